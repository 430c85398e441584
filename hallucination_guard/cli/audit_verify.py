"""``audit verify``: whether a log is whole and unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hallucination_guard.cli.console import show, show_json
from hallucination_guard.cli.options import Command, Json, LogPath
from hallucination_guard.errors import InputError

__all__ = ["register", "verify"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(verify)


def verify(
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="The key that the log was written with, if any.")
    ] = None,
    log: LogPath = Path("audit.jsonl"),
    as_json: Json = False,
) -> int:
    """Say whether the log is whole and unchanged."""
    from hallucination_guard.audit import verify as verified

    key = None
    if key_file is not None:
        try:
            key = key_file.read_bytes()  # as they are: a key of random bytes may begin or end with a blank
        except OSError as error:
            raise InputError(f"the key file {str(key_file)!r} cannot be read: {error.strerror}") from None
    found = verified(log, key)
    problems = [{"line": each.line, "what": each.what, "id": each.id} for each in found.problems]
    if as_json:
        show_json({"ok": found.ok, "records": found.records, "problems": problems})
    elif found.ok:
        show(f"{log}: {found.records} records, whole and unchanged")
    else:
        for each in found.problems:
            show(f"{log}:{each.line}: {each.what}" + (f" (record {each.id})" if each.id else ""))
    return 0 if found.ok else 1
