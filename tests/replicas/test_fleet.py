"""Who asks the replicas, with made-up ones: what is asked again, what is not, and what an error becomes."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from hallucination_guard import Guard, errors
from hallucination_guard.errors import AuditError, GuardError, InputError, ReplicaLost
from hallucination_guard.replicas.fleet import Fleet, Remote
from hallucination_guard.replicas.said import About, Asked, Broken, Said, leaving
from hallucination_guard.server.config import Alias
from hallucination_guard.server.refusals import Refusal, refusal_of
from hallucination_guard.server.requests import Tightening
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Call, Outcome, Released
from hallucination_guard_policies import AbstainBelow

TEXT = "Lyon is a city. It lies in France."


def events(*, limit: float = 5.0) -> list[Any]:
    policy = AbstainBelow(score="hybridgrad", limit=limit)
    guard = Guard(ScriptedModel(TEXT), policy=policy, scorer=ScriptedScorer(1.0), audit=MemorySink())
    return list(guard.stream("Where is Lyon?"))


def about(**more: Any) -> About:
    return About(**{"fingerprint": "f", "streams": True, "why": "", "suspended": "", **more})


class Made:
    """Replicas whose answers are made up: each request takes the next of them; an exception is raised."""

    def __init__(self, *answers: Any, name: str = "a") -> None:
        self._answers = list(answers)
        self.asked: list[Asked] = []
        self.closed = 0
        self.name, self.state = name, about()

    def _said(self, value: Any) -> Said:
        if isinstance(value, ReplicaLost | RuntimeError):
            raise value
        return Said(replica=self.name, value=value, about={"m": self.state})

    async def about(self) -> Said:
        return self._said(self._answers.pop(0) if self._answers else None)

    async def answer(self, asked: Asked) -> Said:
        self.asked.append(asked)
        return self._said(self._answers.pop(0))

    review = answer

    async def stream(self, asked: Asked) -> AsyncGenerator[Said, None]:
        self.asked.append(asked)
        try:
            for each in self._answers.pop(0):
                yield self._said(each)
        finally:
            self.closed += 1


def remote(made: Made) -> Remote:
    return Remote(Alias(alias="m"), Fleet(made))


LOST = ReplicaLost("gone")


async def ask(made: Made) -> Outcome:
    return await remote(made).answering(Tightening()).acall("Where is Lyon?", call=Call(request_id="r"))


async def stream(made: Made) -> list[Any]:
    found = []
    async with aclosing(remote(made).answering(Tightening()).astream("Where is Lyon?")) as coming:
        async for each in coming:
            found.append(each)
    return found


async def test_a_lost_replica_is_asked_again_under_the_same_request_id() -> None:
    outcome = events()[-1]
    made = Made(LOST, outcome)
    assert await ask(made) == outcome
    assert [each.call.request_id for each in made.asked] == ["r", "r"]


async def test_a_request_without_an_id_has_one_before_it_is_asked_for_the_first_time() -> None:
    made = Made(LOST, events()[-1])
    await remote(made).answering(Tightening()).acall("Where is Lyon?")
    first, second = (each.call.request_id for each in made.asked)
    assert first == second and first


async def test_it_is_asked_again_once_and_then_refused_for_a_while() -> None:
    made = Made(LOST, LOST, events()[-1])
    with pytest.raises(ReplicaLost) as caught:
        await ask(made)
    assert len(made.asked) == 2
    refusal = refusal_of(caught.value)
    assert (refusal.status, refusal.code, refusal.retry_after) == (503, "replica_lost", 1)


async def test_a_given_answer_is_judged_again_as_well() -> None:
    made = Made(LOST, events()[-1])
    await remote(made).review(Tightening(), "Where?", [1, 2], ended="stop", call=Call(request_id="r"))
    assert [(each.answer, each.ended) for each in made.asked] == [((1, 2), "stop")] * 2


@pytest.mark.parametrize(
    "error", [InputError("no", hint="yes"), AuditError("full"), Refusal(400, "no", code="not_stricter", param="p")]
)
async def test_an_error_of_the_guard_is_raised_as_itself_and_not_asked_again(error: Any) -> None:
    made = Made(error)
    with pytest.raises(type(error)) as caught:
        await ask(made)
    assert caught.value is error and len(made.asked) == 1


@pytest.mark.parametrize("value", [None, Broken(kind="KeyError"), events()[0]])
async def test_what_is_no_outcome_is_never_an_answer(value: Any) -> None:
    with pytest.raises(RuntimeError, match="replica a gave"):
        await ask(Made(value))


async def test_a_stream_begins_again_while_nothing_has_left() -> None:
    all_events = events()
    made = Made([LOST], all_events)
    assert await stream(made) == all_events
    assert made.closed == 2 and made.asked[0].call == made.asked[1].call


async def test_a_stream_does_not_go_on_elsewhere_once_a_sentence_has_left() -> None:
    first, *_ = events()
    made = Made([first, LOST], events())
    with pytest.raises(ReplicaLost):
        await stream(made)
    assert len(made.asked) == 1


async def test_a_stream_begins_again_once() -> None:
    made = Made([LOST], [LOST], events())
    with pytest.raises(ReplicaLost):
        await stream(made)
    assert len(made.asked) == 2


async def test_leaving_a_stream_closes_it_there() -> None:
    made = Made(events())
    async with aclosing(remote(made).answering(Tightening()).astream("Where is Lyon?")) as coming:
        await anext(coming)
    assert made.closed == 1


# --------------------------------------------------------------------------------------------------------- readiness


async def test_it_is_ready_when_a_replica_says_so_and_not_when_none_does() -> None:
    made = Made(LOST, None, LOST)
    behind = remote(made)
    assert not behind.status().ready
    with pytest.raises(GuardError, match="no replica answers"):
        await behind.start()
    assert not behind.status().ready
    await behind.start()
    assert behind.status().ready and behind.fingerprint == "f" and behind.streams
    with pytest.raises(ReplicaLost):
        await behind.fleet.look()
    assert behind.why == "no replica answers"
    await behind.close()


async def test_an_alias_that_is_not_ready_there_is_not_ready_here() -> None:
    made = Made()
    made.state = about(why="the server beside does not answer")
    behind = remote(made)
    with pytest.raises(GuardError, match="server beside"):
        await behind.start()
    assert not behind.status().ready
    await behind.close()


async def test_what_one_replica_suspends_is_suspended_until_it_takes_that_back_or_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Made()
    behind = remote(made)
    made.state = about(suspended="drift")
    await behind.fleet.look()
    made.name, made.state = "b", about()
    await behind.fleet.look()
    assert behind.suspended == "drift"
    monkeypatch.setattr("hallucination_guard.replicas.fleet._STALE", -1.0)
    await behind.fleet.look()
    monkeypatch.undo()
    assert behind.suspended == ""


async def test_somebody_is_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hallucination_guard.replicas.fleet._LOOK", 0.001)
    behind = remote(Made(None, LOST))
    await behind.start()
    async with asyncio.timeout(10):
        while not behind.why:
            await asyncio.sleep(0)
        while behind.why:
            await asyncio.sleep(0)
    await behind.close()


# --------------------------------------------------------------------------------------------------------- travelling


def kinds(kind: type[GuardError]) -> list[type[GuardError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in kinds(below))]


@pytest.mark.parametrize("kind", [each for each in kinds(GuardError) if each.__module__ == errors.__name__])
def test_every_error_arrives_as_itself(kind: type[GuardError]) -> None:
    error = kind("what", hint="how")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.message, back.hint) == (kind, "what", "how")
    assert refusal_of(back).body == refusal_of(error).body


def test_a_refusal_arrives_as_itself() -> None:
    error = Refusal(429, "no", code="queue_full", param="p", retry_after=3, close=True)
    back = pickle.loads(pickle.dumps(error))
    assert (back.body, back.headers, back.status) == (error.body, error.headers, 429)


def test_of_an_answer_that_was_not_let_through_no_text_travels() -> None:
    [outcome] = events(limit=0.5)
    assert outcome.text is None and "Lyon" in outcome.generation.text
    travelled = leaving(outcome)
    assert b"Lyon" not in pickle.dumps(travelled)
    assert isinstance(travelled, Outcome)
    assert travelled.verdict.score.scores == outcome.verdict.score.scores
    assert travelled.audit_ids == outcome.audit_ids


def test_what_was_let_through_travels_whole() -> None:
    *parts, outcome = pickle.loads(pickle.dumps([leaving(each) for each in events()]))
    assert all(isinstance(each, Released) for each in parts)
    assert "".join(each.text for each in parts) == TEXT
    assert isinstance(outcome, Outcome) and outcome.text == TEXT
