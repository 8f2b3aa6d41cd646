"""The driver of a distillation: checks everything, starts the parts on Ray, watches, and writes the results.

What a user can get wrong is found before any actor starts: all but the cluster's size before Ray does. Training runs
in a thread, so that this process can drain records and heed signals meanwhile.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from ddil_ray.config import RunConfig, config_hash, flatten, to_yaml
from ddil_ray.config.places import anchored
from ddil_ray.errors import ConfigError, RunFailedError, RunStoppedError
from ddil_ray.evaluation import check_instruments
from ddil_ray.factory import code_allowed
from ddil_ray.folder import RunFolder, environment, write_json, write_whole
from ddil_ray.models import DiffusionModel
from ddil_ray.runtime.cluster import connected
from ddil_ray.runtime.demands import pool_bounds
from ddil_ray.runtime.fits import check_fits, total, with_gpu_shares
from ddil_ray.runtime.lock import RunLock
from ddil_ray.runtime.logs import name_logs
from ddil_ray.runtime.metrics import RunMetrics
from ddil_ray.runtime.object_store import store_bytes
from ddil_ray.runtime.resume import resumed_config
from ddil_ray.runtime.retention import Retention
from ddil_ray.runtime.scaling import Scaling
from ddil_ray.runtime.signals import Signals, ended_by_signals
from ddil_ray.runtime.storage import CheckpointStore, Saved
from ddil_ray.runtime.watch import Watch
from ddil_ray.tracking import TRACKERS, BackgroundTracker, RunInfo, View, read_journal
from ddil_ray.training.checkpoint import LEARNER, read_rounds
from ddil_ray.training.kept import kept_folder
from ddil_ray.training.learner import round_models
from ddil_ray.training.recipe import Ingredients, Recipe

if TYPE_CHECKING:
    from ddil_ray.evaluation import Benchmark
    from ddil_ray.results import Scores
    from ddil_ray.runtime.context import RunContext

__all__ = ["RunResult", "distill", "resumed_config"]


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    folder: str
    """The run folder, a path or URL."""
    rounds: dict[int, DiffusionModel]
    """The student of every phase, by its number of steps."""
    scores: Scores
    """By model and steps; empty where evaluation is off."""
    look: str
    """How to see the tracked run."""


def distill(
    config: RunConfig,
    *,
    resume: bool = False,
    verbose: bool = False,
    view: View | None = None,
    benchmark: Benchmark | None = None,
) -> RunResult:
    """Distil as `config` says and leave a run folder.

    Args:
        config: the run.
        resume: go on in the run folder that is there; False refuses a folder that a run has begun in.
        verbose: let Ray speak.
        view: where progress is shown.
        benchmark: measure against this one in place of the config's.

    Raises:
        ConfigError, DataError: before anything starts.
        RunFailedError: training failed; what was saved is there, and `--resume` goes on.
        RunStoppedError: a signal came, SIGINT too; in training a last checkpoint is there, unless a second one came.
    """
    view, made = view or View(), Recipe(config).ingredients()
    if config.evaluation.enabled and benchmark is None:
        check_instruments(config.evaluation, made.data, made.teacher)
    folder = RunFolder(config.output, config.name)
    folder.check_links()
    try:
        with RunLock(folder, view.say), ended_by_signals():
            return _distill(config, made, folder, view, benchmark, resume=resume, verbose=verbose)
    except (SystemExit, KeyboardInterrupt) as end:
        received = signal.SIGTERM if isinstance(end, SystemExit) else signal.SIGINT
        begun = folder.remote or (folder.local / "config.yaml").exists()
        left = f"what was saved is there. {_go_on(folder)}" if begun else "nothing had begun."
        raise RunStoppedError(f"Stopped at once by {received.name}; {left}", signal=received) from None


def _distill(
    config: RunConfig,
    made: Ingredients,
    folder: RunFolder,
    view: View,
    benchmark: Benchmark | None,
    *,
    resume: bool,
    verbose: bool,
) -> RunResult:
    """`distill` of a config that has been checked, in a folder that is this run's alone."""
    if not resume and (folder.has("checkpoints") or folder.has("metrics.json")):
        raise ConfigError(
            f"`name` must be new, but {folder.url} holds a run already. Choose another `name`, or go on with "
            f"`ddil-ray distill --resume {folder.url}`."
        )
    if resume:
        folder.fetch("metrics.jsonl", "tracking.json")
    else:  # of a run that failed before its first checkpoint
        for name in ("metrics.jsonl", "tracking.json"):
            (folder.local / name).unlink(missing_ok=True)
    surroundings = environment(config.seed)
    tracker = _tracker(config, made, folder, commit=str(surroundings["git_commit"]))
    store, status = partial(_store_bytes, config, made, view), "failed"
    try:
        with view, connected(config, verbose=verbose, store=store):
            name_logs(config.name, "driver")
            fitted = _fitted(config)
            # Not of a run that is refused: the folder may be one that another config goes on in.
            write_whole(LocalFileSystem(), str(folder.local / "config.yaml"), to_yaml(config).encode())
            write_json(folder.local / "environment.json", surroundings)
            folder.sync_soon(view.say)
            tracker.start()
            rounds = _train(fitted, made, folder, view)
            view.say("Trained; measuring and writing the results.")
            with folder.filling(f"write them with `ddil-ray distill --resume {folder.url}`"):
                result = _results(fitted, made, rounds, folder, benchmark, tracker.tracker.look())
        status = "finished"
    except (RunStoppedError, SystemExit, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        missing = _close(tracker, folder, status, view)
    if missing:
        raise RunFailedError(missing)
    return result


def _close(tracker: BackgroundTracker, folder: RunFolder, status: str, view: View) -> str | None:
    """Send and copy what is left; what is missing in a finished run's folder after that."""
    files = [folder.local / name for name in ("student", "samples", "report.html", "metrics.json")]
    folder.sync_soon(view.say)  # while the tracker gets its own
    unsent = tracker.finish(status, [f for f in files if f.exists()])
    missing = folder.finish()
    if unsent:
        view.say(unsent)
    if missing and status != "finished":  # beside the reason why it has not finished
        view.say(missing)
    return missing


def _tracker(config: RunConfig, made: Ingredients, folder: RunFolder, *, commit: str) -> BackgroundTracker:
    t = config.tracking
    if t.uri is None and folder.remote:
        uri = f"sqlite:///{Path('mlflow.db').resolve()}"
    else:
        uri = t.uri or f"sqlite:///{folder.local.parent / 'mlflow.db'}"
    phases = made.objective.phases
    tracker = TRACKERS[t.tracker](uri=uri, experiment=t.experiment, timeout_s=t.timeout_s)
    tracker.check(reach=t.required)
    return BackgroundTracker(
        tracker,
        RunInfo(
            config.name,
            params=flatten(config),
            tags={"git_commit": commit, "config_hash": config_hash(config)},
            rounds=[f"round {p.student_steps} steps" for p in phases] if len(phases) > 1 else [],
        ),
        journal=folder.local / "metrics.jsonl",
        state=folder.local / "tracking.json",
        timeout_s=t.timeout_s,
        kept=folder.url,
        lost=lambda: folder.others,
    )


def _store_bytes(config: RunConfig, made: Ingredients, view: View) -> int:
    """Of the object store of a Ray that is started for this run."""
    from ddil_ray.training.memory import shared_bytes

    return store_bytes(shared_bytes(Recipe(config), made), view.say)


def _fitted(config: RunConfig) -> Recipe:
    """The run with its share of the connected cluster's GPUs, which it fits."""
    import ray

    nodes = ray.nodes()
    shared = with_gpu_shares(config, gpus=total(nodes).get("GPU", 0.0))
    check_fits(shared, nodes)
    return Recipe(shared)


def _train(recipe: Recipe, made: Ingredients, folder: RunFolder, view: View) -> dict[int, DiffusionModel]:
    """Train to the end on the connected Ray, unless that was done before; the students of all phases."""
    store, received, total = CheckpointStore(f"{folder.url}/checkpoints"), None, _steps(recipe, made)
    newest, go_on = _newest(store, folder, view), _go_on(folder)
    if newest is None and folder.has("metrics.json"):
        raise ConfigError(
            f"`--resume` must name a run that has its checkpoints, but {folder.url} is finished and has none: training "
            "would begin anew, over its students. Start a run of another `name`."
        )
    if newest is None or newest.step < total:
        received = _run_parts(recipe, made, store, folder, view, step=newest.step if newest else 0)
        newest = _newest(store, folder, view)
    if received is not None:
        raise _stopped(received, newest, total, go_on)
    if newest is None:
        raise RunFailedError("The run must leave a checkpoint, but left none.")
    if newest.step < total:
        raise RunFailedError(f"Training has ended, but the newest whole checkpoint is of step {newest.step}. {go_on}")
    with folder.reaching(go_on), store.fetched(newest, LEARNER) as learner:
        rounds = read_rounds(learner)
    return round_models(recipe.student_of(made.teacher), rounds)


def _stopped(received: int, newest: Saved | None, total: int, go_on: str) -> RunStoppedError:
    name = signal.Signals(received).name
    if newest is None:
        return RunStoppedError(f"Stopped by {name} before the first checkpoint. {go_on}", signal=received)
    return RunStoppedError(
        f"Stopped by {name} after step {newest.step} of {total}; everything is saved. {go_on}", signal=received
    )


def _steps(recipe: Recipe, made: Ingredients) -> int:
    return recipe.config.trainer.steps * len(made.objective.phases)


def _go_on(folder: RunFolder) -> str:
    return f"Go on with `ddil-ray distill --resume {folder.url}`."


def _newest(store: CheckpointStore, folder: RunFolder, view: View) -> Saved | None:
    with folder.reaching(_go_on(folder)):
        return store.newest(view.say)


def _run_parts(
    recipe: Recipe, made: Ingredients, store: CheckpointStore, folder: RunFolder, view: View, *, step: int
) -> int | None:
    """Start the parts on Ray and watch them train from `step` to the end; the signal that ended it, if one did."""
    import ray

    from ddil_ray.runtime.hub import Hub
    from ddil_ray.runtime.monitor import MonitorHandle
    from ddil_ray.runtime.trainer import train
    from ddil_ray.runtime.verdict import explain

    config = recipe.config
    with folder.reaching(_go_on(folder)):
        attempt = max(store.attempts(), default=0) + 1
    measure_every = config.shift.every if config.shift.enabled else None
    hub = Hub.remote(measure_every, pool_bounds(config), config.faults.max_deaths)  # type: ignore[attr-defined]
    try:
        context = _context(recipe, made, hub, folder)
    except ray.exceptions.RayError as error:  # the object store has no room
        raise RunFailedError(explain(error)) from error
    known = {
        "step": step,
        "total_steps": _steps(recipe, made),
        "checkpoint/step": step,
        "staleness/bound": made.max_staleness,
        "checkpoint.every": config.checkpoint.every,
    }
    with Signals() as signals:
        monitor = MonitorHandle(context, config.shift, view.say) if config.shift.enabled else None
        scaling = Scaling(folder, config, hub, view.say)
        prune = Retention(store, config.checkpoint, folder.local / "metrics.jsonl", view.say)
        watch = Watch(hub, view, signals, folder, RunMetrics(config.name, known), monitor, scaling, prune.soon)
        try:
            train(recipe, made, store, attempt, context, watch)
            if monitor is not None and signals.received is None:
                monitor.finish(watch)
                watch()
            prune()
        finally:
            if monitor is not None:
                monitor.kill()
            ray.kill(hub)
        return signals.received


def _context(recipe: Recipe, made: Ingredients, hub: Any, folder: RunFolder) -> RunContext:
    """What every actor of the run gets."""
    import ray

    from ddil_ray.runtime.context import RunContext

    return RunContext(
        config=anchored(recipe.config.model_dump(mode="json")),
        hub=hub,
        images=ray.put(made.data.images.numpy()),
        labels=ray.put(made.data.labels.numpy()),
        prompts=ray.put(made.prompts),
        max_staleness=made.max_staleness,
        kept=kept_folder(recipe.config, folder.url),
        code_allowed=code_allowed(),
        poisoned=f"{folder.url}/poisoned",
    )


def _results(
    recipe: Recipe,
    made: Ingredients,
    rounds: dict[int, DiffusionModel],
    folder: RunFolder,
    benchmark: Benchmark | None,
    look: str,
) -> RunResult:
    """Export, measure and report."""
    from ddil_ray import results
    from ddil_ray.runtime.evaluation import measure_on_ray

    results.export_students(recipe, made, rounds, folder.local)
    grids, about = folder.local / "samples", {}
    parts: dict[str, Any] = {"scores": {}, "classes": {}, "groups": {}}
    if recipe.config.evaluation.enabled:
        benchmark = benchmark or results.new_benchmark(recipe, made)
        about = benchmark.describe()
        found = measure_on_ray(benchmark, results.samplers_of(recipe, made, rounds), recipe.config.evaluation)
        parts = results.measured_parts(found)
        results.save_grids(found, grids)
        results.add_scores(recipe, made, rounds, parts["scores"], about, folder.local)
    records = read_journal(folder.local / "metrics.jsonl")
    last: dict[str, float] = next((r for r in reversed(records) if "loss" in r), {})
    shift: dict[str, float] = next((r for r in reversed(records) if "rollout/nonfinite" in r), {})
    write_json(folder.local / "metrics.json", {**parts, "about": about, "training": last, "shift": shift})
    results.run_report(
        folder.local / "report.html",
        recipe=recipe,
        records=records,
        measured=parts["scores"],
        classes=parts["classes"],
        about=about,
        grids=grids,
    )
    return RunResult(folder.url, rounds, parts["scores"], look)
