"""What the server stands in front of: a guard, or a sidecar, whose doors are the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, Unpack

from hallucination_guard.values import Call, Event, GenerationOptions, Messages, Outcome

__all__ = ["Answering"]


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
