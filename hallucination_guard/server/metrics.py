"""Figures for Prometheus, on a registry of their own: a library does not write into its host's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hallucination_guard.server.answering import Behind
from hallucination_guard.server.house import Places
from hallucination_guard.values import Outcome

__all__ = ["MEDIA_TYPE", "Metrics"]

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The figures of one server.

    Args:
        served: by alias.
        places: by alias.
    """

    def __init__(self, served: Mapping[str, Behind], places: Mapping[str, Places]) -> None:
        self._registry = CollectorRegistry()
        within: dict[str, Any] = {"registry": self._registry, "namespace": "hallucination_guard"}
        self._decisions = Counter("decisions", "Decisions that ended a request.", ["alias", "action", "rule"], **within)
        self._confidence = Histogram(
            "confidence", "Calibrated P(correct).", ["alias"], buckets=[at / 10 for at in range(1, 11)], **within
        )
        self._seconds = Counter(
            "seconds", "Wall time by part; score over the sum is the guard's share.", ["alias", "part"], **within
        )
        self._tokens = Counter("tokens", "Tokens read and written, over all attempts.", ["alias", "way"], **within)
        self._unscored = Counter("unscored", "Answers without a score.", ["alias", "status"], **within)
        self._refused = Counter("refused", "Requests that were not answered.", ["code"], **within)
        self._gone = Counter("clients_gone", "Clients that left before their answer.", ["alias"], **within)
        self._registry.register(_States(served, places))

    def saw(self, alias: str, outcome: Outcome) -> None:
        """Count one outcome."""
        decision = outcome.decision
        self._decisions.labels(alias, decision.action, decision.rule).inc()
        if outcome.confidence is not None:
            self._confidence.labels(alias).observe(outcome.confidence)
        for part in ("generate", "score"):
            self._seconds.labels(alias, part).inc(max(0.0, outcome.seconds.get(part, 0.0)))
        for way in ("in", "out"):
            self._tokens.labels(alias, way).inc(outcome.tokens.get(way, 0))
        if (status := outcome.verdict.score.status) != "scored":
            self._unscored.labels(alias, status).inc()

    def refused(self, code: str) -> None:
        """Count a request that was not answered."""
        self._refused.labels(code).inc()

    def gone(self, alias: str) -> None:
        """Count a client that left."""
        self._gone.labels(alias).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


class _States(Collector):
    """What is looked up when somebody asks."""

    def __init__(self, served: Mapping[str, Behind], places: Mapping[str, Places]) -> None:
        self._served, self._places = served, places

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not look while it is built."""
        return []

    def collect(self) -> Iterator[Metric]:
        """How everything is now."""

        def gauge(name: str, words: str, labels: list[str] | None = None) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"hallucination_guard_{name}", words, labels=labels or ["alias"])

        waiting, running = gauge("queue", "Requests that wait."), gauge("running", "Requests that are answered.")
        ready = gauge("ready", "1 while answers are scored.")
        suspended = gauge("suspended", "1 while certificates or scores do not hold.")
        drift = gauge("drift", "1 once scores have drifted from the calibration's.")
        windows = gauge("drift_windows", "Windows of scores that were tested for drift.")
        parity = gauge("parity", "Answers of the server beside: compared, beyond.", ["alias", "what"])
        for alias, places in self._places.items():
            waiting.add_metric([alias], places.waiting)
            running.add_metric([alias], places.running)
        for alias, served in self._served.items():
            status = served.status()
            ready.add_metric([alias], float(status.ready))
            suspended.add_metric([alias], float(bool(served.suspended)))
            if served.drift is not None:
                drifted, tests = served.drift
                drift.add_metric([alias], float(drifted))
                windows.add_metric([alias], tests)
            if status.generator is not None:
                parity.add_metric([alias, "compared"], status.generator.compared)
                parity.add_metric([alias, "beyond"], status.generator.beyond)
                if status.generator.tolerance is not None:
                    parity.add_metric([alias, "tolerance"], status.generator.tolerance)
        yield from (waiting, running, ready, suspended, drift, windows, parity)
