"""The config of `ddil-ray chain`: a pipeline as one file, a group for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ddil_ray.config.kinds import Group
from ddil_ray.config.places import Place

__all__ = ["LINKS", "STAGES", "STUDENTS", "ChainConfig", "Compare", "Export"]

STAGES = ("train_teacher", "prepare", "distill", "baseline", "evaluate", "compare", "export")
"""In the order in which they are done."""
_TEACHER, _DATA = {"teacher.model": ("train_teacher", "teacher")}, {"data.source": ("prepare", "")}
LINKS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "prepare": _TEACHER,
    "distill": {**_TEACHER, **_DATA},
    "baseline": {**_TEACHER, **_DATA},
    "evaluate": {**_TEACHER, **_DATA},
}
"""Stage -> its settings that a stage before it gives, with that stage and the part of its folder."""
STUDENTS: Mapping[str, tuple[str, ...]] = {
    "evaluate": ("distill",),
    "compare": ("baseline", "distill"),
    "export": ("distill",),
}
"""Stage -> the stages whose students it takes."""
_OWN = ("name", "output")
"""Settings of stages that the chain sets."""

Settings = dict[str, Any]


class Compare(Group):
    """Finished runs that the student is compared with, as by `ddil-ray compare`."""

    runs: tuple[Place, ...] = Field(
        (), description="their folders or fsspec URLs; the first is what others are compared with, before `baseline`"
    )


class Export(Group):
    """The copy of the student for others, as by `ddil-ray export`."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="precision of the weights; default: as they are"
    )
    variant: bool = Field(False, description="name files of weights after `dtype`, fp16 or bf16")
    onnx: bool = Field(False, description="add the denoiser as ONNX, checked against torch")
    push: str | None = Field(None, description="owner/name on the hub to commit the copy to")
    private: bool = Field(False, description="make the hub's repository private")

    @model_validator(mode="after")
    def _fits_together(self) -> Export:
        if self.variant and self.dtype not in ("fp16", "bf16"):
            raise ValueError(f"dtype must be fp16 or bf16 where variant is true, but is {self.dtype or 'null'}")
        if self.private and self.push is None:
            raise ValueError("push must be given where private is true, but is null")
        return self


class ChainConfig(Group):
    """Everything `ddil-ray chain` reads. A stage that is left out is skipped; `{}` takes its defaults."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    output: Place = Field("runs", description="folder or fsspec URL; all stages write to <output>/<name>")
    train_teacher: Settings | None = Field(
        None, description="settings of `ddil-ray train-teacher`; as in all stages, `extends` may name a config"
    )
    prepare: Settings | None = Field(None, description="settings of `ddil-ray prepare`")
    distill: Settings | None = Field(None, description="settings of `ddil-ray distill`")
    baseline: Settings | None = Field(
        None, description="of a second run to compare with: settings over those of `distill`, such as other states"
    )
    evaluate: Settings | None = Field(
        None, description="of `ddil-ray evaluate`: settings over those of `distill`, such as more samples"
    )
    compare: Compare | None = None
    export: Export | None = None

    @property
    def stages(self) -> list[str]:
        """Those that are not left out, in order."""
        return [name for name in STAGES if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _fits_together(self) -> ChainConfig:
        if not self.stages:
            raise ValueError(f"one of the stages {', '.join(STAGES)} must be given, but all are left out")
        for name in ("baseline", *STUDENTS):
            if getattr(self, name) is not None and self.distill is None:
                raise ValueError(f"distill must be given where {name} is, but is left out")
        if self.compare is not None and self.baseline is None and not self.compare.runs:
            raise ValueError("compare.runs must name a finished run where baseline is left out, but names none")
        for name in self.stages:
            settings = getattr(self, name)
            if isinstance(settings, dict):
                self._leaves_to_the_chain(name, settings)
        return self

    def _leaves_to_the_chain(self, name: str, settings: Settings) -> None:
        for key in _OWN:
            if key in settings:
                raise ValueError(f"{name}.{key} must be left out: the chain sets the {key} of every stage")
        for setting, (before, _) in LINKS.get(name, {}).items():
            group, _, key = setting.partition(".")
            given = settings.get(group)
            if getattr(self, before) is not None and isinstance(given, dict) and key in given:
                raise ValueError(f"{name}.{setting} must be left out where {before} is given, whose result it is")
