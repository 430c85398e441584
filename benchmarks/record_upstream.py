"""Keeps what a real server says, for the unit tests: ``python benchmarks/record_upstream.py URL FILE``.

The server runs the demo model as ``smollm2``. What nobody reads, and what names a folder of this machine, is left out.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from hallucination_guard import WhiteBoxModel
from hallucination_guard.server.upstream.asking import asked_of, said_in_full
from hallucination_guard.server.upstream.client import Client
from hallucination_guard.server.upstream.kinds import connect
from hallucination_guard.values import GenerationSettings

FRANCE = "What is the capital of France?"
EMOJI = "Repeat after me: 🦓🙂🦓 Zebras! 🙂"
ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    (FRANCE, {"max_new_tokens": 24}),
    (FRANCE, {"max_new_tokens": 4}),
    (FRANCE, {"stop": ["Par"]}),
    (EMOJI, {"max_new_tokens": 24}),
)
_UNREAD = frozenset(
    {"root", "model_path", "chat_template", "chat_template_tool_use", "default_generation_settings"}
    | {"generation_settings", "timings", "permission", "meta", "details", "models", "chat_template_caps", "bytes"}
    | {"top_logprobs", "created", "id_slot", "media_marker", "ui_settings"}
)


class Recorder(httpx.AsyncHTTPTransport):
    """Passes on, and keeps both sides."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_keepalive_connections=0))
        self.kept: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One exchange."""
        response = await super().handle_async_request(request)
        await response.aread()
        body = json.loads(request.content) if request.content else None
        self.kept.append(
            {
                "method": request.method,
                "path": request.url.path,
                "body": body,
                "reply": [_read(line[5:].strip()) for line in response.text.splitlines() if line.startswith("data:")]
                if body is not None and body.get("stream")
                else _without(response.json()),
            }
        )
        return httpx.Response(response.status_code, content=response.content)


def _read(data: str) -> Any:
    return data if data == "[DONE]" else _without(json.loads(data))


def _without(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {name: _without(each) for name, each in plain.items() if name not in _UNREAD}
    return [_without(each) for each in plain] if isinstance(plain, list) else plain


async def main(url: str, file: Path) -> None:
    """Ask everything once, whole and streamed."""
    recorder, model = Recorder(), WhiteBoxModel.demo()
    upstream: Any = await connect(url)
    await upstream.close()
    upstream._client = Client(url, transport=recorder)
    await upstream.describe()
    for question, settings in ASKED:
        asked = asked_of(model, question, said_in_full(GenerationSettings.of(settings)), upstream.can)
        await upstream.answer(asked)
        if upstream.can.streamed_ids:
            async for _ in upstream.stream(asked):
                pass
    await upstream.close()
    file.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in recorder.kept) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
