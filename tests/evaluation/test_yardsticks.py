"""Scores of one more pass against closed forms and against their definitions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hallucination_guard.errors import InputError
from hallucination_guard.evaluation.yardsticks import (
    FORWARD,
    Looked,
    boosted,
    look,
    middle_third,
    packed,
    rauq,
    state_layers,
    unpacked,
)
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.testing import tiny_model, tiny_tokenizer

PROMPT, ANSWER = tuple(range(10, 30)), (40, 41, 42, 43)


def by_hand(model: Any) -> tuple[Any, list[Any], list[Any]]:
    """log p_t (T × V), attention by layer (heads × S × S), states by layer (S × d), out of an eager model."""
    with torch.no_grad():
        out = model(torch.tensor([[*PROMPT, *ANSWER]]), output_attentions=True, output_hidden_states=True)
    logp = out.logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1)
    return logp, [each[0].double() for each in out.attentions], [each[0] for each in out.hidden_states]


@pytest.fixture(scope="module")
def eager() -> Any:
    return tiny_model(attn_implementation="eager")


@pytest.fixture(scope="module")
def seen(tiny: WhiteBoxModel) -> Looked:
    return look(tiny, PROMPT, ANSWER)


class TestOnePass:
    def test_self_certainty_is_the_divergence_from_uniform(self, seen: Looked, eager: Any) -> None:
        logp, _, _ = by_hand(eager)
        uniform = torch.full_like(logp, 1 / logp.shape[1])
        divergence = (uniform * (uniform.log() - logp)).sum(-1).mean()
        assert seen.scores["-self_certainty"] == pytest.approx(-float(divergence), rel=1e-5)

    def test_rauq_is_its_definition_written_out(self, seen: Looked, eager: Any) -> None:
        logp, attention, _ = by_hand(eager)
        p = logp.exp()[range(len(ANSWER)), list(ANSWER)]
        scores = []
        for layer in (2, 3, 4):  # of six, counted from 0
            # The state at position P + t − 1 predicts ŷ_t and has read ŷ_{t−1}.
            own = [
                [float(head[len(PROMPT) + t - 1, len(PROMPT) + t - 1]) for t in (1, 2, 3)] for head in attention[layer]
            ]
            best = max(own, key=sum)
            confidence = [float(p[0])]
            for t in (1, 2, 3):
                confidence.append(0.2 * float(p[t]) + 0.8 * best[t - 1] * confidence[-1])
            scores.append(-sum(map(math.log, confidence)) / 4)
        # ⌊6/3⌋ … ⌈12/3⌉ counted from 0 are the third to the fifth layer.
        assert list(middle_third(6)) == [3, 4, 5]
        assert seen.scores["rauq"] == pytest.approx(max(scores), rel=1e-5)

    def test_states_are_those_of_the_answer_tokens(self, seen: Looked, eager: Any) -> None:
        _, _, states = by_hand(eager)
        for at, level in enumerate(state_layers(6)[:-1]):  # behind the last the model puts its norm
            expected = states[level][len(PROMPT) :].numpy()
            assert seen.states[:, at].astype(np.float32) == pytest.approx(expected, rel=1e-2, abs=1e-2)

    def test_all_scores_are_there_for_one_token(self, tiny: WhiteBoxModel) -> None:
        found = look(tiny, PROMPT, ANSWER[:1])
        assert set(found.scores) == set(FORWARD)
        logp = by_hand(tiny_model(attn_implementation="eager"))[0]
        assert found.scores["rauq"] == pytest.approx(-float(logp[0, ANSWER[0]]), rel=1e-5)

    def test_without_an_answer_there_is_nothing(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError, match="no answer"):
            look(tiny, PROMPT, ())

    def test_of_a_sliding_window_and_a_soft_cap(self) -> None:
        model = WhiteBoxModel(tiny_model("gemma2"), tiny_tokenizer(), name="tiny", self_test=False)
        logp, _, _ = by_hand(tiny_model("gemma2", attn_implementation="eager"))
        expected = float((-logp).mean() - math.log(logp.shape[1]))
        assert look(model, PROMPT, ANSWER).scores["-self_certainty"] == pytest.approx(-expected, rel=1e-5)


class TestRauq:
    def test_without_attention_is_the_mean_nll_scaled(self) -> None:
        logprobs = np.log([0.5, 0.25, 0.1])
        # c_1 = p_1 and c_t = α·p_t.
        expected = -float(np.log([0.5, 0.2 * 0.25, 0.2 * 0.1]).mean())
        assert rauq(logprobs, [np.zeros((2, 2))]) == pytest.approx(expected)

    def test_with_alpha_one_is_the_mean_nll(self) -> None:
        logprobs = np.log([0.5, 0.25])
        assert rauq(logprobs, [np.full((2, 1), 0.7)], alpha=1.0) == pytest.approx(-float(logprobs.mean()))

    def test_takes_the_head_that_attends_most_and_the_least_certain_layer(self) -> None:
        logprobs = np.log([0.5, 0.5])
        one = -math.log(0.5)
        weak, strong = 0.2 * 0.5 + 0.8 * 0.1 * 0.5, 0.2 * 0.5 + 0.8 * 0.9 * 0.5
        layers = [np.array([[0.9], [0.1]]), np.array([[0.1], [0.0]])]
        assert rauq(logprobs, layers[:1]) == pytest.approx((one - math.log(strong)) / 2)
        assert rauq(logprobs, layers) == pytest.approx((one - math.log(weak)) / 2)

    @pytest.mark.parametrize("depth", [1, 2, 3, 6, 18, 30, 32])
    def test_the_middle_third_is_within_the_model(self, depth: int) -> None:
        found = middle_third(depth)
        assert found
        assert set(found) <= set(range(1, depth + 1))


class TestBoosted:
    def test_a_dominant_token_has_the_mass_of_all_that_are(self) -> None:
        p = np.array([0.45, 0.44, 0.05, 0.03, 0.03])
        tokens = np.array([7, 3, 1, 0, 2])
        # The leads are .01, .39, .02, 0: the second token ends them; .02 is more than .3 of .05 and than .005.
        assert boosted(0.44, 3, p, tokens) == pytest.approx(0.45 + 0.44 + 0.05)
        assert boosted(0.03, 0, p, tokens) == pytest.approx(0.03)

    def test_where_no_token_leads_each_has_its_own(self) -> None:
        p = np.full(10, 0.1)
        assert boosted(0.1, 0, p, np.arange(10)) == pytest.approx(0.1)

    def test_one_that_leads_alone_is_itself(self) -> None:
        p = np.array([0.99, 0.001, 0.001])
        assert boosted(0.99, 5, p, np.array([5, 6, 7])) == pytest.approx(0.99)


class TestKeeping:
    def test_states_come_back_from_json(self) -> None:
        states = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float16)
        assert np.array_equal(unpacked(packed(states)), states)

    @pytest.mark.parametrize("depth", [1, 6, 10, 18, 30])
    def test_layers_are_spaced_and_end_with_the_last(self, depth: int) -> None:
        found = state_layers(depth)
        assert found[-1] == depth
        assert len(found) == min(depth, 10)
        steps = np.diff(found)
        assert depth < 2 or steps.max() - steps.min() <= 1

    def test_what_is_not_finite_cannot_be_built(self) -> None:
        with pytest.raises(ValueError, match="finite"):
            Looked(scores={"rauq": math.nan}, states=np.zeros((1, 1, 1), dtype=np.float16))
