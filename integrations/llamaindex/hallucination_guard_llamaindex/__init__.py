"""hallucination-guard for LlamaIndex: a guarded LLM, and an evaluator that scores what another one wrote."""

from __future__ import annotations

from hallucination_guard.errors import MissingExtra

try:
    from hallucination_guard_llamaindex.evaluator import ConfidenceEvaluator
    from hallucination_guard_llamaindex.llm import GuardedLLM
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"hallucination_guard_llamaindex needs {error.name}",
        hint="pip install 'hallucination-guard-semgrad[llamaindex]'",
    ) from None

__all__ = ["ConfidenceEvaluator", "GuardedLLM"]
