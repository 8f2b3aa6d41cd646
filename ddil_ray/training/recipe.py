"""From a validated config to the objects of a run; every process builds the same ones from the same config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddil_ray.config import Role, RunConfig
from ddil_ray.data import ImageData, check_against_teacher, check_fills_batch, load_images
from ddil_ray.data.prepared import PreparedPrompts
from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.threshold import THRESHOLDS, NoThreshold, PerChannelThreshold, Threshold
from ddil_ray.errors import ConfigError
from ddil_ray.models import DiffusionModel, Lora, load_model, student_of
from ddil_ray.models.match import check_pipelines, load_student
from ddil_ray.objectives import OBJECTIVES, Objective, RealData
from ddil_ray.prompts import Prompts
from ddil_ray.states.batch import Origin
from ddil_ray.states.mixing import Mixing
from ddil_ray.states.prior import ConsumptionPlan, Prior, SourcePriors
from ddil_ray.states.source import Conditions
from ddil_ray.states.stretch import Stretch
from ddil_ray.training.checks import (
    check_embeddings,
    check_exported_grid,
    check_imageless,
    check_sampled_steps,
    check_student_guidance,
    check_threshold,
    discriminated_layer,
)
from ddil_ray.training.loop import LoopSettings
from ddil_ray.training.optimizer import PRECISIONS, OptimizerSettings
from ddil_ray.training.placement import check_placement
from ddil_ray.training.producer import USES_STUDENT

__all__ = ["ROLE_OF_ORIGIN", "Ingredients", "Recipe"]

ROLE_OF_ORIGIN = {
    Origin.FORWARD: "forward_states",
    Origin.STUDENT: "student_rollouts",
    Origin.TEACHER: "teacher_rollouts",
    Origin.MIXED: "student_rollouts",
}
"""The config group that sizes each source's actors."""


@dataclass(frozen=True)
class Ingredients:
    """Everything a run is made of, checked against each other."""

    teacher: DiffusionModel
    data: ImageData
    objective: Objective
    plans: list[ConsumptionPlan]
    threshold: Threshold
    """Of the teacher's estimates."""
    max_staleness: int
    prompts: Prompts | None = None
    """Of a teacher of prompts."""

    def expert(self) -> Denoiser:
        """The guided, thresholded teacher."""
        return self.teacher.expert(guided=True, threshold=self.threshold)


@dataclass(frozen=True)
class Recipe:
    """One run's ingredients, made from `config` alone."""

    config: RunConfig

    # What needs neither data nor teacher -------------------------------------------------------------------------

    @property
    def guidance(self) -> tuple[float, float]:
        """Range of w; equal ends where it is fixed."""
        return self.config.teacher.w

    @property
    def student_guidance(self) -> float:
        """The w that the exported student has, and that it is evaluated at."""
        chosen = self.config.student.guidance
        return sum(self.guidance) / 2 if chosen is None else self.config.teacher.as_w(chosen)

    @cached_property
    def priors(self) -> SourcePriors:
        """Source priors by origin."""
        states = self.config.states
        return SourcePriors({o: _prior(getattr(states, o.label)) for o in Origin})

    @property
    def mixing(self) -> Mixing:
        """How student and teacher share mixed rollouts."""
        states = self.config.states
        segment = None if states.mixed_segment == "trajectory" else states.mixed_segment
        return Mixing(_prior(states.mixed_teacher_probability), segment, states.mixed_takeover)

    def objective(self, student: DiffusionModel, images: Tensor, *, probe: bool = False) -> Objective:
        """The method, for `student`.

        Args:
            student: any of the run.
            images: calibrate a threshold that is per channel.
            probe: pass a row through the network to see that a discriminator's layer gives features.

        Raises:
            ConfigError: a discriminator that is to read what is no layer of the student's network, or a grid of times
                that diffusers' scheduler would not sample the student at.
        """
        config = self.config.objective
        settings = config.model_dump(exclude={"type", "guidance_embedding"})
        if config.type != "pd" and self.config.states.teacher_substeps is not None:
            settings["teacher_substeps"] = self.config.states.teacher_substeps
        if config.type == "dmd2" and config.gan_weight > 0:
            settings["gan_layer"] = discriminated_layer(student, config.gan_layer, probe=probe)
        objective = OBJECTIVES[config.type](student.schedule, threshold=self.target_threshold(images), **settings)
        check_exported_grid(config.type, objective, student)
        return objective

    def role_of(self, origin: Origin) -> Role:
        """The config group that sizes the actors of `origin`."""
        role: Role = getattr(self.config, ROLE_OF_ORIGIN[origin])
        return role

    def rows_per_block(self, origin: Origin) -> int:
        """Rows that one request of `origin` makes."""
        return self.role_of(origin).batch_size

    @property
    def rollout_autocast(self) -> dict[Origin, torch.dtype | None]:
        """What networks run in while they make the states of each source."""
        named = {o: getattr(self.role_of(o), "precision", None) for o in Origin}
        return {o: PRECISIONS[precision or self.config.trainer.precision] for o, precision in named.items()}

    def most_actors(self, origin: Origin) -> int:
        """Blocks of `origin` that can be at work at once: actors that make its states, and those that label them."""
        pooled = self.config.labels.placement == "pool"
        return self.role_of(origin).bounds[1] + (self.config.labels.bounds[1] if pooled else 0)

    def plans(self, phases: int, stretch: Stretch | None = None) -> list[ConsumptionPlan]:
        """What one rank consumes in each phase; of as many workers as may be, or of those of `stretch`."""
        trainer = self.config.trainer
        stretch = stretch or Stretch(trainer.workers[1])
        return [
            ConsumptionPlan(
                self.priors,
                steps=trainer.steps,
                batch_size=trainer.batch_size // stretch.workers,
                seed=self.config.seed,
                phase=phase,
                reuse=self.config.replay.reuse,
                begin=stretch.begin(phase, trainer.steps),
            )
            for phase in range(phases)
        ]

    def max_staleness(self, plans: list[ConsumptionPlan]) -> int:
        """The bound in steps: the configured one, or the smallest that cannot stall and as much again.

        More again where the blocks that are made at once, and those that may lie ready, last longer.

        Raises:
            ConfigError: the configured bound would make trainer and rollouts wait for each other for ever.
        """
        bound, sync = self.config.replay.max_staleness, self.config.sync.every
        smallest = self._smallest_staleness(plans)
        if bound is None:
            rolled_out = [(plan, o) for plan in plans for o in plan.origins if o in USES_STUDENT]
            return smallest + max([smallest, *(self._steps_ahead(plan, o) for plan, o in rolled_out)])
        if bound < smallest:
            raise ConfigError(
                f"`replay.max_staleness` must be at least {smallest} steps here, but is {bound} instead: a block of "
                f"`student_rollouts.batch_size` rows lasts {smallest - sync} steps, and weights are published every "
                f"{sync}. Raise it, or lower `student_rollouts.batch_size` or `sync.every`."
            )
        return bound

    def staleness_of(self, stretch: Stretch, *, phases: int, bound: int) -> int:
        """`bound`, or the smallest that cannot stall in `stretch` where that is more.

        Buffers start empty where another number of workers goes on, so blocks begin at other rows of the plan and may
        last longer than any of a whole run.
        """
        return max(bound, self._smallest_staleness(self.plans(phases, stretch)))

    def _smallest_staleness(self, plans: list[ConsumptionPlan]) -> int:
        sync = self.config.sync.every
        rolled_out = [(plan, o) for plan in plans for o in plan.origins if o in USES_STUDENT]
        return max(
            (plan.smallest_staleness(o, rows=self.rows_per_block(o), sync_every=sync) for plan, o in rolled_out),
            default=sync,
        )

    def _steps_ahead(self, plan: ConsumptionPlan, origin: Origin) -> int:
        """Steps that all blocks last, on average, which may have been begun and not be needed yet."""
        rows, taken = self.rows_per_block(origin), int(plan.fresh(origin)[-1])
        blocks = self.most_actors(origin) / self.config.trainer.workers[1] + self.config.replay.ahead
        return math.ceil(blocks * rows * plan.steps / taken) if taken else 0

    def optimizer_settings(self) -> OptimizerSettings:
        """The learner's settings."""
        t = self.config.trainer
        return OptimizerSettings(
            steps=t.steps,
            name=t.optimizer,
            lr=t.lr,
            betas=(t.betas[0], t.betas[1]),
            weight_decay=t.weight_decay,
            warmup_steps=t.warmup_steps,
            decay=t.decay,
            clip_norm=t.clip_norm,
            ema_decay=t.ema_decay,
            ema_offload=t.ema_offload,
            accumulate=t.accumulate,
            precision=t.precision,
            max_skipped=self.config.faults.max_skipped_steps,
        )

    def loop_settings(self, *, max_staleness: int, rank: int = 0) -> LoopSettings:
        """The loop's settings."""
        c = self.config
        return LoopSettings(
            steps=c.trainer.steps,
            sync_every=c.sync.every,
            max_staleness=max_staleness,
            checkpoint_every=c.checkpoint.every,
            log_every=c.tracking.log_every,
            capacity=c.replay.capacity,
            reuse=c.replay.reuse,
            seed=c.seed,
            rank=rank,
        )

    # What reads the teacher or the data --------------------------------------------------------------------------

    def ingredients(self, *, teacher: DiffusionModel | None = None, data: ImageData | None = None) -> Ingredients:
        """All of a run; whatever can be known to be wrong with it is found here.

        Args:
            teacher: in place of the config's.
            data: in place of the config's.

        Raises:
            ConfigError, DataError: see the methods below.
        """
        check_student_guidance(self.config)
        if teacher is None and self.config.student.model is not None:
            check_pipelines(self.config.student.model, self.config.teacher.model)
        teacher = teacher or self.load_teacher()
        check_placement(teacher, self.config)
        check_sampled_steps(self.config, teacher)
        check_threshold(self.config, teacher)
        data = self.load_data(teacher) if data is None else data
        prompts = self.prompts(teacher, data)
        teacher.bind(prompts.bank() if prompts else None)
        objective = self.objective(self.student_of(teacher), data.images, probe=True)
        plans = self.plans(len(objective.phases))
        threshold = self.teacher_threshold(data.images)
        return Ingredients(teacher, data, objective, plans, threshold, self.max_staleness(plans), prompts)

    def load_teacher(self) -> DiffusionModel:
        """The teacher, on the CPU.

        Raises:
            ConfigError: it cannot be loaded, or cannot be guided or have samples as asked.
        """
        teacher = load_model(self.config.teacher.model, weights=self.config.teacher.weights)
        if self.config.teacher.sample_size is not None:
            teacher = teacher.resized(self.config.teacher.sample_size)
        if max(self.guidance) > 0 and teacher.null_cond is None and not teacher.reads_guidance:
            raise ConfigError(
                f"`teacher.guidance` must be left out for a teacher without an unconditional class, but is "
                f"{self.config.teacher.guidance} instead. Set `teacher.guidance=null`."
            )
        negative = self.config.teacher.negative_prompt
        if negative is not None and (not teacher.prompted or teacher.reads_guidance):
            raise ConfigError(
                f"`teacher.negative_prompt` must be left out for a teacher that "
                f"{'is told guidance' if teacher.prompted else 'is not asked by text'}, but is {negative!r} instead."
            )
        rescale, unguided = self.config.teacher.guidance_rescale, teacher.reads_guidance or max(self.guidance) == 0
        if rescale > 0 and unguided:
            raise ConfigError(
                f"`teacher.guidance_rescale` must be 0 for a teacher that "
                f"{'is told guidance' if teacher.reads_guidance else 'is not guided'}, but is {rescale:g} instead."
            )
        teacher.guidance_rescale = self.config.teacher.guidance_rescale
        return teacher

    def student_of(self, teacher: DiffusionModel) -> DiffusionModel:
        """A new student of `teacher`.

        Raises:
            ConfigError: `student.model` cannot be loaded or is no match for `teacher`; see also `models.student_of`.
        """
        config = self.config.student
        embedded = bool(getattr(self.config.objective, "guidance_embedding", False))
        base = teacher if config.model is None else load_student(config.model, teacher)
        lora = None if config.lora is None else Lora(**config.lora.model_dump())
        return student_of(base, guidance_embedding=embedded, lora=lora)

    def load_data(self, teacher: DiffusionModel) -> ImageData:
        """The training images, checked against the teacher.

        Raises:
            DataError: unreadable, or not what the teacher was made for.
        """
        data = load_images(**self.config.data.model_dump(exclude={"prompt_cache_mib"}))
        guided = max(self.guidance) > 0
        check_against_teacher(
            data,
            sample_shape=teacher.sample_shape,
            num_classes=None if teacher.prompted else teacher.null_cond if guided else teacher.num_conditions,
            prompted=teacher.prompted,
            prepared_for=teacher.family.name if teacher.family and teacher.latent else None,
        )
        if len(data.images) == 0:
            check_imageless(self.config, self.priors, data)
        else:
            check_fills_batch(data, self.config.trainer.batch_size)
        return data

    def prompts(self, teacher: DiffusionModel, data: ImageData) -> Prompts | None:
        """What every process finds the embeddings of the data's prompts with; None for other teachers.

        Raises:
            ConfigError: the text encoders, which are asked for the negative prompt, cannot be loaded.
        """
        if data.prompts is None:
            return None
        negative_prompt = self.config.teacher.negative_prompt
        if negative_prompt is None and isinstance(data.prompts, PreparedPrompts):
            negative = data.prompts.negative()
        else:
            encoder = teacher.family and teacher.folder and teacher.family.text_encoder(teacher.folder)
            if not encoder:
                raise ConfigError(
                    "`teacher.model` must be a pipeline with text encoders for data of prompts without a negative one, "
                    f"but is {self.config.teacher.model}. Use a pipeline, or data prepared by `ddil-ray prepare`."
                )
            negative = encoder.negative(negative_prompt)
        check_embeddings(data.prompts, negative, data.name)
        return Prompts(data.prompts, negative, self.config.data.prompt_cache_mib * 2**20)

    def conditions(self, data: ImageData) -> Conditions:
        """Conditions as frequent as in the data."""
        return Conditions(data.labels, self.guidance)

    def equip(self, objective: Objective, teacher: DiffusionModel, images: Tensor, labels: Tensor) -> None:
        """Give a method that asks in the trainer the teacher, which is frozen, and the data."""
        if objective.asks_in_trainer:
            teacher.network.eval().requires_grad_(False)
            expert = teacher.expert(
                guided=True,
                threshold=self.teacher_threshold(images),
                autocast=PRECISIONS[self.config.trainer.precision],
            )
            objective.equip(expert, RealData(images, labels))

    def teacher_threshold(self, images: Tensor) -> Threshold:
        """The threshold of the teacher's estimates, calibrated on `images` where it is per channel."""
        return self._threshold(images) if self._threshold_on("teacher") else NoThreshold()

    def target_threshold(self, images: Tensor) -> Threshold:
        """The threshold of what the student is compared with, see `threshold.applies_to`."""
        return self._threshold(images) if self._threshold_on("target") else NoThreshold()

    def _threshold_on(self, part: str) -> bool:
        default = "both" if self.config.objective.type == "dmd2" else "teacher"
        return (self.config.threshold.applies_to or default) in (part, "both")

    def _threshold(self, images: Tensor) -> Threshold:
        config = self.config.threshold
        settings = {
            "none": {},
            "static": {"bound": config.bound},
            "dynamic": {"bound": config.bound, "quantile": config.quantile},
        }
        if config.mode == "per_channel":
            return PerChannelThreshold.fit(images, quantile=config.quantile, margin=config.margin)
        return THRESHOLDS[config.mode](**settings[config.mode])


def _prior(value: object) -> Prior:
    if isinstance(value, (int, float)):
        return Prior(float(value), float(value))
    return Prior(value.start, value.end, value.ramp, value.over)  # type: ignore[attr-defined]
