"""Certificates against theory: exact binomial tests, an oracle, and what they promise when drawn many times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control import BinaryClassificationController, FWERFixedSequenceTesting, precision
from pydantic import ValidationError
from scipy.stats import beta, binom

from hallucination_guard.calibration import Certificate, Infeasible
from hallucination_guard.calibration.certificate import (
    FIT_SHARE,
    Drafts,
    certify,
    drafts_hash,
    path,
    policy_hash,
    split,
    upper_bound,
    walk,
)
from hallucination_guard.errors import ConfigurationError
from hallucination_guard_policies import AbstainBelow, RetrieveBelow, RetryBelow, load_policy


def singles(scores: Any, wrong: Any) -> Drafts:
    return Drafts.of([(float(score), not bad)] for score, bad in zip(scores, wrong, strict=True))


def drawn(n: int, seed: int, risk: Any = lambda s: s) -> tuple[Drafts, Drafts]:
    """Uniform scores; fit and test part."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    wrong = rng.random(n) < risk(scores)
    cut = round(FIT_SHARE * n)
    return singles(scores[:cut], wrong[:cut]), singles(scores[cut:], wrong[cut:])


def certified(fit: Drafts, test: Drafts, alphas: Any = (0.3,), delta: float = 0.1) -> Any:
    return certify(fit, test, alphas=alphas, delta=delta, score="s", date="2026-01-01")


# ---------------------------------------------------------------------------------------------- one sequence


def first_passing(sequence: list[tuple[float | None, bool]], threshold: float) -> bool | None:
    """The rule in words: the label of the first attempt whose score is at most the threshold."""
    return next((right for score, right in sequence if score is not None and score <= threshold), None)


sequences = st.lists(
    st.lists(st.tuples(st.none() | st.integers(0, 6).map(float), st.booleans()), min_size=1, max_size=4), max_size=12
)


@given(sequences)
def test_a_threshold_lets_the_first_attempt_through_that_passes_it(given_):
    grid = np.arange(-1.0, 8.0, 0.5)
    answered, wrong = Drafts.of(given_).at(grid)
    for at, threshold in enumerate(grid):
        labels = [first_passing(sequence, threshold) for sequence in given_]
        assert (answered[at], wrong[at]) == (sum(each is not None for each in labels), labels.count(False))


def test_an_attempt_without_a_score_never_passes():
    answered, _ = Drafts.of([[(None, True)]]).at(np.array([1e300]))
    assert answered[0] == 0


# -------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("errors", "answered"), [(0, 10), (3, 40), (39, 40), (40, 40), (120, 700)])
@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_the_bound_is_the_largest_risk_that_the_exact_test_does_not_refute(errors, answered, delta):
    bound = upper_bound(errors, answered, delta=delta)
    assert bound == 1.0 if errors == answered else binom.cdf(errors, answered, bound) == pytest.approx(delta)


@pytest.mark.parametrize(("alpha", "least"), [(0.2, 11), (0.1, 22), (0.05, 45), (0.01, 230)])
def test_without_errors_a_certificate_needs_as_many_answers_as_the_closed_form_says(alpha, least):
    """(1 − α)^n ≤ δ."""
    assert math.ceil(math.log(0.1) / math.log(1 - alpha)) == least
    for n, feasible in ((least - 1, False), (least, True)):
        test = singles(np.linspace(0, 1, n), np.zeros(n))
        found = certified(singles([2.0] * 5, [0] * 5), test, alphas=[alpha])[0]
        assert isinstance(found, Certificate) is feasible


@pytest.mark.filterwarnings("ignore:Fixed sequence testing requires a monotonic risk")  # it finds less, not wrongly
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.2, 0.35])
def test_it_is_what_mapies_fixed_sequence_finds(seed, alpha):
    """An independent implementation of Learn-then-Test on the same grid, precision being one minus our risk.

    MAPIE gets the number of errors back as ceil(n · rate), and where that product is rounded upwards it counts one
    error too many: its p-value is then larger, and there is nothing to compare.
    """
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 1024, 500) / 1024  # so that 1 − score is exact
    wrong = rng.random(500) < scores
    grid = np.arange(128, 1024, 32) / 1024
    controller = BinaryClassificationController(
        predict_function=lambda x: np.column_stack([x[:, 0], 1 - x[:, 0]]),
        risk=precision,
        target_level=1 - alpha,
        confidence_level=0.9,
        list_predict_params=1 - grid,
        fwer_method=FWERFixedSequenceTesting(n_starts=1),
    )
    controller.calibrate(scores[:, None], (~wrong).astype(int))
    answered, errors = singles(scores, wrong).at(grid)
    ours = binom.cdf(errors, answered, alpha)
    theirs = controller.p_values.ravel()
    exact = np.ceil(answered * (1 - (answered - errors) / answered)) == errors
    assert exact.sum() > 10
    np.testing.assert_allclose(theirs[exact], ours[exact], rtol=1e-9)
    assert (theirs >= ours * (1 - 1e-9)).all()
    for p_values, found in ((ours, errors), (theirs, None)):
        rejected = FWERFixedSequenceTesting(n_starts=1).run(p_values, 0.1).tolist()
        if found is not None:
            last = walk(answered, found, begin=0, alpha=alpha, delta=0.1)
            assert rejected == list(range(0 if last is None else last + 1))
        else:
            valid = np.sort(1 - np.asarray(controller.valid_predict_params, float))
            assert grid[rejected].tolist() == pytest.approx(valid.tolist())


def test_the_certificate_says_what_its_threshold_did():
    fit, test = drawn(1000, 0)
    found = certified(fit, test)[0]
    passed = test.begins <= found.threshold
    assert (found.n, found.answered, found.errors) == (800, passed.sum(), test.wrong[passed].sum())
    assert found.bound == pytest.approx(beta.ppf(0.9, found.errors + 1, found.answered - found.errors))


def test_the_bound_never_exceeds_alpha():
    for seed in range(20):
        for found in certified(*drawn(400, seed), alphas=(0.2, 0.3, 0.5)):
            assert isinstance(found, Infeasible) or found.bound <= found.alpha


def test_the_last_step_is_the_last_that_passes():
    answered, wrong = np.array([50, 60, 70, 80]), np.array([0, 30, 0, 0])
    assert walk(answered, wrong, begin=0, alpha=0.2, delta=0.1) == 0
    assert walk(answered, wrong, begin=2, alpha=0.2, delta=0.1) == 3
    assert walk(answered, wrong, begin=1, alpha=0.2, delta=0.1) is None


def test_the_grid_comes_from_the_fit_part_alone():
    """The test part's scores and labels must have no say in where the walk begins."""
    fit, _ = drawn(500, 0)
    first = path(fit, questions=400, delta=0.1)
    second = path(fit, questions=400, delta=0.1)
    assert first[1] == second[1] and np.array_equal(first[0], second[0])
    found = [certified(fit, drawn(500, seed)[1])[0].threshold for seed in (1, 2)]
    assert all(np.isin(each, first[0]) for each in found)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([60, 200, 800]))
def test_thresholds_are_nested(seed, n):
    found = certified(*drawn(n, seed), alphas=(0.1, 0.2, 0.3, 0.4, 0.6))
    thresholds = [-math.inf if isinstance(each, Infeasible) else each.threshold for each in found]
    assert thresholds == sorted(thresholds)


# ------------------------------------------------------------------------------------------------- the promise


def exceeding(risk: Any, truth: Any, alpha: float, *, draws: int = 300, n: int = 300, delta: float = 0.1) -> float:
    """The share of draws whose certified threshold has a true risk above α."""
    broken = 0
    for seed in range(draws):
        found = certified(*drawn(n, seed, risk), alphas=[alpha], delta=delta)[0]
        broken += isinstance(found, Certificate) and truth(min(max(found.threshold, 0.0), 1.0)) > alpha
    return broken / draws


ALLOWED = 0.1 + 3 * math.sqrt(0.1 * 0.9 / 300)


@pytest.mark.parametrize("alpha", [0.2, 0.35])
def test_it_breaks_its_word_no_more_often_than_delta(alpha):
    assert exceeding(lambda s: s, lambda t: t / 2, alpha) <= ALLOWED


def test_nor_where_the_risk_is_not_monotone():
    """The lowest scores are the worst: risk .5 up to .2, then .1, and .8 above .7."""
    shape = lambda s: np.where(s < 0.2, 0.5, np.where(s < 0.7, 0.1, 0.8))  # noqa: E731
    edges = np.linspace(1e-6, 1, 20_001)
    mean = np.cumsum(shape(edges)) / np.arange(1, len(edges) + 1)
    assert exceeding(shape, lambda t: np.interp(t, edges, mean), 0.25) <= ALLOWED


def test_the_test_of_the_promise_can_fail():
    """Choosing the threshold by its error on the same answers, as is often done, breaks the word far more often."""
    broken = 0
    for seed in range(300):
        _, test = drawn(300, seed)
        grid = np.sort(test.begins)
        answered, wrong = test.at(grid)
        fine = np.flatnonzero(wrong / answered <= 0.3)
        broken += len(fine) > 0 and grid[fine[-1]] / 2 > 0.3
    assert broken / 300 > ALLOWED


def test_where_scores_know_nothing_nothing_is_certified_below_the_base_rate():
    assert exceeding(lambda s: np.full_like(s, 0.5), lambda t: 0.5, 0.4) <= ALLOWED


def test_a_whole_sequence_keeps_the_promise_where_a_single_draft_would_not():
    """Three looks for a score that says nothing: each look lets more through, and all of it counts."""
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(200):
        tries = [[(float(rng.random()), bool(rng.random() < 0.6)) for _ in range(3)] for _ in range(200)]
        found = certified(Drafts.of(tries[:40]), Drafts.of(tries[40:]), alphas=[0.35])[0]
        broken += isinstance(found, Certificate)  # the true error is .4 at every threshold
    assert broken / 200 <= 0.1 + 3 * math.sqrt(0.09 / 200)


@pytest.mark.parametrize(
    ("shape", "alpha"),
    [
        ("linear", 0.3),
        ("linear", 0.4),
        ("square", 0.1),
        ("square", 0.2),
        ("logistic", 0.1),
        ("logistic", 0.2),
        ("logistic", 0.4),
    ],
)
def test_most_of_the_best_possible_coverage_is_certified(shape, alpha):
    """At n = 1,000, in the median, against the best threshold of uniform scores with a known risk."""
    risk = {"linear": lambda s: s, "square": lambda s: s**2, "logistic": lambda s: 1 / (1 + np.exp(-12 * (s - 0.5)))}
    even = (np.arange(20_000) + 0.5) / 20_000
    mean = np.cumsum(risk[shape](even)) / np.arange(1, len(even) + 1)
    best = even[mean <= alpha].max()
    found = [certified(*drawn(1000, seed, risk[shape]), alphas=[alpha])[0] for seed in range(40)]
    covered = [0.0 if isinstance(each, Infeasible) else min(each.threshold, 1.0) for each in found]
    assert np.median(covered) >= 0.85 * best


# ------------------------------------------------------------------------------------------------- infeasible


def test_what_can_not_be_certified_is_infeasible_with_the_nearest_that_looks_feasible():
    fit, test = drawn(600, 1, lambda s: np.full_like(s, 0.5))
    found = certified(fit, test, alphas=[0.1])[0]
    assert isinstance(found, Infeasible) and 0.4 < found.nearest < 0.8
    assert certified(fit, test, alphas=[found.nearest])[0].alpha == found.nearest
    assert isinstance(certified(fit, test, alphas=[found.nearest - 0.01])[0], Infeasible)


def test_it_says_so_in_words():
    words = Infeasible(alpha=0.1, delta=0.1, score="semgrad", nearest=0.23, n=80).in_words()
    assert words == "alpha 0.1 is INFEASIBLE on 80 answers with 'semgrad'; the smallest that looks feasible is 0.23"


def test_without_scores_there_is_no_certificate_and_no_hint():
    nothing = Drafts.of([[(None, True)]] * 30)
    assert certified(nothing, nothing)[0].nearest is None


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, math.inf, True, "0.1"])
def test_an_alpha_or_delta_out_of_range_is_refused(value):
    fit, test = drawn(100, 0)
    with pytest.raises((ConfigurationError, TypeError)):
        certified(fit, test, alphas=[value])
    with pytest.raises(ConfigurationError):
        certified(fit, test, delta=value)


# ------------------------------------------------------------------------------------------------- the object


def test_it_survives_its_file():
    found = certified(*drawn(1000, 0))[0]
    assert Certificate.model_validate_json(found.model_dump_json()) == found


def test_a_changed_certificate_is_refused():
    plain = certified(*drawn(1000, 0))[0].model_dump()
    with pytest.raises(ValidationError, match="its content has the hash"):
        Certificate(**{**plain, "threshold": plain["threshold"] * 2})


def test_the_same_certificate_has_the_same_id():
    first, second = (certified(*drawn(1000, 0))[0] for _ in range(2))
    assert first.id == second.id and len(first.id) == 16


def test_the_split_knows_nothing_but_the_ids():
    ids = [f"q{at}" for at in range(200)]
    assert split(ids, share=0.2) == split(reversed(ids), share=0.2)
    fit, test = split(ids, share=0.2)
    assert (len(fit), len(test), fit & test) == (40, 160, frozenset())
    assert split(ids, share=0.2, seed=1) != (fit, test)


def search(query: str) -> list[str]:
    return [query]


def test_a_policys_drafts_do_not_depend_on_its_threshold():
    one, other = RetryBelow(confidence=1.0, times=2), RetryBelow(max_risk=0.1, times=2)
    assert drafts_hash(one) == drafts_hash(other) and policy_hash(one) != policy_hash(other)


def test_nor_on_the_name_of_the_document():
    rules = [{"retry": {"below": {"confidence": 1}}}]
    one, other = (load_policy({"id": name, "version": 1, "rules": rules}) for name in ("a", "b"))
    assert drafts_hash(one) == drafts_hash(other)


@pytest.mark.parametrize(
    "other",
    [
        RetryBelow(max_risk=0.1, times=3),
        RetryBelow(max_risk=0.1, times=2, temperature=1.0),
        RetryBelow(max_risk=0.1, times=2) | AbstainBelow(max_risk=0.1),
        RetrieveBelow(max_risk=0.1, times=2, retriever=search),
    ],
)
def test_but_they_do_on_everything_else(other):
    assert drafts_hash(RetryBelow(max_risk=0.1, times=2)) != drafts_hash(other)


@pytest.mark.parametrize(
    "change",
    [{"errors": 51}, {"answered": 101}, {"bound": 0.4}, {"errors": 20, "bound": 0.1}],
    ids=["more wrong than answered", "more answered than tested", "bound above alpha", "bound below what was seen"],
)
def test_a_certificate_that_does_not_add_up_is_refused(change):
    plain = {"alpha": 0.3, "delta": 0.1, "score": "s", "threshold": 1.0, "n": 100, "fitted": 20, "date": "2026-01-01"}
    plain |= {"answered": 50, "errors": 5, "bound": 0.2}
    assert Certificate(**plain).errors == 5
    with pytest.raises(ValidationError, match=r"cannot be|do not show"):
        Certificate(**{**plain, **change})
