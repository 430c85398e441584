"""An error rate on average: the rule, what it promises when drawn many times, and that it is never a certificate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hallucination_guard import Calibration, Guard
from hallucination_guard.calibration import Labelled, OnAverage, calibrate
from hallucination_guard.calibration.on_average import keep_on_average
from hallucination_guard.errors import CalibrationError, ConfigurationError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions
from hallucination_guard_policies import AbstainBelow


def kept(scores: Any, wrong: Any, alpha: float = 0.3) -> OnAverage:
    [found] = keep_on_average(
        list(scores), [not bad for bad in wrong], alphas=[alpha], questions=len(scores), score="s", date="2026-01-01"
    )
    return found


pairs = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=25)


@given(pairs, st.sampled_from([0.1, 0.25, 0.5, 0.8]))
def test_it_is_the_largest_threshold_that_keeps_the_rule(given_, alpha):
    scores, wrong = zip(*given_, strict=True)
    fine = []
    for threshold in sorted(set(scores)):
        passed = [bad for score, bad in given_ if score <= threshold]
        if (sum(passed) + 1) / (len(passed) + 1) <= alpha + 1e-12:
            fine.append((float(threshold), len(passed), sum(passed)))
    found = kept(scores, wrong, alpha)
    assert (found.threshold, found.answered, found.errors) == (fine[-1] if fine else (None, 0, 0))


def test_one_more_wrong_answer_is_always_reckoned_with():
    assert kept([1.0] * 8, [False] * 8, 0.1).threshold is None
    assert kept([1.0] * 9, [False] * 9, 0.1).answered == 9


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, True, "0.1"])
def test_an_alpha_out_of_range_is_refused(value):
    with pytest.raises((ConfigurationError, TypeError)):
        kept([1.0], [False], value)


# ------------------------------------------------------------------------------------------------- the promise


def drawn_often(n: int, alpha: float, draws: int = 1500) -> np.ndarray:
    """The true error rate of each draw's threshold, 0 where nothing is let through; risk s at the score s."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(draws):
        scores = rng.random(n)
        found = kept(scores, rng.random(n) < scores, alpha)
        rates.append(0.0 if found.threshold is None else found.threshold / 2)
    return np.array(rates)


@pytest.mark.parametrize(("n", "alpha"), [(40, 0.2), (100, 0.1), (200, 0.3)])
def test_the_mean_error_rate_is_kept(n, alpha):
    rates = drawn_often(n, alpha)
    assert rates.mean() <= alpha + 3 * rates.std() / math.sqrt(len(rates))


def test_about_every_second_set_is_above_it_which_a_certificate_would_forbid():
    assert 0.3 < (drawn_often(200, 0.3) > 0.3).mean() < 0.6


def test_the_test_of_the_promise_can_fail():
    """Without the added answer the mean is above α."""
    rng, rates = np.random.default_rng(0), []
    for _ in range(1500):
        scores = rng.random(40)
        order = np.argsort(scores)
        rate = np.cumsum((rng.random(40) < scores)[order]) / np.arange(1, 41)
        fine = np.flatnonzero(rate <= 0.2)
        rates.append(scores[order][fine[-1]] / 2 if len(fine) else 0.0)
    assert np.mean(rates) > 0.2 + 3 * np.std(rates) / math.sqrt(1500)


# ------------------------------------------------------------------------------------------------- the object


PLAIN: dict[str, Any] = {"alpha": 0.3, "score": "s", "threshold": 1.0, "n": 50, "answered": 20, "errors": 4}
PLAIN |= {"date": "2026-01-01"}


@pytest.mark.parametrize(
    "change",
    [{"errors": 6}, {"answered": 51}, {"threshold": None}, {"answered": 0, "errors": 0}, {"errors": 21}],
    ids=["above alpha", "more than asked", "no threshold", "nothing answered", "more wrong than answered"],
)
def test_what_does_not_add_up_is_refused(change):
    assert OnAverage(**PLAIN).errors == 4
    with pytest.raises(ValidationError, match=r"cannot be|do not keep"):
        OnAverage(**{**PLAIN, **change})


def rows(n: int = 400, **changes: Any) -> list[Labelled]:
    rng = np.random.default_rng(1)
    return [
        Labelled(
            id=f"q{at}",
            correct=bool(rng.random() > score**2),
            judge="made up",
            scores={"hybridgrad": float(score), "mean_nll": float(score**2)},
            length=5,
            model=ScriptedModel("x").identity,
            scorer=ScriptedScorer(1.0).identity,
            conditions=Conditions.of(ScriptedModel("x").generate("Who?")),
            **changes,
        )
        for at, score in enumerate(rng.random(n))
    ]


def test_it_stands_in_the_file_apart_from_certificates(tmp_path):
    fitted = calibrate(rows(), on_average=[0.3, 0.2])
    assert fitted.certificates == () == fitted.infeasible
    assert [each.alpha for each in fitted.on_average] == [0.2, 0.3] and fitted.on_average[1].n == 400
    fitted.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == fitted


def test_no_max_risk_stands_on_it():
    fitted = calibrate(rows(), on_average=[0.2])
    model, scorer = ScriptedModel("x"), ScriptedScorer(0.01)
    with pytest.raises(CalibrationError, match="what it keeps on average is no certificate"):
        Guard(model, policy=AbstainBelow(max_risk=0.2), scorer=scorer, calibration=fitted)
    verdict = fitted.verdict(scorer(model, model.generate("Who?")), conditions=rows(1)[0].conditions)
    assert verdict.certificate is None and verdict.max_risk is None


def test_another_model_or_other_data_is_refused():
    plain = calibrate(rows(), on_average=[0.2]).model_dump()
    with pytest.raises(ValidationError, match="kept on average"):
        Calibration(**{**plain, "fingerprint": "another"})
    with pytest.raises(ValidationError, match="kept on average"):
        Calibration(**{**plain, "data": "other"})


def test_a_fused_score_is_tested_on_questions_that_its_weights_never_saw():
    fitted = calibrate(rows(), score="fused", on_average=[0.3])
    assert fitted.on_average[0].n == 240 and fitted.examples == 240


def test_further_attempts_are_refused():
    again = [replace(each, attempt=2, policy="p") for each in rows(60)]
    with pytest.raises(CalibrationError, match="single drafts"):
        calibrate([*(replace(each, policy="p") for each in rows(60)), *again], on_average=[0.3])


def test_an_unscorable_answer_is_a_question_that_is_not_answered():
    lost = [replace(each, id=f"lost{each.id}", scores={}, reason="empty") for each in rows(100)]
    assert calibrate([*rows(100), *lost], on_average=[0.5]).on_average[0].n == 200
