"""Keeps states and labels that are NaN or infinite away from the trainer.

A stream's plan says how many rows every rank takes, so none may be missing: what is wrong is replaced by sound rows of
its block, which then count twice. How many that were is told, and a few of the wrong ones are kept to be looked at.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddil_ray.errors import RunFailedError
from ddil_ray.folder import write_whole
from ddil_ray.states.batch import StateBatch
from ddil_ray.storage import open_url
from ddil_ray.training.kept import to_parquet

__all__ = ["Sieve", "sound_rows"]

_BLOCKS = 64
_SAMPLES = 8
"""Files that one actor leaves at most."""
_ROWS = 16
"""Rows of a file at most."""


def sound_rows(states: StateBatch) -> Tensor:
    """(B,) bool: rows whose state and label, if there is one, are finite."""
    parts = (states.x_t, states.label)
    if all(bool(part.isfinite().all()) for part in parts):
        return torch.ones(len(states), dtype=torch.bool)
    return torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)


@dataclass
class Sieve:
    """What one actor has seen of wrong rows.

    Example: of a block of 4 rows whose second is NaN, `sift` gives rows 0, 2, 2, 3.
    """

    role: str
    """The config group of the actor."""
    source: str
    actor: str
    """Ray's id of it, which tells its samples from those of others."""
    folder: str | None
    """Path or fsspec URL where samples go."""
    most: float
    """Share of the last blocks that may be wrong."""
    count: int = 0
    """Wrong rows so far that nobody was told of; whoever tells sets it to 0."""
    _wrong: deque[int] = field(default_factory=lambda: deque(maxlen=_BLOCKS))
    _files: int = 0

    def sift(self, states: StateBatch) -> StateBatch:
        """`states` with its wrong rows replaced.

        Raises:
            RunFailedError: more than `most` of the last 64 blocks is wrong, or all of this one.
        """
        sound = sound_rows(states)
        wrong = int((~sound).sum())
        self._wrong.append(wrong)
        if not wrong:
            return states
        self.count += wrong
        kept = self._keep(states[~sound])
        if wrong == len(states):
            raise RunFailedError(self._message("all rows of a block", kept))
        share = sum(self._wrong) / (_BLOCKS * len(states))
        if share > self.most:
            raise RunFailedError(self._message(f"{share:.2%} of the rows of the last {_BLOCKS} blocks", kept))
        good = sound.nonzero().squeeze(1)
        chosen = torch.where(sound, torch.arange(len(states)), good[torch.arange(len(states)) % len(good)])
        return states[chosen]

    def _message(self, what: str, kept: str) -> str:
        return (
            f"States of `{self.role}` must be finite, but {what} from {self.source} were NaN or infinite, and "
            f"`faults.max_poisoned` is {self.most:g}. {kept}Lower `trainer.lr`, use precision fp32 in `{self.role}`, "
            "or look for what is wrong with the teacher; the last checkpoint is unharmed."
        )

    def _keep(self, wrong: StateBatch) -> str:
        """Write some of the wrong rows; says where, if they are there."""
        if self.folder is None:
            return ""
        fs, root = open_url(self.folder)
        if self._files < _SAMPLES:
            self._files += 1
            made = f"phase-{int(wrong.phase[0])}-version-{int(wrong.version[0])}-{self._files}"
            name = f"{self.role}-{self.source}-{self.actor}-{made}.parquet"
            try:
                write_whole(fs, f"{root}/{name}", to_parquet(wrong[:_ROWS]))
            except Exception as error:  # every filesystem has errors of its own
                logging.getLogger(__name__).warning("A sample of wrong states could not be written: %s", error)
                return ""
        return f"Some of them are in {self.folder}. "
