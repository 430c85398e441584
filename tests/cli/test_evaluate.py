"""``evaluate`` as a user calls it, on a tiny model: one pass, a report, and nothing paid for twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel

from hallucination_guard import Calibration
from hallucination_guard.calibration import read_labelled
from hallucination_guard.cli import evaluate
from hallucination_guard.cli.app import run as run_command
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.testing import tiny_model, tiny_tokenizer

COUNT = 60


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that was answered, in order."""
    asked: list[str] = []
    real = WhiteBoxModel.generate

    def generate(self: WhiteBoxModel, messages: Any, **settings: Any) -> Any:
        asked.extend(messages)
        return real(self, messages, **settings)

    monkeypatch.setattr(WhiteBoxModel, "generate", generate)
    return asked


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command on a tiny model, with or without a chat template."""

    def run(*arguments: object, base: bool = False) -> int:
        tokenizer = tiny_tokenizer(chat_template=None) if base else tiny_tokenizer()
        loaded = WhiteBoxModel(tiny_model(), tokenizer, name="tiny", self_test=False)
        monkeypatch.setattr(evaluate, "load", lambda _: loaded)
        given = ["evaluate", "--output", tmp_path / "out", "--max-new-tokens", 4, "--resamples", 1000, *arguments]
        return run_command([str(each) for each in given])

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Questions of which some are answered rightly by chance: a letter is a likely part of what a random model says."""
    path = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{at}", "query": f"What is {at * 7919}?", "answers": ["x"]} for at in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Answers with labels."""
    path = tmp_path / "given.jsonl"
    rows = [
        {"query": f"What is {at}?", "response": "abc"[: 1 + at % 3] * (1 + at % 5), "label": at % 3 == 0}
        for at in range(COUNT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found


class TestOnePass:
    def test_writes_answers_report_and_plots(
        self, call: Callable[..., int], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert call("--data", given) == 0
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"answers.jsonl", "report.md", "report.json", "risk-coverage.png", "reliability.png", "roc.png"} <= names
        assert len(read_labelled(tmp_path / "out" / "answers.jsonl")) == COUNT
        rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
        assert len(rows) == COUNT
        assert set(rows[0]["scores"]) == set(report(tmp_path)["scores"])
        found = report(tmp_path)
        assert found["about"]["judge"] == "given"
        assert {"semgrad", "semgrad_mean", "hybridgrad", "-min_token_logprob", "length", "fused"} <= set(
            found["scores"]
        )
        assert found["reference"] in capsys.readouterr().out

    def test_json_is_the_report(
        self, call: Callable[..., int], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        call("--data", given, "--json", "--scores", "semgrad,length", "--reference", "length")
        shown = json.loads(capsys.readouterr().out)
        assert shown == report(tmp_path)
        assert set(shown["scores"]) == {"semgrad", "length"}
        assert set(shown["differences"]) == {"semgrad"}

    def test_the_same_command_answers_nothing_twice(
        self, call: Callable[..., int], questions: Path, prompts: list[str], tmp_path: Path
    ) -> None:
        call("--data", questions, "--limit", 10)
        call("--data", questions)
        call("--data", questions, "--judge", "rouge")
        assert len(prompts) == len(set(prompts)) == COUNT
        assert report(tmp_path)["about"]["judge"] == "rouge-l>=0.3"
        assert {row.judge for row in read_labelled(tmp_path / "out" / "answers.jsonl")} == {"rouge-l>=0.3"}

    def test_another_model_prompt_or_data_is_refused(
        self, call: Callable[..., int], questions: Path, tmp_path: Path
    ) -> None:
        call("--data", questions, "--limit", 4)
        with pytest.raises(InputError, match="another prompt"):
            call("--data", questions, "--prompt", "Q: {query}")
        questions.write_text(questions.read_text().replace("What", "Who"))
        with pytest.raises(InputError, match="another data"):
            call("--data", questions)

    def test_examples_are_not_evaluated(
        self, call: Callable[..., int], questions: Path, prompts: list[str], tmp_path: Path
    ) -> None:
        call("--data", questions, "--shots", 3, "--limit", 5, base=True)
        ids = {row.id for row in read_labelled(tmp_path / "out" / "answers.jsonl")}
        assert ids == {f"q{at}" for at in range(3, 8)}
        assert all(prompt.count("Question: ") == 4 for prompt in prompts)


class TestMoreScores:
    def test_yardsticks_are_kept_and_priced(
        self, call: Callable[..., int], given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from hallucination_guard.evaluation import yardsticks

        looked: list[int] = []
        real = yardsticks.look
        monkeypatch.setattr(yardsticks, "look", lambda *each: (looked.append(1), real(*each))[1])
        for _ in range(2):
            call("--data", given, "--yardsticks")
        assert len(looked) == COUNT
        found = report(tmp_path)
        for name in ("rauq", "-self_certainty", "1-boostedprob", "satrmd"):
            assert found["scores"][name]["seconds"] > 0
        assert "other 4 of 5 folds" in " ".join(found["notes"])

    def test_too_few_labels_for_satrmd_are_said(self, call: Callable[..., int], given: Path, tmp_path: Path) -> None:
        call("--data", given, "--yardsticks", "--limit", 6)
        found = report(tmp_path)
        assert "rauq" in found["scores"]
        assert "satrmd" not in found["scores"]
        assert "No satrmd" in " ".join(found["notes"])

    def test_samples_and_p_true_are_kept_and_priced(
        self, call: Callable[..., int], given: Path, prompts: list[str], tmp_path: Path
    ) -> None:
        for _ in range(2):
            call("--data", given, "--limit", 12, "--samples", 2, "--p-true")
        assert len(prompts) == 2 * 12
        found = report(tmp_path)
        for name in (
            "predictive_entropy",
            "semantic_entropy",
            "lexical_dissimilarity",
            "sar",
            "eigenscore",
            "cocoa",
            "1-semantic_density",
            "1-p_true",
        ):
            assert found["scores"][name]["seconds"] > 0
        said = " ".join(found["notes"])
        assert "own states of tiny" in said
        assert "Reply with the letter only" in said


class TestJudges:
    def judged_by(self, monkeypatch: pytest.MonkeyPatch, replies: list[str]) -> None:
        chat = FakeListChatModel(responses=replies)
        monkeypatch.setattr(evaluate, "_chat", lambda name: chat)

    def test_an_unclear_reply_is_counted_apart_and_the_status_says_so(
        self, call: Callable[..., int], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.judged_by(monkeypatch, ["yes", "no", "hmm"])
        assert call("--data", questions, "--judge", "llm", "--judge-model", "fake:one", "--limit", 12) == 1
        found = report(tmp_path)
        assert found["counts"]["undecided by the judge"] == 4
        assert found["counts"]["labelled"] == 8
        assert any("'hmm'" in note for note in found["notes"])
        assert {row.judge for row in read_labelled(tmp_path / "out" / "answers.jsonl")} == {"llm(fake:one)"}

    def test_an_unknown_chat_model_is_named(self, call: Callable[..., int], questions: Path) -> None:
        with pytest.raises(ConfigurationError, match="nobody"):
            call("--data", questions, "--judge", "llm", "--judge-model", "nobody:none")


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--judge", "embedding"], "sentence"),
            (["--judge", "llm"], "chat model"),
            (["--judge-model", "a:b"], "--judge llm"),
            (["--threshold", "0.5"], "--threshold"),
            (["--samples", "1"], "sample"),
            (["--shots", "30"], "examples"),
            (["--resamples", "10"], "resamples"),
            (["--prompt", "hello"], "place"),
            (["--scores", "nothing", "--limit", "4"], "nothing"),
            (["--reference", "nothing", "--limit", "4"], "nothing"),
        ],
    )
    def test_what_can_not_be_done_is_said(
        self, call: Callable[..., int], questions: Path, arguments: list[str], said: str
    ) -> None:
        with pytest.raises((ConfigurationError, InputError), match=said):
            call("--data", questions, *arguments)

    def test_labels_leave_nothing_to_judge(self, call: Callable[..., int], given: Path) -> None:
        with pytest.raises(InputError, match="nothing to judge"):
            call("--data", given, "--judge", "contains")

    def test_a_file_is_no_folder(self, call: Callable[..., int], given: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(InputError, match="folder"):
            call("--data", given)


def test_beginnings_are_scored_and_calibrate_streams(call: Callable[..., int], tmp_path: Path) -> None:
    path, made = tmp_path / "given.jsonl", tmp_path / "stream.json"
    said = [f"It is {at}. It is not {at + 1}. Sure."[: 8 + at % 25] for at in range(2 * COUNT)]
    rows = [{"query": f"What is {at}?", "response": each, "label": len(each) < 20} for at, each in enumerate(said)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("--data", path, "--beginnings") == 0
    answers = read_labelled(tmp_path / "out" / "answers.jsonl")
    assert {len(each.beginnings) for each in answers} >= {1, 2}
    for each in answers:
        assert dict(each.beginnings[-1].scores) == dict(each.scores)
    options = f"calibrate --for stream --score sequence_nll --data {tmp_path}/out/answers.jsonl --output {made}"
    assert run_command(options.split()) == 0
    assert Calibration.load(made).gate == "stream"


def test_rows_without_beginnings_are_of_another_run(call: Callable[..., int], given: Path) -> None:
    assert call("--data", given) == 0
    with pytest.raises(InputError, match="beginnings"):
        call("--data", given, "--beginnings")
