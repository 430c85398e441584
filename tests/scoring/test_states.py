"""The states that a probe reads, against transformers' own hidden states; alone, together, kept and read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hallucination_guard import WhiteBoxModel
from hallucination_guard.scoring import Cascade, HybridGrad, Likelihood
from hallucination_guard.scoring.states import probed_layers
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values import Generation, Score, States

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2")


def expected(white: WhiteBoxModel, generation: Generation) -> tuple[np.ndarray, np.ndarray]:
    """Mean and last over the answer's tokens, by one forward of transformers; of a cut answer without the last."""
    prompt, answer = generation.prompt_token_ids, generation.response_token_ids
    if generation.finish_reason == "length":
        answer = answer[:-1]
    ids = torch.tensor([(*prompt, *answer)])
    with torch.no_grad():
        hidden = white.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    depth = white.layout.depth
    levels = [hidden[level][0, -len(answer) :].double() for level in probed_layers(white.deep_layers, depth)]
    mixed = torch.stack([each / each.square().mean(dim=-1, keepdim=True).sqrt() for each in levels]).mean(dim=0)
    return mixed.mean(dim=0).numpy(), mixed[-1].numpy()


def states(score: Score) -> States:
    assert score.states is not None
    return score.states


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_models_own_hidden_states(family: str) -> None:
    white = WhiteBoxModel(tiny_model(family), tiny_tokenizer())
    made = white.generate(["Who?", "What is the capital of France?"], max_new_tokens=9, temperature=1.0, seed=3)
    # A stop text ends an answer in the middle of its batch.
    text = made[0].text
    made += white.generate(["Who?"], max_new_tokens=9, temperature=1.0, seed=3, stop=[text[len(text) // 2 :][:2]])
    read = [white.read(each.messages, answer=each.response_token_ids) for each in made]
    kept = HybridGrad().batch(white, made)
    assert {each.finish_reason for each in made} == {"length", "stop_text"}
    for score, generation in zip([*kept, *HybridGrad().batch(white, read)], [*made, *read], strict=True):
        mean, last = expected(white, generation)
        np.testing.assert_allclose(states(score).mean, mean, atol=2e-3)  # float16 has eleven bits
        np.testing.assert_allclose(states(score).last, last, atol=2e-3)
        assert states(score).layers == probed_layers(white.deep_layers, white.layout.depth)


def test_one_token_that_was_never_read_has_the_state_that_predicts_it() -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    [made] = white.generate(["Who?"], max_new_tokens=1, temperature=1.0)
    score = HybridGrad()(white, made)
    if score.status == "scored":
        assert states(score).mean == states(score).last


def test_what_takes_no_gradient_has_none() -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    [made] = white.generate(["Who?"], max_new_tokens=5)
    assert Likelihood()(white, made).states is None
    [made] = white.generate(["Who?"], max_new_tokens=5)
    assert Cascade(cheap="mean_token_entropy", band=(1e6, 1e6))(white, made).states is None


@pytest.mark.parametrize(
    ("layers", "depth", "found"),
    [(range(16, 30), 30, (16, 18, 20, 22)), (range(10, 18), 18, (10, 11, 12, 13)), (range(2, 3), 3, (2,))],
)
def test_the_layers_lie_between_half_and_three_quarters(layers: range, depth: int, found: tuple[int, ...]) -> None:
    assert probed_layers(layers, depth) == found
