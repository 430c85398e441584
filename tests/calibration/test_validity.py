"""The benchmark of the promise does what the package does, only faster."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hallucination_guard.calibration import Certificate, Labelled, fit_fusion, write_labelled
from hallucination_guard.calibration.certificate import Drafts, certify
from hallucination_guard.values import Conditions, ModelIdentity, ScorerIdentity

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "validity.py"
_spec = importlib.util.spec_from_file_location("validity", SCRIPT)
assert _spec is not None and _spec.loader is not None
validity: Any = sys.modules.setdefault("validity", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(validity)


def rows(n: int = 200) -> list[Labelled]:
    rng = np.random.default_rng(0)
    return [
        Labelled(
            id=f"q{at}",
            correct=bool(rng.random() > score**2),
            judge="made up",
            scores={"hybridgrad": float(score), "paragrad": float(score * rng.random())},
            length=int(rng.integers(1, 9)),
            model=ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t"),
            scorer=ScorerIdentity(name="hybridgrad", version="1"),
            conditions=Conditions(frame="f", endings=("stop",)),
        )
        for at, score in enumerate(rng.random(n))
    ]


def test_its_fused_scores_are_the_packages():
    answers = rows()
    pool = validity.population(answers, ["fused"])
    of = np.arange(100)
    fusion = fit_fusion(answers[:100])
    found = validity.fused(pool, of)
    np.testing.assert_allclose(found, [fusion.score(each.scores) for each in answers], rtol=1e-9)


def test_its_thresholds_are_the_packages():
    pool = validity.population(rows(), ["hybridgrad"])
    scores, alphas = pool.scores["hybridgrad"], [0.05, 0.3, 0.5]
    found = validity.certified(scores, pool.wrong, np.arange(50), np.arange(50, 200), alphas=alphas, delta=0.1)
    pairs = [[(float(score), not bad)] for score, bad in zip(scores, pool.wrong, strict=True)]
    theirs = certify(Drafts.of(pairs[:50]), Drafts.of(pairs[50:]), alphas=alphas, score="s")
    assert found == [each.threshold if isinstance(each, Certificate) else None for each in theirs]


def test_the_best_threshold_does_not_cut_through_ties():
    scores, wrong = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert [validity.best(scores, wrong, alpha) for alpha in (0.2, 0.4, 0.5)] == [0.25, 0.75, 1.0]


@pytest.mark.parametrize("broken", [False, True])
def test_its_exit_status_says_whether_the_word_was_kept(tmp_path, broken, monkeypatch, capsys):
    write_labelled(tmp_path / "a.jsonl", rows())
    monkeypatch.setattr(sys, "argv", ["validity", str(tmp_path / "a.jsonl"), "--draws", "40", "--scores", "hybridgrad"])
    monkeypatch.setattr(validity, "SHAPES", {})
    if broken:  # thresholds chosen without any test
        monkeypatch.setattr(validity, "certified", lambda scores, *rest, alphas, **others: [1e9] * len(alphas))
    assert validity.main() == int(broken)
    assert ("TOO OFTEN" in capsys.readouterr().out) is broken


def test_a_file_that_can_not_be_read_is_one_line(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, tmp_path / "none.jsonl"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "cannot be read" in run.stderr
