"""``audit watch``: what the labels of the sample show, label by label."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hallucination_guard.cli.console import show, show_json
from hallucination_guard.cli.options import Command, Json, SampledLog

if TYPE_CHECKING:
    from hallucination_guard.audit import WatchState

__all__ = ["register", "watch"]

_LINE = "{:>6}  {:12}  {:5}  {:>6}  {:>7}  {:>9}  {:>9}"
_LARGE = 700.0  # e to this power is about the largest float


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(watch)


def watch(
    alpha: Annotated[float, typer.Option("--alpha", metavar="A", help="The risk that is promised.")],
    log: SampledLog = Path("audit.jsonl"),
    level: Annotated[
        float,
        typer.Option("--level", metavar="P", help="Probability of a false alarm ever, and of a false proof ever."),
    ] = 0.05,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="NAME", help="Whose labels, where several judges gave some.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Test on the labels of `audit sample` whether at most A of the answers let through are wrong.

    It may be run after every label, as often as you like. Exit status 1 when the alarm was raised. The e-values are
    evidence that more than A are wrong (alarm) and that fewer are (kept); 1/level is enough.
    """
    from hallucination_guard.audit import RiskWatch, watched

    states = [(each, state) for each, state in watched(log, alpha=alpha, level=level, judge=judge)]
    end = RiskWatch.of_log(log, alpha=alpha, level=level, judge=judge)
    state = end.state
    if as_json:
        steps = [{"id": each.id, "correct": each.correct, **_plain(then)} for each, then in states]
        show_json({"alpha": alpha, "level": level, **_plain(state), "suspended": end.suspended, "labels": steps})
        return int(bool(end.suspended))
    show(_LINE.format("labels", "id", "label", "wrong", "waiting", "alarm", "kept"))
    for each, then in states:
        word = "right" if each.correct else "wrong"
        numbers = (f"{math.exp(min(value, _LARGE)):.3g}" for value in (then.alarm, then.proof))
        show(_LINE.format(then.labelled, each.id[:12], word, then.wrong, then.waiting, *numbers))
    show(_in_words(state, alpha, level) if not end.suspended else f"ALARM: {end.suspended}")
    return int(bool(end.suspended))


def _plain(state: WatchState) -> dict[str, Any]:
    return {
        "labelled": state.labelled,
        "wrong": state.wrong,
        "waiting": state.waiting,
        "log_e_alarm": state.alarm,
        "log_e_kept": state.proof,
        "raised": state.raised,
        "kept": state.kept,
    }


def _in_words(state: WatchState, alpha: float, level: float) -> str:
    counts = f"{state.labelled} of {state.sampled} sampled answers are labelled, {state.wrong} of them wrong"
    if state.kept:
        return f"KEPT: so far at most {alpha:g} of the answers are wrong, said at the level {level:g}; {counts}"
    return f"open: neither alarm nor proof yet; {counts}"
