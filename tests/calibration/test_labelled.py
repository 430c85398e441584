"""Labelled answers that cannot be are one line that says which; none of them is fitted on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard.calibration import Labelled, read_labelled, write_labelled
from hallucination_guard.errors import InputError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions


def plain() -> dict[str, Any]:
    answer = Labelled(
        id="q1",
        correct=True,
        judge="made up",
        scores={"hybridgrad": 0.5},
        length=5,
        model=ScriptedModel("x").identity,
        scorer=ScriptedScorer(1.0).identity,
        conditions=Conditions.of(ScriptedModel("x").generate("Who?")),
    )
    return answer.to_json_dict()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(plain()))
    write_labelled(tmp_path / "b.jsonl", read_labelled(tmp_path / "a.jsonl"))
    assert [each.to_json_dict() for each in read_labelled(tmp_path / "b.jsonl")] == [plain()]


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"id": None},
        {"id": ["q1"]},
        {"id": ""},
        {"id": "\ud800"},
        {"judge": 5},
        {"judge": ["made up"]},
        {"policy": {}},
        {"policy": 5},
        {"attempt": True},
        {"attempt": 1.0},
        {"attempt": math.nan},
        {"length": math.nan},
        {"length": math.inf},
        {"length": 3.5},
        {"scores": {"hybridgrad": 10**400}},
        {"scores": {"hybridgrad": math.nan}},
        {"model": {**plain()["model"], "dtype": ["float32"]}},
        {"model": {**plain()["model"], "fingerprint": None}},
        {"scorer": {**plain()["scorer"], "name": None}},
        {"scorer": {**plain()["scorer"], "settings": None}},
        {"scorer": {**plain()["scorer"], "settings": {"a": 1}}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_an_odd_row_is_refused_with_its_line(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(plain()) + "\n" + json.dumps({**plain(), "id": "q2", **change}))
    with pytest.raises(InputError, match=r"line 2 of .* is no labelled answer") as caught:
        read_labelled(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model":' * 100_000, "5", "null", "{}"])
def test_what_is_no_row_at_all_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"line 1 of .* is no labelled answer"):
        read_labelled(tmp_path / "a.jsonl")
