"""A calibration of sentences: back-off thresholds, frozen and bound to the model, scorer and conditions they are of.

:func:`calibrate_sentences` fits one on labelled responses, once for every α, every number of wrong sentences allowed,
and both guarantees of :mod:`hallucination_guard.calibration.backoff`. The score of a sentence may be one that was
measured, or ``fused``: its weights are then fitted on some of the responses and the thresholds on the others. It is
JSON in a file, never pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from hallucination_guard.calibration.backoff import (
    Scored,
    average_rank,
    certified_rank,
    limits,
    retention,
    threshold_at,
)
from hallucination_guard.calibration.bound import loaded, refuse_others
from hallucination_guard.calibration.certificate import split, upper_bound
from hallucination_guard.calibration.fusion import FUSED, Fusion
from hallucination_guard.calibration.responses import LabelledResponse
from hallucination_guard.calibration.stack import fit_fused
from hallucination_guard.errors import CalibrationError, ConfigurationError
from hallucination_guard.values import (
    LOWER_IS_LESS_CERTAIN,
    Backoff,
    Conditions,
    Guarantee,
    ModelIdentity,
    ScorerIdentity,
    Sentence,
    States,
)

__all__ = ["FIT_SHARE", "NoBackoff", "SentenceCalibration", "SentenceThreshold", "calibrate_sentences"]

FIT_SHARE = 0.5
"""Of the responses, for a fused score: learning from more is worth certifying on fewer (docs/sentences.md)."""

_COVERED = {
    *("score", "fusion", "fingerprint", "structure", "dtype", "template"),
    *("scorer", "scorer_version", "scorer_settings", "conditions"),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SentenceThreshold(_Part):
    """Keep the sentences up to ``threshold``: of the responses at most α then keep more wrong ones than ``at_most``.

    Args:
        id: hash of all the rest.
        guarantee: ``certified`` (with probability 1 − δ over the draw of the responses) or ``average``.
        alpha: α.
        delta: δ; None on average.
        at_most: k, wrong sentences that a response may keep.
        threshold: of the score of a sentence.
        n: responses.
        failures: how many of them keep more than k wrong sentences at the threshold.
        bound: upper bound of their share: Clopper–Pearson at level 1 − δ, or on average (failures + 1)/(n + 1).
        sentences: share of the sentences that are kept, on these responses; see ``Retention``.
        right: share of the right sentences that are kept.
        empty: share of the responses of which nothing is kept.
        covers: hash of model, scorer, score and conditions.
        data: hash of what it was fitted on.
        date: ISO, UTC.
    """

    id: str = ""
    guarantee: Guarantee
    alpha: float = Field(gt=0, lt=1)
    delta: float | None = Field(None, gt=0, lt=1)
    at_most: int = Field(ge=0)
    threshold: float
    n: int = Field(ge=1)
    failures: int = Field(ge=0)
    bound: float = Field(ge=0, le=1)
    sentences: float = Field(ge=0, le=1)
    right: float = Field(ge=0, le=1)
    empty: float = Field(ge=0, le=1)
    covers: str
    data: str
    date: str

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if (self.delta is None) != (self.guarantee == "average"):
            raise ValueError(f"the guarantee is {self.guarantee!r} with delta {self.delta!r}")
        if self.failures > self.n or not self.failures / self.n <= self.bound <= self.alpha + 1e-9:
            raise ValueError(f"{self.failures} of {self.n} with the bound {self.bound:g} do not show {self.alpha:g}")
        plain = self.model_dump(exclude={"id"})
        found = hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]
        if self.id not in ("", found):
            raise ValueError(f"the threshold is called {self.id!r} and its content has the hash {found!r}")
        object.__setattr__(self, "id", found)  # frozen from here on
        return self


class NoBackoff(_Part):
    """There is no threshold for this α, not even the strictest: too few responses to show it.

    Args:
        guarantee: that was asked for; also ``alpha``, ``delta`` and ``at_most``.
        n: responses.
        least: how many it takes where none of them keeps too much.
    """

    guarantee: Guarantee
    alpha: float
    delta: float | None = None
    at_most: int
    n: int
    least: int

    def in_words(self) -> str:
        """One sentence."""
        return (
            f"alpha {self.alpha:g}, at most {self.at_most} wrong, {self.guarantee}: INFEASIBLE on {self.n} responses; "
            f"it takes at least {self.least}"
        )


class SentenceCalibration(BaseModel):
    """Fitted thresholds for the sentences of answers. JSON in a file, never pickle.

    Args:
        score: which score of a sentence is read; ``fused`` for the one that ``fusion`` makes.
        fusion: the weights of the fused score.
        fitted: responses that these were fitted on; no threshold has seen them.
        fingerprint: of the model; also ``structure``, ``dtype`` and ``template``.
        scorer: name of what scored the sentences; also its version and settings.
        conditions: how the answers were drawn, and how they ended.
        judge: who labelled.
        responses: n, that the thresholds are of.
        sentences: in all of them.
        wrong: of these.
        unchecked: of these, what the judge could not say; they count as kept or cut and never as wrong.
        data: hash of scores and labels.
        date: ISO, UTC.
        thresholds: what there is; see :class:`SentenceThreshold`.
        infeasible: what was asked for and there is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["sentences"] = "sentences"
    schema_version: Literal[1] = 1
    score: str
    fusion: Fusion | None = None
    fitted: int = Field(0, ge=0, strict=True)
    fingerprint: str
    structure: str
    dtype: str
    template: str
    scorer: str
    scorer_version: str
    scorer_settings: dict[str, str]
    conditions: Conditions
    judge: str
    responses: int = Field(ge=1)
    sentences: int = Field(ge=1)
    wrong: int = Field(ge=0)
    unchecked: int = Field(ge=0)
    data: str
    date: str
    thresholds: tuple[SentenceThreshold, ...] = ()
    infeasible: tuple[NoBackoff, ...] = ()

    @field_validator("conditions", mode="before")
    @classmethod
    def _as_written(cls, given: object) -> Conditions:
        return given if isinstance(given, Conditions) else Conditions.from_json_dict(given)

    @field_serializer("conditions")
    def _in_plain(self, conditions: Conditions) -> dict[str, Any]:
        return conditions.to_json_dict()

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> Self:
        if self.wrong + self.unchecked > self.sentences:
            raise ValueError(f"{self.wrong} wrong and {self.unchecked} unchecked of {self.sentences} cannot be")
        if not (self.fusion is not None) == (self.score == FUSED) == (self.fitted > 0):
            raise ValueError("the score is called fused exactly where there are weights fitted on other responses")
        counts = {each.n for each in self.thresholds} | {each.n for each in self.infeasible}
        if counts - {self.responses}:
            raise ValueError(f"the thresholds are of {counts} responses and the calibration is of {self.responses}")
        if odd := [each.id for each in self.thresholds if (each.covers, each.data) != (self.covered, self.data)]:
            raise ValueError(f"the thresholds {odd!r} are of another model, scorer, conditions or data")
        return self

    @property
    def covered(self) -> str:
        """Hash of what the thresholds cover: model, scorer, the score that is read and its weights, conditions."""
        plain = self.model_dump(mode="json", include=_COVERED)
        if self.fusion is None:  # what is not there leaves the hash as it was before there was any
            del plain["fusion"]
        else:
            del plain["fusion"]["why"]
            plain["fitted"] = self.fitted
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def backoffs(self) -> tuple[Backoff, ...]:
        """The thresholds as a verdict carries them."""
        name = self.score if self.fusion is None else self.fusion.name
        return tuple(
            Backoff(
                alpha=each.alpha,
                at_most=each.at_most,
                guarantee=each.guarantee,
                score=name,
                threshold=each.threshold,
                certificate=each.id,
            )
            for each in self.thresholds
        )

    def value(self, scores: Mapping[str, float], states: States | None = None) -> float:
        """What the thresholds read of a sentence: the higher, the less certain.

        Raises:
            CalibrationError: if it has not what that takes.
        """
        return _read(self.score, self.fusion, scores, states)

    def completed(self, sentences: Sequence[Sentence]) -> tuple[Sentence, ...]:
        """Sentences with the score that the thresholds read, under the name that says by which weights.

        Raises:
            CalibrationError: if it is ``fused`` and a sentence has not what that reads.
        """
        if self.fusion is None:
            return tuple(sentences)
        name = self.fusion.name
        return tuple(
            each
            if name in each.scores  # it was judged before, and states may be gone
            else replace(each, scores={**each.scores, name: self.value(each.scores, each.states)})
            for each in sentences
        )

    def check(self, model: ModelIdentity, scorer: ScorerIdentity) -> None:
        """Refuse the calibration of another model or scorer of sentences.

        Raises:
            CalibrationMismatch: naming everything that differs.
        """
        hint = "fit one for this model, template, dtype and scorer: calibrate --for sentences"
        refuse_others(self, model, scorer, what="the calibration of sentences", hint=hint)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: if the file is missing, is not JSON, or lacks or invents a field.
        """
        return loaded(cls, path, named="thresholds", part="threshold")


def calibrate_sentences(
    responses: Sequence[LabelledResponse],
    *,
    score: str,
    alphas: Iterable[float],
    at_most: Iterable[int] = (0,),
    delta: float = 0.1,
    share: float = FIT_SHARE,
    seed: int = 0,
    date: str | None = None,
) -> SentenceCalibration:
    """Fit back-off thresholds, and for the score ``fused`` its weights first, on responses that nothing else sees.

    Args:
        responses: labelled by one judge, of one model, scored by one scorer, drawn alike; each question once.
        score: of a sentence, or ``fused``; chosen before these labels were looked at: a choice by them is not covered.
        alphas: shares of responses that may keep too much, each in (0, 1).
        at_most: numbers k of wrong sentences that a response may keep.
        delta: the probability with which each ``certified`` threshold may fail, in (0, 1).
        share: of the responses that ``fused`` is fitted on, in (0, 1).
        seed: of the split into these and the others.
        date: ISO; today by default.

    Raises:
        CalibrationError: if the responses cannot be used together, a sentence has not the score, or too few sentences
            are labelled for ``fused``.
        ConfigurationError: on an α, k, δ or share out of range.
        MissingExtra: if scipy or scikit-learn is not installed.
    """
    first, conditions = _one_origin(responses, score)
    wanted, allowed = sorted(set(alphas)), sorted(set(at_most))
    for name, value in (*(("alpha", each) for each in wanted), ("delta", delta), ("share", share)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
            raise ConfigurationError(f"{name} is {value!r}", hint="give a share above 0 and below 1, for example 0.2")
    if not wanted or not allowed or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in allowed):
        raise ConfigurationError(
            f"alphas are {wanted!r} and wrong sentences allowed {allowed!r}", hint="give at least one of each, k from 0"
        )
    fusion, fitted_on = None, frozenset[str]()
    if score == FUSED:
        _check_scorer_of_states(responses)
        fitted_on, _ = split([each.id for each in responses], share=share, seed=seed)
        fusion = fit_fused([own for each in responses if each.id in fitted_on for own in each.checked])
    tested = [each for each in responses if each.id not in fitted_on]
    if not tested:
        raise CalibrationError(f"{len(responses)} responses are all in the fit part", hint="give more of them")
    scored = [_scored(each, score, fusion) for each in tested]
    labels = [correct for each in scored for _, correct in each]
    plain = sorted([each.id, [list(pair) for pair in own]] for each, own in zip(tested, scored, strict=True))
    bare = SentenceCalibration(
        score=score,
        fusion=fusion,
        fitted=len(fitted_on),
        fingerprint=first.model.fingerprint,
        structure=first.model.structure,
        dtype=first.model.dtype,
        template=first.model.template,
        scorer=first.scorer.name,
        scorer_version=first.scorer.version,
        scorer_settings=dict(first.scorer.settings),
        conditions=conditions,
        judge=first.judge,
        responses=len(tested),
        sentences=len(labels),
        wrong=labels.count(False),
        unchecked=labels.count(None),
        data=hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16],
        date=date or datetime.now(UTC).date().isoformat(),
    )
    thresholds: list[SentenceThreshold] = []
    infeasible: list[NoBackoff] = []
    guarantees: tuple[Guarantee, ...] = ("certified", "average")
    for guarantee in guarantees:
        for k in allowed:
            for alpha in wanted:
                found = _fitted(bare, scored, guarantee, alpha, k, delta if guarantee == "certified" else None)
                thresholds.append(found) if isinstance(found, SentenceThreshold) else infeasible.append(found)
    fields = {name: getattr(bare, name) for name in SentenceCalibration.model_fields}
    return SentenceCalibration(**{**fields, "thresholds": tuple(thresholds), "infeasible": tuple(infeasible)})


def _check_scorer_of_states(responses: Sequence[LabelledResponse]) -> None:
    """What reads states says so in its identity; else a guard would be bound to a scorer that reads none."""
    scorer = responses[0].scorer
    reads = scorer.name != "sentences" or scorer.settings.get("states") == "True"
    if not reads and any(own.states is not None for each in responses for own in each.sentences):
        raise CalibrationError(
            "the rows have states, and the scorer that they name reads none",
            hint="give scorer=BySentence(..., states=True).sentences",
        )


def _scored(response: LabelledResponse, score: str, fusion: Fusion | None) -> Scored:
    try:
        return [(_read(score, fusion, each.scores, each.states), each.correct) for each in response.sentences]
    except CalibrationError as error:
        raise CalibrationError(f"the response {response.id!r}: {error.message}", hint=error.hint) from None


def _read(score: str, fusion: Fusion | None, scores: Mapping[str, float], states: States | None) -> float:
    if fusion is not None:
        return fusion.score(scores, states)
    if score not in scores:
        raise CalibrationError(f"a sentence has no {score!r}", hint="use the scorer that it was fitted with")
    return scores[score]


def _fitted(
    bare: SentenceCalibration,
    scored: Sequence[Scored],
    guarantee: Guarantee,
    alpha: float,
    k: int,
    delta: float | None,
) -> SentenceThreshold | NoBackoff:
    n = len(scored)
    rank = average_rank(n, alpha=alpha) if delta is None else certified_rank(n, alpha=alpha, delta=delta)
    if not rank:
        least = next(
            more
            for more in range(n + 1, 10_000_000)
            if (average_rank(more, alpha=alpha) if delta is None else (1.0 - alpha) ** more <= delta)
        )
        return NoBackoff(guarantee=guarantee, alpha=alpha, delta=delta, at_most=k, n=n, least=least)
    own = limits(scored, at_most=k)
    threshold = threshold_at(own, rank)
    failures = sum(each <= threshold for each in own)
    kept = retention(scored, threshold)
    return SentenceThreshold(
        guarantee=guarantee,
        alpha=alpha,
        delta=delta,
        at_most=k,
        threshold=threshold,
        n=n,
        failures=failures,
        bound=(failures + 1) / (n + 1) if delta is None else upper_bound(failures, n, delta=delta),
        sentences=kept.sentences,
        right=kept.right,
        empty=kept.empty,
        covers=bare.covered,
        data=bare.data,
        date=bare.date,
    )


def _one_origin(responses: Sequence[LabelledResponse], score: str) -> tuple[LabelledResponse, Conditions]:
    """The first of them, and the conditions of all; what was mixed is refused."""
    if not responses:
        raise CalibrationError("there are no responses to calibrate on", hint="docs/sentences.md says what they are")
    for what, kinds in (
        ("judges", {each.judge for each in responses}),
        ("models", {(m.fingerprint, m.structure, m.dtype, m.template) for m in (each.model for each in responses)}),
        (
            "scorers",
            {json.dumps([s.name, s.version, sorted(s.settings.items())]) for s in (each.scorer for each in responses)},
        ),
    ):
        if len(kinds) > 1:
            raise CalibrationError(
                f"the responses come from different {what}: {sorted(map(str, kinds))!r}",
                hint="calibrate on responses of one model by one scorer and one judge",
            )
    ids = [each.id for each in responses]
    if twice := sorted({each for each in ids if ids.count(each) > 1}) if len(set(ids)) < len(ids) else []:
        raise CalibrationError(f"the question {twice[0]!r} has several responses", hint="give one response a question")
    lacking = score != FUSED and any(score not in own.scores for each in responses for own in each.sentences)
    if score in LOWER_IS_LESS_CERTAIN or lacking:
        known = sorted({*responses[0].sentences[0].scores} - LOWER_IS_LESS_CERTAIN)
        raise CalibrationError(
            f"{score!r} cannot be calibrated on", hint=f"give a score that rises with doubt, of {', '.join(known)}"
        )
    try:
        return responses[0], Conditions.together(each.conditions for each in responses)
    except ValueError as error:
        raise CalibrationError(str(error), hint="calibrate on answers that were drawn alike") from None
