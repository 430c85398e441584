"""``audit label`` and ``audit replay``, as parsed from a command line, over a log that a guard wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Calibration, Guard
from hallucination_guard.audit import AuditLog, labels_of, records
from hallucination_guard.cli import audit_replay
from hallucination_guard.cli.app import run
from hallucination_guard.errors import AuditError, CalibrationMismatch, InputError, PolicyError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions
from hallucination_guard_policies import load_policy

SCORES = [0.1 * at for at in range(1, 31)]


def calibration(**changes: Any) -> Calibration:
    fitted = {
        "score": "hybridgrad", "intercept": 0.0, "slope": 1.0, "fingerprint": "scripted", "structure": "",
        "conditions": Conditions.of(ScriptedModel("x").generate("Who?")), "dtype": "float32",
        "template": "none", "scorer": "hybridgrad", "scorer_version": "scripted", "scorer_settings": {},
        "examples": 20, "correct": 10, "data": "none",
    }  # fmt: skip
    return Calibration(**{**fitted, **changes})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Thirty answers of falling confidence 1 / (1 + score), one draft each: those from 0.5 up were let through."""
    model = ScriptedModel([f"answer {at}" for at in range(len(SCORES))])
    with AuditLog(tmp_path / "audit.jsonl", fsync=False) as log:
        policy = load_policy("abstain", confidence=0.5)
        guard = Guard(model, policy=policy, scorer=ScriptedScorer(SCORES), calibration=calibration(), audit=log)
        for at in range(len(SCORES)):
            guard(f"question {at}")
    return log.path


@pytest.fixture
def labelled(log: Path, tmp_path: Path) -> Path:
    """The log with every third answer labelled wrong."""
    rows = [f"{record.id},{'wrong' if at % 3 == 0 else 'right'}\n" for at, record in enumerate(records(log))]
    (tmp_path / "given.csv").write_text("id,label\n" + "".join(rows), encoding="utf-8")
    assert call("label", "--log", log, "--file", tmp_path / "given.csv") == 0
    return log


def call(*arguments: object) -> int:
    return run(["audit", *map(str, arguments)])


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


class TestLabel:
    def test_one_answer_is_labelled(self, log: Path, capsys: Any) -> None:
        first = next(records(log)).id
        found = report(capsys, "label", "--log", log, first[:20], "wrong", "--by", "ann", "--note", "no")
        assert [(each["id"], each["label"], each["by"]) for each in found["labels"]] == [(first, "wrong", "ann")]
        assert [each.correct for each in labels_of(log, "ann")] == [False]

    def test_a_file_is_labelled(self, labelled: Path) -> None:
        assert [each.correct for each in labels_of(labelled)] == [at % 3 != 0 for at in range(len(SCORES))]

    @pytest.mark.parametrize("arguments", [[], ["a"], ["a", "right", "--file", "x"]])
    def test_what_is_missing_is_said(self, log: Path, arguments: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            call("label", "--log", log, *arguments)
        assert caught.value.hint

    def test_an_unknown_id_is_said(self, log: Path) -> None:
        with pytest.raises(AuditError, match="zz"):
            call("label", "--log", log, "zz", "right")


class TestReplay:
    def test_the_same_policy_flips_nothing(self, log: Path, capsys: Any) -> None:
        found = report(capsys, "replay", "--log", log, "--policy", "abstain", "--confidence", 0.5)
        assert found["flips"] == []
        assert found["now"] == found["then"]
        assert (found["now"]["requests"], found["now"]["accepted"]) == (30, 10)
        assert next(records(log)).policy["hash"] == found["policy"]

    def test_another_threshold_flips_what_lies_between(self, log: Path, capsys: Any) -> None:
        found = report(capsys, "replay", "--log", log, "--confidence", 0.4)
        assert [(flip["was"], flip["now"]) for flip in found["flips"]] == [("abstain", "accept")] * 5
        assert {flip["id"] for flip in found["flips"]} == {record.id for record in list(records(log))[10:15]}

    def test_a_raw_limit_needs_no_policy(self, log: Path, capsys: Any) -> None:
        found = report(capsys, "replay", "--log", log, "--score", "hybridgrad", "--limit", 2.05)
        assert found["now"]["accepted"] == 20

    def test_a_raw_limit_replaces_that_of_a_policy(self, log: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "own.yaml").write_text(
            "id: own\nversion: 1\nrules:\n- abstain: {above: {score: hybridgrad, limit: 0.05}}\n", encoding="utf-8"
        )
        own = ["replay", "--log", log, "--policy", tmp_path / "own.yaml"]
        assert report(capsys, *own)["now"]["accepted"] == 0
        assert report(capsys, *own, "--score", "hybridgrad", "--limit", 2.05)["now"]["accepted"] == 20

    def test_a_policy_that_looks_things_up_is_loaded_and_nothing_is_looked_up(self, log: Path, capsys: Any) -> None:
        found = report(capsys, "replay", "--log", log, "--policy", "rag")
        assert (found["now"]["accepted"], found["now"]["unknown"]) == (10, 20)
        assert sum(found["unknown_because"].values()) == 20

    def test_labels_give_the_error_of_both(self, labelled: Path, capsys: Any) -> None:
        found = report(capsys, "replay", "--log", labelled, "--policy", "observe")
        assert found["then"]["error"] == pytest.approx(4 / 10)
        assert found["now"]["error"] == pytest.approx(10 / 30)
        for each in (found["now"], found["then"]):
            low, high = each["error_interval"]
            assert low < each["error"] < high

    def test_judges_are_not_mixed(self, labelled: Path, capsys: Any) -> None:
        call("label", "--log", labelled, next(records(labelled)).id, "right", "--by", "ann")
        with pytest.raises(InputError, match="ann, human"):
            call("replay", "--log", labelled)
        found = report(capsys, "replay", "--log", labelled, "--judge", "ann")
        assert (found["now"]["right"], found["now"]["wrong"]) == (1, 0)

    def test_another_calibration_is_used_where_it_fits(self, log: Path, tmp_path: Path, capsys: Any) -> None:
        calibration(intercept=-1.0).save(tmp_path / "c.json")
        found = report(capsys, "replay", "--log", log, "--calibration", tmp_path / "c.json", "--confidence", 0.5)
        assert found["now"]["accepted"] == sum(score <= 2.718 for score in SCORES)
        calibration(fingerprint="other").save(tmp_path / "other.json")
        with pytest.raises(CalibrationMismatch, match="fitted on something else"):
            call("replay", "--log", log, "--calibration", tmp_path / "other.json")

    def test_it_is_readable(self, labelled: Path, capsys: Any) -> None:
        capsys.readouterr()
        assert call("replay", "--log", labelled, "--policy", "observe") == 0
        said = capsys.readouterr().out
        for word in ("then", "replayed", "coverage", "wrong among these", "flips: 20", "abstain (attempt 1) → accept"):
            assert word in said


class TestSweep:
    def test_a_stricter_threshold_never_lets_more_through(self, labelled: Path, capsys: Any) -> None:
        rows = report(capsys, "replay", "--log", labelled, "--sweep")["sweep"]
        thresholds = [row["threshold"] for row in rows]
        assert thresholds == sorted(set(thresholds))
        assert [row["accepted"] for row in rows] == sorted((row["accepted"] for row in rows), reverse=True)
        assert (rows[0]["coverage"], rows[-1]["accepted"]) == (1.0, 1)

    def test_each_row_is_what_a_replay_at_that_threshold_gives(self, labelled: Path, capsys: Any) -> None:
        rows = report(capsys, "replay", "--log", labelled, "--sweep")["sweep"]
        row = rows[len(rows) // 2]
        alone = report(capsys, "replay", "--log", labelled, "--confidence", repr(row["threshold"]))
        assert {**row, "threshold": None} == {**alone["now"], "threshold": None, "flips": len(alone["flips"])}

    def test_a_raw_score_is_swept_the_other_way(self, labelled: Path, capsys: Any) -> None:
        rows = report(capsys, "replay", "--log", labelled, "--sweep", "--score", "hybridgrad")["sweep"]
        assert [row["accepted"] for row in rows] == sorted(row["accepted"] for row in rows)
        assert (rows[0]["accepted"], rows[-1]["coverage"]) == (1, 1.0)

    @pytest.mark.parametrize("name", ["s.png", "s.svg"])
    @pytest.mark.parametrize("which", ["log", "labelled"])
    def test_it_is_drawn(self, which: str, name: str, tmp_path: Path, request: Any, capsys: Any) -> None:
        assert call("replay", "--log", request.getfixturevalue(which), "--plot", tmp_path / name) == 0
        assert (tmp_path / name).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")

    def test_it_is_readable(self, labelled: Path, capsys: Any) -> None:
        capsys.readouterr()
        assert call("replay", "--log", labelled, "--sweep") == 0
        said = capsys.readouterr().out
        assert "Clopper–Pearson, 95%" in said
        assert len(said.splitlines()) == 20 + 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--score", "hybridgrad"],
        ["--limit", "1"],
        ["--score", "hybridgrad", "--limit", "1", "--confidence", "0.5"],
        ["--sweep", "--confidence", "0.5"],
        ["--sweep", "--score", "unheard_of"],
        ["--plot", "here.txt"],
        ["--plot", "nowhere/here.png"],
        ["--judge", "eve"],
    ],
)
def test_what_can_not_be_is_one_line_that_says_how_to_mend_it(log: Path, arguments: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        call("replay", "--log", log, *arguments)
    assert caught.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        ["--policy", "nothing.yaml"],
        ["--policy", "observe", "--sweep"],
        ["--score", "min_token_logprob", "--limit", "1"],
    ],
)
def test_a_policy_that_can_not_be_is_refused(log: Path, arguments: list[str]) -> None:
    with pytest.raises(PolicyError):
        call("replay", "--log", log, *arguments)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl", fsync=False).close()
    with pytest.raises(InputError, match="no records"):
        call("replay", "--log", tmp_path / "audit.jsonl")


@pytest.mark.parametrize("value", [1.0, 0.99999, 0.123456, 0.5, 3.14159e-9, 12345.678, -2.71828])
@pytest.mark.parametrize("down", [True, False])
def test_a_threshold_of_a_sweep_is_short_and_lets_its_value_pass(value: float, down: bool) -> None:
    rounded = audit_replay._rounded(value, down=down)
    assert rounded <= value if down else rounded >= value
    assert rounded == pytest.approx(value, rel=2e-3)
    assert float(f"{rounded:.4g}") == rounded or float(f"{rounded:.5g}") == rounded
