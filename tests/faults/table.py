"""``make faults``: the table of docs/reliability.md, out of a run of the tests that inject faults.

A test that carries ``@pytest.mark.fault(where, how, outcome)`` is a row of it, one for each of its cases where ``how``
names the case. What did not pass is not written, and ends the run with an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BEGIN, END = "<!-- faults: written by make faults -->", "<!-- end of faults -->"


class Table:
    """A pytest plugin that runs the marked tests and keeps their rows."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], tuple[str, set[str]]] = {}
        self.ran = 0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        items[:] = [item for item in items if item.get_closest_marker("fault")]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        result = yield
        report = result.get_result()  # type: ignore[attr-defined]
        if report.when == "call" and report.passed:
            where, how, outcome = item.get_closest_marker("fault").args
            case = item.callspec.id.replace("_", " ") if hasattr(item, "callspec") else ""
            file = item.nodeid.partition("::")[0]
            self.rows.setdefault((where, how.replace("{case}", case)), (outcome, set()))[1].add(file)
            self.ran += 1

    def written(self) -> str:
        """The table in Markdown, by where the fault is."""
        lines = [
            f"{len(self.rows)} faults, {self.ran} tests.",
            "",
            "| where | how it is injected | what happens | test |",
            "|---|---|---|---|",
        ]
        for (where, how), (outcome, files) in sorted(self.rows.items()):
            tests = ", ".join(f"`{each}`" for each in sorted(files))
            lines.append(f"| {where} | {how.replace('|', chr(92) + '|')} | {outcome} | {tests} |")
        return "\n".join(lines)


def main(path: Path) -> int:
    """Run the tests and write the table into the file between its marks."""
    table = Table()
    status = int(pytest.main(["-q", "-p", "no:randomly", "tests"], plugins=[table]))
    if status == 0:
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        path.write_text(f"{before}{BEGIN}\n{table.written()}\n{END}{after}", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
