"""Pins the shell of cluster/: sound by shellcheck, and a token that is made once and for its owner alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "cluster"
BIN = Path(sys.executable).parent
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))


def bash(script, home, **environment):
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home), **environment}
    source = f"set -euo pipefail; . {CLUSTER / 'auth.sh'}; {script}"
    return subprocess.run(["bash", "-c", source], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(path):
    done = subprocess.run([BIN / "shellcheck", "-x", path], cwd=CLUSTER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.name != "auth.sh"], ids=lambda p: p.name)
def test_every_script_turns_authentication_on_before_ray_runs(path):
    """Nothing is shipped that starts or asks a Ray without a token."""
    lines = path.read_text().splitlines()
    sourced = next(i for i, line in enumerate(lines) if line.startswith('. "') and "auth.sh" in line)
    assert not [line for line in lines[:sourced] if not line.startswith("#") and "ray" in line.split()]
    assert "disabled" not in path.read_text()


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: bash("make_token; need_token; cat $RAY_AUTH_TOKEN_PATH", tmp_path), range(4)))
    assert {d.returncode for d in done} == {0}, done[0].stderr
    (token,) = {d.stdout for d in done}
    assert len(token) == 64
    assert set(token) <= set("0123456789abcdef")
    assert [p.name for p in (tmp_path / ".ray").iterdir()] == ["auth_token"]
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / ".ray").stat().st_mode) == 0o700


def test_a_token_that_others_could_read_is_closed(tmp_path):
    """Ray itself writes its default one readable for all."""
    (tmp_path / "token").write_text("a" * 64)
    (tmp_path / "token").chmod(0o644)
    assert bash("need_token", tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")).returncode == 0
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_no_token_is_one_message(tmp_path):
    done = bash("need_token", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: the token must be in RAY_AUTH_TOKEN or in ")


def test_a_token_in_the_environment_needs_no_file(tmp_path):
    assert bash("make_token; need_token", tmp_path, RAY_AUTH_TOKEN="a" * 64).returncode == 0
    assert not (tmp_path / ".ray").exists()
