"""Forecasts: against what certificates then do, against closed forms, and that they promise nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from hallucination_guard.calibration import Infeasible, Labelled, Needed, advise, calibrate
from hallucination_guard.calibration.certificate import Drafts, certify, split
from hallucination_guard.calibration.forecast import FEASIBLE, UP_TO, Likely, with_needed
from hallucination_guard.calibration.population import Ranked, Resampled
from hallucination_guard.calibration.ranking import auroc
from hallucination_guard.errors import CalibrationError, ConfigurationError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions


def rows(n: int, seed: int = 0, d: float = 1.4657, base: float = 0.4) -> list[Labelled]:
    """Binormal: AUROC .85 with 40 % wrong by default; scores are made positive."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < base
    scores = np.exp(rng.normal(size=n) + d * wrong)
    settings: dict[str, Any] = {
        "judge": "made up",
        "length": 5,
        "model": ScriptedModel("x").identity,
        "scorer": ScriptedScorer(1.0).identity,
        "conditions": Conditions.of(ScriptedModel("x").generate("Who?")),
    }
    return [
        Labelled(id=f"q{seed}-{at}", correct=not bad, scores={"hybridgrad": float(score)}, **settings)
        for at, (score, bad) in enumerate(zip(scores, wrong, strict=True))
    ]


def possible(alpha: float, d: float = 1.4657, base: float = 0.4) -> float:
    """The oracle's coverage in closed form."""
    at = np.linspace(-6, 8, 20_001)
    bad = base * norm.cdf(at - d)
    covered = bad + (1 - base) * norm.cdf(at)
    return float(covered[bad <= alpha * covered].max(initial=0.0))


# ---------------------------------------------------------------------------------------------- the population


def test_auroc_is_the_usual_one():
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 5, 100), rng.random(100) < 0.4
    assert auroc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))


def test_a_population_is_fitted_to_ranks_alone():
    rng = np.random.default_rng(1)
    scores = rng.random(200)
    wrong = rng.random(200) < scores
    one, other = Ranked.of(scores, wrong), Ranked.of(np.exp(5 * scores), wrong)
    np.testing.assert_array_equal(one.weights, other.weights)


def test_its_oracle_is_that_of_the_truth():
    rng = np.random.default_rng(2)
    wrong = rng.random(20_000) < 0.4
    population = Ranked.of(rng.normal(size=20_000) + 1.4657 * wrong, wrong)
    for alpha in (0.1, 0.2, 0.3):
        assert population.possible(alpha) == pytest.approx(possible(alpha), abs=0.02)


def test_what_it_draws_is_as_often_wrong_and_as_often_unscorable():
    rng = np.random.default_rng(3)
    scores = rng.random(400)
    wrong = rng.random(400) < scores**2
    drawn = Ranked.of(scores, wrong, scored=0.5).draw(20_000, rng)
    assert drawn.questions == 20_000 and len(drawn.begins) == pytest.approx(10_000, abs=400)
    assert drawn.wrong.mean() == pytest.approx(wrong.mean(), abs=0.02)


def test_labels_that_are_parted_leave_finite_weights():
    population = Ranked.of(np.arange(60.0), np.arange(60) >= 30)
    assert np.isfinite(population.weights).all() and 0.4 < population.possible(0.05) < 0.6


def test_sequences_are_drawn_as_they_are():
    sequences = [[(1.0, False), (0.5, True)], [(2.0, True)], [(None, False)]]
    population = Resampled.of(sequences)
    assert population.possible(0.5) == pytest.approx(2 / 3)
    drawn = population.draw(3000, np.random.default_rng(0))
    assert drawn.questions == 3000
    answered, wrong = drawn.at(np.array([0.4, 0.7, 1.5, 2.5]))
    assert answered / 3000 == pytest.approx(np.array([0, 1, 1, 2]) / 3, abs=0.04)
    assert wrong / 3000 == pytest.approx(np.array([0, 0, 1, 1]) / 3, abs=0.04)


# -------------------------------------------------------------------------------------------------- the advice


@pytest.fixture(scope="module")
def advice() -> Any:
    return advise(rows(400), alphas=[0.3, 0.1])


def test_alphas_stand_in_order_with_what_was_seen(advice):
    assert [each.alpha for each in advice] == [0.1, 0.3]
    assert {each.labels for each in advice} == {400} and advice[0].auroc == pytest.approx(0.85, abs=0.05)


def test_more_risk_never_covers_less(advice):
    strict, lax = advice
    assert strict.possible.expected <= lax.possible.expected and strict.coverage.expected <= lax.coverage.expected


def test_the_oracle_is_in_its_interval(advice):
    for each in advice:
        assert each.possible.low - 0.05 <= possible(each.alpha) <= each.possible.high + 0.05


def test_the_forecast_is_what_certificates_then_cover(advice):
    """Fresh sets of as many labels, certified: the mean coverage lies near what was said."""
    for each in advice:
        found = []
        for seed in range(1, 31):
            answers = rows(each.labels, seed)
            pairs = {row.id: [(row.scores["hybridgrad"], row.correct)] for row in answers}
            fit, test = split(pairs, share=0.2)
            parts = (Drafts.of(pairs[id] for id in sorted(part)) for part in (fit, test))
            [one] = certify(*parts, alphas=[each.alpha], score="s", date="2026-01-01")
            found.append(0.0 if isinstance(one, Infeasible) else one.coverage)
        assert each.coverage.expected == pytest.approx(np.mean(found), abs=0.15)


def test_nine_tenths_take_more_labels_than_half(advice):
    for each in advice:
        assert (each.to_half.expected or UP_TO) <= (each.to_most.expected or UP_TO)


def test_few_labels_are_enough_to_ask():
    [each] = advise(rows(20), alphas=[0.3])
    assert each.labels == 20 and each.possible.low < each.possible.high
    with pytest.raises(CalibrationError, match="cannot be calibrated on"):
        advise(rows(19), alphas=[0.3])


@pytest.mark.parametrize("alphas", [[], [0.0], [1.0], [math.nan], [True]])
def test_an_odd_alpha_is_refused(alphas):
    with pytest.raises(ConfigurationError):
        advise(rows(30), alphas=alphas)


def test_the_same_answers_get_the_same_forecast():
    one, other = (with_needed(infeasible(0.3), population(200), fused=False, seed=3) for _ in range(2))
    assert one == other


def test_sequences_of_attempts_get_advice_too():
    first = [replace(each, policy="p") for each in rows(60)]
    again = [replace(each, attempt=2, id=one.id, policy="p") for one, each in zip(first, rows(60, 1), strict=True)]
    [each] = advise([*first, *again], alphas=[0.4])
    assert each.labels == 60


# ------------------------------------------------------------------------------------ infeasible becomes advice


def infeasible(alpha: float, delta: float = 0.1) -> Infeasible:
    return Infeasible(alpha=alpha, delta=delta, score="s", nearest=0.3, n=80)


def population(n: int = 5000, d: float = 1.4657) -> Ranked:
    rng = np.random.default_rng(5)
    wrong = rng.random(n) < 0.4
    return Ranked.of(rng.normal(size=n) + d * wrong, wrong)


def test_what_is_infeasible_is_told_how_many_labels_it_takes():
    """With so many, four sets in five give a certificate."""
    needed = with_needed(infeasible(0.2), population(), fused=False).needed
    assert needed is not None and needed.expected is not None
    rng, feasible = np.random.default_rng(6), 0
    cut = round(0.2 * needed.expected)
    for _ in range(100):
        wrong = rng.random(needed.expected) < 0.4
        pairs = [
            [(float(score), not bad)]
            for score, bad in zip(rng.normal(size=len(wrong)) + 1.4657 * wrong, wrong, strict=True)
        ]
        [found] = certify(Drafts.of(pairs[:cut]), Drafts.of(pairs[cut:]), alphas=[0.2], score="s")
        feasible += not isinstance(found, Infeasible)
    assert feasible / 100 == pytest.approx(FEASIBLE, abs=0.2)


def test_a_useless_score_is_told_that_no_number_will_do():
    needed = with_needed(infeasible(0.05), population(d=0.0), fused=False)
    assert needed.needed == Needed(up_to=UP_TO)
    assert needed.in_words().endswith("no number of labels up to 12,800 is expected to make it feasible")


def test_calibrate_says_it_and_keeps_it_in_the_file():
    found = calibrate(rows(60), alphas=[0.1]).infeasible[0]
    assert found.needed is not None and found.needed.up_to == UP_TO
    assert "labels" in found.in_words()
    assert Infeasible.model_validate_json(found.model_dump_json()) == found


def test_an_infeasible_of_an_old_file_still_speaks():
    old = Infeasible(alpha=0.1, delta=0.1, score="s", policy=None, nearest=0.2, n=80)
    assert old.needed is None and old.in_words().endswith("the smallest that looks feasible is 0.2")


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (900, "expected to become feasible: with about 900 labels (60 to more than 12,800)"),
        (
            70,
            "about 70 labels (60 to more than 12,800) are expected to do, so this draw was unlucky: label new "
            "questions",
        ),
    ],
)
def test_an_unlucky_draw_is_not_told_to_label_less(expected, words):
    needed = Needed(expected=expected, fewest=60, up_to=UP_TO)
    assert infeasible(0.1).model_copy(update={"needed": needed}).in_words().endswith(f"0.3; {words}")


def test_numbers_out_of_order_are_refused():
    with pytest.raises(ValidationError, match="cannot be"):
        Needed(expected=100, fewest=200, most=300, up_to=1000)
    with pytest.raises(ValidationError, match="cannot be"):
        Needed(expected=None, fewest=100, most=200, up_to=1000)
    with pytest.raises(ValidationError, match="does not lie"):
        Likely(expected=0.5, low=0.6, high=0.7)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (Needed(expected=1200, fewest=500, most=9000, up_to=12_800), "about 1,200 labels (500 to 9,000)"),
        (Needed(expected=1200, fewest=500, up_to=12_800), "about 1,200 labels (500 to more than 12,800)"),
        (Needed(fewest=9000, up_to=12_800), "more than 12,800 labels, with luck 9,000"),
    ],
)
def test_it_says_so_in_words(needed, words):
    assert needed.in_words() == words
