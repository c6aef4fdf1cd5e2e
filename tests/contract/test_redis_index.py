"""The index of the redis backend: kept by any number of workers, of any version, that may die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import zlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import orjson
import pytest

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable
from recallq.redis_client import RedisClient
from recallq_worker.backends.base import Added, Record
from recallq_worker.backends.redis import RedisStore, rebuilding
from recallq_worker.backends.redis import index as index_module
from recallq_worker.backends.redis.index_storage import IndexKeys, IndexStorage
from recallq_worker.backends.redis.values import to_value
from recallq_worker.backends.redis.weighing import weighed
from recallq_worker.reindexing import reindex
from recallq_worker.search import upkeep
from recallq_worker.settings import WorkerSettings
from tests.contract.store_conformance import record
from tests.support import eventually, redis_at


@asynccontextmanager
async def opened(redis_url: str, namespace: str, **options: Any) -> AsyncIterator[RedisStore]:
    store = RedisStore(redis_url, namespace=namespace, **options)
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


@pytest.fixture
async def store(redis_url: str, namespace: str) -> AsyncIterator[RedisStore]:
    async with opened(redis_url, namespace) as store:
        yield store


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a segment of every eight messages."""
    monkeypatch.setattr(upkeep, "ENTRIES", 8)


async def found(store: RedisStore, user: str, query: str, session: str | None = None) -> list[str]:
    hits = await store.search(
        Scope("default", user, session), query, top_k=1000, score_threshold=None
    )
    return [hit.record.record_id for hit in hits]


async def is_sound(store: RedisStore, user: str) -> bool:
    """Whether the index has just the messages that there are."""
    return await store._index.is_sound(store._base("default", user))


async def everything(redis_url: str, namespace: str) -> str:
    """All that is in Redis, in readable form: what is compressed is unpacked."""
    pieces: list[bytes] = []
    async with redis_at(redis_url) as redis:
        async for key in redis.scan_iter(f"{namespace}:*"):
            pieces.append(key)
            match await redis.type(key):
                case b"hash":
                    for field, value in (await fields_of(redis, key)).items():
                        pieces += [field, value]
                        if value[:1] == b"\x78":
                            pieces.append(zlib.decompress(value))
                case b"zset":
                    pieces += cast("list[bytes]", await redis.zrange(key, 0, -1))
                case _:
                    pieces.append(cast("bytes | None", await redis.get(key)) or b"")
    return b"\n".join(pieces).decode(errors="replace")


async def fields_of(redis: RedisClient, key: str) -> dict[bytes, bytes]:
    return cast("dict[bytes, bytes]", await redis.hgetall(key))


async def segments(redis_url: str, namespace: str, user: str) -> dict[str, int]:
    """Names of the segments, and how many messages each has."""
    async with redis_at(redis_url) as redis:
        index = await fields_of(redis, f"{namespace}:m:{{default/{user}}}:i")
    return {
        name[1:].decode(): int(about.split()[0])
        for name, about in index.items()
        if name.startswith(b"s")
    }


class Pause:
    """Lets a store come as far as putting a new segment in its place, and no further."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: RedisStore) -> None:
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        replace = IndexStorage.replace

        async def later(storage: IndexStorage, *args: Any, **more: Any) -> bool:
            if storage is store._index._storage:
                self.reached.set()
                await self.over.wait()
            return await replace(storage, *args, **more)

        monkeypatch.setattr(IndexStorage, "replace", later)


class TestGrowing:
    async def test_entries_become_segments_and_everything_is_found(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        added = [record(user, f"tea number{n} of many", session=f"s{n // 50}") for n in range(1200)]
        for start in range(0, len(added), 40):
            await store.add(added[start : start + 40])
        await store.settled()
        sizes = await segments(redis_url, namespace, user)
        assert 1 <= len(sizes) <= 8
        assert sum(sizes.values()) > 1000
        assert await is_sound(store, user)
        for number in (0, 3, 777, 1199):
            assert (await found(store, user, f"number{number}"))[0] == added[number].record_id
        assert len(await found(store, user, "tea", "s3")) == 50
        newest = await store.search(Scope("default", user), "tea", top_k=3, score_threshold=None)
        assert [hit.record for hit in newest] == added[:-4:-1], "ties by recency"

    async def test_a_part_of_a_word_is_found_wherever_it_is(
        self, store: RedisStore, small_segments: None, user: str
    ) -> None:
        await store.add([record(user, f"filler {n}") for n in range(8)])
        await store.settled()
        await store.add([record(user, "Strawberries from order B-77123", record_id="a")])
        assert await found(store, user, "awberr") == ["a"], "among what is new"
        await store.add([record(user, f"filler {n}") for n in range(8, 24)])
        await store.settled()
        assert await found(store, user, "awberr") == ["a"], "in a segment"
        assert await found(store, user, "7712") == ["a"]
        assert await found(store, user, "b-7712") == ["a"]

    async def test_adding_again_enters_nothing_again(
        self, store: RedisStore, small_segments: None, user: str
    ) -> None:
        added = [record(user, f"tea {n}") for n in range(20)]
        for _ in range(3):
            await store.add(added)
            await store.settled()
        assert await is_sound(store, user)
        assert len(await found(store, user, "tea")) == 20

    async def test_messages_of_one_add_are_in_their_order(
        self, store: RedisStore, small_segments: None, user: str
    ) -> None:
        job = [record(user, "tea", order=7, record_id=f"j-{n:05x}") for n in range(30)]
        await store.add(job)
        await store.settled()
        assert await found(store, user, "tea") == [each.record_id for each in reversed(job)]

    async def test_hostile_ids_and_texts(
        self, store: RedisStore, small_segments: None, user: str
    ) -> None:
        odd = ['"', "\\", "\n", "[]", "a\0b", "é", "👩‍👧", " ", "x" * 300]
        await store.add(
            [record(user, "tea \ud7ff \uffff \0", record_id=each, session=each) for each in odd]
        )
        await store.settled()
        assert sorted(await found(store, user, "tea")) == sorted(odd)
        for each in odd:
            assert await found(store, user, "tea", each) == [each]


async def entries(redis_url: str, namespace: str, user: str) -> dict[bytes, bytes]:
    async with redis_at(redis_url) as redis:
        return await fields_of(redis, f"{namespace}:m:{{default/{user}}}:e")


class TestWhatIsNew:
    """Records get their entries from whoever searches first."""

    async def test_the_first_search_makes_the_entries_for_all(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add([record(user, f"tea {n}", record_id=f"r{n}") for n in range(20)])
        assert set((await entries(redis_url, namespace, user)).values()) == {b""}
        assert await found(store, user, "7") == ["r7"]
        await store.settled()
        made = await entries(redis_url, namespace, user)
        assert len(made) == 20
        assert all(made.values())
        async with opened(redis_url, namespace) as another:
            assert await found(another, user, "8") == ["r8"]
            await another.settled()
        assert await entries(redis_url, namespace, user) == made

    async def test_searches_of_one_worker_see_what_others_add_and_remove(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        scope = Scope("default", user, "s")
        await store.add([record(user, "tea", record_id="a", session="s", epoch=1)])
        assert await found(store, user, "tea") == ["a"]
        async with opened(redis_url, namespace) as another:
            await another.add([record(user, "tea", record_id="b", session="s", epoch=1)])
            assert await found(store, user, "tea") == ["b", "a"]
            # Before all others, so that the newest message stays the same.
            first = record(user, "tea", record_id="c", session="s", epoch=1)
            await another.add([replace(first, order=1)])
            assert await found(store, user, "tea") == ["b", "a", "c"]
            await another.delete(scope, before_epoch=2)
            assert await found(store, user, "tea") == []
            await another.add([record(user, "coffee", record_id="a", session="s", epoch=3)])
            assert await found(store, user, "tea") == []
            assert await found(store, user, "coffee") == ["a"]

    async def test_a_session_that_is_trimmed_is_seen_as_it_is(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace, max_messages_per_session=3) as store:
            for n in range(10):
                await store.add([record(user, f"tea {n}", record_id=f"r{n}", session="s")])
                wanted = [f"r{k}" for k in range(n, max(n - 3, -1), -1)]
                assert await found(store, user, "tea") == wanted

    async def test_what_was_made_of_a_deleted_record_is_not_kept_for_another(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        """A search that read a record before it was deleted ends after its id is back."""
        await store.add([record(user, "tea", record_id="a", epoch=1)])
        keys = IndexKeys(store._base("default", user))
        async with redis_at(redis_url) as redis:
            generation = await cast("Awaitable[bytes]", redis.hget(keys.own[0], "g"))
        await store.delete(Scope("default", user), before_epoch=2)
        await store.add([record(user, "coffee", record_id="a", epoch=3)])
        [(_, stale, _)] = weighed([(b"a", to_value(record(user, "tea")))])
        store._index.fill(keys.base, generation, {b"a": stale})
        await store.settled()
        assert await entries(redis_url, namespace, user) == {b"a": b""}
        assert await found(store, user, "tea") == []
        assert await found(store, user, "coffee") == ["a"]

    async def test_large_messages_do_not_hold_up_the_event_loop(
        self, store: RedisStore, user: str
    ) -> None:
        words = " ".join(f"word{n}" for n in range(60_000))
        await store.add([record(user, f"{words} {n}", record_id=f"r{n}") for n in range(4)])
        longest, over = 0.0, asyncio.Event()

        async def look() -> None:
            nonlocal longest
            loop = asyncio.get_running_loop()
            while not over.is_set():
                before = loop.time()
                await asyncio.sleep(0.001)
                longest = max(longest, loop.time() - before)

        looking = asyncio.create_task(look())
        assert len(await found(store, user, "word7")) == 4
        over.set()
        await looking
        assert longest < 0.5

    async def test_large_records_are_not_kept_in_memory(self, store: RedisStore, user: str) -> None:
        large = {"role": "user", "content": "tea", "image": "x" * 100_000}
        await store.add([record(user, message=large, record_id="large")])
        await store.add([record(user, "tea", record_id="small")])
        for _ in range(2):
            assert set(await found(store, user, "tea")) == {"large", "small"}
        entered = store._remembered.entered_of(store._base("default", user))
        assert entered is not None
        assert set(entered.records) == {b"small"}

    async def test_a_ttl_that_is_taken_back_holds_for_no_session(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with (
            opened(redis_url, namespace, ttl=100) as mortal,
            opened(redis_url, namespace) as store,
            redis_at(redis_url) as redis,
        ):
            await mortal.add([record(user, "tea", session=f"s{n}") for n in range(3)])
            await store.add([record(user, "tea", session="s0")])
            async for key in redis.scan_iter(f"{namespace}:m:{{default/{user}}}:*"):
                assert await redis.pttl(key) == -1, key

    async def test_what_is_fenced_off_leaves_nothing_behind(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.delete(Scope("default", user), before_epoch=9)
        assert await store.add([record(user, "tea", epoch=8)]) == [Added.FENCED]
        async with redis_at(redis_url) as redis:
            left = [key async for key in redis.scan_iter(f"{namespace}:m:{{default/{user}}}:*")]
        assert left == [f"{namespace}:m:{{default/{user}}}:f".encode()]

    async def test_an_add_into_thousands_of_sessions(self, store: RedisStore, user: str) -> None:
        many = [record(user, "tea", session=f"s{n}") for n in range(9_000)]
        assert await store.add(many) == [Added.NEW] * len(many)


class TestTogether:
    async def test_searches_and_pages_side_by_side_survive_a_server_without_scripts(
        self, store: RedisStore, redis_url: str, user: str
    ) -> None:
        await store.add([record(user, f"tea {n}", record_id=f"r{n:02}") for n in range(30)])
        async with redis_at(redis_url) as redis:
            await redis.script_flush()
        scope = Scope("default", user)
        pages = [store.list(scope, offset=n, limit=1) for n in range(30)]
        searches = [found(store, user, str(n)) for n in range(30)]
        listed, answers = await asyncio.gather(asyncio.gather(*pages), asyncio.gather(*searches))
        assert [page[0].record_id for page in listed] == [f"r{n:02}" for n in range(30)]
        assert answers == [[f"r{n:02}"] for n in range(30)]

    async def test_who_gives_up_takes_nobody_along(self, store: RedisStore, user: str) -> None:
        await store.add([record(user, "tea", record_id="a")])
        asked = [asyncio.create_task(found(store, user, "tea")) for _ in range(20)]
        await asyncio.sleep(0)
        for task in asked[::2]:
            task.cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in answers[::2])
        assert answers[1::2] == [["a"]] * 10

    async def test_one_that_fails_fails_alone(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add([record(user, "tea", record_id="a")])
        async with redis_at(redis_url) as redis:
            await redis.set(f"{namespace}:m:{{default/odd}}:o", "not a sorted set")
        good, bad = await asyncio.gather(
            found(store, user, "tea"), found(store, "odd", "tea"), return_exceptions=True
        )
        assert good == ["a"]
        assert isinstance(bad, BackendError)
        assert "tea" not in str(bad)


class TestDeleting:
    async def test_nothing_is_left_of_what_was_deleted(
        self, store: RedisStore, small_segments: None, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add(
            [
                record(user, f"tea xylophone{n} zebra{n}", session=f"s{n % 3}", record_id=f"id{n}z")
                for n in range(60)
            ]
        )
        await store.settled()
        assert await store.delete(Scope("default", user, "s1"), before_epoch=1) == 20
        left = await everything(redis_url, namespace)
        for number in range(60):
            deleted = number % 3 == 1
            for trace in (f"id{number}z", f"xylophone{number}", f"zebra{number}"):
                assert (f"{trace}\n" in left + "\n" or f'"{trace}"' in left) != deleted, trace
        assert len(await found(store, user, "tea")) == 40
        assert await is_sound(store, user)
        await store.delete(Scope("default", user), before_epoch=2)
        left = await everything(redis_url, namespace)
        assert left.split("\n") == [f"{namespace}:m:{{default/{user}}}:f", "*", "2"]

    async def test_deleting_a_session_of_many_does_not_touch_the_segments_of_others(
        self, store: RedisStore, small_segments: None, redis_url: str, namespace: str, user: str
    ) -> None:
        for number in range(3):
            await store.add([record(user, "tea", session=f"s{number}") for _ in range(8)])
            await store.settled()
        before = await segments(redis_url, namespace, user)
        await store.delete(Scope("default", user, "s1"), before_epoch=1)
        after = await segments(redis_url, namespace, user)
        assert len(before) == 3
        assert len(after) == 2
        assert after.items() < before.items()

    @pytest.mark.parametrize("whole_user", [False, True])
    async def test_a_frozen_worker_brings_nothing_back(
        self,
        redis_url: str,
        namespace: str,
        user: str,
        small_segments: None,
        monkeypatch: pytest.MonkeyPatch,
        whole_user: bool,
    ) -> None:
        """It has read what is to become a segment, and goes on after a delete by another."""
        async with opened(redis_url, namespace) as frozen, opened(redis_url, namespace) as other:
            monkeypatch.setattr(index_module, "_LOCK_PATIENCE", 0.05)
            pause = Pause(monkeypatch, frozen)
            await frozen.add([record(user, "tea secretword", session="a") for _ in range(8)])
            await pause.reached.wait()
            await other.add([record(user, "tea kept", session="b", record_id="kept", epoch=1)])
            scope = Scope("default", user, None if whole_user else "a")
            assert await other.delete(scope, before_epoch=1) == 8
            pause.over.set()
            await frozen.settled()
            assert await found(other, user, "tea") == ["kept"]
            assert "secretword" not in await everything(redis_url, namespace)
            assert await is_sound(other, user)

    async def test_a_rebuild_that_was_under_way_brings_nothing_back(
        self,
        redis_url: str,
        namespace: str,
        user: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with opened(redis_url, namespace) as frozen, opened(redis_url, namespace) as other:
            monkeypatch.setattr(index_module, "_LOCK_PATIENCE", 0.05)
            await frozen.add([record(user, "tea secretword", session="a") for _ in range(8)])
            await frozen.add([record(user, "tea kept", session="b", record_id="kept")])
            pause = Pause(monkeypatch, frozen)
            rebuilding = asyncio.create_task(
                frozen.reindex(frozen._base("default", user), anyway=True)
            )
            await pause.reached.wait()
            await other.delete(Scope("default", user, "a"), before_epoch=1)
            pause.over.set()
            await rebuilding
            assert await found(other, user, "tea") == ["kept"]
            assert "secretword" not in await everything(redis_url, namespace)

    async def test_what_is_trimmed_is_forgotten_in_time(
        self, redis_url: str, namespace: str, user: str, small_segments: None
    ) -> None:
        async with opened(redis_url, namespace, max_messages_per_session=10) as store:
            for number in range(100):
                await store.add([record(user, f"tea word{number}x")])
            await store.settled()
            assert await is_sound(store, user)
            assert len(await found(store, user, "tea")) == 10
            assert await found(store, user, "word3x") == []
            sizes = await segments(redis_url, namespace, user)
            assert sum(sizes.values()) <= 30, "not everything that was ever there"


class TestTrouble:
    async def test_an_index_of_another_version_is_made_anew_by_whoever_searches(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add([record(user, f"tea {n}") for n in range(300)])
        await store.settled()
        base = f"{namespace}:m:{{default/{user}}}"
        async with redis_at(redis_url) as redis:
            await redis.hset(f"{base}:i", mapping={"v": "0", "sold": "9 0 0 1"})
            await redis.hset(f"{base}:n:old", "x", "not a segment")
        assert len(await found(store, user, "tea")) == 300
        assert await is_sound(store, user)
        async with redis_at(redis_url) as redis:
            assert not await redis.exists(f"{base}:n:old")

    async def test_records_of_before_there_was_an_index(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        """And an add that comes before anybody searches."""
        await store.add([record(user, f"tea {n}") for n in range(20)])
        base = f"{namespace}:m:{{default/{user}}}"
        async with redis_at(redis_url) as redis:
            await redis.delete(f"{base}:i", f"{base}:e")
        await store.add([record(user, "tea 20")])
        await store.settled()
        assert await is_sound(store, user), "the add saw to it"
        assert len(await found(store, user, "tea")) == 21

    async def test_what_a_worker_of_before_adds_and_removes_is_noticed(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        """It runs beside this one while a fleet is brought up to date, and knows no index."""
        await store.add([record(user, f"tea {n}", record_id=f"r{n}") for n in range(5)])
        base = f"{namespace}:m:{{default/{user}}}"
        value = orjson.dumps([0, 1, "s", {"role": "user", "content": "tea unseen"}])
        async with redis_at(redis_url) as redis:
            await redis.zadd(f"{base}:o", {"x": 1})
            await redis.zadd(f"{base}:s:s", {"x": 1})
            await redis.hset(f"{base}:r", "x", value)
        assert await found(store, user, "unseen") == ["x"]
        async with redis_at(redis_url) as redis:
            for key in ("o", "s:s"):
                await redis.zrem(f"{base}:{key}", "r1")
            await redis.hdel(f"{base}:r", "r1")
        assert "r1" not in await found(store, user, "tea")
        assert await is_sound(store, user)

    @pytest.mark.parametrize("field", [b"s", b"o", b"v", b"d0", b"b0", None])
    async def test_a_damaged_segment_is_made_anew(
        self,
        store: RedisStore,
        small_segments: None,
        redis_url: str,
        namespace: str,
        user: str,
        field: bytes | None,
    ) -> None:
        """One field of it, or all of it is gone."""
        await store.add([record(user, f"tea {n}") for n in range(8)])
        await store.settled()
        (name,) = await segments(redis_url, namespace, user)
        key = f"{namespace}:m:{{default/{user}}}:n:{name}"
        async with redis_at(redis_url) as redis:
            if field is None:
                await redis.delete(key)
            else:
                await redis.hset(key, field, b"\xff\xff" if field == b"b0" else b"torn")
        for _ in range(20):  # and whoever merges it finds out, too
            await store.add([record(user, "tea", epoch=0)])
            await store.settled()
        assert len(await found(store, user, "tea")) == 28
        assert len(await found(store, user, "te")) == 28

    async def test_a_segment_that_nobody_put_in_place_expires(
        self,
        redis_url: str,
        namespace: str,
        user: str,
        small_segments: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Its maker died between the two steps; the next add sees to the entries."""

        async def die(self: IndexStorage, *_: Any, **__: Any) -> bool:
            raise SystemError("killed")

        async with opened(redis_url, namespace) as store:
            with monkeypatch.context() as patched:
                patched.setattr(IndexStorage, "replace", die)
                patched.setattr(IndexStorage, "drop", lambda *_: asyncio.sleep(0))
                await store.add([record(user, f"tea {n}") for n in range(8)])
                await store.settled()
            async with redis_at(redis_url) as redis:
                keys = [key async for key in redis.scan_iter(f"{namespace}:m:*:n:*")]
                assert len(keys) == 1
                assert 0 < await redis.ttl(keys[0]) <= 3600
                await redis.delete(f"{namespace}:m:{{default/{user}}}:l")
            await store.add([record(user, "tea 8")])
            await store.settled()
            assert sum((await segments(redis_url, namespace, user)).values()) == 9
            assert len(await found(store, user, "tea")) == 9

    async def test_a_ttl_holds_for_the_index(
        self, redis_url: str, namespace: str, user: str, small_segments: None
    ) -> None:
        async with opened(redis_url, namespace, ttl=3600) as store:
            async with redis_at(redis_url) as redis:
                seconds, _ = await redis.time()
            fresh = [record(user, "tea") for _ in range(20)]
            fresh = [
                Record(each.record_id, each.scope, seconds * 1_000_000 + n, 0, each.message)
                for n, each in enumerate(fresh)
            ]
            for each in fresh:
                await store.add([each])
                await store.settled()
            async with redis_at(redis_url) as redis:
                keys = [key async for key in redis.scan_iter(f"{namespace}:m:*")]
                assert any(b":n:" in key for key in keys)
                for key in keys:
                    assert 3500 < await redis.ttl(key) <= 3600, key
        async with opened(redis_url, namespace) as store:
            await store.add([record(user, "tea")])
            async with redis_at(redis_url) as redis:
                keys = [key async for key in redis.scan_iter(f"{namespace}:m:*")]
                assert [await redis.ttl(key) for key in keys if b":l" not in key[-2:]] == [
                    -1 for key in keys
                ], "without one, it is lifted everywhere"

    @pytest.mark.parametrize("seed", range(4))
    async def test_many_workers_and_a_user(
        self,
        seed: int,
        redis_url: str,
        namespace: str,
        user: str,
        small_segments: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Adds, deletes and searches at random by three of them; tending is cut off now and then.
        Whatever comes of it, searches find what is listed."""
        monkeypatch.setattr(index_module, "_LOCK_PATIENCE", 0.05)
        chance = random.Random(seed)
        epoch = 0

        async def work(store: RedisStore) -> None:
            nonlocal epoch
            for _ in range(60):
                dice = chance.random()
                session = f"s{chance.randrange(4)}"
                if dice < 0.75:
                    many = chance.choice((1, 1, 3, 9))
                    await store.add(
                        [
                            record(user, f"tea {n}", session=session, epoch=epoch)
                            for n in range(many)
                        ]
                    )
                elif dice < 0.85:
                    epoch += 1
                    scope = Scope("default", user, session if dice < 0.83 else None)
                    await store.delete(scope, before_epoch=epoch)
                elif dice < 0.9:
                    with contextlib.suppress(BackendUnavailable):  # others may be faster
                        await store.reindex(store._base("default", user), anyway=True)
                elif dice < 0.95:
                    for task in list(store._index._tending.values()):
                        task.cancel()
                else:
                    await found(store, user, "tea")

        async with (
            opened(redis_url, namespace) as one,
            opened(redis_url, namespace) as two,
            opened(redis_url, namespace) as three,
        ):
            await asyncio.gather(*(work(each) for each in (one, two, three)))
            for each in (one, two, three):
                await each.settled()
            assert await is_sound(one, user)
            records = await one.list(Scope("default", user), offset=0, limit=1000)
            listed = sorted(each.record_id for each in records)
            assert sorted(await found(two, user, "tea")) == listed
            await one._index.clean(one._base("default", user))
            assert sorted(await ids_in_the_index(redis_url, namespace, user)) == listed


async def ids_in_the_index(redis_url: str, namespace: str, user: str) -> list[str]:
    base = f"{namespace}:m:{{default/{user}}}"
    async with redis_at(redis_url) as redis:
        ids = [each.decode() for each in await fields_of(redis, f"{base}:e")]
        for name in await segments(redis_url, namespace, user):
            for field, value in (await fields_of(redis, f"{base}:n:{name}")).items():
                if field.startswith(b"d"):
                    ids += json.loads(value)
    return ids


class TestReindexing:
    def settings(self, redis_url: str, namespace: str, **more: Any) -> WorkerSettings:
        return WorkerSettings.load(redis_url=redis_url, namespace=namespace, **more)

    async def test_rebuilds_what_is_not_as_it_should_be(
        self, store: RedisStore, redis_url: str, namespace: str
    ) -> None:
        users = ["ann", "bob/x", "用户", "l" * 300]
        for each in users:
            await store.add([record(each, "tea") for _ in range(3)])
        async with redis_at(redis_url) as redis:
            for each in ("ann", "bob%2Fx"):
                await redis.hset(f"{namespace}:m:{{default/{each}}}:i", "v", "0")
        settings = self.settings(redis_url, namespace)
        seen: list[int] = []
        done = await reindex(settings, advance=lambda so_far: seen.append(so_far.users))
        assert (done.users, done.rebuilt, done.messages) == (4, 2, 6)
        assert seen == [1, 2, 3, 4]
        assert (await reindex(settings)).rebuilt == 0
        assert (await reindex(settings, everything=True)).rebuilt == 4
        alone = await reindex(settings, Scope("default", "ann"), everything=True)
        assert (alone.users, alone.rebuilt) == (1, 1)

    async def test_searches_go_on_while_a_sound_index_is_made_anew(
        self, store: RedisStore, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await store.add([record(user, f"tea {n}") for n in range(50)])
        pause = Pause(monkeypatch, store)
        rebuilding = asyncio.create_task(store.reindex(store._base("default", user), anyway=True))
        await pause.reached.wait()
        assert len(await found(store, user, "tea")) == 50
        assert await store.add([record(user, "tea meanwhile", record_id="new")]) == [Added.NEW]
        assert await found(store, user, "meanwhile") == ["new"]
        pause.over.set()
        assert await rebuilding == 50
        assert len(await found(store, user, "tea")) == 51
        assert await is_sound(store, user)

    async def test_many_messages_with_one_order_key(
        self, store: RedisStore, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rebuilding, "_PAGE", 10)
        await store.add([record(user, "tea", order=5) for _ in range(35)])
        await store.add([record(user, "tea") for _ in range(35)])
        assert await store.reindex(store._base("default", user), anyway=True) == 70
        assert len(await found(store, user, "tea")) == 70

    async def test_a_damaged_record_is_not_in_the_way(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add([record(user, f"tea {n}", record_id=f"r{n}") for n in range(3)])
        base = f"{namespace}:m:{{default/{user}}}"
        async with redis_at(redis_url) as redis:
            await redis.hset(f"{base}:r", "r1", "{torn")
            await redis.hset(f"{base}:i", "v", "0")
        assert sorted(await found(store, user, "tea")) == ["r0", "r2"]
        assert await is_sound(store, user), "else it would be made anew by every search"

    async def test_a_search_waits_for_a_rebuild_that_is_under_way(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        """Twenty at once make the index anew once, in each process."""
        async with opened(redis_url, namespace) as one, opened(redis_url, namespace) as two:
            await one.add([record(user, f"tea {n}") for n in range(200)])
            async with redis_at(redis_url) as redis:
                await redis.hset(f"{namespace}:m:{{default/{user}}}:i", "v", "0")
            searches: Sequence[list[str]] = await asyncio.gather(
                *(found(each, user, "tea") for each in (one, two) for _ in range(10))
            )
            assert {len(each) for each in searches} == {200}


async def test_an_idle_store_leaves_nothing_behind(
    redis_url: str, namespace: str, user: str, small_segments: None
) -> None:
    async with opened(redis_url, namespace) as store:
        await store.add([record(user, f"tea {n}") for n in range(50)])

    async def unlocked() -> bool:
        async with redis_at(redis_url) as redis:
            return not await redis.exists(f"{namespace}:m:{{default/{user}}}:l")

    await eventually(unlocked)
    async with opened(redis_url, namespace) as store:
        assert len(await found(store, user, "tea")) == 50


class TestIdsThatComeAgain:
    """Idempotency keys make the same ids of other texts, once what was there before is gone."""

    async def test_after_it_was_trimmed(
        self, redis_url: str, namespace: str, user: str, small_segments: None
    ) -> None:
        async with opened(redis_url, namespace, max_messages_per_session=8) as store:
            await store.add([record(user, "tea oldword", record_id="k")])
            await store.add([record(user, f"tea {n}") for n in range(8)])
            await store.settled()
            await store.add([record(user, "tea newword", record_id="k")])
            await store.add([record(user, f"tea {n}") for n in range(4)])
            await store.settled()
            assert await found(store, user, "newword") == ["k"]
            assert await found(store, user, "oldword") == []
            assert len(await found(store, user, "tea")) == 8
            assert await is_sound(store, user)

    async def test_while_another_worker_compacts_what_was_deleted(
        self,
        redis_url: str,
        namespace: str,
        user: str,
        small_segments: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with opened(redis_url, namespace) as slow, opened(redis_url, namespace) as other:
            monkeypatch.setattr(index_module, "_LOCK_PATIENCE", 0.05)
            pause = Pause(monkeypatch, slow)
            await slow.add([record(user, "tea oldword", record_id=f"k{n}") for n in range(8)])
            await pause.reached.wait()
            await other.delete(Scope("default", user, "s"), before_epoch=1)
            await other.add([record(user, "tea newword", record_id="k0", epoch=1)])
            pause.over.set()
            await slow.settled()
            await slow.add([record(user, f"tea {n}", epoch=1) for n in range(8)])
            await slow.settled()
            assert await found(other, user, "newword") == ["k0"]
            assert await found(other, user, "newwor") == ["k0"], "by a part of it, too"
            assert "oldword" not in await everything(redis_url, namespace)


class TestWorkersOfBefore:
    """They know no index, and run beside this version while a fleet is brought up to date."""

    async def test_one_that_adds_and_trims_in_one_step(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        """The number of records stays the same."""
        await store.add([record(user, f"tea {n}", record_id=f"r{n}") for n in range(5)])
        base = f"{namespace}:m:{{default/{user}}}"
        value = orjson.dumps([0, 2**52, "s", {"role": "user", "content": "tea unseen"}])
        async with redis_at(redis_url) as redis:
            for key in ("o", "s:s"):
                await redis.zadd(f"{base}:{key}", {"x": 2**52})
                await redis.zrem(f"{base}:{key}", "r0")
            await redis.hset(f"{base}:r", "x", value)
            await redis.hdel(f"{base}:r", "r0")
        await store.add([record(user, "tea after it", record_id="y", order=2**53)])
        await store.settled()
        assert await found(store, user, "unseen") == ["x"]
        assert "r0" not in await everything(redis_url, namespace)

    async def test_one_that_deletes_a_user(
        self, store: RedisStore, small_segments: None, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add([record(user, f"tea secretword {n}") for n in range(10)])
        await store.settled()
        base = f"{namespace}:m:{{default/{user}}}"
        async with redis_at(redis_url) as redis:
            await redis.delete(*(f"{base}:{key}" for key in ("r", "o", "x", "s:s")))
        settings = WorkerSettings.load(redis_url=redis_url, namespace=namespace)
        assert (await reindex(settings)).users == 1
        assert await everything(redis_url, namespace) == ""

    async def test_one_that_deletes_what_is_new(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        """Its entries are of nobody."""
        await store.add([record(user, "tea secretword", record_id="gone"), record(user, "tea")])
        base = f"{namespace}:m:{{default/{user}}}"
        async with redis_at(redis_url) as redis:
            for key in ("o", "s:s"):
                await redis.zrem(f"{base}:{key}", "gone")
            await redis.hdel(f"{base}:r", "gone")
        assert len(await found(store, user, "tea")) == 1
        left = await everything(redis_url, namespace)
        assert "gone" not in left

    async def test_a_delete_of_what_has_no_index_leaves_none(
        self, store: RedisStore, redis_url: str, namespace: str, user: str
    ) -> None:
        await store.add([record(user, "tea", record_id="id1z", session="a"), record(user)])
        base = f"{namespace}:m:{{default/{user}}}"
        async with redis_at(redis_url) as redis:
            await redis.delete(f"{base}:i", f"{base}:e")
        await store.delete(Scope("default", user, "a"), before_epoch=1)
        assert "id1z" not in await everything(redis_url, namespace)
        assert len(await found(store, user, "hello")) == 1


async def test_what_has_expired_hides_nothing_that_lives(
    redis_url: str, namespace: str, user: str
) -> None:
    """However many better matches there were."""
    async with redis_at(redis_url) as redis:
        seconds, _ = await redis.time()
    now = seconds * 1_000_000
    async with opened(redis_url, namespace) as before:
        await before.add(
            [
                Record(f"old{n}", Scope("default", user, "s"), now - 10**10 + n, 0, {
                    "role": "user", "content": "pizza",
                })
                for n in range(1500)
            ]
        )  # fmt: skip
    async with opened(redis_url, namespace, ttl=3600) as store:
        message = {"role": "user", "content": "a long time ago we had a large pizza with olives"}
        live = Record("live", Scope("default", user, "s"), now, 0, message)
        await store.add([live])
        await store.settled()
        assert await found(store, user, "pizza") == ["live"]


async def test_a_sweep_leaves_nothing_that_does_not_expire(
    redis_url: str, namespace: str, user: str
) -> None:
    async with opened(redis_url, namespace, ttl=3600) as store:
        async with redis_at(redis_url) as redis:
            seconds, _ = await redis.time()
        message = {"role": "user", "content": "tea"}
        for age in (4000, 10, 0):
            order = (seconds - age) * 1_000_000
            await store.add([Record(f"r{age}", Scope("default", user, "s"), order, 0, message)])
        async with redis_at(redis_url) as redis:
            for key in [key async for key in redis.scan_iter(f"{namespace}:m:*")]:
                assert await redis.ttl(key) > 3500, key


async def test_a_record_that_is_no_record(
    store: RedisStore, redis_url: str, namespace: str, user: str
) -> None:
    values = ['[1,2,"s",null]', "[1,2,3,{}]", '["1",2,"s",{}]', '[1,1e99,"s",{}]', "{}", "[]"]
    await store.add([record(user, "tea", record_id=f"r{n}") for n in range(len(values) + 1)])
    base = f"{namespace}:m:{{default/{user}}}"
    async with redis_at(redis_url) as redis:
        for number, value in enumerate(values):
            await redis.hset(f"{base}:r", f"r{number}", value)
        await redis.hset(f"{base}:i", "v", "0")
    assert await found(store, user, "tea") == [f"r{len(values)}"]
    assert await store.delete(Scope("default", user), before_epoch=2) == len(values) + 1


async def test_a_damaged_record_of_a_segment_can_be_deleted(
    store: RedisStore, small_segments: None, redis_url: str, namespace: str, user: str
) -> None:
    """Nobody knows its session any more."""
    await store.add([record(user, f"tea word{n}x", record_id=f"id{n}z") for n in range(8)])
    await store.add([record(user, "tea", record_id="kept", session="t")])
    await store.settled()
    async with redis_at(redis_url) as redis:
        await redis.hset(f"{namespace}:m:{{default/{user}}}:r", "id3z", "{torn")
    await store.delete(Scope("default", user, "s"), before_epoch=1)
    left = await everything(redis_url, namespace)
    assert "id3z" not in left
    assert "word3x" not in left
    assert await found(store, user, "tea") == ["kept"]


async def test_forms_of_a_word_go_with_who_said_them(
    store: RedisStore, small_segments: None, redis_url: str, namespace: str, user: str
) -> None:
    await store.add([record(user, "we are divorcing", session="a")])
    await store.add([record(user, "about a divorce", session="b") for _ in range(7)])
    await store.settled()
    await store.delete(Scope("default", user, "a"), before_epoch=1)
    assert "divorcing" not in await everything(redis_url, namespace)
    assert len(await found(store, user, "divor")) == 7


async def test_more_entries_than_a_segment_holds(
    store: RedisStore, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the one who sees to them is frozen, and holds the lock."""
    monkeypatch.setattr(index_module, "_MOST_MERGED", 50)
    monkeypatch.setattr(upkeep, "ENTRIES", 8)
    monkeypatch.setattr(store._index, "notice", lambda *_, **__: None)
    added = [record(user, f"tea word{n}x") for n in range(500)]
    await store.add(added)
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "_MOST_MERGED", 50)
    await store.add([record(user, "tea")])
    await store.settled()
    assert await is_sound(store, user)
    for number in (0, 60, 499):
        assert (await found(store, user, f"word{number}x"))[0] == added[number].record_id
