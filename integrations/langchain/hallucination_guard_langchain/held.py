"""HeldAnswers: where drafts lie between the nodes of a graph, and answers that wait for a human. Not in checkpoints.

One SQLite file with one row a call, in plain JSON, for any number of threads and processes. A draft is taken out of the
file, and overwritten in it, when it is decided on; what was let through stays until the conversation's next call, so
that a node that runs again gives what it gave. Keep the file as you keep the audit log: both hold drafts.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from langchain_core.messages import BaseMessage, messages_from_dict

from hallucination_guard.errors import ConfigurationError
from hallucination_guard.guard import Kept
from hallucination_guard_langchain.convert import KEY
from hallucination_guard_langchain.review import Waiting, actions_of

__all__ = ["Held", "HeldAnswers", "Standing", "Way"]

Way: TypeAlias = Literal["generate", "score", "decide", "review", "answered", "abstained"]
"""Where a call goes on: the node that is next, or how it ended."""


class Standing(TypedDict):
    """Where a call stands, as plain JSON for the graph's state. Nothing in it is of a draft.

    ``request_id`` is the call's, for the log; ``answers`` the id of the message that it answers; ``attempts`` how many
    drafts were generated; ``verdict`` what is known of the newest: of a decided one all that a message's
    ``response_metadata["hallucination_guard"]`` says.
    """

    request_id: str
    answers: str
    attempts: int
    way: Way
    verdict: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A call as it is held.

    Args:
        thread_id: the conversation; what a graph is resumed with.
        standing: where it stands.
        kept: for its next step; None where there is none.
        waiting: what waits for a human; None where nothing does.
        message: what leaves, as LangChain writes messages down; None where nothing does.
    """

    thread_id: str | None
    standing: Standing
    kept: Kept | None = None
    waiting: Waiting | None = None
    message: dict[str, Any] | None = None

    @property
    def actions(self) -> list[dict[str, Any]]:
        """What a human is asked about, one decision each: ``{"name": …, "args": …}``."""
        return [] if self.waiting is None else actions_of(self.waiting)

    @property
    def update(self) -> dict[str, Any]:
        """What the node that held it gives to the graph's state."""
        messages: list[BaseMessage] = [] if self.message is None else messages_from_dict([self.message])
        return {KEY: self.standing, **({"messages": messages} if messages else {})}


class HeldAnswers:
    """The file.

    Args:
        path: of it; made where there is none, for its owner alone.

    Raises:
        ConfigurationError: if it cannot be opened, or is something else.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.touch(mode=0o600)
            with self._opened() as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS held (request_id TEXT PRIMARY KEY, thread_id TEXT, way TEXT NOT NULL,"
                    " body TEXT NOT NULL)"
                )
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(
                f"answers cannot be held in {str(self.path)!r}: {error}", hint="give a file of its own"
            ) from None

    def waiting(self, thread_id: str | None = None) -> list[Held]:
        """What waits for a human, the oldest first: of a conversation, or of all."""
        rows = self._rows("way = 'review' AND (? IS NULL OR thread_id = ?) ORDER BY rowid", (thread_id, thread_id))
        return [_read(*row) for row in rows]

    def find(self, request_id: str) -> Held | None:
        """A call; None if it is not held."""
        rows = self._rows("request_id = ?", (request_id,))
        return _read(*rows[0]) if rows else None

    def keep(self, held: Held) -> None:
        """Hold a call as it stands now, in the place of what was held of it."""
        standing = held.standing
        parts = {"standing": standing, "kept": held.kept, "waiting": held.waiting, "message": held.message}
        body = json.dumps(parts, allow_nan=False)
        with self._opened() as database:
            database.execute(
                "INSERT INTO held VALUES (?, ?, ?, ?) ON CONFLICT (request_id) DO UPDATE SET way = excluded.way,"
                " body = excluded.body",
                (standing["request_id"], held.thread_id, standing["way"], body),
            )

    def forget(self, request_id: str) -> None:
        """Drop a call; what waits of it cannot be let through any more."""
        with self._opened() as database:
            database.execute("DELETE FROM held WHERE request_id = ?", (request_id,))

    def forget_ended(self, thread_id: str | None) -> None:
        """Drop the calls of a conversation that have ended."""
        with self._opened() as database:
            database.execute("DELETE FROM held WHERE thread_id IS ? AND way IN ('answered', 'abstained')", (thread_id,))

    def _rows(self, condition: str, values: tuple[str | None, ...]) -> list[tuple[str | None, str]]:
        with self._opened() as database:
            return database.execute(f"SELECT thread_id, body FROM held WHERE {condition}", values).fetchall()

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: so that threads and processes need not share one."""
        with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.execute("PRAGMA secure_delete = ON")  # what is dropped is overwritten, not only unlinked
            yield database


def _read(thread_id: str | None, body: str) -> Held:
    return Held(thread_id=thread_id, **json.loads(body))
