"""What scoring costs, from one run: time over the time of generating the same tokens, and peak memory.

    python benchmarks/cost.py --prompts 50 900 3600 --answers 16 64 256 --repeats 3

generate   transformers' own greedy generation with a plain dynamic cache, nothing added
keeping    what keeping the deep half's states adds to it (WhiteBoxModel.generate − generate)
ours       HybridGrad with all its by-products, from the generation's own cache
re-read    the same without the cache: one pass over prompt and answer first
official   the published algorithm: one graph over prompt and answer, all layers, a backward each for states and head
samples    five more answers, as sampling-based scores need
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from hallucination_guard import HybridGrad, WhiteBoxModel
from hallucination_guard.types import Generation

TEXT = "Tell me all that you know about the history of the city of Paris, its river, its kings and its monuments. "


def official(model: WhiteBoxModel, generation: Generation) -> float:
    """HybridGrad as the published code computes it; its mean over the answer's tokens is turned back into the sum."""
    hf, prompt, answer = model.model, generation.prompt_token_ids, generation.response_token_ids
    assert generation.anchor is not None
    ids = torch.tensor([[*prompt, *answer]])
    head = hf.get_output_embeddings().weight
    for parameter in hf.parameters():
        parameter.requires_grad_(True)  # the published code loads the model so
    out = hf(ids, output_hidden_states=True, use_cache=False)
    logits = out.logits[:, :-1].float()
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    span = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
    chosen = logp[0, span].gather(1, torch.tensor(answer)[:, None])[:, 0]
    loss = -(entropy[0, span] * chosen).sum()
    states = torch.autograd.grad(loss, out.hidden_states[:-1], retain_graph=True)
    deep = [grad[0, len(prompt) + generation.anchor.index] for grad in states[model.deep_layers.start :]]
    semgrad = float(torch.cat(deep).abs().mean())
    paragrad = float(torch.autograd.grad(loss, head)[0].abs().mean())
    share = float(torch.exp(-entropy[0, span].mean()))
    for parameter in hf.parameters():
        parameter.requires_grad_(False)
    return (1 - share) * semgrad + share * paragrad


def peak(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the peak of resident memory in MiB while it ran (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024


def cell(
    model: WhiteBoxModel, prompt: str, answer: int, repeats: int, methods: list[str]
) -> dict[str, tuple[float, float]]:
    """Medians of seconds and peaks by method."""
    ids = torch.tensor([model.prompt(prompt).token_ids])
    config = GenerationConfig(max_new_tokens=answer, do_sample=False, pad_token_id=0)

    def plain() -> None:
        with torch.no_grad():
            model.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=DynamicCache(),
                eos_token_id=None,
            )  # fmt: skip

    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        found.setdefault("generate", []).append(peak(plain))
        made: list[Generation] = []
        found.setdefault("own generate", []).append(
            peak(lambda: made.append(model.generate(prompt, max_new_tokens=answer)))  # noqa: B023 - run at once
        )
        [generation] = made
        assert len(generation.response_token_ids) == answer
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: HybridGrad()(model, generation),  # noqa: B023
            "re-read": lambda: HybridGrad()(model, generation),  # noqa: B023 - the cache is gone by then
            "official": lambda: official(model, generation),  # noqa: B023
            "samples": lambda: [
                model.generate(prompt, max_new_tokens=answer, temperature=1.0, seed=seed) for seed in range(5)
            ],
        }
        for name in methods:
            found.setdefault(name, []).append(peak(runs[name]))
    return {
        name: (statistics.median(s for s, _ in each), statistics.median(m for _, m in each))
        for name, each in found.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[50, 900, 3600])
    parser.add_argument("--answers", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    methods = ["ours", "re-read", "official", "samples"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    arguments = parser.parse_args()
    model = WhiteBoxModel.demo()
    model.__dict__["_end_ids"] = frozenset()  # every answer has its full length
    machine = platform.processor() or platform.machine()
    print(f"{model.name}, {model.identity.dtype}, {torch.get_num_threads()} threads, {machine}")
    shares = [f"{name + ' %':>10}" for name in arguments.methods]
    peaks = [f"{name + ' MiB':>12}" for name in ("generate", *arguments.methods)]
    print(f"{'prompt':>6} {'answer':>6} {'generate s':>10} {'keeping':>8}", *shares, *peaks)
    for length in arguments.prompts:
        prompt = TEXT
        while len(model.prompt(prompt + TEXT).token_ids) <= length:
            prompt += TEXT
        real = len(model.prompt(prompt).token_ids)
        for answer in arguments.answers:
            row = cell(model, prompt, answer, arguments.repeats, arguments.methods)
            base = row["generate"][0]
            keeping = row["own generate"][0] / base - 1
            shares = [f"{row[name][0] / base:>10.1%}" for name in arguments.methods]
            peaks = [f"{row[name][1]:>12.0f}" for name in ("generate", *arguments.methods)]
            print(f"{real:>6} {answer:>6} {base:>10.2f} {keeping:>8.1%}", *shares, *peaks, flush=True)


if __name__ == "__main__":
    main()
