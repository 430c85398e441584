"""A folder of chains, read as one log: every process that answers writes its own, and none waits for another.

What was asked again under its request's id, because the process that answered was lost, is in two chains, or twice in
one. It counts once: as it was done last, for what was done before never left. A request that was asked again counts as
its last run has it, and not a record of one run beside a record of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hallucination_guard.audit.chain import StrPath, anchor_path, parse
from hallucination_guard.errors import AuditError, InputError

if TYPE_CHECKING:
    import sqlite3

__all__ = ["Done", "chains_of", "done_once", "one_chain"]

_BESIDE = (".labels.jsonl", ".sample.jsonl")  # of logs that lie in the folder


def chains_of(log: StrPath) -> list[Path]:
    """The chains of a log: the file, or those of the folder.

    A chain whose anchor is left and which is gone itself is among them: whoever reads it finds that it is missing.

    Raises:
        AuditError: a folder without chains, or one that cannot be read.
    """
    path = Path(log)
    if not path.is_dir():
        return [path]
    try:
        names = [each.name for each in path.iterdir()]
    except OSError as error:
        raise AuditError(f"the folder {log} cannot be read: {error.strerror}", hint="check the path") from error
    end = anchor_path("").name
    found = {each.removesuffix(end) for each in names if each.removesuffix(end).endswith(".jsonl")}
    if chains := sorted(each for each in found if not each.endswith(_BESIDE)):
        return [path / each for each in chains]
    raise AuditError(f"the folder {log} holds no log", hint="give an audit log, or a folder of *.jsonl")


def one_chain(log: StrPath) -> None:
    """See that a log is one file.

    Raises:
        InputError: if it is a folder.
    """
    if Path(log).is_dir():
        raise InputError(
            f"{str(log)!r} is a folder of logs, whose records have no order that stays", hint="give one of its files"
        )


@dataclass(frozen=True, slots=True)
class Done:
    """What counts.

    Args:
        passed_over: lines, as chain and number, whose deed is recorded again later.
        runs: of requests that are in several chains, the chain that counts.
    """

    passed_over: AbstractSet[tuple[int, int]]
    runs: Mapping[str, int]

    def counts(self, chain: int, line: int, request_id: str) -> bool:
        """Whether the record in this line does."""
        return (chain, line) not in self.passed_over and self.runs.get(request_id, chain) == chain


def done_once(chains: Sequence[Path]) -> Done:
    """Look through the chains for what was done twice. Memory grows with that, and not with the log.

    Raises:
        AuditError: a chain cannot be read.
    """
    import sqlite3  # here because importing the audit log should not load a database

    passed_over: set[tuple[int, int]] = set()
    # As in verify: a database that spills to a temporary file.
    with closing(sqlite3.connect("")) as known:
        known.executescript(
            "PRAGMA journal_mode = OFF;"
            "CREATE TABLE deed (id TEXT, request TEXT, attempt INTEGER, chain INTEGER, line INTEGER, time TEXT,"
            " PRIMARY KEY (id, request, attempt)) WITHOUT ROWID;"
            "CREATE TABLE run (request TEXT, chain INTEGER, time TEXT, PRIMARY KEY (request, chain)) WITHOUT ROWID;"
        )
        for chain, path in enumerate(chains):
            try:
                with path.open("rb") as file:
                    for line, raw in enumerate(file, start=1):
                        if (record := parse(raw)) is not None:
                            _take(known, record, chain, line, passed_over, several=len(chains) > 1)
            except OSError as error:
                raise AuditError(
                    f"the audit log {path} cannot be read: {error.strerror}", hint="check the path"
                ) from error
        runs = known.execute(
            "SELECT request, chain FROM run"
            " WHERE request IN (SELECT request FROM run GROUP BY request HAVING count(*) > 1) ORDER BY time"
        )
        return Done(frozenset(passed_over), {_back(request): chain for request, chain in runs})


def _take(
    known: sqlite3.Connection,
    record: Mapping[str, Any],
    chain: int,
    line: int,
    passed_over: set[tuple[int, int]],
    *,
    several: bool,
) -> None:
    attempt = record.get("attempt")
    time, request = _text(record.get("time")), _text(record.get("request_id"))
    if several:
        known.execute(
            "INSERT INTO run VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET time = max(time, excluded.time)",
            (request, chain, time),
        )
    # One that no writer gives, or no database holds, is a deed of its own kind: such a line is no record.
    deed = (_text(record["id"]), request, attempt if type(attempt) is int and 0 < attempt < 2**31 else -1)
    if known.execute("INSERT OR IGNORE INTO deed VALUES (?, ?, ?, ?, ?, ?)", (*deed, chain, line, time)).rowcount:
        return
    where = "WHERE id = ? AND request = ? AND attempt = ?"
    before, at, then = known.execute(f"SELECT chain, line, time FROM deed {where}", deed).fetchone()
    if before != chain and then > time:
        passed_over.add((chain, line))
        return
    passed_over.add((before, at))
    known.execute(f"UPDATE deed SET chain = ?, line = ?, time = ? {where}", (chain, line, time, *deed))


def _text(value: object) -> str:
    """A text that a database holds, for it may have half a character in it; in the same order."""
    return str(value).encode("utf-8", "surrogatepass").hex()


def _back(text: str) -> str:
    return bytes.fromhex(text).decode("utf-8", "surrogatepass")
