"""The parts of a guard: whether they can work together, and the loop that they make.

They may be exchanged between two calls, so every call looks at them again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Self

from hallucination_guard.audit.record import Sink
from hallucination_guard.calibration import Calibration, Certificate, DriftMonitor, Gate, SentenceCalibration
from hallucination_guard.errors import ConfigurationError, PolicyError
from hallucination_guard.guard.joined import Together, UnderWay
from hallucination_guard.guard.judging import Judging, suspended_by
from hallucination_guard.guard.loop import Loop
from hallucination_guard.guard.recording import Recorder, policy_identity
from hallucination_guard.guard.sentences import check_sentences, default_scorer
from hallucination_guard.values import GenerationOptions, GenerationSettings, Model, Policy, Scorer, Watch

__all__ = ["Parts"]

_DRIFT_RATE = 0.01


class Parts:
    """What a guard is put together of; see :class:`~hallucination_guard.Guard`, which has the doors."""

    def __init__(
        self,
        model: Model,
        *,
        policy: Policy,
        scorer: Scorer | None = None,
        calibration: Calibration | None = None,
        sentences: SentenceCalibration | None = None,
        audit: Sink | None = None,
        drift: DriftMonitor | None = None,
        watch: Watch | None = None,
        generation: GenerationSettings | GenerationOptions | None = None,
        max_attempts: int = 16,
        batch_size: int = 8,
        max_calls: int = 256,
        debug: bool = False,
    ) -> None:
        if scorer is None:
            scorer = default_scorer(policy, sentences)
        self.model = model
        self.policy = policy
        self.scorer = scorer
        self.calibration = calibration
        self.sentences = sentences
        self.audit = audit
        self.drift = drift
        self.watch = watch
        self._novelty_drift: DriftMonitor | None = None
        self._watched: Calibration | None = None
        self.generation = GenerationSettings.of(generation or {})
        self.max_attempts = max_attempts
        self.batch_size = batch_size
        self.debug = debug
        _check_whole(max_attempts=max_attempts, batch_size=batch_size, max_calls=max_calls)
        self._under_way, self._together = UnderWay(max_calls), Together(batch_size)
        self._check_parts()

    def with_policy(self, policy: Policy, *, max_attempts: int | None = None) -> Self:
        """The same guard under another policy. What it notices (drift, the watch over labels) holds for both.

        Calls of both count to ``max_calls`` and are scored together.

        Args:
            policy: decides there.
            max_attempts: as for the guard; its own by default.

        Raises:
            ConfigurationError: as for the guard itself.
            CalibrationError: if no certificate keeps the risk that the policy speaks of.
        """
        other = copy.copy(self)
        other.policy = policy
        if max_attempts is not None:
            _check_whole(max_attempts=max_attempts)
            other.max_attempts = max_attempts
        other._check_parts()
        return other

    @property
    def suspended(self) -> str:
        """Why certificates do not hold at the moment, by drift, novelty or labels; empty while they do."""
        return suspended_by(self.drift, self._novelty_drift, self.watch)

    def _loop(self, gate: Gate = "answer") -> Loop:
        """What takes part in this call, as it is now.

        Raises:
            ConfigurationError: if answers are to be judged as a whole by a calibration of streams.
        """
        certificates = self._check_calibration()
        check_sentences(self.policy, self.scorer, self.sentences, self.model)
        if gate == "answer" and self.calibration is not None and self.calibration.gate == "stream":
            raise ConfigurationError(
                "the calibration is of streams, and an answer would be judged as a whole",
                hint="stream, or call the guard, which does; or give it a calibration of whole answers",
            )
        return Loop(
            model=self.model,
            scorer=self.scorer,
            judging=Judging(
                calibration=self.calibration,
                certificates=certificates,
                drift=self.drift,
                novelty=self._novelty_drift,
                watch=self.watch,
                primary=self.scorer.primary,
                sentences=self.sentences,
            ),
            policy=self.policy,
            recorder=Recorder(sink=self.audit, policy=policy_identity(self.policy), debug=self.debug),
            max_attempts=self.max_attempts,
            batch_size=self.batch_size,
        )

    def _check_parts(self) -> None:
        """See that they can work together.

        Raises:
            ConfigurationError: if they cannot.
        """
        policy = self.policy
        if not isinstance(policy, Policy) or not callable(policy):
            raise ConfigurationError(
                f"the policy is {policy!r}", hint="it is called with a verdict and has describe(); see AbstainBelow"
            )
        if self.audit is not None and not callable(self.audit):
            raise ConfigurationError(f"the audit sink is {self.audit!r}", hint="for example AuditLog('audit.jsonl')")
        if self.calibration is None and getattr(policy, "needs_confidence", False):
            raise ConfigurationError(
                "the policy speaks of confidence and the guard has no calibration",
                hint="give calibration=Calibration.load(...), or a policy with score=... and limit=...",
            )
        self._check_calibration()
        check_sentences(policy, self.scorer, self.sentences, self.model)

    def _check_calibration(self) -> tuple[Certificate, ...]:
        """The certificates that hold for the policy, after a look at what may have been changed since the last call."""
        risk = getattr(self.policy, "needs_risk", None)
        needs_risk = risk is not None
        if needs_risk and (uncovered := getattr(self.policy, "uncertified", "")):
            raise PolicyError(uncovered, hint="let every rule say the same max_risk, and a retrieving one its corpus")
        if self.calibration is None:
            if needs_risk:
                raise ConfigurationError(
                    "the policy speaks of max_risk and the guard has no calibration",
                    hint="give one with certificates: hallucination-guard calibrate --alpha ...",
                )
            self._check_watch(risk, ())
            return ()
        self.calibration.check(self.model.identity, self.scorer.identity, self.policy)
        certificates = self.calibration.covering(self.policy)
        self._check_watch(risk, certificates)
        if self._watched not in (None, self.calibration):
            # They compare with another calibration's scores: a new one is watched afresh.
            self.drift = self._novelty_drift = None
        novelty = self.calibration.novelty
        rate = _DRIFT_RATE if novelty is None else _DRIFT_RATE / 2  # of a false alarm ever, in all
        if certificates and self.drift is None:
            self.drift = DriftMonitor(self.calibration.reference, rate=rate)
        if certificates and self._novelty_drift is None and novelty is not None:
            self._novelty_drift = DriftMonitor(novelty.reference, rate=rate)
        self._watched = self.calibration
        return certificates

    def _check_watch(self, risk: float | None, certificates: Sequence[Certificate]) -> None:
        if self.watch is None:
            return
        if isinstance(self.watch, type) or not isinstance(self.watch, Watch):
            raise ConfigurationError(
                f"the watch is {self.watch!r}", hint="for example RiskWatch.of_log('audit.jsonl', alpha=0.1)"
            )
        if not certificates:
            raise ConfigurationError(
                "the watch suspends certificates, and the guard has none that covers its policy",
                hint="calibrate with --alpha, and let the policy speak of max_risk; or leave the watch out",
            )
        own, tested = getattr(self.audit, "path", None), getattr(self.watch, "path", None)
        if own is not None and tested is not None and os.path.realpath(own) != os.path.realpath(tested):
            raise ConfigurationError(
                f"the watch tests the answers of {str(tested)!r}, and the guard records in {str(own)!r}",
                hint="give it the watch of its own log",
            )
        if risk is not None and self.watch.alpha > risk:
            raise ConfigurationError(
                f"the watch tests the risk {self.watch.alpha:g}, and the policy promises {risk:g}",
                hint="let it test what is promised, or less",
            )


def _check_whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} is {value!r}", hint="a whole number, at least 1")
