"""``demo``: a small model with and without a guard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hallucination_guard.cli.console import load, progress, say, short, show, show_json
from hallucination_guard.cli.options import AuditPath, Command, Json, ModelChoice

if TYPE_CHECKING:
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.demo import Row, Summary
    from hallucination_guard.model import WhiteBoxModel

__all__ = ["demo", "register"]

_COLUMNS = {"question": 44, "answer of the model": 28, "conf.": 5, "action": 18, "judged": 8}
"""Of the table: their widths in characters."""


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(demo)


def demo(
    audit: AuditPath = Path(".demo/audit.jsonl"),
    confidence: Annotated[float, typer.Option("--confidence", help="Let through from here up.")] = 0.5,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the calibration here instead of using the shipped one.")
    ] = False,
    save_calibration: Annotated[
        Path | None, typer.Option("--save-calibration", metavar="FILE", help="Where to keep what --fit fitted.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show a small model with and without a guard."""
    from hallucination_guard.demo import calibrated, run, shipped, summarise

    model = load(ModelChoice())
    calibration = (None if fit else calibrated(model)) or _fitted(model)
    if save_calibration is not None:
        calibration.save(save_calibration)
    rows = []
    with _table(len(shipped("demo")), hidden=as_json) as add:
        for row in run(model, calibration, audit, confidence=confidence):
            rows.append(row)
            add(row)
    summary = summarise(rows)
    if as_json:
        show_json(
            {
                **asdict(summary),
                "calibrated_on": calibration.examples,
                "confidence": confidence,
                "audit": str(audit),
                "rows": [_as_json(row) for row in rows],
            }
        )
    else:
        show()
        show(f"threshold: confidence {confidence:g}, fitted on {calibration.examples} answers to other questions")
        _print(summary)
        show(f"audit log: {audit}  (hallucination-guard audit tail --log {audit})")
    return 0


def _fitted(model: WhiteBoxModel) -> Calibration:
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.demo import fit, prompts_to_fit

    say("fitting the calibration on this machine, on other questions than those of the demo")
    with progress("fitting", len(prompts_to_fit())) as done:
        for step in fit(model):
            if isinstance(step, Calibration):
                return step
            done(step)
    raise AssertionError("fitting ends with a calibration")


def _print(summary: Summary) -> None:
    show(f"{'':34}{'without guard':>14}{'with guard':>12}")
    show(f"{'wrong answers let through':34}{summary.wrong_without:>14}{summary.wrong_with:>12}")
    show(f"{'right answers let through':34}{summary.right_without:>14}{summary.right_with:>12}")
    show(f"{'seconds a question':34}{summary.seconds_without:>14.2f}{summary.seconds_with:>12.2f}")
    show(
        f"right answers withheld: {summary.withheld_right}; questions looked up: {summary.retrieved} of "
        f"{summary.questions}; scoring took {summary.score_share:.0%} of the generating time"
    )


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "id": row.question.id,
        "question": row.question.query,
        "without_guard": row.bare,
        "without_guard_correct": row.bare_correct,
        "answer": row.outcome.text,
        "correct": row.correct,
        "confidence": row.outcome.confidence,
        "action": row.outcome.decision.action,
        "rule": row.outcome.decision.rule,
        "attempts": row.outcome.attempts,
        "retrieved": list(row.outcome.retrieved),
    }


def _cells(row: Row) -> tuple[str, ...]:
    outcome = row.outcome
    confidence = "" if outcome.confidence is None else f"{outcome.confidence:.2f}"
    action = f"retrieve, {outcome.decision.action}" if outcome.retrieved else outcome.decision.action
    judged = {True: "right", False: "WRONG", None: "withheld"}[row.correct]
    cells = (row.question.query, outcome.generation.text, confidence, action, judged)
    return tuple(short(cell, width) for cell, width in zip(cells, _COLUMNS.values(), strict=True))


@contextmanager
def _table(total: int, *, hidden: bool) -> Iterator[Callable[[Row], None]]:
    """Rows as they come: on a terminal a table that grows, in a pipe a line each."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def line(values: Sequence[str]) -> str:
        padded = (f"{value:{width}}" for value, width in zip(values, _COLUMNS.values(), strict=True))
        return "  ".join(padded).rstrip()

    if hidden:
        yield lambda row: None
    elif console.is_terminal:
        table = Table(*_COLUMNS, box=None)
        with Live(table, console=console, vertical_overflow="visible") as live:

            def grow(row: Row) -> None:
                table.add_row(*map(Text, _cells(row)))
                table.caption = f"{table.row_count} of {total}"
                live.refresh()

            yield grow
    else:
        show(line(tuple(_COLUMNS)))

        def write(row: Row) -> None:
            show(line(_cells(row)))
            sys.stdout.flush()

        yield write
