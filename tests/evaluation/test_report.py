"""A report says what was measured, on what, how surely and at what cost, and nothing that is not defined."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hallucination_guard.calibration import Labelled
from hallucination_guard.errors import InputError
from hallucination_guard.evaluation import Columns, Report, columns, make_report, write_report
from hallucination_guard.values import Conditions, ModelIdentity, ScorerIdentity

MODEL = ModelIdentity(name="tiny", fingerprint="f", dtype="float32", template="t")
SCORER = ScorerIdentity(name="hybridgrad", version="1", settings={"reduction": "sum"})
PLAIN = Conditions(frame="f", max_new_tokens=64, temperature=0.0, top_p=1.0, stop=(), endings=("stop",))
PNG = b"\x89PNG"


def made(n: int = 120, *, seed: int = 0, wrong: float = 0.6) -> list[Labelled]:
    """Answers whose paragrad tells something and whose semgrad tells less."""
    random = np.random.default_rng(seed)
    rows = []
    for at in range(n):
        bad = bool(random.random() < wrong)
        doubt = 1.2 * bad + random.normal()
        entropy, length = math.exp(0.6 * doubt + random.normal()), int(random.integers(1, 12))
        rows.append(
            Labelled(
                id=str(at),
                correct=not bad,
                judge="contains",
                scores={
                    "semgrad": math.exp(0.3 * doubt + random.normal()),
                    "paragrad": math.exp(doubt),
                    "exgrad": math.exp(doubt + 0.2 * random.normal()),
                    "hybridgrad": math.exp(0.7 * doubt + 0.5 * random.normal()),
                    "mean_token_entropy": entropy,
                    "max_token_entropy": 2 * entropy,
                    "sequence_nll": entropy * length,
                    "mean_nll": entropy,
                    "min_token_logprob": -2 * entropy,
                },
                length=length,
                model=MODEL,
                conditions=PLAIN,
                scorer=SCORER,
                seconds={"generate": 0.5, "score": 0.05},
            )
        )
    return rows


def report_of(table: Columns, **more: Any) -> Report:
    settings: dict[str, Any] = {
        "about": {"model": "tiny", "judge": "contains"},
        "counts": {"labelled": len(table.answers)},
        "costs": {"generate": 60.0, "score": 6.0},
        "resamples": 1000,
    }
    return make_report(table, **{**settings, **more})


@pytest.fixture(scope="module")
def rows() -> list[Labelled]:
    return made()


@pytest.fixture(scope="module")
def report(rows: list[Labelled]) -> Report:
    return report_of(columns(rows))


class TestColumns:
    def test_scores_are_turned_so_that_higher_is_less_certain(self, rows: list[Labelled]) -> None:
        table = columns(rows)
        assert "min_token_logprob" not in table.scores
        assert table.scores["-min_token_logprob"] == [-row.scores["min_token_logprob"] for row in rows]

    def test_sums_have_their_means_beside_them(self, rows: list[Labelled]) -> None:
        table = columns(rows)
        for name in ("semgrad", "paragrad", "exgrad", "hybridgrad"):
            assert table.scores[f"{name}_mean"] == [row.scores[name] / row.length for row in rows]
        assert table.scores["length"] == [row.length for row in rows]

    def test_a_mean_is_not_divided_once_more(self, rows: list[Labelled]) -> None:
        scorer = replace(SCORER, settings={"reduction": "mean"})
        assert "semgrad_mean" not in columns([replace(row, scorer=scorer) for row in rows]).scores

    def test_the_fused_score_never_saw_the_label_it_is_measured_by(self) -> None:
        noise = made(200, seed=5)
        labels = np.random.default_rng(1).permutation([row.correct for row in noise])
        shuffled = [replace(row, correct=bool(label)) for row, label in zip(noise, labels, strict=True)]
        found = report_of(columns(shuffled), reference="length").compared.scores["fused"]["auroc"]
        assert found.low is not None and found.low < 0.5

    def test_without_enough_answers_for_a_fused_score_it_says_so(self) -> None:
        table = columns(made(12))
        assert "fused" not in table.scores
        assert any("No fused score" in note for note in table.notes)

    def test_all_scores_are_of_the_same_answers(self, rows: list[Labelled]) -> None:
        extra = {"1-p_true": {row.id: 0.5 for row in rows[:100]}}
        unscorable = replace(rows[0], scores={}, reason="the answer is empty")
        table = columns([unscorable, *rows[1:]], extra=extra)
        assert {len(values) for values in table.scores.values()} == {99}
        assert table.left_out == {"the answer is empty": 1, "no 1-p_true": 20}

    def test_a_score_that_only_some_have_is_left_out_and_named(self, rows: list[Labelled]) -> None:
        cheap = {name: value for name, value in rows[0].scores.items() if name != "semgrad"}
        table = columns([replace(rows[0], scores=cheap), *rows[1:]])
        assert "semgrad" not in table.scores
        assert any("semgrad" in note for note in table.notes)

    def test_only_those_that_are_wanted(self, rows: list[Labelled]) -> None:
        assert set(columns(rows, only=["semgrad", "length"]).scores) == {"semgrad", "length"}
        with pytest.raises(InputError, match="semgard"):
            columns(rows, only=["semgard"])

    @pytest.mark.parametrize(
        "other",
        [
            {"judge": "human"},
            {"model": replace(MODEL, fingerprint="g")},
            {"scorer": replace(SCORER, version="2")},
            {"policy": "p"},
        ],
    )
    def test_what_does_not_belong_into_one_table_is_refused(self, rows: list[Labelled], other: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"judge|answers are of 2"):
            columns([*rows[1:], replace(rows[0], **other)])

    def test_nothing_is_no_table(self, rows: list[Labelled]) -> None:
        with pytest.raises(InputError, match="no labelled"):
            columns([])
        with pytest.raises(InputError, match="the answer is empty"):
            columns([replace(rows[0], scores={}, reason="the answer is empty")])


class TestReport:
    def test_the_reference_is_the_best_single_score(self, report: Report) -> None:
        values = {name: found["auroc"].value or 0.0 for name, found in report.compared.scores.items()}
        del values["fused"]
        assert report.compared.reference == max(values, key=lambda name: values[name])

    def test_every_score_has_a_row_in_the_table_and_in_the_differences(self, report: Report) -> None:
        scores, differences = report.to_markdown().split("## Differences")
        for name in report.columns.scores:
            assert f"\n| {name} | " in scores
            assert (f"\n| {name} | " in differences) == (name != report.compared.reference)

    def test_says_model_judge_number_and_accuracy(self, report: Report) -> None:
        page = report.to_markdown()
        wrong = sum(report.columns.wrong)
        assert "- model: tiny" in page
        assert "- judge: contains" in page
        assert f"120, of which {wrong} wrong (accuracy {1 - wrong / 120:.3f})" in page

    def test_says_what_it_cost(self, report: Report) -> None:
        page = report.to_markdown()
        assert "| generate | 60.00 | 0.5000 |" in page
        assert "took 10.0 % of the generating time" in page
        assert report.seconds["semgrad"] == pytest.approx(0.05)
        assert report.seconds["length"] == 0.0

    def test_a_star_stands_exactly_where_the_interval_does_not_hold_nil(self, report: Report) -> None:
        _, differences = report.to_markdown().split("## Differences")
        cells = re.findall(r"[+-][\d.]+ \[([+-][\d.]+), ([+-][\d.]+)\]( \\\*)?", differences)
        assert cells
        for low, high, star in cells:
            if 0.0 not in (float(low), float(high)):  # a rounded nil could be either
                assert bool(star) == (float(low) > 0 or float(high) < 0)

    def test_one_label_only_gives_words_and_no_number(self, rows: list[Labelled], tmp_path: Path) -> None:
        report = report_of(columns([replace(row, correct=False) for row in rows]))
        assert report.compared.scores["semgrad"]["auroc"].value is None
        page = report.to_markdown()
        assert "| undefined |" in page
        assert "All answers have one label" in page
        written = write_report(tmp_path, report)
        assert [path.name for path in written] == ["report.md", "report.json", "scores.jsonl", "risk-coverage.png"]

    def test_brier_of_every_score_is_below_that_of_no_knowledge(self, report: Report) -> None:
        found = report.confidence["paragrad"]
        assert found is not None
        assert found["brier"] < report.accuracy * (1 - report.accuracy)

    def test_is_written_whole(self, report: Report, tmp_path: Path) -> None:
        written = write_report(tmp_path, report)
        names = ["report.md", "report.json", "scores.jsonl", "risk-coverage.png", "reliability.png", "roc.png"]
        assert [path.name for path in written] == names
        assert all(path.read_bytes().startswith(PNG) for path in written[3:])
        assert json.loads(written[1].read_text()) == json.loads(json.dumps(report.to_json_dict()))
        page = written[0].read_text()
        assert all(f"]({name})" in page for name in names[3:])

    def test_odd_names_do_not_break_a_plot(self, rows: list[Labelled], tmp_path: Path) -> None:
        about = {"model": "a$b_{c^", "judge": "llm(x|y)"}
        write_report(tmp_path, report_of(columns(rows, only=["semgrad"]), about=about))
