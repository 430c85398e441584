"""Parity: what is compared, what is tolerated, and how soon a pair that no longer fits is suspended."""

from __future__ import annotations

import random

import pytest

from hallucination_guard.server.upstream.parity import FLOOR, ParityWatch, distance, tolerance


def test_the_distance_is_the_mean_over_the_tokens_that_both_know() -> None:
    assert distance([-1.0, None, -2.5], [-1.5, -9.0, -2.5]) == pytest.approx(0.25)


def test_tokens_that_were_not_delivered_do_not_count() -> None:
    assert distance([-1.0, -7.0], [-1.0]) == 0.0


def test_an_answer_most_of_which_cannot_be_compared_has_no_distance() -> None:
    assert distance([-1.0, None, None], [-1.0, -1.0, -1.0]) is None
    assert distance([-1.0], [-1.0, -1.0, -1.0]) is None
    assert distance([-1.0, None], [-1.0, -1.0]) == 0.0


@pytest.mark.parametrize("theirs", [[], [None, None]])
def test_nothing_to_compare_is_no_distance_of_zero(theirs: list[float | None]) -> None:
    assert distance(theirs, [-1.0, -1.0]) is None


@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), -1e9])
def test_what_is_no_number_is_far_and_one_token_counts_for_one_nat_at_most(odd: float) -> None:
    assert distance([odd, -1.0], [-1.0, -1.0]) == 0.5


def test_the_tolerance_is_twice_the_probes_largest_and_never_below_rounding() -> None:
    assert tolerance([0.01, 0.03]) == 0.06
    assert tolerance([0.0, 1e-9]) == FLOOR


def test_four_answers_in_a_row_suspend_it_and_it_stays_suspended() -> None:
    watch = ParityWatch(0.1)
    for _ in range(3):
        watch.observe(0.2)
    assert watch.suspended == ""
    watch.observe(0.2)
    assert "4 answers 4" in watch.suspended
    for _ in range(1000):
        watch.observe(0.0)
    assert watch.suspended


def test_one_answer_in_a_hundred_beyond_it_is_no_alarm_and_one_in_three_is() -> None:
    seldom, often, rng = ParityWatch(0.1), ParityWatch(0.1), random.Random(0)
    for _ in range(20_000):
        seldom.observe(0.2 if rng.random() < 0.01 else 0.0)
    assert seldom.suspended == ""
    for _ in range(200):
        often.observe(0.2 if rng.random() < 1 / 3 else 0.0)
    assert often.suspended
