"""Listeners that are not handed on by a config: cut where they can be cut, else the guarded step is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.globals import set_debug, set_llm_cache
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import context
from langchain_core.tracers.context import register_configure_hook

from hallucination_guard.errors import CallError, ConfigurationError
from hallucination_guard.testing import MemorySink
from hallucination_guard_langchain import GuardRunnable
from hallucination_guard_policies import EscalateBelow

DRAFT = "Ada was a queen"
SAID = "I am not sure enough to answer that."


class Listener(BaseCallbackHandler):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.heard.append(str(response))

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.heard.append(token)


LISTENING: ContextVar[BaseCallbackHandler | None] = ContextVar("listening", default=None)


@pytest.fixture
def hook() -> Iterator[Listener]:
    register_configure_hook(LISTENING, inheritable=True)
    listener = Listener()
    token = LISTENING.set(listener)
    yield listener
    LISTENING.reset(token)
    context._configure_hooks.pop()


def chat(**settings: Any) -> FakeListChatModel:
    return FakeListChatModel(responses=[DRAFT], **settings)


@pytest.mark.fault("listener", "a configure hook in a context variable", "hears nothing of the guarded step")
def test_a_configure_hook_hears_no_draft(guard: Any, hook: Listener) -> None:
    chat().invoke("Who?")
    assert DRAFT in hook.heard.pop(), "the hook hears of steps that are not guarded"
    assert GuardRunnable(chat(), guard()).invoke("Who was Ada?").content == SAID
    assert hook.heard == []


async def test_nor_does_it_when_awaited_or_streamed(guard: Any, hook: Listener) -> None:
    step = GuardRunnable(chat(), guard())
    assert (await step.ainvoke("Who was Ada?")).content == SAID
    assert [each.content for each in step.stream("Who was Ada?")] == [SAID]
    assert hook.heard == []


def test_a_configure_hook_does_not_hear_an_escalations_model(guarded: Any, hook: Listener) -> None:
    policy = EscalateBelow(score="hybridgrad", limit=-1.0, to=chat())
    model = guarded(policy)
    assert model.invoke("Who was Ada?").content == DRAFT
    assert len(hook.heard) == 1, "what is delivered, and no more"


@pytest.mark.fault("listener", "a configure hook of an environment variable", "the call is refused, naming the handler")
def test_a_hook_of_an_environment_variable_is_refused(guard: Any, monkeypatch: Any, sink: MemorySink) -> None:
    variable: ContextVar[BaseCallbackHandler | None] = ContextVar("of the environment", default=None)
    register_configure_hook(variable, inheritable=True, handle_class=Listener, env_var="GUARD_TEST_LISTENS")
    monkeypatch.setenv("GUARD_TEST_LISTENS", "true")
    try:
        with pytest.raises(ConfigurationError, match="heard by Listener"):
            GuardRunnable(chat(), guard()).invoke("Who was Ada?")
    finally:
        context._configure_hooks.pop()
    assert sink.records == []


@pytest.mark.fault("listener", "an instrumented callback manager", "the call is refused, naming the handler")
def test_an_instrumented_callback_manager_is_refused(guard: Any, monkeypatch: Any) -> None:
    listener, made = Listener(), BaseCallbackManager.__init__

    def instrumented(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_handler(listener, inherit=True)

    monkeypatch.setattr(BaseCallbackManager, "__init__", instrumented)
    with pytest.raises(ConfigurationError, match="heard by Listener"):
        GuardRunnable(chat(), guard()).invoke("Who was Ada?")
    assert listener.heard == []


@pytest.fixture
def debugging() -> Iterator[None]:
    set_debug(True)
    yield
    set_debug(False)


@pytest.mark.fault("listener", "`set_debug(True)` around a guarded step", "the call is refused")
async def test_debug_is_refused(guard: Any, debugging: None, capsys: Any) -> None:
    step = GuardRunnable(chat(), guard())
    with pytest.raises(ConfigurationError, match="heard by ConsoleCallbackHandler"):
        step.invoke("Who was Ada?")
    with pytest.raises(ConfigurationError, match="heard by ConsoleCallbackHandler"):
        await step.ainvoke("Who was Ada?")
    assert DRAFT not in capsys.readouterr().out


@pytest.mark.fault("listener", "`set_debug(True)` around a guarded chat model", "prints what is delivered and no draft")
def test_debug_of_a_guarded_chat_model_prints_no_draft(guarded: Any, debugging: None, capsys: Any, sink: Any) -> None:
    assert guarded().invoke("Who was Ada?").content == SAID
    printed = capsys.readouterr().out
    assert SAID in printed and sink.records[-1].answer not in printed


def test_a_guard_that_may_be_looked_into_is_looked_into(guard: Any, debugging: None, capsys: Any) -> None:
    own = guard()
    own.debug = True
    assert GuardRunnable(chat(), own).invoke("Who was Ada?").content == SAID
    assert DRAFT in capsys.readouterr().out


@pytest.fixture
def cache() -> Iterator[InMemoryCache]:
    kept = InMemoryCache()
    set_llm_cache(kept)
    yield kept
    set_llm_cache(None)


@pytest.mark.parametrize("step", [chat(), chat() | StrOutputParser(), chat().bind(stop=["x"]), RunnableLambda(str)])
@pytest.mark.fault("listener", "a global LLM cache", "the call is refused; nothing is in the cache")
def test_a_global_cache_is_refused(guard: Any, cache: InMemoryCache, step: Any) -> None:
    with pytest.raises(ConfigurationError, match="global LLM cache"):
        GuardRunnable(step, guard()).invoke("Who was Ada?")
    assert cache._cache == {}


def test_a_model_that_does_not_use_it_is_let(guard: Any, cache: InMemoryCache) -> None:
    step = GuardRunnable(chat(cache=False) | StrOutputParser(), guard())
    assert step.invoke("Who was Ada?") == SAID
    assert cache._cache == {}


class Unparsable(Exception):
    """A parser's error, which quotes."""


@pytest.mark.fault("draft", "a step's own error quotes it", "the error names only the kind")
async def test_a_steps_own_error_is_named_by_its_kind(guard: Any) -> None:
    def parse(text: Any) -> str:
        raise Unparsable(f"cannot parse {text.content}")

    step = GuardRunnable(chat() | RunnableLambda(parse), guard())
    with pytest.raises(CallError, match="the guarded step raised Unparsable") as caught:
        step.invoke("Who was Ada?")
    with pytest.raises(CallError, match="the guarded step raised Unparsable"):
        await step.ainvoke("Who was Ada?")
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    open_to_look = guard()
    open_to_look.debug = True
    with pytest.raises(Unparsable, match=DRAFT):
        GuardRunnable(chat() | RunnableLambda(parse), open_to_look).invoke("Who was Ada?")


@pytest.mark.parametrize("where", ["id", "name", "model_name", "logprobs"])
@pytest.mark.fault("draft", "the step writes it into {case}", "nothing of it is in the abstention")
def test_an_abstention_has_nothing_that_the_step_wrote(guard: Any, where: str) -> None:
    metadata = {where: DRAFT} if where in ("model_name", "logprobs") else {}
    fields = {where: DRAFT} if where in ("id", "name") else {}
    step = RunnableLambda(lambda _: AIMessage(DRAFT, response_metadata=metadata, **fields))
    assert DRAFT not in repr(GuardRunnable(step, guard()).invoke("Who was Ada?"))
