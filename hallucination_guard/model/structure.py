"""What a model computes with beside its tensors: the config, classes, settings, adapters, hooks.

An adapter switched off, its scaling, a replaced activation or a forward hook change every score and no weight. All
of it is hashed; what only says how the model was stored or is trained is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["Structure"]

_OF_ANY_MODULE = frozenset(nn.Module().__dict__)
# How a model was stored or is trained, what transformers counts while it runs, and what accelerate puts around it.
_STORED = frozenset(
    {
        "gradient_checkpointing",
        "hf_device_map",
        "kernel_config",
        "loss_type",
        "max_seq_len_cached",
        "name_or_path",
        "warnings_issued",
    }
)
_OF_ADAPTERS = frozenset({"_active_adapter", "_disable_adapters"})  # PEFT keeps what is switched on in private names
_STORED_CONFIG = ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_modules", "_parameters", "_buffers", *_HOOKS)
_COLLECTING = "transformers.utils.output_capturing."  # hooks that stay once states were asked for; they only listen
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
_PLAIN = (bool, int, float, str, type(None))


class Structure:
    """The structure of one model, as it was read.

    Args:
        model: the ``transformers`` model.
    """

    def __init__(self, model: Any) -> None:
        self._config = vars(model.config)
        self._own: list[dict[str, Any]] = [each.__dict__ for each in model.modules()]
        parts = [each[name] for each in self._own for name in _PARTS]
        self._filled, self._empty = [each for each in parts if each], [each for each in parts if not each]
        settings = [_settings(each) for each in model.modules()]
        self._containers = [(own, each) for own, (named, _) in zip(self._own, settings, strict=True) for each in named]
        self._modules = tuple(model.modules())
        self._kinds = tuple({type(each) for each in self._modules})
        self._getters = [itemgetter(*_PARTS, *names) for _, names in settings]
        # The objects are held, so that none of another value can take the place of one in memory.
        self._objects, self._words = self._look()
        self.hash: str = _hashed(model)

    def unchanged(self) -> bool:
        """Whether every module, setting, hook and tensor is the very object that was read."""
        try:
            objects, words = self._look()
        except KeyError:  # a setting is gone
            return False
        same = len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return same and words == self._words and not any(self._empty)

    def _look(self) -> tuple[list[object], list[object]]:
        """The objects that the hash covers, and all tensors; what can change in place, in its own words."""
        # Thousands of names on each call of the model: hardly a step of Python for each.
        objects = list(chain.from_iterable(map(dict.values, self._filled)))
        for own, getter in zip(self._own, self._getters, strict=True):
            objects.extend(getter(own))
        words: list[object] = [*map(len, self._own), *(repr(own[name]) for own, name in self._containers)]
        objects.extend(map(type, self._modules))
        objects.extend([kind.forward for kind in self._kinds])  # some libraries replace it in the class
        for name in _GLOBAL_HOOKS:
            objects.extend(getattr(torch_module, name).values())
        for value in self._config.values():
            if isinstance(value, _PLAIN):
                objects.append(value)
            else:
                words.append(repr(value))
        return objects, words


def _settings(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a module's own settings: containers that can change in place, and all others."""
    names = [name for name in module.__dict__ if _counts(module, name)]
    containers = tuple(name for name in names if isinstance(module.__dict__[name], dict | list | set))
    return containers, tuple(name for name in names if name not in containers)


def _counts(module: nn.Module, name: str) -> bool:
    if name in _OF_ANY_MODULE or name in _STORED:
        return False
    if name == "forward" and "_hf_hook" in module.__dict__:  # accelerate's, which moves weights and changes no number
        return False
    return not name.startswith("_") or name in _OF_ADAPTERS


def _hashed(model: Any) -> str:
    digest = xxhash.xxh3_128()
    config = model.config.to_dict()
    for stored in _STORED_CONFIG:
        config.pop(stored, None)
    digest.update(f"{model.dtype} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"\n{name} {kind.__module__}.{kind.__qualname__} {_name(kind.forward)}".encode())
        for key in sorted(module.__dict__):
            if _counts(module, key):
                for words in _in_words(module.__dict__[key]):
                    digest.update(f" {key}=".encode() + words)
        for hooks in _HOOKS:
            for hook in module.__dict__[hooks].values():
                if _name(hook).startswith(_COLLECTING):
                    continue
                digest.update(f" {hooks}: {_name(hook)}".encode())
    for hooks in _GLOBAL_HOOKS:
        for hook in getattr(torch_module, hooks).values():
            digest.update(f"\n{hooks}: {_name(hook)}".encode())
    return digest.hexdigest()


def _in_words(value: object) -> Iterator[bytes]:
    """A setting as bytes; nothing for objects that say nothing stable of themselves (a config is hashed already)."""
    if isinstance(value, Tensor):
        yield _bytes(value)
    elif isinstance(value, _PLAIN):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from (f"{key}:".encode() + words for words in _in_words(value[key]))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _in_words(each)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(str, value))).encode()
    elif callable(value):
        yield _name(value).encode()


def _bytes(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta":
        return b"meta"
    return xxhash.xxh3_128_digest(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _name(value: object) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
