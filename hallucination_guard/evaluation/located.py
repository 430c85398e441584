"""What was located: how alike states are at each layer and position, in three views, and which position that chooses.

In small models the plain cosine is drowned by a direction that all states share: what all wordings have in common at
the template's tokens hides what they differ in. So there are three views:

- ``raw``: SPS of the states as they are;
- ``centred``: SPS after the mean state of each (l, t) was subtracted; this one chooses, unless another is asked for;
- ``nearest``: the share of wordings whose nearest neighbour (cosine, centred) among all others asks the same query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.model.profile import Place, Profile, View
from hallucination_guard.values import Anchor, FrozenDict, ModelIdentity

__all__ = ["VIEWS", "Likeness", "Located", "likeness"]

VIEWS: tuple[View, ...] = get_args(View)
_NOTHING = 1e-6  # of a state's length: what is left of states that are all the same, after their mean was subtracted


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike the states of one (layer, position) are within queries and across, in the three views."""

    raw: float
    centred: float
    nearest: float


def likeness(states: Tensor, owners: Sequence[int]) -> Likeness:
    """The three views of one (layer, position).

    The mean cosine over all pairs is read off sums of unit vectors: Σ_{i≠j} u_i·u_j = ‖Σ_i u_i‖² − Σ_i ‖u_i‖². That
    takes n steps, not n²; only the nearest neighbours need every pair.

    Args:
        states: n × d.
        owners: for each, the number of its query.

    Raises:
        InputError: if there are not two queries, or no query with two wordings.
    """
    queries = {owner: row for row, owner in enumerate(dict.fromkeys(owners))}
    if not 2 <= len(queries) < len(owners):
        raise InputError(
            f"{len(owners)} wordings of {len(queries)} queries cannot be compared",
            hint="give two queries or more, each in two wordings or more",
        )
    own = torch.tensor([queries[owner] for owner in owners])
    states = states.to(torch.float64)
    centred = states - states.mean(dim=0)
    lengths = states.norm(dim=1)
    # What is left of states that are all the same is rounding, which has a direction too.
    centred[centred.norm(dim=1) <= _NOTHING * lengths] = 0.0
    units = _units(centred)
    return Likeness(raw=_sps(_units(states), own), centred=_sps(units, own), nearest=_own_nearest(units, own))


def _units(states: Tensor) -> Tensor:
    lengths = states.norm(dim=1, keepdim=True)
    return states / torch.where(lengths > 0, lengths, 1.0)


def _sps(units: Tensor, own: Tensor) -> float:
    sizes = torch.bincount(own)
    sums = torch.zeros(len(sizes), units.shape[1], dtype=units.dtype).index_add_(0, own, units)
    within = sums.square().sum()
    pairs = (sizes * (sizes - 1)).sum()
    others = len(own) ** 2 - sizes.square().sum()
    across = units.sum(dim=0).square().sum() - within
    return float((within - units.square().sum()) / pairs - across / others)


def _own_nearest(units: Tensor, own: Tensor) -> float:
    like = units @ units.T
    like.fill_diagonal_(-math.inf)
    # A state with nothing of its own is nobody's neighbour, and has none.
    there = units.any(dim=1)
    return float(((own[like.argmax(dim=1)] == own) & there).to(torch.float64).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What was measured, and what it says.

    Args:
        model: which model, without any profile that it was loaded with.
        positions: −1, −2, …: counted from the end of the prompt.
        tokens: at each position, as the tokenizer writes them, in the first prompt.
        shared: for each position, whether all prompts have that token there.
        layers: the l whose mean chooses.
        table: by view, layer (0 … L) and position.
        read: how many positions, from −1 on, have read the question to its end in every prompt.
        view: the view that chose.
        template: what the chat template's own rule names; None without a template.
        tail: the ids that all prompts end with after the question, the last one last.
        prompt: what the queries were put into; has ``{query}``.
        queries: how many.
        prompts: n, their wordings all together.
        data: hash of the wordings.
    """

    model: ModelIdentity
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    shared: tuple[bool, ...]
    layers: range
    table: Mapping[View, tuple[tuple[float, ...], ...]]
    read: int
    view: View
    template: Anchor | None
    tail: tuple[int, ...]
    prompt: str
    queries: int
    prompts: int
    data: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", FrozenDict(self.table))

    def by_position(self, view: View) -> tuple[float, ...]:
        """The mean over the deep half, at each position."""
        rows = [self.table[view][layer] for layer in self.layers]
        return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))

    @property
    def candidates(self) -> range:
        """Which of the positions are chosen from: those that have read the question and do not yet speak the answer."""
        return range(min(1, self.read - 1), self.read)

    def choice(self, view: View) -> int:
        """The position that this view chooses, counted from the end."""
        values = self.by_position(view)
        return self.positions[max(self.candidates, key=values.__getitem__)]

    @property
    def chosen(self) -> int:
        """t*, counted from the end of the prompt."""
        return self.choice(self.view)

    @property
    def agree(self) -> bool:
        """Whether all views choose the same position."""
        return len({self.choice(view) for view in VIEWS}) == 1

    def profile(self, *, anchor: int | None = None) -> Profile:
        """The choice, to be kept.

        Args:
            anchor: another of the positions, where labels speak for it; by default the chosen one.

        Raises:
            ConfigurationError: if nothing was measured there, or it comes before the question's end.
        """
        index = self.chosen if anchor is None else anchor
        if index not in self.positions[: self.read]:
            raise ConfigurationError(
                f"position {index!r} cannot be t*", hint=f"choose from {list(self.positions[: self.read])}"
            )
        values = {view: self.by_position(view) for view in VIEWS}
        return Profile(
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            template=self.model.template,
            anchor=index,
            tail=self.tail[max(0, len(self.tail) + index) :],
            view=self.view if index == self.chosen else "caller",
            layers=(self.layers[0], self.layers[-1]),
            table=tuple(
                Place(index=position, **{view: round(values[view][at], 4) for view in VIEWS})
                for at, position in enumerate(self.positions)
            ),
            prompt=self.prompt,
            queries=self.queries,
            prompts=self.prompts,
            data=self.data,
        )

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data, every layer included."""
        return {
            "model": {
                "name": self.model.name,
                "fingerprint": self.model.fingerprint,
                "dtype": self.model.dtype,
                "template": self.model.template,
            },
            "queries": self.queries,
            "prompts": self.prompts,
            "data": self.data,
            "prompt": self.prompt,
            "deep_layers": list(self.layers),
            "positions": [
                {
                    "index": position,
                    "token": self.tokens[at],
                    "same_in_all_prompts": self.shared[at],
                    "has_read_the_question": at < self.read,
                    "chosen_from": at in self.candidates,
                    **{view: self.by_position(view)[at] for view in VIEWS},
                }
                for at, position in enumerate(self.positions)
            ],
            "choices": {view: self.choice(view) for view in VIEWS},
            "views_agree": self.agree,
            "template_rule": None
            if self.template is None
            else {"index": self.template.index, "token": self.template.token, "rule": self.template.rule},
            "view": self.view,
            "chosen": self.chosen,
            "layers": {view: [list(row) for row in self.table[view]] for view in VIEWS},
        }
