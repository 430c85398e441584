"""A guarded model is used like any other: in chains, agents, with retries, fallbacks, caches and retrievers."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.globals import get_llm_cache, set_llm_cache
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnableParallel
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_store
from langgraph.store.memory import InMemoryStore

from hallucination_guard.demo import BM25Retriever
from hallucination_guard.testing import MemorySink
from hallucination_guard.values import Passage
from hallucination_guard_langchain import LowConfidenceError
from hallucination_guard_langchain.convert import KEY
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetrieveBelow, RetryBelow

NEVER: dict[str, Any] = {"score": "hybridgrad", "limit": -1.0}
SAID = "I am not sure enough to answer that."
TURN: Any = {"messages": [("user", "Who was Ada?")]}
THREAD: Any = {"configurable": {"thread_id": "t-1"}}
PROMPT = ChatPromptTemplate.from_messages([("system", "Be short."), ("user", "{question}")])


# -------------------------------------------------------------------------------------------------------- chains


def test_a_chain_gives_the_answer_as_text(open_model: Any, sink: MemorySink) -> None:
    answer = (PROMPT | open_model | StrOutputParser()).invoke({"question": "Who was Ada?"})
    assert answer == sink.records[-1].answer


def test_a_chain_streams_the_answer_in_one_piece(open_model: Any, sink: MemorySink) -> None:
    pieces = list((PROMPT | open_model | StrOutputParser()).stream({"question": "Who was Ada?"}))
    assert [piece for piece in pieces if piece] == [sink.records[-1].answer]


async def test_an_async_chain_gives_what_a_sync_one_gives(open_model: Any) -> None:
    chain = PROMPT | open_model | StrOutputParser()
    assert await chain.ainvoke({"question": "Who was Ada?"}) == chain.invoke({"question": "Who was Ada?"})


def test_parallel_branches_each_get_their_own_answer(open_model: Any) -> None:
    ask = PROMPT | open_model | StrOutputParser()
    both = RunnableParallel(a=ask, b=RunnableLambda(lambda _: {"question": "Hm?"}) | ask)
    assert both.invoke({"question": "Who was Ada?"}) == {
        "a": ask.invoke({"question": "Who was Ada?"}),
        "b": ask.invoke({"question": "Hm?"}),
    }


def test_a_batch_gives_what_single_calls_give(open_model: Any) -> None:
    questions = ["Who was Ada?", "Hm?", "Why?"]
    assert [each.content for each in open_model.batch(questions)] == [
        open_model.invoke(each).content for each in questions
    ]


def test_a_bound_stop_ends_the_answer(open_model: Any) -> None:
    whole = open_model.invoke("Who was Ada?").content
    stop = next(letter for letter in whole if letter != whole[0])
    assert open_model.bind(stop=[stop]).invoke("Who was Ada?").content == whole[: whole.index(stop)]


def test_bound_max_tokens_go_before_the_guards_own(open_model: Any) -> None:
    assert open_model.bind(max_tokens=3).invoke("Who was Ada?").usage_metadata["output_tokens"] == 3


def test_a_config_reaches_the_callbacks(open_model: Any, listener: Any) -> None:
    open_model.with_config(tags=["mine"], callbacks=[listener]).invoke("Who was Ada?")
    assert "mine" in listener.heard[0]


def test_a_field_can_be_configured_for_one_call(guarded: Any) -> None:
    model = guarded().configurable_fields(abstention=ConfigurableField(id="words"))
    assert model.invoke("Who was Ada?", {"configurable": {"words": "Pass."}}).content == "Pass."


# ---------------------------------------------------------------------------------------- errors, retries, fallbacks


@pytest.fixture
def raising(guarded: Any) -> Any:
    return guarded(on_abstain="error")


def test_an_abstention_can_be_an_error(raising: Any) -> None:
    with pytest.raises(LowConfidenceError, match="abstain_below"):
        raising.invoke("Who was Ada?")


async def test_an_abstention_can_be_an_error_of_a_stream(raising: Any) -> None:
    with pytest.raises(LowConfidenceError):
        _ = [chunk async for chunk in raising.astream("Who was Ada?")]


def test_the_error_carries_the_outcome(raising: Any, sink: MemorySink) -> None:
    with pytest.raises(LowConfidenceError) as raised:
        raising.invoke("Who was Ada?")
    assert raised.value.outcome.audit_ids == (sink.records[0].id,)


def test_the_error_outlasts_a_retrying_chain(raising: Any) -> None:
    with pytest.raises(LowConfidenceError):
        raising.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke("Who was Ada?")


def test_a_fallback_answers_instead(raising: Any) -> None:
    fallback = FakeListChatModel(responses=["She wrote a program."])
    chain = raising.with_fallbacks([fallback], exceptions_to_handle=(LowConfidenceError,))
    assert chain.invoke("Who was Ada?").content == "She wrote a program."


def test_retry_middleware_does_not_make_an_answer_of_the_error(raising: Any) -> None:
    with pytest.raises(LowConfidenceError):
        create_agent(raising, middleware=[ModelRetryMiddleware(initial_delay=0)]).invoke(TURN)


def test_retry_middleware_does_not_ask_again(raising: Any, sink: MemorySink) -> None:
    with pytest.raises(LowConfidenceError):
        create_agent(raising, middleware=[ModelRetryMiddleware(initial_delay=0)]).invoke(TURN)
    assert len(sink.records) == 1


def test_fallback_middleware_answers_instead(raising: Any) -> None:
    fallback = FakeListChatModel(responses=["She wrote a program."])
    agent = create_agent(raising, middleware=[ModelFallbackMiddleware(fallback)])
    assert agent.invoke(TURN)["messages"][-1].content == "She wrote a program."


# -------------------------------------------------------------------------------------------------------- agents


def test_an_agent_answers(open_model: Any, sink: MemorySink) -> None:
    messages = create_agent(open_model, system_prompt="Be short.").invoke(TURN)["messages"]
    assert messages[-1].content == sink.records[-1].answer


async def test_an_async_agent_answers(open_model: Any, sink: MemorySink) -> None:
    messages = (await create_agent(open_model, system_prompt="Be short.").ainvoke(TURN))["messages"]
    assert messages[-1].content == sink.records[-1].answer


def test_an_agent_remembers_the_verdict(open_model: Any) -> None:
    agent = create_agent(open_model, checkpointer=InMemorySaver())
    agent.invoke(TURN, THREAD)
    assert agent.get_state(THREAD).values["messages"][-1].response_metadata[KEY]["decision"] == "accept"


def test_an_agent_reads_its_own_earlier_turn(open_model: Any, sink: MemorySink) -> None:
    agent = create_agent(open_model, checkpointer=InMemorySaver())
    agent.invoke(TURN, THREAD)
    agent.invoke(TURN, THREAD)
    assert [turn["role"] for turn in sink.records[-1].to_json_dict()["prompt"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("mode", ["values", "messages"])
def test_the_thread_of_a_graph_is_in_the_record(mode: Any, open_model: Any, sink: MemorySink) -> None:
    list(create_agent(open_model, checkpointer=InMemorySaver()).stream(TURN, THREAD, stream_mode=mode))
    assert sink.records[0].thread_id == "t-1"


async def test_the_thread_of_an_async_graph_is_in_the_record(open_model: Any, sink: MemorySink) -> None:
    agent = create_agent(open_model, checkpointer=InMemorySaver())
    _ = [part async for part in agent.astream(TURN, THREAD, stream_mode="messages")]
    assert sink.records[0].thread_id == "t-1"


def test_the_thread_of_a_chain_is_in_the_record(open_model: Any, sink: MemorySink) -> None:
    list((PROMPT | open_model).stream({"question": "Who was Ada?"}, THREAD))
    assert sink.records[0].thread_id == "t-1"


def test_a_call_outside_any_thread_is_recorded_without_one(open_model: Any, sink: MemorySink) -> None:
    open_model.invoke("Who was Ada?")
    assert sink.records[0].thread_id is None


# --------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cache() -> Any:
    before, found = get_llm_cache(), InMemoryCache()
    set_llm_cache(found)
    yield found
    set_llm_cache(before)


def test_a_global_cache_does_not_keep_a_guarded_answer(cache: Any, open_model: Any) -> None:
    open_model.invoke("Who was Ada?")
    assert cache._cache == {}


def test_a_global_cache_does_not_spare_the_record(cache: Any, open_model: Any, sink: MemorySink) -> None:
    open_model.invoke("Who was Ada?")
    open_model.invoke("Who was Ada?")
    assert len(sink.records) == 2


def test_a_cache_that_is_asked_for_tells_policies_apart(cache: Any, guarded: Any) -> None:
    guarded(Accept(), cache=True).invoke("Who was Ada?")
    assert guarded(AbstainBelow(**NEVER), cache=True).invoke("Who was Ada?").content == SAID


# ------------------------------------------------------------------------------------------ retrieval and escalation


class Search(BaseRetriever):
    """BM25 behind LangChain's interface."""

    found: Any

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document(each.text, metadata={"source": each.id}) for each in self.found.invoke(query)]


PASSAGES = [
    Passage(id="ada.txt", text="Ada wrote the first program."),
    Passage(id="grace.txt", text="Grace wrote a compiler."),
]


def _retrieve(retriever: Any) -> Any:
    return RetrieveBelow(**NEVER, retriever=retriever, k=1) | AbstainBelow(**NEVER)


def test_a_langchain_retriever_is_asked_the_question(guarded: Any, sink: MemorySink) -> None:
    guarded(_retrieve(Search(found=BM25Retriever(PASSAGES)))).invoke("Who was Ada?")
    assert "Ada wrote the first program." in str(sink.records[-1].prompt)


def test_the_documents_sources_are_in_the_record(guarded: Any, sink: MemorySink) -> None:
    guarded(_retrieve(Search(found=BM25Retriever(PASSAGES)))).invoke("Who was Ada?")
    assert [record.retrieved for record in sink.records] == [(), ("ada.txt",)]


async def test_a_vector_stores_ids_are_in_the_verdict(guarded: Any) -> None:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document("Ada wrote the first program.", id="doc-1")])
    message = await guarded(_retrieve(store.as_retriever())).ainvoke("Who was Ada?")
    assert message.response_metadata[KEY]["retrieved"] == ["doc-1"]


def test_a_retriever_that_fails_ends_in_an_abstention(guarded: Any) -> None:
    def broken(query: str) -> list[Document]:
        raise RuntimeError("down")

    verdict = guarded(_retrieve(RunnableLambda(broken))).invoke("Who was Ada?").response_metadata[KEY]
    assert (verdict["decision"], verdict["rule"]) == ("abstain", "retrieve_failed")


def test_an_escalation_goes_to_another_chat_model(guarded: Any) -> None:
    model = guarded(EscalateBelow(**NEVER, to=FakeListChatModel(responses=["She wrote a program."])))
    assert model.invoke("Who was Ada?").content == "She wrote a program."


async def test_an_escalation_goes_to_a_chain_from_an_async_one(guarded: Any) -> None:
    chain = FakeListChatModel(responses=["She wrote a program."]) | StrOutputParser()
    assert (await guarded(EscalateBelow(**NEVER, to=chain)).ainvoke("Who was Ada?")).content == "She wrote a program."


def test_an_escalation_is_recorded_as_answered_by_another(guarded: Any, sink: MemorySink) -> None:
    guarded(EscalateBelow(**NEVER, to=FakeListChatModel(responses=["Yes."]))).invoke("Who was Ada?")
    assert sink.records[-1].detail == "answered by FakeListChatModel, not scored"


def test_an_escalations_answer_is_not_heard_before_it_is_recorded(guarded: Any, listener: Any) -> None:
    model = guarded(EscalateBelow(**NEVER, to=FakeListChatModel(responses=["She wrote a program."])))
    RunnableLambda(lambda question: model.invoke(question)).invoke("Who was Ada?", {"callbacks": [listener]})
    assert listener.events.count("on_chat_model_start") == 1


def test_an_agent_inside_the_guard_stays_out_of_the_graph_outside(guarded: Any, sink: MemorySink) -> None:
    inner = create_agent(FakeListChatModel(responses=["secret"]))

    def ask(messages: Any) -> str:
        inner.invoke({"messages": messages})
        return "said"

    saver = InMemorySaver()
    agent = create_agent(guarded(EscalateBelow(**NEVER, to=RunnableLambda(ask))), checkpointer=saver)
    seen = list(agent.stream(TURN, THREAD, stream_mode=["values", "messages", "debug"], subgraphs=True))
    assert "secret" not in f"{seen!r} {saver.blobs!r} {saver.writes!r} {saver.storage!r}"


def test_a_retriever_inside_the_guard_may_look_into_the_graphs_store(guarded: Any, sink: MemorySink) -> None:
    store = InMemoryStore()
    store.put(("facts",), "ada", {"text": "Ada wrote the first program."})

    def remember(query: str) -> list[Passage]:
        return [Passage(id=item.key, text=item.value["text"]) for item in get_store().search(("facts",))]

    create_agent(guarded(_retrieve(remember)), store=store).invoke(TURN)
    assert sink.records[-1].retrieved == ("ada",)


def test_retries_end_with_the_abstention(guarded: Any) -> None:
    message = guarded(RetryBelow(**NEVER, times=2) | AbstainBelow(**NEVER)).invoke("Who was Ada?")
    assert (message.content, message.response_metadata[KEY]["attempts"]) == (SAID, 3)


def test_a_message_is_an_ai_message(open_model: Any) -> None:
    assert type(open_model.invoke("Who was Ada?")) is AIMessage
