"""A guard whose policy acts on sentences: what leaves, what is written down, what can be decided again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from hallucination_guard import AuditLog, Guard, Released
from hallucination_guard.audit import records
from hallucination_guard.audit.replay import replay
from hallucination_guard.audit.verdicts import Verdicts
from hallucination_guard.calibration import LabelledResponse, LabelledSentence, SentenceCalibration, calibrate_sentences
from hallucination_guard.errors import CalibrationError, CalibrationMismatch, ConfigurationError, PolicyError
from hallucination_guard.guard.steps import Steps
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Call, Conditions, Decision, Edit, Event, Score, Situation, Verdict
from hallucination_guard_policies import AbstainBelow, MarkSentences, RedactSentences, RetryBelow, Unscored

ANSWER = "It was Ada. She lived in Rome. She wrote it."
MODEL = ScriptedModel(ANSWER)


def doubts(text: str) -> Mapping[str, float]:
    return {"mean_nll": 2.0 if "Rome" in text else 0.5}


SCORER = ScriptedScorer(0.1, by_sentence=doubts)
MARK = MarkSentences(score="mean_nll", limit=1.0)


def guard(policy: Any = MARK, scorer: Any = SCORER, **more: Any) -> Guard:
    return Guard(more.pop("model", ScriptedModel(ANSWER)), policy=policy, scorer=scorer, **more)


def calibration(**changes: Any) -> SentenceCalibration:
    made = MODEL.generate("Who?")
    rows = [
        LabelledResponse(
            **{
                "id": f"q{at}",
                "judge": "made up",
                "sentences": tuple(
                    LabelledSentence(scores={"mean_nll": score}, correct=score < 1.0 or at % 20 > 0)
                    for score in (0.1 + at / 200, 1.5)
                ),
                "model": MODEL.identity,
                "scorer": SCORER.sentences,
                "conditions": Conditions.of(made),
                **changes,
            }
        )
        for at in range(60)
    ]
    return calibrate_sentences(rows, score="mean_nll", alphas=[0.05, 0.3], at_most=[0, 1])


def test_doubtful_sentences_leave_with_a_mark(sink: MemorySink) -> None:
    outcome = guard(audit=sink)("Who?")
    assert outcome.text == "It was Ada. She lived in Rome. [unverified] She wrote it."
    assert outcome.accepted and outcome.retention == pytest.approx(2 / 3)
    assert outcome.generation.text == ANSWER


def test_or_do_not_leave_at_all() -> None:
    outcome = guard(RedactSentences(score="mean_nll", limit=1.0))("Who?")
    assert outcome.text == "It was Ada. She wrote it."
    nothing = guard(RedactSentences(score="mean_nll", limit=0.1))("Who?")
    assert nothing.text is None and nothing.retention is None


def test_the_record_keeps_which_and_no_text_of_them(sink: MemorySink) -> None:
    guard(audit=sink)("Who?")
    [record] = sink.records
    assert record.edit == {"manner": "mark", "doubtful": (1,), "sentences": 3, "marker": " [unverified]"}
    assert record.sentences is not None
    assert [each["scores"]["mean_nll"] for each in record.sentences["scored"]] == [0.5, 2.0, 0.5]  # type: ignore[index,union-attr,call-overload]
    assert "Rome" not in json.dumps(record.to_json_dict()["sentences"])
    assert record.answer == ANSWER


def test_an_answer_without_such_a_policy_has_the_record_it_always_had(sink: MemorySink) -> None:
    guard(AbstainBelow(score="hybridgrad", limit=1.0), ScriptedScorer(0.1), audit=sink)("Who?")
    assert not {"sentences", "edit"} & sink.records[0].to_json_dict().keys()


def test_the_same_decision_can_be_taken_again(tmp_path: Any) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
    outcome = guard(audit=log)("Who?")
    [record] = records(tmp_path / "audit.jsonl")
    again = MARK(Verdicts()(record), Situation())
    assert again == outcome.decision
    stricter = RedactSentences(score="mean_nll", limit=0.1)
    found = replay(records(tmp_path / "audit.jsonl"), stricter)
    assert (found.now.abstained, len(found.flips)) == (1, 1)
    assert replay(records(tmp_path / "audit.jsonl"), MARK).flips == ()


def test_thresholds_are_replayed_as_they_held(tmp_path: Any) -> None:
    policy = MarkSentences(alpha=0.3)
    log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
    outcome = guard(policy, sentences=calibration(), audit=log)("Who?")
    assert outcome.decision.edit is not None
    [record] = records(tmp_path / "audit.jsonl")
    assert policy(Verdicts()(record), Situation()) == outcome.decision


def test_a_log_without_sentences_says_so(tmp_path: Any) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
    guard(AbstainBelow(score="hybridgrad", limit=1.0), ScriptedScorer(0.1), audit=log)("Who?")
    found = replay(records(tmp_path / "audit.jsonl"), MARK)
    assert found.unknown_because == {"the policy acts on sentences and the record has none": 1}


def test_without_scores_of_sentences_nothing_leaves() -> None:
    blind = Score(status="scored", scorer=SCORER.identity, scores={"hybridgrad": 0.1})

    class Blind(ScriptedScorer):
        def batch(self, model: Any, generations: Any) -> list[Score]:
            return [blind for _ in generations]

    scorer = Blind(0.1, by_sentence=doubts)
    outcome = guard(scorer=scorer)("Who?")
    assert (outcome.text, outcome.decision.rule) == (None, "on_unscorable")
    assert guard(Unscored(MARK, on_unscorable="accept"), scorer)("Who?").text == ANSWER


def test_an_edit_of_other_sentences_lets_nothing_out(sink: MemorySink) -> None:
    class Odd:
        edits = True

        def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
            edit = Edit(manner="mark", doubtful=(6,), sentences=7, marker="?")
            return Decision(action="accept", rule="odd", reason="odd", edit=edit)

        def describe(self) -> dict[str, Any]:
            return {"policy": "Odd"}

    with pytest.raises(PolicyError, match="other sentences"):
        guard(Odd(), audit=sink)("Who?")
    assert sink.records[0].rule == "interrupted"


def test_a_scorer_that_scores_no_sentences_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not score them"):
        guard(scorer=ScriptedScorer(0.1))


def test_alpha_wants_a_calibration_of_sentences() -> None:
    with pytest.raises(ConfigurationError, match="no calibration of them"):
        guard(MarkSentences(alpha=0.3))


def test_the_calibration_of_another_model_is_refused() -> None:
    own = calibration(model=replace(MODEL.identity, fingerprint="another"))
    with pytest.raises(CalibrationMismatch):
        guard(MarkSentences(alpha=0.3), sentences=own)


def test_thresholds_of_single_drafts_do_not_hold_for_redraws() -> None:
    with pytest.raises(ConfigurationError, match="single drafts"):
        guard(RetryBelow(score="hybridgrad", limit=1.0) | MarkSentences(alpha=0.3), sentences=calibration())


def test_a_certified_threshold_marks() -> None:
    outcome = guard(MarkSentences(alpha=0.3), sentences=calibration())("Who?")
    assert outcome.decision.edit is not None and "back-off" in outcome.decision.reason


def test_what_was_not_shown_is_not_promised() -> None:
    outcome = guard(MarkSentences(alpha=0.01), sentences=calibration())("Who?")
    assert (outcome.text, outcome.decision.rule) == (None, "uncalibrated")


def test_an_answer_drawn_otherwise_is_not_covered() -> None:
    outcome = guard(MarkSentences(alpha=0.3), sentences=calibration())("Who?", temperature=1.0)
    assert outcome.text is None and "temperature" in outcome.decision.reason


def test_a_stream_is_refused() -> None:
    one = guard()
    assert not one.streams
    with pytest.raises(ConfigurationError, match="whole answer"):
        list(one.stream("Who?"))


class Wraps:
    """A policy of one's own around another one, which does not say that it edits."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        decision: Decision = self._policy(verdict, situation)
        return decision

    def describe(self) -> dict[str, Any]:
        return {"policy": "Wraps"}


async def streamed(way: str, one: Guard) -> AsyncIterator[Event]:
    if way in ("astream", "afollow"):
        async for event in one.astream("Who?") if way == "astream" else one.afollow("Who?", pieces()):
            yield event
    else:
        for event in one.stream("Who?") if way == "stream" else one.follow("Who?", [ANSWER]):
            yield event


async def pieces() -> AsyncIterator[str]:
    yield ANSWER


@pytest.mark.parametrize("way", ["stream", "astream", "follow", "afollow"])
@pytest.mark.parametrize("policy", [MARK, RedactSentences(score="mean_nll", limit=1.0)], ids=["mark", "redact"])
async def test_nothing_leaves_a_stream_that_a_decision_would_edit(policy: Any, way: str, sink: MemorySink) -> None:
    events: list[Event] = []
    one = guard(Wraps(policy), audit=sink)
    assert one.streams  # nobody can tell before it decides
    with pytest.raises(PolicyError, match="leaves sentence by sentence"):
        async for event in streamed(way, one):
            events.append(event)
    assert events == []
    assert [each.rule for each in sink.records] == ["interrupted"]


def test_what_left_before_such_a_decision_is_all_that_leaves(sink: MemorySink) -> None:
    class Late(Wraps):
        def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
            decision = super().__call__(verdict, situation)
            return decision if len(verdict.score.sentences) > 1 else replace(decision, edit=None)

    events = guard(Late(MARK), audit=sink).stream("Who?")
    first = next(events)
    assert isinstance(first, Released) and first.text == "It was Ada. "
    with pytest.raises(PolicyError, match="leaves sentence by sentence"):
        next(events)
    assert [each.rule for each in sink.records] == ["mark_sentences", "interrupted"]


def test_a_call_is_edited_whether_the_policy_said_so_or_not(sink: MemorySink) -> None:
    marked = "It was Ada. She lived in Rome. [unverified] She wrote it."
    one = guard(Wraps(MARK), audit=sink)
    steps = Steps(one)
    kept, _ = steps.score(steps.draw(steps.begin("Who?", request_id="r", call=Call())))
    assert one("Who?").text == one.review("Who?", ANSWER).text == steps.decide(kept)[1].text == marked


def test_a_redraw_is_edited_as_it_was_judged(sink: MemorySink) -> None:
    drafts = ["It was Bob. In Rome.", "It was Ada."]
    scorer = ScriptedScorer({drafts[0]: 0.2, drafts[1]: 0.9}, by_sentence=doubts)
    policy = RetryBelow(score="hybridgrad", limit=0.1, times=1) | AbstainBelow(score="hybridgrad", limit=0.5) | MARK
    outcome = guard(policy, scorer, model=ScriptedModel(drafts), audit=sink)("Who?")
    assert outcome.text == "It was Bob. In Rome. [unverified]"  # the first draft was the more certain one
    assert sink.records[-1].judged == 1


def test_a_call_in_steps_is_edited_too() -> None:
    steps = Steps(guard())
    kept = steps.draw(steps.begin("Who?", request_id="r", call=Call()))
    kept, _ = steps.score(json.loads(json.dumps(kept)))
    _, outcome = steps.decide(json.loads(json.dumps(kept)))
    assert outcome.text is not None and "[unverified]" in outcome.text


def test_by_default_the_sentences_are_scored_where_the_policy_acts_on_them(tiny: Any) -> None:
    outcome = Guard(tiny, policy=MarkSentences(score="sequence_nll", limit=1e-6)).review("Who?", "It was Ada.")
    assert outcome.text == "It was Ada. [unverified]"


def test_a_real_model_is_marked(tiny: Any) -> None:
    from hallucination_guard.scoring import BySentence, HybridGrad

    policy = MarkSentences(score="sequence_nll", limit=1e-6)
    one = Guard(tiny, policy=policy, scorer=BySentence(HybridGrad(), gradient=True))
    outcome = one.review("Who?", "It was Ada. She wrote it.")
    assert outcome.text == "It was Ada. [unverified] She wrote it. [unverified]"


TEXTS = ["It was Ada. ", "It was Bob! ", "She wrote it. ", "Or not? "]


@pytest.fixture(scope="module")
def learned(tiny: Any) -> SentenceCalibration:
    """Weights and thresholds from what a real model has in mind of sentences, labelled by what they say."""
    from hallucination_guard.scoring import score_sentences
    from hallucination_guard.scoring.sentences import sentence_scorer

    rows = []
    for at in range(160):
        texts = [TEXTS[(at // 4**place + place) % 4] for place in range(3)]
        made = tiny.read(f"Who? {at}", answer="".join(texts).strip())
        scored = score_sentences(tiny, made, gradient=False, states=True)
        own = tuple(
            LabelledSentence(scores=each.scores, correct="Bob" not in each.text, states=each.states) for each in scored
        )
        rows.append(
            LabelledResponse(
                id=f"q{at}",
                judge="made up",
                sentences=own,
                model=tiny.identity,
                scorer=sentence_scorer(gradient=False, states=True),
                conditions=Conditions.of(made),
            )
        )
    return calibrate_sentences(rows, score="fused", alphas=[0.05])


def test_what_was_learned_of_sentences_marks_the_wrong_one(
    tiny: Any, learned: SentenceCalibration, tmp_path: Any
) -> None:
    assert learned.fusion is not None and learned.fusion.probe is not None
    policy = MarkSentences(alpha=0.05)
    log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
    one = Guard(tiny, policy=policy, sentences=learned, audit=log)  # the scorer that the calibration is of
    outcome = one.review("Who? 200", "It was Ada. It was Bob! She wrote it.")
    assert outcome.text == "It was Ada. It was Bob! [unverified] She wrote it."
    [record] = records(tmp_path / "audit.jsonl")
    assert policy(Verdicts()(record), Situation()) == outcome.decision
    assert replay(records(tmp_path / "audit.jsonl"), policy).flips == ()
    kept = json.dumps(record.to_json_dict()["sentences"])
    assert learned.fusion.name in kept and "float16" not in kept


def test_in_steps_what_was_learned_says_the_same(tiny: Any, learned: SentenceCalibration) -> None:
    one = Guard(tiny, policy=MarkSentences(alpha=0.05), sentences=learned, generation={"max_new_tokens": 24})
    steps = Steps(one)
    kept = steps.draw(steps.begin("Who? 200", request_id="r", call=Call()))
    kept, _ = steps.score(json.loads(json.dumps(kept)))
    _, outcome = steps.decide(json.loads(json.dumps(kept)))
    again = one("Who? 200")
    assert outcome.text == again.text and outcome.decision == again.decision


@pytest.mark.fault("graph", "what scored a draft's sentences is not the guard's scorer", "the call is refused")
@pytest.mark.parametrize("other", [{}, {"gradient": True}, {"states": True, "layers": "official"}], ids=str)
def test_sentences_that_something_else_scored_are_not_decided_on(
    tiny: Any, learned: SentenceCalibration, other: dict[str, Any]
) -> None:
    from hallucination_guard.scoring import BySentence, GradientSettings, HybridGrad

    layers = other.pop("layers", "paper")
    scorer = BySentence(HybridGrad(), **other, settings=GradientSettings(layers=layers))
    first = Steps(Guard(tiny, policy=MarkSentences(score="mean_nll", limit=1e9), scorer=scorer))
    kept, _ = first.score(first.draw(first.begin("Who?", request_id="r", call=Call())))
    own = Guard(tiny, policy=MarkSentences(alpha=0.05), sentences=learned)
    with pytest.raises(ConfigurationError, match="another scorer"):
        Steps(own).decide(json.loads(json.dumps(kept)))


def test_the_scorer_that_a_calibration_is_of_is_the_default(tiny: Any) -> None:
    from hallucination_guard.scoring import BySentence, GradientSettings, HybridGrad

    settings = GradientSettings(layers="official", weighting="none")
    for scorer in (
        BySentence(HybridGrad(), states=True, settings=settings),
        BySentence(HybridGrad(), gradient=True, settings=settings),
    ):
        own = calibration(model=tiny.identity, scorer=scorer.sentences)
        made = Guard(tiny, policy=MarkSentences(alpha=0.3), sentences=own).scorer
        assert made.sentences == scorer.sentences  # type: ignore[attr-defined]


def test_a_scorer_without_the_states_is_refused(tiny: Any, learned: SentenceCalibration) -> None:
    from hallucination_guard.scoring import BySentence, HybridGrad

    with pytest.raises(CalibrationMismatch, match="scorer settings"):
        Guard(tiny, policy=MarkSentences(alpha=0.05), sentences=learned, scorer=BySentence(HybridGrad()))


@pytest.mark.fault("scorer", "the states of its sentences are missing", "an error, nothing leaves")
def test_states_that_are_not_there_let_nothing_out(
    tiny: Any, learned: SentenceCalibration, sink: MemorySink, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hallucination_guard.scoring import BySentence

    batch = BySentence.batch

    def without(self: Any, model: Any, generations: Any) -> list[Score]:
        scores = batch(self, model, generations)
        return [replace(s, sentences=tuple(replace(each, states=None) for each in s.sentences)) for s in scores]

    monkeypatch.setattr(BySentence, "batch", without)
    one = Guard(tiny, policy=MarkSentences(alpha=0.05), sentences=learned, audit=sink)
    with pytest.raises(CalibrationError, match="states"):
        one.review("Who?", "It was Ada. It was Bob!")
    assert not any(record.decision == "accept" for record in sink.records)
