"""The curves of a report, as PNG files: no window, no global state of the plotting library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hallucination_guard.calibration.fusion import FUSED
from hallucination_guard.errors import InputError, MissingExtra
from hallucination_guard.evaluation.metrics import risk_coverage, roc
from hallucination_guard.evaluation.reliability import confidences, reliability
from hallucination_guard.evaluation.report import Report

__all__ = ["draw_plots"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too
_MOST = len(_COLOURS)
_YARDSTICKS = ("sequence_nll", "mean_token_entropy")
_GREY = "#777777"
_DPI = 150


def draw_plots(folder: str | Path, report: Report) -> list[Path]:
    """Draw ``risk–coverage``, ``reliability`` and ``roc``, as far as they are defined; the paths.

    Raises:
        MissingExtra: if matplotlib or scikit-learn is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "plots need matplotlib", hint="pip install 'hallucination-guard-semgrad[evaluate]'"
        ) from None
    folder = Path(folder)
    made = [_risk_coverage(report, folder / "risk-coverage.png")]
    wrong = report.columns.wrong
    for name, draw in (("reliability.png", _reliability), ("roc.png", _roc)):
        path = folder / name
        path.unlink(missing_ok=True)  # a plot of an earlier run must not stand beside this report
        if any(wrong) and not all(wrong) and draw(report, path):
            made.append(path)
    return made


def _chosen(report: Report) -> list[str]:
    """The scores that are drawn, best first: the fused one, the reference, and one or two of each kind."""
    plain = [name for name in report.ranking if not name.endswith("_mean") and name not in (FUSED, "length")]
    own = set(report.columns.answers[0].scores) | {f"-{name}" for name in report.columns.answers[0].scores}
    bought = [name for name in plain if name not in own]  # the best of what needs more than one pass
    wanted = [FUSED, report.compared.reference, "hybridgrad", "semgrad", *bought[:1], *_YARDSTICKS, *plain]
    chosen = [name for name in dict.fromkeys(wanted) if name in report.compared.scores][:_MOST]
    return [name for name in report.ranking if name in chosen]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _value(report: Report, name: str, metric: str) -> str:
    value = report.compared.scores[name][metric].value
    return "undefined" if value is None else f"{value:.3f}"


def _legend(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _subject(report: Report) -> str:
    about = report.about
    said = f"{about.get('model', '')}, {len(report.columns.answers)} answers, judge {about.get('judge')}"
    return said.replace("$", r"\$")  # else a formula would begin there


def _risk_coverage(report: Report, path: Path) -> Path:
    figure, axes = _figure(8.4, 4.6)
    wrong = report.columns.wrong
    n, errors = len(wrong), sum(wrong)
    for colour, name in zip(_COLOURS, _chosen(report), strict=False):
        coverage, risk = risk_coverage(report.columns.scores[name], wrong)
        axes.plot(coverage, risk, color=colour, linewidth=1.8, label=f"{name}  AURC {_value(report, name, 'aurc')}")
    axes.axhline(errors / n, color=_GREY, linestyle=":", linewidth=1.3, label=f"chance  {errors / n:.3f}")
    ideal = [max(0, k - (n - errors)) / k for k in range(1, n + 1)]
    axes.plot([k / n for k in range(1, n + 1)], ideal, color=_GREY, linestyle="--", linewidth=1.3, label="perfect")
    axes.set(
        xlabel="coverage: share of answers let through, most certain first",
        ylabel="risk: share of wrong ones among them",
        title=f"Risk and coverage\n{_subject(report)}",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    _tidy(axes)
    _legend(axes)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.12)
    return path


def _roc(report: Report, path: Path) -> bool:
    figure, axes = _figure(8.0, 5.0)
    for colour, name in zip(_COLOURS, _chosen(report), strict=False):
        flagged_right, flagged_wrong = roc(report.columns.scores[name], report.columns.wrong)
        label = f"{name}  AUROC {_value(report, name, 'auroc')}"
        axes.plot(flagged_right, flagged_wrong, color=colour, linewidth=1.8, label=label)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1.3, label="chance  0.500")
    axes.set(
        xlabel="share of right answers flagged",
        ylabel="share of wrong answers flagged",
        title=f"Finding wrong answers (ROC)\n{_subject(report)}",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.02),
        aspect="equal",
    )
    _tidy(axes)
    _legend(axes)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.12)
    return True


def _reliability(report: Report, path: Path) -> bool:
    wrong = report.columns.wrong
    names = list(dict.fromkeys(each for each in (FUSED, report.compared.reference) if each in report.columns.scores))
    curves = {}
    for name in names:
        try:
            curves[name] = reliability(confidences(report.columns.scores[name], wrong), wrong)
        except InputError:  # too few of one kind: the report says so where it leaves Brier and ECE out
            return False
    figure, axes = _figure(8.0, 5.0)
    most = max(each.count for bins in curves.values() for each in bins)
    # Two curves often meet; the numbers of one stand above left of its points, of the other below right.
    for colour, beside, (name, bins) in zip(_COLOURS, ((-11, 8), (11, -14)), curves.items(), strict=False):
        found = report.confidence[name]
        said = "" if found is None else f"  ECE {found['ece']:.3f}, Brier {found['brier']:.3f}"
        x, y = [each.confidence for each in bins], [each.accuracy for each in bins]
        axes.plot(x, y, color=colour, linewidth=1.4, label=f"{name}{said}")
        sizes = [25 + 275 * each.count / most for each in bins]
        axes.scatter(x, y, s=sizes, color=colour, alpha=0.55, linewidth=0)
        for each in bins:
            axes.annotate(
                str(each.count),
                (each.confidence, each.accuracy),
                xytext=beside,
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=colour,
            )
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1.3, label="perfectly calibrated")
    axes.set(
        xlabel="confidence (Platt, cross-validated), mean of a bin",
        ylabel="share of right answers in the bin",
        title=f"Reliability; numbers: answers in a bin\n{_subject(report)}",
        xlim=(-0.03, 1.03),
        ylim=(-0.06, 1.06),
        aspect="equal",
    )
    _tidy(axes)
    _legend(axes)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.12)
    return True
