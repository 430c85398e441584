"""What was read before: keys and values by token ids, so that the beginning of a conversation is not read twice.

A turn's prompt begins with the turns before it, every sentence of a stream that is followed with the prompt, and many
prompts with the same system turn. Keys and values of a position depend on nothing behind it (causality), so those of
the longest common beginning can be taken from any earlier pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from hallucination_guard.errors import ConfigurationError
from hallucination_guard.model.replay import filled

__all__ = ["Prefixes", "why_not"]

_BY_POSITION = frozenset(
    {"default", "linear", "llama3", "yarn"}
)  # rotary kinds where a key hangs on its position alone
_Layers = tuple[tuple[Tensor, Tensor], ...]


def why_not(model: Any) -> str:
    """Why nothing that this model reads can be kept; empty if it can."""
    if odd := sorted(_rotary_kinds(model.config.get_text_config(decoder=True)) - _BY_POSITION):
        return f"keys of the rotary kind {odd[0]!r} hang on the length of what is read"
    # A switch while another thread reads, and back, leaves no trace but keys that belong to neither.
    if any(hasattr(each, "_disable_adapters") for each in model.modules()):
        return "an adapter that is not merged can be switched while it is read"
    return ""


def _rotary_kinds(config: Any) -> set[str]:
    """Also where each kind of layer has its own."""
    found, waiting = set(), [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            found |= {each[name] for name in ("rope_type", "type") if isinstance(each.get(name), str)}
            waiting += each.values()
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Read:
    """One pass: its ids (on the CPU), and each layer's keys and values (1 × heads × tokens × d_head)."""

    ids: Tensor
    layers: _Layers

    @classmethod
    def of(cls, ids: Sequence[int], cache: DynamicCache) -> Self:
        return cls(ids=torch.tensor(ids), layers=tuple((each.keys, each.values) for each in cache.layers))

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(side.numel() * side.element_size() for layer in self.layers for side in layer)

    def common(self, ids: Tensor) -> int:
        """How many ids both begin with."""
        length = min(len(ids), len(self.ids))
        differ = (self.ids[:length] != ids[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class Prefixes:
    """The passes that were used last, as many as there is room for.

    Args:
        most: bytes that they may take, on the devices of the model's layers.

    Raises:
        ConfigurationError: if it is no positive whole number.
    """

    def __init__(self, most: int) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ConfigurationError(f"the prefixes may take {most!r} bytes", hint="a whole number, at least 1")
        self.most = most
        self._of: object = None
        self._reads: list[_Read] = []  # the one used last is at the end
        self._lock = Lock()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(each.size for each in self._reads)

    def cache(self, ids: Sequence[int], most: int, *, of: object) -> tuple[DynamicCache, int]:
        """A cache that begins as these ids do, and how many of them it holds.

        Args:
            ids: that are to be read.
            most: how many of them it may hold.
            of: which model reads. What another one read is let go.
        """
        tokens = torch.tensor(ids[:most])
        with self._lock:
            if of != self._of:
                self._of, self._reads = of, []
            found = max(self._reads, key=lambda each: each.common(tokens), default=None)
            length = 0 if found is None else found.common(tokens)
            if found is None or not length:
                return DynamicCache(), 0
            self._reads.remove(found)
            self._reads.append(found)
        cache = DynamicCache()
        cache.layers += [filled(keys[:, :, :length], values[:, :, :length]) for keys, values in found.layers]
        return cache, length

    def keep(self, ids: Sequence[int], cache: DynamicCache, *, of: object) -> None:
        """Keep what was read; what it goes on from, and then what was not used for longest, makes room."""
        read = _Read.of(ids, cache)
        with self._lock:
            if of != self._of or read.size > self.most:
                return
            if any(each.common(read.ids) == len(read.ids) for each in self._reads):
                return
            self._reads = [each for each in self._reads if read.common(each.ids) < len(each.ids)] + [read]
            while sum(each.size for each in self._reads) > self.most:
                del self._reads[0]
