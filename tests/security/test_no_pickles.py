"""Pins that nothing from outside can become code: no pickles, no unsafe YAML, no remote code, nothing unpacked."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_pipeline

from ddil_ray.errors import ConfigError
from ddil_ray.models import find_pipeline, load_model
from ddil_ray.models.latents import load_codec, variant_of

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("ddil_ray", "cluster", "pipelines") for path in (ROOT / folder).rglob("*.py"))

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
UNPACKING = {"extract", "extractall", "unpack_archive"}
REMOTE = {"trust_remote_code", "custom_pipeline", "allow_pickle"}
ALLOWED = {
    ("ddil_ray/runtime/requests.py", "pickle.loads"),  # messages between the processes of one Ray
    ("ddil_ray/runtime/prepare.py", "pickle.loads"),
}


RULES = {
    "{}": lambda call, given: call in FORBIDDEN,
    "{} without weights_only=True": lambda call, given: call == "torch.load" and given.get("weights_only") != "True",
    "{}, which unpacks an archive": lambda call, given: call.rpartition(".")[2] in UNPACKING,
    "{} with a shell": lambda call, given: given.get("shell") == "True",
    "{} without use_safetensors=True": lambda call, given: (
        call.endswith(("from_pretrained", "from_single_file"))
        and "Tokenizer" not in call
        and given.get("use_safetensors") != "True"
    ),
    "{} of remote code or pickles": lambda call, given: any(given.get(name, "False") != "False" for name in REMOTE),
    "{} without trust_remote_code=False": lambda call, given: (
        bool(re.search(r"\bAuto\w+\.from_pretrained$", call)) and given.get("trust_remote_code") != "False"
    ),
}
"""What a call must not be, by what is said of it; from its name, and its keyword arguments as they are written."""


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every call that could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield from ((node.lineno, said.format(call)) for said, broken in RULES.items() if broken(call, given))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
    name = path.relative_to(ROOT).as_posix()
    found = [(line, call) for line, call in faults(ast.parse(path.read_text())) if (name, call) not in ALLOWED]
    assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(b)",
        "yaml.load(t, yaml.Loader)",
        "eval(t)",
        "tar.extractall(folder)",
        "subprocess.run(t, shell=True)",
        "UNet2DModel.from_pretrained(f)",
        "DiffusionPipeline.from_pretrained(f, use_safetensors=True, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(f)",
        "AutoModel.from_pretrained(f, use_safetensors=True)",
        "DiffusionPipeline.download(f, custom_pipeline=x)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_rule_above_sees_what_it_is_to_see(line):
    assert list(faults(ast.parse(line)))


@pytest.mark.parametrize("line", ["network.eval()", "yaml.safe_load(t)", "torch.load(f, weights_only=True)"])
def test_the_rule_above_leaves_the_rest_alone(line):
    assert not list(faults(ast.parse(line)))


def test_what_is_allowed_is_still_there():
    """An exception that nothing needs is a hole."""
    calls = {(name, call) for name, _ in ALLOWED for _, call in faults(ast.parse((ROOT / name).read_text()))}
    assert calls >= ALLOWED


class Evil:
    """A pickle of it leaves a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


PARTS = {
    "unet": lambda folder: load_model(str(folder)),
    "vae": load_codec,
    "text_encoder": lambda folder: find_pipeline(str(folder))[0].text_encoder(folder, "cpu"),
}


@pytest.mark.parametrize("part", PARTS)
def test_pickled_weights_are_refused_and_never_run(tmp_path, part):
    folder, mark = save_pipeline("stable_diffusion", tmp_path), tmp_path / "it-ran"
    (weights,) = (folder / part).glob("*.safetensors")
    torch.save({"weight": Evil(mark)}, weights.with_suffix(".bin"))
    weights.unlink()
    assert variant_of(folder / part) is None
    with pytest.raises(ConfigError, match=r"`teacher.model` must be"):
        PARTS[part](folder)
    assert not mark.exists()


def test_the_pickle_of_that_test_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("library", ["os", "others_code", "diffusers.others", "../code"])
def test_a_pipeline_whose_parts_are_others_code_is_refused(tmp_path, library):
    folder = save_pipeline("stable_diffusion", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": [library, "Scheduler"]}))
    with pytest.raises(ConfigError, match=r"`teacher.model` must be made of parts of diffusers and transformers"):
        load_model(str(folder))


CODE = "raise SystemExit('it ran')"


def _index(folder, **parts):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **parts}))


def _settings(path, **settings):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **settings}))


SMUGGLED = {
    "a module beside the part's settings": (
        lambda folder: (folder / "scheduler" / "diffusers.py").write_text(CODE),
        "holds scheduler/diffusers.py",
    ),
    "a module below it": (
        lambda folder: [(folder / "vae" / "unet").mkdir(), (folder / "vae" / "unet" / "mine.py").write_text(CODE)],
        "holds vae/unet/mine.py",
    ),
    "a text in the place of a part": (lambda folder: _index(folder, scheduler="aX"), "names 'aX' as its scheduler"),
    "a pipeline as a part": (
        lambda folder: _index(folder, scheduler=["diffusers", "DiffusionPipeline"]),
        "holds another pipeline, DiffusionPipeline",
    ),
    "a pipeline in the folder of a part": (
        lambda folder: _settings(folder / "vae" / "model_index.json", unet=["mine", "Net"]),
        "holds vae/model_index.json",
    ),
    "code that transformers would ask for": (
        lambda folder: _settings(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "mine.Net"}),
        r"names code of its own \(auto_map\) in text_encoder/config.json",
    ),
    "pickles behind an index": (
        lambda folder: _settings(
            folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", weight_map={"w": "w.bin"}
        ),
        "names the weights w.bin in unet/",
    ),
    "pickles behind an index of a variant": (
        lambda folder: _settings(
            folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json", weight_map={"w": "w.bin"}
        ),
        "names the weights w.bin in unet/",
    ),
    "a part above the folder": (
        lambda folder: _index(folder, **{"..": ["diffusers", "UNet2DModel"]}),
        r"a part '\.\.'",
    ),
    "a part without a name": (lambda folder: _index(folder, **{"": ["diffusers", "UNet2DModel"]}), "names a part ''"),
    "weights elsewhere behind an index": (
        lambda folder: _settings(
            folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", weight_map={"w": "../../w.safetensors"}
        ),
        "names the weights ../../w.safetensors in unet/",
    ),
}


@pytest.mark.parametrize("what", SMUGGLED)
def test_a_pipeline_folder_that_holds_code_is_refused_before_anything_loads_it(tmp_path, what):
    folder = save_pipeline("stable_diffusion", tmp_path)
    assert load_model(str(folder)).latent
    smuggle, said = SMUGGLED[what]
    smuggle(folder)
    for load in (load_model, find_pipeline):
        with pytest.raises(ConfigError, match=rf"`teacher.model` must be made of parts of .*{said}"):
            load(str(folder))


def test_an_index_of_pickles_that_nobody_loads_is_no_fault(tmp_path):
    """As in folders that were saved in both forms."""
    folder = save_pipeline("stable_diffusion", tmp_path)
    _settings(folder / "text_encoder" / "pytorch_model.bin.index.json", weight_map={"w": "pytorch_model-00001.bin"})
    assert load_model(str(folder)).latent


@pytest.mark.parametrize("name", ["DiffusionPipeline", "Nothing", None, ["AutoencoderKL"]])
def test_an_autoencoder_is_a_network_of_diffusers(tmp_path, name):
    folder = save_pipeline("stable_diffusion", tmp_path)
    _settings(folder / "vae" / "config.json", _class_name=name)
    with pytest.raises(ConfigError, match="is no network of diffusers"):
        load_codec(folder)


def test_a_part_of_diffusers_own_pipelines_is_taken(tmp_path):
    folder = save_pipeline("stable_diffusion", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps({**index, **checker}))
    assert load_model(str(folder)).latent
