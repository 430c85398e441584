"""Files that are not what they are taken for, and texts that a terminal must not be shown: one clear line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import AuditLog, Guard
from hallucination_guard.cli.app import main
from hallucination_guard.cli.console import show, show_json
from hallucination_guard.testing import ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard_policies import Accept

CONTENTS = {
    "binary": b"\xff\xfe\x00a\x81\n",
    "utf-16": "{}\n".encode("utf-16"),
    "deep": b"[" * 100_000 + b"\n",
    "deep object": b'{"a":' * 50_000 + b"\n",
    "prose": b"hello\nworld\n",
    "huge number": b'{"id": 1e999, "text": 1e999}\n',
    "zeros": bytes(100_000),
}
COMMANDS = {
    "calibrate": ("calibrate", "--output", "o.json", "--data"),
    "documents": ("ask", "Who?", "--documents"),
    "evaluate": ("evaluate", "--output", "out", "--data"),
    "locate": ("locate", "--data"),
    "labels": ("locate", "--labels"),
    "calibration": ("ask", "Who?", "--model", "nowhere", "--calibration"),
    "tail": ("audit", "tail", "--log"),
    "verify": ("audit", "verify", "--log"),
    "replay": ("audit", "replay", "--log"),
    "show": ("audit", "show", "abc", "--log"),
    "sample": ("audit", "sample", "--rate", "0.5"),
    "watch": ("audit", "watch", "--alpha", "0.1"),
    "label": ("audit", "label", "abc", "right", "--log"),
    "label file": ("audit", "label", "--log", "none.jsonl", "--file"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_kind_is_refused_in_a_line(
    command: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_bytes(CONTENTS[content])
    status = main([*COMMANDS[command], "odd.jsonl"])
    said = capsys.readouterr()
    assert status in (1, 2)
    assert command == "verify" or (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.fault("files", "a link to itself given to `{case}`", "one line, status 2")
def test_a_link_to_itself_is_refused_in_a_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").symlink_to("odd.jsonl")
    assert main([*COMMANDS[command], "odd.jsonl"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_dtype_that_is_none_is_refused(capsys: Any) -> None:
    assert main(["doctor", "--dtype", "bogus"]) == 2
    assert capsys.readouterr().err == "error: dtype is 'bogus' (for example bfloat16, float16, float32 or auto)\n"


@pytest.mark.parametrize("odd", ["\x1b[31m", "\x9b31m", "\ud83d", "\u202e", "\r", "\x00"], ids=ascii)
class TestWhatATerminalIsNotShown:
    def test_in_a_line(self, odd: str, capsys: Any) -> None:
        show(f"a{odd}b")
        assert odd not in (shown := capsys.readouterr().out) and shown.startswith("a\\u")

    def test_and_json_stays_json(self, odd: str, capsys: Any) -> None:
        show_json({"answer": f"a{odd}b"})
        shown = capsys.readouterr().out
        assert odd not in shown and json.loads(shown) == {"answer": f"a{odd}b"}

    def test_in_the_tail_of_a_log(self, odd: str, tmp_path: Path, capsys: Any) -> None:
        with AuditLog(tmp_path / "audit.jsonl", fsync=False) as log:
            Guard(ScriptedModel(f"a{odd}b"), policy=Accept(), scorer=ScriptedScorer(1.0), audit=log)("Who?")
        assert main(["audit", "tail", "--log", str(log.path)]) == 0
        assert odd not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 9, 5_000])
@pytest.mark.fault("files", "a model with torn weights", "one line, status 2")
def test_a_model_whose_weights_are_torn_is_refused(keep: int, tmp_path: Path, capsys: Any) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    [weights] = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "cannot be loaded" in said and "Traceback" not in said
