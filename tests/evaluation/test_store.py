"""What was paid for is found again, and never taken for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from hallucination_guard.errors import InputError
from hallucination_guard.evaluation import Store


def test_rows_are_found_again(tmp_path: Path) -> None:
    Store(tmp_path / "a.jsonl", {"model": ["x", 1]}).add([{"id": "1", "text": "ä\ud800\n"}])
    again = Store(tmp_path / "a.jsonl", {"model": ("x", 1)})
    again.add([{"id": "2"}])
    assert Store(tmp_path / "a.jsonl", {"model": ["x", 1]}).rows == {
        "1": {"id": "1", "text": "ä\ud800\n"},
        "2": {"id": "2"},
    }


def test_rows_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    Store(tmp_path / "a.jsonl", {"model": "x", "prompt": "p"}).add([{"id": "1"}])
    with pytest.raises(InputError, match="another model"):
        Store(tmp_path / "a.jsonl", {"model": "y", "prompt": "p"})
    with pytest.raises(InputError, match="another prompt"):
        Store(tmp_path / "a.jsonl", {"model": "x"})


@pytest.mark.parametrize("cut", [1, 5])
def test_a_torn_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    Store(path, {}).add([{"id": "1"}, {"id": "2"}])
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Store(path, {})
    assert set(torn.rows) == {"1"}
    torn.add([{"id": "3"}])
    assert set(Store(path, {}).rows) == {"1", "3"}


def test_a_torn_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ki')
    Store(path, {"model": "x"}).add([{"id": "1"}])
    assert set(Store(path, {"model": "x"}).rows) == {"1"}


@pytest.mark.parametrize("text", ["hello\nyou\n", '{"kind": "a"}\n{"no": "id"}\n', "[]\n"])
def test_a_strangers_file_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"in the way|another"):
        Store(path, {})
    assert path.read_text() == text
