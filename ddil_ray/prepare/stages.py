"""The three kinds of work: looking through a shard, encoding prompts, encoding an item's images.

Each takes a request, writes files of names that the request alone decides, and returns counts. A request done twice
leaves what it left the first time, so whoever repeats it does no harm.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from ddil_ray.data.pixels import picture_tensor
from ddil_ray.data.prepared import NEGATIVE_FILE, prompts_table, tensor_column
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.models import find_pipeline
from ddil_ray.prepare.buckets import Bucket, cut_to, nearest
from ddil_ray.prepare.job import Job
from ddil_ray.prepare.pictures import read_picture
from ddil_ray.prepare.rows import Missing, Row, Shard, rows_of, table_of
from ddil_ray.prepare.store import NewParquet

__all__ = ["ImageStage", "ItemRequest", "PromptRequest", "PromptStage", "ScanStage", "ShardRequest"]

T = TypeVar("T")

_READERS = 8
"""Threads that read and decode: they wait for storage more than they compute."""
_ROW_GROUP_BYTES = 2**20
"""Of embeddings: what is read to get at one of them. With smaller groups, finding one takes longer than reading it."""


class ShardRequest(NamedTuple):
    """Look through a shard."""

    number: int
    shard: Shard


class PromptRequest(NamedTuple):
    """Encode the prompts of one file."""

    number: int
    texts: list[str]


class ItemRequest(NamedTuple):
    """Encode the images of an item."""

    name: str
    shard: Shard
    conditions: list[int]
    """Prompt or class ids of its first rows; the others are left alone."""


class ScanStage:
    """Cuts a shard into items, and notes its rows without a condition. Returns its number and that of its rows."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job = job

    def __call__(self, request: ShardRequest) -> tuple[int, int]:
        """Write work/rows/<item>.parquet of all its items, then work/scanned/<shard>.json."""
        items: list[tuple[str, int]] = []
        missing: list[Missing] = []

        def rows() -> Iterator[Row]:
            for row in self._job.reader.scan(request.shard):
                if isinstance(row, Missing):
                    missing.append(row)
                else:
                    yield row

        for part in _batches(rows(), self._job.config.rows_per_file):
            name = f"{request.number:05}-{len(items):05}"
            with self._job.store.new_parquet(f"work/rows/{name}.parquet") as file:
                file.write(table_of(part))
            items.append((name, len(part)))
        self._job.store.write_json(f"work/scanned/{request.number:05}.json", {"items": items, "missing": missing})
        return request.number, sum(rows for _, rows in items)


class PromptStage:
    """Encodes prompts. Returns their number."""

    def __init__(self, job: Job, device: torch.device) -> None:
        family, folder = find_pipeline(job.config.teacher.model)
        self._job, self._encoder = job, family.text_encoder(folder, device)

    def __call__(self, request: PromptRequest) -> int:
        """Write prompts/<number>.parquet; before the first also what pipelines take for no negative prompt."""
        assert self._encoder is not None
        if request.number == 0:
            with self._job.store.new_parquet(NEGATIVE_FILE) as file:
                file.write(prompts_table([""], self._encoder.negative(None)))
        with self._job.store.new_parquet(f"prompts/{request.number:05}.parquet") as file:
            for texts in _batches(request.texts, self._job.config.encode_prompts.batch_size):
                embeddings = {name: part.to(self._job.dtype) for name, part in self._encoder(texts).items()}
                if not all(bool(part.isfinite().all()) for part in embeddings.values()):
                    raise ConfigError(
                        f"`dtype` must hold the embeddings of all prompts, but {self._job.config.dtype} overflows for "
                        f"one of {texts[0]!r} and the {len(texts) - 1} after it. Set `dtype=fp32`, with a new `output`."
                    )
                bytes_each = sum(part[0].numel() * part.element_size() for part in embeddings.values())
                file.write(prompts_table(texts, embeddings), max(1, _ROW_GROUP_BYTES // bytes_each))
        return len(request.texts)


class _Ready(NamedTuple):
    """An image to be encoded, and what its row will say of it."""

    pixels: Tensor
    about: dict[str, Any]


class ImageStage:
    """Reads, cuts and encodes images. Returns the number of rows gone through, and of those left out."""

    def __init__(self, job: Job, device: torch.device) -> None:
        family, folder = find_pipeline(job.config.teacher.model)
        codec = family.codec(folder)
        assert codec is not None
        self._job, self._codec = job, codec.to(device)
        self._threads = ThreadPoolExecutor(_READERS)

    def __call__(self, request: ItemRequest) -> tuple[int, int]:
        """Write latents/<bucket>/<item>.parquet of every bucket it has rows for, then work/done/<item>.json."""
        store = self._job.store
        rows = rows_of(store.read_table(f"work/rows/{request.name}.parquet"))[: len(request.conditions)]
        files: dict[Bucket, NewParquet] = {}
        skipped: list[Missing] = []
        with ExitStack() as opened:
            for bucket, batch in self._by_bucket(request, rows, skipped):
                table = self._encoded(batch, skipped)
                if table is None:
                    continue
                if bucket not in files:
                    new = store.new_parquet(f"latents/{bucket.name}/{request.name}.parquet")
                    files[bucket] = opened.enter_context(new)
                files[bucket].write(table)
        counts = {bucket.name: file.rows for bucket, file in files.items()}
        digests = {f"latents/{bucket.name}/{request.name}.parquet": file.digest for bucket, file in files.items()}
        store.write_json(f"work/done/{request.name}.json", {"buckets": counts, "skipped": skipped, "digests": digests})
        return len(rows), len(skipped)

    def _by_bucket(
        self, request: ItemRequest, rows: Sequence[Row], skipped: list[Missing]
    ) -> Iterator[tuple[Bucket, list[_Ready]]]:
        """Images in batches of one bucket each; those that cannot be read are `skipped`."""
        size = self._job.config.encode_images.batch_size
        waiting: dict[Bucket, list[_Ready]] = {}
        contents = self._job.reader.contents(request.shard, rows)
        of_rows = zip(rows, request.conditions, contents, strict=True)
        tasks = (partial(self._ready, request.shard, *of_row) for of_row in of_rows)
        for found in _ahead(self._threads, tasks, 2 * size):
            if isinstance(found, Missing):
                skipped.append(found)
                continue
            bucket, ready = found
            waiting.setdefault(bucket, []).append(ready)
            if len(waiting[bucket]) == size:
                yield bucket, waiting.pop(bucket)
        yield from waiting.items()

    def _ready(
        self, shard: Shard, row: Row, condition: int, read: Callable[[], Any]
    ) -> tuple[Bucket, _Ready] | Missing:
        try:
            content = read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError) as error:
            self._job.reader.check_there(shard)
            return Missing(row.name, f"cannot be read: {first_line(error)}")
        try:
            column = self._job.config.data.image_column
            picture = read_picture(content, name=row.name, column=column, grey=self._job.grey)
        except Exception as error:  # whatever a decoder meets in a broken file
            return Missing(row.name, first_line(error))
        bucket = nearest(self._job.buckets, picture.height, picture.width)
        cut = cut_to(picture, bucket, center=self._job.config.center_crop, name=row.name)
        about = {
            "cond": condition,
            "source": row.name,
            "original_height": picture.height,
            "original_width": picture.width,
            "crop_top": cut.top,
            "crop_left": cut.left,
        }
        return bucket, _Ready(picture_tensor(cut.picture), about)

    def _encoded(self, batch: list[_Ready], skipped: list[Missing]) -> pa.Table | None:
        """The rows of a batch, but for those whose latents are not finite; None if there are no others."""
        latents = self._codec.encode(torch.stack([ready.pixels for ready in batch])).to(self._job.dtype).cpu()
        finite = latents.isfinite().flatten(1).all(1)
        reason = f"latents are not finite in {self._job.config.dtype}"
        skipped += [Missing(r.about["source"], reason) for r, good in zip(batch, finite, strict=True) if not good]
        if not finite.any():
            return None
        abouts = [ready.about for ready, good in zip(batch, finite, strict=True) if good]
        columns = {name: pa.array([about[name] for about in abouts], kind) for name, kind in _KINDS.items()}
        return pa.table({"latent": tensor_column(latents[finite]), **columns})


_KINDS = {
    "cond": pa.int64(),
    "source": pa.string(),
    "original_height": pa.int32(),
    "original_width": pa.int32(),
    "crop_top": pa.int32(),
    "crop_left": pa.int32(),
}


def _batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """`rows` in lists of `size`, the last one shorter."""
    left = iter(rows)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _ahead(threads: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """What `tasks` return, in their order, while threads do up to `ahead` of the next."""
    begun: deque[Future[T]] = deque()
    for task in tasks:
        begun.append(threads.submit(task))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
