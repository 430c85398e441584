"""The questions that are evaluated on: one JSON object a line, and the prompts that are made of them.

A row has ``query`` (or ``question``, ``prompt``) and either reference answers, ``answers`` (or ``truthful answer``,
``answer``), a text or a list of texts, by which a judge labels; or ``label`` (or ``correct``), true or false, beside
the ``response`` that it belongs to, and then nothing is judged. A row with ``response`` is read, any other is answered.
Other fields are ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.values import from_json

__all__ = ["FEW_SHOT", "PROMPT", "Item", "Prompting", "data_hash", "ending", "given_judge", "read_items"]

PROMPT = "Please directly answer the following question with one or few words:\n{query}"
"""The prompt of the paper's experiments."""

FEW_SHOT = "Question: {query}\nAnswer:"
"""The prompt for a model without a chat template; the examples before it are written the same way."""

_QUERY = ("query", "question", "prompt")
_ANSWERS = ("answers", "truthful answer", "answer")
_LABEL = ("label", "correct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One row.

    Args:
        id: its own, else the number of its line.
        query: what is asked.
        answers: the references; may be empty where there is a label.
        response: the answer to be read; None to generate.
        correct: its label; None to judge.
        judge: who gave the label.
    """

    id: str
    query: str
    answers: tuple[str, ...] = ()
    response: str | None = None
    correct: bool | None = None
    judge: str = "given"


def read_items(path: str | Path) -> list[Item]:
    """The rows of a file, without blank lines.

    Raises:
        InputError: naming file and line of what cannot be used: here a skipped row would be a flattered figure.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}", hint="give a readable file") from None
    items = [_item(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise InputError(f"{str(path)!r} holds no questions", hint="one JSON object a line, with query and answers")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"two rows of {str(path)!r} have the id {item.id!r}", hint="give each its own, or none")
        seen.add(item.id)
    for what, found in (
        ("a response", {item.response is not None for item in items}),
        ("a label", {item.correct is not None for item in items}),
    ):
        if len(found) > 1:
            raise InputError(f"some rows of {str(path)!r} have {what} and some have none", hint="split the file")
    return items


def given_judge(items: Sequence[Item]) -> str | None:
    """Who gave the labels that came with the rows; None where the rows have none.

    Raises:
        InputError: if several judges did.
    """
    from hallucination_guard.evaluation.judges import one_judge

    return None if items[0].correct is None else one_judge([item.judge for item in items])


def data_hash(path: str | Path) -> str:
    """What stored answers are bound to."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


def _item(line: bytes, number: int, path: str | Path) -> Item:
    where = f"line {number} of {path}"
    try:
        row = from_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}", hint="one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is a {type(row).__name__}", hint="one JSON object a line")
    query = _first(row, _QUERY)
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"{where} has the query {query!r}", hint=f"give a text as one of {list(_QUERY)!r}")
    response, label = row.get("response"), _first(row, _LABEL)
    if response is not None and not isinstance(response, str):
        raise InputError(f"{where} has the response {response!r}", hint="give a text")
    if label is not None and (not isinstance(label, bool) or response is None):
        raise InputError(
            f"{where} has the label {label!r} and the response {response!r}",
            hint="a label is true (right) or false and goes with the response it is of",
        )
    own = number if row.get("id") is None else row["id"]
    if isinstance(own, bool) or not isinstance(own, str | int) or own == "":
        raise InputError(f"{where} has the id {repr(own)[:40]}", hint="give a text or a whole number, or none")
    judge = row.get("judge", "given")
    if not isinstance(judge, str) or not judge:
        raise InputError(f"{where} has the judge {judge!r}", hint="give a name")
    return Item(
        id=str(own),
        query=query,
        answers=_references(row, where, needed=label is None),
        response=response,
        correct=label,
        judge=judge,
    )


def _references(row: dict[str, Any], where: str, *, needed: bool) -> tuple[str, ...]:
    found = _first(row, _ANSWERS)
    references = [found] if isinstance(found, str) else found
    if references is None and not needed:
        return ()
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references) or not references:
        raise InputError(
            f"{where} has the reference answers {found!r}", hint=f"a text or texts as one of {list(_ANSWERS)!r}"
        )
    return tuple(references)


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How a question becomes a prompt.

    Args:
        template: has ``{query}``.
        examples: answered questions that are put before it, for a model without a chat template.
        templated: whether the model has a chat template.
    """

    template: str
    examples: tuple[Item, ...] = ()
    templated: bool = True

    @classmethod
    def of(cls, model: WhiteBoxModel, *, template: str | None = None, examples: Sequence[Item] = ()) -> Prompting:
        """The prompting for ``model``: the paper's prompt, or question and answer by turns where there are examples.

        Raises:
            ConfigurationError: on a template without ``{query}``, or examples for a model with a chat template.
        """
        template = template or (FEW_SHOT if examples else PROMPT)
        if "{query}" not in template:
            raise ConfigurationError(f"the prompt {template!r} has no place for the question", hint="put {query} in")
        templated = bool(model.prompt("Who?").templated)
        if examples and templated:
            raise ConfigurationError(
                f"{model.name!r} has a chat template", hint="leave the examples out: they are for base models"
            )
        if any(not item.answers for item in examples):
            raise ConfigurationError("an example has no reference answer", hint="give it one, or no examples")
        return cls(template=template, examples=tuple(examples), templated=templated)

    def __call__(self, query: str) -> str:
        """The prompt."""
        shots = "".join(f"{self._asked(item.query)} {item.answers[0]}\n\n" for item in self.examples)
        return shots + self._asked(query)

    def question(self, query: str) -> str | None:
        """What ``generate`` and ``read`` are to be told of t*: nothing where a chat template names it."""
        return None if self.templated else ending(self(query), query, after=self.template.rpartition("{query}")[2])

    @property
    def stop(self) -> tuple[str, ...]:
        """A base model goes on with the next question; its answer ends with the line."""
        return () if self.templated else ("\n",)

    def _asked(self, query: str) -> str:
        return self.template.replace("{query}", query)  # not format: a query may hold braces


def ending(prompt: str, query: str, *, after: str) -> str:
    """The shortest text ending with ``query`` that finds its place in ``prompt``: t* is its last token.

    Most questions end alike ("?"), and prompts that name the same text can be generated as one batch.

    Args:
        prompt: ends with the query and ``after``.
        query: whose last token is to be t*.
        after: what the template writes behind it.

    Raises:
        InputError: if what comes after repeats all that came before.
    """
    at = len(prompt) - len(after) - (len(query) - len(query.rstrip()))
    for begin in range(at - 1, -1, -1):
        part = prompt[begin:at]
        # generate() looks for the last place where the text stands, without white space around it.
        if not part[0].isspace() and prompt.rfind(part) == begin:
            return part
    raise InputError(f"{query[:60]!r} cannot be told from what follows it", hint="give another prompt template")
