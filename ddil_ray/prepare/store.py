"""The output folder while it is filled: files there are whole, or not there.

```
settings.json                 what is prepared (`Job.content`); another preparation is refused here
work/scanned/<shard>.json     a shard of the source has been looked through: its items, and rows without a condition
work/rows/<item>.parquet      an item: rows of the source, at most `rows_per_file`
work/done/<item>.json         an item has been encoded: rows by bucket, and those that could not be
prompts/<number>.parquet      see `ddil_ray.data.prepared`
latents/<bucket>/<item>.parquet
skipped.jsonl                 rows that were left out, and why
dataset.json                  written last
```
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ddil_ray.storage import make_folder, open_url

__all__ = ["NewParquet", "Store"]

_TEMPORARY = ".ddil-ray-"
"""What names of unfinished files begin with."""


class NewParquet:
    """A Parquet file in the making; it has the schema of the first table written."""

    def __init__(self, path: str) -> None:
        self._path, self.rows = path, 0
        self.digest = ""
        """SHA-256 of the whole file, once it is closed."""
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table, group: int | None = None) -> None:
        """Append `table`, in row groups of `group` rows or as one."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, use_dictionary=False, write_page_checksum=True)
        self._writer.write_table(table, row_group_size=group)
        self.rows += len(table)

    def close(self) -> None:
        """Write the end of the file."""
        if self._writer is not None:
            self._writer.close()
            self.digest = hashlib.sha256(Path(self._path).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Store:
    """The folder `url`: a path or an fsspec URL. Small, and sent to every process."""

    url: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        fs, root = open_url(self.url)
        return fs, root.rstrip("/")

    @property
    def fs(self) -> Any:
        """The filesystem."""
        return self._place[0]

    @property
    def root(self) -> str:
        """The folder on it."""
        return self._place[1]

    def path(self, name: str) -> str:
        """Where the file `name` lies on the filesystem."""
        return f"{self._place[1]}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self.fs.exists(self.path(name)))

    def stems(self, folder: str) -> set[str]:
        """Names, without suffix, of the files that are in `folder` now."""
        self.fs.invalidate_cache()  # other processes write here
        found = self.fs.find(self.path(folder)) if self.fs.exists(self.path(folder)) else []
        return {_stem(path) for path in found if not _name(path).startswith(_TEMPORARY)}

    def read_json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads(self.fs.cat_file(self.path(name)))

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with self._new(name) as path:
            Path(path).write_text(text, encoding="utf-8")

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The content of a Parquet file."""
        return pq.read_table(self.path(name), filesystem=self.fs, columns=columns, page_checksum_verification=True)

    def columns(self, name: str) -> list[str]:
        """Names of the columns of a Parquet file."""
        with self.fs.open(self.path(name), "rb") as file:
            return list(pq.read_schema(file).names)

    @contextmanager
    def new_parquet(self, name: str) -> Iterator[NewParquet]:
        """A file to write to, which is there once this is left without an error."""
        with self._new(name) as path:
            file = NewParquet(path)
            try:
                yield file
            finally:
                file.close()

    def files(self) -> list[str]:
        """Paths of all files that are here now."""
        self.fs.invalidate_cache()
        return list(self.fs.find(self.path(""))) if self.fs.exists(self.path("")) else []

    def holds_others(self) -> bool:
        """Whether there are files that this library did not begin."""
        return any(not _name(path).startswith(_TEMPORARY) for path in self.files())

    def tidy(self, items_done: set[str]) -> None:
        """Remove what a killed process left: unfinished files, and latents of items that are not done."""
        for path in self.files():
            undone = path.startswith(self.path("latents/")) and _stem(path) not in items_done
            if undone or _name(path).startswith(_TEMPORARY):
                with suppress(FileNotFoundError):
                    self.fs.rm_file(path)

    @contextmanager
    def _new(self, name: str) -> Iterator[str]:
        """A local path; what is written there becomes the file `name` at once, on leaving without an error."""
        target = self.path(name)
        make_folder(self.fs, target.rpartition("/")[0])
        local = isinstance(self.fs, LocalFileSystem)
        folder = target.rpartition("/")[0] if local else tempfile.gettempdir()
        path = Path(folder, f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            yield str(path)
            if local:
                os.replace(path, target)  # atomic within a folder
            else:
                self.fs.put_file(str(path), target)  # object stores show a file when it is whole
        finally:
            path.unlink(missing_ok=True)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return _name(path).rpartition(".")[0]
