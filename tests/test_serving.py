"""Pins serving a student: what may be asked, that an image is its seed's whoever shares its batch, and real HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from commands import run
from diffusers import DiffusionPipeline
from pages import blocks
from PIL import Image
from starlette.requests import Request
from started import free_port, until
from tiny import PROMPTS, save_pipeline

from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.diffusion.solver import fresh_noise, renoise_step
from ddil_ray.diffusion.timegrid import consistency_grid
from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.export import save_model_folder, student_scheduler
from ddil_ray.models import load_model
from ddil_ray.runtime import serving as serving_module
from ddil_ray.serving import Studio

ROOT = Path(__file__).parents[1]


def _student(folder, model):
    """One that draws new noise at every step."""
    times, grid = consistency_grid(50, 4), {"original_inference_steps": 50}
    scheduler = student_scheduler(model, times, grid)
    save_model_folder(folder, model, scheduler=scheduler, name="s", description="d", steps=4, times=times)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A student of classes."""
    return _student(tmp_path_factory.mktemp("digits") / "student", load_model("builtin:digits"))


@pytest.fixture(scope="module", params=["stable_diffusion", "sd3"])
def prompted(request, tmp_path_factory):
    """A student of prompts; that of flow matching has a pipeline that passes its scheduler no generator."""
    folder = tmp_path_factory.mktemp(request.param)
    return _student(folder / "student", load_model(str(save_pipeline(request.param, folder))))


def _pixels(png):
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture).astype(int)


def _assert_same(png, other):
    assert np.abs(_pixels(png) - _pixels(other)).max() <= 1


def _asks(studio, *contents):
    return [studio.read(json.dumps(content).encode()) for content in contents]


def test_noise_of_a_row_is_that_of_its_own_generator():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together, alone = generators(1, 2, 3), generators(2)
    noise, mine = fresh_noise((3, 2, 5, 5), together), fresh_noise((1, 2, 5, 5), alone)
    assert torch.equal(noise[1], mine[0])
    assert torch.equal(mine, torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(2)))
    times = torch.full((3,), 0.5, dtype=torch.float64)
    moved = renoise_step(noise, times, CosineVP(), together)
    assert torch.equal(moved[1], renoise_step(mine, times[:1], CosineVP(), alone)[0])


def test_an_image_of_a_class_does_not_depend_on_who_shares_its_batch(digits):
    studio = Studio(str(digits), steps=4, guidance=None)
    asks = _asks(studio, *({"class_label": n % 10, "seed": n // 2} for n in range(7)))
    together = studio.draw(asks)
    for ask, image in zip(asks, together, strict=True):
        _assert_same(image, studio.draw([ask])[0])
    for ask, image in zip(reversed(asks), studio.draw(asks[::-1]), strict=True):
        _assert_same(image, together[asks.index(ask)])
    assert len({_pixels(image).tobytes() for image in together}) == len(asks)


def test_an_image_is_that_of_the_pipeline_alone_with_its_seed(digits):
    studio = Studio(str(digits), steps=4, guidance=None)
    image = studio.draw(_asks(studio, {"class_label": 1, "seed": 9}, {"class_label": 3, "seed": 5}))[1]
    pipeline = DiffusionPipeline.from_pretrained(digits)
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": [3], "num_inference_steps": 4, "generator": torch.manual_seed(5), "output_type": "np"}
    theirs = (pipeline(batch_size=1, **call).images[0] * 255).round()
    assert np.abs(_pixels(image) - theirs.squeeze()).max() <= 1


def test_an_image_of_a_prompt_does_not_depend_on_who_shares_its_batch(prompted):
    studio = Studio(str(prompted), steps=4, guidance=None)
    asks = _asks(studio, *({"prompt": PROMPTS[n % 2], "seed": n} for n in range(4)))
    together = studio.draw(asks)
    for ask, image in zip(asks, together, strict=True):
        _assert_same(image, studio.draw([ask])[0])
    assert studio.about["asked"] == ["seed", "prompt"]


def test_a_seed_is_drawn_where_none_is_given(digits):
    studio = Studio(str(digits), steps=1, guidance=None)
    first, second = _asks(studio, {"class_label": 0}, {"class_label": 0})
    assert first.seed != second.seed
    assert _asks(studio, {"class_label": 0, "seed": first.seed}) == [first]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "`class_label` must be from 0 to 9, but is missing"),
        (b"{", "A request must be a JSON object, but cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 60_000, "cannot be read as JSON"),
        (b"[1]", "A request must be a JSON object, but is another value"),
        (b'{"class_label": 10}', "`class_label` must be from 0 to 9, but is 10 instead"),
        (b'{"class_label": -1}', "`class_label` must be greater than or equal to 0, but is -1 instead"),
        (b'{"class_label": true}', "`class_label` must be a valid integer, but is true instead"),
        (b'{"class_label": 1, "seed": 1.5}', "`seed` must be a valid integer, but is 1.5 instead"),
        (b'{"class_label": 1, "seed": -1}', "`seed` must be greater than or equal to 0"),
        (b'{"class_label": 1, "sed": 1}', "`sed` is not a setting. Did you mean `seed`?"),
        (b'{"class_label": 1, "prompt": "a"}', "`prompt` must be left out, as this student is not asked by text"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(digits, body, expected):
    studio = Studio(str(digits), steps=1, guidance=None)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        studio.read(body)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "`prompt` must be given, as this student is asked by text"),
        ({"prompt": ""}, "`prompt` must have at least 1 character"),
        ({"prompt": "a" * 5000}, "`prompt` must have at most 4096 characters"),
        ({"prompt": "a\0"}, "`prompt` must be text without control characters"),
        ({"prompt": "\ud800"}, "`prompt` must be"),
        ({"prompt": "a", "class_label": 1}, "`class_label` must be left out, as this student knows no classes"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_told_why(prompted, content, expected):
    studio = Studio(str(prompted), steps=1, guidance=None)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        _asks(studio, content)


@pytest.mark.parametrize(
    ("student", "shown"),
    [
        ("/home/somebody/runs/digits-pd", "digits-pd"),
        ("/home/somebody/runs/digits-pd/student", "digits-pd/student"),
        ("file:///home/somebody/exports/sd15-lcm/", "sd15-lcm"),
        ("s3://bucket/exports/sd15-lcm", "s3://bucket/exports/sd15-lcm"),
        ("s3://me:pass@bucket/exports/sd15-lcm", "s3://***@bucket/exports/sd15-lcm"),  # pragma: allowlist secret
        ("somebody/sd15-lcm", "somebody/sd15-lcm"),
    ],
)
def test_strangers_are_told_what_is_served_but_neither_credentials_nor_where_it_lies(digits, student, shown):
    studio = Studio(str(digits), steps=1, guidance=None)
    studio.student = student
    assert studio.about["student"] == shown


def test_a_student_that_cannot_be_served_is_told_before_anything_starts(capsys, digits, tmp_path):
    for arguments, expected in (
        ([tmp_path], "STUDENT must be a run folder with a student"),
        ([digits, "--steps", 51], "`--steps` must be at most 50 for this consistency student, but is 51"),
        ([digits, "--guidance", 2], "`--guidance` must be 0 for this consistency student"),
        ([digits, "--max-ongoing", 4], "`--max-ongoing` must be at least `--max-batch` (8)"),
    ):
        code, out, err = run(capsys, "serve", *arguments)
        assert code == 2
        assert expected in err
        assert out == ""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run(capsys, "serve", digits, "--port", taken.getsockname()[1])
    assert code == 2
    assert "`--port` must be free on `--host`" in err


def test_without_ray_serve_the_command_says_what_to_install(digits):
    script = f"""
import sys
sys.modules["grpc_reflection"] = None
from ddil_ray.cli import main
main(["serve", {str(digits)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'Install it with `pip install "ddil-ray[serve]"`' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def server(digits):
    """A real one with a Ray of its own: its process and URL. Few may wait, and every image takes 50 steps."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    options = ["--steps", "50", "--port", str(port), "--max-batch", "4", "--max-queued", "8", "--wait-ms", "50"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / "serve.py"), str(digits), *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process, f"http://127.0.0.1:{port}/"
    if process.poll() is None:
        process.kill()
        process.communicate()


def _answers(url):
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:  # nobody listens, or no replica is there to answer
        return False


def _wait(process, url):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        if _answers(url):
            return
        time.sleep(0.5)
    raise AssertionError("it did not start")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_client_is_answered_in_batches_and_told_when_there_are_too_many(server, digits):
    process, url = server
    _wait(process, url)
    assert requests.get(f"{url}-/healthz", timeout=10).status_code == 200
    about, shown = requests.get(url, timeout=10).json(), f"{digits.parent.name}/student"
    assert about == {"student": shown, "steps": 50, "asked": ["seed", "class_label"], "classes": 10}

    def post(content, **more):
        return requests.post(url, json=content, timeout=60, **more)

    answer = post({"class_label": 3, "seed": 5})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["x-seed"] == "5"
    studio = Studio(str(digits), steps=50, guidance=None)
    _assert_same(answer.content, studio.draw(_asks(studio, {"class_label": 3, "seed": 5}))[0])

    contents = [{"class_label": n, "seed": 100 + n} for n in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        answers = list(pool.map(lambda c: post(c, headers={"Accept": "application/json"}), contents))
    assert [a.status_code for a in answers] == [200] * len(contents)
    found = [a.json() for a in answers]
    assert [{k: f[k] for k in ("class_label", "seed")} for f in found] == contents
    assert max(f["batch_size"] for f in found) > 1
    for content, answer in zip(contents, found, strict=True):
        _assert_same(base64.b64decode(answer["image"]), studio.draw(_asks(studio, content))[0])

    refused = post({"class_label": 11})
    assert (refused.status_code, refused.json()) == (
        422,
        {"error": "`class_label` must be from 0 to 9, but is 11 instead."},
    )
    assert requests.post(url, data=b"x" * 70_000, timeout=10).status_code == 413
    assert requests.get(f"{url}images", timeout=10).status_code == 404
    assert requests.put(url, timeout=10).headers["allow"] == "GET, POST"
    late = post({"class_label": 1}, headers={"x-request-timeout-seconds": "0.01"})
    assert late.status_code == 408

    with ThreadPoolExecutor(60) as pool:
        many = list(pool.map(lambda n: post({"class_label": n % 10, "seed": n}), range(60)))
    counts = Counter(answer.status_code for answer in many)
    assert set(counts) == {200, 503}
    assert {answer.headers["retry-after"] for answer in many if answer.status_code == 503} == {"1"}
    assert post({"class_label": 0}).status_code == 200

    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err[-3000:]
    assert f"images   {url}" in out
    assert err.splitlines()[-1] == "Stopped by SIGTERM."
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_of_the_page_gets_a_picture(server, tmp_path):
    process, url = server
    _wait(process, url)
    (command,) = [b.text for b in blocks(ROOT / "docs" / "serve.md") if b.text.startswith("curl ")]
    assert "http://127.0.0.1:8000/" in command
    subprocess.run(["bash", "-c", command.replace("http://127.0.0.1:8000/", url)], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG\r\n")


@contextmanager
def _served_here(student, port=None):
    """By this process, on the tests' Ray: its application and URL."""
    from ddil_ray.config import Role
    from ddil_ray.runtime.serving import Served, serving

    served = Served(
        student=str(student), steps=1, guidance=None, host="127.0.0.1", port=port or free_port(),
        replicas=Role(num_gpus=0), max_batch=4, wait_s=0.01, max_ongoing=8, max_queued=8, timeout_s=60,
    )  # fmt: skip
    with serving(served) as application:
        yield application, application.url


def _end_a_replica():
    import ray

    (name,) = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "StudentServer" in a["name"]]
    ray.kill(ray.get_actor(name, namespace="serve"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_second_is_refused_and_the_first_goes_on_through_the_loss_of_a_replica(digits, monkeypatch):
    from ray import serve

    from ddil_ray.runtime import serving

    with _served_here(digits) as (application, url):
        with pytest.raises(ConfigError, match="another `ddil-ray serve` answers there"), _served_here(digits):
            pass
        assert requests.get(url, timeout=30).ok
        application.check()
        _end_a_replica()
        until(lambda: serve.status().applications[serving.NAME].status != "RUNNING")
        application.check()
        with monkeypatch.context() as patch:
            patch.setattr(serving, "_PATIENCE_S", 0.0)
            with pytest.raises(RunFailedError, match="none of its replicas has run"):
                until(application.check, timeout_s=30)
        until(lambda: serve.status().applications[serving.NAME].status == "RUNNING")
        assert requests.get(url, timeout=30).ok
        application.check()
    assert not serve.status().applications


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("deed", ["serve.delete('ddil-ray')", "serve.shutdown()"])
def test_the_command_ends_when_others_delete_what_it_serves(capsys, digits, deed):
    import ray

    port, cluster = free_port(), {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def others():
        try:
            until(lambda: _answers(f"http://127.0.0.1:{port}/"))
        finally:
            # It may not see the end, which the command hastens.
            subprocess.run([sys.executable, "-c", f"from ray import serve; {deed}"], env=cluster, check=False)

    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(others)
        code, out, err = run(capsys, "serve", digits, "--steps", "1", "--num-gpus", "0", "--port", port)
        deleting.result()
    assert code == 1
    assert "images   " in out
    assert "was deleted from Ray Serve by others" in err


def _hello(name, route, port):
    """Served by somebody, on the tests' Ray."""
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Hello:
        async def __call__(self, request):
            return "hello"

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(Hello.bind(), name=name, route_prefix=route)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_student_is_where_the_command_says_whatever_listened_before(digits):
    from ray import serve

    from ddil_ray.runtime.serving import NAME

    left, other = free_port(), free_port()
    _hello(NAME, "/", left)
    with _served_here(digits) as (_, url):
        assert requests.get(url, timeout=30).ok
        assert not _answers(f"http://127.0.0.1:{left}/")
    try:
        _hello("other", "/other", other)
        with _served_here(digits) as (_, url):
            assert url == f"http://127.0.0.1:{other}/"
            assert requests.get(url, timeout=30).ok
        assert _answers(f"http://127.0.0.1:{other}/other")
    finally:
        serve.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_port_that_others_have_on_the_head_is_told_and_nothing_is_left(digits, monkeypatch):
    import ray
    from ray import serve

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = rf"^The head must listen at `--port` {port} of `--host` 127.0.0.1, but does not: .*Choose another port"
        with pytest.raises(RunFailedError, match=told), _served_here(digits, port):
            pass
    assert not serve.status().proxies


def test_a_request_that_does_not_come_gives_its_place_back(digits, monkeypatch):
    """A connection that sends no body holds one of few places of a replica."""
    monkeypatch.setattr(serving_module, "_BODY_S", 0.1)
    replica = object.__new__(serving_module.StudentServer.func_or_class)
    replica._studio = Studio(str(digits), steps=4, guidance=None)

    async def never():
        await asyncio.sleep(60)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    answer = asyncio.run(replica(Request(scope, never)))
    assert answer.status_code == 408
    assert "must have come within 0.1 s" in json.loads(answer.body)["error"]
