"""Where memories are: in Redis, with their vectors, or with their vectors in a store of ReMe's.

All that is listed, deleted or recovered by is in Redis in either case, so that pages, sessions,
deletion epochs and fences are the same; another vector store is asked only what is similar to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from recallq_worker.backends.base import Added
from recallq_worker.backends.reme.vector_store import RedisVectorStore
from recallq_worker.vectors import Row


class Storage(Protocol):
    """The memories of one kind. An owner is a user; a row's group is its session. Raises the errors
    of Redis as backends do, and those of vector stores as they are."""

    flow_store: Any
    """The vector store that ReMe's flows read."""

    async def open(self) -> str:
        """Asks whether it is there; says what it is."""
        ...

    async def close(self) -> None: ...

    async def claim(self, dimensions: int, model: str) -> None:
        """Says what vectors are there. Raises `ConfigurationError` if there are others."""
        ...

    async def put(
        self, owner: str, rows: Sequence[Row], nodes: Sequence[Any], vectors: Sequence[list[float]]
    ) -> bool:
        """Stores memories; False if a deletion has passed meanwhile, and none is stored. Repeating
        it changes nothing."""
        ...

    async def discard(self, owner: str, ids: Sequence[str], *, ban: bool) -> None:
        """Removes memories; with `ban`, nobody stores them any more."""
        ...

    async def get(self, owner: str, ids: Sequence[str]) -> Sequence[Row]:
        """Those that are there."""
        ...

    async def nearest(
        self, owner: str, vector: Sequence[float], *, top_k: int, group: str | None
    ) -> Sequence[tuple[Row, float]]:
        """The most similar ones, best first, ties by recency, with their cosine."""
        ...

    async def page(
        self, owner: str, *, group: str | None, offset: int, limit: int
    ) -> Sequence[Row]: ...

    async def delete(self, owner: str, *, group: str | None, before_epoch: int) -> int: ...


class RedisStorage:
    """All of it in Redis."""

    def __init__(self, store: RedisVectorStore) -> None:
        self.flow_store: Any = store
        self._store = store
        self._vectors = store.vectors

    async def open(self) -> str:
        await self._store.in_thread(self._vectors.ping)
        return "vectors in Redis"

    async def close(self) -> None:
        self._store.close()

    async def claim(self, dimensions: int, model: str) -> None:
        await self._store.in_thread(lambda: self._vectors.claim(dimensions, model))

    async def put(
        self, owner: str, rows: Sequence[Row], nodes: Sequence[Any], vectors: Sequence[list[float]]
    ) -> bool:
        added = await self._store.in_thread(lambda: self._vectors.upsert(owner, rows, vectors))
        return set(added) != {Added.FENCED}

    async def discard(self, owner: str, ids: Sequence[str], *, ban: bool) -> None:
        if not ids:
            return
        if ban:
            await self._store.in_thread(lambda: self._vectors.ban(owner, ids))
        else:
            await self._store.in_thread(lambda: self._vectors.remove(owner, ids))

    async def get(self, owner: str, ids: Sequence[str]) -> Sequence[Row]:
        return await self._store.in_thread(lambda: self._vectors.get_many(owner, ids))

    async def nearest(
        self, owner: str, vector: Sequence[float], *, top_k: int, group: str | None
    ) -> Sequence[tuple[Row, float]]:
        return await self._store.in_thread(
            lambda: self._vectors.nearest(owner, vector, top_k=top_k, group=group)
        )

    async def page(
        self, owner: str, *, group: str | None, offset: int, limit: int
    ) -> Sequence[Row]:
        return await self._store.in_thread(
            lambda: self._vectors.page(owner, group=group, offset=offset, limit=limit)
        )

    async def delete(self, owner: str, *, group: str | None, before_epoch: int) -> int:
        return await self._store.in_thread(
            lambda: self._vectors.delete(owner, group=group, before_epoch=before_epoch)
        )
