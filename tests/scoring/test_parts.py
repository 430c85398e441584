"""Padding and passes together cost least, and every example comes back in its place."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import HybridGrad, gradients, head_walk
from hallucination_guard.scoring.parts import PASS, parts_of
from hallucination_guard.testing import tiny_model, tiny_tokenizer


class TestPartsOfLikeLength:
    @given(st.lists(st.integers(0, 300), min_size=1, max_size=7))
    def test_no_other_way_to_part_them_in_order_costs_less(self, lengths: list[int]) -> None:
        def cost(parts: list[list[int]]) -> int:
            return sum(PASS + len(part) * max(lengths[at] for at in part) for part in parts)

        order = sorted(range(len(lengths)), key=lambda at: lengths[at])
        ways = []
        for cuts in product([False, True], repeat=len(order) - 1):
            parts = [[order[0]]]
            for cut, at in zip(cuts, order[1:], strict=True):
                if cut:
                    parts.append([])
                parts[-1].append(at)
            ways.append(cost(parts))
        found = parts_of(lengths)
        assert sorted(at for part in found for at in part) == list(range(len(lengths)))
        assert cost(found) == min(ways)

    def test_one_answer_without_end_goes_apart(self) -> None:
        assert sorted(map(sorted, parts_of([7, 64, 8, 6, 7, 9]))) == [[0, 2, 3, 4, 5], [1]]


@pytest.mark.parametrize("most", [1, 320 * 4 * 20, 2**27], ids=["one at a time", "a few at a time", "all together"])
def test_a_batch_in_parts_scores_as_each_example_alone(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    monkeypatch.setattr(gradients, "_MOST", most)
    answers = ["me", "nobody at all, as far as anybody knows, or ever knew " * 3, "you and me", "I", "the cat"]
    generations = [white.read("Who was it?", answer=answer) for answer in answers]
    for score, generation in zip(HybridGrad().batch(white, generations), generations, strict=True):
        alone: Any = dict(HybridGrad()(white, white.read("Who was it?", generation.response_token_ids)).scores)
        assert dict(score.scores) == pytest.approx(alone, rel=1e-4)


class TestTheVocabularysTail:
    @pytest.fixture
    def peaked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (6 × 4000) of distributions of which few words have any part, and H."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(6, 4000, generator=generator) * 2
        logits[:, 300:] -= 30  # the rare words
        a = logits.softmax(-1)
        a[range(6), range(6)] -= 1
        return a, torch.randn(6, 16, generator=generator)

    def test_is_left_out_within_the_stated_bound(self, peaked: tuple[torch.Tensor, torch.Tensor]) -> None:
        a, states = peaked
        kept = head_walk.without_tail(a)
        assert kept.shape[1] <= 300
        whole, part = ((each.double().T @ states.double()).abs().sum() for each in (a, kept))
        bound = 1e-5 * (a.double().abs().sum(1) * states.double().abs().sum(1)).sum()
        assert 0 <= float(whole - part) <= float(bound)

    def test_keeps_what_a_single_token_finds_possible(self, peaked: tuple[torch.Tensor, torch.Tensor]) -> None:
        a, _ = peaked
        a[3, 3999] = 0.25
        assert (head_walk.without_tail(a)[3] == 0.25).any()

    def test_stays_where_it_is_not_nil(self) -> None:
        a = torch.full((2, 1000), 1e-3)
        a[:, 0] -= 1
        assert head_walk.without_tail(a) is a

    def test_stays_in_float64(self, peaked: tuple[torch.Tensor, torch.Tensor]) -> None:
        a = peaked[0].double()
        assert head_walk.without_tail(a) is a

    def test_of_a_certain_answer_changes_nothing(self) -> None:
        a = torch.zeros(1, 1000)
        assert float(head_walk.without_tail(a).abs().sum()) == 0.0

    @pytest.mark.parametrize("where", [5, 3999])
    def test_never_hides_what_is_not_a_number(self, peaked: tuple[torch.Tensor, torch.Tensor], where: int) -> None:
        a, _ = peaked
        a[2, where] = float("nan")
        assert head_walk.without_tail(a).isnan().any()
