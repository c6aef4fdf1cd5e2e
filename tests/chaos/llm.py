"""A model server in the weather, for backends whose memories an LLM makes.

It is a loopback server, which lives through the run; what strikes it is dealt out by the same file
that `plugins/flaky_redis.py` reads.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.loopback.openai_api import OpenAIServer
from tests.loopback.reme_prompts import ReMeAnswers

_LOOK_EVERY = 0.1


def is_needed(backend: str) -> bool:
    return backend.startswith("reme_")


@asynccontextmanager
async def model_server(weather: Path, chance: random.Random) -> AsyncIterator[dict[str, str]]:
    """The variables by which workers find it."""
    with OpenAIServer() as server:
        server.answer = ReMeAnswers()
        server.latency["/v1/chat"] = 0.05
        storms = asyncio.create_task(_strike(server, weather, chance))
        try:
            yield {
                f"FLOW_{model}_{name}": value
                for model in ("LLM", "EMBEDDING")
                for name, value in (("API_KEY", server.api_key), ("BASE_URL", server.base_url))
            }
        finally:
            storms.cancel()
            await asyncio.gather(storms, return_exceptions=True)


async def _strike(server: OpenAIServer, weather: Path, chance: random.Random) -> None:
    """Lets some requests fail, before or after they were served, or take their time."""
    while True:
        await asyncio.sleep(_LOOK_EVERY)
        rates: dict[str, float] = json.loads(weather.read_text())
        path = chance.choice(("/v1/chat", "/v1/embeddings"))
        # Requests, not looks, are what the rates speak of: there are a few in each look.
        if chance.random() < 4 * rates.get("unavailable", 0.0):
            server.fail(path, chance.choice((429, 500, 503)), times=chance.choice((1, 2)))
        if chance.random() < 4 * rates.get("lost_reply", 0.0):
            server.cut(path, 1, after=chance.random() < 0.5)
        if chance.random() < rates.get("slow", 0.0):
            server.hang(path, chance.uniform(0.1, 1.0), times=1)
