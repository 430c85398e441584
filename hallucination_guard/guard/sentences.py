"""What a policy that acts on sentences needs of its guard, and the text that it delivers."""

from __future__ import annotations

from hallucination_guard.calibration import SentenceCalibration
from hallucination_guard.errors import ConfigurationError, PolicyError
from hallucination_guard.guard.progress import Draft
from hallucination_guard.values import Decision, Model, Policy, Scorer, ScorerIdentity, edited

__all__ = ["check_sentences", "default_scorer", "delivered"]


def default_scorer(policy: Policy, sentences: SentenceCalibration | None) -> Scorer:
    """HybridGrad; for a policy that acts on sentences they are scored beside it, as their calibration has it."""
    from hallucination_guard.scoring import BySentence, HybridGrad
    from hallucination_guard.scoring.sentences import by_settings

    if not getattr(policy, "edits", False):
        return HybridGrad()
    return BySentence(HybridGrad()) if sentences is None else by_settings(HybridGrad(), sentences.scorer_settings)


def check_sentences(policy: Policy, scorer: Scorer, sentences: SentenceCalibration | None, model: Model) -> None:
    """See that scorer, calibration and policy speak of the same sentences.

    Raises:
        ConfigurationError: if the sentences are not scored, or the policy asks for thresholds that there are not or
            that do not hold for its further attempts; ``CalibrationMismatch`` for the calibration of another model or
            scorer.
    """
    identity: ScorerIdentity | None = getattr(scorer, "sentences", None)
    if identity is None and (sentences is not None or getattr(policy, "edits", False)):
        raise ConfigurationError(
            f"the policy acts on sentences, and {type(scorer).__name__} does not score them",
            hint="give scorer=BySentence(HybridGrad())",
        )
    if sentences is not None and identity is not None:
        sentences.check(model.identity, identity)
    if not getattr(policy, "needs_backoff", False):
        return
    if sentences is None:
        raise ConfigurationError(
            "the policy speaks of alpha for sentences and the guard has no calibration of them",
            hint="give sentences=SentenceCalibration.load(...), or the policy score and limit",
        )
    if getattr(policy, "redraws", True):
        raise ConfigurationError(
            "the thresholds of sentences are of single drafts, and the policy makes further attempts",
            hint="give the policy score and limit instead of alpha, or leave out retry and retrieve",
        )


def delivered(draft: Draft, decision: Decision) -> str:
    """The text of an accepted draft, as the decision has it.

    Raises:
        PolicyError: if the edit is not of this draft's sentences.
    """
    content = draft.generation.content
    if decision.edit is None:
        return content
    failure = ""
    if draft.generation.written_calls:
        failure = "an answer that calls tools cannot be edited"
    else:
        try:
            return edited(content, draft.verdict.score.sentences, decision.edit)
        except ValueError as error:
            failure = str(error)
    raise PolicyError(f"the decision edits other sentences than the answer has: {failure}", hint="look at the scorer")
