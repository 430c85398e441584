"""What a certificate covers is compared on every call: what was drawn, asked or ended otherwise is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hallucination_guard import AuditLog, Calibration, Guard
from hallucination_guard.audit import records
from hallucination_guard.audit.replay import replay
from hallucination_guard.calibration import Labelled, calibrate
from hallucination_guard.calibration.certificate import drafts_hash
from hallucination_guard.errors import CalibrationError, CalibrationMismatch, PolicyError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions, Outcome
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetrieveBelow

SCORER = ScriptedScorer(0.01)
POLICY = AbstainBelow(max_risk=0.3)
MODEL = ScriptedModel("Paris")


def drawn(model: ScriptedModel = MODEL, messages: Any = "Who?", **settings: Any) -> Conditions:
    return Conditions.of(model.generate(messages, **settings))


def rows(conditions: Conditions | None = None, *, attempts: int = 1, **changes: Any) -> list[Labelled]:
    rng = np.random.default_rng(0)
    return [
        Labelled(
            id=f"q{at}",
            attempt=attempt,
            correct=bool(rng.random() > score**2),
            judge="made up",
            scores={"hybridgrad": float(score)},
            length=5,
            model=MODEL.identity,
            scorer=SCORER.identity,
            conditions=conditions or drawn(),
            **changes,
        )
        for at in range(400)
        for attempt in range(1, attempts + 1)
        for score in (rng.random(),)
    ]


def fitted(conditions: Conditions | None = None) -> Calibration:
    return calibrate(rows(conditions), alphas=[0.3])


def asked(
    ask: Callable[[Guard], Outcome], *, calibration: Calibration | None = None, model: ScriptedModel = MODEL
) -> tuple[Outcome, Any]:
    sink = MemorySink()
    guard = Guard(model, policy=POLICY, scorer=SCORER, calibration=calibration or fitted(), audit=sink)
    outcome = ask(guard)
    return outcome, sink.records[-1]


SYSTEM = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who?"}]
ASSISTANT = [{"role": "assistant", "content": "Who?"}]
TURNS = [{"role": role, "content": "Who?"} for role in ("user", "assistant", "user")]


def test_what_was_drawn_as_the_labelled_answers_is_certified():
    outcome, record = asked(lambda guard: guard("What is the capital of France?"))
    assert outcome.text == "Paris" and outcome.verdict.max_risk == 0.3
    assert record.certificate == outcome.verdict.certificate and record.uncovered == ""


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("temperature", lambda guard: guard("Who?", temperature=0.7)),
        ("max_new_tokens", lambda guard: guard("Who?", max_new_tokens=5)),
        ("stop", lambda guard: guard("Who?", stop=["\n"])),
        ("frame", lambda guard: guard(SYSTEM)),
        ("frame", lambda guard: guard(TURNS)),
        ("frame", lambda guard: guard(ASSISTANT)),
        ("frame", lambda guard: guard("Once upon a time. Who? Tell me.", question="Who?")),
        ("ending", lambda guard: guard.review("Who?", "Paris")),
    ],
    ids=[
        "another temperature",
        "fewer tokens at most",
        "another stop text",
        "a system prompt",
        "a conversation",
        "a turn that is not the user's",
        "another text around the question",
        "an answer that something else wrote",
    ],
)
@pytest.mark.fault("conditions", "{case}", "no certificate; the decision and the record name what differs")
def test_what_was_drawn_otherwise_is_refused_by_name(name: str, ask: Callable[[Guard], Outcome]):
    outcome, record = asked(ask)
    assert (outcome.text, outcome.verdict.max_risk, record.certificate) == (None, None, None)
    assert name in outcome.decision.reason and name in record.uncovered


def test_another_top_p_of_a_greedy_draw_is_the_same_draw():
    assert asked(lambda guard: guard("Who?", top_p=0.5, seed=3))[0].text == "Paris"


def test_another_question_in_the_same_frame_is_covered():
    conditions = drawn(messages="Q: Who? A:", question="Who?")
    assert asked(lambda guard: guard("Q: When? A:", question="When?"), calibration=fitted(conditions))[0].text
    assert not asked(lambda guard: guard("Q: When? B:", question="When?"), calibration=fitted(conditions))[0].text


@pytest.mark.parametrize("ending", ["length", "stop_text"])
@pytest.mark.parametrize("policy", [POLICY, AbstainBelow(confidence=0.01)], ids=["max_risk", "confidence"])
@pytest.mark.fault("conditions", "an answer that is cut: {case}", "no confidence and no certificate")
def test_a_cut_answer_passes_no_rule_fitted_on_whole_ones(ending: Any, policy: Any):
    model, sink = ScriptedModel("The", ending=ending), MemorySink()
    outcome = Guard(model, policy=policy, scorer=SCORER, calibration=fitted(), audit=sink)("Who?")
    assert (outcome.text, outcome.confidence, outcome.verdict.max_risk) == (None, None, None)
    assert "cut at" in outcome.decision.reason and outcome.verdict.finish_reason == ending
    assert outcome.decision.rule == "abstain_below"


def test_a_cut_answer_is_what_the_policy_acts_on():
    policy = EscalateBelow(confidence=0.01, to=lambda messages: "ask me")
    outcome = Guard(ScriptedModel("The", ending="length"), policy=policy, scorer=SCORER, calibration=fitted())("Who?")
    assert outcome.text == "ask me"


def test_cut_answers_pass_where_answers_cut_alike_were_labelled():
    model = ScriptedModel("The", ending="length")
    calibration = calibrate([*rows()[:200], *rows(drawn(model))[200:]], alphas=[0.3])
    assert calibration.conditions.endings == ("length", "stop")
    assert asked(lambda guard: guard("Who?"), calibration=calibration, model=model)[0].text == "The"
    outcome, _ = asked(lambda guard: guard("Who?", max_new_tokens=1), calibration=calibration, model=model)
    assert outcome.text is None and outcome.confidence is None


def test_a_raw_score_knows_nothing_of_endings():
    policy = AbstainBelow(score="hybridgrad", limit=1.0)
    assert Guard(ScriptedModel("The", ending="length"), policy=policy, scorer=SCORER)("Who?").text == "The"


@pytest.mark.fault("conditions", "a redraw in a call that is not covered", "no certificate either")
def test_a_later_attempt_of_an_uncovered_call_is_not_covered_either():
    from hallucination_guard_policies import RetryBelow

    policy = RetryBelow(max_risk=0.3, times=1) | AbstainBelow(max_risk=0.3)
    certified = calibrate(rows(attempts=2, policy=drafts_hash(policy)), alphas=[0.3], policy=policy)
    scorer = ScriptedScorer([0.9, 0.01, 0.9, 0.01])
    guard = Guard(ScriptedModel(["a", "b", "c", "d"]), policy=policy, scorer=scorer, calibration=certified)
    assert guard("Who?").text == "b"
    outcome = guard(SYSTEM)
    assert (outcome.text, outcome.verdict.max_risk) == (None, None) and "frame" in outcome.decision.reason


class Search:
    def __init__(self, identity: str) -> None:
        self.identity = identity

    def __call__(self, query: str) -> list[str]:
        return ["a passage"]


def retrieving(retriever: Any, **settings: Any) -> Any:
    return RetrieveBelow(max_risk=0.3, retriever=retriever, **settings) | AbstainBelow(max_risk=0.3)


@pytest.mark.fault("conditions", "another corpus or another k behind the same retriever", "`CalibrationMismatch`")
def test_a_certificate_is_of_one_corpus():
    policy = retrieving(Search("handbook 1"))
    certified = calibrate(rows(attempts=2, policy=drafts_hash(policy)), alphas=[0.3], policy=policy)
    Guard(MODEL, policy=policy, scorer=SCORER, calibration=certified)
    Guard(MODEL, policy=retrieving(Search(""), corpus="handbook 1"), scorer=SCORER, calibration=certified)
    for other in (retrieving(Search("handbook 2")), retrieving(Search("handbook 1"), k=2)):
        with pytest.raises(CalibrationMismatch, match="no certificate covers the policy"):
            Guard(MODEL, policy=other, scorer=SCORER, calibration=certified)


@pytest.mark.fault(
    "conditions", "a retriever that does not say what it searches", "refused where a certificate is asked for"
)
def test_a_retriever_that_does_not_say_what_it_searches_cannot_be_certified():
    policy = retrieving(lambda query: ["a passage"])
    with pytest.raises(PolicyError, match="does not say which corpus"):
        Guard(MODEL, policy=policy, scorer=SCORER, calibration=fitted())
    with pytest.raises(CalibrationError, match="does not say which corpus"):
        calibrate(rows(attempts=2, policy=drafts_hash(policy)), alphas=[0.3], policy=policy)


def test_answers_drawn_differently_are_not_calibrated_on_together():
    mixed = [*rows()[:200], *rows(drawn(temperature=0.7))[200:]]
    with pytest.raises(CalibrationError, match="different temperature"):
        calibrate(mixed)


@pytest.mark.fault("conditions", "they are edited in the file", "the file is refused")
def test_conditions_edited_in_a_file_part_from_their_certificates(tmp_path):
    import json

    fitted().save(tmp_path / "c.json")
    plain = json.loads((tmp_path / "c.json").read_text())
    plain["conditions"]["temperature"] = 0.7
    (tmp_path / "c.json").write_text(json.dumps(plain))
    with pytest.raises(CalibrationError, match="of another model, scorer or conditions"):
        Calibration.load(tmp_path / "c.json")


@pytest.mark.parametrize("name", ["fingerprint", "structure", "template"])
def test_so_does_any_other_binding(tmp_path, name):
    import json

    fitted().save(tmp_path / "c.json")
    plain = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**plain, name: "another"}))
    with pytest.raises(CalibrationError, match="of another model, scorer or conditions"):
        Calibration.load(tmp_path / "c.json")


def test_another_structure_is_refused_by_name():
    other = replace(MODEL.identity, structure="an adapter")
    with pytest.raises(CalibrationMismatch, match="structure"):
        fitted().check(other, SCORER.identity)


def test_a_log_tells_what_was_not_covered_and_replays_it(tmp_path):
    policy = AbstainBelow(confidence=0.01)
    log = AuditLog(tmp_path / "a.jsonl")
    calibration = fitted()
    Guard(ScriptedModel("The", ending="length"), policy=policy, scorer=SCORER, calibration=calibration, audit=log)("W?")
    Guard(ScriptedModel("Paris"), policy=policy, scorer=SCORER, calibration=calibration, audit=log)("Who?")
    again = replay(records(tmp_path / "a.jsonl"), policy)
    other = replay(records(tmp_path / "a.jsonl"), policy, calibration=calibration)
    assert again.flips == other.flips == ()


@pytest.mark.parametrize(
    "change",
    [
        {"frame": ""},
        {"frame": 3},
        {"endings": []},
        {"endings": ["end"]},
        {"endings": "stop"},
        {"stop": "x"},
        {"stop": [""]},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"temperature": float("nan")},
        {"top_p": -1},
        {"unknown": 1},
    ],
)
def test_conditions_that_cannot_be_are_refused(change: dict[str, Any]):
    with pytest.raises(ValueError):
        Conditions.from_json_dict({**drawn().to_json_dict(), **change})


def test_the_white_box_model_says_how_an_answer_ended(tiny):
    whole = tiny.generate("Who are you?", max_new_tokens=6)
    assert (whole.finish_reason, whole.settings.max_new_tokens) == ("length", 6)
    text = whole.text
    cut = tiny.generate("Who are you?", max_new_tokens=6, stop=[text[2:4]])
    assert cut.finish_reason == "stop_text" and cut.settings.stop == (text[2:4],)
    assert tiny.read("Who are you?", answer="me").finish_reason == "read"


@pytest.mark.fault("conditions", "they are changed in memory", "`CalibrationMismatch` on the next call")
def test_conditions_changed_in_memory_part_from_their_certificates():
    changed = fitted().model_copy(update={"conditions": drawn(temperature=0.7)})
    with pytest.raises(CalibrationMismatch, match="changed after it was certified"):
        Guard(MODEL, policy=POLICY, scorer=SCORER, calibration=changed)
