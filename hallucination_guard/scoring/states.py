"""The states of an answer that a probe learns from, out of a replay that has them anyway.

Source: the middle layers tell most of whether an answer is right (arXiv 2604.11662); which ones is not chosen, they are
averaged. Each state is divided by its root mean square first, as the next layer's norm does, so that no layer outweighs
the others and every number fits into float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hallucination_guard.errors import InputError
from hallucination_guard.model.keeping import KeptTrace
from hallucination_guard.model.replay import Replay, replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.values import Generation, States

__all__ = ["probed_layers", "span_states", "states_of"]

_DEEPEST = 0.75  # of the depth
_MOST = 4


def probed_layers(layers: range, depth: int) -> tuple[int, ...]:
    """The l that are averaged: up to four of the deep half's, evenly spaced, at most at ¾ of the depth."""
    fitting = [level for level in layers if level <= _DEEPEST * depth] or [layers.start]
    if len(fitting) <= _MOST:
        return tuple(fitting)
    step = (len(fitting) - 1) / (_MOST - 1)
    return tuple(fitting[round(at * step)] for at in range(_MOST))


@torch.no_grad()
def states_of(run: Replay, row: int, own: slice, layers: range, depth: int) -> States:
    """The states of one example of a replay.

    Args:
        run: of the deep half.
        row: of the example.
        own: the positions of the answer's tokens.
        layers: that were replayed; ``run.states`` has them in this order.
        depth: L.
    """
    chosen = probed_layers(layers, depth)
    return _states(_mixed(run, row, own, layers, chosen), chosen)


@torch.no_grad()
def span_states(
    model: WhiteBoxModel, generation: Generation, spans: Sequence[tuple[int, int]], layers: range
) -> tuple[tuple[States, ...], Generation]:
    """The states of spans of an answer, by one forward of the deep half.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: with an anchor; what was kept of drawing it is taken, as by every score.
        spans: (start, stop) in tokens of the answer, 0 ≤ start < stop ≤ T; S of them.
        layers: the deep half, see :meth:`~hallucination_guard.scoring.gradients.GradientSettings.deep`.

    Returns:
        S of them, and the generation with what was kept or read, so that what is scored next need not read it again.
        What they say of a token does not change with what follows it.

    Raises:
        AnchorError: if the generation has no anchor.
        InputError: if a span is not inside the answer.
    """
    length = len(generation.response_token_ids)
    if odd := [each for each in spans if not 0 <= each[0] < each[1] <= length]:
        raise InputError(f"the span {odd[0]!r} is not in an answer of {length} tokens", hint="count from its first one")
    trace = model.trace(generation, layers)
    with undisturbed(model.model, grad=False):
        run = replay(model.model, model.layout, [trace], layers, whole=True)
    first = trace.states.shape[0] - length + 1  # the position of the answer's first token
    chosen = probed_layers(layers, model.layout.depth)
    # The last token of an answer that was cut is never read: where it is all there is, the one before it stands for it.
    mixed = _mixed(run, 0, slice(min(first, trace.entering.shape[0] - 1), None), layers, chosen)
    found = tuple(_states(mixed[min(start, len(mixed) - 1) : stop], chosen) for start, stop in spans)
    return found, replace(generation, _trace=KeptTrace(trace))


def _mixed(run: Replay, row: int, own: slice, layers: range, chosen: Sequence[int]) -> Tensor:
    """The mean over the chosen layers, T × d; they may be on several devices."""
    levels = [run.states[level - layers.start][row, own] for level in chosen]
    return torch.stack([_at_unit_size(each).cpu() for each in levels]).mean(dim=0)


def _states(mixed: Tensor, chosen: tuple[int, ...]) -> States:
    return States(layers=chosen, mean=tuple(mixed.mean(dim=0).tolist()), last=tuple(mixed[-1].tolist()))


def _at_unit_size(states: Tensor) -> Tensor:
    numbers = states.detach().float()
    return numbers / numbers.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
