"""A small document set and its search, by the library bm25s: enough for ``ask --documents`` and for the demo."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from hallucination_guard.errors import InputError, MissingExtra
from hallucination_guard.values import Passage, from_json

__all__ = ["BM25Retriever"]


class BM25Retriever:
    """Finds the passages that share the rarest words with a query.

    Args:
        passages: what can be found; at least one.
        k: at most this many are found.

    ``identity`` names what is searched, for a policy's ``corpus``.

    Raises:
        MissingExtra: if bm25s is not installed.
        InputError: if there are no passages.
    """

    def __init__(self, passages: Sequence[Passage], *, k: int = 5) -> None:
        try:
            import bm25s
        except ImportError:
            raise MissingExtra(
                "searching documents needs bm25s", hint="pip install 'hallucination-guard-semgrad[demo]'"
            ) from None
        if not passages:
            raise InputError("there are no documents to search", hint="give at least one")
        self._bm25s: Any = bm25s
        self._passages = tuple(passages)
        self._k = k
        plain = json.dumps([[each.id, each.text] for each in self._passages])
        self.identity = f"bm25s k={k} {hashlib.sha256(plain.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
        self._index = bm25s.BM25()
        words = self._tokens([passage.text for passage in passages])
        if not any(words.ids):
            raise InputError("the documents have no words to search by", hint="give texts")
        self._index.index(words, show_progress=False)

    @classmethod
    def from_path(cls, path: str | Path, *, k: int = 5) -> Self:
        """From a JSON-lines file of ``{"id", "text"}``, or from a folder of ``.txt`` and ``.md`` files.

        Raises:
            InputError: if there is no such thing, or a line is not a document.
        """
        path = Path(path)
        if path.is_dir():
            files = sorted(each for each in path.iterdir() if each.suffix in (".txt", ".md"))
            return cls([Passage(id=file.name, text=_text(file)) for file in files], k=k)
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise InputError(f"the documents {str(path)!r} cannot be read: {error.strerror}") from error
        return cls([_passage(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()], k=k)

    def invoke(self, query: str) -> list[Passage]:
        """The passages that share a word with ``query``, the best first."""
        found, scores = self._index.retrieve(
            self._tokens([query]), k=min(self._k, len(self._passages)), show_progress=False
        )
        return [self._passages[at] for at, score in zip(found[0], scores[0], strict=True) if score > 0.0]

    def _tokens(self, texts: list[str]) -> Any:
        return self._bm25s.tokenize(texts, stopwords="en", show_progress=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the document {str(path)!r} cannot be read: {type(error).__name__}", hint="save it as text in UTF-8"
        ) from None


def _passage(line: bytes, number: int, path: Path) -> Passage:
    try:
        row = from_json(line)
        if not isinstance(row["id"], str | int) or not isinstance(row["text"], str):
            raise TypeError("an id is a text or a number, a text a text")
        return Passage(id=str(row["id"]), text=row["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"line {number} of {str(path)!r} is not a document: {type(error).__name__}",
            hint='a line is {"id": "…", "text": "…"}',
        ) from None
