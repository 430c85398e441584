"""Which answers are to be labelled: chosen by a hash, each once, with its probability, and not by anybody."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Guard
from hallucination_guard.audit import (
    AuditLog,
    AuditRecord,
    draw_sample,
    label,
    labels_path,
    read_sample,
    records,
    sample_path,
    verify,
)
from hallucination_guard.audit.sample import answered, draw_value
from hallucination_guard.errors import AuditError, ConfigurationError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_policies import AbstainBelow, EscalateBelow, RetryBelow

LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 1.0}
GOOD, BAD = 0.5, 2.0


def write(path: Path, *scores: float, policy: Any = None, **settings: Any) -> Path:
    """One question a score, or two scores where the policy draws again."""
    with AuditLog(path, fsync=False, **settings) as log:
        guard = Guard(
            ScriptedModel([f"answer {at}" for at in range(len(scores))]),
            policy=policy or AbstainBelow(**LIMIT),
            scorer=ScriptedScorer(list(scores)),
            audit=log,
        )
        for at in range(len(scores) if policy is None else 1):
            guard(f"question {at}")
    return log.path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "audit.jsonl", *[GOOD] * 40)


@pytest.mark.parametrize("name", ["audit.jsonl", "audit", "a.labels.jsonl"])
def test_the_sample_lies_beside_its_log(tmp_path: Path, name: str) -> None:
    path = sample_path(tmp_path / name)
    assert path.parent == tmp_path.resolve() and path.name == f"{name.removesuffix('.jsonl')}.sample.jsonl"


def test_it_is_read_back_as_it_was_drawn(log: Path) -> None:
    drawn = draw_sample(log, rate=0.5, floor=0.25, seed="mine")
    assert read_sample(log) == drawn
    assert (drawn.seed, drawn.floor, drawn.answered) == ("mine", 0.25, 40)
    assert {each.probability for each in drawn.chosen} == {0.5}


def test_the_log_is_left_as_it_was(log: Path) -> None:
    before = log.read_bytes()
    draw_sample(log, rate=0.5)
    assert log.read_bytes() == before and verify(log).ok


def test_the_hash_of_the_id_decides(log: Path) -> None:
    drawn = draw_sample(log, rate=0.5, seed="mine")
    wanted = [each.id for each in records(log) if draw_value("mine", each.id) < 0.5]
    assert [each.id for each in drawn.chosen] == wanted


def test_the_hash_is_even() -> None:
    """Kolmogorov's distance to the uniform distribution, at the level of one in ten thousand."""
    values = sorted(draw_value("seed", f"{at:032x}") for at in range(4000))
    distance = max(max(abs(value - at / 4000), abs(value - (at + 1) / 4000)) for at, value in enumerate(values))
    assert distance < 2.23 / math.sqrt(4000)


def test_another_seed_chooses_others(log: Path, tmp_path: Path) -> None:
    ids = [each.id for each in records(log)]
    assert len({tuple(draw_value(seed, each) < 0.5 for each in ids) for seed in "abcd"}) == 4


def test_asking_twice_asks_for_the_same_ones(log: Path) -> None:
    first = draw_sample(log, rate=0.5)
    written = sample_path(log).read_bytes()
    assert draw_sample(log, rate=0.5) == first == draw_sample(log, rate=1.0)  # nothing is decided on a second time
    assert sample_path(log).read_bytes() == written


def test_a_later_draw_is_of_what_came_since(log: Path) -> None:
    first = draw_sample(log, rate=0.5)
    write(log, *[GOOD] * 10)
    later = draw_sample(log, rate=1.0)
    assert later.chosen[: len(first.chosen)] == first.chosen
    assert [each.probability for each in later.chosen[len(first.chosen) :]] == [1.0] * 10
    assert [(each.rate, each.answered) for each in later.draws] == [(0.5, 40), (1.0, 10)]


def test_abstained_answers_are_not_asked_about(tmp_path: Path) -> None:
    path = write(tmp_path / "audit.jsonl", GOOD, BAD, GOOD, BAD, BAD)
    drawn = draw_sample(path, rate=1.0)
    assert drawn.answered == 2
    assert [each.id for each in drawn.chosen] == [each.id for each in records(path) if each.decision == "accept"]


def test_nor_are_those_of_an_escalations_target(tmp_path: Path) -> None:
    policy = EscalateBelow(**LIMIT, to=lambda question: "from elsewhere")
    assert draw_sample(write(tmp_path / "audit.jsonl", BAD, policy=policy), rate=1.0).answered == 0


def test_of_several_drafts_the_one_that_left_is_asked_about(tmp_path: Path) -> None:
    """The second is worse, so that the first leaves, decided on with the second's record."""
    policy = RetryBelow(**LIMIT, times=1, keep="best") | AbstainBelow(score="hybridgrad", limit=5.0)
    path = write(tmp_path / "audit.jsonl", BAD, 3.0, policy=policy)
    first, second = records(path)
    assert (second.decision, second.judged) == ("accept", 1)
    assert [each.id for each in draw_sample(path, rate=1.0).chosen] == [first.id]


def test_a_log_that_lacks_the_draft_that_left_is_not_sampled(tmp_path: Path) -> None:
    policy = RetryBelow(**LIMIT, times=1, keep="best") | AbstainBelow(score="hybridgrad", limit=5.0)
    path = write(tmp_path / "audit.jsonl", BAD, 3.0, policy=policy)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(AuditError, match="lacks attempt 1"):
        draw_sample(path, rate=1.0)
    assert not sample_path(path).exists()


def test_a_log_without_text_will_do(tmp_path: Path) -> None:
    path = write(tmp_path / "audit.jsonl", GOOD, GOOD, content="redacted")
    assert len(draw_sample(path, rate=1.0).chosen) == 2


def test_an_empty_log_begins_an_empty_sample_and_no_labels(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl", fsync=False).close()
    drawn = draw_sample(tmp_path / "audit.jsonl", rate=0.2)
    assert (drawn.floor, drawn.chosen) == (0.2, ()) and read_sample(tmp_path / "audit.jsonl") == drawn
    assert labels_path(tmp_path / "audit.jsonl").read_bytes() == b""


class TestRefused:
    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, math.nan, True, "0.1"])
    def test_is_a_rate_that_is_no_probability(self, log: Path, rate: Any) -> None:
        with pytest.raises(ConfigurationError, match="rate is"):
            draw_sample(log, rate=rate)

    def test_is_a_rate_below_the_floor(self, log: Path) -> None:
        draw_sample(log, rate=0.5)
        with pytest.raises(ConfigurationError, match="below the floor"):
            draw_sample(log, rate=0.4)

    @pytest.mark.parametrize("other", [{"floor": 0.1}, {"seed": "another"}])
    def test_is_another_floor_or_seed_than_the_first(self, log: Path, other: Any) -> None:
        draw_sample(log, rate=0.5)
        with pytest.raises(ConfigurationError, match="begun with another"):
            draw_sample(log, rate=0.5, **other)

    def test_is_another_log_than_was_sampled(self, log: Path, tmp_path: Path) -> None:
        draw_sample(log, rate=0.5)
        for path in tmp_path.glob("audit.jsonl*"):
            path.unlink()
        write(log, *[GOOD] * 50)
        with pytest.raises(AuditError, match="does not have the answers"):
            draw_sample(log, rate=0.5)

    def test_is_a_log_that_was_cut(self, log: Path) -> None:
        draw_sample(log, rate=0.5)
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-5]))
        with pytest.raises(AuditError, match="does not have the answers"):
            draw_sample(log, rate=0.5)

    def test_is_a_log_whose_labels_were_lost(self, log: Path) -> None:
        draw_sample(log, rate=0.5)
        labels_path(log).unlink()
        with pytest.raises(AuditError, match=r"labels .* are missing"):
            draw_sample(log, rate=0.5)

    @pytest.mark.parametrize("content", [b"hello\n", b"\xff\xfe\x00\n", bytes(100)])
    def test_is_a_file_of_another_kind(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "odd.jsonl").write_bytes(content)
        with pytest.raises(AuditError, match="no audit log"):
            draw_sample(tmp_path / "odd.jsonl", rate=0.5)

    def test_is_a_log_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="cannot be read"):
            draw_sample(tmp_path / "none.jsonl", rate=0.5)
        assert not sample_path(tmp_path / "none.jsonl").exists()


def edit_line(number: int, **changes: Any) -> Any:
    def edited(lines: list[bytes]) -> list[bytes]:
        row = {**json.loads(lines[number]), **changes}
        return [*lines[:number], json.dumps(row).encode() + b"\n", *lines[number + 1 :]]

    return edited


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[1:],
        lambda lines: [],
        lambda lines: lines[:-1],
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:-1], lines[-1][:-1]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, b"prose\n"],
        lambda lines: [*lines, b"[]\n"],
        edit_line(0, seed="another"),
        edit_line(0, sample=2),
        edit_line(0, floor=0.9),
        edit_line(0, floor="0.1"),
        edit_line(1, rate=0.6),
        edit_line(1, rate=None),
        edit_line(1, chosen=1.5),
        edit_line(2, probability=0.9),
        edit_line(2, id="z" * 32),
        edit_line(2, id=7),
        edit_line(2, more=1),
    ],
)
def test_a_sample_that_was_edited_or_cut_is_not_read(log: Path, edit: Any) -> None:
    draw_sample(log, rate=0.5, seed="mine")
    path = sample_path(log)
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(AuditError, match="not whole"):
        read_sample(log)
    with pytest.raises(AuditError, match="not whole"):
        draw_sample(log, rate=0.5)


def test_what_is_sampled_can_be_labelled(log: Path) -> None:
    for each in draw_sample(log, rate=0.5).chosen:
        label(log, each.id, True)


def test_the_answers_are_in_the_order_in_which_they_left(log: Path) -> None:
    found: list[AuditRecord] = list(answered(log))
    assert [each.answer for each in found] == [f"answer {at}" for at in range(40)]
