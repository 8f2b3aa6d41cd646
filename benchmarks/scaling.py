"""How close to ideal is the pipeline, with many trainers and many rollout actors? `sizes.py` has smaller ones.

Real Ray on a simulated cluster: real streams, workers, gradients by gloo and bytes of the real shapes, while networks
sleep for the time of an accelerator (`ddil_ray.simulation`). Measured against an ideal pipeline, against GPUs that make
their own states (both in virtual time, without any framework's cost, which favours them), and against what
`ddil-ray plan` predicts. Rates are per second of the simulated accelerator.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from measuring import Goal, Outcome, Table

from ddil_ray.capacity.baselines import Draw, naive_rate, stops, synchronised_rate
from ddil_ray.capacity.costs import Costs, declared
from ddil_ray.capacity.plan import Capacity, capacity
from ddil_ray.config import RunConfig
from ddil_ray.runtime.run import distill
from ddil_ray.simulation.cluster import connected_to, simulated_cluster
from ddil_ray.simulation.device import World
from ddil_ray.states.batch import Origin
from ddil_ray.tracking import read_journal
from ddil_ray.training.recipe import Recipe

DDIL = {"forward": 0.5, "student": 0.3, "teacher": 0.2, "teacher_substeps": 4}
"""The presets' mixture, with a teacher of 16 steps."""
TEACHER = {"forward": 0.0, "teacher": 1.0, "teacher_substeps": 28}
LCM = {"type": "lcm", "solver_steps": 50, "student_steps": 4}
PD = {"type": "pd", "teacher_steps": 20, "student_steps": [4]}
ROLES = ("forward_states", "student_rollouts", "teacher_rollouts")


STEADY = 240
"""Steps of a run whose beginning, where every row is fresh, does not count."""


@dataclass(frozen=True)
class Point:
    """One run."""

    name: str
    workers: int
    actors: tuple[int, int, int]
    """Of forward states, student rollouts and teacher rollouts."""
    scale: float
    """Seconds slept per second of the simulated accelerator, so that two cores keep up with all processes."""
    steps: int
    states: dict[str, float] = field(default_factory=lambda: dict(DDIL))
    objective: dict[str, Any] = field(default_factory=lambda: dict(LCM))
    reuse: int = 1
    rows: int = 4
    """Per worker and step, and per block."""

    def config(self, output: str) -> RunConfig:
        """The run."""
        roles = {
            role: {"batch_size": self.rows, "num_actors": n, "num_gpus": 1}
            for role, n in zip(ROLES, self.actors, strict=True)
        }
        trainer = {"num_workers": self.workers, "num_gpus": 0.9, "batch_size": self.rows * self.workers}
        return RunConfig.model_validate(
            {
                "name": "run",
                "output": output,
                "teacher": {"model": "ddil_ray.simulation:sd15", "guidance": 6.5},
                "data": {"source": "ddil_ray.simulation:sd15_latents"},
                "objective": self.objective,
                "states": self.states,
                "replay": {"reuse": self.reuse},
                "trainer": {**trainer, "steps": self.steps},
                **roles,
                "labels": {"batch_size": self.rows},
                "sync": {"every": 20},
                "checkpoint": {"every": 10_000},
                "tracking": {"tracker": "none", "log_every": 1},
                "evaluation": {"enabled": False, "steps": [4]},
                "shift": {"enabled": False},
            }
        )


POINTS = [
    Point("1 rollout actor", 1, (1, 1, 1), scale=2, steps=10, states=TEACHER),
    Point("8 rollout actors", 1, (1, 1, 8), scale=2, steps=64, states=TEACHER),
    Point("8 x 32", 8, (13, 9, 10), scale=48, steps=10, objective=PD),
    Point("16 x 13", 16, (3, 3, 7), scale=48, steps=10),
    Point("16 x 4, reuse 4", 16, (1, 1, 2), scale=48, steps=10, reuse=4),
]


@dataclass(frozen=True)
class Result:
    """What a run did."""

    point: Point
    gpus: int
    rows_per_s: float
    stall: float
    """Of the rank that waits most."""
    ideal: float
    """Rows per second of the slower of the trainer and its actors, at full speed and without any other cost."""
    predicted: float
    """Rows per second by the capacity model."""
    predicted_stall: float
    inline: dict[str, float]
    """Rows per second of as many GPUs that make their own states, by baseline."""
    start_s: float
    """Until training began, by the clock."""
    train_s: float

    @property
    def efficiency(self) -> float:
        """Of the ideal."""
        return self.rows_per_s / self.ideal


def run(point: Point, address: str) -> Result:
    """Run `point` on the cluster at `address`."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, connected_to(address, World(point.scale)):
        config = point.config(folder)
        recipe = Recipe(config)
        made = recipe.ingredients()
        costs = declared(recipe, made)
        planned = capacity(recipe, made, costs)
        long = Recipe(replace(point, steps=STEADY).config(folder))
        steady = capacity(long, long.ingredients(), costs)
        distill(config)
        records = [r for r in read_journal(Path(folder) / "run" / "metrics.jsonl") if "loss" in r]
    batch = point.rows * point.workers
    seconds = [batch / r["throughput/samples_per_s"] for r in records]
    stalls = [r["trainer/stall_share"] * s for r, s in zip(records, seconds, strict=True)]
    since = len(records) // 3  # the pipeline fills
    gpus = point.workers + sum(role.actors * role.pools for role in planned.roles)
    return Result(
        point,
        gpus,
        rows_per_s=batch / fmean(seconds[since:]) * point.scale,
        stall=sum(stalls[since:]) / sum(seconds[since:]),
        ideal=_ideal(steady) * point.scale,
        predicted=planned.rows_per_s * point.scale,
        predicted_stall=planned.stall,
        inline={name: rate * point.scale for name, rate in inline(point, costs, recipe, gpus).items()},
        start_s=time.perf_counter() - began - sum(seconds[1:]),
        train_s=sum(seconds[1:]),
    )


def _ideal(planned: Capacity) -> float:
    return min(1.0, *(role.actors / role.needed for role in planned.roles)) * planned.ideal_rows_per_s


def inline(point: Point, costs: Costs, recipe: Recipe, gpus: int) -> dict[str, float]:
    """Rows per second of `gpus` ranks that make their own states, label them and train on them.

    `one` takes one state of each rollout, which stops at a random stage, as inline trainers do; `all` uses every state
    of whole rollouts, as the pipeline does, so its work per row is the pipeline's.
    """
    phase, update = costs.phases[0], costs.update_s / point.rows
    one: list[Draw] = []
    every: list[Draw] = []
    for origin in recipe.priors.origins:
        chance = float(point.states[origin.label])
        other = update + phase.label_s[origin] / point.rows
        state = float(phase.state_s[origin].mean()) / point.rows
        every.append(Draw(chance, other + state))
        one += stops(chance, stages=1 if origin is Origin.FORWARD else 4, stage_s=state, other_s=other)
    return {
        "naive, one": naive_rate(one, gpus),
        "naive, all": naive_rate(every, gpus),
        "synchronised, one": synchronised_rate(one, gpus),
        "synchronised, all": synchronised_rate(every, gpus),
    }


def table_of(name: str, results: Sequence[Result]) -> Table:
    """What was measured."""
    rows = [
        [
            r.point.name,
            str(r.gpus),
            f"{r.rows_per_s:.2f}",
            f"{r.efficiency:.1%}",
            f"{r.stall:.1%}",
            f"{r.predicted:.2f} ({r.predicted / r.rows_per_s - 1:+.1%})",
            f"{r.predicted_stall:.1%}",
            f"{r.inline['naive, one']:.1f}, {r.inline['naive, all']:.1f}",
            f"{r.inline['synchronised, one']:.1f}, {r.inline['synchronised, all']:.1f}",
        ]
        for r in results
    ]
    columns = ["trainers x actors", "GPUs", "rows/s", "of ideal", "stall", "planned", "stall planned"]
    return Table(name, [*columns, "inline, naive", "inline, synchronised"], rows)


def goals_of(name: str, results: Sequence[Result]) -> list[Goal]:
    """What was promised, of the runs that were made."""
    r = {result.point.name: result for result in results}
    found = []
    if "8 x 32" in r:  # by the plan it needs 22
        found.append(Goal("trainer's stall, 8 x 32", r["8 x 32"].stall, 0.01))
        found.append(Goal("throughput / ideal, 8 x 32", r["8 x 32"].efficiency, 0.95, at_least=True))
    if "16 x 13" in r:
        wide = r["16 x 13"]
        for name, baseline, bound in (("naive", "naive, one", 2.5), ("synchronised", "synchronised, all", 0.95)):
            ratio = wide.rows_per_s / wide.inline[baseline]
            found.append(Goal(f"throughput / {name} inline, {wide.gpus} GPUs", ratio, bound, at_least=True))
    if "16 x 4, reuse 4" in r:
        again = r["16 x 4, reuse 4"]
        ratio = again.rows_per_s / again.inline["synchronised, all"]
        found.append(Goal(f"the same with reuse 4, {again.gpus} GPUs", ratio, 1.3, at_least=True))
    if {"1 rollout actor", "8 rollout actors"} <= set(r):
        ratio = r["8 rollout actors"].rows_per_s / r["1 rollout actor"].rows_per_s
        found.append(Goal("rollouts, 8 actors / 1", ratio, 7.6, at_least=True))
    found.append(
        Goal(f"plan's throughput off by ({name})", max(abs(x.predicted / x.rows_per_s - 1) for x in r.values()), 0.1)
    )
    found.append(Goal(f"plan's stall off by ({name})", max(abs(x.predicted_stall - x.stall) for x in r.values()), 0.1))
    return found


def measure(quick: bool) -> Outcome:
    """The points that goals are about."""
    return measure_points("scaling", POINTS[:1] if quick else POINTS)


def measure_points(name: str, points: Sequence[Point]) -> Outcome:
    """Every point on one cluster, as a table of that name."""
    results = []
    with simulated_cluster(nodes=4, cpus=16, gpus=16) as address:
        for point in points:
            results.append(run(point, address))
            print(f"{point.name}: {results[-1].start_s:.0f} s to start, {results[-1].train_s:.0f} s", flush=True)
    figures = {"runs": [{**asdict(r), "efficiency": r.efficiency} for r in results]}
    return Outcome([table_of(name, results)], goals_of(name, results), figures)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
