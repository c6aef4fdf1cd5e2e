"""A whole RecallQ on one machine: an embedded Redis and worker processes.

What ``recallq up`` keeps running, ``recallq demo`` shows, and the other commands start for as long
as they take when no Redis was named. The worker is a program of its own, started and stopped as a
supervisor would; this package never imports it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from recallq.embedded import EmbeddedRedis
from recallq.errors import ConfigurationError, MissingExtra
from recallq.settings import ENV_PREFIX

_READY_PROMPT = "recallq worker ready"
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 30.0
_URLS = ("REDIS_URL", "BROKER_URL", "COORDINATION_URL", "RESULT_URL", "STORE_URL")


def default_data_dir() -> Path:
    """Where the embedded Redis keeps its data unless told otherwise."""
    named = os.environ.get(f"{ENV_PREFIX}DATA_DIR")
    if named:
        return Path(named)
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(home).expanduser() / "recallq"


def worker_environment(url: str, backend: str | None = None) -> dict[str, str]:
    """The environment of a worker that keeps everything on the one Redis at `url`."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {f"{ENV_PREFIX}{each}" for each in _URLS}
    }
    environment[f"{ENV_PREFIX}REDIS_URL"] = url
    if backend is not None:
        environment[f"{ENV_PREFIX}BACKEND"] = backend
    return environment


def worker_command(*arguments: str) -> list[str]:
    """The command that runs `recallq_worker`. Raises `MissingExtra` without its dependencies."""
    if find_spec("uvloop") is None and sys.platform != "win32":
        raise MissingExtra("a worker", "worker")
    return [sys.executable, "-m", "recallq_worker", *arguments]


class WorkerProcess:
    """A worker in a process of its own, its output in a file."""

    def __init__(self, url: str, log_path: Path, *, backend: str | None, lanes: str) -> None:
        self._url = url
        self._backend = backend
        self._lanes = lanes
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def launch(self) -> None:
        """Starts it without waiting. Raises `MissingExtra`."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # of the one before
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                worker_command("worker", "--lanes", self._lanes, "--until-stdin-ends"),
                # Nothing is written to it: it ends with this process, however that ends.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=worker_environment(self._url, self._backend),
                # A Ctrl-C in the terminal is for whoever started it, who then stops it in order.
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Raises `ConfigurationError`, with the end of its log, if it does not come up."""
        assert self._process is not None, "launch() comes first"
        deadline = time.monotonic() + _START_TIMEOUT
        while _READY_PROMPT not in self._said():
            if self._process.poll() is not None:
                raise ConfigurationError(f"the worker did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"the worker was not ready after {_START_TIMEOUT:g} s: {self._last_words()}"
                )
            time.sleep(0.02)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Lets it finish what it holds; kills it if that takes too long."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            if process.stdin is not None:
                process.stdin.close()

    def _said(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _last_words(self) -> str:
        lines = [line for line in self._said().splitlines() if line.strip()]
        # Its own one-line errors say it best; else whatever came last.
        told = [line for line in lines if line.startswith("recallq worker: ")]
        return (told or lines or ["it said nothing"])[-1].removeprefix("recallq worker: ")


class Stack:
    """An embedded Redis with workers. ``with Stack(data_dir) as stack: connect(stack.url)``."""

    def __init__(
        self,
        data_dir: Path | None,
        *,
        workers: int = 1,
        backend: str | None = None,
        lanes: str = "live,bulk,slow",
        port: int | None = None,
    ) -> None:
        """`data_dir` None keeps nothing beyond the stack's life."""
        self.redis = EmbeddedRedis(data_dir, port=port)
        self._count = workers
        self._backend = backend
        self._lanes = lanes
        self.workers: list[WorkerProcess] = []

    @property
    def url(self) -> str:
        return self.redis.url

    def start(self) -> None:
        """Returns once the workers are ready. Raises `ConfigurationError`, `MissingExtra`."""
        worker_command()  # before anything runs
        try:
            self.redis.start()
            for number in range(1, self._count + 1):
                worker = WorkerProcess(
                    self.url,
                    self.redis.data_dir / f"worker-{number}.log",
                    backend=self._backend,
                    lanes=self._lanes,
                )
                self.workers.append(worker)
                worker.launch()
            for worker in self.workers:
                worker.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Workers first, so that they can settle or return what they hold."""
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.stop()
        self.redis.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
