"""No block is stuck behind one that waits for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
from publishing import Rank0, streams, tensors
from runs import small_run

from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.hub import Hub
from ddil_ray.runtime.stages import StateStage
from ddil_ray.states.batch import Origin
from ddil_ray.training.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_block_that_waits_gives_way_to_an_earlier_one_of_its_actor():
    """Row: node loss, rollout actor crash: Ray repeats blocks behind others that wait for what they return."""
    recipe = Recipe(small_run())
    made = recipe.ingredients()
    hub = Hub.remote()
    parts = [ray.put(part) for part in (made.data.images.numpy(), made.data.labels.numpy(), made.prompts)]
    context = RunContext(recipe.config.model_dump(mode="json"), hub, *parts, max_staleness=100)
    incarnation = ray.get(hub.incarnation.remote())
    trainer = Rank0.remote(hub, 0, streams(recipe, len(made.plans), ready=0))
    stage = StateStage(context, int(Origin.STUDENT), incarnation)
    student = recipe.student_of(made.teacher)
    ray.get(trainer.publish.remote(0, 0, tensors(student)))
    with ThreadPoolExecutor(2) as threads:
        later = threads.submit(stage, {"place": np.array([5])})  # beyond its credit
        earlier = threads.submit(stage, {"place": np.array([0])})
        assert len(earlier.result(timeout=30)["t"]) == 16
        assert not later.done()
        ray.get(hub.wish.remote(12))  # the trainer got there
        assert len(later.result(timeout=30)["t"]) == 16
    ray.kill(trainer)
    ray.kill(hub)
