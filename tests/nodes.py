"""pytest-celery's nodes over local processes, for machines without a Docker engine.

pytest-celery drives a node through `CeleryTestContainer`, which wraps a docker-py container. This
module owns stand-ins for that inner object - `LocalProcess` for any command, `LocalRedis` for an
embedded Redis - and the wrappers around them, so that a test written against `celery_setup` kills,
restarts and reads a worker in the same way whether it is a process or a container.

They keep the properties of a container that tests rely on: SIGKILL, and the end of the main
process for whatever reason, takes every process it started with it; the log survives restarts; an
address stays the same. Where Docker or pytest-celery are inconvenient they do better: being ready
is judged by the log since the latest start rather than by any earlier one, it is polled every
few milliseconds rather than every second, and a process that dies first fails at once.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import celery
import psutil
from pytest_celery import CeleryTestContainer
from pytest_docker_tools.exceptions import ContainerFailed, ContainerNotReady
from redis import Redis

from recallq.contract import Lane
from recallq.embedded import EmbeddedRedis, find_server

HOST = "127.0.0.1"

_POLL = 0.02
_READY_TIMEOUT = 60.0
_STOP_TIMEOUT = 15.0
"""Seconds between SIGTERM and SIGKILL when a node is torn down."""


class LocalNode(ABC):
    """What `CeleryTestContainer` uses of a docker-py container, whatever runs behind it."""

    def __init__(self, name: str) -> None:
        self.id = uuid.uuid4().hex * 2
        self.name = name
        self._started = False
        self._log_start = 0

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The main process, None while none runs."""

    @property
    @abstractmethod
    def log_path(self) -> Path: ...

    @property
    def ports(self) -> tuple[int, ...]:
        """TCP ports that it listens on once it is ready."""
        return ()

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _stop(self, timeout: float) -> None:
        """SIGTERM, and SIGKILL after `timeout` seconds; return when nothing is left."""

    @abstractmethod
    def _kill_hard(self) -> None:
        """SIGKILL; return when nothing is left."""

    @property
    def status(self) -> str:
        if self.pid is not None:
            return "running"
        return "exited" if self._started else "created"

    @property
    def attrs(self) -> dict[str, Any]:
        """The parts of `docker inspect` that pytest-docker-tools reads."""
        running = self.pid is not None
        listening = {
            f"{port}/tcp": [{"HostIp": HOST, "HostPort": str(port)}]
            for port in (self.ports if running else ())
        }
        return {
            "Id": self.id,
            "Name": self.name,
            "State": {"Status": self.status, "Running": running, "Pid": self.pid or 0},
            "Config": {"Hostname": HOST, "Env": [], "Labels": {}},
            "HostConfig": {"PortBindings": {}},
            # An address, since tests that themselves run in a container ask for it.
            "NetworkSettings": {"Networks": {"local": {"IPAddress": HOST}}, "Ports": listening},
        }

    def reload(self) -> None:
        """Nothing is cached here; looking is what notices that a process has exited."""
        _ = self.status

    def start(self) -> None:
        if self.pid is None:
            self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            self._start()
            self._started = True

    def stop(self, timeout: float = 10) -> None:
        self._stop(timeout)

    def restart(self, timeout: float = 10) -> None:
        self._stop(timeout)
        self.start()

    def kill(self, signal_: int | str | None = None) -> None:
        """Send a signal, given by number or name, to the main process; SIGKILL if None.

        After SIGKILL it has exited when this returns.
        """
        number = signal_number(signal_)
        pid = self.pid
        if pid is None:
            raise ProcessLookupError(f"{self.name} is not running")
        if number == signal.SIGKILL:
            self._kill_hard()
        else:
            os.kill(pid, number)

    def remove(self, *, force: bool = False) -> None:
        """Leave nothing running; may be called more than once. The log stays."""
        self._stop(0 if force else _STOP_TIMEOUT)

    def logs(self) -> bytes:
        """Everything it printed, over all its runs."""
        return self.log_path.read_bytes() if self.log_path.exists() else b""

    def recent_logs(self) -> bytes:
        """What it printed since its latest start."""
        return self.logs()[self._log_start :]


def signal_number(given: int | str | None) -> signal.Signals:
    """As Docker takes it: 9, "9", "KILL", "SIGKILL", or None for SIGKILL."""
    if given is None:
        return signal.SIGKILL
    if isinstance(given, int) or given.isdigit():
        return signal.Signals(int(given))
    name = given.upper()
    return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]


class LocalProcess(LocalNode):
    """A command whose output goes to a file.

    It gets a process group of its own, which ends with it. A member that leaves the group, as a
    daemon does, is not followed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        name: str = "process",
    ) -> None:
        super().__init__(name)
        self._command = list(command)
        self._log_path = log_path
        self._env = None if env is None else dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self._log_path

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._has_exited() else self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the latest run, negative for a signal; None while it runs or before it ran."""
        return None if self.pid is not None or self._process is None else self._process.returncode

    @property
    def attrs(self) -> dict[str, Any]:
        attrs = super().attrs
        attrs["Config"]["Cmd"] = self._command
        attrs["Config"]["Env"] = [f"{key}={value}" for key, value in (self._env or {}).items()]
        attrs["State"]["ExitCode"] = self.exit_code or 0
        return attrs

    def wait(self, timeout: float | None = None) -> dict[str, int | None]:
        """Wait for it to exit by itself. Raises `TimeoutError`."""
        poll_until(lambda: self.pid is None, timeout, f"{self.name} to exit")
        return {"StatusCode": self.exit_code}

    def _start(self) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _stop(self, timeout: float) -> None:
        pid = self.pid
        if pid is None:
            return
        if timeout > 0:
            os.kill(pid, signal.SIGTERM)
            with suppress(TimeoutError):
                poll_until(self._has_exited, timeout, f"{self.name} to exit")
        self._kill_hard()

    def _kill_hard(self) -> None:
        if not self._has_exited():
            assert self._process is not None
            # Not reaped yet, so the number is still this process's, and its group's.
            os.killpg(self._process.pid, signal.SIGKILL)
            poll_until(self._has_exited, None, f"{self.name} to exit")

    def _has_exited(self) -> bool:
        """Whether the main process has exited; the rest of its group is ended first."""
        process = self._process
        if process is None or process.returncode is not None:
            return True
        with suppress(psutil.NoSuchProcess):  # reaped by somebody else
            if psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
                return False
        # While the zombie is not reaped no other process can get its number. Without members left
        # macOS answers EPERM.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


class LocalRedis(LocalNode):
    """An embedded Redis. Its port and its data outlive kills and restarts."""

    def __init__(self, data_dir: Path, *, name: str = "redis", port: int | None = None) -> None:
        super().__init__(name)
        self._data_dir = data_dir
        self.redis = EmbeddedRedis(data_dir, port=port)

    @property
    def log_path(self) -> Path:
        return self.redis.log_path

    @property
    def pid(self) -> int | None:
        return self.redis.pid

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.redis.port,)

    def _start(self) -> None:
        self.redis.start()

    def _stop(self, timeout: float) -> None:
        if timeout > 0:
            self.redis.stop()
        else:
            self.redis.kill()

    def _kill_hard(self) -> None:
        self.redis.kill()


class LocalContainer(CeleryTestContainer):
    """`CeleryTestContainer` over a local node."""

    _container: LocalNode

    def __init__(self, node: LocalNode) -> None:
        super().__init__(node)

    @property
    def pid(self) -> int | None:
        return self._container.pid

    def logs(self) -> str:
        # The last character may be half written.
        return self._container.logs().decode(errors="replace")

    def recent_logs(self) -> str:
        """What it printed since its latest start."""
        return self._container.recent_logs().decode(errors="replace")

    def get_open_tcp_ports(self) -> list[str]:
        """Of its own ports, those that accept connections: there is no netstat to run inside."""
        return [str(port) for port in self._container.ports if _accepts(port)]

    def _wait_ready(self, timeout: int = 60) -> bool:
        prompt = self.ready_prompt
        deadline = time.monotonic() + timeout
        while prompt is not None and prompt not in self.recent_logs():
            # Asked in this order, since it may print the prompt and exit between two looks.
            if self.status != "running" and prompt not in self.recent_logs():
                raise ContainerFailed(
                    self, f"{self.name} exited before it was ready:\n{self.recent_logs()}"
                )
            if time.monotonic() > deadline:
                raise ContainerNotReady(
                    self, f"{self.name} was not ready within {timeout} s:\n{self.recent_logs()}"
                )
            time.sleep(_POLL)
        return True

    def teardown(self) -> None:
        """Called once for the node and once for its cluster; the second finds nothing to do."""
        self._container.remove()


C = TypeVar("C", bound=LocalContainer)


class LocalRedisContainer(LocalContainer):
    """Has the interface of pytest-celery's `RedisContainer`; `url` and `host_url` are the same."""

    _container: LocalRedis

    @classmethod
    def launch(cls, data_dir: Path, *, name: str = "redis", port: int | None = None) -> Self:
        """A Redis that is ready."""
        node = LocalRedis(data_dir, name=name, port=port)
        node.start()
        return _ready(cls(node))

    @property
    def client(self) -> Redis:
        return Redis.from_url(self.host_url, decode_responses=True)

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "host_url": self.host_url,
            "hostname": self.hostname,
            "port": self.port,
            "vhost": self.vhost,
        }

    @property
    def url(self) -> str:
        return f"{self.prefix()}{self.hostname}:{self.port}/{self.vhost}"

    @property
    def host_url(self) -> str:
        return self.url

    @property
    def hostname(self) -> str:
        return HOST

    @property
    def port(self) -> int:
        return self._container.redis.port

    @property
    def vhost(self) -> str:
        return "0"

    @classmethod
    def prefix(cls) -> str:
        return "redis://"

    @classmethod
    def version(cls) -> str:
        """Of the binary, such as "7.2.4"."""
        said = subprocess.run(
            [str(find_server()), "--version"], capture_output=True, text=True, check=True
        ).stdout
        match = re.search(r"v=([\w.]+)", said)
        return match[1] if match else said.strip()

    @property
    def ready_prompt(self) -> str:
        return "Ready to accept connections"


class LocalWorkerContainer(LocalContainer):
    """A recallq worker; has what `CeleryTestWorker` asks of a `CeleryWorkerContainer`."""

    _container: LocalProcess

    @classmethod
    def command(
        cls, *args: str, debugpy: bool = False, wait_for_client: bool = True, **kwargs: Any
    ) -> list[str]:
        return [sys.executable, "-m", "recallq_worker", *args]

    @classmethod
    def launch(
        cls,
        directory: Path,
        *args: str,
        env: Mapping[str, str] | None = None,
        name: str = "worker",
        wait: bool = True,
    ) -> Self:
        """A worker that is ready, or with `wait` False merely started; logs to `directory`.

        `env` is added to this process's environment without its own RECALLQ_* variables, so that
        a developer's settings do not decide what is tested.
        """
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("RECALLQ_")
        }
        node = LocalProcess(
            cls.command(*args),
            log_path=directory / f"{name}.log",
            env={**inherited, "PYTHONUNBUFFERED": "1", **(env or {})},
            name=name,
        )
        node.start()
        container = cls(node)
        return _ready(container) if wait else container

    @property
    def exit_code(self) -> int | None:
        """Of the latest run, negative for a signal; None while it runs."""
        return self._container.exit_code

    def wait(self, timeout: float | None = None) -> None:
        """Wait for it to exit by itself. Raises `TimeoutError`."""
        self._container.wait(timeout)

    @property
    def ready_prompt(self) -> str:
        return "recallq worker ready"

    @classmethod
    def version(cls) -> str:
        return str(celery.__version__)

    @classmethod
    def log_level(cls) -> str:
        return "INFO"

    @classmethod
    def worker_name(cls) -> str:
        return "recallq"

    @classmethod
    def worker_queue(cls) -> str:
        return Lane.LIVE.queue()


def poll_until(condition: Callable[[], bool], timeout: float | None, what: str) -> None:
    """Return when `condition` holds; `TimeoutError` after `timeout` seconds, None for never."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(_POLL)


def _ready(container: C) -> C:
    """Wait until it is ready; one that never is leaves nothing running."""
    try:
        poll_until(container.ready, _READY_TIMEOUT, f"{container.name} to be ready")
    except BaseException:
        container.teardown()
        raise
    return container


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
