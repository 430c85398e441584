"""``calibrate``: labelled answers become a confidence map and certified thresholds, in one file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hallucination_guard.commands.console import say, show, show_json
from hallucination_guard.errors import InputError

if TYPE_CHECKING:
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.certificate import Certificate, Infeasible
    from hallucination_guard.labelled import Labelled
    from hallucination_guard.types import Policy

__all__ = ["add"]


def add(
    commands: Any,
    *,
    common: argparse.ArgumentParser,
    model: argparse.ArgumentParser,
) -> None:
    """Register the command; it needs no model."""
    parser = commands.add_parser(
        "calibrate",
        parents=[common],
        help="fit a confidence and certify thresholds on labelled answers",
        description="Fits P(correct) from one score, and certifies for each --alpha a threshold: of the answers that "
        "it lets through at most that share is wrong, said with probability 1 − delta over the questions drawn.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE.jsonl",
        help="labelled answers, as evaluate writes them, or an audit log whose records were labelled",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where to write")
    parser.add_argument("--score", help="which score to read, or 'fused' for all at once (default: the scorer's own)")
    parser.add_argument("--map", choices=("platt", "isotonic"), default="platt", help="(default: %(default)s)")
    parser.add_argument("--alpha", type=float, nargs="+", default=[], metavar="A", help="error rates to certify")
    parser.add_argument("--delta", type=float, default=0.1, help="each may fail this often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the questions (default: %(default)s)")
    parser.add_argument(
        "--policy", metavar="FILE", help="that drew several attempts a question: a file or a ready pack (default: none)"
    )
    parser.add_argument("--documents", type=Path, help="what that policy looks things up in, as for ask")
    parser.add_argument("--judge", help="whose labels of an audit log to use, when several judges gave some")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from hallucination_guard.calibration import calibrate

    policy = _policy(arguments)
    answers = [each for path in arguments.data for each in _answers(path, arguments.judge)]
    calibration = calibrate(
        answers,
        score=arguments.score,
        map=arguments.map,
        alphas=arguments.alpha,
        delta=arguments.delta,
        policy=policy,
        seed=arguments.seed,
    )
    calibration.save(arguments.output)
    unscored = sum(each.status != "scored" for each in answers)
    if getattr(arguments, "json", False):
        show_json(_as_json(calibration, len(answers), unscored, arguments.output))
    else:
        _print(calibration, len(answers), unscored, arguments.delta)
        say(f"written to {arguments.output}")
    return 0


def _answers(path: Path, judge: str | None) -> Sequence[Labelled]:
    """Labelled answers, or an audit log with the labels beside it."""
    from hallucination_guard.labelled import read_labelled

    if _is_log(path):
        from hallucination_guard.audit.labels import labelled_answers

        return labelled_answers(path, judge=judge)
    answers = read_labelled(path)
    if judge is not None and (others := {each.judge for each in answers} - {judge}):
        raise InputError(f"the answers of {path} were judged by {', '.join(sorted(others))}", hint="leave out --judge")
    return answers


def _is_log(path: Path) -> bool:
    """Whether the first line is an audit record; what can not be read is the reader's to refuse."""
    try:
        with path.open("rb") as file:
            row = json.loads(next((line for line in file if line.strip()), b"null"))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"schema", "request_id", "decision"} <= row.keys()


def _policy(arguments: argparse.Namespace) -> Policy | None:
    if arguments.policy is None:
        return None
    from hallucination_guard.bm25 import BM25Retriever
    from hallucination_guard_policies import load_policy

    retriever = None if arguments.documents is None else BM25Retriever.from_path(arguments.documents)
    return load_policy(arguments.policy, retriever=retriever)


def _as_json(calibration: Calibration, answers: int, unscored: int, output: Path) -> dict[str, Any]:
    report = calibration.report
    return {
        "output": str(output),
        "answers": answers,
        "unscorable": unscored,
        "score": calibration.score,
        "map": calibration.map,
        "judge": calibration.judge,
        "fitted_on": calibration.examples,
        "accuracy": calibration.correct / calibration.examples,
        "brier": None if report is None else report.brier,
        "ece": None if report is None else report.ece,
        "reliability": [] if report is None else [each.model_dump() for each in report.bins],
        "certificates": [{**each.model_dump(), "coverage": each.coverage} for each in calibration.certificates],
        "infeasible": [each.model_dump() for each in calibration.infeasible],
    }


def _print(calibration: Calibration, answers: int, unscored: int, delta: float) -> None:
    accuracy = calibration.correct / calibration.examples
    show(f"{answers} answers, {unscored} of them unscorable; judge: {calibration.judge}")
    show(
        f"confidence: {calibration.map} on {calibration.score}, "
        f"fitted on {calibration.examples} answers, {accuracy:.1%} of them right"
    )
    if calibration.report is None:
        show("too few answers to say how good the confidence is on others")
    else:
        show(f"on answers left out: Brier {calibration.report.brier:.3f}, ECE {calibration.report.ece:.3f}")
    rows: list[Certificate | Infeasible] = [*calibration.certificates, *calibration.infeasible]
    if not rows:
        return
    show()
    show(f"certificates, each with probability {1 - delta:g}:")
    show("   alpha   threshold   answered        wrong   at most")
    for certificate in calibration.certificates:
        share = f"{certificate.answered}/{certificate.n} ({certificate.coverage:.0%})"
        show(
            f"{certificate.alpha:8g}   {certificate.threshold:<9.4g}   {share:<13}"
            f"{certificate.errors:>8}   {certificate.bound:7.3f}"
        )
    for refused in calibration.infeasible:
        show(refused.in_words())
