"""``audit sample``: choose at random which answers are to be labelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hallucination_guard.cli.console import short, show, show_json
from hallucination_guard.cli.options import Command, Json, SampledLog

if TYPE_CHECKING:
    from hallucination_guard.audit import AuditRecord

__all__ = ["register", "sample"]

_LINE = "{:12}  {:>11}  {}"


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(sample)


def sample(
    rate: Annotated[float, typer.Option("--rate", metavar="P", help="Probability of each answer, in (0, 1].")],
    log: SampledLog = Path("audit.jsonl"),
    floor: Annotated[
        float | None,
        typer.Option("--floor", metavar="P", help="First draw: the smallest rate ever to be used (default: this one)."),
    ] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", metavar="TEXT", help="First draw: of the choice (default: a random one).")
    ] = None,
    as_json: Json = False,
) -> int:
    """Choose at random which of the answers let through are to be labelled, and list those that are not yet.

    What is chosen goes to a file beside the log (audit.jsonl: audit.sample.jsonl), each with its probability. Each
    answer is decided on once: run it again for what came since. Label all of them with `audit label`; `audit watch`
    says what they show.
    """
    from hallucination_guard.audit import draw_sample, labels_of, sample_path
    from hallucination_guard.audit.sample import answered

    found = draw_sample(log, rate=rate, floor=floor, seed=seed)
    labelled = {each.id for each in labels_of(log)}
    open_ones = {each.id: each.probability for each in found.chosen if each.id not in labelled}
    records = [each for each in answered(log) if each.id in open_ones]
    path = sample_path(log)
    if as_json:
        plain = [(each.id, each.to_json_dict()) for each in records]
        todo = [
            {"id": id, "probability": open_ones[id], "prompt": each["prompt"], "answer": each["answer"]}
            for id, each in plain
        ]
        counts = {"answered": found.answered, "sampled": len(found.chosen)}
        show_json({"file": str(path), "floor": found.floor, **counts, "to_label": todo})
        return 0
    show(f"{len(found.chosen)} of {found.answered} answers let through are sampled: in {path}")
    if records:
        show(f"{len(records)} without a label: hallucination-guard audit label ID right|wrong --log {log}")
        show(_LINE.format("id", "probability", "answer"))
    for each in records:
        show(_LINE.format(each.id[:12], f"{open_ones[each.id]:g}", short(_answer(each))))
    return 0


def _answer(record: AuditRecord) -> str:
    return record.answer if isinstance(record.answer, str) else json.dumps(record.to_json_dict()["answer"])
