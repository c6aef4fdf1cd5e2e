"""What the slow lane saves: adds through RecallQ, and through mem0's own ``AsyncMemory``.

    python -m tests.benchmarks.slow_lane [--adds 500] [--users 20] [--llm 1.0]

Both sides store in the same embedded Redis and ask the same loopback OpenAI server, whose LLM takes
a second. RecallQ runs one worker process with its defaults; ``AsyncMemory`` is used as its
documentation says, all adds at once in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

from recallq import MemoryClient
from recallq.embedded import EmbeddedRedis
from recallq_worker.backends.mem0.settings import complete
from recallq_worker.models import ModelSettings
from tests.loopback.openai_api import OpenAIServer
from tests.support import Worker

DIMENSIONS = 1536


@dataclass(frozen=True)
class Figures:
    way: str
    seconds: float
    chats: int
    embeddings: int
    stored: int


def models(server: OpenAIServer) -> dict[str, str]:
    return {
        f"{kind}_{name}": value
        for kind in ("llm", "embedding")
        for name, value in (("api_key", server.api_key), ("base_url", server.base_url))
    }


async def through_recallq(
    server: OpenAIServer, redis: EmbeddedRedis, adds: int, users: int
) -> Figures:
    settings: dict[str, Any] = models(server)
    worker = Worker(redis.url, namespace="ours", backend="mem0", **settings)
    await asyncio.to_thread(worker.start)
    try:
        async with MemoryClient(redis.url, namespace="ours") as client:
            server.reset_counts()
            began = time.monotonic()
            handles = await asyncio.gather(
                *(client.submit_add(f"user-{n % users}", fact(n)) for n in range(adds))
            )
            accepted = time.monotonic() - began
            results = await asyncio.gather(*(each.result(600) for each in handles))
            seconds = time.monotonic() - began
            print(f"accepted after {accepted:.2f} s")
    finally:
        await asyncio.to_thread(worker.close)
    stored = sum(each.added for each in results)
    return Figures("RecallQ", seconds, server.chats, server.embedding_calls, stored)


async def through_mem0(
    server: OpenAIServer, redis: EmbeddedRedis, adds: int, users: int
) -> Figures:
    from mem0 import AsyncMemory  # type: ignore[import-untyped]  # it has no marker

    import recallq_worker.backends.mem0  # noqa: F401  # switches mem0's telemetry off
    from recallq_worker.backends.mem0.vector_store import register

    register()
    config = complete(
        {},
        ModelSettings.load(**models(server)),
        store_url=redis.url,
        namespace="theirs",
        infer=True,
    )
    memory = await asyncio.to_thread(AsyncMemory.from_config, config)
    server.reset_counts()
    began = time.monotonic()
    results = await asyncio.gather(
        *(
            memory.add(
                [{"role": "user", "content": fact(n)}],
                user_id=f"user-{n % users}",
                run_id="default",
            )
            for n in range(adds)
        )
    )
    seconds = time.monotonic() - began
    stored = sum(len(each["results"]) for each in results)
    return Figures("AsyncMemory", seconds, server.chats, server.embedding_calls, stored)


def fact(number: int) -> str:
    return f"Fact number {number}: I keep {number} books about the history of tea at home."


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adds", type=int, default=500)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--llm", type=float, default=1.0, help="seconds that the LLM takes")
    options = parser.parse_args()
    with OpenAIServer(dimensions=DIMENSIONS) as server, EmbeddedRedis() as redis:
        server.latency["/v1/chat"] = options.llm
        figures = [
            await way(server, redis, options.adds, options.users)
            for way in (through_recallq, through_mem0)
        ]
    print(f"{options.adds} adds of {options.users} users at once, the LLM takes {options.llm:g} s")
    print("| way | seconds | adds/s | LLM calls | embedding calls | memories |")
    print("|---|---|---|---|---|---|")
    for each in figures:
        print(
            f"| {each.way} | {each.seconds:.1f} | {options.adds / each.seconds:.1f} "
            f"| {each.chats} | {each.embeddings} | {each.stored} |"
        )


if __name__ == "__main__":
    asyncio.run(main())
