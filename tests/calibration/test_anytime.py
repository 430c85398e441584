"""The test of the risk: exact expectations by counting every outcome, closed forms, and its word at all times."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hallucination_guard.calibration import Bets, RiskTest
from hallucination_guard.calibration import anytime as module
from hallucination_guard.errors import ConfigurationError, InputError

Answer = tuple[float, float]
"""Of an answer: the risk r, and the probability π with which its label is asked for."""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start every other label, so that short sequences have several."""
    monkeypatch.setattr(module, "_EVERY", 2)


def e_values(bets: Bets, labels: Sequence[tuple[bool, float]]) -> tuple[float, float]:
    """Of the alarm, which has no public value but its peak, and of the proof."""
    wealth = bets.start()
    for wrong, probability in labels:
        wealth = bets.after(wealth, wrong=wrong, probability=probability)
    begun = (wealth.labels - 1) // module._EVERY if wealth.labels else 0
    in_hand = (1 - module._FIRST) / (begun + 1)
    return float(np.exp(wealth.alarm).mean()) + in_hand, float(np.exp(bets.shown(wealth)))


def expected(bets: Bets, answers: Sequence[Answer]) -> tuple[float, float]:
    """The exact means over all outcomes: each answer is asked about or not, and wrong or not."""
    means = [0.0, 0.0]
    for asked in itertools.product((True, False), repeat=len(answers)):
        for wrong in itertools.product((True, False), repeat=sum(asked)):
            chosen = [each for each, yes in zip(answers, asked, strict=True) if yes]
            chance = math.prod(pi if yes else 1 - pi for (_, pi), yes in zip(answers, asked, strict=True))
            chance *= math.prod(r if bad else 1 - r for (r, _), bad in zip(chosen, wrong, strict=True))
            if chance:
                labels = [(bad, pi) for (_, pi), bad in zip(chosen, wrong, strict=True)]
                for at, value in enumerate(e_values(bets, labels)):
                    means[at] += chance * value
    return means[0], means[1]


@pytest.mark.parametrize("answers", [[(0.3, 1.0)] * 7, [(0.3, 0.5), (0.3, 1.0), (0.3, 0.25)] * 2], ids=["all", "some"])
def test_at_the_risk_itself_both_are_fair_bets(answers: list[Answer], soon: None) -> None:
    floor = min(pi for _, pi in answers)
    assert expected(Bets(alpha=0.3, floor=floor), answers) == (pytest.approx(1.0), pytest.approx(1.0))


def test_below_the_risk_the_alarm_loses_and_above_it_the_proof(soon: None) -> None:
    below, above = (expected(Bets(alpha=0.3), [(risk, 1.0)] * 6) for risk in (0.2, 0.4))
    assert below[0] < 1.0 < below[1]
    assert above[1] < 1.0 < above[0]


@pytest.mark.parametrize("answers", [[(0.6, 1.0), (0.0, 1.0)] * 3, [(0.5, 0.25), (0.1, 1.0)] * 3], ids=["all", "some"])
def test_the_proof_is_of_the_average_whatever_the_single_risks(answers: list[Answer]) -> None:
    assert sum(risk for risk, _ in answers) / len(answers) == pytest.approx(0.3)
    floor = min(pi for _, pi in answers)
    assert expected(Bets(alpha=0.3, floor=floor), answers)[1] <= 1.0


def test_without_weights_it_would_be_no_test_of_the_answers() -> None:
    """Half at risk .5, asked a quarter as often as the other half, at .1: the average is .3, that of the labels .18."""
    wrong = [(0.5, 0.25), (0.1, 1.0)] * 3
    blind = sum(
        math.prod(pi if yes else 1 - pi for (_, pi), yes in zip(wrong, asked, strict=True))
        * expected(Bets(alpha=0.3), [(r, 1.0) for (r, _), yes in zip(wrong, asked, strict=True) if yes])[1]
        for asked in itertools.product((True, False), repeat=len(wrong))
    )
    assert blind > 1.2


def test_the_bets_are_what_the_formula_says() -> None:
    """Against the plain sum over starts and bets, in ordinary numbers."""
    alpha, floor = 0.2, 0.5
    rng = np.random.default_rng(0)
    labels = [(bool(rng.random() < 0.3), float(rng.choice([0.5, 0.8, 1.0]))) for _ in range(60)]
    up = np.geomspace(0.05 / alpha, 0.95 / alpha, 32)
    down = -np.geomspace(0.3 / (1 - alpha), 0.95 / (1 - alpha), 32)
    moves = [(wrong - alpha) * floor / probability for wrong, probability in labels]
    stakes = {0: 0.8, 25: 0.2 / 2, 50: 0.2 / 6}
    alarm = sum(stake * np.prod([1 + up * x for x in moves[at:]], axis=0).mean() for at, stake in stakes.items())
    proof = np.prod([1 + down * x for x in moves], axis=0).mean()
    assert e_values(Bets(alpha=alpha, floor=floor), labels) == (pytest.approx(alarm + 0.2 / 3), pytest.approx(proof))


def test_stakes_add_up_to_one(soon: None) -> None:
    """A label that moves nothing (half of it wrong, at α = .5) leaves the value at 1, whatever starts meanwhile."""
    bets, wealth = Bets(alpha=0.5), Bets(alpha=0.5).start()
    for _ in range(9):
        wealth = bets.after(wealth, wrong=0.5, probability=1.0)
        assert float(wealth.peak) == pytest.approx(0.0, abs=1e-12)


def ever(risk: float, *, alpha: float, labels: int, streams: int = 400, floor: float = 1.0, pi: Any = 1.0) -> Any:
    """When each stream was first said to be alarming, and to be kept."""
    rng = np.random.default_rng(3)
    bets = Bets(alpha=alpha, floor=floor)
    wealth = bets.start()
    alarm, kept = np.full(streams, np.inf), np.full(streams, np.inf)
    for at in range(labels):
        wealth = bets.after(wealth, wrong=rng.random(streams) < risk, probability=pi)
        alarm[(wealth.peak >= bets.needed) & np.isinf(alarm)] = at + 1
        kept[(bets.shown(wealth) >= bets.needed) & np.isinf(kept)] = at + 1
    return alarm, kept


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_at_all_times_together_it_is_wrong_no_more_often_than_it_says(alpha: float) -> None:
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    for times in ever(alpha, alpha=alpha, labels=600):
        assert np.isfinite(times).mean() <= allowed


def test_twice_the_risk_is_noticed_within_a_hundred_labels_and_half_of_it_shown_within_two_hundred() -> None:
    assert np.median(ever(0.2, alpha=0.1, labels=200)[0]) <= 100
    assert np.median(ever(0.05, alpha=0.1, labels=400)[1]) <= 200


def test_a_risk_that_rises_late_is_noticed_by_a_later_start() -> None:
    test = RiskTest(alpha=0.1)
    for at in range(500):
        test.add(correct=at % 20 != 0, probability=1.0)
    assert test.kept and not test.suspended
    for at in range(120):
        test.add(correct=at % 10 >= 3, probability=1.0)
    assert test.suspended  # when still fewer than one in ten were wrong of all
    assert test._wrong / test.labels < 0.1


# ------------------------------------------------------------------------------------------------------ RiskTest


def test_the_alarm_stays_and_says_what_it_saw(caplog: pytest.LogCaptureFixture) -> None:
    test = RiskTest(alpha=0.1)
    for _ in range(5):
        test.add(correct=False, probability=1.0)
    said = test.suspended
    assert "more than 0.1 of the answers let through" in said
    for _ in range(500):
        test.add(correct=True, probability=1.0)
    assert test.suspended == said and test.alarm >= test.bets.needed
    assert [each.levelname for each in caplog.records if "guard.risk" in each.message] == ["WARNING"]


def test_a_proof_can_lapse() -> None:
    test = RiskTest(alpha=0.2)
    for _ in range(40):
        test.add(correct=True, probability=1.0)
    assert test.kept
    for _ in range(40):
        test.add(correct=False, probability=1.0)
    assert not test.kept


def test_thousands_of_labels_do_not_overflow() -> None:
    bets, wealth = Bets(alpha=0.1), Bets(alpha=0.1).start()
    for _ in range(5000):
        wealth = bets.after(wealth, wrong=True, probability=1.0)
    assert np.isfinite(wealth.alarm).all() and np.isfinite(wealth.proof).all() and math.isfinite(wealth.peak)


def test_threads_share_it() -> None:
    test = RiskTest(alpha=0.3)
    threads = [
        threading.Thread(target=lambda: [test.add(correct=True, probability=1.0) for _ in range(100)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = RiskTest(alpha=0.3)
    for _ in range(800):
        alone.add(correct=True, probability=1.0)
    assert (test.labels, test.proof) == (800, alone.proof)


@pytest.mark.parametrize("probability", [0.05, 0.0, -1.0, 1.5, math.nan, True, "0.5"])
def test_a_label_that_was_asked_for_with_another_probability_is_refused(probability: Any) -> None:
    test = RiskTest(alpha=0.1, floor=0.1)
    with pytest.raises(InputError):
        test.add(correct=True, probability=probability)
    assert test.labels == 0


@pytest.mark.parametrize("correct", [1, None, "right"])
def test_what_is_no_label_is_refused(correct: Any) -> None:
    with pytest.raises(InputError, match="True or False"):
        RiskTest(alpha=0.1).add(correct=correct, probability=1.0)


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": True}, {"level": 0}, {"level": math.nan}, {"floor": 0}, {"floor": 1.1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RiskTest(**{"alpha": 0.1, **settings})
