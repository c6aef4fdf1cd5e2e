"""Old and new side by side: nothing is lost while a fleet is upgraded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from recallq import Lane, MemoryClient, contract
from recallq.cli.doctor import _judge_workers
from recallq.contract import PROTOCOL_VERSION
from recallq.keys import Keys
from recallq.workers import WorkerInfo
from recallq_worker.ledger import WorkerLedger
from recallq_worker.slow_ledger import SlowLedger
from tests.support import Worker, eventually, redis_at

StartWorker = Callable[..., Worker]
NEXT = PROTOCOL_VERSION + 1


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        yield memory


@pytest.fixture
def of_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process speak the next protocol."""
    monkeypatch.setattr(contract, "PROTOCOL_VERSION", NEXT)


async def texts(client: MemoryClient, user: str) -> list[str]:
    return [each.text for each in await client.list_memory(user, {"page_size": 1000})]


async def test_old_workers_leave_what_they_cannot_read_to_newer_ones(
    client: MemoryClient, start_worker: StartWorker, of_tomorrow: None
) -> None:
    old = await asyncio.to_thread(start_worker)
    handles = [await client.submit_add("ann", f"line {n}") for n in range(5)]

    async def left() -> bool:
        return "left to newer workers (protocol version 2" in old.output

    await eventually(left)
    assert not any([(await handle.status()).settled for handle in handles])
    new = await asyncio.to_thread(lambda: start_worker(backend="tomorrow"))
    assert {each.protocol for each in await client.workers()} == {PROTOCOL_VERSION, NEXT}
    await asyncio.to_thread(old.stop)
    for handle in handles:
        assert (await handle.result(60)).added == 1
    assert await texts(client, "ann") == [f"line {n}" for n in range(5)]
    assert await client.dead_letters.count() == 0
    state = await client.transport.fleet()
    assert all(lane.outstanding == 0 for lane in state.lanes)
    assert new.is_alive()
    assert old.output.count("left to newer workers") <= 3  # now and then is enough


async def test_an_operation_that_is_not_known_yet_is_left_as_well(
    client: MemoryClient, start_worker: StartWorker, of_tomorrow: None
) -> None:
    handle = await client.submit_add("ann", "tea")
    queue = Lane.LIVE.queue(client.settings.namespace)
    async with redis_at(client.settings.redis_url) as redis:
        message = cast("bytes", await redis.rpop(queue))
        await redis.lpush(queue, message.replace(b"recallq.add", b"recallq.sum"))
    old = await asyncio.to_thread(start_worker)

    async def left() -> bool:
        return "left to newer workers" in old.output

    await eventually(left)
    assert not (await handle.status()).settled
    assert await client.dead_letters.count() == 0


async def test_many_that_are_left_do_not_keep_a_worker_from_all_else(
    client: MemoryClient, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(start_worker)
    monkeypatch.setattr(contract, "PROTOCOL_VERSION", NEXT)
    for _ in range(1000):  # a batch each
        await client.submit_add("ann", "tea")
    monkeypatch.setattr(contract, "PROTOCOL_VERSION", PROTOCOL_VERSION)
    await client.search("bob", "tea")  # behind them, for once
    for _ in range(20):
        await asyncio.sleep(0.3)
        await client.search("bob", "tea", timeout=20)


async def test_new_workers_serve_old_clients(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    await asyncio.to_thread(lambda: start_worker(backend="tomorrow"))
    assert (await client.add_memory("ann", "tea")).added == 1
    assert await texts(client, "ann") == ["tea"]


async def test_a_call_waits_no_longer_than_its_timeout_for_a_newer_worker(
    client: MemoryClient, start_worker: StartWorker, of_tomorrow: None
) -> None:
    await asyncio.to_thread(start_worker)
    handle = await client.submit_add("ann", "tea", timeout=1)
    with pytest.raises(TimeoutError):
        await client.list_memory("ann", timeout=1)
    assert await handle.cancel()


async def test_old_workers_leave_users_in_the_slow_lane_to_newer_ones(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    live = await asyncio.to_thread(
        lambda: start_worker(backend="tomorrows_extractor", lanes="live,bulk")
    )
    old = await asyncio.to_thread(lambda: start_worker(backend="extractor", lanes="slow"))
    handles = [await client.submit_add("ann", f"line {n}") for n in range(5)]

    async def left() -> bool:
        return "users in the slow lane are left to newer workers (protocol version 2" in old.output

    await eventually(left)
    await asyncio.sleep(2.5)  # until it has looked again
    assert not any([(await handle.status()).settled for handle in handles])
    await asyncio.to_thread(lambda: start_worker(backend="tomorrows_extractor", lanes="slow"))
    for handle in handles:
        await handle.result(60)
    assert await texts(client, "ann") == [f"line {n}" for n in range(5)]
    assert await client.dead_letters.count() == 0
    assert old.output.count("left to newer workers") <= 3
    # Nothing is left of it: older workers serve the user again.
    await asyncio.to_thread(live.stop)
    await asyncio.to_thread(lambda: start_worker(backend="extractor", lanes="live,bulk"))
    assert (await client.add_memory("ann", "tea")).added == 1


async def test_users_who_are_left_do_not_keep_a_worker_from_others(
    client: MemoryClient, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(namespace)
    async with redis_at(client.settings.redis_url) as redis:

        async def all_are_due() -> None:
            for tag in await redis.zrange(keys.slow, 0, -1):
                await redis.zadd(keys.slow, {cast("bytes", tag): 0})

        ledger = SlowLedger(
            redis, keys, WorkerLedger(redis, redis, redis, keys, "w1", one_step=True)
        )
        for n in range(50):
            tag = keys.user_tag("default", f"ann {n}")
            await redis.zadd(keys.slow, {tag: n})
            await redis.zadd(keys.waiting(tag), {"job": n})
            await redis.hset(keys.pending(tag), "job", "a|1|batch|0|s\n{")
            if n < 45:
                await redis.hset(keys.turn(tag), "v", NEXT)
        taken = await ledger.take(3, 10)
        assert [each.tag for each in taken.turns] == [
            keys.user_tag("default", f"ann {n}") for n in (45, 46, 47)
        ]
        assert taken.newest == NEXT
        taken = await ledger.take(10, 10)
        assert (len(taken.turns), taken.newest) == (2, 0)
        assert taken.wait is not None
        assert 0 < taken.wait <= 2
        monkeypatch.setattr(contract, "PROTOCOL_VERSION", NEXT)
        await all_are_due()
        assert len((await ledger.take(100, 10)).turns) == 50
        monkeypatch.setattr(contract, "PROTOCOL_VERSION", PROTOCOL_VERSION)
        await all_are_due()
        # What a newer worker had in its hands, it may have written to.
        taken = await ledger.take(100, 10)
        assert (len(taken.turns), taken.newest) == (0, NEXT)


@pytest.mark.parametrize(
    ("today", "tomorrow"), [("redis", "tomorrow"), ("extractor", "tomorrows_extractor")]
)
async def test_a_rolling_upgrade_loses_nothing(
    client: MemoryClient,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
    today: str,
    tomorrow: str,
) -> None:
    """Workers first, one after the other, then clients, with work under way all the time."""
    olds = [await asyncio.to_thread(lambda: start_worker(backend=today)) for _ in range(2)]
    handles = []
    for step in range(6):
        handles += [await client.submit_add("ann", f"{step} {n:02}") for n in range(30)]
        if step in (1, 2):
            await asyncio.to_thread(lambda: start_worker(backend=tomorrow))
            await asyncio.to_thread(olds.pop().stop)
        if step == 3:
            monkeypatch.setattr(contract, "PROTOCOL_VERSION", NEXT)
    for handle in handles:
        await handle.result(60)
    assert await texts(client, "ann") == [f"{s} {n:02}" for s in range(6) for n in range(30)]
    assert await client.dead_letters.count() == 0


def test_doctor_tells_of_workers_that_are_too_old() -> None:
    lanes = list(Lane)
    workers = [
        WorkerInfo(
            id=f"w{n}", host="h", pid=n, version="1", backend="redis", lanes=lanes, concurrency=8,
            started_at=0.0, protocol=PROTOCOL_VERSION - 1 + n,
        )
        for n in range(2)
    ]  # fmt: skip
    told = {each.check: each for each in _judge_workers(workers)}["protocol"]
    assert (told.state, told.detail[:16]) == ("warning", "1 of 2 workers d")
    assert "h-0" in told.detail
    told = {each.check: each for each in _judge_workers(workers[:1])}["protocol"]
    assert told.state == "failed"
    assert all(each.check != "protocol" for each in _judge_workers(workers[1:]))
