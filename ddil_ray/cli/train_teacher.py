"""`ddil-ray train-teacher`."""

from __future__ import annotations

from ddil_ray.cli.options import AsJson, Config, Overrides, print_json, print_lines
from ddil_ray.errors import ConfigError

__all__ = ["train_teacher"]


def train_teacher(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a small diffusion teacher on your images and save it as a diffusers pipeline.

    Examples:

    `ddil-ray train-teacher digits-teacher`

    `ddil-ray train-teacher digits-teacher name=mine data.source=photos/ data.image_size=16 trainer.steps=5000`
    """
    from ddil_ray.config import TeacherConfig, load_config, to_yaml
    from ddil_ray.export import save_model_folder
    from ddil_ray.folder import RunFolder, environment, write_json
    from ddil_ray.tracking import View
    from ddil_ray.training.teacher import new_teacher, teacher_data
    from ddil_ray.training.teacher import train_teacher as fit

    run = load_config(config, overrides or [], kind=TeacherConfig)
    data = teacher_data(run)
    model = new_teacher(run, data)
    folder = RunFolder(run.output, run.name)
    if folder.has("teacher") or folder.has("checkpoints"):
        raise ConfigError(f"`name` must be new, but {folder.url} holds a run already. Choose another `name`.")
    (folder.local / "config.yaml").write_text(to_yaml(run))
    write_json(folder.local / "environment.json", environment(run.seed))
    with View() as view:
        trained = fit(model, data, run.trainer, seed=run.seed, on_record=view.show)
    save_model_folder(
        folder.local / "teacher",
        trained,
        name=run.name,
        description=f"A small diffusion model of {data.name}, trained by ddil-ray as a teacher for distillation.",
        steps=32,
        facts={"training images": str(len(data)), "training steps": str(run.trainer.steps)},
    )
    folder.sync()
    if as_json:
        print_json({"folder": folder.url, "teacher": f"{folder.url}/teacher"})
        return
    print_lines(
        f"teacher  {folder.url}/teacher",
        f"next     ddil-ray sample {folder.url}/teacher --steps 32 --out teacher.png",
    )
