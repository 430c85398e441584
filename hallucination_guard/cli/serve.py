"""``serve``: guarded answers over the OpenAI API."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hallucination_guard.cli.console import load, say, show, show_json
from hallucination_guard.cli.options import Command, Json, ModelChoice
from hallucination_guard.errors import ConfigurationError, MissingExtra

if TYPE_CHECKING:
    from hallucination_guard.audit import AuditLog
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.server.config import Alias, Settings
    from hallucination_guard.server.house import Served

__all__ = ["register", "serve"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(serve)


def serve(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Without one: the demo model on the loopback.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what is wrong with the file, a line each.")] = False,
    host: Annotated[str | None, typer.Option("--host", help="Instead of the file's.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Instead of the file's.")] = None,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="Make an API key, and print it once.")
    ] = None,
    role: Annotated[list[str] | None, typer.Option("--role", help="Of the new key: ask, score, read.")] = None,
    keys: Annotated[Path | None, typer.Option("--keys", metavar="FILE", help="Where the new key's hash goes.")] = None,
    as_json: Json = False,
) -> int:
    """Serve guarded answers over the OpenAI API."""
    try:
        import hallucination_guard.server.app  # whether everything that it needs is there
        import hallucination_guard.server.running  # noqa: F401  # likewise
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"serve needs {error.name}", hint="pip install 'hallucination-guard-semgrad[server]'"
        ) from None
    from hallucination_guard.server.settled import settled

    if new_key is not None:
        return _new_key(new_key, role or [], keys, as_json=as_json)
    if role or keys:
        raise ConfigurationError("--role and --keys are of a new key", hint="give --new-key NAME")
    if check:
        return _check(config, host, port, as_json=as_json)
    settings = _settings(config, host, port)
    if problems := settings.problems():
        for line in problems:
            say(f"error: {line}")
        return 2
    with ExitStack() as stack:
        served = _served(settings, stack)
        guards = [each.guard for each in served.values()]
        with settled(guards, settings.limits.shutdown_seconds, say):  # before the logs are closed
            return _run(settings, served)


def _settings(config: Path | None, host: str | None, port: int | None) -> Settings:
    from hallucination_guard.server.config import Settings

    if config is None:
        return Settings.of({name: value for name, value in (("host", host), ("port", port)) if value is not None})
    return Settings.read(config, host=host, port=port)


def _new_key(name: str, roles: list[str], path: Path | None, *, as_json: bool) -> int:
    from hallucination_guard.server.keys import new_key

    if path is None:
        raise ConfigurationError("a new key needs a file", hint="--keys keys.yaml")
    key = new_key(path, name, roles)  # type: ignore[arg-type]  # what is no role is refused there
    show_json({"name": name, "roles": roles, "key": key}) if as_json else show(key)
    say(f"its hash is in {path}; the key itself is nowhere else")
    return 0


def _check(config: Path | None, host: str | None, port: int | None, *, as_json: bool) -> int:
    from hallucination_guard.server.config import Problems

    try:
        lines = _settings(config, host, port).problems()
    except Problems as error:
        lines = error.lines
    if as_json:
        show_json({"problems": lines})
    else:
        for line in lines or ["nothing is wrong"]:
            show(line)
    return 2 if lines else 0


def _served(settings: Settings, stack: ExitStack) -> dict[str, Served]:
    """Load what is to be served. Aliases share models and logs."""
    from hallucination_guard.calibration import SentenceCalibration
    from hallucination_guard.guard import Guard
    from hallucination_guard.server.house import Served
    from hallucination_guard.values import GenerationSettings
    from hallucination_guard_policies import load_policy

    models: dict[ModelChoice, WhiteBoxModel] = {}
    logs: dict[str, AuditLog] = {}
    found = {}
    for each in settings.models:
        choice = ModelChoice(name=each.model, device_map=each.device_map, dtype=each.dtype, profile=each.profile)
        if choice not in models:
            # Every thread that computes has threads of its own in torch, and more than there are cores slow down all:
            # this one and its threads are gone when the server begins to draw.
            with ThreadPoolExecutor(1) as loading:
                models[choice] = loading.submit(load, choice).result()
        model = models[choice]
        if each.upstream is not None and each.upstream.prefix_mib:
            model = model.with_prefixes(each.upstream.prefix_mib << 20)
        calibration = _calibration(each, model)
        guard = Guard(
            model,
            policy=load_policy(each.policy, confidence=each.confidence, max_risk=each.max_risk),
            calibration=calibration,
            sentences=None if each.sentences is None else SentenceCalibration.load(each.sentences),
            audit=_log(each, logs, stack),
            generation=GenerationSettings(max_new_tokens=each.max_new_tokens, temperature=each.temperature),
            max_calls=settings.limits.running + settings.limits.queue,
        )
        found[each.alias] = Served(alias=each, guard=guard)
    return found


def _log(alias: Alias, logs: dict[str, AuditLog], stack: ExitStack) -> AuditLog:
    from hallucination_guard.audit import AuditLog

    at = os.path.realpath(alias.audit)
    if at not in logs:
        key = None if alias.audit_key_env is None else os.environ[alias.audit_key_env].encode()
        logs[at] = stack.enter_context(AuditLog(alias.audit, content=alias.content, key=key))
    return logs[at]


def _calibration(alias: Alias, model: WhiteBoxModel) -> Calibration | None:
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.demo import calibrated

    if alias.calibration is not None:
        return Calibration.load(alias.calibration)
    return calibrated(model) if alias.model == "demo" and alias.upstream is None else None


def _run(settings: Settings, served: dict[str, Served]) -> int:
    import asyncio

    from hallucination_guard.server.app import create_app
    from hallucination_guard.server.keys import Keys
    from hallucination_guard.server.running import running

    app = create_app(settings, served, None if settings.keys is None else Keys.read(settings.keys))
    server = running(app, settings, app.close)
    _log_to_stderr()
    say(f"serving {', '.join(served)} at http://{settings.host}:{settings.port}/v1")
    asyncio.run(server.serve())
    return 0 if server.started else 1


def _log_to_stderr() -> None:
    """A line of JSON for what the server notices. An application that embeds it has its own way."""
    import json
    import logging

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            said = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
            return json.dumps(said | getattr(record, "hallucination_guard", {}), ensure_ascii=False)

    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    for name in ("hallucination_guard", "uvicorn"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
