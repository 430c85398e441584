"""What is lost against float32: the same answers scored with weights of every kind.

    python benchmarks/dtypes.py --questions 16

The demo model answers in float32; every other kind reads those very answers (same tokens) and scores them. Printed are
median and largest relative difference of each score, and the rank correlation of HybridGrad over the answers. Kinds
whose library is not installed are named and left out (torchao, bitsandbytes with accelerate, optimum-quanto).
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import spearmanr

from hallucination_guard import HybridGrad, WhiteBoxModel
from hallucination_guard.demo import shipped
from hallucination_guard.errors import GuardError
from hallucination_guard.model.packaged import converted

SCORES = ("semgrad", "paragrad", "hybridgrad", "mean_token_entropy", "sequence_nll")


def cast(dtype: torch.dtype) -> Callable[[Any], Any]:
    """Weights of another floating-point type."""
    return lambda model: copy.deepcopy(model).to(dtype)


def torchao_int8(model: Any) -> Any:
    """Weight-only int8 of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def quanto(kind: str) -> Callable[[Any], Any]:
    """Weight-only int8 or int4 of optimum-quanto."""

    def quantised(model: Any) -> Any:
        from optimum import quanto as library

        model = copy.deepcopy(model)
        library.quantize(model.model, weights=getattr(library, kind))
        library.freeze(model.model)
        return model

    return quantised


def bitsandbytes(**settings: Any) -> Callable[[Any], Any]:
    """Int8 (which rounds the states too) or 4-bit of bitsandbytes on its CPU path."""

    def loaded(_model: Any) -> Any:
        import bitsandbytes  # noqa: F401 - transformers says it less plainly
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        folder, _ = converted()
        config = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        ).eval()

    return loaded


KINDS: dict[str, Callable[[Any], Any]] = {
    "float32": cast(torch.float32),
    "bfloat16": cast(torch.bfloat16),
    "float16": cast(torch.float16),
    "int8 (torchao, weight-only)": torchao_int8,
    "int8 (quanto, weight-only)": quanto("qint8"),
    "int8 (bitsandbytes)": bitsandbytes(load_in_8bit=True),
    "4-bit NF4 (bitsandbytes)": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int4 (quanto, weight-only)": quanto("qint4"),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    white = WhiteBoxModel.demo()
    answers = [white.generate(each.query, max_new_tokens=16) for each in shipped("demo")[: arguments.questions]]
    exact = HybridGrad().batch(white, answers)
    print(f"{white.name}; {len(answers)} answers; relative difference to float32, median / largest")
    print(f"{'weights':30}", *(f"{name:>20}" for name in SCORES), f"{'rank corr.':>10} {'s/answer':>9}")
    for name, make in KINDS.items():
        try:
            other = WhiteBoxModel(make(white.model), white.tokenizer)
        except ImportError as error:
            print(f"{name:30} not installed: {error}")
            continue
        except GuardError as error:
            print(f"{name:30} refused: {error}")
            continue
        began = time.perf_counter()
        scores = [HybridGrad()(other, other.read(each.messages, each.response_token_ids)) for each in answers]
        seconds = (time.perf_counter() - began) / len(answers)
        cells = []
        for score in SCORES:
            off = [abs(a.scores[score] / b.scores[score] - 1) for a, b in zip(scores, exact, strict=True)]
            cells.append(f"{statistics.median(off):>10.1e} / {max(off):.1e}")
        hybrid = [[each.scores["hybridgrad"] for each in side] for side in (scores, exact)]
        print(f"{name:30}", *cells, f"{float(spearmanr(*hybrid)[0]):>10.3f} {seconds:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
