"""Made-up outcomes with known content, for tests of summaries and pages."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from runs import small_run

from ddil_ray.ablation.outcome import Failure, Outcome
from ddil_ray.ablation.summary import Study
from ddil_ray.config import to_yaml

__all__ = ["made_up_outcome", "made_up_study", "time_record", "write_run"]

EVEN = (0.25, 0.25, 0.25, 0.25)
STEPS = (1, 2, 4, 8)


def time_record(step, quarters=EVEN, *, phase=0, **more):
    """A training record of half forward and half student states, all with the same law of t."""
    record = {"step": step, "phase": phase, "loss": 1.0}
    for source in ("forward", "student"):
        record[f"states/share_{source}"] = 0.5
        record |= {f"states/t_{source}/quarter_{n + 1}": share for n, share in enumerate(quarters)}
    return record | more


def _shift_record(generator, scale):
    record = {"step": 100, "phase": 0}
    for k in (1, 2, 3, 4):
        record[f"shift/energy/step_{k}"] = scale * k * (1 + 0.1 * generator.random())
        record[f"shift/floor/step_{k}"] = 0.05
        record[f"shift/frechet/step_{k}"] = scale * k
        record[f"shift/error_visited/step_{k}"] = scale * k * (1 + 0.1 * generator.random())
        record[f"shift/error_forward/step_{k}"] = 0.5 * (1 + 0.1 * generator.random())
    return record


def _picture(generator):
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 255, (48, 48), dtype=np.uint8)).resize((96, 96)).save(buffer, "png")
    return buffer.getvalue()


def made_up_outcome(group, arm, seed, *, scale=1.0, quarters=EVEN):
    """A run whose errors are about `scale`."""
    generator = np.random.default_rng((seed, int(scale * 1000)))

    def scores(scale):
        return {
            n: {
                "frechet_teacher": 9 * scale / n + generator.random(),
                "frechet_data": 1200 * scale / n + generator.random(),
                "paired_error": scale * 0.02 / n,
                "coverage": 1 - 0.5 * scale / n,
                "recall": 0.7,
                "spread": 0.4,
            }
            for n in STEPS
        }

    records = [time_record(n, quarters) for n in range(10, 101, 10)]
    return Outcome(
        group=group,
        arm=arm,
        seed=seed,
        scores=scores(scale),
        teacher=scores(0.5),
        records=[*records, _shift_record(generator, scale)],
        batch_size=64,
        reuse=1,
        seconds={"rollout": scale, "label": 2.0 * scale, "train": 5.0 + generator.random()},
        about={"num_samples": 1000, "features": "64 features of a classifier of digits"},
        pictures={name: _picture(generator) for name in ("teacher-reference", *(f"student-{n}-steps" for n in STEPS))},
        where=f"runs/{arm}/seed-{seed}",
    )


def made_up_study(seeds=3, **skewed):
    """Two groups of three arms; `skewed` is the law of t of the last arm, as `quarters=`."""
    outcomes = [
        made_up_outcome({"objective": objective}, arm, seed, scale=scale, **(skewed if arm == "half student" else {}))
        for seed in range(seeds)
        for objective in ("pd", "lcm")
        for arm, scale in (("forward only", 1.0), ("with teacher", 0.8), ("half student", 0.6))
    ]
    failures = [Failure({"objective": "pd"}, "with teacher", 7, "RunFailedError: the loss is not finite")]
    return Study("Made up", ["forward only", "with teacher", "half student"], outcomes, failures)


def write_run(output, name, *, seed=0, scale=1.0, quarters=EVEN, finished=True, scores=True, **settings):
    """A run folder as `ddil-ray distill` leaves it; `settings` change the small run's."""
    evaluation = {"enabled": True, "num_samples": 32, "steps": [1, 2]}
    config = small_run(name=name, seed=seed, output=str(output), **{"evaluation": evaluation, **settings})
    outcome = made_up_outcome({}, name, seed, scale=scale, quarters=quarters)
    run = Path(output, name)
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in outcome.records))
    for picture, content in outcome.pictures.items():
        (run / "samples" / f"{picture}.png").write_bytes(content)
    measured = {"student": outcome.scores, "teacher": outcome.teacher} if scores else {}
    if finished:
        (run / "metrics.json").write_text(json.dumps({"scores": measured, "about": outcome.about}))
    return str(run)
