"""The norm of ∂ℓ/∂W is that of the product within the bound that is said, and never of a broken number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hallucination_guard.model.head import Head
from hallucination_guard.scoring import head_blocks
from hallucination_guard.scoring.head_blocks import weighted_norms
from hallucination_guard.scoring.head_walk import Reading, head_norms

LEAST = 5e-5


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


def weights_of(a: Tensor) -> Tensor:
    return torch.stack([torch.linspace(0.001, 3, len(a), dtype=a.dtype), torch.ones(len(a), dtype=a.dtype)])


def product(a: Tensor, states: Tensor, weights: Tensor) -> Tensor:
    """The norms by the whole product, in float64."""
    weighted = weights.double()[:, :, None] * states.double()
    return (a.double().T @ weighted).abs().sum(dim=(1, 2))


def head_of(a: Tensor, states: Tensor) -> Head:
    return Head(weight=torch.zeros(a.shape[1], states.shape[1], dtype=a.dtype))


def reading_of(a: Tensor) -> Reading:
    return Reading(entropies=weights_of(a)[0], logprobs=torch.zeros(len(a)), a=a)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0], ids=["doubtful", "mixed", "certain"])
@pytest.mark.parametrize("tokens", [1, 12, 40])
@pytest.mark.parametrize("block", [16, 1024, 10_000])
@pytest.mark.parametrize("least", [1e-6, LEAST, 1e-2])
def test_the_norms_are_those_of_the_product_within_the_bound(
    spread: float, tokens: int, block: int, least: float
) -> None:
    a, states = answer(spread=spread, tokens=tokens)
    found = weighted_norms(a, states, weights_of(a), block=block, least=least)
    whole = product(a, states, weights_of(a))
    assert ((found - whole).abs() <= (least + 1e-6) * whole).all()


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_every_word_is_between_its_bounds(spread: float) -> None:
    a, states = answer(spread=spread, dtype=torch.float64)
    lower, upper = head_blocks._bounds(a, states, weights_of(a))
    norms = (a.T @ (weights_of(a)[:, :, None] * states)).abs().sum(dim=2)
    assert (lower <= norms * (1 + 1e-12)).all()
    assert (norms <= upper * (1 + 1e-12)).all()
    assert (lower > upper / 10).all()


def test_most_of_a_long_tail_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    words = []
    own = head_blocks._multiplied
    monkeypatch.setattr(head_blocks, "_multiplied", lambda a, *rest: words.append(a.shape[1]) or own(a, *rest))
    a, states = answer()
    weighted_norms(a, states, weights_of(a), block=64)
    assert 0 < words[0] < a.shape[1] / 2


def test_a_word_that_tokens_of_opposite_states_find_possible_is_multiplied() -> None:
    """Where two states cancel, the bounds are as far apart as they can be."""
    a, states = answer()
    states[4] = -states[3]
    a[:, 3999] = 0
    a[3:5, 3999] = 0.25
    whole = product(a, states, weights_of(a))
    assert (weighted_norms(a, states, weights_of(a), block=64) - whole).abs().max() <= (LEAST + 1e-6) * whole.max()


def test_in_float64_all_is_multiplied() -> None:
    a, states = answer(dtype=torch.float64)
    torch.testing.assert_close(
        weighted_norms(a, states, weights_of(a), block=64), product(a, states, weights_of(a)), rtol=1e-13, atol=0
    )


def test_a_certain_answer_has_the_norm_0() -> None:
    a, states = torch.zeros(1, 1000), torch.ones(1, 16)
    assert head_norms(head_of(a, states), [states], [reading_of(a)]) == [(0.0, 0.0)]


def test_tokens_of_no_entropy_still_count_in_exgrad() -> None:
    a, states = answer(tokens=2)
    reading = Reading(entropies=torch.zeros(2), logprobs=torch.zeros(2), a=a)
    [(paragrad, exgrad)] = head_norms(head_of(a, states), [states], [reading])
    assert paragrad == 0.0
    assert exgrad == pytest.approx(float((a.double().T @ states.double()).abs().mean()), rel=LEAST + 1e-6)


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
