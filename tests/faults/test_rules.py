"""The rules by which faults are judged, without Ray: what is lived through, and what a run ends with."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from runs import DMD2, small_run

from ddil_ray.errors import ConfigError, RunFailedError, StateError, StreamLostError
from ddil_ray.runtime.admission import Ask
from ddil_ray.runtime.health import Health, Newcomer
from ddil_ray.runtime.poison import Sieve
from ddil_ray.runtime.reader import StreamReader
from ddil_ray.runtime.verdict import explain, would_fail_again
from ddil_ray.runtime.watchdog import Watchdog
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import SourceContext, StateRequest, make_states
from ddil_ray.training.kept import from_parquet
from ddil_ray.training.learner import Learner
from ddil_ray.training.recipe import Recipe


def _batch(rows=8):
    return StateBatch(
        x_t=torch.randn(rows, 1, 8, 8),
        t=torch.rand(rows, dtype=torch.float64),
        cond=torch.arange(rows) % 10,
        w=torch.zeros(rows),
        origin=torch.ones(rows, dtype=torch.int8),
        version=torch.full((rows,), 12),
        phase=torch.zeros(rows, dtype=torch.int64),
        label=torch.randn(rows, 1, 8, 8),
    )


# NaN or inf in states or labels ---------------------------------------------------------------------------------


def _sieve(folder=None, most=0.5, actor="a"):
    return Sieve("student_rollouts", "student", actor, folder=folder, most=most)


def test_sound_states_pass_as_they_are():
    batch = _batch()
    assert _sieve().sift(batch) is batch
    unlabelled = batch.labelled(torch.zeros(8, 0))
    assert _sieve().sift(unlabelled) is unlabelled


@pytest.mark.parametrize("part", ["x_t", "label"])
def test_wrong_rows_are_replaced_by_sound_ones_counted_and_kept_to_be_looked_at(part, tmp_path):
    batch, sieve = _batch(), _sieve(str(tmp_path / "poisoned"))
    getattr(batch, part)[2, 0, 3, 3] = torch.nan
    getattr(batch, part)[5, 0, 0, 0] = -torch.inf
    sifted = sieve.sift(batch)
    assert len(sifted) == 8
    sound = [0, 1, 3, 4, 6, 7]
    torch.testing.assert_close(sifted.x_t[sound], batch.x_t[sound])
    for row in (2, 5):
        assert any(torch.equal(sifted.x_t[row], batch.x_t[other]) for other in sound)
        assert bool(sifted.label[row].isfinite().all())
    assert sieve.count == 2
    (file,) = (tmp_path / "poisoned").iterdir()
    assert from_parquet(file.read_bytes()).cond.tolist() == [2, 5]


def test_actors_of_one_pool_leave_samples_beside_each_other(tmp_path):
    wrong = _batch()
    wrong.x_t[0] = torch.nan
    for actor in ("a", "b"):
        _sieve(str(tmp_path), actor=actor).sift(wrong)
    assert len(list(tmp_path.iterdir())) == 2


def test_few_wrong_rows_are_lived_through_and_more_end_the_run(tmp_path):
    sieve, wrong = _sieve(str(tmp_path), most=0.01), _batch()
    wrong.x_t[0] = torch.inf
    for _ in range(5):  # 5 of 512
        sieve.sift(wrong)
    with pytest.raises(RunFailedError, match=r"`student_rollouts`.*1\.17%.*from student.*`faults.max_poisoned`"):
        sieve.sift(wrong)
    assert len(list(tmp_path.iterdir())) == 6
    late = _sieve(most=0.01)
    for _ in range(1000):
        late.sift(_batch())
    for _ in range(5):
        late.sift(wrong)
    with pytest.raises(RunFailedError, match=r"1\.17%"):  # however much was right before
        late.sift(wrong)


def test_a_block_without_a_sound_row_ends_the_run():
    batch = _batch()
    batch.label[:] = torch.nan
    with pytest.raises(RunFailedError, match="all rows of a block from student"):
        _sieve(most=1.0).sift(batch)


# NaN or inf in losses -------------------------------------------------------------------------------------------


def _learner(**changes):
    recipe = Recipe(small_run(**changes))
    made = recipe.ingredients()
    student = recipe.student_of(made.teacher)
    recipe.equip(made.objective, made.teacher, made.data.images, made.data.labels)
    learner = Learner(student, made.objective, recipe.optimizer_settings())
    context = SourceContext(
        made.teacher.schedule, made.teacher.sample_shape, recipe.conditions(made.data), images=made.data.images
    )
    states = make_states(context, made.objective.phases[0], StateRequest(0, 0, 0, 16, 0), version=-1)
    with torch.no_grad():
        label = made.objective.label(made.expert(), states, made.objective.phases[0])
    return learner, states.labelled(label)


def _poisoned(batch):
    bad = replace(batch, x_t=batch.x_t.clone())
    bad.x_t[3] = torch.nan
    return bad


def _weights(learner):
    return [p.detach().clone() for p in learner.student.network.parameters()]


@pytest.mark.parametrize("changes", [{}, {"objective": DMD2}, {"trainer": {"accumulate": 2}}], ids=str)
def test_a_step_whose_loss_is_not_finite_moves_nothing_and_is_counted(changes):
    learner, batch = _learner(**changes)
    learner.update(batch)
    before, average = _weights(learner), {n: p.clone() for n, p in learner.ema.weights().items()}
    critic = [p.detach().clone() for p in learner.objective.critic.parameters()] if learner.objective.critic else []
    metrics = learner.update(_poisoned(batch))
    assert not {"loss", "grad_norm", "critic/loss"} & set(metrics)
    assert all(map(torch.equal, before, _weights(learner)))
    assert all(torch.equal(average[n], p) for n, p in learner.ema.weights().items())
    assert all(map(torch.equal, critic, learner.objective.critic.parameters())) if critic else True
    assert learner.skipped == 1
    for _ in range(2):  # one of two moves a student that takes turns with a critic
        learner.update(batch)
    assert not all(map(torch.equal, before, _weights(learner)))


def test_a_gradient_that_is_not_finite_moves_nothing():
    learner, batch = _learner()
    before = _weights(learner)
    hook = next(learner.student.network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    learner.update(batch)
    assert learner.skipped == 1
    assert all(map(torch.equal, before, _weights(learner)))
    hook.remove()
    learner.update(batch)
    assert learner.skipped == 1
    assert not all(map(torch.equal, before, _weights(learner)))


def _grow(learner, factor):
    """Let every gradient of the first parameter be `factor` times what it is."""
    return next(learner.student.network.parameters()).register_hook(lambda gradient: gradient * factor)


def test_gradients_beyond_fp16_lower_its_scale_and_are_no_fault():
    learner, batch = _learner(trainer={"precision": "fp16"}, faults={"max_skipped_steps": 0})
    scaler, before = learner.optimizers["student"].scaler, _weights(learner)
    hook = _grow(learner, torch.inf)
    for halvings in range(1, 4):
        assert "loss" not in learner.update(batch)
        assert scaler.get_scale() == 2**16 / 2**halvings
    hook.remove()
    assert learner.skipped == 0
    assert all(map(torch.equal, before, _weights(learner)))
    assert "loss" in learner.update(batch)
    assert not all(map(torch.equal, before, _weights(learner)))


def test_gradients_that_are_never_finite_in_fp16_end_the_run_and_its_scale_stays():
    learner, batch = _learner(trainer={"precision": "fp16"}, faults={"max_skipped_steps": 2})
    before, hook = _weights(learner), _grow(learner, torch.nan)
    for _ in range(16 + 2):  # halvings of 65536, then what may be left out
        learner.update(batch)
    assert learner.skipped == 2
    with pytest.raises(RunFailedError, match=r"must stay finite, but gradients.*3 steps in a row"):
        learner.update(batch)
    assert learner.optimizers["student"].scaler.get_scale() == 1
    hook.remove()
    learner.update(batch)
    assert not all(map(torch.equal, before, _weights(learner)))
    assert all(bool(weight.isfinite().all()) for weight in _weights(learner))


def test_a_critic_that_goes_on_does_not_hide_a_student_that_does_not():
    learner, batch = _learner(objective=DMD2, faults={"max_skipped_steps": 2})
    before, _ = _weights(learner), _grow(learner, torch.nan)
    with pytest.raises(RunFailedError, match=r"must stay finite, but gradients"):
        [learner.update(batch) for _ in range(3 * DMD2["student_every"])]
    assert learner.skipped == 3
    assert all(map(torch.equal, before, _weights(learner)))


def test_a_loss_that_is_not_finite_leaves_the_scale_of_fp16_alone():
    learner, batch = _learner(trainer={"precision": "fp16"})
    learner.update(_poisoned(batch))
    assert (learner.skipped, learner.optimizers["student"].scaler.get_scale()) == (1, 2**16)


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run():
    learner, batch = _learner(faults={"max_skipped_steps": 2})
    for _ in range(3):  # a sound step in between starts the count again
        learner.update(_poisoned(batch))
        learner.update(batch)
    learner.update(_poisoned(batch))
    learner.update(_poisoned(batch))
    with pytest.raises(RunFailedError, match=r"1 of 16 rows gave NaN.*3 steps in a row.*--resume"):
        learner.update(_poisoned(batch))


def test_a_phase_does_not_end_with_steps_that_were_left_out():
    learner, batch = _learner()
    learner.update(_poisoned(batch))
    with pytest.raises(RunFailedError, match="must stay finite"):
        learner.finish()


def test_a_phase_may_end_with_a_step_that_only_a_critic_missed():
    learner, batch = _learner(objective=DMD2)
    while "loss" not in learner.update(batch):
        pass
    learner.update(_poisoned(batch))  # the student rests
    assert learner.skipped == 1
    learner.finish()
    learner.update(_poisoned(batch))
    with pytest.raises(RunFailedError, match="must stay finite"):
        learner.finish()


# Actors that die, hang, run out of memory -----------------------------------------------------------------------


def _join(health, actor="a", *, worker="w", now=0.0, cause="", incarnation=1):
    health.joined(Newcomer(actor, worker, "student", "student_rollouts", incarnation), now=now, cause=cause)


def test_actors_that_finish_blocks_in_between_may_die_for_ever():
    health = Health(max_deaths=2)
    for n in range(100):
        _join(health, now=float(n))
        if n % 2:
            health.finished("a")
    assert health.failure is None
    assert health.died["student"] == 99


def test_a_node_may_go_with_any_number_of_actors():
    health = Health(max_deaths=1)
    for _ in range(2):
        for actor in "abcdefgh":
            _join(health, actor)
    assert health.failure is None
    assert health.died["student"] == 8


def test_actors_that_wait_may_die_for_ever():
    health = Health(max_deaths=1)
    for n in range(10):
        _join(health)
        health.doing("a", "waits for credit", now=float(n), rests=True)
    assert health.failure is None


def test_an_actor_that_dies_of_its_work_again_and_again_ends_the_run_with_the_last_cause():
    health = Health(max_deaths=2)
    for n, actor in enumerate("aabaxa"):
        assert health.failure is None
        _join(health, actor, now=float(n), cause=f"cause {n}")
        health.doing(actor, "is at block 3", now=float(n))
    assert health.failure == (
        "Actors of `student_rollouts` must finish blocks, but one died 3 times without that (`faults.max_deaths`: 2); "
        "last cause: cause 5."
    )


def test_an_actor_without_memory_is_told_what_to_lower():
    health = Health(max_deaths=0)
    _join(health)
    _join(health, cause="Worker was killed due to the node running low on memory.")
    assert "lower `student_rollouts.batch_size`" in health.failure


def test_an_actor_that_hangs_ends_the_run_at_the_third_time_however_long_it_took():
    health = Health(max_deaths=100)
    _join(health)
    for n in range(3):
        assert health.failure is None
        health.last_words("a", "hung: block 7 of student states for 1801 s, at forward (net.py:3)", hung=True)
        _join(health, now=2000.0 * n)
    assert "one hung 3 times" in health.failure
    assert "forward (net.py:3)" in health.failure


def test_what_actors_are_at_is_told_of_those_of_the_newest_stream():
    health = Health()
    assert health.standing("student", now=0) == "none of its actors has started"
    _join(health, "old")
    _join(health, "new", incarnation=2)
    health.doing("new", "waits for weights", now=10.0, rests=True)
    health.doing("new", "waits for weights", now=12.0, rests=True)
    assert health.standing("student", now=15.0) == "an actor of student_rollouts waits for weights since 5 s"


def test_an_actor_is_at_a_block_since_it_began_that_one_though_all_are_called_alike():
    health = Health()
    _join(health)
    for began in (10.0, 5000.0):
        health.doing("a", Ask("labels/student", 0, None, (0, 0)).work, now=began)
    assert health.standing("student", now=5003.0) == "an actor of student_rollouts labels a block since 3 s"


def _hang_here(begun, release):
    begun.set()
    release.wait(20)


def test_work_that_hangs_is_told_with_its_stack_and_its_process_ended():
    told, left, begun, release = [], threading.Event(), threading.Event(), threading.Event()
    watchdog = Watchdog(told.append, timeout_s=0.2, leave=lambda code: left.set())

    def work():
        watchdog.begin("block 3")
        _hang_here(begun, release)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(10)
        assert left.wait(10)
    finally:
        watchdog.stop()
        release.set()
    thread.join()
    assert told[0].startswith("hung: block 3 for ")
    assert "_hang_here (test_rules.py:" in told[0]


def test_rest_is_no_hang_and_slow_work_has_ten_times_its_median():
    told = []
    watchdog = Watchdog(told.append, timeout_s=0.3, leave=lambda code: None)
    for _ in range(3):
        watchdog.begin("block")
        time.sleep(0.15)
        watchdog.end()
    time.sleep(1.2)  # nothing is owed
    watchdog.begin("block")  # 1.5 s are allowed
    time.sleep(1.0)
    watchdog.end()
    assert told == []


class _Silent:
    """A stream whose actors never make a block."""

    def __init__(self):
        self.ended = threading.Event()

    def iter_batches(self, **_):
        self.ended.wait(30)
        return iter(())


def test_a_trainer_that_gets_no_block_says_what_the_actors_of_the_stream_are_at():
    shard = _Silent()
    reader = StreamReader(Origin.MIXED, shard, 4, patience_s=0.2, standing=lambda origin: f"{origin.label}: all wait")
    reader.start()
    with pytest.raises(RunFailedError, match=r"A block of mixed states must come within 0.2 s.*: mixed: all"):
        reader.next()
    shard.ended.set()
    with pytest.raises(RunFailedError, match="ended before training did"):
        reader.next()


class _Garbage:
    """A stream whose blocks are none of states."""

    def iter_batches(self, **_):
        return iter([{"x": [1.0]}])


def test_a_block_that_is_none_of_states_is_told_as_that_and_not_as_a_lost_stream():
    reader = StreamReader(Origin.MIXED, _Garbage(), 4, patience_s=5.0, standing=str)
    reader.start()
    with pytest.raises(StateError):
        reader.next()


# What is tried again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ValueError("x"), True),
        (KeyError("x"), True),
        (ConfigError("x"), True),
        (RunFailedError("x"), True),
        (StreamLostError("x"), False),
        (OSError("x"), False),
        (RuntimeError("NCCL error"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_fail_again_is_not_tried_again(error, again):
    assert would_fail_again(error) is again


def test_what_a_trainer_said_is_forgotten_when_it_begins_again():
    health = Health()
    health.last_words("trainer-1", "hung: step 7 for 1801 s", hung=True)
    health.last_words("a", "hung: block 7", hung=True)
    assert health.trainer_words() == "hung: step 7 for 1801 s"
    health.began()
    assert health.trainer_words() is None


@pytest.mark.parametrize(
    "words",
    [
        "ray.exceptions.OutOfDiskError: Local disk is full",
        "The stream of forward states broke off: The object cannot be created because the local object store is full "
        "and the local disk's utilization is over capacity (95% by default).",
    ],
)
def test_a_full_disk_is_told_from_what_ray_says(words):
    from ray.train import WorkerGroupError

    assert "--object-spilling-directory" in explain(WorkerGroupError(words, {0: StreamLostError("x")}))


def test_the_reason_is_found_under_what_ray_says():
    from ray.train import ControllerError, WorkerGroupError

    assert explain(ControllerError(RunFailedError("the reason"))) == "the reason"
    wrapped = WorkerGroupError("two lines\nof Ray", {1: StreamLostError("the stream")})
    assert explain(wrapped) == "the stream"
    mistake = WorkerGroupError("two lines\nof Ray", {0: TypeError("no such argument\nmore")})
    assert explain(mistake) == "Training failed: TypeError: no such argument"
    died = WorkerGroupError("two lines\nof Ray", {0: OSError("gone")})
    assert explain(died) == "Training failed: of Ray"
    assert "the trainer hung: step 3" in explain(died, "hung: step 3 for 9000 s, at forward (net.py:3)")
