"""Pins the critic: features by name from any network, and a head for any shape of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from ddil_ray.models.unet import UNetNetwork
from ddil_ray.objectives.critic import Critic, DiscriminatorHead
from ddil_ray.testing import TinyNetwork


class _Transformer(nn.Module):
    """diffusers' DiT under this library's signature."""

    def __init__(self):
        super().__init__()
        self.dit = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=3, sample_size=8,
            patch_size=2, num_embeds_ada_norm=20, norm_num_groups=1,
        )  # fmt: skip

    def forward(self, x_t, time, cond, w):
        return self.dit(x_t, timestep=time, class_labels=cond).sample


def _unet():
    return UNetNetwork(
        UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=11,
        )
    )


NETWORKS = {
    "perceptron": (lambda: TinyNetwork((1, 8, 8), conditions=11), "inside"),
    "unet": (_unet, "denoiser.mid_block"),
    "transformer": (_Transformer, "dit.transformer_blocks.1"),
}


def _inputs(rows):
    x_t = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
    return x_t, torch.full((rows,), 500.0), torch.arange(rows) % 10, torch.zeros(rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_read_by_name_and_the_score_is_unchanged(name):
    build, layer = NETWORKS[name]
    torch.manual_seed(0)
    network = build().eval()
    plain = network(*_inputs(6))
    critic = Critic(network, layer=layer, example=_inputs(1)).eval()
    prediction, logits = critic(*_inputs(6))
    torch.testing.assert_close(prediction, plain)
    assert logits.shape == (6,)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_that_stops_at_the_layer_gives_the_same_logits_and_their_gradient(name):
    build, layer = NETWORKS[name]
    network = build().eval()
    critic = Critic(network, layer=layer, example=_inputs(1)).eval()
    x_t, *rest = _inputs(6)
    x_t.requires_grad_()
    whole = critic(x_t, *rest)[1]
    (expected,) = torch.autograd.grad(whole.sum(), x_t)
    short = critic.logits(x_t, *rest)
    (found,) = torch.autograd.grad(short.sum(), x_t)
    torch.testing.assert_close(short, whole)
    torch.testing.assert_close(found, expected)
    assert float(expected.abs().sum()) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_that_are_only_judged_get_the_logits_and_give_the_gradients_of_whole_passes(name):
    build, layer = NETWORKS[name]
    torch.manual_seed(0)
    network = build().eval()
    found = {}
    for ends_early, judged in ((True, 0), (True, 2), (False, 2)):
        critic = Critic(network, layer=layer, example=_inputs(1), ends_early=ends_early).eval()
        prediction, logits = critic(*_inputs(6), judged)
        (prediction[:4].square().mean() + logits.square().mean()).backward()
        gradients = [parameter.grad.clone() for parameter in critic.parameters()]
        critic.zero_grad()
        found[ends_early, judged] = [prediction[:4], logits, *gradients]
        assert len(prediction) == 6 - judged
    for other in list(found.values())[1:]:
        torch.testing.assert_close(other, found[True, 0])


def test_the_pass_really_stops_there():
    network = _unet()
    critic = Critic(network, layer="denoiser.mid_block", example=_inputs(1))
    network.denoiser.conv_out.register_forward_hook(lambda *_: pytest.fail("went on behind the layer"))
    critic.logits(*_inputs(2))


@pytest.mark.parametrize(
    "shape", [(16, 1, 1), (16, 2, 2), (16, 4, 4), (32, 8, 8), (8, 16, 16), (8, 5, 7), (9, 12), (24,)]
)
def test_a_head_gives_one_logit_for_features_of_any_shape(shape):
    assert DiscriminatorHead(shape)(torch.randn(3, *shape)).shape == (3,)


def test_every_rank_starts_with_the_same_head():
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        critic = Critic(TinyNetwork((1, 8, 8), conditions=11), layer="inside", example=_inputs(1))
        heads.append(torch.nn.utils.parameters_to_vector(critic.head.parameters()))
    assert torch.equal(*heads)
