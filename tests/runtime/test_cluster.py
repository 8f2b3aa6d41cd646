"""Pins what is refused before an actor starts, and how GPUs are shared, by numbers alone."""

from __future__ import annotations

import pytest
from runs import THREE_SOURCES, small_run

from ddil_ray.errors import ConfigError
from ddil_ray.runtime.cluster import check_fits, demands, with_gpu_shares


def _gpus(config):
    return {d.role: d.gpus for d in demands(config)}


def test_without_gpus_every_share_is_zero():
    assert set(_gpus(with_gpu_shares(small_run(), gpus=0)).values()) == {0.0}


def test_one_gpu_is_shared_evenly():
    config = with_gpu_shares(small_run(states=THREE_SOURCES), gpus=1)
    assert set(_gpus(config).values()) == {0.25}
    check_fits(config, {"CPU": 8, "GPU": 1})


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


@pytest.mark.parametrize(("resources", "expected"), [({"CPU": 2}, "need 3 CPUs and it has 2"), ({}, "it has 0")])
def test_more_than_the_cluster_has_is_refused_with_every_role(resources, expected):
    config = with_gpu_shares(small_run(), gpus=0)
    with pytest.raises(ConfigError, match=expected + r".*trainer 1 x 1, forward_states 1 x 1, student_rollouts 1 x 1"):
        check_fits(config, resources)


def test_more_gpus_than_the_cluster_has_are_refused():
    config = with_gpu_shares(small_run(trainer={"num_gpus": 4}), gpus=1)
    with pytest.raises(ConfigError, match=r"need 4 GPUs and it has 1 instead"):
        check_fits(config, {"CPU": 8, "GPU": 1})


def test_resources_nobody_has_are_refused():
    config = with_gpu_shares(small_run(student_rollouts={"accelerator_type": "H100"}), gpus=0)
    with pytest.raises(ConfigError, match=r"`student_rollouts`.*accelerator_type:H100"):
        check_fits(config, {"CPU": 8})


def test_pools_are_counted_per_source():
    config = small_run(labels={"placement": "pool", "num_actors": 2})
    labels = [d for d in demands(config) if d.role.startswith("labels")]
    assert [(d.role, d.count) for d in labels] == [("labels (forward)", 2), ("labels (student)", 2)]


def test_measuring_covariate_shift_asks_for_an_actor_of_its_own():
    config = with_gpu_shares(small_run(shift={"enabled": True, "num_cpus": 2}), gpus=1)
    assert _gpus(config) == dict.fromkeys(["trainer", "forward_states", "student_rollouts", "shift"], 0.25)
    with pytest.raises(ConfigError, match=r"need 5 CPUs and it has 4.*shift 1 x 2"):
        check_fits(config, {"CPU": 4, "GPU": 1})


def test_actors_that_measure_have_the_cluster_to_themselves():
    config = small_run(evaluation={"enabled": True, "num_actors": 4}, states=THREE_SOURCES)
    assert (
        with_gpu_shares(config, gpus=1).evaluation.num_gpus == 0.25
    )  # of one GPU, which four training roles share too
    assert with_gpu_shares(config, gpus=8).evaluation.num_gpus == 1.0
    check_fits(with_gpu_shares(config, gpus=0), {"CPU": 4})  # not the sum of both
    more = with_gpu_shares(small_run(evaluation={"enabled": True, "num_actors": 6}), gpus=0)
    with pytest.raises(ConfigError, match=r"need 6 CPUs and it has 4 instead \(evaluation 6 x 1\)"):
        check_fits(more, {"CPU": 4})
