"""Reading a log back: all of it, its end, or one record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard.audit import AuditLog, AuditRecord, find, records, tail
from hallucination_guard.errors import AuditError

IDS = ["aa11", "aa22", "bb", "bbb", "cé"]


def a_record(record_id: str) -> AuditRecord:
    return AuditRecord(
        id=record_id,
        request_id="request",
        model={"name": "m"},
        scorer={"name": "hybridgrad"},
        status="scored",
        scores={"hybridgrad": 0.25},
        policy={"id": "abstain_below"},
        decision="abstain",
        rule="abstain_below",
        reason="in words",
        prompt="aa bb",
        answer="x" * 50_000,
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    with AuditLog(tmp_path / "audit.jsonl", fsync=False) as log:
        for each in IDS:
            log(a_record(each))
    return log.path


def tear(log: Path, line: int) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:line], b'{"answer":\n', *lines[line:]]))


def test_all_records_come_in_order_and_sealed(log: Path) -> None:
    found = list(records(log))
    assert [record.id for record in found] == IDS
    assert [record.seq for record in found] == [0, 1, 2, 3, 4]
    assert [record.prev for record in found[1:]] == [record.hash for record in found[:-1]]


def test_records_come_one_at_a_time(log: Path) -> None:
    tear(log, 1)
    reading = records(log)
    assert next(reading).id == IDS[0]  # what is torn comes later and is not yet read
    with pytest.raises(AuditError, match="line 2 of") as caught:
        next(reading)
    assert "strict=False" in caught.value.hint


def test_a_torn_line_is_passed_over_only_on_request(log: Path) -> None:
    tear(log, 2)
    assert [record.id for record in records(log, strict=False)] == IDS
    assert [record.id for record in tail(log, 9, strict=False)] == IDS
    with pytest.raises(AuditError, match="line 4 from the end"):
        tail(log, 4)


def test_another_schema_is_never_passed_over(log: Path) -> None:
    log.write_bytes(log.read_bytes().replace(b'"schema":1', b'"schema":7', 1))
    with pytest.raises(AuditError, match=r"line 1 of .*: .*schema 7") as caught:
        list(records(log, strict=False))
    assert caught.value.hint


@pytest.mark.parametrize("n", [0, 1, 3, 5, 99])
def test_the_tail_is_the_end_of_all_records(log: Path, n: int) -> None:
    assert tail(log, n) == list(records(log))[max(len(IDS) - n, 0) :]


def test_the_tail_reads_no_more_than_it_needs(log: Path) -> None:
    log.write_bytes(b"garbage\n" * 100_000 + log.read_bytes())
    assert [record.id for record in tail(log, 3)] == IDS[2:]


def test_the_tail_of_an_empty_log_is_empty(tmp_path: Path) -> None:
    assert tail(AuditLog(tmp_path / "audit.jsonl").path, 3) == []


@pytest.mark.parametrize(
    ("prefix", "found"), [("aa1", "aa11"), ("bbb", "bbb"), ("bb", "bb"), ("cé", "cé"), ("c", "cé")]
)
def test_a_record_is_found_by_a_prefix_that_only_it_has_or_by_its_whole_id(log: Path, prefix: str, found: str) -> None:
    assert find(log, prefix).id == found


@pytest.mark.parametrize(
    ("prefix", "message"), [("aa", "several .* aa11, aa22"), ("", "several"), ("zz", "no record"), ("A", "no record")]
)
def test_a_prefix_of_no_record_or_of_several_is_an_audit_error_with_a_hint(
    log: Path, prefix: str, message: str
) -> None:
    with pytest.raises(AuditError, match=message) as caught:
        find(log, prefix)
    assert caught.value.hint


def test_an_id_that_is_there_twice_is_not_found_but_said(log: Path) -> None:
    with AuditLog(log, fsync=False) as more:
        more(replace(a_record("aa11"), request_id="another"))
    with pytest.raises(AuditError, match=r"several records .* have the id 'aa11'"):
        find(log, "aa11")


def test_a_torn_line_does_not_keep_another_record_from_being_found(log: Path) -> None:
    tear(log, 0)
    assert find(log, "aa1").id == "aa11"


@pytest.mark.parametrize(
    "read", [lambda path: list(records(path)), lambda path: tail(path, 1), lambda path: find(path, "a")]
)
def test_a_log_that_is_not_there_is_an_audit_error_that_names_it(tmp_path: Path, read: Any) -> None:
    with pytest.raises(AuditError, match=r"nothing\.jsonl"):
        read(tmp_path / "nothing.jsonl")
