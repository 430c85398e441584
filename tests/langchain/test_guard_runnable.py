"""A guard around any step that answers: the step keeps its type, its draft stays in."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tracers.context import collect_runs, tracing_v2_enabled
from langgraph.checkpoint.memory import InMemorySaver

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.testing import MemorySink
from hallucination_guard_langchain import GuardRunnable, LowConfidenceError
from hallucination_guard_langchain.convert import KEY
from hallucination_guard_policies import AbstainBelow, Accept, RetryBelow

NEVER: dict[str, Any] = {"score": "hybridgrad", "limit": -1.0}
DRAFT = "Ada was a queen"
SAID = "I am not sure enough to answer that."
ASKED = "Who was Ada?"


def chat() -> FakeListChatModel:
    return FakeListChatModel(responses=[DRAFT])


@pytest.fixture
def holding(guard: Any) -> Any:
    """A guard around a chat model, that lets nothing through."""
    return GuardRunnable(chat(), guard())


@pytest.fixture
def passing(guard: Any) -> Any:
    """The same, that lets everything through."""
    return GuardRunnable(chat(), guard(Accept()))


# ------------------------------------------------------------------------------------------------- type in, type out


def test_a_message_stays_a_message(passing: Any) -> None:
    answer = passing.invoke(ASKED)
    assert (type(answer), answer.content) == (AIMessage, DRAFT)


def test_a_text_stays_a_text(guard: Any) -> None:
    assert GuardRunnable(FakeListLLM(responses=[DRAFT]), guard(Accept())).invoke(ASKED) == DRAFT


def test_a_held_back_text_becomes_the_abstention(guard: Any) -> None:
    assert GuardRunnable(FakeListLLM(responses=[DRAFT]), guard()).invoke(ASKED) == SAID


def test_a_held_back_message_becomes_the_abstention(holding: Any) -> None:
    assert holding.invoke(ASKED).content == SAID


def test_a_message_of_another_role_becomes_an_ai_message(guard: Any) -> None:
    step = RunnableLambda(lambda _: ChatMessage(role="oracle", content=DRAFT))
    assert GuardRunnable(step, guard()).invoke(ASKED).content == SAID


def test_what_is_no_answer_is_refused(guard: Any) -> None:
    with pytest.raises(InputError, match="dict"):
        GuardRunnable(RunnableLambda(lambda _: {"answer": DRAFT}), guard(Accept())).invoke(ASKED)


def test_a_tool_call_is_refused(guard: Any) -> None:
    call = AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1"}])
    with pytest.raises(InputError, match="tool"):
        GuardRunnable(RunnableLambda(lambda _: call), guard(Accept())).invoke(ASKED)


def test_an_empty_answer_is_held_back(guard: Any) -> None:
    assert GuardRunnable(FakeListLLM(responses=[""]), guard(Accept())).invoke(ASKED) == SAID


def test_the_types_are_the_steps(passing: Any) -> None:
    assert (passing.InputType, passing.OutputType) == (chat().InputType, chat().OutputType)


# --------------------------------------------------------------------------------------------------- ways to call it


async def test_it_answers_an_async_call(passing: Any) -> None:
    assert (await passing.ainvoke(ASKED)).content == DRAFT


def test_a_stream_is_one_decided_piece(holding: Any) -> None:
    assert [piece.content for piece in holding.stream(ASKED)] == [SAID]


async def test_an_async_stream_is_one_decided_piece(holding: Any) -> None:
    assert [piece.content async for piece in holding.astream(ASKED)] == [SAID]


def test_a_batch_answers_every_prompt(guard: Any) -> None:
    step = GuardRunnable(RunnableLambda(lambda prompt: f"{prompt}!"), guard(Accept()))
    assert step.batch(["a", "b"]) == ["a!", "b!"]


async def test_an_async_batch_answers_every_prompt(guard: Any) -> None:
    step = GuardRunnable(RunnableLambda(lambda prompt: f"{prompt}!"), guard(Accept()))
    assert await step.abatch(["a", "b"]) == ["a!", "b!"]


def test_a_chain_parses_its_answer(passing: Any) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be short."), ("user", "{question}")])
    assert (prompt | passing | StrOutputParser()).invoke({"question": ASKED}) == DRAFT


@pytest.mark.parametrize("prompt", [ASKED, [("user", ASKED)], [HumanMessage(ASKED)]])
def test_a_prompt_is_read_in_every_form(prompt: Any, passing: Any, sink: MemorySink) -> None:
    passing.invoke(prompt)
    assert sink.records[0].to_json_dict()["prompt"] == [{"role": "user", "content": ASKED}]


def test_the_step_can_be_configured_for_one_call(guard: Any) -> None:
    step = chat().configurable_fields(responses=ConfigurableField(id="responses"))
    config: Any = {"configurable": {"responses": ["Another"]}}
    assert GuardRunnable(step, guard(Accept())).invoke(ASKED, config).content == "Another"


def test_arguments_of_the_call_reach_the_step(guard: Any) -> None:
    step = RunnableLambda(lambda prompt, mark: prompt + mark)
    assert GuardRunnable(step, guard(Accept())).invoke("a", mark="!") == "a!"


def test_an_abstention_can_be_an_error(guard: Any) -> None:
    with pytest.raises(LowConfidenceError):
        GuardRunnable(chat(), guard(), on_abstain="error").invoke(ASKED)


async def test_an_abstention_can_be_an_error_of_an_async_call(guard: Any) -> None:
    with pytest.raises(LowConfidenceError):
        await GuardRunnable(chat(), guard(), on_abstain="error").ainvoke(ASKED)


def test_a_fallback_answers_instead(guard: Any) -> None:
    step = GuardRunnable(chat(), guard(), on_abstain="error")
    fallback = FakeListChatModel(responses=["She wrote a program."])
    assert step.with_fallbacks([fallback]).invoke(ASKED).content == "She wrote a program."


# -------------------------------------------------------------------------------------------------- the draft stays in


def _speaking(prompt: Any) -> Any:
    return chat().invoke(prompt)  # as in a user's own function: the config comes from the context


STEPS = {
    "model": chat(),
    "streaming_model": chat().with_config(tags=["streamed"]) | RunnableLambda(lambda message: message),
    "function": RunnableLambda(_speaking),
    "chain": RunnableLambda(lambda prompt: prompt) | chat() | StrOutputParser(),
}


@pytest.mark.parametrize("name", STEPS)
async def test_the_draft_is_in_no_event(name: str, guard: Any, listener: Any) -> None:
    chain = RunnableLambda(lambda question: question) | GuardRunnable(STEPS[name], guard())
    events = [each async for each in chain.astream_events(ASKED, {"callbacks": [listener]}, version="v2")]
    assert DRAFT not in f"{events!r} {listener.heard!r}"


@pytest.mark.parametrize("name", STEPS)
async def test_no_callback_hears_of_the_step(name: str, guard: Any, listener: Any) -> None:
    await GuardRunnable(STEPS[name], guard()).ainvoke(ASKED, {"callbacks": [listener]})
    assert listener.events == ["on_chain_start", "on_chain_end"]


@pytest.mark.parametrize("name", STEPS)
def test_the_draft_is_not_sent_to_langsmith(name: str, guard: Any) -> None:
    client = MagicMock()
    with tracing_v2_enabled(client=client), collect_runs() as collected:
        GuardRunnable(STEPS[name], guard()).invoke(ASKED)
    sent = f"{client.mock_calls!r} {[vars(run) for run in collected.traced_runs]!r}"
    assert SAID in sent and DRAFT not in sent


async def test_the_draft_is_not_sent_to_langsmith_by_an_async_call(guard: Any) -> None:
    client = MagicMock()
    with tracing_v2_enabled(client=client):
        await GuardRunnable(STEPS["function"], guard()).ainvoke(ASKED)
    assert SAID in repr(client.mock_calls) and DRAFT not in repr(client.mock_calls)


def test_tracing_goes_on_after_the_step(holding: Any) -> None:
    client = MagicMock()
    with tracing_v2_enabled(client=client):
        (holding | RunnableLambda(lambda _: "after")).invoke(ASKED)
    assert "after" in repr(client.mock_calls)


@pytest.mark.parametrize("mode", ["messages", "values", "updates", "debug"])
def test_an_agent_inside_the_guard_stays_out_of_the_graph_outside(mode: Any, guard: Any) -> None:
    from langgraph.graph import START, MessagesState, StateGraph

    inner = RunnableLambda(lambda messages: {"messages": messages}) | create_agent(chat())
    step = GuardRunnable(inner | RunnableLambda(lambda state: state["messages"][-1]), guard())
    saver = InMemorySaver()
    graph: Any = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [step.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    thread: Any = {"configurable": {"thread_id": "t-1"}}
    seen = list(
        graph.compile(checkpointer=saver).stream(
            {"messages": [("user", ASKED)]}, thread, stream_mode=mode, subgraphs=True
        )
    )
    assert SAID in f"{seen!r}" and DRAFT not in f"{seen!r} {saver.blobs!r} {saver.writes!r} {saver.storage!r}"


def test_logprobs_of_the_draft_are_dropped(guard: Any) -> None:
    told = AIMessage(DRAFT, response_metadata={"logprobs": DRAFT}, additional_kwargs={"reasoning_content": DRAFT})
    assert DRAFT not in repr(GuardRunnable(RunnableLambda(lambda _: told), guard()).invoke(ASKED))


# --------------------------------------------------------------------------------------------------- what it records


def test_the_steps_answer_is_the_first_draft(holding: Any, sink: MemorySink) -> None:
    holding.invoke(ASKED)
    assert [record.answer for record in sink.records] == [DRAFT]


def test_the_verdict_is_in_the_metadata(holding: Any) -> None:
    assert holding.invoke(ASKED).response_metadata[KEY]["decision"] == "abstain"


def test_the_thread_is_in_the_record(holding: Any, sink: MemorySink) -> None:
    holding.invoke(ASKED, {"configurable": {"thread_id": "t-1"}})
    assert sink.records[0].thread_id == "t-1"


USED = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}


def _step() -> Any:
    told = {"model_name": "served", "finish_reason": "length"}
    return RunnableLambda(lambda _: AIMessage(DRAFT, response_metadata=told, usage_metadata=USED, id="m-1"))


def test_an_accepted_answer_keeps_what_the_step_says_of_it(guard: Any) -> None:
    answer = GuardRunnable(_step(), guard(Accept())).invoke(ASKED)
    metadata = answer.response_metadata
    assert (metadata["model_name"], metadata["finish_reason"], answer.usage_metadata, answer.id) == (
        "served",
        "length",
        USED,
        "m-1",
    )


def test_an_abstention_says_why_it_ended(guard: Any) -> None:
    assert GuardRunnable(_step(), guard()).invoke(ASKED).response_metadata["finish_reason"] == "abstain"


def test_after_a_redraw_the_usage_is_that_of_all_drafts(guard: Any, sink: MemorySink) -> None:
    policy = RetryBelow(**NEVER, times=1) | AbstainBelow(**NEVER)
    usage = GuardRunnable(_step(), guard(policy)).invoke(ASKED).usage_metadata
    assert usage["output_tokens"] == sum(record.tokens["out"] for record in sink.records)


# ---------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def hugging_face(white: WhiteBoxModel) -> Any:
    """LangChain's own chat model over the very weights that the guard reads with."""
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
    from transformers import pipeline

    pipe = pipeline("text-generation", model=white.model, tokenizer=white.tokenizer)
    chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=pipe), tokenizer=white.tokenizer, model_id="tiny")
    return chat.bind(skip_prompt=True, pipeline_kwargs={"max_new_tokens": 8, "do_sample": False})


def test_a_hugging_face_chat_model_is_guarded(hugging_face: Any, guard: Any, sink: MemorySink) -> None:
    answer = GuardRunnable(hugging_face, guard(Accept())).invoke(ASKED)
    assert answer.content == sink.records[0].answer == hugging_face.invoke([HumanMessage(ASKED)]).content


def test_a_hugging_face_draft_is_held_back(hugging_face: Any, guard: Any) -> None:
    assert GuardRunnable(hugging_face, guard()).invoke(ASKED).content == SAID


async def test_a_hugging_face_chat_model_without_async_is_run_in_a_thread(hugging_face: Any, guard: Any) -> None:
    step = GuardRunnable(hugging_face, guard(Accept()))
    assert (await step.ainvoke(ASKED)).content == step.invoke(ASKED).content


def test_no_second_copy_of_the_weights_is_loaded(hugging_face: Any, white: WhiteBoxModel) -> None:
    assert hugging_face.bound.llm.pipeline.model is white.model


def test_a_system_message_reaches_the_reader(passing: Any, sink: MemorySink) -> None:
    passing.invoke([SystemMessage("Be short."), HumanMessage(ASKED)])
    assert [turn["role"] for turn in sink.records[0].to_json_dict()["prompt"]] == ["system", "user"]


# ---------------------------------------------------------------------------------- the prompt that the model has seen


@pytest.mark.parametrize("odd", [{"question": ASKED}, {ASKED}, b"Who?", 5, None, iter([ASKED]), [5]], ids=repr)
def test_what_no_chat_model_takes_is_refused_before_the_step_runs(odd: Any, guard: Any) -> None:
    ran: list[Any] = []
    step = GuardRunnable(RunnableLambda(lambda value: ran.append(value) or DRAFT), guard(Accept()))
    with pytest.raises(InputError):
        step.invoke(odd)
    assert ran == []


async def test_it_is_refused_async_too(guard: Any) -> None:
    with pytest.raises(InputError, match="dict"):
        await GuardRunnable(chat(), guard(Accept())).ainvoke({"question": ASKED})


@pytest.mark.parametrize("bind", [False, True])
def test_a_template_inside_the_step_is_refused(bind: bool, guard: Any) -> None:
    prompt = ChatPromptTemplate.from_template("Say in one word: {question}")
    with pytest.raises(ConfigurationError, match="would not see the model's prompt"):
        GuardRunnable((prompt.with_config(tags=["x"]) if bind else prompt) | chat(), guard(Accept()))


def test_a_template_before_the_guard_is_what_is_scored(guard: Any, sink: Any) -> None:
    chain = ChatPromptTemplate.from_template("Say in one word: {question}") | GuardRunnable(chat(), guard(Accept()))
    chain.invoke({"question": ASKED})
    assert sink.records[-1].prompt[-1]["content"] == f"Say in one word: {ASKED}"


def test_a_prompt_beyond_the_context_is_refused_before_the_step_runs(guard: Any) -> None:
    ran: list[Any] = []
    step = GuardRunnable(RunnableLambda(lambda value: ran.append(value) or DRAFT), guard(Accept()))
    with pytest.raises(InputError, match="tokens"):
        step.invoke("A" * 600)
    assert ran == []


def test_an_answer_beyond_the_context_is_withheld_and_has_a_record(guard: Any, sink: Any) -> None:
    answer = GuardRunnable(FakeListChatModel(responses=["x" * 600]), guard(Accept())).invoke(ASKED)
    assert answer.content == SAID
    assert (sink.records[-1].status, sink.records[-1].rule) == ("unscorable", "on_unscorable")
    assert sink.records[-1].answer == "x" * 600
