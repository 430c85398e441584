"""A double of vLLM that speaks its wire format (as recorded in ``recorded/``) over the scripted model's bytes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import pytest

from hallucination_guard import Calibration, Guard
from hallucination_guard.calibration import Labelled, calibrate
from hallucination_guard.errors import InputError
from hallucination_guard.server.upstream import Sidecar
from hallucination_guard.server.upstream.client import Client
from hallucination_guard.server.upstream.vllm import VLLM
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions, Generation, Score, as_messages
from hallucination_guard_policies import AbstainBelow, load_policy

END = 2


class Reader(ScriptedModel):
    """The copy in this process: a token is a byte, and the byte 2 ends a turn."""

    end_ids = frozenset({END})

    def read(self, messages: Any, answer: Any, **settings: Any) -> Generation:
        if odd := [each for each in answer if not isinstance(each, str) and not 0 <= each < 256]:
            raise InputError(f"the answer has the token id {odd[0]}, outside the vocabulary of 256")
        return super().read(messages, answer, **settings)


class Double:
    """A server. Each attribute is something that it may do otherwise.

    ``texts`` are its answers in turn, the last one for ever; ``finish`` how it says that they ended; ``edit`` changes
    every reply or event before it is sent; ``dies_after`` events the connection breaks; ``off`` is added to each
    log-probability.
    """

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts) or ["Lyon is a city. It lies in France."]
        self.ends = True
        self.finish = "stop"
        self.off = 0.0
        self.edit: Callable[[dict[str, Any]], Any] = lambda reply: None
        self.dies_after: int | None = None
        self.asked: list[dict[str, Any]] = []
        self.open = 0
        self._reader = Reader("unused")

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/version":
            return httpx.Response(200, json={"version": "0.32.0"})
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "owned_by": "vllm"}]})
        body = json.loads(request.content)
        self.asked.append(body)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        prompt = list(self._reader.prompt(body["messages"]).token_ids)
        ids = [*text.encode(), *([END] if self.ends else [])]
        shown, stopped = text, None
        for stop in body.get("stop", []):
            if stop in text:
                shown, stopped = text[: text.index(stop)], stop
                ids = [*text[: text.index(stop) + len(stop)].encode()]  # vLLM gives the ids of the stop text as well
        if body.get("stream"):
            return httpx.Response(200, stream=self._events(prompt, ids, shown, stopped))
        reply = {
            "choices": [{**self._choice(ids, stopped), "message": {"content": shown}, "finish_reason": self.finish}],
            "prompt_token_ids": prompt,
        }
        self.edit(reply)
        return httpx.Response(200, json=reply)

    def _choice(self, ids: list[int], stopped: str | None) -> dict[str, Any]:
        content = [{"token": chr(each), "logprob": -0.5 + self.off} for each in ids]
        return {"index": 0, "token_ids": ids, "logprobs": {"content": content}, "stop_reason": stopped}

    def _events(self, prompt: list[int], ids: list[int], shown: str, stopped: str | None) -> httpx.AsyncByteStream:
        first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": prompt}
        events: list[dict[str, Any]] = [first]
        left = shown
        for at, each in enumerate(ids):
            text, left = left[:1], left[1:]
            choice = {**self._choice([each], None), "delta": {"content": text}, "finish_reason": None}
            if at == len(ids) - 1:
                choice |= {"finish_reason": self.finish, "stop_reason": stopped}
            events.append({"choices": [choice]})
        return _Stream(self, events)


class _Stream(httpx.AsyncByteStream):
    def __init__(self, double: Double, events: list[dict[str, Any]]) -> None:
        self._double, self._events = double, events
        double.open += 1

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at, event in enumerate(self._events):
            if at == self._double.dies_after:
                raise httpx.ReadError("connection reset")
            self._double.edit(event)
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def aclose(self) -> None:
        self._double.open -= 1


def scorer(doubts: str = "nothing") -> ScriptedScorer:
    """Every token has log p = −0.5; answers with ``doubts`` in them are doubtful."""

    def score(generation: Generation) -> Any:
        return Score(
            status="scored",
            scorer=own.identity,
            scores={"hybridgrad": 1.0 if doubts in generation.text else 0.1},
            anchor=generation.anchor,
            token_logprobs=(-0.5,) * len(generation.response_token_ids),
        )

    own = ScriptedScorer(score)
    return own


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture
def sidecar_of() -> Callable[..., Sidecar]:
    """A sidecar of this double, not yet started."""

    def made(
        double: Double,
        *,
        doubts: str = "nothing",
        answers: Any = "never drawn",
        probes: Sequence[str] = ("?", "!"),
        **settings: Any,
    ) -> Sidecar:
        guard = Guard(
            settings.pop("model", Reader(answers)),
            policy=settings.pop("policy", None) or AbstainBelow(score="hybridgrad", limit=0.5),
            scorer=settings.pop("scorer", scorer(doubts)),
            audit=settings.pop("audit", MemorySink()),
            **settings,
        )
        client = Client("http://127.0.0.1:1/v1", transport=httpx.MockTransport(double))
        return Sidecar(guard, VLLM(client, dtype="float32"), probes=probes)

    return made


@pytest.fixture
def certified() -> Callable[[str | None], dict[str, Any]]:
    """What a guard needs for a policy on a certificate of answers that this generator drew."""

    def made(generator: str | None) -> dict[str, Any]:
        model, own, rng = Reader("Lyon"), scorer(), np.random.default_rng(0)
        rows = [
            Labelled(
                id=f"q{at}",
                attempt=1,
                correct=bool(rng.random() > score**2),
                judge="made up",
                scores={"hybridgrad": float(score)},
                length=5,
                model=model.identity,
                scorer=own.identity,
                conditions=replace(Conditions.of(model.generate("Who?")), generator=generator),
            )
            for at in range(400)
            for score in (rng.random(),)
        ]
        calibration = calibrate(rows, alphas=[0.3])
        read = Calibration.model_validate_json(calibration.model_dump_json())
        return {"model": model, "scorer": own, "calibration": read, "policy": AbstainBelow(max_risk=0.3)}

    return made


# ------------------------------------------------------------------------------------------- the server itself

WEATHER = '<tool_call>{"name": "weather", "arguments": {"city": "Lyon"}}</tool_call>'


class Talker(Reader):
    """Says what fits the last turn; ``slow`` seconds a token, and counts them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("unused", **settings)
        self.slow = 0.0
        self.drawn = 0
        self.streaming = True

    def _next(self, messages: Any, settings: dict[str, Any]) -> str:
        [*_, last] = turns = as_messages(messages)
        self.calls.append((turns, dict(settings)))
        if last.role == "tool":
            return f"It is {last.content}."
        if "weather" in last.content and settings.get("tools"):
            return WEATHER
        if "half" in last.content:
            return "Half is known. Atlantis is not."
        if "Atlantis" in last.content:
            return "Atlantis lies in the sea."
        if "long" in last.content:
            return "word " * 60
        return "Lyon is a city. It lies in France."

    def stream(self, messages: Any, **settings: Any) -> Any:
        live = super().stream(messages, **settings)
        draw = live.draw

        def drawing() -> None:
            self.drawn += 1
            if self.slow:
                time.sleep(self.slow)
            draw()

        live.draw = drawing
        return live


@dataclass(slots=True)
class Serving:
    """A running server."""

    url: str
    sink: Any
    model: Talker
    app: Any
    port: int


@contextmanager
def serving(
    *, settings: dict[str, Any] | None = None, keys: Any = None, served: Any = None, sink: Any = None
) -> Iterator[Serving]:
    """A real server on a free port of the loopback, in a thread."""
    from hallucination_guard.server.app import create_app
    from hallucination_guard.server.config import Alias, Settings
    from hallucination_guard.server.house import Served
    from hallucination_guard.server.running import running

    model, sink = Talker(), MemorySink() if sink is None else sink
    policy = {"id": "t", "version": 1, "rules": [{"abstain": {"above": {"score": "hybridgrad", "limit": 0.5}}}]}
    guard = Guard(model, policy=load_policy(policy), scorer=scorer("Atlantis"), audit=sink)
    made = Settings.model_validate({"port": 0, **(settings or {})})
    app = create_app(made, served or {"m": Served(alias=Alias(alias="m"), guard=guard)}, keys)
    server = running(app, made, app.close)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Serving(f"http://127.0.0.1:{port}", sink, model, app, port)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def serve() -> Any:
    return serving
