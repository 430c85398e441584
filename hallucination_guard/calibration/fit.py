"""Fitting: labelled answers become a confidence map, certified thresholds, and what is needed to notice drift."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hallucination_guard.calibration.calibration import Calibration, Gate
from hallucination_guard.calibration.certificate import (
    Certificate,
    Drafts,
    Infeasible,
    certify,
    design,
    drafts_hash,
    policy_hash,
    split,
)
from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.forecast import with_needed
from hallucination_guard.calibration.fusion import FUSED, Fusion, cross_fitted, fit_fusion
from hallucination_guard.calibration.gate import refuse_whole_only, value_of, watched_value, written
from hallucination_guard.calibration.labelled import Labelled
from hallucination_guard.calibration.maps import Kind, fit_map
from hallucination_guard.calibration.novelty import Novelty, fit_novelty
from hallucination_guard.calibration.on_average import keep_on_average
from hallucination_guard.calibration.population import Population, Ranked, Resampled, Sample
from hallucination_guard.calibration.ranking import auroc
from hallucination_guard.calibration.report import FitReport, report_of
from hallucination_guard.calibration.stack import fit_fused
from hallucination_guard.errors import CalibrationError, CalibrationMismatch
from hallucination_guard.values import (
    LOWER_IS_LESS_CERTAIN,
    Conditions,
    Generation,
    ModelIdentity,
    Policy,
    Score,
    ScorerIdentity,
)

__all__ = ["calibrate", "fit_calibration", "sampled"]

_LEAST = 20
_FOLDS = 5
_REFERENCE = 512


def fit_calibration(
    scores: Sequence[Score],
    correct: Sequence[bool],
    *,
    generations: Sequence[Generation],
    score: str | None = None,
) -> Calibration:
    """Fit a confidence map of Platt's kind, without certificates; :func:`calibrate` does all at once.

    Args:
        scores: of labelled answers of one model by one scorer; what could not be scored is left out.
        correct: whether each answer was right.
        generations: those answers.
        score: which score to read; the scorer's own by default.

    Raises:
        CalibrationError: if there are too few answers, only right or only wrong ones, or if right answers do not
            score lower than wrong ones: then this score knows nothing here, and no confidence is made of it.
        MissingExtra: if scikit-learn is not installed.
    """
    triples = zip(scores, correct, generations, strict=True)
    answers = [(each, bool(right), made) for each, right, made in triples if each.status == "scored"]
    pairs, labels = [(each, right) for each, right, _ in answers], [right for _, right, _ in answers]
    _refuse_too_few(labels)
    identities = {json.dumps(_plain(each.scorer), sort_keys=True) for each, _ in pairs}
    if len(identities) > 1:
        raise CalibrationError("the answers were scored by different scorers", hint="score all with one scorer")
    if len({_model_of(made.model) for _, _, made in answers}) > 1:
        raise CalibrationError("the answers are of different models", hint="calibrate on answers of one model")
    scorer, model = pairs[0][0].scorer, answers[0][2].model
    conditions = _together(Conditions.of(made) for _, _, made in answers)
    score = score or scorer.name
    if score in LOWER_IS_LESS_CERTAIN or any(score not in each.scores for each, _ in pairs):
        raise CalibrationError(f"{score!r} cannot be calibrated on", hint="a score that rises with doubt")
    values = [each.scores[score] for each, _ in pairs]
    return Calibration(
        score=score,
        **fit_map(values, labels, kind="platt", name=score),
        **_bound_to(model, scorer, conditions),
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
    on_average: Iterable[float] = (),
    delta: float = 0.1,
    policy: Policy | None = None,
    gate: Gate = "answer",
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
        on_average: error rates to keep on average over calibration sets, which is no certificate; single drafts only.
        delta: the probability with which a certificate may fail.
        policy: that drew these attempts; None for single drafts, or where the rows name it.
        gate: ``answer``, or ``stream``: what is read of an answer is then the greatest value over all its beginnings,
            by which a stream is let through; of single drafts only.
        share: of the questions in the fit part; by default .2, for the fused score .4, and .05 where there are
            questions enough for fixed starts, which a share given here rules out.
        seed: of the split.
        date: ISO; today by default.

    Raises:
        CalibrationError: if the answers cannot be used together, are too few, or the score knows nothing here.
        ConfigurationError: on an α or δ out of range.
        MissingExtra: if scikit-learn is not installed.
    """
    covered = _one_origin(answers, policy)
    if gate == "stream":
        refuse_whole_only(answers, covered)
    alphas, means = tuple(alphas), tuple(on_average)
    if means:
        _refuse_several(answers, covered)
    if alphas and (unnamed := getattr(policy, "unnamed", "")):
        raise CalibrationError(f"{unnamed}, so nothing can be certified of it", hint="give the rule a corpus")
    name = score or answers[0].scorer.name
    date = date or datetime.now(UTC).date().isoformat()
    sequences = _sequences(answers)
    spread = False
    if share is None:
        share, spread = design(len(sequences), fused=name == FUSED)
    if not 0.0 < share < 1.0:
        raise CalibrationError(f"share is {share!r}", hint="give a share above 0 and below 1")
    fit_ids, test_ids = split(sequences, share=share, seed=seed)
    scored = [each for each in answers if each.status == "scored"]
    _refuse_too_few([each.correct for each in scored])
    kept_apart = fit_ids if alphas or means else frozenset()
    fusion, mapped, values = _values(scored, name, kept_apart, gate)
    novelty = _novelty(scored, fusion, kept_apart)
    labels = [each.correct for each in mapped]
    _refuse_too_few(labels)
    parameters = fit_map(values, labels, kind=map, name=name)
    ids = [each.id for each in mapped]
    data = _hash(sorted(written(each, gate) for each in answers))
    first = sorted(
        watched_value(each, value, name, fusion, gate)
        for value, each in zip(values, mapped, strict=True)
        if each.attempt == 1
    )
    calibration = Calibration(
        score=name,
        map=map,
        **parameters,
        fusion=fusion,
        novelty=novelty,
        **_bound_to(answers[0].model, answers[0].scorer, _together(each.conditions for each in scored)),
        judge=answers[0].judge,
        examples=len(mapped),
        correct=sum(labels),
        data=data,
        date=date,
        gate=gate,
        report=_report(values, labels, ids, kind=map, name=name),
        reference=_thinned(first),
    )
    if means:
        kept = keep_on_average(
            values,
            labels,
            alphas=means,
            questions=len(test_ids if fusion else sequences),
            score=name,
            covers=calibration.covered,
            data=data,
            date=date,
        )
        calibration = _with(calibration, on_average=kept)
    if not alphas:
        return calibration
    _refuse_cut_short(sequences, several=covered is not None)
    parts = [_drafts(sequences, part, name, fusion, novelty, gate) for part in (fit_ids, test_ids)]
    found = certify(
        *parts,
        alphas=alphas,
        delta=delta,
        score=name,
        policy=covered,
        covers=calibration.covered,
        data=data,
        date=date,
        spread=spread,
    )
    infeasible = [each for each in found if isinstance(each, Infeasible)]
    if infeasible:
        sample = _sample(sequences, mapped, values, name, fusion, gate)
        infeasible = [with_needed(each, sample.population, fused=name == FUSED, seed=seed) for each in infeasible]
    certificates = tuple(each for each in found if isinstance(each, Certificate))
    return _with(calibration, certificates=certificates, infeasible=tuple(infeasible))


def sampled(
    answers: Sequence[Labelled], *, score: str | None = None, policy: Policy | None = None, gate: Gate = "answer"
) -> Sample:
    """Read labelled answers as :func:`calibrate` does, but certify nothing and fit no map.

    Raises:
        CalibrationError: if the answers cannot be used together or are too few.
    """
    covered = _one_origin(answers, policy)
    if gate == "stream":
        refuse_whole_only(answers, covered)
    name = score or answers[0].scorer.name
    sequences = _sequences(answers)
    _refuse_cut_short(sequences, several=covered is not None)
    scored = [each for each in answers if each.status == "scored"]
    _refuse_too_few([each.correct for each in scored])
    fusion, mapped, values = _values(scored, name, frozenset(), gate)
    return _sample(sequences, mapped, values, name, fusion, gate)


def _sample(
    sequences: Mapping[str, Sequence[Labelled]],
    mapped: Sequence[Labelled],
    values: Sequence[float],
    name: str,
    fusion: Fusion | None,
    gate: Gate,
) -> Sample:
    """Single drafts by their scores, further attempts by their sequences."""
    wrong = [not each.correct for each in mapped]
    population: Population
    if max(map(len, sequences.values())) == 1:
        scored = sum(rows[0].status == "scored" for rows in sequences.values())
        population = Ranked.of(values, wrong, scored=scored / len(sequences))
    else:
        read = _reader(name, fusion, None, gate)
        population = Resampled.of([[read(each) for each in rows] for rows in sequences.values()])
    return Sample(
        population=population,
        score=name,
        labels=len(sequences),
        wrong=sum(wrong) / len(wrong),
        auroc=auroc(values, wrong),
    )


def _with(calibration: Calibration, **changes: Any) -> Calibration:
    plain = {name: getattr(calibration, name) for name in Calibration.model_fields}
    return Calibration(**{**plain, **changes})


def _refuse_several(answers: Sequence[Labelled], covered: str | None) -> None:
    """The proof wants an answer right or wrong at every threshold; of several attempts now one, now another counts."""
    if covered is not None or any(each.attempt > 1 for each in answers):
        raise CalibrationError(
            "an error rate on average is kept for single drafts, and these are of a policy that makes further attempts",
            hint="leave out --on-average, or label the answers of a policy that only abstains",
        )


def _one_origin(answers: Sequence[Labelled], policy: Policy | None) -> str | None:
    """The hash that the certificates carry; what was mixed is refused."""
    if not answers:
        raise CalibrationError("there are no answers to calibrate on", hint="evaluate writes labelled answers")
    for what, kinds in (
        ("judges", {each.judge for each in answers}),
        ("models", {_model_of(each.model) for each in answers}),
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


def _drafts(
    sequences: Mapping[str, Sequence[Labelled]],
    part: frozenset[str],
    name: str,
    fusion: Fusion | None,
    novelty: Novelty | None,
    gate: Gate,
) -> Drafts:
    """The attempts of one part of the questions: of each its score, if it has one, and its label."""
    read = _reader(name, fusion, novelty, gate)
    return Drafts.of([read(each) for each in rows] for id, rows in sequences.items() if id in part)


def _reader(
    name: str, fusion: Fusion | None, novelty: Novelty | None, gate: Gate
) -> Callable[[Labelled], tuple[float | None, bool]]:
    def read(each: Labelled) -> tuple[float | None, bool]:
        if each.status != "scored" or (novelty is not None and novelty.distance(each.states) > novelty.limit):
            return None, each.correct
        return value_of(each, name, fusion, gate), each.correct

    return read


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
    scored: Sequence[Labelled], name: str, fit_ids: frozenset[str], gate: Gate
) -> tuple[Fusion | None, Sequence[Labelled], list[float]]:
    """The weights if there are any, the answers that the map may be fitted on, and their scores."""
    if name != FUSED:
        if name in LOWER_IS_LESS_CERTAIN or any(name not in each.scores for each in scored):
            raise CalibrationError(
                f"{name!r} cannot be calibrated on",
                hint=f"give 'fused', or a score that rises with doubt, of {', '.join(sorted(scored[0].scores))}",
            )
        return None, scored, [value_of(each, name, None, gate) for each in scored]
    fit = fit_fusion if gate == "stream" else fit_fused  # of beginnings no states are kept
    if not fit_ids:  # nothing has to be kept apart: the map is fitted on scores whose weights never saw the answer
        values = cross_fitted(scored, _FOLDS, fit=fit, read=lambda each, fusion: value_of(each, name, fusion, gate))
        return fit(scored), scored, values
    fusion = fit([each for each in scored if each.id in fit_ids])
    rest = [each for each in scored if each.id not in fit_ids]
    return fusion, rest, [value_of(each, name, fusion, gate) for each in rest]


def _refuse_too_few(labels: Sequence[bool]) -> None:
    if len(labels) < _LEAST or len(set(labels)) < 2:
        raise CalibrationError(
            f"{len(labels)} scored answers of which {sum(labels)} right cannot be calibrated on",
            hint=f"give at least {_LEAST} labelled answers, right and wrong ones",
        )


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
            parameters = fit_map([values[at] for at in outside], kept, kind=kind, name=name)
        except CalibrationError:  # without this fold the score knows nothing: there is nothing to report on
            return None
        bare = Calibration.model_construct(map=kind, **parameters)
        confidences[inside] = [bare._confidence(values[at]) for at in inside]
    return report_of(confidences, np.array(labels, float), folds=_FOLDS)


def _thinned(scores: Sequence[float]) -> tuple[float, ...]:
    """At most 512 of the sorted scores, evenly; fewer make the test of drift milder, never harsher."""
    if len(scores) <= _REFERENCE:
        return tuple(scores)
    return tuple(scores[int((at + 0.5) * len(scores) / _REFERENCE)] for at in range(_REFERENCE))


def _model_of(model: ModelIdentity) -> tuple[str, ...]:
    return (model.fingerprint, model.structure, model.dtype, model.template)


def _together(each: Iterable[Conditions]) -> Conditions:
    try:
        return Conditions.together(each)
    except ValueError as error:
        raise CalibrationError(str(error), hint="calibrate on answers that were drawn alike") from None


def _bound_to(model: ModelIdentity, scorer: ScorerIdentity, conditions: Conditions) -> dict[str, Any]:
    return {
        "conditions": conditions,
        "fingerprint": model.fingerprint,
        "structure": model.structure,
        "dtype": model.dtype,
        "template": model.template,
        "scorer": scorer.name,
        "scorer_version": scorer.version,
        "scorer_settings": dict(scorer.settings),
    }


def _hash(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _plain(scorer: ScorerIdentity) -> dict[str, Any]:
    return {"name": scorer.name, "version": scorer.version, "settings": dict(scorer.settings)}


def _novelty(scored: Sequence[Labelled], fusion: Fusion | None, fit_ids: frozenset[str]) -> Novelty | None:
    """Where a probe is read, also what it cannot have learned about; certificates' questions take no part in either."""
    if fusion is None or fusion.probe is None:
        return None
    own = [each for each in scored if not fit_ids or each.id in fit_ids]
    states = [each.states for each in own if each.states is not None]
    return fit_novelty(states, [each.id for each in own])
