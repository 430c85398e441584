"""ConfidenceGate: the replies of any chat generator, decided on and routed."""

from __future__ import annotations

import asyncio

from haystack import component
from haystack.dataclasses import ChatMessage

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.guard import ABSTENTION, Guard, Replying
from hallucination_guard.values import Message
from hallucination_guard_haystack.convert import as_chat_message, as_guard_messages

__all__ = ["ConfidenceGate"]


@component
class ConfidenceGate:
    """Has a guard read what a generator wrote, and gives it out as ``accepted`` or as ``rejected``, never both.

    What is connected to the other output does not run. ``accepted`` are the replies that were let through; if there
    are none, ``rejected`` has an abstention for each, and no draft: its text is in the audit log, not in the pipeline.
    What a reply says of itself in ``meta`` is not believed.

    Args:
        guard: its model reads, its policy decides; further attempts, if it wants any, are the guard's own.
        abstention: what stands for a reply that was not let through.
    """

    def __init__(self, guard: Guard, *, abstention: str = ABSTENTION) -> None:
        self.guard = guard
        self._reply = Replying(abstention)

    @component.output_types(accepted=list[ChatMessage], rejected=list[ChatMessage])
    def run(self, messages: list[ChatMessage] | str, replies: list[ChatMessage]) -> dict[str, list[ChatMessage]]:
        """Decide.

        Args:
            messages: what the replies are to, as the generator was given them.
            replies: what it gave.
        """
        if not replies:
            raise InputError("there is no reply to decide on", hint="connect the replies of a chat generator")
        asked = as_guard_messages(messages)
        decided = [self._decided(asked, each) for each in replies]
        accepted = [message for message, answered in decided if answered]
        return {"accepted": accepted} if accepted else {"rejected": [message for message, _ in decided]}

    @component.output_types(accepted=list[ChatMessage], rejected=list[ChatMessage])
    async def run_async(
        self, messages: list[ChatMessage] | str, replies: list[ChatMessage]
    ) -> dict[str, list[ChatMessage]]:
        """Decide, without blocking the loop."""
        decided: dict[str, list[ChatMessage]] = await asyncio.to_thread(self.run, messages, replies)
        return decided

    def to_dict(self) -> dict[str, object]:
        """Refused: weights and policies are objects.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError("a confidence gate cannot be written to YAML", hint="build the pipeline in Python")

    def _decided(self, asked: list[Message], draft: ChatMessage) -> tuple[ChatMessage, bool]:
        [written] = as_guard_messages([draft])
        if written.tool_calls:
            raise InputError("a reply calls a tool", hint="gate what answers; for what acts there is the generator")
        outcome = self.guard.review(asked, written.content)
        reply = self._reply(outcome)
        if outcome.accepted and outcome.attempts == 1:  # later drafts are the guard's own
            kept = draft.meta if reply.text == written.content else {}  # a server may write the draft's words there
            return ChatMessage.from_assistant(reply.text, meta={**kept, **reply.metadata}), True
        return as_chat_message(reply, model_name=str(self.guard.model.name)), reply.answered
