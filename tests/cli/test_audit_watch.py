"""``audit sample`` and ``audit watch``, as parsed from a command line, over a log that a guard wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import AuditLog, Guard
from hallucination_guard.audit import labels_path, read_sample, records, sample_path
from hallucination_guard.cli.app import main
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_policies import AbstainBelow


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Twenty answers let through and ten that were not."""
    scores = [0.5, 0.5, 2.0] * 10
    with AuditLog(tmp_path / "audit.jsonl", fsync=False) as log:
        policy = AbstainBelow(score="hybridgrad", limit=1.0)
        model = ScriptedModel([f"answer {at}" for at in range(30)])
        guard = Guard(model, policy=policy, scorer=ScriptedScorer(scores), audit=log)
        for at in range(30):
            guard(f"question {at}")
    return log.path


def call(*arguments: object) -> int:
    return main(["audit", *map(str, arguments)])


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    capsys.readouterr()
    assert call(*arguments, "--json") == status
    return json.loads(capsys.readouterr().out)


def label(log: Path, word: str, ids: list[str]) -> None:
    given = log.parent / "given.csv"
    given.write_text("id,label\n" + "".join(f"{each},{word}\n" for each in ids), encoding="utf-8")
    assert call("label", "--log", log, "--file", given) == 0


def test_the_sample_is_listed_and_kept(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "sample", log, "--rate", 1.0)
    assert (found["answered"], found["sampled"], found["file"]) == (20, 20, str(sample_path(log)))
    accepted = [each for each in records(log) if each.decision == "accept"]
    assert [(each["id"], each["answer"]) for each in found["to_label"]] == [(each.id, each.answer) for each in accepted]
    assert {each["probability"] for each in found["to_label"]} == {1.0}


def test_running_it_twice_lists_the_same_ones_but_for_those_labelled(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shown(capsys, "sample", log, "--rate", 0.5, "--seed", "mine")["to_label"]
    label(log, "right", [first[0]["id"]])
    assert shown(capsys, "sample", log, "--rate", 0.5)["to_label"] == first[1:]


def test_in_words(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("sample", log, "--rate", "1", "--floor", "0.1") == 0
    said = capsys.readouterr().out
    assert "20 of 20 answers let through are sampled" in said and "answer 0" in said and "answer 2\n" not in said
    label(log, "right", [each.id for each in read_sample(log).chosen])
    assert call("watch", log, "--alpha", "0.3") == 0
    assert "open: neither alarm nor proof yet; 20 of 20" in capsys.readouterr().out


def test_the_watch_shows_each_label_and_fails_on_the_alarm(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("sample", log, "--rate", 1.0)
    label(log, "wrong", [each.id for each in read_sample(log).chosen][:6])
    found = shown(capsys, "watch", log, "--alpha", 0.1, status=1)
    assert [each["wrong"] for each in found["labels"]] == [1, 2, 3, 4, 5, 6]
    assert found["raised"] and "more than 0.1" in found["suspended"]
    assert call("watch", log, "--alpha", 0.1) == 1
    assert "ALARM: labels show more than 0.1" in capsys.readouterr().out


def test_the_watch_says_when_the_risk_is_kept(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("sample", log, "--rate", 1.0)
    label(log, "right", [each.id for each in read_sample(log).chosen])
    found = shown(capsys, "watch", log, "--alpha", 0.4)
    assert found["kept"] and not found["raised"] and len(found["labels"]) == 20
    assert call("watch", log, "--alpha", 0.4) == 0
    assert "KEPT" in capsys.readouterr().out


def test_labels_of_what_was_not_sampled_are_not_shown(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("sample", log, "--rate", 0.5)
    chosen = {each.id for each in read_sample(log).chosen}
    label(log, "wrong", [each.id for each in records(log) if each.id not in chosen])
    assert shown(capsys, "watch", log, "--alpha", 0.1)["labels"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--rate", "0"),
        ("sample", "--rate", "nan"),
        ("sample", "--rate", "0.1"),
        ("sample", "--rate", "0.5", "--seed", "another"),
        ("watch", "--alpha", "0"),
        ("watch", "--alpha", "0.1", "--level", "1"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(log: Path, capsys: pytest.CaptureFixture[str], arguments: Any) -> None:
    assert call("sample", log, "--rate", "0.5") == 0
    capsys.readouterr()
    assert call(arguments[0], log, *arguments[1:]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
@pytest.mark.parametrize("path", [labels_path, sample_path])
def test_a_watch_that_cannot_be_read_is_no_success(
    log: Path, damage: str, path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    call("sample", log, "--rate", "0.5")
    path(log).unlink() if damage == "missing" else path(log).write_bytes(b"prose\n")
    capsys.readouterr()
    assert call("watch", log, "--alpha", "0.1") == 2
    assert capsys.readouterr().out == ""
