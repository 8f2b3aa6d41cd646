"""Pins the image: sound by hadolint, pinned, for a user that is not root, and made of few files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import CLUSTER, ROOT
from docker.utils.build import exclude_paths

DOCKERFILE = CLUSTER / "Dockerfile"


def test_the_dockerfile_is_sound():
    done = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_installed_and_what_it_stands_on_have_versions():
    text = DOCKERFILE.read_text()
    (base,) = re.findall(r"^ARG BASE=(.+)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    installs = re.findall(r"(?:uv )?pip install(?:.|\\\n)*?(?=&&|\n[A-Z#\n])", text)
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in command or "--no-deps ." in command for command in installs)


def test_the_image_and_nodes_hold_what_every_command_needs():
    """Transformers and adapters for runs on S3, and Ray Serve for `ddil-ray serve`."""
    (image,) = re.findall(r"--requirement pyproject.toml((?: --extra \w+)+)", DOCKERFILE.read_text())
    (nodes,) = re.findall(r"^install:.*\n.*\.\[(.+)\]", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert image.split()[1::2] == nodes.split(",") == ["s3", "transformers", "lora", "serve"]


def test_it_runs_as_a_user_that_kubernetes_knows_is_not_root():
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["1000:1000"]
    assert "ray:" not in last.partition("COPY")[2].partition("USER")[0]  # the code is root's, and not to be written


def test_only_what_the_image_needs_is_sent_to_be_built(tmp_path):
    """By Docker's own reading of .dockerignore."""
    for name in ["a.env", ".env", ".git/config", "runs/x/y", "tests/test_x.py", "ddil_ray/__pycache__/x.pyc"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = ["constraints.txt", "pyproject.toml", "README.md", "LICENSE", "ddil_ray/a/b.py", "ddil_ray/presets/x.yaml"]
    for name in wanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    sent = {path for path in exclude_paths(str(tmp_path), patterns) if (tmp_path / path).is_file()}
    assert sent - {"Dockerfile", ".dockerignore"} == set(wanted)


def test_all_that_the_dockerfile_copies_is_sent():
    patterns = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in patterns


@pytest.mark.parametrize("program", ["ddil-ray", "ray"])
def test_what_kuberay_and_jobs_call_is_on_the_path(program):
    """`ray` comes with a dependency, `ddil-ray` with this package; KubeRay asks for health by wget."""
    text = DOCKERFILE.read_text()
    assert re.search(r"^ENV PATH=/opt/ddil-ray/bin:\$PATH", text, re.MULTILINE)
    assert (Path(sys.executable).parent / program).exists()
    assert "wget" in text
