"""hallucination-guard: knows when a local language model makes things up.

Nothing heavy is imported until a name is used: ``import hallucination_guard`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallucination_guard.audit import AuditLog
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.errors import GuardError
    from hallucination_guard.explain import Explanation
    from hallucination_guard.guard import Guard
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.profile import Profile
    from hallucination_guard.scoring import (
        Cascade,
        ExGrad,
        HybridGrad,
        Isotropic,
        Likelihood,
        ParaGrad,
        SemGrad,
        Span,
        fit_cascade,
        semgrad_by_span,
    )
    from hallucination_guard.types import Decision, Generation, Message, Outcome, Score, Verdict

__version__ = "0.1.0"

_HOME = {
    "AuditLog": "hallucination_guard.audit",
    "Calibration": "hallucination_guard.calibration",
    "Cascade": "hallucination_guard.scoring",
    "Decision": "hallucination_guard.types",
    "ExGrad": "hallucination_guard.scoring",
    "Explanation": "hallucination_guard.explain",
    "Generation": "hallucination_guard.types",
    "Guard": "hallucination_guard.guard",
    "GuardError": "hallucination_guard.errors",
    "HybridGrad": "hallucination_guard.scoring",
    "Isotropic": "hallucination_guard.scoring",
    "Likelihood": "hallucination_guard.scoring",
    "Message": "hallucination_guard.types",
    "Outcome": "hallucination_guard.types",
    "ParaGrad": "hallucination_guard.scoring",
    "Profile": "hallucination_guard.profile",
    "Score": "hallucination_guard.types",
    "SemGrad": "hallucination_guard.scoring",
    "Span": "hallucination_guard.scoring",
    "Verdict": "hallucination_guard.types",
    "WhiteBoxModel": "hallucination_guard.model",
    "fit_cascade": "hallucination_guard.scoring",
    "semgrad_by_span": "hallucination_guard.scoring",
}

__all__ = [
    "AuditLog",
    "Calibration",
    "Cascade",
    "Decision",
    "ExGrad",
    "Explanation",
    "Generation",
    "Guard",
    "GuardError",
    "HybridGrad",
    "Isotropic",
    "Likelihood",
    "Message",
    "Outcome",
    "ParaGrad",
    "Profile",
    "Score",
    "SemGrad",
    "Span",
    "Verdict",
    "WhiteBoxModel",
    "__version__",
    "fit_cascade",
    "semgrad_by_span",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
