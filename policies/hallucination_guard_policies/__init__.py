"""Policies: what is to happen with an answer, given how certain the model was of it.

Small questions (:class:`AbstainBelow`, :class:`RetryBelow`, …) are composed with ``|`` (the first that objects
decides) and ``&`` (both have to object), or written down and loaded with :func:`load_policy`.
"""

from __future__ import annotations

from hallucination_guard_policies.abstain import AbstainBelow
from hallucination_guard_policies.accept import Accept
from hallucination_guard_policies.budget import Budget, Within
from hallucination_guard_policies.compose import BothObject, Composable, FirstObjection
from hallucination_guard_policies.document import Document, load_policy, pack_names
from hallucination_guard_policies.escalate import EscalateBelow
from hallucination_guard_policies.provisional import ShowProvisional
from hallucination_guard_policies.retrieve import RetrieveBelow
from hallucination_guard_policies.retry import RetryBelow
from hallucination_guard_policies.sentences import MarkSentences, RedactSentences
from hallucination_guard_policies.threshold import Threshold
from hallucination_guard_policies.unscored import Unscored

__all__ = [
    "AbstainBelow",
    "Accept",
    "BothObject",
    "Budget",
    "Composable",
    "Document",
    "EscalateBelow",
    "FirstObjection",
    "MarkSentences",
    "RedactSentences",
    "RetrieveBelow",
    "RetryBelow",
    "ShowProvisional",
    "Threshold",
    "Unscored",
    "Within",
    "load_policy",
    "pack_names",
]
