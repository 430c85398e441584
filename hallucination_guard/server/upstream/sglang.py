"""SGLang: its chat endpoint gives the ids of prompt and answer where it is asked for them, of whole answers alone.

Written after its source (0.5.23); it has not been run against a server.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from hallucination_guard.server.upstream.chat import (
    Server,
    body_of,
    content_of,
    ended_of,
    logprobs_of,
    model_of,
    only_choice,
)
from hallucination_guard.server.upstream.client import field, ids_of
from hallucination_guard.server.upstream.part import DRAWN_BY, Asked, Capabilities, Part
from hallucination_guard.values import Generator

__all__ = ["SGLang"]


class SGLang(Server):
    """A server of SGLang, 0.5.23 or newer."""

    can = Capabilities(
        ids=True,
        streamed_ids=False,
        logprobs=True,
        honours=DRAWN_BY | {"tools", "tool_choice", "response_schema"},
    )

    async def describe(self) -> Generator:
        """Who it is; see the protocol."""
        self._model = await model_of(self._client, self._model)
        info = await self._client.get("/get_server_info")
        return Generator(
            url=self._client.url,
            kind="sglang",
            version=str(field(info, "version")),
            model=self._model,
            dtype=self._dtype or str(field(info, "dtype") or ""),
        )

    async def answer(self, asked: Asked) -> Part:
        """A whole answer; see the protocol."""
        wants = {"return_prompt_token_ids": True, "return_token_ids": True, "logprobs": True}
        choice = only_choice(
            await self._client.post("/v1/chat/completions", {**body_of(asked, self._model or ""), **wants})
        )
        return Part(
            prompt_ids=ids_of(field(choice, "prompt_token_ids")),
            ids=ids_of(field(choice, "response_token_ids")),
            text=content_of(choice),
            logprobs=logprobs_of(choice),
            ended=ended_of(field(choice, "finish_reason"), stop_text=isinstance(field(choice, "matched_stop"), str)),
        )

    async def stream(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """The whole answer at once; see the protocol."""
        yield await self.answer(asked)
