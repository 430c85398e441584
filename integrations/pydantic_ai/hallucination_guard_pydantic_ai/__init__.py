"""hallucination-guard for pydantic-ai: a guarded model."""

from __future__ import annotations

from hallucination_guard.errors import MissingExtra

try:
    from hallucination_guard_pydantic_ai.model import GuardedModel
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"hallucination_guard_pydantic_ai needs {error.name}",
        hint="pip install 'hallucination-guard-semgrad[pydantic-ai]'",
    ) from None

__all__ = ["GuardedModel"]
