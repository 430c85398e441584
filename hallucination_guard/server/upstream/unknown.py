"""Any other server with a chat endpoint (``transformers serve``): it gives texts, and what it drew cannot be known.

It is asked with the fields that every server knows, and nothing of what it says is scored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from hallucination_guard.server.upstream.chat import Server, body_of, content_of, ended_of, model_of, only_choice
from hallucination_guard.server.upstream.client import field
from hallucination_guard.server.upstream.part import DRAWN_BY, Asked, Capabilities, Part
from hallucination_guard.values import Generator

__all__ = ["Unknown"]


class Unknown(Server):
    """A server that gives no token ids."""

    can = Capabilities(
        ids=False,
        streamed_ids=False,
        logprobs=False,
        honours=DRAWN_BY,
    )

    async def describe(self) -> Generator:
        """Who it is; see the protocol."""
        self._model = await model_of(self._client, self._model)
        return Generator(url=self._client.url, kind="unknown", version="not said", model=self._model, dtype=self._dtype)

    async def answer(self, asked: Asked) -> Part:
        """A whole answer; see the protocol."""
        choice = only_choice(await self._client.post("/v1/chat/completions", body_of(asked, self._model or "")))
        return Part(text=content_of(choice), ended=ended_of(field(choice, "finish_reason")))

    async def stream(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """The whole answer at once: it is decided on as a whole anyway; see the protocol."""
        yield await self.answer(asked)
