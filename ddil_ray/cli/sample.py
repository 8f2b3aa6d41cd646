"""`ddil-ray sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines
from ddil_ray.errors import ConfigError

__all__ = ["sample"]


def sample(
    model: Annotated[str, typer.Argument(help="Student or teacher: pipeline folder, URL, hub id or builtin:NAME.")],
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 4,
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the noise and the classes.")] = 0,
    class_label: Annotated[int | None, typer.Option(min=0, help="One class for all; default: all in turn.")] = None,
    guidance: Annotated[float, typer.Option(min=0, help="w of the guidance, for teachers; students have theirs.")] = 0,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("samples.png"),
    as_json: AsJson = False,
) -> None:
    """Draw images from a student or a teacher.

    Examples:

    `ddil-ray sample runs/digits-pd/student --steps 1 --out grid.png`

    `ddil-ray sample builtin:digits --steps 32 --guidance 2 --class-label 3 --num 16`
    """
    import torch

    from ddil_ray.evaluation import exported_sampler
    from ddil_ray.models import load_model
    from ddil_ray.report import save_grid

    loaded = load_model(model)
    sampler = exported_sampler(loaded, steps, w=guidance)
    classes = loaded.null_cond if loaded.null_cond is not None else (loaded.num_conditions or 1)
    if class_label is not None and (loaded.num_conditions is None or class_label >= classes):
        raise ConfigError(
            f"`--class-label` must be {f'below {classes}' if loaded.num_conditions else 'left out'} for this model, "
            f"but is {class_label} instead."
        )
    cond = torch.full((num,), class_label) if class_label is not None else torch.arange(num) % classes
    noise = torch.randn(num, *loaded.sample_shape, generator=torch.Generator().manual_seed(seed))
    samples = sampler(noise, cond, seed=seed)
    try:
        save_grid(samples, out, columns=min(num, 10))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`--out` must be a picture file that can be written, but {out} failed: {error}.") from error
    if as_json:
        print_json({"out": str(out), "num": num, "steps": steps})
    else:
        print_lines(f"{num} images of {steps} steps in {out}")
