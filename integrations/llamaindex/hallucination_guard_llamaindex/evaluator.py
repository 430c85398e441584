"""ConfidenceEvaluator: what the white box thinks of an answer that something else wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.evaluation import BaseEvaluator, EvaluationResult
from llama_index.core.prompts.mixin import PromptDictType

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Guard, with_passages
from hallucination_guard.values import Passage, as_messages
from hallucination_guard_policies.retrieve import TEMPLATE

__all__ = ["ConfidenceEvaluator"]


class ConfidenceEvaluator(BaseEvaluator):
    """An evaluator whose ``passing`` is the guard's decision and whose ``score`` is the confidence.

    An answer passes if the policy accepts it as it is, no sentence marked or left out; ``feedback`` is the reason. It
    says what it thinks and holds nothing back: a ``RetryQueryEngine`` hands out the answer of its last try unseen, so
    give its engine a :class:`GuardedLLM` where nothing may leave undecided.

    Args:
        guard: its model reads, its policy decides.
        template: the prompt that the answer is to, with ``{passages}`` and ``{question}``, where there are contexts.
    """

    def __init__(self, guard: Guard, *, template: str = TEMPLATE) -> None:
        self.guard = guard
        self.template = template

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if prompts:
            raise InputError(f"the evaluator has no prompt {next(iter(prompts))!r}", hint="give it a template")

    def evaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Score and decide, and record."""
        if query is None or response is None:
            raise InputError("an evaluation needs a query and a response", hint="give both")
        asked = as_messages(query)
        if contexts:
            passages = [Passage(id=str(at), text=text) for at, text in enumerate(contexts, start=1)]
            asked = with_passages(asked, passages, self.template)
        outcome = self.guard.review(asked, response)
        passing = outcome.accepted and outcome.attempts == 1 and outcome.retention in (None, 1.0)
        scored = outcome.verdict.score.status == "scored"
        return EvaluationResult(
            query=query,
            response=response,
            contexts=contexts,
            passing=passing,
            score=outcome.confidence,
            feedback=outcome.decision.reason,
            invalid_result=not scored,
            invalid_reason=None if scored else outcome.verdict.score.reason,
        )

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """The same, without blocking the loop."""
        return await asyncio.to_thread(self.evaluate, query, response, contexts)
