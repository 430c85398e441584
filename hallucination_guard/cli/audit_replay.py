"""``audit replay``: run any policy or threshold over a log, without a model, and compare with what was decided."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hallucination_guard.cli.console import progress, say, show, show_json
from hallucination_guard.cli.options import Command, Json, LogPath
from hallucination_guard.errors import ConfigurationError, InputError, MissingExtra

if TYPE_CHECKING:
    from hallucination_guard.audit.record import AuditRecord
    from hallucination_guard.audit.replay import Replayed
    from hallucination_guard.audit.tally import Tally
    from hallucination_guard.calibration.calibration import Calibration
    from hallucination_guard.values import Policy

__all__ = ["register", "replay"]

_LEVEL = 0.95
_THRESHOLDS = 20
_DIGITS = 4
_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(replay)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    log: Path
    policy: str | None
    confidence: float | None
    score: str | None
    limit: float | None
    calibration: Path | None
    judge: str | None
    sweep: bool
    plot: Path | None
    json: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    threshold: float
    replayed: Replayed


def replay(
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="A pack (observe, abstain, rag, strict) or a YAML file (default: abstain)."),
    ] = None,
    confidence: Annotated[
        float | None, typer.Option("--confidence", help="Replaces the confidence in the policy's thresholds.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option("--score", metavar="NAME", help="A raw score, not the confidence, for example hybridgrad."),
    ] = None,
    limit: Annotated[
        float | None, typer.Option("--limit", help="With --score: replaces the limit in the policy's thresholds.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Whose confidence to use, not the recorded."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="NAME", help="Whose labels, where several judges gave some.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="A table over thresholds.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draws the sweep's trade-off: .png, .svg or .pdf."),
    ] = None,
    log: LogPath = Path("audit.jsonl"),
    as_json: Json = False,
) -> int:
    """Show what another policy or threshold would have decided.

    Takes the decisions of a log again, without a model: how many answers another policy, threshold or calibration lets
    through, how many of them are wrong (as far as they are labelled), and which decisions flip. Where a policy wants a
    draft that the log does not have, the outcome is unknown and counted apart. Torn lines, which a crash leaves behind,
    are passed over.
    """
    options = _Options(
        log=log,
        policy=policy,
        confidence=confidence,
        score=score,
        limit=limit,
        calibration=calibration,
        judge=judge,
        sweep=sweep or plot is not None,
        plot=plot,
        json=as_json,
    )
    _check(options)
    return _swept(options) if options.sweep else _single(options)


def _settings(options: _Options) -> tuple[Calibration | None, Mapping[str, bool]]:
    """The calibration that was named, and the labels of one judge."""
    from hallucination_guard.audit.labels import by_record, labels_of
    from hallucination_guard.calibration import Calibration

    calibration = None if options.calibration is None else Calibration.load(options.calibration)
    held = labels_of(options.log)
    return calibration, by_record(held, options.judge) if held or options.judge else {}


def _single(options: _Options) -> int:
    from hallucination_guard.audit.replay import replay_each

    calibration, labels = _settings(options)
    [found] = replay_each(_records(options), [_policy(options)], calibration=calibration, labels=labels)
    if found.now.requests == 0:
        raise InputError(f"the log {options.log} has no records", hint="give a log that was written to")
    if options.json:
        show_json(
            {
                "level": _LEVEL,
                "policy": found.policy,
                "then": _plain(found.then),
                "now": _plain(found.now),
                "unknown_because": dict(found.unknown_because),
                "flips": [asdict(each) for each in found.flips],
            }
        )
    else:
        _show(found)
    return 0


def _swept(options: _Options) -> int:
    from hallucination_guard.audit.replay import replay_each

    calibration, labels = _settings(options)
    thresholds = _thresholds(options, calibration)
    policies = [_policy(options, threshold) for threshold in thresholds]
    found = replay_each(_records(options), policies, calibration=calibration, labels=labels)
    points = [_Point(threshold=at, replayed=each) for at, each in zip(thresholds, found, strict=True)]
    if options.plot is not None:
        _plot(options.plot, options.score, points)
        say(f"drawn in {options.plot}")
    if options.json:
        show_json({"level": _LEVEL, "then": _plain(points[0].replayed.then), "sweep": _rows(points)})
    else:
        _show_sweep(options.score, points)
    return 0


def _check(options: _Options) -> None:
    """Said before a log is read."""
    if options.score is not None and options.confidence is not None:
        raise InputError("--score and --confidence are two kinds of threshold", hint="give one of them")
    if options.sweep and (options.confidence is not None or options.limit is not None):
        raise InputError("a sweep takes its thresholds from the log", hint="leave out --confidence and --limit")
    if not options.sweep and (options.score is None) != (options.limit is None):
        raise InputError("--score and --limit belong together", hint="give both, or --score with --sweep")
    if options.plot is not None:
        folder = Path(os.path.realpath(options.plot)).parent
        if options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise InputError(f"{str(options.plot)!r} is no picture", hint="let it end in .png, .svg or .pdf")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{str(options.plot)!r} cannot be written", hint="give a path in a folder that exists")
        _figure()


def _records(options: _Options) -> Iterator[AuditRecord]:
    """The log, with a bar on a terminal."""
    from hallucination_guard.audit import records

    try:
        with options.log.open("rb") as file:
            total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        total = 0  # reading the records says what is wrong
    with progress("reading the log", total) as done:
        for number, record in enumerate(records(options.log, strict=False)):
            if number % 1000 == 0:
                done(number)
            yield record


# -------------------------------------------------------------------------------------------------------------- policy


def _never(query: str) -> NoReturn:
    """Stands for the retriever of a policy: replaying looks nothing up."""
    raise AssertionError("a replay called a retriever")


def _policy(options: _Options, threshold: float | None = None) -> Policy:
    """The policy that was asked for, with a sweep's threshold in place of its own."""
    from hallucination_guard_policies import AbstainBelow, load_policy

    score, name = options.score, options.policy or "abstain"
    if score is not None:
        limit = threshold if threshold is not None else options.limit
        assert limit is not None  # _check saw to it
        if options.policy is None:
            return AbstainBelow(score=score, limit=limit)
        policy = load_policy(name, retriever=_never)
        changed: Policy = _with_limit(policy, score, limit)
        if changed == policy and _with_limit(policy, score, limit + 1.0) == policy:
            raise ConfigurationError(
                f"no threshold of {name!r} reads the score {score!r}",
                hint=f"write above: {{score: {score}, limit: …}} in the policy, or leave out --policy",
            )
        return changed
    confidence = threshold if threshold is not None else options.confidence
    return load_policy(name, retriever=_never, confidence=confidence)


def _with_limit(value: Any, score: str, limit: float) -> Any:
    """The policy with another limit in every threshold that reads ``score``, all the way down."""
    from hallucination_guard_policies import Threshold

    if isinstance(value, tuple):
        return tuple(_with_limit(each, score, limit) for each in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    if isinstance(value, Threshold):
        return replace(value, limit=limit) if value.score == score else value
    inner = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
    changed = {name: _with_limit(each, score, limit) for name, each in inner.items()}
    return replace(value, **changed) if changed != inner else value


def _thresholds(options: _Options, calibration: Calibration | None) -> list[float]:
    """Quantiles of what the log has, rounded so that they can be read and typed, and still let their value pass."""
    from hallucination_guard.audit.request import requests
    from hallucination_guard.audit.verdicts import Verdicts

    verdicts, values = Verdicts(calibration), array("d")
    for request in requests(_records(options)):
        for record in request.attempts:
            score = options.score
            verdict = verdicts(record)  # also refuses a record whose scores are not numbers
            value = verdict.confidence if score is None else verdict.score.scores.get(score)
            if value is not None:
                values.append(value)
    ordered = sorted(values)
    if options.score is None:
        ordered = [each for each in ordered if each > 0.0]
    if not ordered:
        what = "confidence" if options.score is None else f"score {options.score!r}"
        raise InputError(
            f"no record of {options.log} has a {what}", hint="give --calibration FILE, or --score NAME of a score"
        )
    last = len(ordered) - 1
    quantiles = [ordered[round(last * at / (_THRESHOLDS - 1))] for at in range(_THRESHOLDS)]
    return sorted({_rounded(each, down=options.score is None) for each in quantiles})


def _rounded(value: float, *, down: bool) -> float:
    """To four digits, in the direction in which a threshold is the laxer."""
    if value == 0.0:
        return 0.0
    digits = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    near = round(value, digits)
    if (near <= value) if down else (near >= value):
        return near
    step = 10.0**-digits
    return round(value - step if down else value + step, digits)


# ----------------------------------------------------------------------------------------------------------- reporting


def _plain(tally: Tally) -> dict[str, Any]:
    interval = tally.interval(_LEVEL)
    return {
        **asdict(tally),
        "coverage": tally.coverage,
        "coverage_at_most": tally.coverage_at_most,
        "mean_attempts": tally.mean_attempts,
        "error": tally.error,
        "error_interval": None if interval is None else list(interval),
    }


def _rows(points: Sequence[_Point]) -> list[dict[str, Any]]:
    return [
        {"threshold": each.threshold, **_plain(each.replayed.now), "flips": len(each.replayed.flips)} for each in points
    ]


def _show(found: Replayed) -> None:
    rows: list[tuple[str, Callable[[Tally], str]]] = [
        ("requests", lambda each: str(each.requests)),
        ("accepted", lambda each: str(each.accepted)),
        ("abstained", lambda each: str(each.abstained)),
        ("escalated", lambda each: str(each.escalated)),
        ("unknown", lambda each: str(each.unknown)),
        ("redraws", lambda each: str(each.redraws)),
        ("retrievals", lambda each: str(each.retrievals)),
        ("coverage", _coverage),
        ("labelled of the accepted", lambda each: str(each.right + each.wrong)),
        ("wrong among these", _error),
    ]
    show(f"{'':26}{'then':>22}{'replayed':>22}")
    for name, cell in rows:
        show(f"{name:26}{cell(found.then):>22}{cell(found.now):>22}")
    for why, count in found.unknown_because.items():
        show(f"unknown: {count}, for {why}")
    show(f"flips: {len(found.flips)}")
    for flip in found.flips[:_SHOWN]:
        was, now = f"{flip.was} (attempt {flip.was_attempt})", f"{flip.now} (attempt {flip.now_attempt})"
        show(f"  {flip.id[:12]}  {was} → {now}")
    if len(found.flips) > _SHOWN:
        show(f"  … and {len(found.flips) - _SHOWN} more; --json has them all")


def _show_sweep(score: str | None, points: Sequence[_Point]) -> None:
    name = "confidence ≥" if score is None else f"{score} ≤"
    width = max(14, len(name) + 2)
    show(f"{name:>{width}}{'coverage':>18}{'wrong of labelled':>24}{'attempts':>10}{'unknown':>9}")
    for each in points:
        now = each.replayed.now
        attempts = "" if now.mean_attempts is None else f"{now.mean_attempts:.2f}"
        show(f"{each.threshold:>{width}.4g}{_coverage(now):>18}{_error(now):>24}{attempts:>10}{now.unknown:>9}")
    then = points[0].replayed.then
    show(f"as decided: coverage {_coverage(then)}, wrong of labelled {_error(then)}")
    show(f"intervals: Clopper–Pearson, {_LEVEL:.0%}, each threshold alone; one that is chosen here needs new labels")


def _coverage(tally: Tally) -> str:
    if tally.coverage is None or tally.coverage_at_most is None:
        return "–"
    more = f"–{tally.coverage_at_most:.3f}" if tally.unknown else ""
    return f"{tally.coverage:.3f}{more}"


def _error(tally: Tally) -> str:
    interval = tally.interval(_LEVEL)
    return "–" if interval is None else f"{tally.error:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            "drawing needs matplotlib", hint="pip install 'hallucination-guard-semgrad[evaluate]'"
        ) from None
    return Figure(figsize=(6.4, 4.2), layout="constrained")


def _plot(path: Path, score: str | None, points: Sequence[_Point]) -> None:
    """Coverage against error where there are labels, else the threshold against coverage; no global state."""
    figure = _figure()
    axes = figure.subplots()
    name = score or "confidence"
    labelled = [(each.replayed.now, each.replayed.now.interval(_LEVEL)) for each in points]
    known = [(now, interval) for now, interval in labelled if interval is not None]
    if known:
        known.sort(key=lambda each: each[0].coverage or 0.0)
        x = [now.coverage for now, _ in known]
        axes.fill_between(
            x, [low for _, (low, _) in known], [high for _, (_, high) in known], alpha=0.2, label=f"{_LEVEL:.0%} each"
        )
        axes.plot(x, [now.error for now, _ in known], marker="o", label=f"thresholds of {name}")
        then = points[0].replayed.then
        if then.error is not None:
            axes.plot([then.coverage], [then.error], marker="x", linestyle="none", color="black", label="as decided")
        axes.set_xlabel("coverage: share of requests answered")
        axes.set_ylabel("share of wrong ones among the labelled answers")
        axes.set_ylim(bottom=0.0)
    else:
        axes.plot(
            [each.threshold for each in points], [each.replayed.now.coverage for each in points], marker="o", label=name
        )
        axes.set_xlabel(f"threshold of {name}")
        axes.set_ylabel("coverage: share of requests answered")
        axes.set_ylim(0.0, 1.0)
    axes.legend()
    figure.savefig(path)
