"""Policies as documents: the ready packs, what a document says, and the one line about what it cannot say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hallucination_guard_policies.document as documents
from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Policy, Score, ScorerIdentity, Situation, Verdict
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
    pack_names,
)

SCORER = ScorerIdentity(name="hybridgrad", version="1")
PACKS = ("abstain", "observe", "rag", "strict")
FIRST = Situation()
HEAD = "id: test\nversion: 1\n"


def verdict(confidence: float | None) -> Verdict:
    return Verdict(score=Score(status="scored", scorer=SCORER, scores={"hybridgrad": 1e-3}), confidence=confidence)


UNSCORABLE = Verdict(score=Score.unscorable("the answer is empty", scorer=SCORER))
FAILED = Verdict(score=Score.failed("the gradient is not finite", scorer=SCORER))


def search(query: str) -> list[str]:
    return [query]


def rules(*written: dict) -> dict:
    return {"id": "test", "version": 1, "rules": list(written)}


def inner(policy):
    """The policy that a document's rules became, without the wrappers."""
    return policy.policy.policy.policy


def test_the_ready_packs_are_these():
    assert pack_names() == PACKS


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_is_a_policy_under_its_own_name(name):
    policy = load_policy(name, retriever=search)
    assert isinstance(policy, Policy) and policy.id == name


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_opens_with_one_sentence_that_says_whom_it_protects(name):
    sentence = documents._packs()[name].read_text(encoding="utf-8").splitlines()[0]
    assert sentence.startswith("# Protects ") and sentence.endswith(".") and sentence.count(". ") == 0


@pytest.mark.parametrize(
    ("name", "actions"),
    [
        ("observe", ["accept", "accept", "accept", "accept"]),
        ("abstain", ["accept", "accept", "abstain", "abstain"]),
        ("rag", ["accept", "accept", "retrieve", "abstain"]),
        ("strict", ["accept", "retry", "retry", "abstain"]),
    ],
)
def test_a_pack_decides_by_confidence(name, actions):
    policy = load_policy(name, retriever=search)
    assert [policy(verdict(c), FIRST).action for c in (0.9, 0.6, 0.2)] + [policy(UNSCORABLE, FIRST).action] == actions


@pytest.mark.parametrize("name", ["abstain", "rag", "strict"])
@pytest.mark.parametrize("unread", [UNSCORABLE, FAILED, verdict(None)])
def test_a_pack_that_guards_abstains_from_what_it_can_not_read(name, unread):
    assert load_policy(name, retriever=search)(unread, FIRST).action == "abstain"


@pytest.mark.parametrize("unread", [UNSCORABLE, FAILED])
def test_observe_lets_an_unscored_answer_through_and_says_so(unread):
    assert load_policy("observe")(unread, FIRST).reason.startswith("accepted unscored because on_")


def test_rag_looks_up_once_and_then_abstains():
    assert load_policy("rag", retriever=search)(verdict(0.2), Situation(rules=("retrieve_below",))).action == "abstain"


def test_packs_that_act_on_confidence_say_that_they_need_it():
    needs = {name: load_policy(name, retriever=search).needs_confidence for name in PACKS}
    assert needs == {"abstain": True, "observe": False, "rag": True, "strict": True}


def test_every_key_of_a_document_arrives_where_it_belongs():
    policy = load_policy(
        {
            "id": "full",
            "version": 3,
            "rules": [
                {"retry": {"below": {"confidence": 0.9}, "times": 3, "temperature": 1.0, "top_p": 0.9, "seed": 5}},
                {"retry": {"below": {"confidence": 0.8}, "name": "second_look", "keep": "last"}},
                {
                    "retrieve": {
                        "above": {"score": "semgrad", "limit": 3.5e-4},
                        "k": 7,
                        "times": 2,
                        "timeout": 1,
                        "tries": 1,
                        "template": "{passages} {question}",
                    }
                },
                {"both": [{"abstain": {"below": {"confidence": 0.5}}}, {"accept": "all"}]},
                {"escalate": {"below": {"confidence": 0.4}, "times": 2, "timeout": 9.5}},
            ],
            "on_unscorable": "escalate",
            "on_error": "accept",
            "budget": {"attempts": 9, "seconds": 30},
        },
        retriever=search,
        to=search,
    )
    chain = (
        RetryBelow(confidence=0.9, times=3, temperature=1.0, top_p=0.9, seed=5)
        | RetryBelow(confidence=0.8, name="second_look", keep="last")
        | RetrieveBelow(
            score="semgrad",
            limit=3.5e-4,
            k=7,
            times=2,
            timeout=1.0,
            tries=1,
            template="{passages} {question}",
            retriever=search,
        )
        | (AbstainBelow(confidence=0.5) & Accept())
        | EscalateBelow(confidence=0.4, times=2, timeout=9.5, to=search)
    )
    unscored = Unscored(chain, on_unscorable="escalate", on_error="accept", to=search)
    assert policy.policy == Within(unscored, Budget(attempts=9, seconds=30.0))


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ({}, Budget()),
        ({"budget": {"attempts": 2}}, Budget(attempts=2)),
        ({"budget": {"seconds": 5}}, Budget(seconds=5.0)),
    ],
)
def test_a_document_always_has_a_budget(written, budget):
    assert load_policy({**rules({"accept": "all"}), **written}).policy.budget == budget


def test_a_yaml_file_says_the_same_as_a_mapping(tmp_path):
    written = rules({"abstain": {"above": {"score": "hybridgrad", "limit": 3e-4}}})
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(written), encoding="utf-8")
    assert load_policy(path) == load_policy(str(path)) == load_policy(written)


@pytest.mark.parametrize("limit", ["3e-4", "3E-4", "3.0e-4", "0.0003", "300e-6", "+3e-4"])
def test_a_limit_is_a_number_however_it_is_written(tmp_path, limit):
    path = tmp_path / "policy.yaml"
    path.write_text(f"{HEAD}rules: [abstain: {{above: {{score: x, limit: {limit}}}}}]", encoding="utf-8")
    assert inner(load_policy(path)).limit == pytest.approx(3e-4)


def test_a_confidence_given_replaces_every_confidence_of_the_document():
    policy = load_policy("strict", confidence=0.6)
    assert [rule.confidence for rule in inner(policy).policies] == [0.6, 0.6]


def test_a_confidence_given_leaves_raw_limits_alone():
    written = rules(
        {"retry": {"above": {"score": "x", "limit": 2.0}}},
        {"both": [{"abstain": {"above": {"score": "x", "limit": 9.0}}}, {"abstain": {"below": {"confidence": 0.1}}}]},
    )
    retry, both = inner(load_policy(written, confidence=0.6)).policies
    assert (retry.limit, both.first.limit, both.second.confidence) == (2.0, 9.0, 0.6)


def test_a_confidence_given_to_a_document_without_one_is_refused():
    with pytest.raises(PolicyError, match=r"confidence=0\.6 replaces nothing: .*observe\.yaml .*leave it out"):
        load_policy("observe", confidence=0.6)


def test_a_confidence_given_out_of_range_is_refused():
    with pytest.raises(PolicyError, match=r"confidence is 60 .*at most 1"):
        load_policy("abstain", confidence=60)


def test_a_mapping_given_is_not_changed():
    written = rules({"abstain": {"below": {"confidence": 0.5}}})
    before = json.dumps(written)
    load_policy(written, confidence=0.9)
    assert json.dumps(written) == before


def test_a_document_composes_like_any_policy():
    policy = load_policy("abstain") | AbstainBelow(score="hybridgrad", limit=1e-6)
    assert policy(verdict(0.9), FIRST).reason == "hybridgrad 0.001 > 1e-06"


def test_a_hash_is_the_same_for_the_same_document():
    assert load_policy("strict").hash == load_policy("strict").hash


@pytest.mark.parametrize(
    "other",
    [
        rules({"abstain": {"below": {"confidence": 0.6}}}),
        rules({"retry": {"below": {"confidence": 0.5}}}),
        {**rules({"abstain": {"below": {"confidence": 0.5}}}), "version": 2},
        {**rules({"abstain": {"below": {"confidence": 0.5}}}), "on_error": "accept"},
        {**rules({"abstain": {"below": {"confidence": 0.5}}}), "budget": {"attempts": 2}},
    ],
)
def test_a_hash_changes_with_every_change(other):
    assert load_policy(rules({"abstain": {"below": {"confidence": 0.5}}})).hash != load_policy(other).hash


def test_a_description_names_the_document_and_no_live_object():
    described = json.loads(json.dumps(load_policy("rag", retriever=search).describe()))
    assert (described["id"], described["version"]) == ("rag", 1)
    assert described["of"]["of"]["of"]["of"][0]["retriever"] == "search"


ABSTAIN = "rules: [abstain: {below: {confidence: 0.5}}]\n"
BAD = {
    # what is wrong: (document, line or None, what the message holds, what the hint holds)
    "nothing in it": ("", None, "is None, not a mapping", "id, version and rules"),
    "a list": ("- 1\n", 1, "is [1], not a mapping", "id, version and rules"),
    "broken YAML": (HEAD + "rules: [", 3, "expected the node content", "mend the YAML"),
    "a tab": (HEAD + "rules:\n\t- accept: all", 4, "found character '\\t'", "mend the YAML"),
    "two documents": (HEAD + ABSTAIN + "---\na: 1", 4, "another document", "mend the YAML"),
    "a python object": ("id: !!python/name:os.system\n", 1, "python/name:os.system", "mend the YAML"),
    "a date that is none": ("id: 2026-13-45\n", None, "month must be in 1..12", "quotes"),
    "nested too deeply": ("[" * 3000, None, "brackets open at once", "nest less deeply"),
    "a key twice": (HEAD + ABSTAIN + "id: other", 4, "key 'id' is given twice", "mend the YAML"),
    "an inner key twice": (
        HEAD + "rules:\n- abstain:\n    below: {confidence: 0.5}\n    below: {confidence: 0.9}",
        6,
        "key 'below' is given twice",
        "mend the YAML",
    ),
    "no id": ("version: 1\n" + ABSTAIN, 1, "id: is missing", "audit log"),
    "an id that YAML takes for a bool": ("id: no\nversion: 1\n" + ABSTAIN, 1, "id: is False", "short name"),
    "no version": ("id: x\n" + ABSTAIN, 1, "version: is missing", "whole number"),
    "a version in words": ("id: x\nversion: one\n" + ABSTAIN, 2, "version: is 'one'", "whole number"),
    "no rules": (HEAD, 1, "rules: is missing", "at least one rule"),
    "an empty list of rules": (HEAD + "rules: []", 3, "rules: is []; should have at least 1 item", "at least one rule"),
    "rules as a mapping": (HEAD + "rules: {accept: all}", 3, "rules: is {'accept': 'all'}", "a list"),
    "an unknown key": (
        HEAD + ABSTAIN + "threshold: 3",
        4,
        "threshold: unknown key",
        "known here: budget, id, on_error",
    ),
    "a key that is no text": (HEAD + ABSTAIN + "7: 3", 1, "is 7; Keys should be strings", "id, version and rules"),
    "an unknown action": (
        HEAD + "rules:\n- block: {below: {confidence: 0.5}}",
        4,
        "rules[0].block: unknown key",
        "known here: abstain, accept, both, escalate, mark, redact, retrieve, retry",
    ),
    "a rule in one word": (HEAD + "rules:\n- accept", 4, "rules[0]: is 'accept', not a mapping", "accept: all"),
    "a rule without action": (HEAD + "rules:\n- {}", 4, "rules[0]: 0 actions", "exactly one of abstain, accept"),
    "a rule with two actions": (
        HEAD + "rules:\n- accept: all\n  abstain: {below: {confidence: 0.5}}",
        4,
        "rules[0]: 2 actions where there has to be one: abstain, accept",
        "exactly one of",
    ),
    "accept something": (HEAD + "rules:\n- accept: some", 4, "rules[0].accept: is 'some'", "accept: all"),
    "no threshold": (HEAD + "rules:\n- retry: {times: 2}", 4, "rules[0].retry: 0 thresholds", "exactly one of below"),
    "two thresholds": (
        HEAD + "rules:\n- retry: {below: {confidence: 0.5}, above: {score: x, limit: 1}}",
        4,
        "rules[0].retry: 2 thresholds where there has to be one: below, above",
        "exactly one of below",
    ),
    "two kinds in one threshold": (
        HEAD + "rules:\n- retry:\n    below: {confidence: 0.5, score: x}",
        5,
        "rules[0].retry.below.score: unknown key",
        "known here: confidence",
    ),
    "a raw score without limit": (
        HEAD + "rules:\n- retry: {above: {score: x}}",
        4,
        "rules[0].retry.above.limit: is missing",
        "finite number",
    ),
    "a limit that is not finite": (
        HEAD + "rules:\n- retry: {above: {score: x, limit: .inf}}",
        4,
        "rules[0].retry.above.limit: is inf",
        "finite number",
    ),
    "a confidence in percent": (
        HEAD + "rules:\n- abstain:\n    below:\n      confidence: 70",
        6,
        "rules[0].abstain.below.confidence: is 70; should be less than or equal to 1",
        "P(correct) in (0, 1]",
    ),
    "a confidence of nil": (
        HEAD + "rules:\n- abstain: {below: {confidence: 0}}",
        4,
        "confidence: is 0; should be greater than 0",
        "P(correct) in (0, 1]",
    ),
    "a confidence that is no number": (
        HEAD + "rules:\n- abstain: {below: {confidence: .nan}}",
        4,
        "confidence: is nan",
        "P(correct) in (0, 1]",
    ),
    "a confidence in quotes": (
        HEAD + "rules:\n- abstain: {below: {confidence: '0.5'}}",
        4,
        "confidence: is '0.5'",
        "P(correct) in (0, 1]",
    ),
    "a name that is taken": (
        HEAD + "rules:\n- abstain: {below: {confidence: 0.5}, name: budget}",
        4,
        "rules[0].abstain: name is 'budget'",
        "lower-case",
    ),
    "a score that falls": (
        HEAD + "rules:\n- abstain: {above: {score: min_token_logprob, limit: -3}}",
        4,
        "rules[0].abstain: score is 'min_token_logprob', which falls",
        "mean_nll",
    ),
    "no attempts": (HEAD + ABSTAIN + "budget:\n  attempts: 0", 5, "budget.attempts: is 0", "1 or more"),
    "no seconds": (HEAD + ABSTAIN + "budget: {seconds: -1}", 4, "budget.seconds: is -1", "above 0"),
    "endless seconds": (HEAD + ABSTAIN + "budget: {seconds: .inf}", 4, "budget.seconds: is inf", "above 0"),
    "no retries": (HEAD + "rules:\n- retry: {below: {confidence: 0.5}, times: 0}", 4, "retry.times: is 0", "1 or more"),
    "a greedy retry": (
        HEAD + "rules:\n- retry: {below: {confidence: 0.5}, temperature: 0}",
        4,
        "rules[0].retry.temperature: is 0",
        "greedy",
    ),
    "a template without passages": (
        HEAD + "rules:\n- retrieve: {below: {confidence: 0.5}, template: '{question}'}",
        4,
        "rules[0].retrieve: template is '{question}'",
        "{passages} and {question}",
    ),
    "an unknown word for errors": (HEAD + ABSTAIN + "on_error: ignore", 4, "on_error: is 'ignore'", "abstain, accept"),
    "one rule for both": (
        HEAD + "rules:\n- both: [accept: all]",
        4,
        "rules[0].both: is [{'accept': 'all'}]; should have at least 2 items",
        "two rules",
    ),
    "something wrong inside both": (
        HEAD + "rules:\n- both:\n  - accept: all\n  - abstain: {below: {confidence: 2}}",
        6,
        "rules[0].both[1].abstain.below.confidence: is 2",
        "P(correct) in (0, 1]",
    ),
    "both inside itself": (HEAD + "rules: &all\n- both: *all", 4, "cyclic reference", "two rules"),
    "a rule that can never act": (
        HEAD + "rules:\n- abstain: {below: {confidence: 0.8}}\n- retrieve: {below: {confidence: 0.6}}",
        5,
        "rules[1]: retrieve_below (confidence below 0.6) can never act: abstain_below (confidence below 0.8)",
        "ask it first",
    ),
    "two rules under one name": (
        HEAD + "rules:\n- retry: {below: {confidence: 0.8}}\n- retry: {below: {confidence: 0.6}}",
        5,
        "rules[1]: 2 rules are called 'retry_below'",
        "second_look",
    ),
    "two rules under one name inside both": (
        HEAD + "rules:\n- both:\n  - retry: {below: {confidence: 0.8}}\n  - retry: {below: {confidence: 0.6}}",
        4,
        "rules[0].both: 2 rules are called 'retry_below'",
        "second_look",
    ),
}


@pytest.fixture
def refuse(tmp_path: Path):
    """Load a text that is no policy, and hand back the refusal and the file's name."""

    def load(text: str, **settings) -> tuple[PolicyError, str]:
        path = tmp_path / "policy.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PolicyError) as refusal:
            load_policy(path, **settings)
        return refusal.value, str(path)

    return load


@pytest.mark.parametrize("case", BAD)
def test_a_document_that_makes_no_sense_is_told_by_place_and_value(refuse, case):
    text, line, message, _ = BAD[case]
    error, path = refuse(text, retriever=search)
    assert error.message.startswith(f"{path}: " if line is None else f"{path}:{line}: ") and message in error.message


@pytest.mark.parametrize("case", BAD)
def test_a_document_that_makes_no_sense_is_told_how_to_mend(refuse, case):
    assert BAD[case][3] in refuse(BAD[case][0], retriever=search)[0].hint


@pytest.mark.parametrize("case", BAD)
def test_a_refusal_is_one_line_without_another_error_behind_it(refuse, case):
    error, _ = refuse(BAD[case][0], retriever=search)
    assert "\n" not in str(error) and (error.__context__ is None or error.__suppress_context__)


def test_retrieval_without_a_retriever_is_refused():
    with pytest.raises(PolicyError, match=r"rag\.yaml:5: rules\[0\]\.retrieve: there is no retriever .*retriever=…"):
        load_policy("rag")


def test_a_retriever_that_can_not_be_called_is_refused_in_its_place():
    with pytest.raises(PolicyError, match=r"rules\[0\]\.retrieve: retriever is 'bm25' .*invoke"):
        load_policy("rag", retriever="bm25")


def test_an_escalation_without_a_target_is_a_hand_over():
    policy = load_policy(rules({"escalate": {"below": {"confidence": 0.5}}}))
    assert policy(verdict(0.2), FIRST).move.to is None


@pytest.mark.parametrize("source", ["nope", "nope/policy.yaml", "id: x\n" * 300])
def test_a_policy_that_is_not_there_is_told_with_those_that_are(source):
    with pytest.raises(PolicyError, match=r"cannot be read: .*abstain, observe, rag, strict"):
        load_policy(source)


def test_a_folder_is_not_a_policy(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        load_policy(tmp_path)


@pytest.mark.parametrize("content", [b"id: \xff\xfe", b"id: \x00"])
def test_a_file_that_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"is not text .*UTF-8"):
        load_policy(path)


def test_a_mapping_that_makes_no_sense_is_told_by_its_keys():
    with pytest.raises(PolicyError, match=r"^policy: rules\[0\]\.abstain\.below\.confidence: is 3; "):
        load_policy(rules({"abstain": {"below": {"confidence": 3}}}))


def test_packs_inside_the_package_are_found_first(tmp_path, monkeypatch):
    packs = tmp_path / "packs"
    packs.mkdir()
    (packs / "house.yaml").write_text(HEAD + ABSTAIN, encoding="utf-8")
    monkeypatch.setattr(documents.importlib.resources, "files", lambda package: tmp_path)
    assert pack_names() == ("house",)


def test_a_risk_given_replaces_every_risk_of_the_document():
    written = rules({"retry": {"below": {"max_risk": 0.2}}}, {"abstain": {"below": {"max_risk": 0.2}}})
    assert [rule.max_risk for rule in inner(load_policy(written, max_risk=0.05)).policies] == [0.05, 0.05]


def test_a_risk_given_to_a_document_without_one_is_refused():
    with pytest.raises(PolicyError, match=r"max_risk=0\.1 replaces nothing: .*abstain\.yaml .*leave it out"):
        load_policy("abstain", max_risk=0.1)
