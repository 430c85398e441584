"""The scores are what the definitions say, on every architecture, in every path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import ExGrad, HybridGrad, Likelihood, ParaGrad, SemGrad
from hallucination_guard.testing import tiny_model, tiny_tokenizer

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None and _spec.loader is not None
reference = sys.modules.setdefault("reference", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(reference)

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2")
QUESTIONS = ["Who?", "What is the capital of France, and of Spain?", "Name a red fruit."]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def expected(white: WhiteBoxModel, generation: Any, **settings: Any) -> dict[str, float]:
    return reference.full_sequence_scores(
        white.model,
        generation.prompt_token_ids,
        generation.response_token_ids,
        generation.anchor.index,
        **settings,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, id=f"{family}-{str(dtype)[6:]}")
        for family in FAMILIES
        for dtype in TOLERANCE
        # Gemma 2 has no fused attention: in float64 its mask overflows the float32 softmax to "not a number".
        if (family, dtype) != ("gemma2", torch.float64)
    ],
)
class TestEqualsFullSequenceAutograd:
    @pytest.fixture
    def white(self, family: str, dtype: torch.dtype, tied: bool) -> WhiteBoxModel:
        return WhiteBoxModel(tiny_model(family, dtype=dtype, tied=tied), tiny_tokenizer())

    def test_after_generating(self, white: WhiteBoxModel, dtype: torch.dtype) -> None:
        generation = white.generate(QUESTIONS[1], max_new_tokens=9, temperature=1.0, seed=0)
        assert dict(HybridGrad()(white, generation).scores) == pytest.approx(
            expected(white, generation), rel=TOLERANCE[dtype]
        )

    def test_after_reading(self, white: WhiteBoxModel, dtype: torch.dtype) -> None:
        generation = white.read(QUESTIONS[1], answer="Paris, of course")
        assert dict(HybridGrad()(white, generation).scores) == pytest.approx(
            expected(white, generation), rel=TOLERANCE[dtype]
        )

    def test_in_a_generated_batch_of_different_lengths(self, white: WhiteBoxModel, dtype: torch.dtype) -> None:
        generations = white.generate(QUESTIONS, max_new_tokens=12, temperature=1.0, seed=0)
        for score, generation in zip(HybridGrad().batch(white, generations), generations, strict=True):
            assert dict(score.scores) == pytest.approx(expected(white, generation), rel=TOLERANCE[dtype])

    def test_in_a_read_batch_of_different_lengths(self, white: WhiteBoxModel, dtype: torch.dtype) -> None:
        pairs = zip(QUESTIONS, ("no", "Paris and Madrid, I think", "a cherry"), strict=True)
        generations = [white.read(question, answer=answer) for question, answer in pairs]
        for score, generation in zip(HybridGrad().batch(white, generations), generations, strict=True):
            assert dict(score.scores) == pytest.approx(expected(white, generation), rel=TOLERANCE[dtype])


# Norms and softmax compute in float32 inside some models, whatever the weights are: the step is chosen for that.
@pytest.mark.parametrize(("family", "step"), [("llama", 1e-3), ("gemma3", 1e-2), ("gpt2", 1e-3)])
def test_semgrad_is_what_finite_differences_say(family: str, step: float) -> None:
    white = WhiteBoxModel(tiny_model(family, dtype=torch.float64), tiny_tokenizer())
    generation = white.read("Who wrote it?", answer="me")
    score = SemGrad()(white, generation)
    weights = torch.tensor(score.token_entropies, dtype=torch.float64)
    prompt, answer = generation.prompt_token_ids, generation.response_token_ids
    assert generation.anchor is not None
    at, total, count = len(prompt) + generation.anchor.index, 0.0, 0
    for level in white.deep_layers:
        for dimension in range(32):
            move = torch.zeros(32, dtype=torch.float64)
            move[dimension] = step
            up, down = (
                reference.loss_with_moved_state(white.model, prompt, answer, at, level, sign * move, weights)
                for sign in (1, -1)
            )
            total += abs(up - down) / (2 * step)
            count += 1
    assert score.scores["semgrad"] == pytest.approx(total / count, rel=2e-3)


def test_the_anchor_may_be_the_first_or_the_last_token_of_the_prompt() -> None:
    white = WhiteBoxModel(tiny_model(dtype=torch.float64), tiny_tokenizer(chat_template=None))
    for question in ("A", "A question without end?"):
        generation = white.read("A question without end?", answer="yes", question=question)
        assert generation.anchor is not None
        assert generation.anchor.index in (-23, -1)
        assert dict(HybridGrad()(white, generation).scores) == pytest.approx(expected(white, generation), rel=1e-9)


class TestSettings:
    @pytest.fixture
    def white(self) -> WhiteBoxModel:
        return WhiteBoxModel(tiny_model(dtype=torch.float64), tiny_tokenizer())

    def test_official_layers_start_one_earlier(self, white: WhiteBoxModel) -> None:
        generation = white.generate(QUESTIONS[0], max_new_tokens=5, temperature=1.0, seed=0)
        score = SemGrad(layers="official")(white, generation)
        assert score.scores["semgrad"] == pytest.approx(
            expected(white, generation, layers=range(3, 6))["semgrad"], rel=1e-9
        )

    def test_the_mean_is_the_sum_divided_by_the_answers_length(self, white: WhiteBoxModel) -> None:
        generation = white.generate(QUESTIONS[0], max_new_tokens=5, temperature=1.0, seed=0)
        length = len(generation.response_token_ids)
        for scorer in (SemGrad, ParaGrad, ExGrad):
            whole = scorer()(white, generation).scores[scorer.primary]
            assert scorer(reduction="mean")(white, generation).scores[scorer.primary] == pytest.approx(whole / length)

    def test_without_entropy_weights_every_token_counts_the_same(self, white: WhiteBoxModel) -> None:
        generation = white.generate(QUESTIONS[0], max_new_tokens=5, temperature=1.0, seed=0)
        score = SemGrad(weighting="none")(white, generation)
        assert score.scores["semgrad"] == pytest.approx(
            expected(white, generation, weights="none")["semgrad"], rel=1e-9
        )

    def test_the_likelihood_scorer_gives_the_same_numbers_without_a_gradient(self, white: WhiteBoxModel) -> None:
        generation = white.generate(QUESTIONS[1], max_new_tokens=5, temperature=1.0, seed=0)
        cheap, full = Likelihood()(white, generation), HybridGrad()(white, generation)
        assert dict(cheap.scores) == pytest.approx({name: full.scores[name] for name in cheap.scores})


@pytest.mark.parametrize("text", ["", " \n", ".", "...", "\u200b\u200d", "\u202e", "\u0301", "–", "\x07"], ids=ascii)
def test_an_answer_with_nothing_visible_is_unscorable(text: str) -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer(), self_test=False)
    assert HybridGrad()(white, white.read("Who?", answer=text)).status == "unscorable"


@pytest.mark.parametrize("text", ["a", "7", "€", "=", "é", "東", "👍", "(a)"])
def test_a_letter_a_number_or_a_symbol_is_an_answer(text: str) -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer(), self_test=False)
    assert HybridGrad()(white, white.read("Who?", answer=text)).status == "scored"
