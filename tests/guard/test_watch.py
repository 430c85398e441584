"""A guard that is watched: an alarm suspends its certificates as drift does, and nothing lifts that in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Calibration, Guard
from hallucination_guard.audit import AuditLog, RiskWatch, draw_sample, label, labels_path, read_sample, records
from hallucination_guard.calibration import Certificate, DriftMonitor, RiskTest
from hallucination_guard.errors import CalibrationError, ConfigurationError
from hallucination_guard.guard import Steps
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Call, Conditions, Watch
from hallucination_guard_policies import AbstainBelow

REFERENCE = tuple(0.01 * at for at in range(100))


def calibration(alpha: float = 0.2, **changes: Any) -> Calibration:
    """One whose certificate lets everything through up to the score 1."""
    plain: dict[str, Any] = {
        "score": "hybridgrad", "intercept": 0.0, "slope": 1.0, "fingerprint": "scripted", "structure": "",
        "conditions": Conditions.of(ScriptedModel("x").generate("Who?")), "dtype": "float32",
        "template": "none", "scorer": "hybridgrad", "scorer_version": "scripted", "scorer_settings": {},
        "examples": 20, "correct": 10, "data": "none", "reference": REFERENCE, **changes,
    }  # fmt: skip
    bare = Calibration(**plain)
    certificate = Certificate(
        alpha=alpha,
        delta=0.1,
        score="hybridgrad",
        threshold=1.0,
        covers=bare.covered,
        n=100,
        answered=90,
        errors=5,
        bound=alpha / 2 + 0.05,
        fitted=20,
        data="none",
        date="2026-01-01",
    )
    return Calibration(**plain, certificates=(certificate,))


def guard(watch: Any, **settings: Any) -> Guard:
    given = {"policy": AbstainBelow(max_risk=0.2), "calibration": calibration(), **settings}
    return Guard(ScriptedModel("Lyon"), scorer=ScriptedScorer(0.5), watch=watch, **given)


def alarmed() -> RiskTest:
    test = RiskTest(alpha=0.2)
    for _ in range(10):
        test.add(correct=False, probability=1.0)
    return test


def test_both_tests_can_watch(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl", fsync=False).close()
    draw_sample(tmp_path / "audit.jsonl", rate=0.5)
    assert isinstance(RiskTest(alpha=0.1), Watch)
    assert isinstance(RiskWatch.of_log(tmp_path / "audit.jsonl", alpha=0.1), Watch)


def test_before_the_alarm_answers_leave_and_after_it_none() -> None:
    test, sink = RiskTest(alpha=0.2), MemorySink()
    running = guard(test, audit=sink)
    assert running("Capital?").text == "Lyon"
    while not test.suspended:
        test.add(correct=False, probability=1.0)
    outcome = running("Capital?")
    assert outcome.text is None and outcome.verdict is not None and outcome.verdict.max_risk is None
    assert outcome.verdict.suspended == test.suspended
    last = sink.records[-1]
    assert (last.decision, last.rule, last.certificate) == ("abstain", "suspended", None)
    assert test.suspended in last.reason


def test_right_labels_afterwards_lift_nothing() -> None:
    test = alarmed()
    running = guard(test)
    for _ in range(1000):
        test.add(correct=True, probability=1.0)
    assert running("Capital?").text is None


def test_a_new_calibration_does_not_lift_it_either() -> None:
    running = guard(alarmed())
    running.calibration = calibration(alpha=0.1)
    assert running("Capital?").text is None


def test_confidence_is_left_as_it_is() -> None:
    outcome = guard(alarmed())("Capital?")
    assert outcome.verdict is not None and outcome.verdict.confidence is not None


def test_of_two_reasons_both_are_said() -> None:
    drift = DriftMonitor(REFERENCE, window=10)
    for _ in range(10):
        drift.observe(1e9)
    outcome = guard(alarmed(), drift=drift)("Capital?")
    assert outcome.verdict is not None
    assert outcome.verdict.suspended == f"{drift.suspended}; {alarmed().suspended}"


def test_streams_obey_it_too() -> None:
    test = RiskTest(alpha=0.2)
    running = guard(test, calibration=calibration(gate="stream"))
    *released, outcome = running.stream("Capital?")
    assert released and outcome.text == "Lyon"
    for _ in range(10):
        test.add(correct=False, probability=1.0)
    assert [each.text for each in running.stream("Capital?")] == [None]


def test_from_the_answer_over_its_label_to_the_suspension(tmp_path: Path) -> None:
    """The whole way, and after a restart; what is missing suspends as the alarm does."""
    log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
    draw_sample(log.path, rate=1.0)
    running = guard(RiskWatch.of_log(log.path, alpha=0.2), audit=log)
    left = 0
    while running(f"question {left}").text is not None:
        left += 1
        draw_sample(log.path, rate=1.0)
        label(log.path, read_sample(log.path).chosen[-1].id, False)
    assert 1 < left < 10
    assert "of the answers let through to be wrong" in list(records(log.path))[-1].reason
    restarted = RiskWatch.of_log(log.path, alpha=0.2)
    assert guard(restarted, audit=log)("Capital?").text is None


@pytest.mark.fault("labels", "the labels that a guard's watch follows are deleted", "abstains; the record says why")
def test_lost_labels_suspend(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
    draw_sample(log.path, rate=1.0)
    running = guard(RiskWatch.of_log(log.path, alpha=0.2), audit=log)
    assert running("Capital?").text == "Lyon"
    labels_path(log.path).unlink()
    assert running("Capital?").text is None
    last = list(records(log.path))[-1]
    assert last.rule == "suspended" and "cannot be followed" in last.reason


class TestRefused:
    def test_is_a_watch_without_certificates_to_suspend(self) -> None:
        with pytest.raises(ConfigurationError, match="none that covers"):
            guard(RiskTest(alpha=0.2), policy=AbstainBelow(confidence=0.1), calibration=calibration_without())
        with pytest.raises(ConfigurationError, match="none that covers"):
            guard(RiskTest(alpha=0.2), policy=AbstainBelow(score="hybridgrad", limit=1.0), calibration=None)

    def test_is_a_watch_of_a_greater_risk_than_is_promised(self) -> None:
        with pytest.raises(ConfigurationError, match=r"tests the risk 0\.3, and the policy promises 0\.2"):
            guard(RiskTest(alpha=0.3))
        assert guard(RiskTest(alpha=0.1))("Capital?").text == "Lyon"

    @pytest.mark.parametrize("watch", ["audit.jsonl", DriftMonitor(REFERENCE), RiskWatch])
    def test_is_what_does_not_watch(self, watch: Any) -> None:
        with pytest.raises(ConfigurationError):
            guard(watch)

    def test_is_a_policy_exchanged_for_one_that_promises_less_risk(self) -> None:
        running = guard(RiskTest(alpha=0.2), calibration=calibration(alpha=0.1))
        running.policy = AbstainBelow(max_risk=0.1)
        with pytest.raises(ConfigurationError, match="tests the risk"):
            running("Capital?")


def calibration_without() -> Calibration:
    plain = calibration().model_dump()
    return Calibration(**{**plain, "certificates": ()})


def test_a_guard_under_another_policy_shares_what_was_noticed() -> None:
    made = guard(None)
    other = made.with_policy(AbstainBelow(max_risk=0.3))
    assert made.drift is not None and other.drift is made.drift


def test_a_guard_under_a_policy_that_no_certificate_keeps_is_refused() -> None:
    with pytest.raises(CalibrationError, match="smallest risk certified"):
        guard(None).with_policy(AbstainBelow(max_risk=0.1))


def test_a_draft_that_waits_between_two_steps_is_judged_when_it_is_decided_on() -> None:
    test = RiskTest(alpha=0.2)
    steps = Steps(guard(test))
    kept, _ = steps.score(steps.draw(steps.begin("Capital?", request_id="r", call=Call())))
    while not test.suspended:
        test.add(correct=False, probability=1.0)
    _, outcome = steps.decide(kept)
    assert outcome.text is None and outcome.decision.rule == "suspended"


def test_a_draft_that_waits_is_decided_on_by_the_calibration_of_the_one_who_decides() -> None:
    asks = {"policy": AbstainBelow(confidence=0.5)}
    sure, unsure = (guard(None, calibration=calibration(intercept=at), **asks) for at in (9.0, -9.0))
    kept, verdict = Steps(sure).score(Steps(sure).draw(Steps(sure).begin("Capital?", request_id="r", call=Call())))
    assert verdict.confidence is not None
    decided = {name: Steps(each).decide(kept)[1] for name, each in (("sure", sure), ("unsure", unsure))}
    assert decided["sure"].confidence != decided["unsure"].confidence
    assert {each.accepted for each in decided.values()} == {True, False}


def test_a_draft_of_another_scorer_is_not_decided_on() -> None:
    policy = AbstainBelow(score="hybridgrad", limit=1.0)
    scorers = ScriptedScorer(0.5), ScriptedScorer(0.5, settings={"layers": "official"})
    one, other = (Guard(ScriptedModel("Lyon"), policy=policy, scorer=each) for each in scorers)
    kept, _ = Steps(one).score(Steps(one).draw(Steps(one).begin("Capital?", request_id="r", call=Call())))
    with pytest.raises(ConfigurationError, match="another scorer"):
        Steps(other).decide(kept)


def test_the_watch_of_another_log_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        AuditLog(tmp_path / f"{name}.jsonl", fsync=False).close()
        draw_sample(tmp_path / f"{name}.jsonl", rate=0.5)
    watch = RiskWatch.of_log(tmp_path / "a.jsonl", alpha=0.1)
    with AuditLog(tmp_path / "b.jsonl", fsync=False) as other, pytest.raises(ConfigurationError, match=r"a\.jsonl"):
        guard(watch, audit=other)
    with AuditLog(tmp_path / "a.jsonl", fsync=False) as own:
        assert guard(watch, audit=own)("Capital?").accepted
