"""Parity: whether the server still computes what the model here computes, by the log-probabilities of its own tokens.

Of one answer, the *distance* is the mean over its tokens of |log p_server − log p_here|, each capped at 1 nat. At start
a few probe answers give a tolerance: twice the largest of their distances, at least 1e-4. By exchangeability an honest
answer exceeds the largest of n probes with a chance of at most 1/(n+1); twice the largest, far more seldom. Where it
would be .1 or more there is none: it would be as wide as the distance of another model.

One answer proves little, so the watch counts (a CUSUM of signs): +1 beyond the tolerance, −1/4 within, never below 0;
at 4 it alarms. So a pair that no longer fits is suspended after 4 requests, and one of whose answers fewer than 1 in 5
are beyond drifts to 0. Once raised the alarm stays until the sidecar is started again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

__all__ = ["FLOOR", "MOST", "ParityWatch", "distance", "tolerance"]

FLOOR = 1e-4
"""The least tolerance, in nats a token: what float32 kernels differ by."""
MOST = 0.1
"""Where the probes' own mean is beyond this, in nats a token, the server runs another model.

So a tolerance as large would let answers of another model pass for honest ones: then there is none.
"""

_CAP = 1.0
_BACK = 0.25
_ALARM = 4.0


def distance(theirs: Sequence[float | None], ours: Sequence[float]) -> float | None:
    """How far apart the log-probabilities of one answer are, in nats a token; None where most cannot be compared.

    Args:
        theirs: of the server, a token each; None where it gave none. It may have drawn more tokens than were delivered.
        ours: of the model here. Where the beginning of the answer (thinking) is not scored, of its last tokens.
    """
    pairs = [(each, own) for each, own in zip(theirs, ours, strict=False) if each is not None]
    if not pairs or 2 * len(pairs) < len(ours):  # else a server would choose which of its tokens are looked at
        return None
    apart = [min(abs(each - own), _CAP) if math.isfinite(each) else _CAP for each, own in pairs]
    return math.fsum(apart) / len(apart)


def tolerance(distances: Sequence[float]) -> float:
    """What an honest answer stays within, from those of the probes."""
    return max(FLOOR, 2.0 * max(distances))


class ParityWatch:
    """Counts the answers that are beyond the tolerance; safe to share between threads.

    Args:
        tolerance: nats a token.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.compared = 0
        self.beyond = 0
        self._sum = 0.0
        self._suspended = ""
        self._lock = threading.Lock()

    @property
    def suspended(self) -> str:
        """Why nothing is scored any more; empty while it is."""
        return self._suspended

    def observe(self, apart: float | None) -> None:
        """Take note of one answer's distance; None, where too little could be compared, is beyond the tolerance."""
        with self._lock:
            off = apart is None or apart > self.tolerance
            self.compared += 1
            self.beyond += off
            self._sum = self._sum + 1.0 if off else max(0.0, self._sum - _BACK)
            if self._sum >= _ALARM and not self._suspended:
                last = "came without any" if apart is None else f"{apart:.2g}"
                self._suspended = (
                    f"the log-probabilities of the server are no longer ours: of {self.compared} answers {self.beyond} "
                    f"were more than {self.tolerance:.2g} nats a token apart, the last {last}"
                )
