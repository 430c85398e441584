"""What a request is refused with: one table from the library's errors to statuses, in the OpenAI API's shape.

Nothing of an error's own words leaves where they are about the server rather than the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hallucination_guard.errors import (
    AnchorError,
    AuditError,
    BusyError,
    CalibrationError,
    CallError,
    ConfigurationError,
    GuardError,
    InputError,
    ModelError,
    ReplicaLost,
    ScoringError,
)

__all__ = ["STATUSES", "Refusal", "refusal_of"]

_MOST = 300  # characters of an error's own words: it may name a value of the request

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(Exception):
    """A request is not answered.

    Args:
        status: of HTTP.
        message: why, for the client.
        code: for programs.
        param: the field that is meant.
        retry_after: seconds after which it may be tried again.
        close: whether the connection ends with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.close = retry_after, close

    def __reduce__(self) -> tuple[Any, ...]:
        # It travels from the process that refuses to the one that says so.
        state = {name: getattr(self, name) for name in ("code", "param", "retry_after", "close")}
        return _refused_elsewhere, (self.status, self.message, state)

    @property
    def body(self) -> dict[str, Any]:
        """As the OpenAI API writes it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers | ({"connection": "close"} if self.close else {})


def _refused_elsewhere(status: int, message: str, rest: dict[str, Any]) -> Refusal:
    return Refusal(status, message, **rest)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    code: str
    words: str = ""  # instead of the error's own
    retry_after: int | None = None


STATUSES: tuple[tuple[type[GuardError], _Answer], ...] = (
    (InputError, _Answer(400, "invalid_input")),
    (ConfigurationError, _Answer(400, "unsupported")),
    (BusyError, _Answer(429, "queue_full", "too many requests wait for this model", 1)),
    (AuditError, _Answer(503, "audit_unavailable", "the record cannot be written, so no answer is given", 10)),
    (ReplicaLost, _Answer(503, "replica_lost", "what was to answer was lost, and nothing was given", 1)),
    (CallError, _Answer(503, "upstream_unavailable", "what draws or looks up for the answers failed", 5)),
    (CalibrationError, _Answer(503, "calibration_unusable", "the calibration does not fit what is served", 60)),
    (AnchorError, _Answer(503, "model_unusable", "the model cannot be scored", 60)),
    (ScoringError, _Answer(503, "model_unusable", "the model cannot be scored", 60)),
    (ModelError, _Answer(503, "model_unusable", "the model cannot be scored", 60)),
    (GuardError, _Answer(503, "not_answered", "the guard gave no answer", 5)),
)
"""The first that fits counts. Errors about the request say it in their own words."""


def refusal_of(error: GuardError) -> Refusal:
    """What an error of the library is for a client."""
    found = next(answer for kind, answer in STATUSES if isinstance(error, kind))
    words = found.words or str(error)[:_MOST]
    return Refusal(found.status, words, code=found.code, retry_after=found.retry_after)
