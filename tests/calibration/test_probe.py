"""Probe, the two stages, novelty: what they learn, what they refuse, and that a file says the same as memory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from hallucination_guard.audit import AuditRecord
from hallucination_guard.audit.verdicts import Verdicts
from hallucination_guard.calibration import (
    FUSED,
    Calibration,
    DriftMonitor,
    Labelled,
    calibrate,
    read_labelled,
    write_labelled,
)
from hallucination_guard.calibration.certificate import FIT_SHARE_FUSED, split
from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.fusion import cross_fitted, optimum
from hallucination_guard.calibration.novelty import Novelty, fit_novelty
from hallucination_guard.calibration.probe import _FOLDS, _PARTITIONS, Probe, fit_probe
from hallucination_guard.calibration.ranking import auroc, gain
from hallucination_guard.calibration.stack import fit_fused
from hallucination_guard.errors import CalibrationError
from hallucination_guard.values import Conditions, ModelIdentity, Score, ScorerIdentity, States

MODEL = ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t")
SCORER = ScorerIdentity(name="hybridgrad", version="1")
PLAIN = Conditions(frame="f", max_new_tokens=64, temperature=0.0, top_p=1.0, stop=(), endings=("stop",))
D = 24


def answers(n: int, seed: int = 0, *, inside: float = 1.5, outside: float = 0.6) -> list[Labelled]:
    """Answers whose states know ``inside`` and whose likelihood ``outside`` of what makes them wrong."""
    rng = np.random.default_rng(seed)
    towards = np.random.default_rng(99).normal(size=D) / math.sqrt(D)
    found = []
    for at in range(n):
        doubt = rng.normal()
        wrong = bool(rng.random() < 1 / (1 + math.exp(-2.5 * doubt)))
        mean, last = (rng.normal(size=D) + inside * doubt * towards for _ in range(2))
        nll = math.exp(outside * doubt + rng.normal())
        found.append(
            Labelled(
                id=f"q{at}",
                correct=not wrong,
                judge="made up",
                scores={"sequence_nll": nll, "paragrad": nll * math.exp(0.3 * rng.normal()), "mean_nll": nll / 3},
                length=int(rng.integers(1, 9)),
                model=MODEL,
                scorer=SCORER,
                conditions=PLAIN,
                states=States(layers=(3, 4), mean=tuple(mean), last=tuple(last)),
            )
        )
    return found


def wrong(rows: list[Labelled]) -> list[bool]:
    return [not each.correct for each in rows]


def states(rows: list[Labelled]) -> list[States]:
    return [each.states for each in rows if each.states is not None]


def score(row: Labelled) -> Score:
    return Score(
        status="scored", scorer=SCORER, scores=row.scores, states=row.states, token_logprobs=(-1.0,) * row.length
    )


class TestStates:
    def test_they_come_back_from_a_file_bit_by_bit(self, tmp_path):
        rows = answers(5)
        write_labelled(tmp_path / "rows.jsonl", rows)
        assert read_labelled(tmp_path / "rows.jsonl") == rows

    @pytest.mark.parametrize(
        "edit",
        [{"float16": "AAA"}, {"float16": "%%%%"}, {"layers": []}, {"layers": "3"}, {"more": 1}, {"float16": "AAAA"}],
    )
    def test_what_is_no_states_is_refused(self, edit):
        plain = states(answers(1))[0].to_json_dict()
        with pytest.raises(ValueError, match=r"."):
            States.from_json_dict({**plain, **edit})

    @pytest.mark.parametrize("odd", [math.nan, math.inf, 1e6])
    def test_no_number_that_float16_cannot_hold(self, odd):
        with pytest.raises(ValueError, match=r"float16|finite"):
            States(layers=(1,), mean=(odd,), last=(0.0,))


class TestProbe:
    def test_it_is_the_mean_of_scikit_learns_at_one_scale(self):
        rows = answers(120)
        ids = [each.id for each in rows]
        probe, unseen = fit_probe(states(rows), wrong(rows), ids)
        x, y = np.array([each.features for each in states(rows)]), np.array(wrong(rows))
        logits, seen = [], np.zeros((_PARTITIONS, len(y)))
        for seed in range(_PARTITIONS):
            parts = fold_of(ids, _FOLDS, seed=seed)
            for part in range(_FOLDS):
                rest = parts != part
                z = (x - x[rest].mean(axis=0)) / x[rest].std(axis=0)
                own = LogisticRegression(C=probe.strength, max_iter=1000).fit(z[rest], y[rest]).decision_function(z)
                own = (own - own[rest].mean()) / own[rest].std()
                logits.append(own)
                seen[seed, ~rest] = own[~rest]
        np.testing.assert_allclose([math.log(probe.odds(each)) for each in states(rows)], np.mean(logits, 0), atol=1e-4)
        np.testing.assert_allclose(unseen, seen.mean(axis=0), atol=1e-4)

    def test_out_of_fold_means_that_the_own_question_taught_nothing(self):
        """With labels at random an honest probe is at chance; one that saw its answers is not."""
        rows = answers(150, seed=3)
        labels = np.random.default_rng(0).permutation(wrong(rows)).tolist()
        ids = [each.id for each in rows]
        probe, honest = fit_probe(states(rows), labels, ids)
        assert abs(auroc(honest, labels) - 0.5) < 0.12
        assert auroc([probe.odds(each) for each in states(rows)], labels) > 0.62

    def test_attempts_at_one_question_are_on_one_side(self):
        rows = answers(60, seed=4)
        twice = [*states(rows), *states(rows)]
        labels = np.random.default_rng(1).permutation(wrong(rows)).tolist()
        _, found = fit_probe(twice, labels * 2, [each.id for each in rows] * 2)
        assert abs(auroc(found, labels * 2) - 0.5) < 0.2

    def test_states_of_other_layers_are_refused(self):
        rows = answers(60)
        probe, _ = fit_probe(states(rows), wrong(rows), [each.id for each in rows])
        for odd in (None, replace(states(rows)[0], layers=(1, 2)), States(layers=(3, 4), mean=(1.0,), last=(1.0,))):
            with pytest.raises(CalibrationError):
                probe.odds(odd)

    def test_a_file_holds_the_same_probe(self):
        rows = answers(60)
        probe, _ = fit_probe(states(rows), wrong(rows), [each.id for each in rows])
        again = Probe.model_validate_json(probe.model_dump_json())
        assert again == probe and again.name == probe.name
        plain = json.loads(probe.model_dump_json())
        with pytest.raises(ValueError, match="number"):
            Probe.model_validate({**plain, "weights": "AAA"})


class TestTwoStages:
    def test_a_probe_that_helps_is_kept_and_says_by_how_much(self):
        fusion = fit_fused(answers(300))
        assert (
            fusion.probe is not None and fusion.signals[0] == "probe" and fusion.why.startswith("with a probe: AUROC +")
        )
        assert min(fusion.weights) >= 0.0

    def test_one_that_does_not_is_left_out_and_says_so(self):
        fusion = fit_fused(answers(300, inside=0.0, outside=2.0))
        assert fusion.probe is None and fusion.signals == ("paragrad", "sequence_nll", "mean_nll")
        assert fusion.why.startswith("no probe: with one, AUROC -") and fusion.why.endswith("; all scores fused")

    @pytest.mark.parametrize("seen", [True, False])
    def test_the_likelihood_stands_alone_where_it_ranks_better_than_all_together(self, seen):
        rng = np.random.default_rng(1)
        rows = [
            replace(
                row,
                scores=row.scores | {"paragrad": math.exp(rng.normal()), "mean_nll": math.exp(rng.normal())},
                states=row.states if seen else None,
            )
            for row in answers(300, inside=0.0, outside=2.0)
        ]
        fusion = fit_fused(rows)
        assert fusion.probe is None and fusion.signals == ("sequence_nll",) and fusion.weights[0] > 0
        assert fusion.why.startswith("sequence_nll alone: AUROC +") and "no probe" in fusion.why
        assert fusion.score(rows[0].scores) > 0.0
        ranked = [fusion.score(each.scores) for each in rows]
        # The ends of its range are held, so only there may ties be new.
        assert auroc(ranked, wrong(rows)) == pytest.approx(
            auroc([each.scores["sequence_nll"] for each in rows], wrong(rows)), abs=0.005
        )
        assert "alone" not in fit_fused(rows[:30]).why

    def test_without_states_or_with_few_answers_there_is_none(self):
        rows = answers(120)
        assert "states" in fit_fused([replace(rows[0], states=None), *rows[1:]]).why
        assert "too few" in fit_fused(rows[:30]).why

    def test_it_ranks_better_on_answers_that_nothing_saw(self):
        train, test = answers(300), answers(3000, seed=7)
        fusion = fit_fused(train)
        fused = [fusion.score(each.scores, each.states) for each in test]
        best = max(auroc([each.scores[name] for each in test], wrong(test)) for name in test[0].scores)
        assert auroc(fused, wrong(test)) > best + 0.05

    def test_the_optimum_is_that_of_a_general_solver(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 4))
        y = (rng.random(200) < 1 / (1 + np.exp(-x[:, 0] + x[:, 1]))).astype(float)
        weights, intercept = optimum(x, y, c=0.1)

        def loss(at):
            z = x @ at[:4] + at[4]
            return np.sum(np.logaddexp(0, z) - y * z) + 0.5 * np.sum(at[:4] ** 2) / 0.1

        theirs = minimize(
            loss, np.zeros(5), method="SLSQP", bounds=[(0, None)] * 4 + [(None, None)], options={"ftol": 1e-14}
        ).x
        np.testing.assert_allclose([*weights, intercept], theirs, atol=1e-4)
        assert weights[1] == 0.0 < weights[0]


class TestRanking:
    def test_auroc_is_scikit_learns_also_with_ties(self):
        rng = np.random.default_rng(0)
        values, labels = rng.integers(0, 9, 200).astype(float), rng.random(200) < 0.4
        assert auroc(values, labels) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)

    def test_the_interval_covers_what_a_better_number_gains(self):
        """Of two noisy views of one doubt: the true difference lies in nine of ten 80 % intervals or so, never few."""
        big = answers(20_000, seed=50)
        columns = [np.array([each.scores[name] for each in big]) for name in ("sequence_nll", "paragrad")]
        true = auroc(columns[0], wrong(big)) - auroc(columns[1], wrong(big))
        inside = 0
        for seed in range(60):
            part = answers(150, seed=1000 + seed)
            one, other = ([each.scores[name] for each in part] for name in ("sequence_nll", "paragrad"))
            found = gain(one, other, wrong(part), [each.id for each in part])
            inside += found.low <= true <= found.high
        assert 38 <= inside <= 58  # 48 expected; three standard errors


class TestNovelty:
    def test_the_distance_is_mahalanobis_with_the_shrunken_covariance(self):
        rows = answers(200)
        novelty = fit_novelty(states(rows), [each.id for each in rows])
        assert novelty is not None
        u = np.array(novelty.directions).reshape(-1, D)
        covariance = u.T @ np.diag(np.array(novelty.variances) - novelty.rest) @ u + novelty.rest * np.eye(D)
        for each in states(answers(20, seed=5)):
            off = np.array(each.mean) - np.array(novelty.centre)
            assert novelty.distance(each) == pytest.approx(off @ np.linalg.solve(covariance, off) / D, rel=1e-4)

    def test_the_limit_is_passed_by_about_its_rate_of_new_answers_of_the_kind(self):
        rows = answers(600)
        novelty = fit_novelty(states(rows), [each.id for each in rows], rate=0.05)
        assert novelty is not None
        beyond = np.mean([novelty.distance(each) > novelty.limit for each in states(answers(2000, seed=8))])
        assert 0.03 < beyond < 0.075

    def test_what_is_unlike_anything_labelled_has_no_confidence(self):
        calibration = calibrate(answers(300), score=FUSED)
        assert calibration.novelty is not None
        known = answers(300, seed=9)
        sure = calibration.verdict(score(known[0]), conditions=PLAIN)
        assert sure.confidence is not None and calibration.novelty.name in sure.score.scores
        far = replace(known[0], states=States(layers=(3, 4), mean=(9.0,) * D, last=(9.0,) * D))
        verdict = calibration.verdict(score(far), conditions=PLAIN)
        assert verdict.confidence is None and verdict.certificate is None and "unlike anything" in verdict.uncovered

    def test_few_answers_have_no_such_limit(self):
        assert fit_novelty(states(answers(50)), [str(at) for at in range(50)]) is None

    def test_a_file_holds_the_same(self):
        novelty = fit_novelty(states(answers(120)), [str(at) for at in range(120)])
        assert novelty is not None and Novelty.model_validate_json(novelty.model_dump_json()) == novelty


class TestCalibration:
    def test_the_file_keeps_what_was_learned_and_reads_the_record_alike(self, tmp_path):
        calibration = calibrate(answers(300), score=FUSED, alphas=[0.45])
        calibration.save(tmp_path / "c.json")
        again = Calibration.load(tmp_path / "c.json")
        assert again == calibration and again.fusion is not None and again.fusion.probe is not None
        own = score(answers(1, seed=11)[0])
        verdict = again.verdict(own, conditions=PLAIN, certificates=again.certificates)
        # The record keeps numbers and no states.
        recorded = Score(status="scored", scorer=SCORER, scores=verdict.score.scores, token_logprobs=own.token_logprobs)
        replayed = again.verdict(recorded, conditions=PLAIN, certificates=again.certificates)
        assert (replayed.confidence, replayed.certificate) == (verdict.confidence, verdict.certificate)

    def test_without_states_nothing_is_judged(self):
        calibration = calibrate(answers(300), score=FUSED)
        bare = replace(score(answers(1)[0]), states=None)
        with pytest.raises(CalibrationError, match="states"):
            calibration.verdict(bare, conditions=PLAIN)

    def test_the_certificates_questions_touch_nothing_that_was_learned(self):
        rows = answers(300)
        one = calibrate(rows, score=FUSED, alphas=[0.45])
        _, test = split([each.id for each in rows], share=FIT_SHARE_FUSED)
        some = set(sorted(test)[::8])
        turned = [replace(each, correct=not each.correct) if each.id in some else each for each in rows]
        other = calibrate(turned, score=FUSED, alphas=[0.45])
        assert one.fusion == other.fusion and one.novelty == other.novelty and one.certificates != other.certificates

    def test_a_probe_that_was_edited_takes_its_certificates_away(self):
        calibration = calibrate(answers(300), score=FUSED, alphas=[0.45])
        assert calibration.certificates and calibration.fusion is not None and calibration.fusion.probe is not None
        probe = calibration.fusion.probe
        edited = probe.model_copy(update={"weights": tuple(-each for each in probe.weights)})
        changed = calibration.model_copy(update={"fusion": calibration.fusion.model_copy(update={"probe": edited})})
        assert changed.covered != calibration.covered

    def test_cross_fitting_keeps_the_probe_from_its_own_questions(self):
        rows = answers(200, seed=3)
        labels = np.random.default_rng(0).permutation([each.correct for each in rows]).tolist()
        shuffled = [replace(each, correct=label) for each, label in zip(rows, labels, strict=True)]
        assert abs(auroc(cross_fitted(shuffled, fit=fit_fused), wrong(shuffled)) - 0.5) < 0.12


class TestInAGuard:
    """What a guard makes of states: a scorer that reads them off its own list."""

    def test_new_answers_suspend_the_certificates(self):
        rows = answers(400)
        calibration = calibrate(rows, score=FUSED, alphas=[0.45])
        assert calibration.novelty is not None and len(calibration.novelty.reference) >= 10
        monitor = DriftMonitor(calibration.novelty.reference, rate=0.005)
        for each in answers(200, seed=21):
            monitor.observe(calibration.novelty.of(score(each)))
        assert not monitor.suspended
        for each in answers(100, seed=22, inside=6.0):
            monitor.observe(calibration.novelty.of(score(each)))
        assert "drifted" in monitor.suspended


def test_a_record_is_replayed_with_it_as_it_was_judged():
    """What the probe said and how new the answer was stand in the record, so that its states need not."""
    rows = answers(300)
    calibration = calibrate(rows, score="fused")
    assert calibration.fusion is not None and calibration.fusion.probe is not None
    for row in rows[:20]:
        judged = calibration.verdict(score(row), conditions=PLAIN)
        record = AuditRecord(
            request_id=row.id,
            model=asdict(MODEL),
            scorer={"name": SCORER.name, "version": SCORER.version, "settings": dict(SCORER.settings)},
            status="scored",
            scores=dict(judged.score.scores),
            conditions=PLAIN.to_json_dict(),
            policy={"id": "p"},
            decision="accept",
            rule="accept",
            reason="in words",
            prompt="Who?",
        )
        assert Verdicts(calibration)(record).confidence == judged.confidence
