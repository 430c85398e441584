"""``serve``: guarded answers over the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hallucination_guard.cli.console import load, say, show, show_json
from hallucination_guard.cli.options import Command, Json, Replicas
from hallucination_guard.errors import ConfigurationError, MissingExtra

if TYPE_CHECKING:
    from hallucination_guard.server.answering import Behind
    from hallucination_guard.server.config import Settings

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
    ray: Replicas = None,
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
    if new_key is not None:
        return _new_key(new_key, role or [], keys, as_json=as_json)
    if role or keys:
        raise ConfigurationError("--role and --keys are of a new key", hint="give --new-key NAME")
    if check:
        return _check(config, host, port, as_json=as_json, ray=ray is not None)
    settings = _settings(config, host, port)
    if problems := settings.problems():
        for line in problems:
            say(f"error: {line}")
        return 2
    return _here(settings) if ray is None else _on_ray(settings, ray)


def _here(settings: Settings) -> int:
    from hallucination_guard.replicas.opening import opened
    from hallucination_guard.server.settled import settled

    with ExitStack() as stack:
        served = opened(settings, stack, load=load)
        guards = [each.guard for each in served.values()]
        with settled(guards, settings.limits.shutdown_seconds, say):  # before the logs are closed
            return _run(settings, served)


def _on_ray(settings: Settings, replicas: int) -> int:
    from hallucination_guard.replicas.opening import chains_beside
    from hallucination_guard.replicas.ray_cluster import cluster

    with cluster(replicas, say=True) as share:
        from hallucination_guard.replicas.fleet import Remote
        from hallucination_guard.replicas.ray_serving import served_by_ray

        with served_by_ray(settings, replicas, share) as fleet:
            folders = sorted({str(chains_beside(each.audit)) for each in settings.models})
            say(f"{replicas} replicas; a chain of each in {', '.join(folders)}")
            return _run(settings, {each.alias: Remote(each, fleet) for each in settings.models})


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


def _check(config: Path | None, host: str | None, port: int | None, *, as_json: bool, ray: bool) -> int:
    from importlib.util import find_spec

    from hallucination_guard.server.config import Problems

    try:
        lines = _settings(config, host, port).problems()
    except Problems as error:
        lines = error.lines
    if ray and find_spec("ray") is None:
        lines = [*lines, "--ray: it needs pip install 'hallucination-guard-semgrad[ray]'"]
    if as_json:
        show_json({"problems": lines})
    else:
        for line in lines or ["nothing is wrong"]:
            show(line)
    return 2 if lines else 0


def _run(settings: Settings, served: Mapping[str, Behind]) -> int:
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
