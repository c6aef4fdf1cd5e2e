"""The in_memory backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from recallq.contract import Scope
from recallq_worker.backends.in_memory import InMemoryStore
from tests.contract.store_conformance import FindsWords, record, texts


class TestInMemoryStore(FindsWords):
    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[InMemoryStore]:
        store = InMemoryStore()
        await store.start()
        yield store
        await store.stop()

    async def test_keeps_the_newest_of_a_session(self) -> None:
        store = InMemoryStore(max_messages_per_session=3)
        for number in range(6):
            await store.add([record("u", str(number)), record("u", f"t{number}", session="t")])
        assert texts(await store.list(Scope("default", "u", "s"), offset=0, limit=9)) == [
            "3", "4", "5",
        ]  # fmt: skip
        assert len(await store.list(Scope("default", "u"), offset=0, limit=9)) == 6
