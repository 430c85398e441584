"""The fused score in two stages: a probe's logit first, then the signals beside it, none of them turned around.

In one regression a probe of a thousand weights drowns the few scores of the output (arXiv 2507.03998). So its logits
are found out of fold, and then they are one more signal of the fusion. The probe is kept only where the result ranks
better than the best single score, by the lower end of a paired interval over questions; else the others are fused
without it. Where the likelihood alone ranks better than these, by the same measure, it stands alone. Only the
likelihood is asked: the best of nine on a few labels is the luckiest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.fusion import (
    PROBE,
    Fusion,
    Told,
    fit_fusion,
    fitted,
    matrix,
    optimum,
    prior_of,
    ranges,
    signals_of,
)
from hallucination_guard.calibration.probe import fit_probe
from hallucination_guard.calibration.ranking import auroc, gain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

__all__ = ["fit_fused"]

_LIKELIHOOD = "sequence_nll"  # the one score that may stand alone
_FOLDS, _SEED = 5, 2  # of the questions
_LEAST = 40  # answers, and
_OF_A_KIND = 8  # questions with a right answer and questions with a wrong one, at the least, for more than all scores
_LEVEL = 0.5  # of the interval: docs/evidence.md has what other levels cost and bring


def fit_fused(answers: Sequence[Told]) -> Fusion:
    """Fit the fused score, with a probe where these answers show that it helps; ``why`` says what was decided.

    Args:
        answers: labelled; those that could not be scored are left out.

    Raises:
        CalibrationError: as :func:`~hallucination_guard.calibration.fusion.fit_fusion`.
        MissingExtra: if scikit-learn or scipy is not installed.
    """
    import numpy as np

    plain = fit_fusion(answers)
    scored = [each for each in answers if each.status == "scored"]
    wrong = np.array([not each.correct for each in scored])
    ids = [each.id for each in scored]
    # Questions are counted, not answers: what is left out in a fold is a question with all its answers.
    few = min(len({name for name, own in zip(ids, wrong, strict=True) if own == kind}) for kind in (True, False))
    if len(scored) < _LEAST or few < _OF_A_KIND or _one_sided(wrong, ids):
        had = f"{len(scored)} labels, {few} questions of the rarer kind"
        return plain.model_copy(update={"why": f"no probe: {had}, are too few"})
    names, signals = signals_of(scored), matrix(scored)
    states = [each.states for each in scored if each.states is not None]
    if len(states) < len(scored):
        why = "no probe: not every answer has its states"
    else:
        probe, logits = fit_probe(states, wrong.tolist(), ids)
        both, logs = (PROBE, *names), np.column_stack([logits, signals])
        at = max(range(signals.shape[1]), key=lambda column: auroc(signals[:, column], wrong))
        over = gain(_left_out(logs, wrong, ids, prior_of(both)), signals[:, at], wrong, ids, level=_LEVEL)
        said = f"AUROC {over} over {names[at]} on {len(scored)} answers"
        if over.low > 0.0:
            return fitted(logs, wrong.astype(float), both, probe=probe, why=f"with a probe: {said}")
        why = f"no probe: with one, {said}"
    if _LIKELIHOOD in names:
        alone = signals[:, names.index(_LIKELIHOOD)]
        over = gain(alone, _left_out(signals, wrong, ids, prior_of(names)), wrong, ids, level=_LEVEL)
        if over.low > 0.0:
            why = f"{_LIKELIHOOD} alone: AUROC {over} over all scores fused; {why}"
            return fitted(alone[:, None], wrong.astype(float), (_LIKELIHOOD,), why=why)
    return plain.model_copy(update={"why": f"{why}; all scores fused"})


def _one_sided(wrong: NDArray[np.bool_], ids: Sequence[str]) -> bool:
    """Whether some fold leaves only right or only wrong answers to learn from."""
    parts = fold_of(ids, _FOLDS, seed=_SEED)
    return any(len(set(wrong[parts != part].tolist())) < 2 for part in range(_FOLDS))


def _left_out(logs: Floats, wrong: NDArray[np.bool_], ids: Sequence[str], prior: Sequence[float]) -> Floats:
    """What the second stage says of each answer, with weights that were fitted on other questions."""
    import numpy as np

    parts, found = fold_of(ids, _FOLDS, seed=_SEED), np.zeros(len(wrong))
    for part in range(_FOLDS):
        inside, rest = parts == part, parts != part
        if not inside.any():
            continue
        low, high, centre, scale = ranges(logs[rest])
        weights, _ = optimum((logs[rest].clip(low, high) - centre) / scale, wrong[rest].astype(float), prior=prior)
        found[inside] = (logs[inside].clip(low, high) - centre) / scale @ weights
    return found
