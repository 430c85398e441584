"""What scoring costs, from one run: time over the time of generating the same tokens, and peak memory.

    python benchmarks/cost.py                       # prompts of 50, 900, 3600 tokens, answers of 16, 64, 256
    python benchmarks/cost.py --plot cost.png       # the same, and a picture
    python benchmarks/cost.py batches               # scoring over generating in batches of 1, 4, 8, 32, by part
    python benchmarks/cost.py rows                  # rows a second for a file of 200, batches of 1 … 32

generate   transformers' own greedy generation with a plain dynamic cache, nothing added
keeping    what keeping states and logits adds to it (WhiteBoxModel.generate − generate)
ours       HybridGrad with all its by-products, from what generating kept
cascade    the likelihoods alone, where the cascade does not ask for the gradient; where it does, it costs what ours
           does
re-read    HybridGrad without the cache: one pass over prompt and answer first
official   the published algorithm: one graph over prompt and answer, all layers, a backward each for states and head
samples    five more answers, as sampling-based scores need

Each figure is the median over the repeats of its share in the same repeat, so that a slow minute weighs on both sides.
Memory is the peak of the whole process, weights included. Threads that sleep between operations
(OMP_WAIT_POLICY=PASSIVE) make short operations slower, and so scoring more than generating: the setting is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, GenerationConfig

from hallucination_guard import HybridGrad, WhiteBoxModel
from hallucination_guard.rows import Line, read_lines, score_lines
from hallucination_guard.scoring import Cascade, gradients, head_walk
from hallucination_guard.values import Generation

TEXT = "Tell me all that you know about the history of the city of Paris, its river, its kings and its monuments. "
METHODS = ("ours", "cascade", "re-read", "official", "samples")


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
    """Seconds, and the peak of resident memory in MiB while it ran (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the method before has freed is not this one's
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024


def cell(
    model: WhiteBoxModel, prompt: str, answer: int, repeats: int, methods: list[str]
) -> dict[str, tuple[float, float, float]]:
    """By method, medians of: seconds, seconds over those of generate in the same repeat, and peak."""
    ids = torch.tensor([model.prompt(prompt).token_ids])
    config = GenerationConfig(max_new_tokens=answer, do_sample=False, pad_token_id=0)

    def plain() -> None:
        with torch.no_grad():
            model.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=DynamicCache(),
                eos_token_id=None,
            )  # fmt: skip

    def kept() -> Generation:
        generation: Generation = model.generate(prompt, max_new_tokens=answer)
        assert len(generation.response_token_ids) == answer
        return generation

    never = Cascade(band=(1e9, 1e9))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(repeats + 1):
        made: list[Generation] = []
        generating: list[tuple[str, Callable[[], Any]]] = [
            ("generate", plain),
            ("keeping", lambda: made.append(kept())),  # noqa: B023 - run at once
        ]
        measured = {name: peak(run) for name, run in (generating if turn % 2 else generating[::-1])}
        [generation] = made
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: HybridGrad()(model, generation),  # noqa: B023
            "re-read": lambda: HybridGrad()(model, generation),  # noqa: B023 - the cache is gone by then
            "official": lambda: official(model, generation),  # noqa: B023
            "samples": lambda: [
                model.generate(prompt, max_new_tokens=answer, temperature=1.0, seed=seed) for seed in range(5)
            ],
        }
        for name in methods:
            if name == "cascade":
                other = kept()
                measured[name] = peak(lambda: never(model, other))  # noqa: B023
                other.release()
            else:
                measured[name] = peak(runs[name])
        if turn or repeats == 1:  # the first one warms up
            for name, (seconds, memory) in measured.items():
                found.setdefault(name, []).append((seconds, seconds / measured["generate"][0], memory))
    return {name: tuple(map(statistics.median, zip(*each, strict=True))) for name, each in found.items()}  # type: ignore[misc]


def machine() -> str:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    wait = os.environ.get("OMP_WAIT_POLICY", "not set")
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"OMP_WAIT_POLICY {wait}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def table(model: WhiteBoxModel, arguments: argparse.Namespace) -> None:
    """Time and memory by prompt and answer."""
    methods = arguments.methods
    shares = [f"{name + ' %':>10}" for name in methods]
    peaks = [f"{name + ' MiB':>12}" for name in ("generate", *methods)]
    print(f"{'prompt':>6} {'answer':>6} {'generate s':>10} {'keeping':>8}", *shares, *peaks, f"{'official/ours':>13}")
    rows: list[tuple[int, int, dict[str, tuple[float, float, float]]]] = []
    for length in arguments.prompts:
        prompt = TEXT
        while len(model.prompt(prompt + TEXT).token_ids) <= length:
            prompt += TEXT
        real = len(model.prompt(prompt).token_ids)
        for answer in arguments.answers:
            row = cell(model, prompt, answer, arguments.repeats, methods)
            rows.append((real, answer, row))
            shares = [f"{row[name][1]:>10.1%}" for name in methods]
            peaks = [f"{row[name][2]:>12.0f}" for name in ("generate", *methods)]
            both = {"official", "ours"} <= set(methods)
            ratio = f"{row['official'][1] / row['ours'][1]:>13.1f}" if both else ""
            base = row["generate"][0]
            print(
                f"{real:>6} {answer:>6} {base:>10.2f} {row['keeping'][1] - 1:>8.1%}", *shares, *peaks, ratio, flush=True
            )
    if arguments.plot:
        plot(rows, methods, arguments.plot)


def plot(rows: list[tuple[int, int, dict[str, tuple[float, float, float]]]], methods: list[str], path: Path) -> None:
    """Time over generating, by prompt; a panel an answer length."""
    from matplotlib.figure import Figure

    answers = sorted({answer for _, answer, _ in rows})
    figure = Figure(figsize=(4.2 * len(answers), 4.0), layout="constrained")
    for at, answer in enumerate(answers):
        axes = figure.add_subplot(1, len(answers), at + 1)
        mine = [(prompt, row) for prompt, other, row in rows if other == answer]
        for name in methods:
            axes.plot([prompt for prompt, _ in mine], [row[name][1] for _, row in mine], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", title=f"{answer} answer tokens")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3%}".rstrip("0").rstrip(".%") + "%")
        axes.set_xticks([prompt for prompt, _ in mine], [str(prompt) for prompt, _ in mine])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if at == 0:
            axes.set_ylabel("time / generating the same tokens")
        if at == len(answers) - 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


PLACES = ("Paris", "Rome", "Berlin", "Madrid", "Vienna", "Cairo", "Delhi", "Tokyo", "Lima", "Oslo", "Prague", "Athens")


class Parts:
    """Seconds of the parts of scoring while they are listened to."""

    WHERE = (
        (gradients, "replay", "forward"),
        (gradients, "at_anchor", "backward"),
        (gradients, "read_head", "softmax"),
        (head_walk, "pulled_states", "head: A W"),
        (head_walk, "head_norms", "head: norms"),
    )

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((name for _, _, name in self.WHERE), 0.0)

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``call``, whose time is added up under ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return run

    def __enter__(self) -> Parts:
        self._were = [getattr(module, function) for module, function, _ in self.WHERE]
        for (module, function, name), call in zip(self.WHERE, self._were, strict=True):
            setattr(module, function, self.timed(call, name))
        return self

    def __exit__(self, *_: object) -> None:
        for (module, function, _), call in zip(self.WHERE, self._were, strict=True):
            setattr(module, function, call)


def batched(model: WhiteBoxModel, arguments: argparse.Namespace) -> None:
    """Scoring over generating, both in batches of the same size; the same prompt about different places."""
    length, answer = arguments.prompts[0], arguments.answers[0]
    names = [name for _, _, name in Parts.WHERE]
    print(
        f"{'batch':>6} {'generate s':>10} {'score s':>8} {'score %':>8} {'CPU %':>6}",
        *(f"{name + ' %':>13}" for name in names),
    )
    for size in arguments.batches:
        prompts = [TEXT.replace("Paris", f"{PLACES[at % 12]}{' of old' * (at // 12)}") for at in range(size)]
        while len(model.prompt(prompts[0] + TEXT).token_ids) <= length:
            prompts = [prompt + TEXT for prompt in prompts]
        found = []
        for turn in range(arguments.repeats + 1):
            began, cpu = time.perf_counter(), time.process_time()
            made = model.generate(prompts, max_new_tokens=answer)
            generating, cpu_generating = time.perf_counter() - began, time.process_time() - cpu
            began, cpu = time.perf_counter(), time.process_time()
            with Parts() as parts:
                scores = HybridGrad().batch(model, made)
            scoring, cpu_scoring = time.perf_counter() - began, time.process_time() - cpu
            assert all(score.status == "scored" for score in scores)
            if turn or not arguments.repeats:
                shares = [scoring, *(parts.seconds[name] for name in names)]
                found.append(
                    (generating, scoring, cpu_scoring / cpu_generating, *(each / generating for each in shares))
                )
        base, seconds, cpu_share, share, *rest = map(statistics.median, zip(*found, strict=True))
        print(
            f"{size:>6} {base:>10.2f} {seconds:>8.2f} {share:>8.1%} {cpu_share:>6.1%}",
            *(f"{each:>13.1%}" for each in rest),
            flush=True,
        )


def scored(model: WhiteBoxModel, lines: list[Line], size: int) -> list[str]:
    """The statuses of all lines, scored in batches of ``size``."""
    batches = score_lines(model, lines, scorer=HybridGrad(), batch_size=size, batch_tokens=8192, max_new_tokens=1)
    return [row["status"] for batch in batches for _, row in batch]


def throughput(model: WhiteBoxModel, arguments: argparse.Namespace) -> None:
    """Rows a second when scoring a file of answers that something else wrote."""
    import json

    words = TEXT.split()
    raw = [
        json.dumps(
            {"prompt": " ".join(words[: 4 + at % 16]), "response": " ".join(words[at % 7 : at % 7 + 3 + at % 12])}
        )
        for at in range(arguments.rows)
    ]
    lines = read_lines([line.encode() for line in raw])
    print(f"{'batch':>6} {'rows/s':>8} {'peak MiB':>9}   ({arguments.rows} rows, prompts and answers of mixed lengths)")
    for size in arguments.batches:
        seconds, memories = [], []
        for _ in range(arguments.repeats):
            statuses: list[str] = []
            second, memory = peak(lambda: statuses.extend(scored(model, lines, size)))  # noqa: B023 - run at once
            assert statuses == ["scored"] * arguments.rows
            seconds.append(second)
            memories.append(memory)
        print(
            f"{size:>6} {arguments.rows / statistics.median(seconds):>8.2f} {statistics.median(memories):>9.0f}",
            flush=True,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["cost", "batches", "rows"], default="cost")
    parser.add_argument("--prompts", type=int, nargs="+", help="50 900 3600; of batches the first one, 50")
    parser.add_argument("--answers", type=int, nargs="+", help="16 64 256; of batches the first one, 64")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="after one that warms up; a single one goes without")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batches", type=int, nargs="+", help="1 4 8 32; of rows 1 2 4 8 16 32")
    arguments = parser.parse_args()
    whole = arguments.what == "cost"
    arguments.prompts = arguments.prompts or ([50, 900, 3600] if whole else [50])
    arguments.answers = arguments.answers or ([16, 64, 256] if whole else [64])
    arguments.batches = arguments.batches or ([1, 2, 4, 8, 16, 32] if arguments.what == "rows" else [1, 4, 8, 32])
    model = WhiteBoxModel.demo()
    model.__dict__["end_ids"] = frozenset()  # every answer has its full length
    print(f"{model.name}, {model.identity.dtype}; {machine()}")
    if arguments.what == "rows":
        throughput(model, arguments)
    elif arguments.what == "batches":
        batched(model, arguments)
    else:
        table(model, arguments)


if __name__ == "__main__":
    main()
