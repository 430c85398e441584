"""The deep half, once more, with a graph: what the gradient at t* needs and nothing else.

Nothing before t* depends on the state at t* (causality), so ∂ℓ/∂h_{l,t*} needs a graph over the tokens from t* to the
end only, against the cached keys and values of the prefix, and only from the first deep layer on. Where a layer keeps
something else than keys and values by position (a convolution, a recurrent state), there is no prefix to cut off: the
graph then spans the whole sequence, and is still only that of the deep half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hallucination_guard.errors import ModelError
from hallucination_guard.model.view import Layout, replaced_output, skipped, tapped
from hallucination_guard.values import Prefix

__all__ = ["Extended", "Replay", "Trace", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """What is kept of one forward pass so that its deep half can be run again.

    Args:
        ids: the tokens that were read: prompt and answer but for its last.
        anchor: position of t* in the sequence.
        start: the first position with a state: that of t*, or 0 where nothing can be cut off.
        first: l₀, the first deep layer.
        prefix: keys and values (1 × heads × start × d_head) of each layer that runs after h_{l₀}; none if start is 0.
        states: h_{l₀} at positions start … P+T−2, (S × d).
        logits: those that the answer was drawn from, a row of V for each of its tokens, if they were kept.
        origin: where all this came from.
    """

    ids: tuple[int, ...]
    anchor: int
    start: int
    first: int
    prefix: tuple[tuple[Tensor, Tensor], ...]
    states: Tensor
    logits: tuple[Tensor, ...] | None = None
    origin: Prefix

    @property
    def row(self) -> int:
        """Of t* in ``states``."""
        return self.anchor - self.start

    def until(self, tokens: int, of: int) -> Trace:
        """What is kept of the first ``tokens`` tokens of an answer, where this is what is kept of ``of`` tokens."""
        less = of - tokens
        return (
            self
            if not less
            else replace(
                self,
                ids=self.ids[:-less],
                states=self.states[:-less],
                logits=None if self.logits is None else self.logits[:tokens],
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A finished forward pass with a graph.

    Args:
        final: states after the final norm, (B × S × d); row j of an example belongs to its position start + j.
        states: h_l (B × S × d) of each layer asked for. The gradient with respect to one of them is the total
            derivative, through all later layers and positions.
        rows: of t* in each example.
    """

    final: Tensor
    states: tuple[Tensor, ...]
    rows: Tensor

    def at_anchor(self, gradients: Sequence[Tensor]) -> Tensor:
        """∂/∂h_{l,t*} (layers × B × d, float64, on the CPU) out of ∂/∂h_l (B × S × d)."""
        examples = torch.arange(len(self.rows))
        # The layers may be on several devices.
        return torch.stack(
            [each[examples.to(each.device), self.rows.to(each.device)].to(torch.float64).cpu() for each in gradients]
        )


def replay(model: Any, layout: Layout, traces: Sequence[Trace], layers: range) -> Replay:
    """Run the layers after h_{l₀} again, for a batch of traces of any lengths; the caller says whether with a graph.

    Args:
        model: the causal language model; it is not changed.
        layout: of that model.
        traces: one an example, all with ``first == layers.start``.
        layers: the l whose h_l can be derived by; h_l is the output of layer l−1 counted from 0.
    """
    lengths = [trace.states.shape[0] for trace in traces]
    starts = [trace.start for trace in traces]
    width, prefix = max(lengths), max(starts)
    entering = torch.stack([_right_padded(trace.states, width) for trace in traces])
    states = [entering.requires_grad_(torch.is_grad_enabled())]
    device = entering.device
    columns = torch.arange(width, device=device)
    real = torch.tensor(lengths, device=device)[:, None]
    begin = torch.tensor(starts, device=device)[:, None]
    # Padding on the right is behind every real token, so causality hides it. Masking it as well would leave a padded
    # row of a sliding window with nothing to look at: not a number, and 0 · NaN spreads in the backward.
    # Its position is held inside the table of learnt positions (GPT-2).
    positions = begin + torch.minimum(columns, real - 1)
    mask = None
    if min(starts) < prefix:
        seen = torch.arange(prefix + width, device=device) >= prefix - begin
        mask = seen.long()
    decoder = _deep_half(model, layout, layers, entering, states)
    cached = {"past_key_values": _cache(traces, prefix, layers.start), "use_cache": True}
    out = decoder(
        inputs_embeds=entering.detach(),  # only its shape is used: the layers that would read it are replaced
        attention_mask=mask,
        position_ids=positions,
        **(cached if prefix else {"use_cache": False}),
    )
    _check_kept(model, states)
    rows = torch.tensor([trace.row for trace in traces])
    return Replay(final=out.last_hidden_state, states=tuple(states), rows=rows)


class Extended:
    """The replay of one answer that grows: what is new runs against the keys and values of all before, with its graph.

    Nothing is run twice from t* on. Only for models whose cache can be cut at a position.

    Args:
        model: the causal language model; it is not changed.
        layout: of that model.
        layers: as for :func:`replay`.
    """

    def __init__(self, model: Any, layout: Layout, layers: range) -> None:
        self._model, self._layout, self._layers = model, layout, layers
        self._cache = DynamicCache()
        self._row = 0
        self.states: list[Tensor] = []
        self.length = 0
        """Positions from t* on that have run."""

    def __call__(self, trace: Trace) -> Tensor:
        """Run what is new in a longer trace of the same answer.

        Returns:
            The new final states (1 × n × d). They hang on ``states``: h_l (1 × S × d) of the first call, which has t*.
        """
        first = not self.length
        entering = trace.states[self.length :][None]
        states = [entering.requires_grad_(torch.is_grad_enabled())] if first else []
        past = trace.start + self.length
        if first:
            self._row = trace.row
            if trace.prefix:
                self._cache = _cache([trace], trace.start, self._layers.start)
        else:  # masks are sized by what the lowest layer holds, and it does not run
            like = self._cache.layers[self._layers.start]
            for at in range(self._layers.start):
                self._cache.layers[at] = _filled(like.keys[:, :1, :1, :1].detach().expand(-1, 1, past, 1), like.values)
        positions = torch.arange(past, past + entering.shape[1], device=entering.device)[None]
        out = _deep_half(self._model, self._layout, self._layers, entering, states if first else None)(
            inputs_embeds=entering.detach(), position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        if first:
            _check_kept(self._model, states)
            self.states = states
        self.length += entering.shape[1]
        final: Tensor = out.last_hidden_state
        return final

    def hanging(self, finals: Sequence[Tensor]) -> Replay:
        """These final states, side by side, as a replay that can be derived by the states at t*."""
        return Replay(final=torch.cat(list(finals), dim=1), states=tuple(self.states), rows=torch.tensor([self._row]))


def _deep_half(model: Any, layout: Layout, layers: range, entering: Tensor, states: list[Tensor] | None) -> Any:
    """The decoder, whose lower half answers ``entering``; h_l of the layers above are added to ``states``."""
    modules = layout.list_of(model)
    others = {at: skipped(modules[at], returns_tuple=layout.returns_tuple) for at in range(layers.start - 1)}
    others[layers.start - 1] = replaced_output(
        modules[layers.start - 1], lambda _: entering, returns_tuple=layout.returns_tuple
    )
    if states is not None:
        for level in layers[1:]:
            others[level - 1] = tapped(modules[level - 1], states.append)
    return layout.decoder_of(layout.view(model, others))


def _check_kept(model: Any, states: Sequence[Tensor]) -> None:
    """See that no layer has written into the states of the one before.

    Raises:
        ModelError: if one has: the gradient would be that at the overwritten state, in silence.
    """
    if any(each._version for each in states[1:]):
        raise ModelError(
            f"a layer of {type(model).__name__!r} writes into the states that it is given",
            hint="the state at t* cannot be told from what comes after it: this architecture cannot be scored",
        )


def _right_padded(states: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, width - states.shape[0]))


def _cache(traces: Sequence[Trace], prefix: int, first: int) -> DynamicCache:
    """The prefixes of all examples, padded on the left, where generation pads too.

    The layers below l₀ do not run, but masks are sized by what they hold: they get a length and no memory.
    """
    cache = DynamicCache()
    for at in range(max(len(trace.prefix) for trace in traces)):
        keys, values = (_stacked([_side(trace, at, side, traces) for trace in traces], prefix) for side in (0, 1))
        while len(cache.layers) < first:
            cache.layers.append(_filled(keys[:, :1, :1, :1].expand(-1, 1, prefix, 1), values))
        cache.layers.append(_filled(keys, values))
    return cache


def _side(trace: Trace, at: int, side: int, traces: Sequence[Trace]) -> Tensor:
    """Keys or values; of a trace that begins at position 0, none of the shape that the others have."""
    if trace.prefix:
        return trace.prefix[at][side]
    other = next(each for each in traces if each.prefix).prefix[at][side]
    return other[:, :, :0]


def _filled(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _stacked(parts: Sequence[Tensor], prefix: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([torch.nn.functional.pad(part, (0, 0, prefix - part.shape[-2], 0)) for part in parts])
