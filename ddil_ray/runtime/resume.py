"""Going on with a run: which settings may be others than before."""

from __future__ import annotations

import json
from typing import Any, Literal

from ddil_ray.config import RunConfig, load_config
from ddil_ray.config.restored import check_complete
from ddil_ray.errors import ConfigError
from ddil_ray.folder import holds, run_url
from ddil_ray.redact import redacted

__all__ = ["RESUMED", "Kind", "begun", "changes", "check_same_run", "kind_of", "resumed_config"]

Kind = Literal["identity", "elastic", "cosmetic"]
"""What a setting is to a run that goes on: `identity` must stay, as the checkpoint, the plan of states or what the run
is about depend on it; `elastic` may be another, and holds from the checkpoint on; `cosmetic` changes no weights."""

_ACTORS = dict.fromkeys(("num_cpus", "num_gpus", "accelerator_type", "resources", "label_selector"), "elastic")
_ROLE = {**_ACTORS, "num_actors": "elastic", "batch_size": "identity"}

RESUMED: dict[str, Any] = {
    "name": "cosmetic",
    "output": "cosmetic",
    "seed": "identity",
    "teacher": "identity",
    "student": {"model": "identity", "lora": "identity", "guidance": "cosmetic", "license": "cosmetic"},
    "data": {
        **dict.fromkeys(("source", "format", "image_column", "label_column", "image_size", "bucket"), "identity"),
        "prompt_cache_mib": "elastic",
    },
    "objective": "identity",
    "states": "identity",
    "threshold": "identity",
    "replay": {"capacity": "elastic", "reuse": "identity", "max_staleness": "elastic", "ahead": "elastic"},
    "sync": {"every": "elastic", "dtype": "elastic", "deterministic": "elastic"},
    "trainer": {
        **_ACTORS,
        **dict.fromkeys(("steps", "batch_size", "optimizer"), "identity"),
        **dict.fromkeys(("lr", "betas", "weight_decay", "warmup_steps", "decay", "clip_norm", "ema_decay"), "elastic"),
        **dict.fromkeys(("num_workers", "parallel", "accumulate", "precision", "ema_offload"), "elastic"),
        **dict.fromkeys(("gradient_checkpointing", "channels_last", "compile"), "elastic"),
        "max_failures": "cosmetic",
    },
    "forward_states": _ROLE,
    "student_rollouts": {**_ROLE, "precision": "elastic"},
    "teacher_rollouts": {**_ROLE, "precision": "elastic", "keep_rows": "identity", "keep_at": "elastic"},
    "labels": {**_ROLE, "batch_size": "elastic", "precision": "elastic", "placement": "elastic"},
    "shift": "cosmetic",
    "checkpoint": "cosmetic",
    "faults": "cosmetic",
    "tracking": "cosmetic",
    "evaluation": "cosmetic",
}
"""Every setting's kind by its place in the config; a group's where all its settings, those to come too, are of one."""


def kind_of(path: str) -> Kind:
    """Of the setting at a dotted path.

    Raises:
        KeyError: it has none: say in `RESUMED` what it is.
    """
    node: Any = RESUMED
    for name in path.split("."):
        node = node[name]
        if isinstance(node, str):
            return node  # type: ignore[return-value]
    raise KeyError(path)


def changes(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """(old, new) value of all settings that differ, by dotted path; None where one config has no such setting.

    Secrets are no difference: a config that was kept has none.
    """
    old, new = (_leaves(redacted(config.model_dump(mode="json"))) for config in (before, after))
    return {path: (old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)}


def begun(config: RunConfig) -> bool:
    """Whether there is something to go on from in the folder of a run: it holds checkpoints.

    Raises:
        ConfigError: it cannot be read.
    """
    return holds(run_url(config.output, config.name), "checkpoints")


def check_same_run(before: RunConfig, after: RunConfig) -> None:
    """See that what `before` has begun can go on as `after` says.

    Raises:
        ConfigError: `after` is another run; names all settings that make it one.
    """
    wrong = {path: pair for path, pair in changes(before, after).items() if kind_of(path) == "identity"}
    if wrong:
        lines = [f"`{path}` of a resumed run must stay {a!r}, but is {b!r} instead." for path, (a, b) in wrong.items()]
        reason = "The checkpoint, or the plan of the run, depends on it. Start a new run to change it."
        raise ConfigError("\n".join([*lines, reason]))


def resumed_config(run_dir: str, overrides: list[str]) -> RunConfig:
    """The config of the run in `run_dir`, to go on with.

    Raises:
        ConfigError: no run there, overrides change what it is, or a secret is not given again: names all of them.
    """
    url = run_dir.rstrip("/")
    parent, slash, name = url.rpartition("/")
    if not holds(url, "config.yaml"):
        raise ConfigError(
            f"`--resume` must be the folder of a run that has begun, but {run_dir} has no config.yaml. Check the path; "
            "a run that has not begun is started by its config."
        )
    config_file = f"{url}/config.yaml"
    before = load_config(config_file, kind=RunConfig)
    place = [f"output={json.dumps(parent or slash or '.')}", f"name={json.dumps(name)}"]
    config = load_config(config_file, [*overrides, *place], kind=RunConfig)
    check_complete(config)
    check_same_run(before, config)
    return config


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found
