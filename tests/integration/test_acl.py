"""The users that deploy/redis/users.acl gives a fleet: all they need, and nothing besides."""

# mypy: allow-untyped-calls

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from recallq import AccessDenied, BackendError, JobState, MemoryClient
from recallq.embedded import find_server
from recallq.redis_client import NO_INTRODUCTION
from tests.deploy.flower import ask as ask_flower
from tests.deploy.flower import flower_for
from tests.secure_redis import (
    ADMIN,
    CLIENT,
    RULES,
    WORKER,
    Certificates,
    SecureRedis,
    tls_server,
    users_file,
)
from tests.support import PATIENCE, RECALLQ, Shell, Worker, clean_environment, eventually

PASSWORD = "a password of the test"
SERVERS = ["embedded", "tls"]
"""The oldest Redis that is supported, and the newest at hand, which is Debian's."""


class Guarded:
    """A server with these users, and their URLs."""

    def __init__(self, server: SecureRedis, **options: Any) -> None:
        self.client = server.url(CLIENT, PASSWORD, **options)
        self.worker = server.url(WORKER, PASSWORD, **options)
        self.admin = server.admin(ADMIN, PASSWORD, **options)
        # What the tests' own backends count with.
        self.admin.execute_command("ACL", "SETUSER", WORKER, "+incrby")

    def as_user(self, url: str) -> redis.Redis:
        return redis.Redis.from_url(url, **NO_INTRODUCTION)

    def denied(self) -> list[tuple[Any, ...]]:
        """What was refused since this was asked last."""
        log: Any = self.admin.acl_log()
        self.admin.acl_log_reset()
        fields = ("username", "reason", "context", "object")
        return [tuple(each[field] for field in fields) for each in log]


@pytest.fixture(scope="module", params=SERVERS)
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    users = users_file(directory, password=PASSWORD)
    if request.param == "embedded":
        with SecureRedis(directory / "redis", binary=find_server(), users=users) as server:
            yield Guarded(server)
        return
    binary, environment = tls_server()
    certificates = Certificates(directory)
    with SecureRedis(
        directory / "redis",
        binary=binary,
        environment=environment,
        certificate=certificates.issue("server", "127.0.0.1"),
        users=users,
    ) as server:
        yield Guarded(server, ssl_ca_certs=certificates.ca)


once = pytest.mark.parametrize("guarded", ["tls"], indirect=True)
"""For what takes long."""


async def use(url: str, hound: str = "hound") -> None:
    user = f"a friend of the {hound}"
    async with MemoryClient(url, timeout=PATIENCE) as client:
        assert (await client.add_memory(user, "my dog barks", "s")).added == 1
        for lane in ("live", "bulk"):
            await client.add_memory(user, "tea", "s", idempotency_key="k", lane=lane)
        assert [each.text for each in await client.list_memory(user)] == ["my dog barks", "tea"]
        assert (await client.search_memory(user, hound))[0].text == "my dog barks"
        deleted = await client.submit_delete(user, "s", idempotency_key="k")
        assert (await deleted.result(PATIENCE)).removed == 2
        assert await deleted.status() is JobState.SUCCEEDED
        assert (await client.delete_memory(user)).removed == 0
        await (await client.submit_add("bob", "coffee")).cancel()
        assert await client.health(timeout=PATIENCE)


async def fail(guarded: Guarded, worker: Worker) -> None:
    """Dead letters, jobs that are tried again, and those of a worker that was killed."""
    async with MemoryClient(guarded.client, timeout=PATIENCE) as client:
        with pytest.raises(BackendError):
            await client.add_memory("ann", "refuse this")
        with pytest.raises(BackendError):
            await client.add_memory("bob", "refuse this")
        replayed, purged = await client.dead_letters.list()
        assert await client.dead_letters.list("ann") == [replayed]
        guarded.admin.set("recallq:allowed", 1)
        assert (await (await client.dead_letters.replay(replayed)).result(PATIENCE)).added == 1
        await client.dead_letters.purge(purged.id)
        guarded.admin.lpush("recallq.live", b"no message")
        assert (await client.add_memory("ann", "fail 1 times")).added == 1
        await eventually(lambda: _is(client, letters=1))
        handle = await client.submit_add("ann", "sleep 100")
        await eventually(lambda: _is(client, letters=1, running=handle.id))
        worker.kill()


async def _is(client: MemoryClient, letters: int, running: str | None = None) -> bool:
    if running and await client.handle(running).status() is not JobState.RUNNING:
        return False
    return await client.dead_letters.count() == letters


async def extract(url: str) -> None:
    async with MemoryClient(url, timeout=PATIENCE) as client:
        for key in ("k1", "k2", "k1"):
            await client.add_memory("eve", f"same ids {key}", idempotency_key=key)
        with pytest.raises(BackendError):
            await client.add_memory("eve", "refuse")
        assert (await client.add_memory("eve", "fail 1 times")).added == 1
        assert (await client.delete_memory("eve")).removed == 3


class TestWhatIsNeeded:
    """All of it works, and the server has refused nothing meanwhile."""

    @once
    def test_memories_with_vectors_and_all_commands(self, guarded: Guarded, tmp_path: Path) -> None:
        vectors = {
            "search_strategy": "hybrid",
            "embedding_provider": "callable",
            "embedding_callable": "word_vectors:embed",
            "embedding_dimensions": "256",
        }
        with Worker(guarded.worker, **vectors) as worker:  # type: ignore[arg-type]
            asyncio.run(use(guarded.client))
            lines = tmp_path / "log.jsonl"
            lines.write_bytes(
                b'{"user_id": "zoe", "session_id": "s", "role": "user", "content": "fresh bread"}\n'
            )
            shell = Shell(tmp_path, RECALLQ_REDIS_URL=guarded.client)
            shell("ingest", str(lines))
            assert "memory backend" in shell("doctor").stdout
            assert "slow lane" in shell("status").stdout
            run = subprocess.run(
                [RECALLQ, "reindex", "--all"],
                env=clean_environment(
                    RECALLQ_REDIS_URL=guarded.worker,
                    PYTHONPATH=worker._environment["PYTHONPATH"],
                    **{f"RECALLQ_{name.upper()}": value for name, value in vectors.items()},
                ),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert run.returncode == 0, run.stderr
            ping = subprocess.run(
                [sys.executable, "-m", "celery", "-A", "recallq_worker", "inspect", "ping"],
                env=worker._environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert "pong" in ping.stdout, ping.stderr
            assert "Traceback" not in worker.output
        assert guarded.denied() == []

    def test_memories(self, guarded: Guarded) -> None:
        with Worker(guarded.worker):
            asyncio.run(use(guarded.client, hound="dog"))
        assert guarded.denied() == []

    def test_failures_and_takeovers(self, guarded: Guarded) -> None:
        trying = {"retry_base": 0.1, "backend": "slow_redis"}
        with Worker(guarded.worker, **trying) as worker:  # type: ignore[arg-type]
            asyncio.run(fail(guarded, worker))
        # What was taken from it goes into its queue, and to another.
        with Worker(guarded.worker) as worker:
            deadline = time.monotonic() + PATIENCE
            while guarded.admin.exists("recallq:outstanding"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert guarded.denied() == []

    @once
    def test_extraction(self, guarded: Guarded) -> None:
        with Worker(guarded.worker, backend="extractor", retry_base=0.1) as worker:
            asyncio.run(extract(guarded.client))
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
        assert guarded.denied() == []

    def test_events(self, guarded: Guarded) -> None:
        """Of workers that tell of their batches, heard by a receiver that is the same user."""
        with Worker(guarded.worker, events="true") as worker:
            receiver = subprocess.Popen(
                [sys.executable, "-c", RECEIVER],
                env=worker._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                assert receiver.stdout is not None
                heard = {receiver.stdout.readline().strip()}  # it listens: of a worker that lives
                asyncio.run(ask(guarded.client))
                told, trouble = receiver.communicate(timeout=PATIENCE)
            finally:
                receiver.kill()
            heard |= set(told.split())
            assert {"worker-heartbeat", "task-received", "task-succeeded"} <= heard, trouble
            assert "Traceback" not in worker.output
        assert guarded.denied() == []

    @once
    def test_flower(self, guarded: Guarded) -> None:
        with Worker(guarded.worker, events="true") as worker, flower_for(worker) as address:

            async def is_shown() -> bool:
                tasks = await asyncio.to_thread(ask_flower, address, "/api/tasks") or {}
                return any(each["state"] == "SUCCESS" for each in tasks.values())

            asyncio.run(ask(guarded.client))
            asyncio.run(eventually(is_shown))
            (told,) = ask_flower(address, "/api/workers?refresh=1").values()
            assert told["stats"]["pid"] == worker.pid
        assert guarded.denied() == []

    @pytest.mark.parametrize(
        ("user", "packages"), [(CLIENT, ["producer"]), (WORKER, ["producer", "worker"])]
    )
    def test_what_scripts_call_is_allowed(self, user: str, packages: list[str]) -> None:
        """Also where no test comes by."""
        root = RULES.parents[2]
        sources = [path for each in packages for path in (root / each).rglob("*.py")]
        text = "".join(path.read_text() for path in sources)
        called = set(re.findall(r"redis\.call\('([A-Z]+)'", text))
        assert len(called) > 10
        allowed = set(re.findall(r"\+(\w+)", rules_of(user)))
        assert {each.lower() for each in called} <= allowed


def rules_of(user: str) -> str:
    return next(each for each in RULES.read_text().splitlines() if each.startswith(f"user {user} "))


FOR_NOBODY: list[tuple[str, ...]] = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "GET", "*"),
    ("KEYS", "*"),
    ("SHUTDOWN",),
    ("ACL", "LIST"),
    ("CLIENT", "LIST"),
    ("MONITOR",),
    ("SLAVEOF", "NO", "ONE"),
    ("MODULE", "LIST"),
    ("SCRIPT", "FLUSH"),
    ("GET", "other:secret"),
    ("LPUSH", "other.live", "x"),
    ("RENAME", "recallq:clock", "recallq:x"),
    ("EVAL", "return redis.call('GET', 'other:secret')", "0"),
    ("EVAL", "return redis.call('FLUSHALL')", "0"),
    ("PUBLISH", "/0.other.control.pidbox", "{}"),
    ("PUBLISH", "/0.other.events/task.multi", "{}"),
    ("PSUBSCRIBE", "/0.*"),
    ("SUBSCRIBE", "other:reply:x"),
]
NOT_FOR_CLIENTS: list[tuple[str, ...]] = [
    ("HGETALL", "recallq:m:{default/ann}:r"),  # memories: a client asks workers for them
    ("EVAL", "return redis.call('HGETALL', KEYS[1])", "1", "recallq:m:{default/ann}:r"),
    ("SCAN", "0"),
    ("BRPOP", "recallq.live", "1"),
    ("RPOP", "recallq.live"),
    ("PUBLISH", "/0.recallq.control.pidbox", "{}"),  # what stops workers
    ("PUBLISH", "/0.recallq.events/task.multi", "{}"),
    ("PSUBSCRIBE", "/0.recallq.events/*"),
    ("PUBLISH", "recallq:reply:0123456789abcdef", "x"),
    ("SADD", "_kombu.binding.recallq.control.pidbox", "x"),
]


class TestWhatIsRefused:
    @pytest.mark.parametrize("user", ["client", "worker"])
    def test_what_it_has_no_business_with(self, guarded: Guarded, user: str) -> None:
        guarded.admin.set("other:secret", "x")
        connection = guarded.as_user(getattr(guarded, user))
        for command in FOR_NOBODY + (NOT_FOR_CLIENTS if user == "client" else []):
            with pytest.raises(redis.ResponseError) as caught:
                connection.execute_command(*command)
            told = str(caught.value)
            assert re.search("permission|user executing the script can't", told), (command, told)
        connection.close()
        assert guarded.admin.get("other:secret") == b"x"
        assert guarded.denied()

    def test_nobody_comes_in_without_a_name(self, guarded: Guarded) -> None:
        url = re.sub(r"//[^@]*@", "//", guarded.client)
        with pytest.raises(redis.AuthenticationError):
            guarded.as_user(url).ping()
        guarded.denied()

    @once
    async def test_a_client_is_told_what_it_lacks(self, guarded: Guarded) -> None:
        async with MemoryClient(guarded.client, namespace="other") as client:
            with pytest.raises(AccessDenied, match=r"keys?.*users\.acl") as caught:
                await client.add_memory("ann", "the text of the message")
            assert PASSWORD not in str(caught.value) and "text of" not in str(caught.value)
        guarded.admin.execute_command("ACL", "SETUSER", CLIENT, "-zcard")
        try:
            async with MemoryClient(guarded.client) as client:
                with pytest.raises(AccessDenied, match=r"zcard.*users\.acl"):
                    await client.dead_letters.count()
        finally:
            guarded.admin.execute_command("ACL", "SETUSER", CLIENT, "+zcard")
        guarded.denied()

    @once
    def test_a_worker_is_told_what_it_lacks(self, guarded: Guarded) -> None:
        for url, namespace in ((guarded.client, "recallq"), (guarded.worker, "other")):
            run = subprocess.run(
                [sys.executable, "-m", "recallq_worker", "worker"],
                env=clean_environment(RECALLQ_REDIS_URL=url, RECALLQ_NAMESPACE=namespace),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert run.returncode == 1 and "users.acl" in run.stderr, run.stderr
            assert "Traceback" not in run.stderr and PASSWORD not in run.stderr
        guarded.denied()

    @once
    def test_a_worker_that_loses_a_right_says_so_and_goes_on_when_it_is_back(
        self, guarded: Guarded
    ) -> None:
        with Worker(guarded.worker) as worker:
            guarded.admin.execute_command("ACL", "SETUSER", WORKER, "-brpop")
            until(lambda: "Redis refuses what the worker needs" in worker.output)
            assert "users.acl" in worker.output
            guarded.admin.execute_command("ACL", "SETUSER", WORKER, "+brpop")
            asyncio.run(ask(guarded.client))
            assert worker.is_alive() and PASSWORD not in worker.output
        guarded.denied()


RECEIVER = """
from recallq_worker.app import app

with app.connection_for_read() as connection:
    receiver = app.events.Receiver(connection, handlers={"*": lambda event: None})

    def hear(event):
        print(event["type"], flush=True)
        receiver.should_stop = event["type"] == "task-succeeded"

    receiver.handlers = {"*": hear}
    receiver.capture()
"""
"""Prints the types of the events that it hears, until a batch has succeeded."""


async def ask(url: str) -> None:
    async with MemoryClient(url, timeout=PATIENCE) as client:
        await client.list_memory("ann")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
