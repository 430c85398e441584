"""Cascade: likelihood first; the gradient only where the cheap score leaves the decision open.

Both come from one forward pass. Only if the cheap score c lies in the band [low, high] the backward follows: below
``low`` an answer is certain enough and above ``high`` doubtful enough, whatever the gradient g says. One number,
``cascade``, orders all answers: c / low below the band, 1 + g / (g + s) in it, 2 + (c − high) above it, so an answer in
a higher range is less certain than every answer in a lower one (docs/methods.md).

An answer outside the band has likelihoods only: it has no gradient score, and its ``Score.anchor`` is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from types import MappingProxyType
from typing import Any

from hallucination_guard.errors import CalibrationError, ConfigurationError, MissingExtra
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.beginnings import Beginnings
from hallucination_guard.scoring.gradients import Likelihoods, Measured, Thinking, measure_where
from hallucination_guard.scoring.scorers import (
    _VERSION,
    ExGrad,
    HybridGrad,
    ParaGrad,
    SemGrad,
    _Gradient,
    _Measure,
    _Numbers,
    _Scorer,
    cheap_scores,
)
from hallucination_guard.values import Generation, Score

__all__ = ["Cascade", "CascadeFit", "fit_cascade"]

_CHEAP = ("mean_token_entropy", "max_token_entropy", "sequence_nll", "mean_nll")
_GRADIENTS: Mapping[str, type[_Gradient]] = {kind.primary: kind for kind in (SemGrad, ParaGrad, ExGrad, HybridGrad)}
_SETTINGS = frozenset({"layers", "reduction", "weighting", "thinking"})
_LAST_OF_THE_BAND = math.nextafter(2.0, 0.0)
_EXACT = 1e-9  # of a count of pairs
_ROUNDING = 1e-5  # by so much of itself a cheap score may differ between a batch and an answer alone


@dataclass(frozen=True, kw_only=True)
class Cascade(_Scorer):
    """The gradient where it could change the decision, the likelihood elsewhere. See docs/methods.md.

    A generation needs an anchor, whatever its cheap score turns out to be.

    Args:
        cheap: c, a likelihood score that rises with doubt: ``mean_token_entropy``, ``max_token_entropy``,
            ``sequence_nll`` or ``mean_nll``.
        band: (low, high), both inside; (0, inf) is always. It belongs to one model and one kind of question:
            :func:`fit_cascade` finds it.
        gradient: SemGrad, ParaGrad, ExGrad or HybridGrad.
        scale: s.

    Raises:
        ConfigurationError: if a setting is out of range.
    """

    primary = "cascade"

    cheap: str = "mean_token_entropy"
    band: tuple[float, float]
    gradient: _Gradient = field(default_factory=HybridGrad)
    scale: float = 1e-3

    def __post_init__(self) -> None:
        _check_cheap(self.cheap)
        if not isinstance(self.gradient, tuple(_GRADIENTS.values())):
            raise ConfigurationError(
                f"the cascade's gradient is {self.gradient!r}", hint="SemGrad(), ParaGrad(), ExGrad() or HybridGrad()"
            )
        try:
            low, high = map(float, self.band)
        except (TypeError, ValueError):
            raise ConfigurationError(f"the band is {self.band!r}", hint="two numbers, (low, high)") from None
        if not (0.0 <= low <= high and low < math.inf):  # also false for NaN
            raise ConfigurationError(f"the band is {self.band!r}", hint="0 <= low <= high; only high may be infinite")
        if not 0.0 < self.scale < math.inf:
            raise ConfigurationError(f"the scale is {self.scale!r}", hint="a positive number")
        object.__setattr__(self, "band", (low, high))  # whole numbers would make another identity

    @property
    def settings(self) -> dict[str, str]:
        """Every setting that changes a number, the gradient's under ``gradient_…``."""
        low, high = self.band
        return {
            "cheap": self.cheap,
            "low": str(low),
            "high": str(high),
            "scale": str(float(self.scale)),
            "gradient": self.gradient.primary,
            **{f"gradient_{key}": value for key, value in self.gradient.settings.items()},
        }

    def _measure(self, model: WhiteBoxModel, generations: Sequence[Generation]) -> list[_Numbers]:
        return [self._numbers(each) for each in measure_where(model, generations, self.gradient, self._undecided)]

    def _grown(self, model: WhiteBoxModel) -> _Measure:
        grown = Beginnings(model, self.gradient)
        return lambda _, generations: [self._numbers(grown(each, self._undecided)) for each in generations]

    @property
    def thinking(self) -> Thinking:
        """As the gradient has it."""
        return self.gradient.thinking

    def _undecided(self, likelihoods: Likelihoods) -> bool:
        low, high = self.band
        return low <= cheap_scores(likelihoods.entropies, likelihoods.logprobs)[self.cheap] <= high

    def _numbers(self, found: Likelihoods) -> _Numbers:
        if isinstance(found, Measured):
            scores = _Numbers.of_gradient(found).scores
        else:
            scores = cheap_scores(found.entropies, found.logprobs)
        gradient = scores.get(self.gradient.primary)
        return _Numbers(
            scores={**scores, self.primary: _number(scores[self.cheap], gradient, self.band, self.scale)},
            entropies=found.entropies,
            logprobs=found.logprobs,
            prefix=None if gradient is None else found.prefix,
            states=found.states,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeFit:
    """A band, how often the gradient runs with it, and what that costs; as counted on the answers it was fitted on.

    The band was chosen on these very answers, so on others expect the loss to be a little larger: measure it there.

    Args:
        cheap: the score that is looked at first.
        gradient: the score that is asked in the band.
        settings: of the gradient.
        band: (low, high).
        scale: see :class:`Cascade`: the median of the gradient's score in the band.
        keep: the AUROC that was allowed to be lost.
        n: labelled answers used.
        share: the part of them on which the gradient runs. 0: the cheap score alone keeps what is to be kept.
        auroc_gradient: of wrong answers, the gradient always run.
        auroc_cheap: the gradient never run.
        auroc_cascade: with this band.
    """

    cheap: str
    gradient: str
    settings: Mapping[str, str]
    band: tuple[float, float]
    scale: float
    keep: float
    n: int
    share: float
    auroc_gradient: float
    auroc_cheap: float
    auroc_cascade: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def cost(self) -> float:
        """AUROC lost against always running the gradient; negative where the cascade is the better score."""
        return self.auroc_gradient - self.auroc_cascade

    def scorer(self) -> Cascade:
        """The cascade with this band and the gradient it was fitted with."""
        settings: dict[str, Any] = dict(self.settings)
        gradient = _GRADIENTS[self.gradient](**settings)
        return Cascade(cheap=self.cheap, band=self.band, gradient=gradient, scale=self.scale)


def fit_cascade(
    scores: Sequence[Score],
    correct: Sequence[bool],
    *,
    cheap: str = "mean_token_entropy",
    gradient: str = "hybridgrad",
    keep: float = 0.005,
) -> CascadeFit:
    """Find the band that runs the gradient on as few answers as possible and loses at most ``keep`` of its AUROC.

    Every band is looked at whose ends lie between two neighbouring cheap scores (that differ by more than rounding), up
    to n² / 2 of them; of those that run the gradient equally seldom, the one with the higher AUROC is taken.

    Args:
        scores: of labelled answers of one model by one gradient scorer, which gives the cheap scores as well; what
            could not be scored is left out.
        correct: whether each answer was right.
        cheap: see :class:`Cascade`.
        gradient: ``semgrad``, ``paragrad``, ``exgrad`` or ``hybridgrad``.
        keep: AUROC that may be lost against always running the gradient, in [0, 1).

    Raises:
        CalibrationError: if there are too few answers, only right or only wrong ones, or if they were not all scored
            by one gradient scorer.
        ConfigurationError: if ``cheap``, ``gradient`` or ``keep`` is out of range.
        MissingExtra: if scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise MissingExtra(
            "fitting a cascade needs scikit-learn", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
        ) from None
    _check_cheap(cheap)
    if gradient not in _GRADIENTS:
        raise ConfigurationError(f"the gradient is {gradient!r}", hint=f"one of {', '.join(map(repr, _GRADIENTS))}")
    if not 0.0 <= keep < 1.0:
        raise ConfigurationError(f"keep is {keep!r}", hint="the AUROC that may be lost, in [0, 1)")
    pairs = [(each, not right) for each, right in zip(scores, correct, strict=True) if each.status == "scored"]
    wrong = [label for _, label in pairs]
    if len(pairs) < 20 or len(set(wrong)) < 2:
        raise CalibrationError(
            f"{len(pairs)} scored answers of which {len(wrong) - sum(wrong)} right cannot be fitted on",
            hint="give at least 20 labelled answers, right and wrong ones",
        )
    settings = _settings_of([each for each, _ in pairs])
    if any(name not in each.scores for each, _ in pairs for name in (cheap, gradient)):
        raise CalibrationError(
            f"not every answer has both {cheap!r} and {gradient!r}", hint="score all with one gradient scorer"
        )
    cheaps = [each.scores[cheap] for each, _ in pairs]
    gradients = [each.scores[gradient] for each, _ in pairs]
    always, never = float(roc_auc_score(wrong, gradients)), float(roc_auc_score(wrong, cheaps))
    low, high = band = _narrowest(cheaps, gradients, wrong, need=always - keep - never)
    asked = [g for c, g in zip(cheaps, gradients, strict=True) if low <= c <= high]
    scale = median(asked or gradients) or 1.0
    numbers = [_number(c, g if low <= c <= high else None, band, scale) for c, g in zip(cheaps, gradients, strict=True)]
    return CascadeFit(
        cheap=cheap,
        gradient=gradient,
        settings=settings,
        band=band,
        scale=scale,
        keep=keep,
        n=len(pairs),
        share=len(asked) / len(pairs),
        auroc_gradient=always,
        auroc_cheap=never,
        auroc_cascade=float(roc_auc_score(wrong, numbers)),
    )


def _number(cheap: float, gradient: float | None, band: tuple[float, float], scale: float) -> float:
    """The number that orders all answers; ``gradient`` is None exactly outside the band."""
    low, high = band
    if gradient is not None:
        return min(1.0 + gradient / (gradient + scale), _LAST_OF_THE_BAND)
    if cheap < low:
        return max(cheap, 0.0) / low  # an entropy can be rounded below 0
    return 2.0 + (cheap - high)


def _narrowest(
    cheap: Sequence[float], gradient: Sequence[float], wrong: Sequence[bool], *, need: float
) -> tuple[float, float]:
    """The band with the fewest answers whose cascade has at least ``need`` more AUROC than the cheap score.

    Two answers that are not both in the band are ordered as the cheap score orders them. So with the answers sorted by
    it, the band of ranks i … j−1 gains, in pairs of a wrong and a right answer put in order, the sum over the pairs
    within it of (ordered by g) − (ordered by c); it grows with j by a sum over the pairs of one answer more.
    """
    import numpy as np  # scikit-learn brings it

    order = np.argsort(np.asarray(cheap), kind="stable")
    c, g, y = (np.asarray(each, dtype=float)[order] for each in (cheap, gradient, wrong))
    n = len(c)
    ends: dict[int, float] = {0: 0.0, n: math.inf}  # how many answers lie below, and where to cut
    for at, (below, above) in enumerate(pairwise(c.tolist()), start=1):
        if above - below > _ROUNDING * above:
            ends[at] = (below + above) / 2.0
    threshold = need * float(y.sum() * (n - y.sum())) - _EXACT
    inner = [at for at in ends if 0 < at < n]
    if threshold <= 0.0 and inner:
        cut = ends[min(inner, key=lambda at: abs(2 * at - n))]  # anywhere would do
        return cut, cut
    begins = np.array(sorted(ends))[:-1]
    gain = np.zeros(n)  # of the band from rank i to the answer last added
    best = (n + 1, 0.0, 0, n)
    for j in range(n):
        signs = np.sign(g[: j + 1] - g[j]) - np.sign(c[: j + 1] - c[j])
        more = (y[: j + 1] - y[j]) * signs / 2.0
        gain[: j + 1] += np.cumsum(more[::-1])[::-1]
        if j + 1 in ends:
            enough = begins[(begins <= j) & (gain[begins] >= threshold)]
            if enough.size:
                begin = int(enough[-1])  # the narrowest that ends here
                best = min(best, (j + 1 - begin, -float(gain[begin]), begin, j + 1))
    _, _, begin, end = best
    return ends[begin], ends[end]


def _settings_of(scores: Sequence[Score]) -> dict[str, str]:
    """The settings of the one gradient scorer that gave all these."""
    found = {
        json.dumps([each.scorer.name, each.scorer.version, dict(each.scorer.settings)], sort_keys=True): each.scorer
        for each in scores
    }
    if len(found) > 1:
        raise CalibrationError("the answers were scored by different scorers", hint="score all with one scorer")
    [scorer] = found.values()
    if scorer.name not in _GRADIENTS or scorer.version != _VERSION or not scorer.settings.keys() <= _SETTINGS:
        raise CalibrationError(
            f"the answers were scored by {scorer.name!r} version {scorer.version!r}, which is no gradient scorer",
            hint="score them all with HybridGrad()",
        )
    return dict(scorer.settings)


def _check_cheap(name: str) -> None:
    if name not in _CHEAP:
        raise ConfigurationError(f"the cheap score is {name!r}", hint=f"one of {', '.join(map(repr, _CHEAP))}")
