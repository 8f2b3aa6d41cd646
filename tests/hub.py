"""A hub of one's own: the calls of huggingface_hub that read a card's metadata, make a repository and commit to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

__all__ = ["Hub", "local_hub"]

_COMMIT = "0" * 40


class Hub:
    """What the server holds and was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.cards: dict[str, dict[str, Any]] = {}
        """Metadata of the models it has, by id."""
        self.files: dict[str, bytes] = {}
        """What was committed, by <owner>/<name>/<path>."""
        self.created: list[dict[str, Any]] = []
        """Bodies of the requests to make a repository."""
        self.tokens: set[str | None] = set()
        """Authorization headers of what was written."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        model = self.path.removeprefix("/api/models/")
        if model in self.hub.cards:
            self._answer({"id": model, "cardData": self.hub.cards[model]})
        else:
            self._answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.created.append(asked)
            self._answer({"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self._answer({"files": files})
        else:
            self._commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[f"{repo}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{_COMMIT}", "commitOid": _COMMIT})

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(encoded)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that huggingface_hub takes for the hub, with a token for it, as HF_ENDPOINT and HF_TOKEN make it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of-tests")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
