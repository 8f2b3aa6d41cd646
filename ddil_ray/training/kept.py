"""Teacher rollouts that are made once and replayed: neither their states nor their labels ever go stale.

A teacher that does not change says the same of the same state for ever, so the first `keep_rows` rows of a phase stand
for all later ones. Which block a later one replays is a function of the seed alone; files only spare the teacher the
work. So rows are the same with files and without, in any process, and after any crash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddil_ray.config import RunConfig
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.folder import check_writable, write_whole
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import StateRequest
from ddil_ray.storage import open_url
from ddil_ray.training.producer import Expert
from ddil_ray.training.recipe import Recipe

__all__ = ["KeptBlocks", "from_parquet", "kept_blocks", "kept_folder", "to_parquet"]

_FORMAT = 2
"""Of the files, and of what decides their rows: raise it when either changes."""
_REST_S = 60.0
"""How long a storage that fails is left alone."""
_log = logging.getLogger(__name__)


def kept_blocks(recipe: Recipe, origin: Origin, conditions: Tensor, *, folder: str | None) -> KeptBlocks | None:
    """How blocks of `origin` are kept; None where they are not.

    Args:
        recipe: the run.
        origin: source of the blocks.
        conditions: (N,) int64, what conditions are drawn from.
        folder: of their files; None: there are none.
    """
    role = recipe.config.teacher_rollouts
    if origin is not Origin.TEACHER or role.keep_rows is None:
        return None
    return KeptBlocks(-(-role.keep_rows // role.batch_size), folder, _determined_by(recipe, conditions))


def kept_folder(config: RunConfig, run: str) -> str | None:
    """Where the run in folder `run` keeps blocks, an absolute path or URL; None where it keeps none.

    Raises:
        ConfigError: `teacher_rollouts.keep_at` cannot be written.
    """
    role = config.teacher_rollouts
    if role.keep_rows is None:
        return None
    where = role.keep_at or f"{run}/kept"
    where = where if "://" in where else str(Path(where).resolve())
    try:
        fs, root = open_url(where)
        check_writable(fs, root)
    except Exception as error:  # every filesystem has errors of its own
        raise ConfigError(
            f"`teacher_rollouts.keep_at` must be a folder or URL that can be written, but {where!r} failed: {error}. "
            "Check the address, the disk and the credentials."
        ) from error
    return where


@dataclass
class KeptBlocks:
    """The first blocks of every phase, for good."""

    blocks: int
    """That are made in a phase; later ones replay them, each pass in a new order."""
    folder: str | None
    """Path or fsspec URL that holds a folder of files for each teacher and setting; None: nothing is stored."""
    made_from: str
    """What decides a row besides the teacher."""
    _teachers: dict[int, str] = field(default_factory=dict, init=False)
    _rests_until: float = field(default=0.0, init=False)

    def replayed(self, request: StateRequest) -> StateRequest:
        """The request whose rows `request` gets: itself at first."""
        again, place = divmod(request.index, self.blocks)
        if again == 0:
            return request
        order = np.random.default_rng((request.seed, request.phase, 0x4B45, again)).permutation(self.blocks)
        return replace(request, index=int(order[place]))

    def block(self, request: StateRequest, expert: Expert, make: Callable[[StateRequest], StateBatch]) -> StateBatch:
        """The labelled rows of `request`: read where they are kept, else made and kept.

        Args:
            request: any of the source.
            expert: the teacher of the request's phase.
            make: makes and labels the rows of a request.
        """
        request = self.replayed(request)
        if self.folder is None:
            return make(request)
        fs, root = open_url(self.folder)
        path = f"{root}/{self._name(request.phase, expert)}/{request.index:06d}.parquet"
        content = self._tried(partial(fs.cat_file, path), path)
        kept = _parsed(content, path) if content is not None else None
        if kept is None:
            kept = make(request)
            self._tried(partial(write_whole, fs, path, to_parquet(kept)), path)
        return kept

    def _tried(self, act: Callable[[], bytes | None], path: str) -> bytes | None:
        """What `act` gives of the file at `path`, None where there is none. A storage that fails costs the teacher's
        time, not the run; and it is left alone for a while, since finding out that it fails takes long."""
        if time.monotonic() < self._rests_until:
            return None
        try:
            return act()
        except FileNotFoundError:
            return None
        except Exception as error:  # every filesystem has errors of its own
            _log.warning("Blocks are made and not kept for %g s: %s: %s", _REST_S, path, first_line(error))
            self._rests_until = time.monotonic() + _REST_S
            return None

    def _name(self, phase: int, expert: Expert) -> str:
        """A folder of those that have the same teacher and are made in the same way."""
        if phase not in self._teachers:
            model, times = expert.model, torch.linspace(0, 1, 1001, dtype=torch.float64)
            kind = f"{self.made_from} phase {phase} {model.prediction.value} {model.sample_shape}"
            digest = hashlib.blake2b(kind.encode(), digest_size=10)
            for of_time in (model.schedule.alpha, model.schedule.sigma, model.schedule.network_time):
                digest.update(of_time(times).double().numpy().tobytes())
            for name, part in sorted(expert.model.network.state_dict().items()):
                digest.update(name.encode())
                digest.update(memoryview(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
            self._teachers[phase] = digest.hexdigest()
        return self._teachers[phase]


def _determined_by(recipe: Recipe, conditions: Tensor) -> str:
    """All settings that a row or its label depends on.

    Where the teacher lies is no part of it, since `KeptBlocks` looks at its weights and schedule. Where the data lie
    is: of what they hold the conditions alone are looked at, which tells neither images nor prompts of two data sets
    apart.
    """
    config = recipe.config
    settings = {
        "format": _FORMAT,
        "seed": config.seed,
        "teacher": config.teacher.model_dump(mode="json", exclude={"model", "weights"}),
        "data": config.data.model_dump(mode="json", exclude={"prompt_cache_mib"}),
        "conditions": hashlib.blake2b(conditions.numpy().tobytes(), digest_size=10).hexdigest(),
        "objective": config.objective.model_dump(mode="json"),
        "teacher_substeps": config.states.teacher_substeps,
        "threshold": config.threshold.model_dump(mode="json"),
        "rows": config.teacher_rollouts.batch_size,
        "precision": [role.precision or config.trainer.precision for role in (config.teacher_rollouts, config.labels)],
    }
    return json.dumps(settings, sort_keys=True)


def to_parquet(batch: StateBatch) -> bytes:
    """A Parquet file with a row per state and a column per field; shapes of a row are in its metadata."""
    columns, shapes = {}, {}
    for name, values in batch.to_columns().items():
        shapes[name] = list(values.shape[1:])
        width = int(np.prod(values.shape[1:]))
        if width:  # Parquet has no lists of none
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    table = pa.table(columns).replace_schema_metadata({"shapes": json.dumps(shapes)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_parquet(content: bytes) -> StateBatch:
    """The batch of `to_parquet`."""
    table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    shapes = json.loads(table.schema.metadata[b"shapes"])
    columns: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name not in table.column_names:
            if math.prod(shape):
                raise ValueError(f"it has no column {name}")
            columns[name] = np.zeros((len(table), *shape), np.float32)
            continue
        column = table[name].combine_chunks()
        flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
        columns[name] = flat.to_numpy(zero_copy_only=False).reshape(len(table), *shape)
    return StateBatch.from_columns(columns)


def _parsed(content: bytes, path: str) -> StateBatch | None:
    """The block in a file's content; None where it is none, and is made again."""
    try:
        return from_parquet(content)
    except Exception as error:  # Arrow's own
        _log.warning("A kept block is not whole, and is made again: %s: %s", path, first_line(error))
        return None
