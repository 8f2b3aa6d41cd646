"""Pins what imports what, and that the package stays readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cloudpickle
import pytest
from runs import small_run

from ddil_ray.runtime.admission import Ask, Stream
from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.hub import Publication, laid_out
from ddil_ray.runtime.stages import stream_plan
from ddil_ray.runtime.streams import stream_factory
from ddil_ray.states.batch import Origin
from ddil_ray.training.recipe import Recipe

PACKAGE = Path(__file__).parents[1] / "ddil_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_torch_core_imports_without_ray():
    script = "import ddil_ray, ddil_ray.objectives, ddil_ray.training.inline, sys; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_no_tool_of_development_makes_every_process_of_ray_start_slower():
    """With it, jsonschema, which Ray imports, parses a grammar of URIs: two seconds in each of a dozen processes."""
    assert find_spec("rfc3987_syntax") is None, "a tool brings jsonschema[format]: run it apart, as make sbom"


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


def test_what_the_hub_and_the_streams_processes_are_sent_loads_no_torch():
    """It would cost each of them seconds before the first state is made."""
    recipe = Recipe(small_run())
    context = RunContext(recipe.config.model_dump(mode="json"), None, None, None, None, 0)
    stream = Stream(stream_plan(recipe, Origin.STUDENT, phases=1, start_step=0, max_staleness=20), 1, 1)
    publication = Publication(0, 0, None)
    build = stream_factory(context, recipe, Origin.STUDENT, phases=1)
    sent = cloudpickle.dumps([stream, Ask("student", 0, 0, (0, 0)), publication, laid_out, build])
    script = "import cloudpickle, sys; cloudpickle.load(sys.stdin.buffer); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], input=sent).returncode == 0
