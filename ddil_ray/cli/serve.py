"""`ddil-ray serve`."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from ddil_ray.cli.options import Verbose, print_lines
from ddil_ray.errors import ConfigError, RunStoppedError

__all__ = ["serve"]

_POLL_S = 1.0


def serve(
    student: Annotated[str, typer.Argument(help="Run folder (its student is taken) or pipeline folder; a URL of one.")],
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of every image.")] = 4,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="w (guidance_scale - 1), of students that are told it.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; nobody is asked who they are.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the student.")] = 1,
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs of each.")] = 1.0,
    num_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each, or a share of one; default: even shares of what there is."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images that are drawn at once.")] = 8,
    wait_ms: Annotated[float, typer.Option(min=0, help="That a batch waits to be filled.")] = 10.0,
    max_ongoing: Annotated[
        int | None, typer.Option(min=1, help="Requests within a replica; default: two batches.")
    ] = None,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that wait for a replica; more are told 503.")] = 64,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For an answer, then it is 408.")] = 60.0,
    verbose: Verbose = False,
) -> None:
    """Answer requests for images over HTTP, by Ray Serve, until a signal comes.

    Examples:

    `ddil-ray serve runs/digits-pd --steps 1`

    `ddil-ray serve s3://bucket/exports/sd15-lcm --replicas 4 --num-gpus 0.5 --max-batch 4 --port 9000`
    """
    if max_ongoing is not None and max_ongoing < max_batch:
        raise ConfigError(
            f"`--max-ongoing` must be at least `--max-batch` ({max_batch}), or no batch is ever full, but is "
            f"{max_ongoing} instead."
        )
    _check_installed()

    from ddil_ray.config import Role
    from ddil_ray.runtime.serving import Served, serving
    from ddil_ray.runtime.signals import Signals

    if num_gpus is not None and num_gpus > 1 and num_gpus % 1:
        raise ConfigError(f"`--num-gpus` must be whole above 1, but is {num_gpus:g} instead.")
    here = Path(student)
    served = Served(
        student=str(here.resolve()) if "://" not in student and here.exists() else student,
        steps=steps,
        guidance=guidance,
        host=host,
        port=port,
        replicas=Role(num_actors=replicas, num_cpus=num_cpus, num_gpus="auto" if num_gpus is None else num_gpus),
        max_batch=max_batch,
        wait_s=wait_ms / 1000,
        max_ongoing=max_ongoing or 2 * max_batch,
        max_queued=max_queued,
        timeout_s=timeout_s,
    )
    with serving(served, verbose=verbose) as application, Signals() as signals:
        print_lines(
            f"student  {student}",
            f"images   {application.url}",
            f"health   {application.url}-/healthz",
        )
        while signals.received is None:
            application.check()
            time.sleep(_POLL_S)
    raise RunStoppedError(f"Stopped by {signal.Signals(signals.received).name}.", signal=signals.received)


def _check_installed() -> None:
    try:
        import ray.serve  # noqa: F401 - it tells what it lacks
    except ImportError as error:
        raise ConfigError(
            f"`ddil-ray serve` must have Ray Serve, but {error.name or error} is not installed. Install it with "
            '`pip install "ddil-ray[serve]"`, on all nodes of a cluster.'
        ) from error
