"""Metrics against scikit-learn, against closed forms, and against trying every order of ties."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.evaluation import bootstrap, measure
from hallucination_guard.evaluation.metrics import METRICS, risk_coverage, roc
from hallucination_guard.evaluation.reliability import brier, calibration_error, confidences, reliability

ROWS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40)
BOTH = ROWS.filter(lambda rows: len({wrong for _, wrong in rows}) == 2)


def split(rows: list[tuple[int, bool]]) -> tuple[list[float], list[bool]]:
    return [float(value) for value, _ in rows], [wrong for _, wrong in rows]


def brute_aurc(values: list[float], wrong: list[bool]) -> float:
    """The mean over every order that rises in the score."""
    found = []
    for order in permutations(range(len(values))):
        if all(values[a] <= values[b] for a, b in pairwise(order)):
            errors = np.cumsum([wrong[at] for at in order])
            found.append(float((errors / np.arange(1, len(order) + 1)).mean()))
    return sum(found) / len(found)


class TestOneScore:
    @given(BOTH)
    def test_auroc_and_aucpr_are_those_of_scikit_learn(self, rows: list[tuple[int, bool]]) -> None:
        values, wrong = split(rows)
        found = measure(values, wrong)
        assert found["auroc"] == pytest.approx(roc_auc_score(wrong, values))
        assert found["aucpr"] == pytest.approx(average_precision_score(wrong, values))

    @settings(max_examples=40)
    @given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
    def test_aurc_is_its_mean_over_all_orders_of_ties(self, rows: list[tuple[int, bool]]) -> None:
        values, wrong = split(rows)
        assert measure(values, wrong)["aurc"] == pytest.approx(brute_aurc(values, wrong))

    @given(BOTH, st.randoms(use_true_random=False))
    def test_the_order_of_rows_does_not_matter(self, rows: list[tuple[int, bool]], random: object) -> None:
        mixed = list(rows)
        random.shuffle(mixed)  # type: ignore[attr-defined]
        assert measure(*split(mixed)) == pytest.approx(measure(*split(rows)))

    @given(BOTH)
    def test_only_the_order_of_scores_counts(self, rows: list[tuple[int, bool]]) -> None:
        values, wrong = split(rows)
        assert measure([math.exp(each) for each in values], wrong) == pytest.approx(measure(values, wrong))

    @given(BOTH)
    def test_the_perfect_score_has_prr_one_and_a_constant_one_has_none(self, rows: list[tuple[int, bool]]) -> None:
        _, wrong = split(rows)
        assert measure([float(each) for each in wrong], wrong)["prr"] == pytest.approx(1.0)
        constant = measure([1.0] * len(wrong), wrong)
        assert constant["prr"] == pytest.approx(0.0, abs=1e-12)
        assert constant["auroc"] == 0.5
        assert constant["aurc"] == pytest.approx(sum(wrong) / len(wrong))

    def test_accuracy_at_coverage_counts_the_most_certain(self) -> None:
        found = measure([1.0, 2.0, 3.0, 4.0], [False, True, False, True])
        assert [found[f"accuracy@{each:g}"] for each in (0.25, 0.5, 0.75, 0.9)] == pytest.approx([1, 0.5, 2 / 3, 0.5])

    @pytest.mark.parametrize("label", [True, False])
    def test_of_one_class_what_needs_two_is_undefined(self, label: bool) -> None:
        found = measure([1.0, 2.0, 3.0], [label] * 3)
        assert (found["auroc"], found["aucpr"], found["prr"]) == (None, None, None)
        assert found["aurc"] == float(label)

    @pytest.mark.parametrize(
        ("values", "wrong"),
        [([], []), ([1.0], [True, False]), ([math.nan, 1.0], [True, False]), ([math.inf, 1.0], [True, False])],
    )
    def test_what_is_no_score_is_refused(self, values: list[float], wrong: list[bool]) -> None:
        with pytest.raises(InputError, match="scor"):
            measure(values, wrong)

    def test_labels_that_are_not_true_or_false_are_refused(self) -> None:
        with pytest.raises(InputError, match="labels"):
            measure([1.0, 2.0], [0, 1])


class TestBootstrap:
    def scores(self, n: int = 60) -> tuple[dict[str, np.ndarray], np.ndarray]:
        random = np.random.default_rng(3)
        wrong = random.random(n) < 0.6
        good = wrong + random.normal(size=n)
        return {"good": good, "ties": np.round(good), "noise": random.normal(size=n)}, wrong

    def test_a_resample_by_counts_is_the_resample_by_rows(self) -> None:
        from hallucination_guard.evaluation.metrics import _Ranked

        scores, wrong = self.scores()
        random = np.random.default_rng(0)
        for values in scores.values():
            rows = random.integers(0, len(wrong), size=(20, len(wrong)))
            counts = np.stack([np.bincount(each, minlength=len(wrong)) for each in rows])
            found = _Ranked(values, wrong).metrics(counts)
            for at, each in enumerate(rows):
                expected = measure(values[each], wrong[each])
                assert {name: found[name][at] for name in METRICS} == pytest.approx(expected)

    def test_intervals_hold_the_value_and_are_repeatable(self) -> None:
        scores, wrong = self.scores()
        one, other = (bootstrap(scores, wrong, resamples=1000, seed=1) for _ in range(2))
        assert one == other
        for found in one.scores.values():
            auroc = found["auroc"]
            assert auroc.low is not None and auroc.high is not None and auroc.value is not None
            assert auroc.low <= auroc.value <= auroc.high

    def test_the_interval_of_auroc_is_as_wide_as_theory_says(self) -> None:
        scores, wrong = self.scores(400)
        auroc = bootstrap(scores, wrong, resamples=2000).scores["good"]["auroc"]
        assert auroc.value is not None and auroc.low is not None and auroc.high is not None
        a, m, n = auroc.value, int(wrong.sum()), int((~wrong).sum())
        q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
        error = math.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (m * n))  # Hanley–McNeil
        assert auroc.high - auroc.low == pytest.approx(2 * 1.96 * error, rel=0.2)

    def test_differences_are_paired(self) -> None:
        scores, wrong = self.scores(400)
        found = bootstrap({**scores, "twin": scores["good"] * 3}, wrong, reference="good", resamples=1000)
        assert found.reference == "good"
        twin = found.differences["twin"]["auroc"]
        assert (twin.value, twin.low, twin.high) == (0.0, 0.0, 0.0)
        noise = found.differences["noise"]["auroc"]
        assert noise.high is not None and noise.high < 0

    def test_the_reference_is_the_best_by_default(self) -> None:
        assert bootstrap(*self.scores(), resamples=1000).reference in ("good", "ties")

    def test_of_one_class_there_is_no_interval(self) -> None:
        found = bootstrap({"a": [1.0, 2.0, 3.0]}, [True] * 3, resamples=1000)
        assert found.scores["a"]["auroc"].value is None
        assert found.scores["a"]["auroc"].low is None
        assert found.one_class == 1000

    def test_where_many_resamples_have_one_class_there_is_a_value_but_no_interval(self) -> None:
        auroc = bootstrap({"a": [1.0, 2.0, 3.0]}, [True, False, True], resamples=1000).scores["a"]["auroc"]
        assert auroc.value == 0.5
        assert auroc.low is None

    def test_an_unknown_reference_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="'c'"):
            bootstrap({"a": [1.0, 2.0]}, [True, False], reference="c")


class TestCurves:
    @given(BOTH)
    def test_the_mean_of_the_risk_is_aurc(self, rows: list[tuple[int, bool]]) -> None:
        values, wrong = split(rows)
        coverage, risk = risk_coverage(values, wrong)
        assert coverage[-1] == 1.0
        assert risk[-1] == pytest.approx(sum(wrong) / len(wrong))
        assert risk.mean() == pytest.approx(measure(values, wrong)["aurc"])

    @given(BOTH)
    def test_roc_is_that_of_scikit_learn(self, rows: list[tuple[int, bool]]) -> None:
        values, wrong = split(rows)
        x, y = roc(values, wrong)
        their_x, their_y, _ = roc_curve(wrong, values, drop_intermediate=False)
        assert list(x) == pytest.approx(list(their_x))
        assert list(y) == pytest.approx(list(their_y))


class TestConfidences:
    def test_brier_is_that_of_scikit_learn(self) -> None:
        wrong = np.array([True, False, False, True])
        confidence = np.array([0.1, 0.8, 0.6, 0.4])
        assert brier(confidence, wrong) == pytest.approx(brier_score_loss(~wrong, confidence))

    def test_ece_is_the_mean_gap_of_the_bins(self) -> None:
        wrong = np.array([True, False, False, False])
        confidence = np.array([0.62, 0.64, 0.95, 1.0])
        assert [each.count for each in reliability(confidence, wrong)] == [2, 2]
        assert calibration_error(confidence, wrong) == pytest.approx((2 * (0.63 - 0.5) + 2 * (1 - 0.975)) / 4)

    def test_a_sure_and_right_confidence_has_no_error(self) -> None:
        wrong = np.array([True, False])
        assert calibration_error(np.array([0.0, 1.0]), wrong) == brier(np.array([0.0, 1.0]), wrong) == 0.0

    def test_platt_finds_a_logistic_truth(self) -> None:
        random = np.random.default_rng(0)
        logs = random.normal(size=3000)
        truth = 1 / (1 + np.exp(1.5 * logs))
        found = confidences(np.exp(logs), random.random(3000) > truth)
        assert np.abs(found - truth).mean() < 0.02

    def test_no_answer_is_fitted_on_its_own_label(self) -> None:
        random = np.random.default_rng(1)
        values, wrong = random.normal(size=200), random.random(200) < 0.5
        # Who had seen the labels would do better than 1/4, which is what noise is worth.
        assert brier(confidences(values, wrong), wrong) > 0.24

    def test_too_few_of_one_label_are_refused(self) -> None:
        with pytest.raises(InputError, match="folds"):
            confidences([1.0, 2.0, 3.0], [True, False, False])

    def test_what_is_no_probability_is_refused(self) -> None:
        with pytest.raises(InputError, match="confidence"):
            brier(np.array([1.2, 0.0]), [True, False])
