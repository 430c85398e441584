"""Rows are read whole or refused, and a prompt names its t*."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.evaluation import Item, Prompting, read_items
from hallucination_guard.evaluation.data import PROMPT, ending, given_judge
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.testing import tiny_model, tiny_tokenizer


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def base() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None), name="base")


class TestRows:
    @pytest.mark.parametrize("query", ["query", "question", "prompt"])
    @pytest.mark.parametrize("answers", ["answers", "truthful answer", "answer"])
    def test_fields_go_by_several_names(self, tmp_path: Path, query: str, answers: str) -> None:
        (item,) = read_items(write(tmp_path, {query: "Who?", answers: ["me", "I"], "language": "en"}))
        assert item == Item(id="1", query="Who?", answers=("me", "I"))

    def test_one_reference_may_be_a_text(self, tmp_path: Path) -> None:
        assert read_items(write(tmp_path, {"query": "Who?", "answer": "me"}))[0].answers == ("me",)

    def test_a_label_needs_no_reference(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"query": "Who?", "response": "me", "label": False, "judge": "human"})
        items = read_items(path)
        assert items[0].correct is False
        assert given_judge(items) == "human"

    def test_without_labels_no_judge_is_given(self, tmp_path: Path) -> None:
        assert given_judge(read_items(write(tmp_path, {"query": "Who?", "answer": "me"}))) is None

    def test_labels_of_two_judges_are_refused(self, tmp_path: Path) -> None:
        rows = [{"query": "Who?", "response": "me", "correct": True, "judge": each} for each in ("ann", "bob")]
        with pytest.raises(InputError, match=r"ann.*bob"):
            given_judge(read_items(write(tmp_path, *rows)))

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ("{", "not JSON"),
            ([1], "list"),
            ({"answers": ["a"]}, "query None"),
            ({"query": " ", "answers": ["a"]}, "query ' '"),
            ({"query": "q"}, "reference answers None"),
            ({"query": "q", "answers": []}, r"reference answers \[\]"),
            ({"query": "q", "answers": [1]}, r"reference answers \[1\]"),
            ({"query": "q", "response": 5, "answers": ["a"]}, "response 5"),
            ({"query": "q", "response": "r", "label": 1}, "label 1"),
            ({"query": "q", "label": True, "answers": ["a"]}, "label True and the response None"),
            ({"query": "q", "response": "r", "label": True, "judge": ""}, "judge ''"),
        ],
    )
    def test_a_row_that_can_not_be_used_is_named(self, tmp_path: Path, row: Any, said: str) -> None:
        good = {"query": "Who?", "answers": ["me"]}
        with pytest.raises(InputError, match=f"line 2 of .*{said}"):
            read_items(write(tmp_path, good, row))

    @pytest.mark.parametrize("more", [{"response": "me"}, {"response": "me", "label": True}])
    def test_rows_of_two_kinds_are_refused(self, tmp_path: Path, more: dict[str, Any]) -> None:
        good = {"query": "Who?", "answers": ["me"]}
        with pytest.raises(InputError, match="some rows"):
            read_items(write(tmp_path, good, {**good, **more}))

    def test_two_rows_of_one_id_are_refused(self, tmp_path: Path) -> None:
        good = {"id": "a", "query": "Who?", "answers": ["me"]}
        with pytest.raises(InputError, match="'a'"):
            read_items(write(tmp_path, good, good))

    def test_an_empty_or_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no questions"):
            read_items(write(tmp_path, ""))
        with pytest.raises(InputError, match="cannot be read"):
            read_items(tmp_path / "none.jsonl")


class TestPrompts:
    def test_the_papers_prompt_is_the_default(self, tiny: WhiteBoxModel) -> None:
        prompting = Prompting.of(tiny)
        assert prompting("Who?") == PROMPT.format(query="Who?")
        assert prompting.question("Who?") is None

    def test_braces_in_a_question_stay(self, tiny: WhiteBoxModel) -> None:
        assert Prompting.of(tiny, template="Q: {query}")("What is {x}?") == "Q: What is {x}?"

    def test_examples_come_first(self, base: WhiteBoxModel) -> None:
        examples = [Item(id="1", query="Who?", answers=("me", "I"))]
        prompting = Prompting.of(base, examples=examples)
        assert prompting("Where?") == "Question: Who?\nAnswer: me\n\nQuestion: Where?\nAnswer:"
        assert prompting.stop == ("\n",)

    @pytest.mark.parametrize(
        "query", ["Where is it?", "Name a river", "Is it true? ", "A", "What do A: and\nAnswer: mean"]
    )
    def test_t_star_is_the_last_token_of_the_question(self, base: WhiteBoxModel, query: str) -> None:
        prompting = Prompting.of(base, examples=[Item(id="1", query="Name a sea", answers=("a river?",))])
        prompt = prompting(query)
        (found,) = base.generate([prompt], max_new_tokens=1, question=prompting.question(query))
        assert found.anchor is not None
        end = len(prompt) + found.anchor.index + 1  # a token a character
        assert prompt[:end].endswith(query.strip())
        assert prompt[end:].strip() == "Answer:"

    def test_questions_that_end_alike_make_one_batch(self, base: WhiteBoxModel) -> None:
        prompting = Prompting.of(base, examples=[Item(id="1", query="Who?", answers=("me",))])
        assert {prompting.question(each) for each in ("Where?", "When was it?")} == {"?"}

    @given(
        st.text("aA: \n", min_size=1).filter(str.strip), st.text("aA: \n", max_size=5), st.text("aA: \n", max_size=5)
    )
    def test_what_is_named_is_found_at_the_end_of_the_question(self, query: str, before: str, after: str) -> None:
        before = f"Q{before}"
        prompt = before + query + after
        found = ending(prompt, query, after=after)
        assert prompt.rfind(found.strip()) + len(found.strip()) == len((before + query).rstrip())

    def test_a_question_that_what_follows_repeats_whole_is_refused(self) -> None:
        with pytest.raises(InputError, match="another prompt"):
            ending("AAnswer", "A", after="Answer")

    def test_a_template_needs_a_place_for_the_question(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(ConfigurationError, match="place"):
            Prompting.of(tiny, template="Who?")

    def test_examples_are_not_for_a_model_with_a_chat_template(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(ConfigurationError, match="chat template"):
            Prompting.of(tiny, examples=[Item(id="1", query="Who?", answers=("me",))])

    def test_an_example_needs_an_answer(self, base: WhiteBoxModel) -> None:
        with pytest.raises(ConfigurationError, match="example"):
            Prompting.of(base, examples=[Item(id="1", query="Who?", response="me", correct=True)])
