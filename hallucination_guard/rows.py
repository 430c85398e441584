"""``score`` on a file: one JSON object a line in, one a line out, and a bad line ends nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hallucination_guard.errors import InputError
from hallucination_guard.types import Generation, Score, Scorer

__all__ = ["Line", "read_lines", "score_lines"]

_FIELDS = frozenset({"id", "prompt", "messages", "question", "response", "response_token_ids"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the input, or why it is none.

    Args:
        number: of the line, from 1.
        id: as given; None where there was none to read.
        messages: the prompt.
        question: on a model without a chat template, the part of the prompt whose last token is t*.
        answer: text or token ids to be read; None to generate.
        problem: why the line can not be used; empty if it can.
    """

    number: int
    id: Any = None
    messages: Any = None
    question: str | None = None
    answer: str | tuple[int, ...] | None = None
    problem: str = ""


def read_lines(raw: Sequence[bytes]) -> list[Line]:
    """The rows of a file; blank lines are none."""
    return [_line(line, number) for number, line in enumerate(raw, start=1) if line.strip()]


def _line(raw: bytes, number: int) -> Line:
    try:
        row = json.loads(raw)
    except ValueError as error:  # also bytes that are not UTF-8
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


def score_lines(
    model: Any, lines: Sequence[Line], *, scorer: Scorer, batch_size: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """One row of output for each line, in order.

    Args:
        model: a :class:`~hallucination_guard.model.WhiteBoxModel`.
        lines: from :func:`read_lines`.
        scorer: measures.
        batch_size: rows that are generated and scored together.
        max_new_tokens: of a generated answer.
    """

    def made(part: Sequence[Line]) -> list[Generation]:
        return _generations(model, part, max_new_tokens)

    for begin in range(0, len(lines), batch_size):
        part = lines[begin : begin + batch_size]
        yield from _part(model, scorer, part, made)


def _part(
    model: Any, scorer: Scorer, part: Sequence[Line], made: Callable[[Sequence[Line]], list[Generation]]
) -> Iterator[dict[str, Any]]:
    good = [line for line in part if not line.problem]
    try:
        generations = made(good)
        rows = iter([_row(*each) for each in zip(good, generations, scorer.batch(model, generations), strict=True)])
    except Exception as error:
        # Whatever failed, it must name its own row: the rows are tried one by one, and a single row keeps the error.
        if len(part) > 1:
            for line in part:
                yield from _part(model, scorer, [line], made)
            return
        yield _failed(part[0], error.args[0] if isinstance(error, KeyError) else str(error) or type(error).__name__)
        return
    for line in part:
        yield _failed(line, line.problem) if line.problem else next(rows)


def _generations(model: Any, lines: Sequence[Line], max_new_tokens: int) -> list[Generation]:
    """Read what has an answer; generate the rest, together where they name no question of their own."""
    written: dict[int, Generation] = {}
    open_lines: dict[str | None, list[Line]] = {}
    for line in lines:
        if line.answer is None:
            open_lines.setdefault(line.question, []).append(line)
        else:
            written[line.number] = model.read(line.messages, answer=line.answer, question=line.question)
    for question, group in open_lines.items():
        batch = [line.messages for line in group]
        if any(isinstance(messages, list) and not messages for messages in batch):
            raise InputError("the messages are an empty list", hint="give at least one message")
        made = model.generate(batch, max_new_tokens=max_new_tokens, question=question)
        written |= {line.number: generation for line, generation in zip(group, made, strict=True)}
    return [written[line.number] for line in lines]


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


def _failed(line: Line, reason: Any) -> dict[str, Any]:
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
