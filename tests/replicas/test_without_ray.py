"""Where Ray is not installed, the commands say in a line what to install, and everything else works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hallucination_guard
from hallucination_guard.errors import ConfigurationError, MissingExtra
from hallucination_guard.replicas.ray_cluster import cluster

WITHOUT = (
    "import sys; sys.modules['ray'] = None; from hallucination_guard.cli import main; sys.exit(main(sys.argv[1:]))"
)
INSTALL = "pip install 'hallucination-guard-semgrad[ray]'"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, "PYTHONPATH": roots}
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--ray", "2"),
        ("score", "--input", "in.jsonl", "--output", "out.jsonl", "--ray", "2"),
    ],
)
def test_what_to_install_is_said(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode != 0
    assert INSTALL in found.stderr and "Traceback" not in found.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_check_names_it_among_what_is_wrong(tmp_path: Path) -> None:
    found = run("serve", "--check", "--ray", "2", cwd=tmp_path)
    assert found.returncode == 2 and INSTALL in found.stdout
    assert run("serve", "--check", cwd=tmp_path).stdout == "nothing is wrong\n"


def test_the_environment_is_given_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    before = dict(os.environ)
    with pytest.raises(MissingExtra), cluster(2):
        pass
    assert dict(os.environ) == before


def test_a_ray_that_is_there_already_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", hallucination_guard)
    with pytest.raises(ConfigurationError, match="imported before"), cluster(2):
        pass
