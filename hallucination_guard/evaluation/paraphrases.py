"""Queries in several wordings: what is located with, and what a choice is checked on."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hallucination_guard.errors import InputError
from hallucination_guard.values import from_json

__all__ = ["Group", "read_groups", "shipped_groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One query in several wordings.

    Args:
        query: the first wording.
        paraphrases: the others.
        answers: every form of answer that counts as right; needed only to check the choice on labels.
    """

    query: str
    paraphrases: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def wordings(self) -> tuple[str, ...]:
        """All of them, none twice."""
        return tuple(dict.fromkeys((self.query, *self.paraphrases)))


def shipped_groups() -> list[Group]:
    """The package's own 40 queries in five wordings each."""
    with resources.as_file(resources.files("hallucination_guard").joinpath("data/paraphrases.jsonl")) as path:
        return read_groups(path)


def read_groups(path: str | Path, *, labelled: bool = False) -> list[Group]:
    """Read queries: a JSON object a line with ``query``, ``paraphrases`` and ``answers`` (or ``truthful answer``).

    Args:
        path: of the file.
        labelled: whether every row must have answers; else every row must have paraphrases.

    Raises:
        InputError: naming file and line of what cannot be used.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}", hint="give a readable file") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            group = _group(line, f"line {number} of {path}")
            if labelled and not group.answers:
                raise InputError(f"line {number} of {path} has no answers", hint="add 'answers', a list of texts")
            if not labelled and len(group.wordings) < 2:
                raise InputError(
                    f"line {number} of {path} has no paraphrases", hint="add 'paraphrases', a list of texts"
                )
            found.append(group)
    return found


def _group(line: bytes, where: str) -> Group:
    try:
        row = from_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}", hint="one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is {str(row)[:60]!r}, not an object", hint="give query and paraphrases")
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"{where} has the query {query!r}", hint="a query is a text")
    lists = {"paraphrases": row.get("paraphrases", []), "answers": row.get("answers", row.get("truthful answer", []))}
    for name, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where} has {name} {str(texts)[:60]!r}", hint=f"{name} are a list of texts")
    if not all(text.strip() for text in lists["paraphrases"]):
        raise InputError(f"{where} has an empty paraphrase", hint="leave it out")
    answers = tuple(text for text in lists["answers"] if text.strip())  # published sets have empty ones
    return Group(query=query, paraphrases=tuple(lists["paraphrases"]), answers=answers)
