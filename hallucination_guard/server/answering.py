"""What the server stands in front of: an alias, and behind it a guard or a sidecar here, or replicas elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, Unpack

from hallucination_guard.server.config import Alias
from hallucination_guard.server.requests import Tightening
from hallucination_guard.server.upstream.status import Status
from hallucination_guard.values import Call, Event, FinishReason, GenerationOptions, Messages, Outcome

__all__ = ["Answering", "Behind"]


class Answering(Protocol):
    """Answers prompts, or not; a :class:`~hallucination_guard.Guard` does, and a sidecar."""

    async def acall(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Answer one prompt, or not."""
        ...

    def astream(
        self,
        messages: Messages,
        *,
        call: Call | None = None,
        thread_id: str | None = None,
        **generation: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Event, None]:
        """Answer one prompt sentence by sentence; closing it ends generating."""
        ...


class Behind(Protocol):
    """What stands behind an alias; :class:`~hallucination_guard.server.house.Served` does in this process."""

    @property
    def alias(self) -> Alias:
        """As the settings have it."""
        ...

    @property
    def why(self) -> str:
        """Why it is not ready; empty once it is."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        ...

    @property
    def streams(self) -> bool:
        """Whether answers can leave sentence by sentence."""
        ...

    @property
    def suspended(self) -> str:
        """Why certificates or scores do not hold at the moment; empty while they do."""
        ...

    @property
    def drift(self) -> tuple[bool, int] | None:
        """Whether scores have drifted, and in how many tests; None where nobody tests, or not in this process."""
        ...

    def status(self) -> Status:
        """How it is now."""
        ...

    async def start(self) -> None:
        """Get it ready.

        Raises:
            GuardError: if it cannot be yet; then ``why`` says so.
        """
        ...

    async def close(self) -> None:
        """Give back what it holds."""
        ...

    def answering(self, tightening: Tightening) -> Answering:
        """Who answers a request.

        Raises:
            Refusal: if it asks for less than the policy, or for what cannot be kept.
        """
        ...

    async def review(
        self,
        tightening: Tightening,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        ended: FinishReason,
        call: Call,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Judge a given answer by the policy; nothing is drawn.

        Raises:
            Refusal: likewise.
        """
        ...
