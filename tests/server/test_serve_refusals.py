"""What a server refuses, and how: in the OpenAI API's shape, without the request's own words, never with an answer."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hallucination_guard import Guard
from hallucination_guard.errors import (
    AnchorError,
    AuditError,
    BusyError,
    CalibrationMismatch,
    CallTimeout,
    ConfigurationError,
    GuardError,
    InputError,
    MissingExtra,
    ScoringError,
    SelfTestFailed,
    UpstreamError,
)
from hallucination_guard.server.refusals import refusal_of
from hallucination_guard.server.requests import FIELDS, ChatRequest, CompletionRequest, ScoreRequest
from hallucination_guard.testing import MemorySink, ScriptedModel
from hallucination_guard.values import Released

SECRET = "zanzibar"
ASK = {"model": "m", "messages": [{"role": "user", "content": "Where is Lyon?"}]}


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
        yield client


def to(running: Any) -> httpx.Client:
    return httpx.Client(base_url=running.url, timeout=30, trust_env=False)


def refused(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    assert SECRET not in reply.text
    return error


def chat(http: httpx.Client, **more: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={**ASK, **more})


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"stream": 0}, "invalid_field"),
        ({"temperature": SECRET}, "invalid_field"),
        ({"temperature": "0.1"}, "invalid_field"),
        ({"max_tokens": 0}, "invalid_field"),
        ({"max_tokens": True}, "invalid_field"),
        ({"n": 2}, "invalid_field"),
        ({"n": True}, "invalid_field"),
        ({"store": 0}, "invalid_field"),
        ({"presence_penalty": False}, "invalid_field"),
        ({"logit_bias": {"1": 5}}, "invalid_field"),
        ({"logprobs": True}, "invalid_field"),
        ({"store": True}, "invalid_field"),
        ({"parallel_tool_calls": False}, "invalid_field"),
        ({"presence_penalty": 0.5}, "invalid_field"),
        ({"reasoning_effort": SECRET}, "unsupported_field"),
        ({"functions": []}, "unsupported_field"),
        ({SECRET[:3]: SECRET}, "unknown_field"),
        ({"messages": []}, "invalid_field"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "invalid_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": SECRET}]}]}, "invalid_field"),
        ({"messages": [{"role": "user", "content": "x", "of": SECRET}]}, "invalid_field"),
        ({"messages": [{"role": "user", "content": "  "}]}, "invalid_input"),
        ({"tool_choice": "required"}, "invalid_input"),
        ({"max_tokens": 100_000}, "too_many_tokens"),
        ({"hallucination_guard": {"off": True}}, "invalid_field"),
        ({"hallucination_guard": {"max_risk": 0.1}}, "not_stricter"),
    ],
)
def test_what_would_have_no_effect_or_makes_no_sense_is_refused(http: httpx.Client, more: Any, code: str) -> None:
    refused(chat(http, **more), 400, code)


@pytest.mark.parametrize(
    "more",
    [
        {"user": "u", "metadata": {"team": "t"}, "store": False, "n": 1, "service_tier": "auto"},
        {"stop": ["x"], "seed": 1, "top_p": 1, "temperature": 0, "max_completion_tokens": 5},
        {"logit_bias": {}, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "stop": None},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *ASK["messages"]]},
    ],
)
def test_what_is_honoured_or_harmless_is_taken(http: httpx.Client, more: Any) -> None:
    assert chat(http, **more).status_code == 200


def test_facts_of_a_request_stand_in_its_record(http: httpx.Client, server: Any) -> None:
    chat(http, user="ann", metadata={"team": "blue"}, max_tokens=7)
    record = server.sink.records[-1]
    assert dict(record.tags) == {"user": "ann", "team": "blue"}
    assert server.model.calls[-1][1]["max_new_tokens"] == 7


def test_the_table_of_fields_is_that_of_the_requests_and_of_the_page() -> None:
    taken = {name for kind in (ChatRequest, CompletionRequest, ScoreRequest) for name in kind.model_fields}
    assert taken == {name for name, known in FIELDS.items() if known.how != "refused"}
    page = Path(__file__).parents[2].joinpath("docs/server.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", page, re.M))
    assert rows == {name: known.how for name, known in FIELDS.items()}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": ', "invalid_json"),
        (b"", "invalid_field"),
        (b"\xff\xfe", "bad_request"),
        (b"[" * 200_000, "bad_request"),
        (b'{"model": "m", "messages": ' + b'[{"a":' * 50_000, "bad_request"),
        (b"[]", "invalid_field"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "invalid_field"),
    ],
)
def test_a_body_that_is_no_json_is_refused(http: httpx.Client, body: bytes, code: str) -> None:
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["code"] in (code, "invalid_json"), reply.text


def test_half_a_character_is_refused(http: httpx.Client) -> None:
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": "\ud800"}]})
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400


def test_paths_methods_types_and_aliases_that_are_not_there(http: httpx.Client) -> None:
    refused(http.get("/nowhere"), 404, "not_found")
    reply = http.get("/v1/chat/completions")
    refused(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    refused(http.post("/v1/chat/completions", data={"a": "b"}), 415, "unsupported_media_type")
    refused(http.post("/v1/chat/completions", json={**ASK, "model": "other"}), 404, "model_not_found")


def test_a_page_of_another_name_does_not_reach_a_server_without_keys(http: httpx.Client) -> None:
    refused(http.get("/v1/models", headers={"host": "evil.example"}), 421, "unknown_host")
    assert http.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("the word"), 400),
        (MissingExtra("the word"), 400),
        (AuditError("the word"), 503),
        (UpstreamError("the word"), 503),
        (CallTimeout("the word"), 503),
        (CalibrationMismatch("the word"), 503),
        (SelfTestFailed("the word"), 503),
        (AnchorError("the word"), 503),
        (ScoringError("the word"), 503),
        (GuardError("the word"), 503),
    ],
)
def test_each_error_has_one_status_and_keeps_the_server_s_own_words_inside(error: GuardError, status: int) -> None:
    refusal = refusal_of(error)
    assert refusal.status == status
    assert ("the word" in refusal.message) == (status == 400)
    assert (refusal.retry_after is not None) == (status == 503)


def test_every_kind_of_error_is_in_the_table() -> None:
    def kinds(of: type[GuardError]) -> Iterator[type[GuardError]]:
        for each in of.__subclasses__():
            yield each
            yield from kinds(each)

    for kind in kinds(GuardError):
        if kind.__module__ == "hallucination_guard.errors":
            assert refusal_of(kind("x")).status in ((429,) if kind is BusyError else (400, 503))


class _Broken(MemorySink):
    def __call__(self, record: Any) -> str:
        raise AuditError(f"no room for {SECRET}")


def test_without_a_record_there_is_no_answer(serve: Any) -> None:
    with serve(sink=_Broken()) as running, to(running) as http:
        for more in ({}, {"stream": True}):
            reply = chat(http, **more)
            refused(reply, 503, "audit_unavailable")
            assert "Lyon" not in reply.text and reply.headers["retry-after"] == "10"


class _LaterBroken(MemorySink):
    def __call__(self, record: Any) -> str:
        if self.records:
            raise AuditError(f"no room for {SECRET}")
        return super().__call__(record)


def test_a_failure_in_mid_stream_is_an_error_event_and_no_end(serve: Any) -> None:
    with serve(sink=_LaterBroken()) as running, to(running) as http:
        reply = chat(http, stream=True)
    assert reply.status_code == 200 and "Lyon is a city." in reply.text
    assert "It lies in France" not in reply.text and SECRET not in reply.text
    assert '"finish_reason": "stop"' not in reply.text and "[DONE]" not in reply.text
    last = reply.text.strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error" and json.loads(last[1].removeprefix("data: "))["error"]["code"] == (
        "audit_unavailable"
    )


def test_the_stock_client_raises_on_a_failure_in_mid_stream(serve: Any) -> None:
    def stock(running: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0)

    with serve(sink=_LaterBroken()) as running, stock(running) as client:
        stream = client.chat.completions.create(stream=True, **ASK)
        with pytest.raises(openai.APIError, match="record cannot be written"):
            list(stream)


def test_a_defect_is_told_without_its_words(serve: Any, monkeypatch: Any, caplog: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(ScriptedModel, "stream", broken)
    with serve() as running, to(running) as http:
        refused(chat(http), 500, "internal_error")
    assert SECRET not in caplog.text and "ZeroDivisionError" in caplog.text


# ------------------------------------------------------------------------------------------------- scores


def test_a_given_text_is_judged_and_nothing_is_drawn(http: httpx.Client, server: Any) -> None:
    drawn = len(server.model.calls)
    for more, action in (
        ({"response": "Lyon lies in France."}, "accept"),
        ({"response_token_ids": list(b"Atlantis lies in the sea.")}, "abstain"),
    ):
        reply = http.post("/v1/score", json={"model": "m", "prompt": "Where?", **more})
        assert reply.status_code == 200, reply.text
        verdict = reply.json()["hallucination_guard"]
        assert verdict["decision"] == action and verdict["scores"] and verdict["record"]
    assert len(server.model.calls) == drawn


def test_a_policy_that_would_draw_again_does_not_for_a_given_text(serve: Any) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served
    from hallucination_guard_policies import AbstainBelow, RetryBelow

    policy = RetryBelow(score="s", limit=0.01, times=2) | AbstainBelow(score="s", limit=0.01)
    model = ScriptedModel("x")
    guard = Guard(model, policy=policy, scorer=_scorer(), audit=MemorySink())
    with serve(served={"m": Served(alias=Alias(alias="m"), guard=guard)}) as running, to(running) as http:
        reply = http.post("/v1/score", json={"model": "m", "prompt": "Where?", "response": "In France."}).json()
    assert reply["hallucination_guard"]["decision"] == "abstain" and reply["hallucination_guard"]["attempts"] == 1
    assert model.calls == []


@pytest.mark.parametrize("prompts", [False, True])
def test_a_prompt_is_in_the_server_s_lines_only_where_that_is_set(serve: Any, caplog: Any, prompts: bool) -> None:
    caplog.set_level("INFO", logger="hallucination_guard.server")
    with serve(settings={"log": {"prompts": prompts}}) as running, to(running) as http:
        chat(http, messages=[{"role": "user", "content": f"Where is {SECRET}?"}])
    said = "".join(str(record.__dict__) for record in caplog.records if record.name == "hallucination_guard.server")
    assert "server.decided m accept" in said and (SECRET in said) == prompts


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "Where?"},
        {"response": "x"},
        {"prompt": "Where?", "response": "x", "response_token_ids": [1]},
        {"prompt": "Where?", "response_token_ids": [999]},
        {"prompt": "Where?", "response_token_ids": [True]},
    ],
)
def test_a_score_of_nothing_is_refused(http: httpx.Client, more: Any) -> None:
    assert http.post("/v1/score", json={"model": "m", **more}).status_code == 400


# ------------------------------------------------------------------------------------- policies and readiness


def test_a_request_can_only_be_stricter(serve: Any, certified: Any) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served
    from hallucination_guard_policies import load_policy

    policy = {"id": "p", "version": 1, "rules": [{"abstain": {"below": {"confidence": 0.3}}}]}
    parts = certified(None) | {"policy": load_policy(policy)}
    alias = Alias(alias="m", policy="abstain", confidence=0.3)
    sink = MemorySink()
    with serve(served={"m": Served(alias=alias, guard=Guard(**parts, audit=sink))}) as running, to(running) as http:
        assert chat(http).json()["hallucination_guard"]["decision"] == "accept"
        error = refused(chat(http, hallucination_guard={"confidence": 0.2}), 400, "not_stricter")
        assert error["param"] == "hallucination_guard.confidence"
        strict = chat(http, hallucination_guard={"confidence": 1.0}).json()
        assert strict["hallucination_guard"]["decision"] == "abstain"
        assert strict["choices"][0]["message"]["content"] is None
        assert chat(http).json()["hallucination_guard"]["decision"] == "accept"


def test_a_risk_can_only_be_smaller_and_has_to_be_certified(serve: Any, certified: Any, tmp_path: Path) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served
    from hallucination_guard_policies import load_policy

    document = tmp_path / "p.yaml"
    document.write_text("id: p\nversion: 1\nrules: [abstain: {below: {max_risk: 0.4}}]\n", encoding="utf-8")
    parts = certified(None) | {"policy": load_policy(document)}
    served = Served(alias=Alias(alias="m", policy=str(document)), guard=Guard(**parts, audit=MemorySink()))
    with serve(served={"m": served}) as running, to(running) as http:
        refused(chat(http, hallucination_guard={"max_risk": 0.5}), 400, "not_stricter")
        refused(chat(http, hallucination_guard={"max_risk": 0.01}), 400, "not_stricter")
        assert chat(http, hallucination_guard={"max_risk": 0.3}).status_code == 200


def test_a_document_that_was_changed_since_is_not_what_a_stricter_request_gets(
    serve: Any, certified: Any, tmp_path: Path
) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served
    from hallucination_guard_policies import load_policy

    document = tmp_path / "p.yaml"
    document.write_text("id: p\nversion: 1\nrules: [abstain: {below: {confidence: 0.3}}]\n", encoding="utf-8")
    parts = certified(None) | {"policy": load_policy(document)}
    served = Served(alias=Alias(alias="m", policy=str(document)), guard=Guard(**parts, audit=MemorySink()))
    document.write_text("id: q\nversion: 1\nrules: [abstain: {below: {confidence: 0.1}}]\n", encoding="utf-8")
    with serve(served={"m": served}) as running, to(running) as http:
        assert chat(http, hallucination_guard={"confidence": 0.4}).status_code == 200
        assert served.guard.audit.records[-1].policy["id"] == "p"
        document.unlink()
        assert chat(http, hallucination_guard={"confidence": 0.5}).status_code == 200


def test_one_log_is_not_written_in_two_ways_however_it_is_named(tmp_path: Path) -> None:
    from hallucination_guard.server.config import Settings

    aliases = [
        {"alias": "a", "audit": "audit.jsonl", "content": "text"},
        {"alias": "b", "audit": str(tmp_path / "audit.jsonl"), "content": "redacted"},
    ]
    (tmp_path / "serve.yaml").write_text(json.dumps({"models": aliases}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="two aliases share the log"):
        Settings.read(tmp_path / "serve.yaml")


def test_a_server_that_draws_and_is_not_there_is_not_ready(serve: Any) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served
    from hallucination_guard_policies import AbstainBelow

    guard = Guard(ScriptedModel("x"), policy=AbstainBelow(score="s", limit=1), scorer=_scorer())
    alias = Alias.model_validate({"alias": "m", "upstream": {"url": "http://127.0.0.1:9", "kind": "vllm"}})
    with serve(served={"m": Served(alias=alias, guard=guard)}) as running, to(running) as http:
        assert http.get("/readyz").status_code == 503
        assert http.get("/healthz").status_code == 200
        assert refused(chat(http), 503, "not_ready") and chat(http).headers["retry-after"] == "5"


def test_a_sidecar_answers_through_the_server(serve: Any, sidecar_of: Any, double: Any) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served

    sidecar = sidecar_of(double, doubts="Atlantis")
    served = Served(alias=Alias(alias="m"), guard=sidecar.guard, sidecar=sidecar)
    with serve(served={"m": served}) as running, to(running) as http:
        while http.get("/readyz").status_code != 200:
            time.sleep(0.01)
        reply = chat(http).json()
        assert reply["choices"][0]["message"]["content"] == "Lyon is a city. It lies in France."
        assert reply["hallucination_guard"]["status"] == "scored"
        assert 'data: {"error"' not in chat(http, stream=True).text
        assert 'parity{alias="m",what="compared"} 2.0' in http.get("/metrics").text
        double.off = 3.0  # another model draws now
        statuses = [chat(http).json()["hallucination_guard"]["decision"] for _ in range(5)]
        assert statuses == ["accept"] * 4 + ["abstain"]  # the watch over parity suspends, the policy decides
        assert http.get("/readyz").json()["why"] == {"m": "suspended"}
        assert double.open == 0


def _scorer() -> Any:
    from hallucination_guard.testing import ScriptedScorer

    return ScriptedScorer(0.1, name="s")


def test_a_closing_server_lets_nobody_in(serve: Any) -> None:
    with serve() as running, to(running) as http:
        running.app.close()
        refused(chat(http), 503, "shutting_down")
        assert http.get("/readyz").status_code == 503


def test_the_figures_say_what_was_decided(serve: Any) -> None:
    with serve() as running, to(running) as http:
        chat(http)
        chat(http, messages=[{"role": "user", "content": "Where is Atlantis?"}], stream=True)
        chat(http, n=2)
        text = http.get("/metrics").text
    for line in (
        'hallucination_guard_decisions_total{action="accept",alias="m",rule="abstain_below"} 1.0',
        'hallucination_guard_decisions_total{action="abstain",alias="m",rule="abstain_below"} 1.0',
        'hallucination_guard_refused_total{code="invalid_field"} 1.0',
        'hallucination_guard_queue{alias="m"} 0.0',
        'hallucination_guard_ready{alias="m"} 1.0',
        'hallucination_guard_suspended{alias="m"} 0.0',
    ):
        assert line in text, text


# ------------------------------------------------------------------------------------ queues, time, leaving


def test_a_full_queue_refuses_at_once(serve: Any) -> None:
    limits = {"running": 1, "queue": 1}
    long = [{"role": "user", "content": "long"}]

    async def crowd(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
            asks = [http.post("/v1/chat/completions", json={**ASK, "messages": long, "stream": True}) for _ in range(5)]
            return await asyncio.gather(*asks)

    with serve(settings={"limits": limits}) as running:
        running.model.slow = 0.002
        replies = asyncio.run(crowd(running.url))
    assert sorted(each.status_code for each in replies) == [200, 200, 429, 429, 429]
    late = next(each for each in replies if each.status_code == 429)
    refused(late, 429, "queue_full")
    assert late.headers["retry-after"] == "1"


def test_a_request_ends_with_its_time(serve: Any) -> None:
    with serve(settings={"limits": {"deadline_seconds": 0.3}}) as running:
        running.model.slow = 0.01
        with to(running) as http:
            refused(chat(http, messages=[{"role": "user", "content": "long"}], stream=True), 503, "deadline")
        drawn = running.model.drawn
        time.sleep(0.1)
        assert running.model.drawn <= drawn + 1


def test_a_client_that_leaves_a_stream_ends_it_within_a_token(serve: Any) -> None:
    with serve() as running:
        running.model.slow = 0.02
        body = {**ASK, "messages": [{"role": "user", "content": "long"}], "stream": True}
        with to(running) as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=0.3)
        time.sleep(0.1)
        drawn = running.model.drawn
        time.sleep(0.2)
        assert 0 < drawn < 60 and running.model.drawn <= drawn + 1
        assert running.app.places["m"].running == 0
        assert len(running.sink.records) == 1  # what was drawn has its record


def test_a_client_that_leaves_a_call_cancels_it(serve: Any, server: Any) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served

    cancelled = []

    class Slow:
        async def acall(self, *_: Any, **__: Any) -> Any:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

    class Standing(Served):
        def answering(self, tightening: Any) -> Any:
            return Slow()

    guard = server.app.served["m"].guard
    with serve(served={"m": Standing(alias=Alias(alias="m"), guard=guard)}) as running, to(running) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=ASK, timeout=0.2)
        while not cancelled:
            time.sleep(0.01)
        assert running.app.places["m"].running == 0
        assert 'clients_gone_total{alias="m"} 1.0' in http.get("/metrics").text


def test_a_client_that_reads_nothing_is_dropped_and_its_place_is_free(serve: Any, server: Any) -> None:
    from hallucination_guard.server.config import Alias
    from hallucination_guard.server.house import Served

    guard = server.app.served["m"].guard

    class Long:
        """More than sockets hold, in its first sentence."""

        async def astream(self, *given: Any, **options: Any) -> Any:
            async with aclosing(guard.astream(*given, **options)) as events:
                async for each in events:
                    yield replace(each, text="x" * 30_000_000) if isinstance(each, Released) else each

    class Standing(Served):
        def answering(self, tightening: Any) -> Any:
            return Long()

    served = {"m": Standing(alias=Alias(alias="m"), guard=guard)}
    with serve(served=served, settings={"limits": {"write_seconds": 0.5}}) as running:
        place = running.app.places["m"]
        body = json.dumps({**ASK, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as client:
            client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            began = time.monotonic()
            while not place.running:
                assert time.monotonic() < began + 5
                time.sleep(0.01)
            while place.running:
                assert time.monotonic() < began + 10
                time.sleep(0.01)
            assert time.monotonic() > began + 0.4  # it was given its time
            got = 0
            with suppress(ConnectionResetError):
                while part := client.recv(1 << 20):
                    got += len(part)
            assert got < 30_000_000
