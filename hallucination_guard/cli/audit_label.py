"""``audit label``: say of the answers in a log whether they were right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from hallucination_guard.cli.console import show, show_json
from hallucination_guard.cli.options import Command, Json, LogPath
from hallucination_guard.errors import InputError

__all__ = ["label", "register"]

Word: TypeAlias = Literal["right", "wrong"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(label)


def label(
    id: Annotated[str | None, typer.Argument(help="Of the record, or its beginning.", show_default=False)] = None,
    word: Annotated[Word | None, typer.Argument(metavar="[right|wrong]", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", help="JSON lines, or .csv with a header: id, label (right or wrong), and maybe by and note."
        ),
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="The judge.")] = "human",
    note: Annotated[str, typer.Option("--note", help="Why, in words.", show_default=False)] = "",
    log: LogPath = Path("audit.jsonl"),
    as_json: Json = False,
) -> int:
    """Say whether answers were right.

    Labels go to a file beside the log (audit.jsonl: audit.labels.jsonl); the log is not changed. A later label of the
    same record by the same judge replaces the earlier one. Label every attempt of a request: to fit and evaluate, a
    request is used as a whole or not at all.
    """
    from hallucination_guard.audit.labels import label as label_one
    from hallucination_guard.audit.labels import label_all, labels_path, read_labels

    if (file is None) == (id is None):
        raise InputError("which answers?", hint="give the ID of a record and right or wrong, or --file")
    if file is not None:
        given = label_all(log, read_labels(file, by=by, note=note))
    elif word is None or id is None:
        raise InputError(f"what of {id!r}?", hint="give right or wrong after the ID")
    else:
        given = [label_one(log, id, word == "right", by=by, note=note)]
    path = labels_path(log)
    if as_json:
        show_json({"labels": [each.to_json_dict() for each in given], "file": str(path)})
    elif file is not None:
        show(f"{len(given)} labels added to {path}")
    else:
        show(f"{given[0].id[:12]} is {word}, says {by}: in {path}")
    return 0
