"""What is left out of ∂ℓ/∂W takes no more from its norm than is said, and never a broken number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hallucination_guard.model.head import Head
from hallucination_guard.scoring import head_walk
from hallucination_guard.scoring.head_blocks import felt_blocks
from hallucination_guard.scoring.head_walk import Reading, head_norms

LEAST = 1e-5


def answer(
    *, spread: float = 3.0, tokens: int = 12, words: int = 4000, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A (T × V) of more and less certain tokens, over words of which most are rare, and H (T × 16)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, words, generator=generator, dtype=torch.float64) * spread
    logits *= torch.linspace(0.5, 3, tokens, dtype=torch.float64)[:, None]
    logits -= torch.linspace(0, 12, words, dtype=torch.float64)
    a = logits.softmax(-1)
    a[range(tokens), range(tokens)] -= 1
    return a.to(dtype), torch.randn(tokens, 16, generator=generator, dtype=torch.float64).to(dtype)


def entropies_of(a: Tensor) -> Tensor:
    return torch.linspace(0.001, 3, len(a), dtype=a.dtype)


def head_of(a: Tensor, states: Tensor) -> Head:
    return Head(weight=torch.zeros(a.shape[1], states.shape[1], dtype=a.dtype))


def reading_of(a: Tensor) -> Reading:
    return Reading(entropies=entropies_of(a), logprobs=torch.zeros(len(a)), a=a)


def kept(a: Tensor, states: Tensor, block: int = 64) -> list[tuple[Tensor, Tensor | None]]:
    weights = torch.stack([entropies_of(a), torch.ones(len(a), dtype=a.dtype)])
    return list(felt_blocks(a, weights * states.abs().sum(dim=1), block=block))


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0], ids=["doubtful", "mixed", "certain"])
@pytest.mark.parametrize("felt", [16, 1024, 10_000])
def test_the_norms_are_those_of_the_whole_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, spread: float, felt: int
) -> None:
    monkeypatch.setattr(head_walk, "_FELT", felt)
    a, states = answer(spread=spread)
    [found] = head_norms(head_of(a, states), [states], [reading_of(a)])
    for norm, weights in zip(found, (entropies_of(a).double(), torch.ones(len(a)).double()), strict=True):
        weighted = states.double() * weights[:, None]
        whole = float((a.double().T @ weighted).abs().mean())
        most = float((a.double().abs().sum(1) * weighted.abs().sum(1)).sum()) / a.shape[1] / states.shape[1]
        assert -1e-6 * whole <= whole - norm <= LEAST * most + 1e-6 * whole


def test_a_third_of_a_long_tail_is_left_out() -> None:
    a, states = answer()
    assert sum(part.numel() for part, _ in kept(a, states)) < a.numel() * 2 / 3


def test_what_is_left_out_would_take_no_more_than_the_bound_from_the_norm() -> None:
    a, states = answer()
    size = states.abs().sum(dim=1).double()
    for weights in (entropies_of(a).double(), torch.ones(len(a)).double()):
        weight = weights * size
        there = sum(
            float((weight if rows is None else weight[rows]) @ part.double().abs().sum(1))
            for part, rows in kept(a, states)
        )
        whole = float(weight @ a.double().abs().sum(1))
        assert (1 - LEAST) * whole <= there <= whole * (1 + 1e-12)


def test_a_word_that_a_single_token_finds_possible_stays() -> None:
    a, states = answer()
    a[3, 3999] = 0.25
    assert any(bool((part == 0.25).any()) for part, _ in kept(a, states))


def test_rows_say_which_tokens_the_part_is_of() -> None:
    a, states = answer()
    columns = {tuple(column) for column in a.T.tolist()}
    for part, rows in kept(a, states):
        there = list(range(len(a))) if rows is None else rows.tolist()
        for column in part.T.tolist():
            values = dict(zip(there, column, strict=True))
            assert any(all(whole[row] == value for row, value in values.items()) for whole in columns)


def test_in_float64_all_stays_in_its_place() -> None:
    a, states = answer(dtype=torch.float64)
    assert torch.equal(torch.cat([part for part, _ in kept(a, states)], dim=1), a)


def test_a_certain_answer_has_the_norm_0() -> None:
    a, states = torch.zeros(1, 1000), torch.ones(1, 16)
    assert head_norms(head_of(a, states), [states], [reading_of(a)]) == [(0.0, 0.0)]


def test_tokens_of_no_entropy_still_count_in_exgrad() -> None:
    a, states = answer(tokens=2)
    reading = Reading(entropies=torch.zeros(2), logprobs=torch.zeros(2), a=a)
    [(paragrad, exgrad)] = head_norms(head_of(a, states), [states], [reading])
    assert paragrad == 0.0
    assert exgrad == pytest.approx(float((a.double().T @ states.double()).abs().mean()), rel=2e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [5, 3999])
@pytest.mark.parametrize("of", ["a", "states"])
def test_what_is_not_a_number_is_never_hidden(broken: float, where: int, of: str) -> None:
    a, states = answer()
    if of == "a":
        a[2, where] = broken
    else:
        states[2, where % 16] = broken
    [norms] = head_norms(head_of(a, states), [states], [reading_of(a)])
    assert not torch.tensor(norms).isfinite().any()
