"""What guarding a stream costs, from one run: the first sentence, the whole stream, and many streams at a time.

    python benchmarks/stream.py                 # first sentence and whole stream, 128 tokens, medians of 7
    python benchmarks/stream.py together        # 32 streams at a time against one after the other

unguarded   transformers' own greedy generation with a plain dynamic cache, each token noted as it is drawn
guarded     Guard.stream with HybridGrad: every sentence scored, decided on and recorded in a log before it leaves
cascade     the same with a cascade that finds every answer clear: what a sentence costs without its gradient

Each figure is the median over the repeats of its share in the same repeat, so that a slow minute weighs on both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from hallucination_guard import AuditLog, Cascade, Guard, HybridGrad, Outcome, Released, WhiteBoxModel
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import Scorer
from hallucination_guard.values.text import sentence_ranges
from hallucination_guard_policies import AbstainBelow

PROMPTS = [
    "Write a short story about a lighthouse keeper.",
    "Explain to a child how rain is made.",
    "Describe the city of Paris to somebody who has never been there.",
    "Tell me what happens in a bakery before sunrise.",
]
ANYTHING = AbstainBelow(score="mean_token_entropy", limit=1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Seconds to the end of the first sentence and of the whole, and how many sentences there were."""

    first: float
    whole: float
    sentences: int
    text: str


class _Clock(StoppingCriteria):
    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_kwargs: object) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def unguarded(model: WhiteBoxModel, prompt: str, tokens: int) -> Timed:
    """Generate, and note when each token was there. A sentence has ended when the first token of the next is there."""
    ids = torch.tensor([model.prompt(prompt).token_ids])
    clock = _Clock()
    config = GenerationConfig(max_new_tokens=tokens, eos_token_id=sorted(model.end_ids), pad_token_id=0)
    began = time.perf_counter()
    with torch.no_grad():
        out = model.model.generate(
            ids,
            generation_config=config,
            past_key_values=DynamicCache(),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    whole = time.perf_counter() - began
    answer = [each for each in out[0, ids.shape[1] :].tolist() if each not in model.end_ids]
    ranges = sentence_ranges(token_texts(model.tokenizer, answer))
    end = min(ranges[0][1], len(clock.at) - 1)
    text = model.tokenizer.decode(answer)
    return Timed(first=clock.at[end] - began, whole=whole, sentences=len(ranges), text=text)


def guarded(model: WhiteBoxModel, scorer: Scorer, prompt: str, tokens: int, log: AuditLog) -> Timed:
    """Stream through the gate."""
    guard = Guard(model, policy=ANYTHING, scorer=scorer, audit=log, generation={"max_new_tokens": tokens})
    began, first, sentences, text = time.perf_counter(), 0.0, 0, ""
    for event in guard.stream(prompt):
        if isinstance(event, Released):
            first = first or time.perf_counter() - began
            sentences += 1
            text += event.text
    return Timed(first=first, whole=time.perf_counter() - began, sentences=sentences, text=text)


def single(model: WhiteBoxModel, tokens: int, repeats: int, log: AuditLog) -> None:
    """The table of one stream at a time."""
    ways: dict[str, Callable[[str], Timed]] = {
        "guarded": lambda prompt: guarded(model, HybridGrad(), prompt, tokens, log),
        "cascade": lambda prompt: guarded(
            model, Cascade(cheap="mean_token_entropy", band=(1e6, 1e6)), prompt, tokens, log
        ),
    }
    for prompt in PROMPTS[:2]:  # warm
        unguarded(model, prompt, 16)
        ways["guarded"](prompt)
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    wholes: dict[str, list[float]] = {name: [] for name in ways}
    sentences, plain = [], []
    for repeat in range(repeats):
        prompt = PROMPTS[repeat % len(PROMPTS)]
        base = unguarded(model, prompt, tokens)
        plain.append(base)
        for name, way in ways.items():
            found = way(prompt)
            assert found.text == base.text, f"{name} says otherwise than transformers"
            firsts[name].append(found.first / base.first)
            wholes[name].append(found.whole / base.whole)
            sentences.append(found.sentences)
    print(f"{tokens} tokens, {repeats} repeats, {min(sentences)} to {max(sentences)} sentences; unguarded:")
    print(f"first sentence {statistics.median(each.first for each in plain):.2f} s,")
    print(f"whole {statistics.median(each.whole for each in plain):.2f} s")
    print("| way | first sentence / unguarded | whole / unguarded |\n|---|---|---|")
    for name in ways:
        first, whole = statistics.median(firsts[name]), statistics.median(wholes[name])
        spread = f"{min(wholes[name]):.3f} to {max(wholes[name]):.3f}"
        print(f"| {name} | {first:.3f} ({min(firsts[name]):.3f} to {max(firsts[name]):.3f}) | {whole:.3f} ({spread}) |")


def together(model: WhiteBoxModel, tokens: int, streams: int, log: AuditLog) -> None:
    """Many streams at a time, against one after the other."""
    guard = Guard(model, policy=ANYTHING, audit=log, generation={"max_new_tokens": tokens})
    asked = [
        f"Tell me {('one thing', 'two things', 'a story')[at % 3]} about the number {at}." for at in range(streams)
    ]

    def alone(prompt: str) -> Outcome:
        *_, outcome = guard.stream(prompt)
        assert isinstance(outcome, Outcome)
        return outcome

    async def read(prompt: str) -> Outcome:
        last = None
        async for event in guard.astream(prompt):
            last = event
        assert isinstance(last, Outcome)
        return last

    async def at_a_time() -> list[Outcome]:
        return await asyncio.gather(*map(read, asked))

    alone(asked[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    singly = [alone(each) for each in asked]
    one_by_one = time.perf_counter() - began
    middle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    jointly = asyncio.run(at_a_time())
    at_once = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    same = sum(one.text == other.text for one, other in zip(singly, jointly, strict=True))
    worst = max(
        abs(one.verdict.score.scores["hybridgrad"] / other.verdict.score.scores["hybridgrad"] - 1)
        for one, other in zip(singly, jointly, strict=True)
        if one.text == other.text
    )
    drawn = sum(each.tokens["out"] for each in jointly)
    print(f"{streams} streams of at most {tokens} tokens ({drawn} drawn): one after the other {one_by_one:.1f} s,")
    print(f"at a time {at_once:.1f} s: {one_by_one / at_once:.2f} times the throughput;")
    print(f"{same} of {streams} say what they say alone; HybridGrad differs by at most {worst:.1e} of itself;")
    peaks = [round(each / 1024) for each in (before, middle, after)]
    print(f"peak memory {peaks[0]} MiB before, {peaks[1]} after one by one, {peaks[2]} after all")


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("single", "together"), default="single")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--streams", type=int, default=32)
    options = parser.parse_args()
    model = WhiteBoxModel.demo() if options.model == "demo" else WhiteBoxModel.from_pretrained(options.model)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.identity.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(Path(folder) / "audit.jsonl")
        if options.what == "single":
            single(model, options.tokens or 128, options.repeats, log)
        else:
            together(model, options.tokens or 64, options.streams, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
