"""`ddil-ray chain`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ddil_ray.cli.options import AllowCode, AsJson, Config, Overrides, Verbose, print_json, print_lines
from ddil_ray.errors import ConfigError

if TYPE_CHECKING:
    from ddil_ray.chain import Chain, Stage

__all__ = ["chain"]


def chain(
    config: Config,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="Do this stage alone; repeat for more.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all settings, tell what is done and what is not, start nothing.")
    ] = False,
    verbose: Verbose = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Do the stages of a pipeline, one after another: teacher, data, student, baseline, scores, comparison, export.

    The same command again does what is missing only: a stage is done again if its settings, the files it names or the
    results it takes are others. A run that was interrupted goes on.

    Examples:

    `ddil-ray chain digits-chain --dry-run`

    `ddil-ray chain digits-chain distill.trainer.steps=800 export.dtype=fp16`

    `ddil-ray chain my.yaml --only evaluate`
    """
    from ddil_ray.config import ChainConfig, load_config

    settings = load_config(config, overrides or [], kind=ChainConfig)
    for name in only or ():
        if name not in settings.stages:
            given = ", ".join(settings.stages)
            raise ConfigError(f"`--only` must be one of the stages of CONFIG, {given}, but is {name!r} instead.")

    from ddil_ray.chain import Chain

    pipeline, chosen = Chain(settings), only or settings.stages
    pipeline.check(chosen)
    walk = _Walk(pipeline, chosen, dry_run=dry_run, verbose=verbose, quiet=as_json)
    if dry_run:
        walk()
    else:
        from ddil_ray.folder import RunFolder
        from ddil_ray.runtime.lock import RunLock

        with RunLock(RunFolder(settings.output, settings.name), walk.view.say):
            walk()
    if as_json:
        print_json({"folder": walk.chain.url, "stages": walk.told})
    elif dry_run:
        print_lines("Nothing was started.")


class _Walk:
    """Through the stages, in order.

    Args:
        chain: whose.
        chosen: stages that may be done.
        dry_run: do none.
        verbose: let Ray speak.
        quiet: leave telling to `told`.
    """

    def __init__(self, chain: Chain, chosen: list[str], *, dry_run: bool, verbose: bool, quiet: bool) -> None:
        from ddil_ray.tracking import View

        self.chain, self.view = chain, View()
        self.told: dict[str, dict[str, str]] = {}
        """Stage -> its state, and its folder or why there is none."""
        self._chosen = [] if dry_run else chosen
        self._verbose, self._quiet = verbose, quiet

    def __call__(self) -> None:
        from ddil_ray.config.chain import STAGES

        for name in STAGES:
            if name not in self.chain.config.stages:
                self._tell(name, "left out")
            elif missing := self.chain.missing(name):
                self._cannot(name, missing)
            else:
                self._stand(self.chain.stage(name))

    def _cannot(self, name: str, missing: list[str]) -> None:
        if name in self._chosen:
            raise ConfigError(
                f"`--only` must come after the stages that {name} needs, but {', '.join(missing)} must be done first. "
                "Add them, or leave `--only` out."
            )
        self._tell(name, "to do", why=f"after {', '.join(missing)}")

    def _stand(self, stage: Stage) -> None:
        if stage.result is not None:
            self._tell(stage.name, "skipped", why="done before", folder=f"{self.chain.url}/{stage.folder}")
        elif stage.name not in self._chosen:
            self._tell(stage.name, "to do", why=stage.why)
        else:
            self._do(stage)
            self._tell(stage.name, "done", why=stage.why, folder=f"{self.chain.url}/{stage.folder}")

    def _do(self, stage: Stage) -> None:
        self.view.say(f"{stage.name} starts: {stage.why}.")
        started = time.monotonic()
        self.chain.begin(stage)
        try:
            _COMMANDS[stage.name](self.chain, stage, self._verbose)
        except BaseException:
            self.view.say(f"{stage.name} has not been done. The same command goes on from here.")
            raise
        self.chain.finish(stage, time.monotonic() - started)

    def _tell(self, name: str, state: str, **more: str) -> None:
        self.told[name] = {"state": state, **more}
        if not self._quiet:
            print_lines(f"{name:14} {state:9} {more.get('folder') or more.get('why', '')}".rstrip())


def _train_teacher(chain: Chain, stage: Stage, verbose: bool) -> None:
    from ddil_ray.cli.train_teacher import write_image_teacher, write_text_teacher
    from ddil_ray.config import TextTeacherConfig
    from ddil_ray.tracking import View

    chain.clear(stage)
    with View() as view:
        if isinstance(stage.config, TextTeacherConfig):
            write_text_teacher(stage.config, view)
        else:
            write_image_teacher(stage.config, view)


def _prepare(chain: Chain, stage: Stage, verbose: bool) -> None:
    from ddil_ray.prepare import new_job
    from ddil_ray.runtime.prepare import prepare
    from ddil_ray.tracking import View

    with View() as view:
        prepare(new_job(stage.config), view=view, verbose=verbose)


def _distill(chain: Chain, stage: Stage, verbose: bool) -> None:
    from ddil_ray.runtime.resume import begun
    from ddil_ray.runtime.run import distill

    distill(stage.config, resume=begun(stage.config), verbose=verbose)


def _evaluate(chain: Chain, stage: Stage, verbose: bool) -> None:
    from ddil_ray.cli.evaluate import measure
    from ddil_ray.cli.train_teacher import delivered
    from ddil_ray.folder import RunFolder

    (run,) = chain.students("evaluate")
    chain.clear(stage)
    folder = RunFolder(chain.url, stage.folder)
    measure(f"{run}/student", stage.config, folder.local, verbose=verbose)
    delivered(folder)


def _compare(chain: Chain, stage: Stage, verbose: bool) -> None:
    from ddil_ray.ablation.folders import study_of
    from ddil_ray.ablation.report import write_report
    from ddil_ray.cli.train_teacher import delivered
    from ddil_ray.folder import RunFolder

    study = study_of([*stage.config.runs, *chain.students("compare")])
    chain.clear(stage)
    folder = RunFolder(chain.url, stage.folder)
    write_report(folder.local, study)
    delivered(folder)


def _export(chain: Chain, stage: Stage, verbose: bool) -> None:
    from ddil_ray.cli.export import export_to
    from ddil_ray.cli.train_teacher import delivered
    from ddil_ray.folder import RunFolder

    (run,) = chain.students("export")
    chain.clear(stage)
    folder = RunFolder(chain.url, stage.folder)
    export_to(folder.local, run, **stage.config.model_dump())
    delivered(folder)


_COMMANDS: dict[str, Callable[[Chain, Stage, bool], None]] = {
    "train_teacher": _train_teacher,
    "prepare": _prepare,
    "distill": _distill,
    "baseline": _distill,
    "evaluate": _evaluate,
    "compare": _compare,
    "export": _export,
}
