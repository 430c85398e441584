"""The test of the risk on a sample and its labels, whoever gives which label when: nobody can steer it by leaving out.

Labels count in the order of the sample. One that is not there yet is taken for right by the alarm and for wrong by the
proof, so that neither says what it would not say with all of them; what comes after the last label is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hallucination_guard.audit.sample import Sampled
from hallucination_guard.calibration.anytime import Bets, Wealth

__all__ = ["Evidence", "WatchState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchState:
    """Where the test stands.

    Args:
        sampled: records that are asked about.
        labelled: of these, with a label.
        wrong: of these, wrong.
        waiting: without a label, before the last that has one.
        alarm: log of the largest e-value so far against "the risk is at most α".
        proof: log of the e-value now against "the risk so far is at least α".
        kept: whether it is shown now that the answers up to the last label kept the risk on average.
        raised: whether the alarm was ever raised.
    """

    sampled: int
    labelled: int
    wrong: int
    waiting: int
    alarm: float
    proof: float
    kept: bool
    raised: bool


class Evidence:
    """Labels as they come, and what they show; not safe to share between threads.

    Args:
        bets: the rules.
    """

    def __init__(self, bets: Bets) -> None:
        self.bets = bets
        self._chosen: list[Sampled] = []
        self._at: dict[str, int] = {}
        self._labels: dict[int, bool] = {}  # by place in the sample
        self._settled = bets.start()  # after the labels before the first gap
        self._peak = 0.0  # stays where it was when a label is taken back

    def sample(self, more: Sequence[Sampled]) -> None:
        """Take note of what else is asked about."""
        for each in more:
            self._at[each.id] = len(self._chosen)
            self._chosen.append(each)

    def label(self, id: str, correct: bool) -> bool:
        """Take a label; whether it counts: one of a record that was not sampled does not."""
        at = self._at.get(id)
        if at is None:
            return False
        old = self._labels.get(at)
        if old is not None and old != correct:
            # Only a label that is changed can lower the alarm's peak, so it is looked at before: what was raised stays.
            self._peak = max(self._peak, float(self._end().peak))
            self._settled = self.bets.start()
        self._labels[at] = correct
        return True

    def state(self) -> WatchState:
        """What all labels so far show."""
        end = self._end()
        self._peak = max(self._peak, float(end.peak))
        proof = float(self.bets.shown(end))
        return WatchState(
            sampled=len(self._chosen),
            labelled=len(self._labels),
            wrong=sum(not each for each in self._labels.values()),
            waiting=end.labels - len(self._labels),
            alarm=self._peak,
            proof=proof,
            kept=proof >= self.bets.needed,
            raised=self._peak >= self.bets.needed,
        )

    def _end(self) -> Wealth:
        """After the last label."""
        while (at := self._settled.labels) in self._labels:
            self._settled = self._step(self._settled, at)
        end = self._settled
        for at in range(end.labels, max(self._labels, default=-1) + 1):
            end = self._step(end, at)
        return end

    def _step(self, wealth: Wealth, at: int) -> Wealth:
        known = self._labels.get(at)
        return self.bets.after(
            wealth,
            wrong=known is False,
            unless=known is not True,
            probability=self._chosen[at].probability,
        )
