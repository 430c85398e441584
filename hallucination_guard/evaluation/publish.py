"""A report into a folder: the page, the data, the scores of every answer and the curves."""

from __future__ import annotations

import json
from pathlib import Path

from hallucination_guard.evaluation.plots import draw_plots
from hallucination_guard.evaluation.report import Report

__all__ = ["write_report"]


def write_report(folder: str | Path, report: Report) -> list[Path]:
    """Write ``report.md``, ``report.json``, ``scores.jsonl`` and the plots into ``folder``; the paths.

    Raises:
        MissingExtra: if matplotlib or scikit-learn is not installed.
    """
    folder = Path(folder)
    plots = draw_plots(folder, report)
    page, data = folder / "report.md", folder / "report.json"
    page.write_text(report.to_markdown(plots=[each.name for each in plots]) + "\n", encoding="utf-8")
    text = json.dumps(report.to_json_dict(), ensure_ascii=False, indent=2, allow_nan=False)
    data.write_text(text + "\n", encoding="utf-8")
    scores = folder / "scores.jsonl"
    scores.write_text("".join(json.dumps(row) + "\n" for row in report.columns.rows()), encoding="utf-8")
    return [page, data, scores, *plots]
