"""Row of the fault matrix: the user's own factory fails. Without Ray."""

from __future__ import annotations

import re
import sys

import pytest
import yaml
from commands import run
from runs import small_run

from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.features import load_features
from ddil_ray.factory import ALLOW_CODE, call_factory
from ddil_ray.models import load_model

SPELLING = "must name an importable factory without arguments as `module.path:factory`, but '{spec}' failed: "
FAILED = "must name a factory that works, but '{spec}' failed while {stage}: "
IMPORTED, CALLED = "its module was imported", "it was called"
FACTORIES = """
NUMBER = 1

def mistaken():
    return len(NUMBER)

def misses():
    return [].missing

def lacks_a_file():
    return open("/no/such/file")

def says_much():
    raise RuntimeError("the first line\\nand the rest")

def imports():
    import no_such_library

def wants_arguments(size):
    return size

def interrupted():
    raise KeyboardInterrupt

def leaves():
    raise SystemExit(3)

def explains():
    from ddil_ray.errors import ConfigError
    raise ConfigError("`mine` must be set, but is not.")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's, for which code is allowed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(ALLOW_CODE, "1")

    def write(text):
        sys.modules.pop("users_factories", None)
        (tmp_path / "users_factories.py").write_text(text)
        return "users_factories"

    yield write
    sys.modules.pop("users_factories", None)


def told(spec, message, stage=""):
    """Pattern of the whole message but the remedy."""
    return "^" + re.escape(f"`teacher.model` {message.format(spec=spec, stage=stage)}")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def teacher(:\n", r"SyntaxError: .* \(users_factories.py, line 1\)\. Mend"),
        ("\nint('x')\n", r"ValueError: invalid literal .* \(users_factories.py:2 in <module>\)\. Mend"),
        ("open('/no/such')\n", r"FileNotFoundError: .*'/no/such' \(users_factories.py:1 in <module>\)\. Mend"),
        ("import no_such_library\n", r"ModuleNotFoundError: .*no_such_library' \(users_factories.py:1 in <module>\)"),
        ("from json import nothing\n", r"ImportError: cannot import .* \(users_factories.py:1 in <module>\)\. Mend"),
        ("import json\njson.nothing\n", r"AttributeError: .*nothing' \(users_factories.py:2 in <module>\)\. Mend"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_the_place(module, text, what):
    spec = f"{module(text)}:teacher"
    with pytest.raises(ConfigError, match=told(spec, FAILED, IMPORTED) + what):
        load_model(spec)


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("mistaken", r"TypeError: object of type 'int' has no len\(\) \(users_factories.py:5 in mistaken\)\. Mend"),
        ("misses", r"AttributeError: .*'missing' \(users_factories.py:8 in misses\)\. Mend"),
        ("lacks_a_file", r"FileNotFoundError: .*'/no/such/file' \(users_factories.py:11 in lacks_a_file\)\. Mend"),
        ("says_much", r"RuntimeError: the first line \(users_factories.py:14 in says_much\)\. Mend"),
        ("imports", r"ModuleNotFoundError: .*'no_such_library' \(users_factories.py:17 in imports\)\. Mend"),
    ],
)
def test_a_factory_that_raises_is_told_with_the_place(module, factory, what):
    spec = f"{module(FACTORIES)}:{factory}"
    with pytest.raises(ConfigError, match=told(spec, FAILED, CALLED) + what):
        load_model(spec)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("{}:nothing", "module .* has no attribute 'nothing'. Check the spelling"),
        ("{}:NUMBER", "'int' object is not callable. Check the spelling"),
        ("{}:wants_arguments", "wants_arguments.* missing 1 required .* 'size'. Check the spelling"),
        ("{}_:teacher", "No module named 'users_factories_'. Check the spelling"),
        ("{}.deeper.still:teacher", "No module named 'users_factories.deeper'.*. Check the spelling"),
    ],
)
def test_a_name_of_no_factory_is_told_to_be_misspelt(module, name, what):
    spec = name.format(module(FACTORIES))
    with pytest.raises(ConfigError, match=told(spec, SPELLING) + what):
        load_model(spec)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("teacher.model", load_model),
        ("data.source", load_images),
        ("evaluation.features", lambda spec: load_features(spec, load_images("digits"))),
    ],
)
def test_every_setting_that_takes_a_factory_is_named(module, field, call):
    with pytest.raises(ConfigError, match=rf"^`{field}` must name a factory that works, but .*RuntimeError: the first"):
        call(f"{module(FACTORIES)}:says_much")


@pytest.mark.parametrize(("factory", "kind"), [("interrupted", KeyboardInterrupt), ("leaves", SystemExit)])
def test_what_ends_the_process_passes(module, factory, kind):
    with pytest.raises(kind):
        call_factory(f"{module(FACTORIES)}:{factory}", field="teacher.model")


def test_what_a_factory_explains_itself_is_said_as_it_is(module):
    with pytest.raises(ConfigError, match=r"^`mine` must be set, but is not\.$"):
        load_model(f"{module(FACTORIES)}:explains")


def test_a_command_ends_with_one_message_and_exit_code_two(module, tmp_path, capsys):
    config = small_run(teacher={"model": f"{module(FACTORIES)}:says_much"}, output=str(tmp_path / "runs"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code, _, said = run(capsys, "distill", tmp_path / "run.yaml", "--dry-run", "--allow-code")
    assert code == 2
    assert said.startswith("Error: `teacher.model` must name a factory that works, but ")
    assert "Traceback" not in said
