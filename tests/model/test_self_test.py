"""A model whose gradient cannot be trusted is refused on loading, and a score of nothing is no score."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.errors import GuardError, ScoringError, SelfTestFailed
from hallucination_guard.scoring import HybridGrad, Likelihood, SemGrad
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard_policies import Accept

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None and _spec.loader is not None
reference = sys.modules.setdefault("reference", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(reference)


class Factor(torch.autograd.Function):
    """The identity, whose gradient is ``factor`` times what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


class Around(nn.Module):
    """A linear layer, and what is done to its output."""

    def __init__(self, linear: nn.Module, change: Any) -> None:
        super().__init__()
        self.linear, self.change = linear, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x))


def with_linears(change: Any, layers: range = range(6)) -> Any:
    model = tiny_model()
    for at in layers:
        layer = model.model.layers[at]
        for parent, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            setattr(parent, name, Around(getattr(parent, name), change))
    return model


def after_layer(at: int, change: Any) -> Any:
    """A model that does ``change`` to all that leaves one layer."""
    model = tiny_model()
    model.model.layers[at].register_forward_hook(lambda _module, _arguments, out: change(out))
    return model


def wrapped(model: Any) -> WhiteBoxModel:
    return WhiteBoxModel(model, tiny_tokenizer())


class TestRefused:
    def test_linear_layers_that_detach(self) -> None:
        with pytest.raises(SelfTestFailed):
            wrapped(with_linears(Tensor.detach))

    @pytest.mark.parametrize("at", [3, 4, 5])
    def test_a_layer_that_detaches_everything(self, at: int) -> None:
        if at == 3:  # its output is where the leaf of h₄ is added: nothing deep is cut
            wrapped(after_layer(at, Tensor.detach))
            return
        with pytest.raises(SelfTestFailed):
            wrapped(after_layer(at, Tensor.detach))

    @pytest.mark.parametrize("at", [4, 5])
    def test_a_layer_whose_backward_is_nil(self, at: int) -> None:
        with pytest.raises(SelfTestFailed):
            wrapped(after_layer(at, lambda out: Factor.apply(out, 0.0)))

    @pytest.mark.parametrize("at", [4, 5])
    def test_a_layer_whose_backward_is_too_small(self, at: int) -> None:
        with pytest.raises(SelfTestFailed, match="finite difference"):
            wrapped(after_layer(at, lambda out: Factor.apply(out, 0.5)))

    @pytest.mark.parametrize("at", [4, 5])
    def test_a_layer_whose_backward_is_not_a_number(self, at: int) -> None:
        with pytest.raises(SelfTestFailed, match="not finite"):
            wrapped(after_layer(at, lambda out: Factor.apply(out, float("nan"))))

    def test_a_layer_that_gives_not_a_number(self) -> None:
        with pytest.raises(SelfTestFailed):
            wrapped(after_layer(4, lambda out: out * float("nan")))

    @pytest.mark.parametrize("change", [lambda u: 2 * u, lambda u: u + u.mean(), torch.tanh], ids=["×", "+", "tanh"])
    def test_a_head_that_does_more_than_is_known(self, change: Any) -> None:
        from transformers import LlamaForCausalLM

        class Odd(LlamaForCausalLM):
            def forward(self, *arguments: Any, **settings: Any) -> Any:
                out = super().forward(*arguments, **settings)
                out.logits = change(out.logits)
                return out

        model = tiny_model()
        model.__class__ = Odd
        with pytest.raises(SelfTestFailed, match="logits"):
            wrapped(model)

    def test_a_head_whose_module_does_more_than_its_matrix(self) -> None:
        model = tiny_model()
        model.lm_head.register_forward_hook(lambda _module, _arguments, out: 3 * out)
        with pytest.raises(SelfTestFailed, match="logits"):
            wrapped(model)

    @pytest.mark.parametrize("layers", [1, 2])
    def test_too_few_layers(self, layers: int) -> None:
        with pytest.raises(SelfTestFailed, match="layers"):
            wrapped(tiny_model(num_hidden_layers=layers))

    def test_as_an_error_of_this_package(self) -> None:
        assert issubclass(SelfTestFailed, GuardError)


def scaled(kind: str, **settings: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **settings))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


ACCEPTED = {
    "cohere": lambda: scaled("Cohere", logit_scale=0.3),
    "granite": lambda: scaled("Granite", logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "gemma2": lambda: tiny_model("gemma2", final_logit_softcapping=3.0),
    "olmo2": lambda: scaled("Olmo2"),
    "starcoder2": lambda: scaled("Starcoder2", use_bias=True),
    "three layers": lambda: tiny_model(num_hidden_layers=3),
    "seven layers": lambda: tiny_model(num_hidden_layers=7),
    "bfloat16": lambda: tiny_model(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_accepted(name: str) -> None:
    assert wrapped(ACCEPTED[name]()).self_test.gradient_norm > 0


@pytest.mark.parametrize("name", [name for name in ACCEPTED if name != "bfloat16"])
def test_it_is_scored_as_autograd_scores_it(name: str) -> None:
    white = wrapped(ACCEPTED[name]())
    generation = white.generate("Who was it?", max_new_tokens=7, temperature=1.0, seed=3)
    assert generation.anchor is not None
    expected = reference.full_sequence_scores(
        white.model, generation.prompt_token_ids, generation.response_token_ids, generation.anchor.index
    )
    assert dict(HybridGrad()(white, generation).scores) == pytest.approx(expected, rel=2e-4)


class TestAfterLoading:
    def test_a_layer_that_comes_to_detach_is_an_error_and_no_score(self, tiny: WhiteBoxModel) -> None:
        white = wrapped(tiny_model())
        white.model.model.layers[4].register_forward_hook(lambda _module, _arguments, out: out.detach())
        outcome = Guard(white, policy=Accept())("Who?", max_new_tokens=4)
        assert (outcome.text, outcome.verdict.score.status) == (None, "error")

    def test_a_backward_that_comes_to_be_nil_is_an_error_and_no_score(self) -> None:
        white = wrapped(tiny_model())
        white.model.model.layers[5].register_forward_hook(lambda _module, _arguments, out: Factor.apply(out, 0.0))
        outcome = Guard(white, policy=Accept(), scorer=SemGrad())("Who?", max_new_tokens=4, temperature=1.0)
        assert (outcome.text, outcome.verdict.score.status) == (None, "error")

    def test_a_layer_that_comes_to_give_not_a_number_is_an_error_and_no_score(self) -> None:
        white = wrapped(tiny_model())
        with torch.no_grad():
            white.model.model.layers[4].mlp.down_proj.weight.fill_(float("nan"))
        outcome = Guard(white, policy=Accept())("Who?", max_new_tokens=4)
        assert (outcome.text, dict(outcome.verdict.score.scores)) == (None, {})

    def test_another_models_answer_is_refused(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(ScoringError):
            HybridGrad()(tiny, wrapped(tiny_model(seed=1)).read("Who?", answer="Ada"))


class TestTheTrace:
    """What is kept of generating belongs to this answer, and goes when it was scored."""

    @pytest.fixture
    def generation(self, tiny: WhiteBoxModel) -> Any:
        return tiny.generate("Who?", max_new_tokens=6, temperature=1.0, seed=1)

    def kept(self, generation: Any) -> Any:
        return weakref.ref(generation._trace._trace.states)

    def test_is_released_after_scoring(self, tiny: WhiteBoxModel, generation: Any) -> None:
        states = self.kept(generation)
        HybridGrad()(tiny, generation)
        gc.collect()
        assert states() is None

    def test_is_released_after_scoring_without_a_gradient(self, tiny: WhiteBoxModel, generation: Any) -> None:
        states = self.kept(generation)
        Likelihood()(tiny, generation)
        gc.collect()
        assert states() is None

    @pytest.mark.parametrize("answer", ["scored", "refused"])
    def test_does_not_outlive_a_guarded_call(self, answer: str, tiny: WhiteBoxModel) -> None:
        from hallucination_guard.testing import ScriptedScorer

        scorer = HybridGrad() if answer == "scored" else ScriptedScorer(ValueError("no"))
        outcome = Guard(tiny, policy=Accept(), scorer=scorer)("Who?", max_new_tokens=4)
        assert outcome.generation._trace is None or outcome.generation._trace.take() is None

    def test_scoring_twice_gives_the_same(self, tiny: WhiteBoxModel, generation: Any) -> None:
        first, second = (dict(HybridGrad()(tiny, generation).scores) for _ in range(2))
        assert first == pytest.approx(second, rel=1e-4)

    def test_other_layers_than_were_kept_are_not_mixed_up(self, tiny: WhiteBoxModel, generation: Any) -> None:
        read = tiny.read("Who?", answer=generation.response_token_ids)
        official = SemGrad(layers="official")
        assert official(tiny, generation).scores["semgrad"] == pytest.approx(
            official(tiny, read).scores["semgrad"], rel=1e-4
        )

    def test_of_another_answer_is_not_used(self, tiny: WhiteBoxModel, generation: Any) -> None:
        other = tuple(20 + at for at in range(len(generation.response_token_ids)))
        changed = dataclasses.replace(generation, response_token_ids=other)
        expected = dict(HybridGrad()(tiny, tiny.read("Who?", answer=other)).scores)
        assert dict(HybridGrad()(tiny, changed).scores) == pytest.approx(expected, rel=1e-4)

    def test_of_another_prompt_is_not_used(self, tiny: WhiteBoxModel, generation: Any) -> None:
        read = tiny.read("Why?", answer=generation.response_token_ids)
        changed = dataclasses.replace(generation, prompt_token_ids=read.prompt_token_ids)
        expected = dict(HybridGrad()(tiny, read).scores)
        assert dict(HybridGrad()(tiny, changed).scores) == pytest.approx(expected, rel=1e-4)

    def test_of_another_anchor_is_not_used(self, tiny: WhiteBoxModel, generation: Any) -> None:
        anchor = dataclasses.replace(generation.anchor, index=-2)
        changed = dataclasses.replace(generation, anchor=anchor)
        read = dataclasses.replace(tiny.read("Who?", answer=generation.response_token_ids), anchor=anchor)
        expected = HybridGrad()(tiny, read).scores["semgrad"]
        assert HybridGrad()(tiny, changed).scores["semgrad"] == pytest.approx(expected, rel=1e-4)

    def test_of_weights_that_have_changed_since_is_not_used(self) -> None:
        white = wrapped(tiny_model())
        generation = white.generate("Who?", max_new_tokens=6, temperature=1.0, seed=1)
        with torch.no_grad():
            for parameter in white.model.model.layers.parameters():
                parameter.mul_(1.2)
        expected = dict(HybridGrad()(white, white.read("Who?", answer=generation.response_token_ids)).scores)
        try:
            found = dict(HybridGrad()(white, generation).scores)
        except ScoringError:
            return
        assert found == pytest.approx(expected, rel=1e-4)

    def test_a_generation_can_be_pickled_and_copied(self, tiny: WhiteBoxModel, generation: Any) -> None:
        import copy
        import pickle

        assert copy.deepcopy(generation) == pickle.loads(pickle.dumps(generation)) == generation

    def test_a_score_can_be_pickled_and_copied(self, tiny: WhiteBoxModel, generation: Any) -> None:
        import copy
        import pickle

        score = HybridGrad()(tiny, generation)
        assert copy.deepcopy(score) == pickle.loads(pickle.dumps(score)) == score
