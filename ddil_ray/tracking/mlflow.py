"""Tracking in MLflow, on sqlite or a server; the only importer of MLflow beside the model registry (`publish`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import LifecycleStage, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.credentials import read_mlflow_creds

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.redact import HIDDEN, redact
from ddil_ray.tracking.journal import TIME
from ddil_ray.tracking.tracker import Record, RunInfo

__all__ = ["MlflowTracker", "check_credentials", "experiment_of", "quiet", "refused"]

_RUNNING = "RUNNING"
_URI, _TOKEN = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"
_PORTS = {"http": 80, "https": 443}
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100
_NO_METRICS = ("step", "phase", "total_steps", TIME)
_KEY = "ddil_ray_key"
"""Tag by which a run is found again."""
_log = logging.getLogger(__name__)


def quiet() -> None:
    """Keep MLflow from telling what it does, and from printing addresses of runs among what commands print."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def experiment_of(client: MlflowClient, name: str) -> str:
    """Id of the experiment `name`, which is made if there is none.

    Beside a sqlite file its artifacts go to the same folder, not to the working directory.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    artifacts, uri = None, client.tracking_uri
    if uri.startswith("sqlite:///"):
        artifacts = Path(uri.removeprefix("sqlite:///")).resolve().parent.joinpath("mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=artifacts))


def check_credentials(uri: str, field: str) -> None:
    """See that credentials go to the server alone that they are for: `uri` is from a config, which others may write.

    Args:
        uri: of a server or store.
        field: that names it, for the message.

    Raises:
        ConfigError: MLflow has credentials, for another server than this.
    """
    known = read_mlflow_creds()
    if not (known.username or known.password or os.environ.get(_TOKEN)) or not uri.startswith(("http:", "https:")):
        return
    named = os.environ.get(_URI, "")
    if _server(uri) != _server(named):
        raise ConfigError(
            f"`{field}` must be the server that MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or {_TOKEN}, "
            f"are for, as {_URI} tells, but is {redact(uri)!r} instead, and {_URI} is {redact(named) or 'unset'}. Set "
            "it to that server if you trust it with them, or unset them."
        )


def _server(uri: str) -> tuple[str, str | None, int | None]:
    parts, port = urlsplit(uri), None
    with suppress(ValueError):  # one that is no number is the business of who calls there
        port = parts.port
    return parts.scheme, parts.hostname, port or _PORTS.get(parts.scheme)


def refused(error: Exception) -> str | None:
    """What to do about an answer of MLflow to somebody it does not know, or who may not do that; None of others."""
    code = getattr(error, "error_code", None)
    if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to those of somebody "
            "it knows."
        )
    if code == "PERMISSION_DENIED":
        return "Ask whoever administers it for permission, or set MLFLOW_TRACKING_USERNAME to somebody who has it."
    return None


class MlflowTracker:
    """One MLflow run, with a nested run per round where there are several.

    Args:
        uri: MLflow tracking URI.
        experiment: its name; made if there is none.
        timeout_s: of one HTTP request.
    """

    def __init__(self, *, uri: str, experiment: str, timeout_s: float) -> None:
        # `BackgroundTracker` tries again, and `_begun` knows what was done though its answer was lost. MLflow's client
        # would begin a second run, and hold up the end for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, int(timeout_s))))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        quiet()
        self.uri, self.experiment = uri, experiment
        self._run_id = ""
        self._rounds: list[str] = []

    def check(self, *, reach: bool) -> None:
        """See `Tracker.check`."""
        check_credentials(self.uri, "tracking.uri")
        if not reach and "sql" in self.uri.partition(":")[0]:
            return  # a database is made, or looked into, where nobody waits for it
        client = None
        try:
            client = MlflowClient(self.uri)
            if reach:
                client.search_experiments(max_results=1)
        except Exception as error:  # of the server, the database or what lies between
            if client is None and isinstance(error, MlflowException):
                raise ConfigError(
                    f"`tracking.uri` must be an address that MLflow knows, such as http://host:5000 or "
                    f"sqlite:////path/mlflow.db, but is {self.uri!r} instead ({first_line(error)})."
                ) from error
            advice = refused(error) or (
                "Start the server, or set `tracking.required=false`: records then wait for it on disk."
            )
            raise ConfigError(
                f"`tracking.uri` must be reached before the run starts, as `tracking.required` says, but "
                f"{self.look()} failed: {first_line(error)}. {advice}"
            ) from error

    def open(self, run: RunInfo, state: dict[str, Any]) -> None:
        """See `Tracker.open`."""
        self._client = MlflowClient(self.uri)
        known = [state["run_id"], *state["rounds"]] if "run_id" in state else []
        if not self._goes_on(run, known):
            self._begin(run, state)
            if known:
                _log.warning(
                    "MLflow run %s, or a round of it, is gone from %s: run %s gets all, from the first record on.",
                    *(known[0], self.place(), state["run_id"]),
                )
        self._run_id, self._rounds = state["run_id"], state["rounds"]

    def _goes_on(self, run: RunInfo, known: Sequence[str]) -> bool:
        """Open the runs that are known again, if there are any and all are there; False if not."""
        try:
            found = [self._client.get_run(run_id) for run_id in known]
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if not found or any(one.info.lifecycle_stage == LifecycleStage.DELETED for one in found):
            return False
        for one in found:
            self._open_again(one, run.tags)
        return True

    def _begin(self, run: RunInfo, state: dict[str, Any]) -> None:
        experiment_id = experiment_of(self._client, self.experiment)
        run_id = self._begun(experiment_id, state["key"], run.name, run.tags)
        tags = {**run.tags, "mlflow.parentRunId": run_id}
        rounds = [
            self._begun(experiment_id, f"{state['key']}-{number}", f"{run.name} {name}", tags)
            for number, name in enumerate(run.rounds)
        ]
        has = self._client.get_run(run_id).data.params  # which cannot be changed, and may be those of its first start
        params = [Param(key, value[:6000]) for key, value in run.params.items() if key not in has]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
        state.update(run_id=run_id, rounds=rounds, sent=0)  # only once all of it is there: a failed call is made again

    def _begun(self, experiment_id: str, key: str, name: str, tags: dict[str, str]) -> str:
        """Id of the run that has this key: a call whose answer was lost has made it already, or a process before."""
        found = self._client.search_runs([experiment_id], f"tags.{_KEY} = '{key}'", max_results=1)
        if found:
            self._open_again(found[0], tags)
            return str(found[0].info.run_id)
        return str(self._client.create_run(experiment_id, tags={**tags, _KEY: key}, run_name=name).info.run_id)

    def _open_again(self, found: Run, tags: dict[str, str]) -> None:
        if found.info.status != _RUNNING:
            self._client.update_run(found.info.run_id, status=_RUNNING)
        for name, value in tags.items():
            if found.data.tags.get(name) != value:
                self._client.set_tag(found.info.run_id, name, value)

    def log(self, records: Sequence[Record]) -> None:
        """See `Tracker.log`. MLflow keeps a metric once that it gets twice, of the same time."""
        now = time.time()
        batches: dict[str, list[Metric]] = {self._run_id: []}
        for record in records:
            at = int(record.get(TIME, now) * 1000)
            metrics = [
                Metric(name, float(value), at, int(record["step"]))
                for name, value in record.items()
                if name not in _NO_METRICS
            ]
            batches[self._run_id] += metrics
            if self._rounds and "phase" in record:
                batches.setdefault(self._rounds[int(record["phase"])], []).extend(metrics)
        for run_id, metrics in batches.items():
            for start in range(0, len(metrics), _METRICS_PER_CALL):
                self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_CALL])

    def close(self, status: str, files: Sequence[Path]) -> None:
        """See `Tracker.close`."""
        for path in files:
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(self._run_id, str(path))
        for run_id in (*self._rounds, self._run_id):
            self._client.set_terminated(run_id, status=_STATUS[status])

    def place(self) -> str:
        """See `Tracker.place`; who asks makes no other place of it."""
        return f"MLflow at {redact(self.uri).replace(f'{HIDDEN}@', '')}"

    def look(self) -> str:
        """See `Tracker.look`."""
        if self.uri.startswith("http"):
            return f"MLflow at {redact(self.uri)}"
        return f"mlflow ui --backend-store-uri {redact(self.uri)}"
