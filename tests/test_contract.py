"""Every scorer, policy and sink of this repository against :mod:`contract`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard.audit import AuditLog, records
from hallucination_guard.audit.log import Content
from hallucination_guard.scoring import (
    BySentence,
    Cascade,
    ExGrad,
    HybridGrad,
    Isotropic,
    Likelihood,
    ParaGrad,
    SemGrad,
)
from hallucination_guard.testing import MemorySink, ScriptedScorer
from hallucination_guard_policies import (
    AbstainBelow,
    Accept,
    Budget,
    EscalateBelow,
    MarkSentences,
    RedactSentences,
    RetrieveBelow,
    RetryBelow,
    Unscored,
    Within,
    load_policy,
    pack_names,
)

_spec = importlib.util.spec_from_file_location("contract", Path(__file__).parent / "contract.py")
assert _spec is not None and _spec.loader is not None
contract = sys.modules.setdefault("contract", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(contract)


def named(check: Callable[..., None]) -> str:
    return check.__name__


SCORERS = {
    "semgrad": SemGrad(),
    "semgrad-official": SemGrad(layers="official", reduction="mean", weighting="none"),
    "paragrad": ParaGrad(),
    "exgrad": ExGrad(),
    "hybridgrad": HybridGrad(),
    "isotropic": Isotropic(),
    "isotropic-all": Isotropic(parameters="all"),
    "likelihood": Likelihood(),
    "by sentence": BySentence(HybridGrad()),
    "by sentence, gradient": BySentence(Likelihood(), gradient=True),
    "by sentence, states": BySentence(HybridGrad(), states=True),
    "cascade-never": Cascade(band=(0.1, 0.1)),
    "cascade-always": Cascade(band=(0.0, float("inf"))),
    "cascade": Cascade(cheap="sequence_nll", band=(20.0, 35.0)),  # of the answers in the contract: some in, some out
}


@pytest.mark.parametrize("check", contract.SCORER_CHECKS, ids=named)
@pytest.mark.parametrize("name", SCORERS)
def test_scorer(name: str, check: Callable[..., None], tiny: Any) -> None:
    check(SCORERS[name], tiny)


@pytest.mark.parametrize(
    "check",
    [
        contract.scorer_is_a_scorer,
        contract.scorer_has_a_name_and_a_version,
        contract.scorer_identity_is_the_same_each_time,
        contract.scorer_settings_are_words,
        contract.scorer_gives_the_number_it_is_about,
        contract.scorer_signs_its_scores,
        contract.scorer_scores_nothing_for_nothing,
    ],
    ids=named,
)
def test_scripted_scorer(check: Callable[..., None], tiny: Any) -> None:
    check(ScriptedScorer(0.5), tiny)


def search(query: str) -> list[str]:
    return [query]


LOW, HIGH = {"score": "hybridgrad", "limit": 1e-4}, {"score": "mean_nll", "limit": 1.0}
POLICIES = {
    "abstain": AbstainBelow(confidence=0.5),
    "abstain-raw": AbstainBelow(**LOW),
    "retry": RetryBelow(confidence=0.5, times=3),
    "retrieve": RetrieveBelow(confidence=0.5, retriever=search),
    "escalate": EscalateBelow(confidence=0.5),
    "accept": Accept(),
    "within": Within(RetryBelow(confidence=0.5, times=50), Budget(attempts=4)),
    "unscored": Unscored(AbstainBelow(confidence=0.5)),
    "unscored-accept": Unscored(AbstainBelow(confidence=0.5), on_unscorable="accept", on_error="accept"),
    "unscored-escalate": Unscored(Accept(), on_unscorable="escalate", on_error="escalate"),
    "chain": RetryBelow(**LOW, name="a") | RetrieveBelow(**LOW, retriever=search) | EscalateBelow(**HIGH) | Accept(),
    "mark": MarkSentences(score="mean_nll", limit=1.0),
    "redact": Unscored(RedactSentences(alpha=0.2, at_most=1), on_unscorable="accept"),
    "both": AbstainBelow(confidence=0.8) & AbstainBelow(**LOW),
    "nested": (RetryBelow(confidence=0.9) | AbstainBelow(confidence=0.3)) & (RetryBelow(**LOW, name="b") | Accept()),
    **{f"pack-{name}": load_policy(name, retriever=search) for name in pack_names()},
}


@pytest.mark.parametrize("check", contract.POLICY_CHECKS, ids=named)
@pytest.mark.parametrize("name", POLICIES)
def test_policy(name: str, check: Callable[..., None]) -> None:
    check(POLICIES[name])


class TestSinks:
    @pytest.fixture(params=["memory", "log", "keyed log", "lazy log"])
    def sink(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        path = tmp_path / "audit.jsonl"
        return {
            "memory": MemorySink,
            "log": lambda: AuditLog(path, fsync=False),
            "keyed log": lambda: AuditLog(path, fsync=False, key=b"secret"),
            "lazy log": lambda: AuditLog(path, fsync=False, anchor_every=100),
        }[request.param]()

    @pytest.mark.parametrize("check", contract.SINK_CHECKS, ids=named)
    def test_sink(self, sink: Any, check: Callable[..., None]) -> None:
        check(sink, kept)

    @pytest.mark.parametrize("content", ["redacted", "hmac"])
    @pytest.mark.parametrize(
        "check",
        [
            contract.sink_is_a_sink,
            contract.sink_returns_the_records_id,
            contract.sink_keeps_the_records_in_order,
            contract.sink_loses_nothing_between_threads,
        ],
        ids=named,
    )
    def test_sink_that_keeps_no_text(self, content: Content, check: Callable[..., None], tmp_path: Path) -> None:
        check(AuditLog(tmp_path / "audit.jsonl", fsync=False, content=content, key=b"secret"), kept)


def kept(sink: Any) -> Any:
    return sink.records if isinstance(sink, MemorySink) else list(records(sink.path))
