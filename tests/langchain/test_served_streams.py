"""A served model's answer streams through the middleware sentence by sentence, and nothing else of it leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelFallbackMiddleware, ModelRetryMiddleware
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tracers.base import BaseTracer
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import ConfigDict, Field

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.errors import ModelError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard_langchain import HallucinationGuardMiddleware, LowConfidenceError
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetryBelow

ANSWER = "Zebras are striped. Okapis are too. Quaggas were."
FIRST, SECOND, THIRD = "Zebras are striped. ", "Okapis are too. ", "Quaggas were."
NOT_SURE = "I am not sure enough to answer that."
LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 0.5}
ASKED = {"messages": [HumanMessage("Which animals are striped?")]}
CALLED = AIMessage("Let me see. So.", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "c1"}])


class Served(BaseChatModel):
    """Streams its answers word by word; one that is an exception is raised after what stands before it."""

    model_config = ConfigDict(extra="allow")
    answers: list[Any]
    asked: list[Any] = Field(default_factory=list)
    said: list[str] = Field(default_factory=list)
    gate: Any = None  # waited for behind the first sentence
    streamed: bool = True

    @property
    def _llm_type(self) -> str:
        return "served"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(tools=tools, **kwargs)

    def _next(self, messages: list[BaseMessage]) -> list[Any]:
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(messages)
        return list(answer) if isinstance(answer, list) else [answer]

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        whole = ""
        for part in self._next(messages):
            if isinstance(part, Exception):
                raise part
            if isinstance(part, AIMessage):
                return ChatResult(generations=[ChatGeneration(message=part.model_copy())])
            whole += part
        return ChatResult(generations=[ChatGeneration(message=AIMessage(whole))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if not self.streamed:
            yield ChatGenerationChunk(
                message=AIMessageChunk(**self._generate(messages).generations[0].message.model_dump())
            )
            return
        for part in self._next(messages):
            if isinstance(part, Exception):
                raise part
            text = str(part.text) if isinstance(part, AIMessage) else part
            for at, word in enumerate(text.split(" ")):
                if self.gate is not None and "".join(self.said).startswith(FIRST + "Okapis"):
                    assert self.gate.wait(10)
                self.said.append(word if at == 0 else f" {word}")
                yield ChatGenerationChunk(message=AIMessageChunk(content=self.said[-1]))
            if isinstance(part, AIMessage):
                for call in part.tool_calls:
                    chunk: Any = {"name": call["name"], "args": '{"a": 1}', "id": call["id"], "index": 0}
                    yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[chunk]))


def add(a: int) -> str:
    """Add."""
    return f"it is {a}"


def guard_of(doubts: str = "nothing", *, policy: Any = None, drafts: Any = "x") -> Guard:
    scorer = ScriptedScorer(lambda generation: 1.0 if doubts in generation.text else 0.1)
    return Guard(ScriptedModel(drafts), policy=policy or AbstainBelow(**LIMIT), scorer=scorer, audit=MemorySink())


def agent_of(
    *answers: Any, doubts: str = "nothing", inside: Any = (), outside: Any = (), served: Any = None, **settings: Any
) -> tuple[Any, Served, Guard]:
    served = served or Served(answers=list(answers) or [ANSWER])
    guard = settings.pop("guard", None) or guard_of(doubts, policy=settings.pop("policy", None))
    tools = settings.pop("tools", [])
    middleware = [*outside, HallucinationGuardMiddleware(guard, **settings), *inside]
    return create_agent(served, tools=tools, middleware=middleware, checkpointer=InMemorySaver()), served, guard


def config(*handlers: Any) -> Any:
    return {"configurable": {"thread_id": "t"}, "callbacks": list(handlers)}


async def shown(agent: Any, way: str, into: list[Any] | None = None) -> list[Any]:
    """The messages that a client of ``stream_mode="messages"`` is given, as far as they come."""
    seen = [] if into is None else into
    if way == "stream":
        for message, _ in agent.stream(ASKED, config(), stream_mode="messages"):
            seen.append(message)
    else:
        async for message, _ in agent.astream(ASKED, config(), stream_mode="messages"):
            seen.append(message)
    return seen


def texts(messages: list[Any]) -> list[str]:
    return [each.text for each in messages if isinstance(each, AIMessage) and each.text]


def last(agent: Any) -> Any:
    return agent.get_state(config()).values["messages"][-1]


@pytest.mark.parametrize("way", ["stream", "astream"])
class TestSentences:
    async def test_they_leave_one_by_one(self, way: str) -> None:
        agent, _, guard = agent_of()
        seen = await shown(agent, way)
        assert texts(seen) == [FIRST, SECOND, THIRD]
        assert len({each.id for each in seen}) == 1
        message = last(agent)
        assert (message.text, message.id) == (ANSWER, seen[0].id)
        assert message.response_metadata["hallucination_guard"]["decision"] == "accept"
        assert [each.part is None for each in guard.audit.records] == [False, False, True]  # type: ignore[union-attr]

    async def test_what_the_server_says_beside_the_text_does_not_leave(self, way: str) -> None:
        class Telling(Served):
            def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
                yield from super()._stream(messages)
                beside: Any = {
                    "content": "",
                    "additional_kwargs": {"reasoning_content": "unicorns"},
                    "response_metadata": {"logprobs": {"content": [{"token": "unicorns"}]}, "finish_reason": "stop"},
                    "usage_metadata": {"input_tokens": 7, "output_tokens": 9, "total_tokens": 16},
                }
                yield ChatGenerationChunk(message=AIMessageChunk(**beside))

        agent, _, _ = agent_of(served=Telling(answers=[ANSWER]))
        seen = await shown(agent, way)
        message = last(agent)
        assert "unicorns" not in repr(seen) + repr(message)
        assert message.text == ANSWER and message.response_metadata["finish_reason"] == "stop"
        assert message.usage_metadata["total_tokens"] == 16

    async def test_before_the_model_has_finished(self, way: str) -> None:
        gate = threading.Event()
        agent, served, _ = agent_of(served=Served(answers=[ANSWER], gate=gate))
        seen: list[str] = []
        if way == "stream":
            for message, _ in agent.stream(ASKED, config(), stream_mode="messages"):
                assert gate.is_set() or "Quaggas" not in "".join(served.said)
                seen.append(message.text)
                gate.set()
        else:
            async for message, _ in agent.astream(ASKED, config(), stream_mode="messages"):
                assert gate.is_set() or "Quaggas" not in "".join(served.said)
                seen.append(message.text)
                gate.set()
        assert seen[0] == FIRST
        assert "".join(seen) == ANSWER

    async def test_what_is_not_let_through_is_said_behind_what_was(self, way: str) -> None:
        agent, _, _ = agent_of(doubts="Okapis")
        assert texts(await shown(agent, way)) == [FIRST, f"\n\n{NOT_SURE}"]
        assert last(agent).text == f"{FIRST}\n\n{NOT_SURE}"
        assert last(agent).response_metadata["hallucination_guard"]["decision"] == "abstain"

    async def test_nothing_let_through_is_the_abstention(self, way: str) -> None:
        agent, _, _ = agent_of(doubts="Zebras")
        assert texts(await shown(agent, way)) == [NOT_SURE]
        assert last(agent).text == NOT_SURE

    async def test_the_model_is_not_asked_for_more(self, way: str) -> None:
        long = ANSWER + " And so on." * 20000
        agent, served, _ = agent_of(long, doubts="Zebras")
        await shown(agent, way)
        for _ in range(1000):
            if not [each for each in threading.enumerate() if each.name == "hallucination-guard-ear"]:
                break
            await asyncio.sleep(0.005)
        assert len("".join(served.said)) < len(long)

    async def test_an_error_in_the_place_of_an_abstention_comes_behind_what_was_let_through(self, way: str) -> None:
        agent, _, _ = agent_of(doubts="Okapis", exit_behavior="error")
        seen: list[Any] = []
        with pytest.raises(LowConfidenceError):
            await shown(agent, way, seen)
        assert texts(seen) == [FIRST]

    async def test_calls_leave_with_the_whole_answer(self, way: str) -> None:
        agent, served, _ = agent_of(CALLED, "Done so. It is one.", tools=[add])
        seen = [each for each in await shown(agent, way) if isinstance(each, AIMessage)]
        assert texts(seen) == ["Let me see. ", "So.\n", "Done so. ", "It is one."]
        first = [each for each in seen if each.id == seen[0].id]
        assert [bool(each.tool_call_chunks) for each in first] == [False, False, False, True]
        messages = agent.get_state(config()).values["messages"]
        assert [each.text for each in messages[1:]] == ["Let me see. So.\n", "it is 1", "Done so. It is one."]
        assert messages[1].tool_calls[0]["id"] == "c1" == messages[2].tool_call_id
        assert len(served.asked) == 2

    async def test_a_doubtful_call_is_not_made(self, way: str) -> None:
        agent, served, _ = agent_of(CALLED, doubts="arguments", tools=[add])
        seen = await shown(agent, way)
        assert not any(getattr(each, "tool_calls", None) or getattr(each, "tool_call_chunks", None) for each in seen)
        assert len(served.asked) == 1
        assert last(agent).tool_calls == []

    async def test_a_further_draft_goes_on_after_what_left(self, way: str) -> None:
        policy = RetryBelow(**LIMIT, times=1) | AbstainBelow(**LIMIT)
        agent, _, _ = agent_of(guard=guard_of("Okapis", policy=policy, drafts="Giraffes are not."))
        assert texts(await shown(agent, way)) == [FIRST, "Giraffes are not."]
        assert last(agent).text == FIRST + "Giraffes are not."

    async def test_another_one_answers_in_a_paragraph_of_its_own(self, way: str) -> None:
        agent, _, _ = agent_of(doubts="Okapis", policy=EscalateBelow(to=lambda messages: "Ask a zoologist.", **LIMIT))
        assert texts(await shown(agent, way)) == [FIRST, "\n\nAsk a zoologist."]
        assert last(agent).text == f"{FIRST}\n\nAsk a zoologist."

    @pytest.mark.parametrize("decision", ["approve", "reject"])
    async def test_a_human_reviews_the_whole_answer(self, way: str, decision: str) -> None:
        agent, served, _ = agent_of(doubts="Okapis", policy=EscalateBelow(to=None, **LIMIT))
        seen = await shown(agent, way)
        assert texts(seen) == [FIRST, f"\n\n{NOT_SURE}"]
        [asked] = agent.get_state(config()).tasks[0].interrupts
        assert asked.value["action_requests"][0]["args"] == {"text": ANSWER}
        assert "Okapis" not in str(agent.get_state(config()).values["messages"])
        state = agent.invoke(Command(resume={"decisions": [{"type": decision}]}), config())
        assert state["messages"][-1].id == seen[0].id
        assert state["messages"][-1].text == (ANSWER if decision == "approve" else f"{FIRST}\n\n{NOT_SURE}")
        assert len(served.asked) == 1

    async def test_a_model_that_says_all_at_once_is_decided_on_as_a_whole(self, way: str) -> None:
        class Whole(Served):
            disable_streaming: bool = True

        for doubts, said in (("nothing", ANSWER), ("Quaggas", NOT_SURE)):
            agent, _, _ = agent_of(doubts=doubts, served=Whole(answers=[ANSWER]))
            assert texts(await shown(agent, way)) == [said]

    @pytest.mark.parametrize("setting", ["response_format", "served", "approval"])
    async def test_what_asks_for_the_whole_does_not_stream(self, way: str, setting: str) -> None:
        more: dict[str, Any] = {}
        if setting == "approval":
            more = {"require_approval_below": {"add": 0.5}, "confidence": lambda generation: []}
        agent, _, _ = agent_of(**more)
        if setting == "served":
            named = HallucinationGuardMiddleware(guard_of(), served=Served(answers=[ANSWER]))
            agent = create_agent(Served(answers=[ANSWER]), middleware=[named], checkpointer=InMemorySaver())
        if setting == "response_format":
            schema = {"title": "A", "type": "object", "properties": {"a": {"type": "integer"}}}
            agent = create_agent(
                Served(answers=[ANSWER, AIMessage("", tool_calls=[{"name": "A", "args": {"a": 1}, "id": "c"}])]),
                response_format=schema,
                middleware=[HallucinationGuardMiddleware(guard_of())],
                checkpointer=InMemorySaver(),
            )
        assert texts(await shown(agent, way))[0] == (NOT_SURE if setting == "served" else ANSWER)

    async def test_nobody_who_listens_nothing_streams(self, way: str) -> None:
        agent, served, guard = agent_of()
        agent.invoke(ASKED, config()) if way == "stream" else await agent.ainvoke(ASKED, config())
        assert served.said == []
        assert len(guard.audit.records) == 1  # type: ignore[union-attr]

    async def test_two_guards_one_in_front_of_the_other(self, way: str) -> None:
        own = guard_of(policy=EscalateBelow(to=lambda messages: "never", **LIMIT))
        agent, _, outer = agent_of(inside=[HallucinationGuardMiddleware(own)], doubts="Quaggas")
        assert texts(await shown(agent, way)) == [FIRST, SECOND, f"\n\n{NOT_SURE}"]
        assert own.audit.records and outer.audit.records  # type: ignore[union-attr]


class Chooses(AgentMiddleware[Any, Any, Any]):
    """Asks a model of its own something else before the agent's is asked."""

    def __init__(self, model: Any, asked: Any) -> None:
        super().__init__()
        self.model, self.asked = model, asked

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        self.model.invoke(self.asked)
        return handler(request)

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        await self.model.ainvoke(self.asked)
        return await handler(request)


class Rewrites(AgentMiddleware[Any, Any, Any]):
    """Gives another message than the model's."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        handler(request)
        return AIMessage(self.text)

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        await handler(request)
        return AIMessage(self.text)


@pytest.mark.parametrize("way", ["stream", "astream"])
class TestBesideOthers:
    async def test_a_retry_before_anything_left_starts_over(self, way: str) -> None:
        again = ModelRetryMiddleware(max_retries=2, initial_delay=0)
        agent, served, guard = agent_of(["Zeb", OSError("down")], ANSWER, inside=[again])
        assert texts(await shown(agent, way)) == [FIRST, SECOND, THIRD]
        assert len(served.asked) == 2
        assert guard.audit.records[0].rule == "interrupted"  # type: ignore[union-attr]

    async def test_a_retry_after_something_left_lets_nothing_more_leave(self, way: str) -> None:
        again = ModelRetryMiddleware(max_retries=2, initial_delay=0)
        agent, _, guard = agent_of([FIRST + "Okapis", OSError("down")], "Horses are. Cows.", inside=[again])
        seen: list[Any] = []
        with pytest.raises(OSError, match="down"):
            await shown(agent, way, seen)
        assert texts(seen) == [FIRST]
        assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]
        assert "Horses" not in str(agent.get_state(config()).values)

    async def test_a_fallback_inside_starts_over_too(self, way: str) -> None:
        other = Served(answers=["Horses are not. Cows are."])
        agent, _, _ = agent_of(["Zeb", OSError("down")], inside=[ModelFallbackMiddleware(other)])
        assert texts(await shown(agent, way)) == ["Horses are not. ", "Cows are."]

    async def test_a_fallback_outside_takes_over_from_an_error(self, way: str) -> None:
        other = Served(answers=["Horses are not. Cows are."])
        agent, _, _ = agent_of(doubts="Zebras", outside=[ModelFallbackMiddleware(other)], exit_behavior="error")
        assert texts(await shown(agent, way)) == ["Horses are not. ", "Cows are."]
        assert last(agent).text == "Horses are not. Cows are."

    async def test_a_failure_that_a_retry_words_is_decided_on(self, way: str) -> None:
        again = ModelRetryMiddleware(max_retries=1, initial_delay=0)
        agent, _, _ = agent_of(["Zeb", OSError("quagga")], inside=[again], doubts="quagga")
        assert texts(await shown(agent, way)) == [NOT_SURE]

    async def test_a_model_that_is_asked_something_else_is_not_the_answer(self, way: str) -> None:
        other = Served(answers=["Use the tool. It is good. Really."])
        agent, _, _ = agent_of(inside=[Chooses(other, [HumanMessage("Which tool?")])])
        assert texts(await shown(agent, way)) == [FIRST, SECOND, THIRD]

    async def test_a_second_answer_after_something_left_ends_it(self, way: str) -> None:
        other = Served(answers=["Use the tool. It is good. Really."])

        class Same(Chooses):
            def wrap_model_call(self, request: Any, handler: Any) -> Any:
                self.model.invoke(request.messages)
                return handler(request)

            async def awrap_model_call(self, request: Any, handler: Any) -> Any:
                await self.model.ainvoke(request.messages)
                return await handler(request)

        agent, _, _ = agent_of(inside=[Same(other, None)])
        seen: list[Any] = []
        with pytest.raises(ModelError, match="began another answer"):
            await shown(agent, way, seen)
        assert "".join(texts(seen)) == "Use the tool. It is good. "

    @pytest.mark.parametrize(
        ("text", "fails"), [(ANSWER + " \n", False), ("Horses.", True), (ANSWER + " More.", False)]
    )
    async def test_a_message_that_was_not_heard(self, way: str, text: str, fails: bool) -> None:
        agent, _, _ = agent_of(inside=[Rewrites(text)])
        seen: list[Any] = []
        if fails:
            with pytest.raises(ModelError, match="was heard to say something else"):
                await shown(agent, way, seen)
        else:
            await shown(agent, way, seen)
            assert last(agent).text == "".join(texts(seen)) == text
        assert "Horses" not in "".join(texts(seen))

    async def test_one_that_was_rewritten_before_anything_left_is_decided_on(self, way: str) -> None:
        agent, _, _ = agent_of("Zebras", inside=[Rewrites("Horses are. Cows are.")])
        assert texts(await shown(agent, way)) == ["Horses are. ", "Cows are."]

    async def test_what_reads_another_prompt_is_decided_on_as_a_whole(self, way: str) -> None:
        class Other(AgentMiddleware[Any, Any, Any]):
            def wrap_model_call(self, request: Any, handler: Any) -> Any:
                return handler(request.override(messages=[HumanMessage("Something else?")]))

            async def awrap_model_call(self, request: Any, handler: Any) -> Any:
                return await handler(request.override(messages=[HumanMessage("Something else?")]))

        agent, _, _ = agent_of(inside=[Other()])
        assert texts(await shown(agent, way)) == [ANSWER]


@pytest.mark.parametrize("way", ["stream", "astream"])
class TestEnds:
    @pytest.mark.fault(
        "stream",
        "a served model breaks off in mid-stream, {case}",
        "what left is a correct beginning; the error is raised",
    )
    async def test_an_error_in_mid_stream(self, way: str) -> None:
        agent, _, guard = agent_of([FIRST + "Okapis", OSError("down")])
        seen: list[Any] = []
        with pytest.raises(OSError, match="down"):
            await shown(agent, way, seen)
        assert texts(seen) == [FIRST]
        assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]

    async def test_an_error_before_anything(self, way: str) -> None:
        agent, _, _ = agent_of([OSError("down")])
        with pytest.raises(OSError, match="down"):
            await shown(agent, way)

    async def test_a_listener_that_fails_ends_it(self, way: str) -> None:
        class Broken(BaseCallbackHandler):
            raise_error = True

            def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
                raise ValueError("broken")

        agent, _, guard = agent_of()
        stream = {"stream": agent.stream, "astream": agent.astream}[way](
            ASKED, config(Broken()), stream_mode="messages"
        )
        with pytest.raises(ValueError, match="broken"):
            [each for each in stream] if way == "stream" else [each async for each in stream]
        if way == "stream":  # the thread of an async stream may be ahead of its reader
            assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]


async def test_a_reader_who_leaves_ends_it() -> None:
    gate = threading.Event()

    class Async(Served):
        async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
            yield ChatGenerationChunk(message=AIMessageChunk(content=FIRST + "Okapis"))
            try:
                await asyncio.Event().wait()
            finally:
                gate.set()

    agent, _, guard = agent_of(served=Async(answers=[ANSWER]))
    stream = agent.astream(ASKED, config(), stream_mode="messages")
    message, _ = await anext(stream)
    assert message.text == FIRST
    await stream.aclose()
    for _ in range(1000):
        if gate.is_set() and len(guard.audit.records) > 1:  # type: ignore[union-attr]
            break
        await asyncio.sleep(0.005)
    assert gate.is_set()
    assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]


async def test_many_agents_at_a_time() -> None:
    async def one(at: int) -> list[str]:
        agent, _, _ = agent_of(doubts=("nothing", "Okapis")[at % 2])
        return texts(await shown(agent, "astream"))

    found = await asyncio.wait_for(asyncio.gather(*(one(at) for at in range(32))), 60)
    assert found == [[FIRST, SECOND, THIRD], [FIRST, f"\n\n{NOT_SURE}"]] * 16


class Tracer(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Any] = []

    def _persist_run(self, run: Any) -> None:
        self.runs.append(run)


MODES = ["messages", "updates", "values", "custom", "debug", "tasks", "checkpoints", "all", "v2", "v3", "log"]


@pytest.mark.filterwarnings(
    "ignore:The v3 streaming protocol", "ignore::langchain_core._api.LangChainDeprecationWarning"
)
@pytest.mark.parametrize("doubts", ["Zebras", "Okapis"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_rejected_sentence_is_nowhere(way: str, mode: str, doubts: str) -> None:
    saver, tracer, guard = InMemorySaver(), Tracer(), guard_of(doubts)
    agent = create_agent(Served(answers=[ANSWER]), middleware=[HallucinationGuardMiddleware(guard)], checkpointer=saver)
    settings, seen = config(tracer), []
    modes: Any = MODES[:7] if mode == "all" else mode
    if mode in ("v2", "v3", "log"):
        if mode == "v3" and way == "stream":
            seen = [str(each) for each in agent.stream_events(ASKED, settings, version="v3")]
        elif mode == "v3":
            seen = [str(each) async for each in await agent.astream_events(ASKED, settings, version="v3")]
        elif mode == "v2":
            seen = [str(each) async for each in agent.astream_events(ASKED, settings, version="v2")]
        else:
            seen = [str(each) async for each in agent.astream_log(ASKED, settings)]
    elif way == "stream":
        seen = [str(each) for each in agent.stream(ASKED, settings, stream_mode=modes, subgraphs=True)]
    else:
        seen = [str(each) async for each in agent.astream(ASKED, settings, stream_mode=modes, subgraphs=True)]
    everything = " ".join([*seen, *map(str, tracer.runs), repr(saver.storage), repr(saver.blobs), repr(saver.writes)])
    assert "not sure enough" in everything
    if doubts == "Okapis" and mode in ("messages", "all", "v2", "v3", "log"):
        assert "Zebras" in " ".join(seen)
    for word in ("Zebras", "Okapis", "Quaggas")[("Zebras", "Okapis").index(doubts) :]:
        assert word not in everything


def test_with_the_real_model(demo: WhiteBoxModel) -> None:
    """The demo model's own answer, served by something else, is scored and leaves sentence by sentence."""
    answer = demo.generate("Name three rivers of Europe, a sentence each.", max_new_tokens=48).text
    policy = AbstainBelow(score="mean_token_entropy", limit=100.0)
    guard = Guard(demo, policy=policy, audit=MemorySink())
    agent, _, _ = agent_of(answer, guard=guard)
    found = texts([each for each, _ in agent.stream(ASKED, config(), stream_mode="messages")])
    assert len(found) > 1
    assert "".join(found) == answer == last(agent).text
