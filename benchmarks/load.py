"""A server under load, on the loopback: ``hallucination-guard serve`` in a process of its own, and many clients.

    python benchmarks/load.py --clients 64 --seconds 60 --repeats 3

alone       every question once, one at a time: what each answer has to be, and the throughput without batches
together    all clients ask for so many seconds, each the next question as soon as it has an answer
unguarded   the same questions by ``generate`` of ``transformers`` alone, in static batches of as many as the server's;
            before and after each time together, since a machine's speed drifts by more than what is measured: of
            several repeats the median counts

Checked, and it exits with 1 where one does not hold: no status but 200; every answer is the one that it is alone; the
record of every answer is in the log when its first byte is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import httpx

CONFIG = """
port: {port}
models:
  - alias: demo
    model: demo
    policy: abstain
    audit: audit.jsonl
    max_new_tokens: {tokens}
limits: {{batch: {batch}, running: {running}, queue: 256, deadline_seconds: 600}}
"""
UNGUARDED = """
import json, sys, time
import torch
from transformers import DynamicCache
from hallucination_guard import WhiteBoxModel
model, (prompts, tokens, rows) = WhiteBoxModel.demo(), json.load(sys.stdin)
end = model.model.generation_config.eos_token_id

def answer(prompts, tokens):
    read = [list(model.prompt(each).token_ids) for each in prompts]
    longest = max(map(len, read))
    ids = torch.tensor([[end] * (longest - len(each)) + each for each in read])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in read])
    with torch.no_grad():
        model.model.generate(
            ids, attention_mask=mask, past_key_values=DynamicCache(), max_new_tokens=tokens, do_sample=False,
            eos_token_id=end, pad_token_id=end,
        )

batches = [prompts[at : at + rows] for at in range(0, len(prompts), rows)]
answer(batches[0], 2)
began = time.perf_counter()
for each in batches:
    answer(each, tokens)
print((time.perf_counter() - began) / len(prompts))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a client saw."""

    status: int
    prompt: str
    text: str | None
    record: str
    seconds: float
    scoring: float
    recorded: bool


class Server:
    """The command in a process of its own."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.url = f"http://127.0.0.1:{options.port}"
        self.chains = folder / "audit.chains" if options.ray else folder
        (folder / "serve.yaml").write_text(
            CONFIG.format(port=options.port, tokens=options.tokens, batch=options.batch, running=2 * options.batch)
        )
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hallucination_guard.cli", "serve", str(folder / "serve.yaml")),
                *(("--ray", str(options.ray)) if options.ray else ()),
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("w"),
        )
        self.stderr = folder / "stderr"
        self._read: dict[Path, bytearray] = {}

    def wait(self, seconds: float = 120) -> None:
        """Until it is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise SystemExit(f"the server did not start: {self.stderr.read_text()[-2000:]}")

    def sizes(self) -> dict[Path, int]:
        """How much is recorded, in bytes."""
        return {chain: chain.stat().st_size for chain in self.chains.glob("*.jsonl")}

    def recorded(self, record: str, by: dict[Path, int]) -> bool:
        """Whether it was there when the log had these sizes. Read to the end only once: the server needs the time."""
        for chain, size in by.items():
            read = self._read.setdefault(chain, bytearray())
            with chain.open("rb") as file:
                file.seek(len(read))
                read += file.read()
            at = read.rfind(f'"{record}"'.encode())
            if at >= 0 and read.find(b"\n", at) in range(size):
                return True
        return False

    @property
    def mebibytes(self) -> float:
        """Resident memory of the process that answers the clients; that of replicas is not in it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


async def ask(client: httpx.AsyncClient, server: Server, prompt: str) -> Reply:
    """One question; whether its record was there with the first byte."""
    body = {"model": "demo", "messages": [{"role": "user", "content": prompt}]}
    began = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        sizes = server.sizes()
        content = await response.aread()
    seconds = time.perf_counter() - began
    if response.status_code != 200:
        return Reply(
            status=response.status_code,
            prompt=prompt,
            text=None,
            record="",
            seconds=seconds,
            scoring=0.0,
            recorded=True,
        )
    told = json.loads(content)
    verdict, [choice] = told["hallucination_guard"], told["choices"]
    return Reply(
        status=200,
        prompt=prompt,
        text=choice["message"]["content"],
        record=verdict["record"],
        seconds=seconds,
        scoring=verdict["seconds"]["score"],
        recorded=server.recorded(verdict["record"], sizes),
    )


async def load(server: Server, prompts: list[str], clients: int, seconds: float) -> tuple[list[Reply], list[float]]:
    """What all clients saw, and the server's memory each second."""
    replies: list[Reply] = []
    memory: list[float] = []
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

        async def one(own: int) -> None:
            at = own
            while time.monotonic() < end:
                replies.append(await ask(client, server, prompts[at % len(prompts)]))
                at += clients + 1

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(server.mebibytes)
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *map(one, range(clients)))
    return replies, memory


async def alone(server: Server, prompts: list[str]) -> list[Reply]:
    """One at a time."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        return [await ask(client, server, each) for each in prompts]


def unguarded(prompts: list[str], options: argparse.Namespace) -> float:
    """Seconds a question, by ``transformers`` alone."""
    given = json.dumps([prompts, options.tokens, options.batch])
    run = subprocess.run([sys.executable, "-c", UNGUARDED], input=given, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main() -> int:
    """Measure, check and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch", type=int, default=8, help="answers at a time; twice as many are under way")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="how often: together, then unguarded")
    parser.add_argument("--ray", type=int, default=0, metavar="N", help="with N replicas")
    parser.add_argument("--port", type=int, default=8417)
    options = parser.parse_args()
    rows = files("hallucination_guard.data").joinpath("calibration_questions.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["query"] for row in rows[: options.questions]]
    plain = [unguarded(prompts, options)]
    replies: list[Reply] = []
    memory: list[float] = []
    fast: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), options)
        try:
            server.wait()
            asyncio.run(load(server, prompts, options.batch, 2))  # warm: two batches
            began = time.perf_counter()
            singly = asyncio.run(alone(server, prompts))
            slow = len(prompts) / (time.perf_counter() - began)
            for _ in range(options.repeats):
                began = time.perf_counter()
                seen, used = asyncio.run(load(server, prompts, options.clients, options.seconds))
                fast.append(len(seen) / (time.perf_counter() - began))
                replies, memory = [*replies, *seen], [*memory, *used]
                plain.append(unguarded(prompts, options))
        finally:
            server.process.terminate()
            server.process.wait(60)
    return told(options, singly, replies, memory, slow, fast, [2 / sum(pair) for pair in pairwise(plain)])


def told(
    options: argparse.Namespace,
    singly: list[Reply],
    replies: list[Reply],
    memory: list[float],
    slow: float,
    fast: list[float],
    plain: list[float],
) -> int:
    """Print the figures; 1 where a check does not hold."""
    own = {each.prompt: each.text for each in singly}
    failed = [each for each in [*singly, *replies] if each.status != 200]
    other = [each for each in replies if each.status == 200 and each.text != own[each.prompt]]
    unrecorded = [each for each in [*singly, *replies] if not each.recorded]
    took = sorted(each.seconds for each in replies)
    share = statistics.median(each.scoring / each.seconds for each in singly)
    let = sum(each.text is not None for each in replies)
    print(f"{options.clients} clients, {options.seconds:g} s, {options.tokens} tokens, batches of {options.batch}:")
    print(f"{len(replies)} answers ({let} let through), {len(failed)} with another status than 200,")
    print(f"{len(other)} other than alone, {len(unrecorded)} whose record was not there with the first byte;")
    median = statistics.median(fast)
    print(f"{median:.2f} answers a second, one at a time {slow:.2f}: {median / slow:.2f} times the throughput;")
    shares = [without / own for own, without in zip(fast, plain, strict=True)]
    print(
        f"unguarded batches of {options.batch}: {statistics.median(plain):.2f} a second, guarded takes"
        f" {statistics.median(shares):.2f} times as long ({min(shares):.2f} to {max(shares):.2f});"
    )
    print(f"p50 {took[len(took) // 2]:.2f} s, p95 {took[int(len(took) * 0.95)]:.2f} s; alone, scoring is {share:.1%};")
    step = max(1, len(memory) // 6)  # the first part is of a server that warms up
    parts = [f"{statistics.median(memory[at : at + step]):.0f}" for at in range(0, 6 * step, step)]
    print(f"memory in each sixth of the time {', '.join(parts)} MiB, {max(memory):.0f} at the peak")
    return int(bool(failed or other or unrecorded))


if __name__ == "__main__":
    sys.exit(main())
