"""Scores of a generation, from one pass."""

from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.scoring.isotropic import Isotropic
from hallucination_guard.scoring.scorers import ExGrad, HybridGrad, Likelihood, ParaGrad, SemGrad

__all__ = ["ExGrad", "GradientSettings", "HybridGrad", "Isotropic", "Likelihood", "ParaGrad", "SemGrad"]
