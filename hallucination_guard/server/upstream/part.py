"""What is asked of a server beside the guard, and what comes back, whatever its kind."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from hallucination_guard.errors import UpstreamError
from hallucination_guard.values import FinishReason, GenerationSettings, Generator, Message, Tool

__all__ = ["DRAWN_BY", "Asked", "Capabilities", "Kind", "LogprobsError", "Part", "Upstream"]

Kind = Literal["vllm", "llamacpp", "sglang", "unknown"]

DRAWN_BY = frozenset({"max_new_tokens", "temperature", "top_p", "seed", "stop"})
"""The settings that every server draws by."""


class LogprobsError(UpstreamError):
    """What the server gave for log-probabilities is none. For parity that is an answer beyond the tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What servers of one kind can do. Only the fields that follow from it are ever sent.

    Args:
        ids: whether an answer comes with its token ids and those of its prompt.
        streamed_ids: whether they come while it is drawn; else a stream is asked for as a whole.
        logprobs: whether the log-probability of each token comes.
        honours: the names in :class:`~hallucination_guard.values.GenerationSettings` that it draws by.
    """

    ids: bool
    streamed_ids: bool
    logprobs: bool
    honours: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request.

    Args:
        turns: of the conversation, as the server's template is to write them.
        tools: those that its template is told of.
        settings: how the answer is to be drawn, everything said.
    """

    turns: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    settings: GenerationSettings

    @property
    def plain_turns(self) -> list[Mapping[str, object]]:
        """As the chat APIs write them."""
        return [turn.to_json_dict() for turn in self.turns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The next part of an answer, or the whole of it.

    Args:
        prompt_ids: what the server read; with the first part, None where it does not say.
        ids: the next tokens; None where it does not say.
        text: what it says that they say.
        logprobs: of these tokens, in nats, None where one is missing; empty where it gives none.
        ended: how the answer ended; None while it goes on. A whole answer without it is none.
    """

    prompt_ids: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None
    text: str = ""
    logprobs: tuple[float | None, ...] = ()
    ended: FinishReason | None = None


class Upstream(Protocol):
    """A server that draws answers."""

    @property
    def can(self) -> Capabilities:
        """What it can do."""
        ...

    async def describe(self) -> Generator:
        """Who it is, as it says now.

        Raises:
            UpstreamError: if it does not answer.
        """
        ...

    async def answer(self, asked: Asked) -> Part:
        """A whole answer.

        Raises:
            UpstreamError: if it fails, or gives none or several.
        """
        ...

    def stream(self, asked: Asked) -> AsyncGenerator[Part, None]:
        """An answer as it is drawn; the last part says how it ended. Closing it ends the request.

        Raises:
            UpstreamError: from the iterator, if the server fails or breaks off.
        """
        ...

    async def close(self) -> None:
        """Give its connections back."""
        ...
