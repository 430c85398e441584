"""What an attack on the stream gate found: a model is made to say something, and what must not become of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from hallucination_guard import Calibration, Guard, Outcome, Released, WhiteBoxModel
from hallucination_guard.calibration.certificate import Certificate
from hallucination_guard.errors import CalibrationMismatch, ConfigurationError, ModelError
from hallucination_guard.guard.steps import Steps
from hallucination_guard.model import generating, live
from hallucination_guard.scoring import HybridGrad, Likelihood
from hallucination_guard.scoring.beginnings import score_beginnings
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard.values import Call, Conditions, Event, Provisional
from hallucination_guard_policies import AbstainBelow, Accept, RetrieveBelow, RetryBelow, ShowProvisional

LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 0.5}
BELOW = AbstainBelow(**LIMIT)
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}]
LONG = {"max_new_tokens": 120}
Say = Callable[[Any], list[int]]


@pytest.fixture
def white() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(), tiny_tokenizer())


@pytest.fixture
def say(white: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the model draw a text, or what a function of the request gives; all else is as it is."""
    said: dict[str, Say] = {}

    class Force(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, rows: list[list[int]]) -> None:
            self.rows, self.at = rows, 0

        def __call__(self, ids: Any, scores: Any) -> Any:
            forced = torch.full_like(scores, -1e9)
            for row, own in enumerate(self.rows):
                forced[row, own[self.at] if self.at < len(own) else 2] = 0.0
            self.at += 1
            return forced

    real = generating.Decoding._processors

    def processors(self: Any) -> Any:
        chain = real(self)
        chain.append(Force([said["now"](each) for each in self._asked]))
        return chain

    monkeypatch.setattr(generating.Decoding, "_processors", processors)

    def set_text(text: str | Callable[[Any], str]) -> None:
        if callable(text):
            said["now"] = lambda asked: ids_of(white, text(asked))
        else:
            said["now"] = lambda asked: ids_of(white, text)[len(asked.begin) :]

    return set_text


def ids_of(white: WhiteBoxModel, text: str) -> list[int]:
    found: list[int] = white.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def doubt(word: str = "@@") -> ScriptedScorer:
    return ScriptedScorer(lambda generation: 1.0 if word in generation.text else 0.1)


def texts(events: Any) -> list[str]:
    return [each.text for each in events if isinstance(each, Released)]


def outcome_of(events: Any) -> Outcome:
    *_, last = events
    assert isinstance(last, Outcome)
    return last


def calibrated(model: Any, conditions: Conditions, **more: Any) -> Calibration:
    identity, scorer = model.identity, doubt().identity
    bound: dict[str, Any] = {
        "score": "hybridgrad", "intercept": 0.0, "slope": 4.0, "fingerprint": identity.fingerprint,
        "structure": identity.structure, "dtype": identity.dtype, "template": identity.template,
        "scorer": scorer.name, "scorer_version": scorer.version, "scorer_settings": dict(scorer.settings),
        "conditions": conditions, "examples": 20, "correct": 10, "data": "d", "gate": "stream",
    }  # fmt: skip
    return Calibration(**{**bound, **more})


def spare(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(live.Streams, "_spare", property(lambda self: yes))


class TestThresholds:
    def test_steps_do_not_judge_wholes_by_streams(self) -> None:
        model = ScriptedModel("Zebras are striped. Okapis are too.")
        guard = Guard(
            model,
            policy=AbstainBelow(confidence=0.3),
            scorer=doubt(),
            calibration=calibrated(model, Conditions.of(model.generate("?"))),
        )
        with pytest.raises(ConfigurationError, match="of streams"):
            Steps(guard).begin("?", request_id="r", call=Call())

    @pytest.mark.parametrize("gate", ["answer", "stream"])
    def test_an_answer_that_the_context_cut_is_not_covered(self, white: WhiteBoxModel, say: Any, gate: str) -> None:
        say("word " * 100)
        conditions = Conditions.of(white.generate("hi", max_new_tokens=64))
        more: dict[str, Any] = {"gate": gate, "reference": tuple(0.1 + at / 1000 for at in range(30))}
        certificate = Certificate(
            alpha=0.3, delta=0.1, score="hybridgrad", threshold=0.5, n=50, answered=40, errors=1, bound=0.2, fitted=10,
            covers=calibrated(white, conditions, **more).covered, data="d", date="2026-01-01",
        )  # fmt: skip
        guard = Guard(
            white,
            policy=AbstainBelow(max_risk=0.3),
            scorer=doubt(),
            audit=MemorySink(),
            calibration=calibrated(white, conditions, certificates=(certificate,), **more),
            generation={"max_new_tokens": 64},
        )
        room = 512 - len(white.prompt("x").token_ids) - 19
        outcome = guard("x" * room)
        assert (outcome.decision.action, outcome.verdict.max_risk) == ("abstain", None)
        assert guard.audit.records[-1].conditions["max_new_tokens"] == 20  # type: ignore[union-attr]

    @pytest.mark.parametrize("at", [0, 1])
    def test_weights_that_change_end_it(self, white: WhiteBoxModel, say: Any, at: int) -> None:
        say("One cat. Two dogs. Three hens.")
        guard = Guard(
            white,
            policy=AbstainBelow(confidence=0.3),
            scorer=doubt(),
            audit=MemorySink(),
            calibration=calibrated(white, Conditions.of(white.generate("hi", max_new_tokens=64))),
            generation={"max_new_tokens": 64},
        )
        events = guard.stream("hi")
        seen = [next(events) for _ in range(at)]
        with torch.no_grad():
            white.model.lm_head.weight.mul_(1.5)
        with pytest.raises((CalibrationMismatch, ModelError)):
            seen += list(events)
        assert len(seen) == at
        assert guard.audit.records[-1].rule == "interrupted"  # type: ignore[union-attr]

    def test_beginnings_are_those_of_the_gate_where_there_are_calls(self, white: WhiteBoxModel, say: Any) -> None:
        answer = 'Well. So. <tool_call>{"name": "add", "arguments": {"a": "One. Two. Three."}}</tool_call>'
        say(answer)
        sink = MemorySink()
        list(Guard(white, policy=Accept(), scorer=doubt(), audit=sink, generation=LONG).stream("hi", tools=TOOLS))
        read = white.read("hi", answer, tools=TOOLS)
        offline = [length for length, _ in score_beginnings(white, Likelihood(), read)]
        assert offline == [each.tokens["out"] for each in sink.records]


class TestWhatLeaves:
    def test_a_call_that_ends_between_two_looks(
        self, white: WhiteBoxModel, say: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        say('Well. <tool_call>{"name": "add", "arguments": {"a": "One. Two. Three."}}</tool_call>')
        real = live.LiveAnswer.texts
        drawn = white.stream("hi", tools=TOOLS, **LONG)  # type: ignore[typeddict-item]
        drawn.wait(lambda: "Two" in "".join(real(drawn)))
        stale = real(drawn)
        drawn.wait(lambda: False)
        from hallucination_guard.guard.stream import _ends

        looks = iter([stale])
        monkeypatch.setattr(live.LiveAnswer, "texts", lambda self: next(looks, None) or real(self))
        assert all(len("".join(real(drawn)[:stop])) <= len("Well. ") for stop in _ends(drawn, 0, whole=False))

    def test_json_leaves_as_a_whole(self, white: WhiteBoxModel, say: Any) -> None:
        say('{"a": "One. Two. Three."}')
        schema: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        guard = Guard(white, policy=BELOW, scorer=doubt("Three"))
        assert texts(guard.stream("hi", response_schema=schema)) == []

    @pytest.mark.parametrize(
        "answer",
        [
            '<think>Hm.</think>{"name": "add", "parameters": {"a": "Dear Sir. You are. Fired."}}',
            'Let me see. So. <|python_tag|>{"name": "add", "parameters": {"a": 1}}',
        ],
    )
    def test_calls_of_llamas_leave_as_calls(self, white: WhiteBoxModel, say: Any, answer: str) -> None:
        white.tokenizer.chat_template += "{# <|python_tag|> #}"
        say(answer)
        guard = Guard(white, policy=BELOW, scorer=doubt(), generation=LONG)
        events = list(guard.stream("hi", tools=TOOLS))
        assert "".join(texts(events)) == outcome_of(events).text
        assert [each.name for each in outcome_of(events).tool_calls] == ["add"]
        assert "Fired" not in "".join(texts(events))

    @pytest.mark.parametrize(
        ("answer", "hidden"),
        [
            ('Well. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "tool_call"),
            ("<think>He is dumb.</think>Yes it is. No.", "dumb"),
        ],
    )
    def test_neither_calls_nor_thoughts_are_shown_provisionally(
        self, white: WhiteBoxModel, say: Any, answer: str, hidden: str
    ) -> None:
        say(answer)
        guard = Guard(white, policy=ShowProvisional(BELOW), scorer=doubt(), generation=LONG)
        shown = _shown(guard.stream("hi", provisional=True, tools=TOOLS))
        assert shown
        assert hidden not in shown

    def test_a_further_draft_is_shown_from_its_own_beginning(self, white: WhiteBoxModel, say: Any) -> None:
        say(lambda asked: "Maybe so. Ok." if asked.begin else "<think>Hm.</think>Yes it is. No.")
        guard = Guard(white, policy=ShowProvisional(RetryBelow(**LIMIT)), scorer=doubt("No."), generation=LONG)
        shown = _shown(guard.stream("hi", provisional=True))
        assert shown.split("|")[-1] == "Maybe so. Ok."

    def test_json_is_not_shown_provisionally(self, white: WhiteBoxModel, say: Any) -> None:
        say('{"a": "One. Two. Three."}')
        guard = Guard(white, policy=ShowProvisional(BELOW), scorer=doubt("Three"))
        schema: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        assert _shown(guard.stream("hi", provisional=True, response_schema=schema)) == ""

    def test_space_around_a_call_is_not_said_twice(self, white: WhiteBoxModel, say: Any) -> None:
        call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        say(f"\n\nHi. There. {call} More. And more.")
        events = list(Guard(white, policy=Accept(), scorer=doubt(), generation=LONG).stream("hi", tools=TOOLS))
        assert "".join(texts(events)) == outcome_of(events).text
        assert "   " not in "".join(texts(events))


class TestThreads:
    @pytest.mark.parametrize("yes", [True, False])
    def test_a_tokenizer_that_raises_ends_its_own_stream_alone(
        self, white: WhiteBoxModel, say: Any, monkeypatch: pytest.MonkeyPatch, yes: bool
    ) -> None:
        spare(monkeypatch, yes)
        say("One cat is here. Two dogs.")
        real = live.end_of_answer

        def raising(tokenizer: Any, ids: Any, *rest: Any) -> Any:
            if threading.current_thread().name == "bad" or bad.is_set():
                bad.clear()
                raise TypeError("expected str instance")
            return real(tokenizer, ids, *rest)

        bad = threading.Event()
        monkeypatch.setattr(live, "end_of_answer", raising)
        bad.set()
        guard = Guard(white, policy=Accept(), scorer=doubt())
        with pytest.raises(TypeError):
            list(guard.stream("bad"))
        assert outcome_of(guard.stream("later")).text == "One cat is here. Two dogs."

    @pytest.mark.parametrize("draws", ["a reader", "the thread of all"])
    def test_an_interruption_takes_no_token_from_others(
        self, white: WhiteBoxModel, say: Any, monkeypatch: pytest.MonkeyPatch, draws: str
    ) -> None:
        spare(monkeypatch, False)
        monkeypatch.setattr(live, "_GATHER", 0.3)
        answer = "One cat is here. Two dogs are. Three hens."
        say(answer)
        guard = Guard(white, policy=Accept(), generation={"max_new_tokens": 60})
        alone = outcome_of(guard.stream("hi")).verdict.score.scores["hybridgrad"]
        real, hit = live.LiveAnswer.look, []

        def interrupted(self: Any, drawn: Any) -> None:
            if not hit and len(drawn) == 5 and self is self._streams._batch.rows[0]:
                hit.append(1)
                raise KeyboardInterrupt
            real(self, drawn)

        monkeypatch.setattr(live.LiveAnswer, "look", interrupted)
        found: list[Any] = []

        def read() -> None:
            try:
                found.append(outcome_of(guard.stream("hi")))
            except (KeyboardInterrupt, ModelError) as error:
                found.append(error)

        streams = white._streams
        threads = [threading.Thread(target=read) for _ in range(3)]
        if draws == "the thread of all":  # there is a reader more from the beginning
            monkeypatch.setattr(type(streams), "_apart", True)
            monkeypatch.setattr(threading, "excepthook", lambda raised: None)
        threads[0].start()
        while streams._drawn_by is None:  # who comes first and is alone draws, and waits for more before it begins
            time.sleep(0.001)
        for each in threads[1:]:
            each.start()
        for each in threads:
            each.join(60)
        assert len(found) == 3
        if draws == "the thread of all":  # no reader is to blame: each is told, and the next is answered
            assert [type(each) for each in found] == [ModelError] * 3
            assert outcome_of(guard.stream("hi")).text == answer
            return
        whole = [each for each in found if isinstance(each, Outcome)]
        assert len(whole) == 2
        for each in whole:
            assert each.text == answer
            assert each.verdict.score.scores["hybridgrad"] == pytest.approx(alone, rel=1e-3)

    @pytest.mark.parametrize("yes", [True, False])
    def test_each_reader_has_an_error_of_its_own(
        self, white: WhiteBoxModel, say: Any, monkeypatch: pytest.MonkeyPatch, yes: bool
    ) -> None:
        spare(monkeypatch, yes)
        say("One cat is here. SECRET dogs are. Three hens.")
        real = generating.Decoding.steps

        def steps(self: Any, room: int) -> Iterator[Any]:
            for at, each in enumerate(real(self, room)):
                if at == 25:
                    raise RuntimeError("out of memory")
                yield each

        monkeypatch.setattr(generating.Decoding, "steps", steps)
        guard = Guard(white, policy=Accept(), scorer=doubt())
        caught: list[BaseException] = []

        def read() -> None:
            try:
                list(guard.stream("hi"))
            except RuntimeError as error:
                caught.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert len(caught) == len({id(each) for each in caught}) == 3
        for error in caught:
            assert str(error) == "out of memory"
            assert error.__cause__ is error.__context__ is None

    def test_the_interpreter_ends_with_a_stream_open(self, tmp_path: Path) -> None:
        program = """
import sys
from hallucination_guard import AuditLog, Guard, WhiteBoxModel
from hallucination_guard.model import live
from hallucination_guard.testing import ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard_policies import Accept, Unscored
live.Streams._spare = property(lambda self: True)
white = WhiteBoxModel(tiny_model(max_position_embeddings=4096), tiny_tokenizer())
guard = Guard(white, policy=Unscored(Accept(), on_unscorable="accept"), scorer=ScriptedScorer(0.1),
              audit=AuditLog(sys.argv[1]), generation={"max_new_tokens": 3000, "temperature": 1.5})
events = guard.stream("hi")
next(events)
"""
        log = tmp_path / "audit.jsonl"
        done = subprocess.run([sys.executable, "-c", program, str(log)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]

    def test_an_interrupted_call_ends_its_streams(
        self, white: WhiteBoxModel, say: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        say("One cat. Two dogs. Three hens.")
        sink = MemorySink()

        class Interrupting(ScriptedScorer):
            pass

        def score(generation: Any) -> float:
            if "bad" in generation.messages[-1].content:
                raise KeyboardInterrupt
            return 0.1

        guard = Guard(
            white,
            policy=AbstainBelow(confidence=0.3),
            scorer=Interrupting(score),
            audit=sink,
            calibration=calibrated(white, Conditions.of(white.generate("hi", max_new_tokens=64))),
            generation={"max_new_tokens": 64},
        )
        with pytest.raises(KeyboardInterrupt):
            guard("bad")
        assert sink.records[-1].rule == "interrupted"


class TestRecords:
    def test_what_was_not_judged_has_no_verdict(
        self, white: WhiteBoxModel, say: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spare(monkeypatch, True)
        say("One cat is here. Two dogs are. Three hens.")
        sink = MemorySink()
        guard = Guard(white, policy=BELOW, scorer=doubt("Two"), audit=sink, generation={"max_new_tokens": 64})
        events = guard.stream("hi")
        next(events)
        for thread in threading.enumerate():  # it draws on
            if thread.name == "hallucination-guard-stream":
                thread.join(60)
        events.close()  # type: ignore[attr-defined]
        assert (sink.records[-1].rule, sink.records[-1].status) == ("interrupted", "error")
        assert dict(sink.records[-1].scores) == {}

    def test_a_lost_record_is_said(self, white: WhiteBoxModel, say: Any, caplog: pytest.LogCaptureFixture) -> None:
        say("One cat is here. Two dogs are.")
        kept: list[Any] = []

        def full(record: Any) -> str:
            if kept:
                raise OSError("Two dogs are")
            kept.append(record)
            return str(record.id)

        events = Guard(white, policy=Accept(), scorer=doubt(), audit=full).stream("hi")
        next(events)
        events.close()  # type: ignore[attr-defined]
        assert "guard.record_lost" in caplog.text
        assert "Two dogs" not in caplog.text


class TestFurtherDrafts:
    def test_the_length_counts_what_was_released(self, white: WhiteBoxModel, say: Any) -> None:
        say("One cat. Two dogs. Three hens. " + "Four pigs are here. " * 5)
        asked: list[int] = []
        scorer = ScriptedScorer(lambda generation: asked.append(1) or (1.0 if len(asked) in (2, 4) else 0.1))
        guard = Guard(white, policy=RetryBelow(times=5, **LIMIT), scorer=scorer)
        outcome = outcome_of(guard.stream("hi", max_new_tokens=40))
        assert len(outcome.generation.response_token_ids) <= 40

    def test_a_stop_text_across_what_was_released_ends_it(self, white: WhiteBoxModel, say: Any) -> None:
        say(lambda asked: "Three hens. More." if asked.begin else "Two pigs. Four. End.")
        guard = Guard(white, policy=RetryBelow(**LIMIT), scorer=doubt("Four"))
        outcome = outcome_of(guard.stream("hi", stop=["s. Three"]))
        assert "Three" not in (outcome.text or "")

    def test_a_prompt_that_leaves_no_room_ends_it_with_a_record(self, white: WhiteBoxModel, say: Any) -> None:
        say("One cat. Two dogs. Three hens.")
        room = 512 - len(white.prompt("x").token_ids) - 224
        policy = RetrieveBelow(retriever=lambda query: ["p" * 212], template="{passages} {question}", **LIMIT) | BELOW
        sink = MemorySink()
        outcome = outcome_of(Guard(white, policy=policy, scorer=doubt("Three"), audit=sink).stream("x" * room))
        assert outcome.decision.rule == "retrieve_failed"
        assert sink.records[-1].rule == "retrieve_failed"

    def test_a_scorer_that_cannot_begin_is_an_error_of_scoring(self) -> None:
        guard = Guard(ScriptedModel("A. B."), policy=BELOW, scorer=HybridGrad())
        assert outcome_of(guard.stream("hi")).decision.rule == "on_error"


def _shown(events: Iterator[Event]) -> str:
    return "".join(("|" if each.begins else "") + each.text for each in events if isinstance(each, Provisional))
