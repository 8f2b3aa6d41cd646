"""Pins loading, students at birth (oracle 18) and every refusal of what is no teacher."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.errors import ConfigError
from ddil_ray.export import save_model_folder
from ddil_ray.models import load_model, student_of
from ddil_ray.models.unet import UNetNetwork, new_unet, unet_model
from ddil_ray.testing import tiny_model

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
COND = torch.tensor([0, 4, 9])


def small_unet(classes=10):
    torch.manual_seed(0)
    return new_unet(sample_shape=(1, 8, 8), num_classes=classes, block_out_channels=(8, 16))


def teacher_model(**scheduler):
    config = {**DDIMScheduler(prediction_type="v_prediction").config, **scheduler}
    model = unet_model(small_unet(), config)
    model.network.eval()
    return model


def test_a_pipeline_folder_gives_the_same_network_back(tmp_path):
    model = teacher_model()
    save_model_folder(tmp_path, model, name="teacher", description="small", steps=8)
    for spec in (str(tmp_path), f"file://{tmp_path}"):
        loaded = load_model(spec)
        zero = torch.zeros(3)
        torch.testing.assert_close(loaded.denoiser()(X, T, COND, zero), model.denoiser()(X, T, COND, zero))
        assert (loaded.sample_shape, loaded.num_conditions, loaded.null_cond) == ((1, 8, 8), 11, 10)


def test_an_unconditional_pipeline_of_diffusers_loads(tmp_path):
    DDIMPipeline(unet=small_unet(None), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert (model.num_conditions, model.null_cond) == (None, None)
    assert model.denoiser()(X, T, COND, torch.zeros(3)).shape == X.shape


@pytest.mark.parametrize("spec", ["builtin:digits", "ddil_ray.models.perceptron:digits_teacher"])
def test_the_shipped_teachers_are_small_and_denoise(spec):
    model = load_model(spec)
    assert sum(p.numel() for p in model.network.parameters()) * 4 < 2 * 2**20
    from ddil_ray.data import load_images
    from ddil_ray.diffusion.schedule import add_noise

    data = load_images("digits")
    x_0, t = data.images[:64], torch.full((64,), 0.5, dtype=torch.float64)
    x_t = add_noise(x_0, torch.randn_like(x_0), t, model.schedule)
    with torch.no_grad():
        error = (model.denoiser()(x_t, t, data.labels[:64], torch.zeros(64)) - x_0).square().mean()
    assert float(error) < 0.3 * float(x_0.var())


@pytest.mark.parametrize("w", [0.0, 1.5, 7.0])
def test_a_new_student_is_its_teacher_at_every_guidance(w):
    """Oracle 18."""
    teacher = teacher_model()
    student = student_of(teacher, guidance_embedding=True)
    student.network.eval()
    guidance = torch.full((3,), w)
    assert torch.equal(student.denoiser()(X, T, COND, guidance), teacher.denoiser()(X, T, COND, guidance))


def test_guidance_is_baked_into_a_plain_network_exactly():
    student = student_of(teacher_model(), guidance_embedding=True)
    network = student.network.eval()
    torch.nn.init.normal_(network.denoiser.time_embedding.projection.weight, std=0.5)
    plain = UNetNetwork(network.plain_unet(2.0)).eval()
    time = torch.tensor([10.0, 500.0, 999.0])
    told = network(X, time, COND, torch.full((3,), 2.0))
    torch.testing.assert_close(plain(X, time, COND, torch.zeros(3)), told, rtol=1e-4, atol=1e-5)
    assert float((told - network(X, time, COND, torch.zeros(3))).detach().abs().max()) > 1e-3


def test_a_students_weights_are_its_own():
    teacher = teacher_model()
    student = student_of(teacher)
    for parameter in student.network.parameters():
        parameter.data.zero_()
    assert float(sum(p.abs().sum() for p in teacher.network.parameters()).detach()) > 0


def test_what_is_no_teacher_is_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    for spec, expected in {
        str(tmp_path / "plain"): "no readable model_index.json",
        str(tmp_path / "other"): "must hold one of UNet2DModel.*AutoencoderKL",
        str(tmp_path / "torn"): "failed to load",
        "builtin:letters": "builtin:digits.*'builtin:letters'",
        "no.such.module:factory": "importable factory.*No module named 'no'",
        "ddil_ray.testing:nothing": "importable factory.*nothing",
        "builtins:dict": "must return a ddil_ray.models.DiffusionModel, but returned dict",
        "nosuch://bucket/teacher": "must be a path or a URL of .*nosuch://bucket",
    }.items():
        with pytest.raises(ConfigError, match=expected) as caught:
            load_model(spec)
        assert "teacher.model" in str(caught.value)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"`teacher.weights` must be a safetensors file that fits"):
        load_model("ddil_ray.testing:tiny_model", weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("schedule", "signal"),
    [
        ({"rescale_betas_zero_snr": True}, "0"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "5e-05"),
        ({"beta_schedule": "linear", "num_train_timesteps": 2000}, "4e-05"),
    ],
)
def test_epsilon_without_terminal_signal_is_refused(schedule, signal):
    """Its errors are multiplied by 1 / alpha(1) where sampling begins: by 20,000 in the second."""
    with pytest.raises(
        ConfigError, match=rf"`prediction_type`.*zero terminal SNR.*`epsilon`.* alpha is {signal} there"
    ):
        teacher_model(prediction_type="epsilon", **schedule)
    assert teacher_model(prediction_type="v_prediction", **schedule).prediction is Prediction.V
    assert teacher_model(prediction_type="epsilon", beta_schedule="linear").prediction is Prediction.EPSILON


def test_a_factorys_network_is_not_given_an_embedding():
    with pytest.raises(ConfigError, match=r"`objective.guidance_embedding` must be false"):
        student_of(tiny_model(), guidance_embedding=True)


def test_networks_of_another_shape_load(tmp_path):
    unet = UNet2DModel(
        sample_size=(8, 16), in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).sample_shape == (3, 8, 16)


def test_a_pipeline_elsewhere_is_fetched_once_and_again_when_it_changes(tmp_path):
    DDIMPipeline(unet=small_unet(None), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    url = f"file://{tmp_path}"
    first = load_model(url).folder
    assert load_model(url).folder == first
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text() + "\n")
    assert load_model(url).folder != first
