"""A guard as the nodes of a graph: what it lets through, what waits, what a checkpoint holds, what a crash leaves."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy

from hallucination_guard import AuditLog, Guard, WhiteBoxModel
from hallucination_guard.audit import records
from hallucination_guard.errors import AuditError, ConfigurationError, InputError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard_langchain import GuardNodes, GuardState, HeldAnswers, add_guard, way_on
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetrieveBelow, RetryBelow

DRAFT = "zebra quagga okapi"
LIMIT = {"score": "hybridgrad", "limit": 0.5}
BELOW = AbstainBelow(**LIMIT)
HAND_OVER = EscalateBelow(to=None, **LIMIT)
CONFIG: Any = {"configurable": {"thread_id": "t"}}
APPROVE = Command(resume={"decisions": [{"type": "approve"}]})
UNSURE = "I am not sure enough to answer that."


def ask(text: str = "Which animal is striped?") -> dict[str, Any]:
    return {"messages": [HumanMessage(text)]}


def guard_of(answers: Any, score: Any, policy: Any = BELOW, **settings: Any) -> Guard:
    sink = settings.pop("audit", None) or MemorySink()
    return Guard(ScriptedModel(answers), policy=policy, scorer=ScriptedScorer(score), audit=sink, **settings)


@pytest.fixture
def held(tmp_path: Path) -> HeldAnswers:
    return HeldAnswers(tmp_path / "held.db")


def graph_of(guard: Guard, held: HeldAnswers, saver: Any = None, **settings: Any) -> Any:
    builder = StateGraph(GuardState)
    add_guard(builder, guard, held, **settings)
    builder.add_edge(START, "generate")
    return builder.compile(checkpointer=saver)


async def run(graph: Any, given: Any, way: str) -> Any:
    return graph.invoke(given, CONFIG) if way == "invoke" else await graph.ainvoke(given, CONFIG)


def stored(saver: InMemorySaver) -> str:
    """All that the checkpointer holds, as it is written."""
    return " ".join([repr(saver.storage), repr(saver.blobs), repr(saver.writes)])


def last(state: Any) -> Any:
    return state["messages"][-1]


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
class TestDecisions:
    async def test_a_sure_answer_is_a_message(self, held: HeldAnswers, way: str) -> None:
        guard = guard_of("Zebras.", 0.1)
        state = await run(graph_of(guard, held, InMemorySaver()), ask(), way)
        assert last(state).text == "Zebras."
        assert last(state).response_metadata["hallucination_guard"]["decision"] == "accept"
        assert state["hallucination_guard"]["way"] == "answered"
        [record] = guard.audit.records  # type: ignore[union-attr]
        assert (record.decision, record.thread_id) == ("accept", "t")
        assert record.request_id == state["hallucination_guard"]["request_id"]

    async def test_a_doubtful_answer_is_an_abstention(self, held: HeldAnswers, way: str) -> None:
        state = await run(graph_of(guard_of(DRAFT, 1.0), held, InMemorySaver(), abstention_message="No."), ask(), way)
        assert last(state).text == "No."
        assert state["hallucination_guard"]["way"] == "abstained"
        assert "zebra" not in str(state)

    async def test_a_retry_goes_back_to_generate(self, held: HeldAnswers, way: str) -> None:
        guard = guard_of([DRAFT, "a tapir", "Zebras."], [1.0, 0.9, 0.1], RetryBelow(**LIMIT, times=3))
        state = await run(graph_of(guard, held, InMemorySaver()), ask(), way)
        assert last(state).text == "Zebras."
        assert state["hallucination_guard"]["attempts"] == 3
        found = guard.audit.records  # type: ignore[union-attr]
        assert [(each.attempt, each.decision) for each in found] == [(1, "retry"), (2, "retry"), (3, "accept")]
        assert {(each.request_id, each.thread_id) for each in found} == {
            (state["hallucination_guard"]["request_id"], "t")
        }

    async def test_what_is_looked_up_is_generated_and_scored_again(self, held: HeldAnswers, way: str) -> None:
        policy = RetrieveBelow(retriever=lambda query: ["Zebras have stripes."], **LIMIT) | BELOW
        guard = guard_of([DRAFT, "Zebras."], [1.0, 0.1], policy)
        state = await run(graph_of(guard, held, InMemorySaver()), ask(), way)
        assert last(state).text == "Zebras."
        assert len(last(state).response_metadata["hallucination_guard"]["retrieved"]) == 1

    async def test_an_escalations_answer_is_a_message(self, held: HeldAnswers, way: str) -> None:
        guard = guard_of(DRAFT, 1.0, EscalateBelow(to=lambda messages: "Zebras.", **LIMIT))
        state = await run(graph_of(guard, held, InMemorySaver()), ask(), way)
        assert (last(state).text, state["hallucination_guard"]["way"]) == ("Zebras.", "answered")

    async def test_without_a_checkpointer(self, held: HeldAnswers, way: str) -> None:
        graph = graph_of(guard_of([DRAFT, "Zebras."], [1.0, 0.1], RetryBelow(**LIMIT)), held)
        assert last(await run(graph, ask(), way)).text == "Zebras."


class TestReview:
    @pytest.mark.parametrize("way", ["invoke", "ainvoke"])
    @pytest.mark.parametrize(
        ("decision", "text", "said"),
        [
            ({"type": "approve"}, DRAFT, "approved"),
            ({"type": "edit", "edited_action": {"name": "answer", "args": {"text": "Zebras."}}}, "Zebras.", "edited"),
            ({"type": "reject"}, UNSURE, "rejected"),
        ],
    )
    async def test_an_escalated_answer_waits(
        self, held: HeldAnswers, way: str, decision: dict[str, Any], text: str, said: str
    ) -> None:
        guard = guard_of([DRAFT], [1.0], HAND_OVER)  # a second answer or score would raise
        graph = graph_of(guard, held, InMemorySaver())
        state = await run(graph, ask(), way)
        [waiting] = held.waiting("t")
        assert waiting.actions == [{"name": "answer", "args": {"text": DRAFT}}]
        [asked] = state["__interrupt__"][0].value["action_requests"]
        assert asked["args"] == {"request_id": waiting.standing["request_id"]}
        state = await run(graph, Command(resume={"decisions": [decision]}), way)
        assert last(state).text == text
        assert last(state).response_metadata["hallucination_guard"]["reviewed"] == said
        assert state["hallucination_guard"]["way"] == ("abstained" if said == "rejected" else "answered")
        assert held.waiting() == []
        first, second = guard.audit.records  # type: ignore[union-attr]
        assert (second.detail, second.thread_id) == (f"{said} by a human, not scored", "t")
        assert first.request_id == second.request_id
        assert second.answer == (None if said == "rejected" else text)

    def test_a_review_that_cannot_be_used_is_asked_for_again(self, held: HeldAnswers) -> None:
        graph = graph_of(guard_of(DRAFT, 1.0, HAND_OVER), held, InMemorySaver())
        graph.invoke(ask(), CONFIG)
        for answer in ("yes", {"decisions": []}, {"decisions": [{"type": "edit"}]}):
            state = graph.invoke(Command(resume=answer), CONFIG)
            assert state["__interrupt__"][0].value["error"]
            assert len(state["messages"]) == 1
        assert last(graph.invoke(APPROVE, CONFIG)).text == DRAFT

    def test_a_call_of_a_tool_waits_and_leaves_as_edited(self, held: HeldAnswers) -> None:
        tool = {"name": "pay", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}
        text = '<tool_call>\n{"name": "pay", "arguments": {"to": "Ana"}}\n</tool_call>'
        guard = guard_of(text, 1.0, HAND_OVER, generation={"tools": [tool]})
        graph = graph_of(guard, held, InMemorySaver())
        assert "Ana" not in str(graph.invoke(ask("Pay her."), CONFIG))
        assert held.waiting()[0].actions == [{"name": "pay", "args": {"to": "Ana"}}]
        edit = {"type": "edit", "edited_action": {"name": "pay", "args": {"to": "Eva"}}}
        state = graph.invoke(Command(resume={"decisions": [edit]}), CONFIG)
        assert [each["args"] for each in last(state).tool_calls] == [{"to": "Eva"}]

    def test_another_question_leaves_what_waits_where_it_is(self, held: HeldAnswers) -> None:
        guard = guard_of([DRAFT, "Zebras."], [1.0, 0.1], HAND_OVER)
        graph = graph_of(guard, held, InMemorySaver())
        first = graph.invoke(ask(), CONFIG)["hallucination_guard"]["request_id"]
        state = graph.invoke(ask("And which is not?"), CONFIG)
        assert last(state).text == "Zebras."
        assert state["hallucination_guard"]["request_id"] != first
        [waiting] = held.waiting()
        held.forget(waiting.standing["request_id"])
        assert held.waiting() == []

    def test_what_is_not_held_any_more_cannot_be_let_through(self, held: HeldAnswers) -> None:
        graph = graph_of(guard_of(DRAFT, 1.0, HAND_OVER), held, InMemorySaver())
        request_id = graph.invoke(ask(), CONFIG)["hallucination_guard"]["request_id"]
        held.forget(request_id)
        with pytest.raises(InputError, match="nothing is held"):
            graph.invoke(APPROVE, CONFIG)

    def test_a_human_has_to_be_allowed_something(self, held: HeldAnswers) -> None:
        with pytest.raises(ConfigurationError):
            GuardNodes(guard_of("x", 0.1), held, allowed_decisions=[])


MODES = ["messages", "updates", "values", "custom", "debug", "checkpoints", "tasks", "events v2"]


class TestLeaks:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("policy", [BELOW, RetryBelow(**LIMIT), HAND_OVER], ids=["abstain", "retry", "hand over"])
    async def test_no_word_of_a_rejected_or_waiting_draft_is_checkpointed_or_received(
        self, held: HeldAnswers, mode: str, policy: Any
    ) -> None:
        saver = InMemorySaver()
        graph = graph_of(guard_of(DRAFT, 1.0, policy), held, saver)
        if mode == "events v2":
            seen = [str(each) async for each in graph.astream_events(ask(), CONFIG, version="v2")]
        else:
            seen = [str(each) for each in graph.stream(ask(), CONFIG, stream_mode=mode)]
        for word in DRAFT.split():
            assert word not in " ".join([*seen, stored(saver)])
        if policy is HAND_OVER:
            graph.invoke(Command(resume={"decisions": [{"type": "reject"}]}), CONFIG)
            assert "zebra" not in stored(saver)

    def test_the_scan_finds_what_was_let_through(self, held: HeldAnswers) -> None:
        saver = InMemorySaver()
        graph_of(guard_of(DRAFT, 0.1), held, saver).invoke(ask(), CONFIG)
        assert "zebra" in stored(saver)

    @pytest.mark.parametrize("policy", [BELOW, RetryBelow(**LIMIT), HAND_OVER], ids=["abstain", "retry", "hand over"])
    def test_a_rejected_draft_is_overwritten_where_it_was_held(self, held: HeldAnswers, policy: Any) -> None:
        graph = graph_of(guard_of(DRAFT, 1.0, policy), held, InMemorySaver())
        graph.invoke(ask(), CONFIG)
        if policy is HAND_OVER:
            assert b"zebra" in held.path.read_bytes()
            graph.invoke(Command(resume={"decisions": [{"type": "reject"}]}), CONFIG)
        assert b"zebra" not in held.path.read_bytes()

    def test_the_file_is_its_owners_alone(self, held: HeldAnswers) -> None:
        assert held.path.stat().st_mode & 0o077 == 0

    def test_the_state_is_plain_json(self, held: HeldAnswers) -> None:
        graph = graph_of(guard_of([DRAFT, "Zebras."], [1.0, 0.1], RetryBelow(**LIMIT)), held, InMemorySaver())
        graph.invoke(ask(), CONFIG)
        standings = [each.values.get("hallucination_guard") for each in graph.get_state_history(CONFIG)]
        ways = [each["way"] for each in reversed(standings) if each]
        assert ways == ["score", "decide", "generate", "score", "decide", "answered"]
        for each in standings:
            assert json.loads(json.dumps(each, allow_nan=False)) == each

    def test_an_error_holds_no_frame_with_a_draft(self, held: HeldAnswers) -> None:
        def full(record: Any) -> str:
            raise OSError("the disk is full")

        graph = graph_of(guard_of(DRAFT, 0.1, audit=full), held, InMemorySaver())
        with pytest.raises(AuditError) as caught:
            graph.invoke(ask(), CONFIG)
        for frame, _ in traceback.walk_tb(caught.value.__traceback__):
            assert frame.f_code.co_filename == __file__ or "zebra" not in str(frame.f_locals)


class Flaky:
    """A sink that fails at first."""

    def __init__(self, times: int = 1) -> None:
        self.kept = MemorySink()
        self.times = times

    @property
    def records(self) -> list[Any]:
        return self.kept.records

    def __call__(self, record: Any) -> str:
        if self.times:
            self.times -= 1
            raise OSError("the disk is full")
        return self.kept(record)


class Forgetful(InMemorySaver):
    """A checkpointer that loses what one node has written: the process died before it."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self.node = node

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        for channel, value in writes:
            if self.node and channel == "hallucination_guard" and value["way"] == self.node:
                self.node = ""
                raise ConnectionResetError("the process died")
        super().put_writes(config, writes, task_id, task_path)


class TestRunningAgain:
    @pytest.mark.fault("graph", "the log cannot be written", "a retried node decides on the same draft; one record")
    def test_a_retried_node_decides_on_the_same_draft(self, held: HeldAnswers) -> None:
        sink = Flaky()
        guard = guard_of([DRAFT], [0.1], audit=sink)  # a second answer or score would raise
        again = RetryPolicy(initial_interval=0.001, max_attempts=2)
        state = graph_of(guard, held, InMemorySaver(), retry_policy=again).invoke(ask(), CONFIG)
        assert last(state).text == DRAFT
        assert [each.decision for each in sink.records] == ["accept"]

    def test_a_failed_run_goes_on_where_it_was(self, held: HeldAnswers) -> None:
        sink = Flaky()
        graph = graph_of(guard_of([DRAFT], [0.1], audit=sink), held, InMemorySaver())
        with pytest.raises(AuditError):
            graph.invoke(ask(), CONFIG)
        assert len(graph.get_state(CONFIG).values["messages"]) == 1
        assert last(graph.invoke(None, CONFIG)).text == DRAFT

    @pytest.mark.fault("graph", "a node's checkpoint is lost", "it gives what it gave: no draft, no record twice")
    @pytest.mark.parametrize("durability", ["sync", "async"])
    @pytest.mark.parametrize("node", ["score", "decide", "generate", "review"])
    def test_a_node_whose_checkpoint_was_lost_gives_what_it_gave(
        self, held: HeldAnswers, node: str, durability: Any
    ) -> None:
        saver = Forgetful(node)
        policy = RetryBelow(**LIMIT, times=1) | HAND_OVER
        guard = guard_of([DRAFT, "a tapir"], [1.0, 0.9], policy)
        graph = graph_of(guard, held, saver)
        with pytest.raises(ConnectionResetError):
            graph.invoke(ask(), CONFIG, durability=durability)
        graph.invoke(None, CONFIG, durability=durability)
        [waiting] = held.waiting()
        assert waiting.standing["attempts"] == 2
        found = guard.audit.records  # type: ignore[union-attr]
        assert [each.decision for each in found] == ["retry", "escalate"]
        assert len(guard.model.calls) == 2  # type: ignore[attr-defined]
        graph.invoke(APPROVE, CONFIG)
        assert len(found) == 3

    def test_an_unfinished_call_is_not_gone_on_with_for_another_question(self, held: HeldAnswers) -> None:
        model = ScriptedModel({"one": DRAFT, "two": "Zebras."})
        scorer = ScriptedScorer({DRAFT: 1.0, "Zebras.": 0.1})
        guard = Guard(model, policy=RetryBelow(**LIMIT), scorer=scorer, audit=MemorySink())
        graph = graph_of(guard, held, InMemorySaver())
        graph.invoke(ask("one"), CONFIG, interrupt_after=["decide"])
        assert graph.get_state(CONFIG).values["hallucination_guard"]["way"] == "generate"
        state = graph.invoke(ask("two"), CONFIG)
        assert (last(state).text, state["hallucination_guard"]["attempts"]) == ("Zebras.", 1)

    def test_a_replay_of_a_conversation_is_a_call_of_its_own(self, held: HeldAnswers) -> None:
        guard = guard_of(["Zebras.", "Okapis."], 0.1)
        graph = graph_of(guard, held, InMemorySaver())
        graph.invoke(ask(), CONFIG)
        start = next(each for each in graph.get_state_history(CONFIG) if each.next == ("generate",))
        assert last(graph.invoke(None, start.config)).text == "Okapis."
        first, second = guard.audit.records  # type: ignore[union-attr]
        assert first.request_id != second.request_id

    def test_only_the_last_call_of_a_conversation_stays_held(self, held: HeldAnswers) -> None:
        guard = guard_of(["Zebras.", "Okapis."], 0.1)
        graph = graph_of(guard, held, InMemorySaver())
        first = graph.invoke(ask(), CONFIG)["hallucination_guard"]["request_id"]
        second = graph.invoke(ask(), CONFIG)["hallucination_guard"]["request_id"]
        assert held.find(first) is None
        assert held.find(second) is not None


class TestWiring:
    def test_the_ways_may_lead_into_the_rest_of_a_graph(self, held: HeldAnswers) -> None:
        builder = StateGraph(GuardState)
        add_guard(builder, guard_of(DRAFT, 1.0), held, abstained="sorry")
        builder.add_node("sorry", lambda state: {"messages": [("ai", "Ask a person.")]})
        builder.add_edge(START, "generate")
        builder.add_edge("sorry", END)
        assert last(builder.compile().invoke(ask())).text == "Ask a person."

    def test_by_hand(self, held: HeldAnswers) -> None:
        nodes = GuardNodes(guard_of("Zebras.", 0.1), held)
        builder = StateGraph(GuardState)
        for name in ("generate", "score", "decide"):
            builder.add_node(name, getattr(nodes, name))
        builder.add_edge(START, "generate")
        builder.add_edge("generate", "score")
        builder.add_edge("score", "decide")
        builder.add_conditional_edges("decide", way_on, {"answered": END, "abstained": END})
        assert last(builder.compile().invoke(ask())).text == "Zebras."

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("no database, but a text that is long enough to be read as the head of one" * 9)
        for path in (tmp_path / "text", tmp_path / "missing" / "held.db", tmp_path):
            with pytest.raises(ConfigurationError):
                HeldAnswers(path)


RESUME = """
import sqlite3, sys
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from hallucination_guard import AuditLog, Guard, WhiteBoxModel
from hallucination_guard_langchain import GuardState, HeldAnswers, add_guard
from hallucination_guard_policies import EscalateBelow

model = WhiteBoxModel.demo()
def never(*args, **kwargs):
    raise AssertionError("the model was called")
model.generate = model.read = never
policy = EscalateBelow(to=None, score="hybridgrad", limit=0.0)
guard = Guard(model, policy=policy, audit=AuditLog("audit.jsonl"))
builder = StateGraph(GuardState)
held = HeldAnswers("held.db")
add_guard(builder, guard, held)
builder.add_edge(START, "generate")
graph = builder.compile(checkpointer=SqliteSaver(sqlite3.connect("graph.db", check_same_thread=False)))
for waiting in held.waiting():
    resume = Command(resume={"decisions": [{"type": "approve"}]})
    print(graph.invoke(resume, {"configurable": {"thread_id": waiting.thread_id}})["messages"][-1].text)
"""


def test_another_process_resumes_what_a_real_model_has_waiting(demo: WhiteBoxModel, tmp_path: Path) -> None:
    policy = EscalateBelow(to=None, score="hybridgrad", limit=0.0)  # nothing is that sure
    log = tmp_path / "audit.jsonl"
    guard = Guard(demo, policy=policy, audit=AuditLog(log), generation={"max_new_tokens": 10})
    connection = sqlite3.connect(tmp_path / "graph.db", check_same_thread=False)
    graph = graph_of(guard, HeldAnswers(tmp_path / "held.db"), SqliteSaver(connection))
    state = graph.invoke(ask("What is the capital of France?"), CONFIG)
    connection.close()
    assert state["hallucination_guard"]["way"] == "review"
    [record] = records(log)
    assert isinstance(record.answer, str)
    for path in tmp_path.glob("graph.db*"):
        assert record.answer.encode() not in path.read_bytes()
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", RESUME],
        cwd=tmp_path,
        env={**os.environ, "LANGGRAPH_STRICT_MSGPACK": "true", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == record.answer.strip()
    first, second = records(log)
    assert first.request_id == second.request_id
    assert (second.detail, second.thread_id) == ("approved by a human, not scored", "t")


KILLED = """
import os, sqlite3, sys
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from hallucination_guard import Guard
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_langchain import GuardState, HeldAnswers, add_guard
from hallucination_guard_policies import AbstainBelow

first = sys.argv[1] == "first"
def sink(record):
    if first:
        os._exit(9)
    return record.id
policy = AbstainBelow(score="hybridgrad", limit=0.5)
model = ScriptedModel(["zebra"] if first else [])  # the second process has no answer to give
guard = Guard(model, policy=policy, scorer=ScriptedScorer([0.1] if first else []), audit=sink)
builder = StateGraph(GuardState)
add_guard(builder, guard, HeldAnswers("held.db"))
builder.add_edge(START, "generate")
graph = builder.compile(checkpointer=SqliteSaver(sqlite3.connect("graph.db", check_same_thread=False)))
asked = {"messages": [("user", "Which animal is striped?")]} if first else None
print(graph.invoke(asked, {"configurable": {"thread_id": "t"}}, durability="sync")["messages"][-1].text)
"""


@pytest.mark.fault("graph", "the process is killed while it records", "the next one decides on the same draft")
def test_a_process_that_was_killed_is_gone_on_with_by_another(tmp_path: Path) -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", KILLED, which],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for which in ("first", "second")
    ]
    assert runs[0].returncode == 9
    assert runs[1].stdout == "zebra\n", runs[1].stderr
