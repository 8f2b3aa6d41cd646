"""An ablation on Ray: as many workers as fit, each trains and measures whole runs of the grid one after another.

A worker lives as long as the ablation, so what runs share (imports, teacher, data, references) is loaded once per
worker. A worker that is asked for but does not fit just waits; one that dies is started again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddil_ray.ablation.grid import GridRun, check_runs, grid_runs
from ddil_ray.ablation.outcome import Failure, Outcome, read_outcome, write_outcome
from ddil_ray.ablation.report import write_report
from ddil_ray.ablation.summary import Study
from ddil_ray.config import AblationConfig, to_yaml
from ddil_ray.config.ablation import RunResources
from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.factory import allow_code, code_allowed
from ddil_ray.folder import environment, write_json
from ddil_ray.redact import redacted
from ddil_ray.runtime.cluster import ray_session
from ddil_ray.tracking import View

__all__ = ["ablate", "run_grid", "workers_that_fit"]

_ATTEMPTS = 2


def ablate(spec: AblationConfig, out: Path, *, view: View, verbose: bool = False) -> dict[str, Any]:
    """Do what is not done yet of the grid of `spec`, and write the report to the folder `out`; report.json's content.

    Raises:
        ConfigError, DataError: before anything starts.
        RunFailedError: no run gave anything.
    """
    runs = grid_runs(spec)
    check_runs(runs)
    found = {run.label: read_outcome(out, run) for run in runs}
    left = [run for run in runs if found[run.label] is None]
    view.say(f"{len(runs)} runs, {len(runs) - len(left)} of them done before.")
    (out / "ablation.yaml").write_text(to_yaml(spec))
    write_json(out / "environment.json", environment(spec.seeds[0]))
    failures: list[Failure] = []
    progress = _Progress(view, len(left))

    def finished(run: GridRun, outcome: Outcome) -> None:
        found[run.label] = write_outcome(out, run, outcome)
        progress.say(run, f"trained in {sum(outcome.seconds.values()):.0f} s")

    def failed(run: GridRun, problem: str) -> None:
        failures.append(Failure(run.group, run.arm, run.seed, problem))
        progress.say(run, f"failed: {problem}")

    if left:
        with ray_session(cpus=math.ceil(spec.resources.num_cpus), verbose=verbose):
            run_grid(left, spec.resources, finished=finished, failed=failed)
    outcomes = [outcome for outcome in found.values() if outcome is not None]
    if not outcomes:
        raise RunFailedError(f"Every run failed; the first with {failures[0].error}")
    arms = list(spec.axes[spec.compare])
    settings = redacted(spec.model_dump(mode="json"))
    return write_report(out, Study(spec.name, arms, outcomes, failures, settings=settings))


class _Progress:
    """Tells of runs as they end, and how long the rest will take."""

    def __init__(self, view: View, total: int) -> None:
        self._view, self._total, self._done, self._started = view, total, 0, time.monotonic()

    def say(self, run: GridRun, text: str) -> None:
        """`run` has ended."""
        self._done += 1
        minutes = (time.monotonic() - self._started) / self._done * (self._total - self._done) / 60
        self._view.say(f"{self._done}/{self._total}  {run.label}: {text}; about {math.ceil(minutes)} min left")


class _Worker:
    """A process that runs one run at a time."""

    def __init__(self, resources: RunResources, code_allowed: bool) -> None:
        from ddil_ray.ablation.measure import Workbench

        if code_allowed:
            allow_code()
        self._workbench = Workbench("cuda" if resources.num_gpus > 0 else "cpu")

    def ready(self) -> None:
        """Return once this process is up."""

    def run(self, run: GridRun) -> Outcome:
        """Train and measure `run`."""
        return self._workbench.run(run)


def workers_that_fit(resources: RunResources, cluster: dict[str, float]) -> int:
    """How many runs can go at once.

    Raises:
        ConfigError: none.
    """
    needed = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    fit = min(int(cluster.get(kind, 0.0) / amount + 1e-9) for kind, amount in needed.items() if amount > 0)
    if fit < 1:
        raise ConfigError(
            f"`resources` must fit the cluster, but a run needs {resources.num_cpus:g} CPUs and "
            f"{resources.num_gpus:g} GPUs, and it has {cluster.get('CPU', 0):g} and {cluster.get('GPU', 0):g} instead."
        )
    return fit


def run_grid(
    runs: Sequence[GridRun],
    resources: RunResources,
    *,
    finished: Callable[[GridRun, Outcome], None],
    failed: Callable[[GridRun, str], None],
) -> None:
    """Run all of `runs` on the connected Ray; a run that fails is tried once more, the others go on.

    Args:
        runs: in the order they are begun in.
        resources: of one run.
        finished: called in this process as soon as a run is done.
        failed: called with what went wrong when a run has failed for the last time.

    Raises:
        ConfigError: not even one run fits the cluster.
    """
    import ray

    count = min(len(runs), workers_that_fit(resources, ray.cluster_resources()))
    kind = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=-1)(_Worker)
    workers = [kind.remote(resources, code_allowed()) for _ in range(count)]
    queue = deque((run, 1) for run in runs)
    waiting: dict[Any, Any] = {worker.ready.remote(): worker for worker in workers}
    working: dict[Any, tuple[Any, GridRun, int]] = {}
    try:
        while queue or working:
            (done,), _ = ray.wait([*working, *waiting], num_returns=1)
            if done in waiting:
                worker = waiting.pop(done)
            else:
                worker, run, attempt = working.pop(done)
                problem = _take(done, run, finished)
                if problem and attempt < _ATTEMPTS:
                    queue.append((run, attempt + 1))
                elif problem:
                    failed(run, problem)
            if queue:
                run, attempt = queue.popleft()
                working[worker.run.remote(run)] = (worker, run, attempt)
    finally:
        for worker in workers:
            ray.kill(worker)


def _take(done: Any, run: GridRun, finished: Callable[[GridRun, Outcome], None]) -> str:
    """Hand the outcome on; what went wrong where there is none."""
    import ray

    try:
        outcome = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return f"{type(cause).__name__}: {cause}"
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: its process died"
    finished(run, outcome)
    return ""
