"""The deep half, once more, with a graph: what the gradient at t* needs and nothing else.

Nothing before t* depends on the state at t* (causality), so ∂ℓ/∂h_{l,t*} needs a graph over the tokens from t* to the
end only, against the cached keys and values of the prefix, and only from the first deep layer on. A zero leaf is added
to the state at t* after each deep layer: its gradient *is* ∂ℓ/∂h_{l,t*}, through all later layers and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hallucination_guard.view import Layout, replaced_output, skipped, tapped

__all__ = ["Replay", "Trace", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """What is kept of one forward pass so that its deep half can be run again from t* on.

    Args:
        ids: the tokens that were read: prompt and answer but for its last.
        start: position of t* in the sequence: the number of prefix tokens.
        first: l₀, the first deep layer.
        prefix: keys and values (1 × heads × start × d_head) of each layer that runs after h_{l₀}.
        states: h_{l₀} at positions t* … P+T−2, (S × d).
    """

    ids: tuple[int, ...]
    start: int
    first: int
    prefix: tuple[tuple[Tensor, Tensor], ...]
    states: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A finished forward pass with a graph.

    Args:
        final: states after the final norm, (B × S × d); row j of an example belongs to position t* + j.
        leaves: one zero leaf (B × d) a deep layer, in the order of the layers.
    """

    final: Tensor
    leaves: tuple[Tensor, ...]


def replay(model: Any, layout: Layout, traces: Sequence[Trace], layers: range) -> Replay:
    """Run the layers after h_{l₀} again, for a batch of traces of any lengths; the caller says whether with a graph.

    Args:
        model: the causal language model; it is not changed.
        layout: of that model.
        traces: one an example, all with ``first == layers.start``.
        layers: the l whose h_{l,t*} get a leaf; h_l is the output of layer l−1 counted from 0.
    """
    lengths = [trace.states.shape[0] for trace in traces]
    starts = [trace.start for trace in traces]
    batch, width, prefix = len(traces), max(lengths), max(starts)
    states = torch.stack([_right_padded(trace.states, width) for trace in traces])
    leaves: list[Tensor] = []

    def add_leaf(out: Tensor) -> Tensor:
        leaf = torch.zeros(batch, out.shape[-1], dtype=out.dtype, device=out.device, requires_grad=True)
        leaves.append(leaf)
        return torch.cat([out[:, :1] + leaf[:, None], out[:, 1:]], dim=1)

    modules = layout.list_of(model)
    replace = {at: skipped(modules[at], returns_tuple=layout.returns_tuple) for at in range(layers.start - 1)}
    replace[layers.start - 1] = replaced_output(
        modules[layers.start - 1],
        lambda _: add_leaf(states),
        returns_tuple=layout.returns_tuple,
    )
    for level in layers[1:]:
        replace[level - 1] = tapped(modules[level - 1], add_leaf)

    device = states.device
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
    out = decoder(
        inputs_embeds=states,  # only its shape is used: the layers that would read it are replaced
        attention_mask=mask,
        position_ids=positions,
        past_key_values=_cache(traces, prefix, layers.start),
        use_cache=True,
    )
    return Replay(final=out.last_hidden_state, leaves=tuple(leaves))


def _right_padded(states: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, width - states.shape[0]))


def _cache(traces: Sequence[Trace], prefix: int, first: int) -> DynamicCache:
    """The prefixes of all examples, padded on the left, where generation pads too.

    The layers below l₀ do not run, but masks are sized by what they hold: they get a length and no memory.
    """
    cache = DynamicCache()
    for at in range(len(traces[0].prefix)):
        keys, values = (_stacked([trace.prefix[at][side] for trace in traces], prefix) for side in (0, 1))
        while len(cache.layers) < first:
            cache.layers.append(_filled(keys[:, :1, :1, :1].expand(-1, 1, prefix, 1) if prefix else keys, values))
        cache.layers.append(_filled(keys, values))
    return cache


def _filled(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _stacked(parts: Sequence[Tensor], prefix: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([torch.nn.functional.pad(part, (0, 0, prefix - part.shape[-2], 0)) for part in parts])
