"""An ablation as a list of runs: the product of its axes and seeds, all checked before anything starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ddil_ray.config import AblationConfig, ConfigTree, RunConfig, config_hash
from ddil_ray.config.ablation import slug
from ddil_ray.config.places import MODELS, anchored
from ddil_ray.data import BUILTIN, ImageData
from ddil_ray.errors import ConfigError, DdilError
from ddil_ray.evaluation.instruments import check_instruments
from ddil_ray.models import DiffusionModel
from ddil_ray.training.recipe import Recipe

__all__ = ["GridRun", "check_runs", "grid_runs", "same_reference"]

_INSTRUMENTS = (("evaluation", "features"), ("evaluation", "feature_weights"), ("evaluation", "clip"))
"""Settings that may be files or folders."""


@dataclass(frozen=True)
class GridRun:
    """One run of the grid."""

    options: Mapping[str, str]
    """Axis -> option, in the order of the axes."""
    compare: str
    """The axis that is compared."""
    config: RunConfig
    reference: RunConfig
    """The baseline's config: all arms of a comparison are measured against its teacher, data and noises."""

    @property
    def arm(self) -> str:
        """The option of the compared axis."""
        return self.options[self.compare]

    @property
    def group(self) -> dict[str, str]:
        """The options of the other axes; arms of one group are compared."""
        return {axis: option for axis, option in self.options.items() if axis != self.compare}

    @property
    def seed(self) -> int:
        """Of training."""
        return self.config.seed

    @property
    def label(self) -> str:
        """For messages."""
        return ", ".join((*self.options.values(), f"seed {self.seed}"))

    @property
    def key(self) -> str:
        """Changes with any setting that the outcome depends on."""
        return f"{config_hash(self.config)}-{config_hash(self.reference)}"

    def anchored(self) -> GridRun:
        """This run for a process with another working directory."""
        return replace(self, config=_anchored(self.config), reference=_anchored(self.reference))

    def folder(self, out: Path) -> Path:
        """Where this run's files lie."""
        return out / "runs" / "--".join(slug(option) for option in self.options.values()) / f"seed-{self.seed}"


def _anchored(config: RunConfig) -> RunConfig:
    data = () if config.data.source in BUILTIN else (("data", "source"),)
    return RunConfig.model_validate(anchored(config.model_dump(mode="json"), (*MODELS, *_INSTRUMENTS, *data)))


def grid_runs(spec: AblationConfig) -> list[GridRun]:
    """Every run, seed by seed, so that an ablation that is cut short has whole pairs.

    Raises:
        ConfigError: a combination is no valid config, or cannot be compared with its baseline; all are listed.
    """
    base = ConfigTree.read(spec.base).merge(spec.settings, "settings of the ablation")
    names = list(spec.axes)
    combinations = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*spec.axes.values())]
    configs: list[RunConfig] = []

    def build(options: dict[str, str]) -> None:
        tree = base
        for axis, option in options.items():
            tree = tree.merge(spec.axes[axis][option], f"axes.{axis}.{option} of the ablation")
        tree.source = ", ".join(options.values())
        tree.settings |= {"name": spec.name, "output": "runs", "seed": spec.seeds[0]}
        configs.append(tree.validate(RunConfig))

    _refuse(_problem(build, options) for options in combinations)
    baseline = next(iter(spec.axes[spec.compare]))
    references = [configs[combinations.index({**options, spec.compare: baseline})] for options in combinations]
    _refuse(
        _problem(_check_comparable, f"axes.{spec.compare}.{options[spec.compare]}", config, reference)
        for options, config, reference in zip(combinations, configs, references, strict=True)
    )
    return [
        GridRun(options, spec.compare, config.model_copy(update={"seed": seed}), reference)
        for seed in spec.seeds
        for options, config, reference in zip(combinations, configs, references, strict=True)
    ]


def check_runs(runs: list[GridRun]) -> None:
    """Build the ingredients of every combination, with its first seed; teachers and data are read once each.

    Raises:
        ConfigError: a combination cannot run; all are listed.
    """
    read: dict[str, tuple[DiffusionModel, ImageData]] = {}

    def check(run: GridRun) -> None:
        config = run.config
        parts = (config.teacher, config.data, config.trainer)  # the batch must fit the data
        key = json.dumps([part.model_dump(mode="json") for part in parts])
        teacher, data = read.get(key, (None, None))
        made = Recipe(config).ingredients(teacher=teacher, data=data)
        read[key] = made.teacher, made.data
        check_instruments(config.evaluation, made.data, made.teacher)

    once = {tuple(run.options.values()): run for run in reversed(runs)}
    problems = ((", ".join(options), _problem(check, run)) for options, run in once.items())
    _refuse(f"{name}: {problem}" if problem else "" for name, problem in problems)


def same_reference(config: RunConfig) -> str:
    """A text that two configs share if their students are measured against the same references."""
    parts = [config.teacher, config.student, config.data, config.threshold, config.evaluation]
    return json.dumps([part.model_dump(mode="json") for part in parts])


def _check_comparable(option: str, config: RunConfig, reference: RunConfig) -> None:
    if config.evaluation != reference.evaluation:
        raise ConfigError(
            f"`{option}` must leave `evaluation` as its baseline has it, but changes it: scores that are measured "
            "differently cannot be compared. Set `settings.evaluation` for all runs."
        )
    if not config.evaluation.enabled:
        raise ConfigError(
            "`evaluation.enabled` must be true in an ablation, but is false: there is nothing to compare."
        )


def _problem(check: Callable[..., None], *arguments: object) -> str:
    """What `check` refuses; nothing where it refuses nothing."""
    try:
        check(*arguments)
    except DdilError as error:
        return str(error)
    return ""


def _refuse(problems: Iterable[str]) -> None:
    """Raise one error that tells of all problems, each once."""
    found = dict.fromkeys(problem for problem in problems if problem)
    if found:
        raise ConfigError("\n".join(found))
