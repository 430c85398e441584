"""What makes ``score`` on a file safe to interrupt: finished rows wait beside the output until all are there.

``OUT.partial`` holds JSON lines: first what it is bound to, then ``{"line": number, "row": row}`` in the order in which
rows were finished. A batch is one append, so a process that is killed leaves whole lines and at most one torn one. When
every row is there, ``OUT`` is written beside and moved into place, so it is the old file or the whole new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Self, get_args

from filelock import FileLock, Timeout

from hallucination_guard.errors import InputError
from hallucination_guard.values import JSON, Status, from_json

__all__ = ["Partial", "encoded", "write_all"]

_FORMAT = 1


class Partial:
    """The finished rows of one output file; a context manager that holds it against other processes.

    Args:
        output: where the rows belong in the end.
        binding: what the rows depend on (input, model, scorer, settings), as JSON; a partial file of another is
            refused, since its rows would be mixed with these.

    ``statuses`` has the status of every finished row by its line number.

    Raises:
        InputError: on entering, if the partial file is bound to something else or another process writes it.
    """

    def __init__(self, output: Path, binding: Mapping[str, JSON]) -> None:
        # Resolved, so that a link stays a link to the new file and two names of one output meet at one lock.
        self.output = Path(os.path.realpath(output))
        self.path = self.output.with_name(f"{self.output.name}.partial")
        self.statuses: dict[int, str] = {}
        self._binding = {"partial": _FORMAT, **binding}
        self._header = encoded(self._binding)
        self._at: dict[int, int] = {}  # where the row of a line begins
        self._end = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._locked())
            with _named(self.path):
                self._end = self._read()
                self._file: FileIO = stack.enter_context(self.path.open("ab", buffering=0))
                self._file.truncate(self._end)
                if not self._end:
                    write_all(self._file, self._header)
                    self._end = len(self._header)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Keep finished rows, each with its line number. One that is kept already stays as it is."""
        new = [(number, row) for number, row in rows if number not in self._at]
        written = [encoded({"line": number, "row": row}) for number, row in new]
        with _named(self.path):
            write_all(self._file, b"".join(written))
        for (number, row), line in zip(new, written, strict=True):
            self._keep(number, row, len(line))

    def finish(self) -> None:
        """Write the output in the order of the input, and drop the partial file."""
        ordered = self.path.with_name(f"{self.path.name}.ordered")
        try:
            with _named(self.output):
                with self.path.open("rb") as kept, ordered.open("wb") as out:
                    for number in sorted(self._at):
                        kept.seek(self._at[number])
                        out.write(encoded(json.loads(kept.readline())["row"]))
                    out.flush()
                    # Else a power failure could leave the new name on an empty file, and the rows already dropped.
                    os.fsync(out.fileno())
                ordered.replace(self.output)
        finally:
            ordered.unlink(missing_ok=True)
        # Killed before this line, the next call finds every row finished and only writes the output again.
        self._file.close()
        self.path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = Path(f"{self.path}.lock")
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another process is writing {str(self.path)!r}", hint="wait for it, or give another output"
            ) from None
        except NotImplementedError:
            raise InputError(
                f"the file system of {str(self.path)!r} has no locks", hint="write the output elsewhere"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    def _read(self) -> int:
        """Take in the whole rows; where the next one belongs."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as kept:
            first = kept.readline()
            if not first.endswith(b"\n") and self._header.startswith(first):
                return 0  # killed while it began
            self._check(first)
            self._end = len(first)
            for line in kept:
                found = _whole(line)
                if found is None:
                    break  # torn by a kill or a power failure: from here on the rows are scored again
                self._keep(*found, len(line))
        return self._end

    def _keep(self, number: int, row: Mapping[str, Any], length: int) -> None:
        self._at[number] = self._end
        self.statuses[number] = row["status"]
        self._end += length

    def _check(self, first: bytes) -> None:
        if first == self._header:
            return
        found = _object(first)
        if found is None or "partial" not in found:
            raise InputError(
                f"{str(self.path)!r} is in the way and not a partial file of this command",
                hint="move it, or give another output",
            )
        other = [name for name in self._binding if found.get(name) != self._binding[name]]
        raise InputError(
            f"{str(self.path)!r} holds rows of an interrupted run with another {', '.join(other) or 'binding'}",
            hint="repeat that run to finish it, or delete the file, or give another output",
        )


def encoded(value: Mapping[str, object]) -> bytes:
    """One line of JSON."""
    try:
        return f"{json.dumps(value, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # an id may hold half a surrogate pair, which UTF-8 cannot write and an escape can
        return f"{json.dumps(value)}\n".encode()


def write_all(file: FileIO, data: bytes) -> None:
    """Write to an unbuffered file, which keeps nothing back that could fail once more on closing."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


def _whole(line: bytes) -> tuple[int, dict[str, Any]] | None:
    found = _object(line) if line.endswith(b"\n") else None
    if found is None:
        return None
    number, row = found.get("line"), found.get("row")
    if not isinstance(number, int) or isinstance(number, bool) or not isinstance(row, dict):
        return None
    # Only what :meth:`Partial.add` writes, to the byte: what somebody edited is scored again.
    written = encoded({"line": number, "row": row}) == line
    return (number, row) if written and row.get("status") in get_args(Status) else None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = from_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of writing or flushing names no file; this one does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(error.filename or path)) from error
