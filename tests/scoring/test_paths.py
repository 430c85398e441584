"""Every path to a score gives the score that the definitions say, and the score says which path it took."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hallucination_guard.audit import AuditLog, records
from hallucination_guard.guard import Guard
from hallucination_guard.model import WhiteBoxModel, generating
from hallucination_guard.model.replay import replay
from hallucination_guard.scoring import Cascade, HybridGrad, Likelihood, prompt_sensitivity, semgrad_by_span
from hallucination_guard.scoring.gradients import at_anchor
from hallucination_guard.testing import _SIZES, MemorySink, tiny_model, tiny_tokenizer
from hallucination_guard.values import Generation
from hallucination_guard_policies import Accept

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None and _spec.loader is not None
reference = sys.modules.setdefault("reference", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(reference)

QUESTIONS = ["What is it, and why?", "Who?", "Name a red fruit."]
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": (
        "Lfm2",
        {
            "layer_types": ["conv", "full_attention", "conv", "conv", "conv", "full_attention"],
            "conv_L_cache": 3,
            "block_ff_dim": 64,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "linear attention": (
        "Qwen3Next",
        {
            **_LINEAR,
            "layer_types": [*["linear_attention"] * 3, "full_attention", "linear_attention", "full_attention"],
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "attention beside a state space": ("FalconH1", {**_MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4}),
    "state spaces between attention": (
        "GraniteMoeHybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba", "mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "shared_intermediate_size": 32,
            "num_local_experts": 0,
        },
    ),
}


def hybrid(kind: str) -> WhiteBoxModel:
    import transformers

    name, extra = HYBRIDS[kind]
    config = getattr(transformers, f"{name}Config")(**_SIZES, **extra)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return WhiteBoxModel(model.eval(), tiny_tokenizer())


def expected(white: WhiteBoxModel, generation: Generation) -> Any:
    assert generation.anchor is not None
    scores = reference.full_sequence_scores(
        white.model, generation.prompt_token_ids, generation.response_token_ids, generation.anchor.index
    )
    return pytest.approx(scores, rel=1e-4)


@pytest.fixture(scope="module")
def white() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(), tiny_tokenizer())


def draw(white: WhiteBoxModel, prompt: Any = QUESTIONS[0], **settings: Any) -> Any:
    return white.generate(prompt, max_new_tokens=9, temperature=1.0, seed=0, **settings)


def test_kept_from_generating(white: WhiteBoxModel) -> None:
    generation = draw(white)
    score = HybridGrad()(white, generation)
    assert score.prefix == "kept"
    assert dict(score.scores) == expected(white, generation)


def test_kept_in_a_sliding_window() -> None:
    white = WhiteBoxModel(tiny_model("mistral"), tiny_tokenizer())
    generation = draw(white)
    score = HybridGrad()(white, generation)
    assert score.prefix == "kept"
    assert dict(score.scores) == expected(white, generation)


def test_kept_without_the_logits_where_they_are_rounded() -> None:
    white = WhiteBoxModel(tiny_model(dtype=torch.float64), tiny_tokenizer())
    generation = draw(white)
    assert generation._trace._trace.logits is None
    assert dict(HybridGrad()(white, generation).scores) == expected(white, generation)


def test_kept_without_the_logits_where_they_are_too_many(white: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "most_kept", lambda rows: 4 * 320 * 4)
    generation = draw(white)
    assert generation._trace._trace.logits is None
    score = HybridGrad()(white, generation)
    assert score.prefix == "kept"
    assert dict(score.scores) == expected(white, generation)


def test_the_logits_of_decoding_are_those_of_the_head(white: WhiteBoxModel) -> None:
    generation = draw(white)
    kept = generation._trace._trace
    assert kept.logits is not None
    ids = torch.tensor([[*generation.prompt_token_ids, *generation.response_token_ids]])
    with torch.no_grad():
        own = white.model(ids).logits[0, len(generation.prompt_token_ids) - 1 : -1]
    assert torch.allclose(torch.stack(kept.logits), own, atol=1e-5)


def test_reread_once_it_was_given_away(white: WhiteBoxModel) -> None:
    generation = draw(white)
    HybridGrad()(white, generation)
    score = HybridGrad()(white, generation)
    assert score.prefix == "reread"
    assert dict(score.scores) == expected(white, generation)


def test_reread_of_what_something_else_wrote(white: WhiteBoxModel) -> None:
    generation = white.read(QUESTIONS[0], answer="me or you")
    score = HybridGrad()(white, generation)
    assert score.prefix == "reread"
    assert dict(score.scores) == expected(white, generation)


def test_kept_and_reread_in_one_batch(white: WhiteBoxModel) -> None:
    generations = [*draw(white, QUESTIONS), white.read("Who wrote it?", answer="nobody at all")]
    scores = HybridGrad().batch(white, generations)
    assert [score.prefix for score in scores] == ["kept", "kept", "kept", "reread"]
    for score, generation in zip(scores, generations, strict=True):
        assert dict(score.scores) == expected(white, generation)


def test_the_cascade_where_it_asks_the_gradient(white: WhiteBoxModel) -> None:
    generation = draw(white)
    score = Cascade(band=(0.0, float("inf")))(white, generation)
    assert score.prefix == "kept"
    assert {name: score.scores[name] for name in expected(white, generation).expected} == expected(white, generation)


def test_without_a_gradient_there_is_no_path(white: WhiteBoxModel) -> None:
    assert Likelihood()(white, draw(white)).prefix is None


@pytest.mark.parametrize("kind", HYBRIDS)
class TestALayerThatKeepsNoKeysByPosition:
    def test_after_generating_and_after_reading(self, kind: str) -> None:
        white = hybrid(kind)
        generations = [*draw(white, QUESTIONS), white.read("Who was there?", answer="me or you")]
        scores = [*HybridGrad().batch(white, generations[:3]), HybridGrad()(white, generations[3])]
        for score, generation in zip(scores, generations, strict=True):
            assert score.prefix == "whole"
            assert dict(score.scores) == expected(white, generation)

    def test_by_span_and_by_word(self, kind: str) -> None:
        white = hybrid(kind)
        generation = draw(white)
        whole = HybridGrad()(white, generation).scores["semgrad"]
        spans = semgrad_by_span(white, generation, [(0, 3), (3, len(generation.response_token_ids))])
        assert sum(span.share for span in spans) == pytest.approx(whole, rel=1e-4)
        assert len(prompt_sensitivity(white, generation)) == len(generation.prompt_token_ids)


def test_a_layer_that_overwrites_its_input_is_refused() -> None:
    from hallucination_guard.errors import ModelError

    model = tiny_model()
    layer = model.model.layers[5]

    def spoil(_module: Any, args: Any, kwargs: Any) -> None:
        (args[0] if args else kwargs["hidden_states"]).mul_(1.0)

    layer.register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(ModelError, match="writes into"):
        WhiteBoxModel(model, tiny_tokenizer())


def test_the_log_says_which_path_was_taken(white: WhiteBoxModel, tmp_path: Path) -> None:
    sink = MemorySink()
    Guard(white, policy=Accept(), audit=sink)("Who?")
    Guard(white, policy=Accept(), audit=sink).review("Who?", "me")
    assert [record.prefix for record in sink.records] == ["kept", "reread"]
    with AuditLog(tmp_path / "log.jsonl") as log:
        for record in sink.records:
            log(record)
    assert [record.prefix for record in records(tmp_path / "log.jsonl")] == ["kept", "reread"]


def test_a_record_from_before_the_path_was_logged_can_be_read() -> None:
    from hallucination_guard.audit import AuditRecord

    sink = MemorySink()
    Guard(WhiteBoxModel(tiny_model(), tiny_tokenizer()), policy=Accept(), audit=sink)("Who?")
    old = {key: value for key, value in sink.records[0].to_json_dict().items() if key != "prefix"}
    assert AuditRecord.from_json_dict(old) == replace(sink.records[0], prefix=None)


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)], ids=str)
def test_in_half_precision_within_its_rounding(dtype: torch.dtype, off: float) -> None:
    exact, half = (WhiteBoxModel(tiny_model(dtype=each), tiny_tokenizer()) for each in (torch.float32, dtype))
    wanted, got = (HybridGrad()(each, each.read(QUESTIONS[0], answer="me or you")).scores for each in (exact, half))
    assert dict(got) == pytest.approx(dict(wanted), rel=off)


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e3], ids=["underflow", "as it is", "overflow"])
def test_in_float16_gradients_too_small_or_too_large_for_it_are_not_lost(size: float) -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    white = WhiteBoxModel(model, tiny_tokenizer())
    generation = white.read(QUESTIONS[0], answer="me or you")
    layers = white.deep_layers
    found = []
    for each in (model, tiny_model("gpt2", dtype=torch.float16)):
        other = WhiteBoxModel(each, tiny_tokenizer())
        with torch.enable_grad():
            run = replay(each, other.layout, [other.trace(replace(generation, model=other.identity), layers)], layers)
        upstream = torch.zeros(run.final.shape)
        upstream[0, -len(generation.response_token_ids) :] = size * torch.linspace(-1, 1, 32)
        found.append(at_anchor(run, upstream))
    assert torch.allclose(found[1], found[0], rtol=0.05, atol=0.01 * float(found[0].abs().max()))
