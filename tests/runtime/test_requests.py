"""Pins that requests which processes die of or hang at end in one message, and that other deaths are lived through."""

from __future__ import annotations

import time

import numpy as np
import pytest
from faulty import ACTOR
from runs import kill, processes, when

from ddil_ray.config import Role
from ddil_ray.errors import RunFailedError
from ddil_ray.runtime import requests
from ddil_ray.runtime.requests import answers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROLE = Role(num_actors=1, num_cpus=0.1, num_gpus=0)
AT_MOST = 100
"""Times that a process dies if it may: far more than are let through."""


@pytest.mark.parametrize(
    ("stage", "role", "advice"),
    [
        ("deadly:DeadlyStage", ROLE, "lower `encode_images.batch_size`"),
        ("deadly:UnbuiltStage", ROLE, "lower `encode_images.batch_size`"),
        ("deadly:DeadlyStage", None, "look at what `encode_images` names"),
    ],
)
def test_a_request_that_process_after_process_dies_of_is_given_up(stage, role, advice, monkeypatch, tmp_path):
    monkeypatch.setattr(requests, "_MAX_DEATHS", 1)
    with pytest.raises(RunFailedError, match=rf"^Processes of `encode_images` must .* 2 of them died .*{advice}"):
        list(answers("encode_images", stage, [str(tmp_path), AT_MOST], ["die"], role))


@pytest.mark.parametrize(
    ("stage", "role"),
    [
        ("deadly:HangingStage", ROLE),
        pytest.param("deadly:DeadlyStage", ROLE.model_copy(update={"resources": {"none": 1}}), marks=pytest.mark.slow),
    ],
    ids=["hangs", "finds no room"],
)
def test_answers_that_stay_away_are_given_up(monkeypatch, tmp_path, stage, role):
    monkeypatch.setattr(requests, "_PATIENCE_S", 3.0)
    arguments = [str(tmp_path), 0] if stage == "deadly:DeadlyStage" else []
    with pytest.raises(RunFailedError, match=r"^Requests of `evaluation` must .* 3 s .*lower `evaluation.batch_size`$"):
        list(answers("evaluation", stage, arguments, ["0"], role))


@pytest.mark.slow
def test_more_deaths_than_one_request_may_have_are_lived_through_at_different_ones(monkeypatch, tmp_path, recovery):
    monkeypatch.setattr(requests, "_MAX_DEATHS", 1)  # each dies once at its own, and of no other's death
    asked = [f"die {k}" for k in range(4)]
    made, answered = {}, []
    for request, answer in answers("evaluation", "deadly:DeadlyStage", [str(tmp_path), 1], asked, ROLE):
        made[request] = answer
        answered.append(time.monotonic())
    recovery("at most from one answer to the next, with a process that died in between", max(np.diff(answered)))
    assert made == {request: request for request in asked}


@pytest.mark.slow
def test_a_process_that_dies_while_it_imports_dies_of_no_request(monkeypatch):
    monkeypatch.setattr(requests, "_MAX_DEATHS", 0)
    began: list[float] = []

    def imports() -> bool:
        began.extend([time.monotonic()] if not began and processes(ACTOR) else [])
        return bool(began) and time.monotonic() > began[0] + 1  # of three seconds

    killed = when(imports, lambda: kill(ACTOR))
    assert list(answers("evaluation", "slowly:EchoStage", [], ["0"], ROLE)) == [("0", "0")]
    assert killed.result()
