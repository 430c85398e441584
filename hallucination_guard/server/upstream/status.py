"""How a sidecar is."""

from __future__ import annotations

from dataclasses import dataclass

from hallucination_guard.values import Generator

__all__ = ["Status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a sidecar is; asked at any time.

    Args:
        ready: whether answers are scored.
        why: where they are not: what was found at start, what the watch found, or that the server does not answer.
        generator: who draws, and the parity so far; None before the start.
        uncovered: why no certificate of the guard's calibration holds for this server's answers; empty if one may.
    """

    ready: bool
    why: str = ""
    generator: Generator | None = None
    uncovered: str = ""
