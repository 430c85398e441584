"""What docs/scale.md is computed from: costs measured on this machine, and a fleet computed from them.

    python benchmarks/scale.py [--model FOLDER]

Measured: reading and scoring by length of the prompt (what a sidecar does), the same where the prompt was read before,
a plain forward beside it, a record's bytes and the records a second that one log takes. Computed: the same for another
model and device, by floating point operations, at the share of the device's peak that is assumed. Nothing of the second
table was run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch

from hallucination_guard import AuditLog, Guard, HybridGrad, WhiteBoxModel
from hallucination_guard.testing import MemorySink
from hallucination_guard_policies import AbstainBelow

ANYTHING = AbstainBelow(score="mean_token_entropy", limit=1e9)
_RECORDS = 500
ANSWER = 128  # tokens of an answer
SHARE = 0.4  # of a device's peak, in products of a batch; scoring one answer alone reaches less
# Peak in bfloat16, and in float32 for the head, 10¹² operations a second (the makers' own, dense).
DEVICES = {"L4": (121, 30), "A10": (125, 31), "A100": (312, 19.5), "H100": (989, 67)}
# Parameters, layers, width, words, and bytes of keys and values a token (bfloat16).
MODELS = {
    "Llama 3.1 8B": (8.0e9, 32, 4096, 128_256, 2 * 2 * 32 * 1024),
    "Qwen 2.5 32B": (32.8e9, 64, 5120, 152_064, 2 * 2 * 64 * 1024),
    "Llama 3.3 70B": (70.6e9, 80, 8192, 128_256, 2 * 2 * 80 * 1024),
}


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The median."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measured(model: WhiteBoxModel) -> None:
    """Print what this machine takes."""
    scorer = HybridGrad()
    answer = model.tokenizer.encode("It is said that nobody knows. " * 60, add_special_tokens=False)[:ANSWER]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.identity.dtype}, {ANSWER} answer tokens"
    )
    print("| prompt, tokens | read and score, s | its prompt read before, s | a plain forward over both, s |")
    print("|---|---|---|---|")
    keeping, turned = model.with_prefixes(2**30), itertools.count()
    for length in (64, 256, 1024):
        words = model.tokenizer.decode(model.tokenizer.encode("Tell me why. " * 400)[:length])
        ids = torch.tensor([(*model.prompt(words).token_ids, *answer)], device=model.device)

        def both(words: str = words, model: WhiteBoxModel = model) -> object:
            begin = next(turned) % ANSWER  # another answer each time: only the prompt was read before
            return scorer.batch(model, [model.read(words, answer[begin:] + answer[:begin])])

        @torch.no_grad()
        def plain(ids: torch.Tensor = ids) -> object:
            return model.model(input_ids=ids, use_cache=False, logits_to_keep=ANSWER)

        again = partial(both, model=keeping)
        print(f"| {length} | {seconds(both):.2f} | {seconds(again):.2f} | {seconds(plain):.2f} |")
    sink = MemorySink()
    Guard(model, policy=ANYTHING, audit=sink, generation={"max_new_tokens": ANSWER})("Tell me why the sky is blue.")
    [record] = sink.records
    with tempfile.TemporaryDirectory() as folder, AuditLog(Path(folder) / "audit.jsonl") as log:
        began = time.perf_counter()
        for _ in range(_RECORDS):
            log(replace(record, id=uuid4().hex))
        took = time.perf_counter() - began
        size = log.path.stat().st_size / _RECORDS
    print(f"a record of {record.tokens['out']} tokens: {size:.0f} bytes; one log takes {_RECORDS / took:.0f} a second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one answer, in floating point operations: the pass over it, the gradient, and the head in float32."""

    reading: float
    gradient: float
    head: float


def cost(name: str, prompt: int, cached: float = 0.0) -> Cost:
    """Of an answer of :data:`ANSWER` tokens.

    Args:
        name: of the model.
        prompt: its tokens.
        cached: the share of the prompt that was read before.
    """
    parameters, _, width, words, _ = MODELS[name]
    body = parameters - 2 * words * width
    return Cost(
        reading=2 * body * (prompt * (1 - cached) + ANSWER),
        gradient=2 * body / 2 * ANSWER * 2,  # the deep half again, and back
        head=(2 + 2 + 4) * words * width * ANSWER,  # logits, A·W, and two norms in one product
    )


def computed() -> None:
    """Print a fleet."""
    print(f"answers of {ANSWER} tokens, {SHARE:.0%} of the peak; nothing of this was run")
    print("| model | device | prompt | answers a second | nine tenths of the prompt cached |\n|---|---|---|---|---|")
    for name in MODELS:
        for device, (half, single) in DEVICES.items():
            for prompt in (1_000, 8_000):
                plain, cached = (
                    1 / (((each.reading + each.gradient) / half + each.head / single) / (SHARE * 1e12))
                    for each in (cost(name, prompt), cost(name, prompt, cached=0.9))
                )
                print(f"| {name} | {device} | {prompt:,} | {plain:.1f} | {cached:.1f} |")
    for name, (*_, state) in MODELS.items():
        print(f"{name}: keys and values take {state / 1024:.0f} KiB a token, {state * 8_000 / 2**30:.2f} GiB for 8,000")


def main() -> int:
    """Measure, compute and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    measured(WhiteBoxModel.demo() if options.model == "demo" else WhiteBoxModel.from_pretrained(options.model))
    computed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
