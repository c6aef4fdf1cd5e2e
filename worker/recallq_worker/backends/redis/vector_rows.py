"""Where the redis backend keeps vectors: `recallq_worker.vectors`, a row a record.

Rows have no payload: what was said is in the records, and a row whose record is gone is found by
nobody. They fence deletes by themselves, so a vector that comes late is not stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from recallq.contract import Scope
from recallq.keys import Keys
from recallq_worker.backends.base import Record
from recallq_worker.embedding import Vector
from recallq_worker.vectors import Compared, RedisVectors, Row


class RedisVectorRows:
    """A `recallq_worker.search.semantic.VectorRows`."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        dimensions: int,
        ttl: int | None = None,
        connect_timeout: float = 5.0,
        cache_mb: float = 128.0,
    ) -> None:
        """Connects to nothing yet. `ttl` in seconds."""
        self._keys = Keys(namespace)
        self._ttl = ttl
        self._vectors = RedisVectors(
            url,
            f"{namespace}:meaning",
            dimensions=dimensions,
            connect_timeout=connect_timeout,
            cache_bytes=int(cache_mb * 1e6),
        )

    async def start(self, dimensions: int, model: str) -> None:
        await asyncio.to_thread(self._vectors.claim, dimensions, model)

    async def stop(self) -> None:
        await asyncio.to_thread(self._vectors.close)

    async def epochs(self, scope: Scope, ids: Sequence[str]) -> Mapping[str, int]:
        rows = await asyncio.to_thread(self._vectors.get_many, self._owner(scope), ids)
        return {row.id: row.epoch for row in rows}

    async def put(self, records: Sequence[Record], vectors: Sequence[Vector]) -> None:
        owner = self._owner(records[0].scope)
        rows = [
            Row(each.record_id, {}, each.order, each.epoch, each.scope.session_id or "")
            for each in records
        ]
        await asyncio.to_thread(self._vectors.upsert, owner, rows, vectors, ttl=self._ttl)

    async def remove(self, scope: Scope, up_to: Mapping[str, int]) -> None:
        await asyncio.to_thread(self._vectors.remove, self._owner(scope), list(up_to), up_to)

    async def forget(self, base: str, ids: Sequence[str]) -> None:
        """Removes rows of a user who is known by the beginning of the user's keys."""
        owner = base[base.index("{") + 1 : -1]
        await asyncio.to_thread(self._vectors.remove, owner, ids)

    async def delete(self, scope: Scope, before_epoch: int) -> None:
        await asyncio.to_thread(
            self._vectors.delete,
            self._owner(scope),
            group=scope.session_id,
            before_epoch=before_epoch,
        )

    async def compare(
        self, scope: Scope, vector: Vector, ids: Sequence[str], most: int
    ) -> Compared:
        return await asyncio.to_thread(
            self._vectors.compare,
            self._owner(scope),
            vector,
            group=scope.session_id,
            ids=ids,
            most=most,
        )

    def _owner(self, scope: Scope) -> str:
        return self._keys.user_tag(scope.tenant, scope.user_id).strip("{}")
