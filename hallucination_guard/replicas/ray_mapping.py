"""Batches of a file over processes of Ray Data: as they are finished, in any order; of a lost process, once more."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import ray.data
import ray.util.annotations
from ray.exceptions import RayError, RayTaskError

from hallucination_guard.errors import GuardError, ReplicaLost
from hallucination_guard.replicas.jobs import Job
from hallucination_guard.replicas.ray_cluster import Share

__all__ = ["elsewhere", "mapped"]

_LOST = 3  # times that a process may be lost, and a batch with it: one that ends every process must end the job

_Result = TypeVar("_Result")


class _OnRow:
    """A job on a row of Ray Data."""

    def __init__(self, kind: Callable[..., Job], made_of: Mapping[str, Any]) -> None:
        self._job = kind(**made_of)

    def __call__(self, row: Mapping[str, str]) -> dict[str, str]:
        return {"rows": self._job(row["batch"])}


def mapped(
    kind: Callable[..., Job], made_of: Mapping[str, Any], batches: Sequence[str], *, processes: int, share: Share
) -> Iterator[str]:
    """What a job makes of each batch; of one whose process was lost perhaps twice.

    Args:
        kind: of job; each process makes one.
        made_of: its arguments.
        batches: of the file.
        processes: at most.
        share: what each takes of the machine.

    Raises:
        ReplicaLost: if processes were lost again and again.
    """
    if not batches:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it has to say is raised as well
    with warnings.catch_warnings():
        # Ray 2.60 is to lose its only way of saying how often a process may be lost, and has no other yet.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        # A batch a block: each is finished, kept and, where need be, done again by itself.
        rows = ray.data.from_items([{"batch": each} for each in batches], override_num_blocks=len(batches)).map(
            _OnRow,
            fn_constructor_args=(kind, made_of),
            compute=ray.data.ActorPoolStrategy(size=min(processes, len(batches))),
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
            ray_remote_args_fn=lambda: {"max_restarts": _LOST, "max_task_retries": _LOST},
        )
    with _named():
        for row in rows.iter_rows():
            yield str(row["rows"])


def elsewhere(work: Callable[..., _Result], *arguments: Any, share: Share, **more: Any) -> _Result:
    """What ``work`` gives, in a process of its own, which is gone then.

    Raises:
        GuardError: likewise.
    """
    remote = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus or None, max_calls=1, max_retries=1)(work)
    with _named():
        found: _Result = ray.get(remote.remote(*arguments, **more))
        return found


@contextmanager
def _named() -> Iterator[None]:
    """What Ray raises, as what it means."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, GuardError | OSError | ImportError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ReplicaLost(
            f"the processes of the job were lost: {type(error).__name__}",
            hint="what is finished is kept: the same command continues; a smaller --batch-size takes less memory",
        ) from None
