"""Pins that commands in cluster/README.md are sound shell and parse: by `ddil-ray`'s and `ray`'s own command lines."""

from __future__ import annotations

import re
import subprocess

import pytest
from clusters import CLUSTER, ROOT
from commandlines import meant, parsed, words_of

from ddil_ray.config import load_config

README = (CLUSTER / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """Each command of all blocks as words: lines joined, comments and assignments before it taken away."""
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            words = words_of(line)
            if words:
                yield words


ALL = [meant(words) for words in commands()]
OURS = [words for words in ALL if words[0] == "ddil-ray"]
RAYS = [words for words in ALL if words[0] == "ray"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_blocks_are_sound_shell(block):
    done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [*OURS, *RAYS], ids=" ".join)
def test_commands_parse(words):
    assert parsed(words).command.name == words[2 if words[1] == "job" else 1]


def test_all_kinds_of_commands_were_found():
    assert len(OURS) >= 5
    assert {words[1] for words in RAYS} == {"start", "up", "down", "dashboard", "job"}


def test_a_mistake_in_a_command_would_be_noticed():
    with pytest.raises(ValueError, match="--resum"):
        parsed(["ddil-ray", "distill", "mine.yaml", "--resum", "x"])
    with pytest.raises(ValueError, match="--adress"):
        parsed(["ray", "job", "submit", "--adress", "x", "--", "true"])


NEW_RUNS = [w for w in OURS if w[1] == "distill" and "--resume" not in w]
(MINE,) = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def mine(tmp_path):
    """The config on the page, as a file."""
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return str(path)


@pytest.mark.parametrize("words", NEW_RUNS, ids=" ".join)
def test_their_configs_and_settings_load(words, mine):
    on_the_head = str(CLUSTER / "kuberay" / "base" / "run.yaml")
    config = {"/etc/ddil-ray/run.yaml": on_the_head, "mine.yaml": mine}.get(words[2], words[2])
    load_config(config, words[3:])


def test_the_config_on_the_page_has_as_many_nodes_as_it_says(mine):
    config = load_config(mine, [])
    assert config.trainer.label_selector == {"pool": "trainer"}
    least, most = (config.student_rollouts.bounds[end] + config.teacher_rollouts.bounds[end] + 1 for end in (0, 1))
    assert f"{least} to {most} nodes of 1" in MINE


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"\b(?:cluster|pipelines)/[\w./-]+", "\n".join(BLOCKS)))
    named |= {f"cluster/{name}" for name in re.findall(r"`((?:vm|slurm|kuberay|base)/[\w./-]+)`", README)}
    assert len(named) > 10
    for name in named:
        path = ROOT / name.replace("cluster/base/", "cluster/kuberay/base/")
        assert path.exists(), name


def test_every_file_of_the_folder_is_on_the_page():
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and path.name != "README.md":
            named = path.name in README or path.parent.name in {"job", "kueue", "base"}
            assert named, path


def test_the_versions_on_the_page_are_those_that_are_held_to():
    import ray

    assert f"| Ray | {ray.__version__} |" in README
    assert re.search(r"BASE=(\S+)", (CLUSTER / "Dockerfile").read_text())[1] in README
    schemas = (ROOT / "tests" / "cluster" / "schemas" / "README.md").read_text()
    assert "KubeRay v1.7.0" in schemas
    assert "| KubeRay | 1.7.0 |" in README
