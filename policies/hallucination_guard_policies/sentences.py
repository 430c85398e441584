"""Which sentences of an answer are doubtful: they are marked, or left out.

Both rules accept, and their decision says which sentences are doubtful and how they are delivered. Marking is the
milder one: a kept sentence whose antecedent was cut reads as if it spoke of something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import (
    JSON,
    LOWER_IS_LESS_CERTAIN,
    Backoff,
    Decision,
    Edit,
    Guarantee,
    Manner,
    Situation,
    Verdict,
)
from hallucination_guard.values.text import can_be_seen
from hallucination_guard_policies._check import count, number
from hallucination_guard_policies.compose import Composable
from hallucination_guard_policies.threshold import unscored

__all__ = ["MARKER", "MarkSentences", "RedactSentences"]

MARKER = " [unverified]"
"""What stands behind a doubtful sentence unless the caller says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sentences(Composable):
    manner: ClassVar[Manner]

    score: str | None = None
    limit: float | None = None
    alpha: float | None = None
    at_most: int = 0
    guarantee: Guarantee = "certified"

    def __post_init__(self) -> None:
        if (self.score is None) != (self.limit is None) or (self.score is None) == (self.alpha is None):
            raise PolicyError(
                f"sentences with score={self.score!r}, limit={self.limit!r}, alpha={self.alpha!r}",
                hint="give either score together with limit, or alpha of a calibration of sentences",
            )
        if self.alpha is not None:
            number("alpha", self.alpha, above=0, most=1)
        if self.limit is not None:
            number("limit", self.limit)
            if not isinstance(self.score, str) or not self.score or self.score in LOWER_IS_LESS_CERTAIN:
                raise PolicyError(
                    f"score is {self.score!r}", hint="give one that rises with doubt, for example mean_nll"
                )
        count("at_most", self.at_most, least=0)
        if self.guarantee not in get_args(Guarantee):
            raise PolicyError(f"guarantee is {self.guarantee!r}", hint="give 'certified' or 'average'")

    @property
    def rule(self) -> str:
        """The stable name under which its decisions are logged."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def edits(self) -> bool:
        """It changes the text that is let through."""
        return True

    @property
    def needs_backoff(self) -> bool:
        """Whether it reads a calibration of sentences."""
        return self.alpha is not None

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        if blind := unscored(verdict.score):
            return Decision(action="abstain", rule=blind.blind, reason=blind.words)
        sentences = verdict.score.sentences
        if not sentences:
            return self._blind("on_unscorable", "the sentences of the answer were not scored")
        score, limit, words = self.score, self.limit, f"{self.score} > {self.limit:g}" if self.limit is not None else ""
        if self.alpha is not None:
            backoff = self._chosen(verdict.backoffs)
            if backoff is None:
                return self._blind("uncalibrated", self._why_none(verdict))
            score, limit = backoff.score, backoff.threshold
            words = f"{score} > {limit:.4g} (back-off {backoff.certificate})"
        assert score is not None and limit is not None  # __post_init__ saw to it
        if any(score not in each.scores for each in sentences):
            known = ", ".join(sorted(sentences[0].scores))
            return self._blind("unknown_score", f"the sentences have no score {score!r}, only {known}")
        doubtful = tuple(at for at, each in enumerate(sentences) if each.scores[score] > limit)
        reason = f"{len(doubtful)} of {len(sentences)} sentences are doubtful: {words}"
        if self.manner == "redact" and len(doubtful) == len(sentences):
            return Decision(action="abstain", rule=self.rule, reason=f"{reason}; nothing is left of the answer")
        edit = Edit(manner=self.manner, doubtful=doubtful, sentences=len(sentences), marker=self._marker())
        return Decision(action="accept", rule=self.rule, reason=reason, edit=edit)

    def _chosen(self, backoffs: tuple[Backoff, ...]) -> Backoff | None:
        """The one that is asked for, or the most permissive of those that promise more."""
        assert self.alpha is not None
        fit = [
            each
            for each in backoffs
            if each.guarantee == self.guarantee and each.alpha <= self.alpha and each.at_most <= self.at_most
        ]
        return max(fit, key=lambda each: each.threshold, default=None)

    def _why_none(self, verdict: Verdict) -> str:
        asked = f"alpha {self.alpha:g}, at most {self.at_most} wrong ({self.guarantee}) was asked for"
        if verdict.sentences_uncovered:
            return f"{asked}, and {verdict.sentences_uncovered}"
        return f"{asked}, and no threshold of sentences promises it: give the guard a calibration of sentences"

    def _blind(self, rule: str, words: str) -> Decision:
        return Decision(action="abstain", rule=rule, reason=words)

    def _marker(self) -> str:
        return ""

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        threshold: dict[str, JSON] = (
            {"above": {"score": self.score, "limit": self.limit}}
            if self.alpha is None
            else {"backoff": {"alpha": self.alpha, "at_most": self.at_most, "guarantee": self.guarantee}}
        )
        marker: dict[str, JSON] = {"marker": self._marker()} if self.manner == "mark" else {}
        return {"policy": type(self).__name__, "rule": self.rule, **threshold, **marker}

    @property
    def redraws(self) -> bool:
        """It makes no further attempts."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkSentences(_Sentences):
    """Accept the answer with a mark behind each doubtful sentence: ``MarkSentences(score="mean_nll", limit=1.2)``.

    Args:
        score: of a sentence; it is doubtful above ``limit``.
        limit: a finite number.
        alpha: or: the threshold of the guard's calibration of sentences that keeps at most this share of responses
            from having more than ``at_most`` wrong sentences without a mark.
        at_most: with ``alpha``: wrong sentences that a response may keep.
        guarantee: with ``alpha``: ``certified`` or ``average``.
        marker: what is written behind a doubtful sentence, white space included; a reader has to see it, so a comment
            or a tag alone is none.

    Raises:
        PolicyError: on both kinds of threshold or none, a number out of range, or an invisible marker.
    """

    manner: ClassVar[Manner] = "mark"
    marker: str = MARKER

    def __post_init__(self) -> None:
        _Sentences.__post_init__(self)
        if not isinstance(self.marker, str) or not can_be_seen(self.marker):
            raise PolicyError(f"marker is {self.marker!r}", hint="give a text that can be seen, for example ' [?]'")

    def _marker(self) -> str:
        return self.marker


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactSentences(_Sentences):
    """Accept the answer without its doubtful sentences; abstain where none is left.

    Args:
        score: of a sentence; it is doubtful above ``limit``.
        limit: a finite number.
        alpha: or: the threshold of the guard's calibration of sentences, as for :class:`MarkSentences`.
        at_most: with ``alpha``: wrong sentences that a response may keep.
        guarantee: with ``alpha``: ``certified`` or ``average``.

    Raises:
        PolicyError: on both kinds of threshold or none, or a number out of range.
    """

    manner: ClassVar[Manner] = "redact"
