"""Who comes in, and with how much: a plain ASGI door before anything is parsed or routed.

In this order: the ``Host`` header, whether the server is closing, the key and its role, its rate and its concurrency,
the body's type, size and speed. So who has no key cannot make the server read a body.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hallucination_guard.server.config import Settings, is_loopback
from hallucination_guard.server.keys import Key, Keys, Role
from hallucination_guard.server.refusals import Refusal

__all__ = ["Door", "Visitor"]

_Scope: TypeAlias = Any
_Receive: TypeAlias = Callable[[], Any]
_Send: TypeAlias = Callable[[Any], Any]

_log = logging.getLogger("hallucination_guard.server")

_OPEN = frozenset({"/healthz", "/readyz"})
_ROLES: Mapping[str, Role] = {
    "/v1/chat/completions": "ask",
    "/v1/completions": "ask",
    "/v1/score": "score",
    "/metrics": "read",
}
"""What a key has to be allowed."""

_ANY_KEY = frozenset({"/v1/models", "/openapi.json"})

_WITH_BODY = frozenset(path for path, role in _ROLES.items() if role != "read")
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks.

    Args:
        id: of the request.
        principal: the name of the key; None where there are no keys.
        max_tokens: that may be asked for.
    """

    id: str
    principal: str | None
    max_tokens: int


@dataclass(slots=True)
class _Account:
    """A key's bucket of requests, filled steadily, and how many of them run."""

    room: float
    at: float
    running: int = 0


@dataclass(slots=True)
class Door:
    """Lets requests in, or refuses them in the OpenAI API's shape.

    Args:
        app: behind it.
        settings: of the server.
        keys: who may come in; None for everybody.
        closing: whether the server is shutting down.
        refused: told of every refusal's code.
    """

    app: Callable[[_Scope, _Receive, _Send], Any]
    settings: Settings
    keys: Keys | None
    closing: Callable[[], bool]
    refused: Callable[[str], None]
    _accounts: dict[str, _Account] = field(default_factory=dict)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Let one in."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no other protocol is spoken here
            await receive()
            await send({"type": "websocket.close", "code": 1003})
            return
        identity = secrets.token_hex(12)

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", identity.encode())]}
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_host(headers)
            if scope["path"] in _OPEN:
                await self.app(scope, receive, marked)
                return
            if scope["path"] not in _ANY_KEY and scope["path"] not in _ROLES:
                # The router takes "/metrics\n" for "/metrics", of which no role would have been asked.
                raise Refusal(404, "there is nothing here", code="not_found", close=True)
            if self.closing():
                raise Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5, close=True)
            key = self._check_key(headers, scope["path"])
            account = self._charge(key)
            account.running += 1
            try:
                posts = scope["method"] == "POST" and scope["path"] in _WITH_BODY
                body = await self._body(headers, receive, typed=posts)
                allowed = self.settings.limits.max_tokens
                if key is not None and key.limits.max_tokens is not None:
                    allowed = min(allowed, key.limits.max_tokens)
                state = scope.setdefault("state", {})
                state["visitor"] = Visitor(identity, None if key is None else key.name, allowed)
                await self.app(scope, _replayed(body, receive), marked)
            finally:
                account.running -= 1
        except Refusal as refusal:
            self.refused(refusal.code)
            await _refuse(refusal, marked)
        except _Left:
            return
        except Exception as error:
            # The app has answered it without its words, which may hold a prompt; uvicorn would log them.
            _log.error("server.broke_off %s", type(error).__name__)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """A page of another name in a browser on this machine must not reach a server that asks for no key."""
        allowed = self.settings.hosts
        if allowed is None:
            if self.keys is not None or not is_loopback(self.settings.host):
                return
            allowed = [*_LOCAL]
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        if name.lower() not in [each.lower() for each in allowed]:
            raise Refusal(421, "this server is not called by that name", code="unknown_host", close=True)

    def _check_key(self, headers: Mapping[str, str], path: str) -> Key | None:
        if self.keys is None:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = self.keys.whose(given.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refusal(401, "a valid API key is needed", code="invalid_api_key", close=True)
        role = _ROLES.get(path)
        if role is not None and role not in key.roles:
            raise Refusal(403, f"this key has not the role {role!r}", code="missing_role", close=True)
        return key

    def _charge(self, key: Key | None) -> _Account:
        own = None if key is None else key.limits
        rate = (own and own.requests_per_minute) or self.settings.limits.requests_per_minute
        most = (own and own.concurrent) or self.settings.limits.concurrent
        now = time.monotonic()
        account = self._accounts.setdefault("" if key is None else key.name, _Account(float(rate), now))
        account.room = min(float(rate), account.room + (now - account.at) * rate / 60.0)
        account.at = now
        if account.room < 1.0:
            wait = math.ceil((1.0 - account.room) * 60.0 / rate)
            raise Refusal(429, f"more than {rate} requests a minute", code="rate_limit", retry_after=wait, close=True)
        if account.running >= most:
            raise Refusal(
                429, f"more than {most} requests at the same time", code="concurrency_limit", retry_after=1, close=True
            )
        account.room -= 1.0
        return account

    async def _body(self, headers: Mapping[str, str], receive: _Receive, *, typed: bool) -> bytes:
        limits = self.settings.limits
        if typed and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refusal(415, "the body has to be application/json", code="unsupported_media_type", close=True)
        too_large = Refusal(413, f"the body has more than {limits.body_bytes} bytes", code="body_too_large", close=True)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    body += message.get("body", b"")
                    if len(body) > limits.body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {limits.body_seconds:g} seconds", code="slow_body", close=True
            ) from None


class _Left(Exception):
    """The client is gone."""


def _replayed(body: bytes, receive: _Receive) -> _Receive:
    """The body once, and then what comes: the client's leaving."""
    given = False

    async def again() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _refuse(refusal: Refusal, send: _Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
