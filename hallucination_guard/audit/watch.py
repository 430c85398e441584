"""Follow the labels of a sample beside a log, and suspend certificates when they show that the risk is not kept.

Whoever labels writes files (``audit sample``, ``audit label``); a guard that has the watch looks at them before each
verdict (two calls of ``stat`` where nothing has changed). What cannot be read, or has lost what it had, suspends too.
What was suspended stays so: to go on, make another watch, on a new log if the alarm was raised.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from hallucination_guard.audit.chain import StrPath
from hallucination_guard.audit.evidence import Evidence, WatchState
from hallucination_guard.audit.labels import Label, label_history, labels_path
from hallucination_guard.audit.sample import Sample, read_sample, sample_path
from hallucination_guard.calibration.anytime import Bets, in_words
from hallucination_guard.errors import AuditError, GuardError, InputError

__all__ = ["RiskWatch", "watched"]

_log = logging.getLogger("hallucination_guard")
_REST = 0.1  # seconds in which a file that is written changes
_PATIENCE = 2.0


class RiskWatch:
    """Tests the risk of the answers let through, label by label; safe to share between threads.

    Make it with :meth:`of_log` and give it to a guard as its ``watch``.

    Args:
        log: the path of the audit log that was sampled.
        bets: the rules of the test.
        judge: whose labels count; None if there is only one.
    """

    def __init__(self, log: StrPath, bets: Bets, judge: str | None = None) -> None:
        self.bets = bets
        self._log_path = Path(os.path.realpath(log))  # who follows it must not lose it by a change of directory
        self._files = (sample_path(log), labels_path(log))
        self._judge = judge
        self._lock = threading.Lock()
        self._evidence = Evidence(bets)
        self._sample: Sample | None = None
        self._history: list[Label] = []
        self._seen: object = None
        self._suspended = ""

    @classmethod
    def of_log(cls, log: StrPath, *, alpha: float, level: float = 0.05, judge: str | None = None) -> Self:
        """Read the sample and the labels beside a log, and follow them from then on.

        Args:
            log: the path of the audit log; ``audit sample`` begins the files.
            alpha: α, the risk that is promised.
            level: the probability of a false alarm ever; of a false proof ever, likewise.
            judge: whose labels count; may be left out if there is only one.

        Raises:
            ConfigurationError: on an α or level out of range.
            AuditError: a file is missing or cannot be used.
            InputError: several judges gave labels and none was named, or one who gave none.
        """
        made = cls(log, Bets(alpha=alpha, level=level, floor=read_sample(log).floor), judge)
        made._read()
        return made

    @property
    def path(self) -> Path:
        """Of the log whose answers are tested."""
        return self._log_path

    @property
    def alpha(self) -> float:
        """The risk that is tested."""
        return self.bets.alpha

    @property
    def suspended(self) -> str:
        """Why certificates do not hold any more; empty while they do. Looks at the files."""
        with self._lock:
            self._look()
            return self._suspended

    @property
    def state(self) -> WatchState:
        """What the labels show. Looks at the files, unless something had suspended."""
        with self._lock:
            self._look()
            return self._evidence.state()

    def _look(self) -> None:
        if self._suspended:
            return
        try:
            if self._stamp() != self._seen:
                self._read_patiently()
        except GuardError as error:
            self._suspend(f"the labels cannot be followed: {error.message}")

    def _read_patiently(self) -> None:
        """Read; where a file is being written at this moment, once it has come to rest."""
        end = time.monotonic() + _PATIENCE
        while True:
            stamp = self._stamp()
            try:
                return self._read()
            except AuditError:
                time.sleep(_REST)
                if self._stamp() == stamp or time.monotonic() > end:
                    raise

    def _read(self) -> None:
        stamp = self._stamp()
        sample, history = read_sample(self._log_path), label_history(self._log_path)
        before = self._sample
        if before is not None and (
            (sample.seed, sample.floor) != (before.seed, before.floor)
            or sample.chosen[: len(before.chosen)] != before.chosen
            or history[: len(self._history)] != self._history
        ):
            raise AuditError("what was sampled or labelled before is not there any more")
        self._evidence.sample(sample.chosen[0 if before is None else len(before.chosen) :])
        asked = {each.id for each in sample.chosen}
        _one_judge(history, asked, self._judge)
        _named(history, sample, self._judge)
        known = {each.id for each in before.chosen} if before else set()
        for at, each in enumerate(history):
            # A label may be older than the draw that asks for it.
            if self._judge in (None, each.by) and (at >= len(self._history) or (each.id in asked - known)):
                self._evidence.label(each.id, each.correct)
        self._sample, self._history, self._seen = sample, history, stamp
        state = self._evidence.state()
        if state.raised:
            self._suspend(in_words(self.bets, wrong=state.wrong, labels=state.labelled))

    def _suspend(self, why: str) -> None:
        self._suspended = why
        _log.warning("guard.risk: %s; certificates are suspended", why)

    def _stamp(self) -> object:
        """What changes when somebody writes to the files.

        Raises:
            AuditError: if one is missing, for example.
        """
        try:
            found = [path.stat() for path in self._files]
        except OSError as error:
            raise AuditError(
                f"{error.filename} cannot be read: {error.strerror}",
                hint="audit sample begins it; put back what was lost",
            ) from error
        return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def watched(
    log: StrPath, *, alpha: float, level: float = 0.05, judge: str | None = None
) -> Iterator[tuple[Label, WatchState]]:
    """Every label that counts, in the order in which they came, with where the test stood after it.

    Args:
        log: the path of the audit log.
        alpha: α.
        level: as for :meth:`RiskWatch.of_log`.
        judge: likewise.

    Raises:
        ConfigurationError: likewise.
        AuditError: likewise.
        InputError: likewise.
    """
    sample, history = read_sample(log), label_history(log)
    _one_judge(history, {each.id for each in sample.chosen}, judge)
    _named(history, sample, judge)
    evidence = Evidence(Bets(alpha=alpha, level=level, floor=sample.floor))
    evidence.sample(sample.chosen)
    for each in history:
        if judge in (None, each.by) and evidence.label(each.id, each.correct):
            yield each, evidence.state()


def _named(history: list[Label], sample: Sample | None, judge: str | None) -> None:
    """See that a judge who was named is one who labels: with a wrong name no label would ever count."""
    asked = {each.id for each in sample.chosen} if sample else set()
    names = sorted({each.by for each in history if each.id in asked})
    if judge is not None and names and judge not in names:
        raise InputError(f"the judge {judge!r} gave no labels", hint=f"labels are by {', '.join(names)}")


def _one_judge(history: list[Label], asked: set[str], judge: str | None) -> None:
    names = sorted({each.by for each in history if each.id in asked})
    if judge is None and len(names) > 1:
        raise InputError(f"several judges gave labels: {', '.join(names)}", hint="name one of them as judge")
