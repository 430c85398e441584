"""Products that were kept while drawing stand in for multiplying again, where they are what that would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hallucination_guard.errors import ModelError
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.model.products import Place, Products, RowOf, recalled
from hallucination_guard.model.replay import Trace, replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.scoring import HybridGrad, Likelihood
from hallucination_guard.testing import tiny_model, tiny_tokenizer

QUESTIONS = ["Who?", "What is the capital of France, and of Spain?", "Name a red fruit."]


def white_box(family: str = "llama", **options: Any) -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(family, dtype=torch.float64, **options), tiny_tokenizer())


def traces_of(white: WhiteBoxModel, **drawn: Any) -> list[Trace]:
    generations = white.generate(QUESTIONS, max_new_tokens=9, temperature=1.0, seed=0, **drawn)
    return [white.trace(each, white.deep_layers) for each in generations]


def gradients(white: WhiteBoxModel, traces: list[Trace]) -> tuple[Tensor, ...]:
    with undisturbed(white.model, grad=True):
        run = replay(white.model, white.layout, traces, white.deep_layers)
        real = zip(run.final, traces, strict=True)  # what is behind an example's end is nobody's
        return torch.autograd.grad(sum(own[: len(each.states)].square().sum() for own, each in real), run.states)


def counted(white: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """How many tokens' products the deep layers' maps computed meanwhile."""
    seen: list[int] = []
    linear = nn.functional.linear

    def counting(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        deep = white.layout.list_of(white.model)[white.deep_layers.start :]
        if any(weight is each for each in deep.parameters()):
            seen.append(states.shape[0] * states.shape[1])
        return linear(states, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", counting)
        work()
    return sum(seen)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi3"])
def test_a_replay_is_the_same_with_and_without(family: str) -> None:
    white = white_box(family)
    traces = traces_of(white)
    assert all(trace.products() for trace in traces)
    bare = [replace(trace, products=dict) for trace in traces]
    for one, other in zip(gradients(white, traces), gradients(white, bare), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["drawn", "read"])
def test_scoring_multiplies_no_token_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    white = white_box()
    if how == "drawn":
        generation = white.generate(QUESTIONS[1], max_new_tokens=9)
        assert counted(white, monkeypatch, lambda: HybridGrad()(white, generation)) == 0
    else:
        generation = white.read(QUESTIONS[1], answer="Paris, of course")
        read = len(generation.prompt_token_ids) + len(generation.response_token_ids)
        maps = 7 * len(white.layout.list_of(white.model)[white.deep_layers.start :])
        assert counted(white, monkeypatch, lambda: HybridGrad()(white, generation)) == read * maps  # reading itself


def test_the_count_can_see_products(monkeypatch: pytest.MonkeyPatch) -> None:
    white = white_box()
    [trace, *_] = traces_of(white)
    assert counted(white, monkeypatch, lambda: gradients(white, [replace(trace, products=dict)])) > 0


def test_a_beginning_has_the_beginning_of_them() -> None:
    white = white_box()
    generation = white.generate(QUESTIONS[1], max_new_tokens=9, temperature=1.0, seed=0)
    trace = white.trace(generation, white.deep_layers)
    part = trace.until(4, len(generation.response_token_ids))
    assert counted(white, pytest.MonkeyPatch(), lambda: gradients(white, [part])) == 0
    for one, other in zip(gradients(white, [part]), gradients(white, [replace(part, products=dict)]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_map_that_one_example_lacks_is_run_for_all() -> None:
    white = white_box()
    first, *others = traces_of(white)
    some = {place: each for place, each in first.products().items() if place.name != "mlp.up_proj"}
    short = {place: each[:-1] if place.name == "mlp.down_proj" else each for place, each in some.items()}
    mixed, bare = (
        [replace(first, products=lambda: short), *others],
        [replace(each, products=dict) for each in (first, *others)],
    )
    for one, other in zip(gradients(white, mixed), gradients(white, bare), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1, 0, 2], [1]])
@pytest.mark.parametrize("tokens", [(9, 9, 9), (9, 4, 7), (2, 3, 4)])
def test_rows_of_one_batch_have_their_own_in_any_order_and_length(rows: list[int], tokens: Sequence[int]) -> None:
    white = white_box()
    generations = white.generate(QUESTIONS, max_new_tokens=9, temperature=1.0, seed=0)
    lengths = [len(each.response_token_ids) for each in generations]
    traces = [white.trace(each, white.deep_layers) for each in generations]
    traces = [traces[at].until(min(tokens[at], lengths[at]), lengths[at]) for at in rows]
    assert counted(white, pytest.MonkeyPatch(), lambda: gradients(white, traces)) == 0
    bare = [replace(each, products=dict) for each in traces]
    for one, other in zip(gradients(white, traces), gradients(white, bare), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_a_row_drew_after_its_end_is_not_looked_at() -> None:
    white = white_box()
    traces = traces_of(white)
    short = replace(traces[0], states=traces[0].states[:4], ids=traces[0].ids[: traces[0].start + 4], after=None)
    clean = gradients(white, [short, traces[1]])
    assert isinstance(short.products, RowOf)
    for ear in short.products.products._ears.values():
        columns = ear.columns()
        assert columns is not None
        columns[short.products.row, short.products.begin + 4 :] = torch.nan
    for one, other in zip(gradients(white, [short, traces[1]]), clean, strict=True):
        assert torch.equal(one, other)


def test_a_prefix_that_is_not_whole_is_refused() -> None:
    white = white_box()
    [trace, *_] = traces_of(white)
    keys, values = trace.prefix[-1]
    for prefix in (trace.prefix[:-1], (*trace.prefix[:-1], (keys[:, :, 1:], values)), ()):
        with pytest.raises(ModelError, match="not whole"):
            gradients(white, [replace(trace, prefix=prefix)])


def test_they_are_put_together_for_a_replay_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    white, asked, of = white_box(), [], Products.of

    def counting(self: Products, rows: Sequence[int], begin: int, end: int) -> Any:
        asked.append(rows)
        return of(self, rows, begin, end)

    monkeypatch.setattr(Products, "of", counting)
    generation = white.generate(QUESTIONS[1], max_new_tokens=9)
    Likelihood()(white, white.generate(QUESTIONS[1], max_new_tokens=9))
    assert asked == []
    HybridGrad()(white, generation)
    assert asked == [[0]]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    white = white_box()
    white.model.train(training)
    modules = {name: (each, each.training, dict(each.__dict__)) for name, each in white.model.named_modules()}
    gradients(white, traces_of(white))
    for name, each in white.model.named_modules():
        was, mode, attributes = modules[name]
        assert each is was
        assert each.training is mode is training
        assert each.__dict__.keys() == attributes.keys()


class _Layer(nn.Module):
    """Three maps, run as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.steps = how, 0
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        self.steps += 1
        out = self.a(states)
        if self.how == "twice":
            return out + self.b(states) + self.b(out)
        if self.how == "now and then":
            return out + self.b(states) if self.steps % 2 else out
        if self.how == "some tokens":
            return out + self.b(states[:, :1])
        if self.how == "flat":
            return out + self.b(states.reshape(-1, 4)).view_as(states)
        if self.how == "written into":
            return out + self.b(states).relu_()
        if self.how == "sequence first":
            return out + self.b(states.transpose(0, 1)).transpose(0, 1)
        return out + self.b(states)


def heard(how: str, *, most: int = 2**20, widths: tuple[int, ...] = (5, 1, 1, 1), skip: int = 2) -> set[str]:
    """The maps that were kept of a layer that runs so."""
    layer, products = _Layer(how), Products(skip, most=most)
    watched = products.watched(layer, 3)
    given = [torch.randn(2, width, 4) for width in widths]
    with torch.no_grad():
        for states in given:
            products.step(states)
            watched(states)
        products.step(given[-1])  # what comes next sees what was missed last
        kept = products.of([1], 0, sum(widths) - skip)
        whole = torch.cat(given, dim=1)[1, skip:]
        for place, found in kept.items():
            torch.testing.assert_close(found[0], getattr(layer, place.name)(whole))
    assert {place.layer for place in kept} <= {3}
    return {place.name for place in kept}


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("once", {"a", "b"}),
        ("twice", {"a"}),
        ("now and then", {"a"}),
        ("some tokens", {"a"}),
        ("flat", {"a"}),
        ("written into", {"a"}),
        ("sequence first", {"a"}),
    ],
)
def test_only_what_runs_once_over_every_token_is_kept(how: str, kept: set[str]) -> None:
    assert heard(how) == kept


def test_beyond_the_bytes_nothing_is_kept() -> None:
    columns = 5 + 3 - 2 + 1  # the step that has begun counts
    size = 2 * columns * 3 * 4 * 4
    assert heard("once", most=size) == {"a", "b"}
    assert heard("once", most=size - 1) == set()


def test_what_is_given_out_stays_while_more_is_drawn() -> None:
    layer, products = _Layer("once"), Products(0, most=2**20)
    watched = products.watched(layer, 0)
    with torch.no_grad():
        first = torch.randn(1, 3, 4)
        products.step(first)
        watched(first)
        early = products.of([0], 0, 3)[Place(0, "a")][0]
        before = early.clone()
        for _ in range(200):  # several buffers
            more = torch.randn(1, 1, 4)
            products.step(more)
            watched(more)
            products.of([0], 0, 3)
    assert torch.equal(early, before)
    assert len(products.of([0], 0, 203)[Place(0, "a")][0]) == 203


def test_hooks_and_forwards_of_the_callers_are_left_to_run() -> None:
    white = white_box()
    layer = white.layout.list_of(white.model)[-1]
    layer.mlp.up_proj.register_forward_hook(lambda _module, _given, output: 2 * output)
    forward = layer.mlp.gate_proj.forward
    layer.mlp.gate_proj.forward = lambda states: 3 * forward(states)  # type: ignore[method-assign]
    [trace, *_] = traces_of(WhiteBoxModel(white.model, tiny_tokenizer()))
    names = {place.name for place in trace.products() if place.layer == white.layout.depth - 1}
    assert "mlp.down_proj" in names
    assert not names & {"mlp.up_proj", "mlp.gate_proj"}


def test_a_model_that_writes_into_a_product_that_was_none_is_refused() -> None:
    layer = _Layer("written into")
    product = torch.randn(3, 4)
    before = product.clone()
    view = recalled(layer, 3, {Place(3, "b"): product[None]})
    with pytest.raises(RuntimeError, match="modified inplace"):
        view(torch.randn(1, 3, 4, requires_grad=True))
    assert torch.equal(product, before)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_they_take_part_in_a_graph_whatever_is_switched_off_around(around: Callable[[], Any]) -> None:
    white = white_box()
    with around():
        traces = traces_of(white)
        kept = [each for trace in traces for each in trace.products().values()]
    assert kept
    assert not any(each.is_inference() for each in kept)
    bare = [replace(trace, products=dict) for trace in traces]
    for one, other in zip(gradients(white, traces), gradients(white, bare), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
