"""The observing callback: it writes down what left, and changes nothing."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel, FakeListLLM, GenericFakeChatModel
from langchain_core.language_models.fake import FakeStreamingListLLM
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langgraph.checkpoint.memory import InMemorySaver

from hallucination_guard import HybridGrad, WhiteBoxModel
from hallucination_guard.errors import AuditError, InputError
from hallucination_guard.testing import MemorySink
from hallucination_guard_langchain import AuditCallback, GuardRunnable
from hallucination_guard_langchain.callback import _Observe
from hallucination_guard_policies import Accept

ASKED = "Who was Ada?"
TOLD = "A countess."


@pytest.fixture
def audit(white: WhiteBoxModel, sink: MemorySink) -> AuditCallback:
    return AuditCallback(white, audit=sink, raise_error=True)


def chat(*answers: str, **settings: Any) -> FakeListChatModel:
    return FakeListChatModel(responses=list(answers or (TOLD,)), **settings)


async def _collect(stream: Any) -> list[Any]:
    return [each async for each in stream]


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "invoke": lambda step, config: asyncio.to_thread(step.invoke, ASKED, config),
    "ainvoke": lambda step, config: step.ainvoke(ASKED, config),
    "stream": lambda step, config: asyncio.to_thread(lambda: list(step.stream(ASKED, config))),
    "astream": lambda step, config: _collect(step.astream(ASKED, config)),
    "batch": lambda step, config: asyncio.to_thread(step.batch, [ASKED], config),
    "abatch": lambda step, config: step.abatch([ASKED], config),
    "astream_events": lambda step, config: _collect(step.astream_events(ASKED, config, version="v2")),
}
STEPS = {
    "model": chat(),
    "chain": ChatPromptTemplate.from_messages([("user", "{question}")]) | chat(),
    "completion": FakeListLLM(responses=[TOLD]),
    "streamed_completion": FakeStreamingListLLM(responses=[TOLD]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("step", STEPS)
async def test_what_left_is_recorded(call: str, step: str, audit: AuditCallback, sink: MemorySink) -> None:
    await CALLS[call](STEPS[step], {"callbacks": [audit]})
    (record,) = sink.records
    assert (record.answer, record.to_json_dict()["prompt"]) == (TOLD, [{"role": "user", "content": ASKED}])


@pytest.mark.parametrize("call", CALLS)
async def test_nothing_is_kept_in_memory(call: str, audit: AuditCallback) -> None:
    await CALLS[call](chat(), {"callbacks": [audit]})
    assert len(audit._asked) == 0


def test_it_may_sit_on_the_model_itself(audit: AuditCallback, sink: MemorySink) -> None:
    chat(callbacks=[audit]).invoke(ASKED)
    assert sink.records[0].answer == TOLD


def test_a_record_says_that_it_only_observed(audit: AuditCallback, sink: MemorySink) -> None:
    chat().invoke(ASKED, {"callbacks": [audit]})
    assert (sink.records[0].decision, sink.records[0].rule) == ("accept", "observed")


def test_an_answer_without_a_score_is_recorded_too(audit: AuditCallback, sink: MemorySink) -> None:
    chat("").invoke(ASKED, {"callbacks": [audit]})
    assert (sink.records[0].status, sink.records[0].rule) == ("unscorable", "observed")


def test_an_answer_whose_scoring_fails_is_recorded_too(white: WhiteBoxModel, sink: MemorySink) -> None:
    class Broken:
        identity, primary = HybridGrad().identity, "hybridgrad"

        def batch(self, model: Any, generations: Any) -> Any:
            raise RuntimeError("broken")

    chat().invoke(ASKED, {"callbacks": [AuditCallback(white, audit=sink, scorer=Broken(), raise_error=True)]})
    assert sink.records[0].status == "error"


@pytest.mark.parametrize("answer", [TOLD, ""])
def test_the_answer_stays_as_it_was(answer: str, audit: AuditCallback) -> None:
    alone, observed = chat(answer).invoke(ASKED), chat(answer).invoke(ASKED, {"callbacks": [audit]})
    assert observed.model_dump(exclude={"id"}) == alone.model_dump(exclude={"id"})


def test_a_stream_stays_as_it_was(audit: AuditCallback) -> None:
    chunks = [chunk.content for chunk in chat().stream(ASKED, {"callbacks": [audit]})]
    assert chunks == [chunk.content for chunk in chat().stream(ASKED)]


def test_each_of_a_batch_is_recorded(audit: AuditCallback, sink: MemorySink) -> None:
    FakeListLLM(responses=["a", "b"]).generate(["A?", "B?"], callbacks=[audit])
    assert {(record.to_json_dict()["prompt"][0]["content"], record.answer) for record in sink.records} == {
        ("A?", "a"),
        ("B?", "b"),
    }


async def test_concurrent_runs_are_not_mixed_up(audit: AuditCallback, sink: MemorySink) -> None:
    questions = [f"{number}?" for number in range(8)]
    models = [chat(question) for question in questions]
    await asyncio.gather(
        *(model.ainvoke(question, {"callbacks": [audit]}) for model, question in zip(models, questions, strict=True))
    )
    assert {(record.to_json_dict()["prompt"][0]["content"], record.answer) for record in sink.records} == {
        (question, question) for question in questions
    }


def test_a_guarded_models_answer_is_recorded_once(audit: AuditCallback, open_model: Any, sink: MemorySink) -> None:
    open_model.invoke(ASKED, {"callbacks": [audit]})
    assert [record.rule for record in sink.records] == ["accept_all"]


def test_a_guarded_models_stream_is_recorded_once(audit: AuditCallback, open_model: Any, sink: MemorySink) -> None:
    list(open_model.stream(ASKED, {"callbacks": [audit]}))
    assert [record.rule for record in sink.records] == ["accept_all"]


def test_a_guarded_steps_answer_is_recorded_once(audit: AuditCallback, guard: Any, sink: MemorySink) -> None:
    GuardRunnable(chat(), guard(Accept())).invoke(ASKED, {"callbacks": [audit]})
    assert [record.rule for record in sink.records] == ["accept_all"]


@pytest.mark.parametrize("mode", ["values", "messages"])
def test_the_thread_of_a_graph_is_in_the_record(mode: Any, audit: AuditCallback, sink: MemorySink) -> None:
    agent = create_agent(chat(), checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t-1"}, "callbacks": [audit]}
    list(agent.stream({"messages": [("user", ASKED)]}, config, stream_mode=mode))  # type: ignore[arg-type]
    assert [record.thread_id for record in sink.records] == ["t-1"]


# ------------------------------------------------------------------------------------------------- when things fail


def _full(record: Any) -> str:
    raise AuditError("the disk is full")


def test_a_log_that_can_not_be_written_stops_the_chain_if_wished(white: WhiteBoxModel) -> None:
    with pytest.raises(AuditError):
        chat().invoke(ASKED, {"callbacks": [AuditCallback(white, audit=_full, raise_error=True)]})


async def test_a_log_that_can_not_be_written_stops_the_async_chain_if_wished(white: WhiteBoxModel) -> None:
    with pytest.raises(AuditError):
        await chat().ainvoke(ASKED, {"callbacks": [AuditCallback(white, audit=_full, raise_error=True)]})


def test_a_log_that_can_not_be_written_is_warned_about_else(white: WhiteBoxModel, caplog: Any) -> None:
    chat().invoke(ASKED, {"callbacks": [AuditCallback(white, audit=_full)]})
    assert "the disk is full" in caplog.text


def test_a_prompt_that_can_not_be_read_stops_the_chain_if_wished(audit: AuditCallback) -> None:
    with pytest.raises(InputError, match="tokens"):
        chat().invoke("A" * 600, {"callbacks": [audit]})


def test_nothing_is_kept_of_a_failed_run(audit: AuditCallback) -> None:
    with pytest.raises(ValueError, match="down"):
        FailingChat().invoke(ASKED, {"callbacks": [audit]})
    assert len(audit._asked) == 0


class FailingChat(FakeListChatModel):
    responses: list[str] = []  # noqa: RUF012  # a pydantic field

    def _call(self, *args: Any, **kwargs: Any) -> str:
        raise ValueError("down")


def test_nothing_is_kept_of_an_unwritable_record(white: WhiteBoxModel) -> None:
    audit = AuditCallback(white, audit=_full)
    chat().invoke(ASKED, {"callbacks": [audit]})
    assert len(audit._asked) == 0


def test_nothing_is_kept_of_a_stream_that_was_left(audit: AuditCallback) -> None:
    stream = chat().stream(ASKED, {"callbacks": [audit]})
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(audit._asked) == 0


async def test_nothing_is_kept_of_an_async_stream_that_was_left(audit: AuditCallback) -> None:
    stream = chat().astream(ASKED, {"callbacks": [audit]})
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert len(audit._asked) == 0


class WaitingChat(FakeListChatModel):
    responses: list[str] = []  # noqa: RUF012  # a pydantic field

    async def _agenerate(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.Event().wait()


async def test_nothing_is_kept_of_a_cancelled_run(audit: AuditCallback) -> None:
    task = asyncio.create_task(WaitingChat().ainvoke(ASKED, {"callbacks": [audit]}))
    while len(audit._asked) == 0:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    del task
    gc.collect()
    assert len(audit._asked) == 0


def test_an_answer_to_what_was_not_asked_stops_the_chain_if_wished(audit: AuditCallback) -> None:
    with pytest.raises(InputError, match="seen"):
        audit.on_llm_end(LLMResult(generations=[[]]), run_id=uuid4())


def test_its_policy_describes_itself() -> None:
    assert _Observe().describe() == {"id": "observe", "version": 1}


def test_an_answer_that_says_it_was_guarded_elsewhere_is_recorded_all_the_same(
    audit: AuditCallback, sink: MemorySink
) -> None:
    """What a served model writes into its metadata proves nothing; it must not keep an answer out of the log."""
    said = AIMessage(TOLD, response_metadata={"hallucination_guard": {"decision": "accept"}})
    GenericFakeChatModel(messages=iter([said])).invoke(ASKED, {"callbacks": [audit]})
    assert [each.answer for each in sink.records] == [TOLD]


@pytest.mark.fault("answer", "the prompt held an image", "unscorable, with a record")
def test_an_answer_to_an_image_has_a_record_without_a_score(white: Any, sink: MemorySink) -> None:
    asked = HumanMessage([{"type": "text", "text": "Who is this?"}, {"type": "image_url", "image_url": {"url": "x"}}])
    model = FakeListChatModel(responses=["Ada"])
    model.invoke([asked], {"callbacks": [AuditCallback(white, audit=sink, raise_error=True)]})
    [record] = sink.records
    assert (record.status, record.answer, record.scores) == ("unscorable", "Ada", {})
    assert record.detail == "the prompt holds image_url, which a text model cannot read"
    assert record.prompt[0]["content"] == "Who is this?[image_url]"
