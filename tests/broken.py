"""Datasets that are wrong by construction, each with what its message must say; and good ones to compare with."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from preparing import write_tar

__all__ = ["CAPTIONED", "IMAGES", "Broken", "flipped", "good_parquet", "png"]

Lines = list[dict[str, Any]]
ROWS = 48
"""Of a good dataset of grey 8 x 8 digits in ten classes, in three files."""


@dataclass(frozen=True)
class Broken:
    """A way to be wrong."""

    write: Callable[[Path, random.Random], None]
    """Fills a new folder."""
    says: str
    """A pattern of the message."""


def png(seed: int, side: int = 8, *, colour: bool = False) -> bytes:
    """An encoded image."""
    shape = (side, side, 3) if colour else (side, side)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _columns(file: int, rows: int = ROWS // 3) -> dict[str, Any]:
    numbers = range(file * rows, (file + 1) * rows)
    return {"image": [png(n) for n in numbers], "label": [n % 10 for n in numbers]}


def _arrays(rows: int, side: int = 8) -> Any:
    return np.random.default_rng(rows).uniform(-1, 1, (rows, side, side)).astype(np.float32).tolist()


def good_parquet(folder: Path, files: int = 3) -> list[Path]:
    """Files with page checksums, as this library writes them."""
    paths = [folder / f"{file}.parquet" for file in range(files)]
    for file, path in enumerate(paths):
        pq.write_table(pa.table(_columns(file)), path, write_page_checksum=True)
    return paths


def flipped(content: bytes, chance: random.Random) -> bytes:
    """`content` with one byte changed."""
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]


def _edited(edit: Callable[[dict[str, Any], random.Random], dict[str, Any] | None]) -> Callable[..., None]:
    """Three files, of which one has its columns edited; None leaves the file away."""

    def write(folder: Path, chance: random.Random) -> None:
        good_parquet(folder)
        file = chance.randrange(3)
        columns = edit(_columns(file), chance)
        if columns is None:
            (folder / f"{file}.parquet").unlink()
        else:
            pq.write_table(pa.table(columns), folder / f"{file}.parquet")

    return write


def _all(edit: Callable[[dict[str, Any], random.Random], dict[str, Any]]) -> Callable[..., None]:
    def write(folder: Path, chance: random.Random) -> None:
        state = chance.getstate()
        for file in range(3):
            chance.setstate(state)
            pq.write_table(pa.table(edit(_columns(file), chance)), folder / f"{file}.parquet")

    return write


def _one(column: str, value: Callable[[random.Random], Any], kind: Any = None) -> Callable[..., None]:
    """One value of one file is another."""

    def edit(columns: dict[str, Any], chance: random.Random) -> dict[str, Any]:
        values = list(columns[column])
        values[chance.randrange(len(values))] = value(chance)
        return columns | {column: pa.array(values, kind) if kind else values}

    return _edited(edit)


def _one_array(value: Callable[[random.Random], float]) -> Callable[..., None]:
    """Arrays in all files, with one number that is another."""

    def write(folder: Path, chance: random.Random) -> None:
        bad = chance.randrange(3)
        for file in range(3):
            arrays = _arrays(16)
            if file == bad:
                arrays[chance.randrange(16)][chance.randrange(8)][chance.randrange(8)] = value(chance)
            table = pa.table({"image": arrays, "label": [n % 10 for n in range(16)]})
            pq.write_table(table, folder / f"{file}.parquet")

    return write


def _bytes(edit: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    """One file of three has other bytes."""

    def write(folder: Path, chance: random.Random) -> None:
        path = good_parquet(folder)[chance.randrange(3)]
        path.write_bytes(edit(path.read_bytes(), chance))

    return write


def _retyped(column: str, *kinds: Any) -> Callable[..., None]:
    """Another type of one column, in one file or in all."""

    def edit(columns: dict[str, Any], chance: random.Random) -> dict[str, Any]:
        return columns | {column: chance.choice(kinds)(len(columns["label"]))}

    def write(folder: Path, chance: random.Random) -> None:
        (_all if chance.random() < 0.5 else _edited)(edit)(folder, chance)

    return write


def _images(edit: Callable[[Path, random.Random], None]) -> Callable[..., None]:
    """A folder per class with four images each, and a change."""

    def write(folder: Path, chance: random.Random) -> None:
        for n in range(40):
            place = folder / f"class-{n % 10}"
            place.mkdir(exist_ok=True)
            (place / f"{n:02}.png").write_bytes(png(n))
        edit(folder, chance)

    return write


def _spoil(content: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def edit(folder: Path, chance: random.Random) -> None:
        path = chance.choice(sorted(folder.rglob("*.png")))
        path.write_bytes(content(path.read_bytes(), chance))

    return edit


def _emptied(folder: Path, chance: random.Random) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def _duplicated(columns: dict[str, Any], chance: random.Random) -> Any:
    name = chance.choice(["image", "label"])
    return pa.table([*map(pa.array, columns.values()), pa.array(columns[name])], names=[*columns, name])


def _write_duplicated(folder: Path, chance: random.Random) -> None:
    good_parquet(folder)
    pq.write_table(_duplicated(_columns(0), chance), folder / f"{chance.randrange(3)}.parquet")


_WHOLE = r"`data.source` must hold whole Parquet files, but \S*\d.parquet cannot be read"
_HOLD_IMAGES = r"`data.image_column` 'image' must hold encoded images, .* in \S*\d.parquet instead"
_ALIKE = r"must be alike in all files, but holds .* in \S*\d.parquet and .* in \S*\d.parquet"

IMAGES: dict[str, Broken] = {
    "a file cut short": Broken(_bytes(lambda content, chance: content[: chance.randrange(len(content) - 1)]), _WHOLE),
    "a file of other bytes": Broken(_bytes(lambda content, chance: chance.randbytes(len(content))), _WHOLE),
    "an end overwritten": Broken(_bytes(lambda content, chance: content[:-8] + chance.randbytes(8)), _WHOLE),
    "a page overwritten": Broken(
        _bytes(lambda content, chance: content[:60] + chance.randbytes(40) + content[100:]), r"\S*\d.parquet"
    ),
    "no image column in one file": Broken(
        _edited(lambda columns, chance: {"label": columns["label"]}),
        r"`data.image_column` must be a column of every file, but \S*\d.parquet has label and not 'image'",
    ),
    "another name in one file": Broken(
        _edited(lambda columns, chance: {"images": columns["image"], "label": columns["label"]}),
        r"\S*\d.parquet has images, label and not 'image'. Did you mean 'images'\?",
    ),
    "no label column": Broken(
        _all(lambda columns, chance: {"image": columns["image"]}),
        r"`data.label_column` must be a column of every file, but .* not 'label'",
    ),
    "a column twice": Broken(_write_duplicated, r"must be one column of every file, but .* 2 times"),
    "images of another type": Broken(
        _retyped(
            "image",
            lambda n: ["text"] * n,
            lambda n: [1.5] * n,
            lambda n: [7] * n,
            lambda n: [True] * n,
            lambda n: [[0.5]] * n,
            lambda n: [["a"]] * n,
            lambda n: [{"path": "x"}] * n,
        ),
        f"{_HOLD_IMAGES}",
    ),
    "labels of another type": Broken(
        _retyped(
            "label",
            lambda n: ["one"] * n,
            lambda n: [1.0] * n,
            lambda n: [True] * n,
            lambda n: [[1]] * n,
            lambda n: [b"1"] * n,
        ),
        r"`data.label_column` 'label' must hold whole numbers, but is .* in \S*\d.parquet instead",
    ),
    "arrays in one file, encoded images in the others": Broken(
        _edited(lambda columns, chance: columns | {"image": _arrays(16)}), _ALIKE
    ),
    "structs in one file": Broken(
        _edited(lambda columns, chance: columns | {"image": [{"bytes": b} for b in columns["image"]]}), _ALIKE
    ),
    "a negative label": Broken(
        _one("label", lambda chance: -chance.randrange(1, 9)), r"class ids from 0 to 999999, but .* row \d+ has -"
    ),
    "no label in a row": Broken(_one("label", lambda chance: None), r"row \d+ has None. Set `data.label_column=null`"),
    "a label without end": Broken(
        _one("label", lambda chance: 2 ** chance.randrange(20, 62)), r"class ids from 0 to 999999, but .* row \d+"
    ),
    "no image in a row": Broken(_one("image", lambda chance: None, pa.binary()), r"\d.parquet row \d+ holds NoneType"),
    "an image that is none": Broken(
        _one("image", lambda chance: chance.randbytes(30)), r"\S*\d.parquet row \d+ is not one \(of no known format"
    ),
    "an image cut short": Broken(
        _one("image", lambda chance: png(1, 64)[: chance.randrange(60, 2000)]), r"\S*\d.parquet row \d+ is not one"
    ),
    "an image of another size": Broken(
        _one("image", lambda chance: png(1, chance.choice([4, 7, 9, 16]))),
        r"images of one shape, but .*parquet row .* is .* and .*parquet row \d+ is",
    ),
    "an image in colour": Broken(_one("image", lambda chance: png(1, colour=True)), r"images of one shape"),
    "NaN": Broken(_one_array(lambda chance: float("nan")), r"finite values in \[-1, 1\], but .* row \d+ has NaN"),
    "infinity": Broken(_one_array(lambda chance: chance.choice([1e300, float("inf")])), r"row \d+ has NaN or infinity"),
    "values of a byte": Broken(_one_array(lambda chance: chance.uniform(2, 255)), r"values in \[-1, 1\].*Rescale"),
    "arrays of no value": Broken(
        _all(lambda columns, chance: columns | {"image": pa.array([[[]]] * 16, pa.list_(pa.list_(pa.float32())))}),
        r"row 0 holds list of shape \(1, 0\)",
    ),
    "arrays of several lengths": Broken(
        _all(lambda columns, chance: columns | {"image": [[[0.0], [0.0, 0.5]]] * 16}), r"row 0 holds list of shape"
    ),
    "no row in any file": Broken(
        _all(lambda columns, chance: {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}),
        r"at least one image, but the 3 Parquet files of .* have no row",
    ),
    "fewer rows than a batch": Broken(
        lambda folder, chance: pq.write_table(
            pa.table({name: values[:7] for name, values in _columns(0).items()}), folder / "a.parquet"
        ),
        r"at least one batch of 16 images, but .* holds 7 instead. Add data, or lower `trainer.batch_size`",
    ),
    "an image file that is none": Broken(
        _images(_spoil(lambda content, chance: chance.randbytes(chance.randrange(200)))), r"class-\d/\d+.png is not one"
    ),
    "an image file cut short": Broken(
        _images(_spoil(lambda content, chance: content[: chance.randrange(len(content) - 20)])), r"\d+.png is not one"
    ),
    "an image file of another size": Broken(
        _images(_spoil(lambda content, chance: png(3, chance.choice([1, 5, 12])))), r"images of one shape, but .*png is"
    ),
    "an image beside the class folders": Broken(
        _images(lambda folder, chance: (folder / "stray.png").write_bytes(png(0)) and None), r"either all in class"
    ),
    "no image in the folder": Broken(_images(_emptied), r"`data.source` must be a folder with images .* holds none"),
}
"""For `train-teacher`, `distill`, `plan` and `evaluate`."""


def _pairs(folder: Path, edit: Callable[[Lines, random.Random], list[Any]], chance: random.Random) -> None:
    lines = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(6)]
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(n, 16))
    said = [line if isinstance(line, str) else json.dumps(line) for line in edit(lines, chance)]
    (folder / "metadata.jsonl").write_text("\n".join(said) + "\n")


def _lines(edit: Callable[[Lines, random.Random], list[Any]]) -> Callable[..., None]:
    return lambda folder, chance: _pairs(folder, edit, chance)


def _tars(edit: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    def write(folder: Path, chance: random.Random) -> None:
        for number in range(3):
            members = {f"{n}.png": png(n, 16) for n in range(3)} | {f"{n}.txt": b"words" for n in range(3)}
            write_tar(folder / f"{number}.tar", dict(sorted(members.items())))
        path = folder / f"{chance.randrange(3)}.tar"
        path.write_bytes(edit(path.read_bytes(), chance))

    return write


def _compressed(folder: Path, chance: random.Random) -> None:
    with tarfile.open(folder / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))


def _captioned(edit: Callable[[dict[str, Any], random.Random], dict[str, Any]]) -> Callable[..., None]:
    def write(folder: Path, chance: random.Random) -> None:
        bad = chance.randrange(3)
        for file in range(3):
            columns = {"image": [png(n, 16) for n in range(4)], "text": [f"caption {n}" for n in range(4)]}
            table = pa.table(edit(columns, chance) if file == bad else columns)
            pq.write_table(table, folder / f"{file}.parquet")

    return write


def _cut_parquet(folder: Path, chance: random.Random) -> None:
    _captioned(lambda columns, chance: columns)(folder, chance)
    path = folder / f"{chance.randrange(3)}.parquet"
    path.write_bytes(path.read_bytes()[: -chance.randrange(1, 200)])


CAPTIONED: dict[str, Broken] = {
    "a tar cut short": Broken(
        _tars(lambda content, chance: content[: -512 * chance.randrange(1, 9) - chance.randrange(1, 511)]),
        r"`data.source` must hold whole tars .* but \d.tar cannot be read",
    ),
    "a tar of other bytes": Broken(_tars(lambda content, chance: chance.randbytes(len(content))), r"\d.tar cannot be"),
    "an empty tar": Broken(_tars(lambda content, chance: b""), r"\d.tar cannot be read"),
    "a compressed tar": Broken(_compressed, r"whole tars that are not compressed, but 0.tar cannot be read"),
    "a Parquet file cut short": Broken(_cut_parquet, r"whole Parquet files, but \d.parquet cannot be read"),
    "no captions in one file": Broken(
        _captioned(lambda columns, chance: {"image": columns["image"], "words": columns["text"]}),
        r"`data.caption_column` must be a (column of every file|field of the data), but \d.parquet has image, words",
    ),
    "captions of another type": Broken(
        _captioned(lambda columns, chance: columns | {"text": [chance.choice([1, 2.5, True])] * 4}),
        r"`data.caption_column` 'text' must hold text, but is \w+ in \d.parquet instead",
    ),
    "no images in one file": Broken(
        _captioned(lambda columns, chance: {"text": columns["text"], "picture": columns["image"]}),
        r"`data.image_column` must be a column of every file, but \d.parquet has text, picture",
    ),
    "images of another type in one file": Broken(
        _captioned(lambda columns, chance: columns | {"image": [{"bytes": b} for b in columns["image"]]}), _ALIKE
    ),
    "a line that is no JSON": Broken(
        _lines(lambda lines, chance: ["{" + "x" * chance.randrange(9), *lines]), r"a JSON object in each line"
    ),
    "a line of deep JSON": Broken(_lines(lambda lines, chance: ["[" * 100_000, *lines]), r"a JSON object in each line"),
    "a line without a file": Broken(
        _lines(lambda lines, chance: [{"text": "no file"}, *lines]), r"must have a `file_name` in each line"
    ),
    "no captions anywhere": Broken(
        _lines(lambda lines, chance: [{"file_name": line["file_name"]} for line in lines]),
        r"`data.caption_column` must be a field of the data, but metadata.jsonl has file_name",
    ),
    "nothing": Broken(lambda folder, chance: None, r"does not exist or is empty"),
    "files of no format": Broken(
        lambda folder, chance: (folder / f"{chance.random()}.xyz").write_bytes(b"x") and None,
        r"Parquet files, tars, images in class folders.*Set `data.format`",
    ),
}
"""For `prepare`, for a teacher of prompts."""
