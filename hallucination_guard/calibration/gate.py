"""What is read of a labelled answer: of a whole one its score, of a stream the greatest over all its beginnings."""

from __future__ import annotations

from collections.abc import Sequence

from hallucination_guard.calibration.calibration import Gate
from hallucination_guard.calibration.fusion import Fusion
from hallucination_guard.calibration.labelled import Beginning, Labelled
from hallucination_guard.errors import CalibrationError

__all__ = ["refuse_whole_only", "value_of", "watched_value", "written"]


def value_of(each: Labelled, name: str, fusion: Fusion | None, gate: Gate) -> float:
    """What the calibration reads of an answer."""
    parts = each.beginnings if gate == "stream" else (each,)
    return max(_read(part, name, fusion) for part in parts)


def _read(part: Labelled | Beginning, name: str, fusion: Fusion | None) -> float:
    if fusion is None:
        return part.scores[name]
    return fusion.score(part.scores, part.states if isinstance(part, Labelled) else None)


def watched_value(each: Labelled, value: float, name: str, fusion: Fusion | None, gate: Gate) -> float:
    """By what drift is noticed: of a stream by its first sentence, since where it ends depends on the threshold."""
    return _read(each.beginnings[0], name, fusion) if gate == "stream" else value


def refuse_whole_only(answers: Sequence[Labelled], covered: str | None) -> None:
    """See that a stream can be calibrated on these answers.

    Args:
        answers: labelled.
        covered: hash of the policy that made further attempts, if one did.

    Raises:
        CalibrationError: if there are further attempts, or of an answer only the whole was measured.
    """
    if covered is not None or any(each.attempt > 1 for each in answers):
        raise CalibrationError(
            "a stream is calibrated on single drafts, and these are of a policy that makes further attempts",
            hint="label the answers of a policy that only abstains",
        )
    for each in answers:
        if each.status == "scored" and not each.beginnings:
            raise CalibrationError(
                f"of the answer {each.id!r} only the whole was measured",
                hint="measure every beginning: evaluate --beginnings, or a log of guarded streams",
            )


def written(each: Labelled, gate: Gate) -> list[object]:
    """What of an answer is part of the hash of the data."""
    row: list[object] = [each.id, each.attempt, each.correct, sorted(each.scores.items())]
    return [*row, [[own.length, sorted(own.scores.items())] for own in each.beginnings]] if gate == "stream" else row
