"""flowllm's vector store, on `RedisVectors`: one in plain Redis that all workers share.

A workspace is an owner there. Two fields of a node's metadata are for this module:
``recallq_session``, the row's group, and ``recallq_order``, its order key; ``recallq_epoch`` is
what deletions are told by.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flowllm.core.context import C
from flowllm.core.schema import VectorNode
from flowllm.core.vector_store import BaseVectorStore

from recallq.errors import BackendError
from recallq_worker.backends.reme.shapes import EPOCH, ORDER, SESSION
from recallq_worker.daemon_threads import DaemonThreads
from recallq_worker.vectors import NEVER_FENCED, RedisVectors, Row

_THREADS = 16
_PAGE = 1000

T = TypeVar("T")


@C.register_vector_store("redis")
class RedisVectorStore(BaseVectorStore):  # type: ignore[misc]  # to the type checker it is Any
    """One collection, with cosine similarity. `vectors` is what it is made of, for what flowllm has
    no calls for."""

    def __init__(
        self,
        embedding_model: Any = None,
        *,
        url: str,
        collection: str,
        dimensions: int,
        connect_timeout: float = 5.0,
    ) -> None:
        """Connects to nothing yet."""
        super().__init__(embedding_model=embedding_model)
        self.vectors = RedisVectors(
            url,
            collection,
            dimensions=dimensions,
            connect_timeout=connect_timeout,
            text=lambda payload: str(payload.get("content") or ""),
        )
        self.threads: Executor = DaemonThreads(_THREADS, "reme-redis")

    # --- write ----------------------------------------------------------------------------------

    def insert(self, nodes: Any, workspace_id: str, **kwargs: Any) -> None:
        """Stores nodes, but for those that a delete has fenced off: they are to be gone."""
        several = nodes if isinstance(nodes, list) else [nodes]
        self.get_node_embeddings([node for node in several if not node.vector])
        self._store(several, workspace_id)

    async def async_insert(self, nodes: Any, workspace_id: str, **kwargs: Any) -> None:
        several = nodes if isinstance(nodes, list) else [nodes]
        await self.async_get_node_embeddings([node for node in several if not node.vector])
        await self.in_thread(lambda: self._store(several, workspace_id))

    def _store(self, nodes: Sequence[Any], workspace_id: str) -> None:
        rows = [row_of(node) for node in nodes]
        self.vectors.upsert(workspace_id, rows, [node.vector for node in nodes])

    def delete(self, node_ids: str | Sequence[str], workspace_id: str, **kwargs: Any) -> None:
        ids = [node_ids] if isinstance(node_ids, str) else node_ids
        self.vectors.remove(workspace_id, ids)

    async def async_delete(
        self, node_ids: str | Sequence[str], workspace_id: str, **kwargs: Any
    ) -> None:
        await self.in_thread(lambda: self.delete(node_ids, workspace_id))

    # --- read -----------------------------------------------------------------------------------

    def search(
        self,
        query: str,
        workspace_id: str,
        top_k: int = 1,
        filter_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Sequence[Any]:
        return self._nearest(workspace_id, self.get_embeddings(query), top_k, filter_dict)

    async def async_search(
        self,
        query: str,
        workspace_id: str,
        top_k: int = 1,
        filter_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Sequence[Any]:
        if not await self.async_exist_workspace(workspace_id):
            return []  # nobody to compare with: nothing is paid for
        vector = await self.async_get_embeddings(query)
        return await self.in_thread(lambda: self._nearest(workspace_id, vector, top_k, filter_dict))

    def _nearest(
        self, workspace_id: str, vector: Any, top_k: int, filter_dict: dict[str, Any] | None
    ) -> Sequence[Any]:
        where = partial(_fits, filter_dict) if filter_dict else None
        found = self.vectors.nearest(workspace_id, vector, top_k=top_k, where=where)
        return [node_of(row, workspace_id, score) for row, score in found]

    def list_workspace_nodes(self, workspace_id: str, **kwargs: Any) -> Sequence[Any]:
        return [node_of(row, workspace_id) for row in self._every_row(workspace_id)]

    async def async_list_workspace_nodes(self, workspace_id: str, **kwargs: Any) -> Sequence[Any]:
        return await self.in_thread(lambda: self.list_workspace_nodes(workspace_id))

    def _every_row(self, workspace_id: str) -> Iterator[Row]:
        offset = 0
        while rows := self.vectors.page(workspace_id, group=None, offset=offset, limit=_PAGE):
            yield from rows
            offset += len(rows)

    # --- workspaces -----------------------------------------------------------------------------

    def exist_workspace(self, workspace_id: str, **kwargs: Any) -> bool:
        return self.vectors.count(workspace_id) > 0

    async def async_exist_workspace(self, workspace_id: str, **kwargs: Any) -> bool:
        return await self.in_thread(lambda: self.exist_workspace(workspace_id))

    def create_workspace(self, workspace_id: str, **kwargs: Any) -> None:
        """A workspace begins with its first node: there is nothing to do."""

    async def async_create_workspace(self, workspace_id: str, **kwargs: Any) -> None:
        """The same."""

    def delete_workspace(self, workspace_id: str, **kwargs: Any) -> None:
        self.vectors.remove(workspace_id, [row.id for row in self._every_row(workspace_id)])

    async def async_delete_workspace(self, workspace_id: str, **kwargs: Any) -> None:
        await self.in_thread(lambda: self.delete_workspace(workspace_id))

    def list_workspace(self, **kwargs: Any) -> Sequence[str]:
        raise _not_offered("list_workspace")

    async def async_list_workspace(self, **kwargs: Any) -> Sequence[str]:
        raise _not_offered("async_list_workspace")

    def dump_workspace(self, workspace_id: str, path: str | Path = "", **kwargs: Any) -> None:
        raise _not_offered("dump_workspace")

    async def async_dump_workspace(
        self, workspace_id: str, path: str | Path = "", **kwargs: Any
    ) -> None:
        raise _not_offered("async_dump_workspace")

    def load_workspace(self, workspace_id: str, path: str | Path = "", **kwargs: Any) -> None:
        raise _not_offered("load_workspace")

    async def async_load_workspace(
        self, workspace_id: str, path: str | Path = "", **kwargs: Any
    ) -> None:
        raise _not_offered("async_load_workspace")

    def copy_workspace(self, src_workspace_id: str, dest_workspace_id: str, **kwargs: Any) -> None:
        raise _not_offered("copy_workspace")

    async def async_copy_workspace(
        self, src_workspace_id: str, dest_workspace_id: str, **kwargs: Any
    ) -> None:
        raise _not_offered("async_copy_workspace")

    # --- the rest -------------------------------------------------------------------------------

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs what asks Redis in one of the store's threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def close(self) -> None:
        self.vectors.close()
        self.threads.shutdown(wait=False)

    async def async_close(self) -> None:
        self.close()


def row_of(node: Any) -> Row:
    """A node as `RedisVectors` keeps it."""
    return Row(
        id=node.unique_id,
        payload={"content": node.content, "metadata": node.metadata},
        order=int(node.metadata.get(ORDER) or time.time_ns() // 1000),
        epoch=int(node.metadata.get(EPOCH, NEVER_FENCED)),
        group=str(node.metadata.get(SESSION) or ""),
    )


def node_of(row: Row, workspace_id: str, score: float | None = None) -> Any:
    """The node of a row. Of one that was found, ``score`` in its metadata says how similar it is,
    as in flowllm's other stores."""
    metadata = dict(row.payload.get("metadata") or {})
    if score is not None:
        metadata["score"] = score
    return VectorNode(
        unique_id=row.id,
        workspace_id=workspace_id,
        content=row.payload.get("content") or "",
        metadata=metadata,
    )


def _fits(wanted: dict[str, Any], payload: dict[str, Any]) -> bool:
    metadata = payload.get("metadata") or {}
    for name, value in wanted.items():
        found = metadata.get(name.removeprefix("metadata."))
        if isinstance(value, list):
            fits = found in value
        elif isinstance(value, dict):
            fits = _in_range(found, value)
        else:
            fits = found == value
        if not fits:
            return False
    return True


def _in_range(found: Any, bounds: dict[str, Any]) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return (
        found >= bounds.get("gte", found)
        and found <= bounds.get("lte", found)
        and ("gt" not in bounds or found > bounds["gt"])
        and ("lt" not in bounds or found < bounds["lt"])
    )


def _not_offered(call: str) -> BackendError:
    return BackendError(f"the vector store in Redis has no {call}: ask RecallQ's own commands")
