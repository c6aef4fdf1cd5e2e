"""Vectors in Redis."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from recallq.embedded import EmbeddedRedis
from recallq.errors import BackendError, BackendUnavailable
from recallq_worker.backends.base import Added
from recallq_worker.vectors import NEVER_FENCED, RedisVectors, Row
from tests.contract.store_conformance import ids as hostile_ids
from tests.support import clean_environment

NEW, KNOWN, FENCED = Added.NEW, Added.KNOWN, Added.FENCED
EAST, NORTH, NORTHEAST, WEST = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 0.0, 0.0]

_numbers = itertools.count(1)


def row(
    row_id: str | None = None,
    text: str = "tea",
    *,
    order: int | None = None,
    epoch: int = 0,
    group: str = "g",
    **payload: Any,
) -> Row:
    number = next(_numbers)
    return Row(
        id=row_id or f"r{number:08d}",
        payload={"data": text, **payload},
        order=1_790_000_000_000_000 + (number if order is None else order),
        epoch=epoch,
        group=group,
    )


def ids_of(rows: list[Row]) -> list[str]:
    return [each.id for each in rows]


def hits_of(hits: list[tuple[Row, float]]) -> list[str]:
    return [each.id for each, _ in hits]


@pytest.fixture
def vectors(redis_url: str, namespace: str) -> Iterator[RedisVectors]:
    store = RedisVectors(redis_url, namespace, dimensions=3)
    yield store
    store.close()


@pytest.fixture
def others(redis_url: str, namespace: str) -> Iterator[RedisVectors]:
    """The same rows, as another process has them."""
    store = RedisVectors(redis_url, namespace, dimensions=3)
    yield store
    store.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Any]:
    with Redis.from_url(redis_url) as client:
        yield client


def keys_of(redis: Any, namespace: str) -> set[str]:
    return {key.decode() for key in redis.scan_iter(f"{namespace}:*")}


# --- write and read -----------------------------------------------------------------------------


def test_reads_what_was_written(vectors: RedisVectors, user: str) -> None:
    made = row("a", "é\n", deep={"x": [1, None, 2.5, "\n"]}, epoch=7, group="a group")
    assert vectors.upsert(user, [made], [EAST]) == [NEW]
    assert vectors.get(user, "a") == made
    assert vectors.get(user, "b") is None
    assert vectors.get(user + "2", "a") is None


def test_reads_many_in_the_order_asked(vectors: RedisVectors, user: str) -> None:
    vectors.upsert(user, [row("a"), row("b"), row("c")], [EAST] * 3)
    assert ids_of(vectors.get_many(user, ["c", "none", "a"])) == ["c", "a"]
    assert vectors.get_many(user, []) == []


def test_a_row_is_overwritten_where_it_is_known(
    vectors: RedisVectors, user: str, redis: Any, namespace: str
) -> None:
    assert vectors.upsert(user, [row("a", epoch=5)], [EAST]) == [NEW]
    moved = row("a", "moved", group="other", order=3, epoch=2)
    assert vectors.upsert(user, [moved, row("b"), moved], [NORTH] * 3) == [KNOWN, NEW, KNOWN]
    found = vectors.get(user, "a")
    assert found is not None
    assert (found.payload["data"], found.group, found.epoch) == ("moved", "other", 5)
    assert (vectors.count(user), vectors.count(user, "g"), vectors.count(user, "other")) == (
        2,
        1,
        1,
    )
    ((best, score),) = vectors.nearest(user, NORTH, top_k=1, group="other")
    assert (best.id, score) == ("a", 1.0)
    assert redis.zcard(f"{namespace}:{{{user}}}:c") == 2


def test_nothing_to_write(vectors: RedisVectors, user: str, redis: Any, namespace: str) -> None:
    assert vectors.upsert(user, [], []) == []
    assert vectors.remove(user, []) == 0
    assert keys_of(redis, namespace) == set()


def test_writes_in_portions(vectors: RedisVectors, user: str) -> None:
    made = [row(group=f"g{n % 7}") for n in range(1234)]
    assert vectors.upsert(user, made, np.ones((1234, 3), dtype=np.float32)) == [NEW] * 1234
    assert vectors.count(user) == 1234
    assert len(vectors.get_many(user, ids_of(made))) == 1234
    assert len(vectors.nearest(user, EAST, top_k=5000)) == 1234


def test_updates_the_vector_the_payload_or_both(vectors: RedisVectors, user: str) -> None:
    made = row("a", "old", epoch=3)
    vectors.upsert(user, [made], [EAST])
    assert vectors.update(user, "a", payload={"data": "new"})
    assert vectors.nearest(user, EAST, top_k=1)[0][1] == 1.0
    assert vectors.get(user, "a") == Row("a", {"data": "new"}, made.order, 3, "g")
    assert vectors.update(user, "a", vector=NORTH)
    assert vectors.nearest(user, NORTH, top_k=1)[0][1] == 1.0
    assert vectors.update(user, "a", vector=WEST, payload={})
    (found,) = vectors.nearest(user, WEST, top_k=1)
    assert found == (Row("a", {}, made.order, 3, "g"), 1.0)


def test_an_update_does_not_bring_back_what_was_deleted(
    vectors: RedisVectors, user: str, redis: Any, namespace: str
) -> None:
    vectors.upsert(user, [row("a")], [EAST])
    assert vectors.remove(user, ["a"]) == 1
    assert not vectors.update(user, "a", vector=NORTH, payload={"data": "again"})
    assert keys_of(redis, namespace) == set()


def test_updates_race_with_deletes(vectors: RedisVectors, user: str) -> None:
    made = [row(f"r{n}") for n in range(200)]
    vectors.upsert(user, made, [EAST] * 200)

    def update(row_id: str) -> None:
        vectors.update(user, row_id, vector=NORTH, payload={"data": "new"})

    with ThreadPoolExecutor(8) as threads:
        updates = [threads.submit(update, each.id) for each in made]
        removals = [threads.submit(vectors.remove, user, [each.id]) for each in made]
        assert sum(each.result() for each in removals) == 200
        for each in updates:
            each.result()
    assert vectors.count(user) == 0
    assert vectors.nearest(user, EAST, top_k=9) == []


def test_removes_by_id(vectors: RedisVectors, user: str, redis: Any, namespace: str) -> None:
    vectors.upsert(user, [row(f"r{n}", group=f"g{n % 2}") for n in range(1100)], [EAST] * 1100)
    assert vectors.remove(user, ["r0", "r0", "none"]) == 1
    assert vectors.count(user, "g0") == 549
    assert vectors.remove(user, [f"r{n}" for n in range(1100)]) == 1099
    assert keys_of(redis, namespace) == set()


# --- pages --------------------------------------------------------------------------------------


def test_pages_are_in_order_complete_and_do_not_overlap(vectors: RedisVectors, user: str) -> None:
    made = [row(f"r{n:05d}", order=n // 2) for n in range(2500)]
    vectors.upsert(user, made[::-1], [EAST] * 2500)
    assert vectors.page(user, group=None, offset=0, limit=9000) == made
    assert vectors.page(user, group=None, offset=990, limit=20) == made[990:1010]
    assert vectors.page(user, group="g", offset=2490, limit=20) == made[2490:]
    assert vectors.page(user, group="g", offset=2500, limit=20) == []
    assert vectors.page(user, group="none", offset=0, limit=20) == []
    assert vectors.page(user, group=None, offset=0, limit=0) == []


def test_a_page_costs_one_command_wherever_it_is(
    vectors: RedisVectors, user: str, redis: Any
) -> None:
    vectors.upsert(user, [row() for _ in range(2000)], [EAST] * 2000)
    vectors.page(user, group=None, offset=0, limit=1)  # loads the script
    for offset in (0, 1990):
        before = redis.info("commandstats")
        vectors.page(user, group=None, offset=offset, limit=10)
        after = redis.info("commandstats")
        cost = {name: each["calls"] - before.get(name, {}).get("calls", 0)
                for name, each in after.items() if name != "cmdstat_info"}  # fmt: skip
        assert {name: calls for name, calls in cost.items() if calls} == {
            "cmdstat_evalsha": 1, "cmdstat_zrange": 1, "cmdstat_hmget": 1,
        }  # fmt: skip


# --- nearest ------------------------------------------------------------------------------------


def test_the_most_similar_come_first(vectors: RedisVectors, user: str) -> None:
    vectors.upsert(
        user,
        [row("west"), row("northeast"), row("nowhere"), row("east"), row("far east")],
        [WEST, NORTHEAST, [0.0, 0.0, 0.0], EAST, [1e30, 0.0, 0.0]],
    )
    hits = vectors.nearest(user, [3.0, 0.0, 0.0], top_k=9)
    assert hits_of(hits) == ["far east", "east", "northeast", "nowhere", "west"]
    scores = [score for _, score in hits]
    assert scores == pytest.approx([1.0, 1.0, math.sqrt(0.5), 0.0, 0.0], abs=1e-6)
    assert hits_of(vectors.nearest(user, np.array(EAST), top_k=2)) == ["far east", "east"]
    assert vectors.nearest(user, EAST, top_k=0) == []
    assert vectors.nearest(user + "2", EAST, top_k=3) == []
    assert [score for _, score in vectors.nearest(user, [0, 0, 0], top_k=9)] == [0.0] * 5


def test_equally_similar_ones_come_newest_first(redis_url: str, namespace: str, user: str) -> None:
    """Wherever they stand in the matrix, which sums differently here and there."""
    vectors = RedisVectors(redis_url, namespace, dimensions=100)
    try:
        same = np.random.default_rng(7).standard_normal(100)
        made = [row(f"r{n:03d}", order=n // 2) for n in range(101)]
        vectors.upsert(user, made[::2] + made[1::2], [same] * 101)
        hits = vectors.nearest(user, same, top_k=101)
        assert hits_of(hits) == ids_of(made[::-1])
        assert {score for _, score in hits} == {1.0}
    finally:
        vectors.close()


def test_agrees_with_plain_arithmetic(redis_url: str, namespace: str, user: str) -> None:
    vectors = RedisVectors(redis_url, namespace, dimensions=64)
    try:
        random = np.random.default_rng(3)
        made, values = [row() for _ in range(700)], random.standard_normal((700, 64))
        vectors.upsert(user, made, values)
        wanted = random.standard_normal(64)
        cosines = values @ wanted / np.linalg.norm(values, axis=1) / np.linalg.norm(wanted)
        hits = vectors.nearest(user, wanted, top_k=20)
        assert hits_of(hits) == [made[at].id for at in np.argsort(-cosines)[:20]]
        assert [score for _, score in hits] == pytest.approx(np.sort(cosines)[::-1][:20], abs=1e-5)
    finally:
        vectors.close()


def test_searches_one_group_or_all_and_what_is_asked_for(vectors: RedisVectors, user: str) -> None:
    made = [row(f"r{n}", group=f"g{n % 3}", number=n) for n in range(300)]
    vectors.upsert(user, made, [EAST] * 300)
    assert hits_of(vectors.nearest(user, EAST, top_k=2, group="g1")) == ["r298", "r295"]
    assert vectors.nearest(user, EAST, top_k=2, group="none") == []

    def old(payload: dict[str, Any]) -> bool:
        return int(payload["number"]) < 5

    assert hits_of(vectors.nearest(user, EAST, top_k=3, where=old)) == ["r4", "r3", "r2"]
    assert hits_of(vectors.nearest(user, EAST, top_k=9, group="g1", where=old)) == ["r4", "r1"]
    assert hits_of(vectors.keywords(user, "tea", top_k=9, group="g1", where=old)) == ["r4", "r1"]


def test_others_writes_are_seen_at_once(
    vectors: RedisVectors, others: RedisVectors, user: str
) -> None:
    def seen() -> list[tuple[str, float]]:
        return [(each.id, score) for each, score in vectors.nearest(user, EAST, top_k=99)]

    def words() -> list[str]:
        return hits_of(vectors.keywords(user, "tea milk", top_k=99))

    assert (seen(), words()) == ([], [])
    others.upsert(user, [row("a"), row("b")], [EAST, NORTH])
    assert (seen(), words()) == ([("a", 1.0), ("b", 0.0)], ["b", "a"])
    others.update(user, "b", vector=[2, 0, 0], payload={"data": "water"})
    assert (seen(), words()) == ([("b", 1.0), ("a", 1.0)], ["a"])
    others.upsert(user, [row("c", group="x")], [EAST])
    others.remove(user, ["a"])
    assert (seen(), words()) == ([("c", 1.0), ("b", 1.0)], ["c"])
    others.upsert(user, [row("c", "milk", order=-1, group="y")], [NORTH])
    assert (seen(), words()) == ([("b", 1.0), ("c", 0.0)], ["c"])
    assert hits_of(vectors.nearest(user, EAST, top_k=9, group="y")) == ["c"]
    others.delete(user, group=None, before_epoch=1)
    assert (seen(), words()) == ([], [])
    others.upsert(user, [row("a", epoch=1)], [EAST])
    assert (seen(), words()) == ([("a", 1.0)], ["a"])


@pytest.mark.parametrize("count", [499, 500, 501, 1000, 1500])
def test_reads_in_portions_of_any_fit(
    vectors: RedisVectors, others: RedisVectors, user: str, count: int
) -> None:
    others.upsert(user, [row(f"r{n}") for n in range(count)], [EAST] * count)
    assert len(vectors.nearest(user, EAST, top_k=9999)) == count
    others.remove(user, [f"r{n}" for n in range(0, count, 2)])
    assert len(vectors.nearest(user, EAST, top_k=9999)) == count // 2
    others.upsert(user, [row(f"s{n}") for n in range(count)], [NORTH] * count)
    others.remove(user, [f"r{n}" for n in range(count)])
    assert set(hits_of(vectors.nearest(user, EAST, top_k=9999))) == {f"s{n}" for n in range(count)}


def test_what_is_remembered_is_not_read_again(vectors: RedisVectors, user: str, redis: Any) -> None:
    vectors.upsert(user, [row() for _ in range(300)], [EAST] * 300)
    vectors.nearest(user, EAST, top_k=3)
    before = redis.info("commandstats")["cmdstat_hmget"]["calls"]
    vectors.nearest(user, NORTH, top_k=3)
    assert redis.info("commandstats")["cmdstat_hmget"]["calls"] - before == 1  # the winners


def test_a_server_that_has_lost_its_last_writes_is_believed(
    vectors: RedisVectors, user: str, redis: Any, namespace: str
) -> None:
    """As after a crash with an append-only file that is synced once a second."""
    vectors.upsert(user, [row("a")], [EAST])
    keys = keys_of(redis, namespace)
    then = {key: redis.dump(key) for key in keys}
    vectors.upsert(user, [row("lost")], [EAST])
    assert hits_of(vectors.nearest(user, EAST, top_k=9)) == ["lost", "a"]
    for key, value in then.items():
        redis.restore(key, 0, value, replace=True)
    assert hits_of(vectors.nearest(user, EAST, top_k=9)) == ["a"]
    vectors.upsert(user, [row("lost")], [EAST])
    vectors.nearest(user, EAST, top_k=9)
    for key, value in then.items():
        redis.restore(key, 0, value, replace=True)
    vectors.upsert(user, [row("b")], [EAST])
    assert hits_of(vectors.nearest(user, EAST, top_k=9)) == ["b", "a"]


def test_the_memory_of_owners_is_bounded(redis_url: str, namespace: str, user: str) -> None:
    vectors = RedisVectors(redis_url, namespace, dimensions=256, cache_bytes=200_000)
    try:
        random = np.random.default_rng(5)
        values = random.standard_normal((100, 256))
        for number in range(5):
            vectors.upsert(f"{user}-{number}", [row() for _ in range(100)], values)
        for _ in range(2):
            for number in range(5):
                assert len(vectors.nearest(f"{user}-{number}", values[0], top_k=99)) == 99
                assert len(vectors.keywords(f"{user}-{number}", "tea", top_k=99)) == 99
                assert 0 < vectors.cached_bytes <= 200_000
        vectors.upsert(user, [row() for _ in range(300)], np.concatenate([values] * 3))
        assert len(vectors.nearest(user, values[0], top_k=300)) == 300  # too large to keep
        assert vectors.cached_bytes <= 200_000
    finally:
        vectors.close()


# --- keywords -----------------------------------------------------------------------------------


def test_finds_words_the_rarer_the_better(vectors: RedisVectors, user: str) -> None:
    texts = {
        "both": "Green TEA with honey",
        "hills": "the green hills",
        "fields": "the green fields and so much else that the word is lost among them",
        "tea": "tea",
        "none": "nothing of the kind",
    }
    vectors.upsert(user, [row(name, text) for name, text in texts.items()], [EAST] * 5)
    hits = vectors.keywords(user, "green tea, tea!", top_k=9)
    assert hits_of(hits) == ["both", "tea", "hills", "fields"]
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0
    assert len(vectors.keywords(user, "green", top_k=2)) == 2
    assert vectors.keywords(user, "", top_k=9) == []
    assert vectors.keywords(user, "bicycle", top_k=9) == []


def test_scores_as_okapi_bm25_does(vectors: RedisVectors, user: str) -> None:
    vectors.upsert(user, [row("a", "x x y"), row("b", "y"), row("c", "z z")], [EAST] * 3)
    ((_, score),) = vectors.keywords(user, "x", top_k=9)
    expected = math.log(1 + 2.5 / 1.5) * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2))
    assert score == pytest.approx(expected, abs=1e-6)


def test_finds_chinese_by_pairs_and_single_characters(vectors: RedisVectors, user: str) -> None:
    texts = {"tea": "我喜欢杭州的龙井茶", "rain": "上海在下雨", "dragon": "龙年"}
    vectors.upsert(user, [row(name, text) for name, text in texts.items()], [EAST] * 3)
    assert hits_of(vectors.keywords(user, "龙井", top_k=9)) == ["tea", "dragon"]
    assert hits_of(vectors.keywords(user, "雨", top_k=9)) == ["rain"]


def test_searches_the_lemmas_where_there_are_some_or_what_it_is_told(
    redis_url: str, namespace: str, vectors: RedisVectors, user: str
) -> None:
    vectors.upsert(user, [row("a", "attended", text_lemmatized="attend", note="x")], [EAST])
    vectors.upsert(user, [row("b", 7)], [EAST])  # type: ignore[arg-type]  # no text at all
    assert hits_of(vectors.keywords(user, "attend", top_k=9)) == ["a"]
    assert vectors.keywords(user, "attended", top_k=9) == []
    told = RedisVectors(
        redis_url, namespace, dimensions=3, text=lambda payload: payload.get("note", "")
    )
    try:
        assert hits_of(told.keywords(user, "x", top_k=9)) == ["a"]
    finally:
        told.close()


# --- delete -------------------------------------------------------------------------------------


def test_deletes_a_group_or_all_and_spares_what_is_newer(vectors: RedisVectors, user: str) -> None:
    vectors.upsert(user, [row(f"g{n}", epoch=n % 2) for n in range(10)], [EAST] * 10)
    vectors.upsert(user, [row(f"h{n}", group="h", epoch=n % 2) for n in range(10)], [EAST] * 10)
    vectors.upsert(user + "2", [row("theirs")], [EAST])
    assert vectors.delete(user, group="g", before_epoch=1) == 5
    assert vectors.delete(user, group="g", before_epoch=1) == 0
    assert vectors.count(user) == 15
    assert vectors.delete(user, group=None, before_epoch=1) == 5
    left = [f"g{n}" for n in range(1, 10, 2)] + [f"h{n}" for n in range(1, 10, 2)]
    assert ids_of(vectors.page(user, group=None, offset=0, limit=99)) == left
    assert sorted(hits_of(vectors.nearest(user, EAST, top_k=99))) == left
    assert vectors.count(user + "2") == 1


def test_what_is_older_than_a_delete_is_not_stored_after_it(
    vectors: RedisVectors, user: str, redis: Any, namespace: str
) -> None:
    assert vectors.delete(user, group="g", before_epoch=2) == 0
    late, elsewhere, newer = row("a", epoch=1), row("b", epoch=1, group="h"), row("c", epoch=2)
    assert vectors.upsert(user, [late, elsewhere, newer], [EAST] * 3) == [FENCED, NEW, NEW]
    assert vectors.get(user, "a") is None
    vectors.delete(user, group=None, before_epoch=5)
    vectors.delete(user, group=None, before_epoch=3)
    assert vectors.upsert(user, [row(epoch=4, group="h")], [EAST]) == [FENCED]
    assert vectors.upsert(user, [row("d", epoch=5), late], [EAST] * 2) == [NEW, FENCED]
    never = row("e", epoch=NEVER_FENCED)
    assert vectors.upsert(user, [never], [EAST]) == [NEW]
    assert vectors.delete(user, group=None, before_epoch=NEVER_FENCED) == 1
    assert ids_of(vectors.page(user, group=None, offset=0, limit=9)) == ["e"]


def test_deleted_owners_leave_only_fences_that_expire(
    vectors: RedisVectors, user: str, redis: Any, namespace: str
) -> None:
    vectors.upsert(user, [row(group=f"g{n % 5}") for n in range(50)], [EAST] * 50)
    vectors.nearest(user, EAST, top_k=9)
    assert len(keys_of(redis, namespace)) == 5 + 5
    vectors.delete(user, group="g1", before_epoch=1)
    vectors.delete(user, group=None, before_epoch=2)
    base = f"{namespace}:{{{user}}}:f"
    assert keys_of(redis, namespace) == {base, f"{base}:g1"}
    assert vectors.upsert(user, [row(epoch=1)], [EAST]) == [FENCED]
    assert keys_of(redis, namespace) == {base, f"{base}:g1"}
    for key in (base, f"{base}:g1"):
        assert 29 * 24 * 3600 < redis.ttl(key) <= 30 * 24 * 3600


def test_deletes_however_many_while_others_write(
    vectors: RedisVectors, others: RedisVectors, user: str, redis: Any, namespace: str
) -> None:
    vectors.upsert(user, [row(f"r{n}", group=f"g{n % 3}") for n in range(3000)], [EAST] * 3000)
    begun, done = threading.Event(), threading.Event()

    def write() -> tuple[list[str], list[str]]:
        stored: list[str] = []
        newer: list[str] = []
        number = 0
        while not done.is_set() or number < 50:
            old = row(f"o{number}", order=-number, group=f"g{number % 3}")
            new = row(f"n{number}", order=-number, epoch=1, group=f"g{number % 3}")
            result = others.upsert(user, [old, new], [EAST, NORTH])
            newer += [new.id] * (result[1] is NEW)
            stored += [old.id] * (result[0] is NEW)
            number += 1
            begun.set()
        return stored, newer

    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(write)
        assert begun.wait(10)
        removed = vectors.delete(user, group=None, before_epoch=1)
        done.set()
        stored, newer = writing.result()
    assert removed == 3000 + len(stored)
    left = vectors.page(user, group=None, offset=0, limit=9999)
    assert sorted(ids_of(left)) == sorted(newer)
    assert sorted(hits_of(vectors.nearest(user, EAST, top_k=9999))) == sorted(newer)
    vectors.delete(user, group=None, before_epoch=2)
    assert keys_of(redis, namespace) == {f"{namespace}:{{{user}}}:f"}


def test_clears_every_owner_of_a_collection(redis_url: str, namespace: str, redis: Any) -> None:
    name = f"{namespace}:[a-z]*?\\"
    ours, theirs = (
        RedisVectors(redis_url, each, dimensions=3) for each in (name, f"{namespace}:b")
    )
    try:
        for owner in ("", "a", "b:o", "{x}"):
            ours.upsert(
                owner, [row(group=group, epoch=NEVER_FENCED) for group in ("", "o")], [EAST] * 2
            )
        ours.delete("a", group=None, before_epoch=1)
        theirs.upsert("a", [row()], [EAST])
        assert ours.clear() == 8
        assert keys_of(redis, namespace) - {f"{name}:{{a}}:f"} == {
            f"{namespace}:b:{{a}}:{each}" for each in ("r", "v", "o", "c", "n", "g:g")
        }
    finally:
        ours.close()
        theirs.close()


# --- isolation ----------------------------------------------------------------------------------

any_text = hostile_ids | st.just("") | st.text(st.characters(), max_size=20)
places = st.tuples(any_text, any_text, any_text)


@given(first=places, second=places, whole_owner=st.booleans())
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_name_reaches_into_anothers_data(
    vectors: RedisVectors,
    first: tuple[str, str, str],
    second: tuple[str, str, str],
    whole_owner: bool,
) -> None:
    (owner, group, row_id), (owner2, group2, row_id2) = first, second
    if (owner, row_id) == (owner2, row_id2) or (
        owner == owner2 and (whole_owner or group == group2)
    ):
        return
    epoch = next(_numbers)
    mine = Row(row_id, {"data": "mine", row_id: group}, epoch, epoch, group)
    theirs = Row(row_id2, {"data": "theirs"}, epoch, epoch, group2)
    assert vectors.upsert(owner, [mine], [EAST]) == [NEW]
    assert vectors.upsert(owner2, [theirs], [EAST]) == [NEW]
    assert vectors.get(owner, row_id) == mine
    assert vectors.page(owner, group=group, offset=0, limit=9) == [mine]
    assert vectors.nearest(owner, EAST, top_k=9, group=group) == [(mine, 1.0)]
    assert theirs not in vectors.page(owner, group=group, offset=0, limit=9)
    assert vectors.delete(owner, group=None if whole_owner else group, before_epoch=epoch + 1) == 1
    assert vectors.get(owner, row_id) is None
    assert vectors.get(owner2, row_id2) == theirs
    assert vectors.keywords(owner2, "theirs", top_k=9, group=group2)[0][0] == theirs
    assert vectors.remove(owner2, [row_id2]) == 1


def test_keys_of_an_owner_share_a_hash_tag(
    vectors: RedisVectors, redis: Any, namespace: str
) -> None:
    for owner in ("", "}{:", "{odd}", "\ud800", "x" * 999):
        vectors.upsert(owner, [row(group="{o}dd")], [EAST])
        vectors.delete(owner, group="{", before_epoch=1)
        keys = keys_of(redis, namespace)
        tags = {key[key.index("{") : key.index("}") + 1] for key in keys}
        assert len(tags) == 1
        assert len(tags.pop()) > 2
        redis.delete(*keys)


# --- many at once -------------------------------------------------------------------------------


def test_threads_lose_nothing(vectors: RedisVectors, user: str) -> None:
    def write(thread: int) -> None:
        for number in range(200):
            made = row(f"{thread}-{number}", f"tea w{thread}", group=f"g{thread % 2}")
            assert vectors.upsert(user, [made], [[1.0, thread, number]]) == [NEW]
            if number % 20 == 0:
                assert made.id in hits_of(vectors.nearest(user, EAST, top_k=9999))
                assert made.id in hits_of(vectors.keywords(user, f"w{thread}", top_k=9999))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    expected = {f"{thread}-{number}" for thread in range(8) for number in range(200)}
    assert set(ids_of(vectors.page(user, group=None, offset=0, limit=9999))) == expected
    assert set(hits_of(vectors.nearest(user, EAST, top_k=9999))) == expected
    assert set(hits_of(vectors.keywords(user, "tea", top_k=9999))) == expected
    assert vectors.count(user, "g0") == vectors.count(user, "g1") == 800


_WRITER = """
import sys
from recallq_worker.vectors import RedisVectors, Row

url, collection, owner, name = sys.argv[1:]
vectors = RedisVectors(url, collection, dimensions=3)
for number in range(100):
    row = Row(f"{name}-{number}", {"data": "tea"}, number, 0, name)
    vectors.upsert(owner, [row], [[1.0, 0.0, 0.0]])
    assert row.id in [each.id for each, _ in vectors.nearest(owner, [1, 0, 0], top_k=999)]
vectors.close()
"""


def test_processes_share_it(
    vectors: RedisVectors, redis_url: str, namespace: str, user: str
) -> None:
    command = [sys.executable, "-c", _WRITER, redis_url, namespace, user]
    environment = clean_environment(PYTHONPATH=":".join(sys.path))
    writers = [subprocess.Popen([*command, name], env=environment) for name in ("one", "two")]
    seen = 0
    while any(each.poll() is None for each in writers):
        now = len(vectors.nearest(user, EAST, top_k=999))
        assert now >= seen
        seen = now
        time.sleep(0.005)
    assert [each.wait() for each in writers] == [0, 0]
    assert len(vectors.nearest(user, EAST, top_k=999)) == 200


# --- failures -----------------------------------------------------------------------------------


def test_a_vector_of_other_dimensions_is_refused(
    vectors: RedisVectors, redis_url: str, namespace: str, user: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: vectors.upsert(user, [row()], [[1.0, 2.0]]),
        lambda: vectors.update(user, "a", vector=[1.0, 2.0]),
        lambda: vectors.nearest(user, [1.0, 2.0], top_k=1),
    ]
    for call in calls:
        with pytest.raises(BackendError, match=r"has 2 dimensions.* have 3: set"):
            call()
    vectors.upsert(user, [row()], [EAST])
    other = RedisVectors(redis_url, namespace, dimensions=2)
    try:
        with pytest.raises(BackendError, match=r"of 3 dimensions.*have 2.*another collection"):
            other.nearest(user, [1.0, 2.0], top_k=1)
        assert len(other.keywords(user, "tea", top_k=1)) == 1
    finally:
        other.close()


@pytest.mark.parametrize(
    "vector", [[1.0, math.nan, 0.0], [1e300, 0, 0], ["secret", 0, 0], [[1.0], [0.0], [0.0]], 1.0]
)
def test_what_is_no_vector_is_refused(vectors: RedisVectors, user: str, vector: Any) -> None:
    with pytest.raises(BackendError) as caught:
        vectors.upsert(user, [row()], [vector])
    assert "secret" not in str(caught.value)


def test_what_cannot_be_stored_exactly_is_refused(vectors: RedisVectors, user: str) -> None:
    for wrong in (
        Row("a", {}, 2**53 + 1, 0, ""), Row("a", {}, 0, 2**53, ""), Row("a", {}, 0, -1, ""),
        Row("a", {"secret": object()}, 0, 0, ""),
    ):  # fmt: skip
        with pytest.raises(BackendError) as caught:
            vectors.upsert(user, [wrong], [EAST])
        assert "secret" not in str(caught.value)
    assert vectors.count(user) == 0
    for name in ("", "a{b"):
        with pytest.raises(ValueError, match="name"):
            RedisVectors("redis://localhost", name, dimensions=3)
    with pytest.raises(ValueError, match="dimensions"):
        RedisVectors("redis://localhost", "a", dimensions=0)


def test_payloads_come_back_as_they_were(vectors: RedisVectors, user: str) -> None:
    payload = {"half": "\ud83d", "long": 10**40, "é\n": [{"deep": -0.5}, True, None], "": {}}
    vectors.upsert(user, [Row("a", payload, -5, 0, "\udfff\n ")], [EAST])
    found = vectors.get(user, "a")
    assert found == Row("a", payload, -5, 0, "\udfff\n ")
    assert vectors.page(user, group="\udfff\n ", offset=0, limit=1) == [found]


def test_a_damaged_row_hides_no_other(
    vectors: RedisVectors,
    user: str,
    redis: Any,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vectors.upsert(user, [row(each) for each in ("bad", "torn", "good")], [EAST] * 3)
    redis.hset(f"{namespace}:{{{user}}}:r", "bad", "{private")
    redis.hset(f"{namespace}:{{{user}}}:r", "torn", '0 5 g\n"g"\n{"data": "priv')
    assert ids_of(vectors.page(user, group=None, offset=0, limit=9)) == ["good"]
    assert hits_of(vectors.nearest(user, EAST, top_k=9)) == ["good"]
    assert hits_of(vectors.keywords(user, "tea", top_k=9)) == ["good"]
    assert "damaged" in caplog.text
    assert "priv" not in caplog.text
    assert vectors.delete(user, group="g", before_epoch=1) == 3
    assert keys_of(redis, namespace) == {f"{namespace}:{{{user}}}:f:g"}


def test_survives_a_server_that_lost_its_scripts(
    vectors: RedisVectors, user: str, redis: Any
) -> None:
    vectors.upsert(user, [row()], [EAST])
    redis.script_flush()
    assert vectors.upsert(user, [row()], [EAST]) == [NEW]
    redis.script_flush()
    assert len(vectors.nearest(user, EAST, top_k=9)) == 2


def test_says_where_it_failed_and_never_the_password(namespace: str) -> None:
    with EmbeddedRedis() as server, Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", "another")
        vectors = RedisVectors(
            server.url.replace("//", "//:geheim@"), namespace, dimensions=3, connect_timeout=1
        )
        try:
            with pytest.raises(BackendError, match=str(server.port)) as caught:
                vectors.ping()
            assert "geheim" not in str(caught.value)
        finally:
            vectors.close()


def test_a_server_that_is_gone_is_unavailable(namespace: str, user: str) -> None:
    with EmbeddedRedis() as server:
        vectors = RedisVectors(server.url, namespace, dimensions=3, connect_timeout=1)
        try:
            vectors.ping()
            vectors.upsert(user, [row("a")], [EAST])
            assert len(vectors.nearest(user, EAST, top_k=1)) == 1
            server.kill()
            calls: list[Callable[[], object]] = [
                vectors.ping,
                lambda: vectors.upsert(user, [row()], [EAST]),
                lambda: vectors.nearest(user, EAST, top_k=1),
                lambda: vectors.get(user, "a"),
                lambda: vectors.count(user),
                lambda: vectors.delete(user, group=None, before_epoch=1),
                vectors.clear,
            ]
            for call in calls:
                with pytest.raises(BackendUnavailable, match=str(server.port)):
                    call()
            server.start()
            assert hits_of(vectors.nearest(user, EAST, top_k=9)) == ["a"]
        finally:
            vectors.close()


def test_a_server_that_does_not_answer_is_unavailable_in_time(namespace: str, user: str) -> None:
    with EmbeddedRedis() as server, Redis.from_url(server.url) as redis:
        vectors = RedisVectors(server.url, namespace, dimensions=3, command_timeout=0.3)
        try:
            vectors.ping()
            redis.client_pause(100_000)
            begun = time.monotonic()
            with pytest.raises(BackendUnavailable):
                vectors.count(user)
            assert time.monotonic() - begun < 10
        finally:
            vectors.close()
