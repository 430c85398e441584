"""Calls of many tasks meet where the model computes, and nowhere else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from hallucination_guard import Guard, HybridGrad, WhiteBoxModel
from hallucination_guard.errors import AuditError, BusyError, ConfigurationError
from hallucination_guard.model import live
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Generation, Score
from hallucination_guard_policies import AbstainBelow, Accept

QUESTIONS = [f"What is {at} and {at}?" for at in range(8)]
SETTINGS = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers were scored at a time."""
    sizes: list[int] = []
    batch = HybridGrad.batch

    def counted(self: HybridGrad, model: Any, generations: Sequence[Generation]) -> list[Score]:
        sizes.append(len(generations))
        return batch(self, model, generations)

    monkeypatch.setattr(HybridGrad, "batch", counted)
    return sizes


class Watched:
    """The batches that are decoded, and a pause in each of their steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.steps = 0
        self.pause = 0.0
        self.begun = threading.Event()
        watched = self

        class Decoding(live.Decoding):
            def steps(self, room: int) -> Iterator[list[int]]:
                watched.rows.append(len(self._asked))
                for step in super().steps(room):
                    watched.steps += 1
                    if watched.steps > 2:
                        watched.begun.set()
                    time.sleep(watched.pause)
                    yield step

        monkeypatch.setattr(live, "Decoding", Decoding)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def ending(model: WhiteBoxModel, settings: dict[str, Any], questions: list[str], wanted: Any) -> str:
    """A stop text at which answers end after as many tokens as is wanted."""
    texts = [model.generate(each, **settings).text for each in questions]
    for stop in sorted(set("".join(texts))):
        if wanted([len(model.generate(each, **settings, stop=[stop]).response_token_ids) for each in questions]):
            return stop
    raise AssertionError("none")


async def settled(sink: MemorySink, records: int) -> None:
    for _ in range(500):
        if len(sink.records) >= records:
            return
        await asyncio.sleep(0.01)


async def test_they_are_decoded_as_one_batch_and_scored_in_batches(
    tiny: WhiteBoxModel, watched: Watched, scored: list[int]
) -> None:
    sink = MemorySink()
    guard = Guard(tiny, policy=Accept(), audit=sink, generation=SETTINGS)
    found = await asyncio.gather(*map(guard.acall, QUESTIONS))
    assert max(watched.rows) > 1 and sum(watched.rows) == len(QUESTIONS)
    assert max(scored) > 1 and sum(scored) == len(QUESTIONS)
    assert sorted(each.request_id for each in found) == sorted(each.request_id for each in sink.records)


async def test_no_more_are_scored_at_a_time_than_the_batch_size(tiny: WhiteBoxModel, scored: list[int]) -> None:
    guard = Guard(tiny, policy=Accept(), generation=SETTINGS, batch_size=3)
    await asyncio.gather(*map(guard.acall, QUESTIONS * 2))
    assert 1 < max(scored) <= 3 and sum(scored) == 16


async def test_no_more_are_decoded_at_a_time_than_a_batch_may_have(
    tiny: WhiteBoxModel, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_GATHER", 0.3)  # a slow machine must not begin before all have come
    guard = Guard(tiny.with_batches(3), policy=Accept())
    outcomes = await asyncio.gather(*(guard.acall(each, **SETTINGS) for each in QUESTIONS))
    assert watched.rows == [3, 3, 2]
    alone = Guard(tiny, policy=Accept())
    assert [each.text for each in outcomes] == [alone(each, **SETTINGS).text for each in QUESTIONS]


@pytest.mark.parametrize("most", [0, -1, True, 2.0, None])
def test_a_batch_has_a_positive_whole_number_of_rows(tiny: WhiteBoxModel, most: Any) -> None:
    with pytest.raises(ConfigurationError, match="a batch of"):
        tiny.with_batches(most)


@pytest.mark.parametrize("others", [False, True])
async def test_what_ends_early_is_scored_with_the_rest_only_while_others_wait_to_be_drawn(
    tiny: WhiteBoxModel, watched: Watched, scored: list[int], monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    monkeypatch.setattr(live, "_GATHER", 0.3)
    monkeypatch.setattr(live.Streams, "_spare", False)
    settings: dict[str, Any] = {**SETTINGS, "max_new_tokens": 24}
    stop = ending(tiny, settings, QUESTIONS, lambda lengths: 12 < min(lengths) < max(lengths))
    guard = Guard(tiny, policy=Accept(), generation={**settings, "stop": [stop]})
    watched.pause = 0.02
    under_way = [asyncio.create_task(guard.acall(each)) for each in QUESTIONS]
    await asyncio.to_thread(watched.begun.wait, 10)
    under_way += [asyncio.create_task(guard.acall(each)) for each in ["And this?", "And that?"][: 2 * others]]
    found = await asyncio.gather(*under_way)
    lengths = {len(each.generation.response_token_ids) for each in found[: len(QUESTIONS)]}
    assert len(lengths) > 1 and watched.rows[0] == len(QUESTIONS)
    assert (scored[0] == len(QUESTIONS)) == others


async def test_it_waits_no_longer_than_it_took(
    tiny: WhiteBoxModel, watched: Watched, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_GATHER", 0.3)
    monkeypatch.setattr(live.Streams, "_spare", False)
    settings: dict[str, Any] = {**SETTINGS, "max_new_tokens": 24}
    stop = ending(tiny, settings, QUESTIONS, lambda lengths: min(lengths) < 10 and max(lengths) == 24)
    guard = Guard(tiny, policy=Accept(), generation={**settings, "stop": [stop]})
    watched.pause = 0.05
    under_way = [asyncio.create_task(guard.acall(each)) for each in QUESTIONS]
    await asyncio.to_thread(watched.begun.wait, 10)
    under_way += [asyncio.create_task(guard.acall("And this?"))]
    await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    assert scored[0] < len(QUESTIONS) and watched.rows == [len(QUESTIONS)]
    await asyncio.gather(*under_way)


async def test_one_that_is_cancelled_while_it_waits_to_be_scored_is_recorded_and_the_rest_are_scored(
    tiny: WhiteBoxModel, watched: Watched, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_GATHER", 0.3)
    monkeypatch.setattr(live.Streams, "_spare", False)
    settings: dict[str, Any] = {**SETTINGS, "max_new_tokens": 24}
    stop = ending(tiny, settings, QUESTIONS, lambda lengths: 12 < min(lengths) < max(lengths))
    sink = MemorySink()
    guard = Guard(tiny, policy=Accept(), audit=sink, generation={**settings, "stop": [stop]})
    watched.pause = 0.05
    under_way = [asyncio.create_task(guard.acall(each)) for each in QUESTIONS]
    await asyncio.to_thread(watched.begun.wait, 10)
    under_way += [asyncio.create_task(guard.acall("And this?"))]
    while not tiny._streams._jobs:
        await asyncio.sleep(0.01)
    assert not scored
    for each in under_way[:-1]:  # whoever waits to be scored is among them
        each.cancel()
    ended = await asyncio.gather(*under_way, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in ended] == [True] * len(QUESTIONS) + [False]
    assert await asyncio.to_thread(guard.settle, 20)
    assert len(sink.records) == len(under_way) and tiny._streams._jobs == []


@pytest.mark.parametrize(("waits", "batches"), [(0.0, None), (2.0, [4, 4])])
async def test_a_batch_waits_a_little_for_as_many_rows_as_the_last(
    tiny: WhiteBoxModel, watched: Watched, monkeypatch: pytest.MonkeyPatch, waits: float, batches: list[int] | None
) -> None:
    monkeypatch.setattr(live.Streams, "_spare", False)
    monkeypatch.setattr(live, "_SHARE", 100.0)
    monkeypatch.setattr(live, "_FULL", waits)
    guard, met = Guard(tiny, policy=Accept(), generation=SETTINGS), asyncio.Barrier(4)

    async def client(at: int) -> None:
        await guard.acall(QUESTIONS[at])
        await met.wait()
        await asyncio.sleep(0.1 * at)  # of one batch, they come back one after the other
        await guard.acall(QUESTIONS[at + 4])

    with monkeypatch.context() as patched:
        patched.setattr(live, "_GATHER", 0.3)
        first = [asyncio.create_task(client(at)) for at in range(4)]
        while not watched.rows:
            await asyncio.sleep(0.01)
    await asyncio.gather(*first)
    assert watched.rows[0] == 4 and sum(watched.rows) == 8
    assert watched.rows == batches if batches else len(watched.rows) > 2


async def test_who_came_too_late_for_one_batch_does_not_stay_apart_from_the_rest(
    tiny: WhiteBoxModel, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.Streams, "_spare", False)
    monkeypatch.setattr(live, "_SHARE", 100.0)
    monkeypatch.setattr(live, "_FULL", 2.0)
    guard = Guard(tiny, policy=Accept(), generation=SETTINGS)
    watched.pause = 0.05

    async def client(at: int) -> None:
        for turn in range(3):
            await guard.acall(QUESTIONS[(at + turn) % len(QUESTIONS)])
            await asyncio.sleep(0.2)

    first = asyncio.create_task(client(0))
    await asyncio.to_thread(watched.begun.wait, 10)
    await asyncio.gather(first, *map(client, range(1, 4)))
    assert watched.rows == [1, 4, 4, 3]


async def test_one_who_comes_alone_does_not_wait_for_a_batch_of_long_ago(
    tiny: WhiteBoxModel, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_GATHER", 0.3)
    monkeypatch.setattr(live, "_SHARE", 100.0)
    guard = Guard(tiny, policy=Accept(), generation=SETTINGS)
    await asyncio.gather(*map(guard.acall, QUESTIONS))
    assert tiny._streams._awaited > 1 and tiny._streams._patience == live._FULL < 0.5
    await asyncio.sleep(live._FULL)
    began = time.perf_counter()
    await asyncio.to_thread(next, iter(guard.stream("Alone?")), None)
    alone = time.perf_counter() - began
    tiny._streams._awaited = 0
    began = time.perf_counter()
    await asyncio.to_thread(next, iter(guard.stream("Alone?")), None)
    assert alone < time.perf_counter() - began + live._FULL


async def test_guards_with_other_policies_share_a_batch_and_no_decision(tiny: WhiteBoxModel, watched: Watched) -> None:
    lets = Guard(tiny, policy=Accept(), generation=SETTINGS)
    never = Guard(tiny, policy=AbstainBelow(score="hybridgrad", limit=0.0), generation=SETTINGS)
    found = await asyncio.gather(*(guard.acall(each) for each in QUESTIONS[:4] for guard in (lets, never)))
    assert max(watched.rows) > 1
    assert [each.accepted for each in found] == [True, False] * 4


async def test_what_fails_in_one_call_does_not_reach_the_others(tiny: WhiteBoxModel) -> None:
    sink = MemorySink()

    def one_fails(record: Any) -> str:
        if QUESTIONS[2] in str(record.prompt):
            raise OSError("the disk is full")
        return sink(record)

    guard = Guard(tiny, policy=Accept(), audit=one_fails, generation=SETTINGS)
    found = await asyncio.gather(*map(guard.acall, QUESTIONS), return_exceptions=True)
    assert [at for at, each in enumerate(found) if isinstance(each, AuditError)] == [2]
    assert sum(not isinstance(each, BaseException) and each.accepted for each in found) == 7


async def test_a_cancelled_call_takes_no_further_token_and_is_recorded(tiny: WhiteBoxModel, watched: Watched) -> None:
    sink = MemorySink()
    guard = Guard(tiny, policy=Accept(), audit=sink, generation={**SETTINGS, "max_new_tokens": 200})
    watched.pause = 0.02
    task = asyncio.create_task(guard.acall("Go on for ever."))
    await asyncio.to_thread(watched.begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    at_cancel = watched.steps
    await settled(sink, 1)
    await asyncio.sleep(0.2)
    assert watched.steps <= at_cancel + 1 < 100
    [record] = sink.records
    assert (record.decision, record.rule, record.status) == ("abstain", "interrupted", "error")
    assert 0 < record.tokens["out"] < 100


async def test_one_that_is_cancelled_while_it_waits_is_recorded_and_the_rest_go_on(
    tiny: WhiteBoxModel, watched: Watched
) -> None:
    sink = MemorySink()
    guard = Guard(tiny, policy=Accept(), audit=sink, generation={**SETTINGS, "max_new_tokens": 12})
    watched.pause = 0.05
    first = asyncio.create_task(guard.acall("First?"))
    await asyncio.to_thread(watched.begun.wait, 10)
    waiting = asyncio.create_task(guard.acall("Second?"))  # its batch begins when the first has ended
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await first).accepted
    await settled(sink, 2)
    assert sorted(each.rule for each in sink.records) == ["accept_all", "interrupted"]
    assert watched.rows == [1]


async def test_beyond_its_places_a_call_is_refused_at_once_and_a_place_comes_back() -> None:
    go_on = threading.Event()

    def wait(generation: Any) -> float:
        go_on.wait(10)
        return 1.0

    guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(wait), max_calls=2)
    under_way = [asyncio.create_task(guard.acall("Q?")) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(BusyError, match="2 calls are under way"):
        await guard.acall("Q?")
    go_on.set()
    assert [each.text for each in await asyncio.gather(*under_way)] == ["a", "a"]
    assert (await guard.acall("Q?")).text == "a"


async def test_a_prompt_that_cannot_be_used_gives_its_place_back() -> None:
    guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(1.0), max_calls=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="empty"):
            await guard.acall("")
    assert (await guard.acall("Q?")).text == "a"


async def test_a_call_is_never_scored_by_the_scorer_of_another(tiny: WhiteBoxModel, watched: Watched) -> None:
    own = Guard(tiny, policy=Accept(), scorer=ScriptedScorer(0.1), generation=SETTINGS)
    other = own.with_policy(Accept())
    other.scorer = ScriptedScorer(99.0)  # it was swapped afterwards
    found = await asyncio.gather(*(guard.acall(each) for each in QUESTIONS[:4] for guard in (own, other)))
    assert max(watched.rows) > 1
    assert [dict(each.verdict.score.scores)["hybridgrad"] for each in found] == [0.1, 99.0] * 4


async def test_settling_waits_for_the_record_of_a_call_that_was_cancelled() -> None:
    sink, begun, go_on = MemorySink(), threading.Event(), threading.Event()

    def wait(generation: Any) -> float:
        begun.set()
        go_on.wait(10)
        return 1.0

    guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(wait), audit=sink, max_calls=1)
    task = asyncio.create_task(guard.acall("Q?"))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not guard.settle(0.01)
    with pytest.raises(BusyError):  # its thread has its place until it has ended
        await guard.acall("Q?")
    go_on.set()
    assert await asyncio.to_thread(guard.settle, 10)
    assert len(sink.records) == 1


@pytest.mark.parametrize("followed", [False, True])
async def test_settling_waits_for_the_record_of_a_stream_that_was_left(followed: bool) -> None:
    sink, begun, go_on = MemorySink(), threading.Event(), threading.Event()

    def wait(generation: Any) -> float:
        begun.set()
        go_on.wait(10)
        return 1.0

    guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(wait), audit=sink, max_calls=1)
    stream = guard.afollow("Q?", ["a"]) if followed else guard.astream("Q?")
    reader = asyncio.create_task(anext(stream))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):  # the second time it does not wait for the thread any more
        reader.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert guard.under_way == 1 and not guard.settle(0.01)
    go_on.set()
    assert await asyncio.to_thread(guard.settle, 10)
    assert guard.under_way == 0 and len(sink.records) >= 1


async def test_a_stream_takes_no_place_of_a_call() -> None:
    guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(1.0), max_calls=1)
    waiting = asyncio.Event()

    async def pieces() -> AsyncIterator[str]:
        await waiting.wait()
        yield "a"

    async with aclosing(guard.afollow("Q?", pieces())) as stream:
        reader = asyncio.create_task(anext(stream))
        while guard.under_way == 0:
            await asyncio.sleep(0.01)
        assert (await guard.acall("Q?")).text == "a"
        waiting.set()
        assert (await reader).text == "a"  # type: ignore[union-attr]


DROPPED = """
import asyncio, sys, threading, time
from hallucination_guard import Guard
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_policies import Accept

loop, begun = asyncio.new_event_loop(), asyncio.Event()

def slowly(generation):
    loop.call_soon_threadsafe(begun.set)
    while threading.main_thread().is_alive():  # the record is written after the program's end
        time.sleep(0.01)
    return 1.0

def sink(record):
    print(record.decision, flush=True)
    return "id"

async def never():
    begun.set()
    await asyncio.sleep(1000)
    yield "a"

guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(slowly), audit=sink)

async def left():
    stream = guard.astream("Q?") if sys.argv[1] == "scores" else guard.afollow("Q?", never())
    reader = asyncio.create_task(anext(stream))
    await begun.wait()
    return reader

reader = loop.run_until_complete(left())
"""


@pytest.mark.parametrize("at", ["scores", "waits for the loop"])
def test_a_program_that_drops_its_loop_ends_after_the_record_of_a_stream_and_does_end(at: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DROPPED, at], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ("accept" in ran.stdout) == (at == "scores")


async def test_a_thread_that_cannot_start_leaves_nothing_behind(tiny: WhiteBoxModel) -> None:
    guard, start = Guard(tiny, policy=Accept(), generation=SETTINGS, max_calls=8), threading.Thread.start

    for names in ("hallucination-guard-call", "hallucination-guard-stream"):

        def none(self: threading.Thread, names: str = names) -> None:
            if self.name == names:
                raise RuntimeError("can't start new thread")
            start(self)

        while tiny._streams._drawn_by is not None:  # the one before is about to end
            await asyncio.sleep(0.01)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(threading.Thread, "start", none)
            patched.setattr(live.Streams, "_apart", True)
            found = await asyncio.gather(*map(guard.acall, QUESTIONS), return_exceptions=True)
        assert [type(each) for each in found] == [RuntimeError] * len(QUESTIONS)
        assert await asyncio.to_thread(guard.settle, 10)
        assert all(each.accepted for each in await asyncio.gather(*map(guard.acall, QUESTIONS)))


async def test_a_batch_that_cannot_begin_is_an_error_of_each_of_its_calls(
    tiny: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(tiny, policy=Accept(), generation=SETTINGS)

    def none(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(live, "Decoding", none)
        found = await asyncio.wait_for(asyncio.gather(*map(guard.acall, QUESTIONS), return_exceptions=True), 20)
    assert all(isinstance(each, Exception) for each in found)
    assert (await guard.acall("Q?")).accepted


async def test_a_step_that_raises_what_no_future_holds_ends_the_call() -> None:
    class Ending(Accept):
        def __call__(self, verdict: Any, situation: Any) -> Any:
            raise StopIteration

    guard = Guard(ScriptedModel("a"), policy=Ending(), scorer=ScriptedScorer(1.0), max_calls=1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(guard.acall("Q?"), 5)


class TestReviews:
    async def test_they_are_scored_together_and_are_what_review_says(
        self, tiny: WhiteBoxModel, scored: list[int]
    ) -> None:
        sink = MemorySink()
        guard = Guard(tiny, policy=Accept(), audit=sink)
        alone = [guard.review(each, "It is so.") for each in QUESTIONS]
        scored.clear()
        found = await asyncio.gather(*(guard.areview(each, "It is so.") for each in QUESTIONS))
        assert max(scored) > 1 and sum(scored) == len(QUESTIONS)
        for one, other in zip(found, alone, strict=True):
            assert one.text == other.text == "It is so."
            assert dict(one.verdict.score.scores) == pytest.approx(dict(other.verdict.score.scores), rel=1e-4)
        assert len(sink.records) == 2 * len(QUESTIONS)

    async def test_they_share_batches_with_what_is_drawn(self, tiny: WhiteBoxModel, scored: list[int]) -> None:
        guard = Guard(tiny, policy=Accept(), generation=SETTINGS)
        calls = [*map(guard.acall, QUESTIONS[:4]), *(guard.areview(each, "So.") for each in QUESTIONS[4:])]
        found = await asyncio.gather(*calls)
        assert sum(scored) == len(QUESTIONS)
        assert [each.text == "So." for each in found] == [False] * 4 + [True] * 4

    async def test_they_take_places_and_are_waited_for(self, tiny: WhiteBoxModel) -> None:
        sink, goes = MemorySink(), threading.Event()

        def slowly(record: Any) -> str:
            goes.wait(10)
            return sink(record)

        guard = Guard(tiny, policy=Accept(), audit=slowly, max_calls=1)
        task = asyncio.create_task(guard.areview("Who?", "Ada."))
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError):
            await guard.areview("Who?", "Ada.")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not guard.settle(0.05)
        goes.set()
        assert await asyncio.to_thread(guard.settle, 10) and len(sink.records) == 1

    async def test_what_cannot_be_scored_is_decided_on(self, tiny: WhiteBoxModel) -> None:
        guard = Guard(tiny, policy=AbstainBelow(score="hybridgrad", limit=1.0))
        outcome = await guard.areview("Who?", "Ada.", unscorable="the prompt had an image")
        assert outcome.text is None and outcome.verdict.score.status == "unscorable"
