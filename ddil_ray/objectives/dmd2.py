"""Distribution matching distillation: the student's samples are moved to where teacher and student scores agree.

Source: Yin et al. 2024, arXiv:2405.14867 (DMD2). With DDIL's mixture the generator's input states come from any source:
student rollouts are the paper's backward simulation, forward states its alternative; the fake score learns on the same
mixture, or the gradient would be biased. That mixture, and the thresholds on both scores, are this project's reading of
DDIL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.diffusion.denoiser import Denoiser, NetworkDenoiser
from ddil_ray.diffusion.prediction import from_x0, to_x0
from ddil_ray.diffusion.schedule import NoiseSchedule, add_noise
from ddil_ray.diffusion.threshold import NoThreshold, Threshold
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.objectives.critic import Critic
from ddil_ray.objectives.objective import LossOutput, Metrics, Parallel, RealData, spread
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.source import Phase
from ddil_ray.trained import load_trained_state, set_trainable, trained_state

__all__ = [
    "DistributionMatching",
    "critic_adversarial_loss",
    "matching_gradient",
    "matching_loss",
    "student_adversarial_loss",
]


def matching_gradient(x_0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Direction (B, ...) in which each sample is to move away: (fake - real) / mean |x_0 - real|, in float64.

    The normaliser is each sample's own, so that no sample weakens another. Where it is 0, the gradient is 0.

    Args:
        x_0: (B, ...) the student's samples.
        real, fake: (B, ...) x_0 estimates of teacher and fake score at the noised samples.

    Source: Yin et al. 2024, arXiv:2311.18828, eq. 7 and 8.
    """
    real = real.double()
    scale = (x_0.double() - real).abs().flatten(1).mean(1).reshape(-1, *([1] * (x_0.ndim - 1)))
    return ((fake.double() - real) / scale).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(x_0: Tensor, gradient: Tensor) -> Tensor:
    """Per-row (B,) losses whose mean has d/dx_0 = gradient / numel: mean of 1/2 |x_0 - stop(x_0 - gradient)|^2."""
    x_0 = x_0.double()
    return 0.5 * (x_0 - (x_0 - gradient).detach()).square().flatten(1).mean(1)


def student_adversarial_loss(logits: Tensor) -> Tensor:
    """softplus(-D(generated)), mean: ln 2 where the discriminator cannot tell."""
    return F.softplus(-logits).mean()


def critic_adversarial_loss(generated: Tensor, real: Tensor) -> Tensor:
    """softplus(D(generated)) + softplus(-D(real)), means: 2 ln 2 where the discriminator cannot tell."""
    return F.softplus(generated).mean() + F.softplus(-real).mean()


class DistributionMatching:
    """One phase; a student of `student_steps` renoising steps, a fake score, and with weight a discriminator.

    Every iteration trains the critic (fake score and head) on the student's detached samples; every `student_every`-th
    one the student too. States at t = 1 are pure noise, whatever the schedule's terminal signal. Times are
    those before the shift of a flow schedule, which therefore moves the student's stages and the laws of t alike.

    Args:
        schedule: of teacher and student.
        threshold: of the fake score's estimates; should be the teacher's own.
        student_steps: stages of the student; 1 is one-step distillation, where every source gives pure noise.
        student_every: iterations per update of the student.
        teacher_substeps: DDIM steps of a teacher rollout per stage.
        time_range: of the uniform law of t at which scores are compared.
        critic_lr: peak learning rate of the critic; None for the student's.
        gan_weight: of the student's adversarial loss; 0 for no discriminator.
        critic_gan_weight: of the discriminator's loss beside the fake score's.
        gan_layer: submodule of the network whose output the discriminator reads.
    """

    student_becomes_teacher = False
    fixed_steps = False
    asks_in_trainer = True
    critic: nn.Module | None = None

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        threshold: Threshold | None = None,
        student_steps: int = 4,
        student_every: int = 5,
        teacher_substeps: int = 2,
        time_range: Sequence[float] = (0.02, 0.98),
        critic_lr: float | None = None,
        gan_weight: float = 0.0,
        critic_gan_weight: float = 1e-2,
        gan_layer: str | None = None,
    ) -> None:
        self.schedule, self.threshold = schedule, threshold or NoThreshold()
        self.student_steps, self.student_every = student_steps, student_every
        self.time_range, self.critic_lr = (max(time_range[0], schedule.earliest), time_range[1]), critic_lr
        self.gan_weight, self.critic_gan_weight = gan_weight, critic_gan_weight
        self.gan_layer = gan_layer if gan_weight > 0 else None
        self.most_steps: int | None = student_steps
        self.lcm_scheduler: dict[str, Any] | None = {"original_inference_steps": student_steps}
        self._bare: Critic | None = None
        self._expert: Denoiser | None = None
        self._data: RealData | None = None
        self._iteration = 0
        self.phases: tuple[Phase, ...] = (
            Phase(
                index=0,
                student_steps=student_steps,
                stages=uniform_grid(student_steps),
                law=TimeLaw.over(uniform_grid(student_steps)),
                transition="renoise",
                teacher_substeps=teacher_substeps,
                pure_noise=True,
            ),
        )

    def sampling_times(self, steps: int) -> Tensor:
        """Times of diffusers' LCMScheduler with `student_steps` original steps."""
        return consistency_grid(self.student_steps, steps)

    def student_denoiser(self, network: NetworkDenoiser) -> Denoiser:
        """The network as it is."""
        return network

    def label(self, teacher: Denoiser, states: StateBatch, phase: Phase) -> Tensor:
        """Nothing (B, 0): what the teacher is asked depends on the student of the moment."""
        return states.x_t.new_zeros(len(states), 0)

    def equip(self, expert: Denoiser, data: RealData) -> None:
        """Take the real score, and the samples that the discriminator calls real."""
        self._expert, self._data = expert, data

    def start(self, student: nn.Module, phase: Phase, parallel: Parallel) -> None:
        """Start the fake score from the student, which knows what its teacher does then."""
        network = set_trainable(parallel.twin(student))
        device, example = next(network.parameters()).device, None
        if self.gan_layer is not None:
            assert self._data is not None
            x_t, cond = self._data.images[:1].to(device), self._data.cond[:1].to(device)
            example = (x_t, torch.zeros(1, device=device), cond, torch.zeros(1, device=device))
        with torch.autocast(device.type, parallel.dtype, enabled=parallel.dtype is not None):
            self._bare = Critic(network, layer=self.gan_layer, example=example, ends_early=parallel.ends_early)
        self.critic = parallel.wrap(self._bare)
        self._iteration = 0

    def loss(
        self, student: NetworkDenoiser, batch: StateBatch, phase: Phase, generator: torch.Generator | None = None
    ) -> LossOutput:
        """Matching and adversarial loss of the student where it is its turn; the critic's loss always."""
        turn = self._iteration % self.student_every == 0
        with torch.set_grad_enabled(turn):
            x_0 = student(batch.x_t, batch.t, batch.cond, batch.w)
        metrics: Metrics = {
            "student/mean": x_0.detach().mean(),
            "student/spread": spread(x_0),
        }
        loss = per_row = None
        if turn:
            loss, per_row, more = self._student_loss(student, x_0, batch, generator)
            metrics |= more
        critic_loss, more = self._critic_loss(student, x_0.detach(), batch, generator)
        return LossOutput(loss, per_row, metrics | more, critic_loss)

    def _student_loss(
        self, student: NetworkDenoiser, x_0: Tensor, batch: StateBatch, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Metrics]:
        assert self._bare is not None
        assert self._expert is not None
        t = self._times(x_0, self.time_range, generator)
        with torch.no_grad():
            x_t = add_noise(x_0, _noise(x_0, generator), t, self.schedule)
            real = self._expert(x_t, t, batch.cond, batch.w)
            fake_score = replace(student, network=self._bare.network)
            fake = self.threshold(fake_score(x_t, t, batch.cond, torch.zeros_like(batch.w)))
            gradient = matching_gradient(x_0, real, fake)
        per_row = matching_loss(x_0, gradient)
        metrics: Metrics = {"dmd/gradient": gradient.abs().mean(), "dmd/scores_apart": (fake - real).abs().mean()}
        loss = per_row.mean()
        if self.gan_weight > 0:
            adversarial = self._adversarial(student, x_0, batch.cond, generator)
            metrics["gan/student_loss"] = adversarial.detach()
            loss = loss + self.gan_weight * adversarial
        return loss, per_row.detach(), metrics

    def _adversarial(
        self, student: NetworkDenoiser, x_0: Tensor, cond: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The student's adversarial loss as a function of `x_0` alone: the way back through the critic is done here.

        So the critic's own gradients stay out of it, however the critic is spread over processes. It is done for the
        sum over rows, whose gradients a half can hold whatever the number of rows.
        """
        assert self._bare is not None
        samples = x_0.detach().requires_grad_()
        x_t, t = self._renoised(samples, generator)
        logits = self._under_autocast(student, self._bare.logits, x_t, t, cond)
        loss = student_adversarial_loss(logits.double())
        (gradient,) = torch.autograd.grad(loss * len(x_0), samples)
        return loss.detach() + ((x_0 - samples.detach()) * gradient / len(x_0)).sum()

    def _critic_loss(
        self, student: NetworkDenoiser, x_0: Tensor, batch: StateBatch, generator: torch.Generator | None
    ) -> tuple[Tensor, Metrics]:
        """Denoising loss in what the network predicts, and the discriminator's on the same noised samples."""
        assert self.critic is not None
        x_t, t = self._renoised(x_0, generator)
        rows, judged, cond, seen, times = len(x_0), 0, batch.cond, x_t, t
        if self.gan_weight > 0:
            assert self._data is not None
            judged = rows
            real, real_cond = (part.to(x_0.device) for part in self._data.draw(judged, generator))
            real_t, real_times = self._renoised(real, generator)
            seen, times, cond = torch.cat([x_t, real_t]), torch.cat([t, real_times]), torch.cat([cond, real_cond])
        output, logits = self._under_autocast(student, self.critic, seen, times, cond, judged)
        wanted = from_x0(x_0, x_t, t, prediction=student.prediction, schedule=self.schedule)
        loss = (output.float() - wanted).square().mean()
        estimate = to_x0(output.detach(), x_t, t, prediction=student.prediction, schedule=self.schedule)
        metrics: Metrics = {
            "critic/score_loss": loss.detach(),
            "critic/x_0_error": (estimate - x_0).square().mean(),
        }
        if logits is not None:
            generated, real_logits = logits.double().split(rows)
            adversarial = critic_adversarial_loss(generated, real_logits)
            loss = loss + self.critic_gan_weight * adversarial
            metrics |= {
                "gan/critic_loss": adversarial.detach(),
                "gan/real": real_logits.detach().sigmoid().mean(),
                "gan/generated": generated.detach().sigmoid().mean(),
            }
        return loss, metrics

    def _renoised(self, x_0: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(x_t, t) with t uniform over the whole schedule."""
        t = self._times(x_0, (self.schedule.earliest, 1.0), generator)
        return add_noise(x_0, _noise(x_0, generator), t, self.schedule), t

    def _times(self, x: Tensor, span: Sequence[float], generator: torch.Generator | None) -> Tensor:
        """(B,) float64 times uniform over `span`; drawn on the CPU, the same on every device."""
        low, high = span
        return (low + (high - low) * torch.rand(len(x), generator=generator, dtype=torch.float64)).to(x.device)

    def _under_autocast(
        self, student: NetworkDenoiser, call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Tensor, *more: int
    ) -> Any:
        """`call` with the network's own arguments and `more`, in the precision that the student runs in."""
        time = self.schedule.network_time(t).to(x_t.device)
        with torch.autocast(x_t.device.type, student.autocast, enabled=student.autocast is not None):
            return call(x_t, time, cond, torch.zeros(len(x_t), device=x_t.device), *more)

    def after_update(self, student: nn.Module) -> None:
        """Count the iteration."""
        self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """The critic, and whose turn it is."""
        assert self._bare is not None
        return {"critic": trained_state(self._bare), "iteration": self._iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore critic and turn."""
        assert self._bare is not None
        load_trained_state(self._bare, state["critic"])
        self._iteration = state["iteration"]


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x)
