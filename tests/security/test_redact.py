"""Pins what counts as a secret, and that none leaves with a config, a message, a log or what a terminal shows."""

from __future__ import annotations

import io
import logging
import time

import fsspec
import pytest
import yaml
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from runs import small_run

from ddil_ray.config import config_hash, flatten, load_config, to_yaml
from ddil_ray.config.restored import check_complete
from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.redact import HIDDEN, is_redacted, redact, redacted
from ddil_ray.runtime.resume import changes, resumed_config
from ddil_ray.tracking import TRACKERS, RunInfo, View
from ddil_ray.tracking.background import BackgroundTracker

REFUSED = "ftp://me:hunter2@host"  # pragma: allowlist secret
OTHER = "memory://KEY:hunter2@other/images"  # pragma: allowlist secret
URI = "postgresql://me:hunter2@db.example:5432/mlflow"  # pragma: allowlist secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URI, "postgresql://***@db.example:5432/mlflow"),
        ("https://token@host/x", "https://***@host/x"),
        ("s3://KEY:sec/ret@bucket/p", "s3://***@bucket/p"),
        ("https://me:p@ss@host/x", "https://***@host/x"),
        ("from https://a:b@h/x to https://c:d@e", "from https://***@h/x to https://***@e"),
        ("https://blob/x?sv=1&sig=abc%3D&se=2", "https://blob/x?sv=1&sig=***&se=2"),
        ("https://s3/x?X-Amz-Security-Token=abc&y=1", "https://s3/x?X-Amz-Security-Token=***&y=1"),
        ("override 'tracking.token=abc'", "override 'tracking.token=***'"),
        (
            "{'aws_secret_access_key': 'ab cd', 'x': 1}",  # pragma: allowlist secret
            "{'aws_secret_access_key': ***, 'x': 1}",
        ),
        ("password: hunter2", "password: ***"),
        ("Authorization: Bearer 0123456789abcdef", "Authorization: Bearer ***"),
    ],
)
def test_secrets_are_taken_out(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c",
        "http://host:8080/a@b?x=1",
        "http://[::1]:80/a@b",
        "sqlite:////runs/a@b/mlflow.db",
        "`data.prompt_cache_mib` must be at least 1, but is 0 instead.",
        "An override must be `dotted.key=value`, but is 'x' instead.",
        "unknown key; did you mean 'seed'? allowed: name, seed",
        "me@example.org wrote tokens: 5, tokenizer: bytes and design=5",
        "set RAY_AUTH_MODE=token and start again",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


SAFE = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$", min_size=12, max_size=30)


@given(user=SAFE, password=SAFE, around=st.text(max_size=40))
def test_no_password_of_a_url_is_left_whatever_is_around_it(user, password, around):
    shown = redact(f"{around} postgresql://{user}:{password}@host/x {around}")
    assert password not in shown.replace(around, "")
    assert "@host/x" in shown


def test_long_texts_take_no_time():
    started = time.perf_counter()
    for text in ("x://" * 50_000, "://" + "a:" * 50_000, "token='" * 20_000, "token" + " " * 100_000, "A" * 300_000):
        redact(text)
    assert time.perf_counter() - started < 10


def test_values_behind_secret_names_are_hidden_in_trees():
    tree = {"api_key": "x", "auth": {"token": ["a", "b"], "n": 3}, "keep": "y", "monkey": "z", "password": ""}
    assert redacted(tree) == {
        "api_key": HIDDEN, "auth": {"token": [HIDDEN, HIDDEN], "n": 3}, "keep": "y", "monkey": "z", "password": "",
    }  # fmt: skip


def test_no_setting_is_hidden_for_its_name():
    config = small_run()
    assert redacted(config.model_dump(mode="json")) == config.model_dump(mode="json")


@pytest.fixture
def secret_run(tmp_path):
    return small_run(
        output=str(tmp_path),
        tracking={"tracker": "mlflow", "uri": URI},
        data={"source": "memory://KEY:hunter2@bucket/images"},  # pragma: allowlist secret
        evaluation={"clip": "https://me:hunter2@host/clip"},  # pragma: allowlist secret
    )


def test_no_secret_is_in_what_is_kept_or_tracked_of_a_config(secret_run):
    assert "hunter2" not in to_yaml(secret_run)
    assert "hunter2" not in repr(flatten(secret_run))
    assert flatten(secret_run)["tracking.uri"] == "postgresql://***@db.example:5432/mlflow"


def test_a_rotated_password_leaves_the_hash(secret_run):
    tracking = secret_run.tracking.model_copy(update={"uri": URI.replace("hunter2", "hunter3")})
    assert config_hash(secret_run.model_copy(update={"tracking": tracking})) == config_hash(secret_run)
    tracking = secret_run.tracking.model_copy(update={"uri": URI.replace("5432", "5433")})
    assert config_hash(secret_run.model_copy(update={"tracking": tracking})) != config_hash(secret_run)


def test_going_on_asks_for_secrets_again(secret_run, tmp_path):
    folder = tmp_path / secret_run.name
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(secret_run))
    with pytest.raises(ConfigError, match=r"`data.source`, .*`tracking.uri`.* must be given again.*run folder"):
        resumed_config(str(folder), [])
    again = [f"tracking.uri={URI}", f"data.source={secret_run.data.source}", "evaluation.clip=null"]
    config = resumed_config(str(folder), again)
    assert (config.tracking.uri, config.data.source) == (URI, secret_run.data.source)
    check_complete(config)
    with pytest.raises(ConfigError, match=r"`data.source` of a resumed run must stay"):
        resumed_config(str(folder), [*again, f"data.source={OTHER}"])


def test_settings_are_the_same_whatever_their_secrets(secret_run):
    data = secret_run.data.model_copy(update={"source": "memory://KEY:hunter3@bucket/images"})
    assert not changes(secret_run, secret_run.model_copy(update={"data": data}))
    assert changes(secret_run, secret_run.model_copy(update={"seed": 7})) == {"seed": (secret_run.seed, 7)}


def test_messages_have_no_secret_in_them(tmp_path):
    broken = {
        "tracking": {"uri": URI, "password": "hunter2"},  # pragma: allowlist secret
        "name": "https://me:hunter2@host",  # pragma: allowlist secret
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "a.yaml"), ["tracking.token=hunter2", f"data.source={REFUSED}"])
    assert "tracking.password" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in first_line(ValueError(f"could not connect to {URI}"))


def test_a_command_prints_no_secret(secret_run, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(secret_run.model_dump(mode="json")))
    code, out, err = run(capsys, "distill", tmp_path / "a.yaml", "--dry-run")
    assert code == 2  # no such bucket
    assert "hunter2" not in out + err
    console = Console(file=io.StringIO(), width=200)
    View(console).say(f"Tracking in {URI}")
    assert console.file.getvalue() == "Tracking in postgresql://***@db.example:5432/mlflow\n"


def test_a_failing_tracker_logs_no_secret(tmp_path, caplog):
    class Failing(type(TRACKERS["none"]())):
        def open(self, run, state):
            raise OSError(f"cannot reach {URI}")

    tracker = BackgroundTracker(
        Failing(), RunInfo("x", {}, {}), journal=tmp_path / "m.jsonl", state=tmp_path / "s.json", timeout_s=1
    )
    with caplog.at_level(logging.WARNING):
        tracker.start()
        tracker.finish("failed")
    assert "cannot reach postgresql://***@db.example:5432/mlflow" in caplog.text
    assert "hunter2" not in caplog.text


def test_data_is_called_after_its_source_without_credentials():
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "PNG")
    source = "memory://KEY:hunter2@bucket/images"  # pragma: allowlist secret
    fs, root = fsspec.core.url_to_fs(source)
    fs.pipe_file(f"{root}/0.png", content.getvalue())
    assert load_images(source).name == "memory://***@bucket/images"
    assert is_redacted(load_images(source).name)
