"""mem0's vector store, on `RedisVectors`: plain Redis, where mem0's own wants RediSearch.

mem0 tells users apart by a filter, and reads, updates and deletes by nothing but an id. Here every
user's rows are apart, so each call needs an owner: the ``user_id`` of payload or filters, else the
one whose context (`owner_is`) the call runs in. ``run_id`` is the row's group.

Two more fields of a payload are for this module: ``recallq_order``, the row's order key, and
``recallq_epoch``, which deletions are told by. mem0 makes further rows of its own, for entities,
that have neither; the epoch is then the context's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

# mem0 carries annotations here and there, and no marker that it does.
from mem0.utils.factory import VectorStoreFactory  # type: ignore[import-untyped]
from mem0.vector_stores.base import VectorStoreBase  # type: ignore[import-untyped]

from recallq.errors import BackendError
from recallq_worker.backends.base import Added
from recallq_worker.backends.mem0.filters import Matcher, matcher
from recallq_worker.vectors import NEVER_FENCED, RedisVectors, Row

_LIST_DEFAULT = 100
_LIST_CHUNK = 1000
_1970 = datetime(1970, 1, 1, tzinfo=UTC)


def register() -> None:
    """Makes mem0 use this class where its configuration says ``redis``."""
    VectorStoreFactory.provider_to_class["redis"] = f"{__name__}.{RedisVectorStore.__qualname__}"


@dataclass(frozen=True, slots=True)
class _Context:
    owner: str
    epoch: int


_context: ContextVar[_Context | None] = ContextVar("recallq_mem0_owner", default=None)


@contextmanager
def owner_is(owner: str, *, epoch: int = NEVER_FENCED) -> Iterator[None]:
    """Whose rows calls without a ``user_id`` mean, and the epoch of rows that name none."""
    token = _context.set(_Context(owner, epoch))
    try:
        yield
    finally:
        _context.reset(token)


@dataclass(slots=True)
class Found:
    """What mem0 expects of a row."""

    id: str
    payload: dict[str, Any]
    score: float | None = None


Founds = list[Found]
"""Inside the class, `list` is a method."""


class RedisVectorStore(VectorStoreBase):  # type: ignore[misc]  # to the type checker it is Any
    """One collection. `vectors` is what it is made of, for what mem0 has no calls for."""

    def __init__(
        self,
        redis_url: str,
        collection_name: str = "mem0",
        embedding_model_dims: int = 1536,
    ) -> None:
        self.vectors = RedisVectors(redis_url, collection_name, dimensions=embedding_model_dims)
        self.collection_name = collection_name
        self.embedding_model_dims = embedding_model_dims

    def close(self) -> None:
        self.vectors.close()

    # --- write ----------------------------------------------------------------------------------

    def insert(
        self,
        vectors: Sequence[Any],
        payloads: Sequence[dict[str, Any]] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Stores rows, but for those that a delete has fenced off: they are to be gone."""
        self.store(vectors, payloads, ids)

    def store(
        self,
        vectors: Sequence[Any],
        payloads: Sequence[dict[str, Any]] | None = None,
        ids: Sequence[str] | None = None,
    ) -> Sequence[Added]:
        """`insert` that says what became of each row."""
        payloads = payloads if payloads is not None else [{} for _ in vectors]
        ids = ids if ids is not None else [str(uuid.uuid4()) for _ in vectors]
        owners: dict[str, list[int]] = {}
        for position, payload in enumerate(payloads):
            owners.setdefault(_owner_of(payload), []).append(position)
        if not len(vectors) == len(payloads) == len(ids):
            raise ValueError("as many vectors, payloads and ids are needed")
        stored = [Added.FENCED] * len(ids)
        for owner, positions in owners.items():
            added = self.vectors.upsert(
                owner,
                [_row(str(ids[position]), payloads[position]) for position in positions],
                [vectors[position] for position in positions],
            )
            for position, each in zip(positions, added, strict=True):
                stored[position] = each
        return stored

    def update(
        self, vector_id: str, vector: Any = None, payload: dict[str, Any] | None = None
    ) -> None:
        """Changes a row of the context's owner; one that has been deleted stays so."""
        owner = _owner_of(payload or {})
        self.vectors.update(owner, str(vector_id), vector=vector, payload=payload)

    def delete(self, vector_id: str) -> None:
        self.vectors.remove(_owner_of({}), [str(vector_id)])

    # --- read -----------------------------------------------------------------------------------

    def get(self, vector_id: str) -> Found | None:
        row = self.vectors.get(_owner_of({}), str(vector_id))
        return None if row is None else Found(row.id, row.payload)

    def list(
        self, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> Sequence[Founds]:
        """The oldest rows, in order."""
        owner, group, where = _scope(filters)
        limit = _LIST_DEFAULT if top_k is None else top_k
        found: Founds = []
        offset = 0
        while len(found) < limit:
            size = _LIST_CHUNK if where else min(limit - len(found), _LIST_CHUNK)
            rows = self.vectors.page(owner, group=group, offset=offset, limit=size)
            found += [Found(row.id, row.payload) for row in rows if not where or where(row.payload)]
            if len(rows) < size:
                break
            offset += size
        return [found[:limit]]

    def search(
        self,
        query: str,
        vectors: Any,
        top_k: int = 5,
        filters: dict[str, Any] | None = None,
    ) -> Founds:
        owner, group, where = _scope(filters)
        hits = self.vectors.nearest(owner, vectors, top_k=top_k, group=group, where=where)
        return [Found(row.id, row.payload, score) for row, score in hits]

    def keyword_search(
        self, query: str, top_k: int = 5, filters: dict[str, Any] | None = None
    ) -> Founds:
        owner, group, where = _scope(filters)
        hits = self.vectors.keywords(owner, query, top_k=top_k, group=group, where=where)
        return [Found(row.id, row.payload, score) for row, score in hits]

    # --- collections ----------------------------------------------------------------------------

    def create_col(
        self, name: str | None = None, vector_size: int | None = None, distance: str | None = None
    ) -> None:
        """A collection begins with its first row: there is nothing to do."""
        ours = (self.collection_name, self.embedding_model_dims, "cosine")
        if (name or ours[0], vector_size or ours[1], distance or ours[2]) != ours:
            raise ValueError("another collection needs another RedisVectorStore; all use cosine")

    def list_cols(self) -> Sequence[str]:
        return [self.collection_name]

    def col_info(self, name: str | None = None) -> dict[str, Any]:
        return {
            "name": self.collection_name,
            "dimensions": self.embedding_model_dims,
            "distance": "cosine",
        }

    def delete_col(self) -> None:
        """Removes every row of every owner. Fences stay."""
        self.vectors.clear()

    def reset(self) -> None:
        self.delete_col()


def _owner_of(fields: Mapping[str, Any]) -> str:
    owner = fields.get("user_id")
    if owner is None:
        context = _context.get()
        if context is None:
            raise BackendError(
                "whose rows? name a user_id, or call inside `with owner_is(...)`:"
                " rows of different users are apart"
            )
        return context.owner
    if not isinstance(owner, str):
        raise BackendError("user_id must be one string: rows of different users are apart")
    return owner


def _row(row_id: str, payload: dict[str, Any]) -> Row:
    order, epoch = payload.get("recallq_order"), payload.get("recallq_epoch")
    if epoch is None:
        context = _context.get()
        epoch = NEVER_FENCED if context is None else context.epoch
    return Row(
        id=row_id,
        payload=payload,
        order=_created(payload) if order is None else int(order),
        epoch=int(epoch),
        group=str(payload.get("run_id") or ""),
    )


def _created(payload: Mapping[str, Any]) -> int:
    """Microseconds since 1970; now, if the payload does not say."""
    try:
        created = datetime.fromisoformat(payload["created_at"])
    except (KeyError, TypeError, ValueError):
        return time.time_ns() // 1000
    if created.tzinfo is None:
        created = created.replace(tzinfo=UTC)
    return (created - _1970) // timedelta(microseconds=1)


def _scope(filters: Mapping[str, Any] | None) -> tuple[str, str | None, Matcher | None]:
    """Owner, group and what else `filters` want. A group is taken literally, like an owner: one
    that is called ``*`` is no wildcard."""
    rest = {key: value for key, value in (filters or {}).items() if value is not None}
    owner = _owner_of(rest)
    rest.pop("user_id", None)
    group = rest.pop("run_id") if isinstance(rest.get("run_id"), str) else None
    return owner, group, matcher(rest) if rest else None
