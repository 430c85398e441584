"""``calibrate`` from its files to its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hallucination_guard import AuditLog, Calibration, Guard
from hallucination_guard.calibration import Beginning, Labelled, write_labelled
from hallucination_guard.cli.app import run as run_command
from hallucination_guard.errors import CalibrationError, ConfigurationError, InputError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions
from hallucination_guard_policies import AbstainBelow, Accept


def run(*arguments: object) -> int:
    return run_command(["calibrate", *map(str, arguments)])


def rows(n: int, seed: int = 0, **changes: Any) -> list[Labelled]:
    rng = np.random.default_rng(seed)
    scorer = ScriptedScorer(1.0)
    return [
        Labelled(
            id=f"q{seed}-{at}",
            correct=bool(rng.random() > score**2),
            judge="made up",
            scores={"hybridgrad": float(score), "mean_nll": float(score**3 + 0.01)},
            length=5,
            model=ScriptedModel("x").identity,
            scorer=scorer.identity,
            conditions=Conditions.of(ScriptedModel("x").generate("Who?")),
            **changes,
        )
        for at, score in enumerate(rng.random(n))
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_labelled(tmp_path / "answers.jsonl", rows(600))
    return tmp_path / "answers.jsonl"


def test_it_writes_a_calibration_that_a_guard_can_use(data, tmp_path, capsys):
    assert run("--data", data, "--output", tmp_path / "c.json", "--alpha", 0.1, 0.2) == 0
    fitted = Calibration.load(tmp_path / "c.json")
    guard = Guard(
        ScriptedModel("x"), policy=AbstainBelow(max_risk=0.2), scorer=ScriptedScorer(0.05), calibration=fitted
    )
    assert guard("Who?").text == "x"


def test_it_prints_what_was_certified_and_what_is_infeasible(data, tmp_path, capsys):
    run("--data", data, "--output", tmp_path / "c.json", "--alpha", 0.2, 0.001)
    shown = capsys.readouterr().out
    assert "600 answers, 0 of them unscorable" in shown and "Brier" in shown and "ECE" in shown
    assert "alpha 0.001 is INFEASIBLE on 480 answers with 'hybridgrad'; the smallest that looks feasible is" in shown


@pytest.mark.parametrize("options", [(), ("--map", "isotonic"), ("--score", "fused"), ("--score", "mean_nll")])
def test_as_json_it_says_the_same(data, tmp_path, capsys, options):
    run("--data", data, "--output", tmp_path / "c.json", "--alpha", 0.2, "--json", *options)
    shown, fitted = json.loads(capsys.readouterr().out), Calibration.load(tmp_path / "c.json")
    assert (shown["score"], shown["map"]) == (fitted.score, fitted.map)
    assert shown["certificates"][0]["id"] == fitted.certificates[0].id
    assert shown["certificates"][0]["coverage"] == fitted.certificates[0].coverage
    assert shown["brier"] == fitted.report.brier and len(shown["reliability"]) == 10


def test_several_files_are_one_set(data, tmp_path, capsys):
    write_labelled(tmp_path / "more.jsonl", rows(100, seed=1))
    run("--data", data, tmp_path / "more.jsonl", "--output", tmp_path / "c.json", "--json")
    assert json.loads(capsys.readouterr().out)["answers"] == 700


def test_a_labelled_audit_log_is_as_good(tmp_path, capsys):
    from hallucination_guard.audit import label

    log, answers = tmp_path / "audit.jsonl", rows(60)
    with AuditLog(log) as sink:
        scorer = ScriptedScorer([each.scores["hybridgrad"] for each in answers])
        guard = Guard(ScriptedModel("x"), policy=Accept(), scorer=scorer, audit=sink)
        ids = [guard("Who?").audit_ids[0] for _ in answers]
    for id, each in zip(ids, answers, strict=True):
        label(log, id, each.correct)
    run("--data", log, "--output", tmp_path / "c.json", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["answers"], shown["judge"]) == (60, "human")


def test_the_policy_that_drew_the_attempts_is_named(tmp_path, capsys):
    from hallucination_guard.calibration.certificate import drafts_hash
    from hallucination_guard_policies import load_policy

    text = "id: p\nversion: 1\nrules:\n  - retry: {below: {%s}, times: 1}\n"
    collecting, final = tmp_path / "collecting.yaml", tmp_path / "final.yaml"
    collecting.write_text(text % "confidence: 1")
    final.write_text(text % "max_risk: 0.2")
    known = drafts_hash(load_policy(collecting))
    first = rows(600, policy=known)
    again = [
        Labelled(**{**{name: getattr(each, name) for name in Labelled.__slots__}, "id": one.id, "attempt": 2})
        for one, each in zip(first, rows(600, seed=1, policy=known), strict=True)
    ]
    write_labelled(tmp_path / "a.jsonl", [*first, *again])
    run("--data", tmp_path / "a.jsonl", "--output", tmp_path / "c.json", "--alpha", 0.2, "--policy", collecting)
    assert Calibration.load(tmp_path / "c.json").covering(load_policy(final))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--alpha", "1.5"), ConfigurationError),
        (("--alpha", "0.1", "--delta", "0"), ConfigurationError),
        (("--score", "min_token_logprob"), CalibrationError),
    ],
)
def test_odd_options_are_refused(data, tmp_path, options, error):
    with pytest.raises(error):
        run("--data", data, "--output", tmp_path / "c.json", *options)
    assert not (tmp_path / "c.json").exists()


def test_answers_of_another_judge_than_the_one_asked_for_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="were judged by made up"):
        run("--data", data, "--output", tmp_path / "c.json", "--judge", "human")
    assert not (tmp_path / "c.json").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        run("--data", tmp_path / "none.jsonl", "--output", tmp_path / "c.json")


def test_for_streams_it_needs_the_beginnings(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CalibrationError, match="evaluate --beginnings"):
        run("--data", data, "--output", tmp_path / "c.json", "--for", "stream")
    whole = [
        replace(each, beginnings=(Beginning(length=2, scores=each.scores), Beginning(length=5, scores=each.scores)))
        for each in rows(600)
    ]
    write_labelled(data, whole)
    assert run("--data", data, "--output", tmp_path / "c.json", "--for", "stream", "--alpha", "0.3") == 0
    assert "the greatest over all beginnings" in capsys.readouterr().out
    found = Calibration.load(tmp_path / "c.json")
    assert found.gate == "stream"
    assert found.certificates


def test_advice_writes_nothing_and_says_that_it_is_no_certificate(data, tmp_path, capsys):
    assert run("--data", data, "--alpha", 0.05, 0.2, "--advise") == 0
    shown = capsys.readouterr().out
    assert "AUROC" in shown and "alpha 0.05: with 600 labels expect" in shown and "half of what is possible" in shown
    assert shown.rstrip().endswith("not a certificate: it promises nothing")
    assert not list(tmp_path.glob("*.json"))


def test_advice_beside_a_calibration(data, tmp_path, capsys):
    run("--data", data, "--output", tmp_path / "c.json", "--alpha", 0.2, "--advise", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["certificates"] and Calibration.load(tmp_path / "c.json").certificates
    assert shown["advice"][0]["alpha"] == 0.2 and shown["advice"][0]["labels"] == 600
    assert shown["advice"][0]["to_most"].keys() == {"expected", "fewest", "most", "up_to"}
    assert "not a certificate" in shown["advice_is"]


def test_what_is_infeasible_is_told_how_many_labels_it_takes(data, tmp_path, capsys):
    run("--data", data, "--output", tmp_path / "c.json", "--alpha", 0.02, "--json")
    [found] = json.loads(capsys.readouterr().out)["infeasible"]
    assert found["needed"]["up_to"] == 12_800


def test_on_average_is_printed_apart_from_certificates(data, tmp_path, capsys):
    run("--data", data, "--output", tmp_path / "c.json", "--on-average", 0.1, 0.2)
    shown = capsys.readouterr().out
    assert "certificates, each" not in shown and "no certificate, and no max_risk takes it" in shown
    assert "alpha 0.1 on average: 'hybridgrad' up to" in shown
    assert [each.alpha for each in Calibration.load(tmp_path / "c.json").on_average] == [0.1, 0.2]


@pytest.mark.parametrize("options", [("--alpha", "0.1"), ("--advise", "--alpha", "0.1", "--on-average", "0.1")])
def test_what_would_be_lost_is_refused_without_an_output(data, options):
    with pytest.raises(InputError, match="--output"):
        run("--data", data, *options)


def test_advice_on_no_alpha_is_refused(data):
    with pytest.raises(ConfigurationError, match="which error rate"):
        run("--data", data, "--advise")
