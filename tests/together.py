"""Learners of small runs, alone or spread over processes, on the same global batches with the same noise per row."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers  # what is imported late otherwise, in every process
import sklearn.datasets
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp
from runs import PD, small_run

from ddil_ray.objectives import RealData, dmd2
from ddil_ray.shards import local
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import SourceContext, StateRequest, make_states
from ddil_ray.trained import trained_state
from ddil_ray.training.checkpoint import read_checkpoint, write_checkpoint
from ddil_ray.training.learner import Learner
from ddil_ray.training.optimizer import OPTIMIZERS
from ddil_ray.training.parallel import strategy
from ddil_ray.training.placement import teaching, trained
from ddil_ray.training.recipe import Recipe

_ = diffusers.UNet2DModel, diffusers.DDIMScheduler, sklearn.datasets.load_digits

__all__ = ["BATCH", "OBJECTIVES", "Team", "go_on", "train_all", "write"]

BATCH = 16
PERCEPTRON = "ddil_ray.models.perceptron:new_model"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "pd": PD,
    "lcm": {"type": "lcm", "solver_steps": 10, "student_steps": 2},
    "dmd2": {"type": "dmd2", "student_steps": 4, "student_every": 2, "gan_weight": 0.1},
}


class Team:
    """This process's learner of a run, and what it is given at each step.

    Args:
        parallel: a strategy's name.
        poisoned: step at which the last row of the global batch, so of the last rank alone, is NaN.
        settings: of `small_run`, besides the teacher.
    """

    def __init__(self, parallel: str = "ddp", poisoned: int | None = None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.poisoned = poisoned
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        settings = {"teacher": {"model": PERCEPTRON, "guidance": 1.0}, **settings}
        trainer = {"batch_size": BATCH, "lr": 1e-4, **settings.pop("trainer", {})}
        self.recipe = Recipe(small_run(trainer=trainer, **settings))
        self.made = self.recipe.ingredients()
        objective, teacher, config = self.made.objective, self.made.teacher, self.recipe.config
        self.parallel = strategy(parallel, precision=config.trainer.precision, device="cpu")
        student = self.recipe.student_of(teacher)
        self.expert = self.made.expert()
        if objective.asks_in_trainer:
            asked = teaching(teacher, config, "cpu")
            self.asked = asked.with_network(self.parallel.freeze(asked.network))
            self.recipe.equip(objective, self.asked, self.made.data.images, self.made.data.labels)
        student = trained(student, config, "cpu")
        with patch.dict(
            OPTIMIZERS, adamw=partial(torch.optim.AdamW, eps=1e-3)
        ):  # with less it moves by rounding errors
            self.learner = Learner(student, objective, self.recipe.optimizer_settings(), parallel=self.parallel)

    def batch(self, step: int) -> StateBatch:
        """The labelled global batch of `step`; `version` is each row's number."""
        made, phase = self.made, self.learner.phase
        conditions, images = self.recipe.conditions(made.data), made.data.images
        context = SourceContext(made.teacher.schedule, made.teacher.sample_shape, conditions, images=images)
        states = make_states(context, phase, StateRequest(Origin.FORWARD, 0, step, BATCH, 0), version=-1)
        with torch.no_grad():
            label = made.objective.label(self.expert, states, phase)
        if step == self.poisoned:
            states.x_t[-1] = torch.nan
        return StateBatch(**{**vars(states), "label": label, "version": torch.arange(BATCH)})

    def update(self, step: int) -> dict[str, float]:
        """Train on this rank's slice of a global batch; what the loss draws are the rows' own numbers."""
        mine = self.batch(step)[torch.arange(BATCH).chunk(self.ranks)[self.rank]]
        with _noise_of_rows(self.made.objective, step):
            return {name: float(value) for name, value in self.learner.update(mine).items()}

    def state(self) -> dict[str, torch.Tensor]:
        """All that is learnt, whole; empty but on rank 0."""
        learner, objective = self.learner, self.made.objective
        parts = {"student": trained_state(learner.student.network), "ema": learner.ema.weights()}
        parts |= {k: v for k, v in objective.state_dict().items() if isinstance(v, dict)}
        for (
            role,
            optimizer,
        ) in learner.optimizers.items():  # told apart from weights: Adam moves by the signs of trifles
            moments = optimizer.adam.state_dict()["state"]
            parts[f"gradients of the {role}"] = {str(i): kept["exp_avg"] for i, kept in moments.items()}
        gathered = {part: self.parallel.gather(state) or {} for part, state in parts.items()}
        return {f"{part} {name}": t.clone() for part, state in gathered.items() for name, t in state.items()}

    def kept(self) -> dict[str, float]:
        """The share of its entries that this process keeps of everything that grows with the network."""
        learner, objective = self.learner, self.made.objective
        parts = {"student": learner.student.network.parameters(), "ema": learner.ema.module.parameters()}
        parts |= {
            f"moments of the {role}": [t for state in o.adam.state.values() for t in state.values() if t.ndim]
            for role, o in learner.optimizers.items()
        }
        held = {"critic": objective.critic, "target": getattr(objective, "_target", None)}
        parts |= {name: network.parameters() for name, network in held.items() if network is not None}
        if objective.asks_in_trainer:
            parts["teacher"] = self.asked.network.parameters()
        return {name: _share([*tensors]) for name, tensors in parts.items()}


def train_all(cases: dict[Any, dict[str, Any]], steps: int) -> dict[Any, dict[str, Any]]:
    """By case: what the process did and keeps after `steps` updates; one call, so that processes are started once.

    The last update is the first of the next phase, where there is one.
    """
    found = {}
    for name, settings in cases.items():
        team = Team(**settings)
        metrics = [team.update(step) for step in range(steps - 1)]
        if len(team.made.objective.phases) > 1:
            team.learner.finish()
            team.learner.start(team.made.objective.phases[1])
        metrics.append(team.update(steps - 1))
        found[name] = {"metrics": metrics, "state": team.state(), "kept": team.kept(), "skipped": team.learner.skipped}
    return found


def write(folder: str, steps: int, **settings: Any) -> None:
    """Train and write a checkpoint into a folder of this rank's own."""
    team = Team(**settings)
    for step in range(steps):
        team.update(step)
    team.learner.finish()
    mine = Path(folder, f"of-{team.rank}")
    mine.mkdir()
    state = {"step": steps, "learner": team.learner.state_dict(), "rank": {"rank": team.rank}}
    write_checkpoint(mine, state, rank=team.rank, ranks=team.ranks)


def go_on(folder: str, steps: int, **settings: Any) -> dict[str, Any]:
    """Train on from a checkpoint to `steps`."""
    team = Team(**settings)
    state = read_checkpoint(Path(folder), team.parallel, rank=team.rank, ranks=team.ranks)
    team.learner.load_state_dict(state["learner"])
    metrics = [team.update(step) for step in range(state["step"], steps)]
    return {"metrics": metrics, "state": team.state(), "rank": state.get("rank"), "rounds": team.learner.rounds}


def _share(tensors):
    return sum(local(t).numel() for t in tensors) / sum(t.numel() for t in tensors)


@contextmanager
def _noise_of_rows(objective, step):
    """Let whatever a loss draws for a row depend on the step, the row and the draw alone."""
    drawn = {"rows": torch.arange(BATCH), "count": 0}
    loss = objective.loss

    def counted(student, batch, *more):
        drawn.update(rows=batch.version, count=0)
        return loss(student, batch, *more)

    def generator():
        drawn["count"] += 1
        return torch.Generator().manual_seed(1000 * step + drawn["count"])

    def noise(x, _):
        return torch.randn(BATCH, *x.shape[1:], generator=generator())[drawn["rows"]]

    def times(self, x, span, _):
        return span[0] + (span[1] - span[0]) * torch.rand(BATCH, generator=generator()).double()[drawn["rows"]]

    def draw(self, rows, _):
        chosen = torch.randint(len(self.images), (BATCH,), generator=generator())[drawn["rows"]]
        return self.images[chosen], self.cond[chosen]

    with ExitStack() as stack:
        stack.enter_context(patch.object(objective, "loss", counted))
        stack.enter_context(patch.object(dmd2, "_noise", noise))
        stack.enter_context(patch.object(dmd2.DistributionMatching, "_times", times))
        stack.enter_context(patch.object(RealData, "draw", draw))
        yield
