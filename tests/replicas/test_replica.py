"""One replica, made of plain settings: a server's own answers, a chain of its own, and errors that are values."""

from __future__ import annotations

import json
import pickle
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import WhiteBoxModel
from hallucination_guard.audit import AuditLog, draw_sample, records, verify
from hallucination_guard.audit.folder import chains_of
from hallucination_guard.cli.score import _kept as kept
from hallucination_guard.errors import AuditError, ConfigurationError, InputError, ReplicaLost
from hallucination_guard.model.choice import ModelChoice
from hallucination_guard.replicas.jobs import Answers, Scores, plan, text_of
from hallucination_guard.replicas.opening import _reading, _watch, chains_beside, opened
from hallucination_guard.replicas.ray_cluster import Share
from hallucination_guard.replicas.replica import Replica
from hallucination_guard.replicas.said import Asked, Broken
from hallucination_guard.rows import Line, read_lines, score_lines
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.server.config import Alias, Settings, Watching
from hallucination_guard.server.refusals import Refusal
from hallucination_guard.server.requests import Tightening
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values import Call, Outcome, Released, as_messages
from hallucination_guard_policies import AbstainBelow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> dict[str, Any]:
    alias = {"alias": "m", "model": str(model), "policy": "observe", "audit": str(tmp_path / "m.jsonl")}
    return Settings.of({"models": [{**alias, "max_new_tokens": 6}]}).model_dump(mode="json")


def asked(text: str = "Where is Lyon?", **more: Any) -> Asked:
    facts = {"alias": "m", "tightening": Tightening(), "messages": as_messages(text), "call": Call(request_id="r")}
    return Asked(**{**facts, **more})


class TestTheWatchOfAnAlias:
    def test_a_policy_without_a_risk_is_refused(self, settings: dict[str, Any]) -> None:
        settings["models"][0]["watch"] = {"judge": "ann"}
        with ExitStack() as stack, pytest.raises(ConfigurationError, match="speaks of none"):
            opened(Settings.of(settings), stack)

    def test_it_tests_the_risk_of_the_policy_on_the_log_of_the_alias(self, tmp_path: Path) -> None:
        log = tmp_path / "m.jsonl"
        AuditLog(log, fsync=False).close()
        draw_sample(log, rate=0.5)
        alias = Alias(alias="m", audit=log, watch=Watching(level=0.01))
        assert alias.watch is not None
        watch = _watch(alias, alias.watch, AbstainBelow(max_risk=0.2), "")
        assert (watch.alpha, watch.bets.level, watch.path) == (0.2, 0.01, log)
        with pytest.raises(ConfigurationError, match="several processes"):
            _watch(alias, alias.watch, AbstainBelow(max_risk=0.2), "one")


def test_a_model_of_which_nothing_can_be_kept_reads_without_it_unless_it_was_asked_for() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = WhiteBoxModel(tiny_model("llama", rope_parameters=rope), tiny_tokenizer())
    assert _reading(dynamic, None).prefixes is None and _reading(dynamic, 0).prefixes is None
    with pytest.raises(ConfigurationError, match="dynamic"):
        _reading(dynamic, 1)
    plain = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    assert [_reading(plain, mib).prefixes is not None for mib in (None, 0, 1)] == [True, False, True]


async def test_it_answers_as_the_guard_of_a_server_does(settings: dict[str, Any], tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = opened(Settings.of(settings), stack)["m"]
        alone = await served.guard.acall("Where is Lyon?", call=Call(request_id="r"))
    replica = Replica(settings, "one")
    said = await replica.answer(asked())
    replica.close()
    assert isinstance(said.value, Outcome)
    assert (said.value.text, said.value.verdict.score.scores) == (alone.text, alone.verdict.score.scores)
    assert (said.replica, said.value.request_id, said.value.audit_ids) == ("one", "r", alone.audit_ids)
    assert said.about["m"].fingerprint == alone.generation.model.fingerprint
    assert pickle.loads(pickle.dumps(said)) == said


async def test_each_has_a_chain_of_its_own_and_they_are_one_log(settings: dict[str, Any], tmp_path: Path) -> None:
    one, two = Replica(settings, "one"), Replica(settings, "two")
    await one.answer(asked(call=Call(request_id="a")))
    await two.answer(asked(call=Call(request_id="b")))
    await two.answer(asked(call=Call(request_id="a")))  # as if the first had been lost
    one.close()
    two.close()
    chains = chains_beside(tmp_path / "m.jsonl")
    assert [each.name for each in chains_of(chains)] == ["one.jsonl", "two.jsonl"]
    assert all(verify(each).ok for each in chains_of(chains))
    assert [each.request_id for each in records(chains)] == ["b", "a"]
    assert not (tmp_path / "m.jsonl").exists()


async def test_a_stream_is_the_same_answer_in_parts(settings: dict[str, Any]) -> None:
    replica = Replica(settings, "one")
    whole = (await replica.answer(asked())).value
    async with aclosing(replica.stream(asked(call=Call(request_id="s")))) as coming:
        *parts, last = [each.value async for each in coming]
    replica.close()
    assert isinstance(whole, Outcome) and isinstance(last, Outcome)
    assert all(isinstance(each, Released) for each in parts)
    assert "".join(each.text for each in parts) == whole.text == last.text


async def test_errors_are_values(settings: dict[str, Any], tmp_path: Path) -> None:
    replica = Replica(settings, "one")
    tight = Tightening(confidence=0.5)
    for kind, question in (
        (InputError, asked("x" * 4000)),
        (Refusal, asked(tightening=tight)),
        (InputError, asked(answer=(99_999,))),
    ):
        work = replica.review if question.answer else replica.answer
        said = await work(question)
        assert isinstance(said.value, kind) and said.value.__traceback__ is None
        if not question.answer:
            assert [type(each.value) async for each in replica.stream(question)] == [kind]
    (chains_beside(tmp_path / "m.jsonl") / "one.jsonl").write_bytes(b"{")
    await replica.answer(asked())
    (chains_beside(tmp_path / "m.jsonl") / "one.jsonl").write_bytes(b"")
    assert isinstance((await replica.answer(asked())).value, AuditError)


async def test_a_defect_is_named_by_its_kind_and_nothing_of_it_is_said(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(settings, "one")
    said = await replica.answer(asked("secret", options={"tools": 3}))  # type: ignore[typeddict-item]
    if isinstance(said.value, InputError):
        said = await replica.answer(asked("secret", alias="none"))
    assert isinstance(said.value, Broken) and said.value.kind
    assert "secret" not in caplog.text
    replica.close()


def test_shares_leave_room_for_what_feeds_them() -> None:
    for processes in (1, 2, 3, 7, 64, 256):
        for cpus in (1.0, 2.0, 16.0):
            share = Share.of(processes, cpus=cpus, gpus=0.0)
            assert 0 < share.cpus < 1 and share.gpus == 0
            assert share.cpus * processes <= cpus / 2
    assert Share.of(3, cpus=8.0, gpus=1.0).gpus * 3 <= 1
    assert Share.of(2, cpus=8.0, gpus=4.0).gpus == 1.0


# ------------------------------------------------------------------------------------------------------------- jobs


def test_a_job_gives_the_rows_of_one_process(model: Path) -> None:
    raw = [json.dumps({"id": at, "prompt": "x" * at}).encode() for at in range(1, 8)] + [b"no json"]
    lines = read_lines(raw)
    choice = ModelChoice(name=str(model))
    identity, batches = plan(choice, lines, batch_size=3, batch_tokens=8192, max_new_tokens=4)
    white = choice.load()
    assert identity[0][0] == white.identity.fingerprint
    job = Scores(choice, 4)
    found = [each for batch in batches for each in json.loads(job(batch))]
    alone = score_lines(white, lines, scorer=HybridGrad(), batch_size=3, batch_tokens=8192, max_new_tokens=4)
    wanted = [each for rows in alone for each in rows]
    assert [number for number, _ in found] == [number for number, _ in wanted]
    for (_, mine), (_, theirs) in zip(found, wanted, strict=True):
        assert {**mine, "seconds": 0} == {**json.loads(json.dumps(theirs)), "seconds": 0}


def test_a_file_lacks_no_row_that_did_not_come_back(tmp_path: Path) -> None:
    lines = read_lines([b'{"prompt": "a"}', b'{"prompt": "b"}'])
    row = {"id": 1, "status": "scored"}
    output = tmp_path / "out.jsonl"

    def work(finished: Any) -> Any:
        yield [(1, row)]
        yield [(1, {**row, "status": "error"})]  # done twice

    with pytest.raises(ReplicaLost, match="1 rows did not come back, the first of line 2"):
        kept(output, b"", lines, {}, work, most=1)
    assert not output.exists()
    assert kept(output, b"", lines, {}, lambda finished: iter([[(2, row)]]), most=1) == {
        "scored": 2,
        "unscorable": 0,
        "error": 0,
    }


def test_lines_travel_as_they_are() -> None:
    for line in (
        Line(number=1, id="\ud800", messages="hi", question="q"),
        Line(number=2, messages=[{"role": "user", "content": "hi"}], answer=(1, 2)),
        Line(number=3, problem="no"),
    ):
        [back] = json.loads(text_of([line.to_json_dict()]))
        assert Line.from_json_dict(back) == line


def test_answers_are_rows_by_id(model: Path) -> None:
    from hallucination_guard.evaluation.data import Prompting

    choice = ModelChoice(name=str(model))
    prompting = Prompting.of(choice.load())
    job = Answers(choice, prompting, 4, beginnings=False)
    item = {"id": "a", "query": "Who?", "answers": ["me"], "response": None, "correct": None, "judge": "given"}
    [row] = json.loads(job(json.dumps([item])))
    assert (row["id"], row["status"], row["problem"]) == ("a", "scored", "")
