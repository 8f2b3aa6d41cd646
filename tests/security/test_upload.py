"""Pins what a job's working directory uploads, by Ray's own packaging."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from started import checkout

ROOT = Path(__file__).parents[2]
MOST = 1_000_000
"""Bytes of the upload of this repository, with its code or without."""
SECRETS = [
    ".env", ".env.production", "deploy/.env", "id_rsa", "keys/id_ed25519.pub", "server.pem", "tls/private.key",
    ".netrc", ".aws/credentials", ".ssh/config", "gcp-service-account.json", "credentials.json", "secrets.yaml",
    ".ray/auth_token", ".huggingface/token", "ddil_ray/.env", "ddil_ray/server.pem",
]  # fmt: skip
HEAVY = [
    ".venv/lib/big.py", "runs/a/checkpoints/x", "mlruns/0/meta.yaml", "mlflow.db", "model.safetensors",
    "data/a.parquet", "w.ckpt", "images.tar", "backup.tar.gz", "ablations/x/report.html", ".git/config",
    "tests/test_x.py", "ddil_ray/__init__.py",
]  # fmt: skip
KEPT = ["pipelines/distill.py", "mine.yaml", "my_teacher.py"]

spec = importlib.util.spec_from_file_location("check_upload", ROOT / "cluster" / "check_upload.py")
check_upload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_upload)


def uploaded(folder, tmp_path):
    """Names in the package that Ray makes of `folder`."""
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=True)
    with zipfile.ZipFile(package) as file:
        return set(file.namelist())


def filled(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


def test_secrets_and_heavy_files_stay_and_the_rest_goes(tmp_path):
    folder = filled(tmp_path / "job", [*SECRETS, *HEAVY, *KEPT])
    shutil.copy(ROOT / ".rayignore", folder)
    names = uploaded(folder, tmp_path)
    assert names == {*KEPT, ".rayignore"} | {name for name in names if name.endswith("/")}  # and folders left empty
    assert list(check_upload.problems(folder)) == []


def test_without_the_list_the_check_names_every_secret(tmp_path):
    folder = filled(tmp_path / "job", [*SECRETS, *KEPT])
    found = list(check_upload.problems(folder))
    assert {line.partition(" looks like a secret")[0] for line in found} == set(SECRETS)
    names = uploaded(folder, tmp_path)
    assert names == {*SECRETS, *KEPT}  # as Ray has it by default


def test_private_keys_large_files_and_links_out_are_named(tmp_path):
    folder = filled(tmp_path / "job", ["notes.txt", "fine.txt"])
    (folder / "notes.txt").write_text("-----BEGIN OPENSSH " + "PRIVATE KEY-----\nx\n")
    with (folder / "video.mov").open("wb") as file:
        file.truncate(check_upload.LARGE + 1)
    (tmp_path / "outside.txt").write_text("x")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    assert sorted(check_upload.problems(folder)) == [
        "link.txt is reached by a link that leaves the folder",
        "notes.txt holds a private key",
        "video.mov has 10 MiB",
    ]


def test_what_does_not_leave_with_a_job_is_not_sent_to_nodes_or_committed_either(tmp_path):
    """Launchers take .gitignore as the list of what stays, by rsync."""
    names = (".rayignore", ".gitignore")
    uploads, commits = [(ROOT / name).read_text().partition("# secrets")[2].splitlines()[1:] for name in names]
    assert uploads == commits
    assert len(uploads) > 30
    folder = filled(tmp_path / "clone", [*SECRETS, *KEPT])
    shutil.copy(ROOT / ".gitignore", folder)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    listed = ["git", "ls-files", "--others", "--exclude-standard"]
    left = subprocess.run(listed, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    assert set(left) == {*KEPT, ".gitignore"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("clone"))


def packed(clone, package, *options):
    """Names in the archive that `cluster/submit.sh` hands to Ray, which is written to `package`."""
    command = [sys.executable, clone / "cluster" / "check_upload.py", ".", "--pack", package, *options]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(package) as file:
        return set(file.namelist())


def test_this_repository_uploads_no_more_than_it_must(clone, tmp_path):
    names = packed(clone, tmp_path / "job.zip")
    assert (tmp_path / "job.zip").stat().st_size < MOST / 4
    assert {name.partition("/")[0] for name in names} >= {"pipelines", "cluster"}
    assert not {name for name in names if name.startswith(("ddil_ray/", "tests/", "docs/", "benchmarks/"))}
    assert names == {name for name in uploaded(clone, tmp_path) if not name.endswith("/")}


def test_with_its_code_it_uploads_less_than_a_megabyte_and_all_of_the_code(clone, tmp_path):
    names = packed(clone, tmp_path / "job.zip", "--module", clone / "ddil_ray")
    assert (tmp_path / "job.zip").stat().st_size < MOST
    code = {str(path.relative_to(clone)) for path in (clone / "ddil_ray").rglob("*") if path.is_file()}
    left = code - names
    assert {Path(name).suffix for name in left} == {".safetensors", ".parquet"}
    assert len(left) == 3
    assert "pipelines/distill.py" in names


def test_a_secret_in_the_module_stays_too(clone, tmp_path):
    filled(tmp_path / "ddil_ray", [".env"])
    command = [sys.executable, ROOT / "cluster" / "check_upload.py", clone, "--module", tmp_path / "ddil_ray"]
    done = subprocess.run([*command, "--pack", tmp_path / "job.zip"], capture_output=True, text=True)
    assert done.returncode == 1
    assert ".env looks like a secret by its name" in done.stderr
    assert not (tmp_path / "job.zip").exists()


@pytest.mark.parametrize("secret", [True, False])
def test_the_command_says_what_should_stay(tmp_path, secret):
    folder = filled(tmp_path / "job", [".env"] if secret else ["a.yaml"])
    command = [sys.executable, ROOT / "cluster" / "check_upload.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == int(secret)
    assert (".env looks like a secret by its name" in done.stderr) == secret
