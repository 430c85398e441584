"""``audit show``: one record of a log, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hallucination_guard.cli.console import show_json
from hallucination_guard.cli.options import Command, Json, LogPath

__all__ = ["register", "show"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(show)


def show(
    id: Annotated[str, typer.Argument(help="Of the record, or its beginning.")],
    log: LogPath = Path("audit.jsonl"),
    as_json: Json = False,
) -> int:
    """Show one record, whole; always as JSON."""
    from hallucination_guard.audit import find

    show_json(find(log, id).to_json_dict())
    return 0
