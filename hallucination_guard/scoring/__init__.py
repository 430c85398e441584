"""Scores of a generation, from one pass, and where in answer and question they come from."""

from hallucination_guard.scoring.cascade import Cascade, CascadeFit, fit_cascade
from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.scoring.isotropic import Isotropic
from hallucination_guard.scoring.scorers import ExGrad, HybridGrad, Likelihood, ParaGrad, SemGrad
from hallucination_guard.scoring.sensitivity import Word, prompt_sensitivity, question_sensitivity
from hallucination_guard.scoring.spans import Span, semgrad_by_span

__all__ = [
    "Cascade",
    "CascadeFit",
    "ExGrad",
    "GradientSettings",
    "HybridGrad",
    "Isotropic",
    "Likelihood",
    "ParaGrad",
    "SemGrad",
    "Span",
    "Word",
    "fit_cascade",
    "prompt_sensitivity",
    "question_sensitivity",
    "semgrad_by_span",
]
