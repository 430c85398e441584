"""The deep half, once more, with a graph: what the gradient at t* needs and nothing else.

Nothing before t* depends on the state at t* (causality), so ∂ℓ/∂h_{l,t*} needs a graph over the tokens from t* to the
end only, against the cached keys and values of the prefix, and only from the first deep layer on. Where a layer keeps
something else than keys and values by position (a convolution, a recurrent state), there is no prefix to cut off: the
graph then spans the whole sequence, and is still only that of the deep half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hallucination_guard.errors import ModelError
from hallucination_guard.model.products import Kept, recalled, side_by_side
from hallucination_guard.model.view import Layout, replaced_output, skipped, tapped
from hallucination_guard.values import Prefix

__all__ = ["Replay", "Trace", "filled", "replay"]


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
        after: h_{l₀} of the answer's last token (1 × d), which predicts none of it; None where it was not read.
        logits: those that the answer was drawn from, a row of V for each of its tokens, if they were kept.
        products: gives those of the deep layers' linear maps that were kept, from the first of ``entering`` on. They
            are put together when a replay asks, which not every trace sees.
        origin: where all this came from.
    """

    ids: tuple[int, ...]
    anchor: int
    start: int
    first: int
    prefix: tuple[tuple[Tensor, Tensor], ...]
    states: Tensor
    after: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    products: Callable[[], Kept] = dict
    origin: Prefix

    @property
    def entering(self) -> Tensor:
        """``states``, and that of the answer's last token behind them where it is known."""
        return self.states if self.after is None else torch.cat([self.states, self.after])

    @property
    def row(self) -> int:
        """Of t* in ``states``."""
        return self.anchor - self.start

    def until(self, tokens: int, of: int) -> Trace:
        """What is kept of the first ``tokens`` tokens of an answer, where this is what is kept of ``of`` tokens."""
        less = of - tokens
        if not less:
            return self
        logits = None if self.logits is None else self.logits[:tokens]
        return dataclasses.replace(self, ids=self.ids[:-less], states=self.states[:-less], after=None, logits=logits)


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


def replay(model: Any, layout: Layout, traces: Sequence[Trace], layers: range, *, whole: bool = False) -> Replay:
    """Run the layers after h_{l₀} again, for a batch of traces of any lengths; the caller says whether with a graph.

    Args:
        model: the causal language model; it is not changed.
        layout: of that model.
        traces: one an example, all with ``first == layers.start``.
        layers: the l whose h_l can be derived by; h_l is the output of layer l−1 counted from 0.
        whole: also over the answer's last token, which is a row behind the others, where its state is known.
    """
    for trace in traces:
        _check_prefix(trace, layout.depth)
    entered = [trace.entering if whole else trace.states for trace in traces]
    lengths = [each.shape[0] for each in entered]
    starts = [trace.start for trace in traces]
    width, prefix = max(lengths), max(starts)
    entering = torch.stack([_right_padded(each, width) for each in entered])
    states = [entering.requires_grad_(torch.is_grad_enabled())]

    modules = layout.list_of(model)
    replace = {at: skipped(modules[at], returns_tuple=layout.returns_tuple) for at in range(layers.start - 1)}
    replace[layers.start - 1] = replaced_output(
        modules[layers.start - 1], lambda _: entering, returns_tuple=layout.returns_tuple
    )
    products = side_by_side([trace.products for trace in traces], lengths)
    for index in range(layers.start, layout.depth):
        layer = recalled(modules[index], index, products)
        if index + 1 in layers:
            replace[index] = tapped(layer, states.append)
        elif layer is not modules[index]:
            replace[index] = layer

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
    decoder = layout.decoder_of(layout.view(model, replace))
    cached = {"past_key_values": _cache(traces, prefix, layers.start), "use_cache": True}
    out = decoder(
        inputs_embeds=entering.detach(),  # only its shape is used: the layers that would read it are replaced
        attention_mask=mask,
        position_ids=positions,
        **(cached if prefix else {"use_cache": False}),
    )
    if any(each._version for each in states[1:]):
        # The gradient would be that at the overwritten state, in silence.
        raise ModelError(
            f"a layer of {type(model).__name__!r} writes into the states that it is given",
            hint="the state at t* cannot be told from what comes after it: this architecture cannot be scored",
        )
    rows = torch.tensor([trace.row for trace in traces])
    return Replay(final=out.last_hidden_state, states=tuple(states), rows=rows)


def _check_prefix(trace: Trace, depth: int) -> None:
    """See that every layer that runs has all of the prefix: without it a layer would attend to less, in silence."""
    held = [side.shape[-2] for pair in trace.prefix for side in pair]
    if trace.start and held != 2 * (depth - trace.first) * [trace.start]:
        raise ModelError("what was kept of the beginning is not whole", hint="read the answer again, then score it")


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
            cache.layers.append(filled(keys[:, :1, :1, :1].expand(-1, 1, prefix, 1), values))
        cache.layers.append(filled(keys, values))
    return cache


def _side(trace: Trace, at: int, side: int, traces: Sequence[Trace]) -> Tensor:
    """Keys or values; of a trace that begins at position 0, none of the shape that the others have."""
    if trace.prefix:
        return trace.prefix[at][side]
    other = next(each for each in traces if each.prefix).prefix[at][side]
    return other[:, :, :0]


def filled(keys: Tensor, values: Tensor) -> DynamicLayer:
    """A layer of a cache that holds these (B × heads × tokens × d_head)."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _stacked(parts: Sequence[Tensor], prefix: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([torch.nn.functional.pad(part, (0, 0, prefix - part.shape[-2], 0)) for part in parts])
