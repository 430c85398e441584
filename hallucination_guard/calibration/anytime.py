"""A test of the risk that may be looked at after every label: it raises the alarm, or shows that the risk is kept.

Answers t = 1, 2, … are let through; W_t is 1 if answer t is wrong, r_t = P(W_t = 1 | all before t). A label is asked
for with a probability π_t ≥ floor that is logged, whatever W_t will be. Bets at fixed odds λ are made on each label:

    x_t = (W_t − α) · floor/π_t if it was asked for, else 0        E[x_t | before t] = floor · (r_t − α)
    K_n(λ) = ∏_{t≤n} (1 + λ x_t)                                   the e-process: its mean over a grid of λ

λ > 0 wins when more than α are wrong, λ < 0 when fewer are. Waudby-Smith & Ramdas (arXiv 2010.09686), with weights as
in arXiv 2210.10768 and starts mixed as in arXiv 2203.03532; docs/anytime.md has what is promised, and why.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hallucination_guard.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

__all__ = ["Bets", "RiskTest", "Wealth", "checked_share", "in_words"]

_log = logging.getLogger("hallucination_guard")

_BETS = 32
# Of the largest |λ| that cannot lose all on one label. The low end costs nothing where risks are far apart and finds
# small differences; tried .01 to .1 (alarm) and .05 to .4 (proof): medians move by a tenth.
_ALARM_FROM, _PROOF_FROM, _TO = 0.05, 0.3, 0.95
_FIRST = 0.8  # of the stake bets from the first label on; the rest is for changes that come later
_EVERY = (
    25  # labels between two starts; tried 1: the j-th start has 1/j² of the stake, so fewer starts are found sooner
)


@dataclass(frozen=True, slots=True, eq=False)
class Wealth:
    """What the bets have become; arrays may have leading axes, one stream each.

    Args:
        labels: n, counted so far.
        alarm: log of each bet's stake against "the risk is at most α", all starts together, (…, 32).
        proof: log of each bet's wealth against "the risk is at least α", (…, 32).
        peak: log of the largest e-value of the alarm so far, (…).
    """

    labels: int
    alarm: Floats
    proof: Floats
    peak: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Bets:
    """The rules of the bets, all fixed before the first label.

    Args:
        alpha: α, the risk that is tested.
        level: of a false alarm ever, and of a false proof ever; each has its own.
        floor: the smallest probability with which a label may be asked for; with it alone, weights are 1.

    Raises:
        ConfigurationError: on a value out of range.
    """

    alpha: float
    level: float = 0.05
    floor: float = 1.0

    def __post_init__(self) -> None:
        checked_share("alpha", self.alpha)
        checked_share("level", self.level)
        checked_share("floor", self.floor, one=True)

    @property
    def needed(self) -> float:
        """The log of the e-value that is enough: log 1/level."""
        return -math.log(self.level)

    def start(self) -> Wealth:
        """Before the first label."""
        import numpy as np

        return Wealth(0, np.full(_BETS, math.log(_FIRST)), np.zeros(_BETS), np.zeros(()))

    def after(self, wealth: Wealth, *, wrong: object, probability: object, unless: object = None) -> Wealth:
        """One more label.

        Args:
            wealth: before it.
            wrong: W, (…): what the alarm takes it for.
            probability: π, (…): with which it was asked for, at least the floor.
            unless: what the proof takes it for, where that is another thing: of a label that is not there yet the
                alarm has to assume the best, and the proof the worst.

        Raises:
            InputError: if a probability is below the floor or above 1.
        """
        import numpy as np

        pi = np.asarray(probability, float)
        if not np.all((pi >= self.floor) & (pi <= 1.0)):  # also false for NaN
            raise InputError(
                f"a label was asked for with probability {probability!r}, and the floor is {self.floor:g}",
                hint="the floor is the smallest probability that may occur, fixed before the first label",
            )
        weight = self.floor / pi
        alarm, worst = (np.asarray(each, float) for each in (wrong, wrong if unless is None else unless))
        stakes = wealth.alarm
        if wealth.labels and not wealth.labels % _EVERY:
            begun = wealth.labels // _EVERY
            stakes = np.logaddexp(stakes, math.log((1.0 - _FIRST) / (begun * (begun + 1))))
        stakes = stakes + np.log1p(
            self._odds(_ALARM_FROM, 1.0 / self.alpha) * (weight * (alarm - self.alpha))[..., None]
        )
        kept = wealth.proof + np.log1p(
            -self._odds(_PROOF_FROM, 1.0 / (1.0 - self.alpha)) * (weight * (worst - self.alpha))[..., None]
        )
        labels = wealth.labels + 1
        # What is still in hand for later starts: Σ_{j>J} 1/(j(j+1)) = 1/(J+1).
        in_hand = math.log((1.0 - _FIRST) / ((labels - 1) // _EVERY + 1))
        return Wealth(labels, stakes, kept, np.maximum(wealth.peak, np.logaddexp(_mean(stakes), in_hand)))

    def shown(self, wealth: Wealth) -> Floats:
        """Log of the e-value of the proof now, (…); at least :attr:`needed` where it is shown that the risk is kept."""
        return _mean(wealth.proof)

    @staticmethod
    def _odds(low: float, most: float) -> Floats:
        import numpy as np

        return np.geomspace(low * most, _TO * most, _BETS)


class RiskTest:
    """Tests the risk on labels in the order of their answers; safe to share between threads.

    For who has labels from elsewhere than beside an audit log: those are followed by
    :class:`~hallucination_guard.audit.RiskWatch`. A guard takes either as its ``watch``.

    Args:
        alpha: α.
        level: of a false alarm ever, and of a false proof ever.
        floor: the smallest probability with which a label may be asked for.

    Raises:
        ConfigurationError: on a value out of range.
    """

    def __init__(self, *, alpha: float, level: float = 0.05, floor: float = 1.0) -> None:
        self.bets = Bets(alpha=alpha, level=level, floor=floor)
        self._lock = threading.Lock()
        self._wealth = self.bets.start()
        self._wrong = 0
        self._suspended = ""

    @property
    def alpha(self) -> float:
        """The risk that is tested."""
        return self.bets.alpha

    @property
    def suspended(self) -> str:
        """Why certificates do not hold any more; empty while they do."""
        return self._suspended

    @property
    def labels(self) -> int:
        """How many were counted."""
        return self._wealth.labels

    @property
    def alarm(self) -> float:
        """Log of the largest e-value so far against "the risk is at most α"."""
        return float(self._wealth.peak)

    @property
    def proof(self) -> float:
        """Log of the e-value now against "the risk so far was at least α"."""
        return float(self.bets.shown(self._wealth))

    @property
    def kept(self) -> bool:
        """Whether it is shown now that the answers so far kept the risk on average."""
        return self.proof >= self.bets.needed

    def add(self, *, correct: bool, probability: float) -> None:
        """Count the label of the next answer that was asked about.

        Args:
            correct: whether the answer is right.
            probability: with which it was asked for; it has to be a random choice of the answers let through.

        Raises:
            InputError: if it is no label, or its probability is below the floor.
        """
        if not isinstance(correct, bool):
            raise InputError(f"the label is {correct!r}", hint="give True or False")
        if isinstance(probability, bool) or not isinstance(probability, int | float):
            raise InputError(f"the probability is {probability!r}", hint="give a number")
        with self._lock:
            self._wealth = self.bets.after(self._wealth, wrong=not correct, probability=probability)
            self._wrong += not correct
            if self._suspended or self.alarm < self.bets.needed:
                return
            self._suspended = in_words(self.bets, wrong=self._wrong, labels=self._wealth.labels)
        _log.warning("guard.risk: %s; certificates are suspended", self._suspended)


def in_words(bets: Bets, *, wrong: int, labels: int) -> str:
    """The alarm as a sentence, for verdicts and records."""
    return (
        f"labels show more than {bets.alpha:g} of the answers let through to be wrong "
        f"({wrong} of {labels} sampled ones; a false alarm ever has probability {bets.level:g} at most)"
    )


def checked_share(name: str, value: float, *, one: bool = False) -> float:
    """The value, if it is a number above 0 and below 1 (or 1, if that may be).

    Raises:
        ConfigurationError: otherwise.
    """
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or not (0.0 < value < 1.0 or (one and value == 1)):
        words = "and at most 1" if one else "and below 1"
        raise ConfigurationError(f"{name} is {value!r}", hint=f"give a number above 0 {words}, for example 0.1")
    return float(value)


def _mean(logs: Floats) -> Floats:
    """Log of the mean over the last axis of what is given as logs."""
    import numpy as np

    most = logs.max(axis=-1)
    return np.asarray(most + np.log(np.exp(logs - most[..., None]).mean(axis=-1)))
