"""The stand-ins that users test their guarded programs with."""

from __future__ import annotations

import pytest

from hallucination_guard import Guard
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Score, Scorer
from hallucination_guard_policies import Accept


def test_one_answer_is_given_to_everybody() -> None:
    model = ScriptedModel("x")
    assert [each.text for each in model.generate(["a", "b"])] == ["x", "x"]


def test_answers_are_given_in_order() -> None:
    model = ScriptedModel(["x", "y"])
    assert [model.generate("a").text, model.generate("a").text] == ["x", "y"]


def test_answers_are_given_by_question() -> None:
    model = ScriptedModel({"a": ["x", "y"], "b": "z"})
    assert [model.generate(each).text for each in ("b", "a", "b", "a")] == ["z", "x", "z", "y"]


def test_it_never_makes_an_answer_up() -> None:
    model = ScriptedModel({"a": ["x"]})
    model.generate("a")
    for question in ("a", "b"):
        with pytest.raises(ConfigurationError):
            model.generate(question)


def test_it_remembers_what_it_was_asked() -> None:
    model = ScriptedModel("x")
    model.generate("a", seed=3)
    [(messages, settings)] = model.calls
    assert (messages[0].content, settings) == ("a", {"seed": 3})


def test_it_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError):
        ScriptedModel("x", context=10).prompt("a long question")


def test_it_reads_ids_as_bytes() -> None:
    assert ScriptedModel("x").read("a", answer=[80, 97]).text == "Pa"


def test_its_token_ids_are_the_bytes_of_the_text() -> None:
    assert bytes(ScriptedModel("né").generate("a").response_token_ids).decode() == "né"


def test_the_scorer_is_a_scorer() -> None:
    assert isinstance(ScriptedScorer(1.0), Scorer)


@pytest.mark.parametrize(
    "script", [0.5, [0.5], {"x": 0.5}, lambda generation: 0.5], ids=["number", "list", "by text", "function"]
)
def test_a_score_may_be_scripted_as(script: object) -> None:
    scorer = ScriptedScorer(script)  # type: ignore[arg-type]
    assert scorer(None, ScriptedModel("x").generate("a")).scores["hybridgrad"] == 0.5


def test_words_are_unscorable() -> None:
    assert ScriptedScorer("nothing there")(None, ScriptedModel("x").generate("a")).status == "unscorable"


def test_an_exception_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        ScriptedScorer(ZeroDivisionError())(None, ScriptedModel("x").generate("a"))


def test_a_whole_score_is_given_as_it_is() -> None:
    score = Score.failed("because", scorer=ScriptedScorer(1.0).identity)
    assert ScriptedScorer(score)(None, ScriptedModel("x").generate("a")) is score


@pytest.mark.parametrize("script", [[], {}], ids=["list", "by text"])
def test_an_answer_without_a_scripted_score_is_not_let_through(script: object) -> None:
    guard = Guard(ScriptedModel("x"), policy=Accept(), scorer=ScriptedScorer(script))  # type: ignore[arg-type]
    assert guard("a").text is None
