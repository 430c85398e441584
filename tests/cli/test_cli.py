"""The command line, as a user calls it: real processes, real files, the real demo model where a model is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import WhiteBoxModel
from hallucination_guard.testing import tiny_model, tiny_tokenizer

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None and _spec.loader is not None
reference = sys.modules.setdefault("reference", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(reference)

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hallucination_guard.cli", *map(str, arguments)]


def call(*arguments: object, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def signals_as_from_a_terminal() -> None:
    """Runs in the child: under nohup, or in the background of a script, a process inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, as a folder."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without a chat template, as a folder."""
    path = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(path)
    tiny_tokenizer(chat_template=None).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("score")
    lines = [
        {"id": "a", "prompt": "Which metal is liquid at room temperature?"},
        {"id": "b", "prompt": "Name three rivers in Europe.", "response": "Rhine, Danube and Loire"},
        {"id": "c", "prompt": "What do bees make?", "response_token_ids": [338, 4649]},
        {
            "id": "d",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello, my name is Ada."},
                {"role": "assistant", "content": "Hello Ada."},
                {"role": "user", "content": "What is my name?"},
            ],
        },
    ]
    (path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = call("score", "--model", "demo", "--input", "in.jsonl", "--output", "out.jsonl", cwd=path)
    assert run.returncode == 0, run.stderr
    return rows(path / "out.jsonl")


class TestScoreOfTheDemoModel:
    def test_gives_one_row_a_line_in_order(self, scored: list[dict[str, Any]]) -> None:
        assert [row["id"] for row in scored] == ["a", "b", "c", "d"]
        assert {row["status"] for row in scored} == {"scored"}

    def test_agrees_with_autograd_over_the_full_sequence(
        self, scored: list[dict[str, Any]], demo: WhiteBoxModel
    ) -> None:
        for row in scored:
            prompt, answer = tuple(row["prompt_token_ids"]), tuple(row["response_token_ids"])
            expected = reference.full_sequence_scores(demo.model, prompt, answer, row["anchor"]["index"])
            assert row["scores"] == pytest.approx(expected, rel=1e-4)

    def test_reads_given_token_ids_exactly_as_they_are(self, scored: list[dict[str, Any]]) -> None:
        assert scored[2]["response_token_ids"] == [338, 4649]

    def test_names_the_anchor(self, scored: list[dict[str, Any]]) -> None:
        assert scored[0]["anchor"] == {"index": -4, "token": "<|im_start|>", "rule": "header"}


class TestScoreOfAFile:
    def score(self, folder: Path, tmp_path: Path, *lines: Any, options: tuple[str, ...] = ()) -> tuple[int, list[Any]]:
        written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(written) + b"\n")
        run = call("score", "--model", folder, "--input", "in.jsonl", "--output", "out.jsonl", *options, cwd=tmp_path)
        assert "Traceback" not in run.stderr
        return run.returncode, rows(tmp_path / "out.jsonl")

    def test_a_bad_line_ends_nothing_and_the_status_is_one(self, folder: Path, tmp_path: Path) -> None:
        good = {"id": 1, "prompt": "Who?", "response": "me"}
        bad: list[Any] = [
            b"{not json",
            b"\xff\xfe",
            [1, 2],
            {"id": 2},
            {"id": 3, "prompt": "a", "messages": []},
            {"id": 4, "messages": [{"role": "user"}]},
            {"id": 5, "messages": []},
            {"id": 6, "prompt": "", "response": "x"},
            {"id": 7, "prompt": "Who?", "response_token_ids": [5, 100_000]},
            {"id": 8, "prompt": "Who?", "response_token_ids": ["5"]},
            {"id": 9, "prompt": "Who? " * 200, "response": "x"},
            {"id": 10, "prompt": "Who?", "response": "x", "response_token_ids": [1]},
            {"id": 11, "promt": "Who?"},
            {"id": 12, "prompt": 5},
            {"id": 13, "prompt": "Who?", "question": "not in it", "response": "x"},
        ]
        status, out = self.score(folder, tmp_path, good, *bad, good)
        assert status == 1
        assert [row["status"] for row in out] == ["scored", *["error"] * len(bad), "scored"]
        assert [row["line"] for row in out[1:-1]] == list(range(2, len(bad) + 2))
        assert all(row["reason"].startswith(f"line {row['line']}: ") and not row["scores"] for row in out[1:-1])

    def test_an_empty_answer_is_unscorable_and_no_failure(self, folder: Path, tmp_path: Path) -> None:
        status, out = self.score(
            folder,
            tmp_path,
            {"id": 1, "prompt": "Who?", "response": ""},
            {"id": 2, "prompt": "Who?", "response_token_ids": [2]},
            {"id": 3, "prompt": "Who?", "response": " \n"},
        )
        assert status == 0
        assert [(row["status"], row["scores"]) for row in out] == [("unscorable", {})] * 3
        assert all(row["reason"] for row in out)

    def test_batches_give_what_single_rows_give(self, folder: Path, tmp_path: Path) -> None:
        lines = [{"id": at, "prompt": "Who is it? " * at, "response": "it is me " * (7 - at)} for at in range(1, 7)]
        _, single = self.score(folder, tmp_path, *lines, options=("--batch-size", "1"))
        _, batched = self.score(folder, tmp_path, *lines, options=("--batch-size", "4"))
        for one, other in zip(single, batched, strict=True):
            assert other["scores"] == pytest.approx(one["scores"], rel=1e-4)

    def test_without_a_chat_template_the_question_must_be_named(self, base_folder: Path, tmp_path: Path) -> None:
        status, out = self.score(
            base_folder,
            tmp_path,
            {"id": 1, "prompt": "Q: Who? A:", "question": "Who?", "response": " me"},
            {"id": 2, "prompt": "Q: Who? A:", "response": " me"},
        )
        assert status == 1
        assert out[0]["anchor"]["rule"] == "question"
        assert out[1]["status"] == "error"
        assert "name it" in out[1]["reason"]


class TestBadUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("score", "--input", "missing.jsonl", "--output", "out.jsonl"), "missing.jsonl"),
            (("score", "--model", "nowhere/at-all", "--input", "empty", "--output", "out.jsonl"), "nowhere/at-all"),
            (("score", "--model", "nowhere.gguf", "--input", "empty", "--output", "out.jsonl"), "nowhere.gguf"),
            (("score", "--input", "empty", "--output", "no/such/folder/out.jsonl"), "no/such/folder"),
            (("audit", "tail", "--log", "missing.jsonl"), "missing.jsonl"),
            (("audit", "verify", "--log", "missing.jsonl"), "missing.jsonl"),
            (("audit", "show", "abc", "--log", "missing.jsonl"), "missing.jsonl"),
        ],
    )
    def test_is_one_line_that_names_the_value_and_status_two(
        self, arguments: tuple[str, ...], words: str, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").touch()
        run = call(*arguments, cwd=tmp_path)
        assert run.returncode == 2
        assert words in run.stderr
        assert run.stderr.count("\n") == 1

    def test_of_a_policy_is_one_line(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "p.yaml").write_text("id: x\nversion: 1\nrules:\n  - abstain: {below: {confidense: 0.5}}\n")
        run = call("ask", "Who?", "--model", folder, "--policy", "p.yaml", cwd=tmp_path)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1)
        assert "p.yaml:4" in run.stderr

    def test_of_a_threshold_without_a_calibration_is_one_line(self, folder: Path, tmp_path: Path) -> None:
        run = call("ask", "Who?", "--model", folder, "--policy", "abstain", cwd=tmp_path)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1)
        assert "calibration" in run.stderr

    def test_an_unwritable_log_lets_nothing_through(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "audit.jsonl").mkdir()
        run = call("ask", "Who?", "--model", folder, cwd=tmp_path)
        assert run.returncode == 2
        assert run.stdout == ""
        assert run.stderr.count("\n") == 1


def test_ask_says_what_was_decided_and_writes_it_down(folder: Path, tmp_path: Path) -> None:
    run = call("ask", "Who?", "--model", folder, "--policy", "observe", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    shown = json.loads(call("audit", "show", said["audit_ids"][0][:10], "--json", cwd=tmp_path).stdout)
    assert shown["decision"] == said["decision"]
    assert shown["answer"] == (said["text"] if said["text"] is not None else shown["answer"])
    assert call("audit", "verify", cwd=tmp_path).returncode == 0
    assert said["audit_ids"][0][:12] in call("audit", "tail", cwd=tmp_path).stdout


class TestAskExplains:
    def test_the_answer_in_a_page(self, folder: Path, tmp_path: Path) -> None:
        run = call("ask", "Who?", "--model", folder, "--explain", "page.html", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert "explained in page.html" in run.stderr
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert "accept by " in page

    def test_an_answer_that_was_not_let_through_and_says_so(self, folder: Path, tmp_path: Path) -> None:
        rule = "id: x\nversion: 1\nrules:\n  - abstain: {above: {score: semgrad, limit: 0}}\n"
        (tmp_path / "p.yaml").write_text(rule, encoding="utf-8")
        run = call("ask", "Who?", "--model", folder, "--policy", "p.yaml", "--explain", "page.html", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("[abstain:")
        assert "This answer was not let through." in (tmp_path / "page.html").read_text(encoding="utf-8")

    def test_nothing_in_one_line_where_there_is_no_score(self, base_folder: Path, tmp_path: Path) -> None:
        run = call("ask", "Who?", "--model", base_folder, "--explain", "page.html", cwd=tmp_path)
        assert [line for line in run.stderr.splitlines() if "nothing to explain: " in line] != []
        assert not (tmp_path / "page.html").exists()

    def test_where_it_can_not_be_written_nothing_is_asked(self, folder: Path, tmp_path: Path) -> None:
        run = call("ask", "Who?", "--model", folder, "--explain", "no/page.html", cwd=tmp_path)
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
        assert not (tmp_path / "audit.jsonl").exists()


def test_verify_finds_an_edited_record(folder: Path, tmp_path: Path) -> None:
    call("ask", "Who?", "--model", folder, "--policy", "observe", cwd=tmp_path)
    log = tmp_path / "audit.jsonl"
    log.write_text(log.read_text().replace('"attempt":1', '"attempt":2'))
    run = call("audit", "verify", "--json", cwd=tmp_path)
    assert run.returncode == 1
    assert json.loads(run.stdout)["ok"] is False


def test_doctor_shows_the_anchor_in_its_context(folder: Path, tmp_path: Path) -> None:
    run = call("doctor", "--model", folder, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "anchor t*  '<|im_start|>' at -11, by the rule 'header'" in run.stdout
    assert "[[<|im_start|>]]" in run.stdout
    assert "self-test  passed" in run.stdout


def test_doctor_says_how_to_name_the_question_where_there_is_no_template(base_folder: Path, tmp_path: Path) -> None:
    run = call("doctor", "--model", base_folder, cwd=tmp_path)
    assert run.returncode == 0
    assert "name it" in run.stdout
    named = call("doctor", "--model", base_folder, "--anchor-question", "What is the capital", cwd=tmp_path)
    assert "by the rule 'question'" in named.stdout


def test_a_closed_pipe_is_no_failure(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Who?", "response": "me"}) + "\n")
    score = " ".join(command("score", "--model", folder, "--input", "in.jsonl", "--output", "-"))
    run = subprocess.run(
        f"{score} | true",
        shell=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in run.stderr


class Interrupted:
    """``score`` of 400 lines, sent a signal after its first rows."""

    def __init__(self, folder: Path, cwd: Path, sent: signal.Signals) -> None:
        lines = [{"id": at, "prompt": "Who?", "response": "it is me" + " again" * (at % 7)} for at in range(400)]
        (cwd / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.out = cwd / "out.jsonl"
        self.partial = cwd / "out.jsonl.partial"
        self.cwd = cwd
        self.arguments = ("score", "--model", folder, "--input", "in.jsonl", "--output", self.out)
        process = subprocess.Popen(
            command(*self.arguments, "--batch-size", "1"),
            cwd=cwd,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=signals_as_from_a_terminal,
        )
        began = time.monotonic()
        while not self.partial.exists() or self.partial.read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            assert time.monotonic() - began < 120
        process.send_signal(sent)
        _, self.said = process.communicate(timeout=60)
        self.status = process.returncode

    def kept(self) -> dict[int, dict[str, Any]]:
        """The whole rows of the partial file by line number."""
        whole = self.partial.read_bytes().rpartition(b"\n")[0].splitlines()[1:]
        return {each["line"]: each["row"] for each in map(json.loads, whole)}

    def again(self) -> subprocess.CompletedProcess[str]:
        return call(*self.arguments, cwd=self.cwd)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_after_an_interruption_the_same_command_finishes_and_scores_no_row_twice(
    sent: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    run = Interrupted(folder, tmp_path, sent)
    assert not run.out.exists()
    kept = run.kept()
    assert 0 < len(kept) < 400
    again = run.again()
    assert again.returncode == 0, again.stderr
    assert f"{len(kept)} of 400 rows" in again.stderr
    out = rows(run.out)
    assert [row["id"] for row in out] == list(range(400))
    # The wall time that a row took is never the same twice.
    assert all(out[number - 1] == row for number, row in kept.items())
    assert not list(tmp_path.glob("out.jsonl?*"))


def test_control_c_ends_with_one_line_that_says_where_the_rows_are(folder: Path, tmp_path: Path) -> None:
    run = Interrupted(folder, tmp_path, signal.SIGINT)
    assert run.status == 1
    assert run.said.count("\n") == 1
    assert "out.jsonl.partial" in run.said


def test_rows_of_another_input_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    run = Interrupted(folder, tmp_path, signal.SIGKILL)
    before = run.partial.read_bytes()
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Who else?", "response": "me"}) + "\n")
    again = run.again()
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "another input" in again.stderr
    assert "delete the file" in again.stderr
    assert run.partial.read_bytes() == before


def test_a_full_disk_is_one_line_and_the_finished_rows_stay(folder: Path, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "Who?", "response": "it is me"}) + "\n"
    (tmp_path / "in.jsonl").write_text(line * 40)
    score = command("score", "--model", folder, "--input", "in.jsonl", "--output", "out.jsonl", "--batch-size", "4")
    small = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    run = subprocess.run(
        [sys.executable, "-c", f"{small} os.execv(sys.executable, {score!r})"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert "out.jsonl.partial" in run.stderr
    again = subprocess.run(score, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "continuing: " in again.stderr
    assert len(rows(tmp_path / "out.jsonl")) == 40


@pytest.mark.parametrize("output", ["/dev/full", "-"])
def test_a_device_without_room_is_one_line(output: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Who?", "response": "me"}) + "\n")
    score = command("score", "--model", folder, "--input", "in.jsonl", "--output", output)
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            score, cwd=tmp_path, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert not Path("/dev/full.partial").exists()


def test_standard_output_gets_the_rows_in_order_and_no_partial_file(folder: Path, tmp_path: Path) -> None:
    lines = [{"id": at, "prompt": "Who?" * (1 + at % 3), "response": "me"} for at in range(7)]
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    run = call("score", "--model", folder, "--input", "-", "--output", "-", cwd=tmp_path, stdin=stdin)
    assert [json.loads(line)["id"] for line in run.stdout.splitlines()] == list(range(7))
    assert not list(tmp_path.iterdir())


def test_help_names_every_command(tmp_path: Path) -> None:
    said = call("--help", cwd=tmp_path).stdout
    for name in ("demo", "ask", "score", "doctor", "audit"):
        assert name in said
