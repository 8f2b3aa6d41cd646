"""Pins runs on prompts alone: rollouts give all states, and what needs images is refused at once."""

from __future__ import annotations

import pytest
from preparing import prepare, settings
from runs import small_run
from tiny import save_pipeline

from ddil_ray.errors import DataError
from ddil_ray.states.batch import Origin
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

ROLLOUTS = {"forward": 0.0, "student": 0.5, "teacher": 0.5}
LCM = {"type": "lcm", "solver_steps": 10, "student_steps": 2}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(teacher, prepared prompts)."""
    folder = tmp_path_factory.mktemp("imageless")
    teacher = save_pipeline("stable_diffusion", folder)
    (folder / "prompts.txt").write_text("a red bird\ntwo boats\nrain\n")
    return {"model": str(teacher)}, {
        "source": prepare(settings(teacher, folder / "prompts.txt", folder / "data")).output
    }


@pytest.mark.parametrize("objective", [LCM, {"type": "dmd2", "student_steps": 4, "gan_weight": 0.0}])
def test_a_student_is_distilled_on_prompts_alone(given, objective):
    teacher, data = given
    tracking = {"tracker": "none", "log_every": 5}
    config = small_run(
        teacher=teacher, data=data, objective=objective, states=ROLLOUTS, trainer={"steps": 6}, tracking=tracking
    )
    recipe = Recipe(config)
    result = distill_inline(recipe)
    assert recipe.priors.origins == [Origin.STUDENT, Origin.TEACHER]
    assert result.records[-1]["states/share_student"] > 0
    assert len(result.rounds) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"states": {"forward": 0.5, "student": 0.5}}, r"`states.forward` must be 0"),
        ({"objective": {"type": "dmd2"}, "tracking": {"log_every": 5}}, r"`objective.gan_weight` must be 0"),
        ({"threshold": {"mode": "per_channel"}}, r"`threshold.mode` must not be per_channel"),
        ({"shift": {"enabled": True}}, r"`shift.enabled` must be false"),
    ],
)
def test_what_needs_images_is_refused(given, changes, expected):
    teacher, data = given
    config = small_run(**{"teacher": teacher, "data": data, "objective": LCM, "states": ROLLOUTS, **changes})
    with pytest.raises(DataError, match=expected):
        Recipe(config).ingredients()
