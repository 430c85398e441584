"""Several starts for one error budget: against the rule written out, and against worlds made to break it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from hallucination_guard.calibration import Certificate, Infeasible
from hallucination_guard.calibration.certificate import (
    METHOD,
    METHOD_SPREAD,
    Drafts,
    certify,
    course,
    design,
    walk,
)
from hallucination_guard.calibration.starts import SPREAD_FROM, Start, furthest, spread_over


def singles(scores: Any, wrong: Any) -> Drafts:
    scores = np.asarray(scores, float)
    return Drafts(
        begins=scores, ends=np.full(len(scores), math.inf), wrong=np.asarray(wrong, bool), questions=len(scores)
    )


def by_hand(answered: Any, wrong: Any, starts: Any, alpha: float, delta: float) -> int | None:
    """The rule in words: one hypothesis after the other, and the budget is handed on at the end of a whole piece."""
    found, budget = None, 0.0
    places = {each.at: each.share for each in starts}
    stopped = True
    for at in range(len(answered)):
        if at in places:
            budget = (0.0 if stopped else budget) + places[at] * delta
            stopped = False
        if stopped or at < starts[0].at:
            continue
        if answered[at] > 0 and binom.cdf(wrong[at], answered[at], alpha) <= budget + 1e-12:
            found = at
        else:
            stopped = True
    return found


counts = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), min_size=1, max_size=12)


@given(counts, st.sets(st.integers(0, 11), min_size=1, max_size=4), st.sampled_from([0.1, 0.3]))
def test_it_walks_as_the_rule_says(increments, places, alpha):
    steps = np.array([(k, min(e, k)) for k, e in increments])
    answered, wrong = np.cumsum(steps[:, 0]), np.cumsum(steps[:, 1])
    kept = sorted(at for at in places if at < len(answered)) or [0]
    starts = [Start(at=at, share=1 / len(kept)) for at in kept]
    assert furthest(answered, wrong, starts=starts, alpha=alpha, delta=0.2) == by_hand(
        answered, wrong, starts, alpha, 0.2
    )


@given(counts, st.integers(0, 11))
def test_with_one_start_it_is_the_fixed_sequence(increments, begin):
    steps = np.array([(k, min(e, k)) for k, e in increments])
    answered, wrong = np.cumsum(steps[:, 0]), np.cumsum(steps[:, 1])
    begin = min(begin, len(answered) - 1)
    passed = [k > 0 and binom.cdf(e, k, 0.3) <= 0.1 for k, e in zip(answered[begin:], wrong[begin:], strict=True)]
    expected = begin + (passed.index(False) if False in passed else len(passed)) - 1
    found = walk(answered, wrong, begin=begin, alpha=0.3, delta=0.1)
    assert found == (None if expected < begin else expected)


def test_a_start_that_fails_leaves_the_next_its_own_share_only():
    """22 right answers refute .1 at .1 and not at .05: the second start needs what the first would hand on."""
    starts = [Start(at=0, share=0.5), Start(at=1, share=0.5)]
    assert 0.05 < binom.cdf(0, 22, 0.1) < 0.1
    assert furthest(np.array([1, 22]), np.array([0, 0]), starts=starts, alpha=0.1, delta=0.1) is None
    assert binom.cdf(1, 46, 0.1) < 0.05 < binom.cdf(1, 40, 0.1) < 0.1
    handed_on = furthest(np.array([30, 40]), np.array([0, 1]), starts=starts, alpha=0.1, delta=0.1)
    assert handed_on == 1
    assert furthest(np.array([30, 40]), np.array([1, 1]), starts=starts, alpha=0.1, delta=0.1) is None


@pytest.mark.parametrize(("at", "share"), [(-1, 0.5), (0, 0.0), (0, 1.1), (0, math.nan)])
def test_an_odd_start_is_refused(at, share):
    with pytest.raises(ValueError, match="cannot be"):
        Start(at=at, share=share)


def test_fixed_starts_know_no_labels_and_spend_delta_once():
    scores = np.random.default_rng(0).random(60)
    one, other = (
        course(singles(scores, wrong), questions=600, delta=0.1, spread=True) for wrong in (np.zeros(60), scores > 0.2)
    )
    assert one[1] == other[1] and np.array_equal(one[0], other[0])
    assert sum(each.share for each in one[1]) == pytest.approx(1.0)
    answered = singles(scores, scores > 2).at(one[0])[0]
    assert [answered[each.at] for each in one[1]] == [3, 9]  # 5 and 15 % of sixty


def test_starts_on_one_place_are_one():
    assert spread_over(np.array([60, 60, 60]), questions=60) == (Start(at=0, share=1.0),)
    assert spread_over(np.array([], int), questions=60) == ()


# ------------------------------------------------------------------------------------------------- the promise


def false_steps(draws: int, *, delta: float) -> float:
    """Share of draws with a false step anywhere, in a world where every piece ends at a risk of α exactly.

    The starts keep α easily, so budgets are handed on; at the step after each the risk of all that is answered is α,
    the hardest that the hypothesis has.
    """
    rng = np.random.default_rng(1)
    alpha, k = 0.2, np.array([300, 400, 900, 1200, 2700, 3600])
    new = np.diff(k, prepend=0)
    rates = np.array([0.02, 0.74, 0.0, 160 / 300, 0.0, 480 / 900])
    true = np.cumsum(rates * new) / k
    starts = [Start(at=at, share=1 / 3) for at in (0, 2, 4)]
    broken = 0
    for _ in range(draws):
        wrong = np.cumsum(rng.binomial(new, rates))
        for end in range(1, len(k) + 1):  # what is certified counts, and so does a false step that is walked past
            kept = [each for each in starts if each.at < end]
            at = furthest(k[:end], wrong[:end], starts=kept, alpha=alpha, delta=delta)
            if at is not None and true[at] >= alpha - 1e-9:
                broken += 1
                break
    return broken / draws


def test_no_false_step_anywhere_more_often_than_delta():
    assert false_steps(1000, delta=0.1) <= 0.1 + 3 * math.sqrt(0.09 / 1000)


def exceeding(shape: Any, alpha: float, *, draws: int, n: int) -> float:
    even = (np.arange(50_000) + 0.5) / 50_000
    truth = np.cumsum(shape(even)) / np.arange(1, len(even) + 1)
    rng, broken = np.random.default_rng(2), 0
    share, spread = design(n, fused=False)
    cut = round(share * n)
    for _ in range(draws):
        scores = rng.random(n)
        wrong = rng.random(n) < shape(scores)
        parts = singles(scores[:cut], wrong[:cut]), singles(scores[cut:], wrong[cut:])
        [found] = certify(*parts, alphas=[alpha], score="s", date="2026-01-01", spread=spread)
        broken += isinstance(found, Certificate) and np.interp(min(max(found.threshold, 0), 1), even, truth) > alpha
    return broken / draws


@pytest.mark.parametrize(
    ("shape", "alpha"),
    [
        (lambda s: s, 0.2),
        (lambda s: np.where(s < 0.15, 0.5, np.where(s < 0.6, 0.05, 0.9)), 0.25),  # the lowest scores are bad ones
        (lambda s: np.full_like(s, 0.4), 0.35),  # shuffled labels
    ],
    ids=["rising", "not monotone", "shuffled"],
)
def test_certificates_from_fixed_starts_keep_their_word(shape, alpha):
    assert exceeding(shape, alpha, draws=150, n=650) <= 0.1 + 3 * math.sqrt(0.09 / 150)


def test_shuffled_labels_are_infeasible():
    rng = np.random.default_rng(3)
    scores, wrong = rng.random(800), rng.permutation(np.arange(800) < 320)
    [found] = certify(
        singles(scores[:40], wrong[:40]), singles(scores[40:], wrong[40:]), alphas=[0.2], score="s", spread=True
    )
    assert isinstance(found, Infeasible) and 0.3 < found.nearest < 0.7


def test_thresholds_of_several_alphas_are_nested():
    rng = np.random.default_rng(4)
    scores = rng.random(900)
    wrong = rng.random(900) < scores**2
    parts = singles(scores[:45], wrong[:45]), singles(scores[45:], wrong[45:])
    found = certify(*parts, alphas=[0.05, 0.1, 0.2, 0.3], score="s", spread=True)
    thresholds = [each.threshold for each in found if isinstance(each, Certificate)]
    assert len(thresholds) >= 3 and thresholds == sorted(thresholds)


# ------------------------------------------------------------------------------------------- which procedure


def test_the_certificate_remembers_which_procedure_it_was():
    rng = np.random.default_rng(5)
    scores = rng.random(1000)
    wrong = rng.random(1000) < scores**2
    parts = singles(scores[:50], wrong[:50]), singles(scores[50:], wrong[50:])
    fixed, one = (certify(*parts, alphas=[0.3], score="s", spread=each)[0] for each in (True, False))
    assert (fixed.method, one.method) == (METHOD_SPREAD, METHOD)


def test_a_certificate_of_an_old_file_keeps_its_id():
    """Written before there were several procedures."""
    plain = {"alpha": 0.3, "delta": 0.1, "score": "s", "threshold": 1.0, "n": 100, "fitted": 20, "date": "2026-01-01"}
    plain |= {"answered": 50, "errors": 5, "bound": 0.2, "method": "Learn-then-Test, fixed sequence, exact binomial"}
    assert Certificate(**plain, id="d6b5d8910b6ce37e").method == METHOD


def test_small_test_parts_and_fused_scores_have_one_start():
    assert design(631, fused=False)[1] is False and design(632, fused=False) == (0.05, True)
    assert 632 - round(0.05 * 632) == SPREAD_FROM
    assert design(5000, fused=True)[1] is False
    fit = singles(np.random.default_rng(6).random(40), np.arange(40) > 20)
    assert len(course(fit, questions=SPREAD_FROM - 1, delta=0.1, spread=True)[1]) == 1
    assert len(course(fit, questions=SPREAD_FROM, delta=0.1, spread=True)[1]) == 2


def test_without_scores_nothing_begins():
    nothing = Drafts.of([[(None, True)]] * 700)
    [found] = certify(nothing, nothing, alphas=[0.3], score="s", spread=True)
    assert isinstance(found, Infeasible) and found.nearest is None
