"""The sidecar against real servers: the tables of docs/sidecar.md.

    python benchmarks/upstreams.py --vllm ENV/bin/vllm --llama-server FILE --work FOLDER [--questions 100]

Each server runs on the loopback with the demo model. Every question is asked through a sidecar, and the answer's score
is compared with the score of the same tokens given directly, its log-probabilities with the server's. Then what must be
noticed: a prompt of which one token is another, another template, another model. Where the ids differ, that is
noticed by them; then they are forged to be equal, and what the log-probabilities still show is counted.

One JSON line for each run goes into FOLDER/upstreams.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from dequantise import dequantise

from hallucination_guard import Guard, Outcome, Released, WhiteBoxModel
from hallucination_guard.demo.questions import shipped
from hallucination_guard.errors import UpstreamError
from hallucination_guard.model.packaged import _gguf, converted
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.server.upstream import Asked, Part, Sidecar, Upstream, connect, parity
from hallucination_guard.server.upstream.parity import distance
from hallucination_guard.testing import MemorySink
from hallucination_guard.values import Message
from hallucination_guard_policies import Accept

# The template's own system turn, and the same with one token changed.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHANGED = SYSTEM.replace("helpful", "cheerful")
# Another template: the same turns without the default system turn.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MOST = 16  # tokens of an answer
LONG, LONGER = "Write a long story about a lighthouse and the sea.", 1500  # what it draws when it is killed
TWICE = 20  # questions that are asked once more, as a stream and of the model here


class Between:
    """Stands between a sidecar and its server: it changes the request and the answer, and keeps what came last.

    Args:
        inner: the server.
        turns: put before those that are asked.
    """

    def __init__(self, inner: Upstream, *turns: Message) -> None:
        self.inner, self.turns = inner, turns
        self.can, self.describe, self.stream = inner.can, inner.describe, inner.stream
        self.last = Part()
        self.forged: tuple[int, ...] = ()

    async def answer(self, asked: Asked) -> Part:
        """The server's answer; while ids are forged, the last one again, with these as those of its prompt."""
        if self.forged:
            return replace(self.last, prompt_ids=self.forged)
        self.last = await self.inner.answer(replace(asked, turns=(*self.turns, *asked.turns)))
        return self.last

    async def close(self) -> None:
        """Nothing is open."""


async def honest(between: Between, model: WhiteBoxModel, questions: list[str]) -> dict[str, Any]:
    """Every question through the sidecar, and directly."""
    scorer, sink = HybridGrad(), MemorySink()
    sidecar = Sidecar(Guard(model, policy=Accept(), scorer=scorer, audit=sink), between)
    status = await sidecar.start()
    found: dict[str, Any] = {
        "status": status.why or "ready",
        "tolerance": status.generator and status.generator.tolerance,
    }
    apart: list[float] = []
    distances: list[float] = []
    scores: list[float] = []
    scored = streamed = greedy = 0
    for question in questions:
        outcome = await sidecar.acall(question, max_new_tokens=MOST)
        score, ids = outcome.verdict.score, outcome.generation.response_token_ids
        if score.status != "scored":
            found.setdefault("unscorable", []).append(score.reason)
            continue
        scored += 1
        direct = scorer(model, model.read(question, ids))
        scores += [abs(direct.scores[name] - score.scores[name]) for name in score.scores]
        pairs = zip(between.last.logprobs, score.token_logprobs, strict=False)
        apart += [abs(theirs - ours) for theirs, ours in pairs if theirs is not None]
        distances.append(distance(between.last.logprobs, score.token_logprobs) or 0.0)
    for question in questions[:TWICE]:
        whole = await sidecar.acall(question, max_new_tokens=MOST)
        events = [each async for each in sidecar.astream(question, max_new_tokens=MOST)]
        streamed += "".join(each.text for each in events if isinstance(each, Released)) == whole.text
        drawn = model.generate(question, max_new_tokens=MOST).response_token_ids
        greedy += drawn == whole.generation.response_token_ids
    after = sidecar.status()
    return found | {
        "questions": len(questions), "scored": scored, "twice": min(TWICE, len(questions)), "greedy_equal": greedy,
        "streamed_equal": streamed, "score_apart_max": max(scores, default=None), "logprob_apart": spread(apart),
        "distance": spread(distances), "beyond": after.generator and after.generator.beyond,
        "compared": after.generator and after.generator.compared, "suspended": after.why,
        "records_with_generator": sum(each.generator is not None for each in sink.records),
        "generator": None if after.generator is None else after.generator.mark,
    }  # fmt: skip


async def changed(between: Between, model: WhiteBoxModel, questions: list[str], tolerance: float) -> dict[str, Any]:
    """What is noticed by ids, and with ids forged to be equal, by the log-probabilities of single answers."""
    guard = Guard(model, policy=Accept(), scorer=HybridGrad(), audit=MemorySink())
    sidecar = Sidecar(guard, between)
    sidecar._generator, sidecar._found = await between.describe(), ""  # as if the start had found nothing
    by_ids = by_logprobs = unreadable = 0
    distances = []
    for question in questions:
        between.forged = ()
        outcome = await sidecar.acall(question, max_new_tokens=MOST)
        by_ids += outcome.verdict.score.status == "unscorable"
        between.forged = model.prompt(question).token_ids
        outcome = await sidecar.acall(question, max_new_tokens=MOST)
        ours = outcome.verdict.score.token_logprobs
        apart = distance(between.last.logprobs, ours)
        if apart is None:
            unreadable += 1
        else:
            distances.append(apart)
            by_logprobs += apart > tolerance
    return {
        "questions": len(questions), "detected_by_ids": by_ids, "forged_unscorable": unreadable,
        "forged_detected_by_logprobs": by_logprobs, "distance": spread(distances), "tolerance": tolerance,
    }  # fmt: skip


async def killed(upstream: Upstream, model: WhiteBoxModel, kill: Callable[[], None]) -> dict[str, Any]:
    """The server is killed with SIGKILL as it draws a stream, of which a sentence was let through, and a call."""
    sink = MemorySink()
    sidecar = Sidecar(Guard(model, policy=Accept(), scorer=HybridGrad(), audit=sink), upstream)
    if not (status := await sidecar.start()).ready:  # then answers are decided on as a whole, and none is let through
        return {"status": status.why}
    released, errors = [], []
    call: asyncio.Task[Outcome] | None = None
    try:
        async for event in sidecar.astream(LONG, max_new_tokens=LONGER):
            if isinstance(event, Outcome):
                raise SystemExit("the answer was drawn before the server was killed")
            if isinstance(event, Released):
                if call is None:
                    call = asyncio.create_task(sidecar.acall(LONG, max_new_tokens=LONGER))
                    await asyncio.sleep(0.5)  # until it has reached the server
                    kill()
                released.append(event.text)
    except UpstreamError as error:
        errors.append(error.message)
    assert call is not None
    try:
        await call
    except UpstreamError as error:
        errors.append(error.message)
    parts = [each.answer for each in sink.records if each.part is not None]
    return {
        "errors": errors,
        "status": sidecar.status().why,
        "released": len(released),
        "released_as_recorded": released == parts[: len(released)],
        "records": [[each.decision, each.rule, each.part is not None] for each in sink.records],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, ninth decile and maximum."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "n": len(values),
        "median": statistics.median(ordered),
        "p90": ordered[int(0.9 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


@contextmanager
def server(command: list[str], port: int, log: Path, env: dict[str, str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """A server on the loopback until the block ends, and what kills it and all that it has started."""
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env}, start_new_session=True)
        try:
            until = time.monotonic() + 400
            while not _up(url):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{command[0]} did not start, see {log}")
                time.sleep(0.5)
            yield url, lambda: os.killpg(process.pid, signal.SIGKILL)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


VLLM_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}  # fmt: skip


def vllm(program: str, folder: Path, port: int, *, dtype: str, template: Path | None = None) -> list[str]:
    """How vLLM is started."""
    command = [program, "serve", str(folder), "--served-model-name", "smollm2", "--dtype", dtype, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "4"]
    return command + (["--chat-template", str(template)] if template else [])


def llama(program: str, file: Path, port: int, *, template: Path | None = None) -> list[str]:
    """How llama-server is started."""
    command = [program, "-m", str(file), "--alias", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--jinja"]
    command += ["-c", "4096", "-np", "1", "-t", "1", "-fa", "off"]
    return command + (["--chat-template-file", str(template)] if template else [])


async def run(
    url: str,
    dtype: str,
    what: str,
    model: WhiteBoxModel,
    questions: list[str],
    tolerance: float,
    kill: Callable[[], None],
) -> Any:
    """One run against a server that is up."""
    upstream = await connect(url, dtype=dtype)
    try:
        match what:
            case "honest":
                return await honest(Between(upstream), model, questions)
            case "token":
                turn = Message(role="system", content=CHANGED)
                return await changed(Between(upstream, turn), model, questions, tolerance)
            case "killed":
                return await killed(upstream, model, kill)
            case _:
                return await changed(Between(upstream), model, questions, tolerance)
    finally:
        await upstream.close()


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the program of vLLM")
    parser.add_argument("--llama-server", help="the program of llama.cpp")
    parser.add_argument("--work", type=Path, required=True, help="where files and results go")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[], help="numerics: float32 bfloat16 F32 Q4_1")
    parser.add_argument("--runs", nargs="*", default=[], help="some of: honest template model")
    parser.add_argument("--other", type=Path, help="folder of another model; by default the demo's with noise")
    parser.add_argument("--other-gguf", type=Path, help="the same, for llama-server")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    questions = [each.query for each in (*shipped("calibration"), *shipped("demo"))][: options.questions]
    model = WhiteBoxModel.demo()
    for name, started in plan(options):
        if options.only and name not in options.only:
            continue
        tolerance = parity.MOST
        for what, command, env in started:
            if options.runs and what not in options.runs:
                continue
            port = free_port()
            with server(command(port), port, options.work / f"{name}.log", env) as (url, kill):
                for each in (what,) if what != "honest" else ("honest", "token", "killed"):
                    began = time.monotonic()
                    found = asyncio.run(run(url, name, each, model, questions, tolerance, kill))
                    if (
                        each == "honest"
                    ):  # without a tolerance nothing is scored: then what the sidecar calls another model
                        tolerance = found["tolerance"] or parity.MOST
                    row = {"numerics": name, "run": each, **found, "seconds": round(time.monotonic() - began, 1)}
                    with (options.work / "upstreams.jsonl").open("a") as out:
                        out.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


def plan(options: argparse.Namespace) -> Iterator[tuple[str, list[Start]]]:
    """For each numerics its runs, each with how the server is started."""
    folder, _ = converted()
    template = options.work / "other_template.jinja"
    template.write_text(TEMPLATE)
    if options.vllm:
        noisy = options.other or with_noise(folder, options.work / "noisy")
        for dtype in ("float32", "bfloat16"):
            start = partial(vllm, options.vllm, dtype=dtype)
            yield (
                dtype,
                [
                    ("honest", partial(start, folder), VLLM_ENV),
                    ("template", partial(start, folder, template=template), VLLM_ENV),
                    ("model", partial(start, noisy), VLLM_ENV),
                ],
            )
    if options.llama_server:
        exact, noisy = options.work / "demo-f32.gguf", options.work / "noisy-f32.gguf"
        other = options.other_gguf or noisy
        for file, noise in ((exact, 0.0), (noisy, NOISE)):
            if not file.exists():
                dequantise(_gguf(), file, noise=noise)
        start = partial(llama, options.llama_server)
        for numerics, file in (("F32", exact), ("Q4_1", _gguf())):
            yield (
                numerics,
                [
                    ("honest", partial(start, file), {}),
                    ("template", partial(start, file, template=template), {}),
                    ("model", partial(start, other), {}),
                ],
            )


Start: TypeAlias = tuple[str, Callable[[int], list[str]], dict[str, str]]
NOISE = 0.02
"""Of each weight's own standard deviation: a model that is nearly the same, as after a little more training."""


def with_noise(folder: Path, target: Path) -> Path:
    """A copy of a model with a little noise in every matrix."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (target / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


if __name__ == "__main__":
    main()
