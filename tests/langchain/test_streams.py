"""Streams of the guarded chat model, alone, in a chain and in an agent: sentence by sentence, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard_langchain import GuardedChatModel, HallucinationGuardMiddleware, LowConfidenceError
from hallucination_guard_policies import AbstainBelow, EscalateBelow

ANSWER = "Zebras are striped. Okapis are too. Quaggas were."
FIRST, SECOND, THIRD = "Zebras are striped. ", "Okapis are too. ", "Quaggas were."
LIMIT = {"score": "hybridgrad", "limit": 0.5}
ASKED = {"messages": [HumanMessage("Which animals are striped?")]}
NOT_SURE = "I am not sure enough to answer that."


def guard_of(doubts: str = "nothing", *, policy: Any = None, answer: Any = ANSWER) -> Guard:
    scorer = ScriptedScorer(lambda generation: 1.0 if doubts in generation.text else 0.1)
    model = ScriptedModel(answer) if isinstance(answer, str) else answer
    return Guard(model, policy=policy or AbstainBelow(**LIMIT), scorer=scorer, audit=MemorySink())


def chat(doubts: str = "nothing", **settings: Any) -> GuardedChatModel:
    policy, answer = settings.pop("policy", None), settings.pop("answer", ANSWER)
    return GuardedChatModel(guard=guard_of(doubts, policy=policy, answer=answer), **settings)


async def chunks_of(model: Any, way: str, asked: Any = "Which animals?") -> list[Any]:
    if way == "stream":
        return list(model.stream(asked))
    return [each async for each in model.astream(asked)]


@pytest.mark.parametrize("way", ["stream", "astream"])
class TestChat:
    async def test_a_chunk_a_sentence(self, way: str) -> None:
        chunks = await chunks_of(chat(), way)
        assert [each.text for each in chunks] == [FIRST, SECOND, THIRD, ""]
        whole = sum(chunks[1:], chunks[0])
        verdicts = [each for each in chunks if "hallucination_guard" in each.response_metadata]
        assert len(verdicts) == 1
        assert whole.response_metadata["hallucination_guard"]["decision"] == "accept"
        assert whole.text == ANSWER
        assert whole.usage_metadata["output_tokens"] == len(ANSWER)

    async def test_what_is_not_let_through_is_said_behind_what_was(self, way: str) -> None:
        chunks = await chunks_of(chat("Okapis"), way)
        assert [each.text for each in chunks] == [FIRST, f"\n\n{NOT_SURE}"]
        assert chunks[-1].response_metadata["hallucination_guard"]["decision"] == "abstain"

    async def test_nothing_let_through_is_the_abstention(self, way: str) -> None:
        assert [each.text for each in await chunks_of(chat("Zebras"), way)] == [NOT_SURE]

    async def test_an_error_comes_behind_what_was_let_through(self, way: str) -> None:
        seen: list[str] = []
        with pytest.raises(LowConfidenceError):
            if way == "stream":
                seen.extend(_noted(chat("Okapis", on_abstain="error").stream("?"), seen))
            else:
                async for each in chat("Okapis", on_abstain="error").astream("?"):
                    seen.append(each.text)
        assert seen == [FIRST]

    async def test_another_one_answers_in_a_paragraph_of_its_own(self, way: str) -> None:
        policy = EscalateBelow(to=lambda messages: "Ask a zoologist.", **LIMIT)
        chunks = await chunks_of(chat("Okapis", policy=policy), way)
        assert [each.text for each in chunks] == [FIRST, "\n\nAsk a zoologist."]

    async def test_a_chain_streams(self, way: str) -> None:
        assert await chunks_of(chat() | StrOutputParser(), way) == [FIRST, SECOND, THIRD, ""]

    async def test_a_guard_whose_thresholds_are_of_whole_answers_gives_one_chunk(
        self, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Guard, "streams", False)
        assert [each.text for each in await chunks_of(chat(), way)] == [ANSWER]

    async def test_a_call_is_in_the_last_chunk(self, way: str) -> None:
        call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        tool = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
        model = chat(answer=f"Let me see. It is a sum. {call}").bind_tools([tool])
        chunks = await chunks_of(model, way)
        assert [each.text for each in chunks] == ["Let me see. ", "It is a sum. ", "", ""]
        assert [bool(each.tool_call_chunks) for each in chunks] == [False, False, False, True]
        assert sum(chunks[1:], chunks[0]).tool_calls[0]["args"] == {"a": 1}

    async def test_who_reads_is_not_silenced_between_chunks(self, way: str) -> None:
        heard = _Heard()

        async def read(_: Any) -> str:
            said = []
            if way == "stream":
                for each in chat().stream("?"):
                    said.append(RunnableLambda(str.upper).invoke(each.text))
            else:
                async for each in chat().astream("?"):
                    said.append(await RunnableLambda(str.upper).ainvoke(each.text))
            return "".join(said)

        assert await RunnableLambda(read).ainvoke("?", {"callbacks": [heard]}) == ANSWER.upper()
        assert heard.names.count("upper") == 4


async def test_many_streams_at_a_time() -> None:
    model = chat()
    found = await asyncio.gather(*(chunks_of(model, "astream", f"Which {at}?") for at in range(32)))
    assert all("".join(each.text for each in chunks) == ANSWER for chunks in found)
    assert len([each for each in model.guard.audit.records if each.part is None]) == 32  # type: ignore[union-attr]


async def test_a_reader_who_leaves_ends_it() -> None:
    model = chat(answer=Waiting(ANSWER))
    stream = model.astream("Which animals?")
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    for _ in range(1000):  # LangChain leaves the inner generator to the loop, which closes it a moment later
        if len(model.guard.audit.records) > 1:  # type: ignore[union-attr]
            break
        await asyncio.sleep(0.005)
    assert model.guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]


def agent_of(design: str, doubts: str = "nothing", answer: Any = ANSWER, **settings: Any) -> tuple[Any, Guard]:
    guard = guard_of(doubts, answer=answer)
    middleware = [HallucinationGuardMiddleware(guard, **settings)] if design == "both" else []
    return create_agent(GuardedChatModel(guard=guard), middleware=middleware, checkpointer=InMemorySaver()), guard


def config() -> Any:
    return {"configurable": {"thread_id": "t"}}


@pytest.mark.parametrize("design", ["guarded model", "both"])
class TestAgents:
    def test_sentences_arrive_one_by_one(self, design: str) -> None:
        model = Waiting(ANSWER)
        agent, guard = agent_of(design, answer=model)
        texts = []
        for message, _ in agent.stream(ASKED, config(), stream_mode="messages"):
            if message.text:
                texts.append(message.text)
            if message.text == FIRST:  # the rest is not even drawn
                assert len(guard.audit.records) == 1  # type: ignore[union-attr]
                model.seen.set()
        assert texts == [FIRST, SECOND, THIRD]

    async def test_and_asynchronously(self, design: str) -> None:
        agent, _ = agent_of(design)
        texts = [each.text async for each, _ in agent.astream(ASKED, config(), stream_mode="messages") if each.text]
        assert texts == [FIRST, SECOND, THIRD]

    def test_an_abstention_is_shown_once(self, design: str) -> None:
        agent, _ = agent_of(design, "Okapis")
        texts = [each.text for each, _ in agent.stream(ASKED, config(), stream_mode="messages") if each.text]
        assert texts == [FIRST, f"\n\n{NOT_SURE}"]
        state = agent.get_state(config()).values["messages"]
        assert state[-1].text == f"{FIRST}\n\n{NOT_SURE}"

    @pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
    async def test_events_of_the_third_version(self, design: str) -> None:
        agent, _ = agent_of(design, "Okapis")
        run = await agent.astream_events(ASKED, config(), version="v3")
        said = [str(each) async for each in run]
        assert "Zebras" in " ".join(said)
        assert "Okapis" not in " ".join(said)


def test_a_call_that_may_have_to_wait_is_not_streamed() -> None:
    agent, _ = agent_of("both", require_approval_below={"pay": 0.9}, confidence=lambda generation: [])
    texts = [each.text for each, _ in agent.stream(ASKED, config(), stream_mode="messages") if each.text]
    assert texts == [ANSWER]


def test_with_the_real_model(demo: WhiteBoxModel) -> None:
    policy = AbstainBelow(score="mean_token_entropy", limit=100.0)
    model = GuardedChatModel(guard=Guard(demo, policy=policy, generation={"max_new_tokens": 48}))
    asked = "Name three rivers of Europe, a sentence each."
    chunks = [each for each in create_agent(model).stream({"messages": [HumanMessage(asked)]}, stream_mode="messages")]
    texts = [each.text for each, _ in chunks if each.text]
    assert len(texts) > 1
    assert "".join(texts) == model.invoke(asked).text


class Waiting(ScriptedModel):
    """After its first sentence it draws nothing until its reader has it, or is gone."""

    def __init__(self, answer: str) -> None:
        super().__init__(answer)
        self.seen = threading.Event()

    def stream(self, *args: Any, gone: Any = lambda: False, **kwargs: Any) -> Any:
        live = super().stream(*args, gone=gone, **kwargs)
        draw = live.draw

        def once_read() -> None:
            while live.drawn > len(FIRST) + 2 and not self.seen.is_set() and not gone():
                threading.Event().wait(0.005)
            if not gone():
                draw()

        live.draw = once_read  # type: ignore[method-assign]
        return live


class _Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.names: list[str] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.names.append(kwargs.get("name") or "")


def _noted(chunks: Any, into: list[str]) -> list[str]:
    for each in chunks:
        assert isinstance(each, AIMessageChunk)
        into.append(each.text)
    return []
