"""How close to ideal is the pipeline, as trainers and rollout actors grow in number?

Real Ray on a simulated cluster: real streams, workers, gradients by gloo and bytes of the real shapes, while networks
sleep for the time of an accelerator (`ddil_ray.simulation`). Measured against an ideal pipeline, against GPUs that make
their own states (both in virtual time, without any framework's cost, which favours them), and against what
`ddil-ray plan` predicts. `make benchmark-scaling` runs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from ddil_ray.capacity.baselines import Draw, naive_rate, stops, synchronised_rate
from ddil_ray.capacity.costs import Costs, declared
from ddil_ray.capacity.plan import capacity
from ddil_ray.config import RunConfig
from ddil_ray.folder import environment
from ddil_ray.runtime.run import distill
from ddil_ray.simulation.cluster import connected_to, simulated_cluster
from ddil_ray.simulation.device import World
from ddil_ray.states.batch import Origin
from ddil_ray.tracking import read_journal
from ddil_ray.training.recipe import Recipe

DDIL = {"forward": 0.4, "student": 0.3, "teacher": 0.2, "mixed": 0.1, "teacher_substeps": 4}
TEACHER = {"forward": 0.0, "teacher": 1.0, "teacher_substeps": 28}
LCM = {"type": "lcm", "solver_steps": 50, "student_steps": 4}
PD = {"type": "pd", "teacher_steps": 20, "student_steps": [4]}


@dataclass(frozen=True)
class Point:
    """One run."""

    name: str
    workers: int
    actors: dict[str, int]
    """By role."""
    scale: float
    """Seconds slept per second of the simulated accelerator, so that two cores keep up with all processes."""
    steps: int
    rows: int = 4
    """Per worker and step, and per block."""
    states: dict[str, float] = field(default_factory=lambda: dict(DDIL))
    objective: dict[str, Any] = field(default_factory=lambda: dict(LCM))
    reuse: int = 1

    def config(self, output: str) -> RunConfig:
        """The run."""
        roles = {
            role: {"batch_size": self.rows, "num_actors": self.actors.get(role, 1), "num_gpus": 1}
            for role in ("forward_states", "student_rollouts", "teacher_rollouts")
        }
        trainer = {"num_workers": self.workers, "num_gpus": 0.9, "batch_size": self.rows * self.workers}
        return RunConfig.model_validate(
            {
                "name": self.name,
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
    Point("rollouts-1", 1, {"teacher_rollouts": 1}, scale=2, steps=15, states=TEACHER),
    Point("rollouts-8", 1, {"teacher_rollouts": 8}, scale=2, steps=100, states=TEACHER),
    Point("1x4", 1, {"teacher_rollouts": 1}, scale=4, steps=60),
    Point("2x5", 2, {"teacher_rollouts": 2}, scale=8, steps=40),
    Point("8x10", 8, {"forward_states": 2, "student_rollouts": 2, "teacher_rollouts": 4}, scale=16, steps=36),
    Point(
        "8x32",
        8,
        {"forward_states": 9, "student_rollouts": 7, "teacher_rollouts": 9},
        scale=16,
        steps=36,
        objective=PD,
    ),
    Point("16x16", 16, {"forward_states": 3, "student_rollouts": 3, "teacher_rollouts": 7}, scale=24, steps=30),
    Point("16x5-reuse-4", 16, {"teacher_rollouts": 2}, scale=24, steps=30, reuse=4),
]
"""Mixed rollouts have as many actors as the student's; a role that is not named has one per source."""


@dataclass(frozen=True)
class Result:
    """What a run did; rates are per second of the simulated accelerator."""

    point: Point
    gpus: int
    rows_per_s: float
    stall: float
    """Of rank 0."""
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


def run(point: Point, address: str, folder: Path) -> Result:
    """Run `point` on the cluster at `address`."""
    config, began = point.config(str(folder)), time.perf_counter()
    with connected_to(address, World(point.scale)):
        recipe = Recipe(config)
        made = recipe.ingredients()
        costs = declared(recipe, made)
        planned = capacity(recipe, made, costs)
        distill(config)
    took = time.perf_counter() - began
    batch = point.rows * point.workers
    records = [r for r in read_journal(folder / point.name / "metrics.jsonl") if "loss" in r]
    seconds = [batch / r["throughput/samples_per_s"] for r in records]
    stalls = [r["trainer/stall_share"] * s for r, s in zip(records, seconds, strict=True)]
    since = len(records) // 3  # the pipeline fills
    gpus = point.workers + sum(role.actors * role.pools for role in planned.roles)
    fed = min(role.actors / role.needed for role in planned.roles) * planned.ideal_rows_per_s
    return Result(
        point,
        gpus,
        rows_per_s=batch / fmean(seconds[since:]) * point.scale,
        stall=sum(stalls[since:]) / sum(seconds[since:]),
        ideal=min(fed, planned.ideal_rows_per_s) * point.scale,
        predicted=planned.rows_per_s * point.scale,
        predicted_stall=planned.stall,
        inline={name: rate * point.scale for name, rate in inline(point, costs, recipe, gpus).items()},
        start_s=took - sum(seconds[1:]),
        train_s=sum(seconds[1:]),
    )


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
        stages = 1 if origin is Origin.FORWARD else 4
        one += stops(chance, stages=stages, stage_s=state, other_s=other)
    return {
        "naive, one": naive_rate(one, gpus),
        "naive, all": naive_rate(every, gpus),
        "synchronised, one": synchronised_rate(one, gpus),
        "synchronised, all": synchronised_rate(every, gpus),
    }


def show(results: Sequence[Result]) -> None:
    """Print what was measured."""
    table = Table(title="Pipelines on a simulated cluster: rows per second of the simulated accelerator")
    columns = ["run", "GPUs", "trainers", "actors", "rows/s", "of ideal", "stall", "plan", "plan's stall"]
    for name in [*columns, "naive", "synchronised"]:
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.point.name,
            str(r.gpus),
            str(r.point.workers),
            str(r.gpus - r.point.workers),
            f"{r.rows_per_s:.2f}",
            f"{r.efficiency:.1%}",
            f"{r.stall:.1%}",
            f"{r.predicted:.2f} ({r.predicted / r.rows_per_s - 1:+.1%})",
            f"{r.predicted_stall:.1%}",
            f"{r.inline['naive, one']:.1f}",
            f"{r.inline['synchronised, all']:.1f}",
        )
    Console(width=160).print(table)


def main() -> None:
    """Run every point, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="*", help="names of the runs; default: all")
    parser.add_argument("--nodes", type=int, default=4, help="of the simulated cluster")
    args = parser.parse_args()
    began, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="scaling"))
    points = [p for p in POINTS if args.only is None or p.name in args.only]
    results = []
    with simulated_cluster(nodes=args.nodes, cpus=128 // args.nodes, gpus=64 // args.nodes) as address:
        print(f"cluster: {time.perf_counter() - began:.0f} s", flush=True)
        for point in points:
            results.append(run(point, address, folder))
            r = results[-1]
            print(f"{point.name}: start {r.start_s:.0f} s, training {r.train_s:.0f} s", flush=True)
    show(results)
    content = {
        "seconds": round(time.perf_counter() - began),
        "environment": environment(0),
        "results": [{**asdict(r), "efficiency": r.efficiency} for r in results],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
