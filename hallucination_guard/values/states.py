"""What a model had in mind when it wrote an answer: its middle layers, in as many numbers as a probe can learn from."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["States"]


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """States of one answer, averaged over middle layers, each state first divided by its root mean square.

    Numbers are held as precisely as a file keeps them (float16): what is fitted on a file and what is read of an answer
    are the same.

    Args:
        layers: the l of the h_l that were averaged.
        mean: over the answer's tokens, d numbers.
        last: at its last token, d numbers.

    Raises:
        ValueError: if a number is not finite, or the two differ in length.
    """

    layers: tuple[int, ...]
    mean: tuple[float, ...]
    last: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.layers or len(self.mean) != len(self.last) or not self.mean:
            raise ValueError(f"states of {len(self.layers)} layers have {len(self.mean)} and {len(self.last)} numbers")
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in self.layers):
            raise ValueError(f"the layers of states are {self.layers!r}")
        if not all(map(math.isfinite, self.features)):
            raise ValueError("a state is not finite")
        for name in ("mean", "last"):
            object.__setattr__(self, name, _halves(_bytes(getattr(self, name))))

    @property
    def features(self) -> tuple[float, ...]:
        """All of it, 2d numbers."""
        return (*self.mean, *self.last)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data: the layers, and the numbers as little-endian float16 in Base64."""
        return {"layers": list(self.layers), "float16": base64.b64encode(_bytes(self.features)).decode("ascii")}

    @classmethod
    def from_json_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_json_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        if not isinstance(data, Mapping) or set(data) != {"layers", "float16"}:
            raise ValueError("states are layers and float16")
        layers, written = data["layers"], data["float16"]
        if not isinstance(layers, list | tuple) or not isinstance(written, str):
            raise ValueError("states are a list of layers and a text")
        try:
            numbers = _halves(base64.b64decode(written, validate=True))
        except (binascii.Error, struct.error, ValueError) as error:
            raise ValueError(f"the numbers of states cannot be read: {error}") from None
        half = len(numbers) // 2
        return cls(layers=tuple(layers), mean=numbers[:half], last=numbers[half:])


def _bytes(numbers: tuple[float, ...]) -> bytes:
    try:
        return struct.pack(f"<{len(numbers)}e", *numbers)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"a state is out of float16's range: {error}") from None


def _halves(written: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(written) // 2}e", written)
