"""CoCoA and semantic density against closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hallucination_guard.evaluation.agreement import AGREEMENT, Answered, cocoa, score_agreement, semantic_density
from hallucination_guard.evaluation.sample import Sample

ANSWER = Answered(text="Paris", sequence_nll=4.0, mean_nll=2.0, mean_token_entropy=1.0)


class _Axes:
    """Each word that texts end with has an axis of its own."""

    name = "axes"

    def __call__(self, texts: Sequence[str]) -> Any:
        words = ("Paris", "Lyon", "Nice")
        return np.array([[float(text.endswith(word)) for word in words] for text in texts])


def sample(text: str, *logprobs: float) -> Sample:
    return Sample(text=text, without=("",) * len(logprobs), logprobs=logprobs)


class TestCocoa:
    def test_is_nil_where_all_agree_and_the_uncertainty_itself_where_none_do(self) -> None:
        assert cocoa(3.0, np.ones(4)) == 0.0
        assert cocoa(3.0, np.zeros(4)) == 3.0

    def test_is_the_product_of_the_two(self) -> None:
        assert cocoa(2.0, np.array([1.0, 0.5, 0.0])) == pytest.approx(2.0 * 0.5)


class TestDensity:
    def test_is_one_where_all_mean_the_same(self) -> None:
        assert semantic_density(["a", "b"], [1.0, 2.0], np.ones(2)) == pytest.approx(1.0)

    def test_is_weighted_by_likelihood(self) -> None:
        q = [0.5, 0.25]
        expected = (0.5 * 1.0 + 0.25 * 0.5) / 0.75  # cosine 0 is a squared distance of ½
        assert semantic_density(["a", "b"], [-math.log(each) for each in q], np.array([1.0, 0.0])) == pytest.approx(
            expected
        )

    def test_a_text_that_is_drawn_twice_counts_once(self) -> None:
        once = semantic_density(["a", "b"], [1.0, 1.0], np.array([1.0, 0.0]))
        assert semantic_density(["a", "b", "b"], [1.0, 1.0, 1.0], np.array([1.0, 0.0, 0.0])) == pytest.approx(once)

    def test_likelihoods_may_underflow(self) -> None:
        assert semantic_density(["a", "b"], [2000.0, 2000.0], np.array([1.0, 0.0])) == pytest.approx(0.75)


class TestTogether:
    def test_every_score_by_hand(self) -> None:
        samples = [sample("Paris", -2.0, -2.0), sample("Lyon", -1.0), Sample(text="")]
        found = score_agreement("where?", ANSWER, samples, embed=_Axes())
        assert set(found) == set(AGREEMENT)
        # One of three samples agrees; the empty one does not.
        assert found["cocoa"] == pytest.approx(4.0 * 2 / 3)
        assert found["cocoa_mean"] == pytest.approx(2.0 * 2 / 3)
        assert found["cocoa_entropy"] == pytest.approx(1.0 * 2 / 3)
        answer, other = math.exp(-2.0), math.exp(-1.0)
        assert found["1-semantic_density"] == pytest.approx(1.0 - (answer + other / 2) / (answer + other))

    def test_an_empty_answer_cannot_be_built(self) -> None:
        with pytest.raises(ValueError, match="answer"):
            Answered(text=" ", sequence_nll=0.0, mean_nll=0.0, mean_token_entropy=0.0)
