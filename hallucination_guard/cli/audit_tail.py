"""``audit tail``: the last records of a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hallucination_guard.cli.console import short, show, show_json
from hallucination_guard.cli.options import Command, Json, LogPath

if TYPE_CHECKING:
    from hallucination_guard.audit import AuditRecord

__all__ = ["register", "tail"]

_LINE = "{:>5}  {:12}  {:19}  {:8}  {:16}  {:>5}  {}"


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(tail)


def tail(
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 10,
    log: LogPath = Path("audit.jsonl"),
    as_json: Json = False,
) -> int:
    """Show the last records."""
    from hallucination_guard.audit import tail as last

    records = last(log, n)
    if as_json:
        show_json([record.to_json_dict() for record in records])
        return 0
    show(_LINE.format("seq", "id", "time (UTC)", "decision", "rule", "conf.", "answer"))
    for record in records:
        show(_line(record))
    return 0


def _line(record: AuditRecord) -> str:
    confidence = "" if record.confidence is None else f"{record.confidence:.2f}"
    answer = record.answer if isinstance(record.answer, str) else json.dumps(record.to_json_dict()["answer"])
    seq = "" if record.seq is None else str(record.seq)
    return _LINE.format(seq, record.id[:12], record.time[:19], record.decision, record.rule, confidence, short(answer))
