"""The typed groups of a config. Unknown keys are refused; every number has its range here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from ddil_ray.config.kinds import Count, Fraction, Gpus, Group, NoBool, NonNegative, Positive, Seed, Side, Steps
from ddil_ray.config.places import Place, TrackingPlace

__all__ = [
    "Data",
    "Evaluation",
    "LabelRole",
    "NetworkRole",
    "PriorRamp",
    "Replay",
    "Role",
    "Shift",
    "States",
    "Sync",
    "Teacher",
    "TeacherRole",
    "Threshold",
    "Tracking",
    "Trainer",
]

_Gpus = Gpus | Literal["auto"]
Precision = Literal["fp32", "bf16", "fp16"]
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
Selector = Annotated[str, Field(pattern=rf"^!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))$")]
"""A value that Ray matches a node's label with: `value`, `!value`, `in(a, b)`, `!in(a, b)`."""


class Teacher(Group):
    """The pretrained model that is distilled."""

    model: Place = Field(description="builtin:NAME, pipeline folder, fsspec URL, hub id, or module.path:factory")
    weights: str | None = Field(None, description="safetensors file for a factory's network")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="of its weights while it teaches: the halves take half the memory and round its answers. Samples "
        "that students are measured against are always fp32",
    )
    guidance: NonNegative | tuple[NonNegative, NonNegative] | None = Field(
        None, description="one number, or a range [low, high]; default: no guidance"
    )
    guidance_convention: Literal["w", "scale"] = Field(
        "w",
        description="what guidance numbers are: w of D_c + w (D_c - D_u), 0 for none; or the guidance_scale w + 1 of "
        "diffusers and Imagen, 1 for none",
    )
    guidance_rescale: Fraction = Field(
        0.0, description="share by which guided predictions are brought back to the spread of conditional ones"
    )
    negative_prompt: str | None = Field(
        None, description="D_u of a teacher of prompts; default: what its own pipeline takes"
    )

    sample_size: tuple[Side, Side] | None = Field(
        None, description="[height, width] of samples (latents, where it has any); default: the pipeline's own"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Teacher:
        if isinstance(self.guidance, tuple) and self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance must be [low, high] with low <= high, but is {list(self.guidance)}")
        if self.w[0] < 0:
            raise ValueError(f"guidance must be at least 1 where guidance_convention is scale, but is {self.guidance}")
        return self

    @property
    def w(self) -> tuple[float, float]:
        """Range of w, whatever the convention; equal ends where it is fixed."""
        if self.guidance is None:
            return 0.0, 0.0
        low, high = self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)
        return self.as_w(low), self.as_w(high)

    def as_w(self, guidance: float) -> float:
        """w of a number in this config's convention."""
        return guidance - 1 if self.guidance_convention == "scale" else guidance


class Data(Group):
    """Training images."""

    source: Place = Field(
        description="`digits`, `emoji`, module.path:factory, or by path or fsspec URL a folder of images, a Parquet "
        "file, or prepared data"
    )
    format: Literal["auto", "builtin", "factory", "folder", "parquet", "prepared"] = "auto"
    image_column: str = Field("image", description="Parquet column with the image")
    label_column: str | None = Field("label", description="Parquet column with the class id, or null")
    image_size: Side | None = Field(None, description="crop and resize files of images to this many pixels")
    bucket: str | None = Field(None, description="<height>x<width> of prepared data; default: the fullest")
    prompt_cache_mib: Count = Field(512, description="prompt embeddings that one process keeps in memory")


class PriorRamp(Group):
    """A prior, or chance, that moves from `start` to `end` over the first part of each phase."""

    start: Fraction
    end: Fraction
    ramp: Literal["linear", "cosine"] = "linear"
    over: Annotated[float, Field(gt=0, le=1), NoBool] = 1.0

    def at(self, progress: float) -> float:
        """Value at `progress` of a linear ramp; enough to check sums at both ends and between."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.over)


class States(Group):
    """Which states are learnt on: the source priors of DDIL."""

    forward: Fraction | PriorRamp = 1.0
    student: Fraction | PriorRamp = 0.0
    teacher: Fraction | PriorRamp = 0.0
    mixed: Fraction | PriorRamp = 0.0
    mixed_teacher_probability: Fraction | PriorRamp = Field(0.5, description="chance of the teacher in mixed rollouts")
    mixed_segment: Count | Literal["trajectory"] = Field(
        1, description="steps of a mixed rollout that one draw gives to student or teacher"
    )
    mixed_takeover: Positive | None = Field(
        None,
        description="largest RMS of student x_0 - teacher x_0 (data is in [-1, 1]); over it the teacher takes this and "
        "all later steps of a mixed rollout. Asks the teacher at every step; LCM students differ some by design",
    )
    teacher_substeps: Steps | None = Field(None, description="lcm, dmd2: DDIM steps of teacher rollouts per stage")

    @model_validator(mode="after")
    def _sum_to_one(self) -> States:
        priors = [self.forward, self.student, self.teacher, self.mixed]
        ramps = {(p.ramp, p.over) for p in priors if isinstance(p, PriorRamp) and p.start != p.end}
        if len(ramps) > 1:
            raise ValueError("all ramps must share the same `ramp` and `over`, or the priors do not sum to 1 between")
        for progress in (0.0, 1.0):
            total = sum(p.at(progress) if isinstance(p, PriorRamp) else p for p in priors)
            if abs(total - 1) > 1e-6:
                when = "start" if progress == 0 else "end"
                raise ValueError(f"forward + student + teacher + mixed must be 1 at the {when}, but is {total:g}")
        return self


class Threshold(Group):
    """Where the teacher's x_0 is brought back to the data's range ("reflected")."""

    mode: Literal["none", "static", "per_channel", "dynamic"] = "none"
    bound: Positive = Field(
        1.0, description="static, dynamic: largest |x_0|; to be set where the teacher works on latents"
    )
    quantile: Annotated[float, Field(gt=0.5, le=1), NoBool] = 0.9995
    margin: NonNegative = Field(0.1, description="per_channel: widening of the range by this share")
    applies_to: Literal["teacher", "target", "both"] | None = Field(
        None,
        description="the teacher's x_0, the student's target (pd: x_target, lcm: target network, dmd2: fake score), "
        "or both; default: both for dmd2, else teacher",
    )


class Replay(Group):
    """The trainer's buffers of states."""

    capacity: Count = Field(8192, description="rows per source and worker")
    reuse: Count = Field(1, description="times each row is trained on")
    max_staleness: Count | None = Field(
        None,
        description="oldest student weights a row may come from, in steps; default: what cannot stall, and as much "
        "again, or more where that many blocks are made at once",
    )
    ahead: Count = Field(4, description="blocks per source and worker that may lie ready before they are needed")


class Sync(Group):
    """Publication of student weights."""

    every: Count = Field(20, description="steps between publications")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="what float32 weights travel in; bf16 takes half the bytes and rounds the rollouts' student"
    )
    deterministic: bool = Field(
        False,
        description="make each block of student states from the weights that are newest at the step that needs it, so "
        "that timing changes no bit, see docs/reproducibility.md; actors and trainer wait for each other",
    )


class _Resources(Group):
    num_cpus: NonNegative = 1
    num_gpus: _Gpus = Field("auto", description="per actor; auto: shared evenly where the cluster has GPUs")
    accelerator_type: str | None = None
    resources: dict[str, Positive] = Field(default_factory=dict)
    label_selector: dict[str, Selector] = Field(
        default_factory=dict, description="labels of the nodes to run on: `value`, `!value`, `in(a, b)` or `!in(a, b)`"
    )


class Trainer(_Resources):
    """The optimisation, and the workers that run it."""

    num_workers: Count | tuple[Count, Count] = Field(
        1, description="N, or [min, max] to go on with as many as there is room for, see docs/parallel.md"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several workers: each keeps whole networks (ddp), or its part of every weight, gradient, moment "
        "and average (fsdp), see docs/parallel.md",
    )
    steps: Annotated[StrictInt, Field(ge=1, le=10_000_000)] = Field(
        400, description="per phase (round of progressive distillation)"
    )
    batch_size: Count = Field(128, description="rows per step over all workers")
    lr: Positive = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    clip_norm: Positive = 1.0
    ema_decay: Fraction = 0.99
    ema_offload: bool = Field(False, description="keep the averaged weights in the CPU's memory")
    accumulate: Count = Field(1, description="micro-batches per step")
    precision: Precision = Field(
        "fp32",
        description="networks run in it by autocast, here and in roles that name none; weights stay fp32, and are cast "
        "at use",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit keeps its moments in 2 bytes per parameter in place of 8; needs bitsandbytes"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="students and critics keep the inputs of their blocks alone, and run each again on the way back: "
        "far fewer activations for about a third more time; diffusers networks",
    )
    channels_last: bool = Field(
        False,
        description="convolutional networks keep channels innermost, in every role: often faster on GPUs, for a few "
        "per cent more memory",
    )
    compile: bool | str = Field(
        False,
        description="networks pass through torch.compile, in every role but evaluation: true, or a backend other than "
        "inductor. Faster after minutes of compiling in every process",
    )
    max_failures: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] = 3

    @model_validator(mode="after")
    def _divides(self) -> Trainer:
        low, high = self.workers
        if low > high:
            raise ValueError(f"num_workers must be [min, max] with min <= max, but is {[low, high]}")
        for workers in range(low, high + 1):
            if self.batch_size % (workers * self.accumulate):
                raise ValueError(
                    f"batch_size must be a multiple of num_workers x accumulate ({workers} x {self.accumulate}), "
                    f"but is {self.batch_size}"
                )
        return self

    @property
    def workers(self) -> tuple[int, int]:
        """(least, most) workers."""
        n = self.num_workers
        return n if isinstance(n, tuple) else (n, n)

    @property
    def exchanges_parts(self) -> bool:
        """Whether there may be several workers that keep parts of networks."""
        return self.parallel == "fsdp" and self.workers[1] > 1

    @model_validator(mode="after")
    def _can_be_cut(self) -> Trainer:
        if self.parallel == "fsdp" and self.optimizer != "adamw":
            raise ValueError(f"optimizer must be adamw where parallel is fsdp, but is {self.optimizer}")
        if self.parallel == "fsdp" and self.channels_last:
            raise ValueError("channels_last must be false where parallel is fsdp, which cuts rows, but is true")
        if self.exchanges_parts and self.num_gpus != "auto" and 0 < self.num_gpus < 1:
            raise ValueError(
                "num_gpus must be whole, 0 or auto where parallel is fsdp, as NCCL refuses workers that share a GPU, "
                f"but is {self.num_gpus:g}; set 1, or parallel ddp"
            )
        return self


class Role(_Resources):
    """A pool of actors."""

    num_actors: Count | tuple[Count, Count] = Field(1, description="N, or [min, max] to scale between")
    batch_size: Count = Field(128, description="rows per request")

    @model_validator(mode="after")
    def _ordered(self) -> Role:
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"num_actors must be [min, max] with min <= max, but is {list(self.bounds)}")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """(least, most) actors."""
        n = self.num_actors
        return n if isinstance(n, tuple) else (n, n)


class NetworkRole(Role):
    """A pool of actors that ask networks."""

    precision: Precision | None = Field(
        None, description="networks run in it by autocast in this role's work; default: `trainer.precision`"
    )


class TeacherRole(NetworkRole):
    """The teacher's own rollouts, which never go stale."""

    keep_rows: Count | None = Field(
        None,
        description="rows of a phase that are made once and kept, states and labels; later ones replay them, each pass "
        "in a new order. default: every row is new",
    )
    keep_at: Place | None = Field(
        None,
        description="folder or fsspec URL of kept rows, which runs share whose teacher, data, method and seed are the "
        "same; default: kept/ in the run folder",
    )

    @model_validator(mode="after")
    def _keeps(self) -> TeacherRole:
        if self.keep_at is not None and self.keep_rows is None:
            raise ValueError(f"keep_rows must be set where keep_at is, but is null beside {self.keep_at!r}")
        return self


class LabelRole(NetworkRole):
    """Who asks the teacher: the actor that made the states, or a pool behind it."""

    placement: Literal["fused", "pool"] = "fused"


class Shift(_Resources):
    """Measuring covariate shift while a student trains, by an actor of its own (in the process itself without Ray)."""

    enabled: bool = True
    every: Count = Field(100, description="steps between measurements, each of weights that were published")
    num_samples: Annotated[StrictInt, Field(ge=8, le=2**31 - 1)] = Field(256, description="rows per measurement")
    batch_size: Count = Field(256, description="rows per network pass")
    wait_s: NonNegative = Field(60.0, description="longest wait for the last measurement when training has ended")


class Tracking(Group):
    """MLflow, and how often metrics are recorded."""

    tracker: Literal["mlflow", "none"] = "mlflow"
    uri: TrackingPlace | None = Field(None, description="MLflow tracking URI; default: sqlite in the output folder")
    experiment: str = "ddil-ray"
    required: bool = Field(
        False, description="refuse to start where the tracker does not answer; by default records wait for it on disk"
    )
    log_every: Count = 10
    timeout_s: Positive = Field(
        10.0, description="seconds: of one request, and how long a tracker that fails may hold up the end"
    )


class Evaluation(Role):
    """What is measured when training ends, and the actors that make the samples and their features."""

    enabled: bool = True
    num_samples: Annotated[StrictInt, Field(ge=6, le=2**31 - 1)] = 1000
    steps: tuple[Steps, ...] = Field((1, 2, 4, 8), min_length=1)
    teacher_steps: Steps = Field(64, description="DDIM steps of the teacher's reference samples")
    batch_size: Count = Field(256, description="samples per block, which is a network pass")
    seed: Seed = Field(1_000_003, description="of evaluation noise; its keys are never those of training")
    features: str = Field(
        "auto",
        description="auto (trained on classes or prompts), inception, module.path:factory, or a transformers folder",
    )
    feature_weights: str | None = Field(None, description="file with the weights of inception; default: fetched")
    lpips: Literal["none", "alex", "vgg", "squeeze"] = Field(
        "none", description="network of the LPIPS diversity within a condition; needs torchvision"
    )
    clip: str | None = Field(None, description="folder or hub id of a CLIP model, for the CLIP score of the prompts")
    prompts: tuple[str, ...] | None = Field(
        None, description="one per class id, shown in the scores by class; data of prompts has its own"
    )
