"""A judge labels, or says why not; its name goes with its labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models.fake_chat_models import FakeListChatModel

from hallucination_guard.errors import CallError, ConfigurationError, InputError
from hallucination_guard.evaluation import Contains, Embedding, Judgement, Rouge, llm_judge, rouge_l
from hallucination_guard.evaluation.judges import one_judge

WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=7)


def common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The longest common subsequence by its definition."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        return 1 + of(i + 1, j + 1) if one[i] == other[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


class TestRouge:
    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [
            ("the cat sat on the mat", "the cat is on the mat", 5 / 6),
            ("police killed the gunman", "police kill the gunman", 3 / 4),
            ("police killed the gunman", "the gunman kill police", 2 / 4),
            ("Paris.", "paris", 1.0),
            ("Lyon", "Paris", 0.0),
            ("", "Paris", 0.0),
            ("It is Paris, I think", "Paris", 2 * (1 / 5) * 1 / (1 / 5 + 1)),
        ],
    )
    def test_known_values(self, one: str, other: str, expected: float) -> None:
        assert rouge_l(one, other) == pytest.approx(expected)

    @given(WORDS, WORDS)
    def test_is_the_f_measure_of_the_longest_common_subsequence(self, one: list[str], other: list[str]) -> None:
        found = rouge_l(" ".join(one), " ".join(other))
        shared = common(tuple(one), tuple(other))
        if not shared:
            assert found == 0.0
            return
        precision, recall = shared / len(one), shared / len(other)
        assert found == pytest.approx(2 * precision * recall / (precision + recall))

    def test_one_reference_is_enough(self) -> None:
        judge = Rouge()
        assert judge("?", "in the city of Paris", ["Lyon", "the city of Paris"]).correct is True
        assert judge("?", "in Lyon", ["Paris"]).correct is False

    def test_the_threshold_is_in_the_name(self) -> None:
        assert Rouge().name == "rouge-l>=0.3"
        assert Rouge(threshold=0.5).name == "rouge-l>=0.5"

    @pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
    def test_a_threshold_that_means_nothing_is_refused(self, threshold: float) -> None:
        with pytest.raises(ConfigurationError, match="threshold"):
            Rouge(threshold=threshold)


class _Directions:
    """Texts by direction: the first letter says which."""

    name = "letters"

    def __call__(self, texts: Sequence[str]) -> Any:
        return np.eye(26)[[ord(text[0].lower()) - ord("a") for text in texts]]


class TestEmbedding:
    def test_goes_by_the_most_similar_reference(self) -> None:
        judge = Embedding(embed=_Directions())
        assert judge("?", "Paris", ["Lyon", "Prague"]).correct is True
        assert judge("?", "Paris", ["Lyon"]).correct is False

    def test_an_empty_answer_is_wrong(self) -> None:
        assert Embedding(embed=_Directions())("?", " ", ["Lyon"]).correct is False

    def test_names_model_and_threshold(self) -> None:
        assert Embedding(embed=_Directions(), threshold=0.9).name == "embedding(letters)>=0.9"


class TestLlm:
    @pytest.mark.parametrize(
        ("reply", "correct"), [("yes", True), ("**Yes.**", True), ("No, it does not.", False), (" NO", False)]
    )
    def test_yes_and_no_are_labels(self, reply: str, correct: bool) -> None:
        assert llm_judge(FakeListChatModel(responses=[reply]))("?", "Paris", ["Paris"]).correct is correct

    @pytest.mark.parametrize("reply", ["", "perhaps", "yes and no", "I know nothing", "42"])
    def test_an_unclear_reply_labels_nothing_and_says_so(self, reply: str) -> None:
        found = llm_judge(FakeListChatModel(responses=[reply]))("?", "Paris", ["Paris"])
        assert found.correct is None
        assert repr(reply) in found.problem

    def test_is_shown_question_answer_and_references(self) -> None:
        asked: list[str] = []

        class Chat:
            def invoke(self, text: str) -> str:
                asked.append(text)
                return "yes"

        llm_judge(Chat(), name="me")("Which city {x}?", "Paris", ["Lyon", "Nice"])
        assert all(each in asked[0] for each in ("Which city {x}?", "Paris", "Lyon; Nice"))

    def test_a_chat_model_that_fails_labels_nothing(self) -> None:
        class Chat:
            def invoke(self, text: str) -> str:
                raise TimeoutError("too slow")

        with pytest.raises(CallError, match="too slow"):
            llm_judge(Chat())("?", "Paris", ["Paris"])

    def test_has_a_name(self) -> None:
        assert llm_judge(FakeListChatModel(responses=["yes"])).name == "llm(FakeListChatModel)"

    def test_what_can_not_be_asked_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="asked"):
            llm_judge("gpt")


class TestAll:
    @pytest.mark.parametrize("judge", [Contains(), Rouge(), Embedding(embed=_Directions())])
    def test_without_a_reference_nothing_is_judged(self, judge: Any) -> None:
        with pytest.raises(InputError, match="reference"):
            judge("?", "Paris", ["?!"])

    def test_a_judgement_is_a_label_or_a_problem(self) -> None:
        with pytest.raises(ValueError, match="judgement"):
            Judgement(correct=None)
        with pytest.raises(ValueError, match="judgement"):
            Judgement(correct=True, problem="no")

    def test_labels_of_two_judges_are_not_mixed(self) -> None:
        assert one_judge(["contains", "contains"]) == "contains"
        with pytest.raises(InputError, match="human"):
            one_judge(["contains", "human"])
