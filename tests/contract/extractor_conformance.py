"""What every memory extractor must do. Each backend's tests inherit these and add their own.

How memories are worded is up to whoever makes them; so the service or model behind the extractor
must be one of `tests.loopback`, which makes one memory of each message of a user, with its text.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import orjson
import pytest

from recallq.contract import Scope
from recallq_worker.backends.base import Extracted, MemoryExtractor, Record, Submission, Superseded

_numbers = itertools.count(1)
_START = 1_790_000_000_000_000

HOSTILE_IDS = [
    "a", "b", "a/b", "a%2Fb", "a%252Fb", "a b", "a%20b", "a\tb", "a\nb", "a\0b", " ", "\u3000", "%",
    "%25", "*", "?", "[a-z]", "{x}", "x}", "a:b", "../../etc", "'; DROP", '"', "\\", "default/a",
    "default", "null", "0", "-1", "\u00e9", "e\u0301", "用户", "\u202euser", "\ufeff", "a\u200bb",
    "👩\u200d👩\u200d👧", "A", "a&user_id=b", "x" * 300,
]  # fmt: skip

both_ways = pytest.mark.parametrize("infer", [True, False], ids=["infer", "as it is"])


def submission(
    user: str,
    *texts: str,
    session: str = "s",
    order: int | None = None,
    epoch: int = 0,
    infer: bool = True,
    tenant: str = "default",
    metadata: dict[str, Any] | None = None,
    messages: Sequence[dict[str, Any]] | None = None,
) -> Submission:
    """An add of a message for each text, or of `messages`; later ones have higher order keys."""
    number = next(_numbers)
    if messages is None:
        more = {} if metadata is None else {"metadata": metadata}
        messages = [{"role": "user", "content": text, **more} for text in texts]
    job = f"{number:016x}-1-0"
    return Submission(
        job_id=job,
        scope=Scope(tenant, user, session),
        order=_START + (number * 1000 if order is None else order),
        epoch=epoch,
        messages=messages,
        record_ids=[f"{job}-{index:05x}" for index in range(len(messages))],
        infer=infer,
    )


class Notes:
    """A journal that remembers."""

    def __init__(self, *, superseded: bool = False) -> None:
        """`superseded`: whether it refuses, once it has written down what it was told."""
        self.superseded = superseded
        self.intents: list[dict[str, Any]] = []

    async def __call__(self, intent: dict[str, Any]) -> None:
        self.intents.append(orjson.loads(orjson.dumps(intent)))
        if self.superseded:
            raise Superseded

    @property
    def last(self) -> dict[str, Any]:
        """What a worker that takes over would be told."""
        return self.intents[-1]


def texts(records: Iterable[Record]) -> list[str]:
    return [each.message["content"] for each in records]


async def add(extractor: MemoryExtractor, *submissions: Submission) -> list[Extracted]:
    return await extractor.extract(submissions, Notes())


async def everything(
    extractor: MemoryExtractor, user: str, session: str | None = None, tenant: str = "default"
) -> list[Record]:
    return await extractor.list(Scope(tenant, user, session), offset=0, limit=1000)


class ExtractorConformance(ABC):
    """Inherit it, and provide `open_extractor`."""

    @abstractmethod
    def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AbstractAsyncContextManager[MemoryExtractor]:
        """A started extractor with nothing in it."""

    @pytest.fixture
    async def extractor(self, redis_url: str, namespace: str) -> AsyncIterator[MemoryExtractor]:
        async with self.open_extractor(redis_url, namespace) as extractor:
            yield extractor

    # --- extract and list -----------------------------------------------------------------------

    @both_ways
    async def test_lists_what_was_extracted_in_the_order_of_submission(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        done = []
        for text in ("I like green tea", "The train is late", "My cat is called Kitty"):
            done += await add(extractor, submission(user, text, infer=infer))
        found = await everything(extractor, user)
        assert texts(found) == ["I like green tea", "The train is late", "My cat is called Kitty"]
        assert [each.record_ids for each in done] == [[each.record_id] for each in found]
        assert [(each.added, each.merged) for each in done] == [(1, 1)] * 3

    @both_ways
    async def test_lists_by_order_key_whatever_came_first(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        for order, text in ((3, "third was red"), (1, "first was blue"), (2, "second was green")):
            await add(extractor, submission(user, text, order=order, infer=infer))
        found = await everything(extractor, user)
        assert texts(found) == ["first was blue", "second was green", "third was red"]

    @both_ways
    async def test_makes_memories_of_every_message(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        said = [f"fact number {number}" for number in range(7)]
        (done,) = await add(extractor, submission(user, *said, infer=infer))
        found = await everything(extractor, user)
        assert sorted(texts(found)) == said
        if not infer:
            assert texts(found) == said
        assert (len(set(done.record_ids)), done.added) == (7, 7)
        assert set(done.record_ids) == {each.record_id for each in found}

    async def test_extracts_submissions_together(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        said = [["I like green tea", "I like jazz"], ["The train is late"], ["My cat is Kitty"]]
        submissions = [submission(user, *each) for each in said]
        assert len({extractor.group(each) for each in submissions}) == 1
        done = await add(extractor, *submissions)
        found = await everything(extractor, user)
        assert sorted(texts(found)) == sorted(itertools.chain(*said))
        assert [(each.added, each.merged) for each in done] == [(4, 3), (0, 3), (0, 3)]
        for each in done:
            assert set(each.record_ids) == {record.record_id for record in found}

    async def test_what_is_stored_as_it_is_keeps_ids_and_order_of_its_own(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        submissions = [submission(user, f"{n} one", f"{n} two", infer=False) for n in range(3)]
        if len({extractor.group(each) for each in submissions}) == 1:
            done = await add(extractor, *submissions)
        else:
            done = [each for one in submissions for each in await add(extractor, one)]
        found = await everything(extractor, user)
        assert texts(found) == [f"{n} {word}" for n in range(3) for word in ("one", "two")]
        assert [record.order for record in found[::2]] == [each.order for each in submissions]
        assert [each.added for each in done] == [2, 2, 2]
        ids = [each.record_id for each in found]
        assert [set(each.record_ids) for each in done] == [{*ids[:2]}, {*ids[2:4]}, {*ids[4:]}]

    async def test_sessions_and_metadata_are_not_mixed(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        groups = {
            extractor.group(submission(user, "tea", session="s")),
            extractor.group(submission(user, "tea", session="t")),
            extractor.group(submission(user, "tea", session="s", metadata={"a": 1})),
            extractor.group(submission(user, "tea", session="s", infer=False)),
        }
        assert len(groups) == 4
        assert extractor.tokens(submission(user, "tea " * 100)) >= 50
        assert extractor.tokens(submission(user, "tea " * 100, infer=False)) == 0

    @both_ways
    async def test_nothing_is_visible_before_it_is_in_the_journal(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        seen: list[int] = []

        class Watching(Notes):
            async def __call__(self, intent: dict[str, Any]) -> None:
                if not self.intents:
                    seen.append(len(await everything(extractor, user)))
                await super().__call__(intent)

        notes = Watching()
        await extractor.extract([submission(user, "green tea", infer=infer)], notes)
        assert seen == [0]
        assert len(await everything(extractor, user)) == 1

    @both_ways
    async def test_what_the_journal_refuses_is_not_stored(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        notes = Notes(superseded=True)
        with pytest.raises(Superseded):
            await extractor.extract([submission(user, "green tea", infer=infer)], notes)
        assert len(notes.intents) == 1
        for _ in range(2):
            assert await everything(extractor, user) == []
            await asyncio.sleep(0.4)  # for what may be under way

    @both_ways
    async def test_messages_without_text_harm_nothing(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        empty: list[dict[str, Any]] = [
            {"role": "user", "content": None}, {"role": "user", "content": " \n"},
            {"role": "assistant", "content": []}, {"role": "user"},
        ]  # fmt: skip
        done = await add(extractor, submission(user, messages=empty, infer=infer))
        assert done == [Extracted([], 0, 1)]
        done = await add(extractor, submission(user, messages=[], infer=infer))
        assert done == [Extracted([], 0, 1)]
        assert await everything(extractor, user) == []
        mixed = [*empty, {"role": "user", "content": "green tea"}, *empty]
        (one,) = await add(extractor, submission(user, messages=mixed, infer=infer))
        assert (one.added, len(one.record_ids)) == (1, 1)
        assert texts(await everything(extractor, user)) == ["green tea"]

    @both_ways
    async def test_users_are_extracted_at_the_same_time(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        users = [f"{user}-{number}" for number in range(20)]
        await asyncio.gather(
            *(add(extractor, submission(each, f"tea of {each}", infer=infer)) for each in users)
        )
        for each in users:
            assert texts(await everything(extractor, each)) == [f"tea of {each}"]

    async def test_pages_are_complete_and_do_not_overlap(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        for start in range(0, 25, 5):
            said = [f"fact {number}" for number in range(start, start + 5)]
            await add(extractor, submission(user, *said, infer=False))
        scope = Scope("default", user)
        pages = [await extractor.list(scope, offset=at, limit=10) for at in (0, 10, 20, 30)]
        assert [len(page) for page in pages] == [10, 10, 5, 0]
        assert [text for page in pages for text in texts(page)] == [f"fact {n}" for n in range(25)]

    # --- what comes back ------------------------------------------------------------------------

    @both_ways
    async def test_records_have_the_shape_of_all_backends(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        given = submission(
            user, "I like green tea", epoch=4, infer=infer, metadata={"topic": "drinks", "n": 3}
        )
        (done,) = await add(extractor, given)
        (record,) = await everything(extractor, user)
        assert isinstance(record, Record)
        assert [record.record_id] == done.record_ids
        assert (record.scope, record.order, record.epoch) == (given.scope, given.order, 4)
        assert record.message["role"] == "user"
        assert record.message["content"] == "I like green tea"
        assert record.message["metadata"] == {"topic": "drinks", "n": 3}
        assert orjson.loads(orjson.dumps(record.message)) == record.message
        scope = Scope("default", user)
        (hit,) = await extractor.search(scope, "green tea", top_k=3, score_threshold=None)
        assert hit.record == record

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "user", "content": "I like green tea"},
            {"role": "assistant", "content": "You like green tea"},
            {"role": "user", "content": "  green tea  ", "name": "Ann", "x": {"deep": [1, None]}},
            {"role": "assistant", "content": "green tea", "metadata": {"user_id": "x", "n": 1}},
            {"role": "tool", "content": "green tea: 3 kinds", "tool_call_id": "c1", "name": "shop"},
            {"role": "assistant", "content": [{"type": "text", "text": "green tea, 绿茶"}]},
        ],
        ids=["plain", "assistant", "fields", "metadata", "tool", "parts"],
    )
    async def test_what_is_stored_as_it_is_comes_back_as_it_was(
        self, extractor: MemoryExtractor, user: str, message: dict[str, Any]
    ) -> None:
        await add(extractor, submission(user, messages=[message], infer=False))
        (record,) = await everything(extractor, user)
        assert record.message == message
        (hit,) = await extractor.search(
            Scope("default", user), "green tea", top_k=3, score_threshold=None
        )
        assert hit.record.message == message

    async def test_a_whole_conversation_comes_back_as_it_was(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Which tea is there?"},
            {"role": "assistant", "content": "I shall look.", "tool_calls": [{"id": "c1"}]},
            {"role": "tool", "content": "green, black", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Green and black.", "metadata": {"n": 1}},
        ]
        await add(extractor, submission(user, messages=messages, infer=False))
        assert [each.message for each in await everything(extractor, user)] == messages

    # --- search ---------------------------------------------------------------------------------

    @both_ways
    async def test_finds_the_right_memory(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        said = ("I like green tea", "The train is late today", "我喜欢杭州的龙井茶")
        await add(extractor, submission(user, *said, infer=infer))
        scope = Scope("default", user)
        for query, text in (("green tea", said[0]), ("late train", said[1]), ("龙井茶", said[2])):
            hits = await extractor.search(scope, query, top_k=3, score_threshold=None)
            assert hits[0].record.message["content"] == text
            assert all(0 < hit.score <= 1 for hit in hits)
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    async def test_top_k_and_threshold_bound_the_hits(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        said = [f"green tea {number}" for number in range(12)]
        await add(extractor, submission(user, *said, "green bicycle with a bell", infer=False))
        scope = Scope("default", user)
        assert len(await extractor.search(scope, "green tea", top_k=5, score_threshold=None)) == 5
        hits = await extractor.search(scope, "green tea 7", top_k=50, score_threshold=None)
        assert hits[0].record.message["content"] == "green tea 7"
        best = hits[0].score
        assert hits[1].score < best
        for threshold, count in ((best - 1e-6, 1), (1.01, 0), (-1.0, len(hits))):
            found = await extractor.search(
                scope, "green tea 7", top_k=50, score_threshold=threshold
            )
            assert len(found) >= count if threshold < 0 else len(found) == count

    async def test_searches_one_session_or_all(self, extractor: MemoryExtractor, user: str) -> None:
        await add(extractor, submission(user, "tea here"))
        await add(extractor, submission(user, "tea there", session="t"))
        for session, sessions in ((None, ["s", "t"]), ("t", ["t"]), ("s", ["s"]), ("none", [])):
            scope = Scope("default", user, session)
            hits = await extractor.search(scope, "tea", top_k=9, score_threshold=None)
            assert sorted(str(hit.record.scope.session_id) for hit in hits) == sessions
            assert len(await extractor.list(scope, offset=0, limit=9)) == len(sessions)

    async def test_equal_matches_come_newest_first(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        for session in "abc":
            await add(extractor, submission(user, "green tea", session=session, infer=False))
        scope = Scope("default", user)
        hits = await extractor.search(scope, "green tea", top_k=9, score_threshold=None)
        assert [hit.record.scope.session_id for hit in hits] == ["c", "b", "a"]

    @pytest.mark.parametrize("query", ["", " ", "?!", "\0", "x" * 5000, "'; DROP", "*"])
    async def test_no_query_is_too_odd(
        self, extractor: MemoryExtractor, user: str, query: str
    ) -> None:
        await add(extractor, submission(user, "green tea", infer=False))
        hits = await extractor.search(Scope("default", user), query, top_k=3, score_threshold=0.99)
        assert hits == []

    # --- isolation ------------------------------------------------------------------------------

    async def test_no_user_reaches_into_anothers_data(self, extractor: MemoryExtractor) -> None:
        tenants = ["default", "a", "a/b", "x y"]
        others = [("a/b", "c"), ("a", "b/c"), ("default/a", "b"), ("a%2Fb", "c"), ("x%20y", "a")]
        owners = [("default", each) for each in HOSTILE_IDS]
        owners += [(tenant, each) for tenant in tenants[1:] for each in ("a", "b", "*")] + others
        text = "tea of {}".format
        await asyncio.gather(
            *(
                add(extractor, submission(user, text(number), tenant=tenant, infer=False))
                for number, (tenant, user) in enumerate(owners)
            )
        )
        for number, (tenant, user) in enumerate(owners):
            found = await everything(extractor, user, tenant=tenant)
            assert texts(found) == [text(number)], (tenant, user)
            assert found[0].scope == Scope(tenant, user, "s")
            hits = await extractor.search(
                Scope(tenant, user), "tea", top_k=99, score_threshold=None
            )
            assert [hit.record for hit in hits] == found
        for number, (tenant, user) in enumerate(owners):
            if number % 3 == 0:
                assert await extractor.delete(Scope(tenant, user), before_epoch=1) == 1
        for number, (tenant, user) in enumerate(owners):
            left = len(await everything(extractor, user, tenant=tenant))
            assert left == (0 if number % 3 == 0 else 1), (tenant, user)

    async def test_no_session_reaches_into_another(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        for number, session in enumerate(HOSTILE_IDS):
            given = submission(user, f"tea {number}", session=session, infer=False)
            await add(extractor, given)
        for number, session in enumerate(HOSTILE_IDS):
            found = await everything(extractor, user, session)
            assert texts(found) == [f"tea {number}"]
            assert found[0].scope.session_id == session
        for session in HOSTILE_IDS[::3]:
            assert await extractor.delete(Scope("default", user, session), before_epoch=1) == 1
        kept = [each for number, each in enumerate(HOSTILE_IDS) if number % 3]
        found = await everything(extractor, user)
        assert [each.scope.session_id for each in found] == kept

    # --- delete ---------------------------------------------------------------------------------

    @both_ways
    async def test_deletes_a_session_and_nothing_else(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        await add(extractor, submission(user, "tea one", "tea two", infer=infer))
        await add(extractor, submission(user, "tea kept", session="t", infer=infer))
        assert await extractor.delete(Scope("default", user, "s"), before_epoch=1) == 2
        assert texts(await everything(extractor, user)) == ["tea kept"]
        hits = await extractor.search(Scope("default", user), "tea", top_k=9, score_threshold=None)
        assert len(hits) == 1

    @both_ways
    async def test_deletes_a_user_and_nobody_else(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        await add(extractor, submission(user, "tea one", infer=infer))
        await add(extractor, submission(user, "tea two", session="t", infer=infer))
        await add(extractor, submission(user + "2", "tea kept", infer=infer))
        assert await extractor.delete(Scope("default", user), before_epoch=1) == 2
        assert await everything(extractor, user) == []
        assert len(await everything(extractor, user + "2")) == 1

    @both_ways
    async def test_a_delete_spares_what_was_submitted_after_it(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        await add(extractor, submission(user, "new tea", epoch=1, infer=infer))
        await add(extractor, submission(user, "old tea", "old milk", epoch=0, infer=infer))
        await add(extractor, submission(user, "newest tea", epoch=2, infer=infer))
        assert await extractor.delete(Scope("default", user), before_epoch=1) == 2
        assert texts(await everything(extractor, user)) == ["new tea", "newest tea"]

    async def test_submissions_extracted_together_are_as_old_as_the_oldest(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        await add(extractor, submission(user, "tea", epoch=1), submission(user, "milk", epoch=3))
        assert await extractor.delete(Scope("default", user), before_epoch=1) == 0
        assert await extractor.delete(Scope("default", user), before_epoch=2) == 2

    async def test_deleting_twice_or_nothing_is_harmless(
        self, extractor: MemoryExtractor, user: str
    ) -> None:
        assert await extractor.delete(Scope("default", user), before_epoch=1) == 0
        await add(extractor, submission(user, "tea", epoch=1))
        scope = Scope("default", user, "s")
        assert await extractor.delete(scope, before_epoch=1) == 0
        assert await extractor.delete(scope, before_epoch=2) == 1
        assert await extractor.delete(scope, before_epoch=2) == 0
        await add(extractor, submission(user, "tea again", epoch=2))
        assert texts(await everything(extractor, user)) == ["tea again"]

    @pytest.mark.parametrize("spared", [False, True])
    async def test_deletes_however_many_there_are(
        self, extractor: MemoryExtractor, user: str, *, spared: bool
    ) -> None:
        for session in "stu":
            said = [f"{session} {number}" for number in range(70)]
            await add(extractor, submission(user, *said, session=session, infer=False))
        if spared:
            await add(extractor, submission(user, "new tea", epoch=5))
        assert len(await everything(extractor, user)) == 210 + spared
        assert await extractor.delete(Scope("default", user), before_epoch=5) == 210
        assert texts(await everything(extractor, user)) == ["new tea"] * spared

    # --- recover --------------------------------------------------------------------------------

    @both_ways
    async def test_adopts_what_an_extraction_had_stored(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        notes, given = Notes(), [submission(user, "green tea", "black tea", infer=infer)]
        if infer:
            given.append(submission(user, "milk"))
        done = await extractor.extract(given, notes)
        before = await everything(extractor, user)
        found = await extractor.recover(given, notes.last)
        assert found is not None
        assert [sorted(each.record_ids) for each in found] == [
            sorted(each.record_ids) for each in done
        ]
        assert [each.merged for each in found] == [each.merged for each in done]
        assert await everything(extractor, user) == before
        assert len(before) == 2 + infer

    @both_ways
    async def test_removes_what_nobody_wants_any_more(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        await add(extractor, submission(user, "kept tea", infer=infer))
        notes = Notes()
        await extractor.extract([submission(user, "green tea", "milk", infer=infer)], notes)
        for _ in range(2):
            assert await extractor.recover([], notes.last) is None
            assert texts(await everything(extractor, user)) == ["kept tea"]

    @both_ways
    async def test_recovers_nothing_of_what_was_never_stored(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        await add(extractor, submission(user, "kept tea", infer=infer))
        notes, given = Notes(superseded=True), submission(user, "green tea", infer=infer)
        with pytest.raises(Superseded):
            await extractor.extract([given], notes)
        assert await extractor.recover([given], notes.last) is None
        assert await extractor.recover([], notes.last) is None
        assert texts(await everything(extractor, user)) == ["kept tea"]

    @both_ways
    async def test_what_was_removed_may_be_stored_after_all(
        self, extractor: MemoryExtractor, user: str, *, infer: bool
    ) -> None:
        """By whoever takes over, when some of what was to be stored together is gone."""
        given = submission(user, "green tea", infer=infer)
        for notes in (Notes(superseded=True), Notes()):
            with suppress(Superseded):
                await extractor.extract([given], notes)
            assert await extractor.recover([], notes.last) is None
            assert await everything(extractor, user) == []
        (done,) = await add(extractor, given)
        assert done.added == 1
        assert texts(await everything(extractor, user)) == ["green tea"]

    # --- the rest -------------------------------------------------------------------------------

    async def test_is_well(self, extractor: MemoryExtractor) -> None:
        health = await extractor.health()
        assert health.ok
        assert health.backend == extractor.name

    async def test_is_an_extractor(self, extractor: MemoryExtractor) -> None:
        assert isinstance(extractor, MemoryExtractor)
        assert not extractor.single_process
