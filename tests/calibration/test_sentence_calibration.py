"""A calibration of sentences says what was fitted, refuses what it was not fitted on, and comes back from its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hallucination_guard.calibration import (
    FUSED,
    LabelledResponse,
    LabelledSentence,
    SentenceCalibration,
    calibrate_sentences,
    fit_fusion,
    read_responses,
    write_responses,
)
from hallucination_guard.cli.app import run as run_command
from hallucination_guard.errors import CalibrationError, CalibrationMismatch, ConfigurationError, InputError
from hallucination_guard.values import Conditions, ModelIdentity, ScorerIdentity, Sentence, States

MODEL = ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t")
SCORER = ScorerIdentity(name="sentences", version="1", settings={"gradient": "False"})


def responses(n: int = 120, **changes: Any) -> list[LabelledResponse]:
    rng = np.random.default_rng(0)
    return [
        LabelledResponse(
            **{
                "id": f"q{at}",
                "judge": "made up",
                "sentences": tuple(
                    LabelledSentence(
                        scores={"mean_nll": float(s), "min_token_logprob": -float(s)},
                        correct=None if rng.random() < 0.1 else bool(rng.random() > s**3),
                    )
                    for s in rng.random(rng.integers(1, 6))
                ),
                "model": MODEL,
                "scorer": SCORER,
                "conditions": Conditions(frame="f", endings=("stop",)),
                **changes,
            }
        )
        for at in range(n)
    ]


def fitted(**settings: Any) -> SentenceCalibration:
    given = {"score": "mean_nll", "alphas": [0.2, 0.5], "at_most": [0, 1], **settings}
    return calibrate_sentences(responses(), **given)


def test_every_threshold_is_there_with_its_retention() -> None:
    found = fitted()
    assert [(each.guarantee, each.at_most, each.alpha) for each in found.thresholds] == [
        (guarantee, k, alpha) for guarantee in ("certified", "average") for k in (0, 1) for alpha in (0.2, 0.5)
    ]
    for each in found.thresholds:
        assert each.bound <= each.alpha and 0.0 <= each.empty <= 1.0 and each.sentences > 0.0
    certified, average = found.thresholds[0], found.thresholds[4]
    assert certified.threshold <= average.threshold


def test_more_wrong_allowed_keeps_no_less() -> None:
    first, _, more, _ = fitted().thresholds[:4]
    assert (first.at_most, more.at_most) == (0, 1)
    assert more.threshold >= first.threshold and more.sentences >= first.sentences


def test_too_few_responses_are_infeasible() -> None:
    found = calibrate_sentences(responses(20), score="mean_nll", alphas=[0.04, 0.1])
    assert not any(each.alpha == 0.04 for each in found.thresholds)
    refused = {(each.guarantee, each.alpha): each for each in found.infeasible}
    assert refused["certified", 0.1].least == 22  # .9²² < .1 < .9²¹
    assert refused["average", 0.04].least == 24
    assert "INFEASIBLE" in refused["average", 0.04].in_words()


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    found = fitted()
    found.save(tmp_path / "s.json")
    assert SentenceCalibration.load(tmp_path / "s.json") == found


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain["thresholds"][0].update(threshold=9.0),
        lambda plain: plain["thresholds"][0].update(id=""),
        lambda plain: plain.update(fingerprint="another"),
        lambda plain: plain.update(score="sequence_nll"),
        lambda plain: plain.update(more=1),
        lambda plain: plain.pop("judge"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, change: Any) -> None:
    fitted().save(tmp_path / "s.json")
    plain = json.loads((tmp_path / "s.json").read_text())
    change(plain)
    (tmp_path / "s.json").write_text(json.dumps(plain))
    with pytest.raises(CalibrationError):
        SentenceCalibration.load(tmp_path / "s.json")


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        SentenceCalibration.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("model", "scorer", "word"),
    [
        (replace(MODEL, fingerprint="g"), SCORER, "model"),
        (replace(MODEL, template="u"), SCORER, "template"),
        (MODEL, replace(SCORER, settings={"gradient": "True"}), "scorer settings"),
    ],
)
def test_it_is_refused_for_another(model: ModelIdentity, scorer: ScorerIdentity, word: str) -> None:
    fitted().check(MODEL, SCORER)
    with pytest.raises(CalibrationMismatch, match=word):
        fitted().check(model, scorer)


@pytest.mark.parametrize(
    "other",
    [
        {"judge": "another"},
        {"model": replace(MODEL, fingerprint="g")},
        {"scorer": replace(SCORER, version="2")},
        {"conditions": Conditions(frame="g", endings=("stop",))},
        {"id": "q0"},
    ],
)
def test_what_does_not_go_together_is_refused(other: dict[str, Any]) -> None:
    rows = [*responses(30), *responses(1, **{"id": "one more", **other})]
    with pytest.raises(CalibrationError):
        calibrate_sentences(rows, score="mean_nll", alphas=[0.5])


@pytest.mark.parametrize("score", ["min_token_logprob", "none"])
def test_a_score_that_cannot_be_read_is_refused(score: str) -> None:
    with pytest.raises(CalibrationError, match="mean_nll"):
        fitted(score=score)


@pytest.mark.parametrize("settings", [{"alphas": [0.0]}, {"alphas": []}, {"at_most": [-1]}, {"delta": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        fitted(**settings)


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    write_responses(tmp_path / "r.jsonl", responses())
    assert read_responses(tmp_path / "r.jsonl") == responses()


@pytest.mark.parametrize(
    "edit",
    [
        {"model": {"fingerprint": ["a"]}},
        {"model": {"fingerprint": None}},
        {"model": {"fingerprint": "\\ud800"}},
        {"model": {"structure": 1}},
        {"scorer": {"version": 1}},
        {"scorer": {"settings": None}},
        {"scorer": {"settings": [1]}},
        {"scorer": {"settings": {"gradient": False}}},
        {"sentences": [{"scores": {"mean_nll": 1.0}, "correct": True, "states": {"x": 1}}]},
    ],
)
def test_a_row_of_odd_types_is_refused_by_line(tmp_path: Path, edit: dict[str, Any]) -> None:
    row = responses(1)[0].to_json_dict()
    for name, change in edit.items():
        row[name] = {**row[name], **change} if isinstance(change, dict) else change
    (tmp_path / "r.jsonl").write_text(json.dumps(row).replace("\\\\ud800", "\\ud800"))
    with pytest.raises(InputError, match="line 1"):
        read_responses(tmp_path / "r.jsonl")


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"id": 1}\n'])
def test_what_is_no_row_is_refused_by_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(InputError):
        read_responses(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    "change",
    [{"sentences": ()}, {"id": ""}, {"judge": ""}, {"conditions": Conditions(frame="f", endings=("stop", "length"))}],
)
def test_a_row_refuses_what_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        responses(1, **change)


def run(*arguments: object) -> int:
    return run_command(["calibrate", "--for", "sentences", *map(str, arguments)])


def test_the_command_writes_what_the_function_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_responses(tmp_path / "r.jsonl", responses())
    data, out = tmp_path / "r.jsonl", tmp_path / "s.json"
    assert run("--data", data, "--output", out, "--score", "mean_nll", "--alpha", 0.2, 0.5, "--at-most", 0, 1) == 0
    found = SentenceCalibration.load(out)
    assert found.thresholds == fitted(date=found.date).thresholds
    assert "right kept" in capsys.readouterr().out


def test_the_command_says_infeasible_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_responses(tmp_path / "r.jsonl", responses(10))
    data, out = tmp_path / "r.jsonl", tmp_path / "s.json"
    assert run("--data", data, "--output", out, "--score", "mean_nll", "--alpha", 0.05) == 0
    assert "INFEASIBLE" in capsys.readouterr().out
    assert run("--data", data, "--output", out, "--score", "mean_nll", "--alpha", 0.05, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["infeasible"]) == 2


@pytest.mark.parametrize(
    "arguments", [("--alpha", 0.2), ("--score", "mean_nll"), ("--score", "mean_nll", "--alpha", 0.2, "--judge", "x")]
)
def test_the_command_wants_score_and_alpha_and_no_judge(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    write_responses(tmp_path / "r.jsonl", responses(10))
    with pytest.raises(InputError):
        run("--data", tmp_path / "r.jsonl", "--output", tmp_path / "s.json", *arguments)


D = 16
READING = replace(SCORER, settings={"gradient": "False", "layers": "paper", "states": "True"})


def knowing(n: int = 160, seed: int = 0) -> list[LabelledResponse]:
    """Responses whose likelihood says a little of what is wrong, and whose states say much."""
    rng, towards = np.random.default_rng(seed), np.random.default_rng(99).normal(size=D) / 4
    made = []
    for response in responses(n):
        sentences = []
        for each in response.sentences:
            doubt = rng.normal()
            mean, last = (rng.normal(size=D) + 1.5 * doubt * towards for _ in range(2))
            nll = float(np.exp(0.3 * doubt + rng.normal()))
            correct = None if each.correct is None else bool(rng.random() > 1 / (1 + np.exp(-2.5 * doubt)))
            states = States(layers=(3, 4), mean=tuple(mean), last=tuple(last))
            sentences.append(
                LabelledSentence(scores={"mean_nll": nll, "sequence_nll": 3 * nll}, correct=correct, states=states)
            )
        made.append(replace(response, sentences=tuple(sentences), scorer=READING))
    return made


def fused(rows: list[LabelledResponse], **settings: Any) -> SentenceCalibration:
    return calibrate_sentences(rows, **{"score": FUSED, "alphas": [0.3], "date": "2026-11-27", **settings})


def as_sentence(labelled: LabelledSentence) -> Sentence:
    return Sentence(start=0, stop=1, begin=0, end=1, scores=labelled.scores, states=labelled.states)


def right(found: SentenceCalibration) -> float:
    return found.thresholds[0].right


class TestFused:
    def test_states_that_know_keep_more_of_what_is_right(self) -> None:
        found = fused(knowing())
        assert found.fusion is not None and found.fusion.probe is not None
        assert (found.fitted, found.responses, found.thresholds[0].n) == (80, 80, 80)
        assert right(found) > right(fused(knowing(), score="mean_nll")) + 0.2

    def test_the_threshold_is_that_of_the_others_by_the_weights(self) -> None:
        """Read again, with what a guard reads, the labelled responses fail exactly as often as the file says."""
        rows = knowing()
        found = fused(rows)
        [threshold] = [each for each in found.thresholds if each.guarantee == "certified"]
        by_id = {each.id: each for each in rows}
        first_seen = sorted(by_id, key=lambda each: hashlib.sha256(f"0\0{each}".encode()).digest())[:80]
        failing = 0
        for each in (by_id[name] for name in by_id if name not in first_seen):
            scored = found.completed([as_sentence(own) for own in each.sentences])
            pairs = zip(scored, each.sentences, strict=True)
            kept = [own for one, own in pairs if one.scores[found.backoffs[0].score] <= threshold.threshold]
            failing += any(own.correct is False for own in kept)
        assert failing == threshold.failures > 0

    def test_labels_that_the_thresholds_read_do_not_touch_the_weights(self) -> None:
        rows = knowing()
        found = fused(rows)
        fit = {each.id for each in rows if each.id in self._fit_part(rows)}
        turned = [
            each
            if each.id in fit
            else replace(
                each,
                sentences=tuple(replace(own, correct=None if own.correct is None else True) for own in each.sentences),
            )
            for each in rows
        ]
        other = fused(turned)
        assert other.fusion == found.fusion and other.thresholds[0].failures == 0 < found.thresholds[0].failures

    @staticmethod
    def _fit_part(rows: list[LabelledResponse]) -> frozenset[str]:
        from hallucination_guard.calibration.certificate import split
        from hallucination_guard.calibration.sentences import FIT_SHARE

        return split([each.id for each in rows], share=FIT_SHARE)[0]

    def test_what_was_said_once_needs_no_states_again(self) -> None:
        rows = knowing()
        found = fused(rows)
        [first] = found.completed([as_sentence(rows[0].sentences[0])])
        assert set(first.scores) == {"mean_nll", "sequence_nll", found.backoffs[0].score}
        assert found.completed([replace(first, states=None)]) == (replace(first, states=None),)

    def test_what_other_weights_said_is_not_taken_for_it(self) -> None:
        one, other = fused(knowing()), fused(knowing(seed=1))
        [first] = one.completed([as_sentence(knowing()[0].sentences[0])])
        assert one.backoffs[0].score != other.backoffs[0].score not in first.scores
        [both] = other.completed([first])
        bare = other.completed([as_sentence(knowing()[0].sentences[0])])[0]
        assert both.scores[other.backoffs[0].score] == bare.scores[other.backoffs[0].score]

    def test_a_sentence_without_states_is_refused_and_gets_no_number(self) -> None:
        rows = knowing()
        with pytest.raises(CalibrationError, match="states"):
            fused(rows).completed([replace(as_sentence(rows[0].sentences[0]), states=None)])

    def test_without_states_the_scores_alone_are_fused(self) -> None:
        bare = [
            replace(each, sentences=tuple(replace(own, states=None) for own in each.sentences)) for each in knowing()
        ]
        found = fused(bare)
        assert found.fusion is not None and found.fusion.probe is None and "states" in found.fusion.why

    def test_too_few_labels_are_said(self) -> None:
        with pytest.raises(CalibrationError, match="at least 20"):
            fused(knowing(12))
        with pytest.raises(CalibrationError, match="fit part"):
            fused([replace(knowing(160)[0], sentences=tuple(own for e in knowing() for own in e.sentences))])

    def test_it_comes_back_from_its_file_and_is_of_one_piece(self, tmp_path: Path) -> None:
        found = fused(knowing())
        found.save(tmp_path / "s.json")
        assert SentenceCalibration.load(tmp_path / "s.json") == found
        plain = json.loads((tmp_path / "s.json").read_text())
        plain["fusion"]["intercept"] += 0.1
        (tmp_path / "s.json").write_text(json.dumps(plain))
        with pytest.raises(CalibrationError):
            SentenceCalibration.load(tmp_path / "s.json")

    def test_the_name_goes_with_weights(self) -> None:
        plain = fitted().model_dump()
        for change in ({"score": FUSED}, {"fusion": fit_fusion(self._rows()).model_dump()}, {"fitted": 3}):
            with pytest.raises(ValueError, match="fused"):
                SentenceCalibration.model_validate({**plain, **change})

    @staticmethod
    def _rows() -> list[Any]:
        return [own for each in knowing(60) for own in each.checked]

    def test_rows_with_states_come_back_from_their_file(self, tmp_path: Path) -> None:
        write_responses(tmp_path / "r.jsonl", knowing(5))
        assert read_responses(tmp_path / "r.jsonl") == knowing(5)

    def test_the_command_fits_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_responses(tmp_path / "r.jsonl", knowing())
        assert (
            run("--data", tmp_path / "r.jsonl", "--output", tmp_path / "s.json", "--score", FUSED, "--alpha", 0.3) == 0
        )
        assert SentenceCalibration.load(tmp_path / "s.json").thresholds == fused(knowing()).thresholds
        assert "80 other responses" in capsys.readouterr().out

    def test_labels_of_few_questions_are_too_few_however_many_sentences_they_have(self) -> None:
        """All wrong ones in one response: a fold without it has only right ones."""
        rows = [
            replace(each, sentences=tuple(replace(own, correct=at != 3) for own in each.sentences * 4))
            for at, each in enumerate(knowing(100))
        ]
        found = fused(rows, share=0.9)
        assert found.fusion is not None and found.fusion.probe is None and "too few" in found.fusion.why

    def test_states_that_the_scorer_does_not_read_are_refused(self) -> None:
        with pytest.raises(CalibrationError, match="reads none"):
            fused([replace(each, scorer=SCORER) for each in knowing()])

    def test_a_row_that_cannot_be_used_is_named(self) -> None:
        rows = knowing()
        last = max(rows, key=lambda each: each.id not in self._fit_part(rows))
        odd = replace(last, sentences=(replace(last.sentences[0], states=None), *last.sentences[1:]))
        with pytest.raises(CalibrationError, match=last.id):
            fused([odd if each is last else each for each in rows])

    @pytest.mark.parametrize("change", [{"fitted": 100000}, {"fitted": True}, {"responses": 10000}, {"fitted": 0}])
    def test_an_edited_split_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"."):
            SentenceCalibration.model_validate({**fused(knowing()).model_dump(), **change})

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_a_share_out_of_range_is_refused(self, share: float) -> None:
        with pytest.raises(ConfigurationError):
            fused(knowing(), share=share)
