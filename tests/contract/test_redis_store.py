"""The redis backend."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from recallq.contract import Scope
from recallq.embedded import EmbeddedRedis
from recallq.errors import BackendError, BackendUnavailable
from recallq_worker.backends.base import Added, Record
from recallq_worker.backends.redis import RedisStore
from tests.contract.store_conformance import FindsWords, record, texts
from tests.support import eventually, redis_at


@asynccontextmanager
async def opened(store: RedisStore) -> AsyncIterator[RedisStore]:
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


async def keys_of(redis_url: str, namespace: str) -> set[str]:
    async with redis_at(redis_url) as redis:
        return {key.decode() async for key in redis.scan_iter(f"{namespace}:*")}


async def commands_run(redis_url: str) -> Counter[str]:
    """Calls of each command so far, without those that connecting and looking cost."""
    async with redis_at(redis_url) as redis:
        stats = await redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
    ours = ("info", "hello", "client", "ping")
    return Counter({name: count for name, count in calls.items() if not name.startswith(ours)})


class TestRedisStore(FindsWords):
    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[RedisStore]:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            yield store

    async def test_two_processes_share_it(self, redis_url: str, namespace: str, user: str) -> None:
        one, two = (RedisStore(redis_url, namespace=namespace) for _ in range(2))
        async with opened(one), opened(two):
            await one.add([record(user, "tea")])
            assert texts(await two.list(Scope("default", user), offset=0, limit=9)) == ["tea"]
            assert await two.delete(Scope("default", user), before_epoch=1) == 1
            assert await one.list(Scope("default", user), offset=0, limit=9) == []

    async def test_a_deleted_user_leaves_only_a_fence_that_expires(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            await store.add([record(user, session=f"s{n}") for n in range(5)])
            assert len(await keys_of(redis_url, namespace)) == 5 + 5
            await store.delete(Scope("default", user, "s1"), before_epoch=1)
            await store.delete(Scope("default", user), before_epoch=2)
        (fence,) = await keys_of(redis_url, namespace)
        async with redis_at(redis_url) as redis:
            assert await redis.ttl(fence) > 0
            assert await redis.hgetall(fence) == {b"*": b"2"}

    async def test_keys_of_a_user_share_a_hash_tag(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            await store.add([record("}{:" + user, session="{odd}")])
            keys = await keys_of(redis_url, namespace)
        tags = {key[key.index("{") : key.index("}") + 1] for key in keys}
        assert len(tags) == 1
        assert "default/" in tags.pop()

    async def test_nothing_expires_unless_asked(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            await store.add([record(user)])
        async with redis_at(redis_url) as redis:
            lifetimes = [await redis.ttl(key) for key in await keys_of(redis_url, namespace)]
        assert lifetimes == [-1] * 6

    async def test_with_a_ttl_old_records_are_invisible_and_swept_out(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        """Order keys are submission times, so records of long ago can simply be made."""
        async with opened(RedisStore(redis_url, namespace=namespace, ttl=3600)) as store:
            now = await _now(redis_url)
            await store.add([_at(user, "ancient", now - 7200, "old")])
            await store.add([_at(user, "stale", now - 3700), _at(user, "fresh", now - 10)])
            scope = Scope("default", user)
            assert texts(await store.list(scope, offset=0, limit=9)) == ["fresh"]
            assert await store.list(scope, offset=1, limit=9) == []
            hits = await store.search(scope, "stale fresh", top_k=9, score_threshold=None)
            assert len(hits) == 1
            await store.add([_at(user, "newest", now)])
            base = f"{namespace}:m:{{default/{user}}}"
            async with redis_at(redis_url) as redis:
                assert await redis.hlen(f"{base}:r") == 2
                assert await redis.hkeys(f"{base}:x") == [b"s"]
                assert not await redis.exists(f"{base}:s:old")
                assert 3500 < await redis.ttl(f"{base}:r") <= 3600

    async def test_a_ttl_is_counted_by_the_clock_that_order_keys_have(
        self, redis_url: str, namespace: str, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A machine whose own is two hours ahead removes nothing that has yet to live."""
        ahead = time.time_ns() + 7200 * 10**9
        monkeypatch.setattr(time, "time", lambda: ahead / 10**9)
        monkeypatch.setattr(time, "time_ns", lambda: ahead)
        async with opened(RedisStore(redis_url, namespace=namespace, ttl=3600)) as store:
            now = await _now(redis_url)
            await store.add([_at(user, "fresh", now - 10)])
            await store.add([_at(user, "newest", now)])
            listed = await store.list(Scope("default", user), offset=0, limit=9)
            assert texts(listed) == ["fresh", "newest"]

    async def test_sessions_live_as_long_as_their_messages_when_the_ttl_is_another(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        """Else they could be neither listed nor deleted, and searches would find them."""
        scope = Scope("default", user, "early")
        async with opened(RedisStore(redis_url, namespace=namespace, ttl=2)) as store:
            await store.add([_at(user, "tea", await _now(redis_url), "early")])
        async with opened(RedisStore(redis_url, namespace=namespace, ttl=3600)) as store:
            await store.add([_at(user, "coffee", await _now(redis_url), "late")])
            await asyncio.sleep(2.2)
            assert texts(await store.list(scope, offset=0, limit=9)) == ["tea"]
            assert await store.delete(scope, before_epoch=1) == 1
            await store.add([_at(user, "milk", await _now(redis_url), "early")])
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            await store.add([_at(user, "juice", await _now(redis_url), "late")])
        async with opened(RedisStore(redis_url, namespace=namespace, ttl=1)) as store:
            await store.add([_at(user, "water", await _now(redis_url), "late")])

            async def gone() -> bool:
                left = await keys_of(redis_url, namespace)
                return all(key.endswith(":f") for key in left)  # the fence of the delete

            await eventually(gone)

    async def test_with_a_ttl_a_silent_user_vanishes(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace, ttl=1)) as store:
            await store.add([_at(user, "tea", await _now(redis_url))])
            assert await keys_of(redis_url, namespace)

            async def gone() -> bool:
                return not await keys_of(redis_url, namespace)

            await eventually(gone)

    async def test_keeps_the_newest_of_a_session(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        store = RedisStore(redis_url, namespace=namespace, max_messages_per_session=3)
        async with opened(store):
            await store.add([record(user, str(n)) for n in range(1500)])
            await store.add([record(user, "early", order=-5), record(user, "other", session="t")])
            found = await store.list(Scope("default", user), offset=0, limit=9)
            assert texts(found) == ["1497", "1498", "1499", "other"]
            async with redis_at(redis_url) as redis:
                assert await redis.hlen(f"{namespace}:m:{{default/{user}}}:r") == 4

    async def test_a_damaged_record_hides_no_other(
        self,
        redis_url: str,
        namespace: str,
        user: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            await store.add([record(user, "tea one", record_id="bad"), record(user, "tea two")])
            async with redis_at(redis_url) as redis:
                await redis.hset(f"{namespace}:m:{{default/{user}}}:r", "bad", "{torn")
            scope = Scope("default", user)
            assert texts(await store.list(scope, offset=0, limit=9)) == ["tea two"]
            hits = await store.search(scope, "tea", top_k=9, score_threshold=None)
            assert len(hits) == 1
            assert "damaged" in caplog.text
            await store.add([record(user, "tea three")])
            assert await store.delete(scope, before_epoch=1) == 3

    async def test_a_page_costs_one_command_wherever_it_is(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            await store.add([record(user, str(n)) for n in range(2000)])
            await store.settled()
            scope = Scope("default", user)
            await store.list(scope, offset=0, limit=1)  # loads the script
            for offset in (0, 1990):
                before = await commands_run(redis_url)
                await store.list(scope, offset=offset, limit=10)
                cost = await commands_run(redis_url) - before
                assert cost == {"evalsha": 1, "zrange": 1, "hmget": 1}

    async def test_survives_a_server_that_lost_its_scripts(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(RedisStore(redis_url, namespace=namespace)) as store:
            async with redis_at(redis_url) as redis:
                await redis.script_flush()
            assert await store.add([record(user)]) == [Added.NEW]

    async def test_says_where_it_failed_and_never_the_password(self, namespace: str) -> None:
        with EmbeddedRedis() as server:
            async with redis_at(server.url) as redis:
                await redis.config_set("requirepass", "another")
            store = RedisStore(
                server.url.replace("//", "//:geheim@"), namespace=namespace, connect_timeout=1
            )
            with pytest.raises(BackendError) as caught:
                await store.start()
            await store.stop()
            assert "geheim" not in str(caught.value)

    async def test_is_unwell_when_its_redis_is_gone(self, namespace: str, user: str) -> None:
        server = EmbeddedRedis()
        server.start()
        async with opened(RedisStore(server.url, namespace=namespace, connect_timeout=1)) as store:
            assert (await store.health()).ok
            server.stop()
            health = await store.health()
            assert not health.ok
            assert str(server.port) in health.detail
            with pytest.raises(BackendUnavailable):
                await store.add([record(user)])


async def _now(redis_url: str) -> int:
    async with redis_at(redis_url) as redis:
        seconds, _ = await redis.time()
        return int(seconds)


def _at(user: str, text: str, seconds: int, session: str = "s") -> Record:
    made = record(user, text, session=session)
    return Record(made.record_id, made.scope, seconds * 1_000_000, 0, made.message)
