"""All that is needed to take the same decision again, as one JSON object.

The fields and their meaning are a stable schema: a field is never renamed or given another meaning; what changes them
raises :data:`SCHEMA`. A field that is added has a default that says "not recorded", so that older records can be read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from sys import float_info
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable
from uuid import uuid4

from hallucination_guard.audit.chain import canonical
from hallucination_guard.errors import AuditError
from hallucination_guard.values import JSON, Action, FrozenDict, Prefix, Status

__all__ = ["SCHEMA", "AuditRecord", "Sink", "record_id"]

SCHEMA = 1
"""The version of the fields of :class:`AuditRecord`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One attempt: who measured what, what it meant, what was decided and why.

    Plain data all the way down and frozen all the way down: mappings become read-only, lists become tuples.

    Args:
        schema: version of these fields.
        id: under which the record can be found again, see :func:`record_id`; unique but for what was done twice.
        time: UTC, ISO 8601 with microseconds.
        request_id: of the call that this attempt belongs to.
        thread_id: of the conversation, if there is one.
        principal: on whose behalf the call was made, if that was said.
        tags: the application's own marks, texts by name.
        attempt: 1 for the first draft.
        model: ``name``, ``fingerprint``, ``dtype``, ``template``.
        scorer: ``name``, ``version``, ``settings``.
        status: ``scored``, ``unscorable`` or ``error``.
        detail: why there is no score; empty when there is one. Never text of the prompt or the answer.
        scores: by name; higher = less certain.
        anchor: t*: ``index`` (negative, from the end of the prompt), ``token``, ``rule``; None without a gradient.
        prefix: where the gradient read what comes before t*: ``kept`` from generating, ``reread`` in another pass, or
            ``whole``: with a graph over all of it. None without a gradient, and in logs that are older than this field.
        conditions: how the answer was drawn and how it ended, see :class:`~hallucination_guard.values.Conditions`; None
            of an answer that nobody scored, and in logs that are older than this field.
        uncovered: what of the answer the calibration does not cover; empty if nothing.
        confidence: calibrated P(correct) in [0, 1]; None when uncalibrated or unscored.
        certificate: id of the certificate that holds, if one does.
        policy: ``id``, ``version``, ``hash``.
        decision: the verb.
        rule: the rule that fired.
        reason: the same in words. Never text of the prompt or the answer.
        judged: the attempt whose draft the decision is about; 0, the default, stands for ``attempt``.
        tokens: ``in`` and ``out``, of this attempt; ``scored`` where thinking was left out of the scores.
        seconds: ``generate`` and ``score``, wall time of this attempt.
        retrieved: ids of the documents that were put into the prompt.
        sentences: where they were measured: ``scored`` (of each ``start``, ``stop`` in tokens, ``begin``, ``end`` in
            characters of the answer without thinking, and ``scores``), ``backoffs`` (the thresholds that hold for
            them), ``uncovered`` (why none does). None where they were not. Never their text.
        edit: which sentences of the judged draft are doubtful and how they are delivered: ``manner``, ``doubtful``
            (numbers from 0), ``sentences`` (how many there are), ``marker``. None where the answer leaves as it is.
        prompt: list of role/content, or text; in a log that keeps no text, what stands for it.
        answer: text; None when there is none; in a log that keeps no text, what stands for it.
        gate: ``stream`` of an attempt that was judged sentence by sentence; None of one that was judged as a whole.
        part: of a stream: ``start`` and ``stop``, the tokens of the answer that this record lets go, and ``answer`` is
            their text; its other numbers are of the answer up to there. None of a record of a whole attempt.
        generator: where a server drew the answer: ``url``, ``kind``, ``version``, ``model``, ``dtype``, ``tolerance``,
            ``compared``, ``beyond``, see :class:`~hallucination_guard.values.Generator`; ``model`` then only read it.
            None where the model drew it, or nobody said what did.
        versions: of the libraries that took part, by name.
        seq: position in the chain, from 0. This and the next two are the log's to fill in.
        prev: hash of the record before.
        hash: over all the fields but itself.

    Raises:
        ValueError: on a number that is not finite, or on what JSON cannot hold; the message names the field.
    """

    schema: int = SCHEMA
    id: str = field(default_factory=lambda: uuid4().hex)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    request_id: str
    thread_id: str | None = None
    principal: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1
    model: Mapping[str, JSON]
    scorer: Mapping[str, JSON]
    status: Status
    detail: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    anchor: Mapping[str, JSON] | None = None
    prefix: Prefix | None = None
    conditions: Mapping[str, JSON] | None = None
    uncovered: str = ""
    confidence: float | None = None
    certificate: str | None = None
    policy: Mapping[str, JSON]
    decision: Action
    rule: str
    reason: str
    judged: int = 0
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    retrieved: tuple[str, ...] = ()
    prompt: JSON
    answer: str | Mapping[str, JSON] | None = None
    sentences: Mapping[str, JSON] | None = None
    edit: Mapping[str, JSON] | None = None
    gate: Literal["stream"] | None = None
    part: Mapping[str, int] | None = None
    generator: Mapping[str, JSON] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seq: int | None = None
    prev: str | None = None
    hash: str | None = None

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema!r}, not {SCHEMA}")
        for name in ("id", "time", "request_id"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {_shown(getattr(self, name))}, not a text")
        if self.status not in get_args(Status):
            raise ValueError(f"status is {self.status!r}, not one of {', '.join(get_args(Status))}")
        if self.decision not in get_args(Action):
            raise ValueError(f"decision is {self.decision!r}, not one of {', '.join(get_args(Action))}")
        if self.prefix not in (None, *get_args(Prefix)):
            raise ValueError(f"prefix is {self.prefix!r}, not one of {', '.join(get_args(Prefix))}")
        for name in ("model", "scorer", "scores", "policy", "tags", "tokens", "seconds", "versions"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a mapping")
        for name in ("scores", "seconds"):
            if odd := [value for value in getattr(self, name).values() if not _is_number(value)]:
                raise ValueError(f"{name} has {_shown(odd[0])}, not a number")
        for name, least in (("attempt", 1), ("judged", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {_shown(value)}, not a whole number from {least} up")
        if self.gate not in (None, "stream"):
            raise ValueError(f"gate is {_shown(self.gate)}, not 'stream'")
        if self.part is not None and not _is_part(self.part):
            raise ValueError(f"part is {_shown(self.part)}, not a start and a stop")
        if self.judged > self.attempt:
            raise ValueError(f"judged is {self.judged}, a later attempt than the record's own, {self.attempt}")
        for name in _NAMES:
            object.__setattr__(self, name, _frozen(getattr(self, name), name))
        object.__setattr__(self, "judged", self.judged or self.attempt)

    @property
    def deed(self) -> tuple[str, str, int]:
        """What it records: two records with the same deed are of something that was done twice, and count once."""
        return self.id, self.request_id, self.attempt

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], AuditRecord], tuple[dict[str, Any]]]:
        # A read-only mapping cannot be pickled or copied deeply, and a record may well travel to another process.
        return type(self).from_json_dict, (self.to_json_dict(),)

    def to_json_dict(self) -> dict[str, Any]:
        """All the fields in their order, as plain dicts, lists, strings and numbers; the caller's to change.

        Fields added later are left out where nothing was said, so that such a record is what it always was.
        """
        plain = {name: _thawed(getattr(self, name)) for name in _NAMES}
        return {name: value for name, value in plain.items() if value or name not in _IF_SAID}

    @classmethod
    def from_json_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record that :meth:`to_json_dict` gave.

        Raises:
            AuditError: another schema, a missing or unknown field, or a value that cannot be.
        """
        if (schema := data.get("schema")) != SCHEMA:
            raise AuditError(
                f"an audit record has the schema {schema!r}, this version reads {SCHEMA}",
                hint="read it with the version of hallucination-guard-semgrad that wrote it, or a newer one",
            )
        if odd := sorted((set(_NAMES) ^ data.keys()) - (_LATER - data.keys())):
            raise AuditError(f"an audit record of schema {SCHEMA} has missing or unknown fields: {', '.join(odd)}")
        try:
            return cls(**data)
        except ValueError as error:
            raise AuditError(f"not an audit record: {error}") from error


@runtime_checkable
class Sink(Protocol):
    """Where audit records go. Returns the id under which the record can be found; raises if it was not kept."""

    def __call__(self, record: AuditRecord) -> str:
        """Keep one record."""
        ...


def record_id(request_id: str, attempt: int, what: str = "draft") -> str:
    """The id of the record of one thing that was done in a call: who does it again, elsewhere, gives it the same one.

    Args:
        request_id: of the call.
        attempt: of it.
        what: was done, where it is not the decision on the attempt's draft.
    """
    return hashlib.sha256(canonical([request_id, attempt, what]).encode("ascii")).hexdigest()[:32]


_IF_SAID = frozenset({"principal", "tags", "conditions", "uncovered", "sentences", "edit", "gate", "part", "generator"})
_LATER = frozenset({"prefix", *_IF_SAID})  # added to the schema since: older records lack them
_NAMES = tuple(each.name for each in fields(AuditRecord))


def _is_part(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"start", "stop"}:
        return False
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in value.values())
    return whole and 0 <= value["start"] <= value["stop"]


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return True  # whether it is finite, _frozen sees
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= float_info.max


def _shown(value: object) -> str:
    return repr(value)[:40]


def _frozen(value: object, where: str) -> Any:
    match value:
        case None | bool() | int():
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{where} is {value!r}, not a finite number")
            return value
        case str():
            # Two halves of a surrogate pair that arrive as two characters come back from JSON as the one they spell;
            # spelling it here makes every record equal to itself read back.
            return (
                value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            )
        case Mapping():
            if odd := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{where} has the key {odd[0]!r}, not a string")
            return FrozenDict({_frozen(key, where): _frozen(each, f"{where}.{key}") for key, each in value.items()})
        case list() | tuple():
            return tuple(_frozen(each, f"{where}[{index}]") for index, each in enumerate(value))
        case _:
            raise ValueError(f"{where} is {value!r}, which is not plain data")


def _thawed(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(each) for key, each in value.items()}
    return [_thawed(each) for each in value] if isinstance(value, tuple) else value
