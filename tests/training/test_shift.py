"""Pins the measure of covariate shift to Gaussians, where marginals, errors and the effect of a bias are known."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from runs import PD, small_run
from scipy import stats
from torch import nn

from ddil_ray.data import ImageData
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP, expand_to, levels
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives import OBJECTIVES
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.rollout import Policy
from ddil_ray.states.source import Conditions, Phase
from ddil_ray.testing import GaussianDenoiser, tiny_model
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.shift import ProbeRows, ShiftProbe

SCHEDULE = CosineVP()
TEACHER = GaussianDenoiser(SCHEDULE)
GRID = uniform_grid(4)
STEPS = (1, 2, 3, 4)
SIZE = 4


@dataclass(frozen=True)
class Landing:
    """The student without covariate shift: each step lands where the exact probability flow lands, or `bias` beside it.

    x_0 is chosen so that one DDIM step from a stage meets the flow at the next one; for a sampler that re-noises it is
    the flow's end.
    """

    transition: str = "ddim"
    stages: torch.Tensor = GRID
    bias: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def __call__(self, x_t, t, cond, w):
        step = (self.stages - t[:, None]).abs().argmin(1)
        bias = expand_to(torch.tensor(self.bias).double()[step], x_t)
        if self.transition == "renoise":
            return (TEACHER.flow(x_t, t, torch.zeros_like(t)) + bias).to(x_t.dtype)
        s = self.stages[step + 1]
        ratio, gain = _ddim(t, s, x_t)
        return ((TEACHER.flow(x_t, t, s).double() - ratio * x_t.double()) / gain + bias).to(x_t.dtype)


def _ddim(t, s, x):
    """DDIM is x_s = ratio x_t + gain x_0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels(SCHEDULE, u, x) for u in (t, s))
    return sigma_s / sigma_t, alpha_s - alpha_t * sigma_s / sigma_t


def _phase(transition="ddim", *, teacher_substeps=2, stages=GRID):
    return Phase(0, len(stages) - 1, stages, TimeLaw.over(stages), transition, teacher_substeps)


def _data(rows, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return TEACHER.mean + TEACHER.std * torch.randn(rows, size, generator=generator, dtype=torch.float64)


def _probe(rows, *, phase=None, expert=TEACHER, seed=0):
    images, conditions = _data(rows, seed), Conditions(torch.zeros(rows).long(), (0.0, 0.0))
    drawn = ProbeRows.draw(images, conditions, num_samples=rows, seed=seed)
    probe = ShiftProbe(drawn, images, SCHEDULE, batch_size=50)
    probe.start(phase or _phase(), expert)
    return probe


def _alarms(figures):
    return [figures[f"shift/energy/step_{k}"] > figures[f"shift/floor/step_{k}"] for k in STEPS]


@pytest.mark.parametrize("transition", ["ddim", "renoise"])
def test_a_student_without_shift_is_suspected_in_one_case_of_twenty(transition):
    """150 data sets and noises. Binomial per step, two-sided at 10^-5; 8 cases."""
    student, phase = Landing(transition), _phase(transition)
    alarms = [_alarms(_probe(64, phase=phase, seed=seed).measure(student)) for seed in range(150)]
    for above in np.sum(alarms, axis=0):
        assert stats.binomtest(int(above), 150, 0.05).pvalue > 1e-5


@pytest.mark.parametrize("transition", ["ddim", "renoise"])
def test_a_planted_shift_is_seen_at_once_and_only_where_it_is(transition):
    """A bias of .5 in the third step's x_0 moves the states after it and none before.

    After it the means differ by at least 5 of their sd in each of 4 dimensions: missed by chance less than once in 10^6
    measurements.
    """
    phase = _phase(transition)
    for seed in range(10):
        probe = _probe(256, phase=phase, seed=seed)
        plain = probe.measure(Landing(transition))
        biased = probe.measure(Landing(transition, bias=(0.0, 0.0, 0.5, 0.0)))
        assert _alarms(biased)[2:] == [True, True]
        for k in (1, 2):
            assert biased[f"shift/energy/step_{k}"] == plain[f"shift/energy/step_{k}"]


def test_frechet_and_spread_of_a_biased_student_have_their_closed_forms():
    """The affine recursion: deviation e' = sqrt(V_s / V_t) e + gain bias, variance as if unbiased.

    Frechet distance is then SIZE e^2. Of 2,000 rows |e| is known to sqrt(2 V / (2,000 x 4)) and a standard deviation to
    sqrt(V / (2 x 2,000 x 4)); five of those fail once in 10^6.
    """
    bias = (0.3, -0.2, 0.5, 0.4)
    figures = _probe(2000).measure(Landing(bias=bias))
    deviation, one = 0.0, torch.zeros(1, 1, dtype=torch.float64)
    for k in STEPS:
        t, s = GRID[k - 1][None], GRID[k][None]
        (_, v_t), (_, v_s) = (TEACHER._variance(u, one) for u in (t, s))
        deviation = float((v_s / v_t).sqrt() * deviation + _ddim(t, s, one)[1] * bias[k - 1])
        known_to = 5 * (2 * float(v_s) / (2000 * SIZE)) ** 0.5
        assert (figures[f"shift/frechet/step_{k}"] / SIZE) ** 0.5 == pytest.approx(abs(deviation), abs=known_to)
        assert figures[f"rollout/spread/step_{k}"] == pytest.approx(float(v_s) ** 0.5, abs=known_to / 2)


@dataclass(frozen=True)
class Imitation:
    """A student that says what the expert would, plus `bias`."""

    phase: Phase
    bias: float = 0.0

    def __call__(self, x_t, t, cond, w):
        step = int((self.phase.stages - t[0]).abs().argmin())
        ddim = self.phase.transition == "ddim"
        end = self.phase.stages[step + 1] if ddim else torch.zeros((), dtype=torch.float64)
        substeps = self.phase.teacher_substeps * (1 if ddim else self.phase.student_steps - step)
        policy = Policy(TEACHER, SCHEDULE, "ddim", substeps)
        return policy.x_0(x_t, t, end.expand(len(t)), cond, w) + self.bias


@pytest.mark.parametrize("transition", ["ddim", "renoise"])
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_errors_are_the_square_of_the_students_bias(transition, bias):
    phase = _phase(transition, teacher_substeps=3)
    figures = _probe(32, phase=phase).measure(Imitation(phase, bias))
    for k in STEPS:
        for where in ("visited", "forward"):
            assert figures[f"shift/error_{where}/step_{k}"] == pytest.approx(bias**2, abs=1e-12)


def test_the_expert_of_a_sampler_that_renoises_is_the_end_of_its_probability_flow():
    """DDIM's error falls with its steps: with 64 per stage the exact flow's end is nearly what it says."""
    coarse, fine = (
        _probe(32, phase=_phase("renoise", teacher_substeps=n)).measure(Landing("renoise")) for n in (2, 64)
    )
    for k in STEPS:
        assert fine[f"shift/error_visited/step_{k}"] < 1e-4
        assert fine[f"shift/error_visited/step_{k}"] < coarse[f"shift/error_visited/step_{k}"] / 100


def test_the_expert_of_a_ddim_student_says_what_progressive_distillation_labels():
    objective = OBJECTIVES["pd"](SCHEDULE, teacher_steps=12, student_steps=[4])
    (phase,) = objective.phases
    assert phase.teacher_substeps == 3

    class Labelled:
        def __call__(self, x_t, t, cond, w):
            none = torch.zeros(len(t))
            states = StateBatch(x_t, t, cond, w, none, none, none, none)
            return objective.label(TEACHER, states, phase)

    figures = _probe(32, phase=phase).measure(Labelled())
    assert max(v for k, v in figures.items() if "error" in k) < 1e-20


def test_entries_beyond_the_datas_range_are_counted_and_its_ends_are_not():
    probe = _probe(32)
    low, high = probe.rows.x_0.amin(0), probe.rows.x_0.amax(0)

    def student(x_t, t, cond, w):
        return torch.where(torch.arange(SIZE) < 3, high, low - 1e-9).expand(len(x_t), SIZE)

    figures = probe.measure(student)
    assert [figures[f"rollout/clip_share/step_{k}"] for k in STEPS] == [0.25] * 4


def test_a_student_that_overflows_is_counted_and_leaves_no_nan_in_the_record():
    def student(x_t, t, cond, w):
        x_0 = TEACHER(x_t, t, cond, w)
        if float(t[0]) == 0.5:
            x_0[:3] = float("inf")
        return x_0

    figures = _probe(32).measure(student)
    assert figures["rollout/nonfinite"] == 2 * 3 * SIZE  # after the third step and after the fourth
    json.dumps(figures, allow_nan=False)
    assert {"shift/energy/step_2", "shift/error_forward/step_2", "rollout/clip_share/step_4"} <= set(figures)
    assert not {"shift/energy/step_3", "shift/error_visited/step_3", "rollout/spread/step_4"} & set(figures)


def test_large_states_are_compared_on_a_projection_that_keeps_squared_lengths():
    """Data almost at 0, samples at .1: squared length 256 x .01. Its sd on 64 random directions is 18 %."""
    images = 1e-4 * torch.randn(64, 1, 16, 16, dtype=torch.float64)
    drawn = ProbeRows.draw(images, Conditions(torch.zeros(64).long(), (0.0, 0.0)), num_samples=64, seed=0)
    probe = ShiftProbe(drawn, images, SCHEDULE, batch_size=64)
    probe.start(_phase(stages=uniform_grid(1)), TEACHER)
    figures = probe.measure(lambda x_t, t, cond, w: torch.full_like(x_t, 0.1))
    assert figures["shift/frechet/step_1"] == pytest.approx(2.56, rel=0.8)


def test_rows_are_the_same_for_the_same_seed_none_comes_twice_and_each_has_its_condition():
    images, conditions = torch.arange(40.0).reshape(40, 1), Conditions(torch.arange(40) % 7, (1.0, 3.0))
    a, b, c = (ProbeRows.draw(images, conditions, num_samples=n, seed=5) for n in (30, 30, 300))
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.w, b.w)
    assert a.w.min() >= 1
    assert len(a.x_0.unique()) == 30
    assert torch.equal(a.cond, a.x_0[:, 0].long() % 7)
    assert len(c.x_0) == len(c.x_0.unique()) == 40


class FlowNetwork(nn.Module):
    """`Landing` as a network of 2 x 2 images with one weight, its bias."""

    def __init__(self, steps, bias=0.0):
        super().__init__()
        self.landing = Landing(stages=uniform_grid(steps), bias=(0.0,) * steps)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x_t, time, cond, w):
        return self.landing(x_t, time.double() / 1000, cond, w) + self.bias


def _flow_model(steps, bias=0.0):
    return DiffusionModel(FlowNetwork(steps, bias), Prediction.SAMPLE, SCHEDULE, (1, 2, 2))


@pytest.mark.parametrize("bias", [0.0, 0.25])
def test_a_run_measures_the_shift_of_its_first_student(bias):
    """End to end, PD of 8 exact steps into 4, whose student starts exact or with a planted bias.

    The exact one would be suspected in up to 20 % of seeds, this one is not; the biased one's error is bias^2.
    """
    config = small_run(
        objective={"type": "pd", "teacher_steps": 8, "student_steps": [4]},
        teacher={"guidance": 0.0},
        shift={"enabled": True, "every": 8},
        trainer={"steps": 12},
    )
    images = _data(400, seed=3).float().reshape(-1, 1, 2, 2)
    data = ImageData(images, torch.zeros(len(images)).long(), "gaussian")
    result = distill_inline(Recipe(config), teacher=_flow_model(8), data=data, student=_flow_model(4, bias))
    measured = [r for r in result.records if "loss" not in r]
    assert [(r["step"], r["phase"]) for r in measured] == [(0, 0), (8, 0)]
    assert _alarms(measured[0]) == [bias > 0] * 4
    for k in STEPS:
        for where in ("visited", "forward"):
            assert measured[0][f"shift/error_{where}/step_{k}"] == pytest.approx(bias**2, abs=1e-7)
    assert result.seconds["measure"] > 0


def test_measuring_leaves_training_as_it_is_and_follows_phases_and_publications():
    plain, measured = (
        distill_inline(Recipe(small_run(objective=PD, shift={"enabled": on, "every": 10, "num_samples": 32})))
        for on in (False, True)
    )
    assert [r["loss"] for r in plain.records] == [r["loss"] for r in measured.records if "loss" in r]
    assert plain.seconds["measure"] == 0
    shift = [r for r in measured.records if "loss" not in r]
    assert [(r["phase"], r["step"]) for r in shift] == [(0, 0), (0, 12), (1, 20), (1, 32), (1, 36)]
    for record in shift:
        steps = {name.rpartition("_")[2] for name in record if name.startswith("shift/energy/")}
        assert steps == {str(k) for k in range(1, (4, 2)[record["phase"]] + 1)}


def test_a_student_with_a_planted_bias_starts_with_more_shift_and_more_error():
    """A random network on digits is never free of shift; 1 added to its v prediction makes it plainly worse."""
    recipe = Recipe(small_run(objective=PD, trainer={"steps": 2}, shift={"enabled": True}))
    students = [tiny_model(), tiny_model()]
    students[1].network.outside.bias.data.add_(1.0)
    plain, biased = (distill_inline(recipe, student=s).records[0] for s in students)
    for k in STEPS:
        assert biased[f"shift/error_visited/step_{k}"] > 2 * plain[f"shift/error_visited/step_{k}"]
        assert biased[f"shift/energy/step_{k}"] > plain[f"shift/energy/step_{k}"] > plain[f"shift/floor/step_{k}"]


def test_no_two_uses_of_random_numbers_share_a_seed():
    """Else the noise on the way is that of the forward states, displaced by what was drawn between."""
    images, conditions = torch.randn(40, 1, 2, 2), Conditions(torch.zeros(40, dtype=torch.int64), (0.0, 0.0))
    drawn = ProbeRows.draw(images, conditions, num_samples=30, seed=5)
    on_the_way = torch.randn(10_000, generator=torch.Generator().manual_seed(drawn.seed))
    projected = torch.randn(10_000, generator=torch.Generator().manual_seed(drawn.projection_seed))
    for noise in (drawn.eps, drawn.noise, projected):
        assert torch.isin(noise.flatten(), on_the_way).double().mean() < 0.2  # some are equal by chance
    assert ProbeRows.draw(images, conditions, num_samples=30, seed=6).seed != drawn.seed
