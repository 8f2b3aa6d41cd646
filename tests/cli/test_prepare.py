"""Pins `ddil-ray prepare`: what a dry run says and leaves alone, and what a user's mistake looks like."""

from __future__ import annotations

import json

import pytest
from preparing import settings, write_folder
from tiny import save_pipeline

from ddil_ray.cli import main
from ddil_ray.config import to_yaml


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    teacher = save_pipeline("stable_diffusion", folder)
    write_folder(folder / "source", ["a cat", "a dog"])
    path = folder / "prepare.yaml"
    path.write_text(to_yaml(settings(teacher, folder / "source", folder / "out")))
    return path


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *map(str, arguments)])
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err


def test_a_dry_run_prints_the_plan_and_starts_nothing(capsys, config):
    overrides = ["buckets=aspect", "bucket_step=8", "encode_images.num_actors=3"]
    code, out, _ = _run(capsys, config, *overrides, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["teacher"]["family"] == "stable_diffusion"
    assert (plan["source"]["format"], plan["source"]["condition"]) == ("folder with metadata.jsonl", "text")
    assert plan["buckets"] == {"16x16": [4, 8, 8]}
    assert [(actor["role"], actor["count"]) for actor in plan["actors"]] == [
        ("encode_prompts", 1),
        ("encode_images", 3),
    ]
    code, out, _ = _run(capsys, config, "--dry-run")
    assert code == 0
    assert "bucket    16x16, latents of shape (4, 8, 8)" in out
    assert out.endswith("Nothing was started.\n")
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("bucket=square", "`bucket` is not a setting. Did you mean `buckets`?"),
        ("data.source=/nowhere", "'/nowhere' does not exist or is empty"),
        ("data.caption_column=texts", "`data.caption_column` must be a field of the data, but metadata.jsonl has"),
        ("buckets=[[16,17]]", "multiples of 2"),
        ("buckets=[]", "`buckets` must hold a size"),
        ("teacher.model=builtin:digits", "must be a teacher of latents"),
        ("rows_per_file=0", "`rows_per_file`"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(capsys, config, override, expected):
    code, out, err = _run(capsys, config, override)
    assert code == 2
    assert err.startswith("Error: ")
    assert expected in err
    assert "Traceback" not in out + err
