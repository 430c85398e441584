"""On a GPU: loading goes there by itself, in bfloat16, and scores what the CPU scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hallucination_guard import HybridGrad, WhiteBoxModel
from hallucination_guard.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_model_is_loaded_onto_the_gpu_in_bfloat16(folder: Path) -> None:
    model = WhiteBoxModel.from_pretrained(folder)
    assert (model.device.type, model.identity.dtype) == ("cuda", "bfloat16")


def test_float32_scores_are_those_of_the_cpu(folder: Path) -> None:
    there = WhiteBoxModel.from_pretrained(folder, dtype=torch.float32)
    here = WhiteBoxModel(tiny_model(), tiny_tokenizer())
    scores = [dict(HybridGrad()(model, model.read("Who?", answer="it is me")).scores) for model in (there, here)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_a_generation_is_scored_from_its_own_cache(folder: Path) -> None:
    model = WhiteBoxModel.from_pretrained(folder, dtype=torch.float32)
    generation = model.generate("Who?", max_new_tokens=12, temperature=1.0)
    kept = HybridGrad()(model, generation)
    read = HybridGrad()(model, model.read("Who?", answer=generation.response_token_ids))
    assert dict(kept.scores) == pytest.approx(dict(read.scores), rel=1e-3)
