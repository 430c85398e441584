"""The rules of the benchmark of long answers say right, wrong, or that they cannot tell."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hallucination_guard.calibration import read_responses
from hallucination_guard.values import States

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_answers.py"
_spec = importlib.util.spec_from_file_location("long_answers", SCRIPT)
assert _spec is not None and _spec.loader is not None
bench: Any = sys.modules.setdefault("long_answers", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(bench)
bench_aurocs = bench.aurocs

SETS = {each["name"]: at for at, each in enumerate(bench.CATALOGUE["sets"])}


def of(relation: str) -> Any:
    return bench.Question(id="x", text="x", relation=relation)


def among(name: str) -> Any:
    return bench.Question(id="x", text="x", set=SETS[name])


def test_there_are_enough_questions_and_each_is_another() -> None:
    asked = bench.questions()
    assert len(asked) >= 150 and len({each.text for each in asked}) == len(asked)
    assert asked == bench.questions()


@pytest.mark.parametrize("relation", bench.CATALOGUE["relations"])
def test_items_and_what_is_right_are_texts_or_numbers(relation: str) -> None:
    items = bench.CATALOGUE["relations"][relation]["items"]
    assert len(items) >= 20
    assert all(isinstance(key, str) and type(value) in (str, int) for key, value in items.items())


@pytest.mark.parametrize(
    ("question", "sentence", "judged"),
    [
        (of("capital"), "The capital of France is Paris.", "right"),
        (of("capital"), "2. The capital city of France is **Paris**, on the Seine.", "right"),
        (of("capital"), "Paris is the capital of France.", "right"),
        (of("capital"), "The capital of France is Lyon.", "wrong"),
        (of("capital"), "The capital of France is not Lyon.", "unchecked"),
        (of("capital"), "The capitals of France and Japan are Paris and Tokyo.", "unchecked"),
        (of("capital"), "It is Paris.", "unchecked"),
        (of("capital"), "France is a country.", "unchecked"),
        (of("symbol"), "The symbol of iron is Fe.", "right"),
        (of("symbol"), "The symbol of iron is FE.", "wrong"),
        (of("symbol"), "The symbol of carbon is Ca.", "wrong"),
        (of("number"), "The atomic number of gold is 79.", "right"),
        (of("number"), "The atomic number of gold is 7.", "wrong"),
        (of("product"), "7 times 8 is 56.", "right"),
        (of("product"), "7 x 8 = 54.", "wrong"),
        (of("year"), "The Battle of Hastings was in 1066.", "right"),
        (of("year"), "The Battle of Hastings was in October 1067.", "wrong"),
        (of("past"), "The past tense of go is went.", "right"),
        (of("past"), "The past tense of see is see.", "wrong"),
        (of("roman"), "The Roman numeral for 14 is XIV.", "right"),
        (of("roman"), "The Roman numeral for 14 is XIII.", "wrong"),
        (of("author"), "The Hobbit was written by J.R.R. Tolkien.", "right"),
        (of("author"), "Emma was written by Charlotte Brontë.", "wrong"),
        (of("animal"), "A whale is a mammal.", "right"),
        (of("animal"), "A whale is a fish.", "wrong"),
        (of("animal"), "The colour of the whale is blue.", "unchecked"),
        (of("continent"), "Kenya is in East Africa.", "right"),
        (of("continent"), "Kenya is a country in South America.", "wrong"),
        (of("continent"), "The colour of Kenya is black.", "unchecked"),
        (of("language"), "Most people in Brazil speak Portuguese.", "right"),
        (of("language"), "The language most people speak in Japan is Japanese.", "right"),
        (of("language"), "The language of Japan is Chinese.", "wrong"),
        (of("opposite"), "The opposite of hot is warm.", "wrong"),
        (of("opposite"), "The opposite of wide is narrow.", "right"),
        (of("opposite"), "The opposite of wide is fast.", "wrong"),
        (of("product"), "The result of 7 times 13 is 7 times 13.", "unchecked"),
        (of("product"), "The product of 7 times 13 is 91.", "right"),
        (of("currency"), "The currency of Poland is the złoty.", "right"),
        (among("planets of the solar system"), "Mars is a planet of the solar system.", "right"),
        (among("planets of the solar system"), "- Pluto", "wrong"),
        (among("planets of the solar system"), "The Moon is a planet.", "wrong"),
        (among("planets of the solar system"), "It is a planet.", "unchecked"),
        (among("planets of the solar system"), "The number of planets is 8.", "unchecked"),
        (among("plays by Shakespeare"), "Romeo and Juliet is a play by Shakespeare.", "right"),
        (among("letters of the Greek alphabet"), "The Greek alphabet has 24 letters.", "unchecked"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.relation or "set",
)
def test_a_sentence_is_judged(question: Any, sentence: str, judged: str) -> None:
    assert bench.judge(question, sentence) == judged


def made_up(path: Path) -> None:
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    header = {"kind": "run", "model": {"name": "m", "fingerprint": "f", "dtype": "float32", "template": "t"}}
    rows = []
    for each in [one for one in bench.questions() if one.relation == "capital"] * 8:
        sentences = []
        for at in range(4):
            doubt = float(rng.random())
            town = "Lyon" if rng.random() < doubt else "Paris"
            scores = {"mean_nll": doubt, "sequence_nll": doubt, "max_token_entropy": doubt, "min_token_logprob": -doubt}
            text = f"The capital of France is {town}."
            states = States(layers=(3,), mean=tuple(other.normal(size=8)), last=(doubt, *other.normal(size=7)))
            place = {"start": at, "stop": at + 1, "begin": at, "end": at + 1}
            sentences.append({"text": text, **place, "scores": scores, "states": states.to_json_dict()})
        conditions = {
            "frame": "f",
            "max_new_tokens": 9,
            "temperature": 0.0,
            "top_p": 1.0,
            "stop": [],
            "endings": ["stop"],
        }
        rows.append({"id": each.id, "answer": "x", "ending": "stop", "conditions": conditions, "sentences": sentences})
    path.write_text("".join(json.dumps(each) + "\n" for each in (header, *rows)), encoding="utf-8")


def test_the_report_tells_scores_from_chance_and_writes_rows(tmp_path, monkeypatch, capsys) -> None:
    made_up(tmp_path / "run.jsonl")
    header, rows = bench.rows_of_run(tmp_path / "run.jsonl")
    table = bench.table_of(rows)
    found = bench.aurocs(table, draws=100)
    assert found["mean_nll"][1] > 0.6 and found["chance"][1] < 0.5 < found["chance"][2]
    assert bench.within(table, table.scores["mean_nll"]) == pytest.approx(found["mean_nll"][0])  # one relation only
    responses = [replace(bench.labelled(header, row), id=f"q{at}") for at, row in enumerate(rows)]
    drawn = bench.with_chance(responses)
    found_by = {
        name: bench.backed_off(drawn, name, alphas=[0.01, 0.3], allowed=[0], times=50)
        for name in ("mean_nll", "chance")
    }
    left, blind = (found_by[name]["average", 0, 0.3] for name in ("mean_nll", "chance"))
    assert left.right > blind.right and left.failing <= 0.35
    assert ("certified", 0, 0.01) not in found_by["mean_nll"]
    monkeypatch.setattr(bench, "aurocs", lambda table: bench_aurocs(table, draws=100))
    monkeypatch.setattr(bench, "labelled", lambda header, row: next(own))
    own, rows_file = iter(responses), tmp_path / "rows.jsonl"
    options = ["--rows", rows_file, "--judged", 3, "--scores", "mean_nll", "fused", "--times", 2]
    monkeypatch.setattr(sys, "argv", [*map(str, ["x", "report", tmp_path / "run.jsonl", *options])])
    assert bench.main() == 0
    shown = capsys.readouterr().out
    assert "| mean_nll | 0 | 0.1 |" in shown and "| fused | 0 | 0.1 |" in shown and "| text alone |" in shown
    labels = Counter(own.correct for each in read_responses(rows_file) for own in each.sentences)
    assert set(labels) == {True, False}


def test_what_is_right_of_one_kind_and_wrong_of_another_is_not_told_within_kinds() -> None:
    kind = np.array(["capital"] * 50 + ["year"] * 50)
    table = bench.Table(
        response=np.arange(100),
        kind=kind,
        item=kind,
        wrong=np.arange(100) % 10 < np.where(kind == "year", 8, 2),
        texts=(),
        scores={},
    )
    by_kind = (kind == "year").astype(float)
    assert bench._auroc(table.wrong, by_kind) == pytest.approx(0.8)
    assert bench.within(table, by_kind) == 0.5
    assert bench.within(table, table.wrong.astype(float)) == 1.0


def test_a_sentence_is_about_one_item() -> None:
    assert bench.item_of(of("capital"), "The capital of France is Paris.") == "France"
    assert bench.item_of(of("opposite"), "The opposite of wide is fast.") == "wide"
    assert bench.item_of(of("capital"), "France and Japan have capitals.") == ""
    assert bench.item_of(among("plays by Shakespeare"), "Emma is a play.") == ""
