"""``score`` on a file without the command line: how rows are put together, and what an interruption leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard.errors import InputError
from hallucination_guard.rows import Partial, read_lines, score_lines
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Generation, Score

BINDING = {"input": "an input", "model": "a model"}


class Spy:
    """A scorer that remembers its batches."""

    primary = "hybridgrad"

    def __init__(self, fails: Callable[[Generation], bool] = lambda _: False) -> None:
        self.inner = ScriptedScorer(lambda each: RuntimeError("out of memory") if fails(each) else 1.0)
        self.identity = self.inner.identity
        self.batches: list[list[Generation]] = []

    def __call__(self, model: Any, generation: Generation) -> Score:
        return self.batch(model, [generation])[0]

    def batch(self, model: Any, generations: Sequence[Generation]) -> list[Score]:
        self.batches.append(list(generations))
        return self.inner.batch(model, generations)

    @property
    def texts(self) -> list[str]:
        return sorted(each.text for batch in self.batches for each in batch)


def file(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def answers(*lengths: int) -> bytes:
    """A line for each length of an answer."""
    return file(*({"id": at, "prompt": "?", "response": "x" * length} for at, length in enumerate(lengths, start=1)))


def score(raw: bytes, scorer: Any = None, model: Any = None, **settings: Any) -> list[tuple[int, dict[str, Any]]]:
    settings = {"batch_size": 8, "batch_tokens": 8192, "max_new_tokens": 16, **settings}
    batches = score_lines(
        model or ScriptedModel("ok"), read_lines(raw.splitlines()), scorer=scorer or Spy(), **settings
    )
    return [each for batch in batches for each in batch]


def tokens(generation: Generation) -> int:
    return len(generation.prompt_token_ids) + len(generation.response_token_ids)


class TestBatches:
    LENGTHS = (5, 300, 1, 40, 300, 7, 90, 40, 2, 1000, 33, 5)

    def test_hold_rows_of_like_length(self) -> None:
        spy = Spy()
        score(answers(*self.LENGTHS), spy, batch_size=3)
        lengths = [[len(each.text) for each in batch] for batch in spy.batches]
        assert lengths == [[1000, 300, 300], [90, 40, 40], [33, 7, 5], [5, 2, 1]]

    @pytest.mark.parametrize("by_length", [True, False])
    @pytest.mark.parametrize("budget", [1, 50, 400, 700, 100_000])
    def test_never_exceed_the_tokens_but_for_a_longer_row_alone(self, budget: int, by_length: bool) -> None:
        spy = Spy()
        done = score(answers(*self.LENGTHS), spy, batch_tokens=budget, by_length=by_length)
        for batch in spy.batches:
            assert len(batch) == 1 or len(batch) * max(map(tokens, batch)) <= budget
        assert sorted(number for number, _ in done) == list(range(1, len(self.LENGTHS) + 1))

    def test_are_filled_as_far_as_the_tokens_allow(self) -> None:
        spy = Spy()
        each = tokens(ScriptedModel("ok").read("?", "x" * 10))
        score(answers(*[10] * 9), spy, batch_tokens=4 * each)
        assert list(map(len, spy.batches)) == [4, 4, 1]

    def test_count_an_answer_to_come_at_its_longest(self) -> None:
        spy = Spy()
        prompt = len(ScriptedModel("ok").prompt("?").token_ids)
        score(file(*[{"prompt": "?"}] * 6), spy, batch_tokens=2 * (prompt + 100), max_new_tokens=100)
        assert list(map(len, spy.batches)) == [2, 2, 2]

    def test_count_an_answer_to_come_no_longer_than_the_context_has_room(self) -> None:
        spy = Spy()
        score(file(*[{"prompt": "?"}] * 6), spy, ScriptedModel("ok", context=20), batch_tokens=60, max_new_tokens=100)
        assert list(map(len, spy.batches)) == [3, 3]

    def test_leave_the_order_alone_where_rows_are_streamed(self) -> None:
        raw = answers(*self.LENGTHS) + b"{not json\n" + answers(3, 2)
        done = score(raw, batch_tokens=700, by_length=False)
        assert [number for number, _ in done] == list(range(1, len(done) + 1))

    def test_give_what_single_rows_give(self, tiny: Any) -> None:
        raw = file(*({"id": at, "prompt": "Who is it? " * (at % 4 + 1), "response": "me " * at} for at in range(1, 9)))
        single = dict(score(raw, HybridGrad(), tiny, batch_size=1))
        batched = dict(score(raw, HybridGrad(), tiny, batch_tokens=300))
        assert single.keys() == batched.keys()
        for number, row in single.items():
            assert batched[number]["scores"] == pytest.approx(row["scores"], rel=1e-4)

    def test_that_fail_name_the_row_that_failed(self) -> None:
        done = dict(score(answers(1, 2, 3, 4), Spy(lambda each: each.text == "xxx")))
        assert {number: row["status"] for number, row in done.items()} == {
            1: "scored", 2: "scored", 3: "error", 4: "scored",
        }  # fmt: skip
        assert done[3]["reason"] == "line 3: out of memory"

    def test_are_not_spoilt_by_a_row_that_can_not_be_read(self) -> None:
        spy = Spy()
        done = dict(score(file({"prompt": "?", "response": "a"}, {"prompt": " "}, {"messages": [1]}, b"[" * 9999), spy))
        assert [done[number]["status"] for number in range(1, 5)] == ["scored", "error", "error", "error"]
        assert all(done[number]["reason"].startswith(f"line {number}: ") for number in range(2, 5))
        assert list(map(len, spy.batches)) == [1]


class TestPartial:
    RAW = answers(3, 1, 4, 1, 5, 9, 2, 6)

    def run(self, output: Path, spy: Spy, *, stop_after: int | None = None, binding: Any = None) -> None:
        """What the command does; ``stop_after`` so many batches it is interrupted."""
        with Partial(output, binding or BINDING) as partial:
            rest = [line for line in read_lines(self.RAW.splitlines()) if line.number not in partial.statuses]
            batches = score_lines(
                ScriptedModel("ok"), rest, scorer=spy, batch_size=2, batch_tokens=8192, max_new_tokens=16
            )
            for at, batch in enumerate(batches):
                if at == stop_after:
                    raise KeyboardInterrupt
                partial.add(batch)
            partial.finish()

    def interrupted(self, output: Path, batches: int = 2) -> Spy:
        spy = Spy()
        with pytest.raises(KeyboardInterrupt):
            self.run(output, spy, stop_after=batches)
        spy.batches.pop()  # measured and never handed over
        return spy

    def ids(self, output: Path) -> list[int]:
        return [json.loads(line)["id"] for line in output.read_bytes().splitlines()]

    def test_the_output_is_in_the_order_of_the_input_and_nothing_is_left_beside(self, tmp_path: Path) -> None:
        self.run(tmp_path / "out", Spy())
        assert self.ids(tmp_path / "out") == list(range(1, 9))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_interruption_leaves_the_old_output_and_the_finished_rows(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("old")
        self.interrupted(tmp_path / "out")
        assert (tmp_path / "out").read_text() == "old"
        assert (tmp_path / "out.partial").read_bytes().count(b"\n") == 1 + 4

    def test_the_next_call_scores_only_the_rest(self, tmp_path: Path) -> None:
        before, after = self.interrupted(tmp_path / "out"), Spy()
        self.run(tmp_path / "out", after)
        assert sorted(before.texts + after.texts) == sorted("x" * length for length in (3, 1, 4, 1, 5, 9, 2, 6))
        assert self.ids(tmp_path / "out") == list(range(1, 9))

    def test_cut_anywhere_it_is_taken_up_and_only_torn_rows_are_scored_again(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "out")
        whole = (tmp_path / "out.partial").read_bytes()
        for cut in range(len(whole) + 1):
            (tmp_path / "out.partial").write_bytes(whole[:cut])
            spy = Spy()
            self.run(tmp_path / "out", spy)
            assert len(spy.texts) == 8 - max(0, whole[:cut].count(b"\n") - 1)
            assert self.ids(tmp_path / "out") == list(range(1, 9))

    def test_a_tail_of_zeros_after_a_power_failure_is_dropped(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "out")
        with (tmp_path / "out.partial").open("ab") as partial:
            partial.write(b"\0" * 100 + b"\n")
        spy = Spy()
        self.run(tmp_path / "out", spy)
        assert len(spy.texts) == 4
        assert self.ids(tmp_path / "out") == list(range(1, 9))

    def test_killed_before_the_partial_file_was_removed_nothing_is_scored(self, tmp_path: Path) -> None:
        with Partial(tmp_path / "out", BINDING) as partial:
            partial.add(score(self.RAW))
            whole = partial.path.read_bytes()
            partial.finish()
        (tmp_path / "out.partial").write_bytes(whole)
        spy = Spy()
        self.run(tmp_path / "out", spy)
        assert spy.batches == []
        assert self.ids(tmp_path / "out") == list(range(1, 9))

    def test_rows_of_another_run_are_refused_and_kept(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path / "out")
        kept = (tmp_path / "out.partial").read_bytes()
        with pytest.raises(InputError, match=r"another model \(.*delete the file, or give another output"):
            self.run(tmp_path / "out", Spy(), binding={**BINDING, "model": "other"})
        assert (tmp_path / "out.partial").read_bytes() == kept

    def test_a_file_of_that_name_that_is_none_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "out.partial").write_text("my notes\n")
        with pytest.raises(InputError, match="in the way"):
            self.run(tmp_path / "out", Spy())
        assert (tmp_path / "out.partial").read_text() == "my notes\n"

    def test_two_processes_do_not_write_one_output(self, tmp_path: Path) -> None:
        with Partial(tmp_path / "out", BINDING), pytest.raises(InputError, match="another process"):
            self.run(tmp_path / "out", Spy())

    def test_no_rows_are_an_empty_output(self, tmp_path: Path) -> None:
        with Partial(tmp_path / "out", BINDING) as partial:
            partial.finish()
        assert (tmp_path / "out").read_bytes() == b""
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").touch()
        (tmp_path / "out").symlink_to("real")
        self.run(tmp_path / "out", Spy())
        assert (tmp_path / "out").is_symlink()
        assert self.ids(tmp_path / "real") == list(range(1, 9))

    def test_an_id_that_utf_8_can_not_write_is_written_as_it_came(self, tmp_path: Path) -> None:
        done = score(b'{"id": "\\ud800", "prompt": "?", "response": "a"}\n')
        with Partial(tmp_path / "out", BINDING) as partial:
            partial.add(done)
            partial.finish()
        assert json.loads((tmp_path / "out").read_bytes())["id"] == "\ud800"
