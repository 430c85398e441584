"""SATRMD finds what is there to be found, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from hallucination_guard.errors import CalibrationError
from hallucination_guard.evaluation.metrics import auroc
from hallucination_guard.evaluation.satrmd import Distances, cross_fitted, shrunk_covariance


def answers(count: int, *, apart: float, seed: int = 0) -> tuple[dict[str, NDArray[np.float64]], dict[str, bool]]:
    """Answers of 1 to 5 tokens, 3 layers, 6 dimensions; tokens of wrong ones are shifted by ``apart`` in layer 1."""
    random = np.random.default_rng(seed)
    states, wrong = {}, {}
    for at in range(count):
        name, bad = f"a{at}", at % 2 == 0
        tokens = random.normal(size=(random.integers(1, 6), 3, 6)) * np.arange(1, 7)  # of unequal spread
        tokens[:, 1, 0] += apart * bad
        states[name], wrong[name] = tokens, bad
    return states, wrong


@pytest.mark.parametrize("n", [5, 40, 2000])
def test_the_shrunk_covariance_is_scikit_learns(n: int) -> None:
    points = np.random.default_rng(0).normal(size=(n, 12)) * np.arange(1, 13)
    centred = points - points.mean(axis=0)
    assert shrunk_covariance(centred) == pytest.approx(ledoit_wolf(points)[0])


class TestDistances:
    def test_of_many_points_are_the_closed_form(self) -> None:
        random = np.random.default_rng(1)
        right, bad = random.normal(size=(400, 5, 1, 2)), random.normal(size=(400, 5, 1, 2))
        bad[..., 0] += 4.0
        near = Distances.fit([*right, *bad], [False] * 400 + [True] * 400)
        # Right: N(0, 1). All: centred at 2 with variance 1 + 4 along the first axis.
        x = np.array([[[3.0, 1.0]]])
        expected = np.sqrt(3.0**2 + 1.0) - np.sqrt(1.0**2 / 5 + 1.0)
        assert near([x, x]) == pytest.approx(np.full((2, 1), expected), abs=0.1)

    def test_of_an_answer_are_the_mean_over_its_tokens(self) -> None:
        states, wrong = answers(60, apart=2.0)
        near = Distances.fit(list(states.values()), list(wrong.values()))
        one, two = np.zeros((1, 3, 6)), np.ones((1, 3, 6))
        alone, together = near([one, two]), near([np.concatenate([one, two]), one])
        assert together == pytest.approx(np.stack([alone.mean(axis=0), alone[0]]))

    def test_do_not_depend_on_the_scale_of_a_layer(self) -> None:
        states, wrong = answers(60, apart=2.0)
        pairs = [(states[each], wrong[each]) for each in states]
        plain = Distances.fit([each for each, _ in pairs], [bad for _, bad in pairs])
        scaled = Distances.fit([100.0 * each for each, _ in pairs], [bad for _, bad in pairs])
        probe = states["a1"]
        assert scaled([100.0 * probe]) == pytest.approx(plain([probe]))

    def test_need_some_right_answers(self) -> None:
        states, wrong = answers(20, apart=1.0)
        with pytest.raises(CalibrationError, match="right answers"):
            Distances.fit(list(states.values()), [True] * len(wrong))


class TestCrossFitted:
    def test_finds_a_shift(self) -> None:
        states, wrong = answers(200, apart=4.0)
        found = cross_fitted(states, wrong)
        assert set(found) == set(states)
        assert auroc([found[each] for each in states], [wrong[each] for each in states]) > 0.75

    def test_finds_nothing_where_nothing_is(self) -> None:
        values = []
        for seed in range(5):
            states, wrong = answers(120, apart=0.0, seed=seed)
            found = cross_fitted(states, wrong)
            values.append(auroc([found[each] for each in states], [wrong[each] for each in states]))
        assert abs(float(np.mean(values)) - 0.5) < 0.1

    def test_no_score_has_seen_its_own_label(self) -> None:
        states, wrong = answers(100, apart=1.0)
        found = cross_fitted(states, wrong)
        turned = cross_fitted(states, {**wrong, "a0": not wrong["a0"]})
        assert turned["a0"] == found["a0"]
        assert turned != found  # those of other folds have

    def test_does_not_depend_on_the_order(self) -> None:
        states, wrong = answers(60, apart=2.0)
        turned = dict(reversed(states.items()))
        assert cross_fitted(turned, wrong) == pytest.approx(cross_fitted(states, wrong))

    def test_too_few_of_one_label_is_said(self) -> None:
        states, wrong = answers(20, apart=1.0)
        with pytest.raises(CalibrationError, match="one label"):
            cross_fitted(states, dict.fromkeys(wrong, True))
