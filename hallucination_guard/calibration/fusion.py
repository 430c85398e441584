"""One score out of what a single pass measures: logistic regression, strongly regularised, on the signals' logs.

Signals are positive and spread over decades, so their logs are taken, held inside the range seen at fitting, and
standardised. The weights w ≥ 0 minimise Σ log loss + |w − w₀|² / 2C over the answers: every signal rises with doubt,
and a few hundred labels cannot tell that one should count against another. w₀ is what is believed before there are
labels: that the likelihood and ParaGrad count alike. With a small C, few labels move little. The fused score is
e^(b + w·x), the odds of being wrong before calibration, so it is positive and rises with doubt like the others. Fitting
needs scipy, applying needs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.probe import Probe
from hallucination_guard.errors import CalibrationError, MissingExtra
from hallucination_guard.values import States

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

__all__ = [
    "FUSED",
    "PROBE",
    "SIGNALS",
    "Fusion",
    "Told",
    "cross_fitted",
    "fit_fusion",
    "fitted",
    "log_of",
    "optimum",
    "prior_of",
    "ranges",
    "signals_of",
]

SIGNALS = (
    "semgrad",
    "paragrad",
    "exgrad",
    "hybridgrad",
    "mean_token_entropy",
    "max_token_entropy",
    "sequence_nll",
    "mean_nll",
    "min_token_logprob",
)
"""What a pass gives; ``min_token_logprob`` enters as its negative."""

FUSED = "fused"
"""The name of the score that a :class:`Fusion` makes."""

PROBE = "probe"
"""The signal that a :class:`~hallucination_guard.calibration.probe.Probe` gives."""

_C = 0.01
# w₀: 1 on a probe's logit, and nearly as much in all on what finds wrong answers on every model and set that was tried
# (docs/evidence.md); the rest have to earn theirs.
_PRIOR = {"paragrad": 0.2, "mean_token_entropy": 0.2, "sequence_nll": 0.2, "mean_nll": 0.2, PROBE: 1.0}
_TINY = 1e-12
_FAR = 50.0  # |b + w·x|: beyond it odds would not fit a float's usual range, and no answer is that certain
_EDGE = 0.01  # of the answers at either end do not stretch a signal's range
_LEAST = 20


class Told(Protocol):
    """What is fitted on: an answer, or a sentence of one, and whether it is right."""

    @property
    def id(self) -> str:
        """Of the question."""

    @property
    def status(self) -> Literal["scored", "unscorable"]:
        """Whether there are scores."""

    @property
    def correct(self) -> bool:
        """The label."""

    @property
    def scores(self) -> Mapping[str, float]:
        """By name."""

    @property
    def states(self) -> States | None:
        """What a probe learns from."""


_Told = TypeVar("_Told", bound=Told)


class Fusion(BaseModel):
    """Fitted weights; plain numbers, JSON in a file, never pickle.

    Args:
        signals: their names, in the order of the next fields.
        low: of each signal's log, below which it counts as this.
        high: likewise, above.
        centre: mean of the log.
        scale: standard deviation of the log.
        weights: w.
        intercept: b.
        answers: n, how many it was fitted on.
        probe: gives the signal of that name, if it is one of them.
        why: why there is a probe or none; empty where nothing had to be decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    signals: tuple[str, ...] = Field(min_length=1)
    low: tuple[float, ...]
    high: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    answers: int = Field(ge=1)
    probe: Probe | None = None
    why: str = ""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sizes = {len(getattr(self, name)) for name in ("signals", "low", "high", "centre", "scale", "weights")}
        if len(sizes) != 1:
            raise ValueError("every signal needs one number of each kind")
        if odd := [name for name in self.signals if name not in (PROBE, *SIGNALS)]:
            raise ValueError(f"unknown signals {odd!r}")
        if (self.probe is not None) != (PROBE in self.signals):
            raise ValueError("there is a probe exactly where it is one of the signals")
        if not all(each > 0 for each in self.scale):
            raise ValueError("a scale is not positive")
        if not all(each >= 0 for each in self.weights):
            raise ValueError("a weight is negative: no signal counts against another")
        if not all(low <= high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError("a signal's range is turned around")
        return self

    @property
    def name(self) -> str:
        """Under which a sentence keeps its fused score; a hash of what computes it is part of it."""
        plain = self.model_dump_json(exclude={"why"})
        return f"{FUSED}:{hashlib.sha256(plain.encode()).hexdigest()[:12]}"

    def score(self, scores: Mapping[str, float], states: States | None = None) -> float:
        """The fused score of one answer; higher = less certain, always positive.

        Args:
            scores: by name.
            states: what the probe reads; not needed where ``scores`` have what it said.

        Raises:
            CalibrationError: if a signal that it was fitted with is missing.
        """
        z = self.intercept
        if self.probe is not None:
            said = scores.get(self.probe.name)
            scores = {**scores, PROBE: self.probe.odds(states) if said is None else said}
        for at, name in enumerate(self.signals):
            held = min(max(log_of(name, scores), self.low[at]), self.high[at])
            z += self.weights[at] * (held - self.centre[at]) / self.scale[at]
        if math.isnan(z):
            raise CalibrationError("the fused score is not a number", hint="look for absurd numbers in its weights")
        return math.exp(min(max(z, -_FAR), _FAR))


def fit_fusion(answers: Sequence[Told]) -> Fusion:
    """Fit weights on labelled answers; those that could not be scored are left out.

    Raises:
        CalibrationError: on fewer than 20 scored answers, only right or only wrong ones, or no signal that all have.
    """
    import numpy as np

    scored = [each for each in answers if each.status == "scored"]
    wrong = np.array([not each.correct for each in scored], float)
    if len(scored) < _LEAST or len(set(wrong)) < 2:
        raise CalibrationError(
            f"{len(scored)} scored answers of which {int(len(scored) - wrong.sum())} right cannot be fused on",
            hint=f"give at least {_LEAST} labelled answers, right and wrong ones",
        )
    return fitted(matrix(scored), wrong, signals_of(scored))


def cross_fitted(
    answers: Sequence[_Told],
    folds: int = 5,
    *,
    seed: int = 0,
    fit: Callable[[Sequence[_Told]], Fusion] = fit_fusion,
    read: Callable[[_Told, Fusion], float] = lambda each, fusion: fusion.score(each.scores, each.states),
) -> list[float]:
    """Fused scores of labelled answers, each from weights that never saw its question; for reporting.

    Args:
        answers: all scored; several attempts at a question fall into the same fold.
        folds: how many parts, 2 or more.
        seed: of the parts.
        fit: how the weights are fitted.
        read: the fused score of an answer; that of the whole answer by default.

    Raises:
        CalibrationError: as :func:`fit_fusion`; also on an answer without scores, or when there are too few answers
            for so many folds.
    """
    import numpy as np

    if odd := [each.id for each in answers if each.status != "scored"]:
        raise CalibrationError(f"the answer to {odd[0]!r} has no scores to fuse", hint="leave unscorable answers out")
    if folds < 2:
        raise CalibrationError(f"folds is {folds!r}", hint="give 2 or more")
    parts = fold_of([each.id for each in answers], folds, seed=seed)
    # One intercept for all: a part with many wrong answers leaves few to its own weights, whose intercept would rank
    # the whole part too low against the others (measured: AUROC .72 instead of .76 on 120 answers).
    common = math.log(sum(not each.correct for each in answers) / max(sum(each.correct for each in answers), 1) or 1.0)
    found: dict[int, float] = {}
    for part in range(folds):
        inside = np.flatnonzero(parts == part).tolist()
        if not inside:
            continue
        rest = [answers[at] for at in np.flatnonzero(parts != part).tolist()]
        fusion = fit(rest).model_copy(update={"intercept": common})
        for at in inside:
            found[at] = read(answers[at], fusion)
    return [found[at] for at in range(len(answers))]


def signals_of(answers: Sequence[Told]) -> tuple[str, ...]:
    """The signals that every answer has.

    Raises:
        CalibrationError: if there is none.
    """
    common = set.intersection(*(set(each.scores) for each in answers))
    found = tuple(name for name in SIGNALS if name in common)
    if not found:
        raise CalibrationError("the answers have no signal in common", hint="score all with one scorer")
    return found


def matrix(answers: Sequence[Told]) -> Floats:
    """The logs of the signals, answers × signals."""
    import numpy as np

    names = signals_of(answers)
    return np.array([[log_of(name, each.scores) for name in names] for each in answers])


def fitted(
    logs: Floats,
    wrong: Floats,
    names: tuple[str, ...],
    *,
    probe: Probe | None = None,
    why: str = "",
) -> Fusion:
    """Weights for signals whose logs (answers × signals) are known.

    Args:
        logs: of the signals.
        wrong: 1 for a wrong answer, else 0.
        names: of the signals.
        probe: of the signal of that name.
        why: see :class:`Fusion`.
    """
    low, high, centre, scale = ranges(logs)
    weights, intercept = optimum((logs.clip(low, high) - centre) / scale, wrong, prior=prior_of(names))
    return Fusion(
        signals=names,
        low=low.tolist(),
        high=high.tolist(),
        centre=centre.tolist(),
        scale=scale.tolist(),
        weights=weights.tolist(),
        intercept=intercept,
        answers=len(wrong),
        probe=probe,
        why=why,
    )


def prior_of(names: Sequence[str]) -> list[float]:
    """w₀: what is believed of these signals before there are labels."""
    return [_PRIOR.get(name, 0.0) for name in names]


def ranges(logs: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Of each signal's log: the ends that it is held inside, then its mean and standard deviation there."""
    import numpy as np

    low, high = np.quantile(logs, [_EDGE, 1.0 - _EDGE], axis=0)
    held = logs.clip(low, high)
    centre, scale = held.mean(axis=0), held.std(axis=0)
    scale[scale < 1e-9] = 1.0  # a signal that says the same of every answer; its weight stays 0
    return low, high, centre, scale


def optimum(x: Floats, wrong: Floats, *, prior: Sequence[float] | None = None, c: float = _C) -> tuple[Floats, float]:
    """The w ≥ 0 and b that minimise Σ log loss + |w − w₀|² / 2C; b is not held down.

    Args:
        x: answers × signals, standardised.
        wrong: 1 for a wrong answer, else 0.
        prior: w₀, one a signal; 0 by default.
        c: C.

    Raises:
        CalibrationError: if it does not converge, or all answers are right, or wrong.
        MissingExtra: if scipy is not installed.
    """
    import numpy as np

    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtra(
            "fitting a fused score needs scipy", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
        ) from None
    full = np.column_stack([x, np.ones(len(x))])
    held = np.append(np.full(x.shape[1], 1.0 / c), 0.0)
    believed = np.append(np.zeros(x.shape[1]) if prior is None else np.array(prior, float), 0.0)

    def loss(at: Floats) -> tuple[float, Floats]:
        z = full @ at
        p = 1.0 / (1.0 + np.exp(-np.clip(z, -500.0, 500.0)))
        away = at - believed
        value = np.sum(np.logaddexp(0.0, z) - wrong * z) + 0.5 * np.sum(held * away * away)
        return float(value), full.T @ (p - wrong) + held * away

    rate = wrong.mean() if len(wrong) else 0.0
    if not 0.0 < rate < 1.0:
        raise CalibrationError("there are only right or only wrong answers", hint="give more labelled answers")
    start = np.append(believed[:-1], math.log(rate / (1.0 - rate)))
    bounds = [(0.0, None)] * x.shape[1] + [(None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9})
    slope = np.where((found.x <= 0.0) & (held > 0.0), np.minimum(found.jac, 0.0), found.jac)
    if not np.abs(slope).max() <= 1e-3 * len(x):  # its own word for success also means that nothing was left to gain
        raise CalibrationError("the fused score did not converge", hint="look for absurd numbers among the scores")
    return found.x[:-1], float(found.x[-1])


def log_of(name: str, scores: Mapping[str, float]) -> float:
    """The log of a signal, which rises with doubt.

    Raises:
        CalibrationError: if it is not there, or has the wrong sign.
    """
    if name not in scores:
        raise CalibrationError(
            f"the fused score reads {name!r} and the answer has {sorted(scores)!r}",
            hint="use the scorer that it was fitted with",
        )
    value = -scores[name] if name == "min_token_logprob" else scores[name]
    if value < 0.0:
        raise CalibrationError(f"{name!r} is {scores[name]!r}, which has the wrong sign for it")
    return math.log(max(value, _TINY))
