"""From a score to a probability: fitted once on labelled answers, then frozen and bound to what it was fitted on.

A raw score has a scale of its own for each model, template, dtype and scorer. The map is Platt's: P(correct) =
1 / (1 + e^(a + b·log score)), b > 0, fitted by regularised logistic regression on the log of the score (scores are
positive and spread over decades). The fitter needs scikit-learn; applying needs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hallucination_guard.errors import CalibrationError, CalibrationMismatch, MissingExtra
from hallucination_guard.types import LOWER_IS_LESS_CERTAIN, ModelIdentity, Score, ScorerIdentity

__all__ = ["Calibration", "fit_calibration"]

_TINY = 1e-12


class Calibration(BaseModel):
    """A fitted map from one score to the confidence that the answer is right. JSON in a file, never pickle.

    Args:
        score: which of the scores it reads.
        intercept: a.
        slope: b; positive, so that a higher score never means a higher confidence.
        fingerprint: of the model it was fitted on; also ``dtype`` and ``template``.
        scorer: name, version and settings of the scorer.
        examples: n, labelled answers used.
        correct: how many of them were right.
        data: hash of scores and labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    score: str
    intercept: float
    slope: float = Field(gt=0)
    fingerprint: str
    dtype: str
    template: str
    scorer: str
    scorer_version: str
    scorer_settings: dict[str, str]
    examples: int = Field(ge=2)
    correct: int = Field(ge=1)
    data: str

    def confidence(self, score: Score) -> float:
        """Calibrated P(correct) in [0, 1].

        Raises:
            CalibrationError: if the answer has no score, or not the one this was fitted on.
        """
        if self.score not in score.scores:
            raise CalibrationError(
                f"the calibration reads {self.score!r} and the answer has {sorted(score.scores)!r}",
                hint="use the scorer that it was fitted with",
            )
        if score.scores[self.score] < 0.0:
            raise CalibrationError(f"{self.score!r} is {score.scores[self.score]!r}, and it can not be negative")
        z = self.intercept + self.slope * math.log(max(score.scores[self.score], _TINY))
        return 1.0 / (1.0 + math.exp(min(z, 700.0)))

    def check(self, model: ModelIdentity, scorer: ScorerIdentity) -> None:
        """Refuse a stranger's calibration.

        Raises:
            CalibrationMismatch: naming everything that differs.
        """
        pairs = {
            "model": (self.fingerprint, model.fingerprint),
            "dtype": (self.dtype, model.dtype),
            "template": (self.template, model.template),
            "scorer": (self.scorer, scorer.name),
            "scorer version": (self.scorer_version, scorer.version),
            "scorer settings": (self.scorer_settings, dict(scorer.settings)),
        }
        differing = [f"{name} {theirs!r} against {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]
        if differing:
            raise CalibrationMismatch(
                f"the calibration was fitted on something else: {'; '.join(differing)}",
                hint="fit one for this model, template, dtype and scorer",
            )

    @classmethod
    def of_demo(cls) -> Self:
        """The shipped calibration of the demo model in float32; ``docs/demo.md`` has the command that made it."""
        with resources.as_file(resources.files("hallucination_guard").joinpath("data/demo_calibration.json")) as path:
            return cls.load(path)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: if the file is missing, is not JSON, or lacks or invents a field.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise CalibrationError(
                f"the calibration {str(path)!r} can not be read: {error.strerror}", hint="give the file that was saved"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise CalibrationError(
                f"the calibration {str(path)!r} is not valid: {where}: {first['msg']}", hint="fit and save it again"
            ) from None


def fit_calibration(
    scores: Sequence[Score], correct: Sequence[bool], *, model: ModelIdentity, score: str | None = None
) -> Calibration:
    """Fit a confidence map.

    Args:
        scores: of labelled answers of one model by one scorer; what could not be scored is left out.
        correct: whether each answer was right.
        model: identity of that model.
        score: which score to read; the scorer's own by default.

    Raises:
        CalibrationError: if there are too few answers, only right or only wrong ones, or if right answers do not
            score lower than wrong ones: then this score knows nothing here, and no confidence is made of it.
        MissingExtra: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra(
            "fitting a calibration needs scikit-learn", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
        ) from None
    pairs = [(each, bool(right)) for each, right in zip(scores, correct, strict=True) if each.status == "scored"]
    labels = [right for _, right in pairs]
    if len(pairs) < 20 or len(set(labels)) < 2:
        raise CalibrationError(
            f"{len(pairs)} scored answers of which {sum(labels)} right can not be calibrated on",
            hint="give at least 20 labelled answers, right and wrong ones",
        )
    identities = {json.dumps(_plain(each.scorer), sort_keys=True) for each, _ in pairs}
    if len(identities) > 1:
        raise CalibrationError("the answers were scored by different scorers", hint="score all with one scorer")
    scorer = pairs[0][0].scorer
    score = score or scorer.name
    if score in LOWER_IS_LESS_CERTAIN or any(score not in each.scores for each, _ in pairs):
        raise CalibrationError(f"{score!r} can not be calibrated on", hint="a score that rises with doubt")
    values = [each.scores[score] for each, _ in pairs]
    logs = [[math.log(max(value, _TINY))] for value in values]
    fitted = LogisticRegression(C=1e3).fit(logs, [not right for right in labels])  # P(wrong) rises with the score
    slope, intercept = float(fitted.coef_[0][0]), float(fitted.intercept_[0])
    if not slope > 0:
        raise CalibrationError(
            f"on these {len(pairs)} answers {score!r} does not rise with being wrong (slope {slope:.3g})",
            hint="give more labelled answers, or use another score",
        )
    data = hashlib.sha256(json.dumps([values, labels]).encode()).hexdigest()[:16]
    return Calibration(
        score=score,
        intercept=intercept,
        slope=slope,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        template=model.template,
        scorer=scorer.name,
        scorer_version=scorer.version,
        scorer_settings=dict(scorer.settings),
        examples=len(pairs),
        correct=sum(labels),
        data=data,
    )


def _plain(scorer: ScorerIdentity) -> dict[str, Any]:
    return {"name": scorer.name, "version": scorer.version, "settings": dict(scorer.settings)}
