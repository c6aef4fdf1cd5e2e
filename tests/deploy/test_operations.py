"""What the page for operators says, done: a backup, a restore, and what that means."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from recallq import MemoryClient
from recallq.embedded import find_server
from tests.deploy import tools
from tests.deploy.files import ALERTS, DEPLOY, LANES, ROOT, variables
from tests.secure_redis import tls_server
from tests.support import Worker, clean_environment, wait_or_kill

CONFIGURATION = DEPLOY / "redis" / "redis.conf"


@contextmanager
def redis_in(directory: Path, *options: str) -> Iterator[str]:
    """A Redis with our configuration and its data there; its URL."""
    socket = directory / "redis.sock"
    own = ["--dir", str(directory), "--port", "0", "--unixsocket", str(socket)]
    process = subprocess.Popen(
        [str(find_server()), str(CONFIGURATION), *own, *options],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        with Redis(unix_socket_path=str(socket)) as redis:
            deadline = time.monotonic() + 20
            while True:
                try:
                    if not redis.info("persistence")["loading"]:
                        break
                except (RedisConnectionError, FileNotFoundError):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        wait_or_kill(process)


def back_up(url: str, data: Path, backup: Path) -> None:
    """As the page says: a snapshot, and when it is written a copy."""
    with Redis.from_url(url) as redis:
        before = redis.lastsave()
        time.sleep(max(0.0, before.timestamp() + 1.1 - time.time()))  # it counts whole seconds
        redis.bgsave()
        while redis.lastsave() == before:
            time.sleep(0.02)
    shutil.copy(data / "dump.rdb", backup)


def restore(backup: Path, data: Path) -> None:
    """As the page says, into a directory without an append-only file."""
    shutil.copy(backup, data / "dump.rdb")
    with redis_in(data, "--appendonly", "no") as url, Redis.from_url(url) as redis:
        redis.config_set("appendonly", "yes")
        while True:
            info = redis.info("persistence")
            unwritten = info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]
            if info["aof_enabled"] and not unwritten:
                break
            time.sleep(0.02)


async def test_a_backup_and_a_restore(tmp_path: Path) -> None:
    old, new, backup = tmp_path / "old", tmp_path / "new", tmp_path / "backup.rdb"
    old.mkdir()
    new.mkdir()
    with redis_in(old) as url:
        async with MemoryClient(url, namespace="kept", timeout=30) as client:
            with Worker(url, namespace="kept"):
                await client.add_memory("ann", "tea")
                await client.add_memory("bob", "milk")
            # Nobody runs it before the backup.
            waiting = await client.submit_add("ann", "coffee", idempotency_key="k1")
            back_up(url, old, backup)
            with Worker(url, namespace="kept"):
                await waiting.result(30)
                later = await client.submit_add("ann", "water", idempotency_key="k2")
                await later.result(30)
                await client.delete_memory("bob")
                assert await client.list_memory("bob") == []
    restore(backup, new)
    with redis_in(new) as url, Worker(url, namespace="kept"):
        async with MemoryClient(url, namespace="kept", timeout=30) as client:
            # What was outstanding then ran again; under its key, it acts once.
            await client.add_memory("ann", "coffee", idempotency_key="k1")
            # What was accepted since is gone, and is submitted again under its key.
            await client.add_memory("ann", "water", idempotency_key="k2")
            await client.add_memory("ann", "water", idempotency_key="k2")
            said = [each.text for each in await client.list_memory("ann")]
            assert sorted(said) == ["coffee", "tea", "water"]
            # A deletion since then is undone.
            assert len(await client.list_memory("bob")) == 1


# --- the commands for compose ---------------------------------------------------------------------


def commands(first: str) -> str:
    """The block of commands on the page that begins with `first`."""
    page = (DEPLOY / "operations.md").read_text()
    (block,) = re.findall(rf"^( +){re.escape(first)}(.*\n(?:\1.*\n)*)", page, re.MULTILINE)
    return textwrap.dedent(block[0] + first + block[1])


DOCKER = """#!{python}
# Does what is asked of `redis` with a Redis on this machine, and notes what is asked of others.
import os, subprocess, sys, time

arguments = [each.replace("/data", "{data}") for each in sys.argv[1:]]
arguments = [each.replace("/usr/local/etc/redis", "{configuration}") for each in arguments]
with open("{log}", "a") as log:
    print(*arguments, file=log)
if arguments[:1] == ["compose"]:
    arguments = arguments[1:]
what, *arguments = arguments
while arguments and arguments[0].startswith("-"):
    arguments = arguments[2 if arguments[0] == "--name" else 1:]
if what == "cp":
    sys.exit(subprocess.call(["cp", arguments[0].removeprefix("redis:"), arguments[1]]))
if what == "stop":
    password = {{"REDISCLI_AUTH": os.environ["REDIS_PASSWORD"]}} if "redis" in arguments else {{}}
    sys.exit(subprocess.call(["redis-cli", "SHUTDOWN"], env=os.environ | password))
if what == "up" and "redis" in arguments:
    arguments = ["redis", "redis-server", "{configuration}/redis.conf", "--requirepass", "secret"]
if not arguments or arguments[0] not in ("redis", "recallq-restore"):
    sys.exit()
if arguments[1] != "redis-server":
    sys.exit(subprocess.call(arguments[1:]))
quiet = subprocess.DEVNULL
subprocess.Popen(arguments[1:], stdin=quiet, stdout=quiet, stderr=quiet)
while not subprocess.run(["redis-cli", "PING"], capture_output=True).stdout.startswith(
    (b"PONG", b"NOAUTH")
):
    time.sleep(0.05)
"""


class Machine:
    """One that has a `docker` of its own, whose Redis is a process in `directory`."""

    def __init__(self, directory: Path) -> None:
        binary, environment = tls_server()  # as the compose file has: after Redis 6
        self._log, programs = directory / "log", directory / "bin"
        self.data = directory / "data"
        for each in (programs, self.data):
            each.mkdir()
        socket = directory / "redis.sock"
        own = f"--port 0 --unixsocket {socket} --dir {self.data}"
        scripts = {
            "redis-server": f'#!/bin/sh\nexec {binary} "$@" {own}\n',
            "redis-cli": f'#!/bin/sh\nexec {binary.with_name("redis-cli")} -s {socket} "$@"\n',
            "docker": DOCKER.format(
                python=sys.executable,
                data=self.data,
                configuration=CONFIGURATION.parent,
                log=self._log,
            ),
        }
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._directory = directory
        self._environment = clean_environment(
            REDIS_PASSWORD="secret", PATH=f"{programs}:{os.environ['PATH']}", **environment
        )

    def run(self, script: str) -> str:
        run = subprocess.run(
            ["sh", "-e", "-c", script],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    @property
    def asked(self) -> list[str]:
        """What was asked of docker."""
        return self._log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    found.run("REDISCLI_AUTH=secret redis-cli SHUTDOWN NOSAVE || true")


def test_the_commands_for_compose_back_up_and_restore(machine: Machine) -> None:
    backup = commands("ask() {")
    ask = backup.splitlines()[0]
    machine.run("docker compose up --detach redis")
    machine.run(f"{ask}; ask SET a old; sleep 1.1")  # LASTSAVE counts whole seconds
    said = machine.run(backup.replace("\ndocker compose cp", "\nsleep 1; docker compose cp"))
    assert "Background saving started" in said
    (copy,) = machine.data.parent.glob("recallq-*.rdb")
    machine.run(f"{ask}; ask SET a new; ask SET b new")

    script = commands("docker compose stop worker-live").replace("recallq-DATE.rdb", copy.name)
    wait = "while ! redis-cli INFO persistence | grep aof_rewrite_in_progress:0; do sleep 0.1; done"
    script = script.replace("docker stop recallq-restore", f"{wait}\ndocker stop recallq-restore")
    machine.run(script)
    assert "aof_enabled:1" in machine.run(f"{ask}; ask INFO persistence")
    assert machine.run(f"{ask}; ask GET a; ask EXISTS b").split() == ["old", "0"]
    assert (machine.data / "appendonlydir.old").is_dir()
    (started,) = [each for each in machine.asked if "--appendonly no" in each]
    assert "--bind 127.0.0.1" in started  # no client comes in, for there is no password


def test_the_commands_name_what_compose_has() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    stopped = commands("docker compose stop worker-live").splitlines()[0].split()[3:]
    assert {f"worker-{lane}" for lane in LANES} | {"redis"} <= set(stopped) <= services.keys()
    mounted = [each.split(":")[1] for each in services["redis"]["volumes"]]
    assert mounted == ["/data", "/usr/local/etc/redis/redis.conf"]
    page = (DEPLOY / "operations.md").read_text().replace("\\\n", " ")
    for verb, options in re.findall(r"docker compose (\w+)((?: +--?[\w-]+)*)", page):
        told = subprocess.run(
            [*tools.docker_compose(), verb, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in options.split():
            assert re.search(rf"(^|[ ,]){option}\b", told, re.MULTILINE), f"{verb} {option}"


def test_units_are_restarted_one_at_a_time(tmp_path: Path) -> None:
    """With a systemctl that says what it is asked for."""
    units = [rf"recallq-worker@{each}.service" for each in ("live", "live:2", r"live\x2cbulk")]
    (tmp_path / "units").write_text("".join(f"{each} loaded active running x\n" for each in units))
    for name, script in {
        "systemctl": 'case "$1" in list-units) cat units;; *) cat; echo "$@" >> log;; esac',
        "sleep": 'echo "sleep $@" >> log',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(
        ["sh", "-c", commands("systemctl list-units")],
        cwd=tmp_path,
        env=clean_environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
        check=True,
    )
    wanted = [line for unit in units for line in (f"restart {unit}", "sleep 15")]
    assert (tmp_path / "log").read_text().splitlines() == wanted


# --- and the rest ---------------------------------------------------------------------------------


def test_a_snapshot_is_not_read_beside_an_append_only_file(tmp_path: Path) -> None:
    """Why a restore has these steps."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    with redis_in(old) as url, Redis.from_url(url) as redis:
        redis.set("a", "1")
        back_up(url, old, new / "dump.rdb")
    with redis_in(new) as url, Redis.from_url(url) as redis:
        assert redis.get("a") is None


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*")), ids=lambda path: path.name)
def test_variables_that_are_named_exist(path: Path) -> None:
    if not path.is_file() or path.suffix == ".json":
        return
    named = set(re.findall(r"\bRECALLQ_[A-Z0-9_]*[A-Z0-9]\b(?!_?\*)", path.read_text()))
    # Beginnings of names, as in `RECALLQ_EMBEDDING_*`, and the tests' own.
    whole = {name for name in named if not re.search(rf"{name}_\*", path.read_text())}
    assert {name for name in whole if not name.startswith("RECALLQ_TEST_")} <= variables()


def test_the_page_speaks_of_what_there_is() -> None:
    page = (DEPLOY / "operations.md").read_text()
    for named in re.findall(r"`((?:helm|kubernetes|systemd|redis|prometheus)/[^` ]+)`", page):
        assert (DEPLOY / named).exists(), named
    for named in re.findall(r"`([\w-]+\.(?:md|yaml))`", page):
        assert (DEPLOY / named).exists() or (ROOT / named).exists() or named == "values.yaml", named
    for named in re.findall(r"\b(RecallQ[A-Z]\w+)\b", page):
        assert f"alert: {named}\n" in ALERTS.read_text(), named
