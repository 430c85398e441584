"""What real servers said is read as it was meant; ``benchmarks/record_upstream.py`` kept it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import UpstreamError
from hallucination_guard.scoring import Likelihood
from hallucination_guard.server.upstream import Part
from hallucination_guard.server.upstream.asking import asked_of, said_in_full
from hallucination_guard.server.upstream.client import Client
from hallucination_guard.server.upstream.exchange import Exchange
from hallucination_guard.server.upstream.kinds import _KINDS, _kind
from hallucination_guard.server.upstream.parity import distance
from hallucination_guard.values import GenerationSettings
from hallucination_guard_policies import Accept

RECORDED = Path(__file__).with_name("recorded")
KINDS = ("llamacpp", "vllm")
FRANCE = "What is the capital of France?"
EMOJI = "Repeat after me: 🦓🙂🦓 Zebras! 🙂"
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": (FRANCE, {"max_new_tokens": 24}),
    "cut": (FRANCE, {"max_new_tokens": 4}),
    "stopped": (FRANCE, {"stop": ["Par"]}),
    "emoji": (EMOJI, {"max_new_tokens": 24}),
}


class Replay:
    """Answers as the server did, and only what it was asked then."""

    def __init__(self, kind: str) -> None:
        lines = (RECORDED / f"{kind}.jsonl").read_text().splitlines()
        self.kept = [json.loads(line) for line in lines]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        for each in self.kept:
            if (each["method"], each["path"], each["body"]) == (request.method, request.url.path, body):
                if body is not None and body.get("stream"):
                    events = (each if isinstance(each, str) else json.dumps(each) for each in each["reply"])
                    return httpx.Response(200, text="".join(f"data: {event}\n\n" for event in events))
                return httpx.Response(200, json=each["reply"])
        raise AssertionError(f"this was never asked: {request.method} {request.url.path} {body}")


def client_of(kind: str) -> Client:
    return Client("http://127.0.0.1:1", transport=httpx.MockTransport(Replay(kind)))


@pytest.fixture(params=KINDS)
async def served(request: Any) -> Any:
    upstream = _KINDS[request.param](client_of(request.param))
    await upstream.describe()
    yield upstream
    await upstream.close()


def exchange_of(demo: WhiteBoxModel, served: Any, name: str) -> Exchange:
    from hallucination_guard import Guard

    question, settings = ASKED[name]
    return Exchange.begin(
        Guard(demo, policy=Accept(), scorer=Likelihood()),
        question,
        said_in_full(GenerationSettings.of(settings)),
        served,
    )


async def streamed(served: Any, asked: Any) -> list[Part]:
    return [each async for each in served.stream(asked)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_is_known_by_what_it_says(kind: str) -> None:
    assert await _kind(client_of(kind)) == kind


async def test_it_says_who_it_is(served: Any) -> None:
    generator = await served.describe()
    assert generator.model == "smollm2"
    assert generator.version not in ("", "None")
    assert generator.dtype == ("all F32" if generator.kind == "llamacpp" else "")


async def test_a_model_that_it_has_not_is_refused(served: Any) -> None:
    served._model = "gpt"
    with pytest.raises(UpstreamError, match="gpt"):
        await served.describe()


@pytest.mark.parametrize("name", ASKED)
async def test_prompt_and_answer_are_read_id_by_id(demo: WhiteBoxModel, served: Any, name: str) -> None:
    exchange = exchange_of(demo, served, name)
    heard = exchange.heard(await served.answer(exchange.asked))
    assert heard.unscorable == ""
    drawn = demo.generate(ASKED[name][0], **{"max_new_tokens": 64, **ASKED[name][1]})
    assert heard.ids == drawn.response_token_ids
    assert heard.ended == drawn.finish_reason


@pytest.mark.parametrize("name", ASKED)
async def test_its_log_probabilities_are_ours(demo: WhiteBoxModel, served: Any, name: str) -> None:
    exchange = exchange_of(demo, served, name)
    part = await served.answer(exchange.asked)
    heard = exchange.heard(part)
    score = Likelihood()(demo, exchange.read(heard.ids))
    apart = distance(part.logprobs, score.token_logprobs)
    assert apart is not None
    # Float32 on both sides: how many threads sum up is worth 1e-5. The promise is 1e-4.
    assert apart < (5e-5 if type(served).__name__ == "VLLM" else 5e-3)


@pytest.mark.parametrize("name", ASKED)
async def test_a_stream_has_the_same_tokens(demo: WhiteBoxModel, served: Any, name: str) -> None:
    exchange = exchange_of(demo, served, name)
    whole, parts = await served.answer(exchange.asked), await streamed(served, exchange.asked)
    assert parts[0].prompt_ids == whole.prompt_ids == exchange.prompt_ids
    assert sum((each.ids or () for each in parts), ()) == whole.ids
    assert parts[-1].ended == whole.ended
    assert [each.ended for each in parts[:-1]] == [None] * (len(parts) - 1)


async def test_the_answer_begins_the_same_for_both_kinds_of_request(demo: WhiteBoxModel, served: Any) -> None:
    asked = asked_of(demo, FRANCE, said_in_full(GenerationSettings(max_new_tokens=24)), served.can)
    assert "Paris" in (await served.answer(asked)).text
