"""Tiny teachers whose networks fail in Ray's processes as models, devices and machines do."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
import torch
from torch import Tensor

from ddil_ray.models import DiffusionModel
from ddil_ray.testing import TinyNetwork, tiny_model

__all__ = [
    "device_fails_once",
    "dies",
    "hangs_once",
    "lacks_memory",
    "lacks_memory_once",
    "poisons_all",
    "poisons_few",
    "raises",
    "raises_in_trainer",
    "session",
    "swells",
    "trainer_hangs_once",
    "troubled",
]

ACTOR, TRAINER = "ray::MapWorker", "ray::RayTrainWorker"


def session(name: str) -> Path:
    """A file that all processes of this Ray find."""
    return Path(ray._private.worker._global_node.get_session_dir_path(), name)


class _Faulty(TinyNetwork):
    """Does something else first, or with what comes out."""

    fault: Callable[[Tensor], Tensor] | None = None

    def forward(self, *arguments: Tensor) -> Tensor:
        prediction = super().forward(*arguments)
        return prediction if self.fault is None else self.fault(prediction)


def raises() -> DiffusionModel:
    return _faulty(ACTOR, _raise(ValueError("these weights are of another model\nand so on")))


def raises_in_trainer() -> DiffusionModel:
    fail = _raise(TypeError("a student takes no such argument"))

    def told(prediction: Tensor) -> Tensor:
        session(f"raised-{os.getpid()}").touch()
        return fail(prediction)

    return _faulty(TRAINER, told)


def device_fails_once() -> DiffusionModel:
    broken = _raise(RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"))
    return _faulty(ACTOR, _once("device", broken))


def lacks_memory() -> DiffusionModel:
    return _faulty(ACTOR, _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0")))


def lacks_memory_once() -> DiffusionModel:
    """Cannot go on while what a pass had in memory that failed is held."""
    held: list[weakref.ref[Tensor]] = []

    def lack(prediction: Tensor) -> Tensor:
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0")

    once = _once("memory", lack)
    return _faulty(ACTOR, lambda prediction: (lack if any(ref() is not None for ref in held) else once)(prediction))


def dies() -> DiffusionModel:
    return _faulty(ACTOR, _die)


def hangs_once() -> DiffusionModel:
    return _faulty(ACTOR, _once("hang", _hang))


def trainer_hangs_once() -> DiffusionModel:
    return _faulty(TRAINER, _once("hang-trainer", _hang))


def swells() -> DiffusionModel:
    return _faulty(ACTOR, _swell)


def poisons_all() -> DiffusionModel:
    return _faulty(ACTOR, lambda prediction: prediction * torch.nan)


def poisons_few() -> DiffusionModel:
    """One row of every fifth pass."""
    return _faulty(ACTOR, _poison())


def troubled() -> DiffusionModel:
    """An actor dies once, few of the rows of all are poisoned, and one loss is NaN."""
    if _is(TRAINER):
        return _faulty(TRAINER, _once("loss", lambda prediction: prediction * torch.nan))
    die, poison = _once("death", _die), _poison()
    return _faulty(ACTOR, lambda prediction: poison(die(prediction)))


def _poison() -> Callable[[Tensor], Tensor]:
    passes = iter(range(10**9))

    def poison(prediction: Tensor) -> Tensor:
        if next(passes) % 5 == 0:
            prediction[0] = torch.inf
        return prediction

    return poison


def _die(prediction: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return prediction


def _swell(prediction: Tensor) -> Tensor:
    """Take memory until somebody ends it, but no more than a laptop has."""
    held = []
    while len(held) < 32:
        held.append(b"x" * 2**28)
        time.sleep(0.05)
    return prediction


def _hang(prediction: Tensor) -> Tensor:
    time.sleep(3600)
    return prediction


def _raise(error: Exception) -> Callable[[Tensor], Tensor]:
    def fail(prediction: Tensor) -> Tensor:
        raise error

    return fail


def _once(name: str, fault: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fault` at the first call of all processes of this Ray, which share its session's folder."""

    def first(prediction: Tensor) -> Tensor:
        try:
            session(name).touch(exist_ok=False)
        except FileExistsError:
            return prediction
        return fault(prediction)

    return first


def _faulty(title: str, fault: Callable[[Tensor], Tensor]) -> DiffusionModel:
    model = tiny_model()
    if _is(title):
        model.network.__class__ = _Faulty
        model.network.fault = fault
    return model


def _is(title: str) -> bool:
    """Whether Ray calls this process so."""
    return any(title in part for part in psutil.Process().cmdline())
