"""Labelled responses: what was measured of each sentence of an answer and whether it is right; a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hallucination_guard.calibration.labelled import refuse_odd_origin
from hallucination_guard.errors import InputError
from hallucination_guard.values import Conditions, FrozenDict, ModelIdentity, ScorerIdentity, States, from_json
from hallucination_guard.values.sentence import Sentence

__all__ = ["CheckedSentence", "LabelledResponse", "LabelledSentence", "read_responses", "write_responses"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSentence:
    """One sentence with its scores and its label.

    Args:
        scores: by name, finite.
        correct: None where the judge could not say; such a sentence is never counted as wrong.
        states: what a probe can learn from; None where they were not kept.
    """

    scores: Mapping[str, float]
    correct: bool | None
    states: States | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.correct is not None and not isinstance(self.correct, bool):
            raise ValueError(f"the label of a sentence is {self.correct!r}, not true, false or null")
        if not isinstance(self.scores, Mapping):
            raise ValueError(f"the scores of a sentence are {self.scores!r}")
        # It refuses what is no finite number, and what are no states.
        Sentence(start=0, stop=1, begin=0, end=1, scores=self.scores, states=self.states)
        object.__setattr__(self, "scores", FrozenDict(self.scores))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data."""
        states = {} if self.states is None else {"states": self.states.to_json_dict()}
        return {"scores": dict(self.scores), "correct": self.correct, **states}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSentence:
    """A sentence that the judge could label, by itself: what a fused score is fitted on.

    Args:
        id: of the question that its response answers.
        correct: the label.
        scores: see :class:`LabelledSentence`; also ``states``.
        status: always ``scored``.
    """

    id: str
    correct: bool
    scores: Mapping[str, float]
    states: States | None
    status: Literal["scored", "unscorable"] = "scored"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledResponse:
    """One answer, sentence by sentence.

    Args:
        id: of the question; each question once.
        judge: who labelled.
        sentences: in order, at least one.
        model: who answered.
        scorer: what measured the sentences.
        conditions: how the answer was drawn and how it ended.
    """

    id: str
    judge: str
    sentences: tuple[LabelledSentence, ...]
    model: ModelIdentity
    scorer: ScorerIdentity
    conditions: Conditions

    def __post_init__(self) -> None:
        refuse_odd_origin(self.model, self.scorer, {"id": self.id, "judge": self.judge})
        if not self.sentences:
            raise ValueError(f"the response {self.id!r} has no sentences")
        if not isinstance(self.conditions, Conditions) or len(self.conditions.endings) != 1:
            raise ValueError(f"the conditions of {self.id!r} are {self.conditions!r}, not those of one answer")

    @property
    def checked(self) -> tuple[CheckedSentence, ...]:
        """The sentences that have a label."""
        return tuple(
            CheckedSentence(id=self.id, correct=each.correct, scores=each.scores, states=each.states)
            for each in self.sentences
            if each.correct is not None
        )

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "id": self.id,
            "judge": self.judge,
            "sentences": [each.to_json_dict() for each in self.sentences],
            "model": asdict(self.model),
            "scorer": {**asdict(self.scorer), "settings": dict(self.scorer.settings)},
            "conditions": self.conditions.to_json_dict(),
        }


def write_responses(path: str | Path, responses: Iterable[LabelledResponse]) -> None:
    """Write a file that :func:`read_responses` reads."""
    lines = (json.dumps(each.to_json_dict(), ensure_ascii=False) + "\n" for each in responses)
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_responses(path: str | Path) -> Sequence[LabelledResponse]:
    """Read a file of labelled responses.

    Raises:
        InputError: naming file and line of what cannot be read; also for a file without responses.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}", hint="give a readable file") from None
    found = [_response(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{str(path)!r} holds no responses", hint="docs/sentences.md has what a row looks like")
    return found


def _response(line: bytes, where: str) -> LabelledResponse:
    try:
        row = from_json(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text: it could not be written again
        return LabelledResponse(
            model=ModelIdentity(**row.pop("model")),
            scorer=ScorerIdentity(**row.pop("scorer")),
            conditions=Conditions.from_json_dict(row.pop("conditions", None)),
            sentences=tuple(_sentence(**each) for each in row.pop("sentences")),
            **row,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{where} is no labelled response: {error}", hint="docs/sentences.md has what a row looks like"
        ) from None


def _sentence(*, states: Mapping[str, Any] | None = None, **rest: Any) -> LabelledSentence:
    return LabelledSentence(states=None if states is None else States.from_json_dict(states), **rest)
