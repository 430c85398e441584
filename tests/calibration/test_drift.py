"""Drift: the exact test against scipy's, how often it is wrong, and what it does to a running guard."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from hallucination_guard.calibration import DriftMonitor
from hallucination_guard.calibration.drift import ks_statistic, p_value
from hallucination_guard.errors import CalibrationError, ConfigurationError

RNG = np.random.default_rng(0)
REFERENCE = [float(each) for each in RNG.lognormal(size=200)]


@pytest.mark.parametrize(("m", "n"), [(5, 7), (12, 12), (40, 25), (200, 100), (512, 50)])
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_statistic_and_p_value_are_scipys(m, n, shift):
    rng = np.random.default_rng(m * n)
    first, second = rng.normal(size=m), rng.normal(size=n) + shift
    theirs = ks_2samp(first, second, method="exact")
    distance = ks_statistic(first.tolist(), second.tolist())
    assert distance == pytest.approx(theirs.statistic)
    assert p_value(distance, m, n) == pytest.approx(theirs.pvalue, rel=1e-6)


def test_two_samples_apart_have_the_smallest_p_value_there_is():
    """Only the two orders in which one sample lies wholly below the other: 2 / C(m + n, n)."""
    assert p_value(1.0, 6, 4) == pytest.approx(2 / 210)


def test_ties_count_once():
    assert ks_statistic([1, 1, 2, 2], [1, 1, 2, 2]) == 0.0
    assert ks_statistic([1, 1, 1, 2], [1, 2, 2, 2]) == 0.5


def test_without_drift_it_raises_the_alarm_no_more_often_than_it_says():
    """With scores straight from the reference's distribution, over many windows; a tenth may, in all."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        monitor = DriftMonitor(rng.normal(size=60).tolist(), window=20, rate=0.1)
        for score in rng.normal(size=20 * 15):
            monitor.observe(float(score))
        alarms += bool(monitor.suspended)
    assert alarms / 200 <= 0.1 + 3 * np.sqrt(0.09 / 200)


@pytest.mark.filterwarnings("default")
def test_with_drift_it_does_within_a_window_or_two():
    monitor = DriftMonitor(REFERENCE, window=50)
    for score in np.random.default_rng(2).lognormal(mean=1.0, size=100):
        monitor.observe(float(score))
    assert "have drifted" in monitor.suspended and monitor.tests <= 2


def test_once_raised_it_stays_raised():
    monitor = DriftMonitor(REFERENCE, window=50)
    for _ in range(50):
        monitor.observe(1e9)
    before = monitor.suspended
    for score in REFERENCE * 3:
        monitor.observe(score)
    assert before and monitor.suspended == before


def test_it_says_so_in_the_ordinary_log_once(caplog):
    monitor = DriftMonitor(REFERENCE, window=50)
    for _ in range(200):
        monitor.observe(1e9)
    assert [each.levelname for each in caplog.records if "guard.drift" in each.message] == ["WARNING"]


def test_windows_do_not_overlap():
    monitor = DriftMonitor(REFERENCE, window=50)
    for score in np.random.default_rng(3).permutation(REFERENCE)[:149]:
        monitor.observe(float(score))
    assert monitor.tests == 2


def test_threads_share_it():
    monitor = DriftMonitor(REFERENCE, window=100)
    scores = np.random.default_rng(4).choice(REFERENCE, 1000)

    def feed(part: Any) -> None:
        for score in part:
            monitor.observe(float(score))

    threads = [threading.Thread(target=feed, args=(part,)) for part in np.array_split(scores, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.tests == 10


@pytest.mark.parametrize("reference", [[], [1.0] * 9, [float("nan")] * 20])
def test_without_a_reference_there_is_no_monitor(reference):
    with pytest.raises(CalibrationError, match="reference scores"):
        DriftMonitor(reference)


@pytest.mark.parametrize("settings", [{"window": 9}, {"window": True}, {"rate": 0.0}, {"rate": 1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigurationError):
        DriftMonitor(REFERENCE, **settings)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(CalibrationError):
        DriftMonitor(REFERENCE).observe(float("nan"))
