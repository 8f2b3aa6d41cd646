"""Pins what model cards say, and what they must not say."""

from __future__ import annotations

import pytest
from hub import local_hub
from huggingface_hub import ModelCard
from runs import PD, small_run

from ddil_ray.card import License, add_section, base_of, write_card
from ddil_ray.results import add_scores, export_students
from ddil_ray.training.recipe import Recipe


@pytest.mark.parametrize(
    ("spec", "name", "hub_id"),
    [
        ("builtin:digits", "builtin:digits", None),
        ("my.module:teacher", "my.module:teacher", None),
        ("https://me:secret@host/models/teacher/?signature=secret", "teacher", None),  # pragma: allowlist secret
        ("s3://bucket", "bucket", None),
        ("{here}/sd", "sd", None),
    ],
)
def test_a_teacher_is_named_without_its_place(tmp_path, spec, name, hub_id):
    (tmp_path / "sd").mkdir()
    base = base_of(spec.format(here=tmp_path), None)
    assert (base.name, base.hub_id) == (name, hub_id)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", License("mit")),
        (
            "license: other\nlicense_name: rail\nlicense_link: https://example.org/rail",
            License("other", "rail", "https://example.org/rail"),
        ),
        ("license: other\nlicense_name: rail\nlicense_link: LICENSE.md", License("other", "rail")),
        ("tags: [a]", License("unknown")),
        ("license: [", License("unknown")),
        ("license: [mit, apache-2.0]", License("unknown")),
        ("license: 2024-01-01", License("unknown")),
        ("license: other\nlicense_name: 1.0\nlicense_link: 5", License("other")),
        ("license: other\nlicense_name: <script>\nlicense_link: 'a](b'", License("other")),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlicense: other\nlicense_name: [*b, *b]", License("other")),
    ],
)
def test_the_licence_of_the_teacher_is_carried_over(tmp_path, metadata, expected):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nA teacher.")
    assert base_of(str(tmp_path), tmp_path).license == expected
    assert base_of(str(tmp_path), tmp_path, license="apache-2.0").license == License("apache-2.0")
    write_card(
        tmp_path, title="t", description="d", usage="u", library="diffusers", base=base_of(str(tmp_path), tmp_path)
    )
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name, data.license_link) == (expected.id, expected.name, expected.link)


def test_the_licence_of_a_teacher_of_the_hub_is_looked_up_there(monkeypatch, tmp_path):
    with local_hub(monkeypatch) as hub:
        hub.cards["owner/sd"] = {"license": "other", "license_name": "rail", "license_link": "LICENSE.md"}
        base = base_of("owner/sd", tmp_path)
        assert base.license == License("other", "rail", "https://huggingface.co/owner/sd/blob/main/LICENSE.md")
        assert base_of("owner/else", tmp_path).license == License("unknown")
    write_card(tmp_path, title="t", description="d", usage="u", library="diffusers", base=base)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "owner/sd"


def test_a_section_is_added_once(tmp_path):
    write_card(tmp_path, title="t", description="d", usage="u", library="diffusers", facts={"a": "b"})
    for text in ("first", "second"):
        add_section(tmp_path, "Scores", text)
        add_section(tmp_path, "More", text)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Scores\n\nsecond") == 1
    assert card.count("## More\n\nsecond") == 1
    assert "first" not in card
    assert "- a: b" in card


def test_the_card_of_a_student_says_how_it_was_made_and_what_was_measured(tmp_path):
    """For a run of two rounds, whose cards differ."""
    recipe = Recipe(small_run(objective=PD, teacher={"guidance": 1.5}, student={"license": "mit"}))
    made = recipe.ingredients()
    rounds = {n: recipe.student_of(made.teacher) for n in (4, 2)}
    export_students(recipe, made, rounds, tmp_path)
    scores = {model: {n: {"coverage": n / 8} for n in (4, 2)} for model in ("student", "teacher")}
    about = {"num_samples": 64, "features": "64 features of a classifier of digits", "k": 5}
    add_scores(recipe, made, rounds, scores, about, tmp_path)
    last, first = ((tmp_path / f / "README.md").read_text() for f in ("student", "rounds/4-steps"))
    for expected in (
        "license: mit",
        "- teacher: ddil_ray.testing:tiny_model",
        "- method: Progressive distillation (`pd`)",
        "- states, by prior: forward 0.5, student 0.5",
        "- training data: digits",
        "- trained for: 2 sampling steps; 20 updates of 16 states in each round",
        "- guidance: w = 1.5, which is guidance_scale 2.5; w = 1.5 (guidance_scale 2.5) is in the weights",
        "| student | 2 | 0.25 |",
        "| teacher | 2 | 0.25 |",
    ):
        assert expected in last
    assert "| student | 4" not in last
    assert "- trained for: 4 sampling steps" in first
    assert "| student | 4 | 0.5 |" in first
