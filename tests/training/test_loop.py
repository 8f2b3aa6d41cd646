"""Pins the loop in one process: the base method, the mixture, the age of states, exact continuation."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from runs import PD, THREE_SOURCES, small_run

from ddil_ray.errors import ConfigError, RunFailedError, StateError
from ddil_ray.states.batch import Origin
from ddil_ray.states.mixing import Mixing
from ddil_ray.states.prior import Prior
from ddil_ray.states.source import SourceContext, StateRequest, make_states
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.learner import Learner
from ddil_ray.training.loop import TrainingLoop
from ddil_ray.training.recipe import Recipe

OBJECTIVES = {"pd": PD, "lcm": {"type": "lcm", "solver_steps": 10, "student_steps": 2}}


def _losses(result):
    return [record["loss"] for record in result.records]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_only_priors_are_the_base_method_bit_for_bit(name):
    """Oracle 22, against a loop written out here: forward states, the expert's label, a step. 50 steps."""
    changes = {"trainer": {"steps": 50}, "tracking": {"log_every": 1}}
    config = small_run(objective=OBJECTIVES[name], states={"forward": 1.0}, **changes)
    recipe = Recipe(config)
    made = recipe.ingredients()
    objective, expert = made.objective, made.expert()
    student = recipe.student_of(made.teacher)
    learner = Learner(student, objective, recipe.optimizer_settings())
    context = SourceContext(
        made.teacher.schedule, made.teacher.sample_shape, recipe.conditions(made.data), images=made.data.images
    )
    base, phase = [], objective.phases[0]
    for step in range(50):
        states = make_states(context, phase, StateRequest(Origin.FORWARD, 0, step, 16, config.seed), version=-1)
        with torch.no_grad():
            label = objective.label(expert, states, phase)
        base.append(learner.update(states.labelled(label))["loss"])
    assert _losses(distill_inline(recipe))[:50] == base


@pytest.mark.parametrize("workers", [4, [1, 2]])
def test_one_process_takes_whole_batches_whatever_the_number_of_workers(workers):
    alone, told = (distill_inline(Recipe(small_run(trainer={"num_workers": n}))) for n in (1, workers))
    assert _losses(told) == _losses(alone)


def test_dropout_follows_the_seed_and_leaves_torchs_own_numbers_alone():
    config = small_run(
        teacher={"model": "builtin:digits"}, trainer={"steps": 6}, student={"lora": {"rank": 4, "dropout": 0.5}}
    )
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(_losses(distill_inline(Recipe(config))))
        assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1]


def test_the_student_is_rolled_out_as_rounded_as_it_would_travel():
    changes = {"states": {"student": 1.0, "forward": 0.0}, "tracking": {"log_every": 1}}
    exact, rounded = (
        _losses(distill_inline(Recipe(small_run(sync={"dtype": dtype}, **changes)))) for dtype in ("fp32", "bf16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_source_reaches_training_in_its_share(name):
    states = {"forward": 0.25, "student": 0.25, "teacher": 0.25, "mixed": 0.25}
    result = distill_inline(Recipe(small_run(objective=OBJECTIVES[name], states=states)))
    for origin in Origin:
        shares = [r[f"states/share_{origin.label}"] for r in result.records]
        assert sum(shares) / len(shares) == pytest.approx(0.25, abs=1e-6)


def test_mixed_rollouts_follow_the_settings_along_the_run():
    """From the student alone to the teacher alone; the first state is the student's in both, the last is not."""
    mixed = {"forward": 0.0, "mixed": 1.0, "mixed_segment": "trajectory", "mixed_teacher_probability": 0.0}
    ramped = mixed | {"mixed_teacher_probability": {"start": 0.0, "end": 1.0}}
    student, moving, taken_over = (
        _losses(distill_inline(Recipe(small_run(states=states, tracking={"log_every": 1}))))
        for states in (mixed, ramped, mixed | {"mixed_takeover": 1e-6})
    )
    assert moving[0] == student[0]
    assert moving[-1] != student[-1]
    assert taken_over[0] != student[0]


@pytest.mark.parametrize(("segment", "length"), [(1, 1), (3, 3), ("trajectory", None)])
def test_the_settings_of_mixed_rollouts_mean_what_they_say(segment, length):
    """They may be set while `mixed` is 0, as where arms of an ablation share all but their priors."""
    chance = {"start": 0.8, "end": 0.2, "ramp": "cosine", "over": 0.5}
    states = {"mixed_segment": segment, "mixed_teacher_probability": chance, "mixed_takeover": 0.3}
    assert Recipe(small_run(states=states)).mixing == Mixing(Prior(0.8, 0.2, "cosine", 0.5), length, 0.3)
    assert Recipe(small_run()).mixing == Mixing(Prior(0.5, 0.5), 1, None)


def test_rounds_start_from_the_averaged_student_of_the_round_before():
    result = distill_inline(Recipe(small_run(objective=PD)))
    assert list(result.rounds) == [4, 2]
    assert all(not p.requires_grad for m in result.rounds.values() for p in m.network.parameters())


def test_a_run_tells_what_its_time_was_spent_on():
    started = time.perf_counter()
    seconds = distill_inline(Recipe(small_run(trainer={"steps": 100}))).seconds
    passed = time.perf_counter() - started
    assert set(seconds) >= {"rollout", "label", "train"}
    assert all(seconds[part] > 0 for part in ("rollout", "label", "train"))
    assert sum(seconds.values()) < passed


def test_student_states_follow_the_student_and_stop_following_when_not_synced():
    synced, stale = (
        distill_inline(Recipe(small_run(states={"student": 1.0, "forward": 0.0}, sync={"every": period})))
        for period in (4, 1000)
    )
    assert _losses(synced)[:2] == _losses(stale)[:2]
    assert _losses(synced) != _losses(stale)


class Recorder:
    """Hooks that keep what they are given."""

    def __init__(self, wishes=None, refresh=None):
        self.records, self.checkpoints, self.published, self.wishes = [], [], [], wishes or {}
        self.refresh = refresh or (lambda step: None)

    def phase_started(self, step, learner):
        self.published.append(step)
        self.refresh(step)

    def publish(self, step, learner):
        self.published.append(step)
        self.refresh(step)

    def log(self, record):
        self.records.append(record)

    def checkpoint(self, step, state):
        self.checkpoints.append((step, copy.deepcopy(state)))

    def wish(self, step):
        return self.wishes.get(step)


def _loop(recipe, hooks, *, version=lambda: 0, taken=None):
    """A loop fed by blocks whose labels are states themselves, from weights of `version()`."""
    made = recipe.ingredients()
    student = recipe.student_of(made.teacher)
    context = SourceContext(
        made.teacher.schedule,
        made.teacher.sample_shape,
        recipe.conditions(made.data),
        images=made.data.images,
        student=made.teacher.denoiser(),
        teacher=made.teacher.denoiser(),
    )
    blocks = dict.fromkeys(recipe.priors.origins, 0) if taken is None else taken

    def feed(origin):
        def block():
            phase = made.objective.phases[0]
            request = StateRequest(origin, 0, blocks[origin], 16, 0)
            blocks[origin] += 1
            states = make_states(context, phase, request, version=version() if origin == Origin.STUDENT else -1)
            return states.labelled(states.x_t)

        return block

    return TrainingLoop(
        learner=Learner(student, made.objective, recipe.optimizer_settings()),
        plans=made.plans,
        feeds={o: feed(o) for o in recipe.priors.origins},
        hooks=hooks,
        settings=recipe.loop_settings(max_staleness=made.max_staleness),
    ), blocks


def test_weights_are_published_at_the_start_and_every_period():
    hooks = Recorder()
    _loop(Recipe(small_run()), hooks, version=lambda: hooks.published[-1])[0].run()
    assert hooks.published == [0, 4, 8, 12, 16]


def test_a_state_older_than_the_bound_never_reaches_the_student():
    """Weights that are never newer than step 0: the loop refuses the first row that is too old."""
    recipe = Recipe(small_run(replay={"max_staleness": 8}))
    loop, _ = _loop(recipe, Recorder(), version=lambda: 0)
    with pytest.raises(RuntimeError, match=r"at most 8 steps old at step 9"):
        loop.run()
    assert loop.step == 9


def test_going_on_from_a_checkpoint_gives_the_same_losses():
    """Oracle 25, with a replay buffer that holds rows back and draws them at random."""
    recipe = Recipe(small_run(replay={"reuse": 2}, tracking={"log_every": 1}, states=THREE_SOURCES))
    whole = Recorder()
    _loop(recipe, whole, version=lambda: 10**6)[0].run()
    stopped = Recorder({12: "stop"})
    loop, taken = _loop(recipe, stopped, version=lambda: 10**6)
    assert not loop.run()
    step, state = stopped.checkpoints[-1]
    assert step == 12
    resumed = Recorder()
    loop, _ = _loop(recipe, resumed, version=lambda: 10**6, taken=dict(taken))
    loop.load_state_dict(state)
    loop.run()
    assert [r["loss"] for r in stopped.records + resumed.records] == [r["loss"] for r in whole.records]


def test_a_checkpoint_that_is_wanted_out_of_turn_is_written_and_training_goes_on():
    hooks = Recorder({5: "save"})
    loop, _ = _loop(Recipe(small_run(checkpoint={"every": 8})), hooks, version=lambda: 10**6)
    assert loop.run()
    assert [step for step, _ in hooks.checkpoints] == [5, 8, 16, 20]


def test_rows_that_leave_the_buffers_unused_are_told_by_reason_since_the_record_before():
    result = distill_inline(Recipe(small_run(trainer={"steps": 100}, replay={"reuse": 4, "max_staleness": 13})))
    expired = [record.get("rows/expired/student", 0) for record in result.records]
    assert expired.count(0) > 10
    for i, record in enumerate(result.records):
        assert record["rows/dropped/student"] == sum(expired[: i + 1])
    assert sum(expired) > 0


def test_a_bound_that_would_stall_is_refused_with_the_least_that_does_not():
    with pytest.raises(ConfigError, match=r"`replay.max_staleness` must be at least 5 steps.*but is 3 instead"):
        Recipe(small_run(replay={"max_staleness": 3})).ingredients()


def test_a_loss_that_is_not_finite_ends_the_run_with_advice():
    """Through a learning rate that overflows the weights."""
    config = small_run(trainer={"lr": 1e30, "clip_norm": 1e30, "steps": 20})
    with pytest.raises(RunFailedError, match=r"NaN or infinity.*trainer.lr"):
        distill_inline(Recipe(config))


def test_averages_follow_their_closed_form():
    """Oracle 24: 1 - d^n after n updates towards a constant."""
    recipe = Recipe(small_run(trainer={"ema_decay": 0.9, "lr": 1e-12}))
    made = recipe.ingredients()
    learner = Learner(recipe.student_of(made.teacher), made.objective, recipe.optimizer_settings())
    first = next(iter(learner.ema.module.parameters()))
    weight = next(iter(learner.student.network.parameters()))
    weight.data.fill_(0.0)
    learner.ema.update()
    weight.data.fill_(1.0)
    for _ in range(6):
        learner.ema.update()
    torch.testing.assert_close(first.detach(), torch.full_like(first, 1 - 0.9**6))


def test_shares_of_sources_count_the_steps_without_them():
    """A student's share of .05 in batches of 8 is 0 or 1 rows: its mean over records is that of the plan."""
    config = small_run(states={"forward": 0.95, "student": 0.05}, trainer={"steps": 100, "batch_size": 8})
    recipe = Recipe(config)
    records = [r for r in distill_inline(recipe).records if "states/share_student" in r]
    (plan,) = recipe.plans(1)
    rows = sum(plan.counts(n)[Origin.STUDENT] for n in range(100))
    assert sum(r["states/share_student"] for r in records) * config.tracking.log_every == pytest.approx(rows / 8)


def test_a_block_with_values_that_are_not_finite_stops_the_run_before_they_reach_the_weights():
    """The data itself is poisoned: of 16 rows that a block of forward states takes, some have no number."""
    recipe = Recipe(small_run(states={"forward": 1.0}))
    made = recipe.ingredients()
    made.data.images[::4] = float("nan")
    with pytest.raises(StateError, match=r"`x_t` of a block of forward states must be finite"):
        distill_inline(recipe, data=made.data)
