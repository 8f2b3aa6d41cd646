"""The course of a preparation: listing, prompts, images, and the index at the end.

Exactly once, whatever is killed: the work is cut into requests whose files have names of their own and appear whole
(`store`, `stages`). Done is what has its file; the rest is done, or done again over what there is of it. So actors
write their files themselves and hand back counts, and nothing that Ray repeats or loses can double or drop a row.
(`Dataset.write_parquet` names files by the run, and leaves those of a killed one.)

Ids of prompts are their first appearance over all items, in order, and items are kept from the first time on, so that
they are the same in every rerun.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ddil_ray.data.prepared import INDEX, Index, read_index
from ddil_ray.errors import ConfigError, DataError, first_line
from ddil_ray.prepare.job import Job
from ddil_ray.prepare.rows import Shard
from ddil_ray.prepare.stages import ItemRequest, PromptRequest, ShardRequest
from ddil_ray.redact import redact
from ddil_ray.tracking import View

__all__ = ["Execute", "Summary", "begin", "fill", "summary"]

T = TypeVar("T")

SETTINGS, SKIPPED = "settings.json", "skipped.jsonl"
_READERS = 16
"""Threads that read small files."""


class Execute(Protocol):
    """Who does requests: Ray's actors, or this process."""

    def __call__(self, stage: str, requests: Sequence[Any]) -> Iterator[Any]:
        """What the `stage` (a class of `stages`) returns for each request, as they are done."""


class Summary(NamedTuple):
    """What has been prepared."""

    output: str
    buckets: dict[str, int]
    """Images by bucket."""
    prompts: int
    skipped: int
    images_per_s: float | None
    """Of this call, None where it had no image to encode."""


class Item(NamedTuple):
    """A part of a shard."""

    name: str
    shard: Shard
    rows: int


def begin(job: Job) -> bool:
    """Open the output, and tell whether it is complete already.

    Raises:
        ConfigError: it cannot be written, or holds something else.
    """
    store = job.store
    try:
        begun = store.read_json(SETTINGS) if store.exists(SETTINGS) else None
        foreign = begun is None and store.holds_others()
        if begun is None and not foreign:
            store.write_json(SETTINGS, job.content)
    except Exception as error:  # every filesystem has errors of its own
        raise ConfigError(
            f"`output` must be a folder or URL that can be written, but {store.url!r} failed: {first_line(error)}. "
            "Check the address, the disk and the credentials."
        ) from error
    if foreign:
        raise ConfigError(
            f"`output` must be empty or begun by `ddil-ray prepare`, but {store.url} holds other files. Choose another "
            "`output`."
        )
    if begun is not None:
        _check_same(store.url, begun, json.loads(json.dumps(job.content)))
    return store.exists(INDEX)


def _check_same(url: str, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = [key for key in sorted({*begun, *asked}) if begun.get(key) != asked.get(key)]
    if changed:
        listed = "; ".join(f"{key} was {_short(begun.get(key))} and is {_short(asked.get(key))}" for key in changed)
        raise ConfigError(
            f"`output` must be new for other settings, but {url} was begun with others: {listed}. Choose another "
            "`output`, or delete that one."
        )


def _short(value: Any) -> str:
    return f"{len(value)} files or other ones" if isinstance(value, list) else repr(value)


def summary(job: Job, images_per_s: float | None = None) -> Summary:
    """Of an output that is complete."""
    index = read_index(job.store.url)
    return Summary(job.store.url, index.buckets, index.prompts, index.skipped, images_per_s)


def fill(job: Job, execute: Execute, view: View) -> Summary:
    """Do all that is missing of `job`.

    Raises:
        DataError: nothing in the source could be prepared.
        RunFailedError: a request failed; the next call goes on.
    """
    return _Filling(job, execute, view).run()


class _Filling:
    def __init__(self, job: Job, execute: Execute, view: View) -> None:
        self._job, self._execute, self._view, self._store = job, execute, view, job.store

    def run(self) -> Summary:
        items, missing = self._items(self._scan())
        if not items:
            raise self._nothing(missing)
        conditions, texts = self._conditions(items)
        if self._job.prompted:
            self._encode_prompts(texts)
        speed, skipped = None, missing
        buckets: dict[str, int] = {}
        digests: dict[str, str] = {}
        if self._job.reader.images:
            speed = self._encode_images(items, conditions)
            buckets, digests, failed = self._outcome(items)
            skipped = missing + failed
        self._finish(texts, buckets, digests, skipped)
        return summary(self._job, speed)

    def _scan(self) -> list[dict[str, Any]]:
        """What was found in each shard, or in as many of the first as have `limit` rows."""
        found = self._scans(sorted(int(stem) for stem in self._store.stems("work/scanned")))
        rows = {n: sum(count for _, count in scan["items"]) for n, scan in found.items()}
        requests = [ShardRequest(n, shard) for n, shard in enumerate(self._job.shards) if n not in found]
        progress = _Progress(self._view, "looking through", len(self._job.shards), len(found))
        if requests and not self._enough(rows):
            for number, count in self._execute("ScanStage", requests):
                rows[number] = count
                progress.add(1, "shards", f"{sum(rows.values())} rows")
                if self._enough(rows):
                    break
        found |= self._scans([n for n in rows if n not in found])
        return [found[n] for n in _first(found)]

    def _enough(self, rows: dict[int, int]) -> bool:
        """Whether the first shards, those before the first that has not been looked through, have `limit` rows."""
        limit = self._job.config.limit
        return limit is not None and sum(rows[n] for n in _first(rows)) >= limit

    def _scans(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The content of work/scanned/, by numbers of shards."""
        names = [f"work/scanned/{n:05}.json" for n in numbers]
        return dict(zip(numbers, _together(self._store.read_json, names), strict=True))

    def _items(self, scans: Sequence[dict[str, Any]]) -> tuple[list[Item], list[list[str]]]:
        """All items up to the limit, and the rows [name, reason] of their shards that have no condition."""
        items: list[Item] = []
        missing: list[list[str]] = []
        left = self._job.config.limit or math.inf
        for shard, scan in zip(self._job.shards, scans, strict=False):
            if left <= 0:
                break
            missing += scan["missing"]
            for name, rows in scan["items"]:
                if left > 0:
                    items.append(Item(name, shard, int(min(rows, left))))
                    left -= rows
        return items, missing

    def _conditions(self, items: list[Item]) -> tuple[NDArray[np.int64], pa.Array]:
        """Prompt or class ids of all rows, and the distinct prompts in the order of their ids."""
        names = [f"work/rows/{item.name}.parquet" for item in items]
        tables = _together(lambda name: self._store.read_table(name, ["condition"]), names)
        chunks = [table["condition"].slice(0, item.rows) for item, table in zip(items, tables, strict=True)]
        column = pa.chunked_array([chunk for part in chunks for chunk in part.chunks])
        if not self._job.prompted:
            return column.to_numpy(), pa.array([], pa.string())
        encoded = column.dictionary_encode().combine_chunks()
        return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary

    def _encode_prompts(self, texts: pa.Array) -> None:
        done, size = self._store.stems("prompts"), self._job.config.rows_per_file
        missing = [n for n in range(-(-len(texts) // size)) if f"{n:05}" not in done]
        requests = [PromptRequest(n, texts.slice(n * size, size).to_pylist()) for n in missing]
        left = sum(len(request.texts) for request in requests)
        progress = _Progress(self._view, "prompts", len(texts), len(texts) - left)
        for count in self._execute("PromptStage", requests) if requests else ():
            progress.add(count, "prompts")

    def _encode_images(self, items: list[Item], conditions: NDArray[np.int64]) -> float | None:
        """Images per second; None where all were encoded before."""
        done = self._store.stems("work/done")
        self._store.tidy(done)
        starts = itertools.accumulate((item.rows for item in items), initial=0)
        requests = [
            ItemRequest(item.name, item.shard, conditions[start : start + item.rows].tolist())
            for item, start in zip(items, starts, strict=False)
            if item.name not in done
        ]
        left = sum(len(request.conditions) for request in requests)
        progress, skipped = _Progress(self._view, "images", len(conditions), len(conditions) - left), 0
        for rows, failed in self._execute("ImageStage", requests) if requests else ():
            skipped += failed
            progress.add(rows, "images", f"{skipped} skipped" if skipped else "")
        return progress.speed if requests else None

    def _outcome(self, items: list[Item]) -> tuple[dict[str, int], dict[str, str], list[list[str]]]:
        """Images by bucket, digests of files, and the rows [name, reason] that could not be encoded.

        Raises:
            DataError: no image could be.
        """
        buckets: dict[str, int] = {}
        digests: dict[str, str] = {}
        skipped: list[list[str]] = []
        for done in _together(self._store.read_json, [f"work/done/{item.name}.json" for item in items]):
            skipped += done["skipped"]
            digests |= done.get("digests", {})
            for name, rows in done["buckets"].items():
                buckets[name] = buckets.get(name, 0) + rows
        buckets = {name: rows for name, rows in sorted(buckets.items()) if rows}
        if not buckets:
            raise self._nothing(skipped)
        return buckets, digests, skipped

    def _finish(
        self, texts: pa.Array, buckets: dict[str, int], digests: dict[str, str], skipped: list[list[str]]
    ) -> None:
        """Write skipped.jsonl, then dataset.json."""
        job, size = self._job, self._job.config.rows_per_file
        lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in skipped]
        self._store.write_text(SKIPPED, "".join(lines))
        files = [(f"prompts/{n:05}.parquet", min(size, len(texts) - n * size)) for n in range(-(-len(texts) // size))]
        index = Index(
            teacher=redact(job.config.teacher.model),
            family=job.family,
            conditions="prompts" if job.prompted else "classes",
            latent_channels=job.channels,
            buckets=buckets,
            latent_shapes={bucket.name: job.latent_shape(bucket) for bucket in job.buckets if bucket.name in buckets},
            digests=digests,
            prompts=len(texts),
            prompt_files=files,
            embeddings=[name for name in self._store.columns(files[0][0]) if name != "text"] if files else [],
            skipped=len(skipped),
        )
        self._store.write_text(INDEX, index.model_dump_json(indent=2) + "\n")

    def _nothing(self, skipped: list[list[str]]) -> DataError:
        first = f" The first is {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        return DataError(
            f"`data.source` must hold a row that can be prepared, but of {self._job.reader.source} all {len(skipped)} "
            f"were left out.{first}"
        )


class _Progress:
    """Tells how far some work is, how fast, and how long it will take."""

    def __init__(self, view: View, what: str, total: int, done: int) -> None:
        self._view, self._what, self._total, self._before, self._done = view, what, total, done, done
        self._started = time.monotonic()
        self._first = (self._started, done)

    @property
    def speed(self) -> float:
        """Per second since the first result, which processes had to start for; or since the start if it is the last."""
        started, before = self._first if self._done > self._first[1] else (self._started, self._before)
        return (self._done - before) / max(time.monotonic() - started, 1e-9)

    def add(self, count: int, unit: str, *facts: str) -> None:
        """`count` more are done."""
        self._done += count
        if self._first[1] == self._before:
            self._first = (time.monotonic(), self._done)
        left = timedelta(seconds=math.ceil((self._total - self._done) / max(self.speed, 1e-9)))
        more = [f"{self.speed:.0f} {unit}/s", f"{left} left", *filter(None, facts)]
        self._view.progress(self._what, self._done, self._total, "  ".join(more))


def _first(numbers: Container[int]) -> list[int]:
    """0, 1, 2, ... up to the first that is not among `numbers`."""
    return list(itertools.takewhile(numbers.__contains__, itertools.count()))


def _together(read: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """What `read` gives for each of `names`, in their order."""
    with ThreadPoolExecutor(_READERS) as threads:
        yield from threads.map(read, names)
