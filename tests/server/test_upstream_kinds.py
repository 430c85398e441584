"""Each kind is sent what it knows and nothing else; what goes wrong is one line without the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hallucination_guard import Guard
from hallucination_guard.errors import ConfigurationError, InputError, UpstreamError
from hallucination_guard.server.upstream import Asked, Sidecar, connect
from hallucination_guard.server.upstream.client import Client
from hallucination_guard.server.upstream.kinds import _kind
from hallucination_guard.server.upstream.llamacpp import LlamaCpp
from hallucination_guard.server.upstream.sglang import SGLang
from hallucination_guard.server.upstream.unknown import Unknown
from hallucination_guard.server.upstream.vllm import VLLM
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import GenerationSettings, as_messages
from hallucination_guard_policies import AbstainBelow

MODELS = {"data": [{"id": "m", "owned_by": "someone"}]}
PLAIN = {"model", "messages", "max_tokens", "temperature"}


class Server:
    """Answers ``Lyon.``, and keeps what it is asked."""

    def __init__(self, choice: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.choice, self.asked = choice, []  # type: ignore[var-annotated]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={**MODELS, "version": "0.5.23", "dtype": "bfloat16"})
        self.asked.append(json.loads(request.content))
        plain = {"index": 0, "message": {"content": "Lyon."}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [{**plain, **self.choice(self.asked[-1])}]})


def client_of(server: Any, **settings: Any) -> Client:
    return Client("http://127.0.0.1:1", transport=httpx.MockTransport(server), **settings)


def sidecar_of(upstream: Any) -> Sidecar:
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    return Sidecar(Guard(ScriptedModel("x"), policy=policy, scorer=ScriptedScorer(0.1), audit=MemorySink()), upstream)


class TestUnknown:
    async def test_it_is_asked_what_every_server_knows_and_not_scored(self) -> None:
        server = Server(lambda body: {})
        sidecar = sidecar_of(Unknown(client_of(server)))
        assert not (await sidecar.start()).ready
        outcome = await sidecar.acall("Where?")
        assert set(server.asked[-1]) == PLAIN
        assert outcome.text is None
        assert "which tokens it drew" in outcome.verdict.score.reason

    async def test_an_answer_that_does_not_say_how_it_ended_is_none(self) -> None:
        sidecar = sidecar_of(Unknown(client_of(Server(lambda body: {"finish_reason": None}))))
        await sidecar.start()
        with pytest.raises(UpstreamError, match="how the answer ended"):
            await sidecar.acall("Where?")

    async def test_its_stream_is_decided_on_as_a_whole(self) -> None:
        sidecar = sidecar_of(Unknown(client_of(Server(lambda body: {}))))
        await sidecar.start()
        [outcome] = [event async for event in sidecar.astream("Where?")]
        assert outcome.verdict.score.status == "unscorable"

    async def test_a_schema_is_refused(self) -> None:
        sidecar = sidecar_of(Unknown(client_of(Server(lambda body: {}))))
        await sidecar.start()
        with pytest.raises(InputError, match="response_schema"):
            await sidecar.acall("Where?", response_schema={"type": "object", "properties": {}})


class TestSGLang:
    @staticmethod
    def choice(body: dict[str, Any]) -> dict[str, Any]:
        ids = [*b"Lyon."]
        return {
            "prompt_token_ids": list(ScriptedModel("x").prompt(body["messages"]).token_ids),
            "response_token_ids": ids,
            "logprobs": {"content": [{"logprob": -0.5}] * len(ids)},
            "matched_stop": 2,
        }

    async def test_whole_answers_are_read(self) -> None:
        server = Server(self.choice)
        upstream = SGLang(client_of(server))
        generator = await upstream.describe()
        assert generator.mark == "sglang 0.5.23 m bfloat16"
        exchange = await sidecar_of(upstream)._begun("Where?", await _settings(upstream))
        part = await upstream.answer(exchange.asked)
        assert exchange.heard(part).ids == tuple(b"Lyon.")
        assert set(server.asked[-1]) == PLAIN | {"return_prompt_token_ids", "return_token_ids", "logprobs"}

    async def test_a_stream_is_asked_for_as_a_whole(self) -> None:
        server = Server(self.choice)
        upstream = SGLang(client_of(server))
        await upstream.describe()
        exchange = await sidecar_of(upstream)._begun("Where?", await _settings(upstream))
        [part] = [part async for part in upstream.stream(exchange.asked)]
        assert part.ended == "stop"
        assert "stream" not in server.asked[-1]


async def _settings(upstream: Any) -> Any:
    sidecar = sidecar_of(upstream)
    sidecar._generator = await upstream.describe()
    return sidecar._settings({})


class TestTurns:
    async def test_tools_are_told_in_the_turns_where_the_template_knows_none(self) -> None:
        server = Server(lambda body: {})
        sidecar = sidecar_of(VLLM(client_of(server)))
        sidecar._generator = await sidecar.upstream.describe()
        await sidecar.acall("Add.", tools=[{"name": "add"}])
        assert "tools" not in server.asked[-1]
        assert "add" in server.asked[-1]["messages"][0]["content"]
        with pytest.raises(InputError, match="tool_choice"):
            await sidecar.acall("Add.", tools=[{"name": "add"}], tool_choice="required")

    async def test_a_schema_is_told_and_demanded(self) -> None:
        server = Server(lambda body: {})
        sidecar = sidecar_of(VLLM(client_of(server)))
        sidecar._generator = await sidecar.upstream.describe()
        await sidecar.acall("Add.", response_schema={"type": "object", "properties": {"a": {"type": "integer"}}})
        assert server.asked[-1]["response_format"]["json_schema"]["schema"]["properties"] == {"a": {"type": "integer"}}
        assert "integer" in server.asked[-1]["messages"][0]["content"]


class TestFailures:
    @pytest.mark.parametrize(
        ("reply", "words"),
        [
            (httpx.Response(500, text="boom"), "500: boom"),
            (httpx.Response(422, json={"detail": "unknown field"}), "422"),
            (httpx.Response(200, text="<html>"), "no JSON object"),
            (httpx.Response(200, json=[1]), "no JSON object"),
            (httpx.Response(200, text="[" * 100_000), "no JSON object"),
            (httpx.Response(200, json={}), "the models"),
            (httpx.ConnectError("refused"), "ConnectError"),
            (httpx.ReadTimeout("slow"), "ReadTimeout"),
        ],
    )
    async def test_what_is_no_answer_is_one_line(self, reply: Any, words: str) -> None:
        def handle(request: httpx.Request) -> httpx.Response:
            if isinstance(reply, Exception):
                raise reply
            return reply

        with pytest.raises(UpstreamError, match=words) as caught:
            await Unknown(client_of(handle, api_key="sk-secret")).describe()
        assert "sk-secret" not in str(caught.value)

    async def test_an_error_in_mid_stream_ends_it(self) -> None:
        def handle(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, text='data: {"error": {"message": "out of memory"}}\n\n')

        with pytest.raises(UpstreamError, match="out of memory"):
            async for _ in client_of(handle).events("/x", {}):
                pass

    async def test_an_owner_that_is_no_text_is_not_known(self) -> None:
        models = {"data": [{"id": "m", "owned_by": ["vllm"]}]}
        assert await _kind(client_of(lambda request: httpx.Response(200, json=models))) == "unknown"

    @pytest.mark.parametrize("odd", ["x", [1], 10**400, True])
    async def test_odd_log_probabilities_of_llama_cpp_are_no_answer(self, odd: Any) -> None:
        replies = {
            "/apply-template": {"prompt": "?"},
            "/tokenize": {"tokens": [63]},
            "/completion": {
                "content": "a", "tokens": [97], "tokens_evaluated": 1, "stop": True, "stop_type": "eos",
                "completion_probabilities": [{"id": 97, "logprob": odd}],
            },
        }  # fmt: skip
        upstream = LlamaCpp(client_of(lambda request: httpx.Response(200, json=replies[request.url.path])))
        asked = Asked(turns=as_messages("?"), settings=GenerationSettings(max_new_tokens=4, temperature=0.0))
        with pytest.raises(UpstreamError, match="log-probability"):
            await upstream.answer(asked)

    async def test_a_kind_that_is_none_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="'tgi'"):
            await connect("http://127.0.0.1:1", kind="tgi")  # type: ignore[arg-type]

    async def test_nobody_at_the_address(self) -> None:
        with pytest.raises(UpstreamError, match="ConnectError"):
            await connect("http://127.0.0.1:1")
