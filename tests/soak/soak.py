"""A long run whose processes are killed at random: does it finish by itself, as good as one that nobody touched?

`make soak` distils the digits twice, undisturbed and with a process killed now and then by a seeded choice, and
compares. A driver that was killed is started again with `--resume`, as a cluster would; everything else must mend
itself. Exits with 1 where an invariant is broken; what was killed when, and all figures, go to `soak.json`.

| invariant | held against |
| --- | --- |
| it ends, and no longer than `PATIENCE_S` passes without a record | the clock |
| training goes on from the newest checkpoint that was announced, or a later one | journal |
| no state is older than the bound, none is used more often than `replay.reuse` | journal |
| weights never go back, but to those of a checkpoint | journal |
| memory of all processes stays flat | first half of the run |
| the student is as good | the undisturbed run, by `evaluation`'s Frechet distance |
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from ddil_ray.config import RunConfig, load_config
from ddil_ray.tracking.journal import read_journal, training_records
from ddil_ray.training.recipe import Recipe

TITLES = {
    "state actor": "ray::MapWorker",
    "train worker": "ray::RayTrainWorker",
    "hub": "ray::Hub",
    "monitor": "ray::Monitor",
}
"""Kinds of processes by what Ray calls them; `driver` is the command itself."""
PATIENCE_S = 300.0
LOOK_S = 10.0
"""Between two looks at memory, which cost a good part of a second."""
LOG_EVERY = 2
FURTHER = 20
WORSE, GROWN = 1.25, 1.2
"""How much farther from the data the disturbed student may be, and how much more memory the second half may hold."""


@dataclass
class Kill:
    """One process that was killed."""

    at_s: float
    kind: str
    step: int
    """Newest in the journal."""
    checkpoint: int
    """Newest that the journal announces."""
    recovered_s: float | None = None
    """Until a record of `FURTHER` steps more: what was on its way when it was killed is no sign of life."""


@dataclass
class Story:
    """What happened in one run."""

    seconds: float = 0.0
    """From the first record to the last."""
    kills: list[Kill] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes) of all processes."""
    broken: list[str] = field(default_factory=list)


class Run:
    """The command, started again with `--resume` when it was killed."""

    def __init__(self, folder: Path, name: str, preset: str, overrides: Sequence[str]) -> None:
        self.folder, self._settings = folder / name, [preset, *overrides, f"output={folder}", f"name={name}"]
        self._log = (folder / f"{name}.log").open("a")
        self._start("distill", *self._settings)

    def _start(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("ddil-ray")), *arguments]
        self.process = psutil.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def resume(self) -> None:
        """Go on where the last checkpoint is, or anew where there is none."""
        begun = (self.folder / "checkpoints").exists()
        self._start("distill", *(["--resume", str(self.folder)] if begun else self._settings))

    def records(self) -> list[dict[str, float]]:
        """Of the journal."""
        return read_journal(self.folder / "metrics.jsonl")

    def victims(self, kind: str) -> list[psutil.Process]:
        """Processes of a kind that live now."""
        if kind == "driver":
            return [self.process]
        return [p for p in self._below() if _title(p).startswith(TITLES[kind])]

    def bytes_held(self) -> int:
        """By the command and all below it; shared pages count once."""
        total = 0
        for process in (self.process, *self._below()):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def _below(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return list(self.process.children(recursive=True))
        return []


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return "".join(process.cmdline()[:1])
    return ""


def follow(
    run: Run,
    *,
    kinds: Sequence[str],
    every_s: tuple[float, float],
    seed: int,
    most: float = math.inf,
    until: float = math.inf,
) -> Story:
    """Wait for a run to end, and kill its processes now and then: `most` times, before step `until`."""
    story, choose, began = Story(), random.Random(seed), time.monotonic()
    heard = due = first = began
    furthest, killed_driver = 0, False
    for now in _ticks():
        code = run.process.poll()
        story.seconds = heard - first
        if code is not None and not killed_driver:
            story.broken += [] if code == 0 else [f"The command ended with exit code {code}."]
            return story
        if code is not None:
            run.resume()
            killed_driver = False
        steps = [int(r["step"]) for r in run.records() if "loss" in r]
        if max(steps, default=0) > furthest:
            furthest, heard = max(steps), now
            _recovered(story, furthest, now - began)
        if now - heard > PATIENCE_S:
            run.process.kill()
            story.broken.append(f"No step beyond {furthest} for {PATIENCE_S:.0f} s.")
            return story
        _look(run, story, now - began)
        if furthest == 0:
            first, due = now, now + choose.uniform(*every_s)
        elif kinds and now >= due and len(story.kills) < most and furthest < until:
            due = now + choose.uniform(*every_s)
            killed_driver = _kill_one(run, story, choose, kinds, now - began) == "driver"
    raise AssertionError


def _ticks() -> Iterator[float]:
    while True:
        time.sleep(1.0)
        yield time.monotonic()


def _look(run: Run, story: Story, now_s: float) -> None:
    if not story.memory or now_s - story.memory[-1][0] > LOOK_S:
        story.memory.append((now_s, run.bytes_held()))


def _recovered(story: Story, furthest: int, now_s: float) -> None:
    for kill in story.kills:
        if kill.recovered_s is None and furthest >= kill.step + FURTHER:
            kill.recovered_s = now_s - kill.at_s


def _kill_one(run: Run, story: Story, choose: random.Random, kinds: Sequence[str], now_s: float) -> str | None:
    living = {kind: run.victims(kind) for kind in kinds}
    living = {kind: victims for kind, victims in living.items() if victims}
    if not living:
        return None
    killed = Counter(kill.kind for kill in story.kills)
    fewest = min(killed[kind] for kind in living)
    kind = choose.choice(sorted(kind for kind in living if killed[kind] == fewest))
    records = run.records()
    step = max((int(r["step"]) for r in records if "loss" in r), default=0)
    story.kills.append(Kill(now_s, kind, step, announced(records)))
    with contextlib.suppress(psutil.Error):
        choose.choice(living[kind]).kill()
    return kind


def recovery(kills: Sequence[Kill]) -> str:
    """By kind: how many were killed, and the seconds until training was `FURTHER` steps further."""
    lines = []
    for kind in sorted({kill.kind for kill in kills}):
        taken = sorted(k.recovered_s for k in kills if k.kind == kind and k.recovered_s is not None)
        count = sum(kill.kind == kind for kill in kills)
        lines.append(
            f"{kind}: {count} killed; " + (f"{median(taken):.1f} s, at most {taken[-1]:.1f} s" if taken else "-")
        )
    return "\n  ".join(lines)


def announced(records: Sequence[dict[str, float]]) -> int:
    """The newest checkpoint that a journal tells of."""
    return max((int(r["checkpoint/step"]) for r in records if "checkpoint/step" in r), default=0)


def broken_in(records: Sequence[dict[str, float]], *, bound: int, reuse: int) -> list[str]:
    """What a journal tells of that must never be."""
    found, last, version, newest = [], 0, -1, 0
    for record in records:
        step = int(record["step"])
        newest = max(newest, int(record.get("checkpoint/step", 0)))
        if "sync/bytes" in record:
            if step < min(version, newest):
                found.append(f"Weights of step {step} came after those of {version}.")
            version = step
        if "loss" in record:
            if step <= last and step - LOG_EVERY < newest:
                found.append(f"Went back to {step - LOG_EVERY}, before the checkpoint at {newest}.")
            last = step
            found += _rows_broken(record, bound=bound, reuse=reuse)
    return found


def _rows_broken(record: dict[str, float], *, bound: int, reuse: int) -> list[str]:
    """What a record of training tells of rows that must never be."""
    found, step = [], int(record["step"])
    age = record.get("staleness/max", 0)
    if age > bound:
        found.append(f"A state of {age:.0f} steps reached step {step}; the bound is {bound}.")
    used = max((v for k, v in record.items() if k.startswith("replay/reuse/")), default=0)
    if used > reuse:
        found.append(f"Rows were used {used:.2f} times at step {step}, of {reuse}.")
    return found


def useful_s(records: Sequence[dict[str, float]], *, batch_size: int) -> float:
    """Seconds that updates took, each counted once, without waiting for states."""
    return sum(
        LOG_EVERY * batch_size / r["throughput/samples_per_s"] * (1 - r["trainer/stall_share"])
        for r in training_records(records)
    )


def grown(memory: Sequence[tuple[float, int]]) -> float:
    """Most memory of the last third over the most of the third before it; the first one starts. NaN for short runs."""
    third = len(memory) // 3
    if third == 0:
        return float("nan")
    before, after = (max(held for _, held in part) for part in (memory[third : 2 * third], memory[2 * third :]))
    return after / before


def frechet(folder: Path) -> float:
    """Mean Frechet distance of the student to the data, over its numbers of steps."""
    scores: dict[str, Any] = json.loads((folder / "metrics.json").read_text())["scores"]["student"]
    distances = [score["frechet_data"] for score in scores.values()]
    return sum(distances) / len(distances)


def settings(steps: int) -> list[str]:
    """Of the run that is soaked, with `steps` updates per round."""
    return [
        f"trainer.steps={steps}",
        "trainer.max_failures=1000",
        "checkpoint.every=10",
        f"tracking.log_every={LOG_EVERY}",
        "tracking.tracker=none",
    ]


def soaked(folder: Path, name: str, *, preset: str, steps: int, seed: int, whole: bool = True, **kills: Any) -> Any:
    """Go through a run, and say what is broken: its `Story` and `figures`; `kills` as of `follow`."""
    config = load_config(preset, settings(steps), kind=RunConfig)
    until = math.inf if whole else steps * len(config.objective.student_steps)
    run = Run(folder.resolve(), f"{name}-{seed}-{time.time_ns()}", preset, settings(steps))
    story = follow(run, seed=seed, until=until, **kills)
    records, bound = run.records(), Recipe(config).ingredients().max_staleness
    story.broken += broken_in(records, bound=bound, reuse=config.replay.reuse)
    figures = {
        "seconds": story.seconds,
        "goodput": useful_s(records, batch_size=config.trainer.batch_size) / max(story.seconds, 1.0),
        "memory_grown": grown(story.memory),
        "frechet": frechet(run.folder) if not story.broken else float("nan"),
    }
    if figures["memory_grown"] > GROWN:
        story.broken.append(f"Memory grew {figures['memory_grown']:.2f} times.")
    print(f"{name}: {figures}", recovery(story.kills), *story.broken, sep="\n  ", flush=True)
    return {"figures": figures, **asdict(story)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="folder for both runs and soak.json")
    parser.add_argument("--preset", default="digits-pd", help="what is distilled; one with rounds")
    parser.add_argument("--steps", type=int, default=1000, help="updates per round")
    parser.add_argument("--every", type=float, nargs=2, default=(20.0, 40.0), help="seconds between kills, least, most")
    parser.add_argument("--kinds", nargs="+", choices=[*TITLES, "driver"], default=list(TITLES), help="what is killed")
    parser.add_argument("--most", type=float, default=math.inf, help="kills after which the run is left alone")
    parser.add_argument("--training", action="store_true", help="kill nothing in the evaluation after it")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--still", type=Path, help="soak.json of as many steps, whose undisturbed part is taken")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    how = {"preset": args.preset, "steps": args.steps, "every_s": tuple(args.every), "seed": args.seed}
    before = json.loads(args.still.read_text()) if args.still else {}
    found = {"undisturbed": before.get("undisturbed") or soaked(args.output, "undisturbed", kinds=[], **how)}
    found["disturbed"] = soaked(
        args.output, "disturbed", kinds=args.kinds, most=args.most, whole=not args.training, **how
    )
    still, stirred = (found[name]["figures"] for name in ("undisturbed", "disturbed"))
    if not stirred["frechet"] <= WORSE * still["frechet"]:
        found["disturbed"]["broken"].append("The student is worse than that of the undisturbed run.")
    share = {
        "of the undisturbed run's speed": still["seconds"] / stirred["seconds"],
        "frechet, disturbed / undisturbed": stirred["frechet"] / still["frechet"],
    }
    (args.output / "soak.json").write_text(json.dumps({**found, "shares": share}, indent=1) + "\n")
    print(share)
    broken = [text for story in found.values() for text in story["broken"]]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
