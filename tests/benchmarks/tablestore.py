"""What the tablestore backend costs: embedding requests, time, and what a delete leaves behind.

    python -m tests.benchmarks.tablestore [--adds 1000] [--users 100] [--embedding 0.1]
                                          [--lag 2] [--records 10000]

One worker process with its defaults, the real SDKs, and loopback servers in processes of their own:
a Tablestore whose search index lags, a DashScope that takes a tenth of a second. Beside it, each
add embeds and puts its message by itself, as agentscope-runtime did, ``--side-by-side`` at once.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import dashscope
import tablestore as ots

from recallq import MemoryClient, Wait
from recallq.embedded import EmbeddedRedis
from recallq_worker.backends.tablestore import create_tablestore_client
from recallq_worker.backends.tablestore.rows import RECORDS, owner_of
from tests.loopback.dashscope_api import EMBEDDINGS, DashScopeServer
from tests.loopback.tablestore_api import TablestoreServer
from tests.support import Worker

MODEL = "text-embedding-v4"
KEY = "sk-benchmark"
INSTANCE = {"instance_name": "loopback", "access_key_id": "ak-loopback"}
SECRET = "sk-loopback"


@dataclass
class Served:
    """A loopback server in a process of its own."""

    url: str
    pipe: Connection

    def requests(self) -> int:
        """How many there were since it was last asked."""
        self.pipe.send("count")
        return int(self.pipe.recv())


def serve(pipe: Connection, make: Callable[[], Any], path: str) -> None:
    with make() as server:
        pipe.send(server.url)
        while pipe.recv() == "count":
            pipe.send(server.count(path))
            server.reset_counts()


def tablestore_server(lag: float) -> TablestoreServer:
    server = TablestoreServer(index_lag=lag)
    server.keep_bodies = False
    return server


def dashscope_server(seconds: float) -> DashScopeServer:
    server = DashScopeServer(api_key=KEY)
    server.latency[EMBEDDINGS] = seconds
    return server


@contextmanager
def served(make: Callable[[], Any], path: str) -> Iterator[Served]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, make, path), daemon=True)
    process.start()
    try:
        yield Served(ours.recv(), ours)
    finally:
        ours.send("stop")
        process.join(10)


def text(number: int) -> str:
    return f"message {number}: " + "the oak desk will be delivered on Tuesday morning. " * 5


async def through_recallq(client: MemoryClient, embeddings: Served, adds: int, users: int) -> None:
    ways: list[tuple[Wait, int]] = [("stored", adds), ("searchable", 0)]
    for wait, first in ways:
        embeddings.requests()
        began = time.monotonic()
        await asyncio.gather(
            *(
                client.add_memory(f"user-{n % users}", text(n), wait=wait, timeout=600)
                for n in range(first, first + adds)
            )
        )
        seconds = time.monotonic() - began
        if wait == "stored":
            await client.add_memory("last", "one", timeout=600)
            await asyncio.sleep(5)  # for those that are embedded now
        print(
            f"RecallQ: {adds:,} adds of {users} users, all at once, are {wait} after "
            f"{seconds:.2f} s ({adds / seconds:,.0f}/s); {embeddings.requests()} embedding requests"
        )


async def one_by_one(tables: Served, embeddings: Served, adds: int, side_by_side: int) -> None:
    embeddings.requests()
    model = dashscope.AsyncClient(api_key=KEY, base_url=f"{embeddings.url}/api/v1")
    table = _client(tables)
    slots = asyncio.Semaphore(side_by_side)
    primary = [("document_id", "STRING"), ("tenant_id", "STRING")]
    await table.create_table(
        ots.TableMeta("theirs", primary),
        ots.TableOptions(),
        ots.ReservedThroughput(ots.CapacityUnit(0, 0)),
    )

    async def add(number: int) -> None:
        async with slots:
            answer = await model.embeddings.create(model=MODEL, input=[text(number)])
            vector = answer.embeddings[0].embedding
            key = [("document_id", f"m{number}"), ("tenant_id", "t")]
            columns = [("text", text(number)), ("embedding", str(vector))]
            await table.put_row("theirs", ots.Row(key, columns))

    began = time.monotonic()
    try:
        await asyncio.gather(*(add(number) for number in range(adds)))
    finally:
        await table.close()
        await model.aclose()
    seconds = time.monotonic() - began
    print(
        f"One by one: {embeddings.requests():,} embedding requests, {side_by_side} side by "
        f"side; stored after {seconds:.2f} s ({adds / seconds:,.0f}/s)"
    )


async def delete(client: MemoryClient, tables: Served, records: int) -> None:
    began = time.monotonic()
    await asyncio.gather(
        *(
            client.add_memory("large", [text(n) for n in range(at, at + 100)], wait="stored")
            for at in range(0, records, 100)
        )
    )
    stored = time.monotonic() - began
    began = time.monotonic()
    removed = (await client.delete_memory("large", timeout=600)).removed
    seconds = time.monotonic() - began
    left = await client.list_memory("large", {"page_size": 10_000})
    found = await client.search_memory("large", "oak desk", {"top_k": 100})
    behind = await rows_of(tables, owner_of("default", "large"))
    print(
        f"Delete: {records:,} records stored after {stored:.1f} s, {removed:,} removed in "
        f"{seconds:.1f} s while the index lags; {len(left)} listed, {len(found)} found, {behind} "
        "left behind in the table"
    )


async def rows_of(tables: Served, owner: str) -> int:
    """A user's records in the table itself."""
    client = _client(tables)
    start, end = ([("owner", owner), ("place", place)] for place in RECORDS)
    try:
        rows = (await client.get_range("recallq_memory", ots.Direction.FORWARD, start, end))[2]
    finally:
        await client.close()
    return len(rows)


def _client(tables: Served) -> Any:
    return create_tablestore_client(tables.url, **INSTANCE, access_key_secret=SECRET)


async def main(options: argparse.Namespace) -> None:
    with (
        EmbeddedRedis() as redis,
        served(partial(tablestore_server, options.lag), "POST /") as tables,
        served(partial(dashscope_server, options.embedding), EMBEDDINGS) as embeddings,
    ):
        instance: dict[str, Any] = {f"tablestore_{name}": each for name, each in INSTANCE.items()}
        worker = Worker(
            redis.url,
            backend="tablestore",
            tablestore_search_strategy="vector",
            tablestore_end_point=tables.url,
            tablestore_access_key_secret=SECRET,
            embedding_api_key=KEY,
            embedding_base_url=f"{embeddings.url}/api/v1",
            embedding_provider="dashscope",
            **instance,
        )
        await asyncio.to_thread(worker.start)
        try:
            async with MemoryClient(redis.url) as client:
                await client.add_memory("warm", "up")
                await through_recallq(client, embeddings, options.adds, options.users)
                await one_by_one(tables, embeddings, options.adds, options.side_by_side)
                await delete(client, tables, options.records)
        finally:
            await asyncio.to_thread(worker.close)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adds", type=int, default=1000)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--embedding", type=float, default=0.1, help="seconds of a request")
    parser.add_argument("--lag", type=float, default=2.0, help="seconds of the search index")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--side-by-side", type=int, default=64)
    asyncio.run(main(parser.parse_args()))
