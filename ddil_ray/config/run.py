"""The config of a distillation run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ddil_ray.config.checkpoint import Checkpoint
from ddil_ray.config.faults import Faults
from ddil_ray.config.groups import (
    Data,
    Evaluation,
    LabelRole,
    NetworkRole,
    Replay,
    Role,
    Shift,
    States,
    Sync,
    Teacher,
    TeacherRole,
    Threshold,
    Tracking,
    Trainer,
)
from ddil_ray.config.kinds import Group, Seed
from ddil_ray.config.objectives import Objective
from ddil_ray.config.places import Place
from ddil_ray.config.student import Student

__all__ = ["RunConfig"]


class RunConfig(Group):
    """Everything `ddil-ray distill` reads."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    output: Place = Field("runs", description="folder or fsspec URL; the run gets <output>/<name>")
    seed: Seed = 0
    teacher: Teacher
    student: Student = Student()
    data: Data
    objective: Objective
    states: States = States()
    threshold: Threshold = Threshold()
    replay: Replay = Replay()
    sync: Sync = Sync()
    trainer: Trainer = Trainer()
    forward_states: Role = Role()
    student_rollouts: NetworkRole = NetworkRole()
    teacher_rollouts: TeacherRole = TeacherRole()
    labels: LabelRole = LabelRole()
    shift: Shift = Shift()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        low, high = self.teacher.w
        embedded = self.objective.type == "lcm" and self.objective.guidance_embedding
        if low != high and not embedded:
            raise ValueError(
                "teacher.guidance must be one number unless the student is told it, but is a range; set one number, "
                "or objective.type lcm with objective.guidance_embedding true"
            )
        drawn = self.replay.reuse * self.trainer.batch_size // self.trainer.workers[0]
        block = max(r.batch_size for r in (self.forward_states, self.student_rollouts, self.teacher_rollouts))
        if self.replay.capacity < drawn + block:
            raise ValueError(
                f"replay.capacity must hold reuse x batch_size / num_workers rows and the largest block, "
                f"{drawn} + {block}, but is {self.replay.capacity}"
            )
        if self.objective.type == "lcm" and max(self.evaluation.steps) > self.objective.solver_steps:
            raise ValueError(
                f"evaluation.steps must be at most objective.solver_steps ({self.objective.solver_steps}), but is "
                f"{list(self.evaluation.steps)}"
            )
        if not any(self.objective.serves(steps) for steps in self.evaluation.steps):
            raise ValueError(
                f"evaluation.steps must hold a number that a {self.objective.type} student of objective.student_steps "
                f"{self.objective.student_steps} samples with, but is {list(self.evaluation.steps)}"
            )
        if self.objective.type == "dmd2" and self.tracking.log_every < self.objective.student_every:
            raise ValueError(
                f"tracking.log_every must be at least objective.student_every ({self.objective.student_every}), or "
                f"records would lack the student's loss, but is {self.tracking.log_every}"
            )
        return self

    @model_validator(mode="after")
    def _reproduces(self) -> RunConfig:
        if not self.sync.deterministic:
            return self
        if self.trainer.workers[0] != self.trainer.workers[1]:
            raise ValueError(
                f"trainer.num_workers must be one number where sync.deterministic is true, but is "
                f"{list(self.trainer.workers)}"
            )
        for name, steps in (("checkpoint.every", self.checkpoint.every), ("trainer.steps", self.trainer.steps)):
            if steps % self.sync.every:
                raise ValueError(
                    f"{name} must be a multiple of sync.every ({self.sync.every}) where sync.deterministic is true, or "
                    f"what goes on from a checkpoint would roll out other weights, but is {steps}"
                )
        return self
