"""The audit log: one record an attempt, chained so that a later change is found, and read back.

:class:`AuditLog` is a sink: a record goes in, its id comes out, and it is in the file. :func:`verify` finds what was
changed; labels lie beside the log; any policy can be run over it without a model (``audit.replay.replay``, imported
from its module, which has the same name). Nothing is imported until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hallucination_guard._lazy import lazily

if TYPE_CHECKING:
    from hallucination_guard.audit.chain import GENESIS, Problem, Verification, seal, verify
    from hallucination_guard.audit.evidence import WatchState
    from hallucination_guard.audit.labels import (
        Label,
        label,
        label_all,
        label_history,
        labelled_answers,
        labels_of,
        labels_path,
    )
    from hallucination_guard.audit.log import AuditLog, content_digest
    from hallucination_guard.audit.query import find, records, tail
    from hallucination_guard.audit.record import SCHEMA, AuditRecord, Sink
    from hallucination_guard.audit.replay import Flip, Replayed, replay_each
    from hallucination_guard.audit.request import Request, requests
    from hallucination_guard.audit.sample import Draw, Sample, Sampled, draw_sample, read_sample, sample_path
    from hallucination_guard.audit.tally import Tally
    from hallucination_guard.audit.watch import RiskWatch, watched

_HOME = {
    "GENESIS": "chain",
    "SCHEMA": "record",
    "AuditLog": "log",
    "AuditRecord": "record",
    "Draw": "sample",
    "Flip": "replay",
    "Label": "labels",
    "Problem": "chain",
    "Replayed": "replay",
    "Request": "request",
    "RiskWatch": "watch",
    "Sample": "sample",
    "Sampled": "sample",
    "Sink": "record",
    "Tally": "tally",
    "Verification": "chain",
    "WatchState": "evidence",
    "content_digest": "log",
    "draw_sample": "sample",
    "find": "query",
    "label": "labels",
    "label_all": "labels",
    "label_history": "labels",
    "labelled_answers": "labels",
    "labels_of": "labels",
    "labels_path": "labels",
    "read_sample": "sample",
    "records": "query",
    "replay_each": "replay",
    "requests": "request",
    "sample_path": "sample",
    "seal": "chain",
    "tail": "query",
    "verify": "chain",
    "watched": "watch",
}

__getattr__ = lazily(__name__, _HOME)

__all__ = [
    "GENESIS",
    "SCHEMA",
    "AuditLog",
    "AuditRecord",
    "Draw",
    "Flip",
    "Label",
    "Problem",
    "Replayed",
    "Request",
    "RiskWatch",
    "Sample",
    "Sampled",
    "Sink",
    "Tally",
    "Verification",
    "WatchState",
    "content_digest",
    "draw_sample",
    "find",
    "label",
    "label_all",
    "label_history",
    "labelled_answers",
    "labels_of",
    "labels_path",
    "read_sample",
    "records",
    "replay_each",
    "requests",
    "sample_path",
    "seal",
    "tail",
    "verify",
    "watched",
]


def __dir__() -> list[str]:
    return __all__
