"""An embedder without a model, which does what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from recallq_worker.embedding import Embedded, Kind, Vector

DIMENSIONS = 8


def vector_of(text: str) -> Vector:
    """The same for the same text, and no other."""
    digest = blake2b(text.encode(), digest_size=DIMENSIONS).digest()
    return np.frombuffer(digest, dtype=np.uint8).astype(np.float32)


@dataclass
class Request:
    """One that was sent."""

    texts: list[str]
    kind: Kind
    at: float
    """In seconds of the event loop's time."""


class FakeEmbedder:
    """Takes `latency` seconds for a request, and then does as `fate` says."""

    most_request_tokens: int | None = None
    most_at_once: int | None = None

    def __init__(
        self,
        *,
        most_texts: int = 10,
        latency: float = 0.1,
        account: str = "fake",
        dimensions: int = DIMENSIONS,
    ) -> None:
        self.model = "fake"
        self.dimensions = dimensions
        self.most_texts = most_texts
        self.account = account
        self.latency = latency
        self.fate: Callable[[Request], Exception | None] = lambda request: None
        self.requests: list[Request] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.running = False

    async def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        assert self.running
        assert 0 < len(texts) <= self.most_texts
        request = Request(list(texts), kind, asyncio.get_running_loop().time())
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            fate = self.fate(request)
            await asyncio.sleep(self.latency)
            if fate is not None:
                raise fate
        finally:
            self.in_flight -= 1
        return Embedded([vector_of(text) for text in texts], sum(len(text) for text in texts))

    @property
    def sent(self) -> list[str]:
        """All texts, in the order in which they were sent."""
        return [text for request in self.requests for text in request.texts]

    @property
    def sizes(self) -> list[int]:
        return [len(request.texts) for request in self.requests]
