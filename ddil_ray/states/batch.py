"""The record that travels: states with where they came from, and the expert's label once it is known."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ddil_ray.errors import StateError

__all__ = ["Origin", "StateBatch"]


class Origin(IntEnum):
    """Where a state comes from; the four sources of DDIL."""

    FORWARD = 0
    STUDENT = 1
    TEACHER = 2
    MIXED = 3

    @property
    def label(self) -> str:
        """The name used in configs and metrics."""
        return self.name.lower()


@dataclass(frozen=True)
class StateBatch:
    """B states of a (student or forward) process, and what the teacher says of each.

    Example: 4 digits of 8 x 8 pixels at t = .5 from student weights published at step 20 have x_t (4, 1, 8, 8),
    t = [.5, .5, .5, .5], cond = [3, 1, 4, 1], w = [2., 2., 2., 2.], origin = [1, 1, 1, 1], version = [20, 20, 20, 20].
    """

    x_t: Tensor
    """(B, ...) float32 state."""
    t: Tensor
    """(B,) float64 time in [0, 1]."""
    cond: Tensor
    """(B,) int64 condition: a class id now, never an embedding."""
    w: Tensor
    """(B,) float32 guidance the label is made with (0 = none)."""
    origin: Tensor
    """(B,) int8 `Origin`."""
    version: Tensor
    """(B,) int64 trainer step at which the student weights used were published; -1 where none were used."""
    phase: Tensor
    """(B,) int64 phase of training (round of progressive distillation) the state and label belong to."""
    label: Tensor
    """(B, ...) float32: the expert's answer (objective's own meaning); (B, 0) before labelling."""

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: Tensor | slice) -> StateBatch:
        """The chosen rows: views of a slice, a copy of those numbered or marked by a tensor (R,) int64 or (B,) bool."""
        if isinstance(rows, slice):
            return StateBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})
        chosen = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        return StateBatch(**{f.name: getattr(self, f.name).index_select(0, chosen) for f in fields(self)})

    def labelled(self, label: Tensor) -> StateBatch:
        """This batch with the expert's label."""
        return replace(self, label=label)

    def to(self, device: torch.device | str) -> StateBatch:
        """This batch on `device`."""
        return StateBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @staticmethod
    def cat(batches: Sequence[StateBatch]) -> StateBatch:
        """All rows of `batches` (at least one), in order."""
        if len(batches) == 1:
            return batches[0]
        names = [f.name for f in fields(StateBatch)]
        return StateBatch(**{n: torch.cat([getattr(b, n) for b in batches]) for n in names})

    def to_columns(self) -> dict[str, np.ndarray]:
        """One numpy array per field, the form in which Ray Data carries a batch."""
        return {f.name: getattr(self, f.name).detach().cpu().numpy() for f in fields(self)}

    @staticmethod
    def from_columns(columns: dict[str, np.ndarray]) -> StateBatch:
        """The batch of `to_columns`, on the same memory: not to be written where `columns` are not, as Ray's are.

        Raises:
            StateError: a column is missing, of another dtype or number of axes, or of another number of rows.
        """
        _check_columns(columns)
        _allow_read_only()
        return StateBatch(**{f.name: torch.from_numpy(columns[f.name]) for f in fields(StateBatch)})

    def check(self, *, origin: Origin, phase: int, sample_shape: Sequence[int], labelled: bool = True) -> None:
        """Check that these are states of `origin` in `phase` that can be learnt from, `labelled` where it says so.

        Others would silently give wrong targets, or spoil the weights for good.

        Raises:
            StateError: of another source, phase or shape, not labelled, or with values that are not finite or in range.
        """
        there = not labelled or self.label.shape[1:].numel() > 0
        shaped = self.x_t.shape[1:] == tuple(sample_shape)
        rules: dict[str, tuple[str, bool | Tensor]] = {
            "origin": (f"{int(origin)}", self.origin == origin),
            "phase": (str(phase), self.phase == phase),
            "x_t": (f"finite and of shape {tuple(sample_shape)}", shaped and self.x_t.isfinite()),
            "label": ("there and finite", there and self.label.isfinite()),
            "t": ("in [0, 1]", (self.t >= 0) & (self.t <= 1)),
            "w": ("finite", self.w.isfinite()),
        }
        for name, (rule, holds) in rules.items():
            if not bool(torch.as_tensor(holds).all()):
                raise StateError(
                    f"`{name}` of a block of {origin.label} states must be {rule}, but is "
                    f"{_found(getattr(self, name))} instead. Where the student diverges, lower `trainer.lr`, or "
                    "use precision fp32; else look at the data and at the networks that made it."
                )


_KINDS = {"t": "float64", "cond": "int64", "w": "float32", "origin": "int8", "version": "int64", "phase": "int64"}
"""dtype of the columns that have one number per row; the others are float32, with axes of their own."""


def _check_columns(columns: Mapping[str, np.ndarray]) -> None:
    names = [f.name for f in fields(StateBatch)]
    missing = [name for name in names if name not in columns]
    if missing:
        raise StateError(
            f"`states` must have the columns {', '.join(names)}, but {', '.join(missing)} are missing: there are "
            f"{', '.join(columns) or 'none'}. Run one version of ddil-ray on all nodes."
        )
    rows = len(columns["t"])
    for name in names:
        column, kind = columns[name], _KINDS.get(name, "float32")
        flat = name in _KINDS
        if str(column.dtype) != kind or (column.ndim != 1 if flat else column.ndim < 2) or len(column) != rows:
            raise StateError(
                f"`{name}` of states must be {kind} of shape ({rows}{',' if flat else ', ...'}), but is {column.dtype} "
                f"of shape {column.shape} instead. Its rows were of different shapes, or others made it."
            )


def _found(values: Tensor) -> str:
    """Numbers that occur, or of rows with axes of their own the shape; and how many are not finite."""
    bad = int((~values.isfinite()).sum())
    some = values.unique()
    numbers = ", ".join(f"{v:g}" for v in some[:3].tolist()) + (", ..." if len(some) > 3 else "")
    said = numbers if values.ndim == 1 else f"of shape {tuple(values.shape[1:])}"
    return said + (f" with {bad} times NaN or infinity" if bad else "")


@functools.cache
def _allow_read_only() -> None:
    """Spend torch's warning, one per process, of a tensor on memory that must not be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(np.frombuffer(bytes(8)))
