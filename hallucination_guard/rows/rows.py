"""``score`` on a file: one JSON object a line in, one a line out, and a bad line ends nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeAlias

from hallucination_guard.values import Generation, Model, Score, Scorer, from_json

__all__ = ["Line", "Rows", "planned", "read_lines", "score_batch", "score_lines"]

_FIELDS = frozenset({"id", "prompt", "messages", "question", "response", "response_token_ids"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the input, or why it cannot be used.

    Args:
        number: of the line, from 1.
        id: as given; None where there was none to read.
        messages: the prompt.
        question: on a model without a chat template, the part of the prompt whose last token is t*.
        answer: text or token ids to be read; None to generate.
        problem: why the line cannot be used; empty if it can.

    It travels as plain JSON, see :meth:`to_json_dict`.
    """

    number: int
    id: Any = None
    messages: Any = None
    question: str | None = None
    answer: str | tuple[int, ...] | None = None
    problem: str = ""

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_json_dict(cls, data: Mapping[str, Any]) -> Self:
        """The line that :meth:`to_json_dict` gave."""
        answer = data["answer"]
        return cls(**{**data, "answer": tuple(answer) if isinstance(answer, list) else answer})


def read_lines(raw: Sequence[bytes]) -> list[Line]:
    """The rows of a file, without blank lines."""
    return [_line(line, number) for number, line in enumerate(raw, start=1) if line.strip()]


def _line(raw: bytes, number: int) -> Line:
    try:
        row = from_json(raw)
    except ValueError as error:  # also bytes that are not UTF-8; brackets by the thousand
        return Line(number=number, problem=f"not JSON: {error}")
    if not isinstance(row, dict):
        return Line(number=number, problem=f"a {type(row).__name__}, not an object")
    own = row.get("id", number)
    if problem := _problem(row):
        return Line(number=number, id=own, problem=problem)
    answer = row.get("response")
    if answer is None and row.get("response_token_ids") is not None:
        answer = tuple(row["response_token_ids"])
    messages = row["prompt"] if row.get("prompt") is not None else row["messages"]
    return Line(number=number, id=own, messages=messages, question=row.get("question"), answer=answer)


def _problem(row: dict[str, Any]) -> str:
    if unknown := sorted(set(row) - _FIELDS):
        return f"unknown fields {unknown!r}: known are {sorted(_FIELDS)!r}"
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        return "give either 'prompt' or 'messages'"
    if prompt is not None and not isinstance(prompt, str):
        return f"'prompt' is a {type(prompt).__name__}, not a string"
    if messages is not None and not isinstance(messages, list):
        return f"'messages' is a {type(messages).__name__}, not a list"
    text, ids = row.get("response"), row.get("response_token_ids")
    if text is not None and ids is not None:
        return "give either 'response' or 'response_token_ids'"
    if text is not None and not isinstance(text, str):
        return f"'response' is a {type(text).__name__}, not a string"
    if ids is not None and not isinstance(ids, list):
        return f"'response_token_ids' is a {type(ids).__name__}, not a list"
    if row.get("question") is not None and not isinstance(row["question"], str):
        return f"'question' is a {type(row['question']).__name__}, not a string"
    return ""


Rows: TypeAlias = list[tuple[int, dict[str, Any]]]
"""Finished rows of output, each with the number of its line."""


def score_lines(
    model: Model,
    lines: Iterable[Line],
    *,
    scorer: Scorer,
    batch_size: int,
    batch_tokens: int,
    max_new_tokens: int,
    by_length: bool = True,
) -> Iterator[Rows]:
    """One row of output for each line, in batches as they are finished.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
        lines: from :func:`read_lines`.
        scorer: measures.
        batch_size: the most rows that are generated and scored together.
        batch_tokens: the most tokens of a batch, padding included: its rows times its longest one, prompt and answer.
            A longer row is a batch of its own.
        max_new_tokens: of a generated answer.
        by_length: put rows of like length together, whatever their place in the file, longest first: a batch that
            does not fit into memory then shows at once. Otherwise rows come in the order of the lines.
    """
    parts = planned(
        model,
        lines,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        max_new_tokens=max_new_tokens,
        by_length=by_length,
    )
    for part in parts:
        yield from score_batch(model, part, scorer=scorer, max_new_tokens=max_new_tokens)


def planned(
    model: Model,
    lines: Iterable[Line],
    *,
    batch_size: int,
    batch_tokens: int,
    max_new_tokens: int,
    by_length: bool = True,
) -> Iterator[list[Line]]:
    """The batches in which lines are scored; the arguments are those of :func:`score_lines`."""
    sized: Iterable[_Sized] = (_sized(model, line, max_new_tokens) for line in lines)
    if by_length:
        sized = sorted(sized, key=lambda each: -each.tokens)
    yield from _batches(sized, batch_size, batch_tokens)


@dataclass(frozen=True, slots=True)
class _Sized:
    line: Line
    tokens: int


def _sized(model: Model, line: Line, max_new_tokens: int) -> _Sized:
    """The line with the most tokens that it can take up; what cannot even be read becomes a line with a problem."""
    if line.problem:
        return _Sized(line, 0)
    try:
        if line.answer is None:
            tokens = len(model.prompt(line.messages).token_ids) + max_new_tokens
            return _Sized(line, tokens if model.context is None else min(tokens, model.context))
        read = model.read(line.messages, answer=line.answer, question=line.question)
    except Exception as error:  # whatever it is, it is this row's and ends nothing
        return _Sized(replace(line, problem=_reason(error)), 0)
    return _Sized(line, len(read.prompt_token_ids) + len(read.response_token_ids))


def _batches(sized: Iterable[_Sized], batch_size: int, batch_tokens: int) -> Iterator[list[Line]]:
    part: list[Line] = []
    longest = 0
    for each in sized:
        widened = max(longest, each.tokens)
        if part and (len(part) == batch_size or (len(part) + 1) * widened > batch_tokens):
            yield part
            part, widened = [], each.tokens
        part.append(each.line)
        longest = widened
    if part:
        yield part


def score_batch(model: Model, part: Sequence[Line], *, scorer: Scorer, max_new_tokens: int) -> Iterator[Rows]:
    """The rows of one batch; one by one where something in it fails.

    Args:
        model: as for :func:`score_lines`.
        part: from :func:`planned`.
        scorer: measures.
        max_new_tokens: of a generated answer.
    """
    good = [line for line in part if not line.problem]
    try:
        generations = _generations(model, good, max_new_tokens)
        scores = scorer.batch(model, generations) if good else []
        made = {each[0].number: _row(*each) for each in zip(good, generations, scores, strict=True)}
    except Exception as error:
        # Whatever failed, it must name its own row: the rows are tried one by one, and a single row keeps the error.
        if len(part) == 1:
            yield [(part[0].number, _failed(part[0], _reason(error)))]
            return
    else:
        yield [(line.number, made[line.number] if not line.problem else _failed(line, line.problem)) for line in part]
        return
    for line in part:
        yield from score_batch(model, [line], scorer=scorer, max_new_tokens=max_new_tokens)


def _reason(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__


def _generations(model: Model, lines: Sequence[Line], max_new_tokens: int) -> list[Generation]:
    """Read what has an answer; generate the rest, together."""
    found = {
        line.number: model.read(line.messages, answer=line.answer, question=line.question)
        for line in lines
        if line.answer is not None
    }
    rest = [line for line in lines if line.answer is None]
    if rest:
        made = model.generate(
            [line.messages for line in rest],
            question=[line.question for line in rest],
            max_new_tokens=max_new_tokens,
        )
        found |= {line.number: generation for line, generation in zip(rest, made, strict=True)}
    return [found[line.number] for line in lines]


def _row(line: Line, generation: Generation, score: Score) -> dict[str, Any]:
    anchor = generation.anchor
    return {
        "id": line.id,
        "status": score.status,
        "reason": score.reason,
        "response": generation.text,
        "prompt_token_ids": list(generation.prompt_token_ids),
        "response_token_ids": list(generation.response_token_ids),
        "anchor": None if anchor is None else {"index": anchor.index, "token": anchor.token, "rule": anchor.rule},
        "scores": dict(score.scores),
        "seconds": {"generate": generation.seconds, "score": score.seconds},
    }


def _failed(line: Line, reason: str) -> dict[str, Any]:
    return {
        "id": line.id,
        "line": line.number,
        "status": "error",
        "reason": f"line {line.number}: {reason}",
        "response": None,
        "prompt_token_ids": None,
        "response_token_ids": None,
        "anchor": None,
        "scores": {},
        "seconds": {},
    }
