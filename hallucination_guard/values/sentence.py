"""The sentences of an answer: what was measured of each, which are doubtful, and how the text is delivered then."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from hallucination_guard.values.plain import JSON, FrozenDict
from hallucination_guard.values.states import States

__all__ = ["Backoff", "Edit", "Guarantee", "Manner", "Sentence", "edited"]

Manner: TypeAlias = Literal["mark", "redact"]
"""How a doubtful sentence is delivered: with a mark behind it, or not at all."""

Guarantee: TypeAlias = Literal["certified", "average"]
"""What a back-off threshold promises. ``certified``: with probability 1 − δ over the calibration draw at most a share α
of responses keeps more wrong sentences than it may; ``average``: that share is at most α over calibration and use
together, and given one calibration it may be larger."""

# The line of a fence: what indents or quotes it, items of lists that begin on it, the fence, what is said of the code.
_FENCE = re.compile(
    r"(?:^|(?<=[\r\n]))([ \t>]*+)((?:(?:[-+*]|\d{1,9}[.)])[ \t]++[ \t>]*+)*+)(`{3,}+|~{3,}+)([^\r\n]*+)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence of an answer and what was measured of it.

    Args:
        start: its first token, counted from the answer's beginning.
        stop: the token after its last.
        begin: its first character, counted from the beginning of ``Generation.content``.
        end: the character after its last; white space between two sentences belongs to the first.
        text: the characters; empty where no text was kept, as in a record.
        scores: by name, finite; higher = less certain, but for ``min_token_logprob``.
        states: of its tokens, what a probe reads; None where they were not asked for, and in a record.

    Raises:
        ValueError: on an empty range, a text of another length, or a score that is not finite.
    """

    start: int
    stop: int
    begin: int
    end: int
    text: str = ""
    scores: Mapping[str, float]
    states: States | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, low, high in (("tokens", self.start, self.stop), ("characters", self.begin, self.end)):
            if not all(isinstance(each, int) and not isinstance(each, bool) for each in (low, high)) or not (
                0 <= low < high
            ):
                raise ValueError(f"a sentence has the {name} {low!r} to {high!r}")
        if self.text and len(self.text) != self.end - self.begin:
            raise ValueError(f"a sentence of {self.end - self.begin} characters has a text of {len(self.text)}")
        if not self.scores:
            raise ValueError("a sentence has no scores")
        if not isinstance(self.states, States | None):
            raise ValueError(f"the states of a sentence are {type(self.states).__name__}")
        for name, value in self.scores.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"score {name!r} of a sentence is {value!r}, not a finite number")
        object.__setattr__(self, "scores", FrozenDict(self.scores))

    def to_json_dict(self) -> dict[str, JSON]:
        """Plain data, without text and states."""
        return {
            "start": self.start,
            "stop": self.stop,
            "begin": self.begin,
            "end": self.end,
            "scores": dict(self.scores),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """A fitted threshold for the sentences of an answer, and what keeping to it promises.

    Args:
        alpha: the share of responses that may keep more wrong sentences than ``at_most``.
        at_most: wrong sentences that a response may keep.
        guarantee: ``certified`` or ``average``, see :data:`Guarantee`.
        score: which score of a sentence it reads.
        threshold: sentences with a score up to here are kept.
        certificate: its id.
    """

    alpha: float
    at_most: int
    guarantee: Guarantee
    score: str
    threshold: float
    certificate: str

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0 or self.at_most < 0 or self.guarantee not in get_args(Guarantee):
            raise ValueError(f"no back-off is {self.guarantee!r} with alpha {self.alpha!r}, at most {self.at_most!r}")
        if not math.isfinite(self.threshold) or not self.score or not self.certificate:
            raise ValueError(f"a back-off has the threshold {self.threshold!r} on {self.score!r}")

    def to_json_dict(self) -> dict[str, JSON]:
        """Plain data."""
        return {
            "alpha": self.alpha,
            "at_most": self.at_most,
            "guarantee": self.guarantee,
            "score": self.score,
            "threshold": self.threshold,
            "certificate": self.certificate,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Which sentences of an accepted answer are doubtful, and how they are delivered.

    Args:
        manner: ``mark`` or ``redact``.
        doubtful: their numbers from 0 up, rising.
        sentences: how many sentences the answer has.
        marker: what is written behind each of them, or beside the line of a fence; of ``mark`` only.
    """

    manner: Manner
    doubtful: tuple[int, ...]
    sentences: int
    marker: str = ""

    def __post_init__(self) -> None:
        if self.manner not in get_args(Manner) or (self.manner == "mark") != bool(self.marker):
            raise ValueError(f"an edit is {self.manner!r} with the marker {self.marker!r}")
        if self.sentences < 1 or list(self.doubtful) != sorted({*self.doubtful} & {*range(self.sentences)}):
            raise ValueError(f"the sentences {self.doubtful!r} are not some of {self.sentences}")
        if self.manner == "redact" and len(self.doubtful) == self.sentences:
            raise ValueError("nothing is left of the answer: that is an abstention")

    @property
    def retention(self) -> float:
        """The share of sentences that are delivered without a mark."""
        return 1.0 - len(self.doubtful) / self.sentences

    def to_json_dict(self) -> dict[str, JSON]:
        """Plain data."""
        return {
            "manner": self.manner,
            "doubtful": list(self.doubtful),
            "sentences": self.sentences,
            "marker": self.marker,
        }


def edited(content: str, sentences: Sequence[Sentence], edit: Edit) -> str:
    """The text as it is delivered: nothing but marks is added to it, or sentences are left out.

    Args:
        content: of the answer, ``Generation.content``.
        sentences: of it; together they are all of it.
        edit: what is done with which of them.

    Raises:
        ValueError: if the sentences are not those of the text, or other ones than the edit speaks of.
    """
    ends = [0, *(each.end for each in sentences)]
    if len(sentences) != edit.sentences or ends[:-1] != [each.begin for each in sentences] or ends[-1] != len(content):
        raise ValueError(f"{len(sentences)} sentences up to {ends!r} are not those of a text of {len(content)}")
    doubtful = frozenset(edit.doubtful)
    if edit.manner == "redact":
        kept = (content[each.begin : each.end] for number, each in enumerate(sentences) if number not in doubtful)
        return "".join(kept).strip()
    fences, pieces, at = _fences(content), [], 0
    for number in edit.doubtful:
        each = sentences[number]
        place, mark = _mark(content, each.begin + len(content[each.begin : each.end].rstrip()), edit.marker, fences)
        # Two sentences on the line that opens a fence have their marks in front of it, one after the other.
        pieces += [content[at:place], mark]
        at = place
    return "".join([*pieces, content[at:]])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fence:
    """A line of Markdown that begins or ends a block of code, or looks like one.

    Args:
        begin: its first character.
        end: the character after its last, without the line break.
        opens: whether it is the first line of a block.
        indent: what stands before it and may stand before a paragraph beside it.
    """

    begin: int
    end: int
    opens: bool
    indent: str


def _fences(content: str) -> tuple[_Fence, ...]:
    """The lines of fences; which of them open a block is told as far as it can be without parsing lists and quotes."""
    found: list[_Fence] = []
    inside = ""
    for match in _FENCE.finditer(content):
        indent, _, fence, info = match.groups()
        if fence[0] in info and fence[0] == "`":  # code within a line of text
            continue
        opens = not inside
        if opens:
            inside = fence
        elif fence.startswith(inside) and not info.strip():
            inside = ""
        found.append(_Fence(begin=match.start(), end=match.end(), opens=opens, indent=indent))
    return tuple(found)


def _mark(content: str, end: int, marker: str, fences: Sequence[_Fence]) -> tuple[int, str]:
    """Where the mark of a sentence that ends there stands, and how it is written.

    What stands behind a fence on its line is shown to nobody, or the fence is none any more: there the mark is a
    paragraph of its own, before a line that opens a block and after any other.
    """
    at = bisect_left(fences, end, key=lambda each: each.end)
    if at == len(fences) or fences[at].begin >= end:
        return end, marker
    fence = fences[at]
    own = f"{fence.indent}{marker.strip()}"
    if fence.opens:
        before = content[: fence.begin]
        return fence.begin, ("" if not before or before.endswith("\n\n") else "\n") + f"{own}\n\n"
    after = content[fence.end :]
    return fence.end, f"\n\n{own}" + ("\n" if after.strip() and not after.startswith("\n\n") else "")
