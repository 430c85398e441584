"""``calibrate``: labelled answers become a confidence map and certified thresholds, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from hallucination_guard.cli.console import say, show, show_json
from hallucination_guard.cli.options import Command, Json
from hallucination_guard.errors import InputError
from hallucination_guard.values import from_json

if TYPE_CHECKING:
    from hallucination_guard.calibration import Advice, Calibration, Certificate, Infeasible, Labelled
    from hallucination_guard.values import Policy

__all__ = ["calibrate", "register"]

Kind: TypeAlias = Literal["platt", "isotonic"]
Gate: TypeAlias = Literal["answer", "stream", "sentences"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(calibrate)


def calibrate(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE.jsonl…",
            help="Labelled answers, as evaluate writes them, or an audit log whose records were labelled.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.json", help="Where to write; only --advise does without.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option("--score", help="Which score to read, or 'fused' for all at once (default: the scorer's own)."),
    ] = None,
    map: Annotated[Kind, typer.Option("--map", help="From the score to a confidence.")] = "platt",
    alpha: Annotated[list[float] | None, typer.Option("--alpha", metavar="A…", help="Error rates to certify.")] = None,
    on_average: Annotated[
        list[float] | None,
        typer.Option(
            "--on-average",
            metavar="A…",
            help="Error rates to keep on average over calibration sets: no certificate, and no max_risk takes it.",
        ),
    ] = None,
    advise: Annotated[
        bool,
        typer.Option(
            "--advise", help="Say what coverage each --alpha can expect, and how many labels the next step takes."
        ),
    ] = False,
    delta: Annotated[float, typer.Option("--delta", help="Each may fail this often.")] = 0.1,
    gate: Annotated[
        Gate,
        typer.Option(
            "--for",
            help="What it judges: whole answers, streams by all beginnings of their answers, or the sentences of an "
            "answer (docs/sentences.md).",
        ),
    ] = "answer",
    at_most: Annotated[
        list[int] | None,
        typer.Option("--at-most", metavar="K…", help="Of sentences: wrong ones that a response may keep (default: 0)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split of the questions.")] = 0,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="FILE",
            help="That drew several attempts a question: a file or a ready pack (default: none).",
        ),
    ] = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", help="What that policy looks things up in, as for ask.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="Whose labels of an audit log to use, when several judges gave some."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Fit a confidence and certify thresholds on labelled answers.

    Fits P(correct) from one score, and certifies for each --alpha a threshold: of the answers that it lets through at
    most that share is wrong, said with probability 1 − delta over the questions drawn.
    """
    if gate == "sentences":
        from hallucination_guard.cli.calibrate_sentences import fit_sentences

        if output is None:
            raise InputError("where are the thresholds to be written?", hint="give --output")
        weaker = {"--on-average": on_average, "--advise": advise or None}
        refused = {"--policy": policy, "--documents": documents, "--judge": judge, **weaker}
        return fit_sentences(
            data,
            output,
            score=score,
            alphas=alpha,
            at_most=at_most,
            delta=delta,
            seed=seed,
            refused=refused,
            as_json=as_json,
        )
    from hallucination_guard.calibration import advise as forecast
    from hallucination_guard.calibration import calibrate as fitted_on

    if output is None and not advise:
        raise InputError("where is the calibration to be written?", hint="give --output, or --advise to write nothing")
    if output is None and on_average:
        raise InputError("--on-average writes a threshold, and there is no --output", hint="give --output")
    drawn_by = _policy(policy, documents)
    answers = [each for path in data for each in _answers(path, judge)]
    advice: Sequence[Advice] = ()
    if advise:
        advice = forecast(answers, alphas=alpha or (), score=score, delta=delta, policy=drawn_by, gate=gate, seed=seed)
    if output is None:
        if as_json:
            show_json(_advice_as_json(advice))
        else:
            _print_advice(advice)
        return 0
    calibration = fitted_on(
        answers,
        score=score,
        map=map,
        alphas=alpha or (),
        on_average=on_average or (),
        delta=delta,
        policy=drawn_by,
        gate=gate,
        seed=seed,
    )
    calibration.save(output)
    unscored = sum(each.status != "scored" for each in answers)
    if as_json:
        show_json(
            {**_as_json(calibration, len(answers), unscored, output), **(_advice_as_json(advice) if advise else {})}
        )
    else:
        _print(calibration, len(answers), unscored, delta)
        if advise:
            show()
            _print_advice(advice)
        say(f"written to {output}")
    return 0


def _answers(path: Path, judge: str | None) -> Sequence[Labelled]:
    """Labelled answers, or an audit log with the labels beside it."""
    from hallucination_guard.calibration.labelled import read_labelled

    if _is_log(path):
        from hallucination_guard.audit.labels import labelled_answers

        return labelled_answers(path, judge=judge)
    answers = read_labelled(path)
    if judge is not None and (others := {each.judge for each in answers} - {judge}):
        raise InputError(f"the answers of {path} were judged by {', '.join(sorted(others))}", hint="leave out --judge")
    return answers


def _is_log(path: Path) -> bool:
    """Whether the first line is an audit record; what cannot be read is the reader's to refuse."""
    if path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            row = from_json(next((line for line in file if line.strip()), b"null"))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"schema", "request_id", "decision"} <= row.keys()


def _policy(name: str | None, documents: Path | None) -> Policy | None:
    if name is None:
        return None
    from hallucination_guard.demo import BM25Retriever
    from hallucination_guard_policies import load_policy

    return load_policy(name, retriever=None if documents is None else BM25Retriever.from_path(documents))


def _as_json(calibration: Calibration, answers: int, unscored: int, output: Path) -> dict[str, Any]:
    report = calibration.report
    return {
        "output": str(output),
        "answers": answers,
        "unscorable": unscored,
        "score": calibration.score,
        "map": calibration.map,
        "for": calibration.gate,
        "judge": calibration.judge,
        "probe": None if calibration.fusion is None else calibration.fusion.why,
        "fitted_on": calibration.examples,
        "accuracy": calibration.correct / calibration.examples,
        "brier": None if report is None else report.brier,
        "ece": None if report is None else report.ece,
        "reliability": [] if report is None else [each.model_dump() for each in report.bins],
        "certificates": [{**each.model_dump(), "coverage": each.coverage} for each in calibration.certificates],
        "infeasible": [each.model_dump() for each in calibration.infeasible],
        "on_average": [{**each.model_dump(), "coverage": each.coverage} for each in calibration.on_average],
    }


def _advice_as_json(advice: Sequence[Advice]) -> dict[str, Any]:
    from hallucination_guard.calibration.advice import NO_CERTIFICATE

    return {"advice": [each.model_dump() for each in advice], "advice_is": NO_CERTIFICATE}


def _print(calibration: Calibration, answers: int, unscored: int, delta: float) -> None:
    accuracy = calibration.correct / calibration.examples
    show(f"{answers} answers, {unscored} of them unscorable; judge: {calibration.judge}")
    show(
        f"confidence: {calibration.map} on {calibration.score}"
        f"{' (the greatest over all beginnings)' if calibration.gate == 'stream' else ''}, "
        f"fitted on {calibration.examples} answers, {accuracy:.1%} of them right"
    )
    if calibration.fusion is not None and calibration.fusion.why:
        show(calibration.fusion.why)
    if calibration.report is None:
        show("too few answers to say how good the confidence is on others")
    else:
        show(f"on answers left out: Brier {calibration.report.brier:.3f}, ECE {calibration.report.ece:.3f}")
    _print_certificates(calibration, delta)
    if calibration.on_average:
        show()
        show("on average over calibration sets, with no promise for this one: no certificate, and no max_risk takes it")
    for each in calibration.on_average:
        show(each.in_words())


def _print_certificates(calibration: Calibration, delta: float) -> None:
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


def _print_advice(advice: Sequence[Advice]) -> None:
    from hallucination_guard.calibration.advice import NO_CERTIFICATE

    first = advice[0]
    show(
        f"{first.labels} labelled questions; {first.score}: AUROC {first.auroc:.3f}, {first.wrong:.1%} of the answers "
        "wrong. Between brackets: four times in five."
    )
    for each in advice:
        show(each.in_words())
    show(NO_CERTIFICATE)
