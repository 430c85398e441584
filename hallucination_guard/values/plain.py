"""Plain data: what JSON can hold, read from outside by one door, and mappings that nobody changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

__all__ = ["JSON", "FrozenDict", "from_json"]

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


def from_json(text: str | bytes) -> Any:
    """What a text from outside says.

    Raises:
        ValueError: on what is no JSON, no UTF-8, or nested too deep to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


class FrozenDict(dict[Any, Any]):
    """A dict that is never changed. Unlike a read-only view it can be copied, pickled and written as JSON."""

    def _refused(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be changed")

    __setitem__ = __delitem__ = __ior__ = _refused
    clear = pop = popitem = setdefault = update = _refused

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[Any, Any]]]:
        return (FrozenDict, (dict(self),))

    def __repr__(self) -> str:
        return repr(dict(self))
