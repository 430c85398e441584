"""Prints the tests of what has changed since the last commit on the main branch: tests/ mirrors the packages.

A file's own test if there is one, else the folder of its wing; of the
command line, whose tests start processes, a command's own test or none.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = {"values": "guard", "demo": "test_examples.py", "testing.py": "guard/test_scripted.py"}
# Of a wing whose tests take more than a minute, those that compare a file with autograd and theory.
OWN = {
    "scoring/gradients.py": "scoring/test_paths.py",
    "scoring/head_walk.py": "scoring/test_head_blocks.py",
    "scoring/scorers.py": "scoring/test_against_theory.py",
}
PACKAGES = {
    "policies/hallucination_guard_policies": "policies",
    "integrations/langchain/hallucination_guard_langchain": "langchain",
    # What is not LangChain's runs in layers of its own, `make frameworks`; what all share runs here too.
    "integrations": "test_integrations.py",
    "examples": "test_examples.py",
}


def changed() -> list[str]:
    """Paths that differ from what was last published, or from the last commit where nothing was."""
    base = subprocess.run(
        ["git", "merge-base", "HEAD", "@{upstream}"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    listed = [
        ["git", "diff", "--name-only", base or "HEAD"],
        ["git", "ls-files", "--others", "--exclude-standard"],
    ]
    lines = (subprocess.run(each, cwd=ROOT, capture_output=True, text=True, check=True).stdout for each in listed)
    return [path for found in lines for path in found.splitlines()]


def tests_of(path: str) -> Path | None:
    """Where one path is tested; None where a quick look is not to be had."""
    if path.startswith("tests/frameworks/"):
        return Path("tests/langchain/test_framework_contract.py")
    if path.startswith("tests/"):
        found = Path(path)
        return found if found.name.startswith("test_") and (ROOT / found).is_file() else None
    for package, folder in PACKAGES.items():
        if path.startswith(package):
            return Path("tests", folder)
    parts = Path(path).parts
    if len(parts) < 2 or parts[0] != "hallucination_guard" or not path.endswith(".py"):
        return None
    wing = parts[1]
    own = Path("tests", OWN.get("/".join(parts[1:]), f"{wing}/test_{parts[-1]}"))
    if (ROOT / own).is_file():
        return own
    if wing == "cli":
        return None
    folder = Path("tests", WINGS.get(wing, wing))
    return folder if (ROOT / folder).exists() else None


if __name__ == "__main__":
    chosen = {str(found) for path in changed() if (found := tests_of(path)) is not None}
    folders = {each for each in chosen if not each.endswith(".py")}
    kept = folders | {each for each in chosen if str(Path(each).parent) not in folders}
    print(*sorted(kept or {"tests/policies", "tests/guard/test_scripted.py"}))
