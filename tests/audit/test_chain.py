"""Whatever is done to a log afterwards is found."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hallucination_guard
from hallucination_guard.audit import GENESIS, AuditLog, AuditRecord, seal, verify
from hallucination_guard.audit.chain import Head, anchor_line, anchor_path, canonical, lines_backwards
from hallucination_guard.errors import AuditError

KEY = b"a secret of the auditor, 32 bytes"


def a_record(number: int) -> AuditRecord:
    return AuditRecord(
        id=f"id-{number}",
        request_id="request",
        model={"name": "m"},
        scorer={"name": "hybridgrad"},
        status="scored",
        scores={"hybridgrad": number / 10},
        policy={"id": "abstain_below"},
        decision="abstain",
        rule="abstain_below",
        reason="in words",
        prompt="Where is Paris?",
        answer="In Texas.",
    )


def a_log(path: Path, count: int = 6, **settings: Any) -> Path:
    with AuditLog(path, fsync=False, **settings) as log:
        for number in range(count):
            log(a_record(number))
    return path


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def resealed(lines: list[bytes], key: bytes | None = None) -> list[bytes]:
    """What an attacker makes who knows how the chain works."""
    prev, out = GENESIS, []
    for seq, line in enumerate(lines):
        record = seal(json.loads(line), seq, prev, key)
        prev = record["hash"]
        out.append(canonical(record).encode() + b"\n")
    return out


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return a_log(tmp_path / "audit.jsonl")


def test_an_untouched_log_is_fine(log: Path) -> None:
    found = verify(log)
    assert (found.ok, found.records, found.problems, found.anchored) == (True, 6, (), 6)


def test_an_empty_log_is_fine(tmp_path: Path) -> None:
    assert verify(a_log(tmp_path / "empty.jsonl", count=0)).ok


@pytest.mark.parametrize("line", range(6))
@pytest.mark.fault("log", "a record is edited", "found, with its line")
def test_an_edited_record_is_found_in_its_line_and_nowhere_else(log: Path, line: int) -> None:
    rewrite(log, lambda lines: [*lines[:line], lines[line].replace(b"abstain", b"accept"), *lines[line + 1 :]])
    [problem] = verify(log).problems
    assert (problem.line, problem.id) == (line + 1, f"id-{line}")
    assert "edited" in problem.what


@pytest.mark.parametrize(
    "edit",
    [
        lambda line: line.replace(b":", b": ", 1),
        lambda line: b'{"decision":"accept",' + line[1:],  # a second key, which a parser drops and a reader sees
        lambda line: line.replace(b"\n", b"\r\n"),
        lambda line: line.replace(b'"id-2"', b'"\\u0069d-2"'),
        lambda line: line.replace(b"0.2", b"1e999"),
        lambda line: line.replace(b"0.2", b"[" * 900 + b"]" * 900),
    ],
)
def test_no_edit_is_too_small_or_too_odd_to_be_found(log: Path, edit: Callable[[bytes], bytes]) -> None:
    before = log.read_bytes()
    rewrite(log, lambda lines: [*lines[:2], edit(lines[2]), *lines[3:]])
    assert log.read_bytes() != before
    assert [problem.line for problem in verify(log).problems] == [3]


def test_an_edited_place_does_not_make_its_neighbours_look_wrong(log: Path) -> None:
    rewrite(log, lambda lines: [*lines[:2], lines[2].replace(b'"seq":2', b'"seq":999'), *lines[3:]])
    assert [problem.line for problem in verify(log).problems] == [3]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = a_log(tmp_path_factory.mktemp("bytes") / "audit.jsonl", count=3)
    return path, path.read_bytes()


@given(st.data())
@pytest.mark.fault("log", "any byte is changed", "found")
def test_a_change_of_any_byte_is_found(three: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = three
    position = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[position]))
    path.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
    assert not verify(path).ok


@pytest.mark.parametrize("line", range(5))
@pytest.mark.fault("log", "a record is deleted", "found where it is missing")
def test_a_deleted_record_is_found_where_it_is_missing(log: Path, line: int) -> None:
    rewrite(log, lambda lines: lines[:line] + lines[line + 1 :])
    [problem] = verify(log).problems
    assert problem.line == line + 1
    assert "1 record(s) before it are missing" in problem.what


@pytest.mark.fault("log", "two records are swapped", "found")
def test_two_swapped_records_are_found(log: Path) -> None:
    rewrite(log, lambda lines: [lines[0], lines[2], lines[1], *lines[3:]])
    assert [problem.line for problem in verify(log).problems] == [2, 3]


def test_a_record_inserted_again_is_found_by_its_place_and_by_its_id(log: Path) -> None:
    rewrite(log, lambda lines: [*lines[:4], lines[1], *lines[4:]])
    problems = verify(log).problems
    assert {problem.line for problem in problems} == {5}
    assert any("inserted" in problem.what for problem in problems)
    assert any("used before, in line 2" in problem.what for problem in problems)


@pytest.mark.fault("log", "a record is replaced, with a right seal", "found")
def test_a_record_replaced_by_another_with_a_right_seal_is_found(log: Path) -> None:
    def replaced(lines: list[bytes]) -> list[bytes]:
        other = json.loads(lines[2]) | {"decision": "accept"}
        return [*lines[:2], canonical(seal(other, 2, other["prev"])).encode() + b"\n", *lines[3:]]

    rewrite(log, replaced)
    [problem] = verify(log).problems
    assert (problem.line, problem.what[:15]) == (4, "does not follow")


def test_an_id_used_twice_is_found_even_in_a_chain_that_is_whole(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl", fsync=False) as log:
        for number in (0, 1):
            log(a_record(number))
        log(replace(a_record(0), request_id="another"))
    [problem] = verify(log.path).problems
    assert (problem.line, problem.id, problem.what) == (3, "id-0", "its id was used before, in line 1")


def test_what_was_done_again_under_its_id_is_counted_and_no_problem(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl", fsync=False) as log:
        for number in (0, 1, 0):
            log(a_record(number))
    found = verify(log.path)
    assert (found.ok, found.records, found.repeated) == (True, 3, 1)


@pytest.mark.fault("log", "its tail is cut off", "found by the anchor")
def test_a_cut_off_tail_is_found_by_the_anchor(log: Path) -> None:
    rewrite(log, lambda lines: lines[:4])
    [problem] = verify(log).problems
    assert problem.what == "cut off: the anchor vouches for 6 record(s), 4 are left"


def test_a_log_emptied_altogether_is_found_by_the_anchor(log: Path) -> None:
    log.write_bytes(b"")
    assert "cut off" in verify(log).problems[0].what


def test_a_tail_cut_within_a_line_is_torn_and_cut(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-20])
    assert [problem.what.split(":")[0] for problem in verify(log).problems] == ["torn line", "cut off"]


def test_a_missing_newline_at_the_end_is_found(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-1])
    [problem] = verify(log).problems
    assert (problem.line, problem.what) == (6, "torn line: no newline at the end")


@pytest.mark.parametrize("line", [b"\n", b"null\n", b'"text"\n', b'{"seq":1}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_a_line_that_is_no_record_is_found_and_ends_nothing(log: Path, line: bytes) -> None:
    rewrite(log, lambda lines: [*lines[:3], line, *lines[3:]])
    found = verify(log)
    assert [(problem.line, problem.what) for problem in found.problems] == [(4, "torn line: not a record")]
    assert found.records == 6


def test_a_tail_rewritten_by_who_knows_the_chain_is_found_by_the_anchor(log: Path) -> None:
    rewrite(log, lambda lines: resealed([line.replace(b"abstain", b"accept") for line in lines]))
    [problem] = verify(log).problems
    assert problem.what == "rewritten: record 6 is not the one that the anchor vouches for"


@pytest.mark.fault(
    "log",
    "log and anchor are computed anew, without a key",
    "**not found**: keep a key, or a copy of the anchor elsewhere",
)
def test_without_a_key_a_recomputed_log_and_anchor_are_not_found(log: Path, tmp_path: Path) -> None:
    # What the docstring of AuditLog says the chain does not do; the next two tests are the remedies.
    forged = a_log(tmp_path / "forged.jsonl", count=3)
    shutil.copy(forged, log)
    shutil.copy(anchor_path(forged), anchor_path(log))
    assert verify(log).ok


def test_a_copy_of_the_anchor_kept_elsewhere_finds_a_recomputed_log(log: Path, tmp_path: Path) -> None:
    kept = shutil.copy(anchor_path(log), tmp_path / "elsewhere")
    rewrite(log, lambda lines: resealed([line.replace(b"abstain", b"accept") for line in lines]))
    anchor_path(log).unlink()
    assert [problem.what.split(":")[0] for problem in verify(log).problems] == ["not verifiable"]
    assert "rewritten" in verify(log, anchor=kept).problems[0].what


@pytest.mark.fault("log", "log and anchor are computed anew, and a key is used", "found")
def test_with_a_key_a_recomputed_log_and_anchor_are_found(tmp_path: Path) -> None:
    log = a_log(tmp_path / "audit.jsonl", key=KEY)
    assert verify(log, KEY).ok
    forged = a_log(tmp_path / "forged.jsonl", key=b"a guess")
    shutil.copy(forged, log)
    shutil.copy(anchor_path(forged), anchor_path(log))
    found = verify(log, KEY)
    assert found.problems[0].line == 0
    assert [problem.line for problem in found.problems[1:]] == [1, 2, 3, 4, 5, 6]


def test_with_a_key_a_log_resealed_without_one_is_found(tmp_path: Path) -> None:
    log = a_log(tmp_path / "audit.jsonl", key=KEY)
    rewrite(log, resealed)
    assert len(verify(log, KEY).problems) == 7  # every record, and the anchor's


def test_a_keyed_log_verified_without_its_key_is_not_fine(tmp_path: Path) -> None:
    found = verify(a_log(tmp_path / "audit.jsonl", key=KEY))
    assert all("another key" in problem.what for problem in found.problems)
    assert len(found.problems) == 7


def test_an_anchor_that_is_behind_is_fine(log: Path) -> None:
    behind = anchor_path(log).read_bytes()
    with AuditLog(log, fsync=False) as more:
        more(a_record(6))
    anchor_path(log).write_bytes(behind)
    found = verify(log)
    assert (found.ok, found.records, found.anchored) == (True, 7, 6)


def test_a_missing_anchor_is_said(log: Path) -> None:
    anchor_path(log).unlink()
    found = verify(log)
    assert (found.ok, found.anchored) == (False, 0)
    assert found.problems[0].what.startswith("not verifiable")


@pytest.mark.fault("log", "its tail and its anchor are taken away", "not verifiable")
def test_a_tail_that_was_cut_off_with_the_anchor_is_not_called_whole(tmp_path: Path) -> None:
    log = a_log(tmp_path / "audit.jsonl", key=KEY)
    rewrite(log, lambda lines: lines[:3])
    anchor_path(log).unlink()
    assert not verify(log, KEY).ok


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"count":1e999,"head":"","hash":""}', b"\xff"])
def test_a_damaged_anchor_is_found(log: Path, damage: bytes) -> None:
    anchor_path(log).write_bytes(damage)
    [problem] = verify(log).problems
    assert problem.line == 0


def test_an_anchor_edited_to_a_shorter_log_is_found(log: Path) -> None:
    anchor = json.loads(anchor_path(log).read_bytes())
    anchor_path(log).write_text(json.dumps(anchor | {"count": 4}))
    rewrite(log, lambda lines: lines[:4])
    assert "anchor" in verify(log).problems[0].what


def test_a_log_that_is_not_there_is_an_audit_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"nothing\.jsonl"):
        verify(tmp_path / "nothing.jsonl")


def test_the_problems_of_a_hopeless_log_are_counted_and_not_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(b"garbage\n" * 3000)
    problems = verify(path).problems
    assert len(problems) == 1001
    assert problems[-1].what == "… and 2000 more problem(s)"


def test_a_big_log_is_verified_in_the_memory_of_a_small_one(tmp_path: Path) -> None:
    path, prev, template = tmp_path / "big.jsonl", GENESIS, a_record(0).to_json_dict()
    with path.open("wb") as file:
        for seq in range(4000):
            record = seal(template | {"id": f"id-{seq}", "answer": "x" * 10_000}, seq, prev)
            prev = record["hash"]
            file.write(canonical(record).encode() + b"\n")
    anchor_path(path).write_text(anchor_line(Head(4000, prev), "2026-01-01T00:00:00+00:00", None))
    size = path.stat().st_size
    assert size > 40_000_000
    script = (
        "import resource, sys\n"
        "from hallucination_guard.audit import verify\n"
        "verify(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = verify(sys.argv[2])\n"
        "print(found.ok, found.records, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    small = a_log(tmp_path / "small.jsonl")
    root = str(Path(hallucination_guard.__file__).parents[1])
    command = [sys.executable, "-c", script, str(small), str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    ok, records, grown = done.stdout.split()
    assert (ok, records) == ("True", "4000")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    assert int(grown) * unit < size / 5


@given(st.lists(st.sampled_from([b"\n", b"a", b"bc"]), max_size=40).map(b"".join), st.integers(1, 9))
def test_lines_read_backwards_are_the_lines_in_reverse(content: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hallucination_guard.audit.chain._BLOCK", block)
        forwards = [line.removesuffix(b"\n") for line in io.BytesIO(content)]
        assert list(lines_backwards(io.BytesIO(content))) == forwards[::-1]
