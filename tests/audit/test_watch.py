"""The watch: which labels count, what a labeller cannot steer, and that what cannot be read suspends."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import Guard
from hallucination_guard.audit import (
    AuditLog,
    Label,
    RiskWatch,
    Sampled,
    draw_sample,
    label,
    label_all,
    labels_path,
    read_sample,
    records,
    sample_path,
    watched,
)
from hallucination_guard.audit.evidence import Evidence
from hallucination_guard.calibration import Bets, RiskTest
from hallucination_guard.errors import AuditError, ConfigurationError, GuardError, InputError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard_policies import AbstainBelow

LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 1.0}
BETS = Bets(alpha=0.2)


def write(path: Path, *scores: float) -> Path:
    with AuditLog(path, fsync=False) as log:
        guard = Guard(ScriptedModel("x"), policy=AbstainBelow(**LIMIT), scorer=ScriptedScorer(list(scores)), audit=log)
        for at in range(len(scores)):
            guard(f"question {at}")
    return log.path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Forty answers, all sampled, none labelled."""
    path = write(tmp_path / "audit.jsonl", *[0.5] * 40)
    draw_sample(path, rate=1.0)
    return path


def ids(log: Path) -> list[str]:
    return [each.id for each in read_sample(log).chosen]


def label_some(log: Path, some: Iterable[str], correct: bool, by: str = "human") -> None:
    label_all(log, [Label(id=each, correct=correct, by=by) for each in some])


def shown(labels: str, *, of: int | None = None, order: Iterable[int] | None = None, bets: Bets = BETS) -> Evidence:
    """After labels in words: r right, w wrong, . none (yet)."""
    found = Evidence(bets)
    found.sample([Sampled(id=str(at), probability=1.0) for at in range(of or len(labels))])
    for at in range(len(labels)) if order is None else order:
        if labels[at] != ".":
            found.label(str(at), labels[at] == "r")
    return found


# ----------------------------------------------------------------------------------------- what a labeller can do


def test_with_all_labels_it_is_the_plain_test() -> None:
    labels = "rrwrrrrwrwrrrrrrrrrwrrrrrrrrrrwrrr"
    plain = RiskTest(alpha=0.2)
    for each in labels:
        plain.add(correct=each == "r", probability=1.0)
    state = shown(labels).state()
    assert (state.alarm, state.proof, state.waiting) == (plain.alarm, plain.proof, 0)
    assert (state.labelled, state.wrong) == (34, 5)


def test_the_order_in_which_labels_come_has_no_say() -> None:
    labels = "rrwrrrrwrwrrrrrrrrrwrrrrrrrrrrwrrr"
    wanted = shown(labels).state()
    for seed in range(5):
        order = random.Random(seed).sample(range(len(labels)), len(labels))
        assert shown(labels, order=order).state() == wanted


def test_what_waits_is_right_to_the_alarm_and_wrong_to_the_proof() -> None:
    state = shown("rr.wr..w").state()
    assert state.alarm == shown("rrrwrrrw").state().alarm
    assert state.proof == shown("rrwwrwww").state().proof
    assert state.waiting == 3


def test_leaving_out_the_wrong_ones_proves_nothing() -> None:
    honest = "rrrrw" * 40
    assert not shown(honest.replace("w", ".")).state().kept
    assert shown("rrrrr" * 10).state().kept


def test_leaving_out_the_right_ones_raises_no_alarm() -> None:
    assert not shown(("rrrrw" * 40).replace("r", ".")).state().raised
    assert shown("w" * 10).state().raised


def test_what_comes_after_the_last_label_is_not_counted() -> None:
    assert shown("rrwr", of=400).state().proof == shown("rrwr").state().proof


def test_every_look_says_less_than_the_look_with_all_labels() -> None:
    rng = random.Random(1)
    for _ in range(20):
        truth = ["w" if rng.random() < 0.3 else "r" for _ in range(30)]
        given = "".join(each if rng.random() < 0.7 else "." for each in truth)
        assert shown(given).state().alarm <= shown("".join(truth)).state().alarm


def test_a_label_taken_back_does_not_take_back_the_alarm() -> None:
    found = shown("wwwwwwww")
    for at in range(8):
        found.label(str(at), True)
    state = found.state()
    assert state.raised and state.wrong == 0
    assert state.proof == shown("rrrrrrrr").state().proof


def test_a_label_of_what_was_not_sampled_does_not_count() -> None:
    found = shown("rr")
    assert not found.label("a complaint", False)
    assert found.state() == shown("rr").state()


# -------------------------------------------------------------------------------------------------- what counts


def test_labels_of_complaints_and_of_abstained_answers_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "audit.jsonl", *[0.5, 2.0] * 60)
    chosen = {each.id for each in draw_sample(path, rate=0.3).chosen}
    label_some(path, (each.id for each in records(path) if each.id not in chosen), correct=False)
    watch = RiskWatch.of_log(path, alpha=0.1)
    assert (watch.suspended, watch.state.labelled) == ("", 0)
    label_some(path, chosen, correct=False)
    assert "more than 0.1" in watch.suspended and watch.state.labelled == len(chosen)


def test_a_label_that_is_older_than_the_draw_counts_once_it_is_asked_for(log: Path) -> None:
    watch = RiskWatch.of_log(log, alpha=0.1)
    write(log, *[0.5] * 10)
    label_some(log, [each.id for each in records(log)][40:], correct=False)
    assert (watch.suspended, watch.state.labelled) == ("", 0)
    draw_sample(log, rate=1.0)
    assert watch.state.labelled == 10


def test_the_alarm_comes_with_the_label_that_raises_it_and_stays(log: Path) -> None:
    watch = RiskWatch.of_log(log, alpha=0.1)
    said = []
    for each in ids(log)[:6]:
        label(log, each, False)
        said.append(watch.suspended)
    first = said.index(next(filter(None, said)))
    assert first >= 1 and len(set(said[first:])) == 1
    label_some(log, ids(log), correct=True)
    assert watch.suspended == said[-1]


def test_after_a_restart_it_stands_where_it_stood(log: Path) -> None:
    running = RiskWatch.of_log(log, alpha=0.2)
    for at, each in enumerate(ids(log)[:25]):
        label(log, each, at % 5 != 0)
        assert running.suspended == ""
    assert RiskWatch.of_log(log, alpha=0.2).state == running.state


def test_a_restart_lifts_no_alarm_though_the_labels_were_changed(log: Path) -> None:
    label_some(log, ids(log), correct=False)
    label_some(log, ids(log), correct=True)
    assert RiskWatch.of_log(log, alpha=0.1).suspended


def test_each_label_has_the_state_after_it(log: Path) -> None:
    label_some(log, ids(log)[:5], correct=False)
    steps = list(watched(log, alpha=0.1))
    assert [state.labelled for _, state in steps] == [1, 2, 3, 4, 5]
    assert [state.alarm for _, state in steps] == sorted(state.alarm for _, state in steps)
    assert steps[-1][1] == RiskWatch.of_log(log, alpha=0.1).state


def test_a_smaller_rate_is_weighed_up(tmp_path: Path) -> None:
    """At the floor a label weighs 1, at four times the floor a quarter."""
    path = write(tmp_path / "audit.jsonl", *[0.5] * 20)
    draw_sample(path, rate=1.0, floor=0.25)
    label_some(path, ids(path), correct=False)
    plain = RiskTest(alpha=0.1, floor=0.25)
    for _ in range(20):
        plain.add(correct=False, probability=1.0)
    assert RiskWatch.of_log(path, alpha=0.1).state.alarm == plain.alarm


# ---------------------------------------------------------------------------------------------- which judge


def test_of_several_judges_one_has_to_be_named(log: Path) -> None:
    label(log, ids(log)[0], True, by="ann")
    label(log, ids(log)[0], False, by="bob")
    with pytest.raises(InputError, match="ann, bob"):
        RiskWatch.of_log(log, alpha=0.1)
    assert RiskWatch.of_log(log, alpha=0.1, judge="bob").state.wrong == 1


def test_a_second_judge_while_it_runs_suspends(log: Path) -> None:
    watch = RiskWatch.of_log(log, alpha=0.1)
    for by in ("ann", "bob"):
        label(log, ids(log)[0], True, by=by)
    assert "several judges" in watch.suspended


def test_a_judge_who_gives_no_labels_is_refused(log: Path) -> None:
    label(log, ids(log)[0], True, by="ann")
    for read in (RiskWatch.of_log, lambda *of, **how: list(watched(*of, **how))):
        with pytest.raises(InputError, match="'an' gave no labels"):
            read(log, alpha=0.1, judge="an")


def test_a_judge_whose_name_is_never_that_of_a_label_suspends(log: Path) -> None:
    watch = RiskWatch.of_log(log, alpha=0.1, judge="humann")  # nobody has labelled yet
    assert watch.suspended == ""
    label(log, ids(log)[0], False, by="human")
    assert "'humann' gave no labels" in watch.suspended


# ----------------------------------------------------------------------------------------------- fails closed


def lose(path: Path) -> None:
    path.unlink()


def corrupt(path: Path) -> None:
    path.write_bytes(b"\xff prose\n" + path.read_bytes())


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lose_first_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


BROKEN = [lose, corrupt, empty, replace_by_a_folder, lose_first_line]


@pytest.mark.parametrize("where", [labels_path, sample_path])
@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.fault("labels", "the followed labels or sample lost, cut or overwritten", "certificates suspended")
def test_what_it_follows_is_broken_and_it_suspends(log: Path, where: Any, damage: Any) -> None:
    label(log, ids(log)[0], True)
    watch = RiskWatch.of_log(log, alpha=0.1)
    assert watch.suspended == ""
    whole = where(log).read_bytes()
    damage(where(log))
    said = watch.suspended
    assert "cannot be followed" in said
    if where(log).is_dir():
        where(log).rmdir()
    where(log).write_bytes(whole)
    assert watch.suspended == said  # nothing is lifted in silence


@pytest.mark.parametrize("where", [labels_path, sample_path])
@pytest.mark.parametrize("damage", [lose, corrupt, replace_by_a_folder])
def test_and_it_does_not_begin_with_it(log: Path, where: Any, damage: Any) -> None:
    damage(where(log))
    with pytest.raises(AuditError):
        RiskWatch.of_log(log, alpha=0.1)


def test_a_line_that_is_just_being_written_is_waited_for(log: Path) -> None:
    label(log, ids(log)[0], False)
    line = labels_path(log).read_bytes()
    labels_path(log).write_bytes(b"")
    watch = RiskWatch.of_log(log, alpha=0.1)
    with labels_path(log).open("ab", buffering=0) as file:
        file.write(line[:20])
        assert (watch.suspended, watch.state.labelled) == ("", 0)
        file.write(line[20:])
    assert watch.state.labelled == 1


def test_a_sample_that_is_just_being_written_is_waited_for(log: Path) -> None:
    watch = RiskWatch.of_log(log, alpha=0.1)
    path = sample_path(log)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])

    def finish() -> None:
        with path.open("ab", buffering=0) as file:
            for at in range(len(whole) - 20, len(whole)):
                file.write(whole[at : at + 1])
                time.sleep(0.01)

    writing = threading.Thread(target=finish)
    writing.start()
    assert watch.suspended == ""
    writing.join()


def test_a_log_that_was_not_sampled_is_not_watched(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"sample .* is missing"):
        RiskWatch.of_log(write(tmp_path / "audit.jsonl", 0.5), alpha=0.1)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.1, "level": 0.0}])
def test_settings_out_of_range_are_refused(log: Path, settings: Any) -> None:
    with pytest.raises(ConfigurationError):
        RiskWatch.of_log(log, **settings)


def test_a_change_of_directory_does_not_lose_it(log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(log.parent)
    watch = RiskWatch.of_log(log.name, alpha=0.1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    label_some(log, ids(log), correct=False)
    assert "more than 0.1" in watch.suspended


def test_threads_share_it(log: Path) -> None:
    watch = RiskWatch.of_log(log, alpha=0.1)
    said: list[str] = []
    failed: list[GuardError] = []

    def look() -> None:
        try:
            said.extend(watch.suspended for _ in range(20))
        except GuardError as error:
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    label_some(log, ids(log), correct=False)
    for thread in threads:
        thread.join()
    assert not failed and set(said) <= {"", watch.suspended} and watch.suspended
