"""`ddil-ray export`."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines, writable
from ddil_ray.errors import ConfigError

__all__ = ["export", "export_to"]


class Dtype(str, Enum):
    """Precisions of exported weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


def export(
    model: Annotated[str, typer.Argument(help="Run folder (its student is taken) or pipeline folder; a URL of one.")],
    out: Annotated[Path | None, typer.Option(help="New folder to write; default: exports/<name of MODEL>.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the weights; default: as they are.")] = None,
    variant: Annotated[bool, typer.Option("--variant", help="Name files of weights after --dtype.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Add the denoiser as ONNX, checked against torch.")] = False,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Commit the folder to the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the hub's repository private.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a student for others: in another precision, with ONNX, to the hub.

    Examples:

    `ddil-ray export runs/digits-pd --out digits-1-step --onnx`

    `ddil-ray export runs/sd15-lcm --dtype fp16 --variant --push me/sd15-lcm --private`
    """
    if variant and dtype not in (Dtype.FP16, Dtype.BF16):
        raise ConfigError("`--variant` must come with `--dtype` fp16 or bf16, but does not. Add one.")
    if private and push is None:
        raise ConfigError("`--private` must come with `--push`, but does not. Add the repository to push to.")

    found = export_to(
        out or Path("exports", _name(model)),
        model,
        dtype=dtype.value if dtype else None,
        variant=variant,
        onnx=onnx,
        push=push,
        private=private,
    )
    if as_json:
        print_json(found)
    else:
        print_lines(*(f"{what:8} {where}" for what, where in found.items()))


def export_to(
    folder: Path, model: str, *, dtype: str | None, variant: bool, onnx: bool, push: str | None, private: bool
) -> dict[str, str]:
    """Copy `model` to the new `folder`, and further; see the options of `export`.

    Returns:
        Where it is: as `folder`, `onnx` and `hub`.
    """
    from ddil_ray.publish.folder import check_target, copy_folder, pipeline_folder
    from ddil_ray.publish.hub import check_push
    from ddil_ray.publish.hub import push as push_to_hub
    from ddil_ray.publish.onnx import add_onnx, check_onnx

    if push is not None:
        check_push(push)
    if onnx:
        check_onnx()
    source = pipeline_folder(model)
    check_target(source, folder)
    writable(folder, "--out")
    copy_folder(source, folder, dtype=dtype, variant=variant)
    found = {"folder": str(folder)}
    if onnx:
        found["onnx"] = str(add_onnx(folder))
    if push is not None:
        found["hub"] = push_to_hub(folder, push, private=private)
    return found


def _name(model: str) -> str:
    """Of a run, or of a folder that is not called `student`."""
    parts = [part for part in re.split(r"[/\\:]", model) if part not in ("", ".")]
    named = [part for part in parts if part != "student"]
    return named[-1] if named else "student"
