"""ChatOpenAI that keeps the verdict of ``hallucination-guard serve``."""

from __future__ import annotations

from typing import Any

from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI

from hallucination_guard_langchain.convert import KEY

__all__ = ["VerdictChatOpenAI"]


class VerdictChatOpenAI(ChatOpenAI):
    """The stock client, whose messages have the verdict where those of a :class:`GuardedChatModel` have it."""

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        plain = response if isinstance(response, dict) else response.model_dump()
        result = super()._create_chat_result(response, generation_info)
        result.generations[0].message.response_metadata[KEY] = plain.get(KEY)
        return result

    def _convert_chunk_to_generation_chunk(self, chunk: dict[str, Any], *rest: Any) -> ChatGenerationChunk | None:
        made, [choice] = super()._convert_chunk_to_generation_chunk(chunk, *rest), chunk.get("choices") or [{}]
        if made is not None and choice.get("finish_reason"):
            made.message.response_metadata[KEY] = chunk.get(KEY)
        if made is not None and (refusal := (choice.get("delta") or {}).get("refusal")):
            made.message.additional_kwargs["refusal"] = refusal
        return made
