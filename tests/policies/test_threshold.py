"""A threshold: certain enough by confidence, or by one raw score; blind where there is nothing to compare."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import LOWER_IS_LESS_CERTAIN, Score, ScorerIdentity, Verdict
from hallucination_guard_policies import Threshold

SCORER = ScorerIdentity(name="hybridgrad", version="1")


def verdict(confidence: float | None = None, **scores: float) -> Verdict:
    return Verdict(
        score=Score(status="scored", scorer=SCORER, scores=scores or {"hybridgrad": 1e-4}), confidence=confidence
    )


@pytest.mark.parametrize(("confidence", "passed"), [(0.69, False), (0.7, True), (0.71, True), (0.0, False), (1, True)])
def test_a_confidence_passes_from_the_threshold_up(confidence, passed):
    assert Threshold(confidence=0.7).read(verdict(confidence)).passed is passed


@pytest.mark.parametrize(("value", "passed"), [(3.4e-4, True), (3.5e-4, True), (3.6e-4, False), (-1.0, True)])
def test_a_raw_score_passes_up_to_the_limit(value, passed):
    assert Threshold(score="semgrad", limit=3.5e-4).read(verdict(semgrad=value)).passed is passed


def test_a_confidence_threshold_is_blind_to_an_uncalibrated_verdict():
    assert Threshold(confidence=1e-9).read(verdict(None)).blind == "uncalibrated"


def test_what_is_uncalibrated_is_told_how_to_mend():
    assert "give the guard a calibration" in Threshold(confidence=0.7).read(verdict(None)).words


def test_a_score_that_was_not_measured_is_unknown():
    reading = Threshold(score="paragrad", limit=math.pi).read(verdict(semgrad=0.0, nll=0.0))
    assert (reading.passed, reading.blind) == (False, "unknown_score")


def test_an_unknown_score_is_told_with_those_that_are_known():
    reading = Threshold(score="paragrad", limit=1.0).read(verdict(semgrad=0.0, nll=0.0))
    assert reading.words == "there is no score 'paragrad', only nll, semgrad"


@pytest.mark.parametrize(
    ("threshold", "given_", "words"),
    [
        ({"confidence": 0.7}, verdict(0.82), "confidence 0.82 ≥ 0.70"),
        ({"confidence": 0.7}, verdict(0.5), "confidence 0.50 < 0.70"),
        ({"confidence": 0.7}, verdict(0.7), "confidence 0.70 ≥ 0.70"),
        ({"confidence": 0.7}, verdict(0.69999), "confidence 0.69999 < 0.70000"),
        ({"confidence": 0.755}, verdict(0.9), "confidence 0.900 ≥ 0.755"),
        ({"score": "x", "limit": 3.5e-4}, verdict(x=1.23456e-4), "x 0.000123 ≤ 0.00035"),
        ({"score": "x", "limit": 3.5e-4}, verdict(x=4e-3), "x 0.004 > 0.00035"),
    ],
)
def test_the_words_hold_both_numbers_as_different_as_they_are(threshold, given_, words):
    assert Threshold(**threshold).read(given_).words == words


@given(st.floats(0, 1), st.floats(0, 1, exclude_min=True))
def test_the_words_never_contradict_their_comparison(value, limit):
    _, left, sign, right = Threshold(confidence=limit).read(verdict(value)).words.split()
    assert float(left) >= float(right) if sign == "≥" else float(left) < float(right)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"confidence": 0.5, "score": "x", "limit": 1.0},
        {"confidence": 0.5, "limit": 1.0},
        {"score": "x"},
        {"limit": 1.0},
    ],
)
def test_a_threshold_has_exactly_one_kind(arguments):
    with pytest.raises(PolicyError, match="either confidence, or score together with limit"):
        Threshold(**arguments)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 70, math.nan, math.inf, True, "0.7"])
def test_a_confidence_out_of_range_is_refused_with_its_value(value):
    with pytest.raises(PolicyError, match=rf"confidence is {value!r} \(give a finite number above 0 and at most 1"):
        Threshold(confidence=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, False, "1"])
def test_a_limit_that_is_no_finite_number_is_refused_with_its_value(value):
    with pytest.raises(PolicyError, match=rf"limit is {value!r} \(give a finite number"):
        Threshold(score="x", limit=value)


@pytest.mark.parametrize("name", ["", 3])
def test_a_score_without_a_name_is_refused(name):
    with pytest.raises(PolicyError, match="give the name of a score"):
        Threshold(score=name, limit=1.0)


@pytest.mark.parametrize("name", sorted(LOWER_IS_LESS_CERTAIN))
def test_a_score_that_falls_with_certainty_lost_is_refused(name):
    with pytest.raises(PolicyError, match=rf"score is '{name}', which falls .*give one that rises"):
        Threshold(score=name, limit=-3.0)


def test_only_a_confidence_threshold_needs_confidence():
    thresholds = (Threshold(confidence=0.5), Threshold(score="x", limit=1.0))
    assert [threshold.needs_confidence for threshold in thresholds] == [True, False]


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1))
def test_a_confidence_threshold_covers_what_fails_only_where_it_fails(mine, other, value):
    first, second = Threshold(confidence=mine), Threshold(confidence=other)
    assert not first.covers(second) or second.read(verdict(value)).passed or not first.read(verdict(value)).passed


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_a_score_threshold_covers_what_fails_only_where_it_fails(mine, other, value):
    first, second = Threshold(score="x", limit=mine), Threshold(score="x", limit=other)
    assert not first.covers(second) or second.read(verdict(x=value)).passed or not first.read(verdict(x=value)).passed


@pytest.mark.parametrize("other", [Threshold(score="y", limit=1.0), Threshold(confidence=0.1)])
def test_thresholds_on_different_numbers_do_not_cover_each_other(other):
    mine = Threshold(score="x", limit=1.0)
    assert not mine.covers(other) and not other.covers(mine)
