"""Opens pages in headless Chromium through its DevTools protocol, and tells what a reader would meet."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

__all__ = ["Seen", "browser_command", "look"]

_PROBE = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  return {
    page: document.documentElement.scrollWidth, window: innerWidth,
    charts: [...document.querySelectorAll('svg')].map(box),
    pictures: [...document.querySelectorAll('img')].map(e => [e.naturalWidth, ...box(e)]),
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    chartInk: (t => t && getComputedStyle(t).fill)(document.querySelector('svg text')),
    leastText: Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)),
    outside: [...document.querySelectorAll('svg')].flatMap(svg => { const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
        return r.left < frame.left - 1 || r.right > frame.right + 1 || r.bottom > frame.bottom + 1; })
        .map(t => t.textContent); }),
  };
})()"""


@dataclass(frozen=True)
class Seen:
    """What was met on a page at one size and scheme."""

    facts: dict
    """Measured in the page: see `_PROBE`."""
    problems: list[str]
    """Errors on the console, exceptions, and requests for anything but the page itself."""


def browser_command() -> str | None:
    """Chromium under any of its names."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for found in map(shutil.which, names) if found), None)


def look(page: Path | str, *, width: int, dark: bool, picture: Path, ready: str = "true") -> Seen:
    """Open `page`, a file or a URL, in a window of `width` pixels, save all of it as `picture`, and measure it.

    Args:
        page: what to open.
        width: of the window.
        dark: whether the reader likes it dark.
        picture: where to.
        ready: JavaScript that is true once the page is; waited for 30 s.
    """
    url = page if isinstance(page, str) else page.resolve().as_uri()
    with _browser() as port:
        return asyncio.run(_look(port, url, width, dark, picture, ready))


@contextmanager
def _browser():
    with tempfile.TemporaryDirectory(prefix="chromium") as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen([browser_command(), *flags, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            address = next(line for line in process.stderr if "DevTools listening on" in line)
            yield int(address.rpartition("127.0.0.1:")[2].partition("/")[0])
        finally:
            others = psutil.Process(process.pid).children(recursive=True)  # which write into the profile to their end
            process.terminate()
            process.wait(30)
            psutil.wait_procs(others, 10)
            process.stderr.close()


async def _look(port: int, url: str, width: int, dark: bool, picture: Path, ready: str) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (target, *_) = [t for t in await answer.json() if t["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Network", "Log"):
                await tab.call(f"{domain}.enable")
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            await tab.call("Emulation.setEmulatedMedia", features=scheme)
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            await tab.call("Page.navigate", url=url)
            await tab.until("Page.loadEventFired")
            await tab.holds(ready)
            result = await tab.call("Runtime.evaluate", expression=_PROBE, returnByValue=True)
            shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
            return Seen(result["result"]["value"], tab.problems(url))


class _Tab:
    """Calls to a tab, and what it told meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.count, self.events = socket, 0, []

    async def call(self, method: str, **params: object) -> dict:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": params})
        while True:
            message = json.loads((await self.socket.receive(timeout=60)).data)
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(json.loads((await self.socket.receive(timeout=60)).data))

    async def holds(self, condition: str) -> None:
        for _ in range(60):
            found = await self.call("Runtime.evaluate", expression=f"Boolean({condition})", returnByValue=True)
            if found["result"]["value"]:
                return
            await asyncio.sleep(0.5)
        raise TimeoutError(condition)

    def problems(self, url: str) -> list[str]:
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Network.requestWillBeSent":
                asked = params["request"]["url"]
                found += [asked] if asked != url and not asked.startswith("data:") else []
            elif event.get("method") in ("Runtime.exceptionThrown", "Network.loadingFailed", "Log.entryAdded"):
                found.append(json.dumps(params))
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(json.dumps(params["args"]))
        return found
