"""Who took part: which model spoke, which scorer measured. What a calibration is bound to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ModelIdentity", "ScorerIdentity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which model spoke: what a calibration is bound to and what the audit log names.

    Args:
        name: hub id, folder or file name; for reading, not for comparing.
        fingerprint: hash over every value of its weights and buffers.
        dtype: of the weights, for example ``float32``.
        template: hash of the chat template; ``none`` for a model without one.
        structure: hash over the config and all else that it computes with: classes, settings, adapters, hooks, and the
            tokens that end an answer; empty for what has no inside.
    """

    name: str
    fingerprint: str
    dtype: str
    template: str
    structure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerIdentity:
    """Which scorer measured: its name, the version of its arithmetic and every setting that changes a number."""

    name: str
    version: str
    settings: Mapping[str, str] = field(default_factory=dict)
