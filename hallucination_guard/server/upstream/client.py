"""Asking a server: one JSON object, or server-sent events as they come. Whatever fails is an ``UpstreamError``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeAlias

from hallucination_guard.errors import MissingExtra, UpstreamError
from hallucination_guard.server.upstream.part import LogprobsError

try:
    import httpx
except ImportError as error:
    raise MissingExtra(
        "the sidecar needs httpx, which is not installed", hint="pip install 'hallucination-guard-semgrad[server]'"
    ) from error

__all__ = ["Client", "Reply", "field", "ids_of", "logprob_of", "text_of"]

Reply: TypeAlias = Mapping[str, Any]
"""What a server wrote; it is looked at with :func:`field` alone."""

_SHOWN = 200  # characters of a server's own words in an error


class Client:
    """A connection to one server.

    Args:
        url: its root, without ``/v1``.
        api_key: for its ``Authorization``; it is never written down.
        timeout: seconds without a byte after which it has failed.
        transport: how it is reached; for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=5.0),
            transport=transport,
            # Servers close connections that idle (llama-server after 5 seconds), and a request on one of these is lost.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,  # the server stands beside the guard: what is asked of it goes through no proxy
        )

    async def get(self, path: str) -> Reply:
        """What a path says.

        Raises:
            UpstreamError: if it does not.
        """
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: Mapping[str, object]) -> Reply:
        """What comes back for ``body``.

        Raises:
            UpstreamError: if nothing, or no JSON object does.
        """
        return await self._whole("POST", path, body)

    async def events(self, path: str, body: Mapping[str, object]) -> AsyncGenerator[Reply, None]:
        """The events that come back for ``body``, as they come. Closing the iterator ends the request.

        Raises:
            UpstreamError: if it fails.
        """
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refused(path, response)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    event = self._object(path, data)
                    if "error" in event:
                        raise UpstreamError(f"the server at {self.url} failed in mid-stream: {_words(event['error'])}")
                    yield event
        except httpx.HTTPError as error:
            raise self._unreached(path, error) from error

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def _whole(self, method: str, path: str, body: Mapping[str, object] | None) -> Reply:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreached(path, error) from error
        if response.status_code != 200:
            raise self._refused(path, response)
        return self._object(path, response.text)

    def _object(self, path: str, written: str) -> Reply:
        try:
            found = json.loads(written)
        except (ValueError, RecursionError):  # the second: brackets within brackets
            found = None
        if not isinstance(found, dict):
            raise UpstreamError(f"what the server at {self.url}{path} gave is no JSON object")
        return found

    def _unreached(self, path: str, error: httpx.HTTPError) -> UpstreamError:
        return UpstreamError(
            f"the server at {self.url}{path} does not answer: {type(error).__name__}", hint="see whether it runs"
        )

    def _refused(self, path: str, response: httpx.Response) -> UpstreamError:
        return UpstreamError(f"the server at {self.url}{path} says {response.status_code}: {_words(response.text)}")


def field(reply: Any, *path: str | int) -> Any:
    """What stands at a path of names and places; None where nothing does."""
    for step in path:
        if isinstance(step, int):
            reply = reply[step] if isinstance(reply, list) and len(reply) > step else None
        else:
            reply = reply.get(step) if isinstance(reply, Mapping) else None
    return reply


def ids_of(found: object) -> tuple[int, ...] | None:
    """A list of token ids; None where it is none. What no id can be is seen when they are read."""
    if not isinstance(found, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in found):
        return None
    return tuple(found)


def text_of(found: object) -> str:
    """A text; empty where there is none.

    Raises:
        UpstreamError: if it is something else.
    """
    if found is None:
        return ""
    if not isinstance(found, str):
        raise UpstreamError(f"the server gave {type(found).__name__!r} for a text", hint="only texts are read")
    return found


def logprob_of(found: object) -> float | None:
    """A log-probability; None where there is none. One that is not finite is seen when it is compared.

    Raises:
        LogprobsError: if it is no number.
    """
    if found is None:
        return None
    try:
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
    except OverflowError:  # JSON has whole numbers of any length
        pass
    raise LogprobsError(f"the server gave {type(found).__name__!r} for a log-probability")


def _words(said: object) -> str:
    return str(said)[:_SHOWN]
