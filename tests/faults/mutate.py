"""Files that almost are what they should be: bytes turned over, and JSON values that nobody would write."""

from __future__ import annotations

import json
from random import Random
from typing import Any

__all__ = ["mutated"]

_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**64,
    10**400,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    " ",
    "\ud800",
    "\x1b[31m\u202e",
    "a" * 5_000,
    [],
    {},
    [[]] * 50,
    {"": {"": {"": 0}}},
)
_BYTES = (
    *(b"\x00", b"\xff\xfe", b"\n", b"\r\n", b'"', b"{", b"}", b"[" * 2_000),
    *(b"\\ud800", b"1e999", b": ", b"&a *a", b"!!"),
)


def mutated(original: bytes, random: Random) -> bytes:
    """``original`` with one to three changes, of values or of bytes."""
    found = original
    for _ in range(random.randint(1, 3)):
        found = _of_values(found, random) if random.random() < 0.6 else _of_bytes(found, random)
    return found


def _of_bytes(data: bytes, random: Random) -> bytes:
    at, length = random.randint(0, len(data)), random.randint(0, 40)
    match random.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + random.choice(_BYTES) + data[at:]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 4:
            return data[:at] + data[at : at + length] + data[at:]
        case _:
            lines = data.splitlines(keepends=True)
            random.shuffle(lines)
            return b"".join(lines)


def _of_values(data: bytes, random: Random) -> bytes:
    """One value of one line (or of the whole text) becomes an odd one, goes, or comes twice; else a byte changes."""
    lines = data.splitlines(keepends=True)
    one = random.randrange(len(lines)) if lines and random.random() < 0.7 else None
    text = data if one is None else lines[one]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _of_bytes(data, random)
    places = list(_places(value))
    if not places:
        return _of_bytes(data, random)
    holder, key = random.choice(places)
    match random.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(("unknown", "", "id", "schema"))] = holder.pop(key)
        case 2:
            _, other = random.choice(places)
            other_holder = next(each for each, name in places if name == other)
            holder[key] = other_holder[other]
        case _:
            holder[key] = random.choice(_ODD)
    try:
        new = json.dumps(value, indent=2 if one is None and b"\n  " in text else None).encode()
    except (ValueError, RecursionError):  # a value that now holds itself
        return _of_bytes(data, random)
    if one is None:
        return new + b"\n"
    return b"".join([*lines[:one], new + b"\n", *lines[one + 1 :]])


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
