"""Where a model may come from; nothing is loaded twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import MissingExtra, ModelError
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe() -> Any:
    from transformers import pipeline

    return pipeline("text-generation", model=tiny_model(), tokenizer=tiny_tokenizer(), device="cpu")


def numbers(white: WhiteBoxModel) -> dict[str, float]:
    return dict(HybridGrad()(white, white.read("Who?", answer="Ada")).scores)


class TestFromAFolder:
    def test_it_scores_as_the_model_that_was_saved(self, folder: Path, tiny: WhiteBoxModel) -> None:
        assert numbers(WhiteBoxModel.from_pretrained(folder)) == pytest.approx(numbers(tiny))

    def test_it_has_the_fingerprint_of_the_model_that_was_saved(self, folder: Path, tiny: WhiteBoxModel) -> None:
        assert WhiteBoxModel.from_pretrained(str(folder)).identity.fingerprint == tiny.identity.fingerprint

    def test_the_dtype_may_be_chosen(self, folder: Path) -> None:
        assert WhiteBoxModel.from_pretrained(folder, dtype=torch.float64).identity.dtype == "float64"

    def test_it_may_be_mapped_to_a_device(self, folder: Path, tiny: WhiteBoxModel) -> None:
        white = WhiteBoxModel.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32)
        assert numbers(white) == pytest.approx(numbers(tiny))

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError):
            WhiteBoxModel.from_pretrained(tmp_path)

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError):
            WhiteBoxModel.from_pretrained(tmp_path / "none")


class TestFromGGUF:
    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises((ModelError, MissingExtra)):
            WhiteBoxModel.from_gguf(tmp_path / "none.gguf")

    def test_a_file_that_is_none_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "odd.gguf"
        path.write_bytes(b"not a model")
        with pytest.raises((ModelError, MissingExtra)):
            WhiteBoxModel.from_gguf(path)


class TestFromWhatIsLoaded:
    def test_the_model_handed_in_is_the_model(self) -> None:
        model = tiny_model()
        assert WhiteBoxModel(model, tiny_tokenizer()).model is model

    def test_a_transformers_pipeline_gives_its_model(self, pipe: Any) -> None:
        assert WhiteBoxModel.from_pipeline(pipe).model is pipe.model

    def test_a_langchain_pipeline_gives_its_model(self, pipe: Any) -> None:
        from langchain_huggingface import HuggingFacePipeline

        assert WhiteBoxModel.from_langchain(HuggingFacePipeline(pipeline=pipe)).model is pipe.model

    def test_a_langchain_chat_model_gives_its_model(self, pipe: Any) -> None:
        white = WhiteBoxModel.from_langchain(self.chat(pipe))
        assert white.model is pipe.model

    def test_a_langchain_chat_model_gives_its_tokenizer(self, pipe: Any) -> None:
        assert WhiteBoxModel.from_langchain(self.chat(pipe)).tokenizer is pipe.tokenizer

    def chat(self, pipe: Any) -> Any:
        from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

        return ChatHuggingFace(llm=HuggingFacePipeline(pipeline=pipe), tokenizer=pipe.tokenizer)

    def test_a_langchain_model_that_is_not_local_is_refused(self) -> None:
        from langchain_core.language_models.fake_chat_models import FakeListChatModel

        with pytest.raises(ModelError):
            WhiteBoxModel.from_langchain(FakeListChatModel(responses=["x"]))

    def test_a_wrapper_with_adapters_is_looked_through(self) -> None:
        class Wrapper(torch.nn.Module):
            def __init__(self, base: Any) -> None:
                super().__init__()
                self.base, self.config = base, base.config

            def get_base_model(self) -> Any:
                return self.base

        base = tiny_model()
        assert WhiteBoxModel(Wrapper(base), tiny_tokenizer()).model is base

    def test_an_adapter_inside_a_layer_counts(self) -> None:
        class Adapted(torch.nn.Module):
            """y = W x + B A x, as LoRA does it."""

            def __init__(self, linear: Any) -> None:
                super().__init__()
                self.linear = linear
                generator = torch.Generator().manual_seed(0)
                self.a = torch.nn.Parameter(torch.randn(2, linear.in_features, generator=generator))
                self.b = torch.nn.Parameter(torch.randn(linear.out_features, 2, generator=generator))

            def forward(self, x: Any) -> Any:
                return self.linear(x) + x @ self.a.T @ self.b.T

        plain, adapted, merged = tiny_model(), tiny_model(), tiny_model()
        for model in (adapted, merged):
            attention = model.model.layers[4].self_attn
            wrapped = Adapted(attention.q_proj)
            if model is adapted:
                attention.q_proj = wrapped
            else:
                attention.q_proj.weight.data += wrapped.b.data @ wrapped.a.data
        found, expected, other = (numbers(WhiteBoxModel(each, tiny_tokenizer())) for each in (adapted, merged, plain))
        assert found == pytest.approx(expected, rel=1e-4) and found != pytest.approx(other, rel=1e-4)

    def test_a_compiled_model_is_looked_through(self) -> None:
        class Compiled(torch.nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self._orig_mod = model

        base = tiny_model()
        assert WhiteBoxModel(Compiled(base), tiny_tokenizer()).model is base


class TestIdentity:
    def test_the_same_weights_have_the_same_fingerprint(self) -> None:
        first, second = (WhiteBoxModel(tiny_model(), tiny_tokenizer(), name=name) for name in "ab")
        assert first.identity.fingerprint == second.identity.fingerprint

    @pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": torch.bfloat16}, {"tied": True}], ids=repr)
    def test_other_weights_have_another(self, other: Any, tiny: WhiteBoxModel) -> None:
        white = WhiteBoxModel(tiny_model(**other), tiny_tokenizer())
        assert white.identity.fingerprint != tiny.identity.fingerprint

    def test_weights_that_are_held_in_buffers_count(self) -> None:
        """As those of GPTQ and AWQ are."""

        class Buffered(torch.nn.Module):
            def __init__(self, weight: Any) -> None:
                super().__init__()
                self.register_buffer("qweight", weight)

            def forward(self, x: Any) -> Any:
                return x @ self.qweight.T

        found = []
        for factor in (1.0, 2.0):
            model = tiny_model()
            for layer in model.model.layers:
                layer.mlp.up_proj = Buffered(layer.mlp.up_proj.weight.detach() * factor)
            found.append(WhiteBoxModel(model, tiny_tokenizer()).identity.fingerprint)
        assert found[0] != found[1]

    def test_weights_that_are_offloaded_count(self) -> None:
        from accelerate import cpu_offload

        found = []
        for factor in (1.0, 2.0):
            model = tiny_model()
            with torch.no_grad():
                for parameter in model.model.layers.parameters():
                    parameter.mul_(factor)
            for layer in model.model.layers:
                cpu_offload(layer)
            found.append(WhiteBoxModel(model, tiny_tokenizer()).identity.fingerprint)
        assert found[0] != found[1]

    def test_weights_that_change_afterwards_count(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
        before = white.identity.fingerprint
        with torch.no_grad():
            white.model.model.layers[3].mlp.up_proj.weight.mul_(2.0)
        assert white.identity.fingerprint != before

    def test_a_dtype_that_changes_afterwards_counts(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
        assert white.identity.dtype == "float32"
        white.model.to(torch.bfloat16)
        assert white.identity.dtype == "bfloat16"

    def test_a_head_that_is_replaced_afterwards_is_the_one_that_scores(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer())
        white.model.lm_head.weight = torch.nn.Parameter(white.model.lm_head.weight * 3)
        fresh = WhiteBoxModel(white.model, tiny_tokenizer())
        assert numbers(white) == pytest.approx(numbers(fresh), rel=1e-6)


class TestWhatIsRefused:
    def test_a_model_without_a_head(self) -> None:
        with pytest.raises(ModelError):
            WhiteBoxModel(tiny_model().model, tiny_tokenizer())

    def test_an_encoder_with_a_decoder(self) -> None:
        import transformers

        config = transformers.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=6, num_heads=4)
        with pytest.raises(ModelError):
            WhiteBoxModel(transformers.T5ForConditionalGeneration(config).eval(), tiny_tokenizer())

    def test_something_that_is_no_transformers_model(self) -> None:
        with pytest.raises(ModelError):
            WhiteBoxModel(torch.nn.Linear(2, 2), tiny_tokenizer())

    def test_a_model_that_was_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            model = tiny_model()
        with pytest.raises(ModelError):
            WhiteBoxModel(model, tiny_tokenizer())

    def test_a_head_that_is_not_in_memory(self) -> None:
        model = tiny_model()
        model.lm_head.to("meta")
        with pytest.raises(ModelError, match="head"):
            WhiteBoxModel(model, tiny_tokenizer())

    def test_a_head_of_whole_numbers(self) -> None:
        model = tiny_model()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(320, 32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ModelError, match="head"):
            WhiteBoxModel(model, tiny_tokenizer())
