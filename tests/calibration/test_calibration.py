"""Calibrations: both maps, what is kept with them, whom they serve, and a guard that stands on them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from hallucination_guard import Calibration, Guard
from hallucination_guard.calibration import FUSED, DriftMonitor, Labelled, calibrate
from hallucination_guard.calibration.certificate import drafts_hash
from hallucination_guard.calibration.report import report_of
from hallucination_guard.errors import CalibrationError, CalibrationMismatch, ConfigurationError, PolicyError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions, Score, Situation, Verdict
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    EscalateBelow,
    RetrieveBelow,
    RetryBelow,
    Unscored,
    Within,
    load_policy,
)

SCORED = ScriptedScorer(1.0)
PLAIN = Conditions.of(ScriptedModel("x").generate("Who?"))
RETRYING = RetryBelow(max_risk=0.3, times=1) | AbstainBelow(max_risk=0.3)


class Searched:
    identity = "five documents"

    def __call__(self, query: str) -> list[str]:
        return [query]


def row(id: str, value: float, correct: bool, **changes: Any) -> Labelled:
    settings: dict[str, Any] = {
        "id": id,
        "correct": correct,
        "judge": "made up",
        "scores": {"hybridgrad": value, "mean_nll": value**2},
        "length": 5,
        "model": ScriptedModel("x").identity,
        "scorer": SCORED.identity,
        "conditions": PLAIN,
    }
    return Labelled(**{**settings, **changes})


def answers(n: int = 400, seed: int = 0) -> list[Labelled]:
    """Scores uniform on [0, 1], and each wrong with the probability that its score is, squared."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    return [row(f"q{at}", float(each), bool(rng.random() > each**2)) for at, each in enumerate(scores)]


def attempts(n: int = 400, tries: int = 2, **changes: Any) -> list[Labelled]:
    rng = np.random.default_rng(5)
    return [
        row(f"q{at}", float(score), bool(rng.random() > score**2), attempt=attempt, **changes)
        for at in range(n)
        for attempt, score in enumerate(rng.random(tries), start=1)
    ]


def scored(value: float) -> Score:
    return Score(status="scored", scorer=SCORED.identity, scores={"hybridgrad": value, "mean_nll": value**2})


@pytest.fixture(scope="module")
def certified() -> Calibration:
    return calibrate(answers(1000), alphas=[0.1, 0.2, 0.3], date="2026-01-01")


# ------------------------------------------------------------------------------------------------------ the maps


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_confidence_never_rises_with_the_score(kind):
    fitted = calibrate(answers(), map=kind)
    found = [fitted.confidence(scored(value)) for value in np.linspace(0, 1.5, 200)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


def test_the_isotonic_map_comes_near_any_falling_truth():
    fitted = calibrate(answers(20_000), map="isotonic")
    found = [fitted.confidence(scored(value)) - (1 - value**2) for value in np.linspace(0.02, 0.98, 50)]
    assert np.abs(found).max() < 0.06


def test_the_isotonic_map_is_never_certain():
    fitted = calibrate([row(f"q{at}", at + 1.0, at < 30) for at in range(60)], map="isotonic")
    assert 0.9 < fitted.confidence(scored(1.0)) < 1.0 and 0.0 < fitted.confidence(scored(60.0)) < 0.1


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_a_score_that_knows_nothing_gets_no_map(kind):
    falling = [row(f"q{at}", float(at + 1), at >= 30) for at in range(60)]
    with pytest.raises(CalibrationError, match="does not rise with being wrong"):
        calibrate(falling, map=kind)


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
@pytest.mark.parametrize("name", ["hybridgrad", FUSED])
def test_it_survives_its_file(tmp_path, kind, name):
    fitted = calibrate(answers(), map=kind, score=name, alphas=[0.3])
    fitted.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == fitted


def test_the_shipped_one_says_what_it_covers():
    shipped = Calibration.of_demo()
    assert (shipped.schema_version, shipped.map, shipped.conditions.max_new_tokens) == (3, "platt", 24)
    assert shipped.conditions.endings == ("length", "stop")


@pytest.mark.parametrize(
    "change",
    [
        {"intercept": None},
        {"slope": -1.0},
        {"map": "isotonic"},
        {"table": ((0.0, 0.5), (1.0, 0.4))},
        {"score": "fused"},
        {"map": "isotonic", "intercept": None, "slope": None, "table": ((0.0, 0.4), (1.0, 0.5))},
        {"map": "isotonic", "intercept": None, "slope": None, "table": ((1.0, 0.5), (0.0, 0.4))},
        {"map": "isotonic", "intercept": None, "slope": None, "table": ((0.0, 1.5), (1.0, 0.4))},
        {"schema_version": 2},
        {"conditions": None},
        {"conditions": {"frame": "f", "endings": ["stop"]}},
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(tmp_path, change):
    plain = calibrate(answers()).model_dump(mode="json")
    (tmp_path / "c.json").write_text(json.dumps({**plain, **change}))
    with pytest.raises(CalibrationError, match="is not valid"):
        Calibration.load(tmp_path / "c.json")


def test_a_changed_certificate_in_a_file_is_refused(tmp_path, certified):
    plain = certified.model_dump(mode="json")
    plain["certificates"][0]["errors"] = 0
    (tmp_path / "c.json").write_text(json.dumps(plain))
    with pytest.raises(CalibrationError, match=r"certificates\.0.*content has the hash"):
        Calibration.load(tmp_path / "c.json")


def test_a_certificate_in_a_file_has_to_bring_its_id(tmp_path, certified):
    plain = certified.model_dump(mode="json")
    plain["certificates"][0] |= {"id": "", "threshold": plain["certificates"][0]["threshold"] / 2}
    (tmp_path / "c.json").write_text(json.dumps(plain))
    with pytest.raises(CalibrationError, match="has no id"):
        Calibration.load(tmp_path / "c.json")


def test_a_certificate_of_another_calibration_is_refused(certified):
    other = calibrate(answers(1000, seed=1), alphas=[0.3], date="2026-01-01")
    with pytest.raises(ValueError, match="other data than the calibration"):
        Calibration(**{**certified.model_dump(), "certificates": other.certificates})


def test_more_right_answers_than_answers_are_refused(certified):
    with pytest.raises(ValueError, match="cannot be right"):
        Calibration(**{**certified.model_dump(), "correct": certified.examples + 1})


def test_certificates_out_of_order_are_refused(certified):
    with pytest.raises(ValueError, match="rising"):
        Calibration(**{**certified.model_dump(), "certificates": certified.certificates[::-1]})


# ---------------------------------------------------------------------------------------------------- the report


def test_the_report_is_the_closed_form():
    confidences, correct = np.array([0.2] * 50 + [0.8] * 50), np.array([0.0] * 30 + [1.0] * 20 + [1.0] * 50)
    found = report_of(confidences, correct, folds=5)
    assert found.brier == pytest.approx(brier_score_loss(correct, confidences))
    assert sum(each.answers for each in found.bins) == 100


def test_of_true_probabilities_the_calibration_error_is_small_and_of_wrong_ones_large():
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    correct = (rng.random(50_000) < p).astype(float)
    assert report_of(p, correct, folds=5).ece < 0.02 < 0.4 < report_of(1 - p, correct, folds=5).ece


def test_the_report_is_about_questions_that_were_left_out():
    """An isotonic table follows random labels on its own answers; on others it does no better than the base rate."""
    rng = np.random.default_rng(1)
    rows = [row(f"q{at}", float(rng.random()), bool(rng.random() < 0.5)) for at in range(200)]
    try:
        report = calibrate(rows, map="isotonic").report
    except CalibrationError:  # flat: also an answer
        return
    assert report is None or report.brier > 0.24


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"judge": "other"}, "different judges"),
        ({"policy": "p"}, "different policies"),
        ({"model": replace(ScriptedModel("x").identity, fingerprint="another")}, "different models"),
        ({"scorer": ScriptedScorer(1.0, settings={"a": "b"}).identity}, "different scorers"),
    ],
)
def test_what_was_mixed_is_refused(change, words):
    with pytest.raises(CalibrationError, match=words):
        calibrate([*answers(), row("odd", 0.5, True, **change)])


def test_the_same_attempt_twice_is_refused():
    with pytest.raises(CalibrationError, match="'q0'"):
        calibrate([*answers(), row("q0", 0.5, True)])


def test_attempts_without_a_policy_are_refused():
    with pytest.raises(CalibrationError, match="which policy"):
        calibrate(attempts())


def test_attempts_that_ended_because_one_passed_can_not_be_certified():
    rows = [each for each in attempts(policy="p") if (each.id, each.attempt) != ("q7", 2)]
    with pytest.raises(CalibrationError, match=r"'q7' has 1 attempts and others have 2.*confidence: 1"):
        calibrate(rows, alphas=[0.3])


@pytest.mark.parametrize("policy", [RETRYING, None])
def test_first_drafts_that_all_passed_certify_nothing_for_a_policy_that_draws_again(policy):
    rows = [replace(each, policy=drafts_hash(RETRYING)) for each in answers()]
    with pytest.raises(CalibrationError, match="none is a second attempt"):
        calibrate(rows, alphas=[0.3], policy=policy)


def test_an_unknown_score_is_refused_with_those_that_there_are():
    with pytest.raises(CalibrationError, match=r"'semgrad'.*hybridgrad, mean_nll"):
        calibrate(answers(), score="semgrad")


def test_too_few_answers_are_refused():
    with pytest.raises(CalibrationError, match="at least 20"):
        calibrate(answers(19))


# ------------------------------------------------------------------------------------------------- certificates


def test_the_true_risk_below_a_certified_threshold_is_what_was_promised(certified):
    """P(wrong | score ≤ λ) is λ²/3 here."""
    assert [each.alpha for each in certified.certificates] == [0.1, 0.2, 0.3]
    assert all(min(each.threshold, 1.0) ** 2 / 3 <= each.alpha + 0.01 for each in certified.certificates)


@pytest.mark.parametrize("name", ["hybridgrad", FUSED])
def test_the_promise_holds_from_the_labelled_rows_to_the_calibration(name):
    """60 calibrations of 150 answers each; the truth is looked up in 4,000 others."""
    truth = answers(4000, seed=10_000)
    wrong = np.array([not each.correct for each in truth])
    broken = 0
    for seed in range(60):
        fitted = calibrate(answers(150, seed=seed), score=name, alphas=[0.2])
        for found in fitted.certificates:
            read = fitted.fusion.score if fitted.fusion else lambda scores: scores[name]
            passed = np.array([read(each.scores) <= found.threshold for each in truth])
            broken += wrong[passed].mean() > 0.2
    assert broken / 60 <= 0.1 + 3 * math.sqrt(0.09 / 60)


def test_what_is_infeasible_is_kept_with_its_hint():
    fitted = calibrate(answers(), alphas=[0.001, 0.3])
    assert [each.alpha for each in fitted.infeasible] == [0.001] and 0.001 < fitted.infeasible[0].nearest < 0.3


def test_an_unscorable_answer_counts_as_a_question_that_is_not_answered():
    lost = [row(f"lost{at}", 0.0, False, scores={}, reason="empty") for at in range(400)]
    fitted = calibrate([*answers(), *lost], alphas=[0.4])
    assert fitted.certificates[0].n == 760 and fitted.certificates[0].coverage < 0.65


def test_fused_weights_see_only_the_fit_part(certified):
    """Labels of the test part turned round must not move a weight."""
    from hallucination_guard.calibration.certificate import FIT_SHARE_FUSED, split

    rows = answers()
    _, test = split([each.id for each in rows], share=FIT_SHARE_FUSED)
    turned = [
        row(each.id, each.scores["hybridgrad"], not each.correct if each.id == min(test) else each.correct)
        for each in rows
    ]
    one, other = (calibrate(each, score=FUSED, alphas=[0.3]) for each in (rows, turned))
    assert one.fusion == other.fusion and one.intercept != other.intercept


def test_a_fused_calibration_reads_all_signals_of_a_score():
    fitted = calibrate(answers(), score=FUSED)
    score = Score(
        status="scored",
        scorer=SCORED.identity,
        scores={"hybridgrad": 0.5, "mean_nll": 0.25},
        token_logprobs=(-1.0,) * 5,
    )
    assert fitted.fusion is not None
    assert fitted.value(score) == fitted.fusion.score(score.scores)
    missing = fitted.fusion.signals[0]
    with pytest.raises(CalibrationError, match=missing):
        fitted.confidence(replace(score, scores={"other": 1.0}))


def test_the_reference_is_of_first_drafts_and_thinned():
    fitted = calibrate(answers(2000))
    assert len(fitted.reference) == 512 and list(fitted.reference) == sorted(fitted.reference)
    assert np.median(fitted.reference) == pytest.approx(
        np.median([each.scores["hybridgrad"] for each in answers(2000)]), abs=0.01
    )


def test_a_verdict_has_the_smallest_risk_that_lets_it_through(certified):
    low, middle, high = (each.threshold for each in certified.certificates)
    found = [
        certified.verdict(scored(value), conditions=PLAIN, certificates=certified.certificates).max_risk
        for value in (low, math.nextafter(low, 2), middle, high, high + 1)
    ]
    assert found == [0.1, 0.2, 0.2, 0.3, None]


def test_a_suspended_certificate_lets_nothing_through(certified):
    found = certified.verdict(scored(0.0), conditions=PLAIN, certificates=certified.certificates, suspended="drift")
    assert (found.max_risk, found.certificate, found.suspended) == (None, None, "drift")
    assert found.confidence is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_risk": 0.1},
        {"certificate": "c"},
        {"max_risk": 0.0, "certificate": "c"},
        {"max_risk": math.nan, "certificate": "c"},
        {"max_risk": 0.1, "certificate": "c", "suspended": "drift"},
    ],
)
def test_a_verdict_that_can_not_be_is_refused(settings):
    with pytest.raises(ValueError):
        Verdict(score=scored(0.1), **settings)


# -------------------------------------------------------------------------------------------------- in a guard


def guard(policy: Any, calibration: Any, values: Any = 0.1, answer: Any = "Lyon", **settings: Any) -> Guard:
    return Guard(
        ScriptedModel(answer), policy=policy, scorer=ScriptedScorer(values), calibration=calibration, **settings
    )


def test_a_certified_answer_leaves_with_its_certificate(certified):
    sink = MemorySink()
    outcome = guard(AbstainBelow(max_risk=0.1), certified, audit=sink)("Capital?")
    assert outcome.text == "Lyon" and outcome.verdict.max_risk == 0.1
    assert sink.records[0].certificate == certified.certificates[0].id
    assert "certified risk 0.10 ≤ 0.10" in sink.records[0].reason


def test_one_above_the_threshold_does_not(certified):
    outcome = guard(AbstainBelow(max_risk=0.1), certified, 0.99)("Capital?")
    assert outcome.text is None and "no certified threshold" in outcome.decision.reason


def test_a_risk_between_two_certificates_is_served_by_the_stricter(certified):
    value = certified.certificates[1].threshold
    assert guard(AbstainBelow(max_risk=0.25), certified, value)("Capital?").text == "Lyon"
    assert guard(AbstainBelow(max_risk=0.15), certified, value)("Capital?").text is None


def test_an_uncertified_risk_is_refused_with_the_nearest(certified):
    with pytest.raises(CalibrationError, match=r"max_risk 0.05, and the smallest risk certified is 0.1"):
        guard(AbstainBelow(max_risk=0.05), certified)


def test_without_certificates_it_is_refused_with_what_looks_feasible():
    bare = calibrate(answers(), alphas=[0.001])
    with pytest.raises(CalibrationError, match=rf"nearest that looks feasible is {bare.infeasible[0].nearest}"):
        guard(AbstainBelow(max_risk=0.001), bare)


def test_without_a_calibration_it_is_refused():
    with pytest.raises(ConfigurationError, match="no calibration"):
        guard(AbstainBelow(max_risk=0.1), None)


@pytest.mark.parametrize(
    "policy",
    [
        RETRYING,
        RetrieveBelow(max_risk=0.3, retriever=Searched()),
        Within(RETRYING),
        Unscored(EscalateBelow(max_risk=0.3) | RetryBelow(max_risk=0.3)),
    ],
)
def test_a_certificate_of_single_drafts_does_not_serve_a_policy_that_draws_again(certified, policy):
    with pytest.raises(CalibrationMismatch, match="single drafts, and the policy makes further attempts"):
        guard(policy, certified)


def test_it_serves_one_that_escalates(certified):
    assert guard(EscalateBelow(max_risk=0.1), certified)("Capital?").text == "Lyon"


def test_a_certificate_of_attempts_serves_the_policy_that_made_them():
    collecting = RetryBelow(confidence=1.0, times=1) | AbstainBelow(confidence=1.0)
    fitted = calibrate(attempts(800, policy=drafts_hash(collecting)), alphas=[0.3], policy=collecting)
    outcome = guard(RETRYING, fitted, [0.99, 0.1], ["Lyon", "Paris"])("Capital?")
    assert (outcome.text, outcome.verdict.max_risk, outcome.attempts) == ("Paris", 0.3, 2)
    with pytest.raises(CalibrationMismatch, match="no certificate covers"):
        guard(RetryBelow(max_risk=0.3, times=2), fitted)
    with pytest.raises(CalibrationMismatch, match="no certificate covers"):
        guard(AbstainBelow(max_risk=0.3), fitted)


def test_a_policy_that_draws_again_without_saying_so_gets_no_certificate_for_the_second(certified):
    class Sly:
        redraws = False

        def __call__(self, verdict: Verdict, situation: Situation) -> Any:
            return (RetryBelow if situation.attempt == 1 else AbstainBelow)(max_risk=0.1)(verdict, situation)

        def describe(self) -> Any:
            return {"policy": "Sly"}

    outcome = guard(Sly(), certified, [0.99, 0.01], ["Lyon", "Paris"])("Capital?")
    assert outcome.text is None and outcome.verdict.max_risk is None


@pytest.mark.parametrize(
    "policy",
    [
        AbstainBelow(max_risk=0.3) | EscalateBelow(confidence=0.5),
        AbstainBelow(max_risk=0.3) | EscalateBelow(max_risk=0.1),
        AbstainBelow(max_risk=0.3) & Accept(),
        AbstainBelow(max_risk=0.3) & AbstainBelow(confidence=0.5),
        Unscored(AbstainBelow(max_risk=0.3), on_unscorable="accept"),
        Within(Unscored(AbstainBelow(max_risk=0.3), on_error="accept")),
        RetryBelow(max_risk=0.3) | Accept(),
        Within(RetryBelow(max_risk=0.3) | Accept()),
        (RetryBelow(max_risk=0.3) | Accept()) & AbstainBelow(max_risk=0.3),
        (RetryBelow(max_risk=0.3) & RetryBelow(max_risk=0.3, name="again")) | Accept(),
    ],
)
def test_a_policy_that_lets_through_what_is_not_certified_is_refused(certified, policy):
    with pytest.raises(PolicyError, match=r"beside max_risk 0\.[13]"):
        guard(policy, certified)


def test_what_the_floor_accepts_is_certified_where_a_rule_before_it_is_never_spent(certified):
    running = guard(AbstainBelow(max_risk=0.3) | Accept(), certified, 0.99)
    assert running("Capital?").text is None


def test_a_calibration_that_is_exchanged_under_another_policy_is_watched_with_its_own_reference(certified):
    running = guard(AbstainBelow(max_risk=0.3), certified)
    running("Capital?")
    running.policy = RetryBelow(confidence=0.1)
    running.calibration = Calibration(**{**certified.model_dump(), "reference": [5.0 + at for at in range(100)]})
    running("Capital?")
    running.policy = AbstainBelow(max_risk=0.3)
    running("Capital?")
    assert running.drift.reference == running.calibration.reference


def test_a_policy_that_is_exchanged_later_is_checked_as_well(certified):
    running = guard(AbstainBelow(max_risk=0.3), certified)
    running.policy = AbstainBelow(max_risk=0.3) & Accept()
    with pytest.raises(PolicyError, match="beside max_risk"):
        running("Capital?")


@pytest.mark.parametrize("policy", [RETRYING, Within(RETRYING), Unscored(RETRYING), RETRYING | Accept()])
def test_the_needed_risk_is_known_through_every_composition(policy):
    assert (policy.needs_risk, policy.redraws, policy.uncertified) == (0.3, True, "")


def test_a_policy_without_risk_needs_none():
    policy = EscalateBelow(confidence=0.5) | AbstainBelow(confidence=0.4)
    assert (policy.needs_risk, policy.redraws, policy.uncertified) == (None, False, "")


@pytest.mark.parametrize("rule", ["abstain", "retry", "escalate", "retrieve"])
def test_a_document_can_say_it_for_every_rule(rule):
    document = {"id": "p", "version": 1, "rules": [{rule: {"below": {"max_risk": 0.1}}}]}
    policy = load_policy(document, retriever=Searched())
    assert policy.needs_risk == 0.1 and policy.uncertified == "" and not policy.needs_confidence


@pytest.mark.parametrize("below", [{}, {"confidence": 0.5, "max_risk": 0.1}, {"max_risk": 1.0}, {"max_risk": 0.0}])
def test_a_document_says_exactly_one_number_in_range(below):
    with pytest.raises(PolicyError, match="below"):
        load_policy({"id": "p", "version": 1, "rules": [{"abstain": {"below": below}}]})


@pytest.mark.parametrize("value", [0.0, 1.0, 1, -0.1, math.nan, True, "0.1"])
def test_a_risk_out_of_range_is_refused(value):
    with pytest.raises(PolicyError, match="max_risk is"):
        AbstainBelow(max_risk=value)


# -------------------------------------------------------------------------------------------------------- drift


def test_after_drift_nothing_is_certified_and_the_record_says_why(certified, caplog):
    sink = MemorySink()
    running = guard(
        AbstainBelow(max_risk=0.3), certified, 0.01, audit=sink, drift=DriftMonitor(certified.reference, window=20)
    )
    outcomes = [running("Capital?") for _ in range(25)]
    assert [each.text is not None for each in outcomes] == [True] * 19 + [False] * 6
    last = sink.records[-1]
    assert last.certificate is None and last.rule == "suspended" and "the certificate is suspended: " in last.reason
    assert [each.levelname for each in caplog.records if "guard.drift" in each.message] == ["WARNING"]


def test_a_guard_with_certificates_watches_by_itself(certified):
    assert guard(AbstainBelow(max_risk=0.3), certified).drift is not None
    assert guard(AbstainBelow(confidence=0.3), calibrate(answers())).drift is None


def test_scores_like_the_calibrations_raise_no_alarm(certified):
    rng = np.random.default_rng(9)
    running = guard(AbstainBelow(max_risk=0.3), certified, [float(each) for each in rng.random(300)])
    for _ in range(300):
        running("Capital?")
    assert running.drift is not None and running.drift.tests == 3 and not running.drift.suspended


def test_a_new_calibration_is_watched_afresh(certified):
    running = guard(AbstainBelow(max_risk=0.3), certified, 0.01, drift=DriftMonitor(certified.reference, window=10))
    for _ in range(10):
        running("Capital?")
    assert running("Capital?").text is None
    running.calibration = calibrate(answers(1000, seed=1), alphas=[0.3])
    assert running("Capital?").text == "Lyon"


@pytest.mark.parametrize("policy", [AbstainBelow(max_risk=0.3), RETRYING, EscalateBelow(max_risk=0.3)])
def test_while_suspended_no_rule_acts_but_to_abstain(policy):
    decision = policy(Verdict(score=scored(0.1), suspended="it drifted"), Situation())
    assert (decision.action, decision.rule) == ("abstain", "suspended") and "it drifted" in decision.reason
