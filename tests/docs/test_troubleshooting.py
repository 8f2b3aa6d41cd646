"""Pins the messages that the troubleshooting page explains to those that the code has."""

from __future__ import annotations

import ast
import re

import pytest
from pages import ROOT

GAP = "\N{HORIZONTAL ELLIPSIS}"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)


def _texts():
    """Every string of the package, with a gap for what is filled in."""
    for path in sorted((ROOT / "ddil_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)


TEXTS = list(_texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_still_said(message):
    parts = message.replace("`", "").split(GAP)  # some are put in quotes where they are said
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in parts), re.DOTALL)
    assert any(pattern.search(text.replace("`", "")) for text in TEXTS)


def test_every_message_is_long_enough_to_be_known_by():
    assert len(MESSAGES) > 40
    assert [message for message in MESSAGES if len(message.replace(GAP, "").strip()) < 16] == []
