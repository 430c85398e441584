"""Padding and passes together cost least, and every example comes back in its place."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import HybridGrad, gradients
from hallucination_guard.scoring.parts import PASS, parts_of
from hallucination_guard.testing import tiny_model, tiny_tokenizer


class TestPartsOfLikeLength:
    @given(st.lists(st.integers(0, 300), min_size=1, max_size=7), st.none() | st.integers(1, 900))
    def test_no_other_way_to_part_them_in_order_costs_less(self, lengths: list[int], most: int | None) -> None:
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
            if most is None or all(len(part) == 1 or len(part) * lengths[part[-1]] <= most for part in parts):
                ways.append(cost(parts))
        found = parts_of(lengths, most=most)
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
