"""The denoiser of a pipeline as ONNX, checked against torch before it is kept."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.card import add_section, markdown_table
from ddil_ray.errors import ConfigError, RunFailedError, first_line
from ddil_ray.models import DiffusionModel, load_model
from ddil_ray.models.network import FamilyNetwork

__all__ = ["TOLERANCE", "add_onnx", "check_onnx", "export_onnx"]

TOLERANCE = 1e-3
"""Largest difference of any entry to torch's, in units of the largest entry where that is above 1."""

_PROMPTS = ("a cat", "two boats", "rain")
_EXTERNAL_BYTES = 2**31 - 2**20
"""Of weights, which protobuf cannot hold in one file."""


def check_onnx(field: str = "--onnx") -> None:
    """Whether what exports and runs ONNX, which was asked for as `field`, is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"`{field}` must have onnx, onnxscript and onnxruntime, but {error.name} is missing. "
            "Run `pip install 'ddil-ray[onnx]'`."
        ) from error


def add_onnx(folder: Path) -> Path:
    """Add `onnx/<component>.onnx` to a pipeline folder and its card; see `export_onnx`."""
    model = load_model(str(folder))
    assert model.family is not None
    path = folder / "onnx" / f"{model.family.component}.onnx"
    shapes = export_onnx(model, path)
    inputs = [(f"`{name}`", " x ".join(map(str, shape))) for name, shape in shapes.items()]
    add_section(
        folder,
        "ONNX",
        f"`onnx/{path.name}` is the denoiser alone, float32, within {TOLERANCE:g} of torch. Its output is `prediction`."
        f"\n\n{markdown_table(('input', 'shape'), inputs)}",
    )
    return path


@torch.no_grad()
def export_onnx(model: DiffusionModel, path: Path) -> dict[str, list[int | str]]:
    """Write the diffusers denoiser of `model` to `path`, float32 and with a dynamic batch.

    Its inputs are the tensors that the denoiser is called with, under diffusers' names; its output is `prediction`.

    Returns:
        Shapes of the inputs by name, `batch` where they are dynamic.

    Raises:
        ConfigError: see `check_onnx`.
        RunFailedError: torch cannot export it, or onnxruntime computes something else from random inputs of two batch
            sizes; then nothing is left.
    """
    check_onnx()
    network: Any = model.network
    calls = [_call(model, batch) for batch in (2, 3)]
    graph, shapes = _Graph(network.denoiser, calls[0]).eval(), _shapes(*calls)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    dynamic = tuple({i: batch for i, size in enumerate(shape) if size == "batch"} for shape in shapes.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                tuple(_tensors(calls[0]).values()),
                input_names=list(shapes),
                output_names=["prediction"],
                dynamic_shapes=(dynamic,),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter's own, of many kinds
        raise RunFailedError(f"torch cannot export this denoiser to ONNX: {first_line(error)}") from error
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    program.save(path, external_data=weights > _EXTERNAL_BYTES)
    worst = max(_difference(graph, path, call) for call in calls)
    if not worst <= TOLERANCE:
        for file in (path, Path(f"{path}.data")):
            file.unlink(missing_ok=True)
        raise RunFailedError(
            f"The ONNX model must be within {TOLERANCE:g} of torch, but is {worst:.2g} away; it was removed."
        )
    return shapes


class _Graph(nn.Module):
    """The denoiser, called with tensors by position; what else it is called with stays as in `call`."""

    def __init__(self, denoiser: nn.Module, call: Mapping[str, Any]) -> None:
        super().__init__()
        self.denoiser, self.call = denoiser, dict(call)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The prediction."""
        prediction: Tensor = self.denoiser(**_filled(self.call, iter(tensors)))[0]
        return prediction


def _call(model: DiffusionModel, batch: int) -> dict[str, Any]:
    """What the denoiser gets, by name, when the network is asked for `batch` random states."""
    network = model.network
    assert isinstance(network, FamilyNetwork)
    if model.prompted and network.bank is None:
        model.ask(_PROMPTS)
    generator = torch.Generator().manual_seed(batch)
    conditions = len(_PROMPTS) if model.prompted else model.num_conditions or 1
    found: dict[str, Any] = {}

    def keep(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments)

    hook = network.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        network(
            torch.randn(batch, *model.sample_shape, generator=generator),
            model.schedule.network_time(torch.rand(batch, generator=generator)),
            torch.randint(conditions, (batch,), generator=generator),
            torch.rand(batch, generator=generator),
        )
    finally:
        hook.remove()
    return found


def _tensors(call: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a call, those in dictionaries under dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in call.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Mapping):
            found |= _tensors(value, f"{prefix}{name}.")
    return found


def _filled(call: Mapping[str, Any], tensors: Iterator[Tensor]) -> dict[str, Any]:
    """`call` with others in the place of its tensors, in the order of `_tensors`."""
    return {
        name: next(tensors)
        if isinstance(value, Tensor)
        else _filled(value, tensors)
        if isinstance(value, Mapping)
        else value
        for name, value in call.items()
    }


def _shapes(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[int | str]]:
    """Shapes of the tensors of two calls, with `batch` where they differ."""
    pairs = zip(_tensors(one).items(), _tensors(other).values(), strict=True)
    return {
        name: [a if a == b else "batch" for a, b in zip(left.shape, right.shape, strict=True)]
        for (name, left), right in pairs
    }


def _difference(graph: nn.Module, path: Path, call: Mapping[str, Any]) -> float:
    """See `TOLERANCE`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = _tensors(call)
    used = {i.name for i in session.get_inputs()}
    (theirs,) = session.run(None, {name: part.numpy() for name, part in tensors.items() if name in used})
    ours = graph(*tensors.values())
    return float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp(min=1))
