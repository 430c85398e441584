"""hallucination-guard for Haystack: a guarded chat generator, and a gate for the replies of any other one."""

from __future__ import annotations

from hallucination_guard.errors import MissingExtra

try:
    from hallucination_guard_haystack.gate import ConfidenceGate
    from hallucination_guard_haystack.generator import GuardedChatGenerator
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"hallucination_guard_haystack needs {error.name}", hint="pip install 'hallucination-guard-semgrad[haystack]'"
    ) from None

__all__ = ["ConfidenceGate", "GuardedChatGenerator"]
