"""The command is told to stop while it scores for longer than it may: the record is kept, or its loss is said."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from hallucination_guard.audit import verify
from hallucination_guard.server.settled import settled

# ``serve`` as it is, over doubles; the scorer says that it began, and waits until it may go on.
RUN = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("doubles", sys.argv.pop(1))
doubles = importlib.util.module_from_spec(spec)
sys.modules["doubles"] = doubles
spec.loader.exec_module(doubles)
from hallucination_guard import Guard
from hallucination_guard.cli import main
from hallucination_guard.replicas import opening
from hallucination_guard.server.house import Served
from hallucination_guard_policies import AbstainBelow

scorer = doubles.scorer()
score = scorer.batch

def slowly(*of):
    pathlib.Path("begun").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    return score(*of)

scorer.batch = slowly

def opened(settings, stack, *, load):
    [alias] = settings.models
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    audit = opening._log(alias, {}, stack, "")
    return {"m": Served(alias=alias, guard=Guard(doubles.Talker(), policy=policy, scorer=scorer, audit=audit))}

opening.opened = opened
sys.exit(main(sys.argv[1:]))
"""


@dataclass(slots=True)
class Stopping:
    """A server that was told to stop while it scores."""

    process: subprocess.Popen[str]
    folder: Path

    def says(self, words: str) -> bool:
        assert self.process.stderr is not None
        return any(words in line for line in self.process.stderr)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "a.jsonl").read_text().splitlines()]


@contextmanager
def stopping(folder: Path, *, stream: bool) -> Iterator[Stopping]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "s.yaml").write_text(
        "models: [{alias: m, model: demo, policy: abstain, audit: a.jsonl}]\nlimits: {shutdown_seconds: 1}\n"
    )
    command = [sys.executable, "-c", RUN, str(Path(__file__).with_name("conftest.py"))]
    command += ["serve", "s.yaml", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    asked = {"model": "m", "messages": [{"role": "user", "content": "Where?"}], "stream": stream}

    def ask() -> None:
        with suppress(httpx.TransportError):
            httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=60, trust_env=False)

    client, limit = threading.Thread(target=ask), threading.Timer(60, process.kill)
    limit.start()
    try:
        found = Stopping(process, folder)
        assert found.says("serving m")
        end = time.monotonic() + 30
        while True:
            with suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        client.start()
        while not (folder / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        yield found
    finally:
        limit.cancel()
        process.kill()
        process.wait(20)
        if client.ident is not None:
            client.join(20)
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_is_closed_after_the_record_that_outlasts_its_time(tmp_path: Path, stream: bool) -> None:
    with stopping(tmp_path, stream=stream) as server:
        assert server.says("still under way: 1;")
        assert server.records == []
        (tmp_path / "go").touch()
        assert server.process.wait(20) == 0
        record = server.records[0]
        assert record["decision"] == "accept" and record["answer"].startswith("Lyon")
        assert verify(tmp_path / "a.jsonl").ok


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_further_signal_ends_it_and_says_what_has_no_record(tmp_path: Path, number: signal.Signals) -> None:
    with stopping(tmp_path, stream=True) as server:
        assert server.says("still under way: 1;")
        server.process.send_signal(number)
        assert server.says("with 1 under way")
        assert server.process.wait(20) == -number
        assert server.records == []


def test_a_signal_in_the_middle_of_a_line_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)

    def say(line: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    guard = SimpleNamespace(under_way=1, settle=lambda seconds=None: True)
    with settled([guard], 1, say):  # type: ignore[list-item]
        heed = signal.getsignal(signal.SIGTERM)
        assert callable(heed)
        heed(signal.SIGTERM, None)
        guard.under_way = 0
    assert raised == [signal.SIGTERM]
    assert "with 1 under way" in capfd.readouterr().err
