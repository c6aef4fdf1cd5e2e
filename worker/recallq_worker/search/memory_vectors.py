"""Vectors in the memory of a process; see `recallq_worker.search.in_memory`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from recallq.contract import Scope
from recallq.keys import escape
from recallq_worker.backends.base import Record
from recallq_worker.embedding import Vector
from recallq_worker.vectors import Compared
from recallq_worker.vectors.replicas import VectorReplica
from recallq_worker.vectors.rows import Head


class MemoryVectorRows:
    """A `recallq_worker.search.semantic.VectorRows`.

    It knows no fences: nothing comes late in a process that reads its records just before.
    """

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._replicas: dict[tuple[str, str], VectorReplica] = {}
        self._epochs: dict[tuple[str, str], dict[str, Record]] = {}

    async def start(self, dimensions: int, model: str) -> None:
        """Nothing is there yet."""

    async def stop(self) -> None:
        self._replicas.clear()
        self._epochs.clear()

    async def epochs(self, scope: Scope, ids: Sequence[str]) -> Mapping[str, int]:
        known = self._epochs.get(_user(scope), {})
        return {record_id: known[record_id].epoch for record_id in ids if record_id in known}

    async def put(self, records: Sequence[Record], vectors: Sequence[Vector]) -> None:
        user = _user(records[0].scope)
        replica = self._replicas.setdefault(user, VectorReplica(self._dimensions))
        heads = [
            Head(each.epoch, each.order, _suffix(each.scope.session_id or "")) for each in records
        ]
        values = [np.asarray(vector, dtype="<f4").tobytes() for vector in vectors]
        replica.put([each.record_id.encode() for each in records], heads, values)
        self._epochs.setdefault(user, {}).update((each.record_id, each) for each in records)

    async def remove(self, scope: Scope, up_to: Mapping[str, int]) -> None:
        known = await self.epochs(scope, list(up_to))
        self.drop(scope, [each for each, epoch in known.items() if epoch <= up_to[each]])

    def drop(self, scope: Scope, ids: Iterable[str]) -> None:
        """Removes them, at once."""
        user = _user(scope)
        gone = list(ids)
        if user in self._replicas:
            self._replicas[user].drop([record_id.encode() for record_id in gone])
            for record_id in gone:
                self._epochs[user].pop(record_id, None)

    async def delete(self, scope: Scope, before_epoch: int) -> None:
        known = self._epochs.get(_user(scope), {})
        self.drop(
            scope,
            [
                record_id
                for record_id, record in known.items()
                if record.epoch < before_epoch
                and scope.session_id in (None, record.scope.session_id)
            ],
        )

    async def compare(
        self, scope: Scope, vector: Vector, ids: Sequence[str], most: int
    ) -> Compared:
        replica = self._replicas.get(_user(scope))
        if replica is None:
            return Compared([], {})
        length = float(np.linalg.norm(vector))
        direction = (vector / length if length else vector).astype(np.float32)
        suffix = None if scope.session_id is None else _suffix(scope.session_id)
        return replica.compare(direction, suffix, [each.encode() for each in ids], most)


def _user(scope: Scope) -> tuple[str, str]:
    return scope.tenant, scope.user_id


def _suffix(session_id: str) -> bytes:
    return escape(session_id).encode()
