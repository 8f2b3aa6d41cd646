"""Grids on a local Ray: paired, resumable, and going on where a run fails."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import yaml
from faulty import session
from rich.console import Console
from runs import small_run

from ddil_ray.ablation.grid import grid_runs
from ddil_ray.config import AblationConfig, load_config, to_yaml
from ddil_ray.config.ablation import RunResources
from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.runtime import ablation
from ddil_ray.runtime.ablation import ablate, workers_that_fit
from ddil_ray.tracking import View
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

EVALUATION = {"enabled": True, "num_samples": 32, "steps": [1, 2], "teacher_steps": 4}
FORWARD = {"states": {"forward": 1.0, "student": 0.0}}
DIVERGES = {"trainer": {"lr": 1e30, "clip_norm": 1e30}}


@pytest.fixture
def spec(tmp_path):
    """Make an ablation of the small run of the given arms."""

    def make(**arms):
        base = tmp_path / "base.yaml"
        base.write_text(to_yaml(small_run(evaluation=EVALUATION)))
        path = tmp_path / "spec.yaml"
        tree = {"name": "small", "base": str(base), "seeds": [0, 1], "compare": "states", "axes": {"states": arms}}
        tree["resources"] = {"num_cpus": 6}  # two at once on the tests' cluster
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_config(str(path), kind=AblationConfig)

    return make


def _ablate(spec, out):
    """(report.json's content, what was said)"""
    out.mkdir(exist_ok=True)
    said = io.StringIO()
    report = ablate(spec, out, view=View(Console(file=said, width=200)))
    assert report == json.loads((out / "report.json").read_text())
    return report, said.getvalue()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_is_run_reported_and_only_completed_by_the_same_command_again(spec, tmp_path):
    out = tmp_path / "out"
    small = spec(forward=FORWARD, half={})
    report, said = _ablate(small, out)
    assert "4 runs, 0 of them done before" in said
    assert {(r["arm"], r["seed"]) for r in report["runs"]} == {(a, s) for a in ("forward", "half") for s in (0, 1)}
    kept = out / "runs" / "half" / "seed-1" / "metrics.json"
    outcome = json.loads(kept.read_text())
    (run,) = [r for r in grid_runs(small) if (r.arm, r.seed) == ("half", 1)]
    inline = distill_inline(Recipe(run.config))
    assert [r["loss"] for r in outcome["records"]] == pytest.approx([r["loss"] for r in inline.records])
    assert set(outcome["seconds"]) >= {"rollout", "label", "train"}
    assert report["runs"][-1]["scores"] == outcome["scores"]["student"]
    assert (out / "report.csv").read_text().count("\n") > 4
    assert "data:image/png;base64," in (out / "report.html").read_text()

    stamp = kept.stat().st_mtime_ns
    (out / "runs" / "forward" / "seed-0" / "metrics.json").unlink()
    again, said = _ablate(small, out)
    assert "4 runs, 3 of them done before" in said
    assert kept.stat().st_mtime_ns == stamp
    assert again["comparisons"] == report["comparisons"]


class BrokenOnce:
    """A worker whose process does nothing right any more, if it is the first of all."""

    def __init__(self, resources, code_allowed):
        try:
            session("first-worker").touch(exist_ok=False)
            self._broken = True
        except FileExistsError:
            self._broken = False

    def ready(self):
        pass

    def run(self, run):
        if self._broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        time.sleep(0.5)
        return run.label


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_is_broken_does_not_fail_all_runs(spec, monkeypatch):
    monkeypatch.setattr(ablation, "_Worker", BrokenOnce)
    small, finished = spec(forward=FORWARD, half={}), []
    runs = [run for run in grid_runs(small) for _ in range(3)]
    ablation.run_grid(runs, small.resources, finished=lambda run, label: finished.append(label), failed=pytest.fail)
    assert sorted(finished) == sorted(run.label for run in runs)


class Unbuilt:
    """A worker that does not start."""

    def __init__(self, *arguments):
        raise ImportError("no module named so")

    def ready(self):
        pass


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_processes_that_do_not_start_are_one_message(spec, monkeypatch):
    monkeypatch.setattr(ablation, "_Worker", Unbuilt)
    small = spec(forward=FORWARD, half={})
    with pytest.raises(RunFailedError, match=r"must start, but none does: .*no module named so"):
        ablation.run_grid(grid_runs(small), small.resources, finished=pytest.fail, failed=pytest.fail)


def test_runs_find_their_files_from_any_working_directory(spec, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "digits").mkdir()  # which is no data here
    monkeypatch.chdir(tmp_path)
    sources = {arm: {"data": {"source": arm}} for arm in ("images", "digits")}
    found = {run.arm: run.anchored() for run in grid_runs(spec(**sources))}
    assert {arm: run.config.data.source for arm, run in found.items()} == {
        "images": str(tmp_path / "images"),
        "digits": "digits",
    }
    assert found["digits"].reference.data.source == str(tmp_path / "images")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_fails_is_tried_again_and_reported_and_the_rest_goes_on(spec, tmp_path):
    report, said = _ablate(spec(forward=FORWARD, wild=DIVERGES, half={}), tmp_path / "out")
    assert {(f["arm"], f["seed"]) for f in report["failures"]} == {("wild", 0), ("wild", 1)}
    assert "The loss must stay finite" in report["failures"][0]["error"]
    assert {r["arm"] for r in report["comparisons"]} == {"half"}
    assert said.count("failed: RunFailedError") == 2
    assert "wild, seed 0 failed twice" in (tmp_path / "out" / "report.html").read_text()
    wild = spec(wild=DIVERGES, wilder={"trainer": {"lr": 1e31, "clip_norm": 1e30}})
    with pytest.raises(RunFailedError, match="Every run failed; the first with RunFailedError"):
        _ablate(wild.model_copy(update={"seeds": (0,)}), tmp_path / "none")


def test_bad_combinations_are_known_before_ray_starts(spec, tmp_path):
    import ray

    before = ray.is_initialized()
    with pytest.raises(ConfigError, match=r"none: `data.source`"):
        _ablate(spec(forward=FORWARD, none={"data": {"source": "/nowhere"}}), tmp_path / "out")
    assert ray.is_initialized() == before
    assert not Path(tmp_path, "out", "runs").exists()


def _node(cpus, gpus=0.0):
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": {}}


def test_as_many_runs_go_at_once_as_fit():
    assert workers_that_fit(RunResources(num_cpus=2), [_node(7.0)]) == 3
    assert workers_that_fit(RunResources(num_cpus=1, num_gpus=0.25), [_node(16.0, 1.0)]) == 4
    refused = r"`resources` must fit a node.*1 CPUs and 1 GPUs.*the nodes have 4 and 0 instead"
    with pytest.raises(ConfigError, match=refused):
        workers_that_fit(RunResources(num_gpus=1), [_node(4.0)])


def test_a_run_that_fits_the_sum_of_nodes_but_none_of_them_is_refused_and_not_waited_for():
    with pytest.raises(ConfigError, match=r"needs 6 CPUs and 0 GPUs, and the nodes have 4 and 0 instead"):
        workers_that_fit(RunResources(num_cpus=6), [_node(4.0), _node(4.0)])
