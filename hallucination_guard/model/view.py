"""Views: the caller's model with other behaviour in chosen places, while the model itself stays as it was.

Hooks on a module are seen by every thread that runs it, and a flag that is changed and changed back is wrong in
between. So nothing is ever put on the caller's modules. A *view* is a shallow copy of the few modules on the path
from the causal language model down to its list of decoder layers; it shares every weight and every layer that is not
replaced, and it lives for one call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hallucination_guard.errors import ModelError

__all__ = [
    "Layout",
    "OwnForward",
    "copy_of",
    "replaced_output",
    "skipped",
    "tapped",
    "turn_of",
    "undisturbed",
    "with_parameters",
]


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
    clone = copy_of(layer)
    clone.__dict__["forward"] = _Answer(states, returns_tuple)
    clone.__dict__["_compiled_call_impl"] = None
    clone.__dict__["training"] = False  # a checkpointing layer would wrap forward in a recomputation
    clone.__dict__["_modules"] = {}
    # The caller's hooks (a steering vector, say) have done their work on these states already.
    clone.__dict__["_forward_hooks"] = OrderedDict()
    clone.__dict__["_forward_pre_hooks"] = OrderedDict()
    return clone


class OwnForward:
    """A ``forward`` that stands on a copy of a module, put there by us: it knows nothing of training."""


class _Answer(OwnForward):
    """The ``forward`` of a layer that does not run."""

    def __init__(self, states: Callable[[Tensor], Tensor], returns_tuple: bool) -> None:
        self._states, self._returns_tuple = states, returns_tuple

    def __call__(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        answer = self._states(hidden_states)
        return (answer,) if self._returns_tuple else answer


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
        hint = "only decoder-only transformers can be scored"
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_decoder") or getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__!r} is not a causal language model of transformers", hint=hint)
        depth = int(config.get_text_config(decoder=True).num_hidden_layers)
        decoder = model.get_decoder()
        at = next((name for name, module in model.named_modules() if module is decoder), None)
        lists = [
            name for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth and name
        ]
        if not at or not lists:
            raise ModelError(f"no list of {depth} decoder layers found in {type(model).__name__!r}", hint=hint)
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
        with undisturbed(model, grad=False):
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
            self.decoder_of(view)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return seen[0]

    def list_of(self, model: nn.Module) -> nn.ModuleList:
        """The list of layers of ``model`` (or of a view of it)."""
        found = model.get_submodule(".".join((*self.decoder, *self.layers)))
        assert isinstance(found, nn.ModuleList)
        return found

    def reach(self, model: Any, level: int) -> float:
        """How many positions further on h_l can be felt at least: infinite if a later layer attends to all.

        Of a layer that is neither full nor sliding attention (a convolution, a recurrence that may forget) nothing is
        known: it counts as 0.
        """
        config = model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        kinds = (
            getattr(config, "layer_types", None) or ("sliding_attention" if window else "full_attention",) * self.depth
        )
        far = {"full_attention": float("inf"), "sliding_attention": float(window or 1) - 1}
        return sum(far.get(kind, 0.0) for kind in kinds[level:])

    def decoder_of(self, model: nn.Module) -> Any:
        """The module that maps token ids to final states."""
        return model.get_submodule(".".join(self.decoder))

    def view(self, model: nn.Module, replace: Mapping[int, nn.Module]) -> Any:
        """``model`` with the layers at these indices (0 … L−1) replaced; ``model`` itself is not touched.

        A model in training mode is viewed in evaluation mode: dropout would make a score a matter of chance, and
        gradient checkpointing would drop the cache without a word.

        Raises:
            ModelError: if a module on the path has a ``forward`` of its own, which a copy would not run.
        """
        evaluating = any(module.training for module in model.modules())
        root = _opened(model)
        path = [root]
        for name in (*self.decoder, *self.layers):
            child = _opened(path[-1]._modules[name])
            path[-1]._modules[name] = child
            path.append(child)
        # Some position embeddings rewrite their buffers when a long prompt comes: they get buffers of their own.
        decoder = path[len(self.decoder)]
        for name, part in decoder._modules.items():
            if part is not None and not any(True for _ in part.parameters()):
                decoder._modules[name] = _with_own_buffers(part)
        for index, layer in replace.items():
            path[-1]._modules[str(index)] = layer
        if evaluating:
            _evaluate(root, done=set(map(id, (*path, *replace.values()))))
        return root


def _opened(module: nn.Module | None) -> nn.Module:
    """A copy whose ``forward`` is that of its class.

    accelerate puts a ``forward`` on the instance that is bound to the original, and torch.compile a compiled call: with
    either the copy would run the original's layers. Any other is the caller's, and means something that is not known.
    """
    assert module is not None
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        raise ModelError(
            f"{type(module).__name__!r} has a forward of its own, put on the instance",
            hint="undo the patch, or make it a subclass: its layers cannot be looked into otherwise",
        )
    clone = copy_of(module)
    clone.__dict__.pop("forward", None)
    clone.__dict__["_compiled_call_impl"] = None
    return clone


def _with_own_buffers(module: nn.Module) -> nn.Module:
    clone = copy_of(module)
    clone.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    for name, child in clone._modules.items():
        clone._modules[name] = None if child is None else _with_own_buffers(child)
    return clone


def _evaluate(module: nn.Module, *, done: set[int]) -> None:
    """Put ``module``, a copy already, into evaluation mode, and copies of everything below it."""
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], OwnForward):
        raise ModelError(
            f"{type(module).__name__!r} has a forward of its own and is in training mode",
            hint="call model.eval() first",
        )
    module.__dict__["training"] = False
    for name, child in module._modules.items():
        if child is not None:
            if id(child) not in done:
                child = module._modules[name] = copy_of(child)
            _evaluate(child, done=done)


def with_parameters(module: nn.Module, parameters: Mapping[int, Tensor]) -> nn.Module:
    """A copy of ``module`` and everything below it that computes with ``parameters``.

    Args:
        module: a view, or a part of one.
        parameters: what to compute with, by the ``id`` of the parameter it stands for; tied ones stay tied.

    Raises:
        ModelError: if a module below has a ``forward`` of its own, which would go on with the original's parameters.
    """
    if "forward" in module.__dict__:
        raise ModelError(
            f"{type(module).__name__!r} has a forward of its own (a patch, or a device map that moves its weights)",
            hint="its parameters cannot be stood in for: load the model unpatched on one device",
        )
    clone = copy_of(module)
    clone.__dict__["_compiled_call_impl"] = None
    clone.__dict__["_parameters"] = {
        name: None if parameter is None else parameters[id(parameter)] for name, parameter in module._parameters.items()
    }
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else with_parameters(child, parameters)
    return clone


_TURNS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_TURNS_LOCK = Lock()


def turn_of(model: nn.Module) -> AbstractContextManager[object]:
    """To be entered while the model runs: one whose weights are moved in and out is run by one thread at a time."""
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        with _TURNS_LOCK:
            return _TURNS.setdefault(model, RLock())
    return nullcontext()


@contextmanager
def undisturbed(model: nn.Module, *, grad: bool, turn: AbstractContextManager[object] | None = None) -> Iterator[None]:
    """Run the model as it is, whatever the caller has switched on around: inference mode, gradients off, autocast.

    Args:
        model: to be run.
        grad: whether with a graph.
        turn: of the model, where it is at hand: finding out takes a walk over all modules.
    """
    with ExitStack() as stack:
        stack.enter_context(turn_of(model) if turn is None else turn)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", next(model.parameters()).device.type} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
