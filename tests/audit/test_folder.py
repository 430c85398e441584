"""A folder of chains is read as one log, and what was done twice counts once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Guard
from hallucination_guard.audit import (
    AuditLog,
    AuditRecord,
    draw_sample,
    find,
    label,
    labels_of,
    labels_path,
    read_sample,
    records,
    requests,
    tail,
    verify,
)
from hallucination_guard.audit.folder import chains_of
from hallucination_guard.audit.record import record_id
from hallucination_guard.errors import AuditError, InputError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Call, Outcome
from hallucination_guard_policies import AbstainBelow, RetryBelow


def a_record(request: str, second: int, *, attempt: int = 1, decision: Any = "accept", **more: Any) -> AuditRecord:
    fields: dict[str, Any] = {
        "id": record_id(request, attempt),
        "time": f"2026-01-01T00:00:{second:02}.000000+00:00",
        "request_id": request,
        "attempt": attempt,
        "model": {"name": "m", "fingerprint": "f", "dtype": "float32", "template": "none"},
        "scorer": {"name": "hybridgrad", "version": "1", "settings": {}},
        "status": "scored",
        "scores": {"hybridgrad": 0.5},
        "policy": {"id": "p"},
        "decision": decision,
        "rule": "accept",
        "reason": "in words",
        "prompt": "Where is Lyon?",
        "answer": f"of second {second}",
    }
    return AuditRecord(**(fields | more))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "support.chains"


def write(folder: Path, name: str, *found: AuditRecord) -> Path:
    with AuditLog(folder / f"{name}.jsonl", fsync=False) as log:
        for each in found:
            log(each)
    return log.path


def answers(folder: Path) -> list[Any]:
    return [each.answer for each in records(folder)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hallucination_guard.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def a_guard(sink: Any, answers: Any = "Lyon", policy: Any = None) -> Guard:
    policy = policy or AbstainBelow(score="hybridgrad", limit=5.0)
    return Guard(ScriptedModel(answers), policy=policy, scorer=ScriptedScorer(1.0), audit=sink)


# ------------------------------------------------------------------------------------------------------------- ids


def test_the_same_request_gives_its_records_the_same_ids() -> None:
    one, two, other = MemorySink(), MemorySink(), MemorySink()
    policy = RetryBelow(score="hybridgrad", limit=0.5, times=1)
    for sink, name in ((one, "r"), (two, "r"), (other, "s")):
        a_guard(sink, ["Lyon", "Paris", "Nice"], policy)("Where?", call=Call(request_id=name))
    assert [each.attempt for each in one.records] == [1, 2]
    assert [each.id for each in one.records] == [each.id for each in two.records]
    assert not {each.id for each in one.records} & {each.id for each in other.records}
    assert [each.id for each in one.records] == [record_id("r", 1), record_id("r", 2)]


def test_every_record_of_a_call_has_an_id_of_its_own() -> None:
    sink = MemorySink()
    guard = a_guard(sink, "Lyon is a city. It lies in France. It is old.")
    *_, last = guard.stream("Where?", call=Call(request_id="r"))
    ids = [each.id for each in sink.records]
    assert len(ids) == len(set(ids)) == 3
    assert isinstance(last, Outcome) and last.request_id == "r" and last.audit_ids == tuple(ids)
    assert [each.part is not None for each in sink.records] == [True, True, False]


def test_without_a_request_id_every_call_is_a_new_one() -> None:
    sink = MemorySink()
    guard = a_guard(sink)
    assert guard("Where?").request_id != guard("Where?").request_id
    assert len({each.id for each in sink.records}) == 2


def test_several_prompts_are_not_one_request() -> None:
    with pytest.raises(InputError, match="one request_id, 'r'"):
        a_guard(None).batch(["Where?", "Who?"], call=Call(request_id="r"))
    with pytest.raises(InputError, match="empty"):
        Call(request_id="")


# --------------------------------------------------------------------------------------------------- read as one log


def test_chains_are_read_in_the_order_of_their_time(folder: Path) -> None:
    write(folder, "one", a_record("a", 1), a_record("c", 3))
    write(folder, "two", a_record("b", 2), a_record("d", 4))
    assert answers(folder) == ["of second 1", "of second 2", "of second 3", "of second 4"]
    assert [each.answer for each in tail(folder, 3)] == ["of second 2", "of second 3", "of second 4"]
    assert find(folder, record_id("b", 1)[:9]).answer == "of second 2"


def test_what_two_processes_did_counts_once_as_it_was_done_last(folder: Path) -> None:
    write(folder, "lost", a_record("a", 1))
    write(folder, "next", a_record("a", 2), a_record("b", 3))
    assert answers(folder) == ["of second 2", "of second 3"]
    assert find(folder, record_id("a", 1)).answer == "of second 2"
    assert [each.answer for each in tail(folder, 9)] == ["of second 2", "of second 3"]
    assert [each.last.answer for each in requests(records(folder))] == ["of second 2", "of second 3"]


def test_it_does_not_depend_on_the_names_of_the_chains(folder: Path) -> None:
    write(folder, "z-lost", a_record("a", 1))
    write(folder, "a-next", a_record("a", 2))
    assert answers(folder) == ["of second 2"]
    assert find(folder, record_id("a", 1)).answer == "of second 2"


def test_a_run_that_was_lost_leaves_no_attempt_beside_those_of_the_next(folder: Path) -> None:
    write(
        folder,
        "lost",
        a_record("a", 1, decision="retry"),
        a_record("a", 2, attempt=2, decision="retry"),
        a_record("a", 3, attempt=3),
    )
    write(folder, "next", a_record("a", 4, decision="retry"), a_record("a", 5, attempt=2))
    [request] = requests(records(folder))
    assert [each.answer for each in request.attempts] == ["of second 4", "of second 5"]


def test_what_is_twice_in_one_chain_is_read_once(tmp_path: Path) -> None:
    log = write(tmp_path, "audit", a_record("a", 1), a_record("b", 2), a_record("a", 3))
    assert answers(log) == ["of second 2", "of second 3"]
    assert [each.answer for each in tail(log, 9)] == ["of second 2", "of second 3"]
    assert find(log, record_id("a", 1)).answer == "of second 3"
    assert verify(log).repeated == 1


def test_a_call_begun_again_in_one_chain_takes_the_place_of_what_it_was() -> None:
    lost = [a_record("a", 1, decision="retry"), a_record("a", 2, attempt=2, decision="retry")]
    again = [a_record("a", 3, decision="retry"), a_record("a", 4, attempt=2)]
    [request] = requests([*lost, *again])
    assert [each.answer for each in request.attempts] == ["of second 3", "of second 4"]


def test_a_stream_begun_again_takes_the_place_of_its_parts() -> None:
    def part(second: int, start: int, stop: int) -> AuditRecord:
        own = record_id("a", 1, f"part {start}-{stop}")
        return a_record("a", second, id=own, gate="stream", part={"start": start, "stop": stop})

    [request] = requests([part(1, 0, 7), part(2, 0, 5), part(3, 5, 9), a_record("a", 4, gate="stream")])
    assert [each.part for each in request.parts] == [{"start": 0, "stop": 5}, {"start": 5, "stop": 9}]


def test_one_id_of_two_requests_is_not_one_deed(folder: Path) -> None:
    write(folder, "one", a_record("a", 1, id="same"))
    write(folder, "two", a_record("b", 2, id="same"))
    assert len(answers(folder)) == 2
    with pytest.raises(AuditError, match="several records"):
        find(folder, "same")


def test_files_beside_a_log_are_no_chains(folder: Path) -> None:
    log = write(folder, "audit", a_record("a", 1))
    label(log, record_id("a", 1), True)
    draw_sample(log, rate=1.0)
    assert chains_of(folder) == [log]


def test_a_folder_without_a_log_is_said(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="holds no log"):
        list(records(tmp_path))


def test_a_folder_has_labels_beside_it(folder: Path) -> None:
    write(folder, "one", a_record("a", 1))
    write(folder, "two", a_record("b", 2))
    label(folder, record_id("b", 1), True)
    assert [each.id for each in labels_of(folder)] == [record_id("b", 1)]
    assert labels_path(folder).parent == folder.parent


def test_a_sample_is_of_one_chain(folder: Path) -> None:
    write(folder, "one", a_record("a", 1))
    for ask in (lambda: draw_sample(folder, rate=0.5), lambda: read_sample(folder)):
        with pytest.raises(InputError, match="folder of logs"):
            ask()


# ------------------------------------------------------------------------------------------------------- verifying


def test_verify_takes_each_chain_of_a_folder(folder: Path) -> None:
    write(folder, "one", a_record("a", 1))
    two = write(folder, "two", a_record("b", 2), a_record("c", 3))
    found = run("audit", "verify", "--log", str(folder))
    assert found.returncode == 0, found.stderr
    assert [line.partition(": ")[2] for line in found.stdout.splitlines()] == [
        "1 records, whole and unchanged",
        "2 records, whole and unchanged",
    ]
    two.write_bytes(two.read_bytes().replace(b"of second 3", b"of second 9"))
    found = run("audit", "verify", "--log", str(folder), "--json")
    plain = json.loads(found.stdout)
    assert (found.returncode, plain["ok"], plain["records"]) == (1, False, 3)
    assert {name: each["ok"] for name, each in plain["chains"].items()} == {"one.jsonl": True, "two.jsonl": False}


def test_verify_finds_a_chain_that_is_gone(folder: Path) -> None:
    write(folder, "one", a_record("a", 1))
    write(folder, "two", a_record("b", 2)).unlink()
    found = run("audit", "verify", "--log", str(folder))
    assert found.returncode == 1 and "two.jsonl" in found.stdout
    with pytest.raises(AuditError, match=r"two\.jsonl"):
        list(records(folder))


def test_a_torn_last_line_of_a_killed_writer_is_reported_and_passed_over(folder: Path) -> None:
    log = write(folder, "one", a_record("a", 1))
    with log.open("ab") as file:
        file.write(b'{"answer":"to')
    write(folder, "two", a_record("b", 2))
    assert [each.answer for each in records(folder, strict=False)] == ["of second 1", "of second 2"]
    assert run("audit", "verify", "--log", str(folder)).returncode == 1


def test_the_commands_read_a_folder(folder: Path) -> None:
    write(folder, "lost", a_record("a", 1))
    write(folder, "next", a_record("a", 2), replace(a_record("b", 3), decision="abstain", rule="abstain_below"))
    log = ("--log", str(folder))
    assert len(json.loads(run("audit", "tail", *log, "--json").stdout)) == 2
    assert json.loads(run("audit", "show", record_id("a", 1), *log).stdout)["answer"] == "of second 2"
    replayed = json.loads(run("audit", "replay", *log, "--score", "hybridgrad", "--limit", "1", "--json").stdout)
    assert (replayed["then"]["requests"], replayed["then"]["accepted"]) == (2, 1)
    assert run("audit", "label", record_id("a", 1), "right", *log).returncode == 0
    refused = run("audit", "sample", str(folder), "--rate", "0.5")
    assert refused.returncode != 0 and "folder of logs" in refused.stderr
    refused = run("audit", "watch", str(folder), "--alpha", "0.1")
    assert refused.returncode != 0 and "folder of logs" in refused.stderr
