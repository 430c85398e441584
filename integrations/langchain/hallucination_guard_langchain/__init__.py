"""hallucination-guard for LangChain: a guarded chat model, a guarded step, an observing callback, agents and graphs.

Agent middleware and the nodes of a graph need ``langchain`` (extra ``agents``), the client of a served guard needs
``langchain-openai`` (extra ``openai``); they are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hallucination_guard.errors import MissingExtra
from hallucination_guard_langchain.callback import AuditCallback
from hallucination_guard_langchain.chat import GuardedChatModel
from hallucination_guard_langchain.convert import LowConfidenceError
from hallucination_guard_langchain.runnable import GuardRunnable

if TYPE_CHECKING:
    from hallucination_guard_langchain.graph import GuardNodes, GuardState, add_guard, way_on
    from hallucination_guard_langchain.held import HeldAnswers
    from hallucination_guard_langchain.middleware import HallucinationGuardMiddleware, unsure_call
    from hallucination_guard_langchain.served import VerdictChatOpenAI

__all__ = [
    "AuditCallback",
    "GuardNodes",
    "GuardRunnable",
    "GuardState",
    "GuardedChatModel",
    "HallucinationGuardMiddleware",
    "HeldAnswers",
    "LowConfidenceError",
    "VerdictChatOpenAI",
    "add_guard",
    "unsure_call",
    "way_on",
]

_LATER = {
    "GuardNodes": "graph",
    "GuardState": "graph",
    "HallucinationGuardMiddleware": "middleware",
    "HeldAnswers": "held",
    "VerdictChatOpenAI": "served",
    "add_guard": "graph",
    "unsure_call": "middleware",
    "way_on": "graph",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_LATER[name]}")
    except ModuleNotFoundError as error:
        extra = "openai" if name == "VerdictChatOpenAI" else "agents"
        raise MissingExtra(
            f"{name} needs {error.name}", hint=f"pip install 'hallucination-guard-semgrad[{extra}]'"
        ) from None
    found: object = getattr(module, name)
    return found
