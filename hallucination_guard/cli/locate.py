"""``locate``: where in its prompts this model keeps the meaning of a question, and a profile that says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from hallucination_guard.cli.console import load, progress, say, show, show_json
from hallucination_guard.cli.options import Command, DeviceMap, Dtype, Json, ModelChoice, ModelName, ProfilePath
from hallucination_guard.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hallucination_guard.evaluation.located import Located
    from hallucination_guard.evaluation.paraphrases import Group
    from hallucination_guard.evaluation.predict import Predicted

__all__ = ["locate", "register"]

View: TypeAlias = Literal["raw", "centred", "nearest"]
_VIEWS: tuple[View, ...] = ("raw", "centred", "nearest")


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(locate)


def locate(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="JSON lines of query and paraphrases (default: the package's own 40 queries)."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="JSON lines of query and answers: see where the gradient finds wrong answers."),
    ] = None,
    positions: Annotated[int, typer.Option("--positions", min=1, help="How many, from the end.")] = 10,
    queries: Annotated[
        int | None, typer.Option("--queries", min=1, metavar="N", help="Only the first N rows of each file.")
    ] = None,
    wordings: Annotated[
        int | None, typer.Option("--wordings", min=1, metavar="N", help="Only the first N wordings of a query.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What a query is put into.")] = "{query}",
    view: Annotated[View, typer.Option("--view", help="Which chooses.")] = "centred",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.json", help="Where to write the profile.")
    ] = None,
    anchor: Annotated[
        int | None,
        typer.Option(
            "--anchor", metavar="INDEX", help="Keep this one in the profile instead: where labels speak for it."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Where to draw layers × positions.")
    ] = None,
    model: ModelName = "demo",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    profile: ProfilePath = None,
    as_json: Json = False,
) -> int:
    """Measure where the meaning of a question sits (t*).

    Asks queries in several wordings and measures at which of the last tokens of the prompt the model keeps what they
    have in common (SPS). Load a model with the profile to score there; a calibration fitted with another t* is then
    refused.
    """
    from hallucination_guard.evaluation.heatmap import draw
    from hallucination_guard.evaluation.locate import locate as located_by
    from hallucination_guard.evaluation.paraphrases import read_groups
    from hallucination_guard.evaluation.predict import predict

    if anchor is not None and output is None:
        raise ConfigurationError("--anchor goes into a profile, and none is written", hint="add --output FILE.json")
    # The files are read first: a mistake in them shows before a model is loaded.
    groups = _groups(data, queries, wordings)
    labelled = None if labels is None else read_groups(labels, labelled=True)[:queries]
    white = load(ModelChoice(name=model, device_map=device_map, dtype=dtype, profile=profile))
    with progress("reading", sum(len(group.wordings) for group in groups)) as done:
        located = located_by(white, groups, positions=positions, prompt=prompt, view=view, progress=done)
    predicted = None
    if labelled is not None:
        with progress("answering and scoring", len(labelled)) as done:
            predicted = predict(white, labelled, located, progress=done)
    if output is not None:
        located.profile(anchor=anchor).save(output)
    if plot is not None:
        draw(located).savefig(plot, dpi=150)
    if as_json:
        show_json(located.to_json_dict() | ({} if predicted is None else {"labels": predicted.to_json_dict()}))
    else:
        _print(located, predicted)
        if output is not None:
            say(f"profile: {output}; use it with WhiteBoxModel.from_pretrained(…, profile=…)")
    return 0


def _groups(data: Path | None, queries: int | None, wordings: int | None) -> Sequence[Group]:
    from hallucination_guard.evaluation.paraphrases import read_groups, shipped_groups

    groups = (shipped_groups() if data is None else read_groups(data))[:queries]
    if wordings is None:
        return groups
    if wordings < 2:
        raise InputError("one wording of a query cannot be compared", hint="--wordings 2 or more")
    return [replace(group, paraphrases=group.wordings[1:wordings]) for group in groups]


def _print(located: Located, predicted: Predicted | None) -> None:
    first, last = located.layers[0], located.layers[-1]
    show(
        f"{located.model.name}: {located.queries} queries, {located.prompts} wordings; mean over layers {first}…{last}"
    )
    show()
    titles = [*_VIEWS] if predicted is None else [*_VIEWS, "AUROC"]
    show(f"{'':>4}  {'token':<18}" + "".join(f"{title:>9}" for title in titles))
    columns = {view: located.by_position(view) for view in _VIEWS}
    choices = {view: located.choice(view) for view in _VIEWS}
    for at, (position, token) in enumerate(zip(located.positions, located.tokens, strict=True)):
        named = repr(token)[1:-1] if located.shared[at] else f"e.g. {token!r}"
        cells = [f"{columns[view][at]:.3f}{'*' if choices[view] == position else ' '}" for view in _VIEWS]
        if predicted is not None:
            cells.append(f"{predicted.auroc[at]:.3f} ")
        note = "" if at < located.read else "   has not read the question to its end"
        if at < located.read and at not in located.candidates:
            note = "   speaks the answer's first word already"
        show(f"{position:>4}  {named[:18]:<18}" + "".join(f"{cell:>9}" for cell in cells) + note)
    show()
    if predicted is not None:
        correlations = ", ".join(
            f"{view} {'undefined' if value is None else format(value, '+.2f')}"
            for view, value in predicted.rank_correlation.items()
        )
        show(
            f"AUROC: SemGrad at that position, wrong answers; {predicted.wrong} of {predicted.answers} wrong "
            f"({predicted.judge}-match), standard error {predicted.margin:.2f}"
        )
        show(f"rank correlation of SPS with it, over the positions chosen from: {correlations}")
    if not located.agree:
        show("the views disagree: " + ", ".join(f"{view} {choice}" for view, choice in choices.items()))
    rule = located.template
    show("the template's rule: " + ("none" if rule is None else f"{rule.index} {rule.token!r} ({rule.rule})"))
    same = rule is not None and rule.index == located.chosen
    show(f"chosen by {located.view}: {located.chosen}" + (", the same" if same else ""))
