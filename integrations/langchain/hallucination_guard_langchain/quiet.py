"""Nobody listens inside a guard: what is not yet decided on must not leave through a callback, a trace or a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

__all__ = ["unheard"]

# With the others of LangGraph's own keys a graph inside would join the graph outside: write its drafts into that
# checkpoint and stream them. The runtime only carries what a step asks for by name: context and store.
_KEPT = "__pregel_runtime"


@contextmanager
def unheard(config: RunnableConfig | None = None) -> Iterator[RunnableConfig]:
    """A config that no listener of the caller hears of, also for what is called inside without a config.

    Cut are handed-on callbacks, LangSmith tracing, run collectors, and a surrounding graph's streams and checkpoints.
    What sits on a step itself, ``model.callbacks`` for example, was put there to hear it and still does.
    """
    from langchain_core.tracers.context import run_collector_var  # slow: loads LangSmith
    from langsmith.run_helpers import tracing_context

    config = ensure_config(config)
    silent: RunnableConfig = {
        **config,
        "callbacks": [],
        "configurable": {
            key: value
            for key, value in config["configurable"].items()
            if key == _KEPT or not key.startswith(("__pregel_", "checkpoint_"))
        },
    }
    child = var_child_runnable_config.set(silent)
    collector = run_collector_var.set(None)
    try:
        with tracing_context(enabled=False, parent=False):
            yield silent
    finally:
        run_collector_var.reset(collector)
        var_child_runnable_config.reset(child)
