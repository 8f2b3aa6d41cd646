"""Pins that imports leave the garbage collector as it was."""

from __future__ import annotations

import contextlib
import gc

import pytest

from ddil_ray.imports import import_large


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("module", ["json", "no_such_module"])
def test_the_collector_is_left_as_it_was(collects, module):
    (gc.enable if collects else gc.disable)()
    with contextlib.suppress(ModuleNotFoundError):
        import_large(module)
    was = gc.isenabled()
    gc.enable()
    assert was == collects


def test_it_rests_while_a_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "imported_at_rest.py").write_text("import gc\ncollects = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not import_large("imported_at_rest").collects
