"""What each verb does, from the question to the outcome and the record."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import AuditLog, Call, GenerationSettings, Guard, WhiteBoxModel
from hallucination_guard.audit import records
from hallucination_guard.errors import InputError
from hallucination_guard.guard import with_passages
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Message, Passage
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

LIMIT = {"score": "hybridgrad", "limit": 1.0}
GOOD, BAD = 0.5, 2.0
ABSTAIN = AbstainBelow(**LIMIT)


def scripted(answers: Any, scores: Any, policy: Any, sink: MemorySink | None = None, **settings: Any) -> Guard:
    return Guard(ScriptedModel(answers), policy=policy, scorer=ScriptedScorer(scores), audit=sink, **settings)


class TestWithARealModel:
    """The scorer is the real one; only the threshold is chosen so that the verb is taken."""

    PASSED, FAILED = {"score": "hybridgrad", "limit": 1e9}, {"score": "hybridgrad", "limit": 0.0}

    def test_an_accepted_answer_is_the_models_own(self, tiny: WhiteBoxModel, sampled: Any) -> None:
        guard = Guard(tiny, policy=AbstainBelow(**self.PASSED), generation=sampled)
        assert guard("Who?").text == tiny.generate("Who?", **sampled).text

    def test_an_abstention_has_no_text(self, tiny: WhiteBoxModel, sampled: Any) -> None:
        assert Guard(tiny, policy=AbstainBelow(**self.FAILED), generation=sampled)("Who?").text is None

    def test_redraws_are_recorded_one_by_one(self, tiny: WhiteBoxModel, sampled: Any, sink: MemorySink) -> None:
        Guard(tiny, policy=RetryBelow(**self.FAILED, times=3), generation=sampled, audit=sink)("Who?")
        assert [(each.attempt, each.decision) for each in sink.records] == [
            (1, "retry"),
            (2, "retry"),
            (3, "retry"),
            (4, "abstain"),
        ]

    def test_redraws_differ_from_the_draft_and_from_each_other(self, tiny: WhiteBoxModel, sink: MemorySink) -> None:
        policy = RetryBelow(**self.FAILED, times=3, temperature=1.0)
        Guard(tiny, policy=policy, generation={"max_new_tokens": 8}, audit=sink)("Who?")
        assert len({each.answer for each in sink.records}) == 4

    def test_a_redraw_differs_from_a_draft_that_was_drawn_in_the_same_way(
        self, tiny: WhiteBoxModel, sink: MemorySink
    ) -> None:
        policy = RetryBelow(**self.FAILED, times=2)
        move = {"temperature": policy.temperature, "top_p": policy.top_p, "seed": policy.seed}
        Guard(tiny, policy=policy, generation={"max_new_tokens": 12, **move}, audit=sink)("Who?")
        assert len({each.answer for each in sink.records}) == 3

    def test_the_best_draft_is_kept(self, tiny: WhiteBoxModel, sampled: Any, sink: MemorySink) -> None:
        policy = RetryBelow(**self.FAILED, times=5) | Accept()
        outcome = Guard(tiny, policy=policy, generation=sampled, audit=sink)("Who?")
        best = min(sink.records, key=lambda each: each.scores["hybridgrad"])
        assert (outcome.text, sink.records[-1].judged) == (best.answer, best.attempt)

    def test_the_score_of_the_outcome_is_the_judged_drafts_own(self, tiny: WhiteBoxModel, sampled: Any) -> None:
        outcome = Guard(tiny, policy=RetryBelow(**self.FAILED, times=3) | Accept(), generation=sampled)("Who?")
        again = tiny.read("Who?", answer=outcome.generation.response_token_ids)
        expected = HybridGrad()(tiny, again).scores["hybridgrad"]
        assert outcome.verdict.score.scores["hybridgrad"] == pytest.approx(expected, rel=1e-4)

    def test_what_was_retrieved_is_in_the_prompt_that_is_scored(self, tiny: WhiteBoxModel, sampled: Any) -> None:
        policy = RetrieveBelow(**self.FAILED, retriever=lambda query: ["It was Ada."]) | Accept()
        outcome = Guard(tiny, policy=policy, generation=sampled)("Who?")
        assert "It was Ada." in tiny.tokenizer.decode(outcome.generation.prompt_token_ids)

    def test_an_escalations_answer_is_the_text(self, tiny: WhiteBoxModel, sampled: Any) -> None:
        policy = EscalateBelow(**self.FAILED, to=lambda messages: f"asked {messages[-1]['content']}")
        assert Guard(tiny, policy=policy, generation=sampled)("Who?").text == "asked Who?"


class TestRetry:
    def test_the_draft_that_passes_is_let_through(self) -> None:
        guard = scripted(["Lyon", "Paris"], {"Lyon": BAD, "Paris": GOOD}, RetryBelow(**LIMIT))
        assert guard("Capital?").text == "Paris"

    def test_the_best_draft_may_be_the_first(self) -> None:
        policy = RetryBelow(**LIMIT, times=2) | Accept()
        guard = scripted(["a", "b", "c"], {"a": 2.0, "b": 4.0, "c": 3.0}, policy)
        assert guard("Capital?").text == "a"

    def test_the_last_draft_is_kept_if_the_policy_says_so(self) -> None:
        policy = RetryBelow(**LIMIT, times=2, keep="last") | Accept()
        guard = scripted(["a", "b", "c"], {"a": 2.0, "b": 4.0, "c": 3.0}, policy)
        assert guard("Capital?").text == "c"

    def test_a_redraw_without_a_score_never_beats_a_scored_draft(self) -> None:
        policy = Unscored(RetryBelow(**LIMIT, times=1) | Accept(), on_error="accept")
        guard = scripted(["a", "b"], {"a": 2.0, "b": ValueError("no")}, policy)
        assert guard("Capital?").text == "a"

    def test_every_redraw_has_a_seed_of_its_own(self) -> None:
        policy = RetryBelow(**LIMIT, times=3, seed=7, temperature=0.9, top_p=0.8)
        guard = scripted(["a", "b", "c", "d"], BAD, policy)
        guard("Capital?", temperature=0.0, seed=1)
        drawn = [(s.get("temperature"), s.get("top_p"), s.get("seed")) for _, s in guard.model.calls]
        assert drawn == [(0.0, None, 1), (0.9, 0.8, 7), (0.9, 0.8, 8), (0.9, 0.8, 9)]

    def test_a_policys_budget_ends_it(self) -> None:
        guard = scripted("a", BAD, Within(RetryBelow(**LIMIT, times=9), Budget(attempts=3)))
        assert (guard("Capital?").attempts, guard("Capital?").decision.rule) == (3, "budget")

    def test_the_budget_of_seconds_ends_it(self) -> None:
        guard = scripted("a", BAD, Within(RetryBelow(**LIMIT, times=9), Budget(seconds=1e-9)))
        assert guard("Capital?").attempts == 1

    def test_the_guards_own_limit_ends_a_policy_that_never_would(self) -> None:
        guard = scripted("a", BAD, RetryBelow(**LIMIT, times=10**6), max_attempts=4)
        outcome = guard("Capital?")
        assert (outcome.attempts, outcome.decision.rule, outcome.text) == (4, "max_attempts", None)


class TestRetrieve:
    def guard(self, retriever: Any, sink: MemorySink | None = None, then: Any = None, **settings: Any) -> Guard:
        policy = RetrieveBelow(**LIMIT, retriever=retriever, **settings)
        scores = [BAD, GOOD] if then is None else [BAD, then]
        return scripted(["Lyon", "Paris"], scores, policy, sink)

    def test_the_second_answer_is_let_through_if_it_passes(self) -> None:
        assert self.guard(lambda query: ["Paris is."])("Capital?").text == "Paris"

    def test_the_second_answer_is_kept_in_if_it_does_not(self) -> None:
        assert self.guard(lambda query: ["Paris is."], then=BAD)("Capital?").text is None

    def test_the_retriever_is_asked_the_last_user_turn(self) -> None:
        asked: list[str] = []
        guard = self.guard(lambda query: asked.append(query) or ["Paris is."])
        guard(
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "Capital?"},
            ]
        )
        assert asked == ["Capital?"]

    def test_the_outcome_names_the_documents(self) -> None:
        outcome = self.guard(lambda query: [Passage(id="d7", text="Paris is.")])("Capital?")
        assert outcome.retrieved == ("d7",)

    def test_the_record_of_the_answer_from_documents_names_them(self, sink: MemorySink) -> None:
        self.guard(lambda query: [Passage(id="d7", text="Paris is.")], sink)("Capital?")
        assert [each.retrieved for each in sink.records] == [(), ("d7",)]

    def test_no_more_than_k_passages_are_used(self) -> None:
        outcome = self.guard(lambda query: ["one", "two", "three"], k=2)("Capital?")
        assert len(outcome.retrieved) == 2

    def test_a_draft_from_before_is_not_the_best_draft_after(self) -> None:
        policy = (
            RetryBelow(**LIMIT, times=1, name="again") | RetrieveBelow(**LIMIT, retriever=lambda q: ["x"]) | Accept()
        )
        outcome = scripted(["a", "b", "c"], {"a": 2.0, "b": 3.0, "c": 4.0}, policy)("Capital?")
        assert outcome.text == "c"

    def test_a_second_retrieval_begins_from_the_question_as_asked(self) -> None:
        guard = scripted("a", BAD, RetrieveBelow(**LIMIT, retriever=lambda q: ["x"], times=2))
        guard("Capital?")
        assert guard.model.calls[1][0] == guard.model.calls[2][0]

    @pytest.mark.parametrize("text", ["{passages}", "{question}", "{}", "{0}", "{x!r}", "a { b } c", "}{", "{{", "%s"])
    def test_braces_in_the_users_text_stay_as_they_are(self, text: str) -> None:
        guard = self.guard(lambda query: ["Paris is."])
        guard(text)
        assert guard.model.calls[1][0][-1].content.endswith(text)

    @pytest.mark.parametrize("text", ["{question}", "{}", "}{", "{passages[0]}"])
    def test_braces_in_a_passage_stay_as_they_are(self, text: str) -> None:
        guard = self.guard(lambda query: [text])
        guard("Capital?")
        assert f"[1] {text}\n" in guard.model.calls[1][0][-1].content

    def test_only_the_last_user_turn_gets_the_passages(self) -> None:
        turns = (
            Message(role="user", content="a"),
            Message(role="assistant", content="b"),
            Message(role="user", content="c"),
        )
        made = with_passages(turns, [Passage(id="1", text="p")], "{passages}|{question}")
        assert [each.content for each in made] == ["a", "b", "[1] p|c"]


class TestEscalate:
    def guard(self, to: Any, sink: MemorySink | None = None, **settings: Any) -> Guard:
        return scripted("Lyon", BAD, EscalateBelow(**LIMIT, to=to, **settings), sink)

    def test_the_target_gets_plain_messages(self) -> None:
        got: list[Any] = []
        self.guard(lambda messages: got.append(messages) or "Paris")("Capital?")
        assert got == [[{"role": "user", "content": "Capital?"}]]

    def test_the_outcome_is_not_called_accepted(self) -> None:
        outcome = self.guard(lambda messages: "Paris")("Capital?")
        assert (outcome.text, outcome.accepted) == ("Paris", False)

    def test_its_answer_has_a_record_of_its_own_that_says_it_is_not_scored(self, sink: MemorySink) -> None:
        self.guard(lambda messages: "Paris", sink)("Capital?")
        assert [(each.status, each.answer, dict(each.scores)) for each in sink.records] == [
            ("scored", "Lyon", {"hybridgrad": BAD}),
            ("unscorable", "Paris", {}),
        ]

    def test_an_accepting_draft_is_never_handed_over(self) -> None:
        got: list[Any] = []
        policy = EscalateBelow(**LIMIT, to=got.append)
        scripted("Paris", GOOD, policy)("Capital?")
        assert got == []

    def test_without_a_target_the_caller_gets_no_text_and_the_decision(self) -> None:
        outcome = self.guard(None)("Capital?")
        assert (outcome.text, outcome.decision.action) == (None, "escalate")

    def test_a_chat_message_is_an_answer(self) -> None:
        from langchain_core.messages import AIMessage

        assert self.guard(lambda messages: AIMessage(content="Paris"))("Capital?").text == "Paris"

    def test_a_langchain_chat_model_is_a_target(self) -> None:
        from langchain_core.language_models.fake_chat_models import FakeListChatModel

        assert self.guard(FakeListChatModel(responses=["Paris"]))("Capital?").text == "Paris"


class TestReview:
    def test_an_answer_that_something_else_wrote_is_judged(self) -> None:
        guard = scripted("never asked for", {"Paris": GOOD}, ABSTAIN)
        assert guard.review("Capital?", "Paris").text == "Paris"

    def test_the_model_is_not_asked_when_it_passes(self) -> None:
        guard = scripted("never asked for", {"Paris": GOOD}, ABSTAIN)
        guard.review("Capital?", "Paris")
        assert guard.model.calls == []

    def test_what_follows_is_the_models(self) -> None:
        guard = scripted("Paris", {"Lyon": BAD, "Paris": GOOD}, RetryBelow(**LIMIT))
        assert guard.review("Capital?", "Lyon").text == "Paris"

    def test_an_empty_answer_is_not_let_through(self) -> None:
        guard = scripted("x", lambda each: GOOD if each.text else "empty", ABSTAIN)
        assert guard.review("Capital?", "").text is None

    def test_token_ids_are_an_answer(self, tiny: WhiteBoxModel) -> None:
        outcome = Guard(tiny, policy=Accept()).review("Who?", tiny.tokenizer("Ada")["input_ids"])
        assert outcome.text == "Ada"


class TestCall:
    """What is known of a call besides its prompt."""

    FACTS = Call(thread_id="t1", principal="ada", tags={"tenant": "acme"})

    def test_its_facts_are_in_the_record_of_every_attempt(self, sink: MemorySink) -> None:
        scripted(["a", "b"], BAD, RetryBelow(**LIMIT, times=1), sink)("Q?", call=self.FACTS)
        assert [(each.thread_id, each.principal, dict(each.tags)) for each in sink.records] == [
            ("t1", "ada", {"tenant": "acme"})
        ] * 2

    def test_they_are_read_back_from_a_log(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
        scripted("a", GOOD, ABSTAIN, log)("Q?", call=self.FACTS)
        [record] = records(log.path)
        assert (record.principal, dict(record.tags)) == ("ada", {"tenant": "acme"})

    def test_a_record_without_them_has_no_such_fields(self, sink: MemorySink) -> None:
        scripted("a", GOOD, ABSTAIN, sink)("Q?", thread_id="t1")
        assert not {"principal", "tags"} & sink.records[0].to_json_dict().keys()

    async def test_they_go_with_every_prompt_of_a_batch(self, sink: MemorySink) -> None:
        await scripted("a", GOOD, ABSTAIN, sink).abatch(["Q?", "R?"], call=self.FACTS)
        assert [each.principal for each in sink.records] == ["ada", "ada"]

    def test_two_names_for_the_conversation_are_refused(self) -> None:
        with pytest.raises(InputError, match="thread_id"):
            scripted("a", GOOD, ABSTAIN)("Q?", call=self.FACTS, thread_id="t2")

    @pytest.mark.parametrize(
        "odd", [{"thread_id": 5}, {"principal": b"x"}, {"tags": ["x"]}, {"tags": {"a": 1}}, {"principal": "\ud83d"}]
    )
    def test_what_is_no_text_is_refused_before_anything_is_generated(self, odd: Any) -> None:
        with pytest.raises(InputError):
            Call(**odd)

    def test_it_can_be_copied_and_pickled(self) -> None:
        assert copy.deepcopy(self.FACTS) == pickle.loads(pickle.dumps(self.FACTS)) == self.FACTS


class TestSettings:
    """What a caller says about generating is checked before anything is generated."""

    @pytest.mark.parametrize(
        "odd",
        [
            {"temperature": True}, {"temperature": "1"}, {"temperature": math.nan}, {"seed": 2**64}, {"seed": -1},
            {"seed": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": "5"}, {"top_p": 0.0}, {"top_p": 2},
            {"stop": "ab"}, {"stop": iter("ab")}, {"stop": [""]}, {"stop": [1]}, {"question": 5},
        ],
        ids=repr,
    )  # fmt: skip
    def test_what_a_setting_cannot_be_is_refused_in_a_line(self, odd: Any) -> None:
        guard = scripted("a", GOOD, ABSTAIN)
        with pytest.raises(InputError) as refused:
            guard("Q?", **odd)
        assert guard.model.calls == [] and str(refused.value).startswith(next(iter(odd)))

    def test_a_call_overrides_the_guard_and_says_no_more_than_was_said(self) -> None:
        guard = scripted("a", GOOD, ABSTAIN, generation={"seed": 1, "top_p": 0.5})
        guard("Q?", seed=2)
        assert [settings for _, settings in guard.model.calls] == [{"seed": 2, "top_p": 0.5}]

    def test_the_guards_own_are_a_frozen_value(self) -> None:
        settings = scripted("a", GOOD, ABSTAIN, generation={"stop": ["x"]}).generation
        assert settings == GenerationSettings(stop=("x",))
        with pytest.raises(AttributeError):
            settings.seed = 1  # type: ignore[misc]


class TestPrinting:
    """``print(outcome)`` is a line for people; ``repr`` has everything but the draft."""

    def test_an_answer_is_one_line_with_rule_and_record(self, sink: MemorySink) -> None:
        outcome = scripted("Paris\nit is.", GOOD, ABSTAIN, sink)("Capital?")
        record = sink.records[0].id[:12]
        assert str(outcome) == f"Paris it is.  (accept by abstain_below, uncalibrated, record {record})"

    def test_a_draft_that_was_not_let_through_is_not_in_it(self) -> None:
        outcome = scripted("SECRET", BAD, ABSTAIN)("Capital?")
        assert (
            str(outcome) == "[abstain: no answer was let through]  (abstain by abstain_below, uncalibrated, no record)"
        )

    def test_the_confidence_is_in_it(self) -> None:
        outcome = scripted("Paris", GOOD, ABSTAIN)("Capital?")
        sure = replace(outcome, verdict=replace(outcome.verdict, confidence=0.876))
        assert "confidence 0.88" in str(sure)

    def test_the_whole_value_is_there_for_debuggers(self) -> None:
        assert "verdict=Verdict(" in repr(scripted("Paris", GOOD, ABSTAIN)("Capital?"))


class TestTravelling:
    """Values and errors can be copied, pickled and taken apart."""

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
    def test_an_outcome_is_the_same_on_the_other_side(self, way: Any) -> None:
        outcome = scripted("Paris", GOOD, ABSTAIN)("Capital?", call=Call(tags={"a": "b"}))
        assert way(outcome) == outcome

    def test_an_outcome_can_be_taken_apart_into_json(self) -> None:
        plain = asdict(scripted("Paris", GOOD, ABSTAIN)("Capital?"))
        assert json.loads(json.dumps(plain["verdict"]["score"]["scores"])) == {"hybridgrad": GOOD}

    def test_its_mappings_are_not_changed(self) -> None:
        scores = scripted("Paris", GOOD, ABSTAIN)("Capital?").verdict.score.scores
        for change in (lambda: scores.update(a=1), lambda: scores.pop("hybridgrad"), lambda: scores.__ior__({"a": 1})):
            with pytest.raises(TypeError):
                change()
        assert dict(scores) == {"hybridgrad": GOOD}
