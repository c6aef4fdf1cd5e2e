"""The tablestore backend, with the real SDK against a server that speaks Tablestore's protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.backends.tablestore.store import TablestoreStore
from tests.contract.store_conformance import FindsWords, StoreConformance
from tests.loopback.tablestore_api import TablestoreServer


@pytest.fixture(scope="module")
def lagging() -> Iterator[TablestoreServer]:
    """Its search index sees what is written two seconds later."""
    with TablestoreServer(index_lag=2.0) as server:
        yield server


@pytest.fixture
def server() -> Iterator[TablestoreServer]:
    with TablestoreServer() as server:
        yield server


def configured(server: TablestoreServer, **more: Any) -> TablestoreSettings:
    return TablestoreSettings.load(
        end_point=server.url,
        instance_name=server.instance_name,
        access_key_id=server.access_key_id,
        access_key_secret=server.access_key_secret,
        **more,
    )


@asynccontextmanager
async def opened(store: TablestoreStore) -> AsyncIterator[TablestoreStore]:
    try:
        await store.start()
        yield store
    finally:
        await store.stop()


class TestFullText(FindsWords):
    highest_score: ClassVar[float] = float("inf")
    """BM25's scores have no bound."""
    finds_parts_of_words: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _server(self, lagging: TablestoreServer) -> None:
        self.server = lagging

    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[TablestoreStore]:
        table = namespace.replace("-", "_")
        async with opened(TablestoreStore(configured(self.server, table_name=table))) as store:
            yield store
