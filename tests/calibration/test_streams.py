"""Calibrations of streams: what they read, what they are certified of, and where their answers come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hallucination_guard import AuditLog, Calibration, Guard, WhiteBoxModel
from hallucination_guard.audit import records
from hallucination_guard.audit.labels import Label, label_all, labelled_answers
from hallucination_guard.audit.replay import replay
from hallucination_guard.calibration import Labelled, calibrate, read_labelled, write_labelled
from hallucination_guard.calibration.labelled import Beginning
from hallucination_guard.errors import CalibrationError, CalibrationMismatch, InputError
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.scoring.beginnings import score_beginnings
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions
from hallucination_guard_policies import AbstainBelow, Accept

ANSWER = "Zebras are striped. Okapis are too. Quaggas were."
BEGINNINGS = ["Zebras are striped. ", "Zebras are striped. Okapis are too. ", ANSWER]


def rows(n: int, *, seed: int = 0) -> list[Labelled]:
    """Answers of one to four sentences; the greatest value of a beginning says how likely it is wrong."""
    draw, model, scorer = np.random.default_rng(seed), ScriptedModel("x"), ScriptedScorer(0.1)
    conditions = Conditions.of(model.generate("?"))
    found = []
    for at in range(n):
        values = draw.uniform(0.01, 1.0, size=draw.integers(1, 5)).tolist()
        found.append(
            Labelled(
                id=f"q{at}",
                correct=bool(draw.uniform() > max(values) ** 3),
                judge="human",
                scores={"hybridgrad": values[-1]},
                length=10 * len(values),
                model=model.identity,
                scorer=scorer.identity,
                conditions=conditions,
                beginnings=tuple(
                    Beginning(length=10 * number, scores={"hybridgrad": value})
                    for number, value in enumerate(values, start=1)
                ),
            )
        )
    return found


def _doubt(each: Labelled) -> float:
    return max(own.scores["hybridgrad"] for own in each.beginnings)


class TestFitting:
    def test_it_reads_the_greatest_value_of_all_beginnings(self) -> None:
        answers = rows(400)
        plain = [replace(each, beginnings=(), scores={"hybridgrad": _doubt(each)}) for each in answers]
        one, other = calibrate(answers, gate="stream", alphas=[0.3]), calibrate(plain, alphas=[0.3])
        assert (one.gate, other.gate) == ("stream", "answer")
        assert (one.intercept, one.slope) == (other.intercept, other.slope)
        assert one.certificates[0].threshold == other.certificates[0].threshold
        assert one.certificates[0].covers != other.certificates[0].covers

    def test_drift_is_noticed_by_first_sentences(self) -> None:
        answers = rows(60)
        first = sorted(each.beginnings[0].scores["hybridgrad"] for each in answers)
        assert list(calibrate(answers, gate="stream").reference) == first

    @pytest.mark.parametrize("alphas", [[], [0.4]])
    def test_the_fused_score_too(self, alphas: list[float]) -> None:
        found = calibrate(rows(400), score="fused", gate="stream", alphas=alphas)
        assert found.fusion is not None
        assert found.gate == "stream"

    def test_answers_measured_as_a_whole_are_refused(self) -> None:
        with pytest.raises(CalibrationError, match="only the whole was measured"):
            calibrate([replace(each, beginnings=()) for each in rows(50)], gate="stream")

    def test_so_are_further_attempts(self) -> None:
        answers = rows(50)
        with pytest.raises(CalibrationError, match="single drafts"):
            calibrate([replace(each, policy="p") for each in answers], gate="stream")

    def test_a_file_of_it_is_read_again(self, tmp_path: Path) -> None:
        write_labelled(tmp_path / "a.jsonl", answers := rows(30))
        assert list(read_labelled(tmp_path / "a.jsonl")) == answers
        found = calibrate(answers, gate="stream")
        found.save(tmp_path / "c.json")
        assert Calibration.load(tmp_path / "c.json") == found

    @pytest.mark.parametrize("lengths", [(10, 5), (10, 10), (10, 15)])
    def test_beginnings_grow_to_the_whole(self, lengths: tuple[int, int]) -> None:
        parts = tuple(Beginning(length=each, scores={"hybridgrad": 0.1}) for each in lengths)
        with pytest.raises(ValueError, match="the beginnings of"):
            replace(rows(1)[0], length=20, beginnings=parts)

    @pytest.mark.parametrize(
        "given", [{"length": 0}, {"length": True}, {"scores": {}}, {"scores": {"a": float("nan")}}]
    )
    def test_a_beginning_refuses_bad_states(self, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            Beginning(**{"length": 1, "scores": {"a": 1.0}, **given})


def test_a_certificate_of_streams_holds_for_streams() -> None:
    """Calibration sets drawn with replacement; the true error among the streams let through to their end."""
    pool, draw = rows(4000, seed=1), np.random.default_rng(2)
    doubt = np.array([_doubt(each) for each in pool])
    wrong = np.array([not each.correct for each in pool])
    alpha, delta, exceeded, certified = 0.2, 0.1, 0, 0
    for _ in range(60):
        chosen = [replace(pool[at], id=f"d{number}") for number, at in enumerate(draw.integers(len(pool), size=300))]
        found = calibrate(chosen, gate="stream", alphas=[alpha], delta=delta)
        if found.certificates:
            through = doubt <= found.certificates[0].threshold
            certified += 1
            exceeded += bool(wrong[through].mean() > alpha)
    assert certified > 30
    assert exceeded <= 60 * (delta + 3 * (delta * (1 - delta) / 60) ** 0.5)


class TestLogs:
    def _log(self, path: Path, values: dict[str, float], limit: float) -> list[Any]:
        log = AuditLog(path)
        policy = AbstainBelow(score="hybridgrad", limit=limit)
        guard = Guard(ScriptedModel(ANSWER), policy=policy, scorer=ScriptedScorer(values), audit=log)
        list(guard.stream("Which animals?"))
        log.close()
        return list(records(path))

    def test_a_labelled_stream_has_its_beginnings(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.jsonl"
        kept = self._log(path, dict(zip(BEGINNINGS, (0.1, 0.3, 0.2), strict=True)), 0.5)
        label_all(path, [Label(id=kept[-1].id, correct=True)])
        [row] = labelled_answers(path)
        assert [each.scores["hybridgrad"] for each in row.beginnings] == [0.1, 0.3, 0.2]
        assert row.beginnings[-1].length == row.length == len(ANSWER)

    def test_a_part_of_an_answer_is_not_labelled(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.jsonl"
        kept = self._log(path, dict.fromkeys(BEGINNINGS, 0.1), 0.5)
        with pytest.raises(InputError, match="part of an answer"):
            label_all(path, [Label(id=kept[0].id, correct=True)])

    @pytest.mark.parametrize(("limit", "now"), [(0.5, "accepted"), (0.25, "abstained"), (0.05, "abstained")])
    def test_a_replay_asks_about_every_beginning(self, tmp_path: Path, limit: float, now: str) -> None:
        kept = self._log(tmp_path / "audit.jsonl", dict(zip(BEGINNINGS, (0.1, 0.3, 0.2), strict=True)), 0.5)
        found = replay(kept, AbstainBelow(score="hybridgrad", limit=limit)).now
        assert getattr(found, now) == 1

    def test_what_would_have_gone_on_is_unknown(self, tmp_path: Path) -> None:
        kept = self._log(tmp_path / "audit.jsonl", dict(zip(BEGINNINGS, (0.1, 0.3, 0.2), strict=True)), 0.2)
        assert replay(kept, Accept()).now.unknown == 1
        assert replay(kept, AbstainBelow(score="hybridgrad", limit=0.2)).now.abstained == 1

    def test_a_calibration_of_the_other_gate_is_refused(self, tmp_path: Path) -> None:
        kept = self._log(tmp_path / "audit.jsonl", dict.fromkeys(BEGINNINGS, 0.1), 0.5)
        whole = calibrate(rows(50))
        with pytest.raises(CalibrationMismatch, match="gate"):
            replay(kept, AbstainBelow(confidence=0.5), calibration=whole)

    def test_a_calibration_of_streams_replays_them(self, tmp_path: Path) -> None:
        sink, values = MemorySink(), dict(zip(BEGINNINGS, (0.9, 0.01, 0.01), strict=True))
        model, scorer = ScriptedModel(ANSWER), ScriptedScorer(values)
        list(Guard(model, policy=Accept(), scorer=scorer, audit=sink).stream("?"))
        fitted = calibrate(rows(400), gate="stream")
        bare = calibrate(rows(400), gate="stream").confidence
        sure = bare(scorer(model, model.read("?", BEGINNINGS[0])))
        assert replay(sink.records, AbstainBelow(confidence=sure), calibration=fitted).now.accepted == 1
        assert replay(sink.records, AbstainBelow(confidence=sure + 0.01), calibration=fitted).now.abstained == 1


def test_the_beginnings_of_an_answer_are_scored_as_its_stream_is(demo: WhiteBoxModel) -> None:
    asked = "Name three rivers of Europe, a sentence each."
    sink = MemorySink()
    list(Guard(demo, policy=Accept(), audit=sink, generation={"max_new_tokens": 48}).stream(asked))
    found = score_beginnings(demo, HybridGrad(), demo.generate(asked, max_new_tokens=48))
    assert [length for length, _ in found] == [each.tokens["out"] for each in sink.records]
    for (_, score), record in zip(found, sink.records, strict=True):
        assert dict(score.scores) == pytest.approx(dict(record.scores), rel=1e-4)
        assert score.prefix == "kept"
