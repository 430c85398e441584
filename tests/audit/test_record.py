"""A record is plain data, frozen, and comes back from JSON as it went in."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import hallucination_guard
from hallucination_guard.audit import AuditRecord
from hallucination_guard.audit.chain import canonical
from hallucination_guard.errors import AuditError

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


def a_record(**changes: Any) -> AuditRecord:
    fields: dict[str, Any] = {
        "request_id": "request",
        "model": {"name": "m", "fingerprint": "f", "dtype": "float32", "template": "none"},
        "scorer": {"name": "hybridgrad", "version": "1", "settings": {"top_k": "20"}},
        "status": "scored",
        "scores": {"hybridgrad": 0.25},
        "policy": {"id": "abstain_below", "version": "1", "hash": "h"},
        "decision": "accept",
        "rule": "accept",
        "reason": "0.75 is not below 0.5",
        "prompt": [{"role": "user", "content": "Where is Paris?"}],
        "answer": "In France.",
    }
    return AuditRecord(**(fields | changes))


@given(prompt=PLAIN, answer=ANY_TEXT, settings=st.dictionaries(ANY_TEXT, PLAIN, max_size=3), score=st.floats(-1e9, 1e9))
@example(prompt="\ud83d", answer="\ud83d\ude00", settings={"\ud83d\ude00": "\u2028"}, score=-0.0)
def test_a_record_comes_back_from_json_as_it_went_in(prompt: Any, answer: str, settings: Any, score: float) -> None:
    record = a_record(prompt=prompt, answer=answer, scorer={"settings": settings}, scores={"s": score})
    assert AuditRecord.from_json_dict(json.loads(canonical(record.to_json_dict()))) == record


def test_the_fields_stand_in_the_order_of_the_schema() -> None:
    assert " ".join(a_record().to_json_dict()) == (
        "schema id time request_id thread_id attempt model scorer status detail scores anchor prefix confidence "
        "certificate policy decision rule reason judged tokens seconds retrieved prompt answer versions seq prev hash"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("field", "wrap"),
    [
        ("scores", lambda x: {"semgrad": x}),
        ("seconds", lambda x: {"generate": x}),
        ("confidence", lambda x: x),
        ("scorer", lambda x: {"settings": {"deep": [x]}}),
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_field(field: str, wrap: Any, bad: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}.* not a finite number"):
        a_record(**{field: wrap(bad)})


@pytest.mark.parametrize(
    "odd", [{"answer": b"bytes"}, {"scorer": {1: "key"}}, {"model": "name"}, {"versions": {"v": {1}}}]
)
def test_what_json_can_not_hold_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(odd))):
        a_record(**odd)


@pytest.mark.parametrize("name", ["id", "time", "request_id"])
def test_what_names_it_is_a_text(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*, not a text"):
        a_record(**{name: {"index": -1}})


@pytest.mark.parametrize("odd", [{"status": "fine"}, {"decision": "allow"}, {"schema": 2}])
def test_a_word_outside_a_closed_set_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(odd))):
        a_record(**odd)


@pytest.mark.parametrize("schema", [0, 2, None, "1"])
def test_another_schema_is_an_audit_error_with_a_hint(schema: Any) -> None:
    with pytest.raises(AuditError, match="schema") as caught:
        AuditRecord.from_json_dict(a_record().to_json_dict() | {"schema": schema})
    assert "version" in caught.value.hint


def test_a_missing_and_an_unknown_field_are_both_named() -> None:
    data = a_record().to_json_dict() | {"surprise": 1}
    del data["rule"]
    with pytest.raises(AuditError, match="rule, surprise"):
        AuditRecord.from_json_dict(data)


def test_a_value_that_can_not_be_is_an_audit_error_when_read() -> None:
    with pytest.raises(AuditError, match="decision"):
        AuditRecord.from_json_dict(a_record().to_json_dict() | {"decision": "allow"})


def test_a_record_is_frozen_all_the_way_down() -> None:
    settings = {"settings": {"top_k": "20"}}
    record = a_record(scorer=settings)
    settings["settings"]["top_k"] = "changed"
    assert record.scorer == {"settings": {"top_k": "20"}}
    with pytest.raises(TypeError):
        record.scorer["settings"]["top_k"] = "changed"  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        record.decision = "abstain"  # type: ignore[misc]


def test_the_plain_dict_is_the_callers_to_change() -> None:
    record = a_record()
    record.to_json_dict()["scorer"]["settings"]["top_k"] = "changed"
    assert record == a_record(id=record.id, time=record.time)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_record_can_be_copied_and_sent_to_another_process(copied: Any) -> None:
    record = a_record()
    assert copied(record) == record


def test_the_id_is_new_each_time_and_the_time_is_utc_with_microseconds() -> None:
    one, two = a_record(), a_record()
    assert one.id != two.id
    time = datetime.fromisoformat(one.time)
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert len(one.time) == len("2026-01-01T00:00:00.000000+00:00")


def test_the_judged_draft_is_this_attempts_unless_said_otherwise() -> None:
    assert a_record(attempt=3).judged == 3
    assert a_record(attempt=3, judged=1).judged == 1


def test_a_record_can_be_built_without_loading_structlog_or_torch() -> None:
    script = (
        "import sys; from hallucination_guard.audit import AuditRecord, verify, records\n"
        "print(sorted({'structlog', 'filelock', 'torch', 'sqlite3'} & sys.modules.keys()))"
    )
    root = str(Path(hallucination_guard.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", {"generate": "long"}),
        ("seconds", {"generate": None}),
        ("scores", {"semgrad": "0.1"}),
        ("scores", {"semgrad": True}),
        ("scores", {"semgrad": 10**400}),
        ("judged", "1"),
        ("judged", 99),
        ("attempt", 0),
        ("attempt", 1.0),
    ],
    ids=repr,
)
def test_a_number_that_is_none_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(AuditError, match=field):
        AuditRecord.from_json_dict({**a_record().to_json_dict(), field: value})
