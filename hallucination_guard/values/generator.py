"""What drew an answer, where that is not the model that reads it: a server beside the guard."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hallucination_guard.values.plain import JSON

__all__ = ["Generator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """A server that draws answers, for the record and for what a calibration is bound to.

    Args:
        url: where it was asked.
        kind: its program: ``vllm``, ``llamacpp``, ``sglang``, ``unknown``.
        version: of the program, as it says.
        model: as it calls it.
        dtype: of its weights or its arithmetic, as it or the operator says; empty where nobody does.
        tolerance: of the mean distance between its log-probabilities and the reading model's, nats a token, measured at
            start; None where it could not be measured.
        compared: requests whose log-probabilities were compared before this one.
        beyond: how many of them were beyond the tolerance.
    """

    url: str
    kind: str
    version: str
    model: str
    dtype: str = ""
    tolerance: float | None = None
    compared: int = 0
    beyond: int = 0

    @property
    def mark(self) -> str:
        """What a calibration of its answers is bound to: not where it stands, but what computes there."""
        return " ".join(each for each in (self.kind, self.version, self.model, self.dtype) if each)

    def to_json_dict(self) -> dict[str, JSON]:
        """Plain data."""
        return asdict(self)
