"""From scores to promises: labelled answers in, a confidence map and certified thresholds out, bound to their origin.

:func:`calibrate` fits a :class:`Calibration`; it makes a ``Verdict`` of a score and refuses another model, scorer or
policy than it was fitted on. A :class:`Certificate` bounds the risk of what a threshold lets through; a
:class:`DriftMonitor` suspends it when the scores change, a :class:`RiskTest` when labels show that it is not kept.
:func:`advise` forecasts certificates, and :class:`OnAverage` is a weaker promise that never stands in for one.
"""

from __future__ import annotations

from hallucination_guard.calibration.advice import Advice, Needed, advise
from hallucination_guard.calibration.anytime import Bets, RiskTest
from hallucination_guard.calibration.calibration import Calibration, Gate
from hallucination_guard.calibration.certificate import Certificate, Infeasible
from hallucination_guard.calibration.drift import DriftMonitor
from hallucination_guard.calibration.fit import calibrate, fit_calibration
from hallucination_guard.calibration.fusion import FUSED, Fusion, fit_fusion
from hallucination_guard.calibration.labelled import Beginning, Labelled, read_labelled, write_labelled
from hallucination_guard.calibration.on_average import OnAverage
from hallucination_guard.calibration.report import Bin, FitReport
from hallucination_guard.calibration.responses import (
    LabelledResponse,
    LabelledSentence,
    read_responses,
    write_responses,
)
from hallucination_guard.calibration.sentences import SentenceCalibration, SentenceThreshold, calibrate_sentences

__all__ = [
    "FUSED",
    "Advice",
    "Beginning",
    "Bets",
    "Bin",
    "Calibration",
    "Certificate",
    "DriftMonitor",
    "FitReport",
    "Fusion",
    "Gate",
    "Infeasible",
    "Labelled",
    "LabelledResponse",
    "LabelledSentence",
    "Needed",
    "OnAverage",
    "RiskTest",
    "SentenceCalibration",
    "SentenceThreshold",
    "advise",
    "calibrate",
    "calibrate_sentences",
    "fit_calibration",
    "fit_fusion",
    "read_labelled",
    "read_responses",
    "write_labelled",
    "write_responses",
]
