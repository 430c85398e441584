"""What becomes of an answer without a score, and of a loop without a budget."""

from __future__ import annotations

import itertools
import math

import pytest

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Escalate, Score, ScorerIdentity, Situation, Verdict
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    Budget,
    EscalateBelow,
    RetrieveBelow,
    RetryBelow,
    Unscored,
    Within,
)

SCORER = ScorerIdentity(name="hybridgrad", version="1")
GOOD, BAD = (
    Verdict(score=Score(status="scored", scorer=SCORER, scores={"raw": 0.5}), confidence=c) for c in (0.9, 0.2)
)
WITHOUT = {
    "on_unscorable": Verdict(score=Score.unscorable("the answer is empty", scorer=SCORER)),
    "on_error": Verdict(score=Score.failed("the gradient is not finite", scorer=SCORER)),
}
RULE = AbstainBelow(confidence=0.7)
FIRST = Situation()


def bigger(messages: list[dict[str, str]]) -> str:
    return "42"


@pytest.mark.parametrize("setting", WITHOUT)
def test_without_a_word_an_unscored_answer_is_abstained_from(setting):
    decision = Unscored(RULE)(WITHOUT[setting], FIRST)
    assert (decision.action, decision.rule) == ("abstain", setting)


@pytest.mark.parametrize(
    ("setting", "word", "verdict"), list(itertools.product(WITHOUT, ["abstain", "accept", "escalate"], WITHOUT))
)
def test_each_word_is_about_its_own_status_only(setting, word, verdict):
    decision = Unscored(RULE, **{setting: word})(WITHOUT[verdict], FIRST)
    assert (decision.action, decision.rule) == (word if setting == verdict else "abstain", verdict)


@pytest.mark.parametrize("setting", WITHOUT)
def test_an_unscored_acceptance_says_on_whose_word(setting):
    reason = Unscored(RULE, **{setting: "accept"})(WITHOUT[setting], FIRST).reason
    assert reason.startswith(f"accepted unscored because {setting}: accept; ")


@pytest.mark.parametrize(("setting", "word"), list(itertools.product(WITHOUT, ["abstain", "accept", "escalate"])))
def test_the_scorers_reason_is_passed_on(setting, word):
    assert WITHOUT[setting].score.reason in Unscored(RULE, **{setting: word})(WITHOUT[setting], FIRST).reason


def test_an_unscored_escalation_hands_over_to_whom():
    decision = Unscored(RULE, on_error="escalate", to=bigger, timeout=5.0)(WITHOUT["on_error"], FIRST)
    assert decision.move == Escalate(to=bigger, timeout=5.0)


def test_an_unscored_answer_is_escalated_once():
    policy = Unscored(RULE, on_error="escalate")
    assert policy(WITHOUT["on_error"], Situation(rules=("on_error",))).action == "abstain"


@pytest.mark.parametrize("verdict", [GOOD, BAD])
def test_a_scored_answer_is_the_inner_policys(verdict):
    policy = Unscored(RULE, on_unscorable="accept", on_error="accept")
    assert policy(verdict, FIRST) == RULE(verdict, FIRST)


def test_an_uncalibrated_answer_is_not_an_unscored_one():
    policy = Unscored(RULE, on_unscorable="accept", on_error="accept")
    assert policy(Verdict(score=GOOD.score), FIRST).action == "abstain"


@pytest.mark.parametrize("setting", WITHOUT)
def test_an_unknown_word_is_refused(setting):
    with pytest.raises(PolicyError, match=f"{setting} is 'ignore' .*'abstain', 'accept' or 'escalate'"):
        Unscored(RULE, **{setting: "ignore"})


def test_an_escalation_target_that_can_not_be_called_is_refused():
    with pytest.raises(PolicyError, match="to is 'somebody'"):
        Unscored(RULE, on_error="escalate", to="somebody")


LOOPS = [
    RetryBelow(confidence=0.7, times=99),
    RetrieveBelow(confidence=0.7, times=99, retriever=bigger),
]


@pytest.mark.parametrize("policy", LOOPS, ids=lambda policy: policy.rule)
@pytest.mark.parametrize(
    ("situation", "used"),
    [
        (Situation(attempt=4), "4 of 4 attempts"),
        (Situation(attempt=9), "9 of 4 attempts"),
        (Situation(attempt=1, seconds=60.0), "60.0 of 60 seconds"),
        (Situation(attempt=3, seconds=61.25), "61.2 of 60 seconds"),
    ],
)
def test_a_loop_over_its_budget_is_abstained_from_with_the_numbers(policy, situation, used):
    decision = Within(policy, Budget(attempts=4, seconds=60.0))(BAD, situation)
    assert (decision.action, decision.rule, decision.spent) == ("abstain", "budget", False)
    assert decision.reason == f"no budget for {policy.rule}: {used} are used up; confidence 0.20 < 0.70"


@pytest.mark.parametrize("policy", LOOPS, ids=lambda policy: policy.rule)
def test_a_loop_within_its_budget_goes_on(policy):
    situation = Situation(attempt=3, seconds=59.9)
    assert Within(policy, Budget(attempts=4, seconds=60.0))(BAD, situation) == policy(BAD, situation)


@pytest.mark.parametrize("policy", [Accept(), RULE, EscalateBelow(confidence=0.7)], ids=lambda policy: policy.rule)
def test_what_does_not_loop_passes_any_budget(policy):
    situation = Situation(attempt=9, seconds=1e9)
    assert Within(policy, Budget(attempts=1, seconds=0.1))(BAD, situation) == policy(BAD, situation)


def test_no_loop_is_endless_without_a_budget_of_its_own():
    situations = (Situation(attempt=attempt) for attempt in itertools.count(1))
    policy = Within(RetryBelow(confidence=0.7, times=10**9))
    assert next(s.attempt for s in situations if policy(BAD, s).action == "abstain") == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("attempts", 0), ("attempts", 1.5), ("seconds", 0), ("seconds", -1.0), ("seconds", math.inf), ("seconds", None)],
)
def test_a_budget_of_nothing_is_refused(name, value):
    with pytest.raises(PolicyError, match=f"{name} is {value!r} .*give a"):
        Budget(**{name: value})


def test_a_budget_is_part_of_the_description():
    assert Within(RULE, Budget(attempts=2)).describe() != Within(RULE, Budget(attempts=3)).describe()
