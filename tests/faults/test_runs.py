"""Faults of models, devices and processes, injected into whole runs on a local Ray; each names its row of the matrix.

Those that kill from outside (a rollout actor, the hub, the trainer, the driver's signal) are in runtime/test_run.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty import session
from runs import small_run

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import read_journal
from ddil_ray.training.kept import from_parquet

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STUDENT_ALONE = {"student": 1.0, "forward": 0.0}


def _run(run_dir, factory, **changes):
    teacher = {"model": f"faulty:{factory}", "guidance": 1.0}
    return small_run(output=run_dir, teacher=teacher, **{"states": STUDENT_ALONE, **changes})


def _records(config):
    return read_journal(Path(config.output, config.name, "metrics.jsonl"))


def _last(config, name):
    return [r[name] for r in _records(config) if name in r][-1]


def _finished(config):
    return _last(config, "loss") and _last(config, "step") == config.trainer.steps


def test_exception_in_the_users_model_ends_the_run_with_one_message(run_dir):
    """Row: exception in user model. Not tried again: a deterministic error would meet every attempt."""
    config = _run(run_dir, "raises")
    expected = (
        r"^An actor of `student_rollouts` failed making student states: ValueError: these weights are of another model "
        r"\(faulty.py:\d+ in fail\)\. What was saved is there: `--resume` goes on from it\.$"
    )
    with pytest.raises(RunFailedError, match=expected):
        distill(config)
    assert len(list(Path(run_dir, "small", "checkpoints").glob("attempt-*"))) <= 1


def test_exception_in_the_trainer_is_not_tried_again(run_dir):
    """Row: train worker, user error."""
    config = _run(run_dir, "raises_in_trainer", states={"forward": 1.0})
    with pytest.raises(RunFailedError, match=r"^Training failed: TypeError: a student takes no such argument$"):
        distill(config)
    assert len(list(session("").glob("raised-*"))) == 1  # process


def test_a_device_that_fails_once_costs_one_actor(run_dir):
    """Row: exception in user model, of the device: its process is of no more use, and another takes its place."""
    config = _run(run_dir, "device_fails_once", trainer={"steps": 60})
    distill(config)
    assert _finished(config)
    assert _last(config, "actors/deaths/student") == 1


def test_a_device_that_lacks_memory_once_costs_nothing(run_dir):
    """Row: memory of the device, by torch's own error: the same process makes the block once more."""
    config = _run(run_dir, "lacks_memory_once", trainer={"steps": 60})
    distill(config)
    assert _finished(config)
    assert session("memory").exists()  # it did lack it
    assert not [r for r in _records(config) if "actors/deaths/student" in r]


def test_a_device_that_lacks_memory_ends_the_run_with_advice(run_dir):
    """Row: memory of the device."""
    expected = r"OutOfMemoryError: CUDA out of memory\..*Lower `student_rollouts\.batch_size`\."
    with pytest.raises(RunFailedError, match=expected):
        distill(_run(run_dir, "lacks_memory"))


def test_an_actor_that_dies_again_and_again_ends_the_run(run_dir):
    """Row: rollout actor crash, out of memory: gives up, and says what Ray knows of the last death."""
    config = _run(run_dir, "dies", faults={"max_deaths": 1})
    with pytest.raises(RunFailedError) as failed:
        distill(config)
    message = str(failed.value)
    assert message.startswith("Actors of `student_rollouts` must finish blocks, but one died 2 times without that")
    assert "Worker unexpectedly exits" in message  # what Ray knows of a process that was killed
    assert "lower `student_rollouts.batch_size`" in message


def test_an_actor_that_hangs_is_replaced(run_dir):
    """Row: hung actor. Its process ends itself after telling where it stands."""
    config = _run(run_dir, "hangs_once", trainer={"steps": 60}, faults={"timeout_s": 10.0})
    distill(config)
    assert _finished(config)
    assert _last(config, "actors/deaths/student") == 1


def test_few_poisoned_states_are_replaced_counted_and_kept(run_dir):
    """Row: NaN or inf in rollouts."""
    config = _run(run_dir, "poisons_few", faults={"max_poisoned": 0.2})
    distill(config)
    assert _finished(config)
    assert sum(r.get("rows/poisoned/student", 0) for r in _records(config)) > 0
    samples = list(Path(run_dir, "small", "poisoned").iterdir())
    assert samples
    assert not from_parquet(samples[0].read_bytes()).label.isfinite().all()


def test_poisoned_states_alone_end_the_run(run_dir):
    """Row: NaN or inf in rollouts, above the threshold."""
    config = _run(run_dir, "poisons_all")
    with pytest.raises(RunFailedError, match=r"all rows of a block from student were NaN.*are in .*small/poisoned"):
        distill(config)


def test_a_trainer_that_hangs_is_started_again(run_dir):
    """Row: hang, of the trainer."""
    config = _run(run_dir, "trainer_hangs_once", states={"forward": 1.0}, faults={"timeout_s": 6.0})
    distill(config)
    assert _finished(config)
    assert session("hang-trainer").exists()  # it did hang
