"""Pins that Ray's actors measure what this process would, whatever their number and their fate."""

from __future__ import annotations

import pytest
from measured import assert_same
from runs import kill, processes, small_run, when

from ddil_ray.errors import RunFailedError
from ddil_ray.evaluation import teacher_sampler
from ddil_ray.results import new_benchmark, teacher_samplers
from ddil_ray.runtime.fits import evaluation_role
from ddil_ray.testing import tiny_model
from ddil_ray.training.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def _work(**evaluation):
    settings = {"num_samples": 300, "steps": [1, 3], "teacher_steps": 8, "batch_size": 64, **evaluation}
    recipe = Recipe(small_run(evaluation=settings))
    made = recipe.ingredients()
    samplers = {"teacher": teacher_samplers(recipe, made), "other": {2: _other()}}
    return new_benchmark(recipe, made), samplers, evaluation_role(recipe.config)


def _other():
    model = tiny_model()
    return teacher_sampler(model.expert(guided=True), model, 2, w=0.5)


def test_two_actors_measure_exactly_what_this_process_does():
    from ddil_ray.runtime.evaluation import measure_on_ray

    benchmark, samplers, role = _work(num_actors=2)
    assert role.num_gpus == 0.5  # the one GPU of this Ray, shared
    assert_same(measure_on_ray(benchmark, samplers, role), benchmark.measure(samplers))


@pytest.mark.slow
def test_blocks_of_an_actor_that_dies_are_made_again():
    from ddil_ray.runtime.evaluation import measure_on_ray

    benchmark, samplers, role = _work(teacher_steps=256, num_samples=1000)
    busy = "ray::MapWorker(MapBatches(StageCall)).submit"
    killed = when(lambda: processes(busy), lambda: kill(busy))
    measured = measure_on_ray(benchmark, samplers, role)
    assert killed.result()
    assert_same(measured, benchmark.measure(samplers))


def test_a_failure_in_an_actor_is_one_message():
    from ddil_ray.runtime.evaluation import measure_on_ray

    benchmark, _, role = _work()
    broken = teacher_sampler(tiny_model().expert(guided=True), tiny_model(), 2, w=0.5)
    object.__setattr__(broken, "transition", "sideways")
    with pytest.raises(RunFailedError, match=r"Measuring failed: .*sideways.*ddil-ray evaluate"):
        measure_on_ray(benchmark, {"broken": {2: broken}}, role)
