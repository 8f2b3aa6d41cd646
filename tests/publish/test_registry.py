"""Pins the page on teams: a real MLflow server with passwords, started as the page says, with its files on S3."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import boto3
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from commands import run
from mlflow.server import get_app_client
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer
from pages import ROOT, blocks
from registered import finished_run

from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import draw, exported_sampler
from ddil_ray.models import load_model
from ddil_ray.tracking import TRACKERS, BackgroundTracker, Journal, RunInfo

PAGE = blocks(ROOT / "docs" / "teams.md")
ADA, EVE, ADMIN = (f"{name} and a long password" for name in ("ada", "eve", "admin"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _named(name):
    return next(block.text for block in PAGE if block.name == name)


@pytest.fixture(scope="module")
def database(tmp_path_factory, s3_endpoint):
    """The server of the page, whose environment alone has keys of the bucket."""
    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "auth.ini").write_text(_named("auth.ini"))
    (command,) = (block.text for block in PAGE if block.text.startswith("mlflow server"))
    program, kind, *options = shlex.split(command.replace("\\\n", " "))
    assert (program, kind) == ("mlflow", "server")
    secrets = {
        "MLFLOW_AUTH_CONFIG_PATH": "auth.ini",
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of tests",  # pragma: allowlist secret
    }
    boto3.resource("s3").Bucket("bucket").create()
    server = MlflowServer(folder, options, secrets)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
        get_app_client("basic-auth", server.uri).create_user("ada", ADA)
        get_app_client("basic-auth", server.uri).create_user("eve", EVE)
    yield server
    server.kill()


@pytest.fixture
def team(database, s3, monkeypatch):
    """Lets Ada ask, who has no keys of the bucket; gives what tells the names in it, and has them."""
    bucket = boto3.resource("s3").Bucket("bucket")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADA)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    return lambda: {item.key for item in bucket.objects.all()}


def _register(capsys, folder, name, *options):
    code, out, err = run(capsys, "register", folder, "--name", name, "--json", *options)
    assert code == 0, err
    return json.loads(out)


def test_a_student_is_registered_once_with_signature_scores_files_and_the_run_that_made_it(
    capsys, tmp_path, database, team
):
    folder = finished_run(tmp_path, "a", kid=0.01)
    tracker = TRACKERS["mlflow"](uri=database.uri, experiment="ddil-ray", timeout_s=30.0)
    paths = {"journal": tmp_path / "a" / "metrics.jsonl", "state": tmp_path / "a" / "tracking.json"}
    background = BackgroundTracker(tracker, RunInfo("a", {"seed": "0"}, {}), **paths, timeout_s=60.0)
    background.start()
    Journal(paths["journal"]).append([{"step": 0, "loss": 1.0}])
    assert background.finish("finished") is None
    tracked = json.loads(paths["state"].read_text())["run_id"]

    assert _register(capsys, folder, "one") == {"name": "one", "version": "1", "new": True}
    assert _register(capsys, folder, "one") == {"name": "one", "version": "1", "new": False}
    assert _register(capsys, folder, "another")["new"] is True

    client = MlflowClient(database.uri)
    assert len(client.search_model_versions("name = 'one'")) == 1
    version = client.get_model_version("one", "1")
    assert (version.run_id, version.status) == (tracked, "READY")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in model.metrics} == {"kid_teacher": 0.01, "frechet_teacher": 1.0}
    assert client.get_run(tracked).data.metrics == {"loss": 1.0, "kid_teacher": 0.01, "frechet_teacher": 1.0}
    assert any(key.endswith("data/student/model_index.json") for key in team())
    assert all(key.startswith("mlflow/") for key in team())

    loaded = mlflow.pyfunc.load_model("models:/one/1")
    assert [column.name for column in loaded.metadata.signature.inputs] == ["num_images", "class_label"]
    images = loaded.predict(pd.DataFrame({"num_images": [20]}), params={"seed": 5})
    local = load_model(f"{folder}/student")
    expected = draw(local, exported_sampler(local, 1), torch.arange(20) % 10, seed=5)
    assert np.array_equal(images, ((expected + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def test_without_a_server_students_are_registered_beside_the_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    folder = finished_run(tmp_path / "runs", "a", kid=0.01)
    TRACKERS["mlflow"](uri=uri, experiment="ddil-ray", timeout_s=30.0).check(reach=True)
    assert [_register(capsys, folder, "ada's", "--champion")["new"] for _ in range(2)] == [True, False]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model("models:/ada's@champion")
    assert loaded.predict(pd.DataFrame({"num_images": [2]})).shape == (2, 8, 8, 1)


def test_the_alias_moves_to_a_better_student_that_was_measured_alike_and_to_no_other(capsys, tmp_path, database, team):
    runs = {
        "first": finished_run(tmp_path, "first", kid=0.010, seed=1),
        "worse": finished_run(tmp_path, "worse", kid=0.020, seed=2),
        "better": finished_run(tmp_path, "better", kid=0.005, seed=3),
        "otherwise": finished_run(tmp_path, "otherwise", kid=0.001, seed=4, settings=["evaluation.seed=3"]),
    }
    said = {name: _register(capsys, folder, "best", "--champion") for name, folder in runs.items()}
    assert [found["champion"] for found in said.values()] == [True, False, True, False]
    assert [found["version"] for found in said.values()] == ["1", "2", "3", "4"]
    assert said["first"]["reason"] == "there was no champion"
    assert said["worse"]["reason"].startswith("it is not better: kid_teacher is 0.02, and 0.01 of the champion")
    assert said["better"]["reason"].startswith("it is better: kid_teacher is 0.005, and 0.01 of the champion")
    assert said["otherwise"]["reason"].startswith(
        "the two cannot be compared: `evaluation.seed` was 3 where it was measured, and 1000003 where the champion was"
    )
    assert MlflowClient(database.uri).get_model_version_by_alias("best", "champion").version == "3"
    again = _register(capsys, runs["better"], "best", "--champion")
    assert again == {
        "name": "best", "version": "3", "new": False, "champion": True, "reason": "it is the champion already"
    }  # fmt: skip
    code, out, _ = run(capsys, "register", runs["first"], "--name", "best", "--champion")
    assert code == 0
    assert out.startswith("version  models:/best/1, registered before\nchampion no, it is not better: ")


def test_the_title_of_a_version_that_others_made_is_not_taken(capsys, tmp_path, database, team):
    folder = finished_run(tmp_path, "a", kid=0.01)
    _register(capsys, folder, "theirs")
    client = MlflowClient(database.uri)
    client.delete_model_version_tag("theirs", "1", "ddil_ray.evidence")
    client.set_registered_model_alias("theirs", "champion", "1")
    found = _register(capsys, finished_run(tmp_path, "b", kid=0.001, seed=1), "theirs", "--champion")
    assert (found["version"], found["champion"]) == ("2", False)
    assert found["reason"] == "the two cannot be compared: version 1 has no scores of ddil-ray"


@pytest.mark.parametrize(
    ("who", "password"),
    [("ada", "not her password"), ("nobody", ADA), (None, None)],
    ids=["wrong password", "wrong name", "nobody"],
)
def test_who_is_not_known_gets_one_message_and_leaves_nothing(
    capsys, tmp_path, database, team, monkeypatch, who, password
):
    for name, value in (("USERNAME", who), ("PASSWORD", password)):
        if value is None:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
        else:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    code, out, err = run(capsys, "register", finished_run(tmp_path, "a", kid=0.01), "--name", "none", "--champion")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: `--uri` must be an MLflow server that can be reached, but MLflow at {database.uri}")
    assert "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN" in err
    assert not team()
    with pytest.raises(ConfigError, match=r"`tracking.uri` must be reached .* Set MLFLOW_TRACKING_USERNAME and"):
        TRACKERS["mlflow"](uri=database.uri, experiment="ddil-ray", timeout_s=30.0).check(reach=True)


def test_a_name_of_somebody_else_is_refused_and_one_that_no_registry_takes(capsys, tmp_path, team, monkeypatch):
    folder = finished_run(tmp_path, "a", kid=0.01)
    _register(capsys, folder, "of-ada")
    code, _, err = run(capsys, "register", folder, "--name", "a/b")
    assert code == 2
    assert "`--name` must be one that MLflow takes, but is 'a/b' instead" in err
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "eve")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", EVE)
    code, _, err = run(
        capsys, "register", finished_run(tmp_path, "b", kid=0.001, seed=1, settings=["tracking.experiment=of-eve"]),
        "--name", "of-ada", "--champion",
    )  # fmt: skip
    assert code == 2
    assert "Registering of-ada failed: " in err
    assert "Ask whoever administers it for permission" in err


def test_a_bucket_that_fails_costs_a_second_command(capsys, tmp_path, s3, team):
    folder = finished_run(tmp_path, "a", kid=0.01)
    s3.always("503", only=lambda method, path: method == "PUT" and "student" in path)
    code, _, err = run(capsys, "register", folder, "--name", "later")
    assert code == 1
    assert "Error: Registering later failed: " in err
    assert err.rstrip().endswith("Give the command again to go on.")
    s3.calm()
    assert _register(capsys, folder, "later") == {"name": "later", "version": "1", "new": True}


def test_the_page_makes_a_user_and_draws_from_the_champion(capsys, tmp_path, database, team, monkeypatch):
    (tmp_path / "draw.py").write_text(_named("draw.py"))
    (tmp_path / "add_user.py").write_text(_named("add_user.py"))
    add_user = "import getpass, runpy, sys; getpass.getpass = lambda _: sys.argv.pop(); runpy.run_path('add_user.py')"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
        _python(tmp_path, "-c", add_user, "zoe", "zoe and a long password")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "zoe")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "zoe and a long password")
    settings = ["tracking.experiment=of-zoe"]
    _register(capsys, finished_run(tmp_path, "a", kid=0.01, settings=settings), "digits-1-step", "--champion")
    _python(tmp_path, "draw.py")
    assert (tmp_path / "seven.png").stat().st_size > 0


def _python(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
