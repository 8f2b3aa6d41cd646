"""Takes secrets out of what leaves a process: kept configs, tracked parameters, messages, logs and terminals.

Secret is what stands where credentials do: before the `@` of a URL, and behind a name that ends in token, secret,
password, credential or key. What a user hides elsewhere, such as in a path, is not found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "is_redacted", "redact", "redacted"]

HIDDEN = "***"
"""What stands in the place of a secret."""

_NAME = (
    r"(?:token|secret|passw(?:or)?d|passphrase|credentials?|signature|(?<![a-z])sig"
    r"|(?:access|account|api|private|secret)[_-]?key)"
)
_QUOTED = r"""(?P<quote>["'])(?:(?!(?P=quote)).)*(?P=quote)"""
_PATTERNS = (
    # user:password@ of a URL; also where a `/` in the password was not escaped, unless what is before it is a port
    (
        re.compile(r"""(?<=://)(?:[^\s/?#'"]{0,500}|[^\s/?#@:'"\[]{1,200}:(?!\d+(?:[/?#\s'"]|$))[^\s@'"]{0,200})@"""),
        f"{HIDDEN}@",
    ),
    # name=value, "name": "value", and the same among a URL's parameters
    (
        re.compile(
            rf"""(?i)(?P<name>{_NAME}["'`]?\s*[=:]\s*)(?!{re.escape(HIDDEN)})(?:{_QUOTED}|[^\s"'`,;&#)\]}}]+)"""
        ),
        rf"\g<name>{HIDDEN}",
    ),
    # Authorization: Bearer value
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
)
_KEY = re.compile(r"(?i)token|secret|passw|credential|(?:^|[^a-z])key(?:$|[^a-z])")


def redact(text: str) -> str:
    """`text` without secrets; the same if it has none."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted(value: Any, key: str = "") -> Any:
    """A tree of dicts, lists and scalars with secrets taken out, of strings and behind keys that name a secret."""
    if isinstance(value, Mapping):
        return {name: redacted(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(inner, key) for inner in value)
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _KEY.search(key) else redact(value)


def is_redacted(value: Any) -> bool:
    """Whether something was taken out of the string `value`."""
    return isinstance(value, str) and (value == HIDDEN or f"://{HIDDEN}@" in value or f"={HIDDEN}" in value)
