"""The hash chain: pure functions over records, lines and files. No lock, no writing; :mod:`.log` does that.

Each record carries its place ``seq`` (from 0), ``prev``, the hash of the record before, and ``hash``, over everything
else in it. A line of the file is the canonical JSON of one record, byte for byte, so that no edit is too small.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from hallucination_guard.errors import AuditError
from hallucination_guard.values import from_json

__all__ = [
    "GENESIS",
    "START",
    "Head",
    "Problem",
    "StrPath",
    "Verification",
    "anchor_line",
    "anchor_path",
    "canonical",
    "is_sealed",
    "lines_backwards",
    "parse",
    "read_anchor",
    "seal",
    "verify",
]

StrPath: TypeAlias = str | os.PathLike[str]

GENESIS = "0" * 64
"""``prev`` of the first record."""

_BLOCK = 1 << 16
_MOST_PROBLEMS = 1000
_LONGEST = 1 << 26  # bytes of a line; longer ones are no records, and would be held in memory


class Head(NamedTuple):
    """Where a chain stands: how many records it has, and the hash of the last one."""

    length: int
    hash: str


START = Head(0, GENESIS)
"""The head of an empty chain."""


def canonical(value: object) -> str:
    r"""The one way to write a value as JSON: sorted keys, no spaces, ASCII only.

    ASCII, with ``\u`` escapes for the rest, and not UTF-8: a lone surrogate, which a broken tokenizer does produce,
    has no UTF-8 form, and the record that shows it must not be the one that is lost. U+2028 and friends, which some
    readers take for line ends, are escaped as well.

    Raises:
        ValueError: on NaN and the infinities, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def seal(record: Mapping[str, Any], seq: int, prev: str, key: bytes | None = None) -> dict[str, Any]:
    """The record with its place in the chain and the hash over everything but ``hash``.

    Args:
        record: plain data; what it says about ``seq``, ``prev`` and ``hash`` is replaced.
        seq: how many records come before it.
        prev: hash of the last of them, :data:`GENESIS` if there is none.
        key: makes the hash an HMAC-SHA256, which only who has the key can compute; without it, SHA-256.
    """
    body = {**record, "seq": seq, "prev": prev}
    return {**body, "hash": _digest(body, key)}


def is_sealed(record: Mapping[str, Any], line: bytes, key: bytes | None = None) -> bool:
    """Whether the line is, to the byte, what :func:`seal` and :func:`canonical` made of the record."""
    try:
        return line.rstrip(b"\n") == canonical(record).encode("ascii") and record["hash"] == _digest(record, key)
    except ValueError:  # 1e999 reads as infinity, and a hand can nest deeper than we write
        return False


def _digest(body: Mapping[str, Any], key: bytes | None) -> str:
    data = canonical({name: value for name, value in body.items() if name != "hash"}).encode("ascii")
    return hashlib.sha256(data).hexdigest() if key is None else hmac.digest(key, data, "sha256").hex()


def parse(line: bytes) -> dict[str, Any] | None:
    """The sealed record in a line, true or not; None if the line is torn or something else altogether."""
    try:
        record = from_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("seq")) is not int:
        return None
    return record if all(isinstance(record.get(name), str) for name in ("id", "prev", "hash")) else None


def lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file from the last to the first, without their newlines, reading no more than is asked for."""
    position = file.seek(0, os.SEEK_END)
    if not position:
        return
    rest: list[bytes] = []  # the blocks of the line that has not begun yet, the last one first
    held, at_end = 0, True
    while position:
        size = min(_BLOCK, position)
        position -= size
        file.seek(position)
        first, *lines = file.read(size).split(b"\n")
        if lines:
            lines[-1] = b"".join((lines[-1], *reversed(rest)))
            rest, held = [], 0
            if at_end and not lines[-1]:
                lines.pop()  # the last line's own newline begins no further line
            yield from reversed(lines)
        at_end = False
        rest.append(first)
        held += len(first)
        if held > _LONGEST:
            raise AuditError(f"a line of the log has more than {_LONGEST >> 20} MiB", hint="give an audit log")
    yield b"".join(reversed(rest))


def anchor_path(log: StrPath) -> Path:
    """Where the anchor of a log is: beside it."""
    return Path(f"{os.fspath(log)}.anchor")


def anchor_line(head: Head, time: str, key: bytes | None = None) -> str:
    """What an anchor file holds: a head, when it was the head (UTC, ISO 8601), and the seal of both."""
    body = {"count": head.length, "head": head.hash, "time": time}
    return canonical({**body, "hash": _digest(body, key)}) + "\n"


def read_anchor(path: StrPath, key: bytes | None = None) -> Head | None:
    """The head that an anchor file vouches for; None if there is no such file.

    Raises:
        AuditError: it cannot be read, or its seal is not right.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AuditError(f"the anchor {path} cannot be read: {error.strerror}") from error
    try:
        anchor = from_json(data)
        head = Head(int(anchor["count"]), anchor["head"])
        right = anchor["hash"] == _digest(anchor, key)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        right = False
    if not right:
        raise AuditError(
            f"the anchor {path} was edited, or sealed with another key",
            hint="give the key that the log was written with; if that is right, keep the file: it is evidence",
        )
    return head


class Problem(NamedTuple):
    """What is wrong with a log, and where.

    Args:
        line: number of the line, from 1; 0 for the log as a whole.
        what: in words.
        id: of the record in that line, if one can be read.
    """

    line: int
    what: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What :func:`verify` found.

    Args:
        records: how many records the log has, good or not.
        problems: in the order of the lines; at most 1000 and a last one that says how many more.
        anchored: how many records the anchor vouches for; 0 without an anchor: the log is then not verifiable.
        repeated: how many records are of something that was done before and is recorded; it counts once on reading.
    """

    records: int
    problems: tuple[Problem, ...]
    anchored: int = 0
    repeated: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: StrPath, key: bytes | None = None, *, anchor: StrPath | None = None) -> Verification:
    """Check a log: every seal, every link, every id, and its end against the anchor.

    Found are: a record that was edited, deleted, inserted or moved; a line that is torn or is no record; an id used
    for two things; a tail that was cut off or rewritten since the anchor. Memory does not grow with the log. A record
    that is being written at this moment can look torn: verify a log at rest, or again.

    Args:
        path: the log.
        key: what it was sealed with, if it was.
        anchor: a copy of its anchor that was kept elsewhere; default: the one beside it.

    Raises:
        AuditError: the log cannot be read.
    """
    import sqlite3  # here because importing the audit log should not load a database

    problems: list[Problem] = []
    more = records = number = repeated = 0

    def wrong(line: int, what: str, record_id: str | None = None) -> None:
        nonlocal more
        if len(problems) < _MOST_PROBLEMS:
            problems.append(Problem(line, what, record_id))
        else:
            more += 1

    try:  # before the log is read: the log may grow meanwhile, and an anchor that is behind is fine
        vouched = read_anchor(anchor_path(path) if anchor is None else anchor, key)
    except AuditError as error:
        vouched = None
        wrong(0, error.message)
    head, witness = START, ""

    try:
        # The ids go into a database that spills to a temporary file, so that memory does not grow with the log.
        with Path(path).open("rb") as file, closing(sqlite3.connect("")) as ids:
            ids.executescript(
                "PRAGMA journal_mode = OFF; CREATE TABLE seen (id BLOB PRIMARY KEY, line INTEGER, deed BLOB)"
                " WITHOUT ROWID"
            )
            for number, line in enumerate(file, 1):
                record = parse(line)
                if record is None:
                    wrong(number, "torn line: not a record")
                    continue
                name, seq, records = record["id"], record["seq"], records + 1
                if not line.endswith(b"\n"):
                    wrong(number, "torn line: no newline at the end", name)
                row = (name.encode("utf-8", "surrogatepass"), number, _deed(record))
                if not ids.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", row).rowcount:
                    first, deed = ids.execute("SELECT line, deed FROM seen WHERE id = ?", row[:1]).fetchone()
                    # A call that was asked again under its id is in its place; a line that was copied is not.
                    if deed == row[2] and seq == head.length:
                        repeated += 1
                    else:
                        wrong(number, f"its id was used before, in line {first}", name)
                if not is_sealed(record, line, key):
                    wrong(number, "edited, or sealed with another key: its hash is not right", name)
                    seq = head.length  # what it says proves nothing; the next record shows whether it belongs here
                elif seq > head.length:
                    wrong(number, f"{seq - head.length} record(s) before it are missing: deleted or moved", name)
                elif seq < head.length:
                    wrong(number, f"inserted or moved: it is number {seq + 1} and stands after {head.length}", name)
                    continue
                elif record["prev"] != head.hash:
                    wrong(number, "does not follow the record before it: one of them was replaced", name)
                head = Head(seq + 1, record["hash"])
                if vouched and vouched.length == head.length:
                    witness = head.hash
    except OSError as error:
        raise AuditError(f"the audit log {path} cannot be read: {error.strerror}", hint="check the path") from error

    if vouched is None and not problems and records:
        wrong(0, "not verifiable: it has no anchor, so a tail may have been cut off without a trace")
    if vouched and head.length < vouched.length:
        wrong(number, f"cut off: the anchor vouches for {vouched.length} record(s), {head.length} are left")
    elif vouched and witness != vouched.hash:
        wrong(number, f"rewritten: record {vouched.length} is not the one that the anchor vouches for")
    if more:
        problems.append(Problem(number, f"… and {more} more problem(s)"))
    return Verification(records, tuple(problems), vouched.length if vouched else 0, repeated)


def _deed(record: Mapping[str, Any]) -> bytes:
    # Not as JSON: a damaged line may hold what JSON has no word for.
    return hashlib.sha256(ascii((record.get("request_id"), record.get("attempt"))).encode("ascii")).digest()
