"""The audit log: one record an attempt, chained so that a later change is found, and read back.

Nothing is imported until a name is used: a record can be built without loading structlog.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallucination_guard.audit.chain import GENESIS, Problem, Verification, seal, verify
    from hallucination_guard.audit.log import AuditLog, content_digest
    from hallucination_guard.audit.query import find, records, tail
    from hallucination_guard.audit.record import SCHEMA, AuditRecord

_HOME = {
    "GENESIS": "chain",
    "SCHEMA": "record",
    "AuditLog": "log",
    "AuditRecord": "record",
    "Problem": "chain",
    "Verification": "chain",
    "content_digest": "log",
    "find": "query",
    "records": "query",
    "seal": "chain",
    "tail": "query",
    "verify": "chain",
}

__all__ = [
    "GENESIS",
    "SCHEMA",
    "AuditLog",
    "AuditRecord",
    "Problem",
    "Verification",
    "content_digest",
    "find",
    "records",
    "seal",
    "tail",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
