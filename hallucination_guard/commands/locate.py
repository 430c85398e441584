"""``locate``: where in its prompts this model keeps the meaning of a question, and a profile that says so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hallucination_guard.commands.console import load, positive, progress, say, show, show_json
from hallucination_guard.profile import View

if TYPE_CHECKING:
    from hallucination_guard.locate import Located, Predicted

__all__ = ["add"]

_VIEWS: tuple[View, ...] = ("raw", "centred", "nearest")


def add(
    commands: Any,
    *,
    common: argparse.ArgumentParser,
    model: argparse.ArgumentParser,
) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "locate",
        parents=[common, model],
        help="measure where the meaning of a question sits (t*)",
        description="Asks queries in several wordings and measures at which of the last tokens of the prompt the model "
        "keeps what they have in common (SPS). Load a model with the profile to score there; a calibration fitted "
        "with another t* is then refused.",
    )
    parser.add_argument(
        "--data", type=Path, help="JSON lines of query and paraphrases (default: the package's own 40 queries)"
    )
    parser.add_argument(
        "--labels", type=Path, help="JSON lines of query and answers: see where the gradient finds wrong answers"
    )
    parser.add_argument("--positions", type=positive, default=10, help="how many, from the end (default: %(default)s)")
    parser.add_argument("--queries", type=positive, metavar="N", help="only the first N rows of each file")
    parser.add_argument("--wordings", type=positive, metavar="N", help="only the first N wordings of a query")
    parser.add_argument("--prompt", default="{query}", help="what a query is put into (default: %(default)s)")
    parser.add_argument("--view", choices=_VIEWS, default="centred", help="which chooses (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the profile")
    parser.add_argument(
        "--anchor",
        type=int,
        metavar="INDEX",
        help="keep this one in the profile instead: where labels speak for it",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="where to draw layers × positions")
    parser.set_defaults(run=_locate)


def _locate(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from hallucination_guard.errors import ConfigurationError, InputError
    from hallucination_guard.locate import draw, locate, predict, read_groups, shipped_groups

    if arguments.anchor is not None and arguments.output is None:
        raise ConfigurationError("--anchor goes into a profile, and none is written", hint="add --output FILE.json")
    # The files are read first: a mistake in them shows before a model is loaded.
    groups = shipped_groups() if arguments.data is None else read_groups(arguments.data)
    labels = None if arguments.labels is None else read_groups(arguments.labels, labelled=True)[: arguments.queries]
    groups = groups[: arguments.queries]
    if arguments.wordings is not None:
        if arguments.wordings < 2:
            raise InputError("one wording of a query can not be compared", hint="--wordings 2 or more")
        groups = [replace(group, paraphrases=group.wordings[1 : arguments.wordings]) for group in groups]
    model = load(arguments)
    with progress("reading", sum(len(group.wordings) for group in groups)) as done:
        located = locate(
            model,
            groups,
            positions=arguments.positions,
            prompt=arguments.prompt,
            view=arguments.view,
            progress=done,
        )
    predicted = None
    if labels is not None:
        with progress("answering and scoring", len(labels)) as done:
            predicted = predict(model, labels, located, progress=done)
    if arguments.output is not None:
        located.profile(anchor=arguments.anchor).save(arguments.output)
    if arguments.plot is not None:
        draw(located).savefig(arguments.plot, dpi=150)
    if arguments.json:
        show_json(located.to_json_dict() | ({} if predicted is None else {"labels": predicted.to_json_dict()}))
    else:
        _print(located, predicted)
        if arguments.output is not None:
            say(f"profile: {arguments.output}; use it with WhiteBoxModel.from_pretrained(…, profile=…)")
    return 0


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
