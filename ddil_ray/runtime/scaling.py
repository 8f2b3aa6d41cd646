"""Other numbers of actors for a running job: `ddil-ray scale` leaves a request in its folder, the driver answers there.

A folder is what both have: the command needs no connection to Ray, and a run no port. A request is
`scale/<id>.json`, its answer `scale/<id>.answer.json`; both go when they have been read.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ddil_ray.config import RunConfig, load_config
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.folder import RunFolder, using, write_whole
from ddil_ray.places import check_url
from ddil_ray.runtime.demands import pool_bounds, pool_roles, resized
from ddil_ray.runtime.fits import check_fits
from ddil_ray.storage import open_url

__all__ = ["Requests", "Scaling", "scale"]

Sizes = Mapping[str, Any]
"""`num_actors` by role: a number, or [min, max]."""
_REMOTE_S = 5.0
"""Between two looks into a folder that is no local one."""


class Requests:
    """Requests in the folder of a run, and their answers.

    Args:
        fs: filesystem of fsspec.
        root: the run folder in it.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self._fs, self._folder = fs, f"{root.rstrip('/')}/scale"

    def ask(self, sizes: Sizes, *, timeout_s: float) -> dict[str, Any] | None:
        """Leave a request and wait for its answer; None where none came."""
        name = uuid.uuid4().hex
        question, answer = f"{self._folder}/{name}.json", f"{self._folder}/{name}.answer.json"
        write_whole(self._fs, question, json.dumps(dict(sizes)).encode())
        deadline = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline:
                self._fs.invalidate_cache()
                if self._fs.exists(answer):
                    found: dict[str, Any] = json.loads(self._fs.cat_file(answer))
                    return found
                time.sleep(0.2)
            return None
        finally:
            for path in (question, answer):
                if self._fs.exists(path):
                    self._fs.rm_file(path)

    def take(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Requests that have no answer yet, by id."""
        self._fs.invalidate_cache()
        try:
            names = [path.rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return
        for name in names:
            stem = name.removesuffix(".json")
            if not name.startswith(".") and "." not in stem and f"{stem}.answer.json" not in names:
                yield stem, json.loads(self._fs.cat_file(f"{self._folder}/{name}"))

    def answer(self, request: str, content: Mapping[str, Any]) -> None:
        """Answer a request."""
        write_whole(self._fs, f"{self._folder}/{request}.answer.json", json.dumps(dict(content)).encode())

    def clear(self) -> None:
        """Forget what a run before this one was asked."""
        if self._fs.exists(self._folder):
            self._fs.rm(self._folder, recursive=True)


def scale(run: str, sizes: Sizes, *, timeout_s: float = 30.0) -> dict[str, dict[str, Any]]:
    """Give the roles of a running job other numbers of actors.

    Args:
        run: its folder, a path or URL.
        sizes: by role.
        timeout_s: longest wait for the run's answer.

    Returns:
        `before` and `after`, the numbers of all its roles.

    Raises:
        ConfigError: no such run, role or number, one that does not fit the cluster, or a run that does not answer.
    """
    resized(load_config(f"{run.rstrip('/')}/config.yaml", kind=RunConfig), sizes)
    check_url(run, "RUN")
    with using(run, "Who asks a run to change must be able to write there."):
        answer = Requests(*open_url(run)).ask(sizes, timeout_s=timeout_s)
    if answer is None:
        raise ConfigError(
            f"RUN must be the folder of a job that is training, but nobody answers in {run}. Start it with other "
            f"`num_actors`, as in `ddil-ray distill --resume {run} <role>.num_actors=<number>`."
        )
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer


class Scaling:
    """The driver's end.

    Args:
        folder: of the run.
        config: of the run, `num_gpus` in numbers.
        hub: of the run.
        say: tells the user what was changed.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, hub: Any, say: Callable[[str], None]) -> None:
        self._requests, self._config, self._hub, self._say = Requests(folder.fs, folder.root), config, hub, say
        self._remote, self._due, self._asked, self._begun = folder.remote, 0.0, False, False
        self._looking: threading.Thread | None = None

    def watch(self) -> None:
        """Answer new requests. A storage that fails, or is slow, must not end the run nor hold up who calls."""
        if self._asked:  # again, for a hub that has started anew
            self._hub.resize.remote(pool_bounds(self._config))
        if time.monotonic() < self._due or (self._looking is not None and self._looking.is_alive()):
            return
        if not self._remote:
            self._look()
            return
        self._due = time.monotonic() + _REMOTE_S
        self._looking = threading.Thread(target=self._look, name="scaling", daemon=True)
        self._looking.start()

    def _look(self) -> None:
        try:
            if not self._begun:
                self._requests.clear()
                self._begun = True
            for request, sizes in self._requests.take():
                self._requests.answer(request, self._answered(sizes))
        except Exception as error:  # every filesystem has errors of its own
            self._say(f"A request to resize could not be read or answered ({first_line(error)}); the run goes on.")
            self._due = time.monotonic() + 60

    def _answered(self, sizes: Sizes) -> dict[str, Any]:
        import ray

        try:
            config = resized(self._config, sizes)
            check_fits(config, ray.nodes())
        except ConfigError as error:
            return {"error": str(error)}
        try:
            refused = ray.get(self._hub.resize.remote(pool_bounds(config)), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return {"error": "The run's hub is being started again. Ask once more in a few seconds."}
        if refused is not None:
            return {"error": f"{refused}. Stop the run, and go on with `--resume` and other `num_actors`."}
        before, self._config, self._asked = self._config, config, True
        self._say("Resized: " + ", ".join(f"{role} {size}" for role, size in sizes.items()))
        return {"before": _sizes(before), "after": _sizes(config)}


def _sizes(config: RunConfig) -> dict[str, Any]:
    return {role: getattr(config, role).num_actors for role in sorted(set(pool_roles(config).values()))}
