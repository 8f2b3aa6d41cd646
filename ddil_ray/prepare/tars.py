"""WebDataset: tars whose consecutive files `key.jpg`, `key.txt`, `key.json`, `key.cls` are one row.

Images are found again by their bytes in the tar, so tars must not be compressed. Nothing is unpacked: names of members
are names of rows, whatever they say, and links and sparse files, which may read as more than there is, are passed over.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ddil_ray.data.folder import IMAGE_SUFFIXES
from ddil_ray.errors import DataError, first_line
from ddil_ray.prepare.rows import Entry, Reader, Row, Shard

__all__ = ["Tars"]

_READERS = 16
"""Threads: they wait for storage."""


class Tars(Reader):
    """The image of a row, and as fields the keys of its JSON, `txt` and `cls`."""

    format = "webdataset"

    def shards(self, files: Sequence[Shard]) -> list[Shard]:
        """See `Reader.shards`."""
        return self.ending(files, ".tar")

    def check(self, shards: Sequence[Shard]) -> None:
        """See `Reader.check`; the first header of every tar is read."""
        with ThreadPoolExecutor(_READERS) as threads:
            list(threads.map(self._check, shards))

    def _check(self, shard: Shard) -> None:
        if shard.size % tarfile.BLOCKSIZE:
            raise self._torn(shard, f"its {shard.size} bytes are no multiple of {tarfile.BLOCKSIZE}")
        try:
            head = self.fs.cat_file(self.path(shard.path), 0, tarfile.BLOCKSIZE)
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except Exception as error:  # tarfile's, or the filesystem's own
            raise self._torn(shard, first_line(error)) from None

    def _torn(self, shard: Shard, found: str) -> DataError:
        return DataError(
            f"`data.source` must hold whole tars that are not compressed, but {self.title(shard)} cannot be read "
            f"({found}). Write it again."
        )

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """See `Reader.entries`."""
        try:
            with self.fs.open(self.path(shard.path), "rb") as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
                files = (member for member in tar if member.isfile() and not member.issparse())  # holes read as bytes
                for key, members in itertools.groupby(files, key=lambda member: _split(member.name)[0]):
                    yield _entry(f"{self.title(shard)}/{key}", tar, list(members))
        except Exception as error:  # whatever tarfile meets in a torn file
            raise self._torn(shard, first_line(error)) from None

    def contents(self, shard: Shard, rows: Iterable[Row]) -> Iterator[Callable[[], Any]]:
        """See `Reader.contents`."""
        path = self.path(shard.path)
        return (partial(self.fs.cat_file, path, row.place, row.place + row.within) for row in rows)


def _split(path: str) -> tuple[str, str]:
    """Key and suffix: what is before and after the first dot of the file's name."""
    folder, slash, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")
    return folder + slash + stem, suffix.lower()


def _entry(name: str, tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Entry:
    fields: dict[str, Any] = {}
    image = None
    for member in members:
        suffix = _split(member.name)[1]
        if f".{suffix}" in IMAGE_SUFFIXES:
            image = member
        elif suffix in ("txt", "cls", "json"):
            file = tar.extractfile(member)
            text = file.read().decode("utf-8", "replace") if file else ""
            fields |= _parsed(text) if suffix == "json" else {suffix: text}
    if image is None:
        return Entry(name, fields, -1, 0)
    return Entry(name, fields, image.offset_data, image.size)


def _parsed(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # one row's fault, which then has no condition
        return {}
    return fields if isinstance(fields, dict) else {}
