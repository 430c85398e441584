"""Each example runs offline, as a program, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hallucination_guard.audit import verify

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "gated_chain.py": ["What is the capital of France? → ", "Swan Lake? → "],
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
