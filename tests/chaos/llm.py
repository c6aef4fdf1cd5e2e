"""A model server in the weather, for backends whose memories an LLM makes.

It is a loopback server, which lives through the run. A call of such a backend makes several
requests, and the weather strikes each of them for itself: were faults laid out for requests to
come, a machine on which few come would meet nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.weather import Weather
from tests.loopback.faults import Fault, HttpFailure, Received
from tests.loopback.openai_api import OpenAIServer
from tests.loopback.reme_prompts import ReMeAnswers

_SHARE = 0.5
"""How much of the weather of a call strikes each of its requests."""


def is_needed(backend: str) -> bool:
    return backend.startswith("reme_")


@contextmanager
def model_server(path: Path, chance: random.Random) -> Iterator[dict[str, str]]:
    """The variables by which workers find it. `path` is the weather's."""
    weather = Weather(path, chance)

    def strike(request: Received, after: bool) -> Fault | None:
        if after:
            lost = weather.happens("lost_reply", _SHARE)
            return Fault("cut", request.path, 1, after) if lost else None
        if weather.happens("unavailable", _SHARE):
            failure = HttpFailure(weather.chance.choice((429, 500, 503)))
            return Fault("fail", request.path, 1, after, failure=failure)
        if weather.happens("slow", _SHARE):
            return Fault("hang", request.path, 1, after, seconds=weather.nap())
        if weather.happens("stuck", _SHARE):
            return Fault("hang", request.path, 1, after, seconds=3600)
        return None

    with OpenAIServer() as server:
        server.answer = ReMeAnswers()
        server.latency["/v1/chat"] = 0.05
        server.misfortune = strike
        yield {
            f"FLOW_{model}_{name}": value
            for model in ("LLM", "EMBEDDING")
            for name, value in (("API_KEY", server.api_key), ("BASE_URL", server.base_url))
        }
