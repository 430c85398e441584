"""Add lines to a file beside the log: all of them or none, one writer at a time. Lines are only ever added."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hallucination_guard.audit.chain import canonical
from hallucination_guard.errors import AuditError

__all__ = ["append_lines", "written_alone"]

_LOCK_SECONDS = 30.0


@contextmanager
def written_alone(path: Path, what: str) -> Iterator[None]:
    """Nobody else writes to the file meanwhile.

    Args:
        path: of the file; a ``<path>.lock`` appears beside it.
        what: it holds, for errors.

    Raises:
        AuditError: if another process does not let go, or here cannot be written.
    """
    lock = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS, poll_interval=0.001, thread_local=False)
    try:
        with lock:
            yield
    except Timeout as error:
        raise AuditError(
            f"the {what} {path} are locked by another process for more than {_LOCK_SECONDS:.0f} s",
            hint="look for a writer that is stopped or hangs",
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise _unwritable(path, what, error) from error


def append_lines(path: Path, rows: Iterable[Mapping[str, object]], what: str) -> None:
    """Write the rows, JSON each, in one write; a line that a crash cut short is closed off before them.

    Raises:
        AuditError: if they are not in the file; then it is as it was.
    """
    data = "".join(canonical(each) + "\n" for each in rows).encode("ascii")
    try:
        with path.open("ab+") as file:
            before = file.seek(0, os.SEEK_END)
            if before:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    data = b"\n" + data
            try:
                if (written := os.write(file.fileno(), data)) != len(data):
                    raise OSError(f"only {written} of {len(data)} bytes could be written")
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise _unwritable(path, what, error) from error


def _unwritable(path: Path, what: str, error: Exception) -> AuditError:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return AuditError(
        f"the {what} {path} cannot be written: {why}", hint="check the disk and the permissions of the directory"
    )
