"""The fused score: the optimum of its loss, against scikit-learn; one number in, the same out of a file."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from hallucination_guard.calibration import Fusion, Labelled, fit_fusion
from hallucination_guard.calibration.fusion import cross_fitted, optimum
from hallucination_guard.errors import CalibrationError
from hallucination_guard.values import Conditions, ModelIdentity, ScorerIdentity

MODEL = ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t")
SCORER = ScorerIdentity(name="hybridgrad", version="1")
PLAIN = Conditions(frame="f", max_new_tokens=64, temperature=0.0, top_p=1.0, stop=(), endings=("stop",))


def answers(n: int, seed: int = 0, *, noise: tuple[float, ...] = (0.6, 1.0, 3.0)) -> list[Labelled]:
    """Three signals that each see the same doubt through noise of their own; the third hardly does."""
    rng = np.random.default_rng(seed)
    doubt = rng.normal(size=n)
    wrong = rng.random(n) < 1 / (1 + np.exp(-2 * doubt))
    names = ("paragrad", "mean_nll", "semgrad")
    logs = [doubt + spread * rng.normal(size=n) for spread in noise]
    return [
        Labelled(
            id=f"q{at}",
            correct=not wrong[at],
            judge="made up",
            scores={
                **{name: math.exp(log[at]) for name, log in zip(names, logs, strict=True)},
                "min_token_logprob": -math.exp(rng.normal()),
            },
            length=int(rng.integers(1, 30)),
            model=MODEL,
            scorer=SCORER,
            conditions=PLAIN,
        )
        for at in range(n)
    ]


def auroc(rows: list[Labelled], values: Any) -> float:
    return float(roc_auc_score([not each.correct for each in rows], values))


@pytest.mark.parametrize("c", [0.01, 0.1, 10.0])
def test_the_weights_are_scikit_learns_where_all_signals_rise_with_doubt(c):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 5))
    wrong = (rng.random(150) < 1 / (1 + np.exp(-x.sum(axis=1) + 1))).astype(float)
    weights, intercept = optimum(x, wrong, c=c)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, wrong)
    assert (theirs.coef_ > 0).all()
    np.testing.assert_allclose(weights, theirs.coef_[0], atol=1e-5)
    assert intercept == pytest.approx(theirs.intercept_[0], abs=1e-5)


def test_the_optimum_with_a_belief_is_that_of_a_general_solver():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(120, 3))
    wrong = (rng.random(120) < 1 / (1 + np.exp(-x[:, 0]))).astype(float)
    prior = np.array([0.2, 0.5, 0.0])
    weights, intercept = optimum(x, wrong, prior=prior, c=0.05)

    def loss(at):
        z = x @ at[:3] + at[3]
        return np.sum(np.logaddexp(0, z) - wrong * z) + 0.5 * np.sum((at[:3] - prior) ** 2) / 0.05

    bounds = [(0, None)] * 3 + [(None, None)]
    theirs = minimize(loss, np.zeros(4), method="SLSQP", bounds=bounds, options={"ftol": 1e-14}).x
    np.testing.assert_allclose([*weights, intercept], theirs, atol=1e-4)


def test_labels_move_a_belief_and_many_more_than_few():
    rng = np.random.default_rng(3)

    def away(n: int) -> float:
        x = rng.normal(size=(n, 2))
        wrong = (rng.random(n) < 1 / (1 + np.exp(-2 * x[:, 1]))).astype(float)
        weights, _ = optimum(x, wrong, prior=[0.5, 0.0])
        return float(weights[1])

    assert 0.0 < away(30) < 0.4 < 1.2 < away(3000) < 2.0


def test_without_a_word_from_the_labels_it_is_the_mean_of_what_is_believed_in():
    rows = answers(40)
    labels = [each.correct for each in rows]
    opposite = [replace(each, correct=not right) for each, right in zip(rows, labels, strict=True)]
    fusion = fit_fusion([*rows, *(replace(each, id=f"{each.id}'") for each in opposite)])
    named = dict(zip(fusion.signals, fusion.weights, strict=True))
    assert named["paragrad"] == pytest.approx(named["mean_nll"], abs=0.02)
    assert named["semgrad"] == pytest.approx(0.0, abs=0.02)


def test_no_signal_counts_against_another():
    """At the optimum the slope is nil where a weight is positive, and points below 0 where it is held."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 4))
    wrong = (rng.random(80) < 1 / (1 + np.exp(-x[:, 0] + 2 * x[:, 1]))).astype(float)
    weights, intercept = optimum(x, wrong, c=0.1)
    p = 1 / (1 + np.exp(-(x @ weights + intercept)))
    slope = x.T @ (p - wrong) + weights / 0.1
    assert weights.min() >= 0.0 and weights[0] > 0.0 == weights[1]
    assert np.abs(slope[weights > 0]).max() < 1e-4 and slope[weights == 0].min() > -1e-4
    assert abs(p.sum() - wrong.sum()) < 1e-4


def test_labels_that_a_signal_tells_apart_without_error_are_no_trouble():
    x = np.linspace(-1, 1, 60)[:, None] * np.ones(4)
    weights, _ = optimum(x, (x[:, 0] > 0).astype(float))
    assert np.isfinite(weights).all() and weights == pytest.approx([weights[0]] * 4)


def test_it_is_no_worse_than_the_best_single_score_beyond_noise():
    test = answers(4000, seed=100)
    best = max(auroc(test, [each.scores[name] for each in test]) for name in ("paragrad", "mean_nll", "semgrad"))
    for seed in range(5):
        fusion = fit_fusion(answers(100, seed))
        assert auroc(test, [fusion.score(each.scores) for each in test]) > best - 0.02


def test_it_is_better_where_signals_see_different_things():
    test = answers(4000, seed=100, noise=(1.0, 1.0, 1.0))
    fusion = fit_fusion(answers(300, noise=(1.0, 1.0, 1.0)))
    best = max(auroc(test, [each.scores[name] for each in test]) for name in ("paragrad", "mean_nll", "semgrad"))
    assert auroc(test, [fusion.score(each.scores) for each in test]) > best + 0.03


def test_it_is_the_odds_of_being_wrong_and_positive():
    rows = answers(400)
    fusion = fit_fusion(rows)
    odds = [fusion.score(each.scores) for each in rows]
    assert min(odds) > 0
    rate = np.mean([each / (1 + each) for each in odds])
    assert rate == pytest.approx(np.mean([not each.correct for each in rows]), abs=1e-6)


def test_it_survives_its_file():
    fusion = fit_fusion(answers(60))
    assert Fusion.model_validate_json(fusion.model_dump_json()) == fusion


def test_a_number_far_off_counts_as_the_edge_of_what_was_seen():
    rows = answers(200)
    fusion = fit_fusion(rows)
    far, farther = ({**rows[0].scores, "paragrad": value} for value in (1e6, 1e12))
    assert fusion.score(far) == fusion.score(farther)


def test_a_signal_that_says_the_same_of_all_gets_no_weight():
    rows = answers(100)
    same = [
        Labelled(
            **{
                name: getattr(each, name)
                for name in ("id", "correct", "judge", "length", "model", "scorer", "conditions")
            },
            scores={**each.scores, "exgrad": 0.5},
        )
        for each in rows
    ]
    fusion = fit_fusion(same)
    assert fusion.weights[fusion.signals.index("exgrad")] == pytest.approx(0.0, abs=1e-12)


def test_a_missing_signal_is_refused_by_name():
    fusion = fit_fusion(answers(60))
    with pytest.raises(CalibrationError, match="'paragrad'"):
        fusion.score({"mean_nll": 1.0, "semgrad": 1.0, "min_token_logprob": -1.0})


def test_a_signal_that_no_pass_gives_is_refused():
    fusion = fit_fusion(answers(60))
    read = {"signals": (*fusion.signals, "length")}
    longer = {name: (*getattr(fusion, name), 1.0) for name in ("low", "high", "centre", "scale", "weights")}
    with pytest.raises(ValueError, match=r"unknown signals .*length"):
        Fusion(**{**fusion.model_dump(), **read, **longer})


def test_a_signal_of_the_wrong_sign_is_refused():
    fusion = fit_fusion(answers(60))
    with pytest.raises(CalibrationError, match="wrong sign"):
        fusion.score({**answers(1)[0].scores, "mean_nll": -1.0})


@pytest.mark.parametrize("rows", [[], answers(19), [each for each in answers(100) if each.correct]])
def test_too_few_or_one_sided_answers_are_refused(rows):
    with pytest.raises(CalibrationError, match="cannot be fused on"):
        fit_fusion(rows)


def test_cross_fitted_scores_know_nothing_of_their_own_label():
    """Labels at random: scores that had seen them would tell them, and these must not."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(15):
        rows = [
            Labelled(
                **{
                    name: getattr(each, name)
                    for name in ("id", "scores", "judge", "length", "model", "scorer", "conditions")
                },
                correct=bool(rng.random() < 0.5),
            )
            for each in answers(100, seed)
        ]
        found.append(auroc(rows, cross_fitted(rows)))
    assert 0.4 < np.mean(found) < 0.56


def test_attempts_at_one_question_are_fitted_or_scored_together():
    rows = answers(60)
    again = [
        Labelled(
            **{
                name: getattr(each, name)
                for name in ("id", "scores", "judge", "length", "model", "scorer", "conditions", "correct")
            },
            attempt=2,
        )
        for each in rows
    ]
    found = cross_fitted([*rows, *again])
    assert found[:60] == found[60:]


def test_an_answer_without_scores_is_refused_by_cross_fitting():
    lost = Labelled(
        id="x", correct=True, judge="made up", reason="empty", length=0, model=MODEL, scorer=SCORER, conditions=PLAIN
    )
    with pytest.raises(CalibrationError, match="'x'"):
        cross_fitted([*answers(60), lost])


def test_odd_weights_are_refused():
    plain = fit_fusion(answers(60)).model_dump()
    for change in ({"weights": (1.0,)}, {"scale": (0.0,) * len(plain["scale"])}, {"signals": ("x",) * 5}):
        with pytest.raises(ValueError):
            Fusion(**{**plain, **change})


@pytest.mark.parametrize(
    ("name", "change"),
    [("weights", lambda each: -1.0 - each), ("low", lambda each: each + 1e6), ("scale", lambda each: -each)],
)
def test_a_file_with_numbers_that_fitting_never_gives_is_refused(name, change):
    plain = fit_fusion(answers(60)).model_dump()
    with pytest.raises(ValueError, match=r"weight|range|scale"):
        Fusion(**{**plain, name: tuple(map(change, plain[name]))})


def test_what_is_not_a_number_is_an_error():
    plain = fit_fusion(answers(60)).model_dump()
    size = len(plain["signals"])
    odd = Fusion(
        **{**plain, "weights": (1e308,) * size, "scale": (1e-308,) * size, "low": (-1e3,) * size, "high": (1e3,) * size}
    )
    few = {"paragrad": 1e9, "mean_nll": 1e-9, "semgrad": 1e9}
    with pytest.raises(CalibrationError, match="not a number"):
        odd.score({**answers(1)[0].scores, **few})
