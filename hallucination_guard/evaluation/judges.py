"""Who says whether an answer is right.

Every judge has a name, which stays with its labels; labels of different judges are never put into one table.
``contains``: the answer contains a reference, word by word. ``rouge``: ROUGE-L ≥ 0.3 with a reference, the longest
common subsequence of their words as an F-measure. ``embedding``: cosine similarity with a reference ≥ 0.8 by a
sentence-embedding model. ``llm``: a chat model is asked; a reply that is neither yes nor no labels nothing.

For answers of one to three words ``contains`` is the one to take. References that are whole sentences need one of the
others, and these err more often: look at some labels first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hallucination_guard.errors import CallError, ConfigurationError, InputError
from hallucination_guard.evaluation.matching import contains_match, normal_form

__all__ = [
    "ASK",
    "Contains",
    "Embedding",
    "Judge",
    "Judgement",
    "Llm",
    "Rouge",
    "llm_judge",
    "one_judge",
    "rouge_l",
]

ASK = (
    "You compare an answer with reference answers.\n"
    "Question: {query}\n"
    "Reference answers, each of them right: {references}\n"
    "Answer: {answer}\n"
    "Does the answer say the same as one of the references? Reply with one word, yes or no."
)
"""What the chat model of :func:`llm_judge` is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A label, or why there is none.

    Args:
        correct: the label; None where the judge could not decide.
        problem: why not; empty with a label.
    """

    correct: bool | None
    problem: str = ""

    def __post_init__(self) -> None:
        if (self.correct is None) != bool(self.problem):
            raise ValueError(f"a judgement is {self.correct!r} and its problem is {self.problem!r}")


class Judge(Protocol):
    """Labels an answer."""

    @property
    def name(self) -> str:
        """Of the judge with what changes its labels; it is stored with them."""

    def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
        """The label of ``answer`` to ``query``."""


@dataclass(frozen=True, slots=True)
class Contains:
    """Right if the answer contains a reference; see :func:`~hallucination_guard.demo.questions.contains_match`."""

    name = "contains"

    def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
        """The label."""
        return Judgement(correct=contains_match(answer, _some(references)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rouge:
    """Right if ROUGE-L with one reference reaches the threshold."""

    threshold: float = 0.3

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    @property
    def name(self) -> str:
        """With the threshold."""
        return f"rouge-l>={self.threshold:g}"

    def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
        """The label."""
        return Judgement(correct=max(rouge_l(answer, each) for each in _some(references)) >= self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Right if the cosine similarity with one reference reaches the threshold.

    Args:
        embed: texts to unit vectors (n × d), with a ``name``; see :mod:`hallucination_guard.evaluation.embedding`.
        threshold: depends on the embedding model; look at some labels before trusting it.
    """

    embed: Any
    threshold: float = 0.8

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    @property
    def name(self) -> str:
        """With model and threshold."""
        return f"embedding({self.embed.name})>={self.threshold:g}"

    def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
        """The label."""
        if not answer.strip():
            return Judgement(correct=False)  # there is nothing that could be like a reference
        vectors = self.embed([answer, *_some(references)])
        return Judgement(correct=bool((vectors[1:] @ vectors[0]).max() >= self.threshold))


@dataclass(frozen=True, slots=True, kw_only=True)
class Llm:
    """Right if a chat model says yes. See :func:`llm_judge`."""

    chat: Any
    name: str

    def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
        """The label.

        Raises:
            CallError: if the chat model cannot be reached.
        """
        asked = ASK.format(query=query, references="; ".join(_some(references)), answer=answer)
        try:
            reply = self.chat.invoke(asked)
        except Exception as error:  # the chat model is anybody's, and so are its errors
            raise CallError(
                f"the judge {self.name!r} failed: {str(error) or type(error).__name__}",
                hint="labels so far are kept: the same command continues",
            ) from error
        text = reply if isinstance(reply, str) else getattr(reply, "text", None) or getattr(reply, "content", reply)
        said = set(re.findall(r"[a-z]+", str(text).casefold())) & {"yes", "no"}
        if len(said) != 1:
            return Judgement(correct=None, problem=f"the judge said {str(text)[:80]!r}, neither yes nor no")
        return Judgement(correct=said == {"yes"})


def llm_judge(chat: Any, *, name: str | None = None) -> Llm:
    """A judge out of any LangChain chat model (or anything with ``invoke(text)``).

    Args:
        chat: the model; it should be another one than the one that is judged.
        name: to be stored with the labels; by default made of the model's own.
    """
    if not callable(getattr(chat, "invoke", None)):
        raise ConfigurationError(f"{type(chat).__name__!r} cannot be asked", hint="give a LangChain chat model")
    own = getattr(chat, "model_name", None) or getattr(chat, "model", None)
    return Llm(chat=chat, name=name or f"llm({own if isinstance(own, str) else type(chat).__name__})")


def rouge_l(one: str, other: str) -> float:
    """F-measure of the longest common subsequence of words, after lower-casing and dropping punctuation."""
    return _f_measure(normal_form(one).split(), normal_form(other).split())


def _f_measure(one: Sequence[str], other: Sequence[str]) -> float:
    if not one or not other:
        return 0.0
    # 2PR / (P + R) with P = c / |one| and R = c / |other|
    return 2 * _common(one, other) / (len(one) + len(other))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for at, theirs in enumerate(other, start=1):
            before, row[at] = row[at], before + 1 if word == theirs else max(row[at], row[at - 1])
    return row[-1]


def one_judge(names: Sequence[str]) -> str:
    """The one judge of these labels.

    Raises:
        InputError: if there are several: what one calls right another may not.
    """
    found = sorted(set(names))
    if len(found) != 1:
        raise InputError(f"the labels are of the judges {found!r}", hint="evaluate the labels of one judge at a time")
    return found[0]


def _some(references: Sequence[str]) -> Sequence[str]:
    if not any(normal_form(each) for each in references):
        raise InputError(f"the reference answers are {list(references)!r}", hint="give at least one with a word in it")
    return references


def _check_threshold(threshold: float) -> None:
    if not 0.0 < threshold <= 1.0:  # also false for NaN
        raise ConfigurationError(f"the threshold is {threshold!r}", hint="a number above 0, at most 1")
