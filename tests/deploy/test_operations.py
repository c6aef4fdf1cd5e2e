"""What the page for operators says, done: a backup, a restore, and what that means."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from recallq import MemoryClient
from recallq.embedded import find_server
from tests.deploy.files import ALERTS, DEPLOY, ROOT, variables
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
