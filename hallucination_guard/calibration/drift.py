"""Drift: whether the scores in use still look like those that a certificate was made with.

A two-sample Kolmogorov–Smirnov test of each full window against the reference. Windows do not overlap, and the j-th
is tested at the level rate / (j·(j+1)): these add up to ``rate``, so without drift the chance that it *ever* raises
the alarm is at most ``rate``, however long it runs. Once raised it stays raised. The p-value is counted exactly (ties
only make it larger), in plain Python: what protects a running system should not need an extra.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from hallucination_guard.errors import CalibrationError, ConfigurationError

__all__ = ["DriftMonitor", "ks_statistic", "p_value"]

_log = logging.getLogger("hallucination_guard")


class DriftMonitor:
    """Watches scores; safe to share between threads.

    Args:
        reference: scores of the calibration.
        window: so many new scores make a test.
        rate: the probability of a false alarm, ever.

    Raises:
        CalibrationError: if there is no reference to compare with.
        ConfigurationError: on a window or rate out of range.
    """

    def __init__(self, reference: Iterable[float], *, window: int = 100, rate: float = 0.01) -> None:
        self.reference = tuple(sorted(reference))
        if len(self.reference) < 10 or not all(map(math.isfinite, self.reference)):
            raise CalibrationError(
                f"{len(self.reference)} reference scores are too few to notice drift by, or one is not finite",
                hint="calibrate again; at least 10 scores",
            )
        if isinstance(window, bool) or not isinstance(window, int) or window < 10:
            raise ConfigurationError(f"window is {window!r}", hint="a whole number, at least 10")
        if not 0.0 < rate < 1.0:
            raise ConfigurationError(f"rate is {rate!r}", hint="a probability above 0 and below 1")
        self.window = window
        self.rate = rate
        self._lock = threading.Lock()
        self._seen: list[float] = []
        self._tests = 0
        self._suspended = ""

    @property
    def suspended(self) -> str:
        """Why certificates do not hold any more; empty while they do."""
        return self._suspended

    @property
    def tests(self) -> int:
        """How many windows were tested."""
        return self._tests

    def observe(self, score: float) -> None:
        """Take note of one score; the one that fills a window has it tested."""
        with self._lock:
            if self._suspended:
                return
            if not math.isfinite(score):
                raise CalibrationError(f"the score {score!r} is not a finite number")
            self._seen.append(score)
            if len(self._seen) < self.window:
                return
            seen, self._seen = self._seen, []
            self._tests += 1
            level = self.rate / (self._tests * (self._tests + 1))
            distance = ks_statistic(self.reference, seen)
            p = p_value(distance, len(self.reference), len(seen))
            if p > level:
                return
            self._suspended = (
                f"the last {len(seen)} scores have drifted from the calibration's "
                f"(Kolmogorov–Smirnov distance {distance:.2f}, p {p:.1g})"
            )
        _log.warning(
            "guard.drift: %s; certificates are suspended",
            self._suspended,
            extra={"hallucination_guard": {"distance": round(distance, 4), "p": p, "window": len(seen)}},
        )


def ks_statistic(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest distance between the two empirical distribution functions."""
    one, two = sorted(first), sorted(second)
    return max(abs(bisect_right(one, at) / len(one) - bisect_right(two, at) / len(two)) for at in {*one, *two})


def p_value(distance: float, m: int, n: int) -> float:
    """P(D ≥ distance) for two samples of sizes m and n from one continuous distribution, exactly.

    All orders of the m + n values are equally likely: a walk from (0, 0) to (m, n) that steps into either direction
    in proportion to what is left of it. What leaves the band |i/m − j/n| < distance is summed, so a small p-value
    keeps its digits.
    """
    if distance <= 0.0:
        return 1.0
    edge = round(distance * m * n)  # the distance is a whole number of 1/(m·n)
    out = 0.0
    row = [1.0] + [0.0] * n  # row[j]: the probability of being at (i, j) without having left the band
    for i in range(m + 1):
        below = [0.0] * (n + 1)
        for j, mass in enumerate(row):  # stepping along the row fills in the places that come next
            if not mass:
                continue
            if abs(i * n - j * m) >= edge:
                out += mass
            elif left := m - i + n - j:
                below[j] = mass * (m - i) / left
                if j < n:
                    row[j + 1] += mass * (n - j) / left
        row = below
    return min(out, 1.0)
