"""The model handed in is given back as it was, whatever happened; and nothing else of the caller's is touched."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy
import pytest
import torch

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import ModelError
from hallucination_guard.scoring import HybridGrad, Likelihood
from hallucination_guard.testing import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "gemma2", "gpt2")


def state_of(model: Any) -> dict[str, Any]:
    """Everything that could have been changed, by name."""
    found: dict[str, Any] = {
        "config": copy.deepcopy(model.config.to_dict()),
        "generation_config": copy.deepcopy(model.generation_config.to_dict()),
        "generation_config itself": id(model.generation_config),
    }
    for name, module in model.named_modules():
        found[f"{name} is"] = id(module)
        found[f"{name} trains"] = module.training
        found[f"{name} has"] = sorted(module.__dict__)
        found[f"{name} runs"] = module.__dict__.get("forward")
        for attribute, value in module.__dict__.items():
            if "hooks" in attribute and hasattr(value, "keys"):
                found[f"{name}.{attribute}"] = [(key, value[key]) for key in value]
    for name, parameter in model.named_parameters():
        found[f"{name} requires_grad"] = parameter.requires_grad
        found[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.tolist()
        found[f"{name} at"] = (parameter.data_ptr(), parameter._version)
    for name, tensor in (*model.state_dict().items(), *model.named_buffers()):
        found[f"{name} values"] = tensor.tolist()
    return found


def breaking(model: Any) -> None:
    """The third layer from the end raises when it runs."""

    def broken(*_: Any) -> None:
        raise RuntimeError("in the middle")

    model.get_decoder().get_submodule("layers" if hasattr(model.get_decoder(), "layers") else "h")[
        3
    ].register_forward_hook(broken)


def checkpointing(model: Any) -> None:
    # transformers is about to give it the first name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def generating(white: WhiteBoxModel) -> None:
    white.generate(["Who?", "What is it?"], max_new_tokens=4, temperature=1.0, stop=["zzz"])


def reading(white: WhiteBoxModel) -> None:
    white.read("Who?", answer="Ada")


def scoring(white: WhiteBoxModel) -> None:
    HybridGrad().batch(white, [white.read("Who?", answer="Ada"), white.generate("Why?", max_new_tokens=4)])


def likelihood(white: WhiteBoxModel) -> None:
    Likelihood()(white, white.read("Who?", answer="Ada"))


def loading(white: WhiteBoxModel) -> None:
    WhiteBoxModel(white.model, white.tokenizer)


ACTS = [generating, reading, scoring, likelihood, loading]


def named(act: Callable[..., None]) -> str:
    return act.__name__


@pytest.mark.parametrize("act", ACTS, ids=named)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_it_was(family: str, act: Callable[[WhiteBoxModel], None]) -> None:
    white = WhiteBoxModel(tiny_model(family), tiny_tokenizer())
    before = state_of(white.model)
    act(white)
    assert state_of(white.model) == before


@pytest.mark.parametrize("act", ACTS, ids=named)
def test_a_model_in_training_is_as_it_was(act: Callable[[WhiteBoxModel], None]) -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    white.model.train()
    checkpointing(white.model)
    before = state_of(white.model)
    act(white)
    assert state_of(white.model) == before


@pytest.mark.parametrize("act", [generating, scoring, likelihood, loading], ids=named)
def test_the_model_is_as_it_was_after_an_exception_in_the_middle(act: Callable[[WhiteBoxModel], None]) -> None:
    white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    breaking(white.model)
    before = state_of(white.model)
    with pytest.raises(RuntimeError, match="in the middle"):
        act(white)
    assert state_of(white.model) == before


def test_buffers_that_a_long_prompt_changes_are_the_views_own() -> None:
    white = WhiteBoxModel(long_rope(), tiny_tokenizer())
    before = state_of(white.model)
    white.generate("x" * 100, max_new_tokens=4)
    assert state_of(white.model) == before


def test_a_long_prompt_does_not_change_the_scores_of_a_short_one() -> None:
    white = WhiteBoxModel(long_rope(), tiny_tokenizer())
    expected = numbers(white)
    white.generate("x" * 100, max_new_tokens=4)
    assert numbers(white) == pytest.approx(expected, rel=1e-4)


def long_rope() -> Any:
    """A Phi 3 that turns to other frequencies beyond 64 tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    return tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)


def numbers(white: WhiteBoxModel) -> dict[str, float]:
    return dict(HybridGrad()(white, white.read("Who?", answer="Ada, of course")).scores)


class TestWhateverStateTheModelIsIn:
    """Its scores are those of the model in evaluation mode."""

    @pytest.fixture(params=["llama", "gpt2"])
    def family(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def model(self, family: str) -> Any:
        dropout = {"attn_pdrop": 0.5, "resid_pdrop": 0.5} if family == "gpt2" else {"attention_dropout": 0.5}
        return tiny_model(family, **dropout)

    @pytest.fixture
    def expected(self, family: str) -> Any:
        return pytest.approx(numbers(WhiteBoxModel(self.model(family), tiny_tokenizer())), rel=1e-5)

    def test_put_into_training_after_it_was_wrapped(self, family: str, expected: Any) -> None:
        white = WhiteBoxModel(self.model(family), tiny_tokenizer())
        white.model.train()
        assert numbers(white) == expected

    def test_handed_in_while_training(self, family: str, expected: Any) -> None:
        assert numbers(WhiteBoxModel(self.model(family).train(), tiny_tokenizer())) == expected

    def test_generating_while_training(self, family: str) -> None:
        model = self.model(family)
        settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1}
        white = WhiteBoxModel(model, tiny_tokenizer())
        expected = white.generate("Who?", **settings)
        model.train()
        assert white.generate("Who?", **settings).response_token_ids == expected.response_token_ids

    def test_only_one_module_training(self, family: str, expected: Any) -> None:
        white = WhiteBoxModel(self.model(family), tiny_tokenizer())
        list(white.model.get_decoder().modules())[-5].train()
        assert numbers(white) == expected

    def test_with_gradient_checkpointing(self, family: str, expected: Any) -> None:
        white = WhiteBoxModel(self.model(family), tiny_tokenizer())
        white.model.train()
        checkpointing(white.model)
        assert numbers(white) == expected

    def test_with_weights_that_need_no_gradient(self, family: str, expected: Any) -> None:
        white = WhiteBoxModel(self.model(family).requires_grad_(False), tiny_tokenizer())
        assert numbers(white) == expected

    def test_with_inputs_that_require_a_gradient(self, family: str, expected: Any) -> None:
        white = WhiteBoxModel(self.model(family), tiny_tokenizer())
        white.model.enable_input_require_grads()
        assert numbers(white) == expected

    def test_with_a_forward_of_an_inner_modules_own(self) -> None:
        model = tiny_model()
        mlp = model.model.layers[5].mlp
        mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
        white = WhiteBoxModel(model, tiny_tokenizer())
        expected = numbers(white)
        model.train()
        try:
            found = numbers(white)
        except ModelError:  # to say that it cannot be put into evaluation is right too
            return
        assert found == pytest.approx(expected)

    def test_a_forward_of_the_models_own_is_not_ignored(self) -> None:
        """Either the answers are those of the model as the caller runs it, or it is refused."""
        model = tiny_model()
        plain = model.forward

        def forward(*arguments: Any, **settings: Any) -> Any:
            out = plain(*arguments, **settings)
            out.logits = -out.logits
            return out

        model.forward = forward
        with pytest.raises(ModelError):
            WhiteBoxModel(model, tiny_tokenizer())


class TestWhateverModeTheCallerIsIn:
    MODES: ClassVar[dict[str, Any]] = {
        "no grad": torch.no_grad,
        "inference mode": torch.inference_mode,
        "enable grad": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }

    @pytest.mark.parametrize("mode", MODES)
    def test_the_scores_are_the_same(self, mode: str, tiny: WhiteBoxModel) -> None:
        expected = numbers(tiny)
        with self.MODES[mode]():
            assert numbers(tiny) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_model_can_be_wrapped(self, mode: str, tiny: WhiteBoxModel) -> None:
        with self.MODES[mode]():
            white = WhiteBoxModel(tiny.model, tiny.tokenizer)
        assert numbers(white) == numbers(tiny)

    @pytest.mark.parametrize("mode", MODES)
    def test_an_answer_made_in_it_can_be_scored_outside(self, mode: str, tiny: WhiteBoxModel) -> None:
        settings = {"max_new_tokens": 5, "temperature": 1.0, "seed": 1}
        expected = HybridGrad()(tiny, tiny.generate("Who?", **settings)).scores
        with self.MODES[mode]():
            generation = tiny.generate("Who?", **settings)
        assert dict(HybridGrad()(tiny, generation).scores) == pytest.approx(dict(expected), rel=1e-6)


@pytest.mark.parametrize("act", ACTS, ids=named)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_nothing_global_is_touched(act: Callable[[WhiteBoxModel], None], mode: Any, tiny: WhiteBoxModel) -> None:
    with mode():
        before = surroundings()
        act(tiny)
        assert surroundings() == before


def surroundings() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(numpy.random.get_state()),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    ]


def test_the_same_numbers_come_out_whatever_the_default_dtype_is(tiny: WhiteBoxModel) -> None:
    expected = numbers(tiny)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = numbers(tiny)
    finally:
        torch.set_default_dtype(before)
    assert found == pytest.approx(expected, rel=1e-5)


class TestWithAccelerate:
    """Its hooks sit in each module's own forward, and offloaded weights are elsewhere."""

    def test_a_dispatched_model_gives_the_same_scores(self, tiny: WhiteBoxModel) -> None:
        from accelerate import dispatch_model

        model = dispatch_model(tiny_model(), device_map={"": "cpu"}, force_hooks=True)
        assert numbers(WhiteBoxModel(model, tiny_tokenizer())) == pytest.approx(numbers(tiny), rel=1e-6)

    @pytest.mark.parametrize("training", [False, True])
    def test_a_model_with_offloaded_layers_gives_the_same_scores(self, training: bool, tiny: WhiteBoxModel) -> None:
        white = WhiteBoxModel(offloaded(), tiny_tokenizer())
        white.model.train(training)
        try:
            found = numbers(white)
        except ModelError:  # to say that it cannot be put into evaluation is right too
            assert training
            return
        assert found == pytest.approx(numbers(tiny), rel=1e-6)

    def test_a_model_with_offloaded_layers_writes_the_same(self, tiny: WhiteBoxModel) -> None:
        white = WhiteBoxModel(offloaded(), tiny_tokenizer())
        settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1}
        assert white.generate("Who?", **settings).text == tiny.generate("Who?", **settings).text

    def test_a_model_with_offloaded_layers_is_as_it_was(self) -> None:
        white = WhiteBoxModel(offloaded(), tiny_tokenizer())
        before = [(name, str(each.device)) for name, each in white.model.named_parameters()]
        scoring(white)
        assert [(name, str(each.device)) for name, each in white.model.named_parameters()] == before

    def test_threads_on_a_model_with_offloaded_layers_score_as_one_alone(self) -> None:
        white = WhiteBoxModel(offloaded(), tiny_tokenizer())
        expected = numbers(white)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: numbers(white), range(40)))
        assert found == [expected] * 40


def offloaded() -> Any:
    from accelerate import cpu_offload

    model = tiny_model()
    for at in (0, 3, 5):
        cpu_offload(model.model.layers[at])
    return model


def test_threads_with_long_prompts_do_not_change_the_scores_of_short_ones() -> None:
    white = WhiteBoxModel(long_rope(), tiny_tokenizer())
    expected = numbers(white)
    with ThreadPoolExecutor(4) as pool:
        short = []
        for _ in range(40):
            pool.submit(white.generate, "x" * 100, max_new_tokens=3)
            short.append(pool.submit(numbers, white))
        assert [each.result() for each in short] == [expected] * 40
