"""The states of an answer that a probe learns from, out of a replay that has them anyway.

Source: the middle layers tell most of whether an answer is right (arXiv 2604.11662); which ones is not chosen, they are
averaged. Each state is divided by its root mean square first, as the next layer's norm does, so that no layer outweighs
the others and every number fits into float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hallucination_guard.model.replay import Replay
from hallucination_guard.values import States

__all__ = ["probed_layers", "states_of"]

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
    levels = [run.states[level - layers.start][row, own] for level in chosen]
    mixed = torch.stack([_at_unit_size(each).cpu() for each in levels]).mean(dim=0)  # T × d; layers may be on devices
    return States(layers=chosen, mean=tuple(mixed.mean(dim=0).tolist()), last=tuple(mixed[-1].tolist()))


def _at_unit_size(states: Tensor) -> Tensor:
    numbers = states.detach().float()
    return numbers / numbers.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
