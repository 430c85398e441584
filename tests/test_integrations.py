"""Every integration, also where its framework is not installed: it has all that it should, and says what it needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {
    "haystack": "haystack",
    "llamaindex": "llama_index",
    "pydantic_ai": "pydantic_ai",
    "smolagents": "smolagents",
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def test_every_integration_is_here() -> None:
    assert {each.name for each in (ROOT / "integrations").iterdir()} == {*FRAMEWORKS, "langchain"}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_one_sentence_that_says_what_to_install(name: str) -> None:
    program = f"import sys; sys.modules[{FRAMEWORKS[name]!r}] = None; import hallucination_guard_{name}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    extra = name.replace("_", "-")
    said = run.stderr.splitlines()[-1].removeprefix("hallucination_guard.errors.MissingExtra: ")
    assert said.startswith(f"hallucination_guard_{name} needs {FRAMEWORKS[name]}")
    assert said.endswith(f" (pip install 'hallucination-guard-semgrad[{extra}]')")
    assert extra in EXTRAS


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_it_is_tested_with_what_was_tried_together(name: str) -> None:
    assert (ROOT / "tests" / "frameworks" / f"test_{name}.py").is_file()
    pinned = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in pinned if not line.startswith("#"))


@pytest.mark.parametrize("name", [*FRAMEWORKS, "langchain"])
def test_its_readme_is_of_one_screen(name: str) -> None:
    lines = (ROOT / "integrations" / name / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert "```python" in lines
