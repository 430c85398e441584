"""An answer that something else is writing leaves sentence by sentence, each only after its decision."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from hallucination_guard import Calibration, Guard, Outcome, Released, WhiteBoxModel
from hallucination_guard.errors import AuditError, ConfigurationError, InputError, ModelError
from hallucination_guard.guard.in_a_thread import ReaderGone
from hallucination_guard.scoring import HybridGrad, Likelihood
from hallucination_guard.scoring.beginnings import score_beginnings
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard.values import Conditions, Event, Generation
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetrieveBelow, RetryBelow, Unscored

ANSWER = "Zebras are striped. Okapis are too. Quaggas were."
FIRST, SECOND, THIRD = "Zebras are striped. ", "Okapis are too. ", "Quaggas were."
LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 0.5}
ASKED = "Which animals are striped?"
TOOLS: Any = [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def guard_of(doubts: str = "nothing", *, answers: Any = "never drawn", policy: Any = None, **settings: Any) -> Guard:
    scorer = ScriptedScorer(lambda generation: 1.0 if doubts in generation.text else 0.1)
    settings = {"scorer": scorer, "audit": MemorySink(), "model": ScriptedModel(answers), **settings}
    return Guard(settings.pop("model"), policy=policy or AbstainBelow(**LIMIT), **settings)


def texts(events: Any) -> list[str]:
    return [each.text for each in events if isinstance(each, Released)]


def outcome_of(events: list[Event]) -> Outcome:
    assert isinstance(events[-1], Outcome)
    return events[-1]


def words(text: str = ANSWER) -> Iterator[str]:
    yield from (each + " " for each in text.split(" ")[:-1])
    yield text.split(" ")[-1]


class Source:
    """Pieces that know what became of them."""

    def __init__(self, pieces: Any = None) -> None:
        self.pieces = words() if pieces is None else iter(pieces)
        self.given: list[Any] = []
        self.closed = 0

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Any:
        self.given.append(next(self.pieces))
        return self.given[-1]

    def close(self) -> None:
        self.closed += 1


class TestWhatLeaves:
    @pytest.mark.parametrize("size", [1, 3, 7, 1000])
    def test_a_sure_answer_leaves_sentence_by_sentence_however_it_is_cut(self, size: int) -> None:
        cut = [ANSWER[at : at + size] for at in range(0, len(ANSWER), size)]
        guard = guard_of()
        events = list(guard.follow(ASKED, cut))
        assert texts(events) == [FIRST, SECOND, THIRD]
        outcome = outcome_of(events)
        assert (outcome.text, outcome.released, outcome.attempts) == (ANSWER, ANSWER, 1)
        assert outcome.generation.finish_reason == "read"
        assert guard.model.calls == []  # type: ignore[attr-defined]

    def test_and_so_does_one_in_token_ids(self) -> None:
        ids = list(ANSWER.encode())
        events = list(guard_of().follow(ASKED, [ids[:5], ids[5:6], ids[6:]]))
        assert texts(events) == [FIRST, SECOND, THIRD]
        assert outcome_of(events).generation.response_token_ids == tuple(ids)

    def test_a_sentence_leaves_before_the_next_one_is_there(self) -> None:
        source = Source()
        events = guard_of().follow(ASKED, source)
        assert [each.text for each in (next(events),) if isinstance(each, Released)] == [FIRST]
        assert source.given == ["Zebras ", "are ", "striped. ", "Okapis "]

    @pytest.mark.parametrize(("word", "left"), [("Zebras", []), ("Okapis", [FIRST]), ("Quaggas", [FIRST, SECOND])])
    def test_a_doubtful_sentence_ends_it_and_no_more_is_asked_for(self, word: str, left: list[str]) -> None:
        source, guard = Source(), guard_of(word)
        events = list(guard.follow(ASKED, source))
        assert texts(events) == left
        assert (outcome_of(events).text, outcome_of(events).released) == (None, "".join(left))
        assert source.closed == 1
        assert len(source.given) < 8 or word == "Quaggas"

    def test_it_is_what_a_stream_of_the_same_answer_gives(self) -> None:
        for doubts in ("nothing", "Zebras", "Okapis", "Quaggas"):
            drawn, heard = guard_of(doubts, answers=ANSWER), guard_of(doubts)
            own, others = list(drawn.stream(ASKED)), list(heard.follow(ASKED, words()))
            assert texts(own) == texts(others)
            assert outcome_of(own).decision == outcome_of(others).decision
            records = [[each.decision, each.part, each.answer] for each in drawn.audit.records]  # type: ignore[union-attr]
            assert records == [[each.decision, each.part, each.answer] for each in heard.audit.records]  # type: ignore[union-attr]

    def test_each_sentence_had_its_record_first(self) -> None:
        guard = guard_of()
        records = guard.audit.records  # type: ignore[union-attr]
        for at, event in enumerate(guard.follow(ASKED, words())):
            if isinstance(event, Released):
                assert records[at].id == event.audit_id
        assert [each.part is None for each in records] == [False, False, True]

    def test_a_log_that_fails_lets_nothing_leave(self) -> None:
        def broken(record: Any) -> str:
            raise OSError("full")

        source = Source()
        with pytest.raises(AuditError):
            next(guard_of(audit=broken).follow(ASKED, source))
        assert source.closed == 1

    def test_half_a_character_waits(self) -> None:
        ids = list("Ja. Übung macht den Meister. 日本。東京です。".encode())
        events = list(guard_of().follow(ASKED, ([each] for each in ids)))
        assert texts(events) == ["Ja. ", "Übung macht den Meister. ", "日本。", "東京です。"]

    def test_an_empty_answer_is_the_policys_to_decide(self) -> None:
        scorer = ScriptedScorer(lambda generation: "the answer is empty")
        for pieces in ([], [""], [[]]):
            events = list(guard_of(scorer=scorer).follow(ASKED, pieces))
            assert outcome_of(events).decision.rule == "on_unscorable"

    def test_a_call_leaves_with_the_whole_answer(self) -> None:
        seen: list[str] = []
        scorer = ScriptedScorer(lambda generation: seen.append(generation.text) or 0.1)  # type: ignore[func-returns-value]
        events = list(guard_of(scorer=scorer).follow(ASKED, list(f"Let me see. So. {CALL}"), tools=TOOLS))
        assert texts(events) == ["Let me see. ", "So. ", ""][: len(texts(events))]
        assert [each.name for each in outcome_of(events).tool_calls] == ["add"]
        assert seen[-1].endswith(CALL)
        assert not any("tool_call" in each for each in seen[:-1])

    def test_a_doubtful_call_is_none(self) -> None:
        events = list(guard_of("arguments").follow(ASKED, list(f"Let me see. So. {CALL}"), tools=TOOLS))
        assert outcome_of(events).tool_calls == ()
        assert "tool_call" not in "".join(texts(events))

    def test_json_leaves_as_a_whole(self) -> None:
        json = '{"a": "One. Two. Three."}'
        schema: Any = {"type": "object", "properties": {"a": {"type": "string"}}}
        assert texts(guard_of().follow(ASKED, list(json), response_schema=schema)) == [json]
        assert texts(guard_of("Three").follow(ASKED, list(json), response_schema=schema)) == []


class TestFurtherDrafts:
    def test_a_retry_goes_on_after_what_was_released(self) -> None:
        policy = RetryBelow(**LIMIT, times=1) | AbstainBelow(**LIMIT)
        guard, source = guard_of("Okapis", answers="Giraffes are not.", policy=policy), Source()
        events = list(guard.follow(ASKED, source))
        assert texts(events) == [FIRST, "Giraffes are not."]
        outcome = outcome_of(events)
        assert (outcome.text, outcome.attempts) == (FIRST + "Giraffes are not.", 2)
        assert source.closed == 1

    def test_what_is_looked_up_is_in_the_next_prompt(self) -> None:
        policy = RetrieveBelow(retriever=lambda query: ["Horses are not."], **LIMIT) | AbstainBelow(**LIMIT)
        guard = guard_of("Okapis", answers="Horses are not.", policy=policy)
        events = list(guard.follow(ASKED, words()))
        assert "".join(texts(events)) == FIRST + "Horses are not."
        assert "Horses" in guard.model.calls[0][0][-1].content  # type: ignore[attr-defined]

    def test_another_one_answers(self) -> None:
        policy = EscalateBelow(to=lambda messages: "Ask a zoologist.", **LIMIT)
        outcome = outcome_of(list(guard_of("Okapis", policy=policy).follow(ASKED, words())))
        assert (outcome.text, outcome.released) == ("Ask a zoologist.", FIRST)


class TestInterruptions:
    @pytest.mark.parametrize("at", [0, 2, 5])
    @pytest.mark.fault(
        "stream", "what is followed breaks off after {case} pieces", "what had left is a correct beginning; a record"
    )
    def test_an_error_of_the_source_is_recorded_and_raised(self, at: int) -> None:
        def breaking() -> Iterator[str]:
            yield from list(words())[:at]
            raise ConnectionError("gone")

        guard, seen = guard_of(), []
        with pytest.raises(ConnectionError, match="gone"):
            for event in guard.follow(ASKED, breaking()):
                seen.append(event)
        assert FIRST.startswith("".join(texts(seen)))
        record = guard.audit.records[-1]  # type: ignore[union-attr]
        assert (record.rule, record.decision) == ("interrupted", "abstain")
        assert record.answer == "".join(list(words())[:at])

    def test_closing_early_ends_the_source_and_leaves_a_record(self) -> None:
        guard, source = guard_of(), Source()
        events = guard.follow(ASKED, source)
        next(events)
        events.close()  # type: ignore[attr-defined]
        assert source.closed == 1
        assert len(source.given) == 4
        assert [each.rule for each in guard.audit.records][-1] == "interrupted"  # type: ignore[union-attr]

    def test_a_source_that_cannot_be_closed_is_recorded_all_the_same(self) -> None:
        class Stuck(Source):
            def close(self) -> None:
                raise OSError("stuck")

        guard = guard_of()
        events = guard.follow(ASKED, Stuck())
        next(events)
        with pytest.raises(OSError, match="stuck"):
            events.close()  # type: ignore[attr-defined]
        assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]

    @pytest.mark.parametrize("piece", [b"bytes", 7, None, [300], [-1], {"a": 1}])
    def test_what_is_no_piece_is_refused(self, piece: Any) -> None:
        with pytest.raises((InputError, TypeError)):
            list(guard_of().follow(ASKED, [piece]))

    def test_text_and_ids_are_not_mixed(self) -> None:
        guard = guard_of()
        with pytest.raises(InputError, match="one kind"):
            list(guard.follow(ASKED, ["Zebras", list(b" are.")]))
        assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]

    def test_a_model_that_changes_ends_it(self) -> None:
        guard = guard_of()
        other = ScriptedModel("", fingerprint="other").identity

        def changing() -> Iterator[str]:
            yield "Zebras are striped. Okapis"
            guard.model.identity = other  # type: ignore[misc]
            yield " are too. Quaggas were."

        seen: list[Event] = []
        with pytest.raises(ModelError, match="was changed"):
            for event in guard.follow(ASKED, changing()):
                seen.append(event)
        assert texts(seen) == [FIRST]

    @pytest.mark.parametrize(
        ("rewritten", "ends"), [(lambda text: text.replace("striped", "STRIPED"), False), (str.upper, True)]
    )
    @pytest.mark.fault(
        "stream", "a tokenizer that rewrites earlier text", "what follows is read apart, or the stream ends"
    )
    def test_a_tokenizer_that_rewrites_earlier_text(self, rewritten: Any, ends: bool) -> None:
        model = ScriptedModel("")
        follow = model.follow

        def merging(*args: Any, **kwargs: Any) -> Any:
            live = follow(*args, **kwargs)
            ids = lambda text: tuple((rewritten(text) if "Q" in text else text).encode())  # noqa: E731
            live._reading = replace(live._reading, ids=ids)
            return live

        model.follow = merging  # type: ignore[method-assign]
        guard = guard_of(model=model)
        seen: list[Event] = []
        with pytest.raises(ModelError, match="do not begin with") if ends else nullcontext():
            for event in guard.follow(ASKED, words()):
                seen.append(event)
        assert texts(seen) == ([FIRST] if ends else [FIRST, SECOND, THIRD])
        assert guard.audit.records[-1].decision == ("abstain" if ends else "accept")  # type: ignore[union-attr]


class TestUnscorable:
    @pytest.mark.parametrize(
        ("policy", "left"), [(None, []), (Unscored(AbstainBelow(**LIMIT), on_unscorable="accept"), [ANSWER])]
    )
    def test_what_the_caller_says_of_it_holds_for_the_whole(self, policy: Any, left: list[str]) -> None:
        guard = guard_of(policy=policy)
        events = list(guard.follow(ASKED, words(), unscorable="the prompt had an image"))
        assert texts(events) == left
        [record] = guard.audit.records  # type: ignore[union-attr]
        assert (record.status, record.detail, record.answer) == ("unscorable", "the prompt had an image", ANSWER)

    def test_what_is_longer_than_the_context_is_unscorable_from_there_on(self) -> None:
        model = ScriptedModel("", context=len(f"user: {ASKED}\n") + 30)
        events = list(guard_of(model=model).follow(ASKED, words()))
        assert texts(events) == [FIRST]
        assert (outcome_of(events).decision.action, outcome_of(events).verdict.score.status) == (
            "abstain",
            "unscorable",
        )

    def test_so_is_half_a_surrogate_pair(self) -> None:
        events = list(guard_of().follow(ASKED, [FIRST, "Ok\ud800 are too. Quaggas were."]))
        assert outcome_of(events).verdict.score.status == "unscorable"
        assert "Quaggas" not in "".join(texts(events))


class TestSettings:
    def test_a_calibration_of_whole_answers_is_refused_at_once(self) -> None:
        guard = guard_of()
        calibration = _calibration(guard, "answer")
        guard = guard_of(policy=AbstainBelow(confidence=0.5), calibration=calibration)
        with pytest.raises(ConfigurationError, match="of whole answers"):
            guard.follow(ASKED, words())

    def test_a_calibration_of_read_answers_covers_it(self) -> None:
        guard = guard_of()
        guard = guard_of(policy=AbstainBelow(confidence=0.1), calibration=_calibration(guard, "stream"))
        events = list(guard.follow(ASKED, words()))
        assert texts(events) == [FIRST, SECOND, THIRD]
        assert {each.uncovered for each in guard.audit.records} == {""}  # type: ignore[union-attr]
        assert len({str(each.conditions["frame"]) for each in guard.audit.records}) == 1  # type: ignore[union-attr]

    def test_a_model_that_cannot_follow_is_refused(self) -> None:
        class Whole:
            name, context = "whole", None
            identity = ScriptedModel("").identity
            prompt = generate = read = write = lambda self, *_, **__: None

        with pytest.raises(ConfigurationError, match="cannot read an answer while"):
            guard_of(model=Whole()).follow(ASKED, words())

    def test_a_prompt_that_cannot_be_used_is_refused_at_once(self) -> None:
        with pytest.raises(InputError):
            guard_of().follow("", words())


def _calibration(guard: Guard, gate: Any) -> Calibration:
    identity, scorer = guard.model.identity, guard.scorer.identity
    return Calibration(
        score="hybridgrad", intercept=0.0, slope=4.0, fingerprint=identity.fingerprint, structure=identity.structure,
        dtype=identity.dtype, template=identity.template, scorer=scorer.name, scorer_version=scorer.version,
        scorer_settings=dict(scorer.settings), conditions=Conditions.of(guard.model.read(ASKED, "Yes.")), examples=20,
        correct=10, data="d", gate=gate,
    )  # fmt: skip


class TestAsync:
    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_the_same_events(self, kind: str) -> None:
        async def awaited() -> AsyncIterator[str]:
            for each in words():
                await asyncio.sleep(0)
                yield each

        events = [each async for each in guard_of("Quaggas").afollow(ASKED, words() if kind == "sync" else awaited())]
        assert texts(events) == [FIRST, SECOND]

    async def test_a_reader_who_leaves_ends_a_source_that_waits(self) -> None:
        closed = asyncio.Event()

        async def waiting() -> AsyncIterator[str]:
            try:
                yield FIRST + "Okapis"
                await asyncio.Event().wait()
            finally:
                closed.set()

        guard = guard_of()
        events = guard.afollow(ASKED, waiting())
        assert isinstance(await anext(events), Released)
        await events.aclose()
        await asyncio.wait_for(closed.wait(), 5)
        assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]

    async def test_an_error_of_the_source_is_raised(self) -> None:
        async def breaking() -> AsyncIterator[str]:
            yield FIRST + "Okapis"
            raise ConnectionError("gone")

        events = guard_of().afollow(ASKED, breaking())
        assert isinstance(await anext(events), Released)
        with pytest.raises(ConnectionError):
            await anext(events)


class TestWhiteBox:
    """With a real tokenizer and a real gradient."""

    @pytest.fixture
    def white(self) -> WhiteBoxModel:
        return WhiteBoxModel(tiny_model(), tiny_tokenizer())

    @pytest.mark.parametrize("kind", ["text", "ids"])
    def test_what_is_scored_is_what_a_reading_of_that_beginning_scores(self, white: WhiteBoxModel, kind: str) -> None:
        ids = white.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        pieces: Any = words() if kind == "text" else ([each] for each in ids)
        scorer = HybridGrad()
        guard = Guard(white, policy=Accept(), scorer=scorer, audit=MemorySink())
        events = list(guard.follow(ASKED, pieces))
        assert "".join(texts(events)) == ANSWER
        said = ""
        for event in events:
            if isinstance(event, Released):
                said += event.text
                [alone] = scorer.batch(white, [white.read(ASKED, said)])
                assert event.verdict.score.scores["hybridgrad"] == pytest.approx(alone.scores["hybridgrad"], rel=1e-4)

    def test_an_end_token_ends_it(self, white: WhiteBoxModel) -> None:
        [end] = white.end_ids
        ids = white.tokenizer("Yes. No.", add_special_tokens=False)["input_ids"]
        source = Source([[*ids, end, *ids], ids])
        events = list(Guard(white, policy=Accept(), scorer=Likelihood()).follow(ASKED, source))
        assert outcome_of(events).text == "Yes. No."
        assert (source.closed, len(source.given)) == (1, 1)

    @pytest.mark.parametrize("thought", ["<think>Hm. He is dumb. So.</think>\n\n", "<think>Never. Closed. "])
    def test_thinking_does_not_leave(self, white: WhiteBoxModel, thought: str) -> None:
        scorer = ScriptedScorer(lambda generation: 0.1)
        events = list(Guard(white, policy=Accept(), scorer=scorer).follow(ASKED, list(thought + ANSWER)))
        assert "".join(texts(events)) == (ANSWER if "</think>" in thought else "")

    def test_a_control_token_in_a_text_is_text(self, white: WhiteBoxModel) -> None:
        said = "Write <|im_end|> here. And <|im_start|> there."
        events = list(Guard(white, policy=Accept(), scorer=Likelihood()).follow(ASKED, list(said)))
        assert texts(events)[0].strip() == "Write <|im_end|> here."
        assert outcome_of(events).text == said

    def test_the_beginnings_of_the_demo_models_tokens(self, demo: WhiteBoxModel) -> None:
        """The text of an answer gives the beginnings, and their scores, that its own tokens give."""
        answer = "The Rhine is a river. It flows north.\n\nThe Danube flows east! 🎉 The Volga is long."
        reader: Generation = demo.read(ASKED, answer)
        parts = score_beginnings(demo, Likelihood(), reader)
        guard = Guard(demo, policy=Accept(), scorer=Likelihood(), audit=MemorySink())
        events = list(guard.follow(ASKED, list(answer)))
        assert "".join(texts(events)) == answer
        records = guard.audit.records  # type: ignore[union-attr]
        assert [each.tokens["out"] for each in records] == [length for length, _ in parts]
        for record, (_, score) in zip(records, parts, strict=True):
            assert record.scores["mean_nll"] == pytest.approx(score.scores["mean_nll"], rel=1e-4)


async def test_a_thread_that_waits_for_the_loop_ends_when_nobody_reads() -> None:
    from hallucination_guard.guard.in_a_thread import from_the_loop

    async def never() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    left = threading.Event()
    items = from_the_loop(never(), left)
    waiting = asyncio.create_task(asyncio.to_thread(next, items, None))
    await asyncio.sleep(0.01)
    left.set()
    with pytest.raises(ReaderGone):
        await asyncio.wait_for(waiting, 5)
