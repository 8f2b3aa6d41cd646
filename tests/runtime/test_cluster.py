"""Pins what is refused before an actor starts, and how GPUs are shared, by numbers alone."""

from __future__ import annotations

import json

import pytest
import ray
from runs import THREE_SOURCES, small_run

from ddil_ray.config import RunConfig, load_config
from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.runtime.cluster import WORKER_ENV, _worker_env, ray_session
from ddil_ray.runtime.demands import demands, pool_bounds, resized
from ddil_ray.runtime.fits import check_fits, room, with_gpu_shares


def _node(cpus=8.0, gpus=0.0, alive=True, resources=None, **labels):
    has = {"CPU": cpus, "GPU": gpus, **(resources or {})}
    return {"Alive": alive, "Resources": has, "Labels": {"ray.io/node-id": "0", **labels}}


def _gpus(config):
    return {d.role: d.gpus for d in demands(config)}


def test_without_gpus_every_share_is_zero():
    assert set(_gpus(with_gpu_shares(small_run(), gpus=0)).values()) == {0.0}


def test_one_gpu_is_shared_evenly():
    config = with_gpu_shares(small_run(states=THREE_SOURCES), gpus=1)
    assert set(_gpus(config).values()) == {0.25}
    check_fits(config, [_node(8, 1)])


def test_enough_gpus_give_a_whole_one_each():
    assert set(_gpus(with_gpu_shares(small_run(), gpus=8)).values()) == {1.0}


@pytest.mark.parametrize(("gpus", "share"), [(2, 0.5), (3, 0.5), (1, 0.25), (4, 1.0), (0.5, 0.12)])
def test_shares_fit_whole_gpus(gpus, share):
    """Four roles on three GPUs: two fit each at a half; at three quarters the fourth would wait for ever."""
    config = with_gpu_shares(small_run(states=THREE_SOURCES), gpus=gpus)
    assert set(_gpus(config).values()) == {share}


def test_what_is_set_is_kept_and_the_rest_shared():
    config = with_gpu_shares(small_run(trainer={"num_gpus": 1}, forward_states={"num_gpus": 0}), gpus=2)
    assert _gpus(config) == {"trainer": 1, "forward_states": 0, "student_rollouts": 1.0}


PARTS = {"parallel": "fsdp", "num_workers": 2}


@pytest.mark.parametrize(("gpus", "trainer", "others"), [(0, 0, 0), (3, 1, 0.5), (4, 1, 1)])
def test_workers_that_exchange_parts_get_whole_gpus_or_none(gpus, trainer, others):
    """Two workers and two other roles: of three GPUs the roles share the third."""
    config = with_gpu_shares(small_run(trainer=PARTS), gpus=gpus)
    assert _gpus(config) == {"trainer": trainer, "forward_states": others, "student_rollouts": others}
    check_fits(config, [_node(8, gpus)])


@pytest.mark.parametrize("gpus", [1, 2])
def test_workers_that_would_exchange_parts_on_shared_gpus_are_refused(gpus):
    config = with_gpu_shares(small_run(trainer=PARTS), gpus=gpus)
    with pytest.raises(ConfigError, match=r"`trainer.num_gpus` must be whole.*but is 0.(25|5) instead.*Set `trainer"):
        check_fits(config, [_node(8, gpus)])
    alone = with_gpu_shares(small_run(trainer={**PARTS, "num_workers": 1}), gpus=gpus)
    check_fits(alone, [_node(8, gpus)])  # which has nobody to exchange parts with
    check_fits(with_gpu_shares(small_run(trainer={"num_workers": 2}), gpus=gpus), [_node(8, gpus)])


@pytest.mark.parametrize(("nodes", "expected"), [([_node(2)], "need 3 CPUs and it has 2"), ([], "it has 0")])
def test_more_than_the_cluster_has_is_refused_with_every_role(nodes, expected):
    config = with_gpu_shares(small_run(), gpus=0)
    with pytest.raises(ConfigError, match=expected + r".*trainer 1 x 1, forward_states 1 x 1, student_rollouts 1 x 1"):
        check_fits(config, nodes)


def test_more_gpus_than_the_cluster_has_are_refused():
    config = with_gpu_shares(small_run(trainer={"num_gpus": 4}), gpus=1)
    with pytest.raises(ConfigError, match=r"need 4 GPUs and it has 1 instead"):
        check_fits(config, [_node(8, 1)])


def test_resources_nobody_has_are_refused():
    config = with_gpu_shares(small_run(student_rollouts={"accelerator_type": "H100"}), gpus=0)
    with pytest.raises(ConfigError, match=r"`student_rollouts`.*accelerator_type:H100"):
        check_fits(config, [_node(8)])


def test_pools_are_counted_per_source():
    config = small_run(labels={"placement": "pool", "num_actors": 2})
    labels = [d for d in demands(config) if d.role.startswith("labels")]
    assert [(d.role, d.count) for d in labels] == [("labels (forward)", 2), ("labels (student)", 2)]


def test_measuring_covariate_shift_asks_for_an_actor_of_its_own():
    config = with_gpu_shares(small_run(shift={"enabled": True, "num_cpus": 2}), gpus=1)
    assert _gpus(config) == dict.fromkeys(["trainer", "forward_states", "student_rollouts", "shift"], 0.25)
    with pytest.raises(ConfigError, match=r"need 5 CPUs and it has 4.*shift 1 x 2"):
        check_fits(config, [_node(4, 1)])


def test_actors_that_measure_have_the_cluster_to_themselves():
    config = small_run(evaluation={"enabled": True, "num_actors": 4}, states=THREE_SOURCES)
    assert (
        with_gpu_shares(config, gpus=1).evaluation.num_gpus == 0.25
    )  # of one GPU, which four training roles share too
    assert with_gpu_shares(config, gpus=8).evaluation.num_gpus == 1.0
    check_fits(with_gpu_shares(config, gpus=0), [_node(4)])  # not the sum of both
    more = with_gpu_shares(small_run(evaluation={"enabled": True, "num_actors": 6}), gpus=0)
    with pytest.raises(ConfigError, match=r"need 6 CPUs and it has 4 instead \(evaluation 6 x 1\)"):
        check_fits(more, [_node(4)])


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ("a", True),
        ("b", False),
        ("!b", True),
        ("!a", False),
        ("in(b, a)", True),
        ("in(b,c)", False),
        ("!in(a,b)", False),
    ],
)
def test_a_label_selector_selects_as_ray_does(value, fits):
    config = with_gpu_shares(small_run(student_rollouts={"label_selector": {"pool": value}}), gpus=0)
    nodes = [_node(pool="a")]
    if fits:
        check_fits(config, nodes)
        return
    with pytest.raises(
        ConfigError, match=r"`student_rollouts.label_selector` must select a node.*Labels there: pool=a"
    ):
        check_fits(config, nodes)


def test_a_node_without_the_label_is_selected_by_its_absence_alone():
    config = with_gpu_shares(small_run(trainer={"label_selector": {"pool": "!a"}}), gpus=0)
    check_fits(config, [_node()])
    with pytest.raises(ConfigError, match=r"`trainer.label_selector`"):
        check_fits(config, [_node(pool="a"), _node(alive=False)])


@pytest.mark.parametrize(
    ("role", "nodes", "expected"),
    [
        ({"num_actors": 3}, [_node(2, pool="a"), _node(9)], "hold 2 of its 3 actors of 1 CPUs"),
        (
            {"num_actors": 2, "num_cpus": 3},
            [_node(5, pool="a"), _node(1, pool="a"), _node(9)],
            "hold 1 of its 2 actors of 3 CPUs",
        ),
        (
            {"num_actors": 5, "num_gpus": 0.25},
            [_node(9, 1, pool="a"), _node(9, 1)],
            "hold 4 of its 5 actors of 1 CPUs and 0.25 GPUs",
        ),
    ],
)
def test_more_actors_than_the_selected_nodes_hold_are_refused(role, nodes, expected):
    """Of whole actors: one that needs 3 CPUs fits no node of 1, whatever the cluster has."""
    config = with_gpu_shares(small_run(student_rollouts={"label_selector": {"pool": "a"}, **role}), gpus=0)
    with pytest.raises(ConfigError, match=r"`student_rollouts` must fit the nodes that pool=a selects.*" + expected):
        check_fits(config, nodes)


@pytest.mark.parametrize(
    ("trainer", "nodes", "expected"),
    [
        ({"num_cpus": 6}, [_node(4), _node(4), _node(4)], "hold 0 of its 1 actors of 6 CPUs, each on one node"),
        ({"num_cpus": 4, "num_gpus": 1}, [_node(8), _node(2, 1)], "hold 0 of its 1 actors of 4 CPUs and 1 GPUs"),
        (
            {"num_workers": 4, "resources": {"disk": 2}},
            [_node(resources={"disk": 3}), _node(resources={"disk": 3})],
            "hold 2 of its 4 actors of 1 CPUs and 2 disk",
        ),
    ],
)
def test_what_fits_the_sum_but_no_node_is_refused_and_not_waited_for(trainer, nodes, expected):
    config = with_gpu_shares(small_run(trainer=trainer), gpus=sum(node["Resources"]["GPU"] for node in nodes))
    with pytest.raises(ConfigError, match="`trainer` must fit the nodes of the cluster, but they " + expected):
        check_fits(config, nodes)
    check_fits(config, [*nodes, _node(32, 4, resources={"disk": 8})])


def test_nodes_hold_whole_actors():
    nodes = [_node(7), _node(3, 1), _node(64, 8, alive=False)]
    assert room(nodes, {"CPU": 2}) == 4
    assert room(nodes, {"CPU": 0.1, "GPU": 0.25}) == 4
    assert room(nodes, {"CPU": 2, "GPU": 2}) == 0


def test_a_role_that_a_run_does_not_start_asks_for_nothing():
    config = with_gpu_shares(small_run(teacher_rollouts={"accelerator_type": "H100"}), gpus=0)
    check_fits(config, [_node(4)])


@pytest.mark.parametrize("selector", ["", "-a", "in()", "not a", "in(a", "!!a"])
def test_what_ray_cannot_read_as_a_selector_is_refused(selector):
    with pytest.raises(ValueError, match="label_selector"):
        small_run(student_rollouts={"label_selector": {"pool": selector}})


def test_pools_have_the_names_that_metrics_have():
    config = small_run(states={**THREE_SOURCES, "forward": 0.3, "mixed": 0.1}, student_rollouts={"num_actors": (1, 4)})
    assert pool_bounds(config) == {"forward": (1, 1), "student": (1, 4), "teacher": (1, 1), "mixed": (1, 4)}
    pooled = small_run(labels={"placement": "pool", "num_actors": 2})
    assert pool_bounds(pooled)["labels/student"] == (2, 2)


def test_a_resized_config_is_another():
    config = small_run()
    assert resized(config, {"student_rollouts": [2, 4]}).student_rollouts.bounds == (2, 4)
    assert config.student_rollouts.bounds == (1, 1)


def test_a_ray_that_does_not_start_in_time_is_told_in_one_message(monkeypatch):
    """What Ray raises then is an `Exception` of no other kind, as in its node.py."""

    def late(**options):
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RunFailedError, match=r"must start within 30 s.*RAY_ADDRESS"), ray_session(cpus=1):
        pass


@pytest.mark.parametrize("field", ["student_rollouts", "trainer", "shift"])
def test_a_share_of_more_than_one_gpu_is_refused_before_ray_does(field):
    said = rf"`{field}.num_gpus` must be whole above 1 or be 'auto', but is 1.5 instead"
    with pytest.raises(ConfigError, match=said):
        load_config("digits-pd", [f"{field}.num_gpus=1.5"], kind=RunConfig)
    assert getattr(load_config("digits-pd", [f"{field}.num_gpus=2"], kind=RunConfig), field).num_gpus == 2


def test_workers_of_a_cluster_get_what_this_process_has_but_for_what_its_job_gives_them(monkeypatch):
    for name, value in WORKER_ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert _worker_env() == {**WORKER_ENV, "OMP_NUM_THREADS": "8"}
    job = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "4"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert set(_worker_env()) == set(WORKER_ENV) - {"OMP_NUM_THREADS"}
