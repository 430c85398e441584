"""Whatever changes a score changes the identity, within the looks that one call takes; and nothing else does."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import peft
import pytest
import torch
from torch import nn

from hallucination_guard import WhiteBoxModel
from hallucination_guard.model.identity import Fingerprint
from hallucination_guard.testing import tiny_model, tiny_tokenizer

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False}


@pytest.fixture
def white() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(), tiny_tokenizer())


def weight(white: WhiteBoxModel) -> Any:
    return white.model.model.layers[1].mlp.up_proj.weight


def through_data(white: WhiteBoxModel) -> None:
    weight(white).data.mul_(1.01)


def through_numpy(white: WhiteBoxModel) -> None:
    weight(white).detach().numpy()[:] *= 1.01


def in_place(white: WhiteBoxModel) -> None:
    with torch.no_grad():
        weight(white)[3, 3] += 1.0


def other_memory(white: WhiteBoxModel) -> None:
    weight(white).data = weight(white).data * 2


def other_parameter(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight(white).detach() * 2)


def rotary(white: WhiteBoxModel) -> None:
    white.model.model.rotary_emb.inv_freq.mul_(2)


def rotary_through_data(white: WhiteBoxModel) -> None:
    white.model.model.rotary_emb.inv_freq.data *= 2


def forward_hook(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].register_forward_hook(lambda module, args, output: output * 2)


def forward_pre_hook(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].register_full_backward_hook(lambda module, gin, gout: (gin[0] * 2,))


def activation(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].mlp.act_fn = nn.ReLU()


def scaling(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].self_attn.scaling *= 2


def epsilon(white: WhiteBoxModel) -> None:
    white.model.model.norm.variance_epsilon = 0.1


def config(white: WhiteBoxModel) -> None:
    white.model.config.rms_norm_eps = 0.1


def config_in_place(white: WhiteBoxModel) -> None:
    white.model.config.rope_parameters["rope_theta"] = 5.0


def new_module(white: WhiteBoxModel) -> None:
    white.model.model.layers[1].mlp.up_proj = nn.Sequential(white.model.model.layers[1].mlp.up_proj, nn.Tanh())


def forward_of_the_class(white: WhiteBoxModel) -> None:
    kind = type("LlamaMLP", (type(white.model.model.layers[1].mlp),), {})
    white.model.model.layers[1].mlp.__class__ = kind
    white.identity  # noqa: B018  # known, before the library comes that replaces it
    kind.forward = lambda self, x: x


CHANGES = [
    through_data,
    through_numpy,
    in_place,
    other_memory,
    other_parameter,
    rotary,
    rotary_through_data,
    forward_hook,
    forward_pre_hook,
    backward_hook,
    activation,
    scaling,
    epsilon,
    config,
    config_in_place,
    new_module,
    forward_of_the_class,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.fault("model", "{case}", "another identity within the looks of one call: calibrations no longer hold")
def test_a_change_is_seen_within_the_looks_of_one_call(white: WhiteBoxModel, change: Callable[[WhiteBoxModel], None]):
    before = white.identity
    change(white)
    assert any(white.identity != before for _ in range(3))
    assert Fingerprint(white.model)() == white._fingerprint()


def test_a_value_between_the_samples_is_read_when_a_model_is_loaded():
    one, other = tiny_model(), tiny_model()
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    assert Fingerprint(one)() != Fingerprint(other)()


@pytest.mark.fault(
    "model", "one value past torch, between the samples", "found when its part of the memory has its turn"
)
def test_a_value_between_the_samples_is_found_when_its_part_has_its_turn(white: WhiteBoxModel):
    before = white.identity
    weight(white).data[3, 5] += 1.0
    looks = len({each.data_ptr() for each in white.model.state_dict().values()}) + len(list(white.model.buffers()))
    assert any(white.identity != before for _ in range(looks))


def test_what_is_undone_is_the_same_model_again(white: WhiteBoxModel):
    before = white.identity
    handle = white.model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    assert white.identity != before
    handle.remove()
    assert white.identity == before


@pytest.mark.parametrize(
    "same",
    [
        lambda model: model.train(),
        lambda model: model.requires_grad_(False),
        lambda model: setattr(model.config, "_name_or_path", "elsewhere"),
        lambda model: setattr(model, "name_or_path", "elsewhere"),
    ],
)
def test_what_changes_no_score_changes_no_identity(white: WhiteBoxModel, same: Callable[[Any], None]):
    before = white.identity
    same(white.model)
    assert [white.identity for _ in range(3)] == [before] * 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by names that it will drop
class TestAdapters:
    @pytest.fixture
    def tuned(self) -> Any:
        return peft.get_peft_model(tiny_model(), peft.LoraConfig(**LORA)).eval()

    @pytest.fixture
    def white(self, tuned: Any) -> WhiteBoxModel:
        return WhiteBoxModel(tuned, tiny_tokenizer())

    @pytest.mark.fault("model", "a LoRA adapter is switched off", "another identity")
    def test_switched_off_it_is_another_model_and_on_again_the_same(self, tuned: Any, white: WhiteBoxModel):
        before = white.identity
        with tuned.disable_adapter():
            assert white.identity.structure != before.structure
        assert white.identity == before

    @pytest.mark.fault("model", "another LoRA adapter is active", "another identity")
    def test_another_active_adapter_is_another_model(self, tuned: Any, white: WhiteBoxModel):
        tuned.add_adapter("other", peft.LoraConfig(**LORA))
        before = white.identity
        tuned.set_adapter("other")
        assert white.identity != before
        tuned.set_adapter("default")
        assert white.identity == before

    @pytest.mark.fault("model", "the scaling of a LoRA adapter changes", "another identity")
    def test_its_scaling_counts(self, tuned: Any, white: WhiteBoxModel):
        before = white.identity
        tuned.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
        assert white.identity.structure != before.structure

    @pytest.mark.fault("model", "a LoRA adapter is merged", "another identity")
    def test_merged_it_is_another_model(self, tuned: Any, white: WhiteBoxModel):
        before = white.identity
        tuned.merge_adapter()
        assert white.identity.fingerprint != before.fingerprint


def test_a_look_takes_a_small_part_of_reading_all(demo: WhiteBoxModel, pace: float):
    fingerprint = Fingerprint(demo.model)
    began = time.perf_counter()
    fingerprint()
    reading = time.perf_counter() - began
    looks = []
    for _ in range(200):
        began = time.perf_counter()
        fingerprint()
        looks.append(time.perf_counter() - began)
    assert median(looks) < reading / 10 and reading < 5.0 * pace


@pytest.mark.fault("model", "other tokens end an answer", "another identity")
def test_other_tokens_that_end_an_answer_make_another_model():
    one, other = tiny_model(), tiny_model()
    other.generation_config.eos_token_id = [5]
    assert WhiteBoxModel(one, tiny_tokenizer()).identity != WhiteBoxModel(other, tiny_tokenizer()).identity
