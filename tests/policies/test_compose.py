"""``a | b`` and ``a & b``: their truth tables, their laws, and that no composition accepts what no rule accepts."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Decision, Redraw, Score, ScorerIdentity, Situation, Verdict
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    BothObject,
    Budget,
    Composable,
    EscalateBelow,
    FirstObjection,
    RetrieveBelow,
    RetryBelow,
    Unscored,
    Within,
)

SCORER = ScorerIdentity(name="hybridgrad", version="1")
FIRST = Situation()
STATES = ("accept", "object", "retry", "spent")


def verdict(confidence: float | None, raw: float = 0.5) -> Verdict:
    return Verdict(score=Score(status="scored", scorer=SCORER, scores={"raw": raw}), confidence=confidence)


def search(query: str) -> list[str]:
    return [query]


@dataclass(frozen=True, slots=True)
class Says(Composable):
    """Always the same: accept, object (abstain), retry, or spent."""

    state: str
    rule: str

    def __call__(self, verdict, situation):
        return Decision(
            action="accept" if self.state == "accept" else "retry" if self.state == "retry" else "abstain",
            rule=self.rule,
            reason=f"{self.rule} says {self.state}",
            move=Redraw() if self.state == "retry" else None,
            spent=self.state == "spent",
        )

    def describe(self):
        return {"policy": "Says", "state": self.state, "rule": self.rule}


class Stranger:
    """A policy that satisfies the protocol and knows nothing of this package."""

    def __call__(self, verdict, situation):
        return Decision(action="accept", rule="stranger", reason="the stranger says so")

    def describe(self):
        return {"policy": "Stranger"}


def state(decision: Decision) -> str:
    if decision.spent:
        return "spent"
    return {"accept": "accept", "abstain": "object", "retry": "retry"}[decision.action]


CHAIN = {
    # a, b: (what a | b says, who decided)
    ("accept", "accept"): ("accept", "b"),
    ("accept", "object"): ("object", "b"),
    ("accept", "retry"): ("retry", "b"),
    ("accept", "spent"): ("spent", "b"),
    ("object", "accept"): ("object", "a"),
    ("object", "object"): ("object", "a"),
    ("object", "retry"): ("object", "a"),
    ("object", "spent"): ("object", "a"),
    ("retry", "accept"): ("retry", "a"),
    ("retry", "object"): ("retry", "a"),
    ("retry", "retry"): ("retry", "a"),
    ("retry", "spent"): ("retry", "a"),
    ("spent", "accept"): ("accept", "b"),
    ("spent", "object"): ("object", "b"),
    ("spent", "retry"): ("retry", "b"),
    ("spent", "spent"): ("spent", "b"),
}
BOTH = {
    # a, b: (what a & b says, who decided)
    ("accept", "accept"): ("accept", "a"),
    ("accept", "object"): ("accept", "a"),
    ("accept", "retry"): ("accept", "a"),
    ("accept", "spent"): ("accept", "a"),
    ("object", "accept"): ("accept", "b"),
    ("object", "object"): ("object", "a"),
    ("object", "retry"): ("object", "a"),
    ("object", "spent"): ("object", "a"),
    ("retry", "accept"): ("accept", "b"),
    ("retry", "object"): ("retry", "a"),
    ("retry", "retry"): ("retry", "a"),
    ("retry", "spent"): ("retry", "a"),
    ("spent", "accept"): ("accept", "b"),
    ("spent", "object"): ("object", "b"),
    ("spent", "retry"): ("retry", "b"),
    ("spent", "spent"): ("spent", "a"),
}


def test_the_tables_are_complete():
    assert set(CHAIN) == set(BOTH) == set(itertools.product(STATES, repeat=2))


@pytest.mark.parametrize(("a", "b"), CHAIN)
def test_in_a_chain_the_first_objection_decides_else_the_last_word(a, b):
    decision = (Says(a, "a") | Says(b, "b"))(verdict(0.5), FIRST)
    assert (state(decision), decision.rule) == CHAIN[a, b]


@pytest.mark.parametrize(("a", "b"), BOTH)
def test_both_object_only_together(a, b):
    decision = (Says(a, "a") & Says(b, "b"))(verdict(0.5), FIRST)
    assert (state(decision), decision.rule) == BOTH[a, b]


@pytest.mark.parametrize("states", list(itertools.product(STATES, repeat=3)))
def test_how_a_chain_is_bracketed_makes_no_difference(states):
    a, b, c = (Says(word, rule) for word, rule in zip(states, "abc", strict=True))
    assert ((a | b) | c)(verdict(0.5), FIRST) == (a | (b | c))(verdict(0.5), FIRST)


@pytest.mark.parametrize("states", list(itertools.product(STATES, repeat=3)))
def test_how_a_conjunction_is_bracketed_makes_no_difference(states):
    a, b, c = (Says(word, rule) for word, rule in zip(states, "abc", strict=True))
    assert ((a & b) & c)(verdict(0.5), FIRST) == (a & (b & c))(verdict(0.5), FIRST)


@pytest.mark.parametrize("states", list(itertools.product(STATES, repeat=2)))
def test_a_conjunction_names_both_reasons(states):
    a, b = (Says(word, rule) for word, rule in zip(states, "ab", strict=True))
    assert (a & b)(verdict(0.5), FIRST).reason == f"a says {states[0]}; b says {states[1]}"


def test_a_chain_that_accepts_names_all_reasons():
    decision = (Says("accept", "a") | Says("spent", "b") | Says("accept", "c"))(verdict(0.5), FIRST)
    assert decision.reason == "a says accept; b says spent; c says accept"


def test_a_chain_asks_nobody_after_an_objection():
    class Unasked(Stranger):
        def __call__(self, verdict, situation):
            raise AssertionError

    assert (Says("object", "a") | Unasked())(verdict(0.5), FIRST).rule == "a"


def test_nested_chains_are_flattened():
    a, b, c, d = (Says("accept", rule) for rule in "abcd")
    assert ((a | b) | (c | d)) == FirstObjection((a, b, c, d))


def test_a_chain_in_a_conjunction_stays_a_chain():
    a, b, c = (Says("accept", rule) for rule in "abc")
    assert ((a | b) & c).parts == (FirstObjection((a, b)), c)


def test_an_empty_chain_is_refused():
    with pytest.raises(PolicyError, match="at least one"):
        FirstObjection(())


@pytest.mark.parametrize("compose", [lambda a, b: a | b, lambda a, b: a & b], ids=["or", "and"])
@pytest.mark.parametrize("other", [None, 0.5, "abstain", AbstainBelow, lambda verdict, situation: None])
def test_what_is_no_policy_can_not_be_composed(compose, other):
    with pytest.raises(TypeError, match="unsupported operand"):
        compose(Accept(), other)


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (Stranger() | Accept(), ["Stranger", "Accept"]),
        (Accept() | Stranger(), ["Accept", "Stranger"]),
        (Stranger() & Accept(), ["Stranger", "Accept"]),
        (Accept() & Stranger(), ["Accept", "Stranger"]),
    ],
)
def test_a_strangers_policy_composes_from_either_side(policy, parts):
    assert [part["policy"] for part in policy.describe()["of"]] == parts


def test_a_spent_retry_leaves_the_word_to_the_floor():
    policy = RetryBelow(confidence=0.8, times=1) | AbstainBelow(confidence=0.5)
    assert policy(verdict(0.6), Situation(attempt=2, rules=("retry_below",))).action == "accept"


def test_a_spent_retry_without_a_floor_abstains():
    assert RetryBelow(confidence=0.8, times=1)(verdict(0.6), Situation(rules=("retry_below",))).action == "abstain"


def test_a_blind_side_of_a_conjunction_accepts_nothing():
    policy = AbstainBelow(confidence=0.1) & AbstainBelow(score="raw", limit=0.1)
    assert policy(verdict(None, raw=0.5), FIRST).rule == "uncalibrated"


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetryBelow(confidence=0.8) | RetryBelow(confidence=0.5),
        lambda: RetryBelow(confidence=0.8) & RetryBelow(score="raw", limit=1.0),
        lambda: RetryBelow(confidence=0.8) | (AbstainBelow(confidence=0.5) & RetryBelow(confidence=0.5)),
        lambda: Within(RetryBelow(confidence=0.8)) | Unscored(RetryBelow(confidence=0.5)),
        lambda: EscalateBelow(confidence=0.8, name="retry_below") | RetryBelow(confidence=0.5),
    ],
)
def test_two_acting_rules_of_one_name_are_refused(make):
    with pytest.raises(PolicyError, match=r"called 'retry_below' .*name='second_look'"):
        make()


def test_two_acting_rules_of_two_names_go_together():
    policy = RetryBelow(confidence=0.8) | RetryBelow(confidence=0.5, name="second_look")
    assert policy(verdict(0.3), Situation(rules=("retry_below",) * 2)).rule == "second_look"


@pytest.mark.parametrize(
    "make",
    [
        lambda: AbstainBelow(confidence=0.8) | RetryBelow(confidence=0.6),
        lambda: AbstainBelow(confidence=0.8) | RetryBelow(confidence=0.8),
        lambda: AbstainBelow(confidence=0.8) | Accept() | RetryBelow(confidence=0.6),
        lambda: AbstainBelow(confidence=0.8) | (RetryBelow(confidence=0.6) & AbstainBelow(score="raw", limit=1.0)),
        lambda: (AbstainBelow(confidence=0.8) & AbstainBelow(confidence=0.7)) | RetryBelow(confidence=0.6),
        lambda: AbstainBelow(score="raw", limit=1.0) | RetryBelow(score="raw", limit=2.0),
    ],
)
def test_a_rule_that_can_never_act_is_refused(make):
    with pytest.raises(PolicyError, match=r"retry_below \((confidence|raw) .*can never act.*abstain_below \(.*first"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetryBelow(confidence=0.8) | AbstainBelow(confidence=0.8),
        lambda: AbstainBelow(confidence=0.5) | RetryBelow(confidence=0.8),
        lambda: AbstainBelow(score="raw", limit=1.0) | RetryBelow(confidence=0.6),
        lambda: AbstainBelow(score="raw", limit=1.0) | RetryBelow(score="other", limit=2.0),
        lambda: (AbstainBelow(confidence=0.8) & AbstainBelow(score="raw", limit=1.0)) | RetryBelow(confidence=0.6),
    ],
)
def test_a_rule_that_can_act_is_not_refused(make):
    assert make()


@pytest.mark.parametrize(
    ("policy", "needs"),
    [
        (AbstainBelow(score="raw", limit=1.0) | Accept(), False),
        (AbstainBelow(score="raw", limit=1.0) & AbstainBelow(confidence=0.5), True),
        (Within(Unscored(Accept() | AbstainBelow(confidence=0.5))), True),
        (Accept() | Stranger(), False),
    ],
)
def test_a_composition_needs_confidence_when_a_part_does(policy, needs):
    assert policy.needs_confidence is needs


# Arbitrary compositions: every leaf has a name of its own, and what the package refuses to build is left out.

LEVELS = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


@st.composite
def leaves(draw, thresholds):
    name = f"rule_{draw(st.integers(0, 10**9))}"
    kind = draw(st.sampled_from([AbstainBelow, RetryBelow, RetrieveBelow, EscalateBelow]))
    extra = {"retriever": search} if kind is RetrieveBelow else {}
    return kind(**draw(thresholds), name=name, **extra)


def joined(pair):
    operator, (a, b) = pair
    try:
        return operator(a, b)
    except PolicyError:
        return a


def wrapped(pair):
    wrap, policy = pair
    return wrap(policy)


def policies(thresholds, floor=False):
    wrappers = [Within, Unscored, lambda policy: Within(policy, Budget(attempts=1))]
    base = leaves(thresholds) | st.just(Accept()) if floor else leaves(thresholds)
    operators = st.sampled_from([lambda a, b: a | b, BothObject])
    return st.recursive(
        base,
        lambda inner: (
            st.tuples(operators, st.tuples(inner, inner)).map(joined)
            | st.tuples(st.sampled_from(wrappers), inner).map(wrapped)
        ),
        max_leaves=6,
    )


CONFIDENCE = LEVELS.map(lambda level: {"confidence": level})
EITHER = CONFIDENCE | LEVELS.map(lambda level: {"score": "raw", "limit": level}) | st.just({"score": "no", "limit": 1})


def rules_of(policy):
    if isinstance(policy, Composable) and policy.parts:
        return [rule for part in policy.parts for rule in rules_of(part)]
    return [policy.rule]


@st.composite
def asked(draw, thresholds, floor=False):
    """A policy and a situation in which some of its rules have used up their attempts."""
    policy = draw(policies(thresholds, floor))
    spent = draw(st.lists(st.sampled_from(rules_of(policy)), max_size=4, unique=True))
    return policy, Situation(attempt=draw(st.integers(1, 8)), rules=tuple(spent) * 2)


@given(asked(EITHER))
def test_where_no_threshold_passes_nothing_is_accepted(case):
    policy, situation = case
    assert policy(verdict(0.05, raw=2.0), situation).action != "accept"


@given(asked(CONFIDENCE))
def test_where_every_threshold_passes_everything_is_accepted(case):
    policy, situation = case
    assert policy(verdict(1.0), situation).action == "accept"


@given(asked(EITHER, floor=True), st.floats(0, 1), st.none() | st.floats(0, 1))
def test_less_confidence_never_turns_anything_into_an_acceptance(case, more, less):
    policy, situation = case
    assume(less is None or less <= more)
    accepted = [policy(verdict(confidence), situation).action == "accept" for confidence in (more, less)]
    assert accepted != [False, True]


@given(asked(EITHER, floor=True), st.sampled_from(["unscorable", "error"]))
def test_an_answer_without_a_score_is_never_accepted(case, status):
    policy, situation = case
    unscored = Verdict(score=Score(status=status, scorer=SCORER, reason="why"))
    assert policy(unscored, situation).action == "abstain"


@given(asked(EITHER, floor=True), st.floats(0, 1))
def test_the_same_verdict_and_situation_give_the_same_decision(case, confidence):
    policy, situation = case
    assert policy(verdict(confidence), situation) == policy(verdict(confidence), situation)


@given(policies(EITHER, floor=True))
def test_every_composition_describes_itself_as_plain_data(policy):
    assert json.loads(json.dumps(policy.describe())) == policy.describe()
