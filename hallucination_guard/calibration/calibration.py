"""A calibration: from a score to a probability and to certified thresholds, frozen and bound to what it was fitted on.

A raw score has a scale of its own for each model, template, dtype and scorer. Inside are the map to P(correct), the
weights of a fused score if it reads one, the certificates, and scores to notice drift by. It is JSON in a file, never
pickle; applying it needs nothing but what is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from hallucination_guard.calibration.bound import loaded, refuse_others
from hallucination_guard.calibration.certificate import Certificate, Infeasible, drafts_hash, policy_hash
from hallucination_guard.calibration.fusion import FUSED, Fusion
from hallucination_guard.calibration.maps import Kind, Table, isotonic, platt
from hallucination_guard.calibration.novelty import Novelty
from hallucination_guard.calibration.on_average import OnAverage
from hallucination_guard.calibration.report import FitReport
from hallucination_guard.errors import CalibrationError, CalibrationMismatch
from hallucination_guard.values import (
    Conditions,
    ModelIdentity,
    Policy,
    Score,
    ScorerIdentity,
    Verdict,
)

__all__ = ["Calibration", "Gate"]

_COVERED = {
    *("score", "fusion", "novelty", "fingerprint", "structure", "dtype", "template"),
    *("scorer", "scorer_version", "scorer_settings", "conditions"),
}


Gate: TypeAlias = Literal["answer", "stream"]


class Calibration(BaseModel):
    """A fitted map from one score to the confidence that the answer is right. JSON in a file, never pickle.

    Args:
        score: which of the scores it reads; ``fused`` for the one that ``fusion`` makes.
        map: ``platt`` or ``isotonic``.
        intercept: a, of Platt's map.
        slope: b; positive, so that a higher score never means a higher confidence.
        table: of the isotonic map: (score, confidence), scores rising, confidences falling.
        fusion: the weights of the fused score.
        novelty: where the fused score has a probe, which answers are unlike anything that it learned from; they get no
            confidence and pass no certificate.
        fingerprint: of the model it was fitted on; also ``structure``, ``dtype`` and ``template``.
        scorer: name, version and settings of the scorer.
        conditions: how the answers were drawn, and how they ended.
        judge: who gave the labels; None where it was not said.
        examples: n, labelled answers used.
        correct: how many of them were right.
        data: hash of scores and labels.
        date: ISO, UTC; None where it was not said.
        gate: ``answer``: it reads whole answers; ``stream``: the greatest value over all beginnings of an answer that
            end with a sentence, by which a stream is let through.
        report: how good the confidences are on questions that they were not fitted on.
        certificates: for max_risk, smallest α first; their thresholds rise with α.
        infeasible: the α that were asked for and cannot be certified.
        on_average: thresholds that keep an error rate on average over calibration sets, smallest α first. They are
            no certificates, and no policy stands on them.
        reference: scores of first drafts, sorted and thinned, to notice drift by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[3] = 3
    score: str
    map: Kind = "platt"
    intercept: float | None = None
    slope: float | None = Field(None, gt=0)
    table: Table = ()
    fusion: Fusion | None = None
    novelty: Novelty | None = None
    fingerprint: str
    structure: str
    dtype: str
    template: str
    scorer: str
    scorer_version: str
    scorer_settings: dict[str, str]
    conditions: Conditions
    judge: str | None = None
    examples: int = Field(ge=2)
    correct: int = Field(ge=1)
    data: str
    date: str | None = None
    gate: Gate = "answer"
    report: FitReport | None = None
    certificates: tuple[Certificate, ...] = ()
    infeasible: tuple[Infeasible, ...] = ()
    on_average: tuple[OnAverage, ...] = ()
    reference: tuple[float, ...] = ()

    @field_validator("conditions", mode="before")
    @classmethod
    def _as_written(cls, given: object) -> Conditions:
        return given if isinstance(given, Conditions) else Conditions.from_json_dict(given)

    @field_serializer("conditions")
    def _in_plain(self, conditions: Conditions) -> dict[str, Any]:
        return conditions.to_json_dict()

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
        if self.novelty is not None and (self.fusion is None or self.fusion.probe is None):
            raise ValueError("novelty goes with a probe")
        if self.correct > self.examples:
            raise ValueError(f"{self.correct} of {self.examples} answers cannot be right")
        if strange := [each.id for each in self.certificates if each.data != self.data]:
            raise ValueError(f"the certificates {strange!r} are of other data than the calibration")
        if unbound := [each.id for each in self.certificates if each.covers != self.covered]:
            raise ValueError(f"the certificates {unbound!r} are of another model, scorer or conditions")
        if stray := [each.alpha for each in self.on_average if (each.data, each.covers) != (self.data, self.covered)]:
            raise ValueError(f"what is kept on average at {stray!r} is of other data or another model or scorer")
        named += [each.score for each in self.on_average]
        if odd := set(named) - {self.score}:
            raise ValueError(f"a certificate reads {sorted(odd)!r} and the calibration {self.score!r}")
        for first, later in zip(self.certificates, self.certificates[1:], strict=False):
            if not (first.alpha < later.alpha and first.threshold <= later.threshold):
                raise ValueError("certificates stand with α rising, and a smaller α never has the larger threshold")
            if first.policy != later.policy:
                raise ValueError("the certificates are of different policies")
        return self

    @property
    def covered(self) -> str:
        """Hash of what certificates cover besides the policy: model, scorer, the score that is read, conditions."""
        covered = _COVERED | ({"gate"} if self.gate != "answer" else set())
        plain = self.model_dump(mode="json", include=covered)
        if self.novelty is None:  # what is not there leaves the hash as it was before there was any
            del plain["novelty"]
        if plain["fusion"] is not None:
            plain["fusion"] = {
                name: each for name, each in plain["fusion"].items() if name != "why" and each is not None
            }
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def value(self, score: Score) -> float:
        """The number that is read: the higher, the less certain.

        Raises:
            CalibrationError: if the answer has no score, or not the one this was fitted on.
        """
        if self.fusion is not None:
            if score.status != "scored":
                raise CalibrationError(f"an answer that is {score.status!r} has no fused score")
            return self.fusion.score(score.scores, score.states)
        if self.score not in score.scores:
            raise CalibrationError(
                f"the calibration reads {self.score!r} and the answer has {sorted(score.scores)!r}",
                hint="use the scorer that it was fitted with",
            )
        if score.scores[self.score] < 0.0:
            raise CalibrationError(f"{self.score!r} is {score.scores[self.score]!r}, and it cannot be negative")
        return score.scores[self.score]

    def completed(self, score: Score) -> Score:
        """The score with what the probe said and how new the answer is among its numbers, for the record.

        Raises:
            CalibrationError: if these need the answer's states, and it has none.
        """
        parts = {} if score.status != "scored" else self._learned(score)
        return replace(score, scores={**score.scores, **parts}) if parts else score

    def _learned(self, score: Score) -> dict[str, float]:
        found = {}
        if self.fusion is not None and self.fusion.probe is not None and self.fusion.probe.name not in score.scores:
            found[self.fusion.probe.name] = self.fusion.probe.odds(score.states)
        if self.novelty is not None and self.novelty.name not in score.scores:
            found[self.novelty.name] = self.novelty.distance(score.states)
        return found

    def _new(self, score: Score) -> str:
        """Why nothing that was learned holds for this answer; empty if it does."""
        if self.novelty is None or score.status != "scored":
            return ""
        distance = score.scores[self.novelty.name]
        if distance <= self.novelty.limit:
            return ""
        return f"the answer is unlike anything labelled (novelty {distance:.2f}, limit {self.novelty.limit:.2f})"

    def confidence(self, score: Score) -> float:
        """Calibrated P(correct) in [0, 1].

        Raises:
            CalibrationError: if the answer has no score, or not the one this was fitted on.
        """
        return self._confidence(self.value(score))

    def _confidence(self, value: float) -> float:
        if self.map == "isotonic":
            return isotonic(value, self.table)
        assert self.intercept is not None and self.slope is not None  # _says_one_thing saw to it
        return platt(value, intercept=self.intercept, slope=self.slope)

    def verdict(
        self,
        score: Score,
        *,
        conditions: Conditions | None,
        certificates: Iterable[Certificate] = (),
        suspended: str = "",
        at_least: float = 0.0,
    ) -> Verdict:
        """What a score means.

        Args:
            score: of one answer; without numbers it gets no confidence and passes no certificate.
            conditions: how that answer was drawn and how it ended; None where nobody knows: no certificate covers it.
            certificates: those that hold here, see :meth:`covering`.
            suspended: why they do not hold at the moment; empty while they do.
            at_least: what is read is at least this: of a stream, the greatest value of any beginning so far.

        Raises:
            CalibrationError: if the answer has not the score that this was fitted on.
        """
        if conditions is None:
            ending, uncovered, cut = None, "it is not known how the answer was drawn", ""
        else:
            [ending] = conditions.endings
            uncovered, cut = self.conditions.lacks(conditions), self.conditions.cut(conditions)
        score = self.completed(score)
        cut = cut or self._new(score)
        bare = Verdict(score=score, suspended=suspended, finish_reason=ending, uncovered=cut or uncovered)
        if score.status != "scored":
            return bare
        value = max(self.value(score), at_least)  # also of a cut answer: a score that cannot be read is said first
        if cut:
            return bare
        sure = replace(bare, confidence=self._confidence(value))
        passed = sorted((each for each in certificates if value <= each.threshold), key=_alpha)
        if suspended or uncovered or not passed:
            return sure
        return replace(sure, max_risk=passed[0].alpha, certificate=passed[0].id)

    def covering(self, policy: Policy) -> tuple[Certificate, ...]:
        """The certificates that hold for what ``policy`` lets through.

        One of single drafts holds for a policy that makes no further attempts; every other one for the policy whose
        attempts were certified, which is known by its hash.
        """
        unnamed: str = getattr(policy, "unnamed", "")
        if not self.certificates or unnamed:
            return ()
        known = {policy_hash(policy), drafts_hash(policy)} | ({None} if not getattr(policy, "redraws", True) else set())
        return tuple(each for each in self.certificates if each.policy in known)

    def check(self, model: ModelIdentity, scorer: ScorerIdentity, policy: Policy | None = None) -> None:
        """Refuse the calibration of another model or scorer, and a policy whose ``max_risk`` no certificate keeps.

        Raises:
            CalibrationMismatch: naming everything that differs.
            CalibrationError: naming the nearest risk that could be had.
        """
        hint = "fit one for this model, template, dtype and scorer"
        refuse_others(self, model, scorer, what="the calibration", hint=hint)
        if self.certificates and any(each.covers != self.covered for each in self.certificates):
            raise CalibrationMismatch(
                "the calibration was changed after it was certified", hint="load it from its file, or certify it again"
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
        if self.on_average:
            looks += "; what it keeps on average is no certificate"
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
        return loaded(cls, path, named="certificates", part="certificate")


def _alpha(certificate: Certificate) -> float:
    return certificate.alpha
