"""`ddil_ray.prepare` on Ray: shards are looked through by tasks, prompts and images encoded by pools of actors."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ddil_ray.config import Role
from ddil_ray.errors import RunFailedError, first_line
from ddil_ray.prepare import Execute, Job, Summary, begin, fill, stages, summary
from ddil_ray.runtime.cluster import ray_session
from ddil_ray.runtime.fits import role_alone
from ddil_ray.runtime.lock import RunLock
from ddil_ray.storage import of_storage
from ddil_ray.tracking import View

__all__ = ["PrepareStage", "prepare"]

_GROUPS = {"PromptStage": "encode_prompts", "ImageStage": "encode_images"}
"""Config groups of stages; that of the others, which have no actors, is `data`."""


class PrepareStage:
    """A stage of `ddil_ray.prepare.stages` on this process's device.

    Args:
        stage: name of its class.
        job: the pickled `Job`, so that processes of Ray's own need not load what it is made of.
        cpus: that this process may compute with.
    """

    def __init__(self, stage: str, job: bytes, cpus: float) -> None:
        from ddil_ray.runtime.stages import best_device

        torch.set_num_threads(max(1, int(cpus)))
        self._stage = getattr(stages, stage)(pickle.loads(job), best_device())

    def __call__(self, request: Any) -> Any:
        """The stage's result."""
        return self._stage(request)


def prepare(job: Job, *, view: View, verbose: bool = False) -> Summary:
    """Prepare the data of `job`, or what is missing of it.

    Raises:
        ConfigError: the output is another preparation's, or another process works in it; or the actors do not fit the
            cluster.
        DataError: nothing could be prepared.
        RunFailedError: storage or a process failed; the next call goes on.
    """
    if begin(job):
        return _complete(job, view)
    place = SimpleNamespace(fs=job.store.fs, root=job.store.root, url=job.store.url, others=False)
    lock = RunLock(place, view.say, field="output")
    lock.wait(lock.stale_s)  # as of a killed process, whose place is taken at once
    with lock:
        return _complete(job, view) if begin(job) else _prepare(job, view, verbose=verbose)


def _complete(job: Job, view: View) -> Summary:
    view.say(f"{job.store.url} is complete.")
    return summary(job)


def _prepare(job: Job, view: View, *, verbose: bool) -> Summary:
    roles = (job.config.encode_prompts, job.config.encode_images)
    cpus = max(role.bounds[0] * role.num_cpus for role in roles)
    with ray_session(cpus=math.ceil(cpus) + 1, verbose=verbose):
        try:
            return fill(job, _execution(job, _roles(job)), view)
        except RunFailedError as error:
            raise RunFailedError(
                f"Preparing failed: {error}. What is done is kept: the same command does the rest."
            ) from error
        except Exception as error:
            if not of_storage(error):
                raise
            raise RunFailedError(
                f"`output` must be reachable, but {job.store.url} failed: {first_line(error)}. What is done is kept: "
                "the same command does the rest."
            ) from error


def _roles(job: Job) -> dict[str, Role]:
    """The actors of each stage that has some; stages follow each other, so each has the cluster to itself."""
    needed = {"PromptStage": job.prompted, "ImageStage": job.reader.images}
    return {stage: role_alone(group, getattr(job.config, group)) for stage, group in _GROUPS.items() if needed[stage]}


def _execution(job: Job, roles: dict[str, Role]) -> Execute:
    pickled = pickle.dumps(job)

    def execute(stage: str, requests: Sequence[Any]) -> Iterator[Any]:
        from ddil_ray.runtime.requests import answers

        role = roles.get(stage)
        arguments = [stage, pickled, role.num_cpus if role else 1]
        name = _GROUPS.get(stage, "data")
        for _, made in answers(name, "ddil_ray.runtime.prepare:PrepareStage", arguments, requests, role):
            yield made

    return execute
