"""AuditCallback: write down what any chat model said and how sure the white box is of it. It decides nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from hallucination_guard.calibration import Calibration
from hallucination_guard.guard import Guard
from hallucination_guard.types import Scorer, Sink
from hallucination_guard_langchain.convert import KEY, as_guard_messages
from hallucination_guard_policies import Accept, Unscored

__all__ = ["AuditCallback"]


class AuditCallback(BaseCallbackHandler):
    """Scores every answer of the models it is attached to and records it as let through.

    By the time a callback hears of an answer, the answer has left: to hold answers back use ``GuardedChatModel`` or
    ``GuardRunnable``. Answers of a guarded model are not recorded twice.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that reads.
        audit: where the records go.
        scorer: HybridGrad by default.
        calibration: for confidences in the log.
        raise_error: whether a failure to score or record stops the chain; LangChain otherwise only warns.
    """

    def __init__(
        self,
        model: Any,
        *,
        audit: Sink,
        scorer: Scorer | None = None,
        calibration: Calibration | None = None,
        raise_error: bool = False,
    ) -> None:
        observe = Unscored(Accept(), on_unscorable="accept", on_error="accept")
        self.guard = Guard(model, policy=observe, scorer=scorer, calibration=calibration, audit=audit)
        self.raise_error = raise_error
        self._asked: dict[UUID, list[list[BaseMessage]]] = {}
        self._lock = threading.Lock()

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Remember what is asked."""
        with self._lock:
            self._asked[run_id] = messages

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **kwargs: Any) -> None:
        """Remember what is asked."""
        with self._lock:
            self._asked[run_id] = [[HumanMessage(prompt)] for prompt in prompts]

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget it: there is no answer."""
        with self._lock:
            self._asked.pop(run_id, None)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Score and record each answer."""
        with self._lock:
            asked: Sequence[list[BaseMessage]] = self._asked.pop(run_id, [])
        for messages, generations in zip(asked, response.generations, strict=False):
            for generation in generations:
                message = generation.message if isinstance(generation, ChatGeneration) else None
                if message is not None and KEY in message.response_metadata:
                    continue
                text = generation.text if message is None else str(message.text)
                self.guard.review(as_guard_messages(messages), answer=text)
