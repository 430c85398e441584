"""Everything that can go wrong, as one tree.

::

    GuardError
    ├── InputError           a prompt, answer, id or file row that cannot be used
    ├── ConfigurationError   settings that cannot work together
    │   ├── PolicyError      a policy document or object that cannot be used
    │   └── MissingExtra     an optional dependency is not installed
    ├── ModelError           a model that cannot be scored (or not safely)
    │   └── SelfTestFailed   its gradient is zero, not finite or wrong
    ├── AnchorError          no semantics-preserving token can be named
    ├── ScoringError         the arithmetic gave no finite number
    ├── CalibrationError     a calibration that cannot be fitted, read or applied
    │   └── CalibrationMismatch   it was fitted on another model, template, dtype, scorer or policy
    ├── CallError            a retriever or an escalation target failed
    │   ├── CallTimeout      … or did not answer in time
    │   └── UpstreamError    the server that draws the answers failed, or gave none that can be used
    ├── BusyError            as many calls are under way as may be
    ├── ReplicaLost          the process that was to answer is gone; nothing was given
    ├── NotAnswered          the policy let no answer through, and the caller wants that raised; in ``guard/reply.py``
    └── AuditError           the log cannot be written, read or trusted

Every message names the offending value; ``hint`` says how to fix it and is part of ``str(error)``. Both are one line:
what a file or a caller put into them cannot begin a line of a log.
"""

from __future__ import annotations

__all__ = [
    "AnchorError",
    "AuditError",
    "BusyError",
    "CalibrationError",
    "CalibrationMismatch",
    "CallError",
    "CallTimeout",
    "ConfigurationError",
    "GuardError",
    "InputError",
    "MissingExtra",
    "ModelError",
    "PolicyError",
    "ReplicaLost",
    "ScoringError",
    "SelfTestFailed",
    "UpstreamError",
    "without_frames",
]


def _on_one_line(text: str) -> str:
    """``text``, in which line ends, other control characters and half characters stand as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


class GuardError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        message: what is wrong, naming the value.
        hint: how to fix it, one sentence; empty where the message says it all.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = _on_one_line(message), _on_one_line(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def without_frames(error: BaseException) -> BaseException:
    """The error without its traceback and what it came from: their frames and messages may hold a rejected draft.

    To be raised outside of an ``except`` block, which would attach the original again.
    """
    error.__cause__ = error.__context__ = None
    error.add_note("Guard(debug=True) keeps the traceback, which may hold prompt and answer")
    return error.with_traceback(None)


class InputError(GuardError, ValueError):
    """A prompt, answer, token id or file row that cannot be used."""


class ConfigurationError(GuardError):
    """Settings that cannot work together."""


class PolicyError(ConfigurationError):
    """A policy document or policy object that contradicts itself or cannot be read."""


class MissingExtra(ConfigurationError, ImportError):
    """An optional dependency is not installed; the hint is the command that installs it."""


class ModelError(GuardError):
    """A model that cannot be scored, or not safely."""


class SelfTestFailed(ModelError):
    """The gradient of this model is zero, not finite, or disagrees with finite differences."""


class AnchorError(GuardError):
    """No semantics-preserving token t* can be named for this prompt."""


class ScoringError(GuardError):
    """The arithmetic gave no finite number."""


class CalibrationError(GuardError):
    """A calibration that cannot be fitted, read or applied."""


class CalibrationMismatch(CalibrationError):
    """A calibration fitted on another model, template, dtype, scorer or policy."""


class CallError(GuardError):
    """A retriever or an escalation target failed."""


class CallTimeout(CallError):
    """A retriever or an escalation target did not answer in time."""


class UpstreamError(CallError):
    """The server that draws the answers cannot be reached, broke off, or gave none that can be used."""


class BusyError(GuardError):
    """As many calls are under way as may be; the same call may be answered later."""


class ReplicaLost(GuardError):
    """The process that was to answer is gone, and so was the one that was asked instead; nothing was given."""


class AuditError(GuardError):
    """The audit log cannot be written, read or trusted."""
