"""Which model this is: a hash over what it computes with, computed on first use and again once a weight has changed.

Config, dtype and a sample of every stored tensor; the paths and versions in the config say how it was stored, not what
it computes, and are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hallucination_guard.errors import ModelError

__all__ = ["Fingerprint"]

_VOLATILE = ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version")
_SAMPLE = 256  # a fine-tune moves every matrix: so many evenly spaced values of each tell models apart at no cost


class Fingerprint:
    """The hash of one model, remembered as long as nothing that it covers has changed.

    Args:
        model: the ``transformers`` model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: tuple[object, str] | None = None

    def __call__(self) -> str:
        """32 hexadecimal digits.

        Raises:
            ModelError: if a weight is not in memory.
        """
        weights = _tensors(self._model)
        state = (
            [(id(each), each.data_ptr(), each._version, each.dtype) for each in weights.values()],
            self._model.config.to_json_string(use_diff=False),
        )
        known = self._known
        if known is None or known[0] != state:
            known = self._known = (state, self._computed(weights))
        return known[1]

    def _computed(self, weights: dict[str, Tensor]) -> str:
        digest = hashlib.sha256()
        config = self._model.config.to_dict()
        for volatile in _VOLATILE:
            config.pop(volatile, None)
        digest.update(f"{self._model.dtype} {json.dumps(config, sort_keys=True, default=str)}".encode())
        for name, weight in sorted(weights.items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            for part in _parts(self._in_memory(name, weight).detach()):
                flat = part.reshape(-1)
                sample = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _in_memory(self, name: str, weight: Tensor) -> Tensor:
        if weight.device.type != "meta":
            return weight
        module, _, own = name.rpartition(".")
        offloaded = getattr(getattr(self._model.get_submodule(module), "_hf_hook", None), "weights_map", None)
        if offloaded is None or own not in offloaded:
            raise ModelError(
                f"the weight {name!r} of {type(self._model).__name__!r} is not in memory, so the model cannot be told "
                "from others",
                hint="load it with a device_map that transformers or accelerate can dispatch",
            )
        found: Tensor = offloaded[own]
        return found


def _tensors(model: Any) -> dict[str, Tensor]:
    """Weights and the buffers that are stored with them (the weights of some quantisations are buffers)."""
    return {name: each for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight is made of: itself, or the integers and scales of a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in sorted(names):
        yield from _parts(getattr(weight, name))
