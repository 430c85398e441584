"""Whether SPS foretells where the gradient tells wrong answers from right ones: SemGrad at every position, labelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hallucination_guard.errors import ConfigurationError, InputError, ScoringError
from hallucination_guard.evaluation.locate import put_into
from hallucination_guard.evaluation.located import VIEWS, Located
from hallucination_guard.evaluation.matching import contains_match
from hallucination_guard.evaluation.metrics import auroc, spearman
from hallucination_guard.evaluation.paraphrases import Group
from hallucination_guard.model.profile import View, template_under
from hallucination_guard.model.replay import replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings, check_felt
from hallucination_guard.scoring.head_walk import walk_head
from hallucination_guard.values import Anchor, FrozenDict, Generation

__all__ = ["Predicted", "predict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """How well SPS foretold where the gradient tells wrong answers from right ones.

    Args:
        positions: as in :class:`Located`.
        auroc: of SemGrad at each position, for wrong answers.
        rank_correlation: by view, Spearman's ρ between SPS and AUROC over the positions that are chosen from; None
            where one of them is the same everywhere.
        answers: how many were judged; empty ones are not.
        wrong: how many of them were wrong.
        judge: what judged.
    """

    positions: tuple[int, ...]
    auroc: tuple[float, ...]
    rank_correlation: Mapping[View, float | None]
    answers: int
    wrong: int
    judge: str = "contains"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_correlation", FrozenDict(self.rank_correlation))

    @property
    def margin(self) -> float:
        """The standard error of an AUROC of ½ with so many right and wrong answers: less than that is no difference."""
        right = self.answers - self.wrong
        return math.sqrt((self.answers + 1) / (12 * right * self.wrong))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "judge": self.judge,
            "answers": self.answers,
            "wrong": self.wrong,
            "auroc": dict(zip(map(str, self.positions), self.auroc, strict=True)),
            "auroc_standard_error": self.margin,
            "rank_correlation": dict(self.rank_correlation),
        }


def predict(
    model: WhiteBoxModel,
    groups: Sequence[Group],
    located: Located,
    *,
    max_new_tokens: int = 24,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Predicted:
    """Ask labelled questions, and see at which position SemGrad tells wrong answers from right ones.

    Args:
        model: the one that was measured.
        groups: each with answers; their first wording is asked, greedily.
        located: what SPS says.
        max_new_tokens: of an answer.
        batch: how many at once.
        progress: is told how many answers are scored.

    Raises:
        InputError: if a question has no answers, or the answers are all right or all wrong.
        ConfigurationError: if another model was measured.
        ScoringError: if a gradient is not finite, or zero where it cannot be.
    """
    identity = replace(model.identity, template=template_under(model.identity.template), name=located.model.name)
    if identity != located.model:
        raise ConfigurationError(
            f"{model.name!r} is not the model that was measured, {located.model.name!r}", hint="locate with this model"
        )
    answered: list[tuple[Generation, bool]] = []
    for begin in range(0, len(groups), batch):
        some = groups[begin : begin + batch]
        if any(not group.answers for group in some):
            raise InputError("a labelled question has no answers", hint="add 'answers', a list of texts")
        prompts = [put_into(located.prompt, group.query) for group in some]
        for group, generation in zip(some, model.generate(prompts, max_new_tokens=max_new_tokens), strict=True):
            generation.release()  # it was kept for another t*
            if generation.response_token_ids:
                answered.append((generation, contains_match(generation.text, group.answers)))
    wrong = [not right for _, right in answered]
    if len(set(wrong)) < 2:
        raise InputError(
            f"of {len(wrong)} answers {sum(wrong)} are wrong, so nothing can be told apart",
            hint="give labelled questions of which the model gets some right and some wrong",
        )
    found: list[list[float]] = []
    for begin in range(0, len(answered), batch):
        found += _semgrad_everywhere(
            model, [generation for generation, _ in answered[begin : begin + batch]], located.positions
        )
        if progress is not None:
            progress(len(found))
    by_position = tuple(auroc(values, wrong) for values in zip(*found, strict=True))
    return Predicted(
        positions=located.positions,
        auroc=by_position,
        rank_correlation={
            view: spearman(
                [located.by_position(view)[at] for at in located.candidates],
                [by_position[at] for at in located.candidates],
            )
            for view in VIEWS
        },
        answers=len(answered),
        wrong=sum(wrong),
    )


def _semgrad_everywhere(
    model: WhiteBoxModel, generations: Sequence[Generation], positions: Sequence[int]
) -> list[list[float]]:
    """SemGrad of each answer as if t* were at each of the positions, by one backward for all of them."""
    settings = GradientSettings()
    layers = settings.deep(model.layout.depth)
    traces = []
    for generation in generations:
        length = len(generation.prompt_token_ids)
        if length < -min(positions):
            raise InputError(
                f"a labelled prompt has {length} tokens and none at position {min(positions)}",
                hint="look at fewer positions",
            )
        ids = (*generation.prompt_token_ids, *generation.response_token_ids)
        traces.append(model.trace_ids(ids, length + min(positions), layers))
    with undisturbed(model.model, grad=True):
        run = replay(model.model, model.layout, traces, layers)
        head = model.head
        upstream = torch.zeros_like(run.final)
        for row, (trace, generation) in enumerate(zip(traces, generations, strict=True)):
            stop = trace.states.shape[0]
            rows = slice(stop - len(generation.response_token_ids), stop)
            states = run.final[row, rows].detach().to(head.dtype)
            walk = walk_head(head, states, generation.response_token_ids, weighting=settings.weighting)
            upstream[row, rows] = walk.by_states.to(upstream)
        gradients = torch.autograd.grad(run.final, run.states, grad_outputs=upstream)
    width = len(layers) * run.final.shape[-1]
    columns = []
    for position in positions:
        there = [replace(each, anchor=Anchor(index=position, token="", rule="profile")) for each in generations]
        moved = replace(run, rows=run.rows + position - min(positions))
        by_layer = moved.at_anchor(gradients).abs().sum(dim=2)
        if not by_layer.isfinite().all():
            raise ScoringError(f"a gradient at position {position} is not finite", hint="load the model in float32")
        check_felt(model, there, layers, by_layer, upstream)
        columns.append((by_layer.sum(dim=0) / width).tolist())
    return [list(row) for row in zip(*columns, strict=True)]
