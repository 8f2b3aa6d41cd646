"""Pins the documentation to the commands and settings that there are."""

from __future__ import annotations

import pytest
import yaml
from commandlines import PROGRAMS, parsed
from pages import ROOT, blocks, commands, pages

from ddil_ray.ablation.grid import grid_runs
from ddil_ray.config import (
    AblationConfig,
    ChainConfig,
    ConfigTree,
    RunConfig,
    load_config,
    load_teacher_config,
    preset_names,
)
from ddil_ray.config.prepare import PrepareConfig

CLI = PROGRAMS["ddil-ray"]
COMMANDS = [command for page in pages() for command in commands(page)]
KINDS = {
    "distill": RunConfig,
    "plan": RunConfig,
    "evaluate": RunConfig,
    "prepare": PrepareConfig,
    "chain": ChainConfig,
}


@pytest.fixture
def beside(request, tmp_path, monkeypatch):
    """A command, in a folder with the files that its page tells a reader to write."""
    for block in blocks(ROOT / request.param.page):
        if block.language == "yaml" and block.name:
            (tmp_path / block.name).write_text(block.text)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    return request.param


def _options(name):
    return {option for parameter in CLI.commands[name].params for option in parameter.opts}


def test_pages_have_commands():
    assert len([c for c in COMMANDS if c.whole]) > 40
    named = {command.arguments[0] for command in COMMANDS if command.whole}
    assert named >= {*KINDS, "ablate", "compare", "export", "sample", "scale", "train-teacher"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.whole], ids=str)
def test_a_command_in_a_sentence_has_that_name_and_those_options(command):
    name, *rest = command.arguments
    assert name in CLI.commands
    given = {word.strip("[]").partition("=")[0] for word in rest if word.lstrip("[").startswith("-")}
    assert given <= {"--help", *_options(name)}


@pytest.mark.parametrize("beside", [c for c in COMMANDS if c.whole], ids=str, indirect=True)
def test_a_command_to_copy_is_one_and_its_settings_are_right(beside):
    context = parsed(["ddil-ray", *beside.arguments])
    name, values = context.command.name, context.params
    config = values.get("config")
    if config is None or values.get("resume"):
        return
    if config.endswith(".yaml") and not beside.page.startswith(("docs/", "README")):
        return  # files of whoever reads
    overrides = values.get("overrides") or []
    if name == "ablate":
        assert grid_runs(load_config(config, overrides, kind=AblationConfig))
    elif name == "train-teacher":
        load_teacher_config(config, overrides)
    else:
        load_config(config, overrides, kind=KINDS[name])


FRAGMENTS = [
    pytest.param(block.text, id=f"{page.relative_to(ROOT)}: {block.text.splitlines()[0]}")
    for page in pages()
    for block in blocks(page)
    if block.language == "yaml" and block.name is None
]


@pytest.mark.parametrize("text", FRAGMENTS)
def test_settings_on_a_page_are_settings(text):
    """Laid over a preset, as a reader would."""
    ConfigTree.read("digits-pd").merge(yaml.safe_load(text), "page").validate(RunConfig)


def test_the_commands_page_names_every_command_and_every_preset():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    assert {name for name in CLI.commands if f"`ddil-ray {name}" not in page} == set()
    alone = [name for name in preset_names() if "/" not in name]
    assert [name for name in alone if f"`{name}`" not in page] == []
    for name in preset_names():
        if "/" in name:
            folder, _, kind = name.partition("/")
            assert f"`{name}`" in page or (f"`{folder}`" in page and f"`/{kind}`" in page)
