"""What every memory store must do. Each backend's tests inherit these and add their own."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recallq.contract import Scope
from recallq_worker.backends.base import Added, MemoryStore, Record, takes_second_step

NEW, KNOWN, FENCED = Added.NEW, Added.KNOWN, Added.FENCED

_numbers = itertools.count(1)

HOSTILE_IDS = [
    "a:b", "a", "b", "{x}", "x}", "*", "?", "[a-z]", "a/b", "a%2Fb", "../../etc", "a\nb", "a\0b",
    " ", "\t", "'; DROP", "=" + "0" * 64, "\u00e9", "e\u0301", "Ｕｓｅｒ", "用户", "\u202euser",
    "👩\u200d👩\u200d👧", "\ufeff", "x" * 10_000, "x" * 10_001, "default", "null", "0", "-1",
]  # fmt: skip
ids = st.text(min_size=1, max_size=40).filter(
    lambda text: not any("\ud800" <= each <= "\udfff" for each in text)
) | st.sampled_from(HOSTILE_IDS)


def record(
    user: str,
    text: str = "hello",
    *,
    session: str = "s",
    order: int | None = None,
    epoch: int = 0,
    record_id: str | None = None,
    tenant: str = "default",
    message: dict[str, Any] | None = None,
) -> Record:
    number = next(_numbers)
    return Record(
        record_id=record_id or f"r{number:08d}",
        scope=Scope(tenant, user, session),
        order=1_790_000_000_000_000 + (number if order is None else order),
        epoch=epoch,
        message=message or {"role": "user", "content": text},
    )


def texts(records: list[Record]) -> list[str]:
    return [each.message["content"] for each in records]


class StoreConformance(ABC):
    """Inherit it, and provide `open_store`."""

    moves: ClassVar[bool] = True
    """Whether a record takes the earlier place when it is added a second time with that; else it
    stands where it came first."""

    @abstractmethod
    def open_store(
        self, redis_url: str, namespace: str
    ) -> AbstractAsyncContextManager[MemoryStore]:
        """A started store with nothing in it."""

    async def stored(self, store: MemoryStore, records: list[Record]) -> None:
        """Adds records, in both steps if the store takes two: then searches find them."""
        await store.add(records)
        if takes_second_step(store):
            assert not any(await store.index(records, patience=60))

    @pytest.fixture
    async def store(self, redis_url: str, namespace: str) -> AsyncIterator[MemoryStore]:
        async with self.open_store(redis_url, namespace) as store:
            yield store

    # --- add and list ---------------------------------------------------------------------------

    async def test_lists_what_was_added(self, store: MemoryStore, user: str) -> None:
        added = record(
            user, message={"role": "tool", "content": None, "x": {"deep": [1, None, "é"]}}
        )
        assert await store.add([added]) == [NEW]
        assert await store.list(Scope("default", user), offset=0, limit=10) == [added]

    async def test_a_record_is_stored_once_however_often_it_is_added(
        self, store: MemoryStore, user: str
    ) -> None:
        first = record(user, "original", record_id="same")
        again = record(user, "changed", record_id="same")
        assert await store.add([first]) == [NEW]
        assert await store.add([again, record(user, "other")]) == [KNOWN, NEW]
        found = await store.list(Scope("default", user), offset=0, limit=10)
        assert texts(found) == ["original", "other"]

    async def test_the_same_record_twice_in_one_call(self, store: MemoryStore, user: str) -> None:
        once = record(user)
        assert await store.add([once, once]) == [NEW, KNOWN]
        assert len(await store.list(Scope("default", user), offset=0, limit=10)) == 1

    async def test_nothing_to_add(self, store: MemoryStore) -> None:
        assert await store.add([]) == []

    async def test_lists_by_order_key_whatever_came_first(
        self, store: MemoryStore, user: str
    ) -> None:
        await store.add([record(user, "third", order=3), record(user, "first", order=1)])
        await store.add([record(user, "second", order=2, session="t")])
        assert texts(await store.list(Scope("default", user), offset=0, limit=10)) == [
            "first", "second", "third",
        ]  # fmt: skip

    async def test_equal_order_keys_list_by_record_id(self, store: MemoryStore, user: str) -> None:
        for name in ("j-1-00001", "j-1-00000", "j-1-00002"):
            await store.add([record(user, name, order=7, record_id=name)])
        found = await store.list(Scope("default", user), offset=0, limit=10)
        assert texts(found) == ["j-1-00000", "j-1-00001", "j-1-00002"]

    async def test_pages_are_complete_and_do_not_overlap(
        self, store: MemoryStore, user: str
    ) -> None:
        await store.add([record(user, str(number)) for number in range(25)])
        scope = Scope("default", user)
        pages = [await store.list(scope, offset=offset, limit=10) for offset in (0, 10, 20, 30)]
        assert [len(page) for page in pages] == [10, 10, 5, 0]
        assert [text for page in pages for text in texts(page)] == [str(n) for n in range(25)]

    async def test_lists_one_session_or_all(self, store: MemoryStore, user: str) -> None:
        await store.add([record(user, "in s"), record(user, "in t", session="t")])
        assert texts(await store.list(Scope("default", user, "t"), offset=0, limit=9)) == ["in t"]
        assert len(await store.list(Scope("default", user), offset=0, limit=9)) == 2
        assert await store.list(Scope("default", user, "none"), offset=0, limit=9) == []

    async def test_one_call_for_many_users(self, store: MemoryStore, user: str) -> None:
        users = [f"{user}-{number}" for number in range(50)]
        records = [record(each, f"of {each}") for each in users]
        assert await store.add(records) == [NEW] * 50
        for each in users:
            found = await store.list(Scope("default", each), offset=0, limit=9)
            assert texts(found) == [f"of {each}"]

    async def test_concurrent_adds_lose_nothing(self, store: MemoryStore, user: str) -> None:
        await asyncio.gather(*(store.add([record(user, str(n))]) for n in range(50)))
        found = await store.list(Scope("default", user), offset=0, limit=100)
        assert sorted(map(int, texts(found))) == list(range(50))

    # --- search -----------------------------------------------------------------------------------

    async def test_searches_one_session_or_all(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, "tea here"), record(user, "tea there", session="t")])
        everywhere = await store.search(
            Scope("default", user), "tea", top_k=5, score_threshold=None
        )
        there = await store.search(
            Scope("default", user, "t"), "tea", top_k=5, score_threshold=None
        )
        assert len(everywhere) == 2
        assert [hit.record.scope.session_id for hit in there] == ["t"]

    async def test_a_message_without_content_harms_no_search(
        self, store: MemoryStore, user: str
    ) -> None:
        await self.stored(store, [record(user, message={"role": "user", "content": None})])
        await self.stored(store, [record(user, "tea")])
        hits = await store.search(Scope("default", user), "tea", top_k=5, score_threshold=None)
        assert len(hits) == 1

    # --- delete ---------------------------------------------------------------------------------

    async def test_deletes_a_session_and_nothing_else(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, f"tea {n}") for n in range(3)])
        await self.stored(store, [record(user, "tea kept", session="t")])
        assert await store.delete(Scope("default", user, "s"), before_epoch=1) == 3
        assert texts(await store.list(Scope("default", user), offset=0, limit=9)) == ["tea kept"]
        assert await store.list(Scope("default", user, "s"), offset=0, limit=9) == []
        hits = await store.search(Scope("default", user), "tea", top_k=9, score_threshold=None)
        assert len(hits) == 1

    async def test_deletes_a_user_and_nobody_else(self, store: MemoryStore, user: str) -> None:
        await store.add([record(user), record(user, session="t"), record(user + "2", "kept")])
        assert await store.delete(Scope("default", user), before_epoch=1) == 2
        assert await store.list(Scope("default", user), offset=0, limit=9) == []
        assert len(await store.list(Scope("default", user + "2"), offset=0, limit=9)) == 1

    async def test_deletes_however_many_there_are(self, store: MemoryStore, user: str) -> None:
        await store.add([record(user, str(n), session=f"s{n % 3}") for n in range(3210)])
        assert await store.delete(Scope("default", user), before_epoch=1) == 3210
        assert await store.list(Scope("default", user), offset=0, limit=9) == []

    async def test_deleting_twice_or_nothing_is_harmless(
        self, store: MemoryStore, user: str
    ) -> None:
        assert await store.delete(Scope("default", user), before_epoch=1) == 0
        await store.add([record(user, epoch=1)])
        assert await store.delete(Scope("default", user, "s"), before_epoch=2) == 1
        assert await store.delete(Scope("default", user, "s"), before_epoch=2) == 0

    async def test_a_delete_spares_what_was_submitted_after_it(
        self, store: MemoryStore, user: str
    ) -> None:
        newer = [record(user, f"new {n}", epoch=1, order=n) for n in range(5)]
        older = [record(user, f"old {n}", epoch=0, order=10 + n) for n in range(5)]
        await store.add([each for pair in zip(newer, older, strict=True) for each in pair])
        assert await store.delete(Scope("default", user), before_epoch=1) == 5
        found = await store.list(Scope("default", user), offset=0, limit=20)
        assert texts(found) == [f"new {n}" for n in range(5)]

    async def test_what_is_submitted_again_after_a_delete_that_is_to_come_survives_it(
        self, store: MemoryStore, user: str
    ) -> None:
        """The same record, as an idempotency key makes it, before the delete and after it."""
        before = record(user, "tea", epoch=0, record_id="k1")
        after = record(user, "tea", epoch=1, record_id="k1", order=before.order)
        assert await store.add([before]) == [NEW]
        assert await store.add([after]) == [KNOWN]
        assert await store.add([before]) == [KNOWN]
        assert await store.delete(Scope("default", user), before_epoch=1) == 0
        assert texts(await store.list(Scope("default", user), offset=0, limit=9)) == ["tea"]

    @pytest.mark.parametrize("more", [0, 600])  # with so many, it is in a segment of the index
    async def test_of_the_same_record_twice_the_first_submitted_has_the_place(
        self, store: MemoryStore, user: str, more: int
    ) -> None:
        first, again = (record(user, "two", order=n, record_id="k") for n in (2, 4))
        others = [record(user, f"{text} words", order=n) for text, n in (("one", 1), ("three", 3))]
        await self.stored(store, [record(user, "more", order=9 + n) for n in range(more)])
        await self.stored(store, [*others, again])
        scope = Scope("default", user)
        await store.search(scope, "words", top_k=9, score_threshold=None)
        assert await store.add([first, again]) == [KNOWN, KNOWN]
        stands = first if self.moves else again
        listed = sorted([*others, stands], key=lambda each: each.order)
        for each in (scope, Scope("default", user, "s")):
            assert await store.list(each, offset=0, limit=3) == listed
        hits = await store.search(scope, "two", top_k=1, score_threshold=None)
        assert [hit.record for hit in hits] == [stands]
        assert await store.delete(scope, before_epoch=1) == 3 + more

    async def test_what_a_delete_has_fenced_off_moves_nothing(
        self, store: MemoryStore, user: str
    ) -> None:
        stays = record(user, order=4, epoch=1, record_id="k")
        await store.add([stays])
        await store.delete(Scope("default", user), before_epoch=1)
        await store.add([replace(stays, order=stays.order - 1, epoch=0)])
        assert await store.list(Scope("default", user), offset=0, limit=3) == [stays]

    async def test_what_was_submitted_before_a_delete_is_not_stored_after_it(
        self, store: MemoryStore, user: str
    ) -> None:
        scope = Scope("default", user)
        await store.delete(Scope("default", user, "s"), before_epoch=1)
        late, elsewhere = record(user, "late"), record(user, "elsewhere", session="t")
        assert await store.add([late, elsewhere]) == [FENCED, NEW]
        await store.delete(scope, before_epoch=2)
        assert await store.add([late, elsewhere, record(user, epoch=1)]) == [FENCED] * 3
        assert await store.list(scope, offset=0, limit=9) == []
        assert await store.add([record(user, "fresh", epoch=2)]) == [NEW]

    async def test_an_older_delete_that_comes_late_keeps_the_newer_fence(
        self, store: MemoryStore, user: str
    ) -> None:
        await store.delete(Scope("default", user), before_epoch=5)
        await store.delete(Scope("default", user), before_epoch=3)
        assert await store.add([record(user, epoch=4)]) == [FENCED]

    # --- isolation ------------------------------------------------------------------------------

    async def test_tenants_do_not_see_each_other(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, "tea one", tenant="one")])
        await self.stored(store, [record(user, "tea", tenant="two")])
        assert await store.delete(Scope("one", user), before_epoch=1) == 1
        hits = await store.search(Scope("two", user), "tea", top_k=9, score_threshold=None)
        assert [hit.record.scope.tenant for hit in hits] == ["two"]

    @given(
        first=st.tuples(ids, ids, ids), second=st.tuples(ids, ids, ids), whole_user=st.booleans()
    )
    @settings(
        max_examples=60,
        deadline=None,
        # Examples share a store on purpose, and each backend's class inherits the test.
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
        ],
    )
    async def test_no_id_reaches_into_anothers_data(
        self,
        store: MemoryStore,
        first: tuple[str, str, str],
        second: tuple[str, str, str],
        whole_user: bool,
    ) -> None:
        if first == second or (whole_user and first[:2] == second[:2]):
            return
        for tenant, user, _ in (first, second):
            # Epochs only rise: examples share the store.
            await store.delete(Scope(tenant, user), before_epoch=0)
        epoch = next(_numbers)
        mine = record(first[1], "tea mine", tenant=first[0], session=first[2], epoch=epoch)
        theirs = record(second[1], "tea theirs", tenant=second[0], session=second[2], epoch=epoch)
        assert await store.add([mine, theirs]) == [NEW, NEW]
        found = await store.list(Scope(*first), offset=0, limit=1000)
        assert mine in found
        assert theirs not in found
        doomed = Scope(first[0], first[1], None if whole_user else first[2])
        await store.delete(doomed, before_epoch=epoch + 1)
        assert await store.list(Scope(*first), offset=0, limit=1000) == []
        assert theirs in await store.list(Scope(*second), offset=0, limit=1000)
        if not takes_second_step(store) or epoch % 10 == 0:
            await self.stored(store, [theirs])
            hits = await store.search(Scope(*second), "theirs", top_k=1000, score_threshold=None)
            assert theirs in [hit.record for hit in hits]
            assert mine not in [hit.record for hit in hits]
        await store.delete(Scope(*second), before_epoch=epoch + 1)

    # --- the rest -------------------------------------------------------------------------------

    async def test_is_well(self, store: MemoryStore) -> None:
        health = await store.health()
        assert health.ok
        assert health.backend == store.name


class FindsWords(StoreConformance, ABC):
    """A store whose searches look for words."""

    highest_score: ClassVar[float] = 1.0
    finds_parts_of_words: ClassVar[bool] = True

    async def test_finds_any_word_whatever_its_case(self, store: MemoryStore, user: str) -> None:
        await self.stored(
            store, [record(user, "I like GREEN tea"), record(user, "The train is late")]
        )
        hits = await store.search(
            Scope("default", user), "green bicycles", top_k=5, score_threshold=None
        )
        assert [hit.record.message["content"] for hit in hits] == ["I like GREEN tea"]
        assert 0 < hits[0].score <= self.highest_score

    async def test_finds_part_of_a_word(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, "wonderful weather"), record(user, "nothing")])
        hits = await store.search(Scope("default", user), "weath", top_k=5, score_threshold=None)
        found = ["wonderful weather"] if self.finds_parts_of_words else []
        assert [hit.record.message["content"] for hit in hits] == found

    async def test_finds_chinese(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, "我喜欢杭州的龙井茶"), record(user, "上海在下雨")])
        hits = await store.search(Scope("default", user), "龙井", top_k=5, score_threshold=None)
        assert [hit.record.message["content"] for hit in hits] == ["我喜欢杭州的龙井茶"]

    async def test_better_matches_come_first(self, store: MemoryStore, user: str) -> None:
        await self.stored(
            store,
            [
                record(user, "green tea with honey"),
                record(user, "green hills"),
                record(user, "tea"),
            ],
        )
        hits = await store.search(
            Scope("default", user), "green tea", top_k=5, score_threshold=None
        )
        assert hits[0].record.message["content"] == "green tea with honey"
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    async def test_equal_matches_come_newest_first(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, f"tea {n}") for n in range(5)])
        hits = await store.search(Scope("default", user), "tea", top_k=2, score_threshold=None)
        assert [hit.record.message["content"] for hit in hits] == ["tea 4", "tea 3"]

    async def test_a_single_letter_does_not_match_everything(
        self, store: MemoryStore, user: str
    ) -> None:
        await self.stored(store, [record(user, "banana bread"), record(user, "vitamin a helps")])
        hits = await store.search(Scope("default", user), "a", top_k=5, score_threshold=None)
        assert [hit.record.message["content"] for hit in hits] == ["vitamin a helps"]

    async def test_top_k_and_threshold_bound_the_hits(self, store: MemoryStore, user: str) -> None:
        await self.stored(store, [record(user, f"green tea {n}") for n in range(20)])
        await self.stored(store, [record(user, "green only")])
        scope = Scope("default", user)
        assert len(await store.search(scope, "green tea", top_k=7, score_threshold=None)) == 7
        everything = await store.search(scope, "green tea", top_k=50, score_threshold=None)
        assert len(everything) == 21
        least = everything[-1].score
        better = await store.search(scope, "green tea", top_k=50, score_threshold=least + 0.01)
        assert len(better) == 20

    async def test_every_text_in_a_message_is_found(self, store: MemoryStore, user: str) -> None:
        await self.stored(
            store,
            [
                record(
                    user,
                    message={
                        "role": "assistant",
                        "content": [
                            {"type": "text", "text": "first part"},
                            {"type": "text", "text": "second zebra"},
                            {"type": "data", "data": {"name": "lookup", "order": "A-1043"}},
                        ],
                    },
                ),
                record(
                    user,
                    message={
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "function": {
                                    "name": "book",
                                    "arguments": '{"city": "\\u676d\\u5dde"}',
                                }
                            }
                        ],
                    },
                ),
            ],
        )
        for query in ("zebra", "a-1043", "杭州", "book"):
            hits = await store.search(Scope("default", user), query, top_k=5, score_threshold=None)
            assert len(hits) == 1, query
