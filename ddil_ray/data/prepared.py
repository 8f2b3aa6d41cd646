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
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ddil_ray.data.footers import IDS, TENSORS, TEXTS, Footer, check_column, read_footers, unreadable
from ddil_ray.data.images import MOST_CLASSES, ImageData
from ddil_ray.errors import DataError, first_line
from ddil_ray.places import check_links, is_below
from ddil_ray.prompts import Embeddings
from ddil_ray.storage import open_url

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
_Rows = Annotated[int, Field(ge=0, le=2**40)]
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
    latent_channels: Annotated[int, Field(ge=1, le=2**16)]
    buckets: dict[_Name, _Rows] = {}
    """Rows by bucket."""
    latent_shapes: dict[str, tuple[int, int, int]] = {}
    """(C, H, W) of each bucket's latents."""
    digests: dict[str, str] = {}
    """SHA-256 of files of latents, by their names."""
    prompts: _Rows = 0
    """Number of distinct prompts."""
    prompt_files: list[tuple[_Name, _Rows]] = []
    """File and number of its prompts, in the order of ids."""
    embeddings: list[str] = []
    """Names of the embedding columns."""
    skipped: _Rows = 0
    """Rows of the source that were left out; skipped.jsonl lists them."""


def write_index(url: str, index: Index) -> None:
    """Write dataset.json into the folder `url`."""
    fs, root = open_url(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{INDEX}", (index.model_dump_json(indent=2) + "\n").encode())


def read_index(url: str) -> Index:
    """The index of the prepared data at `url`.

    Raises:
        DataError: not there, or not readable.
    """
    try:
        fs, root = open_url(url)
        check_links(fs, root, [f"{root.rstrip('/')}/{INDEX}"])
        return Index.model_validate(json.loads(fs.cat_file(f"{root.rstrip('/')}/{INDEX}")))
    except DataError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc'])) or 'all'}: {first['msg']}"
    except Exception as error:  # every filesystem has errors of its own
        found = first_line(error)
    raise DataError(
        f"`data.source` must be a folder written by `ddil-ray prepare`, but {url!r} has no readable {INDEX} ({found}). "
        "Prepare it again: what is done already is kept."
    )


def tensor_column(tensor: Tensor) -> pa.ExtensionArray:
    """(N, ...) as an Arrow column of fixed-shape tensors."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(tensor.numpy()))


def _tensors(table: pa.Table, name: str, file: str) -> Tensor:
    """(N, ...) of a column of tensors."""
    try:
        return torch.from_numpy(np.concatenate([chunk.to_numpy_ndarray() for chunk in table[name].chunks]))
    except Exception as error:  # what Arrow meets in values that a broken file has
        raise unreadable(file, error) from None


def _read(fs: Any, path: str, columns: list[str], *, digest: str | None = None) -> pa.Table:
    """Columns of a file, which has the `digest` if it is known: checksums of pages do not cover their headers."""
    try:
        if digest is None:
            with fs.open(path, "rb") as file:
                return pq.read_table(file, columns=columns, page_checksum_verification=True)
        content = fs.cat_file(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"its bytes are not those that were written, whose digest is in {INDEX}")
        return pq.read_table(pa.BufferReader(content), columns=columns, page_checksum_verification=True)
    except Exception as error:  # Arrow's, the filesystem's own, or ours
        raise unreadable(path, error) from None


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
        """Embeddings (1, ...) that stand for no negative prompt.

        Raises:
            DataError: unreadable, or of another shape than prompts are.
        """
        fs, root = open_url(self.url)
        check_links(fs, root, [f"{root}/{NEGATIVE_FILE}"])
        (footer,) = read_footers(fs, {f"{root}/{NEGATIVE_FILE}": f"{self.url}/{NEGATIVE_FILE}"})
        for name in self.names:
            check_column([footer], name, "data.source", TENSORS)
        table = _read(fs, f"{root}/{NEGATIVE_FILE}", list(self.names))
        return {name: _finite(_tensors(table, name, footer.name), name, footer.name) for name in self.names}

    def texts(self) -> list[str]:
        """All prompts, in the order of ids."""
        fs, root = open_url(self.url)
        tables = (_read(fs, f"{root}/{name}", ["text"]) for name, _ in self.files)
        return [text for table in tables for text in table["text"].to_pylist()]

    def _read(self, name: str, rows: list[tuple[int, int]]) -> dict[int, Embeddings]:
        """Embeddings by place, of (place, row of the file)."""
        fs, root = open_url(self.url)
        try:
            with fs.open(f"{root}/{name}", "rb") as opened:
                return self._rows_of(pq.ParquetFile(opened, page_checksum_verification=True), name, rows)
        except DataError:
            raise
        except Exception as error:  # Arrow's, or the filesystem's own
            raise unreadable(f"{self.url}/{name}", error) from None

    def _rows_of(self, file: pq.ParquetFile, name: str, rows: list[tuple[int, int]]) -> dict[int, Embeddings]:
        found = {}
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        starts = [0, *itertools.accumulate(sizes)]
        groups = {row: bisect.bisect_right(starts, row) - 1 for _, row in rows}
        for group in sorted(set(groups.values())):
            table = file.read_row_group(group, columns=list(self.names))
            parts = {column: _finite(_tensors(table, column, name), column, name) for column in self.names}
            for place, row in rows:
                if groups[row] == group:
                    found[place] = {column: part[row - starts[group]] for column, part in parts.items()}
        return found


def _finite(tensor: Tensor, column: str, name: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise DataError(
            f"`data.source` must hold finite values, but column {column!r} of {name} has NaN or infinity. Prepare it "
            "again in a new `output`, with `dtype=fp32` if values overflowed."
        )
    return tensor


def load_prepared(source: str, *, bucket: str | None) -> ImageData:
    """Read prepared data: the latents of one bucket, the fullest by default, and where the prompts are.

    Raises:
        DataError: unreadable, or no such bucket.
    """
    index = read_index(source)
    if "://" not in source:
        source = str(Path(source).resolve())  # read by other processes too, in working directories of their own
    prompts = _prompts(source, index) if index.conditions == "prompts" else None
    if not index.buckets:
        if prompts is None:
            raise DataError(
                f"`data.source` must hold latents or prompts, but {INDEX} of {source} tells of neither. Prepare it "
                "again."
            )
        empty = torch.zeros(0, index.latent_channels, 1, 1)
        return ImageData(empty, torch.arange(len(prompts)), source, prompts=prompts, prepared_for=index.family)
    chosen = bucket or max(index.buckets, key=lambda name: index.buckets[name])
    if chosen not in index.buckets:
        have = ", ".join(f"{name} ({rows} images)" for name, rows in index.buckets.items())
        raise DataError(f"`data.bucket` must be one of {have}, but is {chosen!r} instead. Choose one of them.")
    latents, cond = _read_latents(source, chosen, index)
    return ImageData(latents, cond, f"{source} ({chosen})", prompts=prompts, prepared_for=index.family)


def _prompts(source: str, index: Index) -> PreparedPrompts:
    """The prompts of `index`, after the footers of all their files have been checked."""
    fs, root = open_url(source)
    names = [name for name, _ in index.prompt_files]
    check_links(fs, root, [f"{root}/{name}" for name in names])
    footers = read_footers(fs, {f"{root}/{name}": f"{source}/{name}" for name in names})
    rows = [footer.rows for footer in footers]
    if rows != [rows for _, rows in index.prompt_files] or sum(rows) != index.prompts or not rows:
        raise _other_rows(f"{index.prompts} prompts in {len(names)} files", source, f"{sum(rows)}")
    if not index.embeddings:
        raise DataError(
            f"`data.source` must hold embeddings of its prompts, but {INDEX} of {source} names none. Prepare it again."
        )
    check_column(footers, "text", "data.source", TEXTS)
    for name in index.embeddings:
        check_column(footers, name, "data.source", TENSORS)
    return PreparedPrompts(source, tuple(index.prompt_files), tuple(index.embeddings))


def _other_rows(told: str, source: str, found: str) -> DataError:
    return DataError(
        f"`data.source` must hold the {told} that its {INDEX} tells of, but {source} holds {found}: files were lost, "
        "added or written over. Prepare it again in a new `output`."
    )


def _read_latents(source: str, bucket: str, index: Index) -> tuple[Tensor, Tensor]:
    """Latents and conditions of `bucket`: the footers of all its files are checked, then all values."""
    fs, root = open_url(source)
    footers = _latent_footers(fs, root.rstrip("/"), bucket)
    rows = sum(footer.rows for footer in footers)
    if rows != index.buckets[bucket] or not rows:
        raise _other_rows(f"{index.buckets[bucket]} rows of bucket {bucket}", source, str(rows))
    check_column(footers, "cond", "data.source", IDS)
    check_column(footers, "latent", "data.source", TENSORS)
    shape, told = tuple(footers[0].schema.field("latent").type.shape), index.latent_shapes.get(bucket)
    if shape != told:
        raise DataError(
            f"`data.source` must hold latents of the shape that its {INDEX} tells of, {told}, but those of {bucket} in "
            f"{source} are {shape}. Prepare it again in a new `output`."
        )
    conditions, most = [], index.prompts if index.conditions == "prompts" else MOST_CLASSES
    latents = torch.empty(rows, *shape)
    start = 0
    for footer in footers:
        name = footer.name.removeprefix(f"{root.rstrip('/')}/")
        table = _read(fs, footer.name, ["cond", "latent"], digest=index.digests.get(name))
        latents[start : start + len(table)] = _finite(_tensors(table, "latent", footer.name), "latent", footer.name)
        conditions.append(_conditions(table, most, footer.name))
        start += len(table)
    return latents, torch.cat(conditions)


def _latent_footers(fs: Any, root: str, bucket: str) -> list[Footer]:
    """Of the files of `bucket` that have rows."""
    folder = f"{root}/latents/{bucket}"
    try:
        files = sorted(path for path in fs.find(folder) if path.endswith(".parquet"))
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(
            f"`data.source` must be readable, but {folder} failed: {first_line(error)}. Check the address and the "
            "credentials."
        ) from None
    check_links(fs, root, files)
    return [footer for footer in read_footers(fs, {path: path for path in files}) if footer.rows]


def _conditions(table: pa.Table, most: int, name: str) -> Tensor:
    values = table["cond"].to_pylist()
    wrong = next((value for value in values if value is None or not 0 <= value < most), None)
    if wrong is not None or None in values:
        raise DataError(
            f"`data.source` must hold conditions from 0 to {most - 1}, but {name} has {wrong!r} in its column 'cond'. "
            "Prepare it again in a new `output`."
        )
    return torch.tensor(values, dtype=torch.int64)


def prompts_table(texts: Sequence[str], embeddings: Mapping[str, Tensor]) -> pa.Table:
    """The rows of a file of `prompts`."""
    columns: dict[str, Any] = {"text": pa.array(texts, pa.string())}
    return pa.table(columns | {name: tensor_column(part) for name, part in embeddings.items()})
