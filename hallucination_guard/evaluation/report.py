"""The report of an evaluation: which scores tell wrong answers from right ones, how surely, and at what cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hallucination_guard.calibration.fusion import FUSED
from hallucination_guard.errors import InputError
from hallucination_guard.evaluation.columns import Columns
from hallucination_guard.evaluation.metrics import COVERAGES, Compared, Estimate, bootstrap, measure
from hallucination_guard.evaluation.reliability import brier, calibration_error, confidences

__all__ = ["Report", "make_report"]

_EVIDENT = ("auroc", "aurc", "prr")  # the metrics of the table of differences


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that is said of one evaluation; plain data but for the scores themselves.

    Args:
        about: model, data, prompt, judge and settings, by name.
        counts: how many rows became what.
        accuracy: share of right ones among the answers in the table.
        columns: the scores of these answers.
        compared: metrics with intervals.
        confidence: by score: ``brier`` and ``ece`` of its cross-validated confidence; None where they are undefined.
        seconds: by score, what an answer costs on top of generating it.
        costs: seconds of each part of the work, in all.
        notes: sentences that belong under the tables.
    """

    about: Mapping[str, Any]
    counts: Mapping[str, int]
    accuracy: float
    columns: Columns
    compared: Compared
    confidence: Mapping[str, Mapping[str, float] | None]
    seconds: Mapping[str, float]
    costs: Mapping[str, float]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def ranking(self) -> list[str]:
        """The scores, best AUROC first."""
        values = self.compared.scores
        return sorted(values, key=lambda name: -(values[name]["auroc"].value or 0.0))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data; None is undefined."""
        compared = self.compared
        return {
            "about": dict(self.about),
            "counts": dict(self.counts),
            "accuracy": self.accuracy,
            "reference": compared.reference,
            "bootstrap": {
                "resamples": compared.resamples,
                "one_class": compared.one_class,
                "level": compared.level,
            },
            "scores": {
                name: {
                    **{metric: asdict(each) for metric, each in compared.scores[name].items()},
                    "confidence": None if (found := self.confidence[name]) is None else dict(found),
                    "seconds": self.seconds.get(name),
                }
                for name in self.ranking
            },
            "differences": {
                name: {metric: asdict(each) for metric, each in compared.differences[name].items()}
                for name in self.ranking
                if name != compared.reference
            },
            "costs": dict(self.costs),
            "notes": list(self.notes),
        }

    def to_markdown(self, *, plots: Sequence[str] = ()) -> str:
        """The report as a page."""
        answers = len(self.columns.answers)
        wrong = sum(self.columns.wrong)
        level = f"{100 * self.compared.level:g} %"
        lines = [
            f"# Evaluation of {self.about.get('model', 'a model')}",
            "",
            *(f"- {name}: {_inline(value)}" for name, value in self.about.items()),
            f"- answers in the tables: {answers}, of which {wrong} wrong (accuracy {self.accuracy:.3f})",
            f"- rows: {', '.join(f'{count} {what}' for what, count in self.counts.items())}",
            "",
            "## Scores",
            "",
            f"How well each score finds the wrong answers. In brackets {level} bootstrap intervals "
            f"({self.compared.resamples} resamples, the same for all scores).",
            "",
            *self._table(),
            "",
            *_EXPLAINED,
            "",
            f"## Differences to {self.compared.reference}",
            "",
            *self._differences(),
            "",
            "## Cost",
            "",
            *_markdown(
                ["what", "seconds in all", "seconds an answer"],
                [[name, f"{value:.2f}", f"{value / answers:.4f}"] for name, value in self.costs.items()],
            ),
            "",
        ]
        if share := self._share():
            lines += [share, ""]
        if self.notes:
            lines += ["## Notes", "", *(f"- {note}" for note in self.notes), ""]
        if plots:
            lines += ["## Curves", "", *(f"![{Path(plot).stem}]({plot})\n" for plot in plots)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        coverages = [f"accuracy@{each:g}" for each in COVERAGES]
        head = ["score", "AUROC", "AUCPR", "AURC", "PRR", *(f"acc@{each:g}" for each in COVERAGES)]
        rows = []
        for name in self.ranking:
            found, confidence = self.compared.scores[name], self.confidence[name]
            rows.append(
                [
                    name,
                    *(_interval(found[metric]) for metric in ("auroc", "aucpr", "aurc", "prr")),
                    *(_value(found[metric]) for metric in coverages),
                    *(_figure(None if confidence is None else confidence[each]) for each in ("brier", "ece")),
                    _seconds(self.seconds.get(name)),
                ]
            )
        return _markdown([*head, "Brier", "ECE", "seconds"], rows)

    def _differences(self) -> list[str]:
        """Against the reference, paired; a star where the interval does not hold 0."""
        rows = []
        for name in self.ranking:
            if name != self.compared.reference:
                found = self.compared.differences[name]
                rows.append([name, *(_interval(found[metric], signed=True) for metric in _EVIDENT)])
        if not rows:
            return ["There is no other score."]
        said = (
            "Each score minus the reference, on the same answers and the same resamples. \\* where the interval does "
            "not hold 0. Many comparisons are made here: of twenty that mean nothing one has a star."
        )
        return [said, "", *_markdown(["score", *(f"Δ{metric.upper()}" for metric in _EVIDENT)], rows)]

    def _share(self) -> str:
        generate, score = self.costs.get("generate"), self.costs.get("score")
        if not generate or score is None:
            return ""
        return f"All single-pass scores together took {100 * score / generate:.1f} % of the generating time."


_EXPLAINED = (
    "AUROC: how often a wrong answer scores as less certain than a right one (0.5 is chance). AUCPR: average precision "
    "of finding wrong answers (chance is the share of wrong ones). AURC: mean error over all shares of answers let "
    "through, most certain first; lower is better. PRR: the part of the way from chance (0) to perfect (1) in AURC. "
    "acc@q: accuracy among the share q that is most certain. Brier and ECE: of a confidence made of the score by "
    "Platt's map, cross-validated (ECE in 10 bins of equal width). Ties are taken at their expected value. Seconds: "
    "of an answer, on top of generating it; what one pass gives is had together, for the price of that pass.",
)


def make_report(
    columns: Columns,
    *,
    about: Mapping[str, Any],
    counts: Mapping[str, int],
    costs: Mapping[str, float],
    seconds: Mapping[str, float] | None = None,
    reference: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Report:
    """Measure every column.

    Args:
        columns: the scores of the same answers.
        about: what the report is of, by name.
        counts: how many rows became what.
        costs: seconds of each part of the work, in all.
        seconds: of an answer, for scores that have a price of their own; the others share that of the pass.
        reference: what all are compared with; by default the best single score.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the folds.
        notes: sentences to print.
    """
    wrong, said = columns.wrong, [*notes, *columns.notes]
    single = {name: values for name, values in columns.scores.items() if name != FUSED}
    if reference is None:
        reference = _best(single or columns.scores, wrong)
        said.append(
            f"{reference} is the single score with the highest AUROC on these very answers, so it is flattered as a "
            "reference: chosen on other data it may do worse."
        )
    compared = bootstrap(columns.scores, wrong, reference=reference, resamples=resamples, seed=seed)
    if all(wrong) or not any(wrong):
        said.append("All answers have one label, so AUROC, AUCPR and PRR are undefined: nothing can be told apart.")
    elif compared.one_class:
        said.append(
            f"{compared.one_class} of {compared.resamples} resamples held right or wrong answers only and were left "
            "out of the intervals of AUROC, AUCPR and PRR."
        )
    confidence: dict[str, Mapping[str, float] | None] = {}
    for name, values in columns.scores.items():
        try:
            found = confidences(values, wrong, seed=seed)
        except InputError as error:
            confidence[name] = None
            why = f"Brier and ECE are undefined: {error}."
            if why not in said:
                said.append(why)
        else:
            confidence[name] = {"brier": brier(found, wrong), "ece": calibration_error(found, wrong)}
    for why, count in columns.left_out.items():
        said.append(f"{count} labelled answers are not in the tables: {why}.")
    answers = len(columns.answers)
    shared = sum(each.seconds.get("score", 0.0) for each in columns.answers) / answers
    priced = {name: shared for name in columns.scores} | {"length": 0.0} | dict(seconds or {})
    return Report(
        about=about,
        counts=counts,
        accuracy=1.0 - sum(wrong) / answers,
        columns=columns,
        compared=compared,
        confidence=confidence,
        seconds={name: priced[name] for name in columns.scores},
        costs=costs,
        notes=said,
    )


def _best(scores: Mapping[str, Sequence[float]], wrong: Sequence[bool]) -> str:
    return max(scores, key=lambda name: measure(scores[name], wrong)["auroc"] or 0.0)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *cells)]


def _interval(each: Estimate, *, signed: bool = False) -> str:
    value = _value(each, signed=signed)
    if each.low is None or each.high is None:
        return value
    ends = f"{_figure(each.low, signed=signed)}, {_figure(each.high, signed=signed)}"
    star = " \\*" if signed and (each.low > 0 or each.high < 0) else ""
    return f"{value} [{ends}]{star}"


def _value(each: Estimate, *, signed: bool = False) -> str:
    return _figure(each.value, signed=signed)


def _figure(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "undefined"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _inline(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text!r}`" if "\n" in text else text
