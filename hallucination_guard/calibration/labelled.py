"""Labelled answers: what was measured of an answer, and whether it was right. What is fitted and evaluated on.

One JSON object a line. ``evaluate`` writes such files, ``calibrate`` and the cascade's fitter read them, and a labelled
audit log can be read as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hallucination_guard.errors import InputError
from hallucination_guard.values import Conditions, FrozenDict, ModelIdentity, ScorerIdentity, States, from_json

__all__ = ["Beginning", "Labelled", "read_labelled", "refuse_odd_origin", "write_labelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What was measured of an answer up to the end of a sentence.

    Args:
        length: tokens up to there.
        scores: by name, finite.
    """

    length: int
    scores: Mapping[str, float]

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"the length of a beginning is {self.length!r}, not a whole number from 1 up")
        if not isinstance(self.scores, Mapping) or not self.scores:
            raise ValueError(f"the scores of a beginning are {self.scores!r}")
        _refuse_odd_scores(self.scores, "a beginning")
        object.__setattr__(self, "scores", FrozenDict(self.scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """One draft with its scores and its label.

    Args:
        id: of the question.
        attempt: 1 for the first draft; several drafts of one question share its id and count up.
        correct: the label.
        judge: who gave it, for example ``contains`` or ``human``; labels of different judges are never mixed.
        scores: by name; empty where the answer could not be scored.
        reason: why there are none.
        length: T, the answer's tokens.
        model: who answered.
        scorer: what measured.
        conditions: how the answer was drawn and how it ended.
        beginnings: the same of every beginning that ends with a sentence, shortest first, the whole answer last; empty
            where only the whole was measured.
        states: what a probe can learn from; None where they were not kept.
        policy: hash of the policy whose drafts these are; None for single greedy drafts without a policy.
        seconds: by name of what took them.
    """

    id: str
    attempt: int = 1
    correct: bool
    judge: str
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    length: int
    model: ModelIdentity
    scorer: ScorerIdentity
    conditions: Conditions
    beginnings: tuple[Beginning, ...] = ()
    states: States | None = field(default=None, repr=False)
    policy: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_odd_types(self)
        if not isinstance(self.correct, bool):
            raise ValueError(f"the label of {self.id!r} is {self.correct!r}, neither true nor false")
        if not isinstance(self.conditions, Conditions) or len(self.conditions.endings) != 1:
            raise ValueError(f"the conditions of {self.id!r} are {self.conditions!r}, not those of one answer")
        if bool(self.scores) == bool(self.reason):
            raise ValueError(f"the answer {self.id!r} has scores {sorted(self.scores)!r} and reason {self.reason!r}")
        _refuse_odd_scores(self.scores, repr(self.id))
        lengths = [each.length for each in self.beginnings]
        if lengths and (lengths != sorted(set(lengths)) or lengths[-1] != self.length or not self.scores):
            raise ValueError(f"the beginnings of {self.id!r} have {lengths!r} tokens and the answer {self.length}")
        if not self.judge or self.attempt < 1 or self.length < 0:
            raise ValueError(f"{self.id!r} has judge {self.judge!r}, attempt {self.attempt!r}, length {self.length!r}")
        object.__setattr__(self, "scores", FrozenDict(self.scores))
        object.__setattr__(self, "seconds", FrozenDict(self.seconds))

    @property
    def status(self) -> Literal["scored", "unscorable"]:
        """Whether there is anything to fit on."""
        return "scored" if self.scores else "unscorable"

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "id": self.id,
            "attempt": self.attempt,
            "correct": self.correct,
            "judge": self.judge,
            "scores": dict(self.scores),
            "reason": self.reason,
            "length": self.length,
            "model": asdict(self.model),
            "scorer": {
                "name": self.scorer.name,
                "version": self.scorer.version,
                "settings": dict(self.scorer.settings),
            },
            "conditions": self.conditions.to_json_dict(),
            **(
                {"beginnings": [{"length": each.length, "scores": dict(each.scores)} for each in self.beginnings]}
                if self.beginnings
                else {}
            ),
            **({"states": self.states.to_json_dict()} if self.states is not None else {}),
            "policy": self.policy,
            "seconds": dict(self.seconds),
        }


def write_labelled(path: str | Path, answers: Iterable[Labelled]) -> None:
    """Write a file that :func:`read_labelled` reads."""
    lines = (json.dumps(each.to_json_dict(), ensure_ascii=False) + "\n" for each in answers)
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_labelled(path: str | Path) -> Sequence[Labelled]:
    """Read a file of labelled answers.

    Raises:
        InputError: naming file and line of what cannot be read; also for a file without answers.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}", hint="give a readable file") from None
    found = [_labelled(line, f"line {number} of {path}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{str(path)!r} holds no answers", hint="evaluate writes such a file")
    return found


def _labelled(line: bytes, where: str) -> Labelled:
    try:
        row = from_json(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text: it could not be written again
        model = ModelIdentity(**row.pop("model"))
        scorer = ScorerIdentity(**row.pop("scorer"))
        conditions = Conditions.from_json_dict(row.pop("conditions", None))
        beginnings = tuple(Beginning(**each) for each in row.pop("beginnings", ()))
        states = States.from_json_dict(row.pop("states")) if "states" in row else None
        return Labelled(model=model, scorer=scorer, conditions=conditions, beginnings=beginnings, states=states, **row)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{where} is no labelled answer: {error}", hint="evaluate writes such rows") from None


def _refuse_odd_scores(scores: Mapping[str, float], what: str) -> None:
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"score {name!r} of {what} is {value!r}, not a finite number")


def _refuse_odd_types(answer: Labelled) -> None:
    policy = {} if answer.policy is None else {"policy": answer.policy}
    refuse_odd_origin(answer.model, answer.scorer, {"id": answer.id, "judge": answer.judge, **policy})
    for name, number in (("attempt", answer.attempt), ("length", answer.length)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{name} of {answer.id!r} is {number!r}, not a whole number")


def refuse_odd_origin(model: ModelIdentity, scorer: ScorerIdentity, more: Mapping[str, object]) -> None:
    """JSON has numbers where texts belong, and NaN; what is compared, hashed and bound to must be what it seems.

    Args:
        model: who answered.
        scorer: what measured.
        more: by name what has to be a text as well.

    Raises:
        ValueError: if something is no text, or half a surrogate pair.
    """
    texts: dict[str, object] = {
        **more,
        "model.name": model.name,
        "model.fingerprint": model.fingerprint,
        "model.dtype": model.dtype,
        "model.template": model.template,
        "scorer.name": scorer.name,
        "scorer.version": scorer.version,
    }
    for name, value in texts.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}, not a text")
        value.encode()  # half a surrogate pair is no text either: it cannot be hashed or written
    settings = scorer.settings
    said = [model.structure, *settings.keys(), *settings.values()] if isinstance(settings, Mapping) else [None]
    for each in said:
        if not isinstance(each, str):
            raise ValueError(f"structure {model.structure!r} and the scorer's settings {settings!r} are not all texts")
        each.encode()
