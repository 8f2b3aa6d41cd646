"""An ablation on Ray: as many workers as fit, each trains and measures whole runs of the grid one after another.

A worker lives as long as the ablation, so what runs share (imports, teacher, data, references) is loaded once per
worker. A worker that is asked for but does not fit just waits; one that dies is started again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddil_ray.ablation.grid import GridRun, check_runs, grid_runs
from ddil_ray.ablation.outcome import Failure, Outcome, read_outcome, write_outcome
from ddil_ray.ablation.report import write_report
from ddil_ray.ablation.summary import Study
from ddil_ray.config import AblationConfig, to_yaml
from ddil_ray.config.ablation import RunResources
from ddil_ray.errors import ConfigError, DdilError, RunFailedError, last_line
from ddil_ray.factory import allow_code, code_allowed
from ddil_ray.folder import environment, write_json
from ddil_ray.redact import redacted
from ddil_ray.runtime.cluster import ray_session
from ddil_ray.runtime.fits import room
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


def workers_that_fit(resources: RunResources, nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many runs can go at once on `nodes`, as `ray.nodes()` gives them.

    Raises:
        ConfigError: none.
    """
    fit = room(nodes, {"CPU": resources.num_cpus, "GPU": resources.num_gpus})
    if fit < 1:
        has = [node["Resources"] for node in nodes if node["Alive"]]
        each = sorted({f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in has})
        raise ConfigError(
            f"`resources` must fit a node of the cluster, but a run needs {resources.num_cpus:g} CPUs and "
            f"{resources.num_gpus:g} GPUs, and the nodes have {', '.join(each)} instead. Lower them, or add "
            "a node."
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

    count = min(len(runs), workers_that_fit(resources, ray.nodes()))
    kind = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=-1)(_Worker)
    crew = _Crew(runs, count, lambda: kind.remote(resources, code_allowed()))
    try:
        while crew.busy:
            crew.turn(finished, failed)
    finally:
        crew.kill()


class _Crew:
    """Who is at what.

    Args:
        runs: what is to be done.
        count: of processes.
        start: a process.
    """

    def __init__(self, runs: Sequence[GridRun], count: int, start: Callable[[], Any]) -> None:
        self._start = start
        self._queue = deque((run, 1) for run in runs)
        self._starting: dict[Any, Any] = {}
        """Workers, by what they return once they are up."""
        self._working: dict[Any, tuple[Any, GridRun, int]] = {}
        """Worker, run and which attempt it is, by what the worker returns."""
        for _ in range(count):
            self._add()

    @property
    def busy(self) -> bool:
        """Whether runs are left."""
        return bool(self._queue or self._working)

    def turn(self, finished: Callable[[GridRun, Outcome], None], failed: Callable[[GridRun, str], None]) -> None:
        """Wait until a worker is up or done, and give it the next run.

        For one in which a run failed of anything but the run another is started: what broke may be its hold on a
        device, and it would fail all that are left faster than others do them. One that does not start is done without.

        Raises:
            RunFailedError: none of them starts.
        """
        import ray

        (done,), _ = ray.wait([*self._working, *self._starting], num_returns=1)
        if done in self._starting:
            worker, problem = self._starting.pop(done), _problem(done)
            broken = bool(problem)
            if broken and not (self._working or self._starting):
                raise RunFailedError(f"The processes of runs must start, but none does: {problem}")
        else:
            worker, run, attempt = self._working.pop(done)
            problem, broken = _take(done, run, finished)
            if problem:
                self._again(run, attempt, problem, failed)
            if broken:
                ray.kill(worker)
                self._add()
        if not broken and self._queue:
            run, attempt = self._queue.popleft()
            self._working[worker.run.remote(run.anchored())] = (worker, run, attempt)

    def kill(self) -> None:
        """End all that were not ended."""
        import ray

        for worker in (*self._starting.values(), *(worker for worker, _, _ in self._working.values())):
            ray.kill(worker)

    def _add(self) -> None:
        worker = self._start()
        self._starting[worker.ready.remote()] = worker

    def _again(self, run: GridRun, attempt: int, problem: str, failed: Callable[[GridRun, str], None]) -> None:
        if attempt < _ATTEMPTS:
            self._queue.append((run, attempt + 1))
        else:
            failed(run, problem)


def _problem(ready: Any) -> str:
    """Why a process is not up; nothing where it is."""
    import ray

    try:
        ray.get(ready)
    except ray.exceptions.RayError as error:
        return last_line(error)
    return ""


def _take(done: Any, run: GridRun, finished: Callable[[GridRun, Outcome], None]) -> tuple[str, bool]:
    """Hand the outcome on; what went wrong where there is none, and whether it may be the process that is broken."""
    import ray

    try:
        outcome = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return f"{type(cause).__name__}: {cause}", not isinstance(cause, DdilError)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: its process died", True
    finished(run, outcome)
    return "", False
