"""Pins that `ray up` takes the files for cloud and own machines, what its schema does not see, and SkyPilot's task."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import botocore.session
import jsonschema
import pytest
from botocore.validate import ParamValidator
from clusters import CLUSTER, ROOT, documents
from commandlines import meant, parsed
from ray.autoscaler._private.util import prepare_config, validate_config

CLOUDS = ["aws", "gcp"]
LAUNCHERS = [*CLOUDS, "local"]


def launcher(name):
    (config,) = documents(CLUSTER / "vm" / f"{name}.yaml")
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_file(name):
    prepared = prepare_config(launcher(name))
    validate_config(prepared)
    assert prepared["cluster_name"] == "ddil-ray"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("max_worker",), 3),
        (("available_node_types", "trainer", "min_worker"), 1),
        (("available_node_types", "trainer", "resources", "GPU"), 0.5),
        (("head_node_type",), "nobody"),
        (("initialization_commands",), "make"),
    ],
    ids=lambda value: str(value),
)
def test_rays_schema_sees_mistakes(where, value):
    config = launcher("aws")
    *folders, last = where
    inner = config
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLOUDS)
def test_pools_have_sizes_that_fit_the_cluster(name):
    config = launcher(name)
    kinds = copy.copy(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}  # no actor runs there
    assert all(0 <= kind["min_workers"] <= kind["max_workers"] for kind in kinds.values())
    assert sum(kind["max_workers"] for kind in kinds.values()) == config["max_workers"]


PROVIDERS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes"},
    "gcp": {"type", "region", "availability_zone", "project_id"},
    "local": {"type", "head_ip", "worker_ips"},
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_provider_settings_are_those_that_exist(name):
    """Ray's schema lets any other pass."""
    assert set(launcher(name)["provider"]) == PROVIDERS[name]


@pytest.fixture(scope="module")
def ec2():
    return botocore.session.Session().get_service_model("ec2", "2016-11-15")


def kinds_of(name):
    return launcher(name)["available_node_types"]


@pytest.mark.parametrize("kind", ["head", "trainer", "rollout"])
def test_ec2_knows_the_machines_and_their_settings(ec2, kind):
    shape = ec2.operation_model("RunInstances").input_shape
    node = kinds_of("aws")[kind]["node_config"]
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, shape)
    assert not report.has_errors(), report.generate_report()
    assert node["InstanceType"] in ec2.shape_for("InstanceType").enum
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_the_check_of_ec2_settings_sees_mistakes(ec2):
    shape = ec2.operation_model("RunInstances").input_shape
    wrong = {"MinCount": 1, "MaxCount": 1, "InstanceTyp": "p5.48xlarge", "ImageId": 3}
    found = ParamValidator().validate(wrong, shape).generate_report()
    assert "InstanceTyp" in found
    assert "ImageId" in found


GCP_KEYS = {"machineType", "disks", "serviceAccounts", "scheduling"}
SCHEDULING = {"onHostMaintenance", "provisioningModel", "instanceTerminationAction"}


def test_google_machines_have_settings_of_the_compute_api():
    kinds = kinds_of("gcp")
    for kind in kinds.values():
        node = kind["node_config"]
        assert set(node) <= GCP_KEYS
        assert set(node.get("scheduling", {})) <= SCHEDULING
        (disk,) = node["disks"]
        assert set(disk) == {"boot", "autoDelete", "type", "initializeParams"}
        zone = launcher("gcp")["provider"]["availability_zone"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"
    assert {kind["node_config"]["disks"][0]["initializeParams"]["sourceImage"] for kind in kinds.values()} == {
        kinds["head"]["node_config"]["disks"][0]["initializeParams"]["sourceImage"]
    }


def test_rollouts_are_spot_and_trainers_are_not():
    aws, gcp = kinds_of("aws"), kinds_of("gcp")
    assert aws["rollout"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["rollout"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["trainer"]["node_config"]
    assert "provisioningModel" not in gcp["trainer"]["node_config"]["scheduling"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nodes_get_the_token_and_start_by_the_scripts_that_ask_for_it(name):
    config = launcher(name)
    assert config["file_mounts"] == {"~/ddil-ray": ".", "~/.ray/auth_token": "~/.ray/auth_token"}
    for kind, script in (("head", "start-head.sh"), ("worker", "start-worker.sh")):
        (command,) = config[f"{kind}_start_ray_commands"]
        assert f"cluster/background.sh {script}" in command
        assert "ray stop" not in command
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        words = shlex.split(command, comments=True)
        assert parsed(meant(words[words.index("cluster/background.sh") :])).command.name == "start"
    assert "autoscaling-config" in config["head_start_ray_commands"][0]
    assert "ray start" in config["head_start_ray_commands"][0]  # else Ray warns that nothing starts it


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_stays_at_home_is_not_sent_along(name):
    config = launcher(name)
    assert {".git", ".venv", "runs"} <= set(config["rsync_exclude"])
    assert config["rsync_filter"] == [".gitignore"]
    assert "auth_token" not in config["rsync_exclude"]  # which holds for the token's own file, too


@pytest.mark.parametrize("name", [*LAUNCHERS, "skypilot"])
def test_setup_installs_by_a_target_that_is_there(name):
    if name == "skypilot":
        commands = [documents(CLUSTER / "skypilot.yaml")[0]["setup"]]
    else:
        commands = launcher(name)["setup_commands"]
    made = [shlex.split(command) for command in commands if command.startswith("make ")]
    assert len(made) == 1
    assert re.search(r"^install:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [word.replace("~/ddil-ray", str(ROOT)) for word in made[0]]
    shown = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--constraint constraints.txt" in shown.stdout
    asked = [word.removeprefix("WITH=") for word in words if word.startswith("WITH=")]
    assert all(package in shown.stdout for packages in asked for package in packages.split())


@pytest.fixture(scope="module")
def skypilot():
    """Validators of a task and of its resources."""
    path = Path(__file__).parent / "schemas" / "skypilot.json.gz"
    schemas = json.loads(gzip.decompress(path.read_bytes()))
    return [jsonschema.Draft202012Validator(schemas[name]) for name in ("task", "resources")]


def test_the_task_of_skypilot_has_its_schema(skypilot):
    (task,) = documents(CLUSTER / "skypilot.yaml")
    whole, resources = skypilot
    whole.validate(task)
    resources.validate(task["resources"])
    with pytest.raises(jsonschema.ValidationError):
        whole.validate({**task, "node": 2})
    with pytest.raises(jsonschema.ValidationError):
        resources.validate({**task["resources"], "accelerator": "H100:8"})


def test_the_task_of_skypilot_is_sound_shell_and_has_no_secret():
    (task,) = documents(CLUSTER / "skypilot.yaml")
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert not [name for name in task["envs"] if re.search("(?i)token|secret|password|key", name)]
    command = [Path(sys.executable).parent / "shellcheck", "--shell=bash", "-"]
    done = subprocess.run(command, input=task["run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "ray stop" not in task["run"]
