"""Pins the least versions of dependencies below which known holes are open; SECURITY.md names them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLOORS = {"ray": "2.60", "torch": "2.10", "transformers": "5.3", "mlflow": "3.11"}


@pytest.mark.parametrize("package", FLOORS)
def test_no_version_with_a_known_hole_is_taken(package):
    listed = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    found = [r for r in map(Requirement, listed) if r.name == package]
    assert found
    least = Version(FLOORS[package])
    for requirement in found:
        (floor,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert floor >= least
    (pinned,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert Version(pinned) >= least
    assert f"{package} {FLOORS[package]}" in " ".join((ROOT / "SECURITY.md").read_text().split())
