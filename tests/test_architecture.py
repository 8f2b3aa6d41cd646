"""Pins what imports what, and that the package stays readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddil_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_torch_core_imports_without_ray():
    script = "import ddil_ray, ddil_ray.objectives, ddil_ray.training.inline, sys; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_help_is_printed_without_torch_or_ray():
    script = "import ddil_ray.cli, sys; assert not {'ray', 'torch', 'mlflow', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_an_actor_starts_without_model_libraries():
    """They cost each of a run's processes seconds, and a factory's network needs none of them."""
    heavy = "{'diffusers', 'transformers', 'peft', 'mlflow'}"
    script = f"import ddil_ray.runtime.stages, ddil_ray.runtime.worker, sys; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
