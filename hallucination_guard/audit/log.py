"""Write the audit log: one chain a file, shared by all threads and processes that write to it.

A record runs through an own structlog pipeline: content setting → seal → JSON → one write. structlog's global
configuration is neither used nor changed.
"""

from __future__ import annotations

import errno
import hmac
import os
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeAlias, get_args

import structlog
from filelock import FileLock, Timeout

from hallucination_guard.audit.chain import (
    START,
    Head,
    StrPath,
    anchor_line,
    anchor_path,
    canonical,
    is_sealed,
    lines_backwards,
    parse,
    read_anchor,
    seal,
)
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.errors import AuditError, ConfigurationError
from hallucination_guard.values import JSON

__all__ = ["AuditLog", "Content", "content_digest"]

Content: TypeAlias = Literal["text", "redacted", "hmac"]

_LOCK_SECONDS = 30.0  # an append takes milliseconds; who waits longer waits for a process that hangs
_POLL_SECONDS = 0.001
_BEGIN = b'{"an'  # of every record: the fields stand in alphabetical order
_MENDS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the disk quota",
    errno.EFBIG: "raise the limit for the size of a file, or begin a new log",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "give a path whose parents are directories",
    errno.EEXIST: "give a path whose parents are directories",
    errno.EACCES: "make the file and its directory writable for this user",
    errno.EPERM: "make the file and its directory writable for this user",
    errno.EROFS: "give a path on a disk that is not read-only",
}


class AuditLog:
    """An append-only file of audit records, one JSON object a line, in which later changes are found.

    Call it with a record; when it returns the record's id, the record is in the file. A crash or ``kill -9`` loses
    nothing whose id was returned; cut short within a write, it leaves a torn line, which the next append closes off.
    A record that cannot be written whole is taken back and raises.

    **What the chain protects against.** Each record carries a hash over itself and the one before, and the file
    ``<path>.anchor`` names the length and the last hash. :func:`~hallucination_guard.audit.verify` therefore finds
    records that were edited, deleted, inserted, moved or cut off by accident or by somebody who does not know better. A
    log without its anchor is not verifiable, and an object that has written or read a record refuses a file that has
    it no more.

    **What it does not protect against.** Without a ``key``, whoever can write the file can change a record and compute
    all the hashes after it and the anchor anew. With a ``key`` that they do not have, they cannot; they can still
    delete the whole log, or put back an older copy of the log with the anchor of that time. Against that, copy the
    anchor to where they cannot write, and give that copy to ``verify``. Nothing protects against who has the key, or
    records what is not true in the first place.

    The log is one file with one anchor: to begin a new one, move both away together. A log that is shorter than its
    anchor, or whose last record is not sealed with this key, is not written to.

    Args:
        path: the file; its parents are created. A lock file ``<path>.lock`` appears beside it.
        content: what is kept of prompt and answer. ``text``: all; ``redacted``: how many characters they have;
            ``hmac``: :func:`content_digest` of each, so that equal texts can be recognised and no text can be read.
            The text of the token t* goes the same way.
        key: secret of the seals and of ``hmac``; 32 random bytes are wise. All writers of a file need the same.
        anchor_every: an anchor is written after the first and each so many records of the log, and by :meth:`close`. A
            cut of fewer records than that may go unnoticed.
        fsync: whether each record has to be on the disk before its id is returned. False is faster, and a power cut
            may lose the last seconds, which the anchor then shows as a cut.

    Raises:
        AuditError: the file cannot be written or trusted. On creation and on every call.
        ConfigurationError: settings that cannot work.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        content: Content = "text",
        key: bytes | None = None,
        anchor_every: int = 1,
        fsync: bool = True,
    ) -> None:
        if content not in get_args(Content):
            raise ConfigurationError(f"content is {content!r}", hint=f"it is one of {', '.join(get_args(Content))}")
        if key is not None and not (isinstance(key, bytes) and key):
            raise ConfigurationError(
                f"the key of an audit log is of type {type(key).__name__}, or empty", hint="give bytes"
            )
        if content == "hmac" and key is None:
            raise ConfigurationError(
                "content='hmac' needs a key", hint="give key=, for example secrets.token_bytes(32)"
            )
        if anchor_every < 1:
            raise ConfigurationError(f"anchor_every is {anchor_every!r}", hint="it counts records: 1 or more")
        # Resolved, because processes that come by different names have to meet at one lock.
        self._file = _ChainFile(Path(os.path.realpath(path)), key=key, anchor_every=anchor_every, fsync=fsync)
        self._content = content
        self._key = key
        self._closed = False
        # All the settings are given, so that an application's structlog.configure() changes none of them.
        self._append = structlog.wrap_logger(
            self._file,
            processors=[self._veil, self._file.seal, structlog.processors.JSONRenderer(serializer=_rendered)],
            wrapper_class=structlog.BoundLogger,
            context_class=dict,
            cache_logger_on_first_use=False,
        )
        self._file.check()

    @property
    def path(self) -> Path:
        """Of the log, absolute."""
        return self._file.path

    def __call__(self, record: AuditRecord) -> str:
        """Append one record.

        Returns:
            Its id; the record is in the file.

        Raises:
            AuditError: it is not in the file; the message names the path, the hint says how to fix it.
        """
        if self._closed:
            raise AuditError(f"the audit log {self.path} is closed", hint="open another AuditLog on the same path")
        with self._file.exclusive():
            self._append.write(**record.to_json_dict())
        return record.id

    def close(self) -> None:
        """Write the anchor, if it is behind. Further calls raise; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._file.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, content={self._content!r})"

    def _veil(self, _logger: object, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if self._content != "text":
            fields["prompt"] = self._veiled(fields["prompt"])
            fields["answer"] = self._veiled(fields["answer"])
            if fields["anchor"] and "token" in fields["anchor"]:  # a word of the prompt
                fields["anchor"]["token"] = self._veiled(fields["anchor"]["token"])
        return fields

    def _veiled(self, content: JSON) -> JSON:
        if content is None:
            return None
        if self._content == "hmac" and self._key is not None:
            return {"hmac": content_digest(content, self._key)}
        return {"redacted": True, "characters": _characters(content)}


def content_digest(content: JSON, key: bytes) -> str:
    """What a log with ``content="hmac"`` holds in place of this prompt or answer: find a known text by it.

    Args:
        content: the prompt as it was recorded (list of role/content, or text), or the answer.
        key: of the log.
    """
    # The prefix keeps this use of the key apart from the seals: no text can be made that gives the seal of a record.
    return hmac.digest(key, b"content:" + canonical(content).encode("ascii"), "sha256").hex()


def _characters(content: JSON) -> int:
    match content:
        case str():
            return len(content)
        case Mapping():
            return _characters(content.get("content"))
        case Sequence():
            return sum(map(_characters, content))
        case _:
            return 0


def _rendered(fields: Mapping[str, Any], **_: object) -> str:
    return canonical(fields)  # without the renderer's fallback for odd objects: what is no JSON must not get a seal


class _ChainFile:
    """A file with a chain in it: knows where the chain stands, seals what comes next and writes it."""

    def __init__(self, path: Path, *, key: bytes | None, anchor_every: int, fsync: bool) -> None:
        self.path = path
        self._key = key
        self._anchor_every = anchor_every
        self._fsync = fsync
        self._anchor = anchor_path(path)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._head = self._next = START
        self._seen: tuple[int, ...] = ()  # what _fingerprint() gave when self._head was the head
        self._first = ""  # hash of the chain's first record: by it a chain that was cut is told from a new one
        self._torn = False  # whether the file ends within a line
        self._unanchored = False  # whether this object has written records since its last anchor
        self._open: BinaryIO

    def check(self) -> None:
        """Fail now rather than at the first record."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        with self.exclusive():
            pass

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The file open, its head known, and nobody else writing.

        The lock object and the file are new each time, which costs some 50 µs: nothing is inherited by a fork, and a
        log that was moved away is not written to.
        """
        if self._pid != os.getpid():  # forked: the lock may have been held by a thread that does not exist here
            self._pid, self._lock = os.getpid(), threading.Lock()
        lock = FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS, poll_interval=_POLL_SECONDS, thread_local=False)
        # The threads queue up at their own lock because waiting for the file's means polling.
        with self._lock:
            try:
                with lock, self.path.open("ab+") as self._open:
                    self._find_head()
                    yield
            except Timeout as error:
                raise AuditError(
                    f"the audit log {self.path} is locked by another process for more than {_LOCK_SECONDS:.0f} s",
                    hint="look for a writer that is stopped or hangs",
                ) from error
            except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
                raise self._failed(error) from error

    def seal(self, _logger: object, _method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's processor: give the record its place."""
        sealed = seal(fields, self._head.length, self._head.hash, self._key)
        self._next = Head(self._head.length + 1, sealed["hash"])
        return sealed

    def write(self, line: str) -> None:
        """The end of the pipeline: all of the line and its anchor, or nothing."""
        descriptor = self._open.fileno()
        before = os.fstat(descriptor).st_size
        data = (b"\n" if self._torn else b"") + line.encode("ascii") + b"\n"
        try:
            if (written := os.write(descriptor, data)) != len(data):
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")
            if self._fsync:
                os.fsync(descriptor)
                if not before:
                    _sync_directory(self.path.parent)
            if self._is_anchored(self._next):
                self._write_anchor(self._next)
        except OSError:
            # Not for KeyboardInterrupt and its like: the anchor may have been written then, and a record in the file
            # whose id was not returned harms nobody, but an anchor ahead of its log accuses.
            os.ftruncate(descriptor, before)
            raise
        self._first = self._first or self._next.hash
        self._head, self._torn = self._next, False
        self._seen = self._fingerprint()
        self._unanchored = not self._is_anchored(self._next)

    def _is_anchored(self, head: Head) -> bool:
        # The first record too, whatever the interval: so a log without an anchor is always one that has lost it.
        return head.length == 1 or head.length % self._anchor_every == 0

    def finish(self) -> None:
        """Anchor what this object has written."""
        if self._unanchored:
            with self.exclusive():
                self._write_anchor(self._head)
                self._unanchored = False
                self._seen = self._fingerprint()

    def _find_head(self) -> None:
        if (fingerprint := self._fingerprint()) == self._seen:
            return
        anchored = read_anchor(self._anchor, self._key)
        head: Head | None = None
        at, replaced = START, False
        # Back to the record that the anchor vouches for, or to the one that was the head before: whichever is nearer.
        for line in lines_backwards(self._open):
            if (record := parse(line)) is None:
                continue  # torn: the chain goes on from the last whole record, and verify reports the line
            if not is_sealed(record, line, self._key):
                raise self._distrusted("its last records were edited, or sealed with another key")
            at = Head(record["seq"] + 1, record["hash"])
            head = head or at
            replaced = replaced or (at.length == self._head.length and at != self._head)
            if anchored is None or at.length <= anchored.length or (self._seen and at == self._head):
                break
        if head is None and anchored is None and not self._begins_like_a_record():
            raise AuditError(f"{str(self.path)!r} is no audit log", hint="give another path: it is not overwritten")
        if anchored and at.length <= anchored.length and at != anchored:
            raise self._distrusted(f"it does not have the {anchored.length} records that its anchor vouches for")
        if (replaced or (head or START).length < self._head.length) and self._is_own():
            raise self._distrusted(f"it does not have the {self._head.length} records that were here before")
        self._head = head or START
        self._first = self._first_hash()
        self._seen = fingerprint
        self._torn = self._open.seek(0, os.SEEK_END) > 0 and self._last_byte() != b"\n"

    def _begins_like_a_record(self) -> bool:
        """Whether a file without a whole record may be a log: empty, or its only record was torn."""
        self._open.seek(0)
        begin = self._open.read(len(_BEGIN))
        return _BEGIN.startswith(begin)

    def _is_own(self) -> bool:
        """Whether the file still holds the chain that this object knows, and not one begun anew in its place."""
        first = self._first_hash()
        return first == self._first or (not first and os.fstat(self._open.fileno()).st_ino == self._seen[0])

    def _first_hash(self) -> str:
        self._open.seek(0)
        record = parse(self._open.readline())
        return "" if record is None else str(record["hash"])

    def _fingerprint(self) -> tuple[int, ...]:
        """What changes when somebody else writes: inode and size of the log, inode and time of its anchor.

        The anchor too: a log cut back to the size that this object remembers has an anchor that it does not.
        """
        log = os.fstat(self._open.fileno())
        try:
            anchor = self._anchor.stat()
        except FileNotFoundError:
            return log.st_ino, log.st_size
        return log.st_ino, log.st_size, anchor.st_ino, anchor.st_mtime_ns

    def _last_byte(self) -> bytes:
        self._open.seek(-1, os.SEEK_END)
        return self._open.read(1)

    def _write_anchor(self, head: Head) -> None:
        temporary = self._anchor.with_name(f"{self._anchor.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)  # what a crash left, or a link that somebody planted
            with temporary.open("x", encoding="ascii", newline="\n") as file:
                file.write(anchor_line(head, datetime.now(UTC).isoformat(timespec="microseconds"), self._key))
                file.flush()
                if self._fsync:
                    os.fsync(file.fileno())
            temporary.replace(self._anchor)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _distrusted(self, why: str) -> AuditError:
        return AuditError(
            f"the audit log {self.path} cannot be trusted: {why}",
            hint="check the key; to begin a new log, move this one and its .anchor away together, as evidence",
        )

    def _failed(self, error: Exception) -> AuditError:
        number = error.errno if isinstance(error, OSError) else None
        what = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = _MENDS.get(number or 0, "check the disk and the permissions of the file and its directory")
        return AuditError(f"the audit log {self.path} cannot be written: {what}", hint=hint)


def _sync_directory(path: Path) -> None:
    """Make the name of a new file as durable as what is in it; Windows has no way to and no need."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
