"""The event of an outcome, read back from the real SDK."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry._logs import _internal as api
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider

from hallucination_guard import Calibration, Guard
from hallucination_guard.guard import telemetry
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetryBelow

DRAFT = "zebra quagga okapi"
BELOW = AbstainBelow(score="hybridgrad", limit=0.5)
TRACER = TracerProvider().get_tracer("test")


class Exported:
    """What the SDK's exporter was given."""

    def __init__(self) -> None:
        self.provider = LoggerProvider(shutdown_on_exit=False)
        self._exporter = InMemoryLogRecordExporter()
        self.provider.add_log_record_processor(SimpleLogRecordProcessor(self._exporter))

    @property
    def records(self) -> list[Any]:
        return [each.log_record for each in self._exporter.get_finished_logs()]

    @property
    def everything(self) -> str:
        return " ".join(each.to_json() for each in self._exporter.get_finished_logs())


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exported]:
    found = Exported()
    monkeypatch.setattr(api, "_LOGGER_PROVIDER", found.provider)  # the public setter sets it once a process
    yield found
    found.provider.shutdown()


def _guard(score: Any, policy: Any = BELOW, answers: Any = DRAFT, **settings: Any) -> Guard:
    return Guard(ScriptedModel(answers), policy=policy, scorer=ScriptedScorer(score), audit=MemorySink(), **settings)


def test_an_answer_let_through_is_one_event(exported: Exported) -> None:
    outcome = _guard(0.25)("Which animal is striped?")
    [record] = exported.records
    assert record.event_name == "gen_ai.evaluation.result"
    assert dict(record.attributes) == {
        "gen_ai.evaluation.name": "hallucination_guard.hybridgrad",
        "gen_ai.evaluation.score.value": 0.25,
        "gen_ai.evaluation.score.label": "accept",
        "gen_ai.evaluation.explanation": outcome.decision.reason,
        "gen_ai.response.id": outcome.request_id,
        "hallucination_guard.rule": outcome.decision.rule,
        "hallucination_guard.attempts": 1,
    }


def test_a_calibrated_one_says_its_confidence(exported: Exported) -> None:
    model, scorer = ScriptedModel(DRAFT), ScriptedScorer(0.25)
    calibration = Calibration(
        score="hybridgrad",
        intercept=0.0,
        slope=1.0,
        fingerprint=model.identity.fingerprint,
        structure=model.identity.structure,
        conditions=Conditions.of(ScriptedModel("x").generate("Who?")),
        dtype=model.identity.dtype,
        template=model.identity.template,
        scorer=scorer.identity.name,
        scorer_version=scorer.identity.version,
        scorer_settings={},
        examples=20,
        correct=10,
        data="made up",
    )
    outcome = Guard(model, policy=AbstainBelow(confidence=0.5), scorer=scorer, calibration=calibration)("Who?")
    [record] = exported.records
    assert outcome.confidence is not None
    assert record.attributes["gen_ai.evaluation.name"] == "hallucination_guard.confidence"
    assert record.attributes["gen_ai.evaluation.score.value"] == outcome.confidence


def test_nothing_of_a_rejected_draft_or_of_the_prompt_is_exported(exported: Exported) -> None:
    guard = _guard([1.0, 1.0], RetryBelow(score="hybridgrad", limit=0.5, times=1), [DRAFT, "a tapir"])
    guard("Which animal is striped?")
    [record] = exported.records
    assert record.attributes["gen_ai.evaluation.score.label"] == "abstain"
    assert record.attributes["hallucination_guard.attempts"] == 2
    for word in (*DRAFT.split(), "tapir", "animal", "striped"):
        assert word not in exported.everything


def test_what_could_not_be_scored_has_no_value_and_an_error(exported: Exported) -> None:
    _guard(RuntimeError(DRAFT))("Which animal is striped?")
    [record] = exported.records
    assert "gen_ai.evaluation.score.value" not in record.attributes
    assert record.attributes["error.type"] == "scoring_failed"
    assert record.attributes["gen_ai.evaluation.score.label"] == "abstain"
    assert "zebra" not in exported.everything


def test_what_there_is_nothing_to_measure_of_is_no_error(exported: Exported) -> None:
    _guard("nothing to measure")("Which animal is striped?")
    [record] = exported.records
    assert "gen_ai.evaluation.score.value" not in record.attributes
    assert "error.type" not in record.attributes


@pytest.mark.parametrize("to", [None, lambda messages: "Zebras are."])
def test_an_escalation_is_one_event_without_its_answer(exported: Exported, to: Any) -> None:
    _guard(1.0, EscalateBelow(to=to, score="hybridgrad", limit=0.5))("Which animal is striped?")
    [record] = exported.records
    assert record.attributes["gen_ai.evaluation.score.label"] == "escalate"
    assert "Zebras" not in exported.everything


def test_a_batch_is_an_event_a_prompt(exported: Exported) -> None:
    outcomes = _guard([0.1, 1.0], answers=["yes", "no"]).batch(["a", "b"])
    labels = {
        each.attributes["gen_ai.response.id"]: each.attributes["gen_ai.evaluation.score.label"]
        for each in exported.records
    }
    assert labels == {outcomes[0].request_id: "accept", outcomes[1].request_id: "abstain"}


def test_its_parent_is_the_active_span(exported: Exported) -> None:
    with TRACER.start_as_current_span("chat") as span:
        _guard(0.1)("a")
    [record] = exported.records
    assert (record.trace_id, record.span_id) == (span.get_span_context().trace_id, span.get_span_context().span_id)
    assert not span.events  # span events are being given up for log-based ones; an SDK may bridge them


@pytest.mark.parametrize("way", ["acall", "abatch"])
async def test_the_callers_span_is_active_in_the_guards_thread(exported: Exported, way: str) -> None:
    guard = _guard(0.1)
    with TRACER.start_as_current_span("chat") as span:
        await (guard.acall("a") if way == "acall" else guard.abatch(["a"]))
    [record] = exported.records
    assert record.span_id == span.get_span_context().span_id


@pytest.mark.parametrize("way", ["stream", "astream"])
@pytest.mark.parametrize(("score", "label"), [(0.1, "accept"), (1.0, "abstain")])
async def test_a_stream_is_one_event_on_the_callers_span(
    exported: Exported, way: str, score: float, label: str
) -> None:
    guard = _guard(score, answers="Zebras are. Okapis are not.")
    with TRACER.start_as_current_span("chat") as span:
        if way == "stream":
            list(guard.stream("a"))
        else:
            [each async for each in guard.astream("a")]
    [record] = exported.records
    assert record.attributes["gen_ai.evaluation.score.label"] == label
    assert record.span_id == span.get_span_context().span_id


def test_a_review_of_what_something_else_wrote_is_an_event(exported: Exported) -> None:
    outcome = _guard(0.1).review("a", answer=DRAFT)
    assert [each.attributes["gen_ai.response.id"] for each in exported.records] == [outcome.request_id]


def test_a_call_that_raises_is_no_event(exported: Exported) -> None:
    def full(record: object) -> str:
        raise OSError("the disk is full")

    guard = Guard(ScriptedModel(DRAFT), policy=BELOW, scorer=ScriptedScorer(0.1), audit=full)
    with pytest.raises(Exception, match="OSError"):
        guard("a")
    assert exported.records == []


class _Broken(LogRecordProcessor):
    def on_emit(self, log_record: object) -> None:
        raise RuntimeError("the pipeline is broken")

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


@pytest.mark.fault("telemetry", "a log processor raises", "what was decided holds, and a warning")
@pytest.mark.parametrize(("score", "text"), [(0.1, DRAFT), (1.0, None)])
def test_a_broken_pipeline_changes_no_outcome(
    exported: Exported, caplog: pytest.LogCaptureFixture, score: float, text: str | None
) -> None:
    exported.provider.add_log_record_processor(_Broken())
    with caplog.at_level(logging.WARNING, "hallucination_guard"):
        assert _guard(score)("a").text == text
    assert "RuntimeError" in caplog.text


def test_without_opentelemetry_a_guard_works_the_same() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from hallucination_guard import Guard
from hallucination_guard.guard import telemetry
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_policies import AbstainBelow
policy = AbstainBelow(score="hybridgrad", limit=0.5)
for score in (0.1, 1.0):
    print(Guard(ScriptedModel("Zebras."), policy=policy, scorer=ScriptedScorer(score))("a").text)
print(telemetry._emitter())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.split() == ["Zebras.", "None", "None"], run.stderr


def test_importing_the_package_imports_no_opentelemetry() -> None:
    program = "import sys, hallucination_guard.guard; print(any('opentelemetry' in each for each in sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "False"


def test_it_is_looked_for_once() -> None:
    assert telemetry._emitter() is telemetry._emitter()
