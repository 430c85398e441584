"""Nobody listens inside a guard: what is not yet decided on must not leave through a callback, a trace or a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSequence
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from langchain_core.tracers._streaming import _StreamingCallbackHandler

from hallucination_guard.errors import ConfigurationError

__all__ = ["refuse_listeners", "tokens_are_heard", "unheard"]

# With the others of LangGraph's own keys a graph inside would join the graph outside: write its drafts into that
# checkpoint and stream them. The runtime only carries what a step asks for by name: context and store.
_KEPT = "__pregel_runtime"


@contextmanager
def unheard(
    config: RunnableConfig | None = None, *, but_by: Sequence[BaseCallbackHandler] = ()
) -> Iterator[RunnableConfig]:
    """A config that no listener of the caller hears of, also for what is called inside without a config.

    Cut are handed-on callbacks, LangSmith tracing, handlers in context variables (run collectors, configure hooks), and
    a surrounding graph's streams and checkpoints. What sits on a step itself, ``model.callbacks`` for example, was put
    there to hear it and still does. What listens to the whole process cannot be cut: see :func:`refuse_listeners`.

    Args:
        config: of the caller; the surrounding one by default.
        but_by: handlers of the guard's own, which do hear it.
    """
    from langchain_core.tracers import context  # slow: loads LangSmith
    from langsmith.run_helpers import tracing_context

    config = ensure_config(config)
    silent: RunnableConfig = {
        **config,
        "callbacks": list(but_by),
        "configurable": {
            key: value
            for key, value in config["configurable"].items()
            if key == _KEPT or not key.startswith(("__pregel_", "checkpoint_"))
        },
    }
    hooks: list[ContextVar[Any]] = [hook[0] for hook in context._configure_hooks]
    with ExitStack() as stack:
        for variable in [context.tracing_v2_callback_var, *hooks]:
            stack.enter_context(_held(variable, None))
        stack.enter_context(_held(var_child_runnable_config, silent))
        stack.enter_context(tracing_context(enabled=False, parent=False))
        yield silent


@contextmanager
def _held(variable: ContextVar[Any], value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def tokens_are_heard() -> bool:
    """Whether somebody around listens to a model's tokens: a graph's ``messages``, or a stream of events."""
    callbacks = ensure_config().get("callbacks") or []
    handlers = callbacks if isinstance(callbacks, list) else callbacks.handlers
    # The mark by which LangChain itself decides that a model has to stream.
    return any(isinstance(each, _StreamingCallbackHandler) for each in handlers)


def refuse_listeners(step: Runnable[Any, Any]) -> None:
    """See, inside :func:`unheard`, that nothing in the process would hear or keep what ``step`` writes.

    Raises:
        ConfigurationError: naming who would: a handler that every run is given (``set_debug``, an instrumented callback
            manager, a configure hook of an environment variable), or a global cache.
    """
    heard_by = CallbackManager.configure(inheritable_callbacks=[]).handlers  # as the step itself would be given them
    if heard_by:
        names = ", ".join(sorted({type(each).__name__ for each in heard_by}))
        raise ConfigurationError(
            f"the guarded step would be heard by {names}, and a draft must not leave before it is decided on",
            hint="switch it off (set_debug(False)), use GuardedChatModel, which runs no step, or Guard(debug=True)",
        )
    if get_llm_cache() is None:
        return
    models = list(_models(step))
    if not models or any(each.cache is not False for each in models):
        raise ConfigurationError(
            "there is a global LLM cache, which would keep drafts that are not let through",
            hint="give the guarded model cache=False, use GuardedChatModel, or Guard(debug=True)",
        )


def _models(step: Runnable[Any, Any]) -> Iterator[BaseLanguageModel[Any]]:
    """The language models among the steps of a chain, as far as it shows them."""
    if isinstance(step, BaseLanguageModel):
        yield step
    elif isinstance(step, RunnableSequence):
        for each in step.steps:
            yield from _models(each)
    elif isinstance(step, RunnableBindingBase):
        yield from _models(step.bound)
