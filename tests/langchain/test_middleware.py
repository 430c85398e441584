"""HallucinationGuardMiddleware in real agents: what it lets through, what waits for a human, and that nothing leaks."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    HumanInTheLoopMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
)
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tracers.base import BaseTracer
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from opentelemetry._logs import _internal as otel
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from pydantic import ConfigDict, Field

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.errors import ConfigurationError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard_langchain import (
    GuardedChatModel,
    HallucinationGuardMiddleware,
    LowConfidenceError,
    unsure_call,
)
from hallucination_guard_policies import AbstainBelow, EscalateBelow, MarkSentences, RedactSentences, RetrieveBelow

DRAFT = "zebra quagga okapi"
ASKED = {"messages": [HumanMessage("Which animal is striped?")]}
BELOW = AbstainBelow(score="hybridgrad", limit=0.5)


class Served(BaseChatModel):
    """A chat model that serves texts and calls, streamed word by word, as a server in front of the weights does."""

    model_config = ConfigDict(extra="allow")
    answers: list[Any]
    asked: list[Any] = Field(default_factory=list)
    names: str = "served"

    @property
    def _llm_type(self) -> str:
        return "served"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(tools=tools, **kwargs)

    def _next(self, messages: list[BaseMessage]) -> AIMessage:
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(messages)
        return answer if isinstance(answer, AIMessage) else AIMessage(answer)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._next(messages))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        message = self._next(messages)
        for word in str(message.text).split(" "):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=word + " "))
            if run_manager is not None:
                run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk
        if message.tool_calls:
            chunks = [
                {"name": each["name"], "args": json.dumps(each["args"]), "id": each["id"], "index": at}
                for at, each in enumerate(message.tool_calls)
            ]
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=chunks))


def pay(to: str, amount: int) -> str:
    """Pay somebody."""
    return f"paid {amount} to {to}"


def _call(amount: int = 5, name: str = "pay") -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": {"to": "Ana", "amount": amount}, "id": f"c{amount}"}])


def _guard(score: Any, policy: Any = BELOW, **settings: Any) -> Guard:
    return Guard(ScriptedModel("x"), policy=policy, scorer=ScriptedScorer(score), audit=MemorySink(), **settings)


def _last(state: Any) -> Any:
    return state["messages"][-1]


class TestWhatLeavesIsWhatWasDecidedOn:
    """Not the draft beside it: a sentence that was taken out, a block that is no text, words in its metadata."""

    SAID = "Paris is the capital. It has nine moons."

    def guard(self, policy: Any) -> Guard:
        def doubts(text: str) -> dict[str, float]:
            return {"mean_nll": 9.0 if "moons" in text else 0.1}

        scorer = ScriptedScorer(0.1, by_sentence=doubts)
        return Guard(ScriptedModel("x"), policy=policy, scorer=scorer, audit=MemorySink())

    def message(self, answer: Any, guard: Guard) -> Any:
        agent = create_agent(Served(answers=[answer]), middleware=[HallucinationGuardMiddleware(guard)])
        return _last(agent.invoke(ASKED))

    def test_a_sentence_that_is_taken_out_does_not_leave(self) -> None:
        message = self.message(self.SAID, self.guard(RedactSentences(score="mean_nll", limit=1.0)))
        assert message.content == "Paris is the capital."

    def test_a_mark_is_put(self) -> None:
        message = self.message(self.SAID, self.guard(MarkSentences(score="mean_nll", limit=1.0)))
        assert message.content.startswith("Paris is the capital. It has nine moons. ") and "[" in message.content

    def test_blocks_that_are_no_text_and_words_beside_it_do_not_leave(self) -> None:
        draft = AIMessage(
            [
                {"type": "text", "text": "Zebras."},
                {"type": "reasoning", "reasoning": DRAFT},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
            additional_kwargs={"reasoning_content": DRAFT},
            response_metadata={"logprobs": {"content": [{"token": DRAFT}]}, "finish_reason": "stop"},
            id="served-1",
            usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10},
        )
        message = self.message(draft, _guard(0.1))
        assert message.content == "Zebras." and DRAFT not in repr(message) and "base64" not in repr(message)
        assert message.id == "served-1" and message.response_metadata["finish_reason"] == "stop"
        assert message.usage_metadata["total_tokens"] == 10

    def test_a_call_keeps_its_id(self) -> None:
        agent = create_agent(
            Served(answers=[_call(), "Done."]), tools=[pay], middleware=[HallucinationGuardMiddleware(_guard(0.1))]
        )
        messages = agent.invoke(ASKED)["messages"]
        assert [each.tool_call_id for each in messages if isinstance(each, ToolMessage)] == ["c5"]


class TestDecisions:
    @pytest.mark.parametrize("way", ["invoke", "ainvoke"])
    async def test_a_sure_answer_passes_as_it_is(self, way: str) -> None:
        middleware = HallucinationGuardMiddleware(_guard(0.1))
        agent = create_agent(Served(answers=["Zebras."]), middleware=[middleware])
        state = agent.invoke(ASKED) if way == "invoke" else await agent.ainvoke(ASKED)
        assert _last(state).text == "Zebras."
        assert _last(state).response_metadata["hallucination_guard"]["decision"] == "accept"
        assert [each.decision for each in middleware.guard.audit.records] == ["accept"]  # type: ignore[union-attr]

    @pytest.mark.parametrize("way", ["invoke", "ainvoke"])
    async def test_a_doubtful_answer_is_an_abstention(self, way: str) -> None:
        middleware = HallucinationGuardMiddleware(_guard(1.0), abstention_message="I do not know.")
        agent = create_agent(Served(answers=[DRAFT]), middleware=[middleware])
        state = agent.invoke(ASKED) if way == "invoke" else await agent.ainvoke(ASKED)
        assert _last(state).text == "I do not know."
        assert "zebra" not in str(state)

    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            (MarkSentences(score="mean_nll", limit=1.0), "It was Ada. She lived in Rome. [unverified]"),
            (RedactSentences(score="mean_nll", limit=1.0), "It was Ada."),
        ],
        ids=["mark", "redact"],
    )
    @pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream"])
    async def test_a_doubtful_sentence_leaves_as_the_policy_says(self, way: str, policy: Any, text: str) -> None:
        answer = "It was Ada. She lived in Rome."
        scorer = ScriptedScorer(0.1, by_sentence=lambda each: {"mean_nll": 2.0 if "Rome" in each else 0.5})
        guard = Guard(ScriptedModel("x"), policy=policy, scorer=scorer)
        agent = create_agent(Served(answers=[answer]), middleware=[HallucinationGuardMiddleware(guard)])
        if way == "stream":
            chunks = [each.text for each, _ in agent.stream(ASKED, stream_mode="messages")]
            assert chunks == [text]
            return
        state = agent.invoke(ASKED) if way == "invoke" else await agent.ainvoke(ASKED)
        assert _last(state).text == text
        assert ("Rome" in str(state)) == ("Rome" in text)

    def test_a_doubtful_call_is_not_made(self) -> None:
        made: list[str] = []

        def pay(to: str, amount: int) -> str:
            """Pay somebody."""
            made.append(to)
            return "paid"

        agent = create_agent(
            Served(answers=[_call()]), tools=[pay], middleware=[HallucinationGuardMiddleware(_guard(1.0))]
        )
        assert _last(agent.invoke(ASKED)).tool_calls == []
        assert made == []

    def test_a_sure_call_is_made_and_its_result_is_read(self) -> None:
        served = Served(answers=[_call(), "Done."])
        middleware = HallucinationGuardMiddleware(_guard(0.1))
        state = create_agent(served, tools=[pay], middleware=[middleware]).invoke(ASKED)
        assert [type(each) for each in state["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
        assert _last(state).text == "Done."
        records = middleware.guard.audit.records  # type: ignore[union-attr]
        assert json.loads(records[0].answer.split("\n")[1])["arguments"] == {"to": "Ana", "amount": 5}
        assert [each["role"] for each in records[1].prompt] == ["user", "assistant", "tool"]

    def test_what_is_looked_up_is_the_guards_own_answer(self) -> None:
        model = ScriptedModel("Zebras are striped.")
        policy = RetrieveBelow(retriever=lambda query: ["Zebras have stripes."], score="hybridgrad", limit=0.5)
        scorer = ScriptedScorer({DRAFT: 1.0, "Zebras are striped.": 0.1})
        middleware = HallucinationGuardMiddleware(Guard(model, policy=policy, scorer=scorer))
        state = create_agent(Served(answers=[DRAFT]), middleware=[middleware]).invoke(ASKED)
        assert _last(state).text == "Zebras are striped."
        assert len(_last(state).response_metadata["hallucination_guard"]["retrieved"]) == 1

    def test_a_structured_response_of_a_doubtful_answer_is_none(self) -> None:
        schema = {"title": "Animal", "type": "object", "properties": {"name": {"type": "string"}}}
        call = AIMessage("", tool_calls=[{"name": "Animal", "args": {"name": "quagga"}, "id": "c"}])
        agent = create_agent(
            Served(answers=[call]), response_format=schema, middleware=[HallucinationGuardMiddleware(_guard(1.0))]
        )
        state = agent.invoke(ASKED)
        assert "quagga" not in str(state)
        assert state.get("structured_response") is None

    def test_error_is_not_retried_and_goes_to_a_fallback(self) -> None:
        strict = HallucinationGuardMiddleware(_guard(1.0), exit_behavior="error")
        served = Served(answers=[DRAFT])
        with pytest.raises(LowConfidenceError):
            create_agent(served, middleware=[ModelRetryMiddleware(max_retries=3, initial_delay=0), strict]).invoke(
                ASKED
            )
        assert len(served.asked) == 1
        sure = Served(answers=["Zebras."])
        scorer = ScriptedScorer({DRAFT: 1.0, "Zebras.": 0.1})
        guard = Guard(ScriptedModel("x"), policy=BELOW, scorer=scorer)
        strict = HallucinationGuardMiddleware(guard, exit_behavior="error")
        agent = create_agent(Served(answers=[DRAFT]), middleware=[ModelFallbackMiddleware(sure), strict])
        assert _last(agent.invoke(ASKED)).text == "Zebras."

    def test_a_model_that_was_swapped_in_cannot_be_scored(self) -> None:
        served, other = Served(answers=[DRAFT]), Served(answers=["Zebras."])
        scorer = ScriptedScorer({DRAFT: 1.0, "Zebras.": 0.1})
        guard = Guard(ScriptedModel("x"), policy=BELOW, scorer=scorer, audit=MemorySink())
        middleware = HallucinationGuardMiddleware(guard, exit_behavior="error", served=served)
        agent = create_agent(served, middleware=[ModelFallbackMiddleware(other), middleware])
        with pytest.raises(LowConfidenceError):
            agent.invoke(ASKED)
        assert [each.status for each in guard.audit.records] == ["scored", "unscorable"]  # type: ignore[union-attr]

    def test_a_guarded_model_is_judged_once(self) -> None:
        guard = Guard(
            ScriptedModel(DRAFT), policy=BELOW, scorer=ScriptedScorer([1.0]), audit=MemorySink()
        )  # a second score would raise
        agent = create_agent(GuardedChatModel(guard=guard), middleware=[HallucinationGuardMiddleware(guard)])
        assert "zebra" not in str(agent.invoke(ASKED))


class TestReview:
    def _agent(self, middleware: HallucinationGuardMiddleware, served: Served, **settings: Any) -> Any:
        return create_agent(served, middleware=[middleware], checkpointer=InMemorySaver(), **settings)

    @pytest.mark.parametrize(
        ("decision", "text", "said"),
        [
            ({"type": "approve"}, DRAFT, "approved"),
            ({"type": "edit", "edited_action": {"name": "answer", "args": {"text": "Zebras."}}}, "Zebras.", "edited"),
            ({"type": "reject"}, "I am not sure enough to answer that.", "rejected"),
        ],
    )
    def test_an_escalated_answer_waits(self, decision: dict[str, Any], text: str, said: str) -> None:
        policy = EscalateBelow(to=None, score="hybridgrad", limit=0.5)
        served, guard = Served(answers=[DRAFT]), _guard([1.0], policy)
        agent = self._agent(HallucinationGuardMiddleware(guard), served)
        config = {"configurable": {"thread_id": "t"}}
        state = agent.invoke(ASKED, config)
        assert state["__interrupt__"][0].value["action_requests"][0]["args"] == {"text": DRAFT}
        assert DRAFT not in str(state["messages"])
        state = agent.invoke(Command(resume={"decisions": [decision]}), config)
        assert _last(state).text == text
        assert len(served.asked) == 1
        records = guard.audit.records  # type: ignore[union-attr]
        assert [(each.decision, each.detail) for each in records[1:]] == [
            ("escalate", f"{said} by a human, not scored")
        ]
        assert len({each.request_id for each in records}) == 1
        assert records[1].thread_id == "t"
        assert records[1].answer == (None if said == "rejected" else text)

    @pytest.mark.parametrize(
        "answer",
        [
            {"decisions": []},
            {"decisions": [{"type": "respond"}]},
            "yes",
            {"decisions": [{"type": "edit"}]},
            {"decisions": [{"type": "edit", "edited_action": {"name": "", "args": {"text": "Zebras."}}}]},
            {"decisions": [{"type": "edit", "edited_action": {"name": "answer", "args": {"text": " "}}}]},
        ],
    )
    def test_a_review_that_says_nothing_lets_nothing_through_and_is_asked_for_again(self, answer: object) -> None:
        policy = EscalateBelow(to=None, score="hybridgrad", limit=0.5)
        agent = self._agent(HallucinationGuardMiddleware(_guard(1.0, policy)), Served(answers=[DRAFT]))
        config = {"configurable": {"thread_id": "t"}}
        agent.invoke(ASKED, config)
        for _ in range(2):
            state = agent.invoke(Command(resume=answer), config)
            assert state["__interrupt__"][0].value["error"]
            assert DRAFT not in str(agent.get_state(config).values["messages"])
        state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), config)
        assert _last(state).text == DRAFT

    @pytest.mark.parametrize("way", ["sync", "async"])
    async def test_a_shaky_call_of_a_named_tool_waits(self, way: str) -> None:
        middleware = HallucinationGuardMiddleware(
            _guard(0.1), require_approval_below={"pay": 0.9}, confidence=lambda generation: [0.3]
        )
        served = Served(answers=[_call(), "Done."])
        agent = self._agent(middleware, served, tools=[pay])
        config = {"configurable": {"thread_id": "t"}}
        state = agent.invoke(ASKED, config) if way == "sync" else await agent.ainvoke(ASKED, config)
        assert state["__interrupt__"][0].value["action_requests"][0]["args"] == {"to": "Ana", "amount": 5}
        edit = {"type": "edit", "edited_action": {"name": "pay", "args": {"to": "Ana", "amount": 3}}}
        resume = Command(resume={"decisions": [edit]})
        state = agent.invoke(resume, config) if way == "sync" else await agent.ainvoke(resume, config)
        assert [each.text for each in state["messages"][2:]] == ["paid 3 to Ana", "Done."]
        assert len(served.asked) == 2
        details = [each.detail for each in middleware.guard.audit.records]  # type: ignore[union-attr]
        assert details == ["", "held by the middleware, not scored", "edited by a human, not scored", ""]

    @pytest.mark.parametrize("sure", [[], [float("nan")], [0.95, 0.95]])
    def test_a_confidence_that_says_nothing_waits(self, sure: list[float]) -> None:
        middleware = HallucinationGuardMiddleware(
            _guard(0.1), require_approval_below={"pay": 0.9}, confidence=lambda generation: sure
        )
        state = self._agent(middleware, Served(answers=[_call()]), tools=[pay]).invoke(
            ASKED, {"configurable": {"thread_id": "t"}}
        )
        assert "__interrupt__" in state

    def test_sure_calls_and_other_tools_pass(self) -> None:
        for limits, sure in (({"pay": 0.9}, 0.95), ({"delete": 0.9}, 0.1)):
            middleware = HallucinationGuardMiddleware(
                _guard(0.1), require_approval_below=limits, confidence=lambda generation, sure=sure: [sure]
            )
            state = self._agent(middleware, Served(answers=[_call(), "Done."]), tools=[pay]).invoke(
                ASKED, {"configurable": {"thread_id": "t"}}
            )
            assert _last(state).text == "Done."

    def test_beside_langchains_own_human_in_the_loop(self) -> None:
        hitl = HumanInTheLoopMiddleware(interrupt_on={"pay": True})
        for order in (0, 1):
            both = [HallucinationGuardMiddleware(_guard(0.1))]
            both.insert(order, hitl)  # type: ignore[arg-type]
            agent = create_agent(
                Served(answers=[_call(), "Done."]), tools=[pay], middleware=both, checkpointer=InMemorySaver()
            )
            config: Any = {"configurable": {"thread_id": "t"}}
            assert "__interrupt__" in agent.invoke(ASKED, config)
            state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), config)
            assert _last(state).text == "Done."

    @pytest.mark.parametrize(("sure", "waits"), [([0.95], False), ([0.3], True), ([], True), ([float("nan")], True)])
    def test_langchains_own_human_asks_only_about_unsure_calls(self, sure: list[float], waits: bool) -> None:
        middleware = HallucinationGuardMiddleware(_guard(0.1), confidence=lambda generation: sure)
        human = HumanInTheLoopMiddleware(
            interrupt_on={"pay": {"allowed_decisions": ["approve"], "when": unsure_call(below=0.9)}}
        )
        for both in ([middleware, human], [human, middleware]):
            agent = create_agent(
                Served(answers=[_call(), "Done."]), tools=[pay], middleware=both, checkpointer=InMemorySaver()
            )
            config: Any = {"configurable": {"thread_id": "t"}}
            state = agent.invoke(ASKED, config)
            assert ("__interrupt__" in state) == waits
            if waits:
                state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), config)
            assert _last(state).text == "Done."

    def test_a_guarded_model_says_nothing_of_its_calls_so_all_wait(self) -> None:
        human = HumanInTheLoopMiddleware(
            interrupt_on={"pay": {"allowed_decisions": ["approve"], "when": unsure_call(below=0.0)}}
        )
        agent = create_agent(Served(answers=[_call()]), tools=[pay], middleware=[human], checkpointer=InMemorySaver())
        assert "__interrupt__" in agent.invoke(ASKED, {"configurable": {"thread_id": "t"}})

    def test_another_process_resumes_from_the_checkpoint_alone(self, tmp_path: Path) -> None:
        policy = EscalateBelow(to=None, score="hybridgrad", limit=0.5)
        config = {"configurable": {"thread_id": "t"}}
        for resume in (False, True):  # two agents that share nothing but the file
            connection = sqlite3.connect(tmp_path / "graph.db", check_same_thread=False)
            served = Served(answers=[DRAFT])
            middleware = HallucinationGuardMiddleware(_guard(1.0, policy))
            agent = create_agent(served, middleware=[middleware], checkpointer=SqliteSaver(connection))
            state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}) if resume else ASKED, config)
            connection.close()
        assert _last(state).text == DRAFT
        assert served.asked == []


class TestBesideOthers:
    @pytest.mark.parametrize("outside", [True, False])
    def test_personal_data_is_redacted_in_what_was_let_through(self, outside: bool) -> None:
        guard = _guard(0.1)
        redact = PIIMiddleware("email", strategy="redact", apply_to_output=True)
        both: list[Any] = [redact, HallucinationGuardMiddleware(guard)]
        agent = create_agent(Served(answers=["Write to ana@example.com."]), middleware=both if outside else both[::-1])
        state = agent.invoke(ASKED)
        assert "ana@example.com" not in _last(state).text
        assert "REDACTED" in _last(state).text
        assert guard.audit.records[0].answer == "Write to ana@example.com."  # type: ignore[union-attr]

    @pytest.mark.parametrize("outside", [True, False])
    def test_what_was_summarised_is_what_the_guard_reads(self, outside: bool) -> None:
        guard = _guard(0.1)
        short = SummarizationMiddleware(Served(answers=["Of zebras."]), trigger=("messages", 4), keep=("messages", 1))
        both: list[Any] = [short, HallucinationGuardMiddleware(guard)]
        agent = create_agent(Served(answers=["Zebras."]), middleware=both if outside else both[::-1])
        turns = [HumanMessage("One?"), AIMessage("1"), HumanMessage("Two?"), AIMessage("2"), HumanMessage("Which one?")]
        assert _last(agent.invoke({"messages": turns})).text == "Zebras."
        read = str([each["content"] for each in guard.audit.records[0].prompt])  # type: ignore[union-attr]
        assert "Of zebras." in read
        assert "Two?" not in read

    def test_a_fallback_inside_is_decided_on_like_any_model(self) -> None:
        class Broken(Served):
            def _next(self, messages: list[BaseMessage]) -> AIMessage:
                raise RuntimeError("down")

        guard = _guard(1.0)
        both = [HallucinationGuardMiddleware(guard), ModelFallbackMiddleware(Served(answers=[DRAFT]))]
        state = create_agent(Broken(answers=["x"]), middleware=both).invoke(ASKED)
        assert "zebra" not in str(state)
        assert [each.decision for each in guard.audit.records] == ["abstain"]  # type: ignore[union-attr]

    def test_a_retry_inside_repeats_what_broke_and_nothing_else(self) -> None:
        class Flaky(Served):
            def _next(self, messages: list[BaseMessage]) -> AIMessage:
                self.asked.append(messages)
                if len(self.asked) == 1:
                    raise RuntimeError("down")
                return AIMessage(DRAFT)

        served, guard = Flaky(answers=["x"]), _guard(1.0)
        both = [HallucinationGuardMiddleware(guard), ModelRetryMiddleware(max_retries=2, initial_delay=0)]
        state = create_agent(served, middleware=both).invoke(ASKED)
        assert "zebra" not in str(state)
        assert len(served.asked) == 2

    def test_a_retry_that_gave_up_is_no_answer_of_the_model(self) -> None:
        class Broken(Served):
            def _next(self, messages: list[BaseMessage]) -> AIMessage:
                raise RuntimeError("quagga")

        guard = _guard(1.0)  # what ModelRetry puts in its place is read like an answer, and not let through
        both = [HallucinationGuardMiddleware(guard), ModelRetryMiddleware(max_retries=1, initial_delay=0)]
        state = create_agent(Broken(answers=["x"]), middleware=both).invoke(ASKED)
        assert "quagga" not in str(state)

    def test_two_guards_in_front_of_one_model_are_told_apart(self) -> None:
        own, other = _guard(0.1), _guard(0.1)
        agent = create_agent(GuardedChatModel(guard=own), middleware=[HallucinationGuardMiddleware(other)])
        with pytest.raises(ConfigurationError, match="a guard of its own"):
            agent.invoke(ASKED)


class TestSettings:
    @pytest.mark.parametrize(
        "given",
        [
            {"exit_behavior": "continue"},
            {"require_approval_below": {"pay": 0.5}},
            {"require_approval_below": {"pay": 2}, "confidence": lambda generation: []},
            {"allowed_decisions": ["respond"]},
            {"allowed_decisions": []},
        ],
    )
    def test_what_does_not_go_together_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            HallucinationGuardMiddleware(_guard(1.0), **given)

    def test_two_policies_have_two_names(self) -> None:
        other = EscalateBelow(to=None, score="hybridgrad", limit=0.5)
        one, two = (HallucinationGuardMiddleware(_guard(1.0, each)).name for each in (BELOW, other))
        assert one != two


class _Tracer(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def _persist_run(self, run: Any) -> None:
        self.seen.append(run.model_dump_json(exclude={"parent_run"}) if hasattr(run, "model_dump_json") else str(run))

    def on_llm_new_token(self, token: str, **kwargs: Any) -> Any:
        self.seen.append(token)
        return super().on_llm_new_token(token, **kwargs)


MODES = ["messages", "updates", "values", "custom", "debug", "invoke", "ainvoke", "astream", "events v2", "events v3"]


async def received(agent: Any, question: str, mode: str, config: Any) -> list[str]:
    """All that a client receives in one way of running an agent."""
    asked = {"messages": [HumanMessage(question)]}
    if mode == "invoke":
        return [str(agent.invoke(asked, config))]
    if mode == "ainvoke":
        return [str(await agent.ainvoke(asked, config))]
    if mode == "astream":
        return [str(each) async for each in agent.astream(asked, config, stream_mode=["messages", "updates", "values"])]
    if mode == "events v2":
        return [str(each) async for each in agent.astream_events(asked, config, version="v2")]
    if mode == "events v3":
        return [str(each) async for each in await agent.astream_events(asked, config, version="v3")]
    return [str(each) for each in agent.stream(asked, config, stream_mode=mode)]


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryLogRecordExporter]:
    """All that an OpenTelemetry exporter receives."""
    provider, exporter = LoggerProvider(shutdown_on_exit=False), InMemoryLogRecordExporter()
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    monkeypatch.setattr(otel, "_LOGGER_PROVIDER", provider)  # the public setter sets it once a process
    yield exporter
    provider.shutdown()


def _exported(telemetry: InMemoryLogRecordExporter) -> str:
    return " ".join(each.to_json() for each in telemetry.get_finished_logs())


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
class TestLeaks:
    @pytest.mark.parametrize("design", ["middleware", "behind a sentence that left", "guarded model"])
    @pytest.mark.parametrize("mode", MODES)
    async def test_no_word_of_a_rejected_draft_is_received(
        self, mode: str, design: str, telemetry: InMemoryLogRecordExporter
    ) -> None:
        draft, guard = DRAFT, _guard(1.0) if design == "middleware" else None
        if design == "behind a sentence that left":
            draft = f"It is striped. {DRAFT}"
            guard = _guard(lambda generation: 1.0 if "zebra" in generation.text else 0.1)
        agent, saver, tracer = _leaky(design, draft, guard)
        seen = await received(agent, "Which one?", mode, {"configurable": {"thread_id": "t"}, "callbacks": [tracer]})
        everything = " ".join([*seen, *tracer.seen, *_stored(saver), _exported(telemetry)])
        assert "not sure enough" in everything or mode == "custom"
        assert "gen_ai.evaluation.result" in everything
        for word in DRAFT.split():
            assert word not in everything

    async def test_the_scan_finds_a_leak_where_there_is_one(self) -> None:
        agent, saver, tracer = _leaky("none", DRAFT, None)
        config: Any = {"configurable": {"thread_id": "t"}, "callbacks": [tracer]}
        seen = await received(agent, "Which one?", "messages", config)
        for each in (seen, tracer.seen, _stored(saver)):
            assert "zebra" in " ".join(each)

    @pytest.mark.timeout(900)
    async def test_with_the_real_model_and_fifty_questions(
        self, demo: WhiteBoxModel, telemetry: InMemoryLogRecordExporter
    ) -> None:
        subjects = ["rivers", "metals", "planets", "kings", "birds", "engines", "poems", "bridges", "islands", "storms"]
        asked = [
            f"{how} {each}?"
            for how in ("What are", "Who named", "Where are", "Why study", "When came")
            for each in subjects
        ]
        assert len(asked) == 50
        for at, question in enumerate(asked):
            draft = demo.generate(question, max_new_tokens=10).text
            policy = AbstainBelow(score="hybridgrad", limit=0.0)  # nothing is that sure
            guard = Guard(demo, policy=policy, audit=MemorySink(), generation={"max_new_tokens": 10})
            agent, saver, tracer = _leaky(("middleware", "guarded model")[at % 2], draft, guard)
            config: Any = {"configurable": {"thread_id": "t"}, "callbacks": [tracer]}
            mode, design = MODES[at % len(MODES)], ("middleware", "guarded model")[at % 2]
            telemetry.clear()
            seen = await received(agent, question, mode, config)
            everything = " ".join([*seen, *tracer.seen, *_stored(saver), _exported(telemetry)])
            assert draft not in everything
            # What the same way says of another rejected draft is not this one's.
            agent, saver, tracer = _leaky(design, DRAFT, _guard(1.0) if design == "middleware" else None)
            config = {"configurable": {"thread_id": "t"}, "callbacks": [tracer]}
            telemetry.clear()
            seen = await received(agent, question, mode, config)
            known = " ".join([*seen, *tracer.seen, *_stored(saver), _exported(telemetry)])
            for word in {each.strip('.,:;"') for each in draft.split()}:
                assert len(word) < 4 or word in known or word not in everything, (mode, word)


def _leaky(design: str, draft: str, guard: Guard | None) -> tuple[Any, InMemorySaver, _Tracer]:
    saver, tracer = InMemorySaver(), _Tracer()
    if design == "guarded model":
        if guard is None:
            guard = Guard(ScriptedModel(draft), policy=BELOW, scorer=ScriptedScorer(1.0))
        return create_agent(GuardedChatModel(guard=guard), checkpointer=saver), saver, tracer
    middleware = [HallucinationGuardMiddleware(guard)] if guard is not None else []
    return create_agent(Served(answers=[draft]), middleware=middleware, checkpointer=saver), saver, tracer


def _stored(saver: InMemorySaver) -> list[str]:
    """All that the checkpointer holds, as it is written."""
    return [repr(saver.storage), repr(saver.blobs), repr(saver.writes)]
