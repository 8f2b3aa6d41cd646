"""Prepared data: latents, prompts and their embeddings as Parquet, written by `ddil-ray prepare`.

```
dataset.json                    what is there (`Index`)
latents/<bucket>/*.parquet      one row per image: `cond`, `latent`, `source` (the row's name in the source),
                                `original_height`, `original_width` of the image as it was, `crop_top`, `crop_left` in
                                the resized image
prompts/*.parquet               one row per distinct prompt, in the order of ids: `text` and its embeddings
negative.parquet                the embeddings that stand for no negative prompt, one row
skipped.jsonl                   rows of the source that were left out: `name` and `reason`
```

A bucket is named <height>x<width> after its images' size in pixels. `cond` is a prompt id, or a class id where the
teacher knows classes. Data of prompts alone has no `latents`. Tensors are Arrow's fixed-shape tensors, so that any
reader of Parquet can use them.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor

from ddil_ray.data.images import ImageData
from ddil_ray.errors import DataError
from ddil_ray.places import check_links, is_below
from ddil_ray.prompts import Embeddings

__all__ = [
    "INDEX",
    "NEGATIVE_FILE",
    "Index",
    "PreparedPrompts",
    "load_prepared",
    "prompts_table",
    "read_index",
    "tensor_column",
    "write_index",
]

INDEX = "dataset.json"
NEGATIVE_FILE = "negative.parquet"
_READERS = 8
"""Threads that read embeddings, a file each: they wait for storage, and decode outside Python's lock."""


def _below(name: str) -> str:
    if not is_below(name):
        raise ValueError(f"must lead below the folder, but is {name!r}")
    return name


_Name = Annotated[str, AfterValidator(_below)]


class Index(BaseModel):
    """The content of dataset.json."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    teacher: str
    """The model whose autoencoder and text encoders were used."""
    family: str
    conditions: Literal["prompts", "classes"]
    latent_channels: int
    buckets: dict[_Name, int] = {}
    """Rows by bucket."""
    latent_shapes: dict[str, tuple[int, int, int]] = {}
    """(C, H, W) of each bucket's latents."""
    prompts: int = 0
    """Number of distinct prompts."""
    prompt_files: list[tuple[_Name, int]] = []
    """File and number of its prompts, in the order of ids."""
    embeddings: list[str] = []
    """Names of the embedding columns."""
    skipped: int = 0
    """Rows of the source that were left out; skipped.jsonl lists them."""


def write_index(url: str, index: Index) -> None:
    """Write dataset.json into the folder `url`."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{INDEX}", (index.model_dump_json(indent=2) + "\n").encode())


def read_index(url: str) -> Index:
    """The index of the prepared data at `url`.

    Raises:
        DataError: not there, or not readable.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
        return Index.model_validate(json.loads(fs.cat_file(f"{root.rstrip('/')}/{INDEX}")))
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(
            f"`data.source` must be a folder written by `ddil-ray prepare`, but {url!r} has no readable {INDEX} "
            f"({error}). Prepare it again: what is done already is kept."
        ) from None


def tensor_column(tensor: Tensor) -> pa.ExtensionArray:
    """(N, ...) as an Arrow column of fixed-shape tensors."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(tensor.numpy()))


def _tensors(table: pa.Table, name: str) -> Tensor:
    column = table[name].combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return torch.from_numpy(np.concatenate([chunk.to_numpy_ndarray() for chunk in chunks]))


def _read(fs: Any, path: str, columns: list[str]) -> pa.Table:
    return pq.read_table(path, filesystem=fs, columns=columns, page_checksum_verification=True)


@dataclass(frozen=True)
class PreparedPrompts:
    """The embeddings of prepared data; an `EmbeddingSource`. Reads the row groups that the asked prompts are in."""

    url: str
    files: tuple[tuple[str, int], ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return sum(rows for _, rows in self.files)

    def rows(self, ids: Sequence[int]) -> Embeddings:
        """See `EmbeddingSource.rows`."""
        starts = [0, *itertools.accumulate(rows for _, rows in self.files)]
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, id_ in enumerate(ids):
            file = bisect.bisect_right(starts, id_) - 1
            wanted.setdefault(file, []).append((place, id_ - starts[file]))
        found: dict[int, Embeddings] = {}
        with ThreadPoolExecutor(min(_READERS, len(wanted))) as pool:
            for read in pool.map(lambda file: self._read(self.files[file][0], wanted[file]), wanted):
                found |= read
        return {name: torch.stack([found[place][name] for place in range(len(ids))]) for name in self.names}

    def negative(self) -> Embeddings:
        """Embeddings (1, ...) that stand for no negative prompt."""
        fs, root = fsspec.core.url_to_fs(self.url)
        table = _read(fs, f"{root}/{NEGATIVE_FILE}", list(self.names))
        return {name: _tensors(table, name) for name in self.names}

    def texts(self) -> list[str]:
        """All prompts, in the order of ids."""
        fs, root = fsspec.core.url_to_fs(self.url)
        tables = (_read(fs, f"{root}/{name}", ["text"]) for name, _ in self.files)
        return [text for table in tables for text in table["text"].to_pylist()]

    def _read(self, name: str, rows: list[tuple[int, int]]) -> dict[int, Embeddings]:
        """Embeddings by place, of (place, row of the file)."""
        fs, root = fsspec.core.url_to_fs(self.url)
        found = {}
        with fs.open(f"{root}/{name}", "rb") as opened:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            starts = [0, *itertools.accumulate(sizes)]
            groups = {row: bisect.bisect_right(starts, row) - 1 for _, row in rows}
            for group in sorted(set(groups.values())):
                table = file.read_row_group(group, columns=list(self.names))
                parts = {column: _tensors(table, column) for column in self.names}
                for place, row in rows:
                    if groups[row] == group:
                        found[place] = {column: part[row - starts[group]] for column, part in parts.items()}
        return found


def load_prepared(source: str, *, bucket: str | None) -> ImageData:
    """Read prepared data: the latents of one bucket, the fullest by default, and where the prompts are.

    Raises:
        DataError: unreadable, or no such bucket.
    """
    index = read_index(source)
    if "://" not in source:
        source = str(Path(source).resolve())  # read by other processes too, in working directories of their own
    prompts = None
    if index.conditions == "prompts":
        prompts = PreparedPrompts(source, tuple(index.prompt_files), tuple(index.embeddings))
    if not index.buckets:
        assert prompts is not None
        empty = torch.zeros(0, index.latent_channels, 1, 1)
        return ImageData(empty, torch.arange(len(prompts)), source, prompts=prompts, prepared_for=index.family)
    chosen = bucket or max(index.buckets, key=lambda name: index.buckets[name])
    if chosen not in index.buckets:
        have = ", ".join(f"{name} ({rows} images)" for name, rows in index.buckets.items())
        raise DataError(f"`data.bucket` must be one of {have}, but is {chosen!r} instead.")
    latents, cond = _read_latents(source, chosen)
    if len(latents) != index.buckets[chosen]:
        raise DataError(
            f"`data.source` must hold the {index.buckets[chosen]} rows of bucket {chosen} that its {INDEX} tells of, "
            f"but {source} holds {len(latents)}: files were lost or added. Prepare it again in a new `output`."
        )
    return ImageData(latents, cond, f"{source} ({chosen})", prompts=prompts, prepared_for=index.family)


def _read_latents(source: str, bucket: str) -> tuple[Tensor, Tensor]:
    fs, root = fsspec.core.url_to_fs(source)
    folder = f"{root.rstrip('/')}/latents/{bucket}"
    try:
        files = sorted(path for path in fs.find(folder) if path.endswith(".parquet"))
        check_links(fs, root, files)
        tables = [_read(fs, path, ["cond", "latent"]) for path in files]
        latents = torch.cat([_tensors(table, "latent") for table in tables if table.num_rows])
        cond = np.concatenate([table["cond"].to_numpy() for table in tables])
    except Exception as error:  # Arrow's, or the filesystem's own
        raise DataError(
            f"`data.source` must hold whole Parquet files, but {folder} cannot be read ({error}). Prepare it again."
        ) from None
    return latents.float(), torch.from_numpy(cond.astype(np.int64))


def prompts_table(texts: Sequence[str], embeddings: Mapping[str, Tensor]) -> pa.Table:
    """The rows of a file of `prompts`."""
    columns: dict[str, Any] = {"text": pa.array(texts, pa.string())}
    return pa.table(columns | {name: tensor_column(part) for name, part in embeddings.items()})
