"""What several kinds of tests need: real workers, the command line, and waiting for conditions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recallq.redis_client import RedisClient, connect

PLUGINS = Path(__file__).parent / "plugins"
"""On a worker's path, this holds the backends that exist for tests."""

READY = "recallq worker ready"

PATIENCE = 30.0
"""Seconds that tests wait, at the most, for what should come soon: the machine may stall."""

RECALLQ = str(Path(sys.executable).with_name("recallq"))

SETTINGS = ("RECALLQ_", "MEMORY_", "OPENAI_", "OPENROUTER_", "DASHSCOPE_", "MEM0_", "FLOW_")
"""How variables begin that would reach into tests from a developer's environment."""


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without RecallQ's settings, and with `variables`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)
    }
    return {**environment, **variables}


def wait_or_kill(process: subprocess.Popen[Any], timeout: float = 20.0) -> None:
    """Waits until a process that was told to end has ended, and kills it if it does not."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Worker:
    """A real worker process. ``with Worker(url, namespace=..., backend="redis"):``"""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "recallq",
        backend: str = "redis",
        lanes: str = "live,bulk,slow",
        log_level: str = "WARNING",
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        **settings: str | float,
    ) -> None:
        """`environment` holds variables of others; `directory` is where it runs."""
        self.url = url
        self.namespace = namespace
        self.backend = backend
        self._arguments = ["--lanes", lanes, "--log-level", log_level]
        variables = {
            "RECALLQ_REDIS_URL": url,
            "RECALLQ_NAMESPACE": namespace,
            "RECALLQ_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]),
            **{f"RECALLQ_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._environment = clean_environment(**variables | dict(environment or {}))
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def launch(self) -> None:
        """Starts the process without waiting."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "recallq_worker", "worker", *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=self._environment,
            cwd=self._directory,
        )

    def start(self, timeout: float = 60.0) -> None:
        """Starts the process and waits until it takes jobs."""
        before = self.output.count(READY)
        self.launch()
        deadline = time.monotonic() + timeout
        while True:
            lost = not self.is_alive() or time.monotonic() > deadline
            if self.output.count(READY) > before:
                return  # even if it has died of its first job since
            if lost:
                self.stop()
                raise AssertionError(f"the worker did not start:\n{self.output}")
            time.sleep(0.02)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code."""
        assert self._process is not None
        return self._process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        wait_or_kill(self._process)

    def close(self) -> None:
        """Stops the worker and forgets its output."""
        self.stop()
        self._log.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Shell:
    """Runs ``recallq`` with a home of its own."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.environment = clean_environment(
            XDG_DATA_HOME=str(home), HOME=str(home), COLUMNS="200", **variables
        )

    def __call__(
        self, *arguments: str, code: int = 0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        run = subprocess.run(
            [RECALLQ, *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in run.stderr, run.stderr
        assert run.returncode == code, (run.args, run.stdout, run.stderr)
        return run

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [RECALLQ, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def one_line(run: subprocess.CompletedProcess[str]) -> str:
    """The single line that a failed command wrote to standard error."""
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


async def eventually(
    condition: Callable[[], Awaitable[bool]], timeout: float = PATIENCE, every: float = 0.02
) -> None:
    """Waits until `condition` holds; fails if it does not in time."""
    deadline = time.monotonic() + timeout
    while not await condition():
        assert time.monotonic() < deadline, f"still not so after {timeout} s: {condition}"
        await asyncio.sleep(every)


def redis_at(url: str) -> RedisClient:
    """A client for looking into Redis: ``async with redis_at(url) as redis:``"""
    return connect(url, max_connections=4)
