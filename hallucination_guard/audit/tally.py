"""What became of the requests of a log, counted, and how wrong what was let through is as far as it is labelled."""

from __future__ import annotations

from dataclasses import dataclass

from hallucination_guard.errors import ConfigurationError, MissingExtra

__all__ = ["Tally", "clopper_pearson"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of the requests of a log.

    Args:
        requests: all of them.
        accepted: ended with the model's answer.
        abstained: ended without one.
        escalated: were handed on.
        unknown: the rest.
        attempts: drafts that the known ones took.
        redraws: of these, drawn again.
        retrievals: of these, drawn after looking something up.
        right: accepted answers that are labelled right.
        wrong: accepted answers that are labelled wrong.
    """

    requests: int = 0
    accepted: int = 0
    abstained: int = 0
    escalated: int = 0
    unknown: int = 0
    attempts: int = 0
    redraws: int = 0
    retrievals: int = 0
    right: int = 0
    wrong: int = 0

    @property
    def coverage(self) -> float | None:
        """Share of requests that are known to be accepted; None without requests."""
        return self.accepted / self.requests if self.requests else None

    @property
    def coverage_at_most(self) -> float | None:
        """The same if all that is unknown were accepted."""
        return (self.accepted + self.unknown) / self.requests if self.requests else None

    @property
    def mean_attempts(self) -> float | None:
        """Drafts a request, of those whose outcome is known."""
        known = self.requests - self.unknown
        return self.attempts / known if known else None

    @property
    def error(self) -> float | None:
        """Share of wrong ones among the accepted answers that have a label; None without such."""
        labelled = self.right + self.wrong
        return self.wrong / labelled if labelled else None

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Clopper–Pearson interval of :attr:`error`; None without labels.

        It holds if the labelled answers are a random draw of the accepted ones, for one policy fixed beforehand.
        """
        return clopper_pearson(self.wrong, self.right + self.wrong, level) if self.right + self.wrong else None


def clopper_pearson(wrong: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share.

    Args:
        wrong: k.
        of: n, at least 1.
        level: probability with which it holds the true share, at least.

    Raises:
        ConfigurationError: if these cannot be.
        MissingExtra: if scipy is not installed.
    """
    if not (0 <= wrong <= of and of > 0 and 0.0 < level < 1.0):
        raise ConfigurationError(f"an interval for {wrong!r} of {of!r} at the level {level!r}", hint="0 ≤ k ≤ n, n > 0")
    try:
        from scipy.stats import beta
    except ImportError:
        raise MissingExtra(
            "an interval of the error needs scipy", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
        ) from None
    tail = (1.0 - level) / 2
    low = 0.0 if wrong == 0 else float(beta.ppf(tail, wrong, of - wrong + 1))
    high = 1.0 if wrong == of else float(beta.ppf(1.0 - tail, wrong + 1, of - wrong))
    return low, high
