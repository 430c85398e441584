"""Batches, threads and tasks: each gets what it would get alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.audit import AuditLog, verify
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard_policies import AbstainBelow, Accept, RetrieveBelow, RetryBelow

QUESTIONS = [
    "Who?",
    "What is the capital of France, and of Spain?",
    "Name a red fruit.",
    "Why not?",
    "When, and where?",
]
NEVER = {"score": "hybridgrad", "limit": 0.0}
POLICIES = {
    "accept": Accept(),
    "retry": RetryBelow(**NEVER, times=2) | Accept(),
    "retrieve": RetrieveBelow(**NEVER, retriever=lambda query: [f"All about {query}"]) | Accept(),
    "threshold": RetryBelow(score="mean_nll", limit=6.0, times=2) | AbstainBelow(score="mean_nll", limit=6.5),
}


def guard_of(model: WhiteBoxModel, policy: Any = None, **settings: Any) -> Guard:
    generation = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1}
    return Guard(model, policy=policy or Accept(), generation=generation, **settings)


def told(outcome: Any) -> tuple[Any, ...]:
    """What an outcome says, without its times, ids and scores."""
    return (
        outcome.text,
        outcome.decision.action,
        outcome.decision.rule,
        outcome.attempts,
        outcome.retrieved,
        outcome.generation.prompt_token_ids,
        outcome.generation.response_token_ids,
    )


def scores(outcome: Any) -> dict[str, float]:
    return dict(outcome.verdict.score.scores)


@pytest.mark.parametrize("name", POLICIES)
class TestABatch:
    def test_says_what_single_calls_say(self, name: str, tiny: WhiteBoxModel) -> None:
        guard = guard_of(tiny, POLICIES[name])
        assert [told(each) for each in guard.batch(QUESTIONS)] == [told(guard(each)) for each in QUESTIONS]

    def test_scores_as_single_calls_score(self, name: str, tiny: WhiteBoxModel) -> None:
        guard = guard_of(tiny, POLICIES[name])
        for together, question in zip(guard.batch(QUESTIONS), QUESTIONS, strict=True):
            assert scores(together) == pytest.approx(scores(guard(question)), rel=1e-4)

    def test_may_be_cut_in_parts(self, name: str, tiny: WhiteBoxModel) -> None:
        whole, parts = (guard_of(tiny, POLICIES[name], batch_size=size) for size in (8, 2))
        assert [told(each) for each in parts.batch(QUESTIONS)] == [told(each) for each in whole.batch(QUESTIONS)]

    async def test_says_the_same_from_a_task(self, name: str, tiny: WhiteBoxModel) -> None:
        guard = guard_of(tiny, POLICIES[name])
        assert [told(each) for each in await guard.abatch(QUESTIONS)] == [told(guard(each)) for each in QUESTIONS]


def test_a_prompt_near_the_end_of_the_context_does_not_shorten_its_neighbours_answer() -> None:
    white = WhiteBoxModel(tiny_model(max_position_embeddings=80), tiny_tokenizer())
    guard = guard_of(white)
    prompts = ["Who?", "x" * 45]
    assert [told(each) for each in guard.batch(prompts, max_new_tokens=30)] == [
        told(guard(each, max_new_tokens=30)) for each in prompts
    ]


def test_the_same_question_twice_in_a_batch_is_answered_twice_the_same(tiny: WhiteBoxModel) -> None:
    first, second = guard_of(tiny).batch(["Who?", "Who?"])
    assert told(first) == told(second)


def test_a_batch_has_as_many_outcomes_as_prompts_in_order() -> None:
    questions = [f"Q{at}" for at in range(20)]
    guard = Guard(
        ScriptedModel({each: f"A{each}" for each in questions}),
        policy=Accept(),
        scorer=ScriptedScorer(1.0),
        batch_size=3,
    )
    assert [each.text for each in guard.batch(questions)] == [f"A{each}" for each in questions]


def test_a_batch_whose_calls_take_different_ways_keeps_them_apart() -> None:
    answers = {"a": ["bad", "good"], "b": ["good"], "c": ["bad", "worse", "worst"]}
    guard = Guard(
        ScriptedModel(answers),
        policy=RetryBelow(score="hybridgrad", limit=1.0, times=2),
        scorer=ScriptedScorer({"bad": 2.0, "worse": 3.0, "worst": 4.0, "good": 0.5}),
    )
    assert [(each.text, each.attempts) for each in guard.batch(["a", "b", "c"])] == [
        ("good", 2),
        ("good", 1),
        (None, 3),
    ]


class TestManyAtOnce:
    def test_threads_get_what_they_would_get_alone(self, tiny: WhiteBoxModel) -> None:
        guard = guard_of(tiny, POLICIES["retry"])
        alone = [guard(each) for each in QUESTIONS]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(guard, QUESTIONS * 4))
        assert [(told(each), scores(each)) for each in found] == [(told(each), scores(each)) for each in alone] * 4

    async def test_tasks_get_what_they_would_get_alone(self, tiny: WhiteBoxModel) -> None:
        guard = guard_of(tiny, POLICIES["retrieve"])
        alone = [guard(each) for each in QUESTIONS]
        found = await asyncio.gather(*(guard.acall(each) for each in QUESTIONS * 3))
        assert [told(each) for each in found] == [told(each) for each in alone] * 3
        for together, single in zip(found, alone * 3, strict=True):  # they were decoded and scored as batches
            assert scores(together) == pytest.approx(scores(single), rel=1e-4)

    def test_guards_of_one_model_do_not_meet(self, tiny: WhiteBoxModel) -> None:
        guards = [guard_of(tiny, policy) for policy in POLICIES.values()]
        alone = [told(guard("Who?")) for guard in guards]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda guard: told(guard("Who?")), guards * 4)) == alone * 4

    def test_every_attempt_of_every_thread_is_in_the_log(self, tiny: WhiteBoxModel, tmp_path: Any) -> None:
        log = AuditLog(tmp_path / "audit.jsonl", fsync=False)
        guard = guard_of(tiny, POLICIES["retry"], audit=log)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(guard, QUESTIONS))
        log.close()
        found = verify(log.path)
        assert (found.ok, found.records) == (True, 3 * len(QUESTIONS))

    async def test_a_cancelled_task_leaves_its_record(self) -> None:
        import threading

        sink, begun, go_on = MemorySink(), threading.Event(), threading.Event()

        def wait(generation: Any) -> float:
            begun.set()
            go_on.wait(10)
            return 1.0

        guard = Guard(ScriptedModel("a"), policy=Accept(), scorer=ScriptedScorer(wait), audit=sink)
        task = asyncio.create_task(guard.acall("Q?"))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        for _ in range(500):
            if sink.records:
                break
            await asyncio.sleep(0.01)
        assert len(sink.records) == 1
