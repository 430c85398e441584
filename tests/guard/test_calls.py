"""Retrievers and escalation targets: what they may be, and what happens when they fail."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.documents import Document

from hallucination_guard import Guard
from hallucination_guard.guard import calls
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Outcome, Passage
from hallucination_guard_policies import Accept, EscalateBelow, RetrieveBelow

LIMIT = {"score": "hybridgrad", "limit": 1.0}
GOOD, BAD = 0.5, 2.0


@pytest.fixture
def never() -> Any:
    """An event that a hanging call waits for; it is set when the test is over, so that no thread is left behind."""
    event = threading.Event()
    yield event
    event.set()


def looking_up(retriever: Any, sink: MemorySink | None = None, **settings: Any) -> Guard:
    policy = RetrieveBelow(**LIMIT, retriever=retriever, **{"timeout": 5.0, **settings})
    return Guard(ScriptedModel(["a", "b"]), policy=policy, scorer=ScriptedScorer({"a": BAD, "b": GOOD}), audit=sink)


def handing_over(to: Any, sink: MemorySink | None = None, **settings: Any) -> Guard:
    policy = EscalateBelow(**LIMIT, to=to, **{"timeout": 5.0, **settings})
    return Guard(ScriptedModel("a"), policy=policy, scorer=ScriptedScorer(BAD), audit=sink)


def ids(outcome: Outcome) -> tuple[str, ...]:
    return outcome.retrieved


class Invoked:
    """Not callable, but it can be invoked, as LangChain's retrievers and models are."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def invoke(self, argument: Any) -> Any:
        return self.answer


async def find(query: str) -> list[str]:
    await asyncio.sleep(0)
    return ["found"]


async def write(messages: Any) -> str:
    await asyncio.sleep(0)
    return "written"


class TestWhatARetrieverMayBe:
    def test_a_function_that_gives_strings(self) -> None:
        assert looking_up(lambda query: ["found"])("Q?").text == "b"

    def test_an_object_that_is_invoked(self) -> None:
        assert looking_up(Invoked(["found"]))("Q?").text == "b"

    def test_a_langchain_retriever(self) -> None:
        from langchain_core.callbacks import CallbackManagerForRetrieverRun
        from langchain_core.retrievers import BaseRetriever

        class Shelf(BaseRetriever):
            def _get_relevant_documents(
                self, query: str, *, run_manager: CallbackManagerForRetrieverRun
            ) -> list[Document]:
                return [Document(id="shelf-1", page_content=f"about {query}")]

        assert ids(looking_up(Shelf())("Q?")) == ("shelf-1",)

    def test_an_async_function(self) -> None:
        assert looking_up(find)("Q?").text == "b"

    async def test_an_async_function_from_a_task(self) -> None:
        assert (await looking_up(find).acall("Q?")).text == "b"

    async def test_an_async_function_from_a_thread_whose_loop_runs(self) -> None:
        assert looking_up(find)("Q?").text == "b"


class TestWhatARetrieverMayFind:
    @pytest.mark.parametrize(
        ("found", "expected"),
        [
            (Passage(id="p1", text="x"), "p1"),
            (Document(id="d1", page_content="x"), "d1"),
            (Document(page_content="x", metadata={"id": 7}), "7"),
            (Document(page_content="x", metadata={"source": "a.txt"}), "a.txt"),
            ("x", "2d711642b726"),
        ],
    )
    def test_it_is_known_by_its_id(self, found: Any, expected: str) -> None:
        assert ids(looking_up(lambda query: [found])("Q?")) == (expected,)

    def test_a_tuple_is_a_list(self) -> None:
        assert looking_up(lambda query: ("x", "y"))("Q?").text == "b"

    @pytest.mark.parametrize(
        "found", [None, [], (), "text", 7, {"text": "x"}, [{"text": "x"}], [None], [b"x"], iter(["x"])], ids=repr
    )
    @pytest.mark.fault("retriever", "it finds what is no passage", "an abstention")
    def test_anything_else_leads_to_an_abstention(self, found: Any) -> None:
        outcome = looking_up(lambda query: found)("Q?")
        assert (outcome.text, outcome.decision.rule) == (None, "retrieve_failed")

    @pytest.mark.parametrize("found", [[""], ["  \n"], [Document(page_content="")]], ids=repr)
    def test_passages_without_a_text_are_nothing(self, found: Any) -> None:
        assert looking_up(lambda query: found)("Q?").text is None


class TestARetrieverThatFails:
    def test_is_asked_again(self) -> None:
        asked: list[str] = []

        def search(query: str) -> list[str]:
            asked.append(query)
            if len(asked) < 2:
                raise ConnectionError("hiccup")
            return ["found"]

        assert looking_up(search, tries=2)("Q?").text == "b"

    @pytest.mark.fault("retriever", "it raises every time", "asked again, then an abstention, recorded")
    def test_leads_to_an_abstention_when_it_never_works(self) -> None:
        outcome = looking_up(raising(ConnectionError("gone")), tries=2)("Q?")
        assert (outcome.text, outcome.decision.action, outcome.decision.rule) == (None, "abstain", "retrieve_failed")

    def test_is_named_in_the_log(self, sink: MemorySink) -> None:
        looking_up(raising(ConnectionError("gone")), sink, tries=1)("Q?")
        assert "ConnectionError" in sink.records[0].reason

    def test_leads_to_an_abstention_also_before_a_floor_that_accepts(self) -> None:
        policy = RetrieveBelow(**LIMIT, retriever=raising(OSError("gone")), tries=1) | Accept()
        assert Guard(ScriptedModel("a"), policy=policy, scorer=ScriptedScorer(BAD))("Q?").text is None

    def test_does_not_hold_the_call_up_when_it_hangs(self, never: Any) -> None:
        outcome = looking_up(lambda query: never.wait(60), timeout=0.2)("Q?")
        assert (outcome.text, outcome.decision.rule, outcome.seconds["total"] < 3) == (None, "retrieve_failed", True)

    @pytest.mark.fault("retriever", "it hangs", "left behind after the timeout; an abstention")
    def test_is_not_asked_again_when_it_hangs(self, never: Any) -> None:
        asked: list[str] = []
        looking_up(lambda query: asked.append(query) or never.wait(60), timeout=0.2, tries=3)("Q?")
        assert len(asked) == 1

    def test_hangs_in_an_async_way_too(self, never: Any) -> None:
        async def search(query: str) -> list[str]:
            while not never.is_set():
                await asyncio.sleep(0.01)
            return ["late"]

        assert looking_up(search, timeout=0.2)("Q?").text is None

    async def test_does_not_block_the_loop_while_it_hangs(self, never: Any) -> None:
        task = asyncio.create_task(looking_up(lambda query: never.wait(60), timeout=0.3).acall("Q?"))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 5

    def test_raises_async_too(self) -> None:
        async def search(query: str) -> list[str]:
            raise LookupError("nothing")

        assert looking_up(search, tries=1)("Q?").decision.rule == "retrieve_failed"

    @pytest.mark.parametrize("error", [StopIteration(), TimeoutError(), RecursionError(), AssertionError()], ids=repr)
    def test_may_raise_anything(self, error: Exception) -> None:
        assert looking_up(raising(error), tries=1)("Q?").decision.rule == "retrieve_failed"

    @pytest.mark.fault("retriever", "it answers after the timeout", "the answer is dropped")
    def test_that_was_given_up_does_not_put_its_late_answer_anywhere(self, never: Any, sink: MemorySink) -> None:
        def search(query: str) -> list[str]:
            never.wait(60)
            return ["late"]

        outcome = looking_up(search, sink, timeout=0.2)("Q?")
        never.set()
        assert (outcome.retrieved, len(sink.records)) == ((), 1)


class TestEscalation:
    def test_to_an_async_function(self) -> None:
        assert handing_over(write)("Q?").text == "written"

    async def test_to_an_async_function_from_a_task(self) -> None:
        assert (await handing_over(write).acall("Q?")).text == "written"

    async def test_to_an_async_function_from_a_thread_whose_loop_runs(self) -> None:
        assert handing_over(write)("Q?").text == "written"

    def test_to_an_object_that_is_invoked(self) -> None:
        assert handing_over(Invoked("written"))("Q?").text == "written"

    @pytest.mark.parametrize("answer", [None, "", " \n", 7, [], {"content": "x"}, b"x", Invoked("x")], ids=repr)
    @pytest.mark.fault("escalation", "its target gives no text", "an abstention, recorded")
    def test_that_gives_no_text_leads_to_an_abstention(self, answer: Any) -> None:
        outcome = handing_over(lambda messages: answer)("Q?")
        assert (outcome.text, outcome.decision.rule) == (None, "escalate_failed")

    @pytest.mark.fault("escalation", "its target raises", "an abstention, recorded")
    def test_that_raises_leads_to_an_abstention(self) -> None:
        assert handing_over(raising(ConnectionError("gone")))("Q?").decision.rule == "escalate_failed"

    def test_that_raises_is_asked_once(self) -> None:
        asked: list[Any] = []
        handing_over(lambda messages: asked.append(messages) or 1 // 0)("Q?")
        assert len(asked) == 1

    @pytest.mark.fault("escalation", "its target hangs", "left behind after the timeout; an abstention")
    def test_that_hangs_leads_to_an_abstention(self, never: Any) -> None:
        outcome = handing_over(lambda messages: never.wait(60), timeout=0.2)("Q?")
        assert (outcome.text, outcome.decision.rule) == (None, "escalate_failed")

    def test_that_fails_has_one_record(self, sink: MemorySink) -> None:
        handing_over(raising(ConnectionError("gone")), sink)("Q?")
        assert [(each.decision, each.rule) for each in sink.records] == [("abstain", "escalate_failed")]

    def test_to_another_guard_passes_on_what_that_one_lets_through(self) -> None:
        inner = Guard(ScriptedModel("Paris"), policy=Accept(), scorer=ScriptedScorer(GOOD))
        assert handing_over(lambda messages: inner(messages).text)("Q?").text == "Paris"

    def test_to_another_guard_that_abstains_has_no_text(self) -> None:
        inner = Guard(ScriptedModel("Paris"), policy=Accept(), scorer=ScriptedScorer("nothing to measure"))
        assert handing_over(lambda messages: inner(messages).text)("Q?").text is None


def raising(error: Exception) -> Any:
    def call(argument: Any) -> Any:
        raise error

    return call


class TestHungCalls:
    @pytest.mark.fault("escalation", "64 calls hang already", "the next is not made; an abstention")
    def test_when_too_many_hang_the_next_is_refused_and_the_answer_withheld(self, never: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(calls, "_MOST", 2)
        monkeypatch.setattr(calls, "_PLACES", threading.BoundedSemaphore(2))
        asked: list[str] = []

        def hang(query: str) -> list[str]:
            asked.append(query)
            never.wait()
            return ["late"]

        outcomes = [looking_up(hang, timeout=0.05, tries=1)("Q?") for _ in range(3)]
        assert [each.decision.rule for each in outcomes] == ["retrieve_failed"] * 3
        assert "2 calls are under way or hang" in outcomes[2].decision.reason
        assert len(asked) == 2

    def test_a_place_is_free_again_when_a_call_comes_back(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(calls, "_PLACES", threading.BoundedSemaphore(1))
        assert [looking_up(lambda query: ["found"])("Q?").text for _ in range(3)] == ["b"] * 3
