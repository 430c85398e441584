"""``calibrate --for sentences``: labelled responses become back-off thresholds, in a file of their own kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hallucination_guard.cli.console import say, show, show_json
from hallucination_guard.errors import InputError

if TYPE_CHECKING:
    from hallucination_guard.calibration import SentenceCalibration

__all__ = ["fit_sentences"]


def fit_sentences(
    data: Sequence[Path],
    output: Path,
    *,
    score: str | None,
    alphas: Sequence[float] | None,
    at_most: Sequence[int] | None,
    delta: float,
    seed: int,
    refused: Mapping[str, object],
    as_json: bool,
) -> int:
    """Fit, save, and print what is kept; the exit status."""
    from hallucination_guard.calibration import calibrate_sentences, read_responses

    if given := [name for name, value in refused.items() if value is not None]:
        raise InputError(f"{', '.join(given)} does not go with --for sentences", hint="single drafts, one judge a file")
    if score is None or not alphas:
        raise InputError(
            "sentences are calibrated on one score, for the error rates named",
            hint="give --score, for example mean_nll or fused, and --alpha",
        )
    responses = [each for path in data for each in read_responses(path)]
    found = calibrate_sentences(responses, score=score, alphas=alphas, at_most=at_most or (0,), delta=delta, seed=seed)
    found.save(output)
    if as_json:
        show_json({"output": str(output), **found.model_dump(mode="json")})
    else:
        _print(found)
        say(f"written to {output}")
    return 0


def _print(found: SentenceCalibration) -> None:
    show(
        f"{found.responses} responses with {found.sentences} sentences, {found.wrong} of them wrong and "
        f"{found.unchecked} unchecked; judge: {found.judge}; score: {found.score}"
    )
    if found.fusion is not None:
        show(f"weights fitted on {found.fitted} other responses; {found.fusion.why}")
    show()
    show("guarantee   alpha   wrong at most   threshold   failures   at most   kept   right kept   empty responses")
    for each in found.thresholds:
        show(
            f"{each.guarantee:<9}{each.alpha:>8g}{each.at_most:>16}   {each.threshold:<9.4g}{each.failures:>11}"
            f"{each.bound:>10.3f}{each.sentences:>7.0%}{each.right:>13.0%}{each.empty:>18.0%}"
        )
    for refused in found.infeasible:
        show(refused.in_words())
