"""Every file that is read: whatever is in it, an error of this package or a value, within a second.

And nothing is taken for something that this project's writers did not write: what seals and anchors vouch for holds
only for the very bytes, a certificate only for the very model, score and conditions, and any other value that is read
can be written, and read again as the same. ``make fuzz FUZZ=1000000`` goes on for longer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hallucination_guard import AuditLog, Calibration, Guard
from hallucination_guard.audit import label, records, verify
from hallucination_guard.audit.chain import anchor_path
from hallucination_guard.audit.labels import labels_of, labels_path, read_labels
from hallucination_guard.audit.query import tail
from hallucination_guard.audit.sample import draw_sample, draw_value, read_sample, sample_path
from hallucination_guard.calibration import (
    FUSED,
    Labelled,
    LabelledResponse,
    LabelledSentence,
    SentenceCalibration,
    calibrate,
    calibrate_sentences,
    read_labelled,
    read_responses,
    write_labelled,
    write_responses,
)
from hallucination_guard.demo import BM25Retriever
from hallucination_guard.errors import GuardError
from hallucination_guard.evaluation.data import read_items
from hallucination_guard.evaluation.store import Store
from hallucination_guard.model.profile import Place, Profile
from hallucination_guard.rows import Partial
from hallucination_guard.rows.rows import read_lines
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Conditions, Score, ScorerIdentity, Situation, States, Verdict
from hallucination_guard_policies import AbstainBelow, load_policy

_spec = importlib.util.spec_from_file_location("mutate", Path(__file__).with_name("mutate.py"))
assert _spec is not None and _spec.loader is not None
mutate: Any = sys.modules.setdefault("mutate", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(mutate)

INPUTS = int(os.environ.get("FUZZ", "10000"))
KEY = b"a key"
MODEL, SCORER = ScriptedModel("Paris"), ScriptedScorer(0.5)
UNSCORED = Verdict(score=Score.failed("x", scorer=SCORER.identity))

Reads = Callable[[Path, bytes], None]
"""Reads what is at the path and says if it should not have been taken; the original's bytes beside it."""


def answers() -> list[Labelled]:
    random = Random(0)
    return [
        Labelled(
            id=f"q{at}",
            correct=random.random() > (score := random.random()) ** 2,
            judge="made up",
            scores={"hybridgrad": score, "mean_nll": score**2 + 0.01},
            length=5,
            model=MODEL.identity,
            scorer=SCORER.identity,
            conditions=Conditions.of(MODEL.generate("Who?")),
        )
        for at in range(200)
    ]


def responses(count: int) -> list[LabelledResponse]:
    """Of three sentences each, with states that know which one is wrong."""
    random = Random(1)

    def sentence() -> LabelledSentence:
        doubt = random.random()
        correct = None if random.random() < 0.1 else random.random() > doubt**2
        states = States(layers=(1,), mean=(doubt, random.random()), last=(random.random(), doubt))
        return LabelledSentence(scores={"mean_nll": doubt, "sequence_nll": 2 * doubt}, correct=correct, states=states)

    return [
        LabelledResponse(
            id=f"q{at}",
            judge="made up",
            sentences=(sentence(), sentence(), sentence()),
            model=MODEL.identity,
            scorer=ScorerIdentity(name="sentences", version="1", settings={"states": "True"}),
            conditions=Conditions.of(MODEL.generate("Who?")),
        )
        for at in range(count)
    ]


# ------------------------------------------------------------------------------------------------------ what is read


def _log(path: Path, original: bytes) -> None:
    found = verify(path, KEY)
    assert not found.ok or path.read_bytes() == original
    list(records(path, strict=False))
    tail(path, 3, strict=False)
    list(records(path))


def _anchor(path: Path, original: bytes) -> None:
    log = path.with_name(path.name.removesuffix(".anchor"))
    if verify(log, KEY).ok:
        assert json.loads(path.read_bytes()) == json.loads(original)


def _labels(path: Path, original: bytes) -> None:
    for each in labels_of(path.with_name("audit.jsonl")):
        assert set(each.to_json_dict()) == {"by", "id", "label", "note", "time"}


def _sampled(path: Path, original: bytes) -> None:
    found = read_sample(path.with_name("audit.jsonl"))
    assert all(draw_value(found.seed, each.id) < each.probability <= 1.0 for each in found.chosen)
    assert sum(each.chosen for each in found.draws) == len(found.chosen)
    assert 0.0 < found.floor <= min((each.probability for each in found.chosen), default=1.0)


def _label_file(path: Path, original: bytes) -> None:
    for each in read_labels(path):
        assert isinstance(each.correct, bool) and each.id


def _calibration(path: Path, original: bytes) -> None:
    found = Calibration.load(path)
    path.write_text(found.model_dump_json())
    assert Calibration.load(path) == found
    path.write_bytes(original)
    whole = Calibration.load(path)
    assert all(each in whole.certificates for each in found.certificates)
    assert not found.certificates or found.covered == whole.covered


def _sentences(path: Path, original: bytes) -> None:
    found = SentenceCalibration.load(path)
    found.save(path)
    assert SentenceCalibration.load(path) == found
    path.write_bytes(original)
    whole = SentenceCalibration.load(path)
    assert all(each in whole.thresholds for each in found.thresholds)
    assert not found.thresholds or found.backoffs[0].score == whole.backoffs[0].score


def _responses(path: Path, original: bytes) -> None:
    found = read_responses(path)
    write_responses(path, found)
    assert read_responses(path) == found


def _profile(path: Path, original: bytes) -> None:
    found = Profile.load(path)
    found.save(path)
    assert Profile.load(path) == found


def _policy(path: Path, original: bytes) -> None:
    policy = load_policy(path, retriever=len)
    described = json.dumps(policy.describe(), allow_nan=False)
    decision = policy(UNSCORED, Situation())
    assert decision.action != "accept" or '"on_error": "accept"' in described or "Accept" in described


def _answers(path: Path, original: bytes) -> None:
    found = read_labelled(path)
    write_labelled(path, found)
    assert read_labelled(path) == found


def _items(path: Path, original: bytes) -> None:
    assert all(each.id and each.query for each in read_items(path))


def _lines(path: Path, original: bytes) -> None:
    for each in read_lines(path.read_bytes().splitlines()):
        assert each.problem or each.messages is not None


def _documents(path: Path, original: bytes) -> None:
    BM25Retriever.from_path(path)


def _store(path: Path, original: bytes) -> None:
    found = Store(path, {"data": "d"})
    assert all(row["id"] == name for name, row in found.rows.items())


def _partial(path: Path, original: bytes) -> None:
    with Partial(path.with_name(path.name.removesuffix(".partial")), {"input": "d"}) as found:
        assert set(found.statuses.values()) <= {"scored", "unscorable", "error"}


# ---------------------------------------------------------------------------------------------------- what is written


def written(kind: str, folder: Path) -> Path:
    """A file of this kind, as the project writes it; what else belongs to it lies beside it."""
    if kind in ("log", "anchor", "labels", "sample"):
        log = folder / "audit.jsonl"
        with AuditLog(log, key=KEY) as audit:
            guard = Guard(MODEL, policy=AbstainBelow(score="hybridgrad", limit=1.0), scorer=SCORER, audit=audit)
            ids = [guard(f"Question {at}?").audit_ids[0] for at in range(3)]
        if kind == "labels":
            label(log, ids[0], True, note="right")
            label(log, ids[1], False)
            return labels_path(log)
        if kind == "sample":
            draw_sample(log, rate=1.0, floor=0.5)
            return sample_path(log)
        return log if kind == "log" else anchor_path(log)
    path = folder / "file.jsonl"
    match kind:
        case "calibration":
            calibrate(answers(), alphas=[0.3, 0.4]).save(path)
        case "fused calibration":
            calibrate(answers(), score=FUSED, map="isotonic", alphas=[0.4]).save(path)
        case "calibration of sentences":
            calibrate_sentences(responses(80), score="mean_nll", alphas=[0.3, 0.4], at_most=[0, 1]).save(path)
        case "fused calibration of sentences":
            calibrate_sentences(responses(160), score=FUSED, alphas=[0.4]).save(path)
        case "labelled responses":
            write_responses(path, responses(4))
        case "profile":
            place = Place(index=-1, raw=0.5, centred=0.4, nearest=0.3)
            Profile(
                fingerprint="f", dtype="float32", template="t", anchor=-2, tail=(5, 6), view="raw", layers=(2, 5),
                table=(place, place), prompt="{query}", queries=3, prompts=9, data="d",
            ).save(path)  # fmt: skip
        case "policy":
            pack = Path(__file__).parents[2] / "policies" / "packs" / "rag.yaml"
            path = folder / "policy.yaml"
            path.write_bytes(pack.read_bytes())
        case "policy in JSON":
            path = folder / "policy.yaml"
            path.write_text(
                '{"id": "p", "version": 1, "rules": [{"retry": {"below": {"confidence": 0.5}, "times": 2}},\n'
                '{"abstain": {"above": {"score": "mean_nll", "limit": 2.0}}}], "on_error": "abstain",\n'
                '"budget": {"attempts": 3, "seconds": 9}}\n'
            )
        case "labelled answers":
            write_labelled(path, answers()[:4])
        case "label file":
            path.write_text('{"id": "abc", "label": "right", "note": "n"}\n{"id": "abd", "label": false}\n')
        case "label table":
            path = folder / "labels.csv"
            path.write_text("id,label,note\nabc,right,yes\nabd,wrong,\n")
        case "questions":
            path.write_text('{"id": "1", "query": "Who?", "answers": ["me"]}\n{"question": "W?", "answer": "I"}\n')
        case "rows to score":
            path.write_text('{"id": 1, "prompt": "Who?", "response": "me"}\n{"messages": [{"role": "user"}]}\n')
        case "documents":
            path.write_text('{"id": "a", "text": "the cat"}\n{"id": "b", "text": "a dog"}\n')
        case "evaluation rows":
            Store(path, {"data": "d"}).add([{"id": "1", "x": 1.5}, {"id": "2", "x": None}])
        case "partial rows":
            with Partial(folder / "out.jsonl", {"input": "d"}) as partial:
                partial.add([(1, {"id": "1", "status": "scored"}), (2, {"id": "2", "status": "error"})])
            path = folder / "out.jsonl.partial"
    return path


KINDS: dict[str, Reads] = {
    "log": _log,
    "anchor": _anchor,
    "labels": _labels,
    "sample": _sampled,
    "label file": _label_file,
    "label table": _label_file,
    "calibration": _calibration,
    "fused calibration": _calibration,
    "calibration of sentences": _sentences,
    "fused calibration of sentences": _sentences,
    "labelled responses": _responses,
    "profile": _profile,
    "policy": _policy,
    "policy in JSON": _policy,
    "labelled answers": _answers,
    "questions": _items,
    "rows to score": _lines,
    "documents": _documents,
    "evaluation rows": _store,
    "partial rows": _partial,
}
_AT_ONCE = 50


def _seconds(read: Reads, path: Path, original: bytes) -> float:
    """Of this thread's processor, until the file is a value or an error of one line."""
    began = time.thread_time()
    try:
        read(path, original)
    except GuardError as error:
        assert str(error).isprintable()
    return time.thread_time() - began


@pytest.mark.timeout(300 + INPUTS // 20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(
    "files",
    "10,000 damaged files: {case}",
    "an error of this package or a value, within a second; nothing sealed is taken for whole",
)
def test_a_file_that_is_read(kind: str, tmp_path: Path, pace: float) -> None:
    path = written(kind, tmp_path)
    original = path.read_bytes()
    KINDS[kind](path, original)  # what the project wrote is taken

    @settings(
        max_examples=max(1, INPUTS // _AT_ONCE),
        deadline=None,
        database=None,
        derandomize="FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**63))
    def read(seed: int) -> None:
        for at in range(_AT_ONCE):
            path.write_bytes(mutate.mutated(original, Random(seed + at)))
            if _seconds(KINDS[kind], path, original) >= pace:
                # What blows up does so again; a collection of garbage, or another process, does not.
                assert _seconds(KINDS[kind], path, original) < pace

    read()
