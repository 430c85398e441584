"""Decisions taken again from a log: the same by the same policy, others by another, and unknown where the log ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Calibration, Guard
from hallucination_guard.audit import AuditLog, AuditRecord, Replayed, Tally, records, replay_each, requests
from hallucination_guard.audit.replay import replay
from hallucination_guard.audit.tally import clopper_pearson
from hallucination_guard.errors import (
    AuditError,
    CalibrationError,
    CalibrationMismatch,
    ConfigurationError,
    PolicyError,
)
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions, Score
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    Budget,
    EscalateBelow,
    RetrieveBelow,
    RetryBelow,
    Unscored,
    Within,
    load_policy,
)

GOOD, BAD, WORSE = 0.5, 2.0, 3.0
LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 1.0}
ABSTAIN = AbstainBelow(**LIMIT)


def calibration(**changes: Any) -> Calibration:
    """P(correct) = 1 / (1 + score) for the scripted model and scorer."""
    fitted = {
        "score": "hybridgrad", "intercept": 0.0, "slope": 1.0, "fingerprint": "scripted", "structure": "",
        "conditions": Conditions.of(ScriptedModel("x").generate("Who?")), "dtype": "float32",
        "template": "none", "scorer": "hybridgrad", "scorer_version": "scripted", "scorer_settings": {},
        "examples": 20, "correct": 10, "data": "none",
    }  # fmt: skip
    return Calibration(**{**fitted, **changes})


def search(query: str) -> list[str]:
    return ["a passage"]


def broken(query: object) -> Any:
    raise RuntimeError("down")


def log_of(policy: Any, *scores: Any, answers: Any = None, questions: int = 1, **settings: Any) -> list[AuditRecord]:
    """What a guard writes whose drafts score so, one after the other."""
    sink = MemorySink()
    drafts = answers or [f"answer {at}" for at in range(len(scores))]
    guard = Guard(
        ScriptedModel(drafts), policy=policy, scorer=ScriptedScorer(list(scores)), audit=sink, batch_size=1, **settings
    )
    for at in range(questions):
        guard(f"question {at}")
    return sink.records


def nothing_flips(found: Replayed) -> bool:
    alike = replace(found.now, unknown=0) == replace(found.then, unknown=0)
    return found.flips == () and found.now.unknown == 0 and alike


RETRY = RetryBelow(**LIMIT, times=2) | ABSTAIN
LAST = RetryBelow(**LIMIT, times=2, keep="last") | ABSTAIN
RETRIEVE = RetrieveBelow(**LIMIT, retriever=search) | ABSTAIN
OWN_LOGS = {
    "accepted": (ABSTAIN, [GOOD]),
    "abstained": (ABSTAIN, [BAD]),
    "an accepted redraw": (RETRY, [BAD, GOOD]),
    "the best of redraws, none good": (RETRY, [WORSE, BAD, WORSE]),
    "the best of redraws, let through": (RetryBelow(**LIMIT, times=2) | Accept(), [WORSE, BAD, WORSE]),
    "equally good redraws": (RetryBelow(**LIMIT, times=2) | Accept(), [BAD, BAD, BAD]),
    "the last of redraws": (LAST, [BAD, WORSE, GOOD]),
    "the last of redraws, let through": (RetryBelow(**LIMIT, times=2, keep="last") | Accept(), [BAD, BAD, WORSE]),
    "a redraw that cannot be scored": (RetryBelow(**LIMIT, times=2) | Accept(), [BAD, "nothing there", WORSE]),
    "a retrieval that helped": (RETRIEVE, [BAD, GOOD]),
    "a retrieval that did not": (RETRIEVE, [BAD, WORSE]),
    "a retrieval, then a redraw judged afresh": (
        RetrieveBelow(**LIMIT, retriever=search) | RetryBelow(**LIMIT, times=1) | Accept(),
        [BAD, 8.0, 9.0],
    ),
    "a redraw, a retrieval, judged afresh": (
        RetryBelow(**LIMIT, times=1) | RetrieveBelow(**LIMIT, retriever=search) | Accept(),
        [BAD, WORSE, 9.0],
    ),
    "a retrieval that failed": (RetrieveBelow(**LIMIT, retriever=broken) | ABSTAIN, [BAD]),
    "handed to the caller": (EscalateBelow(**LIMIT) | Accept(), [BAD]),
    "answered by another": (EscalateBelow(**LIMIT, to=lambda messages: "better") | Accept(), [BAD]),
    "an escalation that failed": (EscalateBelow(**LIMIT, to=broken) | Accept(), [BAD]),
    "unscorable": (Unscored(ABSTAIN), ["nothing there"]),
    "unscorable and let through": (Unscored(ABSTAIN, on_unscorable="accept"), ["nothing there"]),
    "unscorable and handed on": (Unscored(ABSTAIN, on_unscorable="escalate"), ["nothing there"]),
    "an error in scoring": (Unscored(ABSTAIN), [RuntimeError("broken")]),
    "an error in scoring, let through": (Unscored(ABSTAIN, on_error="accept"), [RuntimeError("broken")]),
    "a budget of attempts": (Within(RetryBelow(**LIMIT, times=9) | Accept(), Budget(attempts=2)), [BAD, WORSE]),
    "no time for another attempt": (Within(RetryBelow(**LIMIT, times=9), Budget(seconds=1e-9)), [BAD]),
}


@pytest.mark.parametrize(("policy", "scores"), OWN_LOGS.values(), ids=OWN_LOGS.keys())
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_recorded_policy_takes_the_recorded_decisions(policy: Any, scores: list[Any], calibrated: bool) -> None:
    log = log_of(policy, *scores, calibration=calibration() if calibrated else None)
    assert nothing_flips(replay(log, policy))


def test_the_recorded_calibration_takes_the_recorded_decisions() -> None:
    policy = RetryBelow(confidence=0.5) | AbstainBelow(confidence=0.4)
    log = log_of(policy, WORSE, 1.25, BAD, GOOD, questions=2, calibration=calibration())
    assert nothing_flips(replay(log, policy))
    assert nothing_flips(replay(log, policy, calibration=calibration()))


def test_the_guards_own_limit_of_attempts_is_kept() -> None:
    policy = RetryBelow(**LIMIT, times=9) | Accept()
    assert nothing_flips(replay(log_of(policy, BAD, WORSE, max_attempts=2), policy))


def test_calls_of_a_batch_are_told_apart() -> None:
    sink = MemorySink()
    model = ScriptedModel({"one": ["a1", "good"], "two": ["a2", "b2", "c2"], "three": "good"})
    scorer = ScriptedScorer(lambda generation: GOOD if generation.text == "good" else BAD)
    Guard(model, policy=RETRY, scorer=scorer, audit=sink).batch(["one", "two", "three"])
    assert [record.attempt for record in sink.records] == [1, 1, 1, 2, 2, 3]
    found = replay(sink.records, RETRY)
    assert nothing_flips(found)
    assert (found.now.accepted, found.now.abstained, found.now.redraws, found.now.attempts) == (2, 1, 3, 6)


def test_it_reads_a_log_that_keeps_no_text(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl", content="redacted", fsync=False) as log:
        for record in log_of(RETRY, BAD, GOOD):
            log(record)
    assert nothing_flips(replay(records(log.path), RETRY))


@pytest.mark.parametrize(
    ("limit", "flips"), [(1.0, []), (0.1, [("accept", "abstain")] * 2), (5.0, [("abstain", "accept")] * 2)]
)
def test_another_threshold_flips_what_lies_between_it_and_the_old_one(
    limit: float, flips: list[tuple[str, str]]
) -> None:
    log = log_of(ABSTAIN, GOOD, BAD, GOOD, BAD, questions=4)
    found = replay(log, AbstainBelow(score="hybridgrad", limit=limit))
    assert [(flip.was, flip.now) for flip in found.flips] == flips
    moved = [record for record in log if (record.scores["hybridgrad"] <= limit) != (record.decision == "accept")]
    assert [flip.id for flip in found.flips] == [record.id for record in moved]


def test_a_draft_that_was_never_drawn_is_unknown_and_not_guessed() -> None:
    found = replay(log_of(ABSTAIN, GOOD, BAD, BAD, questions=3), RETRY)
    assert (found.now.accepted, found.now.abstained, found.now.unknown) == (1, 0, 2)
    assert found.flips == ()
    assert sum(found.unknown_because.values()) == 2
    assert (found.now.coverage, found.now.coverage_at_most) == (pytest.approx(1 / 3), 1.0)


def test_a_redraw_does_not_stand_in_for_a_retrieval() -> None:
    assert replay(log_of(RETRY, BAD, GOOD), RETRIEVE).now.unknown == 1


def test_a_call_that_needs_fewer_drafts_than_it_had_is_known() -> None:
    found = replay(log_of(RETRY, BAD, WORSE, WORSE), Accept())
    assert (found.now.accepted, found.now.attempts, found.then.attempts) == (1, 1, 3)


def test_accepting_another_draft_is_a_flip() -> None:
    [flip] = replay(log_of(RETRY, BAD, GOOD), Accept()).flips
    assert (flip.was, flip.was_attempt, flip.now, flip.now_attempt) == ("accept", 2, "accept", 1)


def test_the_best_draft_is_chosen_by_the_other_calibration() -> None:
    """With a confidence that orders the drafts the other way, the other draft is the one that is accepted."""

    class Upside(Calibration):
        def value(self, score: Score) -> float:
            return 1.0 / super().value(score)

    policy = RetryBelow(confidence=0.99, times=1) | Accept()
    log = log_of(policy, BAD, WORSE, calibration=calibration())
    assert log[-1].judged == 1
    [flip] = replay(log, policy, calibration=Upside(**calibration().model_dump())).flips
    assert (flip.was_attempt, flip.now_attempt) == (1, 2)


@pytest.mark.parametrize("changes", [{"fingerprint": "other"}, {"scorer_version": "2"}, {"template": "another"}])
def test_a_strangers_calibration_is_refused_and_the_record_named(changes: dict[str, str]) -> None:
    log = log_of(ABSTAIN, GOOD)
    with pytest.raises(CalibrationMismatch, match=log[0].id):
        replay(log, AbstainBelow(confidence=0.5), calibration=calibration(**changes))


def test_one_strange_record_among_many_is_found() -> None:
    log = log_of(ABSTAIN, GOOD, GOOD, questions=2)
    log[1] = AuditRecord.from_json_dict({**log[1].to_json_dict(), "model": {**log[1].model, "fingerprint": "other"}})
    with pytest.raises(CalibrationMismatch, match=log[1].id):
        replay(log, AbstainBelow(confidence=0.5), calibration=calibration())


def test_without_a_confidence_in_the_record_a_policy_that_speaks_of_one_is_unknown() -> None:
    found = replay(log_of(ABSTAIN, GOOD, "nothing there", questions=2), AbstainBelow(confidence=0.5))
    assert (found.now.unknown, found.now.abstained) == (1, 1)  # what has no score is abstained from in any case


class TestAPolicyOfCertifiedRisk:
    POLICY = AbstainBelow(max_risk=0.2)

    @staticmethod
    def certified() -> Calibration:
        certificate = {
            "alpha": 0.2, "delta": 0.1, "score": "hybridgrad", "threshold": 1.0, "n": 100, "answered": 50, "errors": 2,
            "bound": 0.1, "fitted": 50, "date": "2026-01-01T00:00:00+00:00", "data": calibration().data,
            "covers": calibration().covered,
        }  # fmt: skip
        reference = tuple(at / 20 for at in range(1, 61))
        return Calibration.model_validate(
            {**calibration().model_dump(), "certificates": [certificate], "reference": reference}
        )

    def test_takes_the_recorded_decisions_with_its_calibration(self) -> None:
        log = log_of(self.POLICY, GOOD, BAD, questions=2, calibration=self.certified())
        assert [record.decision for record in log] == ["accept", "abstain"]
        assert nothing_flips(replay(log, self.POLICY, calibration=self.certified()))

    def test_is_unknown_without_a_calibration(self) -> None:
        log = log_of(self.POLICY, GOOD, calibration=self.certified())
        assert replay(log, self.POLICY).now.unknown == 1

    def test_is_refused_where_no_certificate_keeps_the_risk(self) -> None:
        log = log_of(self.POLICY, GOOD, calibration=self.certified())
        with pytest.raises(CalibrationError):
            replay(log, AbstainBelow(max_risk=0.01), calibration=self.certified())

    def test_abstains_where_the_certificate_was_suspended(self) -> None:
        [record] = log_of(self.POLICY, GOOD, calibration=self.certified())
        changes = {"decision": "abstain", "rule": "suspended", "reason": "drift", "certificate": None}
        drifted = AuditRecord.from_json_dict({**record.to_json_dict(), **changes})
        assert nothing_flips(replay([drifted], self.POLICY, calibration=self.certified()))


class TestACallWithoutAnEnd:
    def interrupted(self) -> list[AuditRecord]:
        sink = MemorySink()
        scorer = ScriptedScorer([BAD, KeyboardInterrupt()])
        with pytest.raises(KeyboardInterrupt):
            Guard(ScriptedModel("x"), policy=RETRY, scorer=scorer, audit=sink)("a")
        return sink.records

    def test_has_no_decision_to_compare_with(self) -> None:
        found = replay(self.interrupted(), RETRY)
        assert (found.then.unknown, found.now.unknown, found.flips) == (1, 1, ())

    def test_is_known_as_far_as_its_drafts_go(self) -> None:
        found = replay(self.interrupted(), ABSTAIN)
        assert (found.then.unknown, found.now.abstained, found.flips) == (1, 1, ())

    def test_is_unknown_where_the_log_ends_within_it(self) -> None:
        found = replay(log_of(RETRY, BAD, GOOD)[:1], RETRY)
        assert (found.then.unknown, found.now.unknown) == (1, 1)

    def test_is_unknown_where_the_log_begins_within_it(self) -> None:
        found = replay(log_of(RETRY, BAD, GOOD)[1:], RETRY)
        assert (found.then.accepted, found.now.unknown) == (1, 1)

    def test_is_unknown_where_a_record_was_lost(self) -> None:
        log = log_of(RETRY, BAD, WORSE, GOOD)
        found = replay([log[0], log[2]], RETRY)
        assert (found.then.accepted, found.now.unknown) == (1, 1)


def test_memory_holds_open_calls_only() -> None:
    log = log_of(RETRY, BAD, GOOD, GOOD, questions=2)

    def read() -> Iterator[AuditRecord]:
        yield from log[:2]
        raise AssertionError("the first call was not given when it ended")

    assert next(requests(read())).attempts == tuple(log[:2])


def test_several_policies_are_replayed_in_one_reading() -> None:
    log = log_of(RETRY, BAD, GOOD, BAD, WORSE, WORSE, questions=2)
    policies = [RETRY, Accept(), ABSTAIN]
    assert replay_each(iter(log), policies) == [replay(log, policy) for policy in policies]


def test_nothing_is_called() -> None:
    log = log_of(RETRIEVE, BAD, GOOD)
    other = RetrieveBelow(**LIMIT, retriever=broken) | EscalateBelow(**LIMIT, to=broken)
    assert replay(log, other).now.accepted == 1


def test_a_document_is_replayed_like_the_policy_that_it_is() -> None:
    log = log_of(load_policy("rag", retriever=search), WORSE, GOOD, GOOD, calibration=calibration(), questions=2)
    assert nothing_flips(replay(log, load_policy("rag", retriever=broken)))


def test_what_is_no_decision_is_refused() -> None:
    class Odd(Accept):
        def __call__(self, verdict: Any, situation: Any) -> Any:
            return None

    with pytest.raises(PolicyError):
        replay(log_of(ABSTAIN, GOOD), Odd())


def test_a_record_that_holds_no_verdict_is_refused() -> None:
    [record] = log_of(ABSTAIN, GOOD)
    odd = AuditRecord.from_json_dict({**record.to_json_dict(), "scores": {}})
    with pytest.raises(AuditError, match=record.id):
        replay([odd], ABSTAIN)


class TestLabels:
    def test_are_those_of_the_accepted_drafts(self) -> None:
        log = log_of(ABSTAIN, GOOD, GOOD, BAD, BAD, questions=4)
        labels = {log[0].id: True, log[1].id: False, log[2].id: False}
        found = replay(log, Accept(), labels=labels)
        assert (found.then.right, found.then.wrong, found.then.error) == (1, 1, 0.5)
        assert (found.now.right, found.now.wrong, found.now.error) == (1, 2, pytest.approx(2 / 3))

    def test_follow_the_draft_that_is_judged(self) -> None:
        log = log_of(RetryBelow(**LIMIT, times=2) | Accept(), WORSE, BAD, WORSE)
        labels = {log[0].id: False, log[1].id: True, log[2].id: False}
        assert replay(log, RetryBelow(**LIMIT, times=2) | Accept(), labels=labels).now.right == 1
        assert replay(log, Accept(), labels=labels).now.wrong == 1

    def test_none_among_the_accepted_give_no_error(self) -> None:
        found = replay(log_of(ABSTAIN, GOOD), ABSTAIN)
        assert found.now.error is found.now.interval() is None


class TestTheInterval:
    """Against its definition: at each end the tail of the binomial distribution is (1 − level) / 2."""

    @staticmethod
    def at_most(k: int, n: int, p: float) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))

    @pytest.mark.parametrize(("k", "n"), [(1, 10), (5, 10), (3, 50), (49, 50)])
    @pytest.mark.parametrize("level", [0.9, 0.95])
    def test_leaves_half_of_the_rest_on_each_side(self, k: int, n: int, level: float) -> None:
        low, high = clopper_pearson(k, n, level)
        assert 1 - self.at_most(k - 1, n, low) == pytest.approx((1 - level) / 2)
        assert self.at_most(k, n, high) == pytest.approx((1 - level) / 2)

    def test_without_errors_has_a_closed_form(self) -> None:
        assert clopper_pearson(0, 30) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))

    def test_is_the_mirror_of_that_of_the_right_ones(self) -> None:
        low, high = clopper_pearson(30, 30)
        assert (1 - high, 1 - low) == pytest.approx(clopper_pearson(0, 30))

    @pytest.mark.parametrize("odd", [(0, 0), (-1, 3), (4, 3), (1, 3, 1.0), (1, 3, math.nan)])
    def test_of_what_can_not_be_is_refused(self, odd: Any) -> None:
        with pytest.raises(ConfigurationError):
            clopper_pearson(*odd)


def test_of_nothing_there_are_no_shares() -> None:
    nothing = Tally()
    assert (nothing.coverage, nothing.coverage_at_most, nothing.mean_attempts, nothing.error) == (None,) * 4
