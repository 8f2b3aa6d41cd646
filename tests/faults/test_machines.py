"""Faults of machines and of the driver's process, each on a Ray of its own, hence in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from own_cluster import furthest, with_a_cluster_of_its_own
from partition import possible
from runs import small_run
from started import distilling

from ddil_ray.config import to_yaml
from ddil_ray.runtime.run import distill, resumed_config
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.tracking import read_journal

RAYS_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")
"""They hold nothing of a run, and take a minute to tell a head that is gone of its end."""

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_node_that_is_lost_with_all_rollout_actors_is_replaced_by_another(run_dir):
    """Row: node loss. The trainer waits, and goes on with actors on the new node, from the step that it was at."""
    found = _found("nodes.py", run_dir)
    assert found["last"] == 400
    assert found["went_on"]
    assert found["done_again"] == 0


def test_a_run_whose_trainer_finds_no_room_any_more_ends_and_says_so(run_dir):
    """Row: node loss, of the trainer's node, when no other comes."""
    message = _found("nodes.py", run_dir, "without room")["message"]
    assert message.startswith("The trainer must find room for its 1 workers, but the cluster had none for minutes")
    assert CheckpointStore(f"{run_dir}/small/checkpoints").newest(print).step >= 20


def test_an_elastic_trainer_that_finds_no_room_says_so_and_heeds_a_signal_at_once(run_dir):
    """Row: node loss, of the nodes of all workers, where Ray Train waits for others for ever."""
    found = _found("nodes.py", run_dir, "elastic")
    assert sum("its workers wait for room in the cluster" in text for text in found["said"]) == 1
    newest = CheckpointStore(f"{run_dir}/small/checkpoints").newest(print).step
    assert newest >= 20
    assert found["message"].startswith(f"Stopped by SIGTERM after step {newest} of 5000; everything is saved.")


@pytest.mark.parametrize("network", ["returns", "stays away"])
def test_a_network_that_breaks_leaves_no_row_lost_or_too_old(run_dir, network, recovery):
    """Row: network partition. Before Ray gives the node up nothing has happened; after that it is a lost node."""
    if not possible():
        pytest.skip("this user may not lay networks")
    found = _found("partition.py", run_dir, network)
    recovery(f"from when the network broke until 20 steps further than it then got ({network})", found["recovered_s"])
    assert found["last"] == 400
    assert found["went_on"]
    assert found["done_again"] == 0
    assert found["oldest"] <= found["bound"]
    assert (found["deaths"] > 0) == (network == "stays away")


def test_a_node_that_is_about_to_be_taken_away_has_a_checkpoint_saved_in_time(run_dir):
    """Row: preemption notice. It is the only checkpoint, and the loss of the node is no failure."""
    found = _found("preemption.py", run_dir)
    assert found["gave_notice"]
    assert found["last"] == 1500
    saved, *later = found["saved"]
    assert found["noticed"] < saved
    assert later == [1500]
    assert found["reached"] < 1500  # when the node was gone
    if found["went_back_to"] is not None:  # None where no step beyond the checkpoint was done in time
        assert saved < found["went_back_to"] <= saved + 10
    assert any("is taken away at" in text for text in found["said"])
    assert {"ActorLocationTracker", "AutoscalingCoordinator", "datasets_stats_actor"} <= set(found["elsewhere"])


def test_an_actor_that_takes_more_memory_than_its_node_may_have_ends_the_run_with_advice(run_dir):
    """Row: actor out of memory, as Ray's own monitor kills it."""
    if psutil.virtual_memory().available < 12 * 2**30:
        pytest.skip("this machine has too little memory to take too much of it")
    message = _found("little_memory.py", run_dir)["message"]
    assert message.startswith("Actors of `student_rollouts` must finish blocks, but one died 2 times without that")
    assert "low on memory" in message
    assert "lower `student_rollouts.batch_size`" in message


def _found(script, run_dir, *arguments):
    """What a script of tests/ that has a cluster of its own wrote."""
    with_a_cluster_of_its_own(script, run_dir, *arguments)
    return json.loads(Path(run_dir, "found.json").read_text())


def test_a_driver_that_dies_leaves_nothing_running_and_its_run_goes_on(tmp_path, run_dir, ray_cluster):
    """Row: driver crash."""
    model = {"model": "slow:slow_everywhere", "guidance": 1.0}
    config = small_run(output=run_dir, teacher=model, trainer={"steps": 150}, checkpoint={"every": 40})
    Path(f"{run_dir}.yaml").write_text(to_yaml(config))
    journal = Path(run_dir, "small", "metrics.jsonl")
    with distilling(tmp_path / "log", f"{run_dir}.yaml") as run:
        run.until(lambda: furthest(journal) >= 60)
        processes = {p: " ".join(p.cmdline()) for p in run.below()}
        run.process.kill()
        run.process.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert all(processes[p].startswith(RAYS_AGENTS) for p in alive), [processes[p] for p in alive]
    _, alive = psutil.wait_procs(alive, timeout=60)
    assert alive == []
    folder = str(Path(run_dir, "small"))
    before = max(r["step"] for r in read_journal(journal) if "loss" in r)
    distill(resumed_config(folder, []), resume=True)
    steps = [r["step"] for r in read_journal(journal) if "loss" in r]
    assert steps[-1] == 150
    after = steps[steps.index(before) + 1] if before < 150 else 150
    assert before - 40 <= after <= before + 2
