"""Pins the way from a config to a champion: what a run leaves is what the registry takes."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from commands import run
from mlflow.tracking import MlflowClient


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_is_distilled_tracked_registered_and_drawn_from(capsys, run_dir, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = ["objective.teacher_steps=2", "objective.student_steps=[1]", "trainer.steps=4", "trainer.batch_size=16"]
    roles = [f"{role}.batch_size=16" for role in ("forward_states", "student_rollouts", "teacher_rollouts")]
    measured = ["evaluation.num_samples=40", "evaluation.steps=[1]", "evaluation.teacher_steps=4"]
    others = [f"output={run_dir}", "name=a", "shift.enabled=false"]
    code, _, err = run(capsys, "distill", "digits-pd", *settings, *roles, *measured, *others)
    assert code == 0, err
    folder = Path(run_dir, "a")
    code, out, err = run(capsys, "register", folder, "--name", "digits", "--champion", "--json")
    assert code == 0, err
    expected = {"name": "digits", "version": "1", "new": True, "champion": True, "reason": "there was no champion"}
    assert json.loads(out) == expected

    client = MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    version = client.get_model_version("digits", "1")
    assert version.run_id == json.loads((folder / "tracking.json").read_text())["run_id"]
    scores = json.loads((folder / "metrics.json").read_text())["scores"]["student"]["1"]
    found = client.get_run(version.run_id).data.metrics
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    student = mlflow.pyfunc.load_model("models:/digits@champion")
    assert student.predict(pd.DataFrame({"num_images": [3], "class_label": [8]})).shape == (3, 8, 8, 1)
