"""What a framework is handed, and what it may ask for, whatever framework it is."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from hallucination_guard import Guard
from hallucination_guard.errors import ConfigurationError, GuardError, InputError
from hallucination_guard.guard import KEY, NotAnswered, Replying, verdict_of
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values import Outcome, options_of, tool_choice_of
from hallucination_guard_policies import AbstainBelow, EscalateBelow

DRAFT = "Lyon, as every schoolchild knows."
TOOLS = [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def outcome(answer: str = DRAFT, score: float = 0.9, *, ending: Any = "stop", policy: Any = None) -> Outcome:
    policy = policy or AbstainBelow(score="hybridgrad", limit=0.5)
    model = ScriptedModel(answer, ending=ending)
    return Guard(model, policy=policy, scorer=ScriptedScorer(score))("What is the capital of France?", tools=TOOLS)


def test_an_accepted_answer_is_its_text() -> None:
    reply = Replying()(outcome("Paris.", 0.1))
    assert (reply.text, reply.answered, reply.finish_reason, reply.ended) == ("Paris.", True, "stop", "stop")


def test_an_abstention_is_the_callers_text_and_nothing_of_the_draft() -> None:
    reply = Replying("Pass.")(outcome())
    assert (reply.text, reply.answered, reply.tool_calls, reply.finish_reason) == ("Pass.", False, (), "abstain")
    assert "Lyon" not in repr(reply) + json.dumps(reply.metadata)


def test_an_abstention_may_be_an_error() -> None:
    with pytest.raises(NotAnswered, match="abstain_below") as raised:
        Replying(on_abstain="error")(outcome())
    assert isinstance(raised.value, GuardError)
    assert "Lyon" not in str(raised.value)


def test_the_error_survives_pickling() -> None:
    error = NotAnswered(outcome())
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.outcome.decision) == (str(error), error.outcome.decision)


def test_what_a_human_said_is_an_answer_that_was_not_accepted() -> None:
    policy = EscalateBelow(score="hybridgrad", limit=0.5, to=lambda _: "Paris, says she.")
    reply = Replying(on_abstain="error")(outcome(policy=policy))
    assert (reply.text, reply.answered, reply.finish_reason, reply.ended) == (
        "Paris, says she.",
        True,
        "escalate",
        "stop",
    )


@pytest.mark.parametrize(
    ("answer", "score", "ending", "ended"),
    [
        (CALL, 0.1, "stop", "tool_calls"),
        (CALL, 0.9, "stop", "content_filter"),
        ("Paris", 0.1, "length", "length"),
        ("Paris", 0.1, "stop_text", "stop"),
    ],
)
def test_how_it_ended_in_the_words_of_the_chat_apis(answer: str, score: float, ending: str, ended: str) -> None:
    assert Replying()(outcome(answer, score, ending=ending)).ended == ended


def test_the_metadata_is_the_verdict_and_the_callers_to_change() -> None:
    found = outcome()
    reply = Replying()(found)
    assert reply.metadata == {KEY: verdict_of(found)}
    reply.metadata[KEY]["decision"] = "accept"  # type: ignore[index]
    assert reply.metadata == {KEY: verdict_of(found)}


def test_tokens_are_those_of_every_attempt() -> None:
    found = outcome()
    reply = Replying()(found)
    assert (reply.tokens_in, reply.tokens_out) == (found.tokens["in"], found.tokens["out"])


@pytest.mark.parametrize("settings", [{"on_abstain": "ignore"}, {"abstention": None}])
def test_another_way_of_abstaining_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Replying(**settings)


# ------------------------------------------------------------------------------------------------- what is asked for


def test_settings_have_the_guards_names() -> None:
    asked = {"max_tokens": 5, "stop_sequences": ["\n"], "temperature": 0.5, "seed": None, "other": 1}
    assert options_of(asked) == {"max_new_tokens": 5, "stop": ["\n"], "temperature": 0.5, "other": 1}


def test_a_setting_under_two_names_is_refused() -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        options_of({"max_tokens": 5, "max_completion_tokens": 6})


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_nothing_chooses_among_them(tools: Any) -> None:
    assert options_of({"tools": tools, "tool_choice": "required"}) == {}


def test_a_choice_among_tools_is_in_the_guards_words() -> None:
    assert options_of({"tools": TOOLS, "tool_choice": "any"}) == {"tools": TOOLS, "tool_choice": "required"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "auto"), (False, "auto"), ("auto", "auto"), ("none", "none"), ("any", "required"), (True, "required"),
        ("required", "required"), ("add", "add"), ({"name": "add"}, "add"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
    ],
)  # fmt: skip
def test_every_way_of_saying_tool_choice(given: object, meant: str) -> None:
    assert tool_choice_of(given) == meant


@pytest.mark.parametrize("given", [1, [], {}, {"type": "any"}, {"function": 1}, {"function": {}}])
def test_what_chooses_nothing_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="tool_choice"):
        tool_choice_of(given)
