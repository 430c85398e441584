"""hallucination-guard for LangChain: a guarded chat model, a guard around any model step, an observing callback, and
agent middleware, which alone needs ``langchain`` (extra ``agents``) and is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hallucination_guard.errors import MissingExtra
from hallucination_guard_langchain.callback import AuditCallback
from hallucination_guard_langchain.chat import GuardedChatModel
from hallucination_guard_langchain.convert import LowConfidenceError
from hallucination_guard_langchain.runnable import GuardRunnable

if TYPE_CHECKING:
    from hallucination_guard_langchain.middleware import HallucinationGuardMiddleware

__all__ = ["AuditCallback", "GuardRunnable", "GuardedChatModel", "HallucinationGuardMiddleware", "LowConfidenceError"]


def __getattr__(name: str) -> object:
    if name != "HallucinationGuardMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from hallucination_guard_langchain.middleware import HallucinationGuardMiddleware
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"agent middleware needs {error.name}", hint="pip install 'hallucination-guard-semgrad[agents]'"
        ) from None
    return HallucinationGuardMiddleware
