"""Does DDIL's mixture of states help? PD and LCM on digits, forward-only against DDIL, over paired seeds.

Arms of one seed share everything but the source of their states: the teacher, the updates, the batch size, the law of
t and all evaluation noise. Ratios are DDIL / baseline per seed with Student's 95 % interval over seeds; a gate names
the ratio that was promised. `make benchmark-ddil` runs it; two processes, one core each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from mlp import new_model

from ddil_ray.config import RunConfig
from ddil_ray.config.teacher import TeacherTrainer
from ddil_ray.data import load_images
from ddil_ray.evaluation import Benchmark
from ddil_ray.evaluation.metrics import paired_difference
from ddil_ray.folder import environment
from ddil_ray.models import DiffusionModel
from ddil_ray.results import new_benchmark, samplers_of, scores
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.teacher import train_teacher

W = 2.0
FORWARD: dict[str, Any] = {"forward": 1.0}
PD_MIX: dict[str, Any] = {"forward": 0.4, "student": 0.3, "teacher": 0.3}
LCM_MIX: dict[str, Any] = {"forward": 0.5, "student": 0.5}
PD = {"type": "pd", "teacher_steps": 16, "student_steps": [8, 4, 2, 1]}
LCM = {"type": "lcm", "solver_steps": 50, "student_steps": 4}


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    objective: dict[str, Any]
    states: dict[str, Any]
    reflected: bool = False
    refresh: bool = True


ARMS = {
    "pd forward": Arm(PD, FORWARD),
    "pd ddil": Arm(PD, PD_MIX),
    "lcm forward": Arm(LCM, FORWARD),
    "lcm ddil": Arm(LCM, LCM_MIX),
    "lcm ddil, never synced": Arm(LCM, LCM_MIX, refresh=False),
    "lcm forward, reflected": Arm(LCM, FORWARD, reflected=True),
    "lcm ddil, reflected": Arm(LCM, LCM_MIX, reflected=True),
}


@dataclass(frozen=True)
class Gate:
    """A promise: `arm` / `baseline` in `score` at `steps` steps is at most (or at least) `bound`."""

    arm: str
    baseline: str
    score: str
    steps: int
    bound: float
    every_seed: bool = False
    difference: bool = False
    """Compare arm - baseline, which must be at least `bound`, in place of the ratio."""


GATES = [
    Gate("pd ddil", "pd forward", "frechet_teacher", 4, 0.85, every_seed=True),
    Gate("pd ddil", "pd forward", "paired_error", 4, 0.93),
    *(Gate("lcm ddil", "lcm forward", "frechet_data", n, 0.97) for n in (4, 8)),
    *(Gate("lcm ddil", "lcm forward", "coverage", n, 0.0, difference=True) for n in (4, 8)),
    *(Gate("lcm ddil", "lcm forward", "recall", n, -0.02, difference=True) for n in (4, 8)),
    Gate("lcm ddil, reflected", "lcm forward", "frechet_data", 4, 0.90),
    Gate("lcm ddil", "lcm ddil, never synced", "frechet_data", 4, 0.97),
]


def recipe_of(arm: Arm, *, seed: int, steps: int, samples: int) -> Recipe:
    """The arm as a run."""
    per_phase = steps // 4 if arm.objective["type"] == "pd" else steps
    return Recipe(
        RunConfig.model_validate(
            {
                "name": "benchmark",
                "seed": seed,
                "teacher": {"model": "mlp:new_model", "guidance": W},
                "data": {"source": "digits"},
                "objective": arm.objective,
                "states": arm.states,
                "threshold": {"mode": "static" if arm.reflected else "none"},
                "trainer": {"steps": per_phase, "batch_size": 128, "lr": 5e-4, "decay": "linear", "ema_decay": 0.99},
                "sync": {"every": 20},
                "evaluation": {"num_samples": samples, "steps": [1, 2, 4, 8], "teacher_steps": 64},
            }
        )
    )


_SHARED: dict[str, Any] = {}


def prepare(teacher_state: dict[str, Tensor], steps: int, samples: int) -> None:
    """Load into a worker process what all its arms share."""
    torch.set_num_threads(1)
    teacher = new_model()
    teacher.network.load_state_dict(teacher_state)
    teacher.network.eval().requires_grad_(False)
    data = load_images("digits")
    recipe = recipe_of(ARMS["pd forward"], seed=0, steps=steps, samples=samples)
    benchmark = new_benchmark(recipe, recipe.ingredients(teacher=teacher, data=data))
    _SHARED.update(teacher=teacher, data=data, benchmark=benchmark, steps=steps, samples=samples)


def train_and_measure(name: str, seed: int) -> dict[str, Any]:
    """Scores of one arm and seed by sampling steps."""
    started, arm, teacher = time.perf_counter(), ARMS[name], _SHARED["teacher"]
    benchmark: Benchmark = _SHARED["benchmark"]
    recipe = recipe_of(arm, seed=seed, steps=_SHARED["steps"], samples=_SHARED["samples"])
    result = distill_inline(recipe, teacher=teacher, data=_SHARED["data"], refresh=arm.refresh)
    made = recipe.ingredients(teacher=teacher, data=_SHARED["data"])
    samplers = samplers_of(recipe, made, result.rounds)["student"]
    measured = scores(benchmark, {name: samplers})[name]
    return {"arm": name, "seed": seed, "scores": measured, "seconds": time.perf_counter() - started}


def trained_teacher(steps: int) -> DiffusionModel:
    """The teacher of all arms."""
    settings = TeacherTrainer(steps=steps, batch_size=128, lr=1e-3, ema_decay=0.999)
    return train_teacher(new_model(), load_images("digits"), settings)


def judge(gate: Gate, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The gate's figure over all seeds."""

    def of(name: str) -> list[float]:
        found = sorted((r["seed"], r["scores"][gate.steps][gate.score]) for r in results if r["arm"] == name)
        return [value for _, value in found]

    arm, baseline = of(gate.arm), of(gate.baseline)
    figures: dict[str, Any] = {**asdict(gate), "arm_values": arm, "baseline_values": baseline}
    if gate.difference:
        figures["figure"] = sum(a - b for a, b in zip(arm, baseline, strict=True)) / len(arm)
        figures["holds"] = figures["figure"] >= gate.bound
        return figures
    difference = paired_difference(baseline, arm)
    figures |= {"figure": difference.ratio, "interval": [difference.low, difference.high], "better": difference.better}
    figures["holds"] = difference.ratio <= gate.bound and (not gate.every_seed or difference.better == difference.seeds)
    return figures


def show(gates: list[dict[str, Any]], seeds: int) -> None:
    """Print the gates."""
    table = Table(title=f"DDIL against its baselines, {seeds} paired seeds")
    for column in ("comparison", "score", "steps", "figure", "95 % interval", "better", "gate", "holds"):
        table.add_column(column, no_wrap=True)
    for g in gates:
        interval = "[{:.3f}, {:.3f}]".format(*g["interval"]) if "interval" in g else "difference"
        bound = f">= {g['bound']:g}" if g["difference"] else f"<= {g['bound']:g}"
        better = f"{g['better']}/{seeds}" if "better" in g else ""
        table.add_row(
            f"{g['arm']} / {g['baseline']}", g["score"], str(g["steps"]), f"{g['figure']:.3f}", interval, better, bound,
            "yes" if g["holds"] else "NO",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    """Run all arms and seeds, print the gates and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=4, help="training seeds (at least 2)")
    parser.add_argument("--steps", type=int, default=4000, help="updates per student, over all its rounds")
    parser.add_argument("--teacher-steps", type=int, default=8000, help="updates of the teacher")
    parser.add_argument("--samples", type=int, default=4000, help="samples per measurement")
    args = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(2)
    teacher = trained_teacher(args.teacher_steps)
    print(f"teacher trained in {time.perf_counter() - started:.0f} s", flush=True)
    state = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    jobs = [(name, seed) for seed in range(args.seeds) for name in ARMS]
    with ProcessPoolExecutor(
        2, mp_context=get_context("spawn"), initializer=prepare, initargs=(state, args.steps, args.samples)
    ) as pool:
        futures = [pool.submit(train_and_measure, *job) for job in jobs]
        results = []
        for future in futures:
            results.append(future.result())
            print(f"{results[-1]['arm']}, seed {results[-1]['seed']}: {results[-1]['seconds']:.0f} s", flush=True)
    gates = [judge(gate, results) for gate in GATES]
    show(gates, args.seeds)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    seconds = round(time.perf_counter() - started)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": settings, "seconds": seconds, "environment": environment(0), "gates": gates, "results": results
    }  # fmt: skip
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{sum(g['holds'] for g in gates)} of {len(gates)} gates hold; {seconds} s; all figures in {args.out}")


if __name__ == "__main__":
    main()
