"""`ddil-ray sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddil_ray.cli.options import AllowCode, AsJson, print_json, print_lines
from ddil_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from ddil_ray.models import DiffusionModel

__all__ = ["sample"]

_COLUMNS = 10


def sample(
    model: Annotated[str, typer.Argument(help="Student or teacher: pipeline folder, URL, hub id or builtin:NAME.")],
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 4,
    num: Annotated[int | None, typer.Option(min=1, help="Images; default: 64, or 4 per prompt.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of all noise: images are those of the pipeline's own seed.")
    ] = 0,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to show; repeat for more, taken in turn.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with a prompt on each line.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Text to guide away from.")] = None,
    class_label: Annotated[int | None, typer.Option(min=0, help="One class for all; default: all in turn.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="w (guidance_scale - 1), of teachers and of students that are told it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("samples.png"),
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Draw images from a student or a teacher.

    Examples:

    `ddil-ray sample runs/digits-pd/student --steps 1 --out grid.png`

    `ddil-ray sample builtin:digits --steps 32 --guidance 2 --class-label 3 --num 16`

    `ddil-ray sample runs/sd15-lcm/student --prompt "a red bird" --prompt "two boats at sea" --num 8`
    """
    import torch

    from ddil_ray.evaluation import draw, exported_sampler
    from ddil_ray.models import load_model
    from ddil_ray.models.match import said_of
    from ddil_ray.report import save_grid

    place, prompts = _device(device), _prompts(prompt, prompt_file)
    with said_of("MODEL"):
        loaded = load_model(model)
    _check_guidance(loaded, guidance, negative_prompt)
    sampler = exported_sampler(loaded, steps, w=guidance or 0.0).to(place)
    if loaded.prompted:
        _check_prompts(prompts, class_label)
        loaded.ask(prompts, negative_prompt, encoder=loaded.text_encoder(place))
        num = num or 4 * len(prompts)
        cond = torch.arange(num) % len(prompts)
    else:
        num = num or 64
        cond = _classes(loaded, prompts, class_label, num)
    samples = draw(loaded, sampler, cond, seed=seed)
    columns = len(prompts) if 1 < len(prompts) <= _COLUMNS else min(num, _COLUMNS)
    try:
        save_grid(samples, out, columns=columns)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`--out` must be a picture file that can be written, but {out} failed: {error}.") from error
    if as_json:
        print_json({"out": str(out), "num": num, "steps": steps, **({"prompts": prompts} if prompts else {})})
    else:
        print_lines(f"{num} images of {steps} steps in {out}")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(0, device=name).device
        torch.zeros(1, device=device).tolist()  # which meta, a device without values, has not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"`--device` must be auto or a device that torch has here, but is {name!r}.") from error
    return device


def _prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """Those given, then those in the file."""
    prompts = list(given or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"`--prompt-file` must be a text file, but {file} failed: {error}.") from error
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts


def _check_guidance(model: DiffusionModel, guidance: float | None, negative: str | None) -> None:
    if model.reads_guidance and guidance is None:
        raise ConfigError(
            "`--guidance` must be given for this model, whose network is told w. A student's README.md says what it "
            "was trained with."
        )
    if negative is not None and (model.reads_guidance or not guidance or not model.prompted):
        raise ConfigError(
            "`--negative-prompt` must come with `--guidance` above 0, of a model that is asked by text and that "
            "guidance is computed for."
        )


def _check_prompts(prompts: Sequence[str], class_label: int | None) -> None:
    if not prompts:
        raise ConfigError("`--prompt` must be given for this model, which is asked by text.")
    if class_label is not None:
        raise ConfigError("`--class-label` must be left out for this model, which is asked by text. Use `--prompt`.")


def _classes(model: DiffusionModel, prompts: Sequence[str], class_label: int | None, num: int) -> torch.Tensor:
    """(num,) class ids: one for all, or all in turn."""
    import torch

    if prompts:
        raise ConfigError("`--prompt` must be left out for this model, which is not asked by text.")
    classes = model.classes or 1
    if class_label is None:
        return torch.arange(num) % classes
    if model.num_conditions is None or class_label >= classes:
        raise ConfigError(
            f"`--class-label` must be {f'below {classes}' if model.num_conditions else 'left out'} for this model, "
            f"but is {class_label} instead."
        )
    return torch.full((num,), class_label)
