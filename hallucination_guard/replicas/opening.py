"""From the settings of a server to what stands behind its aliases: models, guards and logs, opened once each."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from hallucination_guard.audit import AuditLog, RiskWatch
from hallucination_guard.calibration import Calibration, SentenceCalibration
from hallucination_guard.demo import calibrated
from hallucination_guard.errors import ConfigurationError
from hallucination_guard.guard import Guard
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.model.choice import ModelChoice
from hallucination_guard.model.prefixes import why_not
from hallucination_guard.server.config import Alias, Settings, Watching
from hallucination_guard.server.house import Served
from hallucination_guard.values import GenerationSettings, Policy
from hallucination_guard_policies import load_policy

__all__ = ["chains_beside", "opened"]

_PREFIXES = 512 << 20  # bytes


def opened(
    settings: Settings,
    stack: ExitStack,
    *,
    load: Callable[[ModelChoice], WhiteBoxModel] = ModelChoice.load,
    chain: str = "",
) -> dict[str, Served]:
    """Load what is to be served. Aliases share models and logs.

    Args:
        settings: of the server.
        stack: closes the logs.
        load: loads a model.
        chain: the name of this process, where several write: it has a chain of its own beside each log.
    """
    models: dict[ModelChoice, WhiteBoxModel] = {}
    logs: dict[str, AuditLog] = {}
    found = {}
    for each in settings.models:
        choice = ModelChoice(name=each.model, device_map=each.device_map, dtype=each.dtype, profile=each.profile)
        if choice not in models:
            # Every thread that computes has threads of its own in torch, and more than there are cores slow down all:
            # this one and its threads are gone when the server begins to draw.
            with ThreadPoolExecutor(1) as loading:
                models[choice] = loading.submit(load, choice).result().with_batches(settings.limits.batch)
        model = models[choice] if each.upstream is None else _reading(models[choice], each.upstream.prefix_mib)
        policy = load_policy(each.policy, confidence=each.confidence, max_risk=each.max_risk)
        guard = Guard(
            model,
            policy=policy,
            calibration=_calibration(each, model),
            sentences=None if each.sentences is None else SentenceCalibration.load(each.sentences),
            audit=_log(each, logs, stack, chain),
            watch=None if each.watch is None else _watch(each, each.watch, policy, chain),
            generation=GenerationSettings(max_new_tokens=each.max_new_tokens, temperature=each.temperature),
            batch_size=settings.limits.batch,
            max_calls=settings.limits.running + settings.limits.queue,
        )
        found[each.alias] = Served(alias=each, guard=guard)
    return found


def chains_beside(log: Path) -> Path:
    """The folder of the chains of several processes, where one process would write this log."""
    return log.with_name(f"{log.name.removesuffix('.jsonl')}.chains")


def _log(alias: Alias, logs: dict[str, AuditLog], stack: ExitStack, chain: str) -> AuditLog:
    path = chains_beside(alias.audit) / f"{chain}.jsonl" if chain else alias.audit
    at = os.path.realpath(path)
    if at not in logs:
        key = None if alias.audit_key_env is None else os.environ[alias.audit_key_env].encode()
        logs[at] = stack.enter_context(AuditLog(path, content=alias.content, key=key))
    return logs[at]


def _reading(model: WhiteBoxModel, mib: int | None) -> WhiteBoxModel:
    """The model as it reads what a server beside it draws."""
    if mib is None:
        return model if why_not(model.model) else model.with_prefixes(_PREFIXES)
    return model.with_prefixes(mib << 20) if mib else model


def _watch(alias: Alias, watching: Watching, policy: Policy, chain: str) -> RiskWatch:
    risk = getattr(policy, "needs_risk", None)
    if risk is None:
        raise ConfigurationError(
            f"the alias {alias.alias!r} watches a risk, and its policy speaks of none", hint="give it max_risk"
        )
    if chain:
        raise ConfigurationError(
            f"the alias {alias.alias!r} watches the labels of one log, and several processes write several",
            hint="serve it in one process, or without watch",
        )
    return RiskWatch.of_log(alias.audit, alpha=risk, level=watching.level, judge=watching.judge)


def _calibration(alias: Alias, model: WhiteBoxModel) -> Calibration | None:
    if alias.calibration is not None:
        return Calibration.load(alias.calibration)
    return calibrated(model) if alias.model == "demo" and alias.upstream is None else None
