"""Which format a source has. To add one: a `Reader`, and a row in `_READERS` and in `_detect`."""

from __future__ import annotations

from dataclasses import replace

from ddil_ray.config.prepare import PrepareData
from ddil_ray.data.emoji import PARQUET
from ddil_ray.data.folder import IMAGE_SUFFIXES
from ddil_ray.errors import DataError, first_line
from ddil_ray.places import check_links
from ddil_ray.prepare.folders import METADATA, ClassFolders, MetadataFolder, TextFiles
from ddil_ray.prepare.parquets import ParquetFiles
from ddil_ray.prepare.rows import Condition, Reader, Shard
from ddil_ray.prepare.tars import Tars
from ddil_ray.storage import open_url

__all__ = ["located", "open_source"]

_READERS: dict[str, type[Reader]] = {
    "metadata": MetadataFolder,
    "classes": ClassFolders,
    "parquet": ParquetFiles,
    "webdataset": Tars,
    "text": TextFiles,
}


def located(source: str) -> str:
    """Where `data.source` lies: for `emoji`, which comes with this package, its file."""
    return str(PARQUET) if source == "emoji" else source


def open_source(data: PrepareData, *, classes: bool) -> tuple[Reader, list[Shard]]:
    """The reader of `data.source`, with the condition's field picked from its first shard, and all shards.

    Args:
        data: the settings.
        classes: whether conditions are class ids.

    Raises:
        DataError: nothing there, no such format, or no such column.
    """
    condition = Condition(classes, data.label_column if classes else data.caption_column)
    source = located(data.source).rstrip("/").removesuffix(f"/{METADATA}")
    files = _list_files(source)
    reader = _READERS[_detect(files, source, data.format)](source, condition, data.image_column)
    shards = reader.shards(files)
    if not shards:
        raise DataError(
            f"`data.source` must hold files of format {data.format}, but {source!r} holds none. Set "
            "`data.format=auto`, or name another source."
        )
    reader = replace(reader, images=_has_images(reader, shards[0], data))
    _check_conditions(reader, source)
    reader = replace(reader, key=condition.pick(reader.fields(shards[0]), reader.title(shards[0])))
    reader.check(shards)
    return reader, shards


def _list_files(source: str) -> list[Shard]:
    """All files below `source`, by path below it; the source itself, if it is a file, with an empty path."""
    try:
        fs, root = open_url(source)
        found = sorted(fs.find(root, detail=True).items())
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(
            f"`data.source` must be readable, but {source!r} failed: {first_line(error)}. Check the address and its "
            "credentials."
        ) from None
    check_links(fs, root, dict(found))
    if not found:
        raise DataError(f"`data.source` must be a folder or file, but {source!r} does not exist or is empty. Check it.")
    return [Shard(path[len(root.rstrip("/")) + 1 :], int(info["size"] or 0)) for path, info in found]


def _has_images(reader: Reader, first: Shard, data: PrepareData) -> bool:
    if isinstance(reader, ParquetFiles):
        return data.format != "text" and reader.could_hold_images(first)
    return not isinstance(reader, TextFiles)


def _check_conditions(reader: Reader, source: str) -> None:
    if reader.condition.classes and not reader.images:
        raise DataError(
            f"`data.source` must hold images for a teacher of classes, but {source!r} holds prompts alone. Add the "
            "images."
        )
    if isinstance(reader, ClassFolders) and not reader.condition.classes:
        raise DataError(
            f"`data.source` must hold captions for a teacher of prompts, but {source!r} holds images alone. Write a "
            f'{METADATA} beside them, with lines such as {{"file_name": "a.png", "text": "a caption"}}.'
        )


def _detect(files: list[Shard], source: str, wanted: str) -> str:
    """The reader's name for a source of `files`."""
    names = [(file.path or source).rpartition("/")[2].lower() for file in files]

    def some(*suffixes: str) -> bool:
        return any(name.endswith(suffixes) for name in names)

    described = METADATA in names
    if wanted != "auto":
        readers = {"folder": "metadata" if described else "classes", "text": "parquet" if some(".parquet") else "text"}
        return readers.get(wanted, wanted)
    found = {
        "metadata": described,
        "parquet": some(".parquet"),
        "webdataset": some(".tar"),
        "classes": some(*IMAGE_SUFFIXES),
        "text": some(".txt", ".jsonl"),
    }
    kind = next((name for name, there in found.items() if there), None)
    if kind is None:
        raise DataError(
            f"`data.source` must hold a {METADATA}, Parquet files, tars, images in class folders, .txt or .jsonl "
            f"files, but {source!r} holds {names[0]} and the like. Set `data.format`."
        )
    return kind
