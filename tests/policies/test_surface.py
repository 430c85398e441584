"""What the package promises: its names, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import hallucination_guard_policies


def test_the_names_stand_sorted():
    assert hallucination_guard_policies.__all__ == sorted(hallucination_guard_policies.__all__)


def test_every_name_is_there():
    assert all(hasattr(hallucination_guard_policies, name) for name in hallucination_guard_policies.__all__)


def test_importing_loads_nothing_heavy():
    script = (
        "import sys, hallucination_guard_policies\n"
        "print(sorted({'torch', 'transformers', 'yaml', 'pydantic', 'langchain_core'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
