"""One of the answers that are drawn beside the one that is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One drawn answer.

    Args:
        text: as a reader sees it.
        without: the text without each of its tokens; none for an empty sample.
        logprobs: log p_t of each token.
    """

    text: str
    without: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.without) != len(self.logprobs) or not all(map(math.isfinite, self.logprobs)):
            raise ValueError(f"a sample has {len(self.without)} tokens and the log probabilities {self.logprobs!r}")

    @property
    def nll(self) -> float:
        """−log p(s)."""
        return -math.fsum(self.logprobs)
