"""Vectors of texts that were embedded before, in the process's memory and, if wanted, in Redis.

The same texts come again: questions that agents ask often, and every text of a call that is tried
again after one of its requests failed. Entries are found by a digest of model, dimensions, kind and
text; the text itself is not kept. Still a vector says much of its text, so what a user had deleted
may be told from it for as long as it is kept: until others push it out here, and in Redis, where
nothing is kept unless a time to live is set, for that time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from recallq_worker.embedding.base import Kind, Vector

_OVERHEAD = 300
"""Bytes that an entry takes besides its numbers, about."""


class Digests:
    """Digests of texts, for one model and one kind."""

    def __init__(self, model: str, dimensions: int, kind: Kind) -> None:
        self._begun = blake2b(digest_size=16, person=b"recallq.vector")
        self._begun.update(f"{model}\0{dimensions}\0{kind.value}\0".encode())

    def of(self, text: bytes) -> bytes:
        digest = self._begun.copy()
        digest.update(text)
        return digest.digest()


class VectorCache:
    """The vectors that were used last, as far as there is room for them."""

    def __init__(
        self,
        most_bytes: float,
        *,
        lifetime: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Entries go when they are `lifetime` seconds old, whether they are used or not."""
        self._most = most_bytes
        self._lifetime = lifetime
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[Vector, float]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    @property
    def size(self) -> int:
        """In bytes, about."""
        return self._bytes

    def get(self, key: bytes) -> Vector | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        vector, until = entry
        if self._lifetime is not None and until <= self._clock():
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: Vector) -> None:
        if key in self._entries:
            self._remove(key)
        self._entries[key] = (
            vector,
            0.0 if self._lifetime is None else self._clock() + self._lifetime,
        )
        self._bytes += vector.nbytes + _OVERHEAD
        while self._bytes > self._most:
            self._remove(next(iter(self._entries)))

    def expire(self) -> None:
        """Lets go of what is too old."""
        if self._lifetime is not None:
            now = self._clock()
            for key in [key for key, (_, until) in self._entries.items() if until <= now]:
                self._remove(key)

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def _remove(self, key: bytes) -> None:
        vector, _ = self._entries.pop(key)
        self._bytes -= vector.nbytes + _OVERHEAD
