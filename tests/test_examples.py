"""Each example runs offline, as a program, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hallucination_guard.audit import verify

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAYS = {
    "gated_chain.py": ["What is the capital of France? → ", "Swan Lake? → "],
    "graph.py": ["review When does the warehouse open? [[", "{'text': 'The warehouse in Tarvel opens at six.'}"],
    "agent.py": ["waits for a human: {'text': 'The warehouse in Tarvel opens at six.'}"],
    "policy_from_yaml.py": ["policy second-look version 1", "attempt(s): "],
    "rag_abstention.py": ["What is the office dog called?", "handbook-9"],
    "read_audit_log.py": ["3 records, whole and unchanged", "decisions: "],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


def test_a_gated_chain_takes_at_most_fifteen_lines() -> None:
    lines = (EXAMPLES / "gated_chain.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines[1:] if line.strip()]) <= 15


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for words in SAYS[name]:
        assert words in run.stdout
    found = verify(tmp_path / "audit.jsonl")
    assert found.ok
    assert found.records >= 2


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_what_a_page_shows_as_python_is_python(name: str) -> None:
    for shown in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL):
        compile(shown, name, "exec")


@pytest.mark.parametrize("name", ["agent.py", "graph.py"])
def test_an_agent_or_a_graph_takes_at_most_forty_lines(name: str) -> None:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines[1:] if line.strip()]) <= 40


def test_what_an_agent_has_waiting_is_resumed_by_another_process(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, EXAMPLES / "agent.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
        ).stdout

    assert "Biscuit" in run("1", "What is the office dog called?")  # looked up, scored again, and let through
    assert "Biscuit" not in run("2", "When does the warehouse open?")
    before = len((tmp_path / "audit.jsonl").read_text().splitlines())
    assert run("2", "approve") == "The warehouse in Tarvel opens at six.\n"
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(records) == before + 1  # nothing was generated or scored again
    story = [each for each in records if each["request_id"] == records[-1]["request_id"]]
    assert [each["decision"] for each in story] == ["retrieve", "escalate", "escalate"]
    assert [each["answer"] for each in story][1:] == ["The warehouse in Tarvel opens at six."] * 2
    assert story[-1]["detail"] == "approved by a human, not scored"
    assert verify(tmp_path / "audit.jsonl").ok


def test_what_a_graph_has_waiting_is_resumed_by_another_process(tmp_path: Path) -> None:
    said = []
    for arguments in ((), ("approve",)):
        run = subprocess.run(
            [sys.executable, EXAMPLES / "graph.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
        )
        said.append(run.stdout)
        draft_is_checkpointed = b"Tarvel" in (tmp_path / "graph.db").read_bytes()
        assert draft_is_checkpointed == (arguments == ("approve",))
    assert said[1] == "The warehouse in Tarvel opens at six.\n"
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [each["decision"] for each in records] == ["retrieve", "escalate", "escalate"]
    assert len({each["request_id"] for each in records}) == 1
