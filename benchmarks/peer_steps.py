"""One step of training as two public programs take it, written from what they compute; fp32, on the CPU.

Neither holds more than it must: latents and embedded prompts are at hand, there is no logging and no checkpoint, so
that what is compared is the step alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.models.network import sinusoid
from ddil_ray.objectives.critic import DiscriminatorHead

__all__ = ["DiffusersLcm", "Dmd2", "PeerData"]


@dataclass(frozen=True)
class PeerData:
    """What the peers train on."""

    latents: Tensor
    """(N, C, H, W)"""
    embedded: Tensor
    """(N, words, width) prompts, one per latent."""
    no_prompt: Tensor
    """(1, words, width)"""
    alphas_cumprod: Tensor
    """(T,) of the teacher's schedule."""

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Latents and their embedded prompts."""
        chosen = torch.randint(len(self.latents), (rows,))
        return self.latents[chosen], self.embedded[chosen]

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timesteps (B,), to be multiplied with latents."""
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noised(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Forward diffusion."""
        alpha, sigma = self.levels(timesteps)
        return alpha * x_0 + sigma * noise


class _Optimizer:
    """AdamW with clipping and a schedule, as both programs set it up."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, clip_norm: float) -> None:
        self.parameters, self.clip_norm = parameters, clip_norm
        self.adam = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
        self.schedule = get_scheduler("constant", self.adam)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad(set_to_none=True)


class DiffusersLcm:
    """The step of diffusers' `examples/consistency_distillation/train_lcm_distill_sd_wds.py`.

    Per step: latents noised to a time of a 50-step grid; the student there, told w; the teacher there, with and without
    the prompt in a pass each; one DDIM step of the guided estimate; the target network at the new place; pseudo-Huber
    loss of the two consistency functions; AdamW, clipped; the target network moves towards the student.
    """

    def __init__(self, teacher: UNet2DConditionModel, student: UNet2DConditionModel, data: PeerData) -> None:
        self.teacher, self.student, self.data = teacher, student, data
        self.target = copy.deepcopy(student).requires_grad_(False)
        self.optimizer = _Optimizer(list(student.parameters()), lr=1e-4, clip_norm=1.0)
        self.skip = len(data.alphas_cumprod) // 50
        self.grid = torch.arange(1, 51) * self.skip - 1
        self.grid_before = torch.cat([data.alphas_cumprod[:1], data.alphas_cumprod[self.grid[:-1]]])

    def step(self, rows: int) -> float:
        """One update; returns the loss."""
        latents, embedded = self.data.draw(rows)
        index = torch.randint(50, (rows,))
        start = self.grid[index]
        end = (start - self.skip).clamp(min=0)
        x_t = self.data.noised(latents, torch.randn_like(latents), start)
        w = 3.0 + 12.0 * torch.rand(rows)
        told = sinusoid(w, self.student.config.time_cond_proj_dim)
        student = self.student(x_t, start, timestep_cond=told, encoder_hidden_states=embedded).sample
        predicted = self._consistent(student, x_t, start)
        with torch.no_grad():
            x_s = self._solver_step(x_t, start, index, embedded, w.reshape(-1, 1, 1, 1))
            target = self.target(x_s, end, timestep_cond=told, encoder_hidden_states=embedded).sample
            aim = self._consistent(target, x_s, end)
        loss = (((predicted - aim) ** 2 + 1e-6).sqrt() - 1e-3).mean()
        self.optimizer.step(loss)
        with torch.no_grad():
            for average, parameter in zip(self.target.parameters(), self.student.parameters(), strict=True):
                average.mul_(0.95).add_(parameter, alpha=0.05)
        return loss.item()

    def _solver_step(self, x_t: Tensor, start: Tensor, index: Tensor, embedded: Tensor, w: Tensor) -> Tensor:
        alpha, sigma = self.data.levels(start)
        estimates = []
        for prompt in (embedded, self.data.no_prompt.expand(len(x_t), -1, -1)):
            noise = self.teacher(x_t, start, encoder_hidden_states=prompt).sample
            estimates.append(((x_t - sigma * noise) / alpha, noise))
        (x_0, noise), (x_0_without, noise_without) = estimates
        x_0, noise = x_0 + w * (x_0 - x_0_without), noise + w * (noise - noise_without)
        before = self.grid_before[index].reshape(-1, 1, 1, 1)
        return before.sqrt() * x_0 + (1 - before).sqrt() * noise

    def _consistent(self, noise: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.data.levels(timesteps)
        u = 10.0 * timesteps.reshape(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (u**2 + 0.25), u / (u**2 + 0.25).sqrt()
        return c_skip * x_t + c_out * ((x_t - sigma * noise) / alpha)


class _Judge(nn.Module):
    """The fake score, and a head on what the way down and the middle of its network give."""

    def __init__(self, unet: UNet2DConditionModel, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.unet, self.head = unet, DiscriminatorHead(shape)

    def logits(self, x_t: Tensor, timesteps: Tensor, embedded: Tensor) -> Tensor:
        """(B,) of a pass that ends after the middle."""
        unet = self.unet
        time = unet.time_embedding(unet.time_proj(timesteps))
        x = unet.conv_in(x_t)
        for block in unet.down_blocks:
            attends = {"encoder_hidden_states": embedded} if getattr(block, "has_cross_attention", False) else {}
            x, _ = block(hidden_states=x, temb=time, **attends)
        return self.head(unet.mid_block(x, time, encoder_hidden_states=embedded))


class Dmd2:
    """The step of DMD2's `main/train_sd.py` with its discriminator (`cls_on_clean_image`, `diffusion_gan`).

    Per step: the generator at noised latents; where it is its turn, fake score and guided real score (one pass with
    both prompts) at its noised output, the discriminator on another noising of it, AdamW. Then the fake score's
    denoising loss, and the discriminator on real and generated latents in a pass each, noised anew; AdamW.
    """

    def __init__(self, teacher: UNet2DConditionModel, student: UNet2DConditionModel, data: PeerData) -> None:
        self.real, self.generator, self.data = teacher, student, data
        channels, side = student.config.block_out_channels[-1], student.config.sample_size // 2
        self.judge = _Judge(copy.deepcopy(student).requires_grad_(True), (channels, side, side))
        self.optimizers = [
            _Optimizer(list(network.parameters()), lr=1e-5, clip_norm=10.0) for network in (student, self.judge)
        ]
        self.stages = torch.arange(999, 0, -250)
        self.iteration = 0

    def step(self, rows: int) -> float:
        """One iteration; returns the fake score's loss."""
        latents, embedded = self.data.draw(rows)
        timesteps = self.stages[torch.randint(4, (rows,))]
        x_t = self.data.noised(latents, torch.randn_like(latents), timesteps)
        turn = self.iteration % 5 == 0
        with torch.set_grad_enabled(turn):
            x_0 = self._x_0(self.generator(x_t, timesteps, embedded).sample, x_t, timesteps)
        if turn:
            self.judge.requires_grad_(False)
            loss = self._matching(x_0, embedded) + 1e-3 * F.softplus(-self._logits(x_0, embedded)).mean()
            self.judge.requires_grad_(True)
            self.optimizers[0].step(loss)
        loss = self._score_loss(x_0.detach(), embedded)
        real, real_embedded = self.data.draw(rows)
        judged = F.softplus(self._logits(x_0.detach(), embedded)).mean()
        judged = judged + F.softplus(-self._logits(real, real_embedded)).mean()
        self.optimizers[1].step(loss + 1e-2 * judged)
        self.iteration += 1
        return loss.item()

    def _x_0(self, noise: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (part.double() for part in self.data.levels(timesteps))
        return ((x_t.double() - sigma * noise.double()) / alpha).float()

    def _matching(self, x_0: Tensor, embedded: Tensor) -> Tensor:
        with torch.no_grad():
            timesteps = torch.randint(20, 981, (len(x_0),))
            x_t = self.data.noised(x_0, torch.randn_like(x_0), timesteps)
            fake = self._x_0(self.judge.unet(x_t, timesteps, embedded).sample, x_t, timesteps)
            both = torch.cat([self.data.no_prompt.expand(len(x_0), -1, -1), embedded])
            without, noise = self.real(torch.cat([x_t] * 2), torch.cat([timesteps] * 2), both).sample.chunk(2)
            real = self._x_0(without + 8.0 * (noise - without), x_t, timesteps)
            gradient = (fake - real) / (x_0 - real).abs().mean(dim=[1, 2, 3], keepdim=True)
        return 0.5 * F.mse_loss(x_0, (x_0 - gradient.nan_to_num()).detach())

    def _score_loss(self, x_0: Tensor, embedded: Tensor) -> Tensor:
        noise, timesteps = torch.randn_like(x_0), torch.randint(1000, (len(x_0),))
        predicted = self.judge.unet(self.data.noised(x_0, noise, timesteps), timesteps, embedded).sample
        return F.mse_loss(predicted, noise)

    def _logits(self, x_0: Tensor, embedded: Tensor) -> Tensor:
        timesteps = torch.randint(1000, (len(x_0),))
        return self.judge.logits(self.data.noised(x_0, torch.randn_like(x_0), timesteps), timesteps, embedded)
