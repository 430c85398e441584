"""Who answers under which alias, how many may ask at once, and how a request makes its policy stricter."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import yaml

from hallucination_guard.errors import ConfigurationError, GuardError
from hallucination_guard.guard import Guard
from hallucination_guard.server.answering import Answering
from hallucination_guard.server.config import Alias
from hallucination_guard.server.refusals import Refusal
from hallucination_guard.server.requests import Tightening
from hallucination_guard.server.upstream import Sidecar, Status, connect
from hallucination_guard.values import JSON, Call, FinishReason, GenerationOptions, Messages, Outcome, Policy
from hallucination_guard_policies import load_policy, pack_names

__all__ = ["Places", "Served"]

_KEPT = 16  # guards under a stricter policy, an alias


class Places:
    """How many requests run and wait; further ones are refused at once.

    Args:
        running: at the same time.
        queue: that wait.
    """

    def __init__(self, running: int, queue: int) -> None:
        self._room, self._queue = asyncio.Semaphore(running), queue
        self.waiting = self.running = 0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A place, as soon as there is one.

        Raises:
            Refusal: if too many wait already.
        """
        if self._room.locked() and self.waiting >= self._queue:
            raise Refusal(429, "too many requests wait for this model", code="queue_full", retry_after=1)
        self.waiting += 1
        try:
            await self._room.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._room.release()


@dataclass(slots=True)
class Served:
    """What stands behind an alias.

    Args:
        alias: as the settings have it.
        guard: decides.
        sidecar: draws the answers, where the model does not do that itself.
        why: why it is not ready; empty once it is.
    """

    alias: Alias
    guard: Guard
    sidecar: Sidecar | None = None
    why: str = ""
    _stricter: dict[tuple[float | None, float | None], Guard] = field(default_factory=dict)
    _document: str | dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        # As it was when the server began: a file that was changed since is not what requests are compared with.
        named = self.alias.policy
        self._document = named if named in pack_names() else yaml.safe_load(Path(named).read_bytes())
        if (self.sidecar is not None or self.alias.upstream is not None) and not self.why:
            self.why = "the server that draws the answers was not asked yet"

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self.guard.model.identity.fingerprint

    @property
    def streams(self) -> bool:
        """Whether answers can leave sentence by sentence."""
        return self.guard.streams

    @property
    def drift(self) -> tuple[bool, int] | None:
        """Whether scores have drifted, and in how many tests; None where nobody tests."""
        watched = self.guard.drift
        return None if watched is None else (bool(watched.suspended), watched.tests)

    async def start(self) -> None:
        """Get it ready.

        Raises:
            GuardError: if what draws the answers does not answer or does not fit.
        """
        try:
            await self._start()
        except GuardError as error:
            self.why = error.message
            raise

    async def close(self) -> None:
        """Give the connections back."""
        if self.sidecar is not None:
            await self.sidecar.close()

    async def _start(self) -> None:
        beside = self.alias.upstream
        if self.sidecar is None and beside is not None:
            upstream = await connect(
                beside.url,
                kind=beside.kind,
                model=beside.model,
                dtype=beside.dtype,
                api_key=None if beside.api_key_env is None else os.environ.get(beside.api_key_env),
            )
            self.sidecar = Sidecar(self.guard, upstream)
        if self.sidecar is not None:
            await self.sidecar.start()
        self.why = ""

    def status(self) -> Status:
        """How it is now."""
        if self.why:
            return Status(ready=False, why=self.why)
        if self.sidecar is not None:
            return self.sidecar.status()
        return Status(ready=True)

    @property
    def suspended(self) -> str:
        """Why certificates or scores do not hold at the moment; empty while they do."""
        return self.guard.suspended or ("" if self.sidecar is None or self.why else self.sidecar.status().why)

    def answering(self, tightening: Tightening) -> Answering:
        """Who answers a request.

        Raises:
            Refusal: if it asks for less than the policy, or for what cannot be kept.
        """
        guard = self.stricter(tightening)
        if self.sidecar is None:
            return guard
        if guard is self.guard:
            return self.sidecar
        other = copy.copy(self.sidecar)  # its watch over parity and its connections are the same
        other.guard = guard
        return other

    async def review(
        self,
        tightening: Tightening,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        ended: FinishReason,
        call: Call,
        **generation: Unpack[GenerationOptions],
    ) -> Outcome:
        """Judge a given answer by the policy, without drawing anything."""
        guard = self.stricter(tightening)
        judge = guard.with_policy(guard.policy, max_attempts=1)
        return await judge.areview(messages, answer, ended=ended, call=call, **generation)

    def stricter(self, tightening: Tightening) -> Guard:
        """The guard under the policy that a request asks for.

        Raises:
            Refusal: likewise.
        """
        if not tightening.asks:
            return self.guard
        if not self.alias.tighten:
            raise _refused("this alias has one policy for every request", None)
        own = self.guard.policy.describe()
        for name, wanted in (("max_risk", tightening.max_risk), ("confidence", tightening.confidence)):
            numbers = _numbers(own, name)
            if wanted is None:
                continue
            if not numbers:
                raise _refused(f"the policy of this alias has no {name}", name)
            if (name == "max_risk" and wanted > min(numbers)) or (name == "confidence" and wanted < max(numbers)):
                kept = min(numbers) if name == "max_risk" else max(numbers)
                raise _refused(f"{name} {wanted:g} is looser than the alias's own, {kept:g}", name)
        at = (tightening.max_risk, tightening.confidence)
        if at not in self._stricter:
            try:
                made = self.guard.with_policy(self._policy(*at))
            except (ConfigurationError, GuardError) as error:
                raise _refused(f"this cannot be kept: {error.message}", None) from None
            while len(self._stricter) >= _KEPT:
                self._stricter.pop(next(iter(self._stricter)))
            self._stricter[at] = made
        return self._stricter[at]

    def _policy(self, max_risk: float | None, confidence: float | None) -> Policy:
        return load_policy(
            self._document,
            max_risk=self.alias.max_risk if max_risk is None else max_risk,
            confidence=self.alias.confidence if confidence is None else confidence,
        )


def _refused(why: str, name: str | None) -> Refusal:
    param = "hallucination_guard" + (f".{name}" if name else "")
    return Refusal(400, f"{why}: a request can only be stricter", code="not_stricter", param=param)


def _numbers(described: JSON | Mapping[str, Any], name: str) -> list[float]:
    """All numbers of this name in the thresholds of a described policy."""
    if isinstance(described, Mapping):
        below = described.get("below")
        number = below.get(name) if isinstance(below, Mapping) else None
        own = [float(number)] if isinstance(number, int | float) else []
        return own + [each for value in described.values() for each in _numbers(value, name)]
    if isinstance(described, list | tuple):
        return [each for value in described for each in _numbers(value, name)]
    return []
