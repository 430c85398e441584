"""Advice: from labelled answers, what a certificate would cover, and how many labels the next step takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hallucination_guard.calibration.calibration import Gate
from hallucination_guard.calibration.fit import sampled
from hallucination_guard.calibration.forecast import NO_CERTIFICATE, Advice, Likely, advice_of
from hallucination_guard.calibration.fusion import FUSED
from hallucination_guard.calibration.labelled import Labelled
from hallucination_guard.calibration.needed import Needed
from hallucination_guard.errors import ConfigurationError, MissingExtra
from hallucination_guard.values import Policy

__all__ = ["NO_CERTIFICATE", "Advice", "Likely", "Needed", "advise"]


def advise(
    answers: Sequence[Labelled],
    *,
    alphas: Iterable[float],
    score: str | None = None,
    delta: float = 0.1,
    policy: Policy | None = None,
    gate: Gate = "answer",
    seed: int = 0,
) -> tuple[Advice, ...]:
    """Forecast certificates for several α, smallest first. Nothing is certified.

    A fused score is read out of fold, so with more labels it may become a little better than is said.

    Args:
        answers: as for :func:`~hallucination_guard.calibration.calibrate`; at least 20 scored ones.
        alphas: error rates among the answered, each in (0, 1).
        score: which to read, or ``fused``; the scorer's own by default.
        delta: δ of the certificates.
        policy: that drew these attempts; None for single drafts, or where the rows name it.
        gate: ``answer`` or ``stream``.
        seed: of the simulation.

    Raises:
        CalibrationError: if the answers cannot be used together or are too few.
        ConfigurationError: without an α, or on an α or δ out of range.
        MissingExtra: if scipy is not installed.
    """
    chosen = tuple(alphas)
    if not chosen:
        raise ConfigurationError("advice on which error rate?", hint="give --alpha, for example 0.1")
    for what, share in (*(("alpha", each) for each in chosen), ("delta", delta)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share < 1.0:
            raise ConfigurationError(f"{what} is {share!r}", hint="give a share above 0 and below 1, for example 0.1")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise MissingExtra("advice needs scipy", hint="pip install 'hallucination-guard-semgrad[calibrate]'") from None
    sample = sampled(answers, score=score, policy=policy, gate=gate)
    return advice_of(sample, alphas=chosen, delta=delta, fused=sample.score == FUSED, seed=seed)
