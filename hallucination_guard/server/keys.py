"""API keys: who may do what. A file holds their hashes; a key itself is shown once, when it is made.

A key has 256 random bits, so a plain SHA-256 is enough: there is nothing to be guessed that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias, get_args

import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hallucination_guard.errors import ConfigurationError

__all__ = ["Key", "KeyLimits", "Keys", "Role", "new_key"]

Role: TypeAlias = Literal["ask", "score", "read"]
"""``ask`` for answers, ``score`` for scores of given texts, ``read`` the metrics."""

_PREFIX = "hg-"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class KeyLimits(_Part):
    """Of one key, instead of the server's own.

    Args:
        requests_per_minute: at most.
        concurrent: requests at the same time.
        max_tokens: that a request may ask for.
    """

    requests_per_minute: int | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)


class Key(_Part):
    """One key.

    Args:
        name: whose it is; it stands in records as the principal.
        roles: what it may be used for.
        sha256: of the key, hexadecimal.
        limits: its own.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    roles: Annotated[list[Role], Field(min_length=1)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    limits: KeyLimits = KeyLimits()


class Keys(_Part):
    """The keys of a server.

    Args:
        keys: all of them.
    """

    keys: list[Key] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [each.name for each in self.keys]
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise ValueError(f"the key {twice[0]!r} is there twice")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """The keys of a file.

        Raises:
            ConfigurationError: if it cannot be read or used; what stands in it is not repeated.
        """
        hint = "make one: hallucination-guard serve --new-key NAME --role ask --keys FILE"
        try:
            found = yaml.safe_load(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}", hint=hint) from None
        except (yaml.YAMLError, RecursionError, ValueError):
            raise ConfigurationError(f"{str(path)!r} is no YAML", hint=hint) from None
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigurationError(f"{str(path)!r}, {place}: {first['msg']}", hint=hint) from None

    def whose(self, given: str) -> Key | None:
        """Whose key it is; None for nobody's. It takes as long for every key that is none."""
        digest = _hash(given)
        found = None
        for each in self.keys:
            if hmac.compare_digest(each.sha256, digest):
                found = each
        return found


def new_key(path: Path, name: str, roles: list[Role]) -> str:
    """Make a key, and write its hash into the file, which only its owner may read.

    Returns:
        The key. It is nowhere else.

    Raises:
        ConfigurationError: if the name is taken, a role is none, or the file cannot be used.
    """
    if unknown := sorted(set(roles) - set(get_args(Role))):
        raise ConfigurationError(f"the role {unknown[0]!r} is none", hint=f"one of {', '.join(get_args(Role))}")
    if not roles:
        raise ConfigurationError("a key without a role can do nothing", hint="--role ask, for example")
    key = _PREFIX + secrets.token_urlsafe(32)
    try:
        made = Key(name=name, roles=roles, sha256=_hash(key))
    except ValidationError:
        raise ConfigurationError(f"the name {name!r} cannot be", hint="letters, digits, '.', '_', '@', '-'") from None
    try:
        with FileLock(f"{path}.lock"):
            before = Keys.read(path).keys if path.exists() else []
            if any(each.name == name for each in before):
                raise ConfigurationError(f"there is a key {name!r} already", hint="take another name, or remove it")
            written = Keys(keys=[*before, made]).model_dump(mode="json", exclude_defaults=True)
            fresh = path.with_name(f"{path.name}.new")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                yaml.safe_dump(written, file, sort_keys=False)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
