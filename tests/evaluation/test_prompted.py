"""Pins how models of prompts and latents are measured: on decoded pictures, with the data's own prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from measured import assert_same
from preparing import prepare, settings
from runs import small_run
from tiny import save_pipeline

from ddil_ray.data import ImageData
from ddil_ray.errors import DataError
from ddil_ray.evaluation import check_instruments, pictures_of, reference_rows
from ddil_ray.models import load_model
from ddil_ray.prompts import HeldEmbeddings
from ddil_ray.results import new_benchmark, prompt_parts, save_grids, scores_of, teacher_samplers
from ddil_ray.training.recipe import Recipe

TEXTS = ["a red bird", "two boats", "a bird in rain", "rain", "a red boat"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_model(str(save_pipeline("stable_diffusion", tmp_path_factory.mktemp("teacher"))))


@pytest.fixture(scope="module")
def data(teacher):
    """Latents of forty pictures, eight of each prompt."""
    embeddings = teacher.family.text_encoder(teacher.folder)(TEXTS)
    pictures = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = teacher.codec.encode(pictures)
    return ImageData(
        latents, torch.arange(40) % 5, "birds", HeldEmbeddings(embeddings, TEXTS), prepared_for="stable_diffusion"
    )


def benchmark_of(teacher, data):
    """(benchmark, samplers) of a run on `data`."""
    asked = {"num_samples": 24, "steps": [1, 2], "teacher_steps": 4, "batch_size": 16, "enabled": True}
    recipe = Recipe(small_run(evaluation=asked))
    made = recipe.ingredients(teacher=teacher, data=data)
    return new_benchmark(recipe, made), {"teacher": teacher_samplers(recipe, made)}


@pytest.fixture(scope="module")
def measured(teacher, data):
    benchmark, samplers = benchmark_of(teacher, data)
    return benchmark, benchmark.measure(samplers)


def test_samples_are_pictures_and_are_not_scored_by_prompt(measured):
    benchmark, found = measured
    by_steps = found.measured["teacher"]
    assert all(m.first.shape == (24, 3, 16, 16) for m in by_steps.values())
    assert all(m.classes == [] for m in by_steps.values())
    assert set(by_steps[1].scores) >= {"frechet_data", "frechet_teacher", "coverage", "paired_error"}
    about = benchmark.describe()
    assert (about["image_size"], about["resized"]) == (16, False)
    assert "words of the prompts of birds" in about["features"]


def test_prompts_of_the_first_samples_are_told(measured, data):
    benchmark, found = measured
    cond = torch.cat([benchmark.maker.blocks.conditions(b) for b in range(2)])
    assert found.prompts == tuple(TEXTS[c] for c in cond)


def test_samples_are_compared_with_as_many_latents_as_there_are_samples(data):
    few = reference_rows(data, num_samples=24, seed=3)
    assert len(few) == len(few.labels) == 24
    assert all(any(torch.equal(row, other) for other in data.images[data.labels == c]) for row, c in
               zip(few.images, few.labels, strict=True))  # fmt: skip
    assert_same(few.images, reference_rows(data, num_samples=24, seed=3).images)
    assert reference_rows(data, num_samples=40, seed=3) is data
    pixels = replace(data, prepared_for=None)
    assert reference_rows(pixels, num_samples=24, seed=3) is pixels


def test_latents_are_seen_as_the_pictures_they_decode_to(teacher, data):
    seen = pictures_of(data, teacher.codec, teacher.sample_shape)
    assert not seen.latents
    torch.testing.assert_close(seen.images, teacher.codec.decode(data.images).clamp(-1, 1))


def imageless(teacher, tmp_path, **changes):
    """A run on prepared prompts alone, measured at 2 steps."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    prepare(settings(teacher.folder, tmp_path / "prompts.txt", tmp_path / "prepared"))
    return Recipe(
        small_run(
            teacher={"model": str(teacher.folder)},
            data={"source": str(tmp_path / "prepared")},
            evaluation={"enabled": True, "num_samples": 24, "steps": [2], "teacher_steps": 4},
            **changes,
        )
    )


def test_prompts_without_pictures_are_measured_against_the_teacher_alone(teacher, tmp_path):
    recipe = imageless(teacher, tmp_path, states={"forward": 0.0, "student": 1.0})
    made = recipe.ingredients()
    check_instruments(recipe.config.evaluation, made.data, made.teacher)
    benchmark = new_benchmark(recipe, made)
    scores = scores_of(benchmark.measure({"teacher": teacher_samplers(recipe, made)}))["teacher"][2]
    assert set(scores) == {"frechet_teacher", "kid_teacher", "vendi", "paired_error"}
    assert benchmark.describe()["image_size"] == 16
    assert "random" in benchmark.describe()["features"]


def test_prompts_without_pictures_still_give_no_forward_states(teacher, tmp_path):
    with pytest.raises(DataError, match=r"`states.forward` must be 0 where there are no images"):
        imageless(teacher, tmp_path).ingredients()


def test_a_report_shows_what_each_model_makes_of_each_prompt(measured, tmp_path):
    _, found = measured
    save_grids(found, tmp_path)
    ((title, (gallery,)),) = prompt_parts(tmp_path, models=["teacher-reference", "teacher-2-steps"])
    assert title == "What models make of prompts"
    assert [card.caption for card in gallery.cards] == list(found.prompts)
    assert [figure.caption for figure in gallery.cards[0].figures] == ["teacher reference", "teacher 2 steps"]
