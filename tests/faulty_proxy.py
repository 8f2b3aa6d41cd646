"""A loopback HTTP proxy before a server, which fails as networks and storages do, by a script or a seed."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["FAULTS", "Faulty"]

FAULTS = ("503", "reset", "slow", "truncate")
"""And `hang`, which never answers; `lost`, where the request is done and its answer does not come back; `terse`, where
errors of S3 do not name the condition that failed; 403, 409 and 501. `truncate` breaks answers off that have a body,
and lets others be."""
_SLOW_S = 0.2
_ERRORS = {
    "403": ("AccessDenied", "Access Denied"),
    "409": ("ConditionalRequestConflict", "A conflicting operation is in progress."),
    "501": ("NotImplemented", "A header you provided implies functionality that is not implemented."),
    "503": ("SlowDown", "Please reduce your request rate."),
}
"""In the words of S3, by status."""
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
_HOP = ("connection", "transfer-encoding", "content-length", "keep-alive", "expect")


class Faulty:
    """Listens on a port of its own and passes requests on to `upstream`, an address of host and port.

    `fault` decides what happens to a request of a method and path: a name of `FAULTS`, or None. `seen` counts what
    happened, "ok" where nothing did.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream, self.slow_s, self.seen = upstream, _SLOW_S, Counter[str]()
        self.calm()
        proxy = self

        class Handler(_Handler):
            faulty = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def calm(self) -> None:
        """Fail no more."""
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.slow_s = _SLOW_S
        self.seen.clear()

    def script(self, *faults: str | None, only: Callable[[str, str], bool] = lambda method, path: True) -> None:
        """Do `faults` to the next requests that `only` picks, one each."""
        left, lock = list(faults), threading.Lock()

        def fault(method: str, path: str) -> str | None:
            with lock:
                return left.pop(0) if left and only(method, path) else None

        self.fault = fault

    def always(self, kind: str, only: Callable[[str, str], bool] = lambda method, path: True) -> None:
        """Do the fault `kind` to all requests that `only` picks."""
        self.fault = lambda method, path: kind if only(method, path) else None

    def seeded(self, share: float, seed: int, kinds: tuple[str, ...] = FAULTS) -> None:
        """Do any of `kinds` to a share of the requests."""
        draw = random.Random(seed)
        self.fault = lambda method, path: draw.choice(kinds) if draw.random() < share else None

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        request.close()  # without a FIN of its own, so that a reset stays one

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up, as they are made to


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: Faulty

    def _serve(self) -> None:
        body = self._body()
        fault = self.faulty.fault(self.command, self.path)
        self.faulty.seen[fault or "ok"] += 1
        if fault in _ERRORS:
            self._answer(int(fault), {"Content-Type": "application/xml"}, _ERROR.format(*_ERRORS[fault]).encode())
        elif fault == "reset":
            self._reset()
        elif fault == "hang":
            self.connection.settimeout(120)
            self.rfile.read(1)  # until the client gives up
            self.close_connection = True
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        connection = HTTPConnection(*self.faulty.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost":
            self._reset()
            return
        if fault == "slow":
            time.sleep(self.faulty.slow_s)
        if fault == "terse":
            content = re.sub(rb"<Condition>.*?</Condition>", b"", content)
        self._answer(answer.status, dict(answer.getheaders()), content, truncate=fault == "truncate" and bool(content))

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, truncate: bool = False) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if truncate else content)
        if truncate:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass
