"""What tests of the registry share: each leaves MLflow without a server."""

from __future__ import annotations

from collections.abc import Iterator

import mlflow
import pytest


@pytest.fixture(autouse=True)
def _no_server_of_before() -> Iterator[None]:
    yield
    mlflow.set_tracking_uri(None)
