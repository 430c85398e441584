"""Isotropic is what its definition says, by plain autograd over the full sequence, and holds next to nothing."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from hallucination_guard.errors import ConfigurationError, ModelError, ScoringError
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import Isotropic, Likelihood
from hallucination_guard.testing import tiny_model, tiny_tokenizer

QUESTIONS = ["Who?", "What is the capital of France, and of Spain?", "Name a red fruit."]
ANSWERS = ["no", "Paris and Madrid", "a cherry"]


def white_box(family: str = "llama", *, tied: bool = False, **sizes: Any) -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(family, dtype=torch.float64, tied=tied, **sizes), tiny_tokenizer())


def probabilities(white: WhiteBoxModel, generation: Any, standing_in: dict[str, Tensor]) -> Tensor:
    """p_t of the answer, with a graph, by the model's own forward pass."""
    prompt, answer = generation.prompt_token_ids, generation.response_token_ids
    ids = torch.tensor([[*prompt, *answer]])
    out = torch.func.functional_call(white.model, standing_in, (ids,), {"use_cache": False}, tie_weights=False)
    return out.logits[0, len(prompt) - 1 : -1].softmax(-1)[range(len(answer)), list(answer)]


def expected(p: Tensor, parameters: list[Tensor], *, chain_rule: bool = False) -> dict[str, float]:
    """The definition, word for word, or with ∇p = p ∇log p in it."""
    squares = []
    for each in p:
        what, factor = (each.log(), each.item()) if chain_rule else (each, 1.0)
        gradients = torch.autograd.grad(what, parameters, retain_graph=True)
        squares.append(factor**2 * sum(float((gradient**2).sum()) for gradient in gradients))
    epistemic = sum(squares) / len(squares)
    aleatoric = float((p * (1 - p)).mean().detach())
    return {
        "isotropic": epistemic + aleatoric,
        "isotropic_epistemic": epistemic,
        "isotropic_aleatoric": aleatoric,
    }


def isotropic(score: Any) -> dict[str, float]:
    return {name: value for name, value in score.scores.items() if name.startswith("isotropic")}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
class TestEqualsAutograd:
    @pytest.mark.parametrize(
        ("family", "sizes"),
        [
            ("llama", {}),
            ("gemma2", {"final_logit_softcapping": 3.0}),  # low enough to bend these logits
            ("gpt2", {}),
        ],
    )
    def test_over_the_head_as_a_variable_of_its_own(self, family: str, sizes: dict[str, Any], tied: bool) -> None:
        white = white_box(family, tied=tied, **sizes)
        generation = white.read(QUESTIONS[1], answer=ANSWERS[1])
        own = white.head.weight.clone().requires_grad_()
        p = probabilities(white, generation, {"lm_head.weight": own})
        assert isotropic(Isotropic()(white, generation)) == pytest.approx(expected(p, [own]), rel=1e-9)

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_over_all_parameters(self, family: str, tied: bool) -> None:
        white = white_box(family, tied=tied)
        generation = white.read(QUESTIONS[1], answer=ANSWERS[1])
        p = probabilities(white, generation, {})
        found = isotropic(Isotropic(parameters="all")(white, generation))
        # The norms of all but GPT-2 compute in float32, whatever the weights are, so a factor p that goes through them
        # is rounded there. In front of the gradient, by the chain rule, it is not.
        exact = 1e-9 if family == "gpt2" else 1e-7
        parameters = list(white.model.parameters())
        assert found == pytest.approx(expected(p, parameters), rel=exact)
        assert found == pytest.approx(expected(p, parameters, chain_rule=True), rel=1e-9)


def test_a_scale_on_the_logits_belongs_to_the_head() -> None:
    white = white_box()
    white.model.config.logit_scale = 0.5
    whole = white.head
    generation = white.read(QUESTIONS[0], answer=ANSWERS[0])
    found = Isotropic()(white, generation).scores["isotropic_epistemic"]
    with torch.no_grad():
        white.model.config.logit_scale = None
        white.model.lm_head.weight *= 0.5
    # The same distribution from W' = W/2 as from W at half scale; and ∂p/∂W = ½ ∂p/∂W'.
    generation = white.read(QUESTIONS[0], answer=ANSWERS[0])
    assert whole.scale == 0.5
    assert found == pytest.approx(Isotropic()(white, generation).scores["isotropic_epistemic"] / 4, rel=1e-9)


@pytest.fixture(params=["head", "all"])
def scorer(request: pytest.FixtureRequest) -> Isotropic:
    return Isotropic(parameters=request.param)


class TestAsAScorer:
    def test_a_batch_gives_what_each_gives_alone(self, scorer: Isotropic) -> None:
        white = white_box()
        generations = [white.read(*pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
        together = [dict(score.scores) for score in scorer.batch(white, generations)]
        assert together == [dict(scorer(white, each).scores) for each in generations]

    def test_a_generated_answer_scores_as_the_same_answer_read(self, scorer: Isotropic) -> None:
        white = white_box()
        drawn = white.generate(QUESTIONS[1], max_new_tokens=6, temperature=1.0, seed=0)
        read = white.read(QUESTIONS[1], answer=drawn.response_token_ids)
        assert dict(scorer(white, drawn).scores) == dict(scorer(white, read).scores)

    def test_it_brings_the_likelihood_scores(self, scorer: Isotropic) -> None:
        white = white_box()
        generation = white.read(QUESTIONS[1], answer=ANSWERS[1])
        found, cheap = scorer(white, generation).scores, Likelihood()(white, generation).scores
        assert {name: found[name] for name in cheap} == pytest.approx(dict(cheap))

    def test_it_needs_no_anchor(self, scorer: Isotropic) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        generation = white.read("Once upon a time", answer="there was")
        assert generation.anchor is None
        assert scorer(white, generation).status == "scored"

    @pytest.mark.parametrize("answer", ["", " \n", [0, 0]], ids=["empty", "white space", "special tokens"])
    def test_an_answer_without_text_is_unscorable(self, scorer: Isotropic, answer: Any, tiny: WhiteBoxModel) -> None:
        assert scorer(tiny, tiny.read(QUESTIONS[0], answer=answer)).status == "unscorable"

    def test_a_number_that_is_not_finite_is_an_error(self, scorer: Isotropic) -> None:
        white = white_box()
        with torch.no_grad():
            white.model.lm_head.weight[5] = float("nan")
        with pytest.raises(ScoringError):
            scorer(white, white.read(QUESTIONS[0], answer=ANSWERS[0]))

    def test_its_identity_says_which_parameters(self, scorer: Isotropic) -> None:
        assert dict(scorer.identity.settings) == {"parameters": scorer.parameters}

    def test_other_parameters_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="lora"):
            Isotropic(parameters="lora")  # type: ignore[arg-type]


class TestTheCallersModel:
    def test_stays_as_it_was(self, scorer: Isotropic) -> None:
        white = white_box(tied=True)
        for at, parameter in enumerate(white.model.parameters()):
            parameter.requires_grad_(at % 2 == 0)
        white.model.train()

        def state() -> list[Any]:
            parameters = [
                (name, id(each), each._version, each.requires_grad, each.grad, each._post_accumulate_grad_hooks)
                for name, each in white.model.named_parameters(remove_duplicate=False)
            ]
            return [parameters, [module.training for module in white.model.modules()]]

        before = state()
        scorer(white, white.read(QUESTIONS[0], answer=ANSWERS[0]))
        assert state() == before

    def test_frozen_parameters_count_as_all_others_do(self, scorer: Isotropic) -> None:
        white = white_box()
        generation = white.read(QUESTIONS[0], answer=ANSWERS[0])
        expected = dict(scorer(white, generation).scores)
        white.model.requires_grad_(False)
        assert dict(scorer(white, generation).scores) == expected

    def test_is_never_seen_with_other_parameters(self, scorer: Isotropic) -> None:
        white = white_box()
        own, seen = {id(each) for each in white.model.parameters()}, []
        handle = white.model.model.norm.register_forward_hook(
            lambda *_: seen.append({id(each) for each in white.model.parameters()})
        )
        scorer(white, white.read(QUESTIONS[0], answer=ANSWERS[0]))
        handle.remove()
        assert seen == [own]

    @pytest.mark.parametrize("trouble", ["quantised", "patched"])
    def test_is_refused_where_not_all_its_parameters_can_be_reached(self, trouble: str) -> None:
        white = white_box()
        if trouble == "quantised":
            white.model.is_quantized = True
        else:
            mlp = white.model.model.layers[0].mlp
            mlp.forward = mlp.forward
        generation = white.read(QUESTIONS[0], answer=ANSWERS[0])
        assert Isotropic()(white, generation).status == "scored"
        with pytest.raises(ModelError, match=trouble if trouble == "quantised" else "forward of its own"):
            Isotropic(parameters="all")(white, generation)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_no_two_parameters_have_a_gradient_at_the_same_time(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    white = white_box(tied=tied)
    gradients: list[weakref.ref[Tensor]] = []
    leaves: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    original = Tensor.register_post_accumulate_grad_hook

    def watched(leaf: Tensor, hook: Any) -> Any:
        def watch(leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradients.append(weakref.ref(leaf.grad))
            alive.append(sum(each() is not None for each in gradients))
            hook(leaf)

        leaves.append(weakref.ref(leaf))
        return original(leaf, watch)

    monkeypatch.setattr(Tensor, "register_post_accumulate_grad_hook", watched)
    generation = white.read(QUESTIONS[0], answer=ANSWERS[0])
    Isotropic(parameters="all")(white, generation)
    count = len(list(white.model.parameters()))
    assert len(alive) == count * len(generation.response_token_ids)
    assert set(alive) == {1}
    assert not any(each() is not None for each in (*gradients, *leaves))
