"""Under which conditions an answer was drawn: with the model and the scorer, what a calibration speaks of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Self, get_args

from hallucination_guard.values.generation import FinishReason, Generation
from hallucination_guard.values.plain import JSON
from hallucination_guard.values.prompt import Message
from hallucination_guard.values.settings import GenerationSettings

__all__ = ["Conditions"]

_ENDINGS = frozenset(get_args(FinishReason))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How an answer, or every answer of a set, was drawn.

    The settings are those of the call: what a policy changes for a further attempt belongs to the policy.

    Args:
        frame: hash of what stands around the question: system turns, whether there were earlier turns, the role of
            the last one, the tools or the schema that the model was given, and the text around the question where the
            caller named it. A template inside the user's own turn cannot be told from the question and is not in it.
        max_new_tokens: the answer's length at most; None where something else wrote it, and so for the next three.
        temperature: 0 is greedy.
        top_p: of sampling; 1 where the draw is greedy.
        stop: texts that end the answer.
        endings: how answers ended, see :data:`FinishReason`; of one answer it is one.
        generator: what drew them where that was a server, see :class:`~hallucination_guard.values.Generator`; None
            where the model itself did, or nobody said.

    Raises:
        ValueError: on a value that cannot be.
    """

    frame: str
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] | None = None
    endings: tuple[FinishReason, ...]
    generator: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "endings"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.frame, str) or not self.frame:
            raise ValueError(f"the frame is {self.frame!r}, not a hash")
        if self.generator is not None and (not isinstance(self.generator, str) or not self.generator):
            raise ValueError(f"the generator is {self.generator!r}, not a text")
        ends = isinstance(self.endings, tuple) and all(isinstance(each, str) for each in self.endings)
        if not ends or not self.endings or not _ENDINGS.issuperset(self.endings):
            raise ValueError(f"the endings are {self.endings!r}, not some of {', '.join(sorted(_ENDINGS))}")
        object.__setattr__(self, "endings", tuple(sorted(set(self.endings))))
        if self.stop is not None and not (
            isinstance(self.stop, tuple) and all(isinstance(each, str) and each for each in self.stop)
        ):
            raise ValueError(f"the stop texts are {self.stop!r}, not texts")
        for name in ("max_new_tokens", "temperature", "top_p"):
            value = getattr(self, name)
            kinds = int if name == "max_new_tokens" else int | float
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < float("inf")
            ):
                raise ValueError(f"{name} is {value!r}, not a number from 0 up")

    @classmethod
    def of(cls, generation: Generation) -> Self:
        """Those of one answer."""
        settings, reason = generation.settings, generation.finish_reason
        # The beginning of an answer that something else is still writing is not finished, and yet not drawn.
        drawn = reason != "read" and not (reason == "open" and settings.max_new_tokens is None)
        greedy = not settings.temperature
        return cls(
            frame=_frame(generation.messages, settings),
            max_new_tokens=settings.max_new_tokens if drawn else None,
            temperature=settings.temperature if drawn else None,
            top_p=(1.0 if greedy else settings.top_p) if drawn else None,
            stop=tuple(settings.stop or ()) if drawn else None,
            endings=(generation.finish_reason,),
        )

    @classmethod
    def together(cls, each: Iterable[Conditions]) -> Conditions:
        """Those of a set of answers, which must have been drawn alike; they may have ended differently.

        Raises:
            ValueError: naming what differs; also for no answers.
        """
        given = set(each)
        if not given:
            raise ValueError("there are no answers")
        kinds = {replace(one, endings=("stop",)) for one in given}
        first = next(iter(kinds))
        if differing := sorted({name for other in kinds for name in _differing(first, other)}):
            raise ValueError(f"the answers were drawn with different {', '.join(differing)}")
        return replace(first, endings=tuple(ending for one in given for ending in one.endings))

    def ended(self, reason: FinishReason) -> Conditions:
        """The same of an answer that ended in this way."""
        return replace(self, endings=(reason,))

    def lacks(self, own: Conditions) -> str:
        """What of an answer's own conditions these do not cover, in words with both values; empty if nothing."""
        differing = [f"{name} {getattr(own, name)!r} against {getattr(self, name)!r}" for name in _differing(self, own)]
        # Of a beginning it is not known how its answer will end; that is asked again of the whole.
        if unseen := sorted(set(own.endings) - {*self.endings, "open"}):
            differing.append(f"an ending by {', '.join(unseen)} against {', '.join(self.endings)}")
        return "; ".join(differing)

    def cut(self, own: Conditions) -> str:
        """Why an answer is less than these know, in words: it was cut, and none was, or otherwise. Empty if it is not.

        How an answer ended that something else wrote is not known, and so it is not said to be cut.
        """
        if "length" in own.endings and ("length" not in self.endings or own.max_new_tokens != self.max_new_tokens):
            at = "its most" if own.max_new_tokens is None else own.max_new_tokens
            return f"the answer was cut at {at} tokens, which no labelled answer was"
        if "stop_text" in own.endings and ("stop_text" not in self.endings or own.stop != self.stop):
            return "the answer was cut at a stop text, which no labelled answer was"
        return ""

    @property
    def hash(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(self.to_json_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json_dict(self) -> dict[str, JSON]:
        """Plain data."""
        plain = asdict(self)
        if self.generator is None:  # added later: what is not there leaves the hash as it was
            del plain["generator"]
        return {**plain, "endings": list(self.endings), "stop": None if self.stop is None else list(self.stop)}

    @classmethod
    def from_json_dict(cls, plain: object) -> Self:
        """What :meth:`to_json_dict` gave.

        Raises:
            ValueError: on a missing or unknown name, or a value that cannot be.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(plain, Mapping) or {*plain, "generator"} != names:
            raise ValueError(f"conditions are {repr(plain)[:60]}, not {', '.join(sorted(names))}")
        return cls(**plain)


def _differing(one: Conditions, other: Conditions) -> list[str]:
    names = ("frame", "max_new_tokens", "temperature", "top_p", "stop", "generator")
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _frame(messages: tuple[Message, ...], settings: GenerationSettings) -> str:
    """What stays the same from question to question."""
    question = settings.question
    system = [[turn.role, turn.content] for turn in messages if turn.role in ("system", "developer")]
    others = [turn for turn in messages if turn.role not in ("system", "developer")]
    around = list(others[-1].content.rpartition(question)[::2]) if question and others else []
    asker = others[-1].role if others else ""
    frame: list[object] = [system, len(others) > 1, asker, around]
    if settings.offered:  # beside the turns; left out where there is nothing, so that such frames keep their hash
        tools = [each.to_json_dict() for each in settings.tools or ()]
        frame.append([tools, settings.tool_choice, settings.strict_tools, settings.response_schema])
    plain = json.dumps(frame)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]
