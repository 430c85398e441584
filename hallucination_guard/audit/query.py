"""Read an audit log back: a file, or a folder of chains. What was done twice is read once.

No seal is checked here; :func:`~hallucination_guard.audit.verify` does that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import merge
from pathlib import Path
from typing import BinaryIO

from hallucination_guard.audit.chain import StrPath, lines_backwards, parse
from hallucination_guard.audit.folder import Done, chains_of, done_once
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.errors import AuditError

__all__ = ["find", "records", "tail"]


def records(path: StrPath, *, strict: bool = True) -> Iterator[AuditRecord]:
    """The records of a log, the oldest first, one at a time; those of a folder in the order of their time.

    The log is gone through twice: first for what was done twice, of which the last counts.

    Args:
        path: the log, or a folder of chains.
        strict: False passes over torn lines, which a power cut leaves behind.

    Raises:
        AuditError: the log cannot be read, a line is torn (if ``strict``), or a record has another schema.
    """
    chains = chains_of(path)
    done = done_once(chains)
    reading = [_chain(each, at, done, strict=strict) for at, each in enumerate(chains)]
    return reading[0] if len(reading) == 1 else merge(*reading, key=lambda record: record.time)


def _chain(path: Path, chain: int, done: Done, *, strict: bool) -> Iterator[AuditRecord]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            found = _record(line, f"line {number} of {path}", strict=strict)
            if found is not None and done.counts(chain, number, found.request_id):
                yield found


def tail(path: StrPath, n: int, *, strict: bool = True) -> list[AuditRecord]:
    """The last ``n`` records, the oldest of them first; reads no more of each file than they take.

    Args:
        path: the log, or a folder of chains.
        n: at most so many.
        strict: False passes over torn lines.

    Raises:
        AuditError: as for :func:`records`.
    """
    most = max(n, 0)
    ends = [_end(each, most, strict=strict) for each in chains_of(path)]
    if len(ends) == 1:
        return ends[0][::-1]
    last: dict[tuple[str, str, int], AuditRecord] = {}
    for record in merge(*(end[::-1] for end in ends), key=lambda record: record.time):
        last.pop(record.deed, None)
        last[record.deed] = record
    return list(last.values())[-most:] if most else []


def _end(path: Path, most: int, *, strict: bool) -> list[AuditRecord]:
    """The last ones of a chain, the last first, each deed once."""
    found: dict[tuple[str, str, int], AuditRecord] = {}
    with _opened(path) as file:
        for back, line in enumerate(lines_backwards(file), 1):
            if len(found) >= most:
                break
            record = _record(line, f"line {back} from the end of {path}", strict=strict)
            if record is not None:
                found.setdefault(record.deed, record)
    return list(found.values())


def find(path: StrPath, id_prefix: str) -> AuditRecord:
    """The one record whose id begins with ``id_prefix``; a whole id wins over longer ones that begin with it.

    Torn lines are passed over: the record asked for is not in them. Of what was done twice it is the last.

    Raises:
        AuditError: no record or several fit, or the log cannot be read.
    """
    # Most lines need no parsing: an id that fits is in the line's bytes, as JSON writes it.
    needle = json.dumps(id_prefix)[1:-1].encode("ascii")
    fitting: dict[tuple[str, str, int], AuditRecord] = {}
    for chain in chains_of(path):
        with _opened(chain) as file:
            for number, line in enumerate(file, 1):
                raw = parse(line) if needle in line else None
                # Two are enough to know that the prefix is ambiguous; beyond them only the whole id matters.
                if raw is None or not raw["id"].startswith(id_prefix):
                    continue
                if raw["id"] != id_prefix and len(fitting) >= 2 and raw["id"] not in {each[0] for each in fitting}:
                    continue
                found = _record(line, f"line {number} of {chain}", strict=True)
                if found is None:
                    continue
                before = fitting.get(found.deed)
                if before is None or found.time >= before.time:
                    fitting[found.deed] = found
    whole = [each for each in fitting.values() if each.id == id_prefix]
    if len(one := whole or list(fitting.values())) == 1:
        return one[0]
    if not one:
        raise AuditError(f"no record in {path} has an id that begins with {id_prefix!r}", hint="ids are case-sensitive")
    if whole:
        raise AuditError(f"several records in {path} have the id {id_prefix!r}", hint="verify the log")
    raise AuditError(
        f"several records in {path} have an id that begins with {id_prefix!r}: {one[0].id}, {one[1].id}, …",
        hint="give more of the id",
    )


@contextmanager
def _opened(path: StrPath) -> Iterator[BinaryIO]:
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise AuditError(f"the audit log {path} cannot be read: {error.strerror}", hint="check the path") from error


def _record(line: bytes, where: str, *, strict: bool) -> AuditRecord | None:
    if (raw := parse(line)) is None:
        if strict:
            raise AuditError(f"{where} is torn: it holds no record", hint="strict=False passes over torn lines")
        return None
    try:
        return AuditRecord.from_json_dict(raw)
    except AuditError as error:
        raise AuditError(f"{where}: {error.message}", hint=error.hint) from error
