"""What a guard is put together from: the model, the scorer and the policy, each as the steps that it must have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, Unpack, runtime_checkable

from hallucination_guard.values.decision import Decision, Situation
from hallucination_guard.values.generation import FinishReason, Generation
from hallucination_guard.values.identity import ModelIdentity, ScorerIdentity
from hallucination_guard.values.plain import JSON
from hallucination_guard.values.prompt import Messages, Prompt
from hallucination_guard.values.score import Score
from hallucination_guard.values.settings import Drawing, Offered
from hallucination_guard.values.tools import ToolCall
from hallucination_guard.values.verdict import Verdict

Found = TypeVar("Found")

__all__ = [
    "Ending",
    "FollowingModel",
    "Heard",
    "Live",
    "Model",
    "Piece",
    "Policy",
    "Scorer",
    "StreamingModel",
    "StreamingScorer",
    "Watch",
]


@dataclass(frozen=True, slots=True)
class Ending:
    """The last piece of an answer that something else wrote, where it is known how it ended."""

    reason: FinishReason


Piece: TypeAlias = str | Sequence[int] | Ending
"""What an answer that something else is writing grows by: text, or token ids; the last may say how it ended."""


@runtime_checkable
class Model(Protocol):
    """Generates and reads. What streams as well is a :class:`StreamingModel`."""

    @property
    def name(self) -> str:
        """For logs; not for comparing."""
        ...

    @property
    def identity(self) -> ModelIdentity:
        """Which model it is, as it is now."""
        ...

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and answer may have together; None where that is not known."""
        ...

    def prompt(self, messages: Messages, **offered: Unpack[Offered]) -> Prompt:
        """What it reads for these messages, and the tools it may call; raises ``InputError`` if it cannot."""
        ...

    def generate(
        self,
        messages: Sequence[Messages],
        *,
        question: str | Sequence[str | None] | None = None,
        **drawing: Unpack[Drawing],
    ) -> list[Generation]:
        """Answer a batch of prompts; ``question`` is one for all, or one a prompt."""
        ...

    def read(
        self,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        question: str | None = None,
        **offered: Unpack[Offered],
    ) -> Generation:
        """Take an answer that something else wrote."""
        ...

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """An answer with tool calls as the model writes it, for :meth:`read`."""
        ...


class Compute(Protocol):
    """Has something computed where its turn comes."""

    def __call__(self, work: Callable[[], Found]) -> Found:
        """What ``work`` gives."""
        ...


class Live(Protocol):
    """An answer while it is drawn. One reader has it, in a thread of its own."""

    @property
    def ended(self) -> FinishReason | None:
        """How it ended; None while it is drawn."""
        ...

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until ``ready`` says so, which is asked at every token, or it has ended, or the reader is gone.

        It is asked by the thread that draws: a reader who woke up at every token would be in its way.

        Raises:
            Exception: what went wrong in drawing it, or in asking.
        """
        ...

    def texts(self) -> tuple[str, ...]:
        """What each token so far adds to the text."""
        ...

    def prose(self) -> int:
        """How many characters of the text are surely of the answer: no beginning of a stop text, no call of a tool."""
        ...

    def beginning(self, tokens: int | None = None) -> Generation:
        """Its first tokens, or all so far, as an answer; ``open`` unless these are all of one that has ended."""
        ...

    def compute(self, work: Callable[[], Found], *, patient: bool = False) -> Found:
        """What ``work`` gives; nothing is drawn meanwhile where both would want the same cores.

        Args:
            work: is called once.
            patient: where others wait to be drawn, it may wait as long again as this answer took until now, so that
                what ends meanwhile is computed together with it.
        """
        ...

    def leave(self) -> None:
        """The reader is gone: it ends within a token."""
        ...


class Heard(Live, Protocol):
    """An answer while something else writes it."""

    @property
    def unscorable(self) -> str:
        """Why it cannot be read, and so not be scored; empty while it can."""
        ...


@runtime_checkable
class StreamingModel(Model, Protocol):
    """Draws an answer that can be read while it is drawn."""

    def stream(
        self,
        messages: Messages,
        *,
        begin: Sequence[int] = (),
        gone: Callable[[], bool] = lambda: False,
        question: str | None = None,
        **drawing: Unpack[Drawing],
    ) -> Live:
        """Begin to answer one prompt.

        Args:
            messages: as for :meth:`Model.generate`.
            begin: ids with which the answer begins; it goes on after them.
            gone: asked at every token whether the reader is gone.
            question: as for :meth:`Model.generate`.
            **drawing: as for :meth:`Model.generate`.
        """
        ...


@runtime_checkable
class FollowingModel(StreamingModel, Protocol):
    """Reads an answer while something else writes it."""

    def follow(
        self,
        messages: Messages,
        pieces: Iterable[Piece],
        *,
        gone: Callable[[], bool] = lambda: False,
        unscorable: str = "",
        question: str | None = None,
        **offered: Unpack[Offered],
    ) -> Heard:
        """Begin to read.

        Args:
            messages: as for :meth:`Model.read`.
            pieces: of the answer, as they come: texts, or token ids; one kind an answer.
            gone: asked at every piece whether the reader is gone.
            unscorable: why it is not to be read, where the caller knows that.
            question: as for :meth:`Model.read`.
            **offered: as for :meth:`Model.read`.
        """
        ...

    def compute(self, work: Callable[[], Found]) -> Found:
        """What ``work`` gives, in turn with what is drawn and computed for others."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Measures generations of one model; must be deterministic and must not change the model."""

    @property
    def identity(self) -> ScorerIdentity:
        """Name, version and settings."""
        ...

    @property
    def primary(self) -> str:
        """The name in ``Score.scores`` that this scorer is about."""
        ...

    def batch(self, model: Model, generations: Sequence[Generation]) -> list[Score]:
        """One score a generation, in order. What cannot be measured is ``unscorable``, with its reason."""
        ...


@runtime_checkable
class StreamingScorer(Scorer, Protocol):
    """Measures longer and longer beginnings of an answer without beginning anew."""

    def beginnings(self, model: Model) -> Callable[[Generation], Score]:
        """A step that is given the beginnings of one answer, shorter ones first."""
        ...


@runtime_checkable
class Policy(Protocol):
    """One question about a verdict. Pure: same verdict and situation, same decision."""

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        ...

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on; hashed into the audit record."""
        ...


@runtime_checkable
class Watch(Protocol):
    """Says when certificates do not hold any more, by labels. Asked before each verdict, by any thread."""

    @property
    def alpha(self) -> float:
        """The risk that is tested."""
        ...

    @property
    def suspended(self) -> str:
        """Why certificates do not hold; empty while they do. What cannot be known is a reason."""
        ...
