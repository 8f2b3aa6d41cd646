"""Does DDIL's mixture of states help? Forward-only against DDIL over paired seeds, judged by gates.

Arms of one seed share everything but what their spec in `benchmarks/ddil/` changes: the teacher, the updates, the
batch size, the law of t and all evaluation noise. A gate names what was promised of an arm against another, before it
was measured; `docs/evidence.md` tells what came out. `make benchmark-ddil` runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import patches

from ddil_ray.ablation.statistics import paired_difference
from ddil_ray.ablation.summary import TEACHER, paired
from ddil_ray.config import AblationConfig, load_config
from ddil_ray.config.teacher import TeacherTrainer
from ddil_ray.data import load_images
from ddil_ray.folder import environment
from ddil_ray.models import perceptron
from ddil_ray.runtime.ablation import ablate
from ddil_ray.tracking import View
from ddil_ray.training.teacher import train_teacher

SPECS = Path(__file__).with_suffix("")


@dataclass(frozen=True)
class Gate:
    """A promise: `arm` / `baseline` in `score` at `steps` steps is at most `bound`."""

    arm: str
    baseline: str
    score: str
    steps: int
    bound: float
    every_seed: bool = False
    """The arm must also be better in every seed."""
    difference: bool = False
    """Compare arm - baseline, which must be at least `bound`, in place of the ratio."""


def pd_gates() -> list[Gate]:
    """What is promised of progressive distillation."""
    return [
        Gate("ddil", "forward", "frechet_teacher", 4, 0.85, every_seed=True),
        Gate("ddil", "forward", "paired_error", 4, 0.93),
    ]


def lcm_gates(*steps: int) -> list[Gate]:
    """What is promised of latent consistency."""
    return [
        *(Gate("ddil", "forward", "frechet_data", n, 0.97) for n in steps),
        *(Gate("ddil", "forward", "coverage", n, 0.0, difference=True) for n in steps),
        *(Gate("ddil", "forward", "recall", n, -0.02, difference=True) for n in steps),
    ]


GATES = {
    "pd": pd_gates(),
    "lcm": [
        *lcm_gates(4, 8),
        Gate("ddil, reflected", "forward", "frechet_data", 4, 0.90),
        Gate("ddil", "ddil, never synced", "frechet_data", 4, 0.97),
    ],
    "dmd2": [Gate(arm, TEACHER, "frechet_data", 4, 0.85) for arm in ("student", "forward", "ddil")],
    "emoji-pd": pd_gates(),
    "emoji-lcm": lcm_gates(4),
}
"""Gates by the spec that measures them: `benchmarks/ddil/<name>.yaml`, run in this order."""

TEACHERS = {
    "digits": (perceptron.new_model, TeacherTrainer(steps=8000, batch_size=128, lr=1e-3, ema_decay=0.999)),
    "emoji": (patches.new_model, TeacherTrainer(steps=4500, batch_size=64, lr=6e-3, ema_decay=0.998)),
}
"""Untrained teacher and its training, by the data that all arms of a spec use."""


def judge(gate: Gate, report: dict[str, Any]) -> dict[str, Any]:
    """The gate's figure over all seeds of a report.json."""
    if gate.baseline == TEACHER:
        runs = {r["seed"]: r["scores"][str(gate.steps)][gate.score] for r in report["runs"] if r["arm"] == gate.arm}
        rows = [r for r in report["quality"] if (r["arm"], r["steps"], r["score"]) == (TEACHER, gate.steps, gate.score)]
        arm, baseline = list(runs.values()), [rows[0]["mean"]] * len(runs)
    else:
        baseline, arm = paired(report["runs"], gate.baseline, gate.arm, score=gate.score, steps=gate.steps)
    found = paired_difference(baseline, arm)
    figure = found.difference if gate.difference or found.ratio is None else found.ratio
    holds = figure.mean >= gate.bound if gate.difference else figure.mean <= gate.bound
    return {
        **asdict(gate),
        "baseline_values": baseline,
        "arm_values": arm,
        "figure": figure.mean,
        "interval": [figure.low, figure.high],
        "better": sum(a > b if gate.difference else a < b for a, b in zip(arm, baseline, strict=True)),
        "seeds": found.seeds,
        "holds": holds and (not gate.every_seed or found.better == found.seeds),
    }


def show(gates: list[dict[str, Any]]) -> None:
    """Print the gates."""
    table = Table(title="DDIL against its baselines")
    for column in ("method", "comparison", "score", "steps", "figure", "95 % interval", "better", "gate", "holds"):
        table.add_column(column, no_wrap=True)
    for g in gates:
        table.add_row(
            g["method"],
            f"{g['arm']} {'-' if g['difference'] else '/'} {g['baseline']}",
            g["score"],
            str(g["steps"]),
            f"{g['figure']:.3f}",
            "[{:.3f}, {:.3f}]".format(*g["interval"]) if g["seeds"] > 1 else "one seed",
            f"{g['better']}/{g['seeds']}",
            f"{'>=' if g['difference'] else '<='} {g['bound']:g}" + (", every seed" if g["every_seed"] else ""),
            "yes" if g["holds"] else "NO",
        )
    Console(width=150).print(table)


def teacher_weights(data: str, folder: Path, *, share: float) -> Path:
    """Weights of the teacher of `data` in `folder`, trained for `share` of its updates unless they are there."""
    path = folder / f"teacher-{data}.safetensors"
    if not path.exists():
        new_model, settings = TEACHERS[data]
        settings = settings.model_copy(update={"steps": max(1, round(settings.steps * share))})
        model = train_teacher(new_model(), load_images(data), settings)
        save_file({name: value.contiguous() for name, value in model.network.state_dict().items()}, path)
    return path


def main() -> None:
    """Train the teacher, run every spec, print the gates and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--runs", type=Path, help="folder for runs and reports; default: a new one in runs/")
    parser.add_argument("--teacher-share", type=float, default=1.0, help="share of the teachers' usual updates")
    parser.add_argument("overrides", nargs="*", help="of every spec, such as seeds=[0,1] settings.trainer.steps=100")
    args = parser.parse_args()
    started = time.perf_counter()
    folder: Path = args.runs or Path("runs", time.strftime("benchmark-ddil-%Y%m%d-%H%M%S"))
    folder.mkdir(parents=True, exist_ok=True)
    gates, results = [], {}
    for method, promised in GATES.items():
        data = "emoji" if method.startswith("emoji") else "digits"
        weights = teacher_weights(data, folder, share=args.teacher_share)
        overrides = [f"settings.teacher.weights={weights}", *args.overrides]
        spec = load_config(str(SPECS / f"{method}.yaml"), overrides, kind=AblationConfig)
        (folder / method).mkdir(exist_ok=True)
        report = ablate(spec, folder / method, view=View())
        results[method] = {"settings": report["settings"], "runs": report["runs"], "failures": report["failures"]}
        gates += [{"method": method, **judge(gate, report)} for gate in promised]
        print(f"{method}: {time.perf_counter() - started:.0f} s so far; {folder / method / 'report.html'}", flush=True)
    show(gates)
    seconds = round(time.perf_counter() - started)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": {"teacher_share": args.teacher_share, "overrides": args.overrides},
        "seconds": seconds,
        "environment": environment(0),
        "gates": gates,
        "results": results,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{sum(g['holds'] for g in gates)} of {len(gates)} gates hold; {seconds} s; all figures in {args.out}")


if __name__ == "__main__":
    main()
