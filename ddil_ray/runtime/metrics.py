"""What a run tells Prometheus: a table of metrics, each of which is read from a key of the run's records.

The driver sets them from the records that it journals, so a step costs nothing more. Ray's agent on the driver's node
exports them, with `ray_` before each name, every ten seconds; how that is gathered is in docs/monitoring.md. Dashboard
and alerts, in cluster/observability, use no other metrics, and a test holds them to this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge

__all__ = ["METRICS", "Metric", "RunMetrics"]


@dataclass(frozen=True)
class Metric:
    """One metric, and the key of records that it is read from."""

    key: str
    """Of records; one that ends in "/" goes on with the value of `tag`. That of a setting is its name."""
    name: str
    """After `ddil_`, with its unit at the end."""
    help: str
    tag: str | None = None
    """That tells its series apart, beside the run."""
    reason: str | None = None
    """Value of another tag, where keys share a name."""
    counts: Literal["all", "new"] | None = None
    """A counter: records have what happened so far, or since the record before. None: a gauge."""

    @property
    def exported(self) -> str:
        """Name of the series."""
        return f"ray_ddil_{self.name}{'_total' if self.counts else ''}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Names of all its tags."""
        return tuple(filter(None, ("run", self.tag, self.reason and "reason")))


METRICS = (
    Metric("step", "step", "The step that training is at."),
    Metric("total_steps", "planned_steps", "Steps of the whole run."),
    Metric("phase", "phase", "Round of progressive distillation, from 0."),
    Metric("loss", "loss", "Loss, mean since the record before."),
    Metric("loss/", "source_loss", "Loss on the states of a source.", "source"),
    Metric("grad_norm", "gradient_norm", "Norm of the student's gradient."),
    Metric("lr", "learning_rate", "Learning rate."),
    Metric("throughput/samples_per_s", "samples_per_second", "Rows trained on per second by all trainer workers."),
    Metric("trainer/stall_share", "stall_ratio", "Share of time that the trainer waits for states."),
    Metric("trainer/stall_share/", "source_stall_ratio", "Share that it waits for those of a source.", "source"),
    Metric("trainer/skipped_steps", "skipped_steps", "Steps left out for a loss or gradient of NaN.", counts="all"),
    Metric("staleness/p50", "staleness_median_steps", "Median age of the student states trained on."),
    Metric("staleness/max", "staleness_max_steps", "Age of the oldest of them."),
    Metric("staleness/bound", "staleness_bound_steps", "The bound on age, which ends the run where it is broken."),
    Metric("replay/fill/", "replay_rows", "Rows in the buffer of a source, on rank 0.", "source"),
    Metric("replay/reuse/", "replay_draws_per_row", "Draws per row that came in.", "source"),
    Metric("rows/made/", "rows_made", "Rows that actors made or labelled.", "pool", counts="new"),
    Metric("rows/expired/", "rows_dropped", "Rows that left the buffers unused.", "source", "expired", "new"),
    Metric("rows/evicted/", "rows_dropped", "Rows that left the buffers unused.", "source", "evicted", "new"),
    Metric("rows/poisoned/", "rows_poisoned", "Rows that were not finite, and were replaced.", "pool", counts="new"),
    Metric("actors/count/", "actors", "Actors that run.", "pool"),
    Metric("actors/busy_share/", "actor_busy_ratio", "Share of the actors' time at work.", "pool"),
    Metric("actors/waits_for_weights/", "actor_weights_wait_ratio", "Share waiting for newer weights.", "pool"),
    Metric("actors/waits_for_trainer/", "actor_trainer_wait_ratio", "Share waiting for the trainer.", "pool"),
    Metric("actors/block_s/", "block_seconds", "Time at work per block.", "pool"),
    Metric("actors/deaths/", "actor_deaths", "Actors that died.", "pool", counts="all"),
    Metric("actors/blocks_ahead/", "queue_blocks", "Blocks begun that no step needs yet.", "source"),
    Metric("actors/bytes_ahead/", "queue_bytes", "The same in bytes, by the size of the newest block.", "source"),
    Metric("sync/seconds", "sync_seconds", "From a publication by the trainer until rollouts can have it."),
    Metric("sync/bytes", "sync_bytes", "Weights of a publication."),
    Metric("checkpoint/step", "checkpoint_step", "Step of the newest checkpoint."),
    Metric("checkpoint.every", "checkpoint_every_steps", "Steps between checkpoints."),
    Metric("checkpoint/seconds", "checkpoint_seconds", "Until the newest checkpoint was in the run folder."),
    Metric("checkpoint/waited_s", "checkpoint_wait_seconds", "Of these, time that training waited."),
    Metric("checkpoint/bytes", "checkpoint_bytes", "Share of rank 0 in the newest checkpoint."),
    Metric("shift/energy/", "shift_energy", "Energy distance of visited to forward states.", "sampler_step"),
    Metric("shift/floor/", "shift_floor", "What it exceeds by chance in 5 % of cases without shift.", "sampler_step"),
    Metric("shift/error_visited/", "error_visited", "The student's error on states that it visits.", "sampler_step"),
    Metric("shift/error_forward/", "error_forward", "Its error on forward states.", "sampler_step"),
    Metric("rollout/nonfinite", "student_nonfinite_values", "Values of its rollouts that were not finite."),
)
_BY_KEY = {metric.key: metric for metric in METRICS}


@cache
def _read_by(key: str) -> tuple[Metric, str] | None:
    """The metric that is read from `key`, and the value of its tag; None where none is."""
    if key in _BY_KEY:
        return _BY_KEY[key], ""
    for start, metric in _BY_KEY.items():
        if start.endswith("/") and key.startswith(start):
            return metric, key.removeprefix(start)
    return None


class RunMetrics:
    """Sets the metrics of one run.

    Args:
        run: its name.
        settings: what holds from its start, as a record.
    """

    def __init__(self, run: str, settings: Mapping[str, float]) -> None:
        self._run = run
        self._last: dict[str, float] = {}
        """Newest value of each key."""
        self._gauges: dict[tuple[str, ...], tuple[Metric, dict[str, str], float]] = {}
        """The newest of each series."""
        self._exported: dict[str, Any] = {}
        self.show([settings])

    def show(self, records: Iterable[Mapping[str, float]]) -> None:
        """Take in new records, if there are any, and set all gauges: Ray drops one that was not set for 20 seconds.

        So they go when this is no longer called, as after training.
        """
        for record in records:
            for metric, tags, value in self.read(record):
                if metric.counts is None:
                    self._gauges[(metric.name, *tags.values())] = metric, tags, value
                else:
                    self._of(metric, Counter).inc(value, tags)
        for metric, tags, value in self._gauges.values():
            self._of(metric, Gauge).set(value, tags)

    def read(self, record: Mapping[str, float]) -> Iterator[tuple[Metric, dict[str, str], float]]:
        """What a record says, with all tags: values of gauges, and of counters what is new, if it is more than 0.

        Only what tells how many steps there are, as records of training do, tells the step that the run is at.
        """
        for key, value in record.items():
            found = _read_by(key)
            if found is None or (key == "step" and "total_steps" not in record):
                continue
            metric, tag = found
            new = self._new(metric, key, float(value))
            if metric.counts is None or new > 0:
                tags = {"run": self._run, metric.tag or "": tag, "reason": metric.reason or ""}
                yield metric, {name: tags[name] for name in metric.tags}, new

    def _new(self, metric: Metric, key: str, value: float) -> float:
        before, self._last[key] = self._last.get(key, 0.0), value
        # Where less happened so far than before, whoever counts has begun anew.
        return value - before if metric.counts == "all" and value >= before else value

    def _of(self, metric: Metric, kind: Any) -> Any:
        if metric.name not in self._exported:
            self._exported[metric.name] = kind(f"ddil_{metric.name}", metric.help, metric.tags)
        return self._exported[metric.name]
