"""A pipeline as stages: what each is told, whether it is done, and why it has to be done.

What goes into a stage are its settings, and by digest the files and the results of other stages that they name. Its
folder is named after all of that, and a record of it lies beside the folder, written once the folder is whole. So what
has its record is done; other settings or files lead to another folder, and the same ones back again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from pydantic import BaseModel

from ddil_ray.config import ChainConfig, ConfigTree, RunConfig, deciding, teacher_config
from ddil_ray.config.chain import LINKS, STUDENTS, Compare, Export
from ddil_ray.config.prepare import PrepareConfig
from ddil_ray.errors import ConfigError, DdilError, RunFailedError, first_line
from ddil_ray.folder import run_url, using, write_whole
from ddil_ray.redact import redact
from ddil_ray.storage import open_url
from ddil_ray.training.manifest import sha256

__all__ = ["Chain", "Stage", "contents", "versions"]

_RESULTS = {
    "train_teacher": ("teacher",),
    "prepare": ("dataset.json", "settings.json"),  # which has the digests of all latents
    "distill": ("student", "metrics.json"),
    "baseline": ("student", "metrics.json"),
}
"""Stage -> what other stages take of its folder."""
_FILES = (
    *("data.source", "teacher.model", "teacher.weights", "student.model"),
    *("evaluation.features", "evaluation.feature_weights", "evaluation.clip"),
)
"""Settings that may name files."""
_NOT_DECIDING = ("trainer.num_workers", "encode_images.batch_size", "encode_prompts.batch_size")
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "last_modified", "LastModified", "created")
"""What filesystems say of a file that changes with its content; the first is taken."""
_CHANGES_SHOWN = 3


@dataclass(frozen=True)
class Stage:
    """A stage whose inputs are there."""

    name: str
    config: Any
    """Of its command, with the name and output of its folder."""
    folder: str
    """Its name in the folder of the chain."""
    inputs: Mapping[str, str]
    """What goes into it."""
    result: str | None
    """Digest of what others take of it; None unless it is done."""
    begun: bool
    """Whether its folder is there."""
    why: str
    """Why it has to be done; empty where it is."""


class Chain:
    """The stages of a pipeline and its folder.

    Args:
        config: the pipeline.

    Raises:
        ConfigError: the settings of a stage are wrong; names all that are.
    """

    def __init__(self, config: ChainConfig) -> None:
        self.config = config
        self.url = run_url(config.output, config.name)
        with self._reaching():
            self._fs, self._root = open_url(self.url)
        self._done: dict[str, Stage] = {}
        problems = dict.fromkeys(filter(None, map(self._problem, config.stages)))
        if problems:
            raise ConfigError("\n".join(problems))

    def missing(self, name: str) -> list[str]:
        """The stages that must be done before `stage` can be asked for this one."""
        links = {before for before, _ in LINKS.get(name, {}).values()}
        needed = links.union(STUDENTS.get(name, ()))
        return [before for before in self.config.stages if before in needed and before not in self._done]

    def stage(self, name: str) -> Stage:
        """How it stands with a stage that none is `missing` of.

        Raises:
            ConfigError: files that it names cannot be read, or the chain's own folder.
        """
        config = self._config(name)
        inputs = self._inputs(name, config)
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
        folder = f"{self._prefix(name)}{key}"
        with self._reaching():
            self._fs.invalidate_cache()  # other processes write here
            begun = bool(self._fs.exists(f"{self._root}/{folder}"))
            record = self._record(f"{folder}.json")
            result = record["result"] if begun and record and record["inputs"] == inputs else None
            why = self._why(name, inputs, begun, gone=record is not None) if result is None else ""
        placed = config.model_copy(update=self._placed(config, folder))
        stage = Stage(name, placed, folder, inputs, result, begun, why)
        if result is not None:
            self._done[name] = stage
        return stage

    def check(self, chosen: Collection[str]) -> None:
        """Whether there is what those of the stages `chosen` need that are to do, and no stage before them makes.

        Raises:
            ConfigError: names all that is not there.
        """
        to_do = [name for name in self.config.stages if self.missing(name) or self.stage(name).result is None]
        problems = [problem for name in to_do if name in chosen for problem in _lacking(getattr(self.config, name))]
        if problems:
            raise ConfigError("\n".join(problems))

    def begin(self, stage: Stage) -> None:
        """Forget, before a stage is done, what was noted of a folder that is gone: the next one is another."""
        record = f"{self._root}/{stage.folder}.json"
        with self._reaching():
            if self._fs.exists(record):
                self._fs.rm_file(record)

    def finish(self, stage: Stage, seconds: float) -> None:
        """Note that a stage whose folder is whole is done.

        Raises:
            RunFailedError: it cannot be noted.
        """
        with self._reaching(RunFailedError):
            result = contents(f"{self.url}/{stage.folder}", _RESULTS.get(stage.name, ()))
            record = {
                "stage": stage.name,
                "inputs": stage.inputs,
                "result": result,
                "seconds": round(seconds, 1),
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "version": importlib.metadata.version("ddil-ray"),
            }
            write_whole(self._fs, f"{self._root}/{stage.folder}.json", (json.dumps(record, indent=2) + "\n").encode())
        self._done[stage.name] = replace(stage, result=result, why="")

    def clear(self, stage: Stage) -> None:
        """Remove what a stage has begun, and cannot go on with."""
        if stage.begun:
            with self._reaching():
                self._fs.rm(f"{self._root}/{stage.folder}", recursive=True)

    def part(self, name: str, part: str = "") -> str:
        """Where a part of the folder of a stage lies that is done."""
        return f"{self.url}/{self._done[name].folder}/{part}".rstrip("/")

    def students(self, name: str) -> list[str]:
        """The run folders that a stage takes the students of."""
        return [self.part(before) for before in STUDENTS[name] if before in self._done]

    def _reaching(self, kind: type[DdilError] = ConfigError) -> AbstractContextManager[None]:
        return using(self.url, "The same command goes on when it can be.", kind)

    def _prefix(self, name: str) -> str:
        return f"{self.config.name}-{name.replace('_', '-')}-"

    def _problem(self, name: str) -> str:
        """What is wrong with the settings of a stage."""
        try:
            config = self._config(name)
        except DdilError as error:
            return str(error)
        compared = self.config.compare is not None and name in STUDENTS["compare"]
        if compared and isinstance(config, RunConfig) and not config.evaluation.enabled:
            return f"`{name}.evaluation.enabled` must be true where `compare` is given, but is false."
        return ""

    def _config(self, name: str) -> BaseModel:
        """Of a stage, in no folder yet; of results that are not there yet, it says where they could be."""
        settings = getattr(self.config, name)
        if isinstance(settings, BaseModel):
            return settings
        tree = ConfigTree.of(settings, f"`{name}`")
        if name in ("baseline", "evaluate"):
            tree = ConfigTree.of(self.config.distill or {}, "`distill`").merge(tree.settings, tree.source)
            tree.source = f"`{name}`"
        for setting, (before, part) in self._links(name).items():
            place = self.part(before, part) if before in self._done else f"{self.url}/{before}"
            group, _, key = setting.partition(".")
            tree = tree.merge({group: {key: place}}, before)
        tree.settings |= {"output": self.url}
        if name == "prepare":
            return tree.validate(PrepareConfig)
        tree.settings |= {"name": self.config.name}
        return teacher_config(tree) if name == "train_teacher" else tree.validate(RunConfig)

    def _links(self, name: str) -> dict[str, tuple[str, str]]:
        return {s: link for s, link in LINKS.get(name, {}).items() if getattr(self.config, link[0]) is not None}

    def _placed(self, config: BaseModel, folder: str) -> dict[str, str]:
        if isinstance(config, PrepareConfig):
            return {"output": f"{self.url}/{folder}"}
        return {"name": folder, "output": self.url} if "name" in type(config).model_fields else {}

    def _inputs(self, name: str, config: BaseModel) -> dict[str, str]:
        links, tree = self._links(name), config.model_dump(mode="json")
        inputs = {k: v for k, v in deciding(config).items() if k not in _NOT_DECIDING and k not in links}
        inputs |= {f"result of {before}": str(self._done[before].result) for before, _ in links.values()}
        for before in STUDENTS.get(name, ()):
            if before in self._done:
                inputs[f"result of {before}"] = str(self._done[before].result)
        named = {setting: _at(tree, setting) for setting in _FILES if setting not in links}
        named |= {redact(f"{run}/metrics.json"): f"{run}/metrics.json" for run in tree.get("runs", ())}
        for setting, place in named.items():
            version = versions(place, setting) if isinstance(place, str) else None
            if version is not None:
                inputs[f"content of {setting}"] = version
        return inputs

    def _record(self, name: str) -> dict[str, Any] | None:
        """The content of a record; None where there is none."""
        try:
            content: Any = json.loads(self._fs.cat_file(f"{self._root}/{name}"))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) and {"inputs", "result", "finished"} <= content.keys() else None

    def _why(self, name: str, inputs: Mapping[str, str], begun: bool, gone: bool) -> str:
        if begun or gone:
            return "it was begun and not finished" if begun else "its folder is gone"
        found = self._fs.ls(self._root, detail=False) if self._fs.exists(self._root) else []
        names = [path.rpartition("/")[2] for path in found]
        mine = [n for n in names if n.startswith(self._prefix(name)) and n.endswith(".json")]
        records = [record for record in map(self._record, mine) if record]
        if not records:
            return "it was not done before"
        before = max(records, key=lambda record: str(record["finished"]))["inputs"]
        differing = [key for key in sorted({*before, *inputs}) if before.get(key) != inputs.get(key)]
        shown = [_difference(key, before.get(key), inputs.get(key)) for key in differing[:_CHANGES_SHOWN]]
        more = len(differing) - len(shown)
        return "; ".join([*shown, *([f"{more} more"] if more else [])])


def _lacking(settings: Any) -> Iterator[str]:
    """What the settings of a stage name, and is not there."""
    for check in _needs(settings):
        try:
            check()
        except ConfigError as error:  # noqa: PERF203 - seldom more than one
            yield str(error)


def _needs(settings: Any) -> Iterator[Callable[[], object]]:
    """Checks by the commands of stages, whose libraries only those load that need them."""
    if isinstance(settings, Compare):
        from ddil_ray.finished import read_finished

        yield from (partial(read_finished, run.rstrip("/"), "`compare.runs`") for run in settings.runs)
    if isinstance(settings, Export) and settings.push is not None:
        from ddil_ray.publish.hub import check_push

        yield partial(check_push, settings.push, "export.push")
    if isinstance(settings, Export) and settings.onnx:
        from ddil_ray.publish.onnx import check_onnx

        yield partial(check_onnx, "export.onnx")


def _difference(key: str, before: str | None, now: str | None) -> str:
    if " of " in key:
        return f"{key} is another"
    return f"{key} was {before or 'not a setting'} and is {now or 'not a setting'}"


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def versions(place: str, field: str) -> str | None:
    """Changes with the names, sizes and versions (ETags, or times of change) of the files at a path or URL, which are
    not read; None where no files are.

    Raises:
        ConfigError: they cannot be listed; calls them `field`.
    """
    try:
        fs, root = open_url(place)
        fs.invalidate_cache()
        found = fs.find(root, detail=True) if fs.exists(root) else {}
        found = {path: info or fs.info(path) for path, info in found.items()}
    except Exception as error:  # every filesystem has errors of its own
        raise ConfigError(f"`{field}` must be readable, but {place} failed: {first_line(error)}.") from error
    if not found:
        return None
    listed = [
        [path.removeprefix(root), info["size"], str(next((info[name] for name in _VERSIONS if name in info), ""))]
        for path, info in sorted(found.items())
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def contents(url: str, parts: tuple[str, ...]) -> str:
    """Changes with any byte of the files that are `parts` of a folder, or lie in them; all are read."""
    fs, root = open_url(url)
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in fs.find(f"{root}/{part}")):
        with fs.open(path, "rb") as file:
            digest.update(f"{path.removeprefix(root)} {sha256(file)}\n".encode())
    return digest.hexdigest()
