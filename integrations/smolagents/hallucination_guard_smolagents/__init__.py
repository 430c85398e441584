"""hallucination-guard for smolagents: a guarded model, and a check of final answers that another one wrote."""

from __future__ import annotations

from hallucination_guard.errors import MissingExtra

try:
    from hallucination_guard_smolagents.check import AnswerCheck
    from hallucination_guard_smolagents.model import GuardedModel
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"hallucination_guard_smolagents needs {error.name}",
        hint="pip install 'hallucination-guard-semgrad[smolagents]'",
    ) from None

__all__ = ["AnswerCheck", "GuardedModel"]
