"""Ray Train as a run uses it, for the driver."""

from __future__ import annotations

import threading

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.runtime.streams import StreamSplit, stream_factory
from ddil_ray.runtime.verdict import Judge, explain
from ddil_ray.runtime.waits import exchange_s
from ddil_ray.runtime.watch import Watch
from ddil_ray.runtime.worker import train_worker
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = ["train"]

_POLL_S = 0.5


def train(
    recipe: Recipe, made: Ingredients, store: CheckpointStore, attempt: int, context: RunContext, watch: Watch
) -> None:
    """Run Ray Train in a thread, calling `watch` until it ends; its checkpoints are of `attempt`.

    A signal that comes while no trainer runs ends this at once: nothing is there that could be lost.

    Raises:
        RunFailedError: training failed.
    """
    config, (filesystem, path) = recipe.config, store.filesystem()
    phases, gpus = len(made.objective.phases), float(config.trainer.num_gpus)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"context": context, "store": store},
        datasets={o.label: stream_factory(context, recipe, o, phases=phases) for o in recipe.priors.origins},
        dataset_config=StreamSplit(),
        # NCCL refuses two ranks on one GPU, which a share of less than one allows.
        torch_config=TorchConfig(backend=None if gpus >= 1 else "gloo", timeout_s=exchange_s(config.faults)),
        scaling_config=ScalingConfig(
            num_workers=config.trainer.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={
                "CPU": config.trainer.num_cpus,
                **({"GPU": gpus} if gpus else {}),
                **config.trainer.resources,
            },
            accelerator_type=config.trainer.accelerator_type,
            label_selector=dict(config.trainer.label_selector) or None,
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.trainer.max_failures, controller_failure_limit=3),
            callbacks=[Judge(context.hub)],
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        watch()
        if thread.is_alive() and not watch.trainer_runs():
            return
    watch()  # what was told in the end
    if failure:
        raise RunFailedError(explain(failure[0], watch.trainer_words())) from failure[0]
