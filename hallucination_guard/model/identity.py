"""Which model this is: two hashes, over every value of its tensors and over all else that it computes with.

Read on first use, and again once a cheap look finds a change.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

from torch import Tensor

from hallucination_guard.errors import ModelError
from hallucination_guard.model.structure import Structure
from hallucination_guard.model.weights import Weights

__all__ = ["Fingerprint"]


class Fingerprint:
    """The hashes of one model, remembered as long as nothing that they cover is seen to have changed.

    Args:
        model: the ``transformers`` model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._structure: Structure | None = None
        self._weights: Weights | None = None
        self._lock = Lock()  # reading takes a while: threads that come together wait for one reading

    def __call__(self) -> tuple[str, str]:
        """The hash of the tensors and that of the structure, 32 hexadecimal digits each.

        Raises:
            ModelError: if a weight is not in memory.
        """
        with self._lock:
            structure, weights = self._structure, self._weights
            if structure is None or not structure.unchanged():
                structure, weights = Structure(self._model), None  # it says which tensors there are
            if weights is None or not weights.unchanged():
                weights = self._read()
            self._structure, self._weights = structure, weights
            return weights.hash, structure.hash

    @property
    def seen(self) -> tuple[object, object]:
        """What was read last: other objects as soon as a change was seen, also one that was taken back."""
        self()
        with self._lock:
            return self._structure, self._weights

    def _read(self) -> Weights:
        tensors = {
            name: each for name, each in self._model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)
        }
        tensors |= {name: each for name, each in self._model.named_buffers()}  # rotary frequencies are not stored
        stays = [each for each in tensors.values() if each.device.type != "meta"]
        return Weights({name: self._in_memory(name, each) for name, each in tensors.items()}, stays)

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
