"""What the linear maps of the deep layers gave while an answer was drawn, so that scoring need not multiply again.

A forward pass through the deep half is nearly all products with weights, and drawing the answer has made each of them.
∂(xW)/∂x needs W alone, so a replay for a gradient may take the product from here: the graph is the same, and its
forward is what stands between the linear maps. Only maps that are ``nn.Linear`` itself, run once a step over every
position, are kept; what is anything else (an expert that sees some tokens, a quantised map) is multiplied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hallucination_guard.model.view import OwnForward, copy_of

__all__ = ["Kept", "Place", "Products", "RowOf", "recalled", "side_by_side"]


class Place(NamedTuple):
    """Of a linear map: the index of its layer, and its name there."""

    layer: int
    name: str


Kept = Mapping[Place, Tensor]


class Products:
    """Collects the products (B × S × out) of the maps of some layers from column ``start`` on, over the steps.

    Args:
        start: the first column that is kept.
        most: bytes that are kept at most: beyond, all is let go.
    """

    def __init__(self, start: int, *, most: int) -> None:
        self._start, self._most = start, most
        self._steps = self._columns = self._bytes = 0
        self._ears: dict[Place, _Ear] = {}

    def watched(self, layer: nn.Module, index: int) -> nn.Module:
        """``layer``, whose linear maps are listened to."""
        maps = {}
        for name, each in _linear_maps(layer):
            ear = self._ears[Place(index, name)] = _Ear(each)
            maps[name] = _running(each, ear)
            self._bytes += each.out_features * each.weight.element_size()
        return _with(layer, maps)

    def step(self, states: Tensor) -> None:
        """A step begins, over these states (B × S × d): each map is to see each of them once."""
        batch, width = states.shape[:2]
        skip = max(0, self._start - self._columns)
        for each in self._ears.values():
            each.begin(self._steps, batch, width, skip)
        self._steps += 1
        self._columns += width
        if max(0, self._columns - self._start) * batch * self._bytes > self._most:
            ears, self._ears = self._ears, {}
            for each in ears.values():
                each.stop()

    def of(self, rows: Sequence[int], begin: int, end: int) -> Kept:
        """The products of some rows at the kept positions ``begin`` … ``end``−1 (R × S × out), if they are there.

        Another thread may ask while the batch is decoded.
        """
        found = {}
        for place, each in self._ears.items():
            columns = each.columns()
            if columns is not None and columns.shape[1] > begin:
                part = columns[:, begin:end]
                if len(rows) == 1:
                    found[place] = part[rows[0]][None]
                else:  # the whole batch, as it was drawn, needs no copy
                    found[place] = part.contiguous() if [*rows] == [*range(len(part))] else part[rows]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class RowOf:
    """What is kept of one row of a batch; put together when it is asked for."""

    products: Products
    row: int
    begin: int
    end: int

    def __call__(self) -> Kept:
        """The products (S × out)."""
        return {place: each[0] for place, each in self.products.of([self.row], self.begin, self.end).items()}


def side_by_side(rows: Sequence[Callable[[], Kept]], lengths: Sequence[int]) -> Kept:
    """The products that every row has (B × S × out, S the longest's); behind a shorter one's end are zeros.

    Args:
        rows: give what is kept of each.
        lengths: how many of its positions are wanted.
    """
    first, width = rows[0], max(lengths)
    if isinstance(first, RowOf) and all(
        isinstance(each, RowOf) and (each.products, each.begin, length) == (first.products, first.begin, width)
        for each, length in zip(rows, lengths, strict=True)
    ):
        # Of one batch. Behind a shorter row's end would be what was drawn after it: who says that it is finite?
        own = [each.row for each in rows if isinstance(each, RowOf)]
        kept = first.products.of(own, first.begin, first.begin + width)
        return {place: each for place, each in kept.items() if each.shape[1] == width}
    several = [each() for each in rows]
    return {
        place: _padded([each[place][:length] for each, length in zip(several, lengths, strict=True)])
        for place in several[0]
        if all(place in each and len(each[place]) >= length for each, length in zip(several, lengths, strict=True))
    }


class _Ear(OwnForward):
    """The ``forward`` of a map that is listened to: it runs at every token, and so does next to nothing besides."""

    __slots__ = ("_batch", "_bias", "_heard", "_held", "_lock", "_runs", "_seen", "_skip", "_weight", "_width")

    def __init__(self, linear: nn.Linear) -> None:
        self._weight, self._bias = linear.weight, linear.bias
        self._heard: list[Tensor] | None = []  # since they were put together last; None when nothing is kept any more
        self._held, self._seen = torch.empty(0, 0, 0), 0
        self._runs = self._batch = self._width = self._skip = 0
        self._lock = RLock()

    def __call__(self, states: Tensor) -> Tensor:
        product = nn.functional.linear(states, self._weight, self._bias)
        if (heard := self._heard) is not None:
            self._runs += 1
            if product.shape[1] != self._width:
                self.stop()  # some of the tokens, or in an order of its own
            # A copy of a part: a slice would hold the products of the whole prompt.
            heard.append(product[..., self._skip :, :].clone() if self._skip else product)
        return product

    def begin(self, steps: int, batch: int, width: int, skip: int) -> None:
        """A step begins, after so many; of this width, of which the first columns are skipped."""
        if self._runs != steps and self._heard is not None:
            self.stop()  # it ran twice in a step, or not at all
        self._batch, self._width, self._skip = batch, width, skip

    def stop(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._heard, self._held = None, torch.empty(0, 0, 0)

    def columns(self) -> Tensor | None:
        """All columns so far (B × S × out), side by side; what was given out is never written again."""
        # Whoever asks may be in inference mode, and a tensor made there takes part in no graph.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if (heard := self._heard) is None:
                return None
            new = tuple(heard)
            # One that was written into is no product any more.
            if any(each.dim() != 3 or len(each) != self._batch or each._version for each in new):
                self.stop()
                return None
            columns = self._seen + sum(each.shape[1] for each in new)
            if columns > self._held.shape[1]:
                held = new[0].new_empty(self._batch, max(2 * self._seen, columns), new[0].shape[2])
                if self._seen:
                    held[:, : self._seen] = self._held[:, : self._seen]
                self._held = held
            if new:
                torch.cat(new, dim=1, out=self._held[:, self._seen : columns])
            self._seen = columns
            del heard[: len(new)]
            return self._held[:, :columns]


def recalled(layer: nn.Module, index: int, kept: Kept) -> nn.Module:
    """``layer`` that takes the products at hand; a gradient goes back through it as through ``layer``.

    Args:
        layer: as it is.
        index: of the layer.
        kept: products of the batch (B × S × out).
    """
    maps = {
        name: _running(each, _Recalling(each, kept[place]))
        for name, each in _linear_maps(layer)
        if (place := Place(index, name)) in kept
    }
    return _with(layer, maps) if maps else layer


def _linear_maps(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The maps that compute xWᵀ (+ b) and nothing else, and run where their parents' own ``forward`` runs them."""
    for name, child in module._modules.items():
        if child is None or "forward" in child.__dict__ or child._forward_hooks or child._forward_pre_hooks:
            continue
        place = f"{path}.{name}" if path else name
        if type(child) is nn.Linear:
            yield place, child
        else:
            yield from _linear_maps(child, place)


def _with(module: nn.Module, maps: Mapping[str, nn.Module], path: str = "") -> nn.Module:
    """A copy of ``module`` with other maps at these places; what holds none of them is shared."""
    clone = copy_of(module)
    for name, child in module._modules.items():
        place = f"{path}.{name}" if path else name
        if place in maps:
            clone._modules[name] = maps[place]
        elif child is not None and any(each.startswith(f"{place}.") for each in maps):
            clone._modules[name] = _with(child, maps, place)
    return clone


def _padded(rows: Sequence[Tensor]) -> Tensor:
    if len(rows) == 1:
        return rows[0][None]
    padded = rows[0].new_zeros(len(rows), max(map(len, rows)), rows[0].shape[1])
    for row, each in zip(padded, rows, strict=True):
        row[: len(each)] = each
    return padded


def _running(linear: nn.Linear, forward: OwnForward) -> nn.Module:
    clone = copy_of(linear)
    clone.__dict__["forward"] = forward
    clone.__dict__["_compiled_call_impl"] = None
    return clone


class _Recalling(OwnForward):
    """The ``forward`` of a map whose product is at hand."""

    def __init__(self, linear: nn.Linear, product: Tensor) -> None:
        self._weight, self._product = linear.weight.detach(), product

    def __call__(self, states: Tensor) -> Tensor:
        product: Tensor = _Recall.apply(states, self._weight, self._product)  # type: ignore[no-untyped-call]
        return product


class _Recall(torch.autograd.Function):
    """xWᵀ + b, of which the value is known and the derivative by x is W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: Tensor, weight: Tensor, product: Tensor) -> Tensor:
        return product.view_as(product)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        [weight] = ctx.saved_tensors
        return gradient @ weight, None, None
