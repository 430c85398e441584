"""The audit log: one record an attempt, chained so that a later change is found, and read back.

Nothing is imported until a name is used: a record can be built without loading structlog. The function ``replay`` has
the name of its module and is imported from there: ``from hallucination_guard.audit.replay import replay``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallucination_guard.audit.chain import GENESIS, Problem, Verification, seal, verify
    from hallucination_guard.audit.labels import Label, label, label_all, labelled_answers, labels_of, labels_path
    from hallucination_guard.audit.log import AuditLog, content_digest
    from hallucination_guard.audit.query import find, records, tail
    from hallucination_guard.audit.record import SCHEMA, AuditRecord
    from hallucination_guard.audit.replay import Flip, Replayed, Request, Tally, replay_each, requests

_HOME = {
    "GENESIS": "chain",
    "SCHEMA": "record",
    "AuditLog": "log",
    "AuditRecord": "record",
    "Flip": "replay",
    "Label": "labels",
    "Problem": "chain",
    "Replayed": "replay",
    "Request": "replay",
    "Tally": "replay",
    "Verification": "chain",
    "content_digest": "log",
    "find": "query",
    "label": "labels",
    "label_all": "labels",
    "labelled_answers": "labels",
    "labels_of": "labels",
    "labels_path": "labels",
    "records": "query",
    "replay_each": "replay",
    "requests": "replay",
    "seal": "chain",
    "tail": "query",
    "verify": "chain",
}

__all__ = [
    "GENESIS",
    "SCHEMA",
    "AuditLog",
    "AuditRecord",
    "Flip",
    "Label",
    "Problem",
    "Replayed",
    "Request",
    "Tally",
    "Verification",
    "content_digest",
    "find",
    "label",
    "label_all",
    "labelled_answers",
    "labels_of",
    "labels_path",
    "records",
    "replay_each",
    "requests",
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
