"""AuditCallback: write down what any chat model said and how sure the white box is of it. It decides nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from hallucination_guard.audit import Sink
from hallucination_guard.calibration import Calibration
from hallucination_guard.errors import InputError
from hallucination_guard.guard import Guard
from hallucination_guard.values import JSON, Decision, Model, Scorer, Situation, Verdict
from hallucination_guard_langchain.convert import LLM_TYPE, as_guard_messages, thread_of, unreadable, without_media

__all__ = ["AuditCallback"]


class _Observe:
    """Says of every answer, scored or not, what is the case: it has left."""

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        return Decision(action="accept", rule="observed", reason="only observed: the answer left before it was scored")

    def describe(self) -> Mapping[str, JSON]:
        return {"id": "observe", "version": 1}


@dataclass(frozen=True, slots=True)
class _Asked:
    prompts: list[list[BaseMessage]]
    thread_id: str | None
    guarded: bool


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
        model: Model,
        *,
        audit: Sink,
        scorer: Scorer | None = None,
        calibration: Calibration | None = None,
        raise_error: bool = False,
    ) -> None:
        self.guard = Guard(model, policy=_Observe(), scorer=scorer, calibration=calibration, audit=audit)
        self.raise_error = raise_error
        # Weakly by the run's own id object: of a cancelled run LangChain tells neither the end nor an error.
        self._asked: WeakKeyDictionary[UUID, _Asked] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Remember what is asked."""
        # By the kind of the model object, not by what the answer says of itself: a served model can write any metadata.
        guarded = (kwargs.get("invocation_params") or {}).get("_type") == LLM_TYPE
        asked = _Asked(messages, thread_of({"metadata": kwargs.get("metadata") or {}}), guarded)
        with self._lock:
            self._asked[run_id] = asked

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **kwargs: Any) -> None:
        """Remember what is asked."""
        self.on_chat_model_start(serialized, [[HumanMessage(each)] for each in prompts], run_id=run_id, **kwargs)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget it: there is no answer."""
        with self._lock:
            self._asked.pop(run_id, None)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Score and record each answer."""
        with self._lock:
            asked = self._asked.pop(run_id, None)
        if asked is None:
            raise InputError("an answer came for a question that was not seen", hint="attach the callback before")
        if asked.guarded:
            return  # the guard has recorded it
        for messages, generations in zip(asked.prompts, response.generations, strict=False):
            for generation in generations:
                message = generation.message if isinstance(generation, ChatGeneration) else None
                text = generation.text if message is None else str(message.text)
                read = as_guard_messages(without_media(messages))
                self.guard.review(read, answer=text, unscorable=unreadable(messages), thread_id=asked.thread_id)
