"""Whether the answers in a log were right: labels in a file of their own beside it, for the log must not be edited.

``audit.jsonl`` has its labels in ``audit.labels.jsonl``: one JSON object a line with the ``id`` of a record, the
``label`` of its answer (``right`` or ``wrong``), who gave it (``by``), a ``note`` and the ``time``. Lines are only ever
added; a judge's later label of the same record replaces the earlier one when they are read. The file is not sealed.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hallucination_guard.audit.chain import StrPath
from hallucination_guard.audit.lines import append_lines, written_alone
from hallucination_guard.audit.query import find, records
from hallucination_guard.audit.record import AuditRecord
from hallucination_guard.audit.request import Request, requests
from hallucination_guard.calibration.labelled import Beginning, Labelled
from hallucination_guard.errors import AuditError, InputError
from hallucination_guard.values import Conditions, ModelIdentity, ScorerIdentity, from_json

__all__ = [
    "Label",
    "by_record",
    "label",
    "label_all",
    "label_history",
    "labelled_answers",
    "labels_of",
    "labels_path",
    "read_labels",
]

_WORDS = {"right": True, "wrong": False}
_KEYS = ("by", "id", "label", "note", "time")
_FURTHER = frozenset({"retrieve_failed", "max_attempts", "budget"})
"""Rules by which the log says that another attempt was wanted and not had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a judge says of the answer of one record.

    Args:
        id: of the record.
        correct: the label.
        by: the judge; labels of different judges are never mixed.
        note: in words.
        time: UTC, ISO 8601.

    Raises:
        InputError: if a field is not what it should be.
    """

    id: str
    correct: bool
    by: str = "human"
    note: str = ""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))

    def __post_init__(self) -> None:
        for name in ("id", "by", "note", "time"):
            value = getattr(self, name)
            if not isinstance(value, str) or not (value or name == "note"):
                raise InputError(f"{name} of a label is {value!r}", hint="give a text")
        if not isinstance(self.correct, bool):
            raise InputError(f"the label of {self.id!r} is {self.correct!r}", hint="give True or False")

    def to_json_dict(self) -> dict[str, str]:
        """Plain data, as a line of the file holds it."""
        word = "right" if self.correct else "wrong"
        return {"by": self.by, "id": self.id, "label": word, "note": self.note, "time": self.time}


def labels_path(log: StrPath) -> Path:
    """Where the labels of a log are: beside it."""
    path = Path(
        os.path.realpath(log)
    )  # resolved, as the log does: who comes by different names has to meet at one file
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.labels.jsonl")


def label(log: StrPath, id: str, correct: bool, *, by: str = "human", note: str = "") -> Label:
    """Label the answer of one record.

    Args:
        log: the path of the audit log.
        id: of the record, or a beginning that no other id has.
        correct: whether its answer is right.
        by: the judge.
        note: in words.

    Returns:
        The label; it is in the file.

    Raises:
        AuditError: no record or several fit, or a file cannot be read or written.
        InputError: the record has no answer.
    """
    given = Label(id=id, correct=correct, by=by, note=note)
    found = replace(given, id=_answered(find(log, id)).id)
    _append(log, [found])
    return found


def label_all(log: StrPath, labels: Iterable[Label]) -> list[Label]:
    """Label the answers of several records: all of them or, if one cannot be labelled, none.

    Args:
        log: the path of the audit log; it is read once.
        labels: whose ``id`` may be a beginning that no other id has.

    Raises:
        AuditError: of an id, no record or several fit, or a file cannot be read or written.
        InputError: a record has no answer, or there are no labels.
    """
    given = list(labels)
    if not given:
        raise InputError("there are no labels", hint="give at least one")
    names = _whole_ids(log, {each.id for each in given})
    found = [replace(each, id=names[each.id]) for each in given]
    _append(log, found)
    return found


def read_labels(path: StrPath, *, by: str = "human", note: str = "") -> list[Label]:
    """Labels out of a file that somebody made: JSON lines or, if it is called ``.csv``, CSV with a header.

    Args:
        path: rows have ``id`` and ``label`` (``right`` or ``wrong``; in JSON also true or false) and may have ``by``
            and ``note``.
        by: the judge of rows that name none.
        note: of rows that have none.

    Raises:
        InputError: naming file and line of the first row that cannot be.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as error:
        raise InputError(f"the labels {path} cannot be read: {error.strerror}", hint="check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"the labels {path} are not text", hint="save them in UTF-8") from None
    found = []
    for number, row in _csv_rows(text) if Path(path).suffix.lower() == ".csv" else _json_rows(text):
        where = f"line {number} of {path}"
        given = {"by": by, "note": note, **{key: value for key, value in row.items() if value not in (None, "")}}
        if odd := sorted(map(str, given.keys() - {"by", "id", "label", "note"})):
            raise InputError(f"{where} has {', '.join(odd)}", hint="known are id, label, by and note")
        try:
            found.append(
                Label(id=given.get("id", ""), correct=_word(given.get("label")), by=given["by"], note=given["note"])
            )
        except InputError as error:
            raise InputError(f"{where}: {error.message}", hint=error.hint) from None
    if not found:
        raise InputError(f"the labels {path} hold no rows", hint="give rows with id and label")
    return found


def labels_of(log: StrPath, judge: str | None = None) -> list[Label]:
    """The labels of a log that hold: of each record and judge the last one, in the order of their first lines.

    Args:
        log: the path of the audit log.
        judge: whose; None for all.

    Raises:
        AuditError: the file cannot be read, or a line of it is no label.
    """
    found: dict[tuple[str, str], Label] = {}
    for each in _every(labels_path(log)) or ():
        if judge in (None, each.by):
            found[each.id, each.by] = each
    return list(found.values())


def label_history(log: StrPath) -> list[Label]:
    """Every label of a log that was ever given, in the order in which they came, also those that were replaced.

    A last line without its end is not counted: somebody may just be writing it.

    Args:
        log: the path of the audit log.

    Raises:
        AuditError: the file is missing or cannot be read, or a line of it is no label.
    """
    path = labels_path(log)
    given = _every(path, finished=True)
    if given is None:
        raise AuditError(f"the labels {path} are missing", hint="put them back; audit sample begins the file")
    return given


def _every(path: Path, *, finished: bool = False) -> list[Label] | None:
    """The labels in a file, or only those of finished lines; None if there is no file."""
    try:
        with path.open("rb") as file:
            return [
                _parsed(line, f"line {number} of {path}")
                for number, line in enumerate(file, start=1)
                if line.endswith(b"\n") or not finished
            ]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AuditError(f"the labels {path} cannot be read: {error.strerror}", hint="check the path") from error


def by_record(labels: Iterable[Label], judge: str | None = None) -> dict[str, bool]:
    """One judge's labels by the record's id, as :func:`~hallucination_guard.audit.replay.replay` takes them.

    Args:
        labels: those that hold, as :func:`labels_of` gives them.
        judge: whose; may be left out if there is only one.

    Raises:
        InputError: several judges and none named, or one who gave no labels.
    """
    given = list(labels)
    judges = sorted({each.by for each in given})
    if judge is None and len(judges) > 1:
        raise InputError(f"several judges gave labels: {', '.join(judges)}", hint="name one of them as judge")
    if judge is not None and judge not in judges:
        raise InputError(
            f"the judge {judge!r} gave no labels", hint=f"labels are by {', '.join(judges) or 'nobody so far'}"
        )
    return {each.id: each.correct for each in given if judge in (None, each.by)}


def labelled_answers(log: StrPath, judge: str | None = None, *, leave_out_partial: bool = False) -> list[Labelled]:
    """The labelled drafts of a log, one row a record, to fit and evaluate on.

    A row's ``id`` is the request's; its ``policy`` is the hash of the policy, if the log shows that this policy makes
    further attempts, and None for single drafts. Answers of an escalation target are not the model's and give no row.

    A request with several attempts counts only as a whole: which of its drafts a person got to see and label depends
    on their scores, and such a choice must not look like a sample. If only some are labelled, that is an error, unless
    such requests are to be left out (then what remains are the requests that were easy to decide: mind the bias).

    Args:
        log: the path of the audit log; a log that keeps no text will do.
        judge: whose labels; may be left out if there is only one.
        leave_out_partial: pass over requests of which only some attempts are labelled.

    Raises:
        InputError: no labels, several judges and none named, or a request that is labelled in part.
        AuditError: a file cannot be read.
    """
    given = labels_of(log)
    labels = by_record(given, judge)
    if not labels:
        raise InputError(f"no record of {log} is labelled", hint="hallucination-guard audit label ID right|wrong")
    name = judge or given[0].by
    rows: list[tuple[str, Labelled]] = []
    further: set[str] = set()
    for request in requests(records(log, strict=False)):
        drafts = request.attempts or (request.last,)
        policy = str(request.last.policy.get("hash") or "")
        if len(drafts) > 1 or request.last.decision in ("retry", "retrieve") or request.last.rule in _FURTHER:
            further.add(policy)
        without = [each.id for each in drafts if each.id not in labels]
        if len(without) == len(drafts):
            continue
        if without or not request.attempts or drafts[-1] is not request.last or request.decided is None:
            if not leave_out_partial:
                raise _partial(request, without)
            continue
        rows += [(policy, _labelled(each, labels[each.id], name, request.beginnings(each))) for each in drafts]
    if not rows:
        raise InputError(f"no draft of {log} is labelled that can be used", hint="label every attempt of some requests")
    return [replace(row, policy=policy) if policy in further else row for policy, row in rows]


def _partial(request: Request, without: Sequence[str]) -> InputError:
    if not without:
        return InputError(
            f"the request {request.id} is labelled and the log does not have all of its attempts",
            hint="leave_out_partial=True passes over such requests",
        )
    return InputError(
        f"of the request {request.id} only some attempts are labelled; without a label: {', '.join(without)}",
        hint="label them too, or pass over such requests with leave_out_partial=True",
    )


def _labelled(record: AuditRecord, correct: bool, judge: str, parts: Sequence[AuditRecord]) -> Labelled:
    """A row of a record. A streamed answer has its beginnings only where it was let through to its end."""
    plain = record.to_json_dict()
    streamed = record.gate == "stream" and record.decision == "accept" and record.status == "scored"
    try:
        return Labelled(
            id=record.request_id,
            attempt=record.attempt,
            correct=correct,
            judge=judge,
            scores=plain["scores"],
            reason=record.detail,
            length=_scored(record),
            model=ModelIdentity(**plain["model"]),
            scorer=ScorerIdentity(**plain["scorer"]),
            conditions=Conditions.from_json_dict(plain.get("conditions")),
            beginnings=tuple(Beginning(length=_scored(each), scores=dict(each.scores)) for each in parts)
            if streamed
            else (),
            seconds=plain["seconds"],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise AuditError(
            f"the record {record.id} cannot be used as a labelled answer: {error}", hint="verify the log"
        ) from None


def _scored(record: AuditRecord) -> int:
    """How many tokens were scored: without a reasoning model's thinking."""
    return record.tokens.get("scored", record.tokens["out"])


def _answered(record: AuditRecord) -> AuditRecord:
    if record.part is not None:
        raise InputError(
            f"the record {record.id} is of a part of an answer", hint="label the record of the whole answer"
        )
    if record.answer is None:
        raise InputError(f"the record {record.id} has no answer to label", hint="label one that has")
    return record


def _whole_ids(log: StrPath, wanted: set[str]) -> dict[str, str]:
    """For each beginning of an id the id that it means, by the rules of :func:`~.query.find`, in one pass."""
    lengths = sorted({len(each) for each in wanted})
    fitting: dict[str, list[AuditRecord]] = {each: [] for each in wanted}
    for record in records(log, strict=False):
        for length in lengths:
            some = fitting.get(record.id[:length])
            if some is not None and (len(some) < 2 or record.id in wanted):
                some.append(record)
    found = {}
    for name, some in fitting.items():
        whole = [each for each in some if each.id == name]
        if len(one := whole or some) != 1:
            find(log, name)  # says what is wrong, in the same words as for one
            raise AuditError(f"the log {log} changed while it was read", hint="try again")
        found[name] = _answered(one[0]).id
    return found


def _append(log: StrPath, labels: Sequence[Label]) -> None:
    path = labels_path(log)
    with written_alone(path, "labels"):
        append_lines(path, (each.to_json_dict() for each in labels), "labels")


def _parsed(line: bytes, where: str) -> Label:
    try:
        row = from_json(line)
        if set(row) != set(_KEYS):
            raise InputError(f"it has not just {', '.join(_KEYS)}")
        return Label(id=row["id"], correct=_word(row["label"]), by=row["by"], note=row["note"], time=row["time"])
    except InputError as error:
        why = error.message
    except (ValueError, TypeError, RecursionError):
        why = "it is torn, or no JSON object"
    raise AuditError(f"{where} is no label: {why}", hint="delete that line and label the record again")


def _word(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.strip() not in _WORDS:
        raise InputError(f"the label is {value!r}", hint="give right or wrong")
    return _WORDS[value.strip()]


def _json_rows(text: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"line {number} is no JSON object", hint="one object a line, with id and label")
        yield number, row


def _csv_rows(text: str) -> Iterable[tuple[int, Mapping[Any, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(
            f"line {reader.line_num} is no CSV: {error}", hint="one row a record, with id and label"
        ) from None
