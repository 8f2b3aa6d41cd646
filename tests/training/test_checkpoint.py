"""Pins what a checkpoint of several processes holds, who can go on from it, and that a half-written one is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from spread import spread
from together import OBJECTIVES, go_on, train_all, write

from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.training.checkpoint import read_shared

SETTINGS = {"objective": OBJECTIVES["dmd2"]}
DONE, STEPS = 2, 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The checkpoint of two processes with parts of networks, as Ray Train puts their files together."""
    folder = tmp_path_factory.mktemp("run") / "attempt-1" / "checkpoint_1"
    folder.mkdir(parents=True)
    spread(2, _write_fsdp, str(folder))
    for mine in sorted(folder.glob("of-*")):
        shutil.copytree(mine, folder, dirs_exist_ok=True)
        shutil.rmtree(mine)
    return folder


def _write_fsdp(folder):
    write(folder, DONE, parallel="fsdp", **SETTINGS)


def _go_on(folders):
    ways = {"whole": "fsdp"}
    return {way: go_on(at, STEPS, parallel=ways.get(way, way), **SETTINGS) for way, at in folders.items()}


@pytest.fixture(scope="module")
def whole():
    """What one process learns without a break."""
    return train_all({"whole": SETTINGS}, STEPS)["whole"]


@pytest.fixture(scope="module")
def resumed(written, tmp_path_factory):
    """By number of processes, what each found; "whole" goes on with parts from what one process wrote."""
    alone = tmp_path_factory.mktemp("alone")
    write(str(alone), DONE, **SETTINGS)
    folders = {way: str(written) for way in ("fsdp", "ddp")} | {"whole": str(alone / "of-0")}
    return {1: [_go_on({"ddp": str(written)})], 2: spread(2, _go_on, folders)}


@pytest.mark.parametrize(("ranks", "way"), [(1, "ddp"), (2, "fsdp"), (2, "ddp"), (2, "whole")])
def test_any_number_of_processes_goes_on_from_a_checkpoint_in_any_way(whole, resumed, ranks, way):
    """With the same losses, weights and moments as without a break; what is a rank's own where there are as many."""
    found = [each[way] for each in resumed[ranks]]
    for step, metrics in enumerate(whole["metrics"][DONE:]):
        for name in metrics.keys() & {"loss", "critic/loss"}:
            mean = sum(float(each["metrics"][step][name]) for each in found) / ranks
            assert mean == pytest.approx(float(metrics[name]), abs=1e-6)
    assert found[0]["state"].keys() == whole["state"].keys()
    for name, tensor in whole["state"].items():
        torch.testing.assert_close(found[0]["state"][name], tensor, rtol=1e-4, atol=1e-6)
    for rank, each in enumerate(found):
        assert each["rank"] == ({"rank": rank} if ranks == 2 and way != "whole" else None)
        assert list(each["rounds"]) == [4]


def test_the_rounds_are_whole_without_a_process_group(written, whole):
    shared = read_shared(written)
    assert shared["step"] == DONE
    (weights,) = shared["learner"]["rounds"].values()
    assert {f"student {name}" for name in weights} <= whole["state"].keys()
    assert not any(tensor.is_meta for tensor in weights.values())
    assert all(tensor.is_meta for tensor in shared["learner"]["student"].values())


def test_every_process_writes_its_part_alone(written):
    """Weights, average, moments and critic with moments: seven copies of a network, of which each wrote a half."""
    files = [json.loads((written / f"manifest-{rank}-of-2.json").read_text())["files"] for rank in range(2)]
    parts = [mine[f"parts-{rank}.safetensors"]["size"] for rank, mine in enumerate(files)]
    assert parts[0] == pytest.approx(parts[1], rel=0.05)
    assert set(files[0]) == {"learner.safetensors", "rank-0.safetensors", "parts-0.safetensors"}
    assert set(files[1]) == {"rank-1.safetensors", "parts-1.safetensors"}


@pytest.mark.parametrize(
    "file",
    [
        "learner.safetensors",
        "rank-1.safetensors",
        "parts-1.safetensors",
        "manifest-0-of-2.json",
        "manifest-1-of-2.json",
    ],
)
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "missing"])
def test_a_half_written_checkpoint_is_not_the_newest(written, tmp_path, file, cut):
    store = CheckpointStore(str(tmp_path))
    for name in ("checkpoint_1", "checkpoint_2"):
        shutil.copytree(written, tmp_path / "attempt-1" / name)
    assert Path(store.newest(pytest.fail).path).name == "checkpoint_2"
    broken = tmp_path / "attempt-1" / "checkpoint_2" / file
    content = broken.read_bytes()
    broken.unlink()
    if cut:
        broken.write_bytes(content[: len(content) // 2])
    said: list[str] = []
    assert Path(store.newest(said.append).path).name == "checkpoint_1"
    assert len(said) == 1
