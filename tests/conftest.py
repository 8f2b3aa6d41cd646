"""What all tests share: quiet threads, and one local Ray for the session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from faulty_proxy import Faulty

from ddil_ray.factory import ALLOW_CODE

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ[ALLOW_CODE] = "1"  # teachers of tests are factories; tests of the flag itself take it away

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of the local Ray go to one process, where tests are spread over several."""
    for item in items:
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture
def recovery(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Tells how many seconds what took; all that was told is printed when the tests are done."""
    return lambda what, seconds: record_property("recovery", f"{seconds:.1f} s {what}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Times to recover, for the tables of docs/reliability.md."""
    reports = terminalreporter.getreports("passed")
    told = [value for report in reports for name, value in report.user_properties if name == "recovery"]
    if told:
        terminalreporter.section("times to recover")
    for line in told:
        terminalreporter.write_line(str(line))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DDIL_RAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with room for every role of every test, in a short path (socket names have a limit)."""
    from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV

    os.environ.update(WORKER_ENV | LOCAL_ENV)
    here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(here)  # for factories in tests that Ray's processes call
    import ray

    with tempfile.TemporaryDirectory(prefix="r") as folder:
        ray.init(
            address="local",
            num_cpus=12,
            num_gpus=1,  # in name only: roles get shares of it, and compute on the CPU
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[Faulty]:
    """A local S3 behind a proxy that can be told to fail; the environment names it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Faulty(server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield proxy
    proxy.stop()
    server.stop()


@pytest.fixture
def s3(s3_endpoint: Faulty) -> Iterator[Faulty]:
    """The proxy, with an empty bucket `bucket` behind it that nothing happens to yet."""
    import boto3

    bucket = boto3.resource("s3").Bucket("bucket")
    bucket.create()
    s3_endpoint.calm()
    yield s3_endpoint
    s3_endpoint.calm()
    bucket.objects.all().delete()


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    """Where the runs of a test go."""
    return str(tmp_path / "runs")
