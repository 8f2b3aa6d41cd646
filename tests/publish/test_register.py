"""Pins `ddil-ray register` before a registry is reached: what it refuses, and what a server is told and answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import run
from mlflow.tracking import MlflowClient
from registered import finished_run

from ddil_ray.errors import ConfigError
from ddil_ray.publish.registry import registry_of, student_of_run
from ddil_ray.tracking import TRACKERS

PASSWORD = "correct horse battery"  # pragma: allowlist secret


@pytest.fixture(autouse=True)
def _nobody(monkeypatch):
    """No server, and nobody, that the environment of the tests may name."""
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def answering():
    """A server that gives one answer to everything; `uri`, and the `authorizations` that it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            sent.append(self.headers.get("Authorization"))
            self.send_error(server.answer)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def answer(status):
        server.answer = status
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield answer, sent
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--name", "n", "--metric", "kid_data"], "`--metric` must come with `--champion`"),
        (["--name", "n", "--uri", "ftp://host/db"], "`--uri` must be a path or a URL of databricks, file, http"),
        (["--name", "n"], "`--uri` must be given where a run's own tracker is not known"),
    ],
)
def test_what_cannot_be_registered_is_said_at_once(capsys, tmp_path, arguments, expected):
    code, out, err = run(capsys, "register", finished_run(tmp_path, "a", kid=0.01), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {expected}")


def test_a_run_that_was_not_measured_is_no_champion(capsys, tmp_path):
    folder = finished_run(tmp_path, "a", kid=None)
    code, _, err = run(capsys, "register", folder, "--name", "n", "--champion", "--uri", "http://127.0.0.1:9")
    assert code == 2
    assert f"must be given for a student that was measured at its 1 steps, but {folder} has no such scores" in err


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), "RUN must be a finished run"),
        (lambda folder: (folder / "config.yaml").unlink(), "RUN must be the folder of a run"),
        (lambda folder: (folder / "student" / "model_index.json").unlink(), "RUN must be a run folder with a student"),
    ],
)
def test_a_folder_without_a_student_is_refused(capsys, tmp_path, spoil, expected):
    finished_run(tmp_path, "a", kid=0.01)
    spoil(tmp_path / "a")
    code, _, err = run(capsys, "register", tmp_path / "a", "--name", "n", "--uri", "http://127.0.0.1:9")
    assert code == 2
    assert expected in err


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
        (403, "Ask whoever administers it for permission"),
        (404, "`--uri` must be an MLflow server with a model registry, but MLflow at http://127"),
    ],
)
def test_a_server_that_refuses_or_has_no_registry_is_told_apart(capsys, tmp_path, answering, status, expected):
    answer, _ = answering
    folder = finished_run(tmp_path, "a", kid=0.01)
    code, out, err = run(capsys, "register", folder, "--name", "n", "--uri", answer(status))
    assert (code, out) == (2, "")
    assert err.count("Error: ") == 1
    assert expected in err


def test_who_asks_is_taken_from_the_environment_and_not_shown(capsys, tmp_path, monkeypatch, answering):
    answer, sent = answering
    folder = finished_run(tmp_path, "a", kid=0.01)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answer(401))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    by_name = run(capsys, "register", folder, "--name", "n")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token-of-a-proxy")
    by_token = run(capsys, "register", folder, "--name", "n")
    assert sent[0].startswith("Basic ")
    assert sent[-1] == "Bearer a-token-of-a-proxy"
    for code, out, err in (by_name, by_token):
        assert code == 2
        assert PASSWORD not in out + err
        assert "a-token-of-a-proxy" not in out + err


def test_the_registry_is_where_the_run_is_tracked_unless_another_is_named(tmp_path):
    tracked = student_of_run(finished_run(tmp_path, "a", kid=0.01, settings=["tracking.uri=http://mlflow:5000"])).run
    assert registry_of(tracked, None) == "http://mlflow:5000"
    assert registry_of(tracked, "https://other") == "https://other"
    beside = student_of_run(finished_run(tmp_path, "b", kid=0.01)).run
    (tmp_path / "mlflow.db").touch()
    assert registry_of(beside, None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_same_student_has_the_same_key_and_another_one_or_other_scores_have_not(tmp_path):
    runs = [("a", 0.01, 0), ("b", 0.01, 0), ("c", 0.02, 0), ("d", 0.01, 1)]
    first, same, rescored, other = (
        student_of_run(finished_run(tmp_path, name, kid=kid, seed=seed)).key for name, kid, seed in runs
    )
    assert first == same
    assert len({first, rescored, other}) == 3


@pytest.mark.parametrize("named", [None, "http://127.0.0.1:1", "https://127.0.0.1"])
@pytest.mark.parametrize("who", ["USERNAME", "PASSWORD", "TOKEN"])
def test_credentials_go_to_no_server_that_a_config_names_but_they_are_not_for(
    capsys, tmp_path, monkeypatch, answering, named, who
):
    """Neither from a run nor where its student is registered; a config may be from others."""
    answer, sent = answering
    monkeypatch.setenv(f"MLFLOW_TRACKING_{who}", PASSWORD)
    if named is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    uri = answer(401)
    refused = r"must be the server that MLFLOW_TRACKING_USERNAME and .* are for"
    with pytest.raises(ConfigError, match=f"`tracking.uri` {refused}"):
        TRACKERS["mlflow"](uri=uri, experiment="e", timeout_s=5.0).check(reach=True)
    student = student_of_run(finished_run(tmp_path, "a", kid=0.01, settings=[f"tracking.uri={uri}"]))
    with pytest.raises(ConfigError, match=f"`--uri` {refused}") as error:
        registry_of(student.run, None)
    assert PASSWORD not in str(error.value)
    assert sent == []
    assert registry_of(student.run, uri) == uri  # whoever gives the command trusts it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{uri}/mlflow")
    assert registry_of(student.run, None) == uri
    with pytest.raises(ConfigError, match=r"`tracking.uri` must be reached"):
        TRACKERS["mlflow"](uri=uri, experiment="e", timeout_s=5.0).check(reach=True)
    assert len(sent) == 1


def test_a_student_whose_training_was_deleted_in_mlflow_is_registered_with_a_run_of_its_own(capsys, tmp_path):
    uri, folder = f"sqlite:///{tmp_path}/mlflow.db", finished_run(tmp_path, "a", kid=0.01)
    client = MlflowClient(uri)
    tracked = client.create_run("0").info.run_id
    client.delete_run(tracked)
    (tmp_path / "a" / "tracking.json").write_text(json.dumps({"run_id": tracked}))
    for new in (True, False):
        code, out, err = run(capsys, "register", folder, "--name", "n", "--uri", uri, "--json")
        assert code == 0, err
        assert json.loads(out)["new"] is new
    (version,) = client.search_model_versions("name = 'n'")
    assert version.run_id != tracked
    assert (
        len(client.search_logged_models(["0", version.run_id and client.get_run(version.run_id).info.experiment_id]))
        == 1
    )
