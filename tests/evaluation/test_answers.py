"""One pass: answered, scored, kept, judged; nothing twice, nothing dropped in silence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard.errors import ConfigurationError, ScoringError
from hallucination_guard.evaluation import (
    P_TRUE,
    Contains,
    Item,
    Judgement,
    Prompting,
    Store,
    answer,
    judge,
    labelled,
    p_true,
)
from hallucination_guard.evaluation.data import PROMPT
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import HybridGrad, Likelihood
from hallucination_guard.testing import ScriptedModel, ScriptedScorer, tiny_model, tiny_tokenizer
from hallucination_guard.values import Generation

QUERIES = ("Who?", "What is the capital of France?", "Why is the sky blue at noon?")
ITEMS = [Item(id=str(at), query=query, answers=("me",)) for at, query in enumerate(QUERIES)]


class TestAnswering:
    def test_a_batch_scores_as_each_question_alone(self, tiny: WhiteBoxModel, tmp_path: Path) -> None:
        store, prompting = Store(tmp_path / "a.jsonl", {}), Prompting.of(tiny)
        answer(tiny, ITEMS, prompting, store, scorer=HybridGrad(), max_new_tokens=6, batch_size=3)
        for item in ITEMS:
            alone = tiny.generate(prompting(item.query), max_new_tokens=6)
            row = store.rows[item.id]
            assert row["response_token_ids"] == list(alone.response_token_ids)
            assert row["scores"] == pytest.approx(HybridGrad()(tiny, alone).scores, rel=1e-3)

    def test_what_generating_kept_is_used(
        self, tiny: WhiteBoxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_again(*_: Any) -> Any:
            raise AssertionError("the prompt was read once more")

        monkeypatch.setattr(tiny, "trace_ids", read_again)
        store = Store(tmp_path / "a.jsonl", {})
        answer(tiny, ITEMS, Prompting.of(tiny), store, scorer=HybridGrad(), max_new_tokens=6)
        assert {row["status"] for row in store.rows.values()} == {"scored"}

    def test_no_question_is_answered_twice(self, tmp_path: Path) -> None:
        model, path = ScriptedModel("me"), tmp_path / "a.jsonl"
        for items in (ITEMS[:2], ITEMS):
            answer(model, items, Prompting.of(model), Store(path, {}), scorer=ScriptedScorer(1.0))
        assert len(model.calls) == 3

    def test_tells_how_far_it_is(self, tmp_path: Path) -> None:
        model, told = ScriptedModel("me"), list[int]()
        store = Store(tmp_path / "a.jsonl", {})
        answer(model, ITEMS, Prompting.of(model), store, scorer=ScriptedScorer(1.0), batch_size=2, done=told.append)
        assert told == [0, 2, 3]

    def test_a_response_is_read_and_not_generated(self, tiny: WhiteBoxModel, tmp_path: Path) -> None:
        item = Item(id="a", query="Who?", response="not me", correct=False)
        store = Store(tmp_path / "a.jsonl", {})
        answer(tiny, [item], Prompting.of(tiny), store, scorer=HybridGrad())
        assert store.rows["a"]["response"] == "not me"
        assert store.rows["a"]["seconds"]["generate"] == 0.0

    def test_a_base_model_stops_at_the_line_and_batches_questions_that_end_alike(self, tmp_path: Path) -> None:
        model = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None), name="base")
        prompting = Prompting.of(model, examples=[Item(id="x", query="Where?", answers=("here",))])
        store = Store(tmp_path / "a.jsonl", {})
        answer(model, ITEMS, prompting, store, scorer=HybridGrad(), max_new_tokens=12)
        assert all("\n" not in row["response"] for row in store.rows.values())
        alone = model.generate(prompting(QUERIES[1]), max_new_tokens=12, question=QUERIES[1], stop=["\n"])
        assert store.rows["1"]["scores"] == pytest.approx(HybridGrad()(model, alone).scores, rel=1e-3)

    def test_a_question_that_fails_is_a_row_with_its_problem_and_ends_nothing(self, tmp_path: Path) -> None:
        def script(generation: Generation) -> Any:
            return ScoringError("semgrad is nan") if "capital" in generation.messages[-1].content else 1.0

        model, store = ScriptedModel("me"), Store(tmp_path / "a.jsonl", {})
        answer(model, ITEMS, Prompting.of(model), store, scorer=ScriptedScorer(script))
        assert [bool(store.rows[item.id]["problem"]) for item in ITEMS] == [False, True, False]
        assert "semgrad is nan" in store.rows["1"]["problem"]

    def test_a_question_whose_t_star_can_not_be_named_is_such_a_row(self, tmp_path: Path) -> None:
        model = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None), name="base", self_test=False)
        prompting, store = Prompting.of(model, template="{query}Answer"), Store(tmp_path / "a.jsonl", {})
        items = [Item(id="odd", query="A", answers=("me",)), *ITEMS]
        answer(model, items, prompting, store, scorer=HybridGrad(), max_new_tokens=4)
        assert [key for key, row in store.rows.items() if row["problem"]] == ["odd"]

    def test_an_error_of_the_program_is_not_swallowed(self, tmp_path: Path) -> None:
        model, store = ScriptedModel("me"), Store(tmp_path / "a.jsonl", {})
        with pytest.raises(RuntimeError, match="out of memory"):
            answer(model, ITEMS, Prompting.of(model), store, scorer=ScriptedScorer(RuntimeError("out of memory")))


class TestJudging:
    def answered(self, folder: Path, texts: Sequence[str]) -> Store:
        store = Store(folder / "answers.jsonl", {})
        model = ScriptedModel(
            {PROMPT.replace("{query}", query): text for query, text in zip(QUERIES, texts, strict=True)}
        )
        answer(model, ITEMS, Prompting.of(model), store, scorer=ScriptedScorer(1.0))
        return store

    def test_labels_travel_with_their_judge(self, tmp_path: Path) -> None:
        answers, verdicts = self.answered(tmp_path, ["me", "you", "it is me"]), Store(tmp_path / "labels.jsonl", {})
        judge(ITEMS, answers, verdicts, Contains())
        labels = {key: row["correct"] for key, row in verdicts.rows.items()}
        scorer, model = ScriptedScorer(1.0).identity, ScriptedModel("me").identity
        rows = labelled(ITEMS, answers, labels, by="contains", model=model, scorer=scorer)
        assert [row.correct for row in rows] == [True, False, True]
        assert {row.judge for row in rows} == {"contains"}

    def test_what_the_judge_can_not_decide_has_no_label(self, tmp_path: Path) -> None:
        class Unsure:
            name = "unsure"

            def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
                return Judgement(correct=None, problem="who knows")

        answers, verdicts = self.answered(tmp_path, ["a", "b", "c"]), Store(tmp_path / "labels.jsonl", {})
        judge(ITEMS, answers, verdicts, Unsure())
        assert {row["correct"] for row in verdicts.rows.values()} == {None}

    def test_no_answer_is_judged_twice(self, tmp_path: Path) -> None:
        asked: list[str] = []

        class Counting:
            name = "counting"

            def __call__(self, query: str, answer: str, references: Sequence[str]) -> Judgement:
                asked.append(query)
                return Judgement(correct=True)

        answers = self.answered(tmp_path, ["a", "b", "c"])
        for items in (ITEMS[:2], ITEMS):
            judge(items, answers, Store(tmp_path / "labels.jsonl", {}), Counting())
        assert asked == list(QUERIES)


class TestPTrue:
    def test_is_the_share_of_the_letters_that_mean_true(self, tiny: WhiteBoxModel) -> None:
        asked = P_TRUE.replace("{query}", "Who?").replace("{answer}", "me")
        # A byte tokenizer writes " A" as two tokens, so one token each can be the reply.
        a, b = (
            math.exp(Likelihood()(tiny, tiny.read(asked, answer=letter)).token_logprobs[0]) for letter in ("A", "B")
        )
        assert p_true(tiny, "Who?", " me ") == pytest.approx(a / (a + b), rel=1e-4)

    def test_braces_in_question_and_answer_are_only_text(self, tiny: WhiteBoxModel) -> None:
        assert 0.0 < p_true(tiny, "Who is {answer}?", "{x}") < 1.0

    def test_a_tokenizer_without_the_letters_is_refused(self, tiny: WhiteBoxModel) -> None:
        from hallucination_guard.evaluation.answers import _first_tokens

        def blind(text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0]}

        with pytest.raises(ConfigurationError, match="first token"):
            _first_tokens(blind)
