"""Long vectors in a JSON file: little-endian float32 in Base64, a third of what digits would take."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

__all__ = ["Numbers"]


def _unpacked(given: object) -> object:
    if not isinstance(given, str):
        return given
    try:
        written = base64.b64decode(given, validate=True)
        return struct.unpack(f"<{len(written) // 4}f", written)
    except (binascii.Error, struct.error) as error:
        raise ValueError(f"the numbers cannot be read: {error}") from None


def _single(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """As precisely as they are kept, so that what was fitted and what is loaded are the same."""
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    try:
        return struct.unpack(f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}f", *numbers))
    except OverflowError as error:
        raise ValueError(f"a number is out of float32's range: {error}") from None


def _packed(numbers: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode("ascii")


Numbers: TypeAlias = Annotated[
    tuple[float, ...], BeforeValidator(_unpacked), AfterValidator(_single), PlainSerializer(_packed, when_used="json")
]
"""A vector of finite numbers in single precision."""
