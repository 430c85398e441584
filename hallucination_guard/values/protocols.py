"""What a guard is put together from: the model, the scorer and the policy, each as the steps that it must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, Unpack, runtime_checkable

from hallucination_guard.values.decision import Decision, Situation
from hallucination_guard.values.generation import Generation
from hallucination_guard.values.identity import ModelIdentity, ScorerIdentity
from hallucination_guard.values.plain import JSON
from hallucination_guard.values.prompt import Messages, Prompt
from hallucination_guard.values.score import Score
from hallucination_guard.values.settings import Drawing, Offered
from hallucination_guard.values.tools import ToolCall
from hallucination_guard.values.verdict import Verdict

__all__ = ["Model", "Policy", "Scorer"]


@runtime_checkable
class Model(Protocol):
    """Generates and reads. What streams as well will be a protocol of its own on top of this one."""

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
class Policy(Protocol):
    """One question about a verdict. Pure: same verdict and situation, same decision."""

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        ...

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on; hashed into the audit record."""
        ...
