"""Labels beside a log: kept, read back, replaced, and joined with the records they are about."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Guard
from hallucination_guard.audit import (
    AuditLog,
    Label,
    label,
    label_all,
    labelled_answers,
    labels_of,
    labels_path,
    records,
    verify,
)
from hallucination_guard.audit.labels import by_record, read_labels
from hallucination_guard.calibration import read_labelled, write_labelled
from hallucination_guard.errors import AuditError, InputError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetryBelow

LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 1.0}
GOOD, BAD = 0.5, 2.0
RETRY = RetryBelow(**LIMIT, times=1) | AbstainBelow(**LIMIT)


def a_log(path: Path, *scores: Any, policy: Any = None, questions: int = 1, **settings: Any) -> Path:
    with AuditLog(path / "audit.jsonl", fsync=False, **settings) as log:
        guard = Guard(
            ScriptedModel([f"answer {at}" for at in range(len(scores))]),
            policy=policy or AbstainBelow(**LIMIT),
            scorer=ScriptedScorer(list(scores)),
            audit=log,
            batch_size=1,
        )
        for at in range(questions):
            guard(f"question {at}")
    return log.path


def ids(log: Path) -> list[str]:
    return [record.id for record in records(log)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return a_log(tmp_path, GOOD, BAD, GOOD, questions=3)


@pytest.mark.parametrize(
    ("name", "beside"),
    [("audit.jsonl", "audit.labels.jsonl"), ("audit", "audit.labels.jsonl"), ("a.log", "a.log.labels.jsonl")],
)
def test_labels_lie_beside_their_log(tmp_path: Path, name: str, beside: str) -> None:
    assert labels_path(tmp_path / name) == tmp_path.resolve() / beside


def test_a_label_is_read_back(log: Path) -> None:
    given = label(log, ids(log)[1], False, by="ann", note="the year is wrong")
    assert labels_of(log) == [given]
    assert (given.id, given.correct, given.by, given.note) == (ids(log)[1], False, "ann", "the year is wrong")


def test_the_log_is_left_as_it_was(log: Path) -> None:
    before = log.read_bytes()
    label(log, ids(log)[0], True)
    assert log.read_bytes() == before
    assert verify(log).ok


def test_a_log_without_labels_has_none(log: Path) -> None:
    assert labels_of(log) == []


def test_the_beginning_of_an_id_is_enough(log: Path) -> None:
    whole = ids(log)[2]
    assert label(log, whole[:12], True).id == whole
    assert [each.id for each in label_all(log, [Label(id=whole[:10], correct=True)])] == [whole]


def test_a_later_label_of_the_same_judge_replaces_the_earlier_one(log: Path) -> None:
    first = ids(log)[0]
    for correct, by in ((True, "ann"), (True, "bob"), (False, "ann")):
        label(log, first, correct, by=by)
    assert {(each.by, each.correct) for each in labels_of(log)} == {("ann", False), ("bob", True)}
    assert [each.correct for each in labels_of(log, "ann")] == [False]
    assert len(labels_path(log).read_bytes().splitlines()) == 3  # nothing is overwritten


@pytest.mark.parametrize(
    "give", [lambda log, id: label(log, id, True), lambda log, id: label_all(log, [Label(id=id, correct=True)])]
)
class TestRefused:
    def test_is_an_unknown_id(self, log: Path, give: Any) -> None:
        with pytest.raises(AuditError, match=r"no record .* 'zz'"):
            give(log, "zz")

    def test_is_a_beginning_that_several_have(self, tmp_path: Path, give: Any) -> None:
        log = a_log(tmp_path, *[GOOD] * 17, questions=17)  # of 17 hexadecimal ids two begin alike
        letters = [each[0] for each in ids(log)]
        shared = next(each for each in letters if letters.count(each) > 1)
        with pytest.raises(AuditError, match="several"):
            give(log, shared)

    def test_is_a_record_without_an_answer(self, tmp_path: Path, give: Any) -> None:
        record = next(records(a_log(tmp_path, GOOD)))
        with AuditLog(tmp_path / "other.jsonl", fsync=False) as other:
            other(type(record).from_json_dict({**record.to_json_dict(), "answer": None}))
        with pytest.raises(InputError, match="no answer"):
            give(other.path, record.id)
        assert labels_of(other.path) == []

    def test_is_a_log_that_is_not_there(self, tmp_path: Path, give: Any) -> None:
        with pytest.raises(AuditError, match="nothing"):
            give(tmp_path / "nothing.jsonl", "a")


def test_of_several_labels_all_are_kept_or_none(log: Path) -> None:
    with pytest.raises(AuditError):
        label_all(log, [Label(id=ids(log)[0], correct=True), Label(id="zz", correct=True)])
    assert labels_of(log) == []


def test_a_line_that_is_no_label_is_named(log: Path) -> None:
    label(log, ids(log)[0], True)
    with labels_path(log).open("a") as file:
        file.write('{"id": "x"')
    label(log, ids(log)[1], True)  # closes the torn line off
    with pytest.raises(AuditError, match="line 2 of"):
        labels_of(log)


def _give(log: Path, id: str, by: str) -> None:
    for _ in range(10):
        label(log, id, True, by=by)


def test_judges_in_several_processes_lose_no_label(log: Path) -> None:
    context = multiprocessing.get_context("spawn")
    first = ids(log)[0]
    judges = [context.Process(target=_give, args=(log, first, name)) for name in ("a", "b")]
    for each in judges:
        each.start()
    for each in judges:
        each.join()
    assert [each.exitcode for each in judges] == [0, 0]
    assert len(labels_path(log).read_bytes().splitlines()) == 20
    assert len(labels_of(log)) == 2


class TestAFileOfLabels:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("l.jsonl", '{"id": "a", "label": "right"}\n\n{"id": "b", "label": false, "by": "ann", "note": "no"}\n'),
            ("l.csv", "id,label,by,note\na,right,,\nb,wrong,ann,no\n"),
            ("l.csv", "\ufeffid,label,by,note\r\na, right,,\r\nb,wrong,ann,no\r\n"),
        ],
        ids=["json lines", "csv", "csv of a spreadsheet"],
    )
    def test_is_read(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        found = read_labels(tmp_path / name, by="me")
        assert [(each.id, each.correct, each.by, each.note) for each in found] == [
            ("a", True, "me", ""),
            ("b", False, "ann", "no"),
        ]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("l.jsonl", '{"id": "a", "label": "maybe"}\n', "line 1 .*'maybe'"),
            ("l.jsonl", '{"id": "a", "label": "right"}\n{"id": "b"}\n', "line 2 .*None"),
            ("l.jsonl", '{"label": "right"}\n', "line 1 .* id"),
            ("l.jsonl", '{"id": 5, "label": "right"}\n', "line 1 .* id .* 5"),
            ("l.jsonl", '{"id": "a", "label": 1}\n', "line 1 .* 1"),
            ("l.jsonl", '{"id": "a", "label": "right", "sure": 1}\n', "line 1 .* sure"),
            ("l.jsonl", "a right\n", "line 1 is no JSON object"),
            ("l.jsonl", "\n", "no rows"),
            ("l.csv", "id,label\na,yes\n", "line 2 .*'yes'"),
            ("l.csv", "id,label\na,right,more\n", "line 2 .* None"),
            ("l.csv", "", "no rows"),
            ("l.csv", b"\xff\xff", "not text"),
        ],
    )
    def test_that_can_not_be_is_refused_with_its_line(
        self, tmp_path: Path, name: str, text: str | bytes, message: str
    ) -> None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / name)

    def test_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nothing"):
            read_labels(tmp_path / "nothing.csv")


class TestLabelledAnswers:
    def test_are_the_labelled_records_with_what_was_measured(self, log: Path) -> None:
        first, second, _ = records(log)
        label(log, first.id, True)
        label(log, second.id, False)
        found = labelled_answers(log)
        assert [(each.id, each.attempt, each.correct, each.policy, each.judge) for each in found] == [
            (first.request_id, 1, True, None, "human"),
            (second.request_id, 1, False, None, "human"),
        ]
        assert [dict(each.scores) for each in found] == [{"hybridgrad": GOOD}, {"hybridgrad": BAD}]
        assert found[0].length == first.tokens["out"]
        assert (found[0].model.fingerprint, found[0].scorer.version) == ("scripted", "scripted")

    def test_travel_as_a_file(self, log: Path, tmp_path: Path) -> None:
        label_all(log, [Label(id=each, correct=True) for each in ids(log)])
        write_labelled(tmp_path / "answers.jsonl", labelled_answers(log))
        assert read_labelled(tmp_path / "answers.jsonl") == labelled_answers(log)

    @pytest.mark.parametrize("content", ["redacted", "hmac"])
    def test_come_of_a_log_that_keeps_no_text(self, tmp_path: Path, content: Any) -> None:
        log = a_log(tmp_path, GOOD, content=content, key=b"secret")
        label(log, ids(log)[0], True)
        assert len(labelled_answers(log)) == 1

    def test_keep_the_reason_of_what_could_not_be_scored(self, tmp_path: Path) -> None:
        log = a_log(tmp_path, "nothing there")
        label(log, ids(log)[0], False)
        [row] = labelled_answers(log)
        assert (row.status, row.reason) == ("unscorable", "nothing there")

    def test_of_several_attempts_form_a_sequence_that_names_its_policy(self, tmp_path: Path) -> None:
        log = a_log(tmp_path, BAD, GOOD, GOOD, policy=RETRY, questions=2)
        label_all(log, [Label(id=each, correct=True) for each in ids(log)])
        found = labelled_answers(log)
        assert [each.attempt for each in found] == [1, 2, 1]
        assert found[0].id == found[1].id != found[2].id
        assert {each.policy for each in found} == {next(records(log)).policy["hash"]}

    @pytest.mark.parametrize("labelled", [0, 1])
    def test_of_a_request_labelled_in_part_are_refused_or_left_out(self, tmp_path: Path, labelled: int) -> None:
        log = a_log(tmp_path, BAD, GOOD, GOOD, policy=RETRY, questions=2)
        label_all(log, [Label(id=ids(log)[at], correct=True) for at in (labelled, 2)])
        with pytest.raises(InputError, match=f"only some .*{ids(log)[1 - labelled]}"):
            labelled_answers(log)
        [row] = labelled_answers(log, leave_out_partial=True)
        assert row.id == list(records(log))[2].request_id

    def test_of_a_request_that_the_log_has_in_part_are_refused(self, tmp_path: Path) -> None:
        log = a_log(tmp_path, BAD, GOOD, policy=RETRY)
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
        label(log, ids(log)[0], True)
        with pytest.raises(InputError, match="does not have all"):
            labelled_answers(log)

    def test_are_drafts_of_the_model_and_not_of_whom_it_was_escalated_to(self, tmp_path: Path) -> None:
        policy = EscalateBelow(**LIMIT, to=lambda messages: "better") | Accept()
        log = a_log(tmp_path, BAD, policy=policy)
        draft, other = ids(log)
        label(log, other, True)
        with pytest.raises(InputError, match="no draft"):
            labelled_answers(log)
        label(log, draft, False)
        assert [each.correct for each in labelled_answers(log)] == [False]

    def test_never_mix_judges(self, log: Path) -> None:
        first = ids(log)[0]
        label(log, first, True, by="ann")
        assert [each.judge for each in labelled_answers(log)] == ["ann"]
        label(log, first, False, by="bob")
        with pytest.raises(InputError, match="ann, bob"):
            labelled_answers(log)
        assert [each.correct for each in labelled_answers(log, "bob")] == [False]
        with pytest.raises(InputError, match="'eve' gave no labels"):
            labelled_answers(log, "eve")

    def test_of_a_log_without_labels_are_refused(self, log: Path) -> None:
        with pytest.raises(InputError, match=r"no record .* is labelled"):
            labelled_answers(log)


@pytest.mark.parametrize("odd", [{"id": ""}, {"id": 5}, {"correct": "right"}, {"by": ""}, {"note": None}])
def test_what_is_no_label_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Label(**{"id": "a", "correct": True, **odd})


def test_labels_by_record_are_one_judges() -> None:
    both = [Label(id="a", correct=True, by="ann"), Label(id="b", correct=False, by="ann")]
    assert by_record(both) == by_record(both, "ann") == {"a": True, "b": False}


def test_a_label_is_a_line_of_json(log: Path) -> None:
    label(log, ids(log)[0], True)
    row = json.loads(labels_path(log).read_bytes())
    assert row.keys() == {"id", "label", "by", "note", "time"}
    assert row["label"] == "right"


def test_a_csv_field_without_end_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,label\n" + "a" * 200_000 + ",right\n", encoding="utf-8")
    with pytest.raises(InputError, match="no CSV"):
        read_labels(path)
