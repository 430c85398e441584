"""Which sentences are doubtful is decided by their scores, and the text follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import (
    Backoff,
    Decision,
    Edit,
    Escalate,
    Policy,
    Score,
    ScorerIdentity,
    Sentence,
    Situation,
    Verdict,
    edited,
)
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    MarkSentences,
    RedactSentences,
    RetryBelow,
    ShowProvisional,
    Unscored,
    Within,
    load_policy,
)

SCORER = ScorerIdentity(name="hybridgrad", version="1")
TEXT = "It was Ada. She wrote it.\nIn 1843."
PLACES = [(0, 12), (12, 26), (26, 34)]
FIRST = Situation()


def sentences(*values: float) -> tuple[Sentence, ...]:
    return tuple(
        Sentence(start=begin, stop=end, begin=begin, end=end, text=TEXT[begin:end], scores={"mean_nll": value})
        for (begin, end), value in zip(PLACES, values, strict=True)
    )


def verdict(*values: float, **more: Any) -> Verdict:
    own = sentences(*values) if values else ()
    score = Score(status="scored", scorer=SCORER, scores={"hybridgrad": 1e-4}, sentences=own)
    return Verdict(score=score, **more)


def backoff(alpha: float, threshold: float, **changes: Any) -> Backoff:
    plain = {"alpha": alpha, "at_most": 0, "guarantee": "certified", "score": "mean_nll", "threshold": threshold}
    return Backoff(**{**plain, "certificate": f"c{alpha:g}", **changes})


MARK = MarkSentences(score="mean_nll", limit=1.0)
REDACT = RedactSentences(score="mean_nll", limit=1.0)
RULES = [MARK, REDACT, MarkSentences(alpha=0.2), RedactSentences(alpha=0.2, at_most=1, guarantee="average")]


class Wraps:
    """A policy of one's own around another one, which does not say that it edits."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        decision: Decision = self._policy(verdict, situation)
        return decision

    def describe(self) -> dict[str, Any]:
        return {"policy": "Wraps", "of": [self._policy.describe()]}


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_is_a_policy_that_edits(rule: Any) -> None:
    assert isinstance(rule, Policy) and rule.edits and not rule.redraws


def test_doubtful_sentences_are_marked() -> None:
    decision = MARK(verdict(0.5, 1.5, 1.0), FIRST)
    assert decision.action == "accept" and decision.rule == "mark_sentences"
    assert decision.edit == Edit(manner="mark", doubtful=(1,), sentences=3, marker=" [unverified]")
    assert edited(TEXT, sentences(0.5, 1.5, 1.0), decision.edit) == ("It was Ada. She wrote it. [unverified]\nIn 1843.")


def test_doubtful_sentences_are_left_out() -> None:
    decision = REDACT(verdict(0.5, 1.5, 1.0), FIRST)
    assert decision.edit is not None and decision.edit.retention == pytest.approx(2 / 3)
    assert edited(TEXT, sentences(0.5, 1.5, 1.0), decision.edit) == "It was Ada. In 1843."
    first = REDACT(verdict(2.0, 0.5, 2.0), FIRST).edit
    assert first is not None and edited(TEXT, sentences(2.0, 0.5, 2.0), first) == "She wrote it."


def test_the_marker_is_the_callers() -> None:
    decision = MarkSentences(score="mean_nll", limit=1.0, marker=" (?)")(verdict(2.0, 0.0, 2.0), FIRST)
    assert decision.edit is not None
    assert edited(TEXT, sentences(2.0, 0.0, 2.0), decision.edit) == "It was Ada. (?) She wrote it.\nIn 1843. (?)"


def test_nothing_doubtful_changes_nothing() -> None:
    for rule in (MARK, REDACT):
        edit = rule(verdict(0.1, 0.1, 0.1), FIRST).edit
        assert edit is not None and edit.retention == 1.0
        assert edited(TEXT, sentences(0.1, 0.1, 0.1), edit) == TEXT


def test_where_all_is_doubtful_marks_stay_and_nothing_else() -> None:
    marked, left_out = MARK(verdict(2.0, 2.0, 2.0), FIRST), REDACT(verdict(2.0, 2.0, 2.0), FIRST)
    assert marked.edit is not None and marked.edit.retention == 0.0
    assert (left_out.action, left_out.rule, left_out.edit) == ("abstain", "redact_sentences", None)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(
    ("score", "name"),
    [
        (Score.unscorable("empty", scorer=SCORER), "on_unscorable"),
        (Score.failed("because", scorer=SCORER), "on_error"),
        (Score(status="scored", scorer=SCORER, scores={"hybridgrad": 1.0}), "on_unscorable"),
    ],
)
def test_without_scores_of_sentences_it_abstains(rule: Policy, score: Score, name: str) -> None:
    decision = rule(Verdict(score=score), FIRST)
    assert (decision.action, decision.rule) == ("abstain", name)


def test_another_score_is_not_read() -> None:
    decision = MarkSentences(score="semgrad", limit=1.0)(verdict(0.1, 0.1, 0.1), FIRST)
    assert (decision.action, decision.rule) == ("abstain", "unknown_score")


def test_what_was_not_scored_goes_where_the_caller_says() -> None:
    blind = verdict()
    accepted = Unscored(MARK, on_unscorable="accept")(blind, FIRST)
    assert (accepted.action, accepted.rule, accepted.edit) == ("accept", "on_unscorable", None)
    handed_on = Unscored(AbstainBelow(score="hybridgrad", limit=1.0) | MARK, on_unscorable="escalate")(blind, FIRST)
    assert handed_on.action == "escalate" and isinstance(handed_on.move, Escalate)
    assert Unscored(MARK)(blind, FIRST).action == "abstain"
    assert Unscored(MARK)(verdict(2.0, 0.1, 0.1), FIRST).edit is not None


def test_the_most_permissive_threshold_that_promises_enough_is_read() -> None:
    held = (
        backoff(0.1, 0.4),
        backoff(0.2, 0.9),
        backoff(0.3, 5.0),
        backoff(0.2, 6.0, at_most=1),
        backoff(0.2, 7.0, guarantee="average"),
    )
    decision = MarkSentences(alpha=0.25)(verdict(0.5, 0.9, 0.95, backoffs=held), FIRST)
    assert decision.edit is not None and decision.edit.doubtful == (2,)
    assert "c0.2" in decision.reason
    more = MarkSentences(alpha=0.25, at_most=1)(verdict(0.5, 0.9, 6.5, backoffs=held), FIRST)
    assert more.edit is not None and more.edit.doubtful == (2,)


@pytest.mark.parametrize("held", [(), (backoff(0.3, 5.0),), (backoff(0.1, 5.0, guarantee="average"),)])
def test_without_a_threshold_that_promises_it_it_abstains(held: tuple[Backoff, ...]) -> None:
    decision = MarkSentences(alpha=0.2)(verdict(0.1, 0.1, 0.1, backoffs=held), FIRST)
    assert (decision.action, decision.rule) == ("abstain", "uncalibrated")


def test_it_says_what_is_not_covered() -> None:
    decision = MarkSentences(alpha=0.2)(verdict(0.1, 0.1, 0.1, sentences_uncovered="temperature 1 against 0"), FIRST)
    assert decision.action == "abstain" and "temperature 1 against 0" in decision.reason


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score": "mean_nll"},
        {"limit": 1.0},
        {"score": "mean_nll", "limit": 1.0, "alpha": 0.1},
        {"score": "min_token_logprob", "limit": 1.0},
        {"score": "", "limit": 1.0},
        {"score": "mean_nll", "limit": float("nan")},
        {"alpha": 0.0},
        {"alpha": 0.1, "at_most": -1},
        {"alpha": 0.1, "guarantee": "maybe"},
        {"alpha": 0.1, "marker": " "},
    ],
)
def test_a_rule_refuses_what_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        MarkSentences(**settings)


def test_a_chain_keeps_the_edit_wherever_the_rule_stands() -> None:
    floor, doubtful = AbstainBelow(score="hybridgrad", limit=1.0), verdict(0.1, 2.0, 0.1)
    for chain in (floor | MARK, MARK | floor, MARK | Accept()):
        assert chain.edits
        decision = chain(doubtful, FIRST)
        assert decision.action == "accept" and decision.edit is not None and decision.edit.doubtful == (1,)
    for wrapped in (Within(floor | MARK), ShowProvisional(MARK)):
        assert wrapped.edits and wrapped(doubtful, FIRST).edit is not None


def test_an_objection_has_no_edit() -> None:
    decision = (MARK | AbstainBelow(score="hybridgrad", limit=1e-6))(verdict(0.1, 2.0, 0.1), FIRST)
    assert decision.action == "abstain" and decision.edit is None
    spent = (MARK | RetryBelow(score="hybridgrad", limit=1e-6, times=1))(
        verdict(0.1, 2.0, 0.1), Situation(attempt=2, rules=("retry_below",))
    )
    assert spent.action == "abstain" and spent.edit is None


def test_what_would_undo_an_edit_is_refused() -> None:
    with pytest.raises(PolicyError):
        MARK & AbstainBelow(score="hybridgrad", limit=1.0)
    with pytest.raises(PolicyError):
        MARK | REDACT


def test_neither_does_the_edit_of_one_that_did_not_say_so() -> None:
    doubtful = verdict(0.5, 1.5, 1.0)
    with pytest.raises(PolicyError, match="under '&'"):
        (AbstainBelow(score="hybridgrad", limit=1.0) & Wraps(MARK))(doubtful, FIRST)
    with pytest.raises(PolicyError, match="two rules of a chain edit"):
        (Wraps(REDACT) | MARK)(doubtful, FIRST)


INVISIBLE = [
    *("", " ", "\n", "\t ", "\u00a0", "\u3000", "\u2003"),
    *("\0", "\x1b", "\u200b", "\u200d", "\u200e", "\u202e", "\u2060", "\u00ad", "\ufeff", "\U000e0041"),
    *("\u034f", "\u0332", "\ufe0f", "\u180b", "\ud800", "\ue000", "\u0378"),
    *("\u115f", "\u1160", "\u3164", "\uffa0", "\u2800", "\U0001d159", "\ufffc"),
    *(
        "<!-- -->",
        " <!-- unverified -->",
        "<!-- unverified",
        "<unverified>",
        "<b></b>",
        '<img alt="unverified">',
        "<?x?>",
    ),
    *("&nbsp;", "&#8203;", "&ZeroWidthSpace;", "<i>&#x200b;</i>", " \u200b<!-- x -->\u2800 "),
]


@pytest.mark.parametrize("marker", INVISIBLE, ids=ascii)
def test_a_mark_that_nobody_sees_is_refused(marker: str) -> None:
    with pytest.raises(PolicyError, match="marker is"):
        MarkSentences(score="mean_nll", limit=1.0, marker=marker)
    plain = {
        "id": "x",
        "version": 1,
        "rules": [{"mark": {"above": {"score": "mean_nll", "limit": 1}, "marker": marker}}],
    }
    with pytest.raises(PolicyError):
        load_policy(plain)


@pytest.mark.parametrize(
    "marker",
    [" [unverified]", "?", " (?)", "*", "⚠️", "\n> unsure", "<b>?</b>", " &#x2753;", " < 0.5", "‽", "。", "未確認"],
)
def test_a_mark_that_is_seen_is_kept(marker: str) -> None:
    assert MarkSentences(score="mean_nll", limit=1.0, marker=marker).marker == marker


def test_a_document_says_the_same() -> None:
    plain: dict[str, Any] = {
        "id": "long",
        "version": 1,
        "rules": [
            {"abstain": {"above": {"score": "hybridgrad", "limit": 1.0}}},
            {"mark": {"above": {"score": "mean_nll", "limit": 1.0}, "marker": " (?)"}},
        ],
    }
    policy = load_policy(plain)
    assert policy.edits and not policy.needs_backoff
    edit = policy(verdict(0.1, 2.0, 0.1), FIRST).edit
    assert edit is not None and (edit.doubtful, edit.marker) == ((1,), " (?)")
    plain["rules"] = [{"redact": {"backoff": {"alpha": 0.2, "at_most": 1}}}]
    assert load_policy(plain).needs_backoff
    for wrong in ({}, {"above": {"score": "mean_nll", "limit": 1.0}, "backoff": {"alpha": 0.1}}, {"backoff": {}}):
        plain["rules"] = [{"redact": wrong}]
        with pytest.raises(PolicyError):
            load_policy(plain)
    plain["rules"] = [{"redact": {"above": {"score": "mean_nll", "limit": 1.0}, "marker": "x"}}]
    with pytest.raises(PolicyError, match="unknown key"):
        load_policy(plain)


@pytest.mark.parametrize(
    "change",
    [{"doubtful": (3,)}, {"doubtful": (1, 0)}, {"doubtful": (1, 1)}, {"marker": ""}, {"sentences": 0}],
)
def test_an_edit_refuses_what_cannot_be(change: dict[str, Any]) -> None:
    edit = Edit(manner="mark", doubtful=(1,), sentences=3, marker="?")
    with pytest.raises(ValueError):
        replace(edit, **change)


def test_an_edit_is_of_its_own_text() -> None:
    edit = Edit(manner="mark", doubtful=(1,), sentences=3, marker="?")
    for text, own in (
        (TEXT + "!", sentences(1, 1, 1)),
        (TEXT, sentences(1, 1, 1)[:2]),
        (TEXT, sentences(1, 1, 1)[::-1]),
    ):
        with pytest.raises(ValueError):
            edited(text, own, edit)


def test_only_what_is_accepted_is_edited() -> None:
    edit = Edit(manner="redact", doubtful=(), sentences=1)
    with pytest.raises(ValueError):
        Decision(action="abstain", rule="x", reason="y", edit=edit)
    with pytest.raises(ValueError):
        Edit(manner="redact", doubtful=(0,), sentences=1)
