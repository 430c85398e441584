"""hallucination-guard for LangChain: a guarded chat model, a guarded step, an observing callback, agent middleware.

The middleware alone needs ``langchain`` (extra ``agents``); it is imported when it is used.
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
