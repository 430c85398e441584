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
    arguments = score_arguments(tiny, made)
    assert [each.name for each in arguments] == [*made.tool_calls[0].arguments]
    spans = semgrad_by_span(tiny, made, [(each.start, each.stop) for each in arguments])
    for each, span in zip(arguments, spans, strict=True):
        own = whole.token_logprobs[each.start : each.stop]
        assert each.scores["sequence_nll"] == pytest.approx(-math.fsum(own), rel=1e-4)
        assert each.scores["semgrad"] == pytest.approx(span.semgrad, rel=1e-4)
    cheap = score_arguments(tiny, made, gradient=False)
    for each, other in zip(cheap, arguments, strict=True):
        assert set(other.scores) - set(each.scores) == {"semgrad"}
        assert each.scores["sequence_nll"] == pytest.approx(other.scores["sequence_nll"], rel=1e-4)


def test_an_answer_without_calls_has_no_arguments(tiny: WhiteBoxModel) -> None:
    assert score_arguments(tiny, tiny.generate("x", max_new_tokens=4)) == ()
