"""``locate`` as a command: a table or JSON, a profile that fits the model, a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import WhiteBoxModel
from hallucination_guard.cli.app import run
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.model import Profile
from hallucination_guard.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"query": "Who wrote Hamlet?", "paraphrases": ["Name Hamlet's author.", "Hamlet is by whom?"]},
        {"query": "What is ice?", "paraphrases": ["Say what ice is."]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call(*arguments: object) -> int:
    return run(["locate", *map(str, arguments)])


def test_prints_a_line_a_position_and_what_each_view_chooses(folder: Path, data: Path, capsys: Any) -> None:
    assert call("--model", folder, "--data", data, "--positions", 20) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:23]] == [str(at) for at in range(-1, -21, -1)]
    assert sum(line.count("*") for line in lines[3:23]) == 3
    assert "has not read the question" in lines[22]
    assert any(line.startswith("the template's rule: ") and "'<|im_start|>' (header)" in line for line in lines)
    assert lines[-1].startswith("chosen by centred: -")


def test_prints_json_with_every_layer(folder: Path, data: Path, capsys: Any) -> None:
    assert call("--model", folder, "--data", data, "--positions", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["index"] for each in found["positions"]] == [-1, -2, -3, -4]
    assert len(found["layers"]["centred"]) == 7
    assert found["chosen"] == found["choices"]["centred"]


def test_writes_a_profile_that_the_model_takes(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "profile.json"
    assert call("--model", folder, "--data", data, "--positions", 4, "--output", path) == 0
    assert str(path) in capsys.readouterr().err
    model = WhiteBoxModel.from_pretrained(folder, profile=path, self_test=False)
    anchor = model.read("What is it?", "Ice").anchor
    assert anchor is not None
    assert (anchor.index, anchor.rule) == (Profile.load(path).anchor, "profile")


def test_keeps_another_position_if_told_to(folder: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert call("--model", folder, "--data", data, "--positions", 4, "--output", path, "--anchor", -3) == 0
    assert Profile.load(path).anchor == -3
    with pytest.raises(ConfigurationError, match="none is written"):
        call("--model", folder, "--data", data, "--anchor", -3)


def test_draws_a_picture(folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "heat.png"
    assert call("--model", folder, "--data", data, "--positions", 4, "--plot", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_says_how_well_the_labels_agree(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    model = WhiteBoxModel.from_pretrained(folder, self_test=False)
    queries = ["Who wrote Hamlet?", "What is ice?", "Where is Rome?"]
    first = model.generate(queries[0], max_new_tokens=24).text
    rows = [{"query": query, "answers": ["no such word"]} for query in queries]
    rows[0]["answers"] = [first]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert call("--model", folder, "--data", data, "--positions", 4, "--labels", labels, "--json") == 0
    found = json.loads(capsys.readouterr().out)["labels"]
    assert (found["answers"], found["wrong"], list(found["auroc"])) == (3, 2, ["-1", "-2", "-3", "-4"])
    assert call("--model", folder, "--data", data, "--positions", 4, "--labels", labels) == 0
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    assert "rank correlation of SPS with it, over the positions chosen from: raw" in printed


def test_takes_only_so_many_queries_and_wordings(folder: Path, capsys: Any) -> None:
    assert call("--model", folder, "--queries", 3, "--wordings", 2, "--positions", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["queries"], found["prompts"]) == (3, 6)


def test_finds_a_mistake_in_the_file_before_it_loads_a_model(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        call("--model", tmp_path / "no such model", "--data", path)


def test_refuses_a_single_wording(folder: Path) -> None:
    with pytest.raises(InputError, match="one wording"):
        call("--model", folder, "--wordings", 1)
