"""What a server is told: one YAML file, checked to the last key before anything is loaded."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hallucination_guard.errors import ConfigurationError, GuardError, InputError
from hallucination_guard.guard import ABSTENTION
from hallucination_guard.server.keys import Keys

__all__ = ["Alias", "Limits", "Logging", "Problems", "Settings", "Upstream", "Watching", "is_loopback"]

_Path = Annotated[Path, BeforeValidator(lambda given: Path(given) if isinstance(given, str) else given)]
_Seconds = Annotated[float, Field(gt=0, le=86_400)]
_Count = Annotated[int, Field(ge=1, le=1_000_000)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Upstream(_Part):
    """A server that draws the answers, see docs/sidecar.md.

    Args:
        url: its root.
        kind: what it is; ``auto`` asks it.
        model: which of its models; its first by default.
        dtype: of its weights, where it does not say so.
        api_key_env: the environment variable that holds the key for it; a key does not stand in this file.
        prefix_mib: mebibytes for what the model here has read, so that it reads no beginning twice; 0 keeps nothing. By
            default 512, where the model allows it.
    """

    url: str = Field(pattern=r"^https?://[^\s]+$")
    kind: Literal["auto", "vllm", "llamacpp", "sglang", "unknown"] = "auto"
    model: str | None = None
    dtype: str = ""
    api_key_env: str | None = None
    prefix_mib: Annotated[int, Field(ge=0, le=1 << 20)] | None = None


class Watching(_Part):
    """The labels of a sample of the alias's answers, which suspend its certificates on the alarm, see docs/anytime.md.

    Args:
        level: the probability of a false alarm ever.
        judge: whose labels count; None if there is only one.
    """

    level: float = Field(default=0.05, gt=0, lt=1)
    judge: str | None = None


class Alias(_Part):
    """A name under which clients ask, and what stands behind it.

    Args:
        alias: the name.
        model: ``demo``, a folder, a ``.gguf`` file or a hub id; aliases with the same model share it.
        device_map: as in transformers.
        dtype: as in transformers.
        profile: where t* was measured to be.
        upstream: what draws the answers; by default the model does itself.
        policy: a pack or a document.
        confidence: replaces that of the policy.
        max_risk: replaces that of the policy.
        calibration: its file; the demo model has one.
        watch: follows the labels of a sample of its log, begun by ``audit sample``; the policy speaks of max_risk.
        sentences: thresholds of sentences.
        audit: the log; aliases may share one.
        content: what the log keeps of prompt and answer; ``hmac`` needs ``audit_key_env``.
        audit_key_env: the environment variable that holds the key of its seals.
        max_new_tokens: of an answer that says nothing else.
        temperature: likewise.
        tighten: whether a request may ask for a smaller risk or a higher confidence; never for less of them.
    """

    alias: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")
    model: str = Field(default="demo", min_length=1)
    device_map: str | None = None
    dtype: str | None = None
    profile: _Path | None = None
    upstream: Upstream | None = None
    policy: str = Field(default="abstain", min_length=1)
    confidence: float | None = Field(default=None, gt=0, le=1)
    max_risk: float | None = Field(default=None, gt=0, lt=1)
    calibration: _Path | None = None
    watch: Watching | None = None
    sentences: _Path | None = None
    audit: _Path = Path("audit.jsonl")
    content: Literal["text", "redacted", "hmac"] = "text"
    audit_key_env: str | None = None
    max_new_tokens: _Count = 256
    temperature: float | None = Field(default=None, ge=0, le=2)
    tighten: bool = True


class Limits(_Part):
    """What one server takes on.

    Args:
        body_bytes: of a request's body, at most; looked at before it is parsed.
        head_seconds: until a request's head has come.
        body_seconds: until its body has come.
        write_seconds: a client that reads nothing for so long is dropped; its request ends as if it had left.
        keep_alive_seconds: an idle connection is kept so long.
        connections: at most; beyond it the answer is 503.
        running: requests of one alias that are answered at the same time; those that are not in the batch that is
            decoded are ready for the next one.
        batch: answers of one model that are decoded and scored together, at most.
        queue: requests of one alias that wait, at most; beyond it the answer is 429.
        deadline_seconds: for one request, waiting included; beyond it the answer is 503.
        shutdown_seconds: running requests have so long to end when the server is told to stop.
        max_tokens: that a request may ask for.
        messages: in a request, at most.
        requests_per_minute: of one key, or of all clients together where there are no keys.
        concurrent: requests of one key at the same time, likewise.
    """

    body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 1 << 20
    head_seconds: _Seconds = 10.0
    body_seconds: _Seconds = 20.0
    write_seconds: _Seconds = 30.0
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] = 5
    connections: _Count = 512
    running: _Count = 16
    batch: _Count = 8
    queue: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    deadline_seconds: _Seconds = 120.0
    shutdown_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    max_tokens: _Count = 1024
    messages: _Count = 1000
    requests_per_minute: _Count = 600
    concurrent: _Count = 128


class Logging(_Part):
    """What the server's own log lines hold.

    Args:
        prompts: whether the prompt; off by default.
    """

    prompts: bool = False


class Settings(_Part):
    """The whole file.

    Args:
        host: where it listens; another than the loopback needs ``keys``, or ``open_without_keys``.
        port: there; 0 takes a free one.
        open_without_keys: whether everybody who reaches the address may ask.
        hosts: names by which clients may call it, for the ``Host`` header; by default the loopback's names where there
            are no keys, and any where there are.
        keys: the file of keys, see :class:`~hallucination_guard.server.keys.Keys`.
        models: the aliases.
        abstention: what stands in ``refusal`` for an answer that was not let through.
        limits: see :class:`Limits`.
        log: see :class:`Logging`.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8400, ge=0, le=65_535)
    open_without_keys: bool = False
    hosts: list[str] | None = None
    keys: _Path | None = None
    models: list[Alias] = Field(default=[Alias(alias="demo")], min_length=1)
    abstention: str = Field(default=ABSTENTION, min_length=1)
    limits: Limits = Limits()
    log: Logging = Logging()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [each.alias for each in self.models]
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise ValueError(f"the alias {twice[0]!r} is there twice")
        if not is_loopback(self.host) and self.keys is None and not self.open_without_keys:
            raise ValueError(
                f"host {self.host!r} can be reached from elsewhere and there are no keys: give keys, or say "
                "open_without_keys: true"
            )
        if shared := _shared_log(self.models):
            raise ValueError(shared)
        return self

    @classmethod
    def read(cls, path: Path, **instead: Any) -> Self:
        """Settings from a file. Paths in it are relative to its folder.

        Args:
            path: of it.
            **instead: values that stand instead of the file's own, where they are not None.

        Raises:
            ConfigurationError: with a line for each thing in it that cannot be.
        """
        try:
            found = yaml.safe_load(path.read_bytes())
        except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
            why = getattr(error, "strerror", None) or getattr(error, "problem", None) or type(error).__name__
            raise ConfigurationError(f"{str(path)!r} cannot be read: {why}", hint="give a YAML file") from None
        if not isinstance(found, dict):
            raise ConfigurationError(f"{str(path)!r} holds no mapping", hint="see docs/server.md for one to begin with")
        given = {**found, **{name: value for name, value in instead.items() if value is not None}}
        return cls.of(given).beside(path.parent)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Settings from plain data.

        Raises:
            ConfigurationError: with a line for each thing in it that cannot be.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            found = [f"{_place(each['loc'])}{_words(each['msg'])}" for each in error.errors(include_url=False)]
        raise Problems(found)

    def beside(self, folder: Path) -> Self:
        """The same, whose relative paths are of this folder."""

        def moved(path: Path | None) -> Path | None:
            return None if path is None else folder / path

        models = [
            each.model_copy(
                update={name: moved(getattr(each, name)) for name in ("profile", "calibration", "sentences", "audit")}
                | ({"policy": str(folder / each.policy)} if each.policy.endswith((".yaml", ".yml")) else {})
                | ({"model": str(folder / each.model)} if (folder / each.model).exists() else {})
            )
            for each in self.models
        ]
        if shared := _shared_log(models):
            raise Problems([shared])
        return self.model_copy(update={"models": models, "keys": moved(self.keys)})

    def problems(self) -> list[str]:
        """What stands in the way of serving this, as far as it can be seen without loading a model; a line each."""
        found = []
        if self.keys is not None:
            found += _tried("keys", lambda: Keys.read(self.keys) if self.keys else None)
        for each in self.models:
            found += [f"models {each.alias}: {line}" for line in _alias_problems(each)]
        return found


class Problems(ConfigurationError):
    """Several things are wrong at once.

    Args:
        lines: one for each.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def _shared_log(models: Sequence[Alias]) -> str:
    """Which log two aliases would write in two ways; empty if none."""
    logs: dict[str, tuple[str, str | None]] = {}
    for each in models:
        kept = (each.content, each.audit_key_env)
        if logs.setdefault(os.path.realpath(each.audit), kept) != kept:
            return f"two aliases share the log {str(each.audit)!r} with other settings of it"
    return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _alias_problems(alias: Alias) -> list[str]:
    from hallucination_guard.calibration import Calibration, SentenceCalibration
    from hallucination_guard_policies import load_policy

    def calibration() -> object:
        return None if alias.calibration is None else Calibration.load(alias.calibration)

    def sentences() -> object:
        return None if alias.sentences is None else SentenceCalibration.load(alias.sentences)

    def log() -> None:
        folder = alias.audit.parent
        existing = next(each for each in (folder, *folder.resolve().parents) if each.is_dir())
        if not os.access(existing, os.W_OK):
            raise InputError(f"the log {str(alias.audit)!r} cannot be written there")
        if alias.content == "hmac" and alias.audit_key_env is None:
            raise InputError("content hmac needs audit_key_env")

    def secrets() -> None:
        names = [alias.audit_key_env, alias.upstream.api_key_env if alias.upstream else None]
        for name in names:
            if name is not None and not os.environ.get(name):
                raise InputError(f"the environment variable {name!r} is not set")

    def model() -> None:
        if alias.model.startswith(("/", "./", "../")) and not Path(alias.model).exists():
            raise InputError(f"there is no {alias.model!r}")

    return [
        line
        for name, check in (
            (
                "policy",
                lambda: load_policy(alias.policy, confidence=alias.confidence, max_risk=alias.max_risk),
            ),
            ("calibration", calibration),
            ("sentences", sentences),
            ("audit", log),
            ("environment", secrets),
            ("model", model),
        )
        for line in _tried(name, check)
    ]


def _tried(name: str, check: Any) -> list[str]:
    try:
        check()
    except GuardError as error:
        return [f"{name}: {error}"]
    return []


def _place(path: tuple[int | str, ...]) -> str:
    return ".".join(map(str, path)) + ": " if path else ""


def _words(message: str) -> str:
    return message.removeprefix("Value error, ")
