"""Views: the caller's model with other behaviour in chosen places, while the model itself stays as it was.

Hooks on a module are seen by every thread that runs it, and a flag that is changed and changed back is wrong in
between. So nothing is ever put on the caller's modules. A *view* is a shallow copy of the few modules on the path
from the causal language model down to its list of decoder layers; it shares every weight and every layer that is not
replaced, and it lives for one call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hallucination_guard.errors import ModelError

__all__ = ["Layout", "copy_of", "replaced_output", "skipped", "tapped"]


def copy_of(module: nn.Module) -> nn.Module:
    """A shallow copy: same parameters, buffers and children, but its own table of children."""
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone


def tapped(layer: nn.Module, see: Callable[[Tensor], Tensor | None]) -> nn.Module:
    """``layer``, whose output states go through ``see``, which may return others in their place."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        seen = see(states)
        if seen is None:
            return None
        return (seen, *output[1:]) if isinstance(output, tuple) else seen

    clone = copy_of(layer)
    clone.__dict__["_forward_hooks"] = OrderedDict(layer._forward_hooks)
    clone.register_forward_hook(hook)
    return clone


def replaced_output(layer: nn.Module, states: Callable[[Tensor], Tensor], *, returns_tuple: bool) -> nn.Module:
    """``layer`` that does not run: it answers ``states(input)``. Attributes that the decoder reads are kept."""

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        answer = states(hidden_states)
        return (answer,) if returns_tuple else answer

    clone = copy_of(layer)
    clone.__dict__["forward"] = forward
    clone.__dict__["_compiled_call_impl"] = None
    clone.__dict__["training"] = False  # a checkpointing layer would wrap forward in a recomputation
    return clone


def skipped(layer: nn.Module, *, returns_tuple: bool) -> nn.Module:
    """``layer`` that lets its input through unchanged."""
    return replaced_output(layer, lambda states: states, returns_tuple=returns_tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the parts of a causal language model are.

    Args:
        decoder: path from the causal language model to the module that runs the layers.
        layers: path from there to the list of layers.
        depth: L, the number of layers.
        returns_tuple: whether a layer returns a tuple (older architectures) or the states alone.
    """

    decoder: tuple[str, ...]
    layers: tuple[str, ...]
    depth: int
    returns_tuple: bool

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Find the parts.

        Raises:
            ModelError: if there is no decoder with one list of ``num_hidden_layers`` layers.
        """
        config = model.config.get_text_config(decoder=True)
        depth = int(config.num_hidden_layers)
        decoder = model.get_decoder()
        at = next((name for name, module in model.named_modules() if module is decoder), None)
        lists = [
            name for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth and name
        ]
        if not at or not lists:
            raise ModelError(
                f"no list of {depth} decoder layers found in {type(model).__name__!r}",
                hint="only decoder-only transformers can be scored",
            )
        path = tuple(min(lists, key=lambda name: name.count(".")).split("."))
        layout = cls(decoder=tuple(at.split(".")), layers=path, depth=depth, returns_tuple=False)
        return cls(decoder=layout.decoder, layers=path, depth=depth, returns_tuple=layout._layer_returns_tuple(model))

    def _layer_returns_tuple(self, model: Any) -> bool:
        seen: list[bool] = []
        layer = self.list_of(model)[0]
        probe = copy_of(layer)
        probe.__dict__["_forward_hooks"] = OrderedDict(layer._forward_hooks)
        probe.register_forward_hook(lambda _m, _a, output: seen.append(isinstance(output, tuple)))
        view = self.view(model, {0: probe})
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        with torch.inference_mode(False), torch.no_grad():
            self.decoder_of(view)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return seen[0]

    def list_of(self, model: nn.Module) -> nn.ModuleList:
        """The list of layers of ``model`` (or of a view of it)."""
        found = model.get_submodule(".".join((*self.decoder, *self.layers)))
        assert isinstance(found, nn.ModuleList)
        return found

    def decoder_of(self, model: nn.Module) -> Any:
        """The module that maps token ids to final states."""
        return model.get_submodule(".".join(self.decoder))

    def view(self, model: nn.Module, replace: Mapping[int, nn.Module]) -> Any:
        """``model`` with the layers at these indices (0 … L−1) replaced; ``model`` itself is not touched.

        A model in training mode is viewed in evaluation mode: dropout would make a score a matter of chance, and
        gradient checkpointing would drop the cache without a word.
        """
        training = any(module.training for module in model.modules())
        root = _evaluating(model, {}) if training else _opened(model)
        here = root
        for name in (*self.decoder, *self.layers):
            child = _opened(here._modules[name])
            here._modules[name] = child
            here = child
        for index, layer in replace.items():
            layer.__dict__["training"] = False
            here._modules[str(index)] = layer
        return root


def _opened(module: nn.Module | None) -> nn.Module:
    """A copy whose ``forward`` is that of its class.

    accelerate and torch.compile put a ``forward`` on the instance that is bound to the original: the copy would run
    the original's layers.
    """
    assert module is not None
    clone = copy_of(module)
    clone.__dict__.pop("forward", None)
    clone.__dict__["_compiled_call_impl"] = None
    return clone


def _evaluating(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        clone = _opened(module)
        clone.__dict__["training"] = False
        done[module] = clone
        for name, child in clone._modules.items():
            clone._modules[name] = None if child is None else _evaluating(child, done)
    return done[module]
