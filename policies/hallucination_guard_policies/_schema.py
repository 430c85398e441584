"""What a policy document may say: types and shapes are checked here, meaning where the policies are built."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from hallucination_guard_policies._source import Source

__all__ = ["Abstain", "Document", "Escalate", "Mark", "Redact", "Retrieve", "Retry", "Rule", "checked"]

_TIMES = "how often in one call, 1 or more"
_UNSCORED = "abstain, accept or escalate"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Certain(_Part):
    confidence: float | None = Field(
        None, gt=0, le=1, description="calibrated P(correct) in (0, 1]; raw scores go under 'above'"
    )
    max_risk: float | None = Field(None, gt=0, lt=1, description="a certified share of wrong answers in (0, 1)")

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise _choice(given, "number", "confidence: … or max_risk: …")
        return self


class Raw(_Part):
    score: str = Field(min_length=1, description="name of a raw score, for example hybridgrad")
    limit: float = Field(description="the highest value that still passes, a finite number")


class _Threshold(_Part):
    below: Certain | None = Field(None, description="{confidence: 0.5} or {max_risk: 0.1}")
    above: Raw | None = Field(None, description="{score: hybridgrad, limit: 3.5e-4}")
    name: str | None = Field(None, pattern="^[a-z][a-z0-9_]*$", description="lower-case letters, digits, underscores")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [key for key in ("below", "above") if getattr(self, key) is not None]
        if len(given) != 1:
            raise _choice(given, "threshold", "below: {confidence: … or max_risk: …} or above: {score: …, limit: …}")
        return self

    def settings(self, confidence: float | None, max_risk: float | None) -> dict[str, Any]:
        """The arguments of the policy object; both numbers replace the document's own where it has them."""
        own = self.model_dump(exclude={"below", "above"}, exclude_none=True)
        if self.above is not None:
            return {**own, "score": self.above.score, "limit": self.above.limit}
        assert self.below is not None  # _one_kind saw to it
        if self.below.max_risk is not None:
            return {**own, "max_risk": self.below.max_risk if max_risk is None else max_risk}
        return {**own, "confidence": self.below.confidence if confidence is None else confidence}


class Abstain(_Threshold):
    pass


class Retry(_Threshold):
    times: int | None = Field(None, ge=1, description=_TIMES)
    temperature: float | None = Field(None, gt=0, description="a number above 0; a greedy redraw repeats the draft")
    top_p: float | None = Field(None, gt=0, le=1, description="a number in (0, 1]")
    seed: int | None = Field(None, ge=0, description="a whole number, 0 or more")
    keep: Literal["best", "last"] | None = Field(None, description="best or last")


class Retrieve(_Threshold):
    k: int | None = Field(None, ge=1, description="how many passages at most, 1 or more")
    times: int | None = Field(None, ge=1, description=_TIMES)
    timeout: float | None = Field(None, gt=0, description="seconds, above 0")
    tries: int | None = Field(None, ge=1, description="calls in all when the retriever fails, 1 or more")
    corpus: str | None = Field(None, description="which documents are searched, for example handbook-2026-11")
    template: str | None = Field(None, description="a prompt with {passages} and {question}")


class Escalate(_Threshold):
    times: int | None = Field(None, ge=1, description=_TIMES)
    timeout: float | None = Field(None, gt=0, description="seconds, above 0")


class Backoff(_Part):
    alpha: float = Field(gt=0, lt=1, description="a share of responses in (0, 1)")
    at_most: int = Field(0, ge=0, description="wrong sentences that a response may keep, 0 or more")
    guarantee: Literal["certified", "average"] = Field("certified", description="certified or average")


class Redact(_Part):
    above: Raw | None = Field(None, description="{score: mean_nll, limit: 1.2}")
    backoff: Backoff | None = Field(None, description="{alpha: 0.2, at_most: 1}")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [key for key in ("above", "backoff") if getattr(self, key) is not None]
        if len(given) != 1:
            raise _choice(given, "threshold", "above: {score: …, limit: …} or backoff: {alpha: …, at_most: …}")
        return self

    def settings(self) -> dict[str, Any]:
        """The arguments of the policy object."""
        own = self.model_dump(exclude={"above", "backoff"}, exclude_none=True)
        return {**own, **(self.above or self.backoff or self).model_dump()}


class Mark(Redact):
    marker: str | None = Field(None, min_length=1, description="what stands behind a doubtful sentence")


class Rule(_Part):
    abstain: Abstain | None = Field(None, description="{below: {confidence: 0.5}}")
    accept: Literal["all"] | None = Field(None, description="accept: all")
    both: list[Rule] | None = Field(None, min_length=2, max_length=2, description="two rules that both have to object")
    escalate: Escalate | None = Field(None, description="{below: {confidence: 0.5}}")
    mark: Mark | None = Field(None, description="{above: {score: mean_nll, limit: 1.2}}")
    redact: Redact | None = Field(None, description="{above: {score: mean_nll, limit: 1.2}}")
    retrieve: Retrieve | None = Field(None, description="{below: {confidence: 0.5}, k: 3}")
    retry: Retry | None = Field(None, description="{below: {confidence: 0.5}, times: 2}")

    @model_validator(mode="after")
    def _one_action(self) -> Self:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise _choice(given, "action", ", ".join(type(self).model_fields))
        return self


class Budget(_Part):
    attempts: int | None = Field(None, ge=1, description="answers in all, 1 or more")
    seconds: float | None = Field(None, gt=0, description="a number above 0")


class Document(_Part):
    id: str = Field(min_length=1, description="a short name for the audit log")
    version: int = Field(ge=1, description="a whole number, 1 or more; raise it with every change")
    rules: list[Rule] = Field(min_length=1, description="a list of at least one rule, for example - accept: all")
    on_unscorable: Literal["abstain", "accept", "escalate"] = Field("abstain", description=_UNSCORED)
    on_error: Literal["abstain", "accept", "escalate"] = Field("abstain", description=_UNSCORED)
    budget: Budget | None = Field(None, description="{attempts: 6, seconds: 120}")
    provisional: bool = Field(False, description="true, if a stream may show text before it is decided on")


def checked(source: Source) -> Document:
    """The document in ``source``.

    Raises:
        PolicyError: about the first thing in it that cannot be.
    """
    try:
        return Document.model_validate(source.data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise source.refusal(first["loc"], *_in_words(first))


def _choice(given: Sequence[str], noun: str, known: str) -> PydanticCustomError:
    have = f"{len(given)} {noun}s where there has to be one" + (f": {', '.join(given)}" if given else "")
    return PydanticCustomError("choice", "{have}", {"have": have, "hint": f"give exactly one of {known}"})


def _in_words(error: ErrorDetails) -> tuple[str, str]:
    """Message and hint for one finding of pydantic."""
    match error["type"]:
        case "choice":
            return error["msg"], error["ctx"]["hint"]
        case "extra_forbidden":
            return "unknown key", f"known here: {', '.join(sorted(_siblings(error['loc'])))}"
        case "missing":
            return "is missing", _wanted(error["loc"])
        case "model_type":
            return f"is {reprlib.repr(error['input'])}, not a mapping", _wanted(error["loc"])
        case _:
            should = error["msg"].removeprefix("Input ").removeprefix("List ").partition(" after validation")[0]
            return f"is {reprlib.repr(error['input'])}; {should}", _wanted(error["loc"])


def _wanted(path: Sequence[int | str]) -> str:
    """What the description of the last key on the way to a value says that it should be."""
    keys = [place for place, step in enumerate(path) if isinstance(step, str)]
    field = _siblings(path[: keys[-1] + 1]).get(str(path[keys[-1]])) if keys else None
    if field is None or not field.description:
        return "a document is a mapping with id, version and rules, as in the ready packs"
    return f"give {field.description}"


def _siblings(path: Sequence[int | str]) -> Mapping[str, FieldInfo]:
    """The keys that are known where the last key of a path stands."""
    model: type[BaseModel] = Document
    for step in path[:-1]:
        if isinstance(step, str):
            model = next(_models(model.model_fields[step].annotation), model)
    return model.model_fields


def _models(annotation: Any) -> Any:
    """The models inside a type such as ``list[Rule] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
