"""What an evaluation has paid for is kept: JSON lines bound to what they depend on, so that a run can be continued.

The first line says what the rows are bound to; each further line is one row with its ``id``. A batch is one append, so
a killed process leaves whole lines and at most one torn one, which is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hallucination_guard.errors import InputError
from hallucination_guard.values import JSON, from_json

__all__ = ["Store"]


class Store:
    """Rows of one kind in one file, by id.

    Args:
        path: of the file; made on the first :meth:`add`.
        binding: what the rows depend on, as JSON.

    Raises:
        InputError: if the file holds rows that depend on something else, or is no such file.
    """

    def __init__(self, path: str | Path, binding: Mapping[str, JSON]) -> None:
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        self._binding = json.loads(json.dumps({"kind": self.path.stem, **binding}))
        if self.path.exists():
            self._read()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep finished rows, each with its ``id``."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not self.path.exists():
            text = json.dumps(self._binding) + "\n" + text
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.rows |= {row["id"]: dict(row) for row in rows}

    def _read(self) -> None:
        raw = self.path.read_bytes()
        end = raw.rfind(b"\n") + 1
        try:
            header, *rows = [from_json(line) for line in raw[:end].splitlines()] or [self._binding]
            self.rows = {row["id"]: row for row in rows}
            if not all(isinstance(name, str) and name for name in self.rows):
                raise ValueError("an id is a text")
            kept = dict(header)
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{str(self.path)!r} is in the way and not a file of this command",
                hint="move it, or give another folder",
            ) from None
        if differing := sorted(key for key in {*kept, *self._binding} if kept.get(key) != self._binding.get(key)):
            raise InputError(
                f"{str(self.path)!r} holds rows of a run with another {', '.join(differing)}",
                hint="give another folder, or delete the file to start anew",
            )
        if not end:
            self.path.unlink()  # killed while it began
        elif end < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(end)
