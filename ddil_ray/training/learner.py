"""The update of a student, and of a critic where the objective has one: loss, backward, clip, step, averages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ddil_ray.errors import RunFailedError
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives.objective import LossOutput, Metrics, Objective
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import Phase
from ddil_ray.training.optimizer import PRECISIONS, NetworkOptimizer, OptimizerSettings
from ddil_ray.training.parallel import Alone
from ddil_ray.training.weights import WeightAverage, load_trained_state, trained_state

__all__ = ["Learner", "round_models"]


class Learner:
    """Updates one student; knows no objective by name.

    Args:
        student: model whose network is trained, already on its device.
        objective: the method, equipped if it asks in the trainer.
        settings: optimizer settings.
        parallel: how networks are spread over the processes that train together.
    """

    def __init__(
        self,
        student: DiffusionModel,
        objective: Objective,
        settings: OptimizerSettings,
        *,
        parallel: Alone | None = None,
    ) -> None:
        self.student, self.objective, self.settings = student, objective, settings
        self.parallel = parallel or Alone()
        self._forward_network = self.parallel.wrap(student.network)
        self.phase = objective.phases[0]
        self.rounds: dict[int, dict[str, torch.Tensor]] = {}
        """Whole averaged weights of every finished phase by its number of student steps, on the CPU; of rank 0."""
        self.device = next(student.network.parameters()).device
        self.skipped = 0
        """Steps that were left out because a loss or a gradient was not finite."""
        self._skipped_in_a_row = 0  # since the student last moved
        self._left_out = 0  # of these, steps in which it should have moved
        self._restart()

    def start(self, phase: Phase) -> None:
        """Begin `phase` from the student as it is: fresh optimizers, averages and method state."""
        self.phase = phase
        if phase.index > 0:
            # A round's result is its averaged student; it is what the next round starts from and is taught by.
            load_trained_state(self.student.network, self.ema.weights())
        self._restart()

    def finish(self) -> None:
        """Keep the averaged weights as the result of this phase; every rank must call.

        Raises:
            RunFailedError: the last steps were left out, so that the student is what it was when losses went wrong.
        """
        if self._left_out:
            raise RunFailedError(_diverged("its last steps", self._left_out))
        weights = self.parallel.gather(self.ema.weights())
        if weights is not None:
            self.rounds[self.phase.student_steps] = {k: v.cpu().clone() for k, v in weights.items()}

    def published(self) -> dict[str, torch.Tensor] | None:
        """The student's trained weights by name, whole, as they are now; None but on rank 0. Every rank must call.

        They share the network's memory where it is not cut up, and are on the CPU where it is.
        """
        return self.parallel.gather(trained_state(self.student.network))

    def _restart(self) -> None:
        settings = self.settings
        self.objective.start(self.student.network, self.phase, self.parallel)
        device = "cpu" if settings.ema_offload else None
        self.ema = WeightAverage(self.student.network, decay=settings.ema_decay, device=device)
        self.optimizers = {"student": NetworkOptimizer(self.student.network.parameters(), settings)}
        critic = self.objective.critic
        if critic is not None:
            lr = self.objective.critic_lr or settings.lr
            self.optimizers["critic"] = NetworkOptimizer(critic.parameters(), replace(settings, lr=lr))

    def update(self, batch: StateBatch, generator: torch.Generator | None = None) -> Metrics:
        """One step on labelled states, which are on the CPU; `generator` (CPU) gives the objective's noise.

        The device is waited for once: before anything moves, losses and gradients must be finite, in every process.
        Where they are not, neither student nor critic moves, and the step is counted in `skipped`; but not where
        gradients alone are beyond what fp16 holds and the scale of its losses can be lowered for it.

        Raises:
            RunFailedError: more than `max_skipped` steps were left out since the student last moved.
        """
        metrics: Metrics = {**_by_origin(batch), "lr": self.optimizers["student"].lr}
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        outputs = self._outputs(batch.to(self.device), generator)
        losses = [output.per_row for output in outputs if output.per_row is not None]
        criticism = [output.critic_loss.detach() for output in outputs if output.critic_loss is not None]
        moved = {"student": losses, "critic": criticism}
        norms = {role: optimizer.norm() for role, optimizer in self.optimizers.items() if moved[role]}
        if self._sound(outputs, norms):
            if losses:  # a critic that goes on says nothing of a student that does not
                self._skipped_in_a_row = self._left_out = 0
            metrics |= outputs[-1].metrics
            if losses:
                metrics |= _losses_by_origin(torch.cat(losses), batch.origin)
            if criticism:
                metrics["critic/loss"] = torch.stack(criticism).mean()
            metrics |= self._move(norms)
        elif not self._excused(outputs, norms):
            self._count_skipped(outputs)
        for optimizer in self.optimizers.values():
            optimizer.advance()
        self.objective.after_update(self.student.network)
        return metrics

    def _move(self, norms: Mapping[str, torch.Tensor]) -> Metrics:
        """Move along the gradients of those networks that have some."""
        metrics: Metrics = {}
        if "student" in norms:
            metrics["grad_norm"] = self.optimizers["student"].step(norms["student"])
            self.ema.update()
        if "critic" in norms:
            metrics["critic/grad_norm"] = self.optimizers["critic"].step(norms["critic"])
        return metrics

    def _outputs(self, batch: StateBatch, generator: torch.Generator | None) -> list[LossOutput]:
        """Losses of all micro-batches; their gradients add up."""
        outputs: list[LossOutput] = []
        each = math.ceil(len(batch) / self.settings.accumulate)
        parts = [batch[start : start + each] for start in range(0, len(batch), each)]
        for i, part in enumerate(parts):
            with contextlib.nullcontext() if i == len(parts) - 1 else self._without_exchange():
                outputs.append(self._backward(part, len(part) / len(batch), generator))
        return outputs

    def _sound(self, outputs: Sequence[LossOutput], norms: Mapping[str, torch.Tensor]) -> bool:
        """Whether all losses and gradients are finite, in every process alike."""
        gradients = [norm.isfinite() for norm in norms.values()]
        return bool(self.parallel.agreed(torch.stack([_finite(outputs), *gradients]).all()))

    def _excused(self, outputs: Sequence[LossOutput], norms: Mapping[str, torch.Tensor]) -> bool:
        """Leave this step out; whether all that is wrong with it is the scale of fp16's losses, which is lowered."""
        excused = finite = bool(self.parallel.agreed(_finite(outputs)))
        for role, norm in norms.items():
            beyond = not bool(norm.isfinite())
            lowered = self.optimizers[role].leave_out(lower=finite and beyond)
            excused = excused and (lowered or not beyond)
        return excused

    def _count_skipped(self, outputs: Sequence[LossOutput]) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._left_out += any(output.per_row is not None for output in outputs)
        if self._skipped_in_a_row > self.settings.max_skipped:
            raise RunFailedError(_diverged(_what_is_wrong(outputs), self._skipped_in_a_row))

    def _backward(self, batch: StateBatch, share: float, generator: torch.Generator | None) -> LossOutput:
        """Losses of a micro-batch that is `share` of the batch, and their gradients."""
        precision = PRECISIONS[self.settings.precision]
        denoiser = replace(self.student.denoiser(autocast=precision), network=self._forward_network)
        output = self.objective.loss(denoiser, batch, self.phase, generator)
        for role, loss in (("student", output.loss), ("critic", output.critic_loss)):
            if loss is not None:
                self.optimizers[role].backward(loss * share)
        return output

    def _without_exchange(self) -> contextlib.AbstractContextManager[None]:
        """Leave out the exchange of gradients of all but the last micro-batch."""
        return self.parallel.without_exchange(self._forward_network, self.objective.critic)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs."""
        return {
            "phase": self.phase.index,
            "student": trained_state(self.student.network),
            "ema": self.ema.state_dict(),
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "objective": self.objective.state_dict(),
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.phase = self.objective.phases[state["phase"]]
        load_trained_state(self.student.network, state["student"])
        self._restart()
        self.ema.load_state_dict(state["ema"])
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][role])
        self.objective.load_state_dict(state["objective"])
        self.rounds = state["rounds"]


def round_models(student: DiffusionModel, rounds: Mapping[int, dict[str, torch.Tensor]]) -> dict[int, DiffusionModel]:
    """The frozen student of every phase by its number of steps, from `Learner.rounds` and a student of that kind."""
    models = {}
    for steps, weights in rounds.items():
        models[steps] = student.copy()
        load_trained_state(models[steps].network, weights)
        models[steps].network.eval().requires_grad_(False)
    return models


def _parts(outputs: Sequence[LossOutput]) -> dict[str, list[torch.Tensor]]:
    """What must be finite: the loss of every row, and all sums of losses."""
    return {
        "rows": [o.per_row for o in outputs if o.per_row is not None],
        "losses of the student": [o.loss.detach()[None] for o in outputs if o.loss is not None],
        "losses of the critic": [o.critic_loss.detach()[None] for o in outputs if o.critic_loss is not None],
    }


def _finite(outputs: Sequence[LossOutput]) -> torch.Tensor:
    """Whether () bool all losses are finite."""
    return torch.stack([t.isfinite().all() for tensors in _parts(outputs).values() for t in tensors]).all()


def _what_is_wrong(outputs: Sequence[LossOutput]) -> str:
    for what, tensors in _parts(outputs).items():
        wrong = [not ok for tensor in tensors for ok in tensor.isfinite().tolist()]
        if any(wrong):
            return f"{sum(wrong)} of {len(wrong)} {what}"
    return "gradients, or losses of another worker,"


def _diverged(what: str, steps: int) -> str:
    return (
        f"The loss must stay finite, but {what} gave NaN or infinity, and it was so for {steps} steps in a row. Lower "
        "`trainer.lr`, or use precision fp32; the last checkpoint is unharmed, and `--resume` goes on from it."
    )


def _losses_by_origin(losses: torch.Tensor, origins: torch.Tensor) -> Metrics:
    """Mean loss, and that of every source's rows."""
    metrics: Metrics = {"loss": losses.mean()}
    for origin in Origin:
        rows = (origins == origin).nonzero().squeeze(1)
        if len(rows):
            metrics[f"loss/{origin.label}"] = losses[rows.to(losses.device)].mean()
    return metrics


def _by_origin(batch: StateBatch) -> Metrics:
    """Share and law of t of every source's rows."""
    metrics: Metrics = {}
    for origin in Origin:
        t = batch.t[batch.origin == origin]
        if len(t):
            metrics[f"states/share_{origin.label}"] = len(t) / len(batch)
            for quarter, share in enumerate((torch.histc(t.float(), 4, 0, 1) / len(t)).tolist()):
                metrics[f"states/t_{origin.label}/quarter_{quarter + 1}"] = share
    return metrics
