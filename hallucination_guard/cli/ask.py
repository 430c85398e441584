"""``ask``: one question through a guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hallucination_guard.cli.console import check_folder, load, say, show, show_json
from hallucination_guard.cli.options import (
    AnchorQuestion,
    AuditPath,
    Command,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    ModelChoice,
    ModelName,
    ProfilePath,
)

if TYPE_CHECKING:
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.values import Message, Outcome, Policy, Retriever

__all__ = ["ask", "register"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(ask)


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    policy: Annotated[
        str | None, typer.Option("--policy", help="A pack (observe, abstain, rag, strict) or a YAML file.")
    ] = None,
    confidence: Annotated[float | None, typer.Option("--confidence", help="The packs' threshold.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="A calibration file; the demo model has one."),
    ] = None,
    sentences: Annotated[
        Path | None,
        typer.Option("--sentences", metavar="FILE", help="Thresholds of sentences, from calibrate --for sentences."),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option("--documents", help="For retrieval: a folder of texts, or JSON lines of id and text."),
    ] = None,
    audit: AuditPath = Path("audit.jsonl"),
    max_new_tokens: MaxNewTokens = 64,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    anchor_question: AnchorQuestion = None,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", metavar="FILE.html", help="A page with what is shaky in the answer that was judged."),
    ] = None,
    model: ModelName = "demo",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    profile: ProfilePath = None,
    as_json: Json = False,
) -> int:
    """Ask one question through a guard."""
    from hallucination_guard.audit import AuditLog
    from hallucination_guard.calibration import SentenceCalibration
    from hallucination_guard.demo import BM25Retriever
    from hallucination_guard.guard import Guard
    from hallucination_guard.values import GenerationSettings

    if explain is not None:
        check_folder(explain)
    retriever = None if documents is None else BM25Retriever.from_path(documents)
    white = load(ModelChoice(name=model, device_map=device_map, dtype=dtype, profile=profile))
    fitted = _calibration(calibration, model, white)
    with AuditLog(audit) as log:
        guard = Guard(
            white,
            policy=_policy(policy, fitted, confidence, retriever),
            calibration=fitted,
            sentences=None if sentences is None else SentenceCalibration.load(sentences),
            audit=log,
            generation=GenerationSettings(max_new_tokens=max_new_tokens, question=anchor_question or None),
        )
        outcome = guard(_messages(question, system))
    _print(outcome, audit, as_json=as_json)
    if explain is not None:
        _explain(explain, white, outcome)
    return 0


def _calibration(path: Path | None, name: str, model: WhiteBoxModel) -> Calibration | None:
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.demo import calibrated

    if path is not None:
        return Calibration.load(path)
    return calibrated(model) if name == "demo" else None


def _policy(
    name: str | None, calibration: Calibration | None, confidence: float | None, retriever: Retriever | None
) -> Policy:
    from hallucination_guard_policies import load_policy

    # Without a calibration nothing can be decided by confidence: the default then is to observe, and it says so.
    chosen = name or ("observe" if calibration is None else "abstain")
    return load_policy(chosen, retriever=retriever, confidence=confidence)


def _messages(question: str, system: str | None) -> list[Message]:
    from hallucination_guard.values import Message

    before = [Message(role="system", content=system)] if system else []
    return [*before, Message(role="user", content=question)]


def _explain(path: Path, model: WhiteBoxModel, outcome: Outcome) -> None:
    """Write the page of the answer that was judged last, also where it was not let through."""
    from hallucination_guard.scoring import explain

    score = outcome.verdict.score
    if score.status != "scored":
        say(f"nothing to explain: {score.reason}")
        return
    said = "" if outcome.accepted else " This answer was not let through."
    note = f"{outcome.decision.action} by {outcome.decision.rule}: {outcome.decision.reason}.{said}"
    page = explain(model, outcome.generation).to_html(note=note)
    path.write_text(page, encoding="utf-8")
    say(f"explained in {path}")


def _print(outcome: Outcome, audit: Path, *, as_json: bool) -> None:
    if as_json:
        show_json(
            {
                "text": outcome.text,
                "decision": outcome.decision.action,
                "rule": outcome.decision.rule,
                "reason": outcome.decision.reason,
                "confidence": outcome.confidence,
                "status": outcome.verdict.score.status,
                "scores": dict(outcome.verdict.score.scores),
                **({} if outcome.retention is None else {"retention": outcome.retention}),
                "attempts": outcome.attempts,
                "retrieved": list(outcome.retrieved),
                "seconds": dict(outcome.seconds),
                "audit_ids": list(outcome.audit_ids),
                "audit": str(audit),
            }
        )
        return
    show(outcome.text if outcome.text is not None else f"[{outcome.decision.action}: no answer was let through]")
    confidence = "" if outcome.confidence is None else f"confidence {outcome.confidence:.2f}, "
    say(
        f"{outcome.decision.action} by {outcome.decision.rule}: {outcome.decision.reason}; {confidence}"
        f"{outcome.attempts} attempt(s), record {outcome.audit_ids[-1][:12]} in {audit}"
    )
