"""`ddil-ray train-teacher`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddil_ray.cli.options import AllowCode, AsJson, Config, Overrides, print_json, print_lines, quiet_libraries
from ddil_ray.errors import ConfigError, RunFailedError

if TYPE_CHECKING:
    from ddil_ray.config import TeacherConfig, TextTeacherConfig
    from ddil_ray.folder import RunFolder
    from ddil_ray.tracking import View

__all__ = ["new_run", "train_teacher", "write_image_teacher", "write_text_teacher"]


def train_teacher(
    config: Config, overrides: Overrides = None, allow_code: AllowCode = False, as_json: AsJson = False
) -> None:
    """Train a small diffusion teacher on your images and save it as a diffusers pipeline.

    With `kind: text-to-image` it is a latent teacher of captioned images, for `ddil-ray prepare`.

    Examples:

    `ddil-ray train-teacher digits-teacher`

    `ddil-ray train-teacher digits-teacher name=mine data.source=photos/ data.image_size=16 trainer.steps=5000`

    `ddil-ray train-teacher emoji-teacher name=mine data.source=captioned/ trainer.steps=5000`
    """
    from ddil_ray.config import TextTeacherConfig, load_teacher_config
    from ddil_ray.tracking import View

    run = load_teacher_config(config, overrides or [])
    with View() as view:
        folder = write_text_teacher(run, view) if isinstance(run, TextTeacherConfig) else write_image_teacher(run, view)
    if as_json:
        print_json({"folder": folder.url, "teacher": f"{folder.url}/teacher"})
        return
    teacher = f"{folder.url}/teacher"
    if isinstance(run, TextTeacherConfig):
        place = f"teacher.model={teacher} data.source={run.data.source}"
        following = [
            f'ddil-ray sample {teacher} --steps 32 --guidance 2 --prompt "a caption"',
            f"ddil-ray prepare emoji-prepare {place} resolution={run.image_size} output={folder.url}/prepared",
        ]
    else:
        following = [f"ddil-ray sample {teacher} --steps 32 --out teacher.png"]
    print_lines(f"teacher  {teacher}", "next     " + "\n         ".join(following))


def write_image_teacher(run: TeacherConfig, view: View) -> RunFolder:
    """Train a teacher of pixels, and leave it in the folder of the run."""
    from ddil_ray.export import save_model_folder
    from ddil_ray.training.teacher import new_teacher, teacher_data
    from ddil_ray.training.teacher import train_teacher as fit

    data = teacher_data(run)
    model = new_teacher(run, data)
    folder = new_run(run)
    trained = fit(model, data, run.trainer, seed=run.seed, on_record=view.show)
    with folder.filling(f"delete {folder.url} and train again"):
        save_model_folder(
            folder.local / "teacher",
            trained,
            name=run.name,
            description=f"A small diffusion model of {data.name}, trained by ddil-ray as a teacher for distillation.",
            steps=32,
            teacher=True,
            facts={"training images": str(len(data)), "training steps": str(run.trainer.steps)},
        )
    return delivered(folder)


def write_text_teacher(run: TextTeacherConfig, view: View) -> RunFolder:
    """Train a text-to-image teacher of latents, and leave it in the folder of the run."""
    import tempfile

    from ddil_ray.export import save_model_folder
    from ddil_ray.models import load_model
    from ddil_ray.training.captions import captioned_images
    from ddil_ray.training.text_teacher import train_text_teacher

    quiet_libraries()
    data = captioned_images(run.data, size=run.image_size)
    folder = new_run(run)
    pipeline = train_text_teacher(run, data, say=view.say, on_record=view.show)
    again = f"delete {folder.url} and train again"
    with folder.filling(again), tempfile.TemporaryDirectory(prefix="ddil-ray-teacher-") as parts:
        pipeline.save_pretrained(parts)
        save_model_folder(
            folder.local / "teacher",
            load_model(parts),
            name=run.name,
            description=f"A small latent text-to-image model of the captioned images {data.name}, trained by ddil-ray "
            "as a teacher for distillation.",
            steps=32,
            teacher=True,
            facts={
                "training images": str(len(data)),
                "training steps": f"{run.autoencoder.steps} of the autoencoder, {run.trainer.steps} of the denoiser",
            },
        )
    return delivered(folder)


def delivered(folder: RunFolder) -> RunFolder:
    """`folder`, once its files are where the output is.

    Raises:
        RunFailedError: they cannot be copied; says where they are.
    """
    if missing := folder.finish():
        raise RunFailedError(missing)
    return folder


def new_run(run: TeacherConfig | TextTeacherConfig) -> RunFolder:
    """The folder of a run, with its config.

    Raises:
        ConfigError: there is a run in it already.
    """
    from ddil_ray.config import to_yaml
    from ddil_ray.folder import RunFolder, environment, write_json

    folder = RunFolder(run.output, run.name)
    if folder.has("teacher") or folder.has("checkpoints"):
        raise ConfigError(f"`name` must be new, but {folder.url} holds a run already. Choose another `name`.")
    (folder.local / "config.yaml").write_text(to_yaml(run))
    write_json(folder.local / "environment.json", environment(run.seed))
    return folder
