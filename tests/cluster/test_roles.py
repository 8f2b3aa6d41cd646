"""Pins that the pools of nodes which files in cluster/ make are those that the roles of the run ask for.

A run checks itself whether a cluster holds it before it starts: the same checks are made here, on nodes as a file makes
them. Beyond that no node may be idle, neither of the least that a pool has nor of the most.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from clusters import CLUSTER, MACHINES, Pool, artefact, documents
from ray.util import accelerators

from ddil_ray.config import load_config
from ddil_ray.errors import ConfigError
from ddil_ray.runtime.demands import pool_roles, resized
from ddil_ray.runtime.fits import check_fits

ALL = ["base", "job", "kueue", "aws", "gcp", "slurm", "skypilot"]
AUTOSCALED = ["base", "job", "aws", "gcp"]


def asked(config, end):
    """(pool, GPUs) and CPUs of all actors, at their least number (0) or their most (1)."""
    gpus, cpus = Counter(), Counter()
    actors = [("trainer", config.trainer.workers[end])]
    actors += [(role, getattr(config, role).bounds[end]) for role in pool_roles(config).values()]
    actors += [("shift", 1)] if config.shift.enabled else []
    for name, count in actors:
        role = getattr(config, name)
        gpus[role.label_selector["pool"]] += count * role.num_gpus
        cpus[role.label_selector["pool"]] += count * role.num_cpus
    return gpus, cpus


def at_size(config, end):
    """The config with the least (0) or most (1) actors of every role."""
    return resized(config, {role: getattr(config, role).bounds[end] for role in pool_roles(config).values()})


@pytest.mark.parametrize("name", ALL)
def test_a_run_finds_room_on_the_least_nodes_by_its_own_checks(name):
    made = artefact(name)
    nodes = [node for pool in made.pools for node in pool.nodes(pool.least)]
    check_fits(made.config, nodes)


@pytest.mark.parametrize("name", AUTOSCALED)
def test_one_node_less_is_refused_so_no_pool_may_start_smaller(name):
    made = artefact(name)
    for short in made.pools:
        nodes = [n for pool in made.pools for n in pool.nodes(pool.least - (pool is short))]
        with pytest.raises(ConfigError, match=r"The roles must fit the cluster|must select a node of the cluster"):
            check_fits(made.config, nodes)


@pytest.mark.parametrize("name", ALL)
def test_pools_hold_exactly_what_their_roles_ask_for_at_least_and_at_most(name):
    made = artefact(name)
    for end, size in ((0, "least"), (1, "most")):
        gpus, cpus = asked(made.config, end)
        assert set(gpus) == {pool.labels["pool"] for pool in made.pools}
        for pool in made.pools:
            count = getattr(pool, size)
            assert gpus[pool.labels["pool"]] == count * pool.gpus, size
            assert cpus[pool.labels["pool"]] <= count * pool.cpus, size


@pytest.mark.parametrize("name", ALL)
def test_every_file_means_the_same_gpus(name):
    made = artefact(name)
    kinds = {pool.labels["pool"]: MACHINES[pool.machine] for pool in made.pools}
    assert kinds["trainer"][0] == accelerators.NVIDIA_H100
    assert kinds["rollout"][0] == (accelerators.NVIDIA_H100 if name == "skypilot" else accelerators.NVIDIA_L4)
    for pool in made.pools:
        assert MACHINES[pool.machine][1] in (None, pool.gpus)


def test_machines_that_are_there_are_as_many_as_the_roles_need_at_least():
    (config,) = documents(CLUSTER / "vm" / "local.yaml")
    assert len(config["provider"]["worker_ips"]) == sum(pool.least for pool in artefact("base").pools)
    assert len({config["provider"]["head_ip"], *config["provider"]["worker_ips"]}) == 10


def test_the_nodes_of_one_machine_hold_the_roles_of_their_preset_at_most_too():
    script = (CLUSTER / "local.sh").read_text()
    (names,) = re.findall(r"^for pool in (.+); do$", script, re.MULTILINE)
    (cpus,) = re.findall(r"--num-cpus=(\d+) --num-gpus=1", script)
    nodes = [node for name in names.split() for node in Pool({"pool": name}, 1, 1, float(cpus), 1, "").nodes(1)]
    config = load_config("pools/digits")
    for end in (0, 1):
        check_fits(at_size(config, end), nodes)
        gpus, used = asked(config, end)
        assert max(gpus.values()) <= 1
        assert max(used.values()) <= float(cpus)
    with pytest.raises(ConfigError, match="The roles must fit the cluster"):
        check_fits(config, nodes[:1])


def test_no_role_names_an_accelerator_that_an_autoscaler_would_not_know():
    """It learns labels from a group, but an `accelerator_type` from a node that runs alone."""
    config = load_config("pools/sd15-dmd2", ["data.source=mine"])
    roles = ["trainer", *pool_roles(config).values(), "shift", "evaluation"]
    assert {getattr(config, role).accelerator_type for role in roles} == {None}


def test_a_pool_of_other_nodes_would_be_noticed():
    """The check itself: half the GPUs of a node, or another label, do not pass."""
    made = artefact("base")
    trainer, rollout = made.pools
    for wrong in (
        [Pool({"pool": "train"}, 1, 1, 96, 8, ""), rollout],
        [trainer, Pool(rollout.labels, 4, 32, 6, 1, "")],
    ):
        nodes = [node for pool in wrong for node in pool.nodes(pool.least)]
        with pytest.raises(ConfigError):
            check_fits(made.config, nodes)
