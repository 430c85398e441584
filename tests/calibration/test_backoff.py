"""Back-off thresholds against their closed forms, and their word against a population that is known."""

from __future__ import annotations

import importlib.util
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from hallucination_guard.calibration import LabelledResponse, LabelledSentence, write_responses
from hallucination_guard.calibration.backoff import average_rank, certified_rank, limits, retention, threshold_at
from hallucination_guard.errors import ConfigurationError
from hallucination_guard.values import Conditions, ModelIdentity, ScorerIdentity

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "validity_sentences.py"
_spec = importlib.util.spec_from_file_location("validity_sentences", SCRIPT)
assert _spec is not None and _spec.loader is not None
bench: Any = sys.modules.setdefault("validity_sentences", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(bench)

RESPONSE = [(1.0, True), (2.0, False), (3.0, None), (4.0, False), (5.0, True)]


def test_the_limit_is_the_first_wrong_sentence_too_many() -> None:
    assert [limits([RESPONSE], at_most=k)[0] for k in (0, 1, 2)] == [2.0, 4.0, math.inf]


@given(st.integers(1, 400), st.integers(1, 99))
def test_the_rank_on_average_is_that_of_the_literature(n: int, hundredths: int) -> None:
    alpha = hundredths / 100
    level = math.ceil((n + 1) * (1 - Fraction(hundredths, 100)))
    # The level-th smallest strictness is the (n + 1 − level)-th smallest limit.
    assert average_rank(n, alpha=alpha) == n + 1 - level


@given(st.integers(1, 400), st.integers(1, 99))
def test_the_certified_rank_is_the_last_that_the_binomial_test_passes(n: int, hundredths: int) -> None:
    alpha, delta = hundredths / 100, 0.1
    rank = certified_rank(n, alpha=alpha, delta=delta)
    tail = binom.cdf(np.arange(n), n, alpha)
    assert rank == int(np.sum(tail <= delta * (1 + 1e-9)))


def test_what_scores_below_the_limit_is_kept() -> None:
    threshold = threshold_at([2.0, 4.0, math.inf], 2)
    assert 3.999 < threshold < 4.0
    assert math.isfinite(threshold_at([2.0, math.inf], 2))
    for rank in (0, 4):
        with pytest.raises(ConfigurationError):
            threshold_at([2.0, 4.0, math.inf], rank)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.data())
def test_fewer_than_the_rank_fail(own: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(own)))
    threshold = threshold_at(own, rank)
    assert sum(each <= threshold for each in own) < rank


def test_retention_counts_an_empty_response() -> None:
    kept = retention([RESPONSE, [(9.0, True)]], 2.5)
    assert (kept.sentences, kept.right, kept.empty) == (2 / 6, 1 / 3, 0.5)


@pytest.mark.parametrize("kind", ["telling", "blind", "coarse"])
def test_the_word_is_kept_in_a_thousand_draws(kind: str) -> None:
    results = list(bench.validity(bench.made_up(kind), n=200, delta=0.1, draws=1000))
    assert not [each for each in results if each.broken]
    assert not any(each.infeasible for each in results)


def test_the_check_finds_a_broken_word(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.certified_rank
    monkeypatch.setattr(bench, "certified_rank", lambda n, **rest: right(n, **rest) + 8)
    assert any(each.broken for each in bench.validity(bench.made_up("telling"), n=200, delta=0.1, draws=300))


def test_the_benchmark_reads_responses(tmp_path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)
    rows = [
        LabelledResponse(
            id=f"q{at}",
            judge="made up",
            sentences=tuple(
                LabelledSentence(scores={"mean_nll": float(s)}, correct=bool(rng.random() > s)) for s in rng.random(4)
            ),
            model=ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t"),
            scorer=ScorerIdentity(name="sentences", version="1"),
            conditions=Conditions(frame="f", endings=("stop",)),
        )
        for at in range(60)
    ]
    write_responses(tmp_path / "r.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "r.jsonl"), "--draws", "200", "--n", "15"])
    assert bench.main() == 0
    assert "INFEASIBLE" in capsys.readouterr().out  # 15 responses cannot show α = .1


def test_the_benchmark_fits_weights_for_every_set(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--score", "fused", "--draws", "6", "--n", "60"])
    assert bench.main() == 0
    assert "made-up responses, fused" in capsys.readouterr().out
