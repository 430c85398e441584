"""A record whose id was returned is in the file, whatever happens; one that cannot be written raises."""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
from filelock import FileLock

import hallucination_guard
from hallucination_guard.audit import AuditLog, AuditRecord, Sink, content_digest, records, verify
from hallucination_guard.audit.chain import anchor_path
from hallucination_guard.errors import AuditError, ConfigurationError

KEY = b"a secret of the auditor, 32 bytes"
ROOT = str(Path(hallucination_guard.__file__).parents[1])

A_RECORD = """
from hallucination_guard.audit import AuditLog, AuditRecord

def a_record(**changes):
    fields = dict(
        request_id="request", model={"name": "m"}, scorer={"name": "hybridgrad"}, status="scored",
        scores={"hybridgrad": 0.25}, policy={"id": "abstain_below"}, decision="abstain", rule="abstain_below",
        reason="in words", prompt=[{"role": "user", "content": "Where is Paris?"}], answer="In Texas.",
    )
    return AuditRecord(**(fields | changes))
"""
_scope: dict[str, Any] = {}
exec(A_RECORD, _scope)  # the same record here and in the processes that are started below


def a_record(**changes: Any) -> AuditRecord:
    made: AuditRecord = _scope["a_record"](**changes)
    return made


def started(script: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", A_RECORD + script, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


# What is written


def test_a_log_is_a_sink_that_returns_the_id_under_which_the_record_is_in_the_file(path: Path) -> None:
    record = a_record()
    with AuditLog(path) as log:
        assert isinstance(log, Sink)
        assert log(record) == record.id
    [line] = path.read_text(encoding="ascii").splitlines()
    written = json.loads(line)
    assert written["id"] == record.id
    assert (written["seq"], written["prev"]) == (0, "0" * 64)
    body = json.dumps({k: v for k, v in written.items() if k != "hash"}, sort_keys=True, separators=(",", ":"))
    assert written["hash"] == hashlib.sha256(body.encode()).hexdigest()


def test_the_chain_goes_on_when_the_log_is_opened_again(path: Path) -> None:
    for _ in range(3):
        with AuditLog(path, fsync=False) as log:
            log(a_record())
    assert [record.seq for record in records(path)] == [0, 1, 2]
    assert verify(path).ok


def test_parents_are_created(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a" / "b" / "audit.jsonl")
    log(a_record())
    assert verify(log.path).ok


@pytest.mark.fault("log", "half a character in a text", "the record is kept")
def test_a_lone_surrogate_does_not_lose_the_record(path: Path) -> None:
    record = a_record(answer="torn \ud83d off \U0001f600", prompt="\udc00\u2028")
    AuditLog(path)(record)
    [read] = records(path)
    assert (read.answer, read.prompt) == (record.answer, record.prompt)
    assert verify(path).ok


def test_an_applications_structlog_configuration_is_neither_used_nor_changed(path: Path) -> None:
    def drop(*_: Any) -> Any:
        raise structlog.DropEvent

    class Stray(dict[str, Any]):
        def __init__(self, *_: Any) -> None:
            super().__init__(stray=1)

    before = structlog.get_config()
    log = AuditLog(path)
    assert structlog.get_config() == before
    try:
        structlog.configure(processors=[drop], context_class=Stray)
        log(a_record())
    finally:
        structlog.reset_defaults()
    assert verify(path).records == 1
    assert "stray" not in path.read_text()


# Content


SECRET = "XyzzyPlugh"


def secret_record() -> AuditRecord:
    return a_record(
        prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Who is {SECRET}?"}],
        answer=f"{SECRET} is nobody.",
        anchor={"index": -5, "token": SECRET, "rule": "last_user_token"},
    )


def test_text_is_kept_where_the_setting_says_so(path: Path) -> None:
    AuditLog(path)(secret_record())
    assert path.read_text().count(SECRET) == 3


@pytest.mark.parametrize("settings", [{"content": "redacted"}, {"content": "hmac", "key": KEY}])
def test_no_text_is_in_the_bytes_of_a_log_that_keeps_none(path: Path, settings: dict[str, Any]) -> None:
    with AuditLog(path, **settings) as log:
        log(secret_record())
    for file in path.parent.iterdir():
        assert SECRET.encode() not in file.read_bytes()
        assert b"brief" not in file.read_bytes()
    assert verify(path, settings.get("key")).ok


def test_redacted_says_how_many_characters_there_were(path: Path) -> None:
    AuditLog(path, content="redacted")(secret_record())
    [record] = records(path)
    assert record.prompt == {"redacted": True, "characters": len("Be brief.") + len(f"Who is {SECRET}?")}
    assert record.answer == {"redacted": True, "characters": len(f"{SECRET} is nobody.")}
    assert record.anchor == {
        "index": -5,
        "token": {"redacted": True, "characters": len(SECRET)},
        "rule": "last_user_token",
    }


def test_equal_texts_have_equal_hmacs_that_only_the_key_gives(path: Path) -> None:
    log = AuditLog(path, content="hmac", key=KEY)
    for answer in ("one", "one", "two"):
        log(a_record(answer=answer))
    one, same, two = (record.answer for record in records(path))
    assert one == same == {"hmac": content_digest("one", KEY)}
    assert one != two
    assert content_digest("one", KEY) != content_digest("one", b"another key")
    assert content_digest("one", KEY) == hmac.new(KEY, b'content:"one"', "sha256").hexdigest()


@pytest.mark.parametrize("settings", [{"content": "redacted"}, {"content": "hmac", "key": KEY}])
def test_an_answer_that_is_not_there_stays_so(path: Path, settings: dict[str, Any]) -> None:
    AuditLog(path, **settings)(a_record(answer=None, status="error", detail="no gradient", scores={}))
    [record] = records(path)
    assert (record.answer, record.detail, record.reason) == (None, "no gradient", "in words")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"content": "hmac"}, "key"),
        ({"content": "all"}, "all"),
        ({"key": b""}, "key"),
        ({"key": "text"}, "str"),
        ({"anchor_every": 0}, "0"),
    ],
)
def test_settings_that_can_not_work_are_refused_with_a_hint(path: Path, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word) as caught:
        AuditLog(path, **settings)
    assert caught.value.hint
    assert not path.exists()


def test_the_key_does_not_show(path: Path) -> None:
    assert "secret" not in repr(AuditLog(path, key=KEY))


# Anchors


def anchored(path: Path) -> int:
    count: int = json.loads(anchor_path(path).read_text())["count"]
    return count


def test_an_anchor_follows_every_so_many_records_and_the_end(path: Path) -> None:
    log = AuditLog(path, anchor_every=3, fsync=False)
    seen = []
    for _ in range(7):
        log(a_record())
        seen.append(anchored(path) if anchor_path(path).exists() else 0)
        assert verify(path).ok
    assert seen == [1, 1, 3, 3, 3, 6, 6]
    log.close()
    assert anchored(path) == 7


def test_a_log_that_was_cut_is_not_written_to_so_that_its_anchor_stays_as_evidence(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    for _ in range(4):
        log(a_record())
    cut = path.read_bytes().splitlines(keepends=True)[:2]
    path.write_bytes(b"".join(cut))
    for write in (lambda: log(a_record()), lambda: AuditLog(path)):
        with pytest.raises(AuditError, match="4 records that its anchor vouches for") as caught:
            write()
        assert "evidence" in caught.value.hint
    assert anchored(path) == 4
    assert not verify(path).ok


@pytest.mark.fault("log", "it is cut back while it is open", "not written to any more")
def test_a_log_cut_back_to_where_this_writer_left_it_is_not_written_to(path: Path) -> None:
    mine, other = AuditLog(path, fsync=False), AuditLog(path, fsync=False)
    mine(a_record())
    left = path.read_bytes()
    other(a_record())
    path.write_bytes(left)
    with pytest.raises(AuditError, match="2 records"):
        mine(a_record())


def test_a_log_rewritten_below_its_anchor_is_not_written_to(tmp_path: Path) -> None:
    one, two = (AuditLog(tmp_path / name, fsync=False) for name in ("one", "two"))
    for _ in range(2):
        one(a_record())
    for _ in range(3):
        two(a_record())
    one.path.write_bytes(two.path.read_bytes())
    with pytest.raises(AuditError, match="cannot be trusted"):
        one(a_record())


def test_another_key_is_refused_before_anything_is_written(path: Path) -> None:
    AuditLog(path, key=KEY)(a_record())
    before = path.read_bytes()
    for key in (None, b"another"):
        with pytest.raises(AuditError, match="key"):
            AuditLog(path, key=key)
    anchor_path(path).unlink()
    with pytest.raises(AuditError, match="key"):
        AuditLog(path, key=None)
    assert path.read_bytes() == before


def test_a_new_log_begins_when_log_and_anchor_are_moved_away_even_while_it_is_open(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    log(a_record())
    for file in (path, anchor_path(path)):
        file.rename(file.with_name(f"old-{file.name}"))
    log(a_record())
    assert [verify(each).ok for each in (path, path.with_name("old-audit.jsonl"))] == [True, True]
    assert [record.seq for record in records(path)] == [0]


# Many writers


def test_threads_share_one_chain(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    begin, ids = threading.Barrier(8), list[str]()

    def write() -> None:
        begin.wait()
        ids.extend(log(a_record()) for _ in range(20))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {record.id for record in records(path)} == set(ids)
    assert (verify(path).ok, verify(path).records) == (True, 160)


@pytest.mark.fault("log", "several processes write at once", "one whole chain")
def test_processes_and_several_logs_in_them_share_one_chain(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    script = """
import sys, threading
sys.stdin.readline()
logs = [AuditLog(sys.argv[1], fsync=False, anchor_every=int(sys.argv[2])) for _ in range(2)]
ids = []
def write(log):
    ids.extend(log(a_record()) for _ in range(25))
threads = [threading.Thread(target=write, args=[log]) for log in logs]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*ids)
"""
    command = [sys.executable, "-c", A_RECORD + script]
    writers = [
        subprocess.Popen(
            [*command, str(name), every],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, every in [(path, "1"), (link, "1"), (path, "7"), (link, "1000")]
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    ids = list[str]()
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert err == ""
        ids += out.split()
    assert len(ids) == 200
    assert sorted(record.id for record in records(path)) == sorted(ids)
    assert verify(path).ok


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_writes_to_the_same_chain_even_if_a_thread_held_the_lock(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    log(a_record())
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            log(a_record())

    busy = threading.Thread(target=write)
    busy.start()
    try:
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=log, args=[a_record(id=f"child-{number}")]) for number in range(8)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
    finally:
        stop.set()
        busy.join()
    assert [child.exitcode for child in children] == [0] * 8
    assert {f"child-{number}" for number in range(8)} <= {record.id for record in records(path)}
    assert verify(path).ok


@pytest.mark.fault("log", "another process holds the lock for ever", "`AuditError` after 30 s, no text")
def test_a_lock_that_is_never_let_go_is_an_audit_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path)
    monkeypatch.setattr("hallucination_guard.audit.log._LOCK_SECONDS", 0.05)
    with (
        FileLock(f"{log.path}.lock"),
        ThreadPoolExecutor() as pool,
        pytest.raises(AuditError, match="locked by another process"),
    ):
        pool.submit(log, a_record()).result()
    log(a_record())


# What goes wrong


@pytest.mark.parametrize("fsync", ["", "fsync"])
@pytest.mark.fault("log", "`kill -9` while writing ({case})", "no record whose id was returned is lost")
def test_kill_9_loses_no_record_whose_id_was_returned(path: Path, fsync: str) -> None:
    script = """
import sys
log = AuditLog(sys.argv[1], fsync=bool(sys.argv[2]))
while True:
    print(log(a_record()), flush=True)
"""
    returned = set[str]()
    for _ in range(6):
        writer = started(script, path, fsync)
        assert writer.stdout is not None
        returned.add(writer.stdout.readline().strip())
        timer = threading.Timer(random.uniform(0, 0.1), writer.kill)
        timer.start()
        # A line without its newline was cut within the print, not within the log.
        returned |= {line.strip() for line in writer.communicate()[0].splitlines(keepends=True) if line.endswith("\n")}
        timer.join()
        assert writer.returncode == -signal.SIGKILL
        found = verify(path)
        # Cut between two writes nothing is wrong. The kernel may also end one write between two pages of the file
        # (some 1 in 1000 kills): that line is torn, its id was not returned, and saying so is what verify is for.
        assert [problem for problem in found.problems if not problem.what.startswith("torn line")] == []
        assert len(found.problems) <= 1
        assert returned <= {record.id for record in records(path, strict=False)}
    assert len(returned) > 6


@pytest.mark.fault("log", "the disk is full", "`AuditError`, no text, the chain stays whole")
def test_a_full_disk_raises_and_takes_the_piece_of_the_record_back(path: Path) -> None:
    script = """
import os, resource, signal, sys
from hallucination_guard.errors import AuditError
log = AuditLog(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
while True:
    size = os.path.getsize(sys.argv[1])
    try:
        print(log(a_record()))
    except AuditError as error:
        assert os.path.getsize(sys.argv[1]) == size < 5000
        print(error, file=sys.stderr)
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(log(a_record()))
"""
    out, err = started(script, path).communicate(timeout=60)
    assert str(path) in err
    assert "bytes could be written" in err
    assert "make room" in err
    assert [record.id for record in records(path)] == out.split()
    assert len(out.split()) > 2
    assert verify(path).ok


def test_a_disk_too_full_for_the_anchor_takes_the_record_back(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    log(a_record())
    anchor_path(path).with_name(f"{path.name}.anchor.tmp").mkdir()
    before = path.read_bytes()
    with pytest.raises(AuditError, match="cannot be written"):
        log(a_record())
    assert path.read_bytes() == before
    anchor_path(path).with_name(f"{path.name}.anchor.tmp").rmdir()
    log(a_record())
    assert (verify(path).ok, verify(path).records) == (True, 2)


@pytest.mark.fault("log", "`fsync` fails", "`AuditError`, no text, the chain stays whole")
def test_a_failed_fsync_takes_the_record_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path)
    log(a_record())
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(AuditError, match="Input/output error") as caught:
            log(a_record())
    assert caught.value.hint
    assert path.read_bytes() == before
    log(a_record())
    assert verify(path).ok


def test_fsync_is_the_settings_to_decide(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    AuditLog(path, fsync=False)(a_record())
    assert calls == []
    AuditLog(path, fsync=True)(a_record())
    assert len(calls) == 2  # the record and its anchor


def test_a_directory_in_place_of_the_file_is_refused_at_once_and_named(path: Path) -> None:
    path.mkdir()
    with pytest.raises(AuditError, match=r"audit\.jsonl.*directory") as caught:
        AuditLog(path)
    assert caught.value.hint == "give the path of a file"


def test_a_file_in_place_of_a_parent_is_refused_at_once_and_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match=r"file/audit\.jsonl") as caught:
        AuditLog(tmp_path / "file" / "audit.jsonl")
    assert "director" in caught.value.hint


def test_a_log_that_becomes_unwritable_raises_at_the_next_record_and_not_after(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    path.unlink()
    path.mkdir()
    with pytest.raises(AuditError, match="directory"):
        log(a_record())
    path.rmdir()
    log(a_record())
    assert verify(path).ok


@pytest.mark.parametrize("keep", [1, 300, -2])
@pytest.mark.fault("log", "a crash left a torn line", "closed off; the chain goes on")
def test_a_torn_tail_is_closed_off_and_the_chain_goes_on_from_the_last_whole_record(path: Path, keep: int) -> None:
    log = AuditLog(path, fsync=False, anchor_every=100)  # what a power cut tears, no anchor vouches for
    for _ in range(3):
        log(a_record())
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:keep])
    for writer in (AuditLog(path, fsync=False), AuditLog(path, fsync=False)):  # the one before is gone with the power
        writer(a_record())
    found = verify(path)
    assert [(problem.line, problem.what) for problem in found.problems] == [(3, "torn line: not a record")]
    assert [record.seq for record in records(path, strict=False)] == [0, 1, 2, 3]


def test_a_last_record_that_only_lacks_its_newline_gets_it_and_stays(path: Path) -> None:
    log = AuditLog(path, fsync=False)
    for _ in range(2):
        log(a_record())
    path.write_bytes(path.read_bytes()[:-1])
    log(a_record())
    assert (verify(path).ok, verify(path).records) == (True, 3)


def test_a_log_whose_only_record_is_torn_begins_again_behind_it(path: Path) -> None:
    path.write_bytes(b'{"answer":"In Te')
    AuditLog(path, fsync=False)(a_record())
    assert [problem.line for problem in verify(path).problems] == [1]
    assert [record.seq for record in records(path, strict=False)] == [0]


def test_a_last_record_that_was_edited_is_not_built_upon(path: Path) -> None:
    AuditLog(path, fsync=False)(a_record())
    path.write_bytes(path.read_bytes().replace(b"abstain", b"accept"))
    with pytest.raises(AuditError, match="edited"):
        AuditLog(path)


def test_a_closed_log_raises_and_closing_twice_is_fine(path: Path) -> None:
    log = AuditLog(path)
    log.close()
    log.close()
    with pytest.raises(AuditError, match="closed") as caught:
        log(a_record())
    assert caught.value.hint


def test_the_log_stays_where_it_was_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = AuditLog("audit.jsonl", fsync=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log(a_record())
    assert verify(tmp_path / "audit.jsonl").records == 1


class TestARunningLogRemembersItsHead:
    """Whoever removes the anchor and cuts the log is refused by the object that wrote it."""

    @pytest.mark.parametrize("left", [0, 1, 2])
    @pytest.mark.parametrize("in_place", [True, False])
    def test_a_cut_tail_without_its_anchor_is_not_written_to(self, path: Path, left: int, in_place: bool) -> None:
        log = AuditLog(path, fsync=False)
        for _ in range(4):
            log(a_record())
        kept = b"".join(path.read_bytes().splitlines(keepends=True)[:left])
        anchor_path(path).unlink()
        if not in_place and left:
            path.unlink()
        path.write_bytes(kept)
        with pytest.raises(AuditError, match="4 records that were here before"):
            log(a_record())

    def test_a_record_that_was_replaced_is_found(self, path: Path) -> None:
        log = AuditLog(path, fsync=False)
        for _ in range(2):
            log(a_record())
        first = path.read_bytes().splitlines(keepends=True)[0]
        anchor_path(path).unlink()
        path.write_bytes(first)
        with AuditLog(path, fsync=False) as other:
            other(a_record())
        with pytest.raises(AuditError, match="2 records that were here before"):
            log(a_record())

    def test_a_log_that_was_moved_away_begins_anew(self, path: Path, tmp_path: Path) -> None:
        log = AuditLog(path, fsync=False)
        for _ in range(4):
            log(a_record())
        for each in (path, anchor_path(path)):
            each.rename(tmp_path / f"old-{each.name}")
        log(a_record())
        assert (verify(path).ok, verify(path).records) == (True, 1)

    def test_one_that_another_process_began_anew_is_written_to(self, path: Path, tmp_path: Path) -> None:
        log = AuditLog(path, fsync=False)
        for _ in range(4):
            log(a_record())
        for each in (path, anchor_path(path)):
            each.rename(tmp_path / f"old-{each.name}")
        with AuditLog(path, fsync=False) as other:
            other(a_record())
        log(a_record())
        assert (verify(path).ok, verify(path).records) == (True, 2)


class TestWhatIsNoLogIsNotWrittenTo:
    @pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b'{"id": 1}\n', bytes(100)])
    def test_a_file_of_another_kind(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(AuditError, match="no audit log"):
            AuditLog(path)
        assert path.read_bytes() == content

    def test_a_file_without_an_end_is_refused_before_it_is_held_in_memory(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(200 << 20)
        with pytest.raises(AuditError, match="more than 64 MiB"):
            AuditLog(path)

    @pytest.mark.fault("log", "a link is planted in the anchor's place", "not followed")
    def test_a_planted_link_in_the_anchors_place_is_not_followed(self, path: Path, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("precious")
        Path(f"{anchor_path(path)}.tmp").symlink_to(victim)
        AuditLog(path, fsync=False)(a_record())
        assert victim.read_text() == "precious" and verify(path).ok
