"""Which kind of server stands at an address."""

from __future__ import annotations

from typing import Literal

from hallucination_guard.errors import ConfigurationError
from hallucination_guard.server.upstream.client import Client, field
from hallucination_guard.server.upstream.llamacpp import LlamaCpp
from hallucination_guard.server.upstream.part import Kind, Upstream
from hallucination_guard.server.upstream.sglang import SGLang
from hallucination_guard.server.upstream.unknown import Unknown
from hallucination_guard.server.upstream.vllm import VLLM

__all__ = ["connect"]

_KINDS: dict[str, type[VLLM | LlamaCpp | SGLang | Unknown]] = {
    "vllm": VLLM,
    "llamacpp": LlamaCpp,
    "sglang": SGLang,
    "unknown": Unknown,
}


async def connect(
    url: str,
    *,
    kind: Kind | Literal["auto"] = "auto",
    model: str | None = None,
    dtype: str = "",
    api_key: str | None = None,
    timeout: float = 120.0,
) -> Upstream:
    """The server at an address.

    Args:
        url: its root; ``/v1`` at the end is looked over.
        kind: what it is; ``auto`` asks it, and takes what says nothing that is known for ``unknown``.
        model: which of its models; by default its first.
        dtype: of its weights, where it does not say so itself: a calibration is bound to it.
        api_key: for its ``Authorization``.
        timeout: seconds without a byte after which it has failed.

    Raises:
        ConfigurationError: if the kind is none.
        UpstreamError: if the server does not answer.
    """
    if kind != "auto" and kind not in _KINDS:
        raise ConfigurationError(f"the upstream's kind is {kind!r}", hint=f"auto, {', '.join(_KINDS)}")
    client = Client(url, api_key=api_key, timeout=timeout)
    try:
        found = await _kind(client) if kind == "auto" else kind
    except BaseException:
        await client.close()
        raise
    return _KINDS[found](client, model=model, dtype=dtype)


async def _kind(client: Client) -> str:
    """What the server's list of models says that it belongs to."""
    owner = field(await client.get("/v1/models"), "data", 0, "owned_by")
    return owner if isinstance(owner, str) and owner in _KINDS else "unknown"
