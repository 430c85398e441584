"""From a score to a probability: fitted once on labelled answers, then frozen and bound to what it was fitted on.

A raw score has a scale of its own for each model, template, dtype and scorer. Two maps to P(correct): Platt's,
1 / (1 + e^(a + b·log score)), b > 0, fitted by regularised logistic regression on the log of the score (scores are
positive and spread over decades); and the isotonic one, a falling table with straight lines between its points, for
which a few hundred answers are wanted. The score may also be the fused one (:mod:`hallucination_guard.fusion`), whose
weights then travel inside. Certificates (:mod:`hallucination_guard.certificate`) travel inside too. The fitters need
scikit-learn; applying needs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hallucination_guard.certificate import (
    FIT_SHARE,
    FIT_SHARE_FUSED,
    Certificate,
    Drafts,
    Infeasible,
    certify,
    drafts_hash,
    policy_hash,
    split,
)
from hallucination_guard.errors import CalibrationError, CalibrationMismatch, MissingExtra
from hallucination_guard.fusion import Fusion, cross_fitted, fit_fusion, fold_of
from hallucination_guard.labelled import Labelled
from hallucination_guard.types import (
    LOWER_IS_LESS_CERTAIN,
    ModelIdentity,
    Policy,
    Score,
    ScorerIdentity,
    Verdict,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FUSED", "Bin", "Calibration", "FitReport", "calibrate", "fit_calibration"]

FUSED = "fused"
"""The name of the score that a :class:`~hallucination_guard.fusion.Fusion` makes."""

Kind: TypeAlias = Literal["platt", "isotonic"]

_TINY = 1e-12
_LEAST = 20
_FOLDS = 5
_BINS = 10
_REFERENCE = 512


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bin(_Part):
    """Of answers that were given a similar confidence: how many, their mean confidence, the share that was right."""

    answers: int
    confidence: float
    correct: float


class FitReport(_Part):
    """How good the confidences are on questions that the map was not fitted on, by cross-validation.

    Args:
        answers: how many.
        folds: parts; each question was left out once.
        brier: mean of (confidence − label)².
        ece: expected calibration error: mean of |mean confidence − share right| over the bins, weighted.
        bins: ten of equally many answers, from the lowest confidence to the highest.
    """

    answers: int
    folds: int
    brier: float
    ece: float
    bins: tuple[Bin, ...]


class Calibration(_Part):
    """A fitted map from one score to the confidence that the answer is right. JSON in a file, never pickle.

    Args:
        score: which of the scores it reads; ``fused`` for the one that ``fusion`` makes.
        map: ``platt`` or ``isotonic``.
        intercept: a, of Platt's map.
        slope: b; positive, so that a higher score never means a higher confidence.
        table: of the isotonic map: (score, confidence), scores rising, confidences falling.
        fusion: the weights of the fused score.
        fingerprint: of the model it was fitted on; also ``dtype`` and ``template``.
        scorer: name, version and settings of the scorer.
        judge: who gave the labels; None where it was not said.
        examples: n, labelled answers used.
        correct: how many of them were right.
        data: hash of scores and labels.
        date: ISO, UTC; None where it was not said.
        report: how good the confidences are on questions that they were not fitted on.
        certificates: for max_risk, smallest α first; their thresholds rise with α.
        infeasible: the α that were asked for and can not be certified.
        reference: scores of first drafts, sorted and thinned, to notice drift by.
    """

    schema_version: Literal[1, 2] = 2
    score: str
    map: Kind = "platt"
    intercept: float | None = None
    slope: float | None = Field(None, gt=0)
    table: tuple[tuple[float, float], ...] = ()
    fusion: Fusion | None = None
    fingerprint: str
    dtype: str
    template: str
    scorer: str
    scorer_version: str
    scorer_settings: dict[str, str]
    judge: str | None = None
    examples: int = Field(ge=2)
    correct: int = Field(ge=1)
    data: str
    date: str | None = None
    report: FitReport | None = None
    certificates: tuple[Certificate, ...] = ()
    infeasible: tuple[Infeasible, ...] = ()
    reference: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        platt = self.intercept is not None and self.slope is not None
        if platt != (self.map == "platt") or bool(self.table) != (self.map == "isotonic"):
            raise ValueError("a platt map has an intercept and a slope and no table, an isotonic one a table alone")
        for (low, sure), (high, unsure) in zip(self.table, self.table[1:], strict=False):
            if not (low < high and sure >= unsure):
                raise ValueError("the table's scores must rise and its confidences fall")
        if not all(0.0 <= confidence <= 1.0 for _, confidence in self.table):
            raise ValueError("a confidence of the table is not in [0, 1]")
        if (self.fusion is not None) != (self.score == FUSED):
            raise ValueError("the score is called fused exactly where there are fused weights")
        named = [each.score for each in self.certificates] + [each.score for each in self.infeasible]
        if self.correct > self.examples:
            raise ValueError(f"{self.correct} of {self.examples} answers can not be right")
        if strange := [each.id for each in self.certificates if each.data != self.data]:
            raise ValueError(f"the certificates {strange!r} are of other data than the calibration")
        if odd := set(named) - {self.score}:
            raise ValueError(f"a certificate reads {sorted(odd)!r} and the calibration {self.score!r}")
        for first, later in zip(self.certificates, self.certificates[1:], strict=False):
            if not (first.alpha < later.alpha and first.threshold <= later.threshold):
                raise ValueError("certificates stand with α rising, and a smaller α never has the larger threshold")
            if first.policy != later.policy:
                raise ValueError("the certificates are of different policies")
        return self

    def value(self, score: Score) -> float:
        """The number that is read: the higher, the less certain.

        Raises:
            CalibrationError: if the answer has no score, or not the one this was fitted on.
        """
        if self.fusion is not None:
            if score.status != "scored":
                raise CalibrationError(f"an answer that is {score.status!r} has no fused score")
            return self.fusion.score(score.scores, len(score.token_logprobs) or None)
        if self.score not in score.scores:
            raise CalibrationError(
                f"the calibration reads {self.score!r} and the answer has {sorted(score.scores)!r}",
                hint="use the scorer that it was fitted with",
            )
        if score.scores[self.score] < 0.0:
            raise CalibrationError(f"{self.score!r} is {score.scores[self.score]!r}, and it can not be negative")
        return score.scores[self.score]

    def confidence(self, score: Score) -> float:
        """Calibrated P(correct) in [0, 1].

        Raises:
            CalibrationError: if the answer has no score, or not the one this was fitted on.
        """
        return self._confidence(self.value(score))

    def _confidence(self, value: float) -> float:
        if self.map == "platt":
            assert self.intercept is not None and self.slope is not None  # _says_one_thing saw to it
            z = self.intercept + self.slope * math.log(max(value, _TINY))
            return 1.0 / (1.0 + math.exp(min(z, 700.0)))
        at = bisect_right(self.table, value, key=lambda point: point[0])
        if at == 0 or at == len(self.table):
            return self.table[0 if at == 0 else -1][1]
        (low, sure), (high, unsure) = self.table[at - 1 : at + 1]
        return sure + (unsure - sure) * (value - low) / (high - low)

    def verdict(self, score: Score, *, certificates: Iterable[Certificate] = (), suspended: str = "") -> Verdict:
        """What a score means.

        Args:
            score: of one answer; without numbers it gets no confidence and passes no certificate.
            certificates: those that hold here, see :meth:`covering`.
            suspended: why they do not hold at the moment; empty while they do.

        Raises:
            CalibrationError: if the answer has not the score that this was fitted on.
        """
        if score.status != "scored":
            return Verdict(score=score, suspended=suspended)
        value = self.value(score)
        confidence = self._confidence(value)
        passed = () if suspended else sorted((each for each in certificates if value <= each.threshold), key=_alpha)
        if not passed:
            return Verdict(score=score, confidence=confidence, suspended=suspended)
        return Verdict(score=score, confidence=confidence, max_risk=passed[0].alpha, certificate=passed[0].id)

    def covering(self, policy: Policy) -> tuple[Certificate, ...]:
        """The certificates that hold for what ``policy`` lets through.

        One of single drafts holds for a policy that makes no further attempts; every other one for the policy whose
        attempts were certified, which is known by its hash.
        """
        if not self.certificates:
            return ()
        known = {policy_hash(policy), drafts_hash(policy)} | ({None} if not getattr(policy, "redraws", True) else set())
        return tuple(each for each in self.certificates if each.policy in known)

    def check(self, model: ModelIdentity, scorer: ScorerIdentity, policy: Policy | None = None) -> None:
        """Refuse a stranger's calibration, and a policy whose ``max_risk`` no certificate keeps.

        Raises:
            CalibrationMismatch: naming everything that differs.
            CalibrationError: naming the nearest risk that could be had.
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
        risk = getattr(policy, "needs_risk", None)
        if policy is not None and risk is not None:
            self._check_risk(policy, risk)

    def _check_risk(self, policy: Policy, risk: float) -> None:
        covering = self.covering(policy)
        if any(each.alpha <= risk for each in covering):
            return
        if covering:
            tried = next((each for each in self.infeasible if each.alpha == risk), None)
            why = f"the smallest risk certified is {covering[0].alpha:g}" + (f"; {tried.in_words()}" if tried else "")
            raise CalibrationError(
                f"the policy asks for max_risk {risk:g}, and {why}",
                hint=f"ask for {covering[0].alpha:g}, or certify on more labelled answers",
            )
        if self.certificates:
            mine = policy_hash(policy)
            theirs = self.certificates[0].policy
            what = "single drafts, and the policy makes further attempts" if theirs is None else f"the policy {theirs}"
            raise CalibrationMismatch(
                f"no certificate covers the policy {mine}: they are of {what}",
                hint="certify the attempts that this policy makes: calibrate --policy",
            )
        nearest = min((each.nearest for each in self.infeasible if each.nearest is not None), default=None)
        looks = "" if nearest is None else f"; the nearest that looks feasible is {nearest:g}"
        raise CalibrationError(
            f"the policy asks for max_risk {risk:g}, and the calibration holds no certificate{looks}",
            hint="calibrate with --alpha, or with more labelled answers",
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
            written = Path(path).read_bytes()
            found = cls.model_validate_json(written)
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
        # A certificate that is made gets its id from its content; one that is read has to bring it, or an edit would
        # only have to take it out.
        if any(not each.get("id") for each in json.loads(written).get("certificates", ())):
            raise CalibrationError(f"a certificate of {str(path)!r} has no id", hint="fit and save it again")
        return found


def fit_calibration(
    scores: Sequence[Score], correct: Sequence[bool], *, model: ModelIdentity, score: str | None = None
) -> Calibration:
    """Fit a confidence map of Platt's kind, without certificates; :func:`calibrate` does all at once.

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
    pairs = [(each, bool(right)) for each, right in zip(scores, correct, strict=True) if each.status == "scored"]
    labels = [right for _, right in pairs]
    _refuse_too_few(labels)
    identities = {json.dumps(_plain(each.scorer), sort_keys=True) for each, _ in pairs}
    if len(identities) > 1:
        raise CalibrationError("the answers were scored by different scorers", hint="score all with one scorer")
    scorer = pairs[0][0].scorer
    score = score or scorer.name
    if score in LOWER_IS_LESS_CERTAIN or any(score not in each.scores for each, _ in pairs):
        raise CalibrationError(f"{score!r} can not be calibrated on", hint="a score that rises with doubt")
    values = [each.scores[score] for each, _ in pairs]
    return Calibration(
        score=score,
        **_platt(values, labels, name=score),
        **_bound_to(model, scorer),
        examples=len(pairs),
        correct=sum(labels),
        data=_hash([values, labels]),
    )


def calibrate(
    answers: Sequence[Labelled],
    *,
    score: str | None = None,
    map: Kind = "platt",
    alphas: Iterable[float] = (),
    delta: float = 0.1,
    policy: Policy | None = None,
    share: float | None = None,
    seed: int = 0,
    date: str | None = None,
) -> Calibration:
    """Fit a confidence map, certify thresholds, and keep what is needed to notice drift.

    Rows with the same id are the attempts at one question, in order. For a policy that makes further attempts they
    must be all that it would make: collect them with a threshold that nothing passes (``confidence: 1``), because
    where a log ends with an accepted draft nobody knows what a stricter threshold would have drawn next.

    With certificates for the fused score its weights are fitted on the fit part of the questions, and everything else
    on the test part. Plain scores need no fitting: their map is fitted on all answers.

    Args:
        answers: labelled by one judge, of one model, scored by one scorer.
        score: which to read, or ``fused``; the scorer's own by default.
        map: ``platt`` or ``isotonic``.
        alphas: error rates to certify; none, no certificates.
        delta: the probability with which a certificate may fail.
        policy: that drew these attempts; None for single drafts, or where the rows name it.
        share: of the questions in the fit part; by default .2, for the fused score .4.
        seed: of the split.
        date: ISO; today by default.

    Raises:
        CalibrationError: if the answers can not be used together, are too few, or the score knows nothing here.
        ConfigurationError: on an α or δ out of range.
        MissingExtra: if scikit-learn is not installed.
    """
    covered = _one_origin(answers, policy)
    name = score or answers[0].scorer.name
    date = date or datetime.now(UTC).date().isoformat()
    alphas = tuple(alphas)
    sequences = _sequences(answers)
    if share is None:
        share = FIT_SHARE_FUSED if name == FUSED else FIT_SHARE
    if not 0.0 < share < 1.0:
        raise CalibrationError(f"share is {share!r}", hint="give a share above 0 and below 1")
    fit_ids, test_ids = split(sequences, share=share, seed=seed)
    scored = [each for each in answers if each.status == "scored"]
    _refuse_too_few([each.correct for each in scored])
    fusion, mapped, values = _values(scored, name, fit_ids if alphas else frozenset())
    labels = [each.correct for each in mapped]
    _refuse_too_few(labels)
    parameters = _mapped(values, labels, kind=map, name=name)
    ids = [each.id for each in mapped]
    plain = [[each.id, each.attempt, each.correct, sorted(each.scores.items())] for each in answers]
    data = _hash(sorted(plain))
    found: tuple[Certificate | Infeasible, ...] = ()
    if alphas:
        _refuse_cut_short(sequences, several=covered is not None)

        def read(each: Labelled) -> tuple[float | None, bool]:
            if each.status != "scored":
                return None, each.correct
            return (fusion.score(each.scores, each.length) if fusion else each.scores[name]), each.correct

        parts = [
            Drafts.of([read(each) for each in rows] for id, rows in sequences.items() if id in part)
            for part in (fit_ids, test_ids)
        ]
        found = certify(*parts, alphas=alphas, delta=delta, score=name, policy=covered, data=data, date=date)
    first = sorted(value for value, each in zip(values, mapped, strict=True) if each.attempt == 1)
    return Calibration(
        score=name,
        map=map,
        **parameters,
        fusion=fusion,
        **_bound_to(answers[0].model, answers[0].scorer),
        judge=answers[0].judge,
        examples=len(mapped),
        correct=sum(labels),
        data=data,
        date=date,
        report=_report(values, labels, ids, kind=map, name=name),
        certificates=tuple(each for each in found if isinstance(each, Certificate)),
        infeasible=tuple(each for each in found if isinstance(each, Infeasible)),
        reference=_thinned(first),
    )


def _one_origin(answers: Sequence[Labelled], policy: Policy | None) -> str | None:
    """The hash that the certificates carry; what was mixed is refused."""
    if not answers:
        raise CalibrationError("there are no answers to calibrate on", hint="evaluate writes labelled answers")
    for what, kinds in (
        ("judges", {each.judge for each in answers}),
        ("models", {(each.model.fingerprint, each.model.dtype, each.model.template) for each in answers}),
        ("scorers", {json.dumps(_plain(each.scorer), sort_keys=True) for each in answers}),
        ("policies", {each.policy for each in answers}),
    ):
        if len(kinds) > 1:
            raise CalibrationError(
                f"the answers come from different {what}: {sorted(map(str, kinds))!r}",
                hint="calibrate on answers of one model by one scorer, one judge and one policy",
            )
    named = answers[0].policy
    if policy is None:
        if named is None and any(each.attempt > 1 for each in answers):
            raise CalibrationError(
                "there are further attempts, and nothing says which policy made them", hint="give the policy"
            )
        return named
    if named not in (None, policy_hash(policy), drafts_hash(policy)):
        raise CalibrationMismatch(
            f"the answers are of the policy {named} and not of the one given, {policy_hash(policy)}",
            hint="give the policy that drew them",
        )
    redraws = getattr(policy, "redraws", True)
    if not redraws and any(each.attempt > 1 for each in answers):
        raise CalibrationError(
            "there are further attempts, and the policy given makes none", hint="give the policy that drew them"
        )
    if redraws and named is None:
        raise CalibrationError(
            "the policy makes further attempts, and the answers are single drafts without a policy",
            hint="collect the attempts that it makes",
        )
    return drafts_hash(policy) if redraws else None


def _sequences(answers: Sequence[Labelled]) -> Mapping[str, list[Labelled]]:
    """The attempts at each question, in order and without gaps."""
    found: dict[str, list[Labelled]] = {}
    for each in answers:
        found.setdefault(each.id, []).append(each)
    for id, rows in found.items():
        rows.sort(key=lambda each: each.attempt)
        if [each.attempt for each in rows] != list(range(1, len(rows) + 1)):
            raise CalibrationError(
                f"the question {id!r} has the attempts {[each.attempt for each in rows]!r}",
                hint="label every attempt once, from the first on",
            )
    return found


def _refuse_cut_short(sequences: Mapping[str, Sequence[Labelled]], *, several: bool) -> None:
    """A draft that was let through hides those that a stricter threshold would have drawn after it."""
    longest = max(map(len, sequences.values()))
    if several and longest == 1:
        raise CalibrationError(
            "the answers are of a policy, and none is a second attempt: what it would have drawn next is not known",
            hint="collect the attempts with a threshold that nothing passes; if it makes none, give the policy",
        )
    for id, rows in sequences.items():
        if len(rows) < longest and rows[-1].status == "scored":
            raise CalibrationError(
                f"the question {id!r} has {len(rows)} attempts and others have {longest}: what a stricter threshold "
                "would have drawn next is not known",
                hint="collect the attempts with a threshold that nothing passes: below: {confidence: 1}",
            )


def _values(
    scored: Sequence[Labelled], name: str, fit_ids: frozenset[str]
) -> tuple[Fusion | None, Sequence[Labelled], list[float]]:
    """The weights if there are any, the answers that the map may be fitted on, and their scores."""
    if name != FUSED:
        if name in LOWER_IS_LESS_CERTAIN or any(name not in each.scores for each in scored):
            raise CalibrationError(
                f"{name!r} can not be calibrated on",
                hint=f"give 'fused', or a score that rises with doubt, of {', '.join(sorted(scored[0].scores))}",
            )
        return None, scored, [each.scores[name] for each in scored]
    if not fit_ids:  # nothing has to be kept apart: the map is fitted on scores whose weights never saw the answer
        return fit_fusion(scored), scored, cross_fitted(scored, _FOLDS)
    fusion = fit_fusion([each for each in scored if each.id in fit_ids])
    rest = [each for each in scored if each.id not in fit_ids]
    return fusion, rest, [fusion.score(each.scores, each.length) for each in rest]


def _refuse_too_few(labels: Sequence[bool]) -> None:
    if len(labels) < _LEAST or len(set(labels)) < 2:
        raise CalibrationError(
            f"{len(labels)} scored answers of which {sum(labels)} right can not be calibrated on",
            hint=f"give at least {_LEAST} labelled answers, right and wrong ones",
        )


def _mapped(values: Sequence[float], labels: Sequence[bool], *, kind: Kind, name: str) -> dict[str, Any]:
    return _platt(values, labels, name=name) if kind == "platt" else _isotonic(values, labels, name=name)


def _platt(values: Sequence[float], labels: Sequence[bool], *, name: str) -> dict[str, Any]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise _no_sklearn() from None
    _refuse_negative(values, name)
    logs = [[math.log(max(value, _TINY))] for value in values]
    fitted = LogisticRegression(C=1e3).fit(logs, [not right for right in labels])  # P(wrong) rises with the score
    slope, intercept = float(fitted.coef_[0][0]), float(fitted.intercept_[0])
    if not slope > 0:
        raise CalibrationError(
            f"on these {len(values)} answers {name!r} does not rise with being wrong (slope {slope:.3g})",
            hint="give more labelled answers, or use another score",
        )
    return {"intercept": intercept, "slope": slope}


def _isotonic(values: Sequence[float], labels: Sequence[bool], *, name: str) -> dict[str, Any]:
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError:
        raise _no_sklearn() from None
    _refuse_negative(values, name)
    # One invented answer against the trend at either end: a run of right answers is many, but never certainty.
    scores = [min(values), *values, max(values)]
    right = [0.0, *map(float, labels), 1.0]
    fitted = IsotonicRegression(increasing=False, y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(scores, right)
    points = zip(map(float, fitted.X_thresholds_), map(float, fitted.y_thresholds_), strict=True)
    table = tuple((score, min(max(confidence, 0.0), 1.0)) for score, confidence in points)
    if not table[0][1] > table[-1][1]:
        raise CalibrationError(
            f"on these {len(values)} answers {name!r} does not rise with being wrong: the table is flat",
            hint="give more labelled answers, or use another score",
        )
    return {"table": table}


def _report(
    values: Sequence[float], labels: Sequence[bool], ids: Sequence[str], *, kind: Kind, name: str
) -> FitReport | None:
    """None where a fold has too little to fit a map on: no report is better than one of something else."""
    import numpy as np

    parts = fold_of(ids, _FOLDS)
    confidences = np.empty(len(values))
    for part in range(_FOLDS):
        inside, outside = np.flatnonzero(parts == part).tolist(), np.flatnonzero(parts != part).tolist()
        kept = [labels[at] for at in outside]
        if not inside or len(set(kept)) < 2:
            return None
        try:
            parameters = _mapped([values[at] for at in outside], kept, kind=kind, name=name)
        except CalibrationError:  # without this fold the score knows nothing: there is nothing to report on
            return None
        bare = Calibration.model_construct(map=kind, **parameters)
        confidences[inside] = [bare._confidence(values[at]) for at in inside]
    return report_of(confidences, np.array(labels, float), folds=_FOLDS)


def report_of(confidences: NDArray[Any], correct: NDArray[Any], *, folds: int) -> FitReport:
    """Brier score, expected calibration error and reliability bins of confidences."""
    import numpy as np

    order = np.argsort(confidences, kind="stable")
    bins = tuple(
        Bin(answers=len(at), confidence=float(confidences[at].mean()), correct=float(correct[at].mean()))
        for at in np.array_split(order, min(_BINS, len(order)))
    )
    return FitReport(
        answers=len(order),
        folds=folds,
        brier=float(np.mean((confidences - correct) ** 2)),
        ece=sum(each.answers * abs(each.confidence - each.correct) for each in bins) / len(order),
        bins=bins,
    )


def _thinned(scores: Sequence[float]) -> tuple[float, ...]:
    """At most 512 of the sorted scores, evenly; fewer make the test of drift milder, never harsher."""
    if len(scores) <= _REFERENCE:
        return tuple(scores)
    return tuple(scores[int((at + 0.5) * len(scores) / _REFERENCE)] for at in range(_REFERENCE))


def _refuse_negative(values: Sequence[float], name: str) -> None:
    if (lowest := min(values)) < 0.0:
        raise CalibrationError(
            f"{name!r} is {lowest!r}, and it can not be negative", hint="give a score that rises from nil with doubt"
        )


def _no_sklearn() -> MissingExtra:
    return MissingExtra(
        "fitting a calibration needs scikit-learn", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
    )


def _bound_to(model: ModelIdentity, scorer: ScorerIdentity) -> dict[str, Any]:
    return {
        "fingerprint": model.fingerprint,
        "dtype": model.dtype,
        "template": model.template,
        "scorer": scorer.name,
        "scorer_version": scorer.version,
        "scorer_settings": dict(scorer.settings),
    }


def _alpha(certificate: Certificate) -> float:
    return certificate.alpha


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _plain(scorer: ScorerIdentity) -> dict[str, Any]:
    return {"name": scorer.name, "version": scorer.version, "settings": dict(scorer.settings)}
