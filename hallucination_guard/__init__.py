"""hallucination-guard: knows when a local language model makes things up.

Nothing heavy is imported until a name is used: ``import hallucination_guard`` does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hallucination_guard._lazy import lazily

if TYPE_CHECKING:
    from hallucination_guard.audit import AuditLog
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.errors import GuardError
    from hallucination_guard.guard import Guard
    from hallucination_guard.model import Profile, WhiteBoxModel
    from hallucination_guard.scoring import (
        Cascade,
        ExGrad,
        Explanation,
        HybridGrad,
        Isotropic,
        Likelihood,
        ParaGrad,
        SemGrad,
        Span,
        explain,
        fit_cascade,
        semgrad_by_span,
    )
    from hallucination_guard.values import (
        Call,
        Decision,
        Generation,
        GenerationSettings,
        Message,
        Outcome,
        Released,
        Score,
        Tool,
        ToolCall,
        Verdict,
    )

__version__ = "0.1.0"

_HOME = {
    "AuditLog": "audit",
    "Calibration": "calibration",
    "Call": "values",
    "Cascade": "scoring",
    "Decision": "values",
    "ExGrad": "scoring",
    "Explanation": "scoring",
    "Generation": "values",
    "GenerationSettings": "values",
    "Guard": "guard",
    "GuardError": "errors",
    "HybridGrad": "scoring",
    "Isotropic": "scoring",
    "Likelihood": "scoring",
    "Message": "values",
    "Outcome": "values",
    "ParaGrad": "scoring",
    "Profile": "model",
    "Released": "values",
    "Score": "values",
    "SemGrad": "scoring",
    "Span": "scoring",
    "Tool": "values",
    "ToolCall": "values",
    "Verdict": "values",
    "WhiteBoxModel": "model",
    "explain": "scoring",
    "fit_cascade": "scoring",
    "semgrad_by_span": "scoring",
}

__getattr__ = lazily(__name__, _HOME)

__all__ = [
    "AuditLog",
    "Calibration",
    "Call",
    "Cascade",
    "Decision",
    "ExGrad",
    "Explanation",
    "Generation",
    "GenerationSettings",
    "Guard",
    "GuardError",
    "HybridGrad",
    "Isotropic",
    "Likelihood",
    "Message",
    "Outcome",
    "ParaGrad",
    "Profile",
    "Released",
    "Score",
    "SemGrad",
    "Span",
    "Tool",
    "ToolCall",
    "Verdict",
    "WhiteBoxModel",
    "__version__",
    "explain",
    "fit_cascade",
    "semgrad_by_span",
]


def __dir__() -> list[str]:
    return __all__
