"""hallucination-guard for LangChain: a guarded chat model, a guard around any model step, and an observing callback."""

from hallucination_guard_langchain.callback import AuditCallback
from hallucination_guard_langchain.chat import GuardedChatModel
from hallucination_guard_langchain.convert import LowConfidenceError
from hallucination_guard_langchain.runnable import GuardRunnable

__all__ = ["AuditCallback", "GuardRunnable", "GuardedChatModel", "LowConfidenceError"]
