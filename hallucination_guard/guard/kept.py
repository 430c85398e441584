"""A call between two steps, as plain JSON: what the process that goes on needs to know of it, and nothing else.

The plain form is the fields by their names, all the way down. What was kept for scoring (tensors) is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hallucination_guard.errors import InputError
from hallucination_guard.guard.progress import Progress
from hallucination_guard.values import JSON

__all__ = ["keep", "restore"]

_Kind = TypeVar("_Kind")


def keep(progress: Progress) -> dict[str, JSON]:
    """The plain form; of the time, how much has passed, since another process has another clock."""
    plain = _plain(replace(progress, began=time.perf_counter() - progress.began))
    assert isinstance(plain, dict)
    return plain


def restore(plain: Mapping[str, JSON]) -> Progress:
    """What :func:`keep` gave.

    Raises:
        InputError: if it is something else.
    """
    try:
        progress = _restored(Progress, plain)
    except (TypeError, ValueError, KeyError) as error:
        # By its kind: its words may quote a draft.
        failure = InputError(f"what was kept of a call cannot be read: {type(error).__name__}", hint="ask again")
    else:
        progress.began = time.perf_counter() - progress.began
        return progress
    raise failure


def _plain(value: object) -> JSON:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in _hints(type(value))}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Set):
        return [_plain(each) for each in sorted(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no plain form")


def _restored(kind: type[_Kind], plain: Any) -> _Kind:
    """The value of this type whose plain form this is."""
    made: Any = _value(kind, plain)
    assert isinstance(made, kind)
    return made


def _value(kind: Any, plain: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or kind is JSON:
        return plain
    if origin in (Union, UnionType):
        if plain is None and NoneType in arguments:
            return None
        of = [each for each in arguments if each is not NoneType]
        return _value(of[0], plain) if len(of) == 1 else plain  # several: only JSON itself
    if origin is Literal:
        if plain not in arguments:
            raise ValueError("a word that is none of those there are")
        return plain
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(_value(arguments[0], each) for each in _checked(list, plain))
    if origin is tuple:
        return tuple(_value(each, of) for each, of in zip(arguments, _checked(list, plain), strict=True))
    if origin is set:
        return {_value(arguments[0], each) for each in _checked(list, plain)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: _value(arguments[1], each) for name, each in _checked(dict, plain).items()}
    if origin is list:
        return [_value(arguments[0], each) for each in _checked(list, plain)]
    if is_dataclass(kind):
        made: Any = kind
        hints = _hints(made)
        if set(_checked(dict, plain)) != set(hints):
            raise ValueError(f"other fields than those of {made}")
        return made(**{name: _value(hint, plain[name]) for name, hint in hints.items()})
    return _checked((int, float) if kind is float else kind, plain)


def _checked(kind: Any, plain: Any) -> Any:
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise TypeError(f"a {type(plain).__name__} where a {kind} was kept")
    return plain


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of the fields; not of private ones, which hold what is never kept."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind) if not each.name.startswith("_")}
