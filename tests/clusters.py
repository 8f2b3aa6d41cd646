"""The files of cluster/ as tests read them: documents, the run that each starts, and its pools of nodes."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandlines import parsed

from ddil_ray.config import RunConfig, load_config

__all__ = [
    "CLUSTER",
    "KUBERAY",
    "MACHINES",
    "ROOT",
    "SCHEMAS",
    "Artefact",
    "Pool",
    "artefact",
    "documents",
    "kustomized",
    "sbatch_options",
    "strict",
]

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
SCHEMAS = ROOT / "tests" / "cluster" / "schemas"
RUN = str(KUBERAY / "base" / "run.yaml")
MACHINES = {
    "NVIDIA-H100-80GB-HBM3": ("H100", None),
    "NVIDIA-L4": ("L4", None),
    "p5.48xlarge": ("H100", 8),
    "g6.2xlarge": ("L4", 1),
    "a3-highgpu-8g": ("H100", 8),
    "g2-standard-8": ("L4", 1),
    "h100": ("H100", None),
    "l4": ("L4", None),
}
"""What a file calls its machines: the kind of GPU, and how many it has where the name says so."""


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind."""

    labels: dict[str, str]
    least: int
    most: int
    cpus: float
    gpus: int
    machine: str

    def nodes(self, count: int) -> Iterator[dict[str, Any]]:
        """`count` of them, as `ray.nodes()` tells."""
        for _ in range(count):
            yield {"Alive": True, "Labels": self.labels, "Resources": {"CPU": self.cpus, "GPU": self.gpus}}


@dataclass(frozen=True)
class Artefact:
    """One way to start a cluster."""

    config: RunConfig
    pools: list[Pool]


def documents(path: Path) -> list[dict[str, Any]]:
    """All of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


@functools.cache
def _rendered(name: str) -> str:
    command = ["kubectl", "kustomize", str(KUBERAY / name)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def kustomized(name: str) -> dict[str, dict[str, Any]]:
    """What `kubectl apply -k cluster/kuberay/<name>` applies, by kind."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders kustomizations, is not installed")
    return {document["kind"]: document for document in yaml.safe_load_all(_rendered(name))}


def artefact(name: str) -> Artefact:
    """The run and the pools of `base`, `job`, `kueue` (Kubernetes), `aws`, `gcp`, `slurm` or `skypilot`."""
    return {
        "base": lambda: Artefact(load_config(RUN), _kuberay(_base()["spec"])),
        "job": lambda: _rayjob("job"),
        "kueue": lambda: _rayjob("kueue"),
        "aws": lambda: Artefact(_run("pools/sd15-dmd2"), _launcher("aws", "InstanceType")),
        "gcp": lambda: Artefact(_run("pools/sd15-dmd2"), _launcher("gcp", "machineType")),
        "slurm": _slurm,
        "skypilot": _skypilot,
    }[name]()


def _base() -> dict[str, Any]:
    (cluster,) = documents(KUBERAY / "base" / "raycluster.yaml")
    return cluster


def _run(config: str, *overrides: str) -> RunConfig:
    return load_config(config, ["data.source=s3://bucket/prepared", *overrides])


def _rayjob(name: str) -> Artefact:
    spec = kustomized(name)["RayJob"]["spec"]
    given = parsed(shlex.split(spec["entrypoint"])).params
    assert given["config"] == "/etc/ddil-ray/run.yaml"
    return Artefact(load_config(RUN, given["overrides"] or []), _kuberay(spec["rayClusterSpec"]))


def _kuberay(spec: dict[str, Any]) -> list[Pool]:
    pools = []
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        machine = pod["nodeSelector"]["nvidia.com/gpu.product"]
        sizes = group["minReplicas"], group["maxReplicas"]
        pools.append(Pool(group["labels"], *sizes, float(limits["cpu"]), int(limits["nvidia.com/gpu"]), machine))
    return pools


def _launcher(name: str, machine: str) -> list[Pool]:
    (config,) = documents(CLUSTER / "vm" / f"{name}.yaml")
    kinds = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    return [
        Pool(
            kind["labels"],
            kind["min_workers"],
            kind["max_workers"],
            kind["resources"]["CPU"],
            kind["resources"]["GPU"],
            kind["node_config"][machine],
        )
        for kind in kinds
    ]


def sbatch_options(text: str) -> list[dict[str, str]]:
    """The `#SBATCH` options of each component of a job."""
    components: list[dict[str, str]] = [{}]
    for option in re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE):
        if option == "hetjob":
            components.append({})
        else:
            key, _, value = option.removeprefix("--").partition("=")
            components[-1][key] = value
    return components


def _slurm() -> Artefact:
    text = (CLUSTER / "slurm" / "ddil.sbatch").read_text()
    overrides = re.search(r"^#   sbatch cluster/slurm/ddil.sbatch mine.yaml (.+)$", text, re.MULTILINE)
    labels = re.findall(r"start-(?:head|worker)\.sh .*--labels=pool=(\w+)", text)
    assert overrides
    pools = []
    for label, options in zip([labels[0], labels[-1]], sbatch_options(text), strict=True):
        machine, _, gpus = options["gpus-per-node"].partition(":")
        nodes = int(options["nodes"])
        pools.append(Pool({"pool": label}, nodes, nodes, float(options["cpus-per-task"]), int(gpus), machine))
    return Artefact(_run("pools/sd15-dmd2", *overrides[1].split()), pools)


def _skypilot() -> Artefact:
    (task,) = documents(CLUSTER / "skypilot.yaml")
    words = shlex.split(task["run"][task["run"].index("ddil-ray distill") :].replace("\\\n", " "))
    given = parsed(words).params
    overrides = [override for override in given["overrides"] if "$" not in override]
    machine, _, gpus = task["resources"]["accelerators"].partition(":")
    labels = re.findall(r"--labels=pool=(\w+)", task["run"])
    assert len(labels) == task["num_nodes"]
    cpus = float(task["resources"]["cpus"].rstrip("+"))
    pools = [Pool({"pool": label}, 1, 1, cpus, int(gpus), machine.lower()) for label in labels]
    return Artefact(_run(given["config"], *overrides), pools)


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused, and keys that have a default not required: what Kubernetes fills in."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(inner) for key, inner in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
        if isinstance(schema.get("required"), list):
            found["required"] = [key for key in schema["required"] if "default" not in properties.get(key, {})]
    return found
