"""A hash over every value of a model's weights, read once, and a cheap look on each call whether it still holds.

The look compares where each tensor's memory is and torch's count of writes to it, eight values of every third tensor,
and half a mebibyte, both going round from look to look; a guarded call looks three times (before, after generating, on
scoring). So what a call cannot see is a write past torch, through ``.data`` or numpy, that misses the eight values of
its tensor: it is found when its part of the memory has its turn, for 0.5 GB after some 340 calls. What is offloaded is
read once and not looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TypeAlias

import torch
import xxhash
from torch import Tensor

__all__ = ["Weights"]

_CHUNK = 2**19  # bytes
_SAMPLE = 8
_TURNS = 3

_Piece: TypeAlias = tuple[Tensor, int, bytes]
"""A flat tensor, the first value of a chunk of it, and the chunk's hash."""


class Weights:
    """The values of some tensors, as they were read.

    Args:
        named: the tensors by name; they are read here.
        watched: those of them whose memory stays, to be looked at again.
    """

    def __init__(self, named: Mapping[str, Tensor], watched: Sequence[Tensor]) -> None:
        self._watched = tuple(watched)
        self._state = self._count_writes()
        self._pieces: list[_Piece] = []
        stays = {each.data_ptr() for whole in watched for each in _parts(whole)}
        known: dict[tuple[object, ...], bytes] = {}  # tied weights are read once
        digest = xxhash.xxh3_128()
        for name, weight in sorted(named.items()):
            for part in _parts(weight):
                place = (part.data_ptr(), part.dtype, part.shape, part.stride(), part.device)
                if place not in known or not part.data_ptr():
                    known[place] = self._read(part, looked_at=part.data_ptr() in stays and part.is_contiguous())
                digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode() + known[place])
        self.hash: str = digest.hexdigest()
        self._samples = [_samples(self._watched[turn::_TURNS]) for turn in range(_TURNS)]
        self._sampled = [_gathered(each) for each in self._samples]
        self._turn = count()

    def _read(self, part: Tensor, *, looked_at: bool) -> bytes:
        flat = part.detach().reshape(-1)
        step = max(1, _CHUNK // max(1, flat.element_size()))
        digest = xxhash.xxh3_128()
        for begin in range(0, flat.numel(), step):
            chunk = _hashed(flat[begin : begin + step])
            digest.update(chunk)
            if looked_at:
                self._pieces.append((flat, begin, chunk))
        return digest.digest()

    def unchanged(self) -> bool:
        """Whether the look finds nothing; see the module's first lines for what it cannot see."""
        if self._count_writes() != self._state:
            return False
        turn = next(self._turn)
        now, then = _gathered(self._samples[turn % _TURNS]), self._sampled[turn % _TURNS]
        if not all(map(torch.equal, now, then)):
            return False
        if not self._pieces:
            return True
        flat, begin, chunk = self._pieces[turn % len(self._pieces)]
        return _hashed(flat[begin : begin + max(1, _CHUNK // flat.element_size())]) == chunk

    def _count_writes(self) -> list[tuple[int, int]]:
        return [(each.data_ptr(), each._version) for each in self._watched]


def _hashed(values: Tensor) -> bytes:
    return xxhash.xxh3_128_digest(values.contiguous().cpu().view(torch.uint8).numpy().data)


def _samples(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Evenly spaced values of each tensor, without copying; one list for each device and type."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for whole in tensors:
        for part in _parts(whole):
            if part.numel() and part.is_contiguous() and part.element_size() in _INTEGERS:
                flat = part.detach().reshape(-1)
                spaced = flat[:: -(-flat.numel() // _SAMPLE)].view(_INTEGERS[flat.element_size()])
                found.setdefault((spaced.device, spaced.dtype), []).append(spaced)
    return list(found.values())


# Compared as integers: a weight that is not a number equals itself, and 0.0 does not equal −0.0.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _gathered(samples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(list(each)) for each in samples]


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight is made of: itself, or the integers and scales of a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in sorted(names):
        yield from _parts(getattr(weight, name))
