"""Which answers to have labelled: a random sample of those let through, with the probability of each, beside the log.

``audit.jsonl`` has its sample in ``audit.sample.jsonl``. The first line fixes what must not be chosen later: the seed,
and the floor, the smallest rate that may be used. Each draw then adds a line that says at which rate the answers let
through since the last draw were sampled, and a line for each chosen record. An answer is chosen where
HMAC-SHA-256(seed, id), read as a number in [0, 1), is below the rate: nobody picks it, its label has no say, and each
is decided on once.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hallucination_guard.audit.chain import StrPath
from hallucination_guard.audit.folder import one_chain
from hallucination_guard.audit.labels import labels_path
from hallucination_guard.audit.lines import append_lines, written_alone
from hallucination_guard.audit.query import records
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.audit.request import requests
from hallucination_guard.calibration.anytime import checked_share
from hallucination_guard.errors import AuditError, ConfigurationError
from hallucination_guard.values import from_json

__all__ = ["Draw", "Sample", "Sampled", "answered", "draw_sample", "draw_value", "read_sample", "sample_path"]

_FIRST, _DRAW, _CHOSEN = (
    frozenset({"sample", "seed", "floor", "time"}),
    frozenset({"rate", "answered", "chosen", "last", "time"}),
    frozenset({"id", "probability"}),
)
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A record whose label is asked for.

    Args:
        id: of the record of the draft that was let through.
        probability: with which it was chosen.
    """

    id: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What one draw looked at.

    Args:
        rate: the probability of each answer.
        answered: so many answers had been let through since the draw before.
        chosen: so many of them are asked about.
        last: id of the last record that was decided on.
        time: UTC, ISO 8601.
    """

    rate: float
    answered: int
    chosen: int
    last: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """All that was sampled of a log, in the order of its answers.

    Args:
        seed: of the choice.
        floor: the smallest rate that may be used.
        draws: the oldest first.
        chosen: likewise.
    """

    seed: str
    floor: float
    draws: tuple[Draw, ...] = ()
    chosen: tuple[Sampled, ...] = ()

    @property
    def answered(self) -> int:
        """How many answers let through were decided on."""
        return sum(each.answered for each in self.draws)


def sample_path(log: StrPath) -> Path:
    """Where the sample of a log is: beside it."""
    path = Path(os.path.realpath(log))
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.sample.jsonl")


def draw_value(seed: str, id: str) -> float:
    """The number in [0, 1) that decides on a record."""
    digest = hmac.digest(seed.encode(), id.encode("utf-8", "surrogatepass"), "sha256")
    return int.from_bytes(digest[:6], "big") / 2.0**48


def answered(log: StrPath) -> Iterator[AuditRecord]:
    """Of each call that ended with an answer of the model the record of the draft that was let through, in order.

    Raises:
        AuditError: the log cannot be read, or lacks a draft that was let through.
    """
    for request in requests(records(log, strict=False)):
        if request.decided != "accept":
            continue
        at = request.last.judged
        if at != request.last.attempt and at > len(request.attempts):
            raise AuditError(f"the log {log} lacks attempt {at} of the request {request.id}", hint="verify the log")
        yield request.last if at == request.last.attempt else request.attempts[at - 1]


def draw_sample(log: StrPath, *, rate: float, floor: float | None = None, seed: str | None = None) -> Sample:
    """Decide on the answers that were let through since the last draw, and write down which are to be labelled.

    Args:
        log: the path of the audit log; a log that keeps no text will do. The first draw begins the files of the sample
            and of the labels, and may be of a log without an answer.
        rate: the probability with which each is chosen. Choose it without knowing anything of what is right among
            these answers: no label, no complaint.
        floor: the smallest rate that will ever be used, fixed by the first draw; by default its rate. A label that was
            chosen with more counts the less the smaller the floor is.
        seed: of the choice, fixed by the first draw; by default a random one.

    Returns:
        The whole sample.

    Raises:
        ConfigurationError: a rate below the floor, or a floor or seed other than that of the first draw.
        AuditError: a file cannot be read or written, or the log is not the one that was sampled before.
        InputError: the log is a folder of chains.
    """
    one_chain(log)
    checked_share("rate", rate, one=True)
    if floor is not None:
        checked_share("floor", floor, one=True)
    if seed is not None and not (isinstance(seed, str) and seed and seed.isascii()):
        raise ConfigurationError(f"the seed is {seed!r}", hint="give a text of ASCII characters, or leave it out")
    path = sample_path(log)
    with written_alone(path, "sample"):
        old = read_sample(log) if path.exists() else None
        begun = old or Sample(seed=seed or secrets.token_hex(16), floor=floor or rate)
        if floor not in (None, begun.floor) or seed not in (None, begun.seed):
            raise ConfigurationError(
                f"the sample {path} was begun with another floor or seed",
                hint="leave them out; the first draw fixed them",
            )
        if rate < begun.floor:
            raise ConfigurationError(
                f"the rate {rate!r} is below the floor {begun.floor!r}",
                hint="the smallest rate is fixed by the first draw; sample at that rate, or begin a new log",
            )
        if old is not None and not labels_path(log).exists():
            raise AuditError(f"the labels {labels_path(log)} are missing", hint="put them back; they were begun empty")
        _check_kind(log)
        found = _since(log, begun)
        chosen = tuple(
            Sampled(id=each, probability=float(rate)) for each in found if draw_value(begun.seed, each) < rate
        )
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        drawn = tuple(
            Draw(rate=float(rate), answered=len(found), chosen=len(chosen), last=each, time=now) for each in found[-1:]
        )
        rows = [] if old else [{"sample": _VERSION, "seed": begun.seed, "floor": begun.floor, "time": now}]
        rows += [*map(_plain, drawn), *map(_plain, chosen)]
        if old is None:
            labels_path(log).touch()  # before the sample: from now on labels that are missing are labels that were lost
        if rows:
            append_lines(path, rows, "sample")
    return Sample(seed=begun.seed, floor=begun.floor, draws=begun.draws + drawn, chosen=begun.chosen + chosen)


def read_sample(log: StrPath) -> Sample:
    """What :func:`draw_sample` wrote beside a log.

    Raises:
        AuditError: it is missing or cannot be read, or does not add up: it was edited or cut.
        InputError: the log is a folder of chains.
    """
    one_chain(log)
    path = sample_path(log)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise AuditError(f"the sample {path} is missing", hint="begin one: hallucination-guard audit sample") from None
    except OSError as error:
        raise AuditError(f"the sample {path} cannot be read: {error.strerror}", hint="check the path") from error
    try:
        if lines.pop():
            raise ValueError("its last line is cut off")
        return _sample([_row(each, number) for number, each in enumerate(lines, start=1)])
    except (ValueError, TypeError, KeyError, RecursionError, ConfigurationError) as error:
        why = error.message if isinstance(error, ConfigurationError) else error
        raise AuditError(f"the sample {path} is not whole: {why}", hint="put back what was written") from None


def _since(log: StrPath, sample: Sample) -> list[str]:
    """The ids of all answers after the last draw."""
    ids = [record.id for record in answered(log)]
    before, new = ids[: sample.answered], ids[sample.answered :]
    if len(before) < sample.answered or (before and before[-1] != sample.draws[-1].last):
        raise AuditError(
            f"the log {log} does not have the answers that were sampled of it before",
            hint="to begin a new log, move the old one away with its sample and its labels",
        )
    return new


def _check_kind(log: StrPath) -> None:
    """See that it is a log: a file without a record is one only while it is empty."""
    if next(records(log, strict=False), None) is None and Path(log).stat().st_size:
        raise AuditError(f"{str(log)!r} is no audit log: it holds no record", hint="check the path")


def _plain(each: Draw | Sampled) -> dict[str, Any]:
    names = _DRAW if isinstance(each, Draw) else _CHOSEN
    return {name: getattr(each, name) for name in sorted(names)}


def _row(line: bytes, number: int) -> Mapping[str, Any]:
    try:
        row = from_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def _sample(rows: Sequence[Mapping[str, Any]]) -> Sample:
    """Put together, and checked as far as it can be without the log."""
    if not rows or set(rows[0]) != _FIRST or rows[0]["sample"] != _VERSION:
        raise ValueError("its first line does not begin a sample")
    seed, floor = rows[0]["seed"], checked_share("floor", rows[0]["floor"], one=True)
    if not isinstance(seed, str) or not seed:
        raise ValueError("its seed is no text")
    draws: list[Draw] = []
    chosen: list[Sampled] = []
    due = 0
    for number, row in enumerate(rows[1:], start=2):
        if set(row) == _DRAW and not due:
            draw = Draw(**row)
            due = draw.chosen
            counts = (draw.answered, draw.chosen)
            if not all(type(each) is int for each in counts) or not isinstance(draw.last, str):
                raise ValueError(f"line {number} does not say what was drawn")
            if not (floor <= checked_share("rate", draw.rate, one=True) and 0 <= due <= draw.answered):
                raise ValueError(f"line {number} cannot be")
            draws.append(draw)
        elif set(row) == _CHOSEN and due:
            each = Sampled(**row)
            if not isinstance(each.id, str):
                raise ValueError(f"line {number} names no record")
            if each.probability != draws[-1].rate or not draw_value(seed, each.id) < each.probability:
                raise ValueError(f"line {number} names a record that the seed did not choose")
            chosen.append(each)
            due -= 1
        else:
            raise ValueError(f"line {number} is out of place")
    if due:
        raise ValueError(f"{due} records are missing at its end")
    if len({each.id for each in chosen}) < len(chosen):
        raise ValueError("a record is in it twice")
    return Sample(seed=seed, floor=floor, draws=tuple(draws), chosen=tuple(chosen))
