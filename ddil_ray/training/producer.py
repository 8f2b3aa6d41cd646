"""Makes labelled blocks: states of one source, and what the expert says of them, with the newest weights at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.threshold import Threshold
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives.objective import Objective
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.mixing import Mixing
from ddil_ray.states.source import Conditions, SourceContext, StateRequest, make_states
from ddil_ray.training.wire import FlatWeights, load_weights

__all__ = ["USES_STUDENT", "USES_TEACHER", "Expert", "StateMaker"]

USES_STUDENT = frozenset({Origin.STUDENT, Origin.MIXED})
"""Origins whose states depend on student weights."""
USES_TEACHER = frozenset({Origin.TEACHER, Origin.MIXED})
"""Origins whose states are made with the teacher."""


@dataclass
class Expert:
    """The teacher of the current phase: the given one, then each round's student."""

    teacher: DiffusionModel
    student: DiffusionModel | None
    """Architecture of later teachers, whose weights are replaced; None where the given one teaches to the end."""
    threshold: Threshold
    autocast: torch.dtype | None = None
    """Of labels."""
    phase: int = 0

    def enter(self, phase: int, weights: FlatWeights | None) -> None:
        """Become the teacher of `phase`; `weights` are the last round's student, or None for the given teacher."""
        if weights is not None:
            assert self.student is not None
            load_weights(self.student.network, weights)
        self.begin(phase, promoted=weights is not None)  # a restart may go back to the given teacher

    def begin(self, phase: int, *, promoted: bool) -> None:
        """Teach `phase` with the weights at hand: those of the last round's student where it is `promoted`."""
        self.phase, self._promoted = phase, promoted

    _promoted: bool = field(default=False, init=False)

    @property
    def model(self) -> DiffusionModel:
        """The network that teaches now."""
        model = self.student if self._promoted else self.teacher
        assert model is not None
        return model

    @property
    def denoiser(self) -> Denoiser:
        """Guided only while it is the given teacher: a student has learnt its guidance."""
        return self.asked_in(self.autocast)

    def asked_in(self, autocast: torch.dtype | None) -> Denoiser:
        """`denoiser` whose network runs in another precision."""
        return self.model.expert(guided=not self._promoted, threshold=self.threshold, autocast=autocast)

    @torch.no_grad()
    def label(self, objective: Objective, states: StateBatch, device: torch.device | str) -> StateBatch:
        """`states` with the objective's label, on the CPU."""
        phase = objective.phases[self.phase]
        label = objective.label(self.denoiser, states.to(device), phase)
        return states.labelled(label.cpu())


@dataclass
class StateMaker:
    """Makes the states of requests, holding only the networks that its origins need."""

    objective: Objective
    model: DiffusionModel
    """Gives schedule and shape."""
    conditions: Conditions
    images: torch.Tensor | None = None
    student: DiffusionModel | None = None
    expert: Expert | None = None
    mixing: Mixing = field(default_factory=Mixing)
    autocast: Mapping[Origin, torch.dtype | None] = field(default_factory=dict)
    """Of rollouts, by origin; none where one is left out."""
    device: torch.device | str = "cpu"
    version: int = -1
    """Step at which the weights in `student` were published."""

    def load_student(self, version: int, weights: FlatWeights) -> None:
        """Take new student weights."""
        assert self.student is not None
        load_weights(self.student.network, weights)
        self.version = version

    def make(self, request: StateRequest) -> StateBatch:
        """The states of `request`, without labels."""
        autocast = self.autocast.get(request.origin)
        context = SourceContext(
            schedule=self.model.schedule,
            sample_shape=self.model.sample_shape,
            conditions=self.conditions,
            images=self.images,
            student=self._student_denoiser(autocast),
            teacher=self.expert.asked_in(autocast) if self.expert is not None else None,
            mixing=self.mixing,
            device=self.device,
        )
        version = self.version if request.origin in USES_STUDENT else -1
        return make_states(context, self.objective.phases[request.phase], request, version=version)

    def _student_denoiser(self, autocast: torch.dtype | None) -> Denoiser | None:
        if self.student is None:
            return None
        return self.objective.student_denoiser(self.student.denoiser(autocast=autocast))
