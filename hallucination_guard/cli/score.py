"""``score``: a file of prompts or answers, a row a line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from hallucination_guard.cli.console import check_folder, load, progress, say, show_json, unwritable
from hallucination_guard.cli.options import (
    Command,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    ModelChoice,
    ModelName,
    ProfilePath,
    Replicas,
)
from hallucination_guard.errors import ConfigurationError, InputError, ReplicaLost

if TYPE_CHECKING:
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.rows import Line, Rows
    from hallucination_guard.values import JSON, Scorer

__all__ = ["register", "score"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(score)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    output: str
    batch_size: int
    batch_tokens: int
    max_new_tokens: int
    choice: ModelChoice
    ray: int | None


def score(
    input: Annotated[str, typer.Option("--input", metavar="FILE", help="JSON lines; - for standard input.")],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FILE",
            help="JSON lines; - for standard output: rows come at once and in order, and an interrupted run starts "
            "anew (so does one that writes to a pipe or a device).",
        ),
    ],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at once, at most.")] = 8,
    batch_tokens: Annotated[
        int,
        typer.Option(
            "--batch-tokens",
            min=1,
            metavar="N",
            help="Tokens at once, at most: rows times the longest, prompt and answer; a longer row goes alone; less "
            "takes less memory.",
        ),
    ] = 8192,
    max_new_tokens: MaxNewTokens = 64,
    model: ModelName = "demo",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    profile: ProfilePath = None,
    ray: Replicas = None,
    as_json: Json = False,
) -> int:
    """Score a file of prompts or answers.

    One row a line, in the order of the input. Finished rows are kept in OUTPUT.partial; after an interruption (Ctrl-C,
    kill, a full disk) the same command continues there, scoring no row twice, and OUTPUT appears once it is whole. To
    start anew, delete OUTPUT.partial.
    """
    from hallucination_guard.rows import read_lines

    options = _Options(
        output=output,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        max_new_tokens=max_new_tokens,
        choice=ModelChoice(name=model, device_map=device_map, dtype=dtype, profile=profile),
        ray=ray,
    )
    try:
        raw = sys.stdin.buffer.read() if input == "-" else Path(input).read_bytes()
    except OSError as error:
        raise InputError(f"{input!r} cannot be read: {error.strerror}", hint="give a readable file") from None
    lines = read_lines(raw.splitlines(keepends=True))
    path = Path(output)
    # A pipe or a device has no beside, and must not be replaced by a file.
    streamed = output == "-" or (path.exists() and not path.is_file())
    if streamed and ray is not None:
        raise ConfigurationError(
            "with --ray rows come as they are finished, and are put in order in a file", hint="give --output FILE"
        )
    counts = _stream(options, lines) if streamed else _file(options, raw, lines)
    if as_json and output != "-":
        show_json(counts)
    else:
        say(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts["error"] else 0


def _stream(options: _Options, lines: Sequence[Line]) -> dict[str, int]:
    from hallucination_guard.rows.partial import encoded, write_all
    from hallucination_guard.scoring import HybridGrad

    counts = {"scored": 0, "unscorable": 0, "error": 0}
    if options.output == "-":
        out = FileIO(sys.stdout.fileno(), "wb", closefd=False)
    else:
        try:
            out = FileIO(options.output, "wb")
        except OSError as error:
            raise unwritable(options.output, str(error.strerror)) from None
    with out:
        rows = _rows(options, load(options.choice), lines, scorer=HybridGrad(), by_length=False)
        with progress("scoring", len(lines)) as done:
            for batch in rows:
                write_all(out, b"".join(encoded(row) for _, row in batch))
                for _, row in batch:
                    counts[row["status"]] += 1
                done(sum(counts.values()))
    return counts


def _file(options: _Options, raw: bytes, lines: Sequence[Line]) -> dict[str, int]:
    output = Path(options.output)
    check_folder(output)
    with _working(options, lines) as (identity, work):
        return _kept(output, raw, lines, identity, work, most=options.max_new_tokens)


Work: TypeAlias = Callable[[Container[int]], Iterator["Rows"]]
"""From the numbers of the lines that are finished to the rows of the others, in batches as they are finished."""


@contextmanager
def _working(options: _Options, lines: Sequence[Line]) -> Iterator[tuple[Mapping[str, JSON], Work]]:
    """What rows depend on, and who makes them, as long as the context lasts."""
    if options.ray is None:
        yield _here(options, lines)
        return
    from hallucination_guard.replicas.jobs import Scores, plan, text_of
    from hallucination_guard.replicas.ray_cluster import cluster

    choice, processes = options.choice.absolute(), options.ray
    with cluster(processes) as share:
        from hallucination_guard.replicas.ray_mapping import elsewhere, mapped

        (model, scorer), batches = elsewhere(
            plan,
            choice,
            lines,
            share=share,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            max_new_tokens=options.max_new_tokens,
        )

        def work(finished: Container[int]) -> Iterator[Rows]:
            open_lines = [[line for line in json.loads(each) if line["number"] not in finished] for each in batches]
            rest = [text_of(each) for each in open_lines if each]
            made_of = {"choice": choice, "max_new_tokens": options.max_new_tokens}
            for rows in mapped(Scores, made_of, rest, processes=processes, share=share):
                yield [(number, row) for number, row in json.loads(rows)]

        yield {"model": model, "scorer": scorer}, work


def _here(options: _Options, lines: Sequence[Line]) -> tuple[Mapping[str, JSON], Work]:
    from hallucination_guard.scoring import HybridGrad

    model, scorer = load(options.choice), HybridGrad()
    identity: dict[str, JSON] = {
        "model": [model.identity.fingerprint, model.identity.structure, model.identity.template],
        "scorer": [scorer.identity.name, scorer.identity.version, dict(scorer.identity.settings)],
    }

    def work(finished: Container[int]) -> Iterator[Rows]:
        rest = [line for line in lines if line.number not in finished]
        return _rows(options, model, rest, scorer=scorer, by_length=True)

    return identity, work


def _kept(
    output: Path, raw: bytes, lines: Sequence[Line], identity: Mapping[str, JSON], work: Work, *, most: int
) -> dict[str, int]:
    """Every row in the output; those that are finished are kept beside it until all are."""
    from hallucination_guard.rows import Partial

    binding: dict[str, JSON] = {
        "input": hashlib.sha256(raw).hexdigest(),
        **identity,
        # Not the size of batches: who ran out of memory goes on with smaller ones.
        "max_new_tokens": most,
    }
    try:
        with Partial(output, binding) as partial:
            done_before = len(partial.statuses)
            if done_before:
                say(f"continuing: {done_before} of {len(lines)} rows are in {partial.path}")
            with progress("scoring", len(lines)) as done:
                done(done_before)
                for batch in work(frozenset(partial.statuses)):
                    partial.add(batch)
                    done(len(partial.statuses))
            if lost := [line.number for line in lines if line.number not in partial.statuses]:
                raise ReplicaLost(
                    f"{len(lost)} rows did not come back, the first of line {lost[0]}",
                    hint="the same command continues",
                )
            partial.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished rows are in {output}.partial: the same command continues") from None
    statuses = list(partial.statuses.values())
    return {status: statuses.count(status) for status in ("scored", "unscorable", "error")}


def _rows(
    options: _Options, model: WhiteBoxModel, lines: Sequence[Line], *, scorer: Scorer, by_length: bool
) -> Iterator[Rows]:
    from hallucination_guard.rows import score_lines

    return score_lines(
        model,
        lines,
        scorer=scorer,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        max_new_tokens=options.max_new_tokens,
        by_length=by_length,
    )
