"""Replicas on Ray Serve: how many, where, and how they are reached. Ray's own HTTP proxy is off: the server is ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import LoggingConfig

from hallucination_guard.errors import BusyError, GuardError, ModelError, ReplicaLost
from hallucination_guard.replicas.fleet import Fleet
from hallucination_guard.replicas.ray_cluster import Share
from hallucination_guard.replicas.replica import Replica
from hallucination_guard.replicas.said import Asked, Said
from hallucination_guard.server.config import Settings

__all__ = ["served_by_ray"]

_NAME = "hallucination-guard"
_TRIES = 3  # to make a replica, before the deployment has failed


class _OnRay(Replica):
    """A replica that Ray makes, names and ends."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings, serve.get_replica_context().replica_id.unique_id)

    def __del__(self) -> None:  # what Ray calls at a graceful end
        if hasattr(self, "_stack"):
            self.close()


@contextmanager
def served_by_ray(settings: Settings, replicas: int, share: Share) -> Iterator[Fleet]:
    """Replicas of a server, as long as the context lasts; they are up when it begins.

    Args:
        settings: of the server.
        replicas: how many.
        share: what each takes of the machine.

    Raises:
        ModelError: if they cannot be made.
    """
    limits = settings.limits
    deployment = serve.deployment(
        _OnRay,
        name="replica",
        num_replicas=replicas,
        # What is asked of a replica meets in the guard's batches: nothing waits in Ray, and Ray batches nothing.
        max_ongoing_requests=(limits.running + limits.queue) * len(settings.models) + 1,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        graceful_shutdown_timeout_s=float(limits.shutdown_seconds),
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=_TRIES,
        logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
    )
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(proxy_location="Disabled", logging_config=quiet)
    try:
        plain = settings.beside(Path.cwd()).model_dump(mode="json")
        try:
            handle = serve.run(deployment.bind(plain), name=_NAME, route_prefix=None)
        except (RuntimeError, RayError, RayServeException) as error:
            raise ModelError(f"the replicas could not be made: {_why(error)}", hint="try it without --ray") from None
        yield Fleet(_RayHandle(handle))
    finally:
        serve.shutdown()


def _why(error: Exception) -> str:
    """The last words of what was raised where a replica was made: Serve keeps its traceback as a text."""
    application = serve.status().applications.get(_NAME)
    kept = [] if application is None else [each.message for each in application.deployments.values()]
    lines = [line.strip() for text in (str(error), *kept) for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if line.startswith(f"{GuardError.__module__}.")]
    last: str = (raised or lines or [type(error).__name__])[-1]
    return last.removeprefix(f"{GuardError.__module__}.")


class _RayHandle:
    """Reaches the replicas by a Serve handle; what Ray raises becomes what it means.

    Args:
        handle: of the deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)

    async def about(self) -> Said:
        """How one of them is."""
        return await self._one(self._handle.about.remote())

    async def answer(self, asked: Asked) -> Said:
        """What one of them answers."""
        return await self._one(self._handle.answer.remote(asked))

    async def review(self, asked: Asked) -> Said:
        """What one of them makes of a given answer."""
        return await self._one(self._handle.review.remote(asked))

    async def stream(self, asked: Asked) -> AsyncGenerator[Said, None]:
        """What one of them answers, event by event."""
        coming = self._streaming.stream.remote(asked)
        over = False
        try:
            while True:
                try:
                    said = await _meant(anext(coming))
                except StopAsyncIteration:
                    over = True
                    return
                yield said
        finally:
            if not over:
                coming.cancel()

    async def _one(self, response: Any) -> Said:
        try:
            return await _meant(response)
        except asyncio.CancelledError:
            response.cancel()  # the replica ends generating within a token
            raise


async def _meant(awaited: Awaitable[Any]) -> Said:
    """What is awaited.

    Raises:
        ReplicaLost: if its replica is gone, or cannot be reached.
        BusyError: if it takes no more.
    """
    try:
        found = await awaited
    except BackPressureError:
        raise BusyError("the replicas take no more requests") from None
    except RayTaskError as error:  # a replica returns its errors: what it raises is a defect
        raise RuntimeError(f"a replica raised {type(error.cause or error).__name__}") from None
    except (RayError, RayServeException) as error:  # its words name processes and addresses
        raise ReplicaLost(f"a replica was lost: {type(error).__name__}") from None
    assert isinstance(found, Said)
    return found
