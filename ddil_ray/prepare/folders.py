"""Sources that are folders of image files, and text files of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from ddil_ray.data.folder import IMAGE_SUFFIXES
from ddil_ray.errors import DataError, first_line
from ddil_ray.places import is_below
from ddil_ray.prepare.rows import Entry, Reader, Row, Shard

__all__ = ["METADATA", "ClassFolders", "MetadataFolder", "TextFiles"]

METADATA = "metadata.jsonl"
_FILE_NAME = "file_name"


class _ImageFiles(Reader):
    """Rows are named after their files."""

    def contents(self, shard: Shard, rows: Iterable[Row]) -> Iterator[Callable[[], Any]]:
        """See `Reader.contents`."""
        return (partial(self.fs.cat_file, self.path(row.name)) for row in rows)


class MetadataFolder(_ImageFiles):
    """Images in folders with a metadata.jsonl each: lines with `file_name`, below it, and a caption or class id."""

    format = f"folder with {METADATA}"

    def shards(self, files: Sequence[Shard]) -> list[Shard]:
        """See `Reader.shards`."""
        return [file for file in files if PurePosixPath(file.path).name == METADATA]

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """See `Reader.entries`."""
        for number, fields in _json_lines(self, shard):
            if not isinstance(fields.get(_FILE_NAME), str):
                raise DataError(
                    f"`data.source` must have a `{_FILE_NAME}` in each line of {METADATA}, but line {number} of "
                    f"{self.title(shard)} has {', '.join(fields) or 'nothing'} instead. Name the image's file there."
                )
            if not is_below(fields[_FILE_NAME]):
                raise DataError(
                    f"`{_FILE_NAME}` must name a file below the folder of its {METADATA}, but line {number} of "
                    f"{self.title(shard)} has {fields[_FILE_NAME]!r} instead. Move the image there."
                )
            yield Entry(str(PurePosixPath(shard.path).parent / fields[_FILE_NAME]), fields, number, 0)


class ClassFolders(_ImageFiles):
    """Images in a folder per class; class ids follow the alphabetical order of the folders' names."""

    format = "folder per class"

    def shards(self, files: Sequence[Shard]) -> list[Shard]:
        """See `Reader.shards`."""
        sizes: dict[str, int] = {}
        for path, size, _ in self.ending(files, *IMAGE_SUFFIXES):
            name, below, _ = path.partition("/")
            if not below:
                raise DataError(
                    f"`data.source` must hold images in a folder per class, or with a {METADATA}, but {path} is in "
                    "neither. Move it, or describe it there."
                )
            sizes[name] = sizes.get(name, 0) + size
        return [Shard(name, sizes[name], label) for label, name in enumerate(sorted(sizes))]

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """See `Reader.entries`."""
        paths = sorted(path for path in self.fs.find(self.path(shard.path)) if path.lower().endswith(IMAGE_SUFFIXES))
        for number, path in enumerate(paths):
            yield Entry(path[len(self.root) + 1 :], {"label": shard.label}, number, 0)


class TextFiles(Reader):
    """Prompts without images: lines of .txt files, or of .jsonl files with a caption."""

    format = "text"

    def shards(self, files: Sequence[Shard]) -> list[Shard]:
        """See `Reader.shards`."""
        return self.ending(files, ".txt", ".jsonl")

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """See `Reader.entries`."""
        plain = not self.title(shard).lower().endswith(".jsonl")
        lines = ((n, {"text": line}) for n, line in _lines(self, shard)) if plain else _json_lines(self, shard)
        for number, fields in lines:
            yield Entry(f"{self.title(shard)}:{number}", fields, number, 0)

    def contents(self, shard: Shard, rows: Iterable[Row]) -> Iterator[Callable[[], Any]]:
        """There are none."""
        return iter(())


def _lines(reader: Reader, shard: Shard) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and lines that are not empty."""
    try:
        with reader.fs.open(reader.path(shard.path), "r", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"`data.source` must hold readable text, but {reader.title(shard)} cannot be read as UTF-8 "
            f"({first_line(error)}). Save it as UTF-8."
        ) from None


def _json_lines(reader: Reader, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(reader, shard):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            fields = error
        if not isinstance(fields, dict):
            raise DataError(
                f"`data.source` must hold a JSON object in each line of {reader.title(shard)}, but line {number} is "
                f"{line.strip()[:60]!r} instead. Mend or remove the line."
            )
        yield number, fields
