"""vLLM: its chat endpoint gives the ids of prompt and answer where it is asked for them, streamed as well."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from hallucination_guard.errors import UpstreamError
from hallucination_guard.server.upstream.chat import (
    Server,
    body_of,
    content_of,
    ended_of,
    logprobs_of,
    model_of,
    only_choice,
)
from hallucination_guard.server.upstream.client import Reply, field, ids_of
from hallucination_guard.server.upstream.part import DRAWN_BY, Asked, Capabilities, Part
from hallucination_guard.values import Generator

__all__ = ["VLLM"]


class VLLM(Server):
    """A server of vLLM, 0.10.2 or newer."""

    can = Capabilities(
        ids=True,
        streamed_ids=True,
        logprobs=True,
        honours=DRAWN_BY | {"tools", "tool_choice", "response_schema"},
    )

    async def describe(self) -> Generator:
        """Who it is; see the protocol."""
        self._model = await model_of(self._client, self._model)
        version = field(await self._client.get("/version"), "version")
        return Generator(url=self._client.url, kind="vllm", version=str(version), model=self._model, dtype=self._dtype)

    async def answer(self, asked: Asked) -> Part:
        """A whole answer; see the protocol."""
        reply = await self._client.post("/v1/chat/completions", self._body(asked))
        return _part(reply, only_choice(reply), "message")

    async def stream(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """An answer as it is drawn; see the protocol."""
        async with aclosing(self._client.events("/v1/chat/completions", {**self._body(asked), "stream": True})) as come:
            async for event in come:
                part = _part(event, only_choice(event), "delta")
                yield part
                if part.ended is not None:
                    return
        raise UpstreamError(f"the stream of {self._client.url} broke off before the answer had ended")

    def _body(self, asked: Asked) -> dict[str, object]:
        return {**body_of(asked, self._model or ""), "return_token_ids": True, "logprobs": True}


def _part(reply: Reply, choice: Reply, holder: str) -> Part:
    text, ids = content_of(choice, holder), field(choice, "token_ids")
    if holder == "delta" and "token_ids" not in choice and not text:
        ids = []  # the first event of a stream says what was read, and draws nothing
    stopped = field(choice, "stop_reason")
    return Part(
        prompt_ids=ids_of(field(reply, "prompt_token_ids")),
        ids=ids_of(ids),
        text=text,
        logprobs=logprobs_of(choice),
        ended=ended_of(field(choice, "finish_reason"), stop_text=isinstance(stopped, str)),
    )
