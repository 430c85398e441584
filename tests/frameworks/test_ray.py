"""Ray for real: `serve`, `score` and `evaluate` with --ray as commands, HTTP clients, and processes that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import yaml

from hallucination_guard.audit import records, requests, verify
from hallucination_guard.audit.folder import chains_of
from hallucination_guard.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.timeout(600)

# The processes are many and the cores few.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
}
COMMAND = [sys.executable, "-m", "hallucination_guard.cli"]
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Who wrote Hamlet?",
    "How many days has a week?",
)
NOISE = {"rel": 1e-5, "abs": 1e-5}  # of float32, in batches that are put together otherwise
SCORES = ("semgrad", "paragrad", "exgrad", "hybridgrad", "mean_token_entropy", "sequence_nll")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that answers in milliseconds, in a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- processes


def processes() -> dict[int, tuple[int, str]]:
    """The processes of this machine: parent and command line."""
    found = {}
    for each in Path("/proc").iterdir():
        try:
            if each.name.isdigit():
                status = (each / "stat").read_text().rpartition(")")[2].split()
                command = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if status[0] != "Z":
                    found[int(each.name)] = (int(status[1]), command)
        except OSError:
            continue
    return found


def below(pid: int) -> dict[int, str]:
    """All the processes that this one began, and those that they began."""
    every, found, last = processes(), {}, {pid}
    while last:
        last = {each for each, (parent, _) in every.items() if parent in last}
        found |= {each: every[each][1] for each in last}
    return found


def workers(pid: int, name: str) -> list[int]:
    return [each for each, command in below(pid).items() if command.startswith(f"ray::{name}")]


def until(done: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)
    return found


def left_of(pids: dict[int, str]) -> dict[int, str]:
    """Those of the processes that still run. Their numbers are not given out again within a test."""
    every = processes()
    return {pid: command for pid, command in pids.items() if pid in every and "ray" in every[pid][1]}


# ---------------------------------------------------------------------------------------------------------- serving


@dataclass(slots=True)
class Serving:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def chains(self) -> Path:
        return self.folder / "m.chains"


@contextmanager
def serving(
    folder: Path, *, ray: int | None = None, limits: dict[str, Any] | None = None, **alias: Any
) -> Iterator[Serving]:
    """The command `serve` on a free port, until it has ended by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "port": port,
        "models": [{"alias": "m", "audit": "m.jsonl", **alias}],
        "limits": {"requests_per_minute": 1_000_000, **(limits or {})},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    more = [] if ray is None else ["--ray", str(ray)]
    with (folder / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(folder / "serve.yaml"), *more], env=ENVIRONMENT, stdout=out, stderr=out
        )
    running = Serving(f"http://127.0.0.1:{port}", process, folder)
    try:
        until(lambda: ready(running), 240)
        yield running
    finally:
        begun = below(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        until(lambda: not left_of(begun), 30)


def ready(running: Serving) -> bool:
    assert running.process.poll() is None, (running.folder / "out.txt").read_text()
    try:
        return httpx.get(f"{running.url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def client(running: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120)


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


async def together(
    running: Serving, bodies: list[dict[str, Any]], *, clients: int, after: Callable[[int], None]
) -> list[Any]:
    """The replies to all of them, so many at a time; ``after`` is told how many have come."""
    gate, come = asyncio.Semaphore(clients), 0
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=running.url, timeout=120, trust_env=False, limits=limits) as http:

        async def one(body: dict[str, Any]) -> httpx.Response:
            nonlocal come
            async with gate:
                reply = await http.post("/v1/chat/completions", json=body)
            come += 1
            after(come)
            return reply

        return await asyncio.gather(*map(one, bodies))


def verdict(reply: httpx.Response) -> dict[str, Any]:
    return dict(reply.json()["hallucination_guard"])


def assert_whole(folder: Path) -> None:
    for chain in chains_of(folder):
        found = verify(chain)
        assert found.ok, (chain, found.problems)


def test_two_replicas_say_and_score_what_one_process_does(tmp_path: Path) -> None:
    bodies = [asked(each, max_tokens=64) for each in QUESTIONS]
    found = {}
    for name, ray in (("one", None), ("two", 2)):
        with serving(tmp_path / name, ray=ray, model="demo", policy="abstain") as running:
            replies = asyncio.run(together(running, bodies, clients=len(bodies), after=lambda come: None))
            assert {each.status_code for each in replies} == {200}
            found[name] = replies
            given = client(running).post(
                "/score", body={"model": "m", "prompt": QUESTIONS[0], "response": "Lyon."}, cast_to=object
            )
            found[f"{name} given"] = given
            said = [
                chunk.choices[0].delta.content or ""
                for chunk in client(running).chat.completions.create(**asked(QUESTIONS[0], max_tokens=16), stream=True)
                if chunk.choices
            ]
            found[f"{name} streamed"] = "".join(said)
            if ray:
                assert len(workers(running.process.pid, "ServeReplica")) == 2
    for one, two in zip(found["one"], found["two"], strict=True):
        assert one.json()["choices"][0]["message"] == two.json()["choices"][0]["message"]
        mine, theirs = verdict(one), verdict(two)
        assert mine["decision"] == theirs["decision"]
        if mine["confidence"] is None:  # its answer was cut
            assert theirs["confidence"] is None
        else:
            assert mine["confidence"] == pytest.approx(theirs["confidence"], **NOISE)
        assert {name: mine["scores"][name] for name in SCORES} == pytest.approx(
            {name: theirs["scores"][name] for name in SCORES}, **NOISE
        )
    assert any(verdict(each)["confidence"] is not None for each in found["one"])
    assert found["one streamed"] == found["two streamed"]
    one, two = (found[f"{name} given"]["hallucination_guard"] for name in ("one", "two"))
    assert (one["decision"], one["scores"]) == (two["decision"], pytest.approx(two["scores"], **NOISE))
    assert_whole(tmp_path / "two" / "m.chains")
    assert len(list(records(tmp_path / "two" / "m.chains"))) == len(bodies) + 2


def test_a_replica_killed_under_six_hundred_requests(tmp_path: Path, model: Path) -> None:
    # Every sixth is a stream. The model is random: its texts are noise, its scores and records are real.
    bodies = [asked(f"question {at}", max_tokens=12, stream=at % 6 == 0) for at in range(600)]
    with serving(tmp_path, ray=2, model=str(model), policy="observe") as running:
        first, _ = workers(running.process.pid, "ServeReplica")
        killed = []

        def kill(come: int) -> None:
            if come >= 200 and not killed:
                killed.append(first)
                os.kill(first, signal.SIGKILL)

        replies = asyncio.run(together(running, bodies, clients=32, after=kill))
        assert killed
        # There are two again, and nobody had to say so.
        until(lambda: len(workers(running.process.pid, "ServeReplica")) == 2, 120)
        until(lambda: ready(running))
        last = client(running).chat.completions.create(**asked("and now?", max_tokens=4))
        assert last.choices[0].message.content is not None
    answered, failed, broken = [], [], []
    for body, reply in zip(bodies, replies, strict=True):
        if reply.status_code != 200:
            failed.append(reply)
        elif not body["stream"]:
            answered.append(verdict(reply))
        elif reply.text.endswith("data: [DONE]\n\n"):
            events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
            answered.append(events[-1]["hallucination_guard"])
        else:
            broken.append(reply.text)
    counts = Counter(answered=len(answered), failed=len(failed), broken=len(broken))
    for each in failed:
        assert each.status_code == 503 and int(each.headers["retry-after"]) > 0, each.text
        assert set(each.json()) == {"error"}
    for each in broken:  # a stream whose replica was lost after a sentence had left
        assert "event: error" in each and "[DONE]" not in each
    assert counts["answered"] > 500
    # None is unguarded: each has a decision, and its record is in a chain; none has two.
    chains = tmp_path / "m.chains"
    assert len(chains_of(chains)) == 3
    assert_whole(chains)
    kept = {each.id: each for each in records(chains)}
    for each in answered:
        record = kept[each["record"]]
        assert (record.decision, each["decision"], record.status) == ("accept", "accept", "scored")
        assert dict(record.scores) == each["scores"]
    assert len({each["record"] for each in answered}) == len(answered)
    told = Counter(each.id for each in requests(records(chains)))
    assert set(told.values()) == {1}
    assert {each["request_id"] for each in answered} <= set(told)


def listening(pid: int) -> set[str]:
    """The addresses on which a process waits for connections, as the kernel writes them."""
    return {address for address, _ in sockets(pid)}


def sockets(pid: int) -> set[tuple[str, str]]:
    """Likewise, with their ports."""
    own = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(str(each.readlink()))
        except OSError:
            continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    waiting = [line[1].partition(":") for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own]
    return {(address, port) for address, _, port in waiting}


def open_ports(pid: int) -> set[int]:
    """The ports on which it waits for connections from everywhere."""
    return {int(port, 16) for address, port in sockets(pid) if address not in LOOPBACK}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_nobody_else_can_use_its_ray(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, ray=1, model=str(model), policy="observe") as running:
        begun = below(running.process.pid)
        [(raylet, command)] = [(pid, each) for pid, each in begun.items() if "/raylet/raylet " in each]
        [gcs] = [pid for pid, each in begun.items() if "/gcs_server " in each]
        for pid in (running.process.pid, raylet, gcs):
            assert listening(pid) and listening(pid) <= LOOPBACK
        [address] = {each.partition("=")[2] for each in command.split() if each.startswith("--gcs-address=")}
        assert address.startswith("127.0.0.1:")
        [folder] = {each.partition("=")[2] for each in command.split() if each.startswith("--temp_dir=")}
        assert Path(folder).parent.stat().st_mode & 0o077 == 0
        # The replicas' own ports are on all addresses; what stands behind them asks for the token.
        [replica] = workers(running.process.pid, "ServeReplica")
        assert open_ports(replica)
        for port in open_ports(replica):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", timeout=20)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        stranger = f"import ray; ray.init(address={address!r}, _temp_dir={str(tmp_path / 'x')!r})"
        done = subprocess.run(
            [sys.executable, "-c", stranger],
            env={
                **ENVIRONMENT,
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            },  # else it looks elsewhere than on the loopback
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode != 0 and "uthenticat" in done.stderr
    assert not Path(folder).parent.exists()


def test_errors_arrive_as_themselves(tmp_path: Path, model: Path) -> None:
    long = {"prompt": "x" * 900, "model": "m"}
    tight = {**asked("hi"), "hallucination_guard": {"confidence": 0.5}}
    statuses = {}
    for name, ray in (("one", None), ("two", 2)):
        with (
            serving(
                tmp_path / name, ray=ray, model=str(model), policy="observe", limits={"shutdown_seconds": 5}
            ) as running,
            httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http,
        ):
            replies = [
                http.post("/v1/completions", json=long),
                http.post("/v1/completions", json={**long, "stream": True}),
                http.post("/v1/chat/completions", json=tight),
                http.post("/v1/chat/completions", json={**tight, "stream": True}),
                http.post("/v1/chat/completions", json={**asked("hi"), "model": "other"}),
                http.post("/v1/score", json={"model": "m", "prompt": "hi", "response_token_ids": [99_999]}),
            ]
            # What the log cannot take is not answered: each has lost what its anchor vouches for.
            for at in range(8):
                assert http.post("/v1/chat/completions", json=asked(f"{at}", max_tokens=2)).status_code == 200
            logs = [running.folder / "m.jsonl"] if ray is None else chains_of(running.chains)
            for log in logs:
                log.write_bytes(b"")
            for stream in (False, True):
                replies.append(http.post("/v1/chat/completions", json=asked("hi", max_tokens=2, stream=stream)))
        assert all(each.status_code >= 400 for each in replies), [each.text for each in replies]
        statuses[name] = [
            (each.status_code, each.json()["error"]["code"], each.json()["error"]["message"]) for each in replies
        ]
        assert [each.headers.get("retry-after") for each in replies[-2:]] == ["10", "10"]
    assert statuses["one"] == statuses["two"]
    assert {code for _, code, _ in statuses["two"]} >= {"invalid_input", "not_stricter", "audit_unavailable"}


def test_what_a_client_left_is_recorded_and_a_killed_server_leaves_nothing_running(tmp_path: Path) -> None:
    body = asked("Write a long story about the sea, with many sentences.", max_tokens=400)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {"port": port, "models": [{"alias": "m", "model": "demo", "policy": "observe", "audit": "m.jsonl"}]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(tmp_path / "serve.yaml"), "--ray", "2"], env=ENVIRONMENT, stdout=out, stderr=out
        )
    running = Serving(f"http://127.0.0.1:{port}", process, tmp_path)
    begun: dict[int, str] = {}
    try:
        until(lambda: ready(running), 240)
        with httpx.Client(base_url=running.url, trust_env=False) as http:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=3)
            [record] = until(lambda: list(records(running.chains, strict=False)), 30)
            assert record.rule == "interrupted" and 0 < record.tokens["out"] < 400
            with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}, timeout=60) as reply:
                next(reply.iter_lines())
            until(lambda: any(each.rule == "interrupted" and each.gate for each in records(running.chains)), 30)
        begun = below(process.pid)
        replicas = {pid: name for pid, name in begun.items() if name.startswith("ray::ServeReplica")}
        assert len(replicas) == 2
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        until(lambda: not left_of(replicas), 30)
    finally:
        process.kill()
    assert_whole(running.chains)
    until(lambda: not left_of(begun), 240)  # Ray's own agents look after their raylet once a minute or so


# ------------------------------------------------------------------------------------------------------------- jobs


def prompts(path: Path, count: int) -> Path:
    lines = [{"id": f"q{at}", "prompt": f"question {at} " + "x" * (at % 9)} for at in range(count)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for each in rows:
        each.pop("seconds", None)
    return rows


def score(model: Path, lines: Path, output: Path, *more: str) -> list[str]:
    settings = ["--max-new-tokens", "48", "--batch-size", "4"]
    return [*COMMAND, "score", "--model", str(model), "--input", str(lines), "--output", str(output), *settings, *more]


def assert_alike(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The same rows in the same order; scores up to the noise of float32."""
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert {**mine, "scores": None} == {**theirs, "scores": None}
        assert mine["scores"] == pytest.approx(theirs["scores"], **NOISE)


@pytest.fixture(scope="session")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """200 prompts, and their rows without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    lines = prompts(folder / "in.jsonl", 200)
    subprocess.run(score(model, lines, folder / "out.jsonl"), env=ENVIRONMENT, check=True, capture_output=True)
    return lines, rows_of(folder / "out.jsonl")


def kept(output: Path) -> int:
    """How many rows are finished beside it."""
    partial = Path(f"{output}.partial")
    return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0


def test_a_file_is_the_same_when_a_process_of_the_job_is_killed(
    tmp_path: Path, model: Path, undisturbed: tuple[Path, list[dict[str, Any]]]
) -> None:
    lines, wanted = undisturbed
    output = tmp_path / "out.jsonl"
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(score(model, lines, output, "--ray", "2"), env=ENVIRONMENT, stdout=out, stderr=out)
    try:
        until(lambda: kept(output) >= 20 or process.poll() is not None, 240)
        assert process.poll() is None, (tmp_path / "out.txt").read_text()
        os.kill(workers(process.pid, "MapWorker")[0], signal.SIGKILL)
        begun = below(process.pid)
        assert process.wait(240) == 0, (tmp_path / "out.txt").read_text()
    finally:
        process.kill()
    found = rows_of(output)
    assert [each["id"] for each in found] == [f"q{at}" for at in range(200)]
    assert_alike(found, wanted)
    until(lambda: not left_of(begun), 30)


def test_a_file_is_the_same_when_the_job_itself_is_killed_and_begun_again(
    tmp_path: Path, model: Path, undisturbed: tuple[Path, list[dict[str, Any]]]
) -> None:
    lines, wanted = undisturbed
    output = tmp_path / "out.jsonl"
    command = score(model, lines, output, "--ray", "2")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: kept(output) >= 40 or process.poll() is not None, 240)
        assert process.poll() is None
        begun = {pid: name for pid, name in below(process.pid).items() if name.startswith("ray::MapWorker")}
        assert begun
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        until(lambda: not left_of(begun), 30)
    finally:
        process.kill()
    before = kept(output)
    assert 40 <= before < 200 and not output.exists()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"continuing: {before} of 200" in done.stderr
    found = rows_of(output)
    assert [each["id"] for each in found] == [f"q{at}" for at in range(200)]
    assert_alike(found, wanted)


def test_an_evaluation_is_the_same(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"id": f"q{at}", "query": f"question {at}", "answers": ["e" if at % 2 else "nothing"]} for at in range(24)]
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = {}
    for name, more in (("one", []), ("two", ["--ray", "2"])):
        output = tmp_path / name
        command = [*COMMAND, "evaluate", "--model", str(model), "--data", str(data), "--output", str(output)]
        settings = ["--max-new-tokens", "8", "--batch-size", "4", "--resamples", "1000"]
        done = subprocess.run(
            [*command, *settings, *more], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        _, *kept_rows = rows_of(output / "generations.jsonl")
        found[name] = sorted(kept_rows, key=lambda each: str(each["id"]))
        found[f"{name} labels"] = sorted(
            rows_of(output / "labels-contains.jsonl")[1:], key=lambda each: str(each["id"])
        )
    assert len(found["two"]) == 24
    assert_alike(found["two"], found["one"])
    assert found["one labels"] == found["two labels"]


def test_a_replica_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"port": 0, "models": [{"alias": "m", "model": "empty"}]}))
    command = [*COMMAND, "serve", "serve.yaml", "--ray", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "the replicas could not be made" in done.stderr and "cannot be loaded" in done.stderr.splitlines()[-1]


def test_what_cannot_be_had_is_said(tmp_path: Path, model: Path) -> None:
    lines = prompts(tmp_path / "in.jsonl", 1)
    done = subprocess.run(
        score(model, lines, Path("-"), "--ray", "2"), env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "give --output FILE" in done.stderr
    missing = score(tmp_path / "missing", lines, tmp_path / "out.jsonl", "--ray", "2")
    done = subprocess.run(missing, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "missing" in done.stderr and "Traceback" not in done.stderr
