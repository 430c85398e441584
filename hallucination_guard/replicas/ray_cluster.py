"""A Ray of our own: on this machine, on the loopback, behind a token that nobody else has, and gone at the end.

Nothing is reported to anybody (no usage statistics, no dashboard). What Ray writes meanwhile (sockets, its own logs)
lies in a folder that only this user can enter.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hallucination_guard.errors import ConfigurationError, MissingExtra

__all__ = ["Share", "cluster"]

_STORE = 256 << 20  # bytes of shared memory: what travels are texts and numbers
_GRAIN = 1 / 1024  # of a share: Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True)
class Share:
    """What of the machine each process takes.

    Args:
        cpus: below one, so that half of them stay free for what Ray itself has to run: where the processes take all,
            the task that feeds them never begins, and everything waits for ever.
        gpus: likewise; 0 where there are none.
    """

    cpus: float
    gpus: float

    @classmethod
    def of(cls, processes: int, *, cpus: float, gpus: float) -> Share:
        """The share of each of so many processes."""
        return cls(
            cpus=min(0.5, int(cpus / 2 / processes / _GRAIN) * _GRAIN),
            gpus=min(1.0, int(gpus / processes / _GRAIN) * _GRAIN),
        )


@contextmanager
def cluster(processes: int, *, say: bool = False) -> Iterator[Share]:
    """Ray, as long as the context lasts, and what each of the processes may take of it.

    Args:
        processes: that are to answer or score.
        say: show on the standard error what they write.

    Raises:
        MissingExtra: if Ray is not installed.
        ConfigurationError: if this process has begun to use Ray in its own way.
    """
    if sys.modules.get("ray") is not None:
        raise ConfigurationError(
            "ray was imported before its token was made", hint="run it as a command: hallucination-guard … --ray N"
        )
    token = secrets.token_hex(32)
    # Ray reads most of them when it is imported, and its processes inherit them.
    ours = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for "listen on other addresses than the loopback"
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    before = {name: os.environ.get(name) for name in (*ours, "RAY_ADDRESS")}
    os.environ.update(ours)
    os.environ.pop("RAY_ADDRESS", None)
    folder = Path(tempfile.mkdtemp(prefix="hg-ray-"))  # its owner's alone; Ray opens its own folders to everybody
    try:
        ray = _ray()
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_STORE,
                log_to_driver=say,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "ray"),
            )
            found = ray.cluster_resources()
            yield Share.of(processes, cpus=found.get("CPU", 1.0), gpus=found.get("GPU", 0.0))
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(
            f"--ray needs {error.name or 'ray'}", hint="pip install 'hallucination-guard-semgrad[ray]'"
        ) from None
    return ray
