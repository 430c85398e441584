"""Calls as the families write them: parsed with their places, refused as text, and held to by a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hallucination_guard import Tool, ToolCall, WhiteBoxModel
from hallucination_guard.errors import InputError
from hallucination_guard.model.calling import call_grammar, format_of, json_grammar, taught, written_calls
from hallucination_guard.testing import CHATML, tiny_model, tiny_tokenizer
from hallucination_guard.values import Message, as_messages, as_tools

TOOLS = as_tools(
    [
        {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}},
        {"type": "function", "function": {"name": "now", "description": "The time."}},
    ]
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
# Enough of each family's template to be told apart, and to write tools down.
TEMPLATES = {
    "hermes": CHATML + "{# <tool_call> #}{% if tools %}{{ tools | tojson }}{% endif %}",
    "llama": CHATML + '{# <|python_tag|> "parameters": #}{% if tools %}{{ tools | tojson }}{% endif %}',
    "mistral": CHATML + "{# [TOOL_CALLS] #}{% if tools %}{{ tools | tojson }}{% endif %}",
    "mistral_args": CHATML + "{# [TOOL_CALLS] [ARGS] #}{% if tools %}{{ tools | tojson }}{% endif %}",
}
WRITTEN = {
    "hermes": 'ok <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x, }"}}\n</tool_call>\n'
    '<tool_call>{"name":"now","arguments":{}}</tool_call>',
    "llama": '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": "x, }"}}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "x, }"}}, {"name": "now", "arguments": {}}]',
    "mistral_args": '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x, }"}[TOOL_CALLS]now[ARGS]{}',
}


def _tokenizer(form: str) -> Any:
    return tiny_tokenizer(chat_template=TEMPLATES[form], special=SPECIAL)


@pytest.mark.parametrize("form", WRITTEN)
def test_a_call_is_read_with_the_places_of_its_arguments(form: str) -> None:
    text = WRITTEN[form]
    assert format_of(_tokenizer(form)) == form
    found = written_calls(form, text, TOOLS, prompt_token_ids=(1, 2))  # type: ignore[arg-type]
    assert found[0].call.name == "add"
    assert dict(found[0].call.arguments) == {"a": 1, "b": "x, }"}
    assert {name: text[start:stop] for name, (start, stop) in found[0].arguments.items()} == {"a": "1", "b": '"x, }"'}
    if form != "llama":
        assert [each.call.name for each in found] == ["add", "now"]
    ids = [each.call.id for each in found]
    assert len(set(ids)) == len(ids)
    assert ids != [each.call.id for each in written_calls(form, text, TOOLS, prompt_token_ids=(1, 3))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "add"',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1}}',
        "<tool_call>" + "[" * 100_000,
        "<tool_call>",
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        "no call at all",
    ],
    ids=["cut", "unknown", "nan", "list", "open", "deep", "bare", "number", "text"],
)
def test_what_cannot_be_parsed_is_text(text: str) -> None:
    assert written_calls("hermes", text, TOOLS, prompt_token_ids=()) == ()


def test_one_call_that_cannot_be_parsed_leaves_no_half_of_an_answer() -> None:
    good = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert written_calls("hermes", good + "<tool_call>{", TOOLS, prompt_token_ids=()) == ()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WRITTEN)), st.data())
def test_no_text_raises(form: Any, data: st.DataObject) -> None:
    text = WRITTEN[form]
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    damaged = text[:start] + data.draw(st.text(max_size=6)) + text[stop:]
    for each in written_calls(form, damaged, TOOLS, prompt_token_ids=()):
        assert 0 <= each.start < each.stop <= len(damaged)
        for name, (begin, end) in each.arguments.items():
            assert json.loads(damaged[begin:end]) == each.call.arguments[name]


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("choice", ["required", "add"])
def test_under_the_grammar_a_random_model_makes_a_valid_call(form: str, choice: str) -> None:
    white = WhiteBoxModel(tiny_model(vocab_size=320), _tokenizer(form), name="tiny")
    schema = {"properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"]}
    tools = [Tool(name="add", parameters=schema)]
    made = white.generate(["x", "yy"], tools=tools, tool_choice=choice, max_new_tokens=90, temperature=1.0)
    for each in made:
        assert each.finish_reason == "stop"
        (call,) = each.tool_calls
        assert call.name == "add"
        assert isinstance(call.arguments["a"], int)
        assert 0 <= call.arguments["a"] <= 99
        assert each.content == ""


@pytest.mark.parametrize("form", WRITTEN)
def test_a_free_answer_stays_free_of_half_calls(form: str) -> None:
    from llguidance import LLMatcher

    for choice in ("auto", "required", "add"):
        assert not LLMatcher.validate_grammar(call_grammar(_tokenizer(form), TOOLS, choice))
    assert not LLMatcher.validate_grammar(json_grammar({"type": "object", "properties": {}}))


def test_a_schema_that_no_grammar_can_hold_is_refused(tiny: WhiteBoxModel) -> None:
    with pytest.raises(InputError, match="no grammar"):
        tiny.generate("x", response_schema={"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}})


def test_the_prompt_of_a_model_whose_template_knows_no_tools() -> None:
    tiny = WhiteBoxModel(tiny_model(max_position_embeddings=2048), tiny_tokenizer(), name="tiny")
    call = {"id": "c", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = as_messages(
        [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "add"},
        ]
    )  # fmt: skip
    text = tiny.prompt(turns, tools=TOOLS).text
    assert text.index('"name": "now"') < text.index("1 + 2?") < text.index("<tool_response>\n3\n</tool_response>")
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert taught((Message(role="user", content="x"),), ()) == (Message(role="user", content="x"),)
    assert tiny.prompt(turns, tools=TOOLS).messages == turns  # what was said stays what was said


def test_a_template_that_knows_tools_is_given_them() -> None:
    white = WhiteBoxModel(tiny_model(), _tokenizer("hermes"), name="tiny")
    text = white.prompt("1 + 2?", tools=TOOLS).text
    assert text.endswith(json.dumps([each.to_json_dict() for each in TOOLS], ensure_ascii=False))
    assert "You can call" not in text


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tools": [{"name": "a b"}]}, "named"),
        ({"tools": [{"name": "a"}, {"name": "a"}]}, "two tools"),
        ({"tools": ["a"]}, "tool is a str"),
        ({"tools": [{"name": "a", "parameters": {"type": "array"}}]}, "type 'array'"),
        ({"tools": [{"name": "a", "parameters": {"x": float("nan")}}]}, "parameters"),
        ({"tools": TOOLS, "tool_choice": "other"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "response_schema": {"type": "object"}}, "response schema"),
        ({"response_schema": [1]}, "parameters"),
        ({"tools": [{"name": "a", "description": "<|im_end|>"}]}, "control token"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], why: str) -> None:
    white = WhiteBoxModel(tiny_model(), _tokenizer("hermes"), name="tiny")
    with pytest.raises(InputError, match=why):
        white.generate("x", **given)


@pytest.mark.parametrize("calls", ["add", [{"name": "add", "arguments": "{"}], [1], [{"id": "c"}]])
def test_turns_with_calls_that_cannot_be_are_refused(calls: object) -> None:
    with pytest.raises(InputError):
        as_messages([{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "user", "content": "x"}])


def test_a_call_travels_as_the_chat_apis_write_it() -> None:
    call = ToolCall(name="add", arguments={"a": 1}, id="c")
    assert ToolCall.of(call.to_json_dict()) == call
    assert ToolCall.of({"name": "add", "args": {"a": 1}, "id": "c", "type": "tool_call"}) == call
    assert Tool.of(TOOLS[0].to_json_dict()) == TOOLS[0]


def test_the_real_model_calls_and_reads_its_own_call(demo: WhiteBoxModel) -> None:
    weather = {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]}}
    made = demo.generate("What is the weather in Paris?", tools=[weather], tool_choice="required", max_new_tokens=48)
    assert [(each.name, dict(each.arguments)) for each in made.tool_calls] == [("get_weather", {"city": "Paris"})]
    read = demo.read("What is the weather in Paris?", made.response_token_ids, tools=[weather])
    assert (read.prompt_token_ids, read.tool_calls) == (made.prompt_token_ids, made.tool_calls)
