"""Who comes in: keys, roles, rates, sizes and speeds, before anything is parsed."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hallucination_guard.cli import main
from hallucination_guard.errors import ConfigurationError
from hallucination_guard.server.config import Settings
from hallucination_guard.server.keys import Keys, new_key

ASK = {"model": "m", "messages": [{"role": "user", "content": "Where is Lyon?"}]}


@pytest.fixture(scope="module")
def keyed(serve: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, dict[str, str]]]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {role: new_key(path, role, [role]) for role in ("ask", "score", "read")}
    written = yaml.safe_load(path.read_text())
    for name, limits in (
        ("slow", {"requests_per_minute": 2}),
        ("one", {"concurrent": 1}),
        ("short", {"max_tokens": 5}),
    ):
        made[name] = new_key(path, name, ["ask"])
        written = yaml.safe_load(path.read_text())
        written["keys"][-1]["limits"] = limits
        path.write_text(yaml.safe_dump(written))
    limits = {"body_seconds": 0.5, "head_seconds": 0.5, "body_bytes": 65536}
    with serve(settings={"limits": limits}, keys=Keys.read(path)) as running:
        yield running, made


def post(keyed: Any, name: str | None, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    running, keys = keyed
    headers = {} if name is None else {"authorization": f"Bearer {keys.get(name, name)}"}
    return httpx.post(running.url + path, json=body or ASK, headers=headers, trust_env=False, timeout=20)


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


@pytest.mark.parametrize("name", [None, "hg-wrong", "x ask", "Ask"])
def test_without_a_key_nobody_comes_in(keyed: Any, name: str | None) -> None:
    reply = post(keyed, name)
    assert code(reply) == (401, "invalid_api_key") and reply.headers["www-authenticate"] == "Bearer"


def test_a_key_opens_what_its_role_says(keyed: Any) -> None:
    running, keys = keyed
    score = {"model": "m", "prompt": "Where?", "response": "In France."}
    assert post(keyed, "ask").status_code == 200
    assert code(post(keyed, "score")) == (403, "missing_role")
    assert post(keyed, "score", "/v1/score", **score).status_code == 200
    assert code(post(keyed, "ask", "/v1/score", **score)) == (403, "missing_role")
    for name, status in (("read", 200), ("ask", 403)):
        headers = {"authorization": f"Bearer {keys[name]}"}
        assert httpx.get(running.url + "/metrics", headers=headers, trust_env=False).status_code == status
    assert httpx.get(running.url + "/metrics", trust_env=False).status_code == 401
    for path in ("/healthz", "/readyz"):
        assert httpx.get(running.url + path, trust_env=False).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions%0A", "/metrics%0A", "/v1/models%0A", "/v1/nothing", "/"])
def test_a_path_that_is_none_of_the_servers_is_not_there_whatever_the_key(keyed: Any, path: str) -> None:
    running, keys = keyed
    drawn = len(running.model.calls)
    headers = {"authorization": f"Bearer {keys['score']}"}
    for reply in (
        httpx.post(running.url + path, headers=headers, json=ASK, trust_env=False),
        httpx.get(running.url + path, headers=headers, trust_env=False),
    ):
        assert code(reply) == (404, "not_found")
    assert len(running.model.calls) == drawn


def test_any_key_may_read_the_schema_and_the_aliases(keyed: Any) -> None:
    running, keys = keyed
    for path in ("/openapi.json", "/v1/models"):
        headers = {"authorization": f"Bearer {keys['score']}"}
        assert httpx.get(running.url + path, headers=headers, trust_env=False).status_code == 200
        assert httpx.get(running.url + path, trust_env=False).status_code == 401


def test_the_record_names_the_key_and_not_what_opens(keyed: Any) -> None:
    post(keyed, "ask")
    assert keyed[0].sink.records[-1].principal == "ask"
    assert keyed[1]["ask"] not in repr(keyed[0].sink.records[-1])


def test_a_key_has_its_own_limits(keyed: Any) -> None:
    statuses = [post(keyed, "slow") for _ in range(3)]
    assert [each.status_code for each in statuses] == [200, 200, 429]
    assert code(statuses[-1]) == (429, "rate_limit") and 0 < int(statuses[-1].headers["retry-after"]) <= 30
    assert code(post(keyed, "short", **ASK, max_tokens=6)) == (400, "too_many_tokens")
    post(keyed, "short")
    assert keyed[0].model.calls[-1][1]["max_new_tokens"] == 5


def test_a_key_runs_only_so_much_at_the_same_time(keyed: Any) -> None:
    running, keys = keyed
    head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keys['one']}\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as first:
        path = head.replace("/v1/score", "/v1/chat/completions")
        first.sendall(f"{path}content-type: application/json\r\ncontent-length: 10\r\n\r\n".encode())
        time.sleep(0.1)
        assert code(post(keyed, "one")) == (429, "concurrency_limit")
        assert b"408" in first.recv(100)
    assert post(keyed, "one").status_code == 200


def told(running: Any, sent: bytes, *, slowly: bytes = b"") -> tuple[bytes, float]:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.settimeout(10)
        connection.sendall(sent)
        for each in slowly:
            time.sleep(0.1)
            try:
                connection.sendall(bytes([each]))
            except OSError:
                break
        try:
            return connection.recv(4096), time.monotonic() - began
        except ConnectionError:
            return b"", time.monotonic() - began


def test_a_head_that_does_not_come_is_given_up(keyed: Any) -> None:
    reply, seconds = told(keyed[0], b"POST /v1/chat", slowly=b"/completions HTTP/1.1\r\n")
    assert reply == b"" and seconds < 3
    reply, seconds = told(keyed[0], b"")
    assert reply == b"" and 0.4 < seconds < 3


def test_a_body_that_comes_slowly_is_given_up(keyed: Any) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keyed[1]['ask']}\r\n"
    typed = f"{head}content-type: application/json\r\ncontent-length: 100\r\n\r\n".encode()
    reply, seconds = told(keyed[0], typed, slowly=b" " * 8)
    assert b" 408 " in reply and b"slow_body" in reply and seconds < 3


@pytest.mark.parametrize("length", ["104857600", "-1", "many"])
def test_a_body_that_says_it_is_too_large_is_not_waited_for(keyed: Any, length: str) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keyed[1]['ask']}\r\n"
    typed = f"{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()
    reply, seconds = told(keyed[0], typed)
    assert (b" 413 " if length.isdigit() else b" 400 ") in reply and seconds < 0.4


def test_a_body_without_a_length_is_counted(keyed: Any) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(70):
            yield b" " * 1000

    headers = {"authorization": f"Bearer {keyed[1]['ask']}", "content-type": "application/json"}
    reply = httpx.post(
        keyed[0].url + "/v1/chat/completions", content=pieces(), headers=headers, trust_env=False, timeout=20
    )
    assert code(reply) == (413, "body_too_large")


_SERVER = """
import sys
sys.path[:0] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("conftest_of_servers", {conftest!r})
module = importlib.util.module_from_spec(spec)
sys.modules["conftest_of_servers"] = module
spec.loader.exec_module(module)
with module.serving() as running:
    print(running.port, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_megabytes_costs_next_to_no_memory(chunked: bool) -> None:
    source = _SERVER.format(path=sys.path, conftest=str(Path(__file__).with_name("conftest.py")))
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        port = int(process.stdout.readline())
        httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=ASK, trust_env=False, timeout=30)
        before = peak(process.pid)
        length = "transfer-encoding: chunked" if chunked else "content-length: 104857600"
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{length}\r\n"
        )
        piece = b" " * (1 << 20)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            sent, reply = 0, b""
            try:
                connection.sendall(head.encode() + b"\r\n")
                for _ in range(100):
                    connection.sendall(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
                    sent += 1
            except OSError:
                pass
            try:
                reply = connection.recv(4096)
            except OSError:
                assert sent < 100  # it was cut off
        assert b" 413 " in reply or sent < 100
        assert peak(process.pid) - before < 50 * 1024
        still = httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=10)
        assert still.status_code == 200
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def peak(pid: int) -> int:
    """The most memory that it ever had, in KiB."""
    return next(
        int(line.split()[1])
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


# ------------------------------------------------------------------------------------------- keys and settings


def test_a_key_is_shown_once_and_lies_in_the_file_as_a_hash(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "keys.yaml"
    assert main(["serve", "--new-key", "web", "--role", "ask", "score", "--keys", str(path)]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("hg-") and len(key) > 40
    assert key not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Keys.read(path).whose(key)
    assert found is not None and (found.name, found.roles) == ("web", ["ask", "score"])
    assert Keys.read(path).whose(key[:-1]) is None
    assert main(["serve", "--new-key", "web", "--role", "ask", "--keys", str(path)]) == 2
    assert main(["serve", "--new-key", "other", "--role", "admin", "--keys", str(path)]) == 2
    assert main(["serve", "--new-key", "other", "--keys", str(path)]) == 2


@pytest.mark.parametrize("text", ["", "keys: []", "keys: [{name: a, roles: [ask], sha256: x}]", "[" * 5000, "\x00"])
def test_a_broken_file_of_keys_opens_to_nobody(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError):
        Keys.read(path)


def checked(tmp_path: Path, text: str, capsys: Any) -> tuple[int, list[str]]:
    path = tmp_path / "serve.yaml"
    path.write_text(text, encoding="utf-8")
    status = main(["serve", str(path), "--check"])
    return status, capsys.readouterr().out.splitlines()


def test_a_good_file_has_nothing_wrong(tmp_path: Path, capsys: Any) -> None:
    new_key(tmp_path / "keys.yaml", "a", ["ask"])
    text = """
host: 0.0.0.0
keys: keys.yaml
models:
  - {alias: a, model: demo, policy: abstain, confidence: 0.6, audit: logs/a.jsonl}
  - {alias: b, upstream: {url: 'http://127.0.0.1:8000', kind: vllm, dtype: float32}, policy: observe, audit: b.jsonl}
limits: {queue: 8, running: 4, body_bytes: 1048576}
log: {prompts: false}
"""
    assert checked(tmp_path, text, capsys) == (0, ["nothing is wrong"])


def test_each_thing_that_is_wrong_has_a_line(tmp_path: Path, capsys: Any) -> None:
    status, lines = checked(tmp_path, "port: '80'\nwhat: 1\nmodels: [{alias: a, max_risk: 2}]\n", capsys)
    assert status == 2 and [line.partition(":")[0] for line in lines] == ["port", "models.0.max_risk", "what"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host: 0.0.0.0\n", "can be reached from elsewhere and there are no keys"),
        ("models: [{alias: a}, {alias: a}]\n", "the alias 'a' is there twice"),
        ("keys: none.yaml\n", "cannot be read"),
        ("models: [{alias: a, policy: nothing.yaml}]\n", "nothing.yaml"),
        ("models: [{alias: a, policy: observe, confidence: 0.5}]\n", "replaces nothing"),
        ("models: [{alias: a, calibration: none.json}]\n", "none.json"),
        ("models: [{alias: a, content: hmac}]\n", "needs audit_key_env"),
        ("models: [{alias: a, audit_key_env: NOT_SET_AT_ALL}]\n", "NOT_SET_AT_ALL"),
        ("models: [{alias: a}, {alias: b, content: redacted}]\n", "share the log"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path: Path, capsys: Any, text: str, said: str) -> None:
    status, lines = checked(tmp_path, text, capsys)
    assert status == 2 and len(lines) == 1 and said in lines[0], lines


def test_everybody_may_come_in_only_where_it_is_said() -> None:
    assert Settings.model_validate({"host": "0.0.0.0", "open_without_keys": True}).keys is None
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert Settings.model_validate({"host": host}).host == host


# ------------------------------------------------------------------------------------------- the demo model


@pytest.mark.timeout(200)
def test_the_command_serves_the_demo_model(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("port: 0\nmodels: [{alias: d, policy: observe, audit: a.jsonl}]\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = "import sys; from hallucination_guard.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", run, "serve", str(tmp_path / "serve.yaml"), "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=90) as http:
            while True:
                try:
                    assert http.get("/readyz").status_code == 200
                    break
                except httpx.ConnectError:
                    assert process.poll() is None, lines
                    time.sleep(0.1)
            body = {"model": "d", "max_tokens": 8, "messages": [{"role": "user", "content": "What is 1 + 1?"}]}
            reply = http.post("/v1/chat/completions", json=body).json()
        verdict = reply["hallucination_guard"]
        assert reply["choices"][0]["message"]["content"] and verdict["status"] == "scored" and verdict["scores"]
        records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert verdict["record"] in [each["id"] for each in records]
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()
    assert any("server.decided d accept" in line for line in lines)
    assert not any("What is 1 + 1?" in line for line in lines)
