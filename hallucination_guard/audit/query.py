"""Read an audit log back. No seal is checked here; :func:`~hallucination_guard.audit.verify` does that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from hallucination_guard.audit.chain import StrPath, lines_backwards, parse
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.errors import AuditError

__all__ = ["find", "records", "tail"]


def records(path: StrPath, *, strict: bool = True) -> Iterator[AuditRecord]:
    """The records of a log, the oldest first, one at a time.

    Args:
        path: the log.
        strict: False passes over torn lines, which a power cut leaves behind.

    Raises:
        AuditError: the log cannot be read, a line is torn (if ``strict``), or a record has another schema.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if (found := _record(line, f"line {number} of {path}", strict=strict)) is not None:
                yield found


def tail(path: StrPath, n: int, *, strict: bool = True) -> list[AuditRecord]:
    """The last ``n`` records, the oldest of them first; reads no more of the file than they take.

    Args:
        path: the log.
        n: at most so many.
        strict: False passes over torn lines.

    Raises:
        AuditError: as for :func:`records`.
    """
    with _opened(path) as file:
        read = (
            _record(line, f"line {back} from the end of {path}", strict=strict)
            for back, line in enumerate(lines_backwards(file), 1)
        )
        return list(islice((each for each in read if each is not None), max(n, 0)))[::-1]


def find(path: StrPath, id_prefix: str) -> AuditRecord:
    """The one record whose id begins with ``id_prefix``; a whole id wins over longer ones that begin with it.

    Torn lines are passed over: the record asked for is not in them.

    Raises:
        AuditError: no record or several fit, or the log cannot be read.
    """
    # Most lines need no parsing: an id that fits is in the line's bytes, as JSON writes it.
    needle = json.dumps(id_prefix)[1:-1].encode("ascii")
    fitting: list[AuditRecord] = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            raw = parse(line) if needle in line else None
            # Two are enough to know that the prefix is ambiguous; beyond them only the whole id matters.
            if raw and (raw["id"] == id_prefix or (raw["id"].startswith(id_prefix) and len(fitting) < 2)):
                found = _record(line, f"line {number} of {path}", strict=True)
                fitting += [found] if found else []
    whole = [each for each in fitting if each.id == id_prefix]
    if len(one := whole or fitting) == 1:
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
