"""The command in a process of its own, killed or told to stop as it answers: nothing is lost, nothing out unguarded."""

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
from pathlib import Path
from typing import Any

import httpx

from hallucination_guard.audit import verify

RUN = "import sys; from hallucination_guard.cli import main; sys.exit(main(sys.argv[1:]))"
QUESTIONS = [f"What is {each} + {each}?" for each in range(40)]
CLIENTS = 6


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Until it is ready; killed at the end if it still runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "serve.yaml"
    config.write_text("models: [{alias: d, policy: abstain, audit: a.jsonl, max_new_tokens: 12}]\n")
    command = [sys.executable, "-c", RUN, "serve", str(config), "--port", str(port)]
    with (folder / "stderr").open("ab") as said:
        process = subprocess.Popen(command, stderr=said, cwd=folder)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < end, (folder / "stderr").read_text()
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait(20)


def test_what_was_answered_is_in_the_log_and_the_log_goes_on(tmp_path: Path) -> None:
    replies: list[dict[str, Any]] = []
    broken: list[str] = []

    def client(own: int, url: str) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            for question in QUESTIONS[own::CLIENTS]:
                try:
                    reply = http.post(
                        "/v1/chat/completions",
                        json={"model": "d", "messages": [{"role": "user", "content": question}]},
                    )
                except httpx.TransportError as error:
                    broken.append(type(error).__name__)
                    return
                assert reply.status_code == 200
                replies.append(reply.json())

    with serving(tmp_path) as (process, url):
        clients = [threading.Thread(target=client, args=(own, url)) for own in range(CLIENTS)]
        for each in clients:
            each.start()
        end = time.monotonic() + 60
        while len(replies) < 2 * CLIENTS:  # some are out, and others under way
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        for each in clients:
            each.join(60)
    assert len(broken) == CLIENTS and len(replies) < len(QUESTIONS)

    with serving(tmp_path) as (process, url):  # the same log, whatever its last line looks like
        again = httpx.post(
            f"{url}/v1/chat/completions",
            json={"model": "d", "messages": [{"role": "user", "content": "What is 7 + 8?"}]},
            trust_env=False,
            timeout=60,
        )
        assert again.status_code == 200
        replies.append(again.json())
        with suppress(httpx.ReadTimeout):  # a client that leaves: what was drawn for it has a record as well
            httpx.post(
                f"{url}/v1/chat/completions",
                json={"model": "d", "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
                trust_env=False,
                timeout=0.5,
            )
        process.terminate()
        assert process.wait(60) == 0
    recorded = {}
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        record = json.loads(line)
        recorded[record["id"]] = record
    assert any("sky" in str(each["prompt"]) for each in recorded.values())
    for reply in replies:
        record, message = recorded[reply["hallucination_guard"]["record"]], reply["choices"][0]["message"]
        assert (record["decision"] == "accept") == (message["content"] is not None)
        if message["content"] is not None:
            assert message["content"] == record["answer"]
    assert verify(tmp_path / "a.jsonl").ok
