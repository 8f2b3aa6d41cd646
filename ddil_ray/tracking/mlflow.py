"""Tracking in MLflow, on sqlite or a server; the only importer of MLflow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from ddil_ray.redact import redact
from ddil_ray.tracking.tracker import Record, RunInfo

__all__ = ["MlflowTracker"]

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100


class MlflowTracker:
    """One MLflow run, with a nested run per round where there are several.

    Args:
        uri: MLflow tracking URI.
        experiment: its name; made if there is none.
        timeout_s: of one HTTP request.
    """

    def __init__(self, *, uri: str, experiment: str, timeout_s: float) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, int(timeout_s))))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self.uri, self.experiment = uri, experiment
        self._run_id = ""
        self._rounds: list[str] = []

    def open(self, run: RunInfo, state: dict[str, Any]) -> None:
        """See `Tracker.open`."""
        self._client = MlflowClient(self.uri)
        if "run_id" not in state:
            experiment = self._client.get_experiment_by_name(self.experiment)
            experiment_id = experiment.experiment_id if experiment else self._new_experiment()
            created = self._client.create_run(experiment_id, tags=run.tags, run_name=run.name)
            run_id, rounds = created.info.run_id, []
            for name in run.rounds:
                tags = {**run.tags, "mlflow.parentRunId": run_id}
                nested = self._client.create_run(experiment_id, tags=tags, run_name=f"{run.name} {name}")
                rounds.append(nested.info.run_id)
            params = [Param(key, value[:6000]) for key, value in run.params.items()]
            for start in range(0, len(params), _PARAMS_PER_CALL):
                self._client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
            state.update(run_id=run_id, rounds=rounds)  # only once all of it is there: a failed call is made again
        else:
            for run_id in (state["run_id"], *state["rounds"]):
                self._client.update_run(run_id, status="RUNNING")
            self._client.log_batch(state["run_id"], tags=[RunTag(k, v) for k, v in run.tags.items()])
        self._run_id, self._rounds = state["run_id"], state["rounds"]

    def _new_experiment(self) -> str:
        """Beside a sqlite file its artifacts go to the same folder, not to the working directory."""
        artifacts = None
        if self.uri.startswith("sqlite:///"):
            artifacts = Path(self.uri.removeprefix("sqlite:///")).resolve().parent.joinpath("mlartifacts").as_uri()
        experiment_id: str = self._client.create_experiment(self.experiment, artifact_location=artifacts)
        return experiment_id

    def log(self, records: Sequence[Record]) -> None:
        """See `Tracker.log`."""
        now = int(time.time() * 1000)
        batches: dict[str, list[Metric]] = {self._run_id: []}
        for record in records:
            metrics = [
                Metric(name, float(value), now, int(record["step"]))
                for name, value in record.items()
                if name not in ("step", "phase", "total_steps")
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

    def look(self) -> str:
        """See `Tracker.look`."""
        if self.uri.startswith("http"):
            return f"MLflow at {redact(self.uri)}"
        return f"mlflow ui --backend-store-uri {redact(self.uri)}"
