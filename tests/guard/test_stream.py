"""The stream gate: what leaves, when, after which record, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hallucination_guard import AuditLog, Calibration, Guard, Outcome, Released, WhiteBoxModel
from hallucination_guard.audit import records
from hallucination_guard.audit.request import requests
from hallucination_guard.errors import AuditError, ConfigurationError, InputError, ModelError
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.scoring.beginnings import score_beginnings
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard.values import Conditions, Event, Generation, Provisional, Score, ScorerIdentity
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    EscalateBelow,
    RetrieveBelow,
    RetryBelow,
    ShowProvisional,
    Unscored,
    load_policy,
)

ANSWER = "Zebras are striped. Okapis are too. Quaggas were."
FIRST, SECOND, THIRD = "Zebras are striped. ", "Okapis are too. ", "Quaggas were."
LIMIT = {"score": "hybridgrad", "limit": 0.5}
ASKED = "Which animals are striped?"
TOOLS = [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def doubtful_from(word: str) -> ScriptedScorer:
    """Sure of every beginning until the word is in it."""
    return ScriptedScorer(lambda generation: 1.0 if word in generation.text else 0.1)


def guard(answers: Any = ANSWER, *, doubts: str = "nothing", policy: Any = None, **settings: Any) -> Guard:
    settings.setdefault("scorer", doubtful_from(doubts))
    settings.setdefault("audit", MemorySink())
    model = settings.pop("model", None) or (answers if isinstance(answers, ScriptedModel) else ScriptedModel(answers))
    return Guard(model, policy=policy or AbstainBelow(**LIMIT), **settings)


def texts(events: list[Event]) -> list[str]:
    return [each.text for each in events if isinstance(each, Released)]


def outcome_of(events: list[Event]) -> Outcome:
    assert isinstance(events[-1], Outcome)
    return events[-1]


class TestWhatLeaves:
    def test_a_sure_answer_leaves_sentence_by_sentence(self) -> None:
        events = list(guard().stream(ASKED))
        assert texts(events) == [FIRST, SECOND, THIRD]
        outcome = outcome_of(events)
        assert (outcome.text, outcome.released, outcome.decision.action) == (ANSWER, ANSWER, "accept")

    async def test_and_so_does_the_async_stream(self) -> None:
        events = [each async for each in guard().astream(ASKED)]
        assert texts(events) == [FIRST, SECOND, THIRD]
        assert outcome_of(events).text == ANSWER

    def test_it_is_what_a_call_would_give(self) -> None:
        assert outcome_of(list(guard().stream(ASKED))).text == guard()(ASKED).text

    @pytest.mark.parametrize(("word", "left"), [("Zebras", []), ("Okapis", [FIRST]), ("Quaggas", [FIRST, SECOND])])
    def test_a_doubtful_sentence_ends_it(self, word: str, left: list[str]) -> None:
        events = list(guard(doubts=word).stream(ASKED))
        assert texts(events) == left
        outcome = outcome_of(events)
        assert (outcome.text, outcome.released, outcome.decision.action) == (None, "".join(left), "abstain")
        assert len(events) == len(left) + 1

    def test_what_follows_a_doubtful_sentence_is_not_drawn(self) -> None:
        model = ScriptedModel(ANSWER)
        lives = []
        stream = model.stream
        model.stream = lambda *args, **kwargs: lives.append(stream(*args, **kwargs)) or lives[-1]  # type: ignore[method-assign,func-returns-value]
        list(guard(model, doubts="Zebras").stream(ASKED))
        assert lives[0].drawn < len(ANSWER) // 2
        assert lives[0].left

    def test_each_verdict_is_of_the_answer_up_to_there(self) -> None:
        scorer = ScriptedScorer(lambda generation: len(generation.text) / 1000)
        events = list(guard(scorer=scorer).stream(ASKED))
        values = [each.verdict.score.scores["hybridgrad"] for each in events if isinstance(each, Released)]
        assert values == [len(FIRST) / 1000, len(FIRST + SECOND) / 1000, len(ANSWER) / 1000]

    @pytest.mark.parametrize("line", ["it is noise", RuntimeError("zebra")])
    def test_a_beginning_without_a_score_does_not_leave(self, line: Any) -> None:
        scorer = ScriptedScorer(lambda generation: line if "Okapis" in generation.text else 0.1)
        events = list(guard(scorer=scorer).stream(ASKED))
        assert texts(events) == [FIRST]
        assert outcome_of(events).decision.rule in ("on_unscorable", "on_error")

    def test_an_empty_answer_is_the_policys_to_decide(self) -> None:
        scorer = ScriptedScorer(lambda generation: "the answer is empty")
        events = list(guard("", scorer=scorer).stream(ASKED))
        assert [type(each) for each in events] == [Outcome]
        assert outcome_of(events).decision.rule == "on_unscorable"

    def test_half_a_character_is_no_end_of_a_sentence(self) -> None:
        answer = "Ja. Übung macht den Meister. 日本。東京です。"
        events = list(guard(answer).stream(ASKED))
        assert texts(events) == ["Ja. ", "Übung macht den Meister. ", "日本。", "東京です。"]

    def test_nor_is_half_a_character_behind_a_space(self, demo: WhiteBoxModel) -> None:
        answer = "Hello there! \N{PARTY POPPER} Bye."
        ids = demo.tokenizer(answer)["input_ids"]
        assert any("\N{REPLACEMENT CHARACTER}" in demo.tokenizer.decode(ids[:at]) for at in range(len(ids)))
        live = demo.stream(ASKED, begin=ids, max_new_tokens=1)
        live.wait(lambda: False)
        names = ("name", "context", "identity", "prompt", "generate", "read", "write")
        model: Any = SimpleNamespace(stream=lambda *_, **__: live, **{each: getattr(demo, each) for each in names})
        events = list(guard(policy=Accept(), model=model).stream(ASKED))
        assert texts(events)[0] == "Hello there!"
        assert "".join(texts(events)) == outcome_of(events).text
        parts = [length for length, _ in score_beginnings(demo, HybridGrad(), demo.read(ASKED, answer))]
        assert [demo.tokenizer.decode(ids[:length]) for length in parts] == ["Hello there!", answer]

    def test_a_sentence_ends_where_it_cannot_go_on(self) -> None:
        # "é" is two tokens: after the first of them the sentence seems to end, after the second it goes on.
        events = list(guard("He said so. été came. Then?").stream(ASKED))
        assert texts(events) == ["He said so. été came. ", "Then?"]

    def test_what_may_be_a_stop_text_waits(self) -> None:
        model = ScriptedModel("One. Two. Three. Four")
        events = list(guard(model).stream(ASKED, stop=[". Three"]))
        assert texts(events)[0] == "One. "
        assert "Two. " in texts(events)  # "T" could still be the stop text, "Tw" cannot

    def test_marks_alone_are_no_sentence(self) -> None:
        assert texts(list(guard("... \n\nZebras. Okapis.").stream(ASKED))) == ["... \n\nZebras. ", "Okapis."]


class TestRecords:
    def test_every_sentence_has_its_record_before_it_leaves(self) -> None:
        sink = MemorySink()
        for event in guard(audit=sink).stream(ASKED):
            if isinstance(event, Released):
                assert sink.records[-1].id == event.audit_id
        parts = [each.part for each in sink.records]
        assert parts == [{"start": 0, "stop": 20}, {"start": 20, "stop": 36}, None]
        assert [each.answer for each in sink.records] == [FIRST, SECOND, ANSWER]
        assert len({each.request_id for each in sink.records}) == 1

    def test_a_log_that_fails_lets_nothing_more_go(self) -> None:
        kept: list[Any] = []

        def full(record: Any) -> str:
            if kept:
                raise OSError("no space left")
            kept.append(record)
            return str(record.id)

        seen: list[Event] = []
        with pytest.raises(AuditError):
            list(_noted(guard(audit=full).stream(ASKED), seen))
        assert texts(seen) == [FIRST]

    def test_a_log_that_fails_at_once_lets_nothing_go(self) -> None:
        def full(record: Any) -> str:
            raise OSError("no space left")

        seen: list[Event] = []
        with pytest.raises(AuditError):
            list(_noted(guard(audit=full).stream(ASKED), seen))
        assert seen == []

    def test_in_a_log_it_is_one_request_with_one_attempt(self, tmp_path: Any) -> None:
        log = AuditLog(tmp_path / "audit.jsonl")
        list(guard(audit=log).stream(ASKED))
        log.close()
        [found] = requests(records(tmp_path / "audit.jsonl"))
        assert (found.decided, len(found.attempts), found.last.answer) == ("accept", 1, ANSWER)

    def test_an_error_carries_no_draft(self) -> None:
        class Broken(ScriptedModel):
            def stream(self, *args: Any, **kwargs: Any) -> Any:
                live = super().stream(*args, **kwargs)
                beginning = live.beginning

                def broken(tokens: int | None = None) -> Any:
                    return _raise(ValueError("broken")) if tokens is None or tokens >= 20 else beginning(tokens)

                live.beginning = broken  # type: ignore[method-assign]
                return live

        with pytest.raises(ValueError) as caught:
            list(guard(Broken(ANSWER)).stream(ASKED))
        assert caught.value.__traceback__ is not None
        for frame in list(_frames(caught.value.__traceback__))[1:]:
            assert "Okapis" not in str(frame.tb_frame.f_locals)


class TestReaders:
    def test_one_who_leaves_is_recorded(self) -> None:
        sink = MemorySink()
        stream = guard(audit=sink).stream(ASKED)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert [each.rule for each in sink.records] == ["abstain_below", "interrupted"]
        assert sink.records[-1].answer is not None
        assert len(sink.records[-1].answer) <= len(FIRST) + 1

    def test_one_who_is_forgotten_too(self) -> None:
        sink = MemorySink()
        stream = guard(audit=sink).stream(ASKED)
        next(stream)
        del stream
        gc.collect()
        assert sink.records[-1].rule == "interrupted"

    async def test_a_cancelled_task_too(self) -> None:
        sink, begun = MemorySink(), asyncio.Event()
        own = guard(SlowModel(ANSWER), audit=sink)

        async def read() -> None:
            async for _ in own.astream(ASKED):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sink.records[-1].rule == "interrupted"

    async def test_an_async_stream_that_is_closed_too(self) -> None:
        sink = MemorySink()
        stream = guard(SlowModel(ANSWER), audit=sink).astream(ASKED)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert sink.records[-1].rule == "interrupted"

    async def test_an_async_stream_raises_what_went_wrong(self) -> None:
        with pytest.raises(AuditError):
            [each async for each in guard(audit=lambda record: _raise(OSError("full"))).astream(ASKED)]

    def test_one_that_is_never_read_draws_nothing(self) -> None:
        model = ScriptedModel(ANSWER)
        guard(model).stream(ASKED)
        assert model.calls == []


class SlowModel(ScriptedModel):
    """After its first sentence it waits until its reader is gone."""

    def stream(self, *args: Any, gone: Any = lambda: False, **kwargs: Any) -> Any:
        live = super().stream(*args, gone=gone, **kwargs)
        draw = live.draw

        def slowly() -> None:
            while live.drawn > len(FIRST) + 2 and not gone():
                threading.Event().wait(0.005)
            if not gone():
                draw()

        live.draw = slowly  # type: ignore[method-assign]
        return live


class TestFurtherDrafts:
    def test_a_retry_goes_on_after_what_was_released(self) -> None:
        model = ScriptedModel([ANSWER, "Tapirs are not. The end."])
        own = guard(model, doubts="Okapis", policy=RetryBelow(**LIMIT))
        events = list(own.stream(ASKED))
        assert texts(events) == [FIRST, "Tapirs are not. ", "The end."]
        assert outcome_of(events).text == FIRST + "Tapirs are not. The end."
        assert outcome_of(events).attempts == 2
        assert model.calls[1][1]["temperature"] > 0
        kept = own.audit.records  # type: ignore[union-attr]
        assert [(each.attempt, each.decision, each.part is None) for each in kept] == [
            (1, "accept", False),
            (1, "retry", True),
            (2, "accept", False),
            (2, "accept", True),
        ]

    def test_what_is_looked_up_goes_on_after_what_was_released(self) -> None:
        model = ScriptedModel([ANSWER, "Tapirs are not."])
        policy = RetrieveBelow(retriever=lambda query: ["Tapirs have no stripes."], **LIMIT) | AbstainBelow(**LIMIT)
        events = list(guard(model, doubts="Okapis", policy=policy).stream(ASKED))
        assert texts(events) == [FIRST, "Tapirs are not."]
        assert "no stripes" in model.calls[1][0][-1].content
        assert len(outcome_of(events).retrieved) == 1

    def test_a_spent_rule_ends_it(self) -> None:
        model = ScriptedModel([ANSWER, ANSWER.replace("Zebras", "Zebus")])
        events = list(guard(model, doubts="Zeb", policy=RetryBelow(times=1, **LIMIT)).stream(ASKED))
        assert texts(events) == []
        assert outcome_of(events).attempts == 2
        assert outcome_of(events).text is None

    def test_an_escalation_answers_instead(self) -> None:
        own = guard(doubts="Okapis", policy=EscalateBelow(to=lambda messages: "Ask a zoologist.", **LIMIT))
        events = list(own.stream(ASKED))
        assert texts(events) == [FIRST]
        assert (outcome_of(events).text, outcome_of(events).released) == ("Ask a zoologist.", FIRST)

    def test_a_retriever_that_fails_ends_it(self) -> None:
        policy = RetrieveBelow(retriever=lambda query: _raise(OSError("down")), tries=1, **LIMIT)
        events = list(guard(doubts="Okapis", policy=policy).stream(ASKED))
        assert outcome_of(events).decision.rule == "retrieve_failed"
        assert texts(events) == [FIRST]

    def test_the_guards_own_limit_holds(self) -> None:
        policy = RetryBelow(times=100, **LIMIT)
        events = list(guard("Zebras.", doubts="Zebras", policy=policy, max_attempts=3).stream(ASKED))
        assert outcome_of(events).decision.rule == "max_attempts"


class TestTools:
    def test_the_text_before_a_call_streams_and_the_call_is_decided_on_with_the_whole(self) -> None:
        events = list(guard(f"Let me see. It is a sum. {CALL}").stream(ASKED, tools=TOOLS))
        assert texts(events) == ["Let me see. ", "It is a sum. ", ""]
        assert [each.name for each in outcome_of(events).tool_calls] == ["add"]

    @pytest.mark.parametrize("word", ["tool_call", "<"])
    def test_no_call_leaves_that_was_not_let_through(self, word: str) -> None:
        events = list(guard(f"Let me see. {CALL}", doubts=word).stream(ASKED, tools=TOOLS))
        assert texts(events) == ["Let me see. "]
        assert outcome_of(events).tool_calls == ()
        assert "add" not in "".join(texts(events))

    def test_a_call_that_cannot_be_parsed_is_text(self) -> None:
        events = list(guard("Well. <tool_call>nonsense. More").stream(ASKED, tools=TOOLS))
        assert "".join(texts(events)) == outcome_of(events).text == "Well. <tool_call>nonsense. More"
        assert texts(events)[0] == "Well. "


class TestProvisional:
    def test_the_policy_has_to_allow_it(self) -> None:
        with pytest.raises(ConfigurationError, match="shown before it is decided on"):
            guard().stream(ASKED, provisional=True)

    @pytest.mark.parametrize("word", ["nothing", "Okapis"])
    def test_tokens_are_shown_marked_and_the_log_says_so_before(self, word: str) -> None:
        sink = MemorySink()
        own = guard(doubts=word, policy=ShowProvisional(AbstainBelow(**LIMIT)), audit=sink)
        events: list[Event] = []
        for event in own.stream(ASKED, provisional=True):
            events.append(event)
            if isinstance(event, Provisional):
                assert sink.records[0].rule == "provisional"
                assert sink.records[0].status == "unscorable"
        shown = "".join(each.text for each in events if isinstance(each, Provisional))
        assert shown.startswith(FIRST)
        assert (shown == ANSWER) == (word == "nothing")
        assert outcome_of(events).text == (ANSWER if word == "nothing" else None)
        assert [each.begins for each in events if isinstance(each, Provisional)].count(True) == 1

    def test_a_further_draft_says_that_it_begins(self) -> None:
        policy = ShowProvisional(RetryBelow(**LIMIT))
        own = guard(ScriptedModel([ANSWER, "Tapirs are not."]), doubts="Okapis", policy=policy)
        shown = [each for each in own.stream(ASKED, provisional=True) if isinstance(each, Provisional)]
        begins = [at for at, each in enumerate(shown) if each.begins]
        assert len(begins) == 2
        assert "".join(each.text for each in shown[begins[1] :]) == "Tapirs are not."

    def test_a_document_can_say_it(self) -> None:
        document = {"id": "live", "version": 1, "rules": [{"abstain": {"above": LIMIT}}], "provisional": True}
        assert load_policy(document).provisional
        assert not load_policy({**document, "provisional": False}).provisional

    def test_a_call_never_shows_anything(self) -> None:
        assert guard(policy=ShowProvisional(Accept()))(ASKED).text == ANSWER


def calibration(gate: str = "stream", **changed: Any) -> Calibration:
    """Platt with slope 1 and intercept −1: a value of 1 is a confidence of a half."""
    model, scorer = ScriptedModel(ANSWER), ScriptedScorer(0.1)
    conditions = Conditions.of(model.generate(ASKED))
    bound: dict[str, Any] = {
        "score": "hybridgrad", "intercept": 0.0, "slope": 4.0, "fingerprint": model.identity.fingerprint,
        "structure": model.identity.structure, "dtype": "float32", "template": "none", "scorer": "hybridgrad",
        "scorer_version": scorer.identity.version, "scorer_settings": {}, "conditions": conditions, "examples": 20,
        "correct": 10, "data": "d", "gate": gate,
    }  # fmt: skip
    return Calibration(**{**bound, **changed})


class TestCalibrations:
    def test_one_of_whole_answers_is_refused(self) -> None:
        own = guard(policy=AbstainBelow(confidence=0.5), calibration=calibration("answer"))
        assert not own.streams
        with pytest.raises(ConfigurationError, match="calibrate --for stream"):
            own.stream(ASKED)

    def test_a_policy_that_asks_nothing_of_it_streams_without_confidence(self) -> None:
        events = list(guard(calibration=calibration("answer")).stream(ASKED))
        assert all(each.verdict.confidence is None for each in events if isinstance(each, Released))

    def test_the_greatest_value_so_far_counts(self) -> None:
        values = {FIRST: 2.0, FIRST + SECOND: 0.1, ANSWER: 0.5}
        own = guard(policy=AbstainBelow(confidence=0.01), scorer=ScriptedScorer(values), calibration=calibration())
        events = list(own.stream(ASKED))
        confidences = [each.verdict.confidence for each in events if isinstance(each, Released)]
        assert confidences == [confidences[0]] * 3

    def test_a_call_goes_through_the_gate(self) -> None:
        values = {FIRST: 9.0, FIRST + SECOND: 0.1, ANSWER: 0.1}
        own = guard(policy=AbstainBelow(confidence=0.5), scorer=ScriptedScorer(values), calibration=calibration())
        outcome = own(ASKED)
        assert (outcome.text, outcome.decision.action) == (None, "abstain")  # as a whole it would have passed

    def test_so_does_a_batch(self) -> None:
        own = guard(policy=AbstainBelow(confidence=0.01), calibration=calibration())
        assert [each.text for each in own.batch([ASKED] * 3)] == [ANSWER] * 3

    def test_an_answer_from_elsewhere_does_not(self) -> None:
        own = guard(policy=AbstainBelow(confidence=0.5), calibration=calibration())
        with pytest.raises(ConfigurationError, match="as a whole"):
            own.review(ASKED, ANSWER)

    def test_a_cut_answer_has_no_confidence_at_its_end(self) -> None:
        own = guard(
            ScriptedModel(ANSWER, ending="length"), policy=AbstainBelow(confidence=0.01), calibration=calibration()
        )
        events = list(own.stream(ASKED))
        assert texts(events) == [FIRST, SECOND]
        assert outcome_of(events).text is None


def test_a_model_that_does_not_stream_is_refused() -> None:
    class Whole:
        name, context, identity = "whole", None, ScriptedModel("x").identity
        prompt, generate, read, write = (lambda *args, **kwargs: None for _ in range(4))

    own = Guard(Whole(), policy=Accept(), scorer=ScriptedScorer(0.1))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="does not stream"):
        own.stream(ASKED)


def test_a_prompt_that_cannot_be_used_is_refused_at_once() -> None:
    with pytest.raises(InputError):
        guard().stream("")


def test_a_tokenizer_that_rewrites_what_was_released_ends_it() -> None:
    class Rewriting(ScriptedModel):
        def stream(self, *args: Any, **kwargs: Any) -> Any:
            live = super().stream(*args, **kwargs)
            whole = live.beginning

            def other(tokens: int | None = None) -> Generation:
                made = whole(tokens)
                if tokens is not None and tokens < 30:
                    return made
                return self._generation(live._prompt, "Zebus " + made.text, "stop", made.settings)

            live.beginning = other  # type: ignore[method-assign]
            return live

    seen: list[Event] = []
    with pytest.raises(ModelError, match="does not begin with what was released"):
        list(_noted(guard(Rewriting(ANSWER)).stream(ASKED), seen))
    assert texts(seen) == [FIRST]


@pytest.fixture(scope="module")
def tiny_white() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(), tiny_tokenizer())


class TestWithAModel:
    SAID: dict[str, Any] = {"max_new_tokens": 64, "temperature": 1.0, "seed": 5}  # noqa: RUF012
    TOLD = "Name three rivers of Europe, a sentence each."

    def test_text_and_verdict_are_those_of_the_call(self, demo: WhiteBoxModel) -> None:
        own = Guard(demo, policy=Accept(), generation={"max_new_tokens": 64})
        events, called = list(own.stream(self.TOLD)), own(self.TOLD)
        assert len(texts(events)) > 2
        assert "".join(texts(events)) == outcome_of(events).text == called.text
        streamed = outcome_of(events).verdict.score
        assert dict(streamed.scores) == pytest.approx(dict(called.verdict.score.scores), rel=1e-4)
        assert {each.verdict.score.prefix for each in events if isinstance(each, Released)} == {"kept"}

    def test_a_reader_who_left_costs_a_token(self, tiny_white: WhiteBoxModel) -> None:
        drawn: list[int] = []
        gone = threading.Event()
        live = tiny_white.stream(ASKED, gone=gone.is_set, **{**self.SAID, "max_new_tokens": 400})
        look = live.look
        live.look = lambda ids: (drawn.append(ids[-1]), look(ids))[1]  # type: ignore[method-assign]
        live.wait(lambda: len(live.texts()) > 3)
        at = len(drawn)
        gone.set()
        for thread in threading.enumerate():
            if thread.name == "hallucination-guard-stream":
                thread.join(30)
        assert len(drawn) <= at + 2
        live.wait(lambda: False)  # returns: nobody draws any more

    def test_what_goes_wrong_in_decoding_reaches_the_reader(
        self, tiny_white: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hallucination_guard.model.generating.Decoding.steps", lambda *_: _raising())
        sink = MemorySink()
        with pytest.raises(RuntimeError, match="out of memory"):
            list(Guard(tiny_white, policy=Accept(), audit=sink).stream(ASKED))
        assert [each.rule for each in sink.records] == ["interrupted"]

    async def test_many_at_a_time_are_what_each_is_alone(self, tiny_white: WhiteBoxModel) -> None:
        sink = MemorySink()
        own = Guard(tiny_white, policy=Accept(), audit=sink, generation={"max_new_tokens": 24})
        asked = [f"What is {at} and {'more ' * (at % 5)}?" for at in range(32)]
        alone = [[each for each in own.stream(one)] for one in asked]

        async def read(one: str) -> list[Event]:
            return [each async for each in own.astream(one)]

        together = await asyncio.gather(*map(read, asked))
        for one, other in zip(alone, together, strict=True):
            assert texts(list(one)) == texts(list(other))
            assert dict(outcome_of(list(one)).verdict.score.scores) == pytest.approx(
                dict(outcome_of(list(other)).verdict.score.scores), rel=1e-3
            )
        assert sum(each.part is None for each in sink.records) == 64
        for each in threading.enumerate():
            if each.name.startswith("hallucination-guard"):
                each.join(30)
                assert not each.is_alive()

    def test_a_base_model_streams_where_the_question_is_named(self) -> None:
        base = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        own = Guard(base, policy=Accept(), generation={"max_new_tokens": 6, "question": "Who?"})
        assert outcome_of(list(own.stream("Q: Who? A:"))).verdict.score.status == "scored"

    def test_the_context_bounds_what_can_go_on(self, tiny_white: WhiteBoxModel) -> None:
        with pytest.raises(InputError, match="shorten"):
            tiny_white.stream(ASKED, begin=[5] * 500)

    def test_a_scorer_that_fails_in_the_middle(self, demo: WhiteBoxModel) -> None:
        class Failing:
            identity, primary = ScorerIdentity(name="hybridgrad", version="1", settings={}), "hybridgrad"
            asked = 0

            def batch(self, model: Any, generations: Any) -> list[Score]:
                self.asked += 1
                if self.asked > 1:
                    raise RuntimeError("broken")
                return [Score(status="scored", scorer=self.identity, scores={"hybridgrad": 0.1})]

        own = Guard(demo, policy=AbstainBelow(**LIMIT), scorer=Failing(), generation={"max_new_tokens": 64})
        events = list(own.stream(self.TOLD))
        assert len(texts(events)) == 1
        assert outcome_of(events).decision.rule == "on_error"

    def test_unscored_is_let_through_only_where_the_policy_says_so(self, tiny_white: WhiteBoxModel) -> None:
        scorer = ScriptedScorer("cannot be read")
        for policy, left in ((Accept(), False), (Unscored(Accept(), on_unscorable="accept"), True)):
            own = Guard(tiny_white, policy=policy, scorer=scorer, generation=self.SAID)
            assert bool(texts(list(own.stream(ASKED)))) == left


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    white = WhiteBoxModel(tiny_model().to("cuda"), tiny_tokenizer())
    events = list(Guard(white, policy=Accept(), generation={"max_new_tokens": 24}).stream(ASKED))
    assert torch.isfinite(torch.tensor(outcome_of(events).verdict.score.scores["hybridgrad"]))


def _noted(events: Iterator[Event], into: list[Event]) -> Iterator[Event]:
    for each in events:
        into.append(each)
        yield each


def _raising() -> Iterator[Any]:
    yield _raise(RuntimeError("out of memory"))


def _raise(error: Exception) -> Any:
    raise error


def _frames(traceback: Any) -> Iterator[Any]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next
