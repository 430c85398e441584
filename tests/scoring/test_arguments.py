"""Arguments of calls: their spans, and numbers that agree with those of the whole answer."""

from __future__ import annotations

import math

import pytest

from hallucination_guard import HybridGrad, WhiteBoxModel, semgrad_by_span
from hallucination_guard.scoring import score_arguments
from hallucination_guard.scoring.arguments import argument_spans
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values import as_tools

TOOLS = as_tools(
    [
        {
            "name": "pay",
            "parameters": {
                "properties": {"to": {"type": "string", "maxLength": 8}, "sum": {"type": "integer", "maximum": 99}},
                "required": ["to", "sum"],
            },
        }
    ]
)


@pytest.fixture(scope="module")
def tiny() -> WhiteBoxModel:
    """A random Llama with room for the tools."""
    return WhiteBoxModel(tiny_model(max_position_embeddings=2048), tiny_tokenizer(), name="tiny")


def test_spans_hold_the_values_and_where_they_end(tiny: WhiteBoxModel) -> None:
    answer = '<tool_call>\n{"name": "pay", "arguments": {"to": "Ana", "sum": 25}}\n</tool_call>'
    made = tiny.read("x", answer, tools=TOOLS)
    (call,) = made.written_calls
    spans = argument_spans([*answer], call)  # one token a character
    assert {name: answer[start:stop] for name, (start, stop) in spans.items()} == {"to": 'Ana"', "sum": "25}"}


def test_scores_are_those_of_the_tokens(tiny: WhiteBoxModel) -> None:
    made = tiny.generate("x", tools=TOOLS, tool_choice="pay", max_new_tokens=200, temperature=1.0, seed=3)
    whole = HybridGrad()(tiny, made)
    arguments = score_arguments(tiny, made, masked="kept")
    assert [each.name for each in arguments] == [*made.tool_calls[0].arguments]
    spans = semgrad_by_span(tiny, made, [(each.start, each.stop) for each in arguments])
    for each, span in zip(arguments, spans, strict=True):
        own = whole.token_logprobs[each.start : each.stop]
        assert each.scores["sequence_nll"] == pytest.approx(-math.fsum(own), rel=1e-4)
        assert each.scores["semgrad"] == pytest.approx(span.semgrad, rel=1e-4)
    cheap = score_arguments(tiny, made, gradient=False, masked="kept")
    for each, other in zip(cheap, arguments, strict=True):
        assert set(other.scores) - set(each.scores) == {"semgrad"}
        assert each.scores["sequence_nll"] == pytest.approx(other.scores["sequence_nll"], rel=1e-4)


def test_an_answer_without_calls_has_no_arguments(tiny: WhiteBoxModel) -> None:
    assert score_arguments(tiny, tiny.generate("x", max_new_tokens=4)) == ()


def test_what_the_grammar_masked_is_left_out(tiny: WhiteBoxModel) -> None:
    made = tiny.generate("x", tools=TOOLS, tool_choice="pay", max_new_tokens=200, temperature=1.0, seed=3)
    kept, left = (score_arguments(tiny, made, masked=each) for each in ("kept", "left_out"))
    cheap = score_arguments(tiny, made, gradient=False)
    for one, other, third in zip(kept, left, cheap, strict=True):
        # Whatever is taken away from the others is shared out.
        assert other.scores["sequence_nll"] <= one.scores["sequence_nll"] + 1e-6
        assert other.scores["sequence_nll"] == pytest.approx(third.scores["sequence_nll"], rel=1e-4)
    (_, number) = left
    closing = number.stop - number.start  # after two digits a number can only end
    assert closing == len(str(number.value)) + 1
    assert any(
        other.scores["sequence_nll"] < one.scores["sequence_nll"] - 0.1 for one, other in zip(kept, left, strict=True)
    )


def test_an_answer_that_was_read_has_no_grammar(tiny: WhiteBoxModel) -> None:
    answer = '<tool_call>\n{"name": "pay", "arguments": {"to": "Ana", "sum": 25}}\n</tool_call>'
    made = tiny.read("x", answer, tools=TOOLS)
    kept, left = (score_arguments(tiny, made, masked=each) for each in ("kept", "left_out"))
    assert kept == left


def test_thinking_does_not_move_the_spans(tiny: WhiteBoxModel) -> None:
    call = '<tool_call>\n{"name": "pay", "arguments": {"to": "Ana", "sum": 25}}\n</tool_call>'
    made = tiny.read("x", f"<think>Hm.</think>{call}", tools=TOOLS)
    gradient, cheap = (score_arguments(tiny, made, gradient=each) for each in (True, False))
    for one, other in zip(gradient, cheap, strict=True):
        assert one.scores["sequence_nll"] == pytest.approx(other.scores["sequence_nll"], rel=1e-4)
