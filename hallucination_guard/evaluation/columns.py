"""The scores side by side: for every answer every score, turned so that higher = less certain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hallucination_guard.calibration.fusion import FUSED
from hallucination_guard.calibration.labelled import Labelled
from hallucination_guard.errors import CalibrationError, InputError
from hallucination_guard.values import JSON, LOWER_IS_LESS_CERTAIN

__all__ = ["Columns", "columns"]

_SUMS = ("semgrad", "paragrad", "exgrad", "hybridgrad")
"""The scores that are sums over the answer's tokens and have no mean among the scores; HybridGrad mixes two sums with
weights that do not depend on T, so its mean is its T-th part too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Scores of the same answers.

    Args:
        answers: those that have every score.
        scores: by name, in the order of ``answers``, higher = less certain.
        left_out: why answers were left out, and how many for each reason.
        notes: what is to be said about scores that are missing.
    """

    answers: Sequence[Labelled]
    scores: Mapping[str, Sequence[float]]
    left_out: Mapping[str, int]
    notes: Sequence[str]

    @property
    def wrong(self) -> list[bool]:
        """The label turned, in the order of ``answers``."""
        return [not each.correct for each in self.answers]

    def rows(self) -> Iterator[dict[str, JSON]]:
        """The table as plain data, an answer at a time."""
        for at, each in enumerate(self.answers):
            scores: dict[str, JSON] = {name: float(values[at]) for name, values in self.scores.items()}
            yield {"id": each.id, "wrong": not each.correct, "scores": scores}


def columns(
    answers: Sequence[Labelled],
    *,
    extra: Mapping[str, Mapping[str, float]] | None = None,
    folds: int = 5,
    only: Sequence[str] = (),
) -> Columns:
    """Every score of the answers that have all of them.

    Args:
        answers: labelled; of one model, scorer and judge.
        extra: further scores by name, then by the answer's id, higher = less certain.
        folds: of the fused score, which is fitted on the others' folds.
        only: names of the scores that are wanted; empty for all.

    Raises:
        InputError: if the answers do not belong into one table, nothing is left, or a name is not known.
    """
    from hallucination_guard.evaluation.judges import one_judge

    if not answers:
        raise InputError("there are no labelled answers", hint="evaluate some questions first")
    one_judge([each.judge for each in answers])
    for what, found in (
        ("models", {(each.model.fingerprint, each.model.structure, each.model.template) for each in answers}),
        ("scorers", {str((each.scorer.name, each.scorer.version, dict(each.scorer.settings))) for each in answers}),
        ("policies", {each.policy for each in answers}),
    ):
        if len(found) > 1:
            raise InputError(f"the answers are of {len(found)} {what}", hint="evaluate those of one at a time")
    extra = extra or {}
    left_out: dict[str, int] = {}
    kept = []
    for each in answers:
        lacking = [name for name, values in extra.items() if each.id not in values]
        why = each.reason or (f"no {lacking[0]}" if lacking else "")
        if why:
            left_out[why] = left_out.get(why, 0) + 1
        else:
            kept.append(each)
    if not kept:
        raise InputError(f"none of {len(answers)} labelled answers has every score: {left_out}", hint="see the reasons")
    scores = _single(kept)
    some = {name for each in kept for name in each.scores} - _shared(kept)
    notes = [f"{name} is not in the tables: some answers have it and some do not." for name in sorted(some)]
    if not only or FUSED in only:
        try:
            scores[FUSED] = _fused(kept, folds)
        except CalibrationError as error:
            notes.append(f"No fused score: {error}.")
        else:
            notes.append(
                f"fused: of every answer by weights that were fitted on the other {folds - 1} of {folds} folds."
            )
    scores |= {name: [values[each.id] for each in kept] for name, values in extra.items()}
    if unknown := sorted({*only} - {*scores, FUSED}):
        raise InputError(f"there are no scores {unknown!r}", hint=f"there are {', '.join(sorted(scores))}")
    if only:
        scores = {name: values for name, values in scores.items() if name in only}
    return Columns(answers=kept, scores=scores, left_out=left_out, notes=notes)


def _shared(answers: Sequence[Labelled]) -> set[str]:
    return set.intersection(*(set(each.scores) for each in answers))


def _single(answers: Sequence[Labelled]) -> dict[str, Sequence[float]]:
    shared = _shared(answers)
    found: dict[str, Sequence[float]] = {}
    for name in answers[0].scores:
        if name not in shared:
            continue
        turned = -1.0 if name in LOWER_IS_LESS_CERTAIN else 1.0
        found[f"-{name}" if turned < 0 else name] = [turned * each.scores[name] for each in answers]
        # What one number less is to be divided by is known only of the paper's sum.
        if name in _SUMS and answers[0].scorer.settings.get("reduction", "sum") == "sum":
            found[f"{name}_mean"] = [each.scores[name] / each.length for each in answers]
    found["length"] = [float(each.length) for each in answers]
    return found


def _fused(answers: Sequence[Labelled], folds: int) -> list[float]:
    from hallucination_guard.calibration.fusion import cross_fitted
    from hallucination_guard.calibration.stack import fit_fused

    return list(cross_fitted(answers, folds=folds, fit=fit_fused))
