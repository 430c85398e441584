"""From outcomes to the wire: completions, chunks and errors as the OpenAI API writes them, and the verdict beside.

The verdict stands under one key at the top level. Clients that drop what they do not know keep what lies in ``usage``
(whole answers) and in ``logprobs`` (streams as well), so it is mirrored there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from hallucination_guard.guard import KEY, Replying
from hallucination_guard.guard.reply import verdict_of
from hallucination_guard.values import JSON, Outcome, Released

__all__ = ["Wire", "event", "verdict_on_the_wire"]

DONE = b"data: [DONE]\n\n"


def verdict_on_the_wire(outcome: Outcome) -> dict[str, JSON]:
    """The verdict as plain JSON; it holds no text of prompt or draft."""
    plain = verdict_of(outcome)
    return {
        **plain,
        "record": outcome.audit_ids[-1] if outcome.audit_ids else None,
        "answered": outcome.text is not None,
        "finish_reason": outcome.generation.finish_reason,
    }


def event(plain: dict[str, Any], *, name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(plain, ensure_ascii=False)}\n\n".encode("utf-8", "surrogatepass")


class Wire:
    """Writes the replies to one request.

    Args:
        alias: by which it asked.
        abstention: what is said instead of an answer that was not let through.
        chat: whether it is a chat's, or a text completion's.
        usage: whether a stream is to end with its usage.
        id: of the request.
        fingerprint: of the model.
    """

    def __init__(self, *, alias: str, abstention: str, chat: bool, usage: bool, id: str, fingerprint: str) -> None:
        self._replying = Replying(abstention)
        self._chat, self._usage = chat, usage
        self._head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + id,
            "created": int(time.time()),
            "model": alias,
            "system_fingerprint": fingerprint[:16],
        }

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """A whole reply."""
        reply, verdict = self._replying(outcome), verdict_on_the_wire(outcome)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": reply.ended,
            "logprobs": self._logprobs(verdict),
        }
        if self._chat:
            message: dict[str, Any] = {
                "role": "assistant",
                "content": outcome.text,
                "refusal": None if reply.answered else reply.text,
            }
            if calls := self._calls(outcome):
                message |= {"tool_calls": calls, "content": outcome.text or None}
            choice["message"] = message
        else:
            choice["text"] = outcome.text or ""
        return {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [choice],
            "usage": self._usage_of(outcome, verdict),
            KEY: verdict,
        }

    def part(self, released: Released) -> bytes:
        """A sentence that was let through."""
        verdict: dict[str, JSON] = {
            "decision": "accept",
            "confidence": released.verdict.confidence,
            "scores": dict(released.verdict.score.scores),
            "status": released.verdict.score.status,
            "record": released.audit_id or None,
        }
        return event(self._chunk(text=released.text) | {KEY: verdict})

    def end(self, outcome: Outcome, *, streamed: bool) -> Iterator[bytes]:
        """The end of a stream.

        Args:
            outcome: of it.
            streamed: whether its sentences have left; else all of it leaves now.
        """
        reply, verdict = self._replying(outcome), verdict_on_the_wire(outcome)
        text = outcome.text or ""
        if streamed:
            # An escalation's answer is a paragraph of its own behind what was released.
            text = "" if outcome.accepted else ("\n\n" if outcome.released and text else "") + text
        if text:
            yield event(self._chunk(text=text))
        if self._chat and not reply.answered:
            yield event(self._chunk(delta={"refusal": reply.text}))
        if self._chat and (calls := self._calls(outcome)):
            yield event(self._chunk(delta={"tool_calls": [{"index": at, **each} for at, each in enumerate(calls)]}))
        last = self._chunk(delta={}, text="", ended=reply.ended)
        last["choices"][0]["logprobs"] = self._logprobs(verdict)
        yield event(last | {KEY: verdict})
        if self._usage:
            yield event(self._chunk(choices=[]) | {"usage": self._usage_of(outcome, verdict), KEY: verdict})
        yield DONE

    def start(self) -> bytes:
        """The beginning of a chat's stream; nothing in it is of an answer."""
        return event(self._chunk(delta={"role": "assistant", "content": ""}))

    @property
    def chat(self) -> bool:
        """Whether it is a chat's."""
        return self._chat

    def _chunk(
        self,
        *,
        text: str | None = None,
        delta: dict[str, Any] | None = None,
        ended: str | None = None,
        choices: list[Any] | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": ended, "logprobs": None}
        if self._chat:
            choice["delta"] = {"content": text} if delta is None else delta
        else:
            choice["text"] = text or ""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice] if choices is None else choices}

    def _logprobs(self, verdict: dict[str, JSON]) -> dict[str, Any]:
        return {"content": None, "refusal": None, KEY: verdict} if self._chat else {KEY: verdict}

    def _usage_of(self, outcome: Outcome, verdict: dict[str, JSON]) -> dict[str, Any]:
        read, written = outcome.tokens.get("in", 0), outcome.tokens.get("out", 0)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            KEY: verdict,
        }

    def _calls(self, outcome: Outcome) -> list[dict[str, Any]]:
        return [
            {"id": f"call_{self._head['id']}_{at}", **dict(each.to_json_dict())}
            for at, each in enumerate(outcome.tool_calls)
        ]
