"""Pins what becomes of a run's records in Prometheus: values, counters, tags, and all of it in a live run."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import ray
from observability import questions, samples, selectors, troubled_run
from runs import small_run, when

from ddil_ray.errors import RunStoppedError
from ddil_ray.runtime.metrics import METRICS, RunMetrics
from ddil_ray.runtime.run import distill
from ddil_ray.runtime.storage import CheckpointStore


def _read(metrics, record):
    """{name: (value, tags beside the run)}."""
    found = {}
    for metric, tags, value in metrics.read(record):
        assert tags.pop("run") == "mine"
        found[metric.exported] = (value, tags)
    return found


def test_a_key_goes_to_its_metric_and_what_is_behind_it_to_the_tag():
    record = {
        "step": 4, "total_steps": 9, "loss": 0.5, "loss/student": 0.7,
        "trainer/stall_share": 0.1, "trainer/stall_share/teacher": 0.2,
        "actors/busy_share/labels/student": 0.9, "shift/energy/step_2": 0.3, "rows/evicted/student": 3,
        "critic/loss": 1.0,
    }  # fmt: skip
    assert _read(RunMetrics("mine", {}), record) == {
        "ray_ddil_step": (4, {}),
        "ray_ddil_planned_steps": (9, {}),
        "ray_ddil_loss": (0.5, {}),
        "ray_ddil_source_loss": (0.7, {"source": "student"}),
        "ray_ddil_stall_ratio": (0.1, {}),
        "ray_ddil_source_stall_ratio": (0.2, {"source": "teacher"}),
        "ray_ddil_actor_busy_ratio": (0.9, {"pool": "labels/student"}),
        "ray_ddil_shift_energy": (0.3, {"sampler_step": "step_2"}),
        "ray_ddil_rows_dropped_total": (3, {"source": "student", "reason": "evicted"}),
    }


def test_only_the_start_and_training_tell_the_step_that_the_run_is_at():
    metrics = RunMetrics("mine", {})
    assert _read(metrics, {"step": 0, "total_steps": 20})["ray_ddil_step"] == (0, {})
    assert _read(metrics, {"step": 8, "checkpoint/step": 8}) == {"ray_ddil_checkpoint_step": (8, {})}
    assert "ray_ddil_step" in _read(metrics, {"step": 10, "total_steps": 20, "loss": 1.0})


def test_counters_get_what_is_new_also_of_those_who_count_from_the_start_or_begin_anew():
    metrics = RunMetrics("mine", {})
    deaths, made = "ray_ddil_actor_deaths_total", "ray_ddil_rows_made_total"
    told = [{"actors/deaths/student": n, "rows/made/student": 16} for n in (2, 2, 5, 1)]
    read = [_read(metrics, record) for record in told]
    assert [r.get(deaths, (0,))[0] for r in read] == [2, 0, 3, 1]
    assert [r[made][0] for r in read] == [16] * 4


def test_keys_and_names_are_told_apart_and_what_shares_a_name_is_one_metric():
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
        assert not metric.name.endswith("_total")
        assert metric.key.endswith("/") == (metric.tag is not None)
        same = [other for other in METRICS if other.name == metric.name]
        assert len({(other.tags, other.help, other.counts) for other in same}) == 1
        assert len({other.reason for other in same}) == len(same)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_scrape_of_a_live_run_finds_all_that_dashboard_and_alerts_ask_for(run_dir):
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    wanted = {selector.name for expression in questions() for selector in selectors(expression)}
    seen = {}

    def all_there():
        seen.clear()
        seen.update({s.name: s.labels for s in samples(port) if s.labels["run"] == "watched"})
        return wanted <= seen.keys()

    stopped = when(all_there, lambda: os.kill(os.getpid(), signal.SIGTERM), timeout_s=200)
    with pytest.raises(RunStoppedError):
        distill(troubled_run("watched", run_dir))
    assert stopped.result(), wanted - seen.keys()
    tags = {metric.exported: set(metric.tags) for metric in METRICS}
    for name in wanted:
        assert tags[name] <= seen[name].keys()
    _until_gone(port)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_tells_the_step_that_it_is_at_before_it_has_a_record(run_dir):
    config = small_run(name="silent", output=run_dir, trainer={"steps": 20_000}, tracking={"log_every": 20_000})
    _stopped_at(0, config)
    saved = CheckpointStore(f"{run_dir}/silent/checkpoints").newest(print)
    assert saved.step > 0
    _stopped_at(saved.step, config, resume=True)


def _stopped_at(step, config, **how):
    """Distil until a scrape says that the run is at `step`."""
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    wanted = {"ray_ddil_step": step, "ray_ddil_planned_steps": config.trainer.steps}

    def told():
        return {s.name: s.value for s in samples(port) if s.labels["run"] == config.name and s.name in wanted} == wanted

    stopped = when(told, lambda: os.kill(os.getpid(), signal.SIGTERM), timeout_s=100)
    with pytest.raises(RunStoppedError):
        distill(config, **how)
    assert stopped.result()


def _until_gone(port):
    """The process goes on, and nothing says that the run does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = {s.name for s in samples(port) if s.labels["run"] == "watched" and not s.name.endswith("_total")}
        if not left:
            return
        time.sleep(1)
    raise AssertionError(left)
