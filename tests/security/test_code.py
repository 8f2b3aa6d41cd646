"""Pins that code which a config names is run only where whoever starts the command allows it."""

from __future__ import annotations

import sys

import pytest
import yaml
from commands import run
from runs import small_run

from ddil_ray.config import RunConfig
from ddil_ray.data import ImageData, load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.features import load_features
from ddil_ray.factory import ALLOW_CODE, allow_code, call_factory, code_allowed
from ddil_ray.models import load_model
from ddil_ray.runtime.context import RunContext

MODULE = """
import pathlib
pathlib.Path({mark!r}).touch()

def teacher():
    from ddil_ray.testing import tiny_model
    return tiny_model()

def nothing():
    return None
"""


@pytest.fixture
def others_module(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported, and the file."""
    mark = tmp_path / "it-ran"
    (tmp_path / "others_code.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("others_code", None)


@pytest.fixture
def not_allowed(monkeypatch):
    """Whatever a test allows is taken back after it."""
    monkeypatch.setenv(ALLOW_CODE, "0")


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("teacher.model", lambda: load_model("others_code:teacher")),
        ("data.source", lambda: load_images("others_code:teacher")),
        ("data.source", lambda: load_images("others_code:teacher", format="factory")),
        ("evaluation.features", lambda: load_features("others_code:teacher", load_images("digits"))),
    ],
)
def test_a_factory_is_not_even_imported_unless_code_is_allowed(others_module, not_allowed, field, call):
    with pytest.raises(ConfigError, match=f"`{field}` must name no code.*others_code:teacher.*--allow-code"):
        call()
    assert not others_module.exists()
    assert "others_code" not in sys.modules


def test_a_factory_is_called_once_code_is_allowed(others_module, not_allowed):
    assert not code_allowed()
    allow_code()
    assert load_model("others_code:teacher").sample_shape == (1, 8, 8)
    assert others_module.exists()


def test_this_packages_own_factories_need_no_permission(not_allowed):
    assert load_model("ddil_ray.testing:tiny_model").sample_shape == (1, 8, 8)
    assert isinstance(load_images("ddil_ray.simulation:sd15_latents"), ImageData)


@pytest.mark.parametrize("spec", ["ddil_ray.cli:main", "ddil_ray.testing.x:y", "ddil_ray.simulation_of_others:x"])
def test_not_all_of_this_package_is_a_factory(not_allowed, spec):
    with pytest.raises(ConfigError, match="must name no code"):
        call_factory(spec, field="teacher.model")


def test_no_config_can_allow_code():
    assert not [name for name in _names(RunConfig.model_json_schema()) if "allow" in name or "trust" in name]


def _names(node):
    if isinstance(node, dict):
        for name, inner in node.items():
            yield name
            yield from _names(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _names(inner)


def test_actors_of_a_run_may_what_its_driver_may(others_module, not_allowed):
    config = small_run(teacher={"model": "others_code:teacher"}).model_dump(mode="json")
    told, untold = (RunContext(config, None, None, None, None, 0, code_allowed=code) for code in (True, False))
    with pytest.raises(ConfigError, match="must name no code"):
        untold.recipe.load_teacher()
    assert told.recipe.load_teacher().sample_shape == (1, 8, 8)


def test_the_flag_of_a_command_allows_it(others_module, not_allowed, tmp_path, capsys):
    config = small_run(teacher={"model": "others_code:teacher"}, output=str(tmp_path / "runs"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code, _, said = run(capsys, "distill", tmp_path / "run.yaml", "--dry-run")
    assert code == 2
    assert "--allow-code" in said
    assert not others_module.exists()
    assert run(capsys, "distill", tmp_path / "run.yaml", "--dry-run", "--allow-code")[0] == 0
    assert others_module.exists()
