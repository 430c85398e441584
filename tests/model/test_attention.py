"""Attention weights are those of the model itself, and the model does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hallucination_guard.errors import ModelError
from hallucination_guard.model.attention import plainly_attending
from hallucination_guard.model.view import Layout, undisturbed
from hallucination_guard.testing import tiny_model

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])  # longer than the sliding windows


def seen(model: Any) -> tuple[dict[int, Any], dict[int, Any], Any]:
    weights: dict[int, Any] = {}
    states: dict[int, Any] = {}
    layout = Layout.of(model)
    with undisturbed(model, grad=False):
        view = plainly_attending(model, layout, attention=weights.__setitem__, states=states.__setitem__)
        final = layout.decoder_of(view)(input_ids=IDS, use_cache=False).last_hidden_state
    return weights, states, final


def settings(model: Any) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("family", FAMILIES)
class TestWeights:
    def test_are_those_of_a_model_that_was_loaded_eager(self, family: str) -> None:
        weights, states, final = seen(tiny_model(family))
        eager = tiny_model(family, attn_implementation="eager")
        with torch.no_grad():
            out = eager.get_decoder()(IDS, output_attentions=True, output_hidden_states=True, use_cache=False)
        assert sorted(weights) == sorted(states) == [1, 2, 3, 4, 5, 6]
        for level, expected in enumerate(out.attentions, start=1):
            torch.testing.assert_close(weights[level], expected)
        for level, expected in enumerate(out.hidden_states[1:-1], start=1):
            torch.testing.assert_close(states[level], expected)
        torch.testing.assert_close(final, out.last_hidden_state)

    def test_leave_the_model_as_it_was(self, family: str) -> None:
        model = tiny_model(family)
        with torch.no_grad():
            before = model(IDS, use_cache=False).logits
        before_settings = settings(model)
        modules = {name: (id(module), set(module.__dict__)) for name, module in model.named_modules()}
        seen(model)
        assert {name: (id(module), set(module.__dict__)) for name, module in model.named_modules()} == modules
        assert not any(module._forward_hooks for module in model.modules())
        assert settings(model) == before_settings
        with torch.no_grad():
            assert torch.equal(model(IDS, use_cache=False).logits, before)


def test_a_model_in_training_is_looked_at_in_evaluation() -> None:
    model = tiny_model("gpt2").train()  # has dropout in its attention
    weights, _, _ = seen(model)
    torch.testing.assert_close(weights[3].sum(-1), torch.ones(1, 4, IDS.shape[1]))
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_patched_layer_is_refused() -> None:
    model = tiny_model()
    layer = model.get_decoder().layers[2]
    layer.forward = layer.forward
    with pytest.raises(ModelError, match="forward of its own"):
        plainly_attending(model, Layout.of(tiny_model()), attention=lambda *_: None)
