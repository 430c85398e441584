"""The rules: each asks one question, accepts when the answer is good enough, and otherwise does its one thing."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import pytest

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Escalate, Policy, Redraw, Retrieve, Score, ScorerIdentity, Situation, Verdict
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetrieveBelow, RetryBelow

SCORER = ScorerIdentity(name="hybridgrad", version="1")
GOOD, BAD = (
    Verdict(score=Score(status="scored", scorer=SCORER, scores={"hybridgrad": s}), confidence=c)
    for s, c in ((1e-4, 0.9), (9e-4, 0.2))
)
UNCALIBRATED = Verdict(score=GOOD.score)
UNSCORABLE = Verdict(score=Score.unscorable("the answer is empty", scorer=SCORER))
FAILED = Verdict(score=Score.failed("the gradient is not finite", scorer=SCORER))
FIRST = Situation()


def search(query: str) -> list[str]:
    return [query]


class Index:
    def invoke(self, query: str) -> list[str]:
        return [query]


RULES = [
    AbstainBelow(confidence=0.7),
    RetryBelow(confidence=0.7),
    RetrieveBelow(confidence=0.7, retriever=search),
    EscalateBelow(confidence=0.7),
]
ACTING = RULES[1:]
ALL = [*RULES, Accept()]


def by_name(policy):
    return type(policy).__name__


@pytest.mark.parametrize("policy", ALL, ids=by_name)
def test_a_rule_is_a_policy(policy):
    assert isinstance(policy, Policy)


@pytest.mark.parametrize("policy", ALL, ids=by_name)
def test_a_rule_is_frozen(policy):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        policy.rule = "another"


@pytest.mark.parametrize("policy", ALL, ids=by_name)
def test_a_rule_has_no_room_for_state(policy):
    assert not hasattr(policy, "__dict__")


@pytest.mark.parametrize("policy", ALL, ids=by_name)
def test_a_rule_survives_pickling(policy):
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize("policy", ALL, ids=by_name)
def test_a_description_is_plain_data(policy):
    assert json.loads(json.dumps(policy.describe())) == policy.describe()


@pytest.mark.parametrize(
    ("policy", "rule"),
    list(zip(ALL, ["abstain_below", "retry_below", "retrieve_below", "escalate_below", "accept_all"], strict=True)),
    ids=by_name,
)
def test_a_rule_has_a_stable_name(policy, rule):
    assert policy(GOOD, FIRST).rule == rule


@pytest.mark.parametrize("policy", RULES, ids=by_name)
def test_a_rule_accepts_what_passes_and_says_by_which_numbers(policy):
    decision = policy(GOOD, FIRST)
    assert (decision.action, decision.reason) == ("accept", "confidence 0.90 ≥ 0.70")


@pytest.mark.parametrize(
    ("policy", "action"), list(zip(RULES, ["abstain", "retry", "retrieve", "escalate"], strict=True)), ids=by_name
)
def test_a_rule_acts_on_what_fails_and_says_by_which_numbers(policy, action):
    decision = policy(BAD, FIRST)
    assert (decision.action, decision.reason) == (action, "confidence 0.20 < 0.70")


@pytest.mark.parametrize(
    "policy",
    [
        AbstainBelow(score="hybridgrad", limit=3.5e-4),
        RetryBelow(score="hybridgrad", limit=3.5e-4),
        RetrieveBelow(score="hybridgrad", limit=3.5e-4, retriever=search),
        EscalateBelow(score="hybridgrad", limit=3.5e-4),
    ],
    ids=by_name,
)
def test_a_raw_score_decides_without_a_calibration(policy):
    assert policy(UNCALIBRATED, FIRST).action == "accept"


@pytest.mark.parametrize("policy", ALL, ids=by_name)
@pytest.mark.parametrize(
    ("verdict", "rule", "why"),
    [(UNSCORABLE, "on_unscorable", "the answer is empty"), (FAILED, "on_error", "the gradient is not finite")],
)
def test_an_answer_without_a_score_is_abstained_from_with_the_scorers_reason(policy, verdict, rule, why):
    decision = policy(verdict, FIRST)
    assert (decision.action, decision.rule, decision.spent, why in decision.reason) == ("abstain", rule, False, True)


@pytest.mark.parametrize("policy", RULES, ids=by_name)
def test_an_uncalibrated_verdict_is_abstained_from(policy):
    decision = policy(UNCALIBRATED, FIRST)
    assert (decision.action, decision.rule, decision.spent) == ("abstain", "uncalibrated", False)


def test_an_unknown_score_is_abstained_from():
    decision = RetryBelow(score="typo", limit=1.0)(GOOD, FIRST)
    assert (decision.action, decision.rule, decision.spent) == ("abstain", "unknown_score", False)


@pytest.mark.parametrize("policy", ACTING, ids=by_name)
def test_a_rule_acts_as_long_as_it_has_attempts_left(policy):
    assert not policy(BAD, Situation(rules=(policy.rule,) * (policy.times - 1))).spent


@pytest.mark.parametrize("policy", ACTING, ids=by_name)
def test_a_rule_without_attempts_left_is_spent(policy):
    decision = policy(BAD, Situation(rules=(policy.rule,) * policy.times))
    assert (decision.action, decision.rule, decision.spent) == ("abstain", policy.rule, True)


@pytest.mark.parametrize("policy", ACTING, ids=by_name)
def test_a_spent_rule_still_accepts_what_passes(policy):
    assert policy(GOOD, Situation(rules=(policy.rule,) * 9)).action == "accept"


def test_a_spent_rule_says_how_often_it_fired():
    decision = RetryBelow(confidence=0.7, times=2)(BAD, Situation(rules=("retry_below", "other", "retry_below")))
    assert decision.reason == "confidence 0.20 < 0.70, and retry_below has fired 2 of 2 times"


def test_a_named_rule_counts_under_its_name():
    policy = RetryBelow(confidence=0.7, name="second_look", times=1)
    situations = (Situation(rules=("retry_below",)), Situation(rules=("second_look",)))
    assert [policy(BAD, situation).spent for situation in situations] == [False, True]


def test_a_retry_hands_over_how_to_draw():
    policy = RetryBelow(confidence=0.7, temperature=0.9, top_p=0.8, seed=7, keep="last")
    assert policy(BAD, FIRST).move == Redraw(temperature=0.9, top_p=0.8, seed=7, keep="last")


def test_a_retrieval_hands_over_how_to_look_up():
    policy = RetrieveBelow(
        confidence=0.7, retriever=search, k=5, timeout=2.5, tries=4, template="{passages}? {question}"
    )
    expected = Retrieve(retriever=search, k=5, timeout=2.5, tries=4, template="{passages}? {question}")
    assert policy(BAD, FIRST).move == expected


def test_an_escalation_hands_over_to_whom():
    assert EscalateBelow(confidence=0.7, to=search, timeout=3.0)(BAD, FIRST).move == Escalate(to=search, timeout=3.0)


def test_an_escalation_to_nobody_is_a_hand_over_to_the_caller():
    assert EscalateBelow(confidence=0.7)(BAD, FIRST).move == Escalate(to=None, timeout=60.0)


def test_the_ready_template_ends_with_the_question():
    template = RetrieveBelow(confidence=0.7, retriever=search).template
    assert template.format(passages="{P}", question="who {is} it?").endswith("who {is} it?")


@pytest.mark.parametrize(
    ("retriever", "name"), [(search, "search"), (Index(), "Index"), (Index().invoke, "Index.invoke")]
)
def test_a_retriever_is_described_by_its_name(retriever, name):
    assert RetrieveBelow(confidence=0.7, retriever=retriever).describe()["retriever"] == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (AbstainBelow(confidence=0.7), AbstainBelow(confidence=0.8)),
        (AbstainBelow(score="x", limit=1.0), AbstainBelow(score="y", limit=1.0)),
        (AbstainBelow(confidence=0.7), RetryBelow(confidence=0.7)),
        (RetryBelow(confidence=0.7), RetryBelow(confidence=0.7, keep="last")),
        (RetryBelow(confidence=0.7), RetryBelow(confidence=0.7, name="other")),
        (EscalateBelow(confidence=0.7), EscalateBelow(confidence=0.7, to=search)),
    ],
)
def test_what_decides_otherwise_is_described_otherwise(one, other):
    assert one.describe() != other.describe()


def test_only_accept_needs_no_confidence():
    assert [policy.needs_confidence for policy in ALL] == [True] * 4 + [False]


@pytest.mark.parametrize("name", ["budget", "on_error", "uncalibrated", "accept_all", "Second Look", "1st", "a-b"])
def test_a_name_that_means_something_else_is_refused(name):
    with pytest.raises(PolicyError, match=f"name is {name!r} .*give lower-case letters"):
        AbstainBelow(confidence=0.7, name=name)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (RetryBelow, {"times": 0}),
        (RetryBelow, {"times": 1.0}),
        (RetryBelow, {"times": True}),
        (RetryBelow, {"temperature": 0}),
        (RetryBelow, {"temperature": math.inf}),
        (RetryBelow, {"top_p": 0.0}),
        (RetryBelow, {"top_p": 1.1}),
        (RetryBelow, {"seed": -1}),
        (RetryBelow, {"keep": "first"}),
        (RetrieveBelow, {"retriever": None}),
        (RetrieveBelow, {"retriever": "bm25"}),
        (RetrieveBelow, {"retriever": search, "k": 0}),
        (RetrieveBelow, {"retriever": search, "timeout": 0.0}),
        (RetrieveBelow, {"retriever": search, "tries": 0}),
        (RetrieveBelow, {"retriever": search, "template": "{question}"}),
        (RetrieveBelow, {"retriever": search, "template": "{passages} {question} {"}),
        (RetrieveBelow, {"retriever": search, "template": "{passages} {question} {date}"}),
        (RetrieveBelow, {"retriever": search, "template": "{passages.__class__} {question}"}),
        (RetrieveBelow, {"retriever": search, "template": None}),
        (EscalateBelow, {"to": "somebody"}),
        (EscalateBelow, {"timeout": -1.0}),
        (EscalateBelow, {"times": 0}),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_with_its_value(make, arguments):
    name, value = list(arguments.items())[-1]
    with pytest.raises(PolicyError) as refusal:
        make(confidence=0.7, **arguments)
    assert refusal.value.message == f"{name} is {value!r}" and refusal.value.hint.startswith("give ")
