"""Whatever a chain does with a guarded model: a draft that was not let through is nowhere but in the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.context import collect_runs, tracing_v2_enabled
from langgraph.checkpoint.memory import InMemorySaver

from hallucination_guard.testing import MemorySink
from hallucination_guard.values import Passage, Policy
from hallucination_guard_langchain import GuardedChatModel
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetrieveBelow, RetryBelow

NEVER: dict[str, Any] = {"score": "hybridgrad", "limit": -1.0}
ASKED = "Who was Ada?"
SAID = "I am not sure enough to answer that."
TURN = {"messages": [("user", ASKED)]}
THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}

Way = Callable[[GuardedChatModel, RunnableConfig], Awaitable[Any]]
WAYS: dict[str, Way] = {}


def way(run: Way) -> Way:
    WAYS[run.__name__.strip("_")] = run
    return run


async def _all(items: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in items]


@way
async def _invoke(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return model.invoke(ASKED, config)


@way
async def _ainvoke(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await model.ainvoke(ASKED, config)


@way
async def _stream(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return list(model.stream(ASKED, config))


@way
async def _astream(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(model.astream(ASKED, config))


@way
async def _batch(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return model.batch([ASKED], config)


@way
async def _abatch(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await model.abatch([ASKED], config)


@way
async def _generate(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return model.generate_prompt([model._convert_input(ASKED)], callbacks=config.get("callbacks"))


@way
async def _astream_events_v1(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(model.astream_events(ASKED, config, version="v1"))


@way
async def _astream_events_v2(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(model.astream_events(ASKED, config, version="v2"))


@way
async def _stream_events_v3(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return list(model.stream_events(ASKED, config, version="v3"))


@way
async def _astream_events_v3(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(await model.astream_events(ASKED, config, version="v3"))


@way
async def _astream_log(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(model.astream_log(ASKED, config))


@way
async def _agent(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return create_agent(model).invoke(TURN, config)


@way
async def _agent_async(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await create_agent(model).ainvoke(TURN, config)


@way
async def _agent_events_v2(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(create_agent(model).astream_events(TURN, config, version="v2"))


@way
async def _agent_events_v3(model: GuardedChatModel, config: RunnableConfig) -> Any:
    return await _all(await create_agent(model).astream_events(TURN, config, version="v3"))


@way
async def _checkpoint(model: GuardedChatModel, config: RunnableConfig) -> Any:
    saver = InMemorySaver()
    create_agent(model, checkpointer=saver).invoke(TURN, {**config, **THREAD})
    assert SAID in str(saver.blobs)  # the search would find a text
    return [saver.blobs, saver.writes, saver.storage, list(saver.list(THREAD))]


def _agent_stream(mode: str) -> None:
    async def streamed(model: GuardedChatModel, config: RunnableConfig) -> Any:
        agent = create_agent(model, checkpointer=InMemorySaver())
        return list(agent.stream(TURN, {**config, **THREAD}, stream_mode=mode, subgraphs=True))  # type: ignore[call-overload]

    async def astreamed(model: GuardedChatModel, config: RunnableConfig) -> Any:
        agent = create_agent(model, checkpointer=InMemorySaver())
        return await _all(agent.astream(TURN, {**config, **THREAD}, stream_mode=mode, subgraphs=True))  # type: ignore[call-overload]

    WAYS[f"agent_stream_{mode}"] = streamed
    WAYS[f"agent_astream_{mode}"] = astreamed


for each in ("messages", "values", "updates", "debug", "custom", "checkpoints", "tasks"):
    _agent_stream(each)


def _find(query: str) -> list[Passage]:
    return [Passage(id="ada.txt", text="Ada wrote a program.")]


POLICIES: dict[str, Policy] = {
    "abstain": AbstainBelow(**NEVER),
    "retry": RetryBelow(**NEVER, times=2) | AbstainBelow(**NEVER),
    "retrieve": RetrieveBelow(**NEVER, retriever=_find) | AbstainBelow(**NEVER),
    "failed_escalation": EscalateBelow(**NEVER, to=lambda messages: ""),
}


def _drafts(sink: MemorySink) -> set[str]:
    drafts = {str(record.answer) for record in sink.records}
    assert drafts and all(len(draft) == 16 and draft.isalpha() for draft in drafts)
    return drafts


pytestmark = [  # interfaces that are about to come or to go must hold as well
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]
CASES = [(name, "retry") for name in WAYS]
CASES += [(name, policy) for name in ("ainvoke", "agent_astream_messages") for policy in POLICIES if policy != "retry"]


@pytest.mark.parametrize(("name", "policy"), CASES)
async def test_no_draft_leaves(name: str, policy: str, guarded: Any, sink: MemorySink, listener: Any) -> None:
    gave = await WAYS[name](guarded(POLICIES[policy]), {"callbacks": [listener]})
    told = f"{gave!r} {listener.heard!r}"
    assert [draft for draft in _drafts(sink) if draft[:6] in told or draft[-6:] in told] == []


async def test_a_listener_is_told_what_does_leave(open_model: Any, sink: MemorySink, listener: Any) -> None:
    open_model.invoke(ASKED, {"callbacks": [listener]})
    assert _drafts(sink).pop() in str(listener.heard)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_draft_is_in_the_run_tree(policy: str, guarded: Any, sink: MemorySink) -> None:
    class Tracer(BaseTracer):
        def _persist_run(self, run: Any) -> None:
            runs.append(vars(run))

    runs: list[Any] = []
    create_agent(guarded(POLICIES[policy])).invoke(TURN, {"callbacks": [Tracer()]})
    assert SAID in str(runs)
    assert not any(draft in str(runs) for draft in _drafts(sink))


@pytest.mark.parametrize("policy", POLICIES)
def test_no_draft_is_sent_to_langsmith(policy: str, guarded: Any, sink: MemorySink) -> None:
    client = MagicMock()
    with tracing_v2_enabled(client=client), collect_runs() as collected:
        guarded(POLICIES[policy]).invoke(ASKED)
    sent = f"{client.mock_calls!r} {[vars(run) for run in collected.traced_runs]!r}"
    assert SAID in sent
    assert not any(draft in sent for draft in _drafts(sink))


def test_the_error_says_no_draft(guarded: Any, sink: MemorySink, listener: Any) -> None:
    from hallucination_guard_langchain import LowConfidenceError

    with pytest.raises(LowConfidenceError) as raised:
        guarded(on_abstain="error").invoke(ASKED, {"callbacks": [listener]})
    told = f"{raised.value!r} {raised.value} {vars(raised.value)!r} {listener.heard!r}"
    assert _drafts(sink).pop() not in told


# ------------------------------------------------------------------------------------------- the abstention is shown


def _texts(messages: list[Any]) -> str:
    return "".join(str(message.content) for message in messages if isinstance(message, AIMessage))


async def _shown_by_messages_mode(model: GuardedChatModel) -> str:
    return _texts([message for message, _ in create_agent(model).stream(TURN, stream_mode="messages")])


async def _shown_by_async_messages_mode(model: GuardedChatModel) -> str:
    return _texts([part[0] async for part in create_agent(model).astream(TURN, stream_mode="messages")])


async def _shown_by_events_v2(model: GuardedChatModel) -> str:
    events = await _all(create_agent(model).astream_events(TURN, version="v2"))
    return _texts([each["data"]["chunk"] for each in events if each["event"] == "on_chat_model_stream"])


async def _shown_by_events_v3(model: GuardedChatModel) -> str:
    return "".join([str(text) async for text in (await model.astream_events(ASKED, version="v3")).text])


async def _shown_by_agent_v3(model: GuardedChatModel) -> str:
    run = await create_agent(model).astream_events(TURN, version="v3")
    return "".join([str(await message.text) async for message in run.messages])


async def _shown_by_state(model: GuardedChatModel) -> str:
    return _texts((await create_agent(model).ainvoke(TURN))["messages"])  # type: ignore[arg-type]


SHOWN = {
    "invoke": lambda model: _asked(model.ainvoke(ASKED)),
    "stream": lambda model: _streamed(model.astream(ASKED)),
    "chain": lambda model: _streamed((model | RunnableLambda(lambda message: message)).astream(ASKED)),
    "messages": _shown_by_messages_mode,
    "async_messages": _shown_by_async_messages_mode,
    "events_v2": _shown_by_events_v2,
    "events_v3": _shown_by_events_v3,
    "agent_v3": _shown_by_agent_v3,
    "state": _shown_by_state,
}


async def _asked(answer: Awaitable[Any]) -> str:
    return str((await answer).content)


async def _streamed(chunks: AsyncIterator[Any]) -> str:
    return _texts(await _all(chunks))


@pytest.mark.parametrize("name", SHOWN)
async def test_the_abstention_is_shown_once(name: str, guarded: Any) -> None:
    assert await SHOWN[name](guarded(POLICIES["retry"])) == SAID


def test_an_escalations_answer_is_shown_once(guarded: Any) -> None:
    from langchain_core.language_models import FakeListChatModel

    model = guarded(EscalateBelow(**NEVER, to=FakeListChatModel(responses=["She wrote a program."])))
    shown = create_agent(model).stream(TURN, stream_mode="messages")
    assert _texts([message for message, _ in shown]) == "She wrote a program."
