"""An exported student behind HTTP, by Ray Serve: dynamic batches, time-outs, health, and no more at once than may be.

What waits where, from a client inwards:

| place | how many | what is more |
|---|---|---|
| the proxy's queue | `max_queued` | is answered 503 with Retry-After, at once |
| a replica | `max_ongoing` | waits in the proxy's queue |
| a batch | `max_batch` | waits in the replica for the next one |

A request that is not answered within `timeout_s` is answered 408, and left out of the batch if it still waits for one.
A replica is replaced when its device no longer computes, or a batch hangs.

A cluster serves one student. Whoever serves holds an actor by name, which Ray gives to one alone and ends with its
process: a second one is refused before it touches anything, and what a killed one left is the next one's to replace.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ddil_ray.config import Role
from ddil_ray.errors import ConfigError, RunFailedError, first_line, last_line
from ddil_ray.runtime.cluster import ray_session
from ddil_ray.runtime.fits import role_alone
from ddil_ray.serving import MOST_BYTES, Ask, Studio

__all__ = ["Application", "Served", "StudentServer", "serving"]

NAME = "ddil-ray"
"""Of the application, and of what its owner holds; a cluster has one."""
_HANGS = 4
"""Time-outs that a batch takes before it is held for hanging."""
_LEAST_HANG_S = 60.0
_BODY_S = 10.0
"""For a request to come, which holds a place in the replica meanwhile."""
_RETRY_AFTER_S = 1
_DRAIN_S = 20.0
_PATIENCE_S = 600.0
"""Without any replica: a node may take as long to be replaced."""


@dataclass(frozen=True)
class Served:
    """What is served, and how."""

    student: str
    """Run folder or pipeline folder, by path or URL."""
    steps: int
    guidance: float | None
    host: str
    """That the proxy listens on."""
    port: int
    replicas: Role
    max_batch: int
    wait_s: float
    """That a batch waits to be filled."""
    max_ongoing: int
    max_queued: int
    timeout_s: float


@serve.deployment
class StudentServer:
    """A replica: one copy of the student.

    Args:
        served: what and how.
        cpus: that this process may compute with.
    """

    def __init__(self, served: Served, cpus: float) -> None:
        import torch

        from ddil_ray.runtime.stages import best_device

        torch.set_num_threads(max(1, int(cpus)))
        self._studio = Studio(served.student, steps=served.steps, guidance=served.guidance, device=best_device())
        self._hang_s, self._began = max(_LEAST_HANG_S, _HANGS * served.timeout_s), 0.0
        batches: Any = self._draw
        batches.set_max_batch_size(served.max_batch)
        batches.set_batch_wait_timeout_s(served.wait_s)

    async def __call__(self, request: Request) -> Response:
        """Answer: GET says what is served, POST draws an image."""
        if request.url.path != "/":
            return _refusal(404, f"The path must be /, but is {request.url.path}.")
        if request.method == "GET":
            return JSONResponse(self._studio.about)
        if request.method != "POST":
            return _refusal(405, f"The method must be GET or POST, but is {request.method}.", Allow="GET, POST")
        try:
            ask = self._studio.read(await asyncio.wait_for(_body(request), _BODY_S))
        except asyncio.TimeoutError:
            return _refusal(408, f"A request must have come within {_BODY_S:g} s, but has not.")
        except _TooLongError as error:
            return _refusal(413, str(error))
        except ConfigError as error:
            return _refusal(422, str(error))
        try:
            image, together = await self._draw(ask)
        except Exception as error:  # whatever the device or the model does
            logging.getLogger("ray.serve").exception("A batch failed.")
            return _refusal(500, f"The image could not be drawn: {first_line(error)}")
        return _answer(ask, image, together, request.headers.get("accept", ""))

    @serve.batch  # type: ignore[untyped-decorator]
    async def _draw(self, asks: list[Ask]) -> list[tuple[bytes, int]]:
        """Images, and how many were drawn at once; in a thread, so that this process goes on to listen."""
        self._began = time.monotonic()
        try:
            images = await asyncio.to_thread(self._studio.draw, asks)
        finally:
            self._began = 0.0
        return [(image, len(asks)) for image in images]

    def check_health(self) -> None:
        """Raise where this replica should be replaced."""
        if self._began == 0.0:
            self._studio.check()
        elif time.monotonic() - self._began > self._hang_s:
            raise RuntimeError(f"A batch has not been drawn within {self._hang_s:g} s.")


class _TooLongError(Exception):
    """A body of more than `MOST_BYTES`."""


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise _TooLongError(f"A request must be at most {MOST_BYTES // 1024} KiB, but is more.")
    return body


def _answer(ask: Ask, image: bytes, together: int, accepted: str) -> Response:
    """The image as a file, or within JSON where that is what the client accepts."""
    if "application/json" not in accepted:
        return Response(image, media_type="image/png", headers={"X-Seed": str(ask.seed), "X-Batch-Size": str(together)})
    asked = ask.model_dump(exclude_none=True)
    return JSONResponse({**asked, "batch_size": together, "image": base64.b64encode(image).decode()})


def _refusal(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


@contextlib.contextmanager
def serving(served: Served, *, verbose: bool = False) -> Iterator[Application]:
    """Serve within this.

    Raises:
        ConfigError: it cannot be served so, before anything starts but for what the cluster has; or another serves.
        RunFailedError: the replicas do not start.
    """
    Studio(served.student, steps=served.steps, guidance=served.guidance)  # which tells what is wrong
    if "RAY_ADDRESS" not in os.environ:
        _check_port(served.host, served.port)
    with ray_session(cpus=math.ceil(served.replicas.bounds[0] * served.replicas.num_cpus) + 1, verbose=verbose):
        role = role_alone("replicas", served.replicas)
        if not verbose:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        with _alone():
            try:
                url = _listen(served)
                _deploy(served, role)
                yield Application(url)
            finally:
                _withdraw()


class Application:
    """The student that this process serves at `url`, from when its replicas have started."""

    def __init__(self, url: str) -> None:
        self.url, self._ran = url, time.monotonic()

    def check(self) -> None:
        """See that clients are answered, or may be soon.

        Raises:
            RunFailedError: they are not any more.
        """
        found = _applications().get(NAME)
        if found is None or found.status == ApplicationStatus.DELETING:
            raise RunFailedError(
                f"The student must be served until a signal comes, but the application {NAME} was deleted from Ray "
                "Serve by others. Start it again."
            )
        if any(deployment.replica_states.get("RUNNING") for deployment in found.deployments.values()):
            self._ran = time.monotonic()
        elif time.monotonic() - self._ran > _PATIENCE_S:
            raise RunFailedError(
                f"The student must answer, but none of its replicas has run for {_PATIENCE_S:g} s: Ray Serve calls it "
                f"{found.status.value}. See that the cluster has room for one, then start it again."
            )


class _Holder:
    """Lives as long as the process that serves."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Be the only one that serves a student on this cluster.

    Raises:
        ConfigError: another does.
    """
    named: Any = ray.remote(_Holder).options(name=NAME, namespace=NAME, num_cpus=0, max_restarts=-1)
    try:
        holder = named.remote()
        ray.get(holder.__ray_ready__.remote())  # where two start at once, one's actor is dead
    except (ValueError, ActorDiedError) as error:
        raise ConfigError(
            "A cluster must serve one student, but another `ddil-ray serve` answers there already, and goes on. Stop "
            "that one first, or serve on another cluster."
        ) from error
    try:
        yield
    finally:
        ray.kill(holder)


def _applications() -> dict[str, ApplicationStatusOverview]:
    """Of everybody, by name."""
    try:
        return dict(serve.status().applications)
    except ActorDiedError:  # somebody has shut down Serve itself
        return {}


def _listen(served: Served) -> str:
    """Have the head listen; the URL there. Where Ray Serve has applications of others, it listens where it did before.

    Raises:
        RunFailedError: it cannot.
    """
    if not _applications().keys() - {NAME}:
        serve.shutdown()  # what a killed one left, which would go on to listen in its place
    options = {"host": served.host, "port": served.port, "request_timeout_s": served.timeout_s}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options)
        at = _get_global_client().http_config
    except (RuntimeError, RayError, TimeoutError) as error:
        raise RunFailedError(
            f"The head must listen at `--port` {served.port} of `--host` {served.host}, but does not: "
            f"{last_line(error).rstrip('.')}. Choose another port."
        ) from error
    return f"http://{at.host}:{at.port}/"


def _withdraw() -> None:
    if NAME in _applications():
        with contextlib.suppress(ActorDiedError):  # as above, meanwhile
            serve.delete(NAME)
    if not _applications():  # of others
        serve.shutdown()


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"`--port` must be free on `--host`, but {port} on {host} is not: {first_line(error)}. Choose another."
        ) from error


def _deploy(served: Served, role: Role) -> None:
    """Start the replicas, and wait until they answer."""
    actor = {
        "num_cpus": role.num_cpus,
        "num_gpus": float(role.num_gpus),
        "resources": role.resources,
        **({"accelerator_type": role.accelerator_type} if role.accelerator_type else {}),
        **({"label_selector": role.label_selector} if role.label_selector else {}),
    }
    deployment: Any = StudentServer
    configured = deployment.options(
        num_replicas=role.bounds[0],
        ray_actor_options=actor,
        max_ongoing_requests=served.max_ongoing,
        max_queued_requests=served.max_queued,
        backpressure_config={"retry_after_s": _RETRY_AFTER_S},
        health_check_timeout_s=max(_LEAST_HANG_S, served.timeout_s),
        graceful_shutdown_timeout_s=_DRAIN_S,
        max_constructor_retry_count=1,
    )
    try:
        serve.run(configured.bind(served, role.num_cpus), name=NAME, route_prefix="/")
    except (RuntimeError, RayServeException) as error:  # the latter where another application has its path
        raise RunFailedError(f"The student must start, but does not: {first_line(error)}") from error
