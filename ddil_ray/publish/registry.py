"""Students in MLflow's model registry: with a signature, their scores, and an alias that moves by the gate.

What is registered is data: the student's folder, and an MLmodel file that names `publish.pyfunc` to read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import LifecycleStage, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from ddil_ray.errors import ConfigError, DdilError, RunFailedError, first_line
from ddil_ray.finished import FinishedRun, read_finished
from ddil_ray.places import TRACKING_SCHEMES, allowed
from ddil_ray.publish.folder import pipeline_folder
from ddil_ray.publish.gate import Evidence, Verdict, evidence_of, judge
from ddil_ray.publish.pyfunc import save_student
from ddil_ray.redact import is_redacted, redact
from ddil_ray.storage import open_url
from ddil_ray.tracking.mlflow import check_credentials, experiment_of, quiet, refused
from ddil_ray.training.manifest import FileFacts
from ddil_ray.training.recipe import Recipe

__all__ = ["CHAMPION", "Registered", "Registry", "Student", "registry_of", "student_of_run"]

CHAMPION = "champion"
"""The alias of the version that `models:/NAME@champion` loads."""
_KIND, _KEY, _EVIDENCE = "ddil_ray", "ddil_ray.student", "ddil_ray.evidence"
"""Tags: of a name, what is registered there; of a version, a digest of what it holds, and what was measured of it."""


@dataclass(frozen=True)
class Student:
    """What is registered."""

    run: FinishedRun
    folder: Path
    """Its pipeline."""
    mlflow_run: str | None
    """Id of the MLflow run that tracked its training, if one did."""
    steps: int
    w: float
    evidence: Evidence | None

    @property
    def key(self) -> str:
        """Digest of the folder and of what was measured: the same where the same is registered again."""
        digest = hashlib.sha256((self.evidence.to_json() if self.evidence else "").encode())
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.folder).as_posix()} {FileFacts.of(path).sha256}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    new: bool
    """Whether it was made now; else the same student was registered before."""

    @property
    def uri(self) -> str:
        """What MLflow loads it by."""
        return f"models:/{self.name}/{self.version}"


def student_of_run(url: str) -> Student:
    """The student of the finished run in the folder or fsspec URL `url`.

    Raises:
        ConfigError: there is none, or it is no pipeline folder.
    """
    run = read_finished(url, "RUN", evaluated=False)
    config = run.config
    steps = config.objective.student_steps
    last = steps[-1] if isinstance(steps, tuple) else steps
    return Student(
        run,
        pipeline_folder(url, "RUN"),
        mlflow_run=_tracked_as(url),
        steps=last,
        w=Recipe(config).student_guidance,
        evidence=evidence_of(run, last),
    )


def _tracked_as(url: str) -> str | None:
    """Id of the MLflow run of a run folder, if its tracker got to one."""
    fs, root = open_url(url)
    path = f"{root}/tracking.json"
    try:
        run_id = json.loads(fs.cat_file(path)).get("run_id") if fs.exists(path) else None
    except (ValueError, AttributeError):  # torn
        return None
    return run_id if isinstance(run_id, str) else None


def registry_of(run: FinishedRun, given: str | None) -> str:
    """The tracking URI of the registry: the one `given`, or else where `run` is tracked.

    Raises:
        ConfigError: neither can be, or MLflow's credentials are for another server than the run's.
    """
    if given is not None:
        try:
            return allowed(given, TRACKING_SCHEMES)
        except ValueError as error:
            raise ConfigError(f"`--uri` {error} (found {redact(given)!r})") from None
    tracking = run.config.tracking
    if tracking.uri is not None and not is_redacted(tracking.uri):
        check_credentials(tracking.uri, "--uri")
        return tracking.uri
    beside = Path(run.url).resolve().parent / "mlflow.db"
    if tracking.uri is None and "://" not in run.url and beside.exists():
        return f"sqlite:///{beside}"
    raise ConfigError(
        f"`--uri` must be given where a run's own tracker is not known, but is not, and {run.url} does not tell one. "
        "Add it, or set MLFLOW_TRACKING_URI."
    )


class Registry:
    """A registry that was reached, and is MLflow's in this process from then on.

    Args:
        uri: MLflow tracking URI; MLFLOW_REGISTRY_URI may name another place for the registry.

    Raises:
        ConfigError: it cannot be reached, has no registry, or does not know who asks.
    """

    def __init__(self, uri: str) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
        os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # nothing of the working directory goes along
        quiet()
        self.uri = uri
        try:
            mlflow.set_tracking_uri(uri)  # a database finds the model of a version by no client of ours
            self._client = MlflowClient(uri)
            self._client.search_registered_models(max_results=1)
        except Exception as error:  # of the server, the database or what lies between
            raise self._unreached(error) from error

    def _unreached(self, error: Exception) -> DdilError:
        where = f"MLflow at {redact(self.uri)}"
        if getattr(error, "error_code", "") in ("ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"):
            return ConfigError(
                f"`--uri` must be an MLflow server with a model registry, but {where} has none "
                f"({first_line(error)}). Name another, or set MLFLOW_REGISTRY_URI to one that has."
            )
        return ConfigError(
            f"`--uri` must be an MLflow server that can be reached, but {where} failed: {first_line(error)}. "
            f"{refused(error) or 'Start it, or name another.'}"
        )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Explain what fails while a server that was reached is asked to do `what`."""
        try:
            yield
        except DdilError:
            raise
        except Exception as error:  # MLflow's, or those of the store that its artifacts go to
            advice = refused(error)
            if advice is not None:
                raise ConfigError(f"{what} failed: {first_line(error)}. {advice}") from error
            raise RunFailedError(f"{what} failed: {first_line(error)}. Give the command again to go on.") from error

    def register(self, student: Student, name: str) -> Registered:
        """`student` as a version of `name`, which is made where it is not there; once, however often it is asked for.

        Raises:
            ConfigError: MLflow takes no such name, or whoever asks may not do that.
            RunFailedError: the server, or the store of its artifacts, failed.
        """
        key = student.key
        with self._asking(f"Registering {name}"):
            self._make(name)
            same = f"name = \"{name}\" and tag.`{_KEY}` = '{key}'"
            found = self._client.search_model_versions(same, max_results=1)
            if found:
                return Registered(name, str(found[0].version), new=False)
            model_id, run_id = self._upload(student)
            tags = {_KEY: key, **({_EVIDENCE: student.evidence.to_json()} if student.evidence else {})}
            made = self._client.create_model_version(
                name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id
            )
            return Registered(name, str(made.version), new=True)

    def crown(self, registered: Registered, evidence: Evidence, score: str) -> Verdict:
        """Make a version the champion of its name if it may be.

        Returns:
            Whether it is now, and why.
        """
        with self._asking(f"Asking for the champion of {registered.name}"):
            champion = self._champion(registered.name)
            verdict = _verdict(registered, evidence, champion, score)
            if verdict.passes:
                self._client.set_registered_model_alias(registered.name, CHAMPION, registered.version)
            return verdict

    def _make(self, name: str) -> None:
        """See that `name` is there, and that whoever asks may change it: before gigabytes are sent."""
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise ConfigError(
                    f"`--name` must be one that MLflow takes, but is {name!r} instead: {first_line(error)}"
                ) from error
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._client.set_registered_model_tag(name, _KIND, "student")

    def _champion(self, name: str) -> ModelVersion | None:
        try:
            return self._client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # as stores say it
                return None
            raise

    def _upload(self, student: Student) -> tuple[str, str]:
        """The ids of a logged model of `student` and of the run that it is an output of."""
        run_id = self._run_of(student)
        experiment = self._client.get_run(run_id).info.experiment_id
        model = self._client.create_logged_model(experiment, "student", source_run_id=run_id)
        try:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary, "model")
                about = Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id)
                save_student(folder, student.folder, steps=student.steps, w=student.w, about=about)
                self._client.log_model_artifacts(model.model_id, str(folder))
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
            now = int(time.time() * 1000)
            scores = student.evidence.scores if student.evidence else {}
            metrics = [Metric(score, value, now, 0, model.model_id, run_id=run_id) for score, value in scores.items()]
            self._client.log_batch(run_id, metrics=metrics)
        except Exception:
            with suppress(Exception):
                self._client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self._client.finalize_logged_model(model.model_id, "READY")
        return model.model_id, run_id

    def _run_of(self, student: Student) -> str:
        """Id of the MLflow run of the training, where this server has it; else of one that is made for it."""
        if student.mlflow_run is not None:
            try:
                found = self._client.get_run(student.mlflow_run).info
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if found.lifecycle_stage != LifecycleStage.DELETED:
                    return str(found.run_id)
        config = student.run.config
        experiment_id = experiment_of(self._client, config.tracking.experiment)
        made = self._client.create_run(experiment_id, run_name=config.name)
        self._client.set_terminated(made.info.run_id)
        return str(made.info.run_id)


def _verdict(registered: Registered, evidence: Evidence, champion: ModelVersion | None, score: str) -> Verdict:
    if champion is None:
        return judge(evidence, None, score)
    if str(champion.version) == registered.version:
        return Verdict(True, "it is the champion already")
    measured = champion.tags.get(_EVIDENCE)
    if measured is None:
        return Verdict(False, f"the two cannot be compared: version {champion.version} has no scores of ddil-ray")
    verdict = judge(evidence, Evidence.from_json(measured), score)
    return Verdict(verdict.passes, f"{verdict.reason} (version {champion.version})")
