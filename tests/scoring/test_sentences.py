"""The sentences of an answer are the spans of its tokens, and together they are its text."""

from __future__ import annotations

import dataclasses
import math
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.errors import InputError, ScoringError
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import BySentence, HybridGrad, Likelihood, score_sentences, semgrad_by_span
from hallucination_guard.scoring.sentences import locate
from hallucination_guard.scoring.states import span_states
from hallucination_guard.values import Score, Sentence
from hallucination_guard.values.text import has_visible

ANSWER = "It was Ada. She wrote it!\nOr not?"
TEXTS = ["It was Ada. ", "She wrote it!\n", "Or not?"]


def test_sentences_are_the_content_in_order(tiny: WhiteBoxModel) -> None:
    made = tiny.read("Who?", answer=ANSWER)
    found = score_sentences(tiny, made)
    assert [each.text for each in found] == TEXTS
    assert [made.content[each.begin : each.end] for each in found] == TEXTS
    assert (found[0].start, found[-1].stop) == (0, len(made.response_token_ids))


def test_scores_are_those_of_the_tokens(tiny: WhiteBoxModel) -> None:
    made = tiny.read("Who?", answer=ANSWER)
    whole, found = HybridGrad()(tiny, made), score_sentences(tiny, made)
    for each in found:
        own = whole.token_logprobs[each.start : each.stop]
        assert each.scores["sequence_nll"] == pytest.approx(-math.fsum(own), rel=1e-4)
        assert each.scores["mean_nll"] == pytest.approx(-math.fsum(own) / len(own), rel=1e-4)
        assert each.scores["max_token_entropy"] == pytest.approx(
            max(whole.token_entropies[each.start : each.stop]), rel=1e-4
        )
    assert math.fsum(each.scores["semgrad_share"] for each in found) == pytest.approx(whole.scores["semgrad"], rel=1e-4)


def test_semgrad_is_that_of_the_span(tiny: WhiteBoxModel) -> None:
    made = tiny.read("Who?", answer=ANSWER)
    found = score_sentences(tiny, made)
    spans = semgrad_by_span(tiny, made, [(each.start, each.stop) for each in found])
    assert [each.scores["semgrad"] for each in found] == pytest.approx([each.semgrad for each in spans], rel=1e-6)


def test_without_a_gradient_the_rest_is_the_same(tiny: WhiteBoxModel) -> None:
    made = tiny.read("Who?", answer=ANSWER)
    for cheap, full in zip(score_sentences(tiny, made, gradient=False), score_sentences(tiny, made), strict=True):
        assert {*full.scores} - {*cheap.scores} == {"semgrad", "semgrad_share"}
        assert all(full.scores[name] == pytest.approx(value, rel=1e-4) for name, value in cheap.scores.items())


@pytest.mark.parametrize("scorer", [HybridGrad(), Likelihood(), HybridGrad(thinking="counted")], ids=str)
def test_beside_a_scorer_they_are_the_same(tiny: WhiteBoxModel, scorer: Any) -> None:
    made = tiny.read("Who?", answer=ANSWER)
    [score] = BySentence(scorer).batch(tiny, [made])
    [bare] = scorer.batch(tiny, [made])
    assert score.scorer == bare.scorer and score.scores == pytest.approx(bare.scores, rel=1e-6)
    for one, other in zip(score.sentences, score_sentences(tiny, made, gradient=False), strict=True):
        assert (one.begin, one.end, one.start, one.stop) == (other.begin, other.end, other.start, other.stop)
        assert all(one.scores[name] == pytest.approx(value, rel=1e-3) for name, value in other.scores.items())


def test_with_a_gradient_it_says_so_in_its_identity() -> None:
    plain, other = BySentence(HybridGrad()), BySentence(HybridGrad(), gradient=True)
    assert plain.identity == other.identity
    assert plain.sentences != other.sentences


def test_thinking_is_no_sentence(tiny: WhiteBoxModel) -> None:
    made = tiny.read("Who?", answer=f"<think>Hm. Who?</think>\n\n{ANSWER}")
    assert made.thinking
    assert [each.text for each in score_sentences(tiny, made, gradient=False)] == TEXTS


@pytest.mark.parametrize("answer", ["", " … "])
def test_nothing_to_measure_is_refused(tiny: WhiteBoxModel, answer: str) -> None:
    with pytest.raises(ScoringError):
        score_sentences(tiny, tiny.read("Who?", answer=answer))


def test_an_answer_that_calls_tools_has_none() -> None:
    from hallucination_guard.testing import tiny_model, tiny_tokenizer

    model = WhiteBoxModel(tiny_model(max_position_embeddings=2048), tiny_tokenizer(), name="tiny")
    tool = {"name": "pay", "parameters": {"properties": {"to": {"type": "string"}}, "required": ["to"]}}
    call = '<tool_call>\n{"name": "pay", "arguments": {"to": "Ana"}}\n</tool_call>'
    made = model.read("x", f"I pay. Now.\n{call}", tools=[tool])
    assert made.tool_calls
    [score] = BySentence(Likelihood()).batch(model, [made])
    assert score.status == "scored" and not score.sentences
    with pytest.raises(ScoringError, match="calls of tools"):
        score_sentences(model, made)


@given(st.lists(st.sampled_from(["A", "b", ".", " ", "\n", ". B", "!?", "\n\n", "…", "1.", " x"]), min_size=1))
def test_they_divide_tokens_and_characters(texts: list[str]) -> None:
    content = "".join(texts)
    if not has_visible(content):
        return
    tokens, characters = locate(texts, 0, content)
    assert all(one[1] == other[0] for one, other in pairwise(tokens))
    assert "".join(content[begin:end] for begin, end in characters) == content
    assert (tokens[0][0], tokens[-1][1]) == (0, len(texts))
    assert all(start < stop for start, stop in tokens)
    assert all(has_visible(content[begin:end]) for begin, end in characters)


def test_a_sentence_is_frozen_and_refuses_what_cannot_be() -> None:
    good = Sentence(start=0, stop=2, begin=0, end=2, text="ab", scores={"x": 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        good.start = 1  # type: ignore[misc]
    for change in (
        {"start": 2},
        {"end": 0},
        {"begin": -1},
        {"text": "abc"},
        {"scores": {}},
        {"scores": {"x": math.nan}},
        {"stop": True},
    ):
        with pytest.raises(ValueError):
            dataclasses.replace(good, **change)  # type: ignore[arg-type]


def test_what_has_no_score_has_no_sentences(tiny: WhiteBoxModel) -> None:
    sentence = Sentence(start=0, stop=2, begin=0, end=2, scores={"x": 1.0})
    with pytest.raises(ValueError):
        dataclasses.replace(Score.failed("because", scorer=HybridGrad().identity), sentences=(sentence,))


def test_those_of_a_long_answer_are_located_at_once(pace: float) -> None:
    text = "The cat sat. " * 8_000
    began = time.process_time()
    _, characters = locate(text, 0, text)  # a token a character
    assert time.process_time() - began < 1.0 * pace
    assert characters[:2] == [(0, 13), (13, 26)] and len(characters) == 8_000


def hidden(tiny: WhiteBoxModel, made: Any, layers: tuple[int, ...]) -> torch.Tensor:
    """The mean over layers of h_l / RMS at each token of the answer, by transformers' own way out (T × d)."""
    ids = torch.tensor([[*made.prompt_token_ids, *made.response_token_ids]])
    with torch.no_grad():
        levels = tiny.model(ids, output_hidden_states=True).hidden_states
    own = torch.stack([levels[each][0, len(made.prompt_token_ids) :].double() for each in layers])
    return (own / own.square().mean(dim=-1, keepdim=True).sqrt()).mean(dim=0)


@pytest.mark.parametrize("gradient", [False, True])
def test_states_are_those_of_its_own_tokens(tiny: WhiteBoxModel, gradient: bool) -> None:
    made = tiny.read("Who?", answer=ANSWER)
    found = score_sentences(tiny, made, gradient=gradient, states=True)
    assert len(found) == 3
    for each in found:
        assert each.states is not None
        own = hidden(tiny, made, each.states.layers)[each.start : each.stop]
        assert each.states.mean == pytest.approx(own.mean(dim=0).tolist(), abs=2e-3)  # float16
        assert each.states.last == pytest.approx(own[-1].tolist(), abs=2e-3)


def test_the_states_of_a_single_sentence_are_those_of_the_answer(tiny: WhiteBoxModel) -> None:
    made = tiny.read("Who?", answer="It was Ada.")
    [score] = BySentence(HybridGrad(), states=True).batch(tiny, [made])
    [sentence] = score.sentences
    assert sentence.states is not None and score.states is not None
    assert sentence.states.layers == score.states.layers
    assert sentence.states.features == pytest.approx(score.states.features, abs=2e-3)


def test_an_answer_that_was_cut_has_states_too(tiny: WhiteBoxModel) -> None:
    """Its last token was drawn and never read."""
    for most in (1, 7):
        made = tiny.generate("Who?", max_new_tokens=most)
        if not has_visible(made.content):
            continue
        for each in score_sentences(tiny, made, gradient=False, states=True):
            assert each.states is not None and all(map(math.isfinite, each.states.features))


def test_what_was_kept_of_drawing_is_read_once(tiny: WhiteBoxModel) -> None:
    """With the states there is one forward more of the deep half, and none over the prompt."""
    tokens = 0

    def count(module: Any, arguments: Any, keywords: Any) -> None:
        nonlocal tokens
        tokens += keywords.get("hidden_states", arguments[0] if arguments else None).shape[1]

    prompt = "Who wrote it, and when, and where was she? " * 4
    seen = {}
    layers = tiny.layout.list_of(tiny.model)
    hooks = [each.register_forward_pre_hook(count, with_kwargs=True) for each in layers]
    try:
        for states in (False, True):
            made = tiny.generate(prompt, max_new_tokens=12)
            tokens = 0
            [score] = BySentence(HybridGrad(), states=states).batch(tiny, [made])
            seen[states] = (tokens, score.scores)
    finally:
        for each in hooks:
            each.remove()
    assert seen[True][0] <= 2 * seen[False][0]
    assert seen[True][1] == pytest.approx(seen[False][1], rel=1e-5)


@pytest.mark.parametrize("span", [(50, 60), (-3, -1), (0, 0), (2, 1)])
def test_a_span_outside_the_answer_is_refused(tiny: WhiteBoxModel, span: tuple[int, int]) -> None:
    made = tiny.read("Who?", answer="It was Ada.")
    with pytest.raises(InputError, match="span"):
        span_states(tiny, made, [span], tiny.deep_layers)


def test_states_are_in_the_identity_only_where_they_are_read() -> None:
    plain, other = BySentence(HybridGrad()), BySentence(HybridGrad(), states=True)
    assert plain.identity == other.identity
    assert dict(plain.sentences.settings) == {"gradient": "False"}
    assert dict(other.sentences.settings) == {"gradient": "False", "layers": "paper", "states": "True"}


def test_the_plain_form_has_no_states(tiny: WhiteBoxModel) -> None:
    [first, *_] = score_sentences(tiny, tiny.read("Who?", answer=ANSWER), gradient=False, states=True)
    assert set(first.to_json_dict()) == {"start", "stop", "begin", "end", "scores"}
