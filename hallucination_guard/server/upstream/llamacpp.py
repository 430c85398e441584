"""llama-server of llama.cpp: its chat endpoint hides ids, so template, tokenizer and completion are asked one by one.

``/apply-template`` writes the prompt, ``/tokenize`` reads it, and ``/completion`` is given those very ids; all three
are the server's own, so another template or vocabulary than ours shows in the ids.

In a stream the server leaves out tokens that end within a character. Their number is known (``tokens_predicted``), so
what is missing is noticed; the rest is then drawn as a whole after the ids that are known.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from hallucination_guard.errors import UpstreamError
from hallucination_guard.server.upstream.chat import Server, listed_in, model_of
from hallucination_guard.server.upstream.client import Reply, field, ids_of, logprob_of, text_of
from hallucination_guard.server.upstream.part import DRAWN_BY, Asked, Capabilities, Part
from hallucination_guard.values import FinishReason, Generator

__all__ = ["LlamaCpp"]


class LlamaCpp(Server):
    """A ``llama-server`` of 2026 or newer, started with ``--jinja``."""

    can = Capabilities(
        ids=True,
        streamed_ids=True,
        logprobs=True,
        honours=DRAWN_BY | {"tools", "response_schema"},
    )

    async def describe(self) -> Generator:
        """Who it is; see the protocol."""
        self._model = await model_of(self._client, self._model)
        props = await self._client.get("/props")
        return Generator(
            url=self._client.url,
            kind="llamacpp",
            version=str(field(props, "build_info")),
            model=self._model,
            dtype=self._dtype or str(field(props, "model_ftype") or ""),
        )

    async def answer(self, asked: Asked) -> Part:
        """A whole answer; see the protocol."""
        prompt = await self._prompt(asked)
        return self._part(await self._client.post("/completion", _body(asked, prompt)), prompt)

    async def stream(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """An answer as it is drawn; see the protocol."""
        prompt = await self._prompt(asked)
        yield Part(prompt_ids=prompt, ids=())
        come = self._client.events("/completion", {**_body(asked, prompt), "stream": True})
        known: tuple[int, ...] = ()
        async with aclosing(come):
            async for event in come:
                part = self._part(event, prompt)
                drawn = field(event, "tokens_predicted")
                if part.ids is None or drawn != len(known) + len(part.ids):
                    break
                known += part.ids
                yield part
                if part.ended is not None:
                    return
            else:
                raise UpstreamError(f"the stream of {self._client.url} broke off before the answer had ended")
        most = asked.settings.max_new_tokens
        assert most is not None
        if most <= len(known):
            raise UpstreamError(f"the server at {self._client.url} left out the ids of tokens at the answer's end")
        rest = {**_body(asked, (*prompt, *known)), "n_predict": most - len(known)}
        yield self._part(await self._client.post("/completion", rest), (*prompt, *known))

    async def _prompt(self, asked: Asked) -> tuple[int, ...]:
        tools = {"tools": [each.to_json_dict() for each in asked.tools]} if asked.tools else {}
        written = field(await self._client.post("/apply-template", {"messages": asked.plain_turns, **tools}), "prompt")
        read = {"content": written, "add_special": True, "parse_special": True}
        ids = ids_of(field(await self._client.post("/tokenize", read), "tokens"))
        if not isinstance(written, str) or not ids:
            raise UpstreamError(f"the server at {self._client.url} gave no prompt", hint="start it with --jinja")
        return ids

    def _part(self, reply: Reply, prompt: Sequence[int]) -> Part:
        ended = _ended(self._client.url, reply)
        if ended is not None and field(reply, "tokens_evaluated") != len(prompt):
            raise UpstreamError(f"the server at {self._client.url} read another prompt than it was given")
        ids = ids_of(field(reply, "tokens"))
        return Part(
            prompt_ids=tuple(prompt),
            ids=ids,
            text=text_of(field(reply, "content")),
            logprobs=_aligned(ids or (), listed_in(field(reply, "completion_probabilities"))),
            ended=ended,
        )


def _body(asked: Asked, prompt: Sequence[int]) -> dict[str, object]:
    settings = asked.settings
    body: dict[str, object] = {
        "prompt": list(prompt),
        "n_predict": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        # By default it samples by more than was asked for.
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "return_tokens": True,
        "n_probs": 1,
        "stop": list(settings.stop or ()),
    }
    if settings.temperature:
        body["seed"] = settings.seed
    if settings.response_schema is not None:
        body["json_schema"] = settings.response_schema
    return body


def _ended(url: str, reply: Reply) -> FinishReason | None:
    if not field(reply, "stop"):
        return None
    ending = {"eos": "stop", "word": "stop_text", "limit": "length"}.get(str(field(reply, "stop_type")))
    if ending is None or field(reply, "truncated") is True:
        raise UpstreamError(f"the server at {url} ended the answer otherwise", hint="give it a larger context")
    return ending  # type: ignore[return-value]  # its values are finish reasons


def _aligned(ids: Sequence[int], listed: Sequence[Reply]) -> tuple[float | None, ...]:
    """The log-probability of each token; one that ends within a character has none: ``listed`` leaves it out."""
    found: list[float | None] = []
    left = [(field(each, "id"), logprob_of(field(each, "logprob"))) for each in listed]
    for each in ids:
        own = bool(left) and left[0][0] == each
        found.append(left.pop(0)[1] if own else None)
    return tuple(found) if not left else ()
