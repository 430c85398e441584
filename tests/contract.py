"""What every scorer, policy and sink must satisfy, whoever wrote it.

The checks are plain functions over one implementation, so that the author of another can run them too: load this file
by its path and parametrise over :data:`SCORER_CHECKS`, :data:`POLICY_CHECKS` and :data:`SINK_CHECKS`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hallucination_guard.audit import AuditRecord, Sink
from hallucination_guard.errors import GuardError
from hallucination_guard.values import Decision, Policy, Score, Scorer, ScorerIdentity, Situation, Verdict

QUESTION, ANSWER = "What is the capital of France?", "Paris, on the Seine"


# ------------------------------------------------------------------------------------------------------- scorers


def scorer_is_a_scorer(scorer: Any, model: Any) -> None:
    assert isinstance(scorer, Scorer)


def scorer_has_a_name_and_a_version(scorer: Scorer, model: Any) -> None:
    assert scorer.identity.name and scorer.identity.version


def scorer_identity_is_the_same_each_time(scorer: Scorer, model: Any) -> None:
    assert scorer.identity == scorer.identity


def scorer_settings_are_words(scorer: Scorer, model: Any) -> None:
    assert all(isinstance(each, str) for pair in scorer.identity.settings.items() for each in pair)


def scorer_gives_the_number_it_is_about(scorer: Scorer, model: Any) -> None:
    [score] = scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])
    assert scorer.primary in score.scores


def scorer_gives_finite_numbers_only(scorer: Scorer, model: Any) -> None:
    [score] = scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])
    assert all(map(math.isfinite, score.scores.values()))


def scorer_signs_its_scores(scorer: Scorer, model: Any) -> None:
    answers = [model.read(QUESTION, answer=each) for each in (ANSWER, "")]
    assert all(score.scorer == scorer.identity for score in scorer.batch(model, answers))


def scorer_is_deterministic(scorer: Scorer, model: Any) -> None:
    once, again = (scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])[0] for _ in range(2))
    assert dict(once.scores) == dict(again.scores)


def scorer_gives_one_score_an_answer_in_order(scorer: Scorer, model: Any) -> None:
    answers = [model.read(QUESTION, answer=each) for each in (ANSWER, "no", "Lyon?")]
    together = scorer.batch(model, answers)
    alone = [scorer.batch(model, [each])[0] for each in answers]
    for one, other in zip(together, alone, strict=True):
        assert_close(one.scores, other.scores)


def scorer_scores_nothing_for_nothing(scorer: Scorer, model: Any) -> None:
    assert scorer.batch(model, []) == []


def scorer_calls_an_empty_answer_unscorable(scorer: Scorer, model: Any) -> None:
    [score] = scorer.batch(model, [model.read(QUESTION, answer="")])
    assert (score.status, dict(score.scores)) == ("unscorable", {})


def scorer_calls_white_space_unscorable(scorer: Scorer, model: Any) -> None:
    [score] = scorer.batch(model, [model.read(QUESTION, answer=" \n\t ")])
    assert score.status == "unscorable"


def scorer_calls_special_tokens_alone_unscorable(scorer: Scorer, model: Any) -> None:
    [score] = scorer.batch(model, [model.read(QUESTION, answer=[0, 0])])
    assert score.status == "unscorable"


def scorer_keeps_its_place_beside_an_empty_answer(scorer: Scorer, model: Any) -> None:
    answers = [model.read(QUESTION, answer=each) for each in ("", ANSWER, "")]
    assert [score.status for score in scorer.batch(model, answers)] == ["unscorable", "scored", "unscorable"]


def scorer_gives_reasons_for_the_unscorable(scorer: Scorer, model: Any) -> None:
    assert scorer.batch(model, [model.read(QUESTION, answer="")])[0].reason


def scorer_refuses_another_models_answer(scorer: Scorer, model: Any) -> None:
    stranger = dataclasses.replace(model.identity, fingerprint="0" * 32)
    generation = dataclasses.replace(model.read(QUESTION, answer=ANSWER), model=stranger)
    raises(GuardError, lambda: scorer.batch(model, [generation]))


def scorer_leaves_the_random_state_alone(scorer: Scorer, model: Any) -> None:
    before = torch.get_rng_state()
    scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])
    assert torch.equal(before, torch.get_rng_state())


def scorer_leaves_no_gradient_behind(scorer: Scorer, model: Any) -> None:
    scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])
    assert all(parameter.grad is None for parameter in model.model.parameters())


def scorer_works_where_the_caller_has_switched_gradients_off(scorer: Scorer, model: Any) -> None:
    expected = scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])[0].scores
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = scorer.batch(model, [model.read(QUESTION, answer=ANSWER)])[0].scores
        assert_close(found, expected)


def scorer_gives_each_thread_its_own(scorer: Scorer, model: Any) -> None:
    answers = [model.read(QUESTION, answer=each) for each in (ANSWER, "no", "Lyon?", "Rome")]
    expected = [dict(scorer.batch(model, [each])[0].scores) for each in answers]
    found = in_threads([lambda each=each: dict(scorer.batch(model, [each])[0].scores) for each in answers])
    assert found == expected


# ------------------------------------------------------------------------------------------------------ policies

SCORER = ScorerIdentity(name="hybridgrad", version="1")
NUMBERS = ("semgrad", "paragrad", "exgrad", "hybridgrad", "mean_token_entropy", "mean_nll", "sequence_nll")


def verdict(level: float, confidence: float | None = None) -> Verdict:
    """A scored verdict whose every number is ``level``."""
    score = Score(status="scored", scorer=SCORER, scores=dict.fromkeys(NUMBERS, level))
    return Verdict(score=score, confidence=confidence)


UNSCORABLE = Verdict(score=Score.unscorable("the answer is empty", scorer=SCORER))
FAILED = Verdict(score=Score.failed("the gradient is not finite", scorer=SCORER))
VERDICTS = [
    *(verdict(level, confidence) for level in (0.0, 1e-4, 1.0, 1e9) for confidence in (None, 0.0, 0.5, 0.79, 1.0)),
    UNSCORABLE,
    FAILED,
]
SITUATIONS = [Situation(), Situation(attempt=3, rules=("retry_below",) * 2, seconds=1.0), Situation(attempt=999)]


def policy_is_a_policy(policy: Any) -> None:
    assert isinstance(policy, Policy)


def policy_always_decides(policy: Policy) -> None:
    assert all(isinstance(policy(each, at), Decision) for each in VERDICTS for at in SITUATIONS)


def policy_gives_a_rule_and_a_reason(policy: Policy) -> None:
    assert all(policy(each, at).rule and policy(each, at).reason for each in VERDICTS for at in SITUATIONS)


def policy_decides_the_same_each_time(policy: Policy) -> None:
    assert all(policy(each, at) == policy(each, at) for each in VERDICTS for at in SITUATIONS)


def policy_describes_itself_in_plain_data(policy: Policy) -> None:
    described = policy.describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def policy_describes_itself_the_same_after_deciding(policy: Policy) -> None:
    before = policy.describe()
    policy(VERDICTS[0], SITUATIONS[0])
    assert policy.describe() == before


def policy_accepts_an_answer_without_a_score_only_if_it_says_so(policy: Policy) -> None:
    described = json.dumps(policy.describe())
    for each, word in ((UNSCORABLE, "on_unscorable"), (FAILED, "on_error")):
        if f'"{word}": "accept"' not in described:
            assert policy(each, Situation()).action != "accept"


def policy_says_so_where_it_accepts_without_a_score(policy: Policy) -> None:
    for each in (UNSCORABLE, FAILED):
        decision = policy(each, Situation())
        assert decision.action != "accept" or "unscored" in decision.reason


def policy_that_needs_a_confidence_accepts_nothing_without_one(policy: Policy) -> None:
    if getattr(policy, "needs_confidence", False):
        described = json.dumps(policy.describe())
        if '"above"' not in described and '"Accept"' not in described:
            assert policy(verdict(0.0, None), Situation()).action != "accept"


def policy_ends(policy: Policy) -> None:
    """However uncertain every draft is, the wish for another one comes to an end by itself."""
    rules: list[str] = []
    for attempt in range(1, 100):
        decision = policy(verdict(1e9, 0.0), Situation(attempt=attempt, rules=tuple(rules)))
        rules.append(decision.rule)
        if decision.action not in ("retry", "retrieve"):
            return
    raise AssertionError("99 attempts, and it wants another")


def policy_gives_each_thread_its_own(policy: Policy) -> None:
    expected = [policy(each, Situation()) for each in VERDICTS]
    assert in_threads([lambda each=each: policy(each, Situation()) for each in VERDICTS]) == expected


# --------------------------------------------------------------------------------------------------------- sinks


def record(**changes: Any) -> AuditRecord:
    """A record as the guard makes them."""
    fields: dict[str, Any] = {
        "request_id": "r1",
        "model": {"name": "m", "fingerprint": "f", "dtype": "float32", "template": "t"},
        "scorer": {"name": "hybridgrad", "version": "1", "settings": {}},
        "status": "scored",
        "scores": {"hybridgrad": 1e-4},
        "policy": {"id": "p", "version": 1, "hash": "h"},
        "decision": "accept",
        "rule": "accept_all",
        "reason": "because",
        "prompt": [{"role": "user", "content": QUESTION}],
        "answer": ANSWER,
    }
    return AuditRecord(**{**fields, **changes})


Kept = Callable[[Sink], Sequence[AuditRecord]]


def sink_is_a_sink(sink: Any, kept: Kept) -> None:
    assert isinstance(sink, Sink)


def sink_returns_the_records_id(sink: Sink, kept: Kept) -> None:
    given = record()
    assert sink(given) == given.id


def sink_keeps_the_records_in_order(sink: Sink, kept: Kept) -> None:
    given = [record(attempt=attempt) for attempt in (1, 2, 3)]
    for each in given:
        sink(each)
    assert [each.id for each in kept(sink)] == [each.id for each in given]


def sink_keeps_every_field(sink: Sink, kept: Kept) -> None:
    given = record(confidence=0.5, thread_id="t", retrieved=("d1",), reason='"quoted", ünïcode \U0001f600')
    sink(given)
    place = {"seq": None, "prev": None, "hash": None}
    assert {**kept(sink)[-1].to_json_dict(), **place} == {**given.to_json_dict(), **place}


def sink_loses_nothing_between_threads(sink: Sink, kept: Kept) -> None:
    given = [record(request_id=f"r{at}") for at in range(16)]
    in_threads([lambda each=each: sink(each) for each in given])
    assert {each.id for each in kept(sink)} == {each.id for each in given}


# --------------------------------------------------------------------------------------------------------- helpers


def assert_close(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-4, abs_tol=1e-12), (name, found[name], value)


def raises(kind: type[BaseException], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls give when all begin at once, in order."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(at: int) -> None:
        start.wait(10)
        try:
            results[at] = calls[at]()
        except BaseException as error:  # shown by whoever compares the results
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def _checks(prefix: str) -> list[Callable[..., None]]:
    return [each for name, each in sorted(globals().items()) if name.startswith(prefix)]


SCORER_CHECKS = _checks("scorer_")
POLICY_CHECKS = _checks("policy_")
SINK_CHECKS = _checks("sink_")
