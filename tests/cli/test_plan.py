"""Pins `ddil-ray plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
from commands import run

SIMULATED = ["digits-lcm", "teacher.model=ddil_ray.simulation:sd15", "data.source=ddil_ray.simulation:sd15_latents",
             "shift.enabled=false", "evaluation.enabled=false"]  # fmt: skip


def test_a_plan_names_roles_limits_and_memory(capsys):
    code, out, _ = run(capsys, "plan", *SIMULATED, "trainer.num_workers=4", "--gpus", "12", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["basis"] == "declared"
    assert [role["role"] for role in found["capacity"]["roles"]] == ["forward_states", "student_rollouts"]
    assert found["capacity"]["workers"] == 4
    assert {"trainer", "forward_states", "student_rollouts"} <= {row["role"] for row in found["memory"]["roles"]}
    assert found["split"]["settings"][0] == "trainer.num_workers=8"
    assert found["split"]["capacity"]["rows_per_s"] > found["capacity"]["rows_per_s"]
    assert found["cluster"] is None


def test_a_plan_for_people_says_what_to_change(capsys):
    code, out, _ = run(capsys, "plan", *SIMULATED, "trainer.num_workers=8")
    assert code == 0
    for part in (
        "recommended",
        "limit: student_rollouts",
        "rows/s",
        "weights",
        "traffic",
        "inline",
        "Nothing was started.",
    ):
        assert part in out


def test_networks_are_counted_on_the_accelerator_that_is_named(capsys):
    found = {}
    for name in ("A100", "H100"):
        code, out, _ = run(capsys, "plan", "digits-perceptron", "--accelerator", name, "--json")
        assert code == 0
        found[name] = json.loads(out)
        assert found[name]["basis"] == f"counted on {name}"
    ratio = found["A100"]["capacity"]["update_s"] / found["H100"]["capacity"]["update_s"]
    assert ratio == pytest.approx(67 / 19.5)  # float32


def test_measured_times_are_those_of_this_machine(capsys):
    code, out, _ = run(capsys, "plan", "digits-perceptron", "--measure", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["basis"] == "measured"
    assert 1e-4 < found["capacity"]["update_s"] < 10
    assert all(role["block_s"] > 0 for role in found["capacity"]["roles"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits-lcm", "--accelerator", "Z80"], "`--accelerator` must be one of T4"),
        (["digits-lcm", "trainer.accelerator_type=Z80"], "`trainer.accelerator_type` must be one of T4"),
        (["digits-lcm", "--accelerator", "A100", "--measure"], "`--accelerator` must be left out with --measure"),
        ([*SIMULATED, "--gpus", "2"], "`--gpus` must suffice for one worker and one actor of every source"),
        (["sd15/lcm", "teacher.model=/nowhere/else", "data.source=digits"], "`teacher.model`"),
    ],
)
def test_bad_input_is_one_message(capsys, arguments, expected):
    code, _, err = run(capsys, "plan", *arguments)
    assert code == 2
    assert expected in err
