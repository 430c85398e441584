"""The arithmetic of the scores: what one pass measures of a generation, and where in it the score comes from.

In go a model and generations; out come a :class:`~hallucination_guard.values.Score` each, and on demand spans, words
and an :class:`Explanation`. A scorer measures everything that its pass gives and is about one number of it.
"""

from __future__ import annotations

from hallucination_guard.scoring.arguments import Argument, call_confidence, score_arguments
from hallucination_guard.scoring.cascade import Cascade, CascadeFit, fit_cascade
from hallucination_guard.scoring.explain import Explanation, Token, explain
from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.scoring.isotropic import Isotropic
from hallucination_guard.scoring.scorers import ExGrad, HybridGrad, Likelihood, ParaGrad, SemGrad
from hallucination_guard.scoring.sensitivity import Word, prompt_sensitivity, question_sensitivity
from hallucination_guard.scoring.sentences import BySentence, score_sentences
from hallucination_guard.scoring.spans import Span, semgrad_by_span

__all__ = [
    "Argument",
    "BySentence",
    "Cascade",
    "CascadeFit",
    "ExGrad",
    "Explanation",
    "GradientSettings",
    "HybridGrad",
    "Isotropic",
    "Likelihood",
    "ParaGrad",
    "SemGrad",
    "Span",
    "Token",
    "Word",
    "call_confidence",
    "explain",
    "fit_cascade",
    "prompt_sensitivity",
    "question_sensitivity",
    "score_arguments",
    "score_sentences",
    "semgrad_by_span",
]
