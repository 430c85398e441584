"""The attention weights of a forward pass, looked at without a trace: no setting of the caller's model is changed.

Fast kernels never form the weights. So a view computes attention plainly ("eager" in transformers): it has copies of
the attention modules and of the decoder, each with a config of its own that says so, and shares every weight.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from hallucination_guard.errors import ModelError
from hallucination_guard.model.view import Layout, copy_of, tapped

__all__ = ["See", "plainly_attending"]

See: TypeAlias = Callable[[int, Tensor], None]
"""Is shown something of layer l (1 … L)."""


def plainly_attending(model: nn.Module, layout: Layout, *, attention: See, states: See | None = None) -> Any:
    """A view of ``model`` that shows the attention of each layer that has one.

    Args:
        model: the causal language model; it is not changed.
        layout: of that model.
        attention: is shown the weights (B × heads × S × S, rows are what attends) of layer l.
        states: is shown h_l (B × S × d).

    Raises:
        ModelError: if a layer is patched, so that a copy of it would run the original.
    """
    replace = {}
    for at, layer in enumerate(layout.list_of(model)):
        plain = _plain(layer, at + 1, attention)
        replace[at] = plain if states is None else tapped(plain, _of_layer(states, at + 1))
    view = layout.view(model, replace)
    decoder = layout.decoder_of(view)  # it makes the mask, in the form that its config's attention takes
    decoder.__dict__["config"] = _plain_config(decoder.config)
    return view


def _plain(layer: nn.Module, level: int, see: See) -> nn.Module:
    """A copy of ``layer`` whose attention is computed plainly and shown."""
    clone = _copied(layer)
    for name, child in layer._modules.items():
        if child is not None and "attention" in type(child).__name__.lower() and hasattr(child, "config"):
            attending = _copied(child)
            attending.__dict__["config"] = _plain_config(child.config)
            attending.__dict__["_forward_hooks"] = OrderedDict(child._forward_hooks)
            attending.register_forward_hook(_shown(see, level))
            clone._modules[name] = attending
    return clone


def _copied(module: nn.Module) -> nn.Module:
    if "forward" in module.__dict__:
        raise ModelError(
            f"{type(module).__name__!r} has a forward of its own (a patch, or a device map that moves its weights)",
            hint="its attention cannot be looked at: load the model unpatched on one device",
        )
    clone = copy_of(module)
    clone.__dict__["_compiled_call_impl"] = None
    return clone


def _plain_config(config: Any) -> Any:
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"
    return own


def _shown(see: See, level: int) -> Callable[..., None]:
    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.dim() != 4:
            raise ModelError(
                f"{type(module).__name__!r} does not give its attention weights",
                hint="scores that look at attention cannot be had of this architecture",
            )
        see(level, weights)

    return hook


def _of_layer(see: See, level: int) -> Callable[[Tensor], None]:
    return lambda states: see(level, states)
