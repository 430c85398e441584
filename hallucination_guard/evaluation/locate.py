"""Where in the prompt the meaning of a question sits: the Semantic Preservation Score, measured.

Source: arXiv 2605.04638. h_{l,t} is the residual stream after layer l (h_0: what enters the first) at prompt position
t. Every query is asked in several wordings, and SPS(l, t) = S_within − S_across: the mean cosine similarity of h_{l,t}
over all pairs of wordings of one query, less that over all pairs of different queries. Averaged over the deep half, its
largest value says where t* is, in one of three views (:mod:`hallucination_guard.evaluation.located`).

Only positions that have read the question to its end can be chosen, and the prompt's last token only where it is alone:
the answer's first word is read there (docs/thresholds.md has the figures).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hallucination_guard.errors import ConfigurationError, InputError, ScoringError
from hallucination_guard.evaluation.located import VIEWS, Located, likeness
from hallucination_guard.evaluation.paraphrases import Group
from hallucination_guard.model.anchor import locate_anchor
from hallucination_guard.model.profile import View, template_under
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.model.view import copy_of, tapped, undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.values import Prompt

__all__ = ["locate", "put_into"]

_PLAIN = "{query}"
_BATCH = 16


def locate(
    model: WhiteBoxModel,
    groups: Sequence[Group],
    *,
    positions: int = 10,
    prompt: str | None = None,
    view: View = "centred",
    progress: Callable[[int], None] | None = None,
) -> Located:
    """Measure where the meaning of a question sits in this model's prompts.

    Held in memory are the states of all layers at the last positions: n · (L+1) · positions · d values of the model's
    own dtype.

    Args:
        model: any; a profile that it was loaded with plays no part.
        groups: two queries or more, each in two wordings or more.
        positions: how many, from the end of the prompt.
        prompt: what every query is put into, with ``{query}``; by default the query alone. A model without a chat
            template reads it as it is.
        view: which of the three chooses.
        progress: is told how many prompts are done.

    Raises:
        InputError: if there is too little to compare, or a prompt is shorter than ``positions``.
        ConfigurationError: if ``prompt`` has no ``{query}``, or there is no such view.
        AnchorError: if the end of a question cannot be found in its prompt.
        ScoringError: if a state is not finite.
    """
    form = _PLAIN if prompt is None else prompt
    _check(form, groups, view, positions)
    asked = [(at, wording) for at, group in enumerate(groups) for wording in group.wordings]
    owners = [at for at, _ in asked]
    prompts = [model.prompt(put_into(form, wording)) for _, wording in asked]
    for (_, wording), each in zip(asked, prompts, strict=True):
        if len(each.token_ids) < positions:
            raise InputError(
                f"the prompt of {wording!r} has {len(each.token_ids)} tokens, fewer than the {positions} positions",
                hint="look at fewer positions, or put the query into a longer prompt",
            )
    layers = GradientSettings().deep(model.layout.depth)
    ends = [_end_of(model.tokenizer, each, wording) for (_, wording), each in zip(asked, prompts, strict=True)]
    read = min(positions, *ends)
    states = _states(model, prompts, positions, progress)
    if not states.isfinite().all():
        raise ScoringError(
            f"a state of {model.name!r} is not finite in {model.identity.dtype}", hint="load it in float32 or bfloat16"
        )
    cells = [[likeness(at, owners) for at in layer] for layer in states]
    ids = [[each.token_ids[-at] for each in prompts] for at in range(1, positions + 1)]
    shared = tuple(len(set(column)) == 1 for column in ids)
    after = next((at for at, same in enumerate(shared) if not same), positions)
    tail = tuple(prompts[0].token_ids[len(prompts[0].token_ids) - min(after, read - 1) :])
    identity = replace(model.identity, template=template_under(model.identity.template))
    return Located(
        model=identity,
        positions=tuple(range(-1, -positions - 1, -1)),
        tokens=tuple(map(str, model.tokenizer.convert_ids_to_tokens([column[0] for column in ids]))),
        shared=shared,
        layers=layers,
        table={each: tuple(tuple(getattr(cell, each) for cell in row) for row in cells) for each in VIEWS},
        read=read,
        view=view,
        template=locate_anchor(model.tokenizer, prompts[0]),
        tail=tail,
        prompt=form,
        queries=len(groups),
        prompts=len(prompts),
        data=hashlib.sha256(json.dumps([group.wordings for group in groups]).encode()).hexdigest()[:16],
    )


def _check(form: str, groups: Sequence[Group], view: View, positions: int) -> None:
    if _PLAIN not in form:
        raise ConfigurationError(f"the prompt {form!r} has no {_PLAIN}", hint="say where the query goes")
    if view not in VIEWS:
        raise ConfigurationError(f"view is {view!r}", hint=f"one of {', '.join(map(repr, VIEWS))}")
    if positions < 1:
        raise ConfigurationError(f"positions is {positions!r}", hint="look at one position at least")
    for group in groups:
        if len(group.wordings) < 2:
            raise InputError(f"{group.query!r} has one wording", hint="give it a paraphrase")
    if len(groups) < 2:
        raise InputError(f"{len(groups)} queries cannot be told apart", hint="give two or more")


def put_into(form: str, wording: str) -> str:
    """The prompt that asks in this wording."""
    return form.replace(_PLAIN, wording)


def _end_of(tokenizer: Tokenizer, prompt: Prompt, wording: str) -> int:
    """How many tokens of the prompt are left from the question's last one on, that included."""
    anchor = locate_anchor(tokenizer, prompt, question=wording)
    assert anchor is not None  # a question was named
    return -anchor.index


def _states(
    model: WhiteBoxModel, prompts: Sequence[Prompt], positions: int, progress: Callable[[int], None] | None
) -> Tensor:
    """h_{l,t} of all prompts: (L+1) × positions × n × d, position −1 first, in the model's dtype, on the CPU."""
    depth = model.layout.depth
    kept: Tensor | None = None
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at].token_ids))
    pad = int(model.tokenizer.pad_token_id or 0)
    for begin in range(0, len(order), _BATCH):
        batch = order[begin : begin + _BATCH]
        rows = [prompts[at].token_ids for at in batch]
        width = max(map(len, rows))
        columns = torch.tensor([[len(row) - 1 - at for at in range(positions)] for row in rows])
        seen: dict[int, Tensor] = {}
        view = model.layout.view(model.model, _watched(model, columns, seen))
        # Padding stands on the right, where causality hides it: no mask, and positions count from 0 of themselves.
        ids = torch.tensor([(*row, *[pad] * (width - len(row))) for row in rows], device=model.device)
        with undisturbed(model.model, grad=False):
            model.layout.decoder_of(view)(input_ids=ids, use_cache=False)
        if kept is None:
            kept = torch.empty(depth + 1, positions, len(prompts), seen[0].shape[-1], dtype=seen[0].dtype)
        for level, states in seen.items():
            kept[level, :, batch] = states.transpose(0, 1)
        if progress is not None:
            progress(begin + len(batch))
    assert kept is not None  # there are prompts
    return kept


def _watched(model: WhiteBoxModel, columns: Tensor, seen: dict[int, Tensor]) -> dict[int, Any]:
    """The layers, whose states at these columns are put into ``seen``, by level."""

    def at(level: int) -> Callable[[Tensor], None]:
        def see(states: Tensor) -> None:
            where = columns.to(states.device)
            picked = states[torch.arange(len(where), device=states.device)[:, None], where]
            seen[level] = picked.detach().cpu()

        return see

    modules = model.layout.list_of(model.model)
    watched: dict[int, Any] = {level - 1: tapped(modules[level - 1], at(level)) for level in range(1, len(modules) + 1)}
    watched[0] = _entered(watched[0], at(0))
    return watched


def _entered(layer: Any, see: Callable[[Tensor], None]) -> Any:
    """``layer``, whose input states ``see`` is shown."""

    def hook(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(args[0] if args else named["hidden_states"])

    clone = copy_of(layer)
    for table in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        clone.__dict__[table] = getattr(layer, table).copy()
    clone.register_forward_pre_hook(hook, with_kwargs=True)
    return clone
