"""Whatever breaks, no text leaves that was not decided on, and no attempt is without a record."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.audit import AuditLog, records
from hallucination_guard.errors import (
    AuditError,
    CalibrationError,
    CalibrationMismatch,
    ConfigurationError,
    InputError,
    PolicyError,
    ScoringError,
)
from hallucination_guard.scoring import HybridGrad, SemGrad
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard.values import Conditions, Decision, Generation, Outcome, Score, ScorerIdentity
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    Composable,
    EscalateBelow,
    RetrieveBelow,
    RetryBelow,
    Unscored,
)

LIMIT = {"score": "hybridgrad", "limit": 1.0}
GOOD, BAD = 0.5, 2.0


def guard_of(policy: Any = None, scorer: Any = None, **settings: Any) -> Guard:
    model = settings.pop("model", None) or ScriptedModel("Lyon")
    return Guard(model, policy=policy or Accept(), scorer=scorer or ScriptedScorer(GOOD), **settings)


class Deciding(Composable):
    """A policy that does whatever it is told."""

    def __init__(self, decide: Any) -> None:
        self.decide = decide

    def __call__(self, verdict: Any, situation: Any) -> Any:
        return self.decide(verdict, situation)

    def describe(self) -> dict[str, Any]:
        return {"policy": "Deciding"}


class Scoring:
    """A scorer that does whatever it is told."""

    primary = "hybridgrad"
    identity = ScorerIdentity(name="hybridgrad", version="1")

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def batch(self, model: Any, generations: Sequence[Any]) -> Any:
        return self._batch(generations)


def score(value: float = GOOD) -> Score:
    return Score(status="scored", scorer=Scoring.identity, scores={"hybridgrad": value})


async def coroutine(value: Any) -> Any:
    return value


def interrupts(*_: Any) -> Any:
    raise KeyboardInterrupt


class TestPolicy:
    @pytest.mark.parametrize("answer", [None, True, "accept", 1.0, {"action": "accept"}, object()])
    def test_what_is_no_decision_is_refused(self, answer: Any) -> None:
        with pytest.raises(PolicyError):
            guard_of(Deciding(lambda verdict, situation: answer))("Capital?")

    @pytest.mark.fault(
        "policy", "it decides None, a text or True", "an error to the caller, a record `interrupted`, no text"
    )
    def test_what_is_no_decision_is_recorded_as_interrupted(self, sink: MemorySink) -> None:
        with pytest.raises(PolicyError):
            guard_of(Deciding(lambda verdict, situation: None), audit=sink)("Capital?")
        assert [(each.decision, each.rule) for each in sink.records] == [("abstain", "interrupted")]

    def test_an_exception_in_the_policy_reaches_the_caller(self) -> None:
        with pytest.raises(ZeroDivisionError):
            guard_of(Deciding(lambda verdict, situation: 1 // 0))("Capital?")

    @pytest.mark.fault("policy", "it raises", "the error to the caller, a record `interrupted`, no text")
    def test_an_exception_in_the_policy_is_recorded(self, sink: MemorySink) -> None:
        with pytest.raises(ZeroDivisionError):
            guard_of(Deciding(lambda verdict, situation: 1 // 0), audit=sink)("Capital?")
        assert [each.rule for each in sink.records] == ["interrupted"]

    @pytest.mark.fault("policy", "it is async", "refused, no text")
    def test_an_async_policy_is_refused(self) -> None:
        promised = coroutine(Decision(action="accept", rule="r", reason="because"))
        try:
            with pytest.raises(PolicyError):
                guard_of(Deciding(lambda verdict, situation: promised))("Capital?")
        finally:
            promised.close()

    @pytest.mark.fault("policy", "what it says of itself is no JSON", "an error before anything is generated")
    def test_a_policy_that_describes_itself_badly_lets_nothing_through(self, sink: MemorySink) -> None:
        class Odd(Deciding):
            def describe(self) -> dict[str, Any]:
                return {"limit": math.nan}

        accept = Decision(action="accept", rule="r", reason="because")
        with pytest.raises(ValueError):
            guard_of(Odd(lambda verdict, situation: accept), audit=sink)("Capital?")

    def test_something_that_can_not_be_called_is_no_policy(self) -> None:
        with pytest.raises(ConfigurationError):
            guard_of(policy="accept")

    @pytest.mark.fault("policy", "a plain function without `describe()`", "refused when the guard is made")
    def test_a_function_that_can_not_describe_itself_is_refused_before_anything_is_generated(self) -> None:
        with pytest.raises(ConfigurationError):
            guard_of(lambda verdict, situation: Decision(action="accept", rule="r", reason="because"))


class TestScorer:
    BROKEN: ClassVar[dict[str, Any]] = {
        "raises": lambda generations: 1 // 0,
        "gives not a number": lambda generations: [score(math.nan) for _ in generations],
        "gives infinity": lambda generations: [score(math.inf) for _ in generations],
        "gives too few": lambda generations: [],
        "gives too many": lambda generations: [score()] * (len(generations) + 1),
        "gives None for one": lambda generations: [None] * len(generations),
        "gives numbers": lambda generations: [0.1] * len(generations),
        "gives None": lambda generations: None,
        "gives one score": lambda generations: score(),
    }

    @pytest.mark.parametrize("how", BROKEN)
    def test_one_that_fails_leads_to_an_abstention(self, how: str) -> None:
        outcome = guard_of(scorer=Scoring(self.BROKEN[how]))("Capital?")
        assert (outcome.text, outcome.decision.rule) == (None, "on_error")

    @pytest.mark.parametrize("how", BROKEN)
    @pytest.mark.fault("scorer", "{case}", "the policy's `on_error` (by default an abstention), recorded")
    def test_one_that_fails_is_in_the_log_with_its_reason(self, how: str, sink: MemorySink) -> None:
        guard_of(scorer=Scoring(self.BROKEN[how]), audit=sink)("Capital?")
        [record] = sink.records
        assert record.status == "error" and record.detail and not record.scores

    def test_an_error_is_accepted_only_on_the_policys_word(self, sink: MemorySink) -> None:
        policy = Unscored(Accept(), on_error="accept")
        outcome = guard_of(policy, ScriptedScorer(ValueError("no gradient")), audit=sink)("Capital?")
        assert (outcome.text, "ValueError" in sink.records[0].reason) == ("Lyon", True)

    @pytest.mark.fault(
        "scorer", "one answer of a batch cannot be scored", "the others are scored, this one is unscored"
    )
    def test_one_answer_that_can_not_be_scored_does_not_take_the_others_with_it(self) -> None:
        model = ScriptedModel({"a": "one", "b": "two", "c": "three"})
        script = {"one": GOOD, "two": ValueError("no"), "three": GOOD}
        outcomes = guard_of(scorer=ScriptedScorer(script), model=model).batch(["a", "b", "c"])
        assert [each.text for each in outcomes] == ["one", None, "three"]

    @pytest.mark.fault("scorer", "it gives the score of another scorer", "an error score, no text")
    def test_a_score_signed_by_another_scorer_is_refused(self) -> None:
        foreign = Score(status="scored", scorer=ScorerIdentity(name="other", version="9"), scores={"hybridgrad": 0.0})
        outcome = guard_of(AbstainBelow(**LIMIT), Scoring(lambda generations: [foreign] * len(generations)))("Capital?")
        assert outcome.text is None

    def test_a_score_can_not_be_built_with_an_unknown_status(self) -> None:
        with pytest.raises(ValueError):
            Score(status="fine", scorer=Scoring.identity, reason="because")  # type: ignore[arg-type]

    @pytest.mark.fault("scorer", "the score that the policy reads is missing", "an abstention `unknown_score`")
    def test_the_score_that_the_policy_reads_must_be_there(self) -> None:
        outcome = guard_of(AbstainBelow(score="semgrad", limit=1e9))("Capital?")
        assert (outcome.text, outcome.decision.rule) == (None, "unknown_score")


class TestUnscorable:
    def guard(self, tiny: WhiteBoxModel, policy: Any, sink: MemorySink) -> Guard:
        return Guard(tiny, policy=policy, audit=sink)

    ANSWERS: ClassVar[dict[str, Any]] = {
        "empty": (),
        "end of turn only": (2,),
        "special tokens only": (0, 1),
        "white space": (223, 201),
    }

    @pytest.mark.parametrize("kind", ANSWERS)
    @pytest.mark.fault(
        "answer", "{case}", "unscorable: the policy's `on_unscorable` (by default an abstention), recorded"
    )
    def test_it_is_abstained_from(self, kind: str, tiny: WhiteBoxModel, sink: MemorySink) -> None:
        outcome = self.guard(tiny, Accept(), sink).review("Who?", self.ids(tiny, kind))
        assert (outcome.text, outcome.decision.rule) == (None, "on_unscorable")

    @pytest.mark.parametrize("kind", ANSWERS)
    def test_it_is_accepted_only_on_the_policys_word(self, kind: str, tiny: WhiteBoxModel, sink: MemorySink) -> None:
        policy = Unscored(Accept(), on_unscorable="accept")
        outcome = self.guard(tiny, policy, sink).review("Who?", self.ids(tiny, kind))
        assert outcome.text is not None and not outcome.text.strip()

    @pytest.mark.parametrize("kind", ANSWERS)
    def test_the_log_shows_that_it_was_accepted_unscored(
        self, kind: str, tiny: WhiteBoxModel, sink: MemorySink
    ) -> None:
        policy = Unscored(Accept(), on_unscorable="accept")
        self.guard(tiny, policy, sink).review("Who?", self.ids(tiny, kind))
        [record] = sink.records
        assert (record.status, record.rule, "unscored" in record.reason) == ("unscorable", "on_unscorable", True)

    @pytest.mark.fault("answer", "the model ends at once", "unscorable, an abstention")
    def test_a_model_that_ends_at_once_is_abstained_from(self, sink: MemorySink) -> None:
        import torch

        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight[2] = 0
        model.generation_config.eos_token_id = list(range(320))
        outcome = Guard(WhiteBoxModel(model, tiny_tokenizer()), policy=Accept(), audit=sink)("Who?")
        assert (outcome.text, outcome.decision.rule) == (None, "on_unscorable")

    def ids(self, tiny: WhiteBoxModel, kind: str) -> Any:
        return tiny.tokenizer(" \n")["input_ids"] if kind == "white space" else self.ANSWERS[kind]


class TestAudit:
    class Full:
        def __call__(self, record: Any) -> str:
            raise AuditError("the disk is full")

    @pytest.mark.fault("sink", "it raises", "`AuditError`, no text")
    def test_what_can_not_be_recorded_is_not_let_through(self) -> None:
        with pytest.raises(AuditError):
            guard_of(audit=self.Full())("Capital?")

    @pytest.mark.fault("sink", "the log was closed", "`AuditError`, no text")
    def test_a_closed_log_lets_nothing_through(self, tmp_path: Any) -> None:
        log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
        log.close()
        with pytest.raises(AuditError):
            guard_of(audit=log)("Capital?")

    @pytest.mark.fault("sink", "it raises at the answer of an escalation", "`AuditError`, no text")
    def test_a_sink_that_fails_at_the_escalations_answer_keeps_it_in(self) -> None:
        kept: list[Any] = []

        def sink(record: Any) -> str:
            if kept:
                raise AuditError("the disk is full")
            kept.append(record)
            return str(record.id)

        with pytest.raises(AuditError):
            guard_of(EscalateBelow(**LIMIT, to=lambda m: "Paris"), ScriptedScorer(BAD), audit=sink)("Capital?")

    @pytest.mark.parametrize("answer", [None, "", 7, True])
    @pytest.mark.fault("sink", "it gives no id", "`AuditError`, no text")
    def test_a_sink_that_gives_no_id_lets_nothing_through(self, answer: Any) -> None:
        with pytest.raises(AuditError):
            guard_of(audit=lambda record: answer)("Capital?")

    @pytest.mark.fault("sink", "it is async", "`AuditError`, no text")
    def test_an_async_sink_lets_nothing_through(self) -> None:
        promised = coroutine("an id, some day")
        try:
            with pytest.raises(AuditError):
                guard_of(audit=lambda record: promised)("Capital?")
        finally:
            promised.close()

    def test_a_path_is_no_sink(self) -> None:
        with pytest.raises(ConfigurationError):
            guard_of(audit="audit.jsonl")

    def test_a_sink_that_breaks_does_not_hide_the_interruption(self) -> None:
        def sink(record: Any) -> str:
            raise OSError("the disk is gone")

        with pytest.raises(KeyboardInterrupt):
            guard_of(Deciding(interrupts), audit=sink)("Capital?")

    @pytest.mark.fault(
        "sink", "it raises for one prompt of a batch", "an error, nothing leaves, the others have their record"
    )
    def test_a_sink_that_breaks_once_does_not_cost_the_others_their_record(self) -> None:
        kept: list[Any] = []

        def sink(record: Any) -> str:
            if record.prompt[-1]["content"] == "a":
                raise OSError("the disk hiccups")
            kept.append(record)
            return str(record.id)

        with pytest.raises((OSError, ZeroDivisionError)):
            guard_of(Deciding(lambda v, s: 1 // 0), audit=sink, model=ScriptedModel("x")).batch(["a", "b", "c"])
        assert [each.prompt[-1]["content"] for each in kept] == ["b", "c"]

    def test_words_of_the_question_do_not_come_into_a_log_that_keeps_no_text(self, tmp_path: Any) -> None:
        def search(query: str) -> list[str]:
            raise KeyError(query)

        path = tmp_path / "audit.jsonl"
        policy = RetrieveBelow(**LIMIT, retriever=search, tries=1)
        with AuditLog(path, fsync=False, content="redacted") as log:
            guard_of(policy, ScriptedScorer(BAD), audit=log)("my secret illness")
        assert "illness" not in path.read_text()


class TestInterruption:
    def test_during_scoring_it_goes_through(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            guard_of(scorer=Scoring(interrupts))("Capital?")

    @pytest.mark.fault("interruption", "Ctrl-C while scoring", "goes through; a record `interrupted`")
    def test_during_scoring_it_is_recorded(self, sink: MemorySink) -> None:
        with pytest.raises(KeyboardInterrupt):
            guard_of(scorer=Scoring(interrupts), audit=sink)("Capital?")
        [record] = sink.records
        assert (record.decision, record.rule, record.status) == ("abstain", "interrupted", "error")

    @pytest.mark.fault("interruption", "Ctrl-C while looking up", "goes through; a record `interrupted`")
    def test_during_retrieval_it_is_recorded(self, sink: MemorySink) -> None:
        policy = RetrieveBelow(**LIMIT, retriever=interrupts)
        with pytest.raises(KeyboardInterrupt):
            guard_of(policy, ScriptedScorer(BAD), audit=sink)("Capital?")
        assert [(each.rule, each.status) for each in sink.records] == [("interrupted", "scored")]

    @pytest.mark.fault("interruption", "Ctrl-C while escalating", "goes through; a record `interrupted`")
    def test_during_escalation_it_is_recorded(self, sink: MemorySink) -> None:
        with pytest.raises(KeyboardInterrupt):
            guard_of(EscalateBelow(**LIMIT, to=interrupts), ScriptedScorer(BAD), audit=sink)("Capital?")
        assert [each.rule for each in sink.records] == ["interrupted"]

    @pytest.mark.fault("interruption", "Ctrl-C in a batch", "a record for every draft")
    def test_it_is_recorded_for_every_prompt_of_a_batch(self, sink: MemorySink) -> None:
        with pytest.raises(KeyboardInterrupt):
            guard_of(scorer=Scoring(interrupts), audit=sink).batch(["a", "b", "c"])
        assert len({each.request_id for each in sink.records}) == 3

    def test_in_a_second_attempt_the_first_is_recorded_once(self, sink: MemorySink) -> None:
        script = [BAD, KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            guard_of(RetryBelow(**LIMIT), ScriptedScorer(script), audit=sink)("Capital?")
        assert [(each.attempt, each.rule) for each in sink.records] == [(1, "retry_below"), (2, "interrupted")]

    def test_before_the_sink_has_kept_the_record_the_attempt_is_recorded_all_the_same(self) -> None:
        kept: list[Any] = []

        def sink(record: Any) -> str:
            if not kept and record.rule != "interrupted":
                raise KeyboardInterrupt
            kept.append(record)
            return str(record.id)

        with pytest.raises(KeyboardInterrupt):
            guard_of(audit=sink)("Capital?")
        assert [each.rule for each in kept] == ["interrupted"]


class TestCalibration:
    @pytest.fixture(scope="class")
    @staticmethod
    def white() -> WhiteBoxModel:
        return WhiteBoxModel(tiny_model(), tiny_tokenizer(), name="tiny")

    @pytest.fixture(scope="class")
    @staticmethod
    def fitted(white: WhiteBoxModel) -> Any:
        return calibration_for(white, HybridGrad(), white.generate("Who?", max_new_tokens=4))

    def test_one_of_its_own_is_taken(self, white: WhiteBoxModel, fitted: Any) -> None:
        assert 0 <= Guard(white, policy=Accept(), calibration=fitted)("Who?", max_new_tokens=4).confidence <= 1

    @pytest.mark.fault("calibration", "fitted on another model", "`CalibrationMismatch` before anything is generated")
    def test_one_of_another_model_is_refused(self, fitted: Any) -> None:
        other = WhiteBoxModel(tiny_model(seed=1), tiny_tokenizer(), name="tiny")
        with pytest.raises(CalibrationMismatch, match="model"):
            Guard(other, policy=Accept(), calibration=fitted)

    @pytest.mark.fault("calibration", "fitted in another dtype", "`CalibrationMismatch`")
    def test_one_of_another_dtype_is_refused(self, fitted: Any) -> None:
        import torch

        other = WhiteBoxModel(tiny_model(dtype=torch.bfloat16), tiny_tokenizer(), name="tiny")
        with pytest.raises(CalibrationMismatch, match="dtype"):
            Guard(other, policy=Accept(), calibration=fitted)

    @pytest.mark.fault("calibration", "fitted with another chat template", "`CalibrationMismatch`")
    def test_one_of_another_template_is_refused(self, white: WhiteBoxModel, fitted: Any) -> None:
        template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
        other = WhiteBoxModel(white.model, tiny_tokenizer(chat_template=template), name="tiny")
        with pytest.raises(CalibrationMismatch, match="template"):
            Guard(other, policy=Accept(), calibration=fitted)

    @pytest.mark.fault("calibration", "fitted with another scorer", "`CalibrationMismatch`")
    def test_one_of_another_scorer_is_refused(self, white: WhiteBoxModel, fitted: Any) -> None:
        with pytest.raises(CalibrationMismatch, match="scorer"):
            Guard(white, policy=Accept(), scorer=SemGrad(), calibration=fitted)

    @pytest.mark.fault("calibration", "fitted with other settings of the scorer", "`CalibrationMismatch`")
    def test_one_of_other_settings_is_refused(self, white: WhiteBoxModel, fitted: Any) -> None:
        with pytest.raises(CalibrationMismatch, match="settings"):
            Guard(white, policy=Accept(), scorer=HybridGrad(reduction="mean"), calibration=fitted)

    def test_a_stranger_put_in_later_is_refused_too(self, white: WhiteBoxModel, fitted: Any) -> None:
        guard = Guard(white, policy=AbstainBelow(confidence=0.5), calibration=fitted)
        with pytest.raises((CalibrationMismatch, AttributeError)):
            guard.calibration = fitted.model_copy(update={"fingerprint": "another"})
            guard("Who?", max_new_tokens=4)

    @pytest.mark.fault("calibration", "the weights change between two calls", "`CalibrationMismatch` on the next call")
    def test_it_does_not_outlive_a_change_of_the_weights(self) -> None:
        import torch

        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(), name="tiny")
        fitted = calibration_for(white, HybridGrad())
        with torch.no_grad():
            for parameter in white.model.parameters():
                parameter.mul_(1.5)
        with pytest.raises(CalibrationMismatch):
            Guard(white, policy=AbstainBelow(confidence=0.5), calibration=fitted)

    def test_a_policy_that_speaks_of_confidence_needs_one(self) -> None:
        with pytest.raises(ConfigurationError, match="calibration"):
            guard_of(AbstainBelow(confidence=0.5))

    def test_a_policy_deep_inside_that_speaks_of_confidence_needs_one(self) -> None:
        with pytest.raises(ConfigurationError, match="calibration"):
            guard_of(Unscored((Accept() & AbstainBelow(confidence=0.5)) | Accept()))

    def test_a_score_that_it_does_not_find_is_an_error(self, sink: MemorySink) -> None:
        model = ScriptedModel("Lyon")
        scorer = ScriptedScorer(Score(status="scored", scorer=ScriptedScorer(1.0).identity, scores={"other": 1.0}))
        fitted = calibration_for(model, scorer)
        with pytest.raises(CalibrationError):
            Guard(model, policy=Accept(), scorer=scorer, calibration=fitted, audit=sink)("Capital?")

    def test_a_negative_score_has_no_confidence(self) -> None:
        """The map is of the score's logarithm: below nil it would say "certain"."""
        model, scorer = ScriptedModel("Lyon"), ScriptedScorer(-5.0)
        with pytest.raises(CalibrationError):
            calibration_for(model, scorer).confidence(scorer(model, model.generate("Capital?")))

    def test_an_unscored_answer_has_no_confidence(self) -> None:
        model, scorer = ScriptedModel("Lyon"), ScriptedScorer("nothing there")
        guard = Guard(model, policy=Accept(), scorer=scorer, calibration=calibration_for(model, scorer))
        assert guard("Capital?").confidence is None


def calibration_for(model: Any, scorer: Any, drawn: Generation | None = None) -> Any:
    from hallucination_guard import Calibration

    return Calibration(
        score=scorer.primary,
        intercept=0.0,
        slope=1.0,
        fingerprint=model.identity.fingerprint,
        structure=model.identity.structure,
        conditions=Conditions.of(drawn or ScriptedModel("x").generate("Who?")),
        dtype=model.identity.dtype,
        template=model.identity.template,
        scorer=scorer.identity.name,
        scorer_version=scorer.identity.version,
        scorer_settings=dict(scorer.identity.settings),
        examples=20,
        correct=10,
        data="made up",
    )


class TestInput:
    @pytest.mark.parametrize("prompt", ["", "  ", [], [{}], [{"role": "user"}], [{"content": "x"}], [3], 3, None, b"x"])
    def test_what_is_no_prompt_is_refused(self, prompt: Any) -> None:
        with pytest.raises(InputError):
            guard_of()(prompt)

    @pytest.mark.fault("prompt", "one prompt of a batch cannot be used", "`InputError` before anything is generated")
    def test_a_bad_prompt_in_a_batch_is_refused_before_anything_is_generated(self) -> None:
        model = ScriptedModel("x")
        with pytest.raises(InputError):
            guard_of(model=model).batch(["a", ""])
        assert model.calls == []

    def test_a_text_is_no_batch(self) -> None:
        with pytest.raises((InputError, ConfigurationError)):
            guard_of().batch("Who?")

    def test_an_empty_batch_has_no_outcomes(self) -> None:
        assert guard_of().batch([]) == []

    def test_unknown_settings_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="max_tokens"):
            guard_of()("Who?", max_tokens=3)

    @pytest.mark.parametrize("name", ["max_attempts", "batch_size"])
    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1.5, "3"])
    def test_limits_are_whole_numbers(self, name: str, value: Any) -> None:
        with pytest.raises((ConfigurationError, TypeError)):
            guard_of(**{name: value})

    @pytest.mark.fault("prompt", "with passages it is longer than the context", "an abstention, recorded")
    def test_a_prompt_too_long_after_retrieval_leads_to_an_abstention(self, sink: MemorySink) -> None:
        policy = RetrieveBelow(**LIMIT, retriever=lambda query: ["x" * 500]) | Accept()
        guard = guard_of(policy, ScriptedScorer(BAD), model=ScriptedModel("Lyon", context=300), audit=sink)
        assert (guard("Capital?").text, sink.records[0].rule) == (None, "retrieve_failed")

    def test_a_conversation_without_a_user_turn_can_not_be_looked_up(self) -> None:
        policy = RetrieveBelow(**LIMIT, retriever=lambda query: ["x"])
        outcome = guard_of(policy, ScriptedScorer(BAD))([{"role": "system", "content": "Speak."}])
        assert (outcome.text, outcome.decision.rule) == (None, "retrieve_failed")


class TestOutcome:
    @pytest.mark.fault("draft", "an outcome is printed", "nothing of the draft is shown")
    def test_it_does_not_show_the_draft_when_it_is_printed(self) -> None:
        outcome = guard_of(AbstainBelow(**LIMIT), ScriptedScorer(BAD), model=ScriptedModel("SECRET"))("Capital?")
        assert "SECRET" not in repr(outcome)

    @pytest.mark.parametrize("action", ["abstain", "retry", "retrieve"])
    def test_it_can_not_carry_a_text_that_was_not_let_through(self, action: Any) -> None:
        accepted = guard_of()("Capital?")
        from hallucination_guard.values import Redraw, Retrieve

        moves = {"retry": Redraw(), "retrieve": Retrieve(retriever=None, k=1, timeout=1, tries=1, template="")}
        decision = Decision(action=action, rule="r", reason="because", move=moves.get(action))
        with pytest.raises(ValueError):
            Outcome(text="x", decision=decision, verdict=accepted.verdict, attempts=1, generation=accepted.generation)

    def test_it_can_be_pickled_and_copied(self, tiny: WhiteBoxModel) -> None:
        import copy
        import pickle

        outcome = Guard(tiny, policy=Accept())("Who?", max_new_tokens=3)
        assert pickle.loads(pickle.dumps(outcome)).text == copy.deepcopy(outcome).text == outcome.text

    @pytest.mark.fault("draft", "an application logs everything", "nothing of the draft is in its log")
    def test_an_abstention_leaves_nothing_of_the_draft_in_the_ordinary_log(self, caplog: Any) -> None:
        caplog.set_level("DEBUG")
        guard_of(AbstainBelow(**LIMIT), ScriptedScorer(BAD), model=ScriptedModel("SECRET"))("Capital?")
        assert "SECRET" not in caplog.text + json.dumps([str(each.__dict__) for each in caplog.records])

    def test_words_that_an_application_binds_for_its_own_log_break_nothing(self, caplog: Any) -> None:
        import structlog

        caplog.set_level("INFO")
        with structlog.contextvars.bound_contextvars(name="service", message="m", args=()):
            assert guard_of()("Capital?").text == "Lyon"


class TestRecords:
    def test_every_attempt_has_one_in_order(self, sink: MemorySink) -> None:
        guard_of(RetryBelow(**LIMIT, times=2), ScriptedScorer(BAD), audit=sink)("Capital?")
        assert [each.attempt for each in sink.records] == [1, 2, 3]

    def test_the_outcome_names_them(self, sink: MemorySink) -> None:
        outcome = guard_of(RetryBelow(**LIMIT, times=2), ScriptedScorer(BAD), audit=sink)("Capital?")
        assert outcome.audit_ids == tuple(each.id for each in sink.records)

    def test_they_share_the_calls_id(self, sink: MemorySink) -> None:
        outcome = guard_of(RetryBelow(**LIMIT, times=2), ScriptedScorer(BAD), audit=sink)("Capital?")
        assert {each.request_id for each in sink.records} == {outcome.request_id}

    def test_each_call_has_an_id_of_its_own(self, sink: MemorySink) -> None:
        guard_of(audit=sink).batch(["a", "b"])
        assert len({each.request_id for each in sink.records}) == 2

    def test_each_shows_its_own_answer_and_score(self, sink: MemorySink) -> None:
        model, scorer = ScriptedModel(["a", "b"]), ScriptedScorer({"a": 3.0, "b": 4.0})
        guard_of(RetryBelow(**LIMIT, times=1), scorer, model=model, audit=sink)("Capital?")
        assert [(each.answer, dict(each.scores)) for each in sink.records] == [
            ("a", {"hybridgrad": 3.0}),
            ("b", {"hybridgrad": 4.0}),
        ]

    def test_each_says_which_attempt_was_judged(self, sink: MemorySink) -> None:
        model, scorer = ScriptedModel(["a", "b"]), ScriptedScorer({"a": 3.0, "b": 4.0})
        guard_of(RetryBelow(**LIMIT, times=1) | Accept(), scorer, model=model, audit=sink)("Capital?")
        assert [each.judged for each in sink.records] == [1, 1]

    def test_the_fields_are_those_of_the_call(self, tiny: WhiteBoxModel, sink: MemorySink) -> None:
        outcome = Guard(tiny, policy=Accept(), audit=sink)("Who?", max_new_tokens=3, thread_id="t1")
        [record] = sink.records
        assert record.to_json_dict() | {"id": "", "time": "", "versions": {}, "policy": {}} == {
            "schema": 1,
            "id": "",
            "time": "",
            "request_id": outcome.request_id,
            "thread_id": "t1",
            "attempt": 1,
            "model": {
                "name": "tiny",
                "fingerprint": tiny.identity.fingerprint,
                "dtype": "float32",
                "template": tiny.identity.template,
                "structure": tiny.identity.structure,
            },
            "scorer": {"name": "hybridgrad", "version": "1", "settings": HybridGrad().settings},
            "status": "scored",
            "detail": "",
            "scores": dict(outcome.verdict.score.scores),
            "anchor": {"index": -11, "token": "<|im_start|>", "rule": "header"},
            "prefix": "kept",
            "conditions": Conditions.of(outcome.generation).to_json_dict(),
            "confidence": None,
            "certificate": None,
            "policy": {},
            "decision": "accept",
            "rule": "accept_all",
            "reason": outcome.decision.reason,
            "judged": 1,
            "tokens": {"in": len(outcome.generation.prompt_token_ids), "out": 3},
            "seconds": {"generate": outcome.seconds["generate"], "score": outcome.seconds["score"]},
            "retrieved": [],
            "prompt": [{"role": "user", "content": "Who?"}],
            "answer": outcome.text,
            "versions": {},
            "seq": None,
            "prev": None,
            "hash": None,
        }

    def test_they_say_which_policy_decided(self, sink: MemorySink) -> None:
        for limit in (1.0, 2.0):
            guard_of(AbstainBelow(score="hybridgrad", limit=limit), audit=sink)("Capital?")
        assert len({each.policy["hash"] for each in sink.records}) == 2

    def test_they_are_written_before_the_text_leaves(self, tmp_path: Any) -> None:
        log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
        outcome = guard_of(audit=log)("Capital?")
        assert [each.answer for each in records(log.path)] == [outcome.text]

    def test_odd_characters_do_not_cost_a_record(self, tmp_path: Any) -> None:
        log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
        outcome = guard_of(model=ScriptedModel("a\x00\u2028\ud83d \U0001f600"), audit=log)("Capital?")
        assert len(list(records(log.path))) == len(outcome.audit_ids) == 1


class TestEveryDraftHasARecord:
    """… or an exception was raised before there was one."""

    @pytest.mark.fault("answer", "one to review is longer than the context", "unscorable, with a record")
    def test_an_answer_beyond_the_context_is_unscorable_and_recorded(self, sink: MemorySink) -> None:
        guard = guard_of(model=ScriptedModel("x", context=60), audit=sink)
        guard.model = WhiteBoxModel(tiny_model(max_position_embeddings=64), tiny_tokenizer())
        outcome = guard.review("Who?", answer="x" * 80)
        assert (outcome.text, outcome.decision.rule) == (None, "on_unscorable")
        assert (sink.records[0].answer, "context" in sink.records[0].detail) == ("x" * 80, True)

    @pytest.mark.fault("interruption", "drawing again fails in a batch", "a record for every draft")
    def test_a_nudge_that_raises_leaves_a_record_of_every_draft(self, sink: MemorySink) -> None:
        class Nudged(ScriptedModel):
            def generate(self, messages: Any, **settings: Any) -> Any:
                if settings.get("seed", 0) > 1000:  # a redraw that is drawn again
                    raise RuntimeError("out of memory")
                return super().generate(messages, **settings)

        guard = guard_of(RetryBelow(**LIMIT), ScriptedScorer(BAD), model=Nudged("same"), audit=sink)
        with pytest.raises(RuntimeError):
            guard.batch(["a", "b"])
        assert [(each.attempt, each.rule) for each in sink.records] == [
            (1, "retry_below"),
            (1, "retry_below"),
            (2, "interrupted"),
            (2, "interrupted"),
        ]

    @pytest.mark.fault("policy", "`describe()` raises", "an error before anything is generated")
    def test_a_policy_that_cannot_describe_itself_is_refused_before_anything_is_generated(self) -> None:
        class Nameless:
            def __call__(self, verdict: Any, situation: Any) -> Decision:
                return Decision(action="accept", rule="r", reason="because")

            def describe(self) -> Any:
                raise KeyError("name")

        model = ScriptedModel("x")
        with pytest.raises(KeyError):
            guard_of(Nameless(), model=model)("Who?")
        assert model.calls == []

    @pytest.mark.fault(
        "sink", "`guard.audit = None` in the middle of a call", "the call writes to the log that it began with"
    )
    def test_taking_the_log_away_in_the_middle_of_a_call_does_not_take_its_records_away(self, sink: MemorySink) -> None:
        guard = guard_of(audit=sink)

        def score_and_take_away(generation: Any) -> float:
            guard.audit = None
            return GOOD

        guard.scorer = ScriptedScorer(score_and_take_away)
        assert guard("Who?").audit_ids == (sink.records[0].id,)

    @pytest.mark.parametrize("odd", [5, b"t", ["t"], "\ud83d"], ids=repr)
    @pytest.mark.fault("prompt", "an odd `thread_id`", "`InputError` before anything is generated")
    def test_an_odd_thread_id_is_refused_before_anything_is_generated(self, odd: Any) -> None:
        model = ScriptedModel("x")
        with pytest.raises(InputError):
            guard_of(model=model)("Who?", thread_id=odd)
        assert model.calls == []


SECRET = "SECRET-DRAFT"


def held_by(error: BaseException | None) -> str:
    """All that an error report could show: messages, notes, causes, and the locals of every frame of the package."""
    shown = []
    while error is not None:
        shown += [str(error), repr(error.args), *getattr(error, "__notes__", ())]
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "hallucination_guard" in frame.f_code.co_filename:
                shown += [repr(value) for value in frame.f_locals.values()]
                shown += [repr(vars(value)) for value in frame.f_locals.values() if hasattr(value, "__dict__")]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


class TestErrorsDoNotCarryTheDraft:
    def raised(self, **settings: Any) -> BaseException:
        with pytest.raises(BaseException) as caught:
            guard_of(model=ScriptedModel(SECRET), **settings)("Who?")
        return caught.value

    def quoting(self, record: Any) -> str:
        raise RuntimeError(f"duplicate key in row {record.answer}")

    @pytest.mark.fault(
        "sink", "its error quotes the row", "`AuditError` names the kind of error; no frame holds the draft"
    )
    def test_a_sinks_error_is_named_by_its_kind(self) -> None:
        error = self.raised(audit=self.quoting)
        assert isinstance(error, AuditError) and "RuntimeError" in str(error)
        assert SECRET not in held_by(error)

    def test_nor_does_the_error_of_a_policy(self) -> None:
        def decide(verdict: Any, situation: Any) -> Any:
            raise ValueError("no")

        policy = AbstainBelow(**LIMIT)
        guard = guard_of(model=ScriptedModel(SECRET))
        guard.policy = type("P", (), {"__call__": lambda _, v, s: decide(v, s), "describe": policy.describe})()
        with pytest.raises(ValueError) as caught:
            guard("Who?")
        assert SECRET not in held_by(caught.value)

    def test_a_sinks_interruption_has_no_frames(self) -> None:
        def interrupted(record: Any) -> str:
            raise KeyboardInterrupt

        assert SECRET not in held_by(self.raised(audit=interrupted))

    def test_the_original_is_at_hand_by_a_switch(self) -> None:
        error = self.raised(audit=self.quoting, debug=True)
        assert isinstance(error, RuntimeError) and SECRET in str(error)

    @pytest.mark.fault("scorer", "its error message quotes the draft", "the record names only the kind of error")
    def test_a_scorers_message_is_not_in_the_record(self, sink: MemorySink) -> None:
        class Quoting(ScriptedScorer):
            def batch(self, model: Any, generations: Any) -> Any:
                raise ScoringError(f"cannot score {generations[0].text!r}")

        guard_of(Accept(), Quoting(GOOD), model=ScriptedModel(SECRET), audit=sink)("Who?")
        assert SECRET not in sink.records[0].detail + sink.records[0].reason
