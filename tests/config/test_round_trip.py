"""Pins that a config is what was written: dumped and loaded it is the same, by a file or by overrides too."""

from __future__ import annotations

import pytest
import yaml
from fuzz import BASES, leaves, put, valid
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ddil_ray.config import load_config, to_yaml

COMMANDS = [command for command in BASES if command not in ("plan", "evaluate", "ablate")]
"""Of one command per kind of config, whose every setting has a schema: those of an ablation's axes have none."""


def accepted(kind, tree):
    try:
        return kind.model_validate(tree)
    except ValidationError:
        return None


@st.composite
def changes(draw, command):
    """Valid settings of a command's config, a few at once."""
    kind, base = BASES[command]
    chosen = draw(st.lists(st.sampled_from(leaves(kind, base)), min_size=1, max_size=8, unique_by=lambda leaf: leaf[0]))
    tree, found = base, []
    for path, node in chosen:
        value = draw(valid(node))
        if accepted(kind, put(tree, path, value)):
            tree = put(tree, path, value)
            found.append((path, value))
    assume(found)
    return kind, base, tree, found


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_config_that_is_dumped_loads_as_itself(command, data, tmp_path_factory):
    kind, _, tree, _ = data.draw(changes(command))
    config = kind.model_validate(tree)
    path = tmp_path_factory.mktemp("dump") / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(str(path), kind=kind)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=25)
@given(data=st.data())
def test_an_override_is_an_edit_of_the_file(command, data, tmp_path_factory):
    kind, base, tree, found = data.draw(changes(command))
    folder = tmp_path_factory.mktemp("edit")
    for name, content in (("base", base), ("edited", tree)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    overrides = [f"{'.'.join(path)}={yaml.safe_dump(value, default_flow_style=True)}" for path, value in found]
    edited = load_config(str(folder / "edited.yaml"), kind=kind)
    assert load_config(str(folder / "base.yaml"), overrides, kind=kind) == edited
