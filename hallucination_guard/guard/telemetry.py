"""One OpenTelemetry event an outcome, by the semantic conventions for generative AI; nothing where OTel is absent.

``gen_ai.evaluation.result`` is a log-based event: its parent is the active span, and an SDK may bridge it to a span
event. It says the confidence, or the raw score where nothing was calibrated (the evaluation's name says which), what
was decided and why. No text of prompt or answer is in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from hallucination_guard.values import Outcome

__all__ = ["evaluated"]

_SCOPE = "hallucination_guard"
_log = logging.getLogger(_SCOPE)

_Attributes = dict[str, str | int | float]


def evaluated(outcome: Outcome, *, primary: str) -> None:
    """Say what became of a call.

    Args:
        outcome: of the call; its records are written.
        primary: the score that stands for the answer where there is no confidence.
    """
    emit = _emitter()
    if emit is None:
        return
    try:
        emit(_attributes(outcome, primary))
    except Exception as error:
        # What is called here is the application's: its log processors run inside of emit() and may raise anything.
        # The records are written and the decision has been taken: an exception here would keep an answer in that was
        # let through, and there is no answer that going on would let out.
        _log.warning("guard.telemetry: no event, the OpenTelemetry pipeline raised %s", type(error).__name__)


@cache
def _emitter() -> Callable[[_Attributes], None] | None:
    """What emits an event; looked for once, since a failed import is a search of the whole path each time."""
    try:
        from opentelemetry._logs import LogRecord, get_logger
    except ImportError:
        return None

    def emit(attributes: _Attributes) -> None:
        # The logger is asked for each time: the application may set its provider up after the first outcome. The record
        # takes time and context, and with it the active span, as they are now.
        get_logger(_SCOPE).emit(LogRecord(event_name="gen_ai.evaluation.result", attributes=attributes))

    return emit


def _attributes(outcome: Outcome, primary: str) -> _Attributes:
    verdict, decision = outcome.verdict, outcome.decision
    sure = verdict.confidence is not None
    value = verdict.confidence if sure else verdict.score.scores.get(primary)
    attributes: _Attributes = {
        "gen_ai.evaluation.name": f"{_SCOPE}.{'confidence' if sure else primary}",
        "gen_ai.evaluation.score.label": decision.action,
        "gen_ai.evaluation.explanation": decision.reason,
        "gen_ai.response.id": outcome.request_id,
        f"{_SCOPE}.rule": decision.rule,
        f"{_SCOPE}.attempts": outcome.attempts,
    }
    if value is not None:
        attributes["gen_ai.evaluation.score.value"] = float(value)
    if verdict.score.status == "error":
        attributes["error.type"] = "scoring_failed"  # its kind in words is in the record, and may be anything
    return attributes
