"""A whole run on Ray, on the shipped teacher: is the student any good?"""

from __future__ import annotations

import pytest

from ddil_ray.config import load_config
from ddil_ray.evaluation.samplers import Sampler
from ddil_ray.results import new_benchmark, scores
from ddil_ray.runtime.run import distill
from ddil_ray.training.recipe import Recipe


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_distribution_matching_beats_the_undistilled_samplers_by_far(run_dir):
    """The teacher's own 2-step samples, by DDIM and by renoising, are at least 15 % further from the data."""
    settings = [f"output={run_dir}", "evaluation.steps=[2]", "evaluation.num_samples=1000", "tracking.tracker=none"]
    config = load_config("digits-dmd2", settings)
    recipe = Recipe(config)
    made = recipe.ingredients()
    distilled = distill(config).scores
    grid = made.objective.phases[0].stages
    renoised = Sampler(made.expert(), made.teacher.schedule, grid, "renoise")
    undistilled = scores(new_benchmark(recipe, made), {"renoised": {2: renoised}})
    student = distilled["student"][2]["frechet_data"]
    assert student <= 0.85 * distilled["teacher"][2]["frechet_data"]
    assert student <= 0.85 * undistilled["renoised"][2]["frechet_data"]
