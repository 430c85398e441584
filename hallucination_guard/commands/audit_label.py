"""``audit label``: say of the answers in a log whether they were right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hallucination_guard.commands.console import show, show_json
from hallucination_guard.errors import InputError

__all__ = ["add"]


def add(audit: Any, *, common: argparse.ArgumentParser, log: argparse.ArgumentParser) -> None:
    """Register the command.

    Args:
        audit: the subparsers below ``audit``.
        common: has ``--json``.
        log: has ``--log``.
    """
    command = audit.add_parser(
        "label",
        parents=[common, log],
        help="say whether answers were right",
        description="Labels go to a file beside the log (audit.jsonl: audit.labels.jsonl); the log is not changed. A "
        "later label of the same record by the same judge replaces the earlier one. Label every attempt of a request: "
        "to fit and evaluate, a request is used as a whole or not at all.",
    )
    command.add_argument("id", nargs="?", help="of the record, or its beginning")
    command.add_argument("label", nargs="?", choices=["right", "wrong"], help="right or wrong")
    command.add_argument(
        "--file", type=Path, help="JSON lines, or .csv with a header: id, label (right or wrong), and maybe by and note"
    )
    command.add_argument("--by", default="human", metavar="NAME", help="the judge (default: %(default)s)")
    command.add_argument("--note", default="", help="why, in words")
    command.set_defaults(run=_label)


def _label(arguments: argparse.Namespace) -> int:
    from hallucination_guard.audit.labels import label, label_all, labels_path, read_labels

    if (arguments.file is None) == (arguments.id is None):
        raise InputError("which answers?", hint="give the ID of a record and right or wrong, or --file")
    if arguments.file is not None:
        given = label_all(arguments.log, read_labels(arguments.file, by=arguments.by, note=arguments.note))
    elif arguments.label is None:
        raise InputError(f"what of {arguments.id!r}?", hint="give right or wrong after the ID")
    else:
        correct = arguments.label == "right"
        given = [label(arguments.log, arguments.id, correct, by=arguments.by, note=arguments.note)]
    path = labels_path(arguments.log)
    if arguments.json:
        show_json({"labels": [each.to_json_dict() for each in given], "file": str(path)})
    elif arguments.file is not None:
        show(f"{len(given)} labels added to {path}")
    else:
        show(f"{given[0].id[:12]} is {arguments.label}, says {arguments.by}: in {path}")
    return 0
