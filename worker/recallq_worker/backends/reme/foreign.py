"""Vectors in a vector store of flowllm's own: qdrant, Elasticsearch or pgvector.

They are asked for what is similar, and nothing else. What a memory says is in Redis, too, and what
is not there is not found: so a write that was interrupted leaves nothing that anybody sees, and
none of what these stores lack is needed: pages, deletion epochs, sessions of any name, lists of
more than 10,000.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from recallq.errors import BackendError, BackendUnavailable, ConfigurationError, JobError
from recallq_worker.backends.failures import as_job_error
from recallq_worker.backends.reme.drafts import drafting
from recallq_worker.backends.reme.shapes import SESSION, session_token
from recallq_worker.backends.reme.storage import RedisStorage
from recallq_worker.backends.reme.vector_store import RedisVectorStore
from recallq_worker.vectors import Row

log = logging.getLogger(__name__)

T = TypeVar("T")

_NO_VECTOR = [0.0]
"""In Redis, where a row has its vector elsewhere."""
_QUERY = "?"
_CHUNK = 200
"""Nodes a request: some megabytes, at the usual dimensions."""
_PAGE = 1000
_MOST_FOUND = 10_000
"""What Elasticsearch finds at once, at most."""
_FAREWELL = 3.0
_PATIENCE = 30.0
"""Seconds that a call may take: not all of these clients would give up by themselves."""


class ForeignStorage(RedisStorage):
    """Rows in Redis, vectors elsewhere."""

    def __init__(
        self,
        rows: RedisVectorStore,
        backend: str,
        make: Callable[[], Any],
        workspace: Callable[[str], str],
    ) -> None:
        """`make` makes flowllm's store, and may connect; `workspace` names an owner's."""
        super().__init__(rows)
        self.embedding_model = rows.embedding_model
        self.flow_store = _Reads(self)
        self._backend = backend
        self._make = make
        self._workspace = workspace
        self._foreign: Any = None
        # pgvector's has one connection, which does one thing at a time.
        self._turn = asyncio.Lock() if backend == "pgvector" else None

    async def open(self) -> str:
        await super().open()
        if self._foreign is None:
            try:
                await asyncio.to_thread(self._connect)
            except ImportError as error:
                raise ConfigurationError(
                    f"ReMe's {self._backend} store needs a package that is not installed: {error}"
                ) from None
            except TypeError as error:
                raise ConfigurationError(
                    f"vector_store.default.params of the ReMe configuration: {error}"
                ) from None
        await self._ask(lambda: self._foreign.async_exist_workspace("recallq_is_well"))
        return f"vectors in {self._backend}"

    def _connect(self) -> None:
        self._foreign = self._make()

    async def close(self) -> None:
        foreign, self._foreign = self._foreign, None
        await super().close()
        if foreign is not None:
            try:
                async with asyncio.timeout(_FAREWELL):
                    await foreign.async_close()
            finally:
                await asyncio.to_thread(foreign.close)

    async def put(
        self, owner: str, rows: Sequence[Row], nodes: Sequence[Any], vectors: Sequence[list[float]]
    ) -> bool:
        workspace, ids = self._workspace(owner), [row.id for row in rows]
        for start in range(0, len(nodes), _CHUNK):
            portion = [_sent(node, workspace) for node in nodes[start : start + _CHUNK]]
            await self._insert(workspace, portion)
        stored = await super().put(owner, rows, nodes, [_NO_VECTOR] * len(rows))
        if not stored:
            await self._remove(owner, ids)
        return stored

    async def _insert(self, workspace: str, nodes: list[Any]) -> None:
        async def insert() -> None:
            await self._foreign.async_insert(nodes, workspace)

        try:
            await self._ask(insert)
        except JobError:
            # Two who store the first memories of a user may both have made the workspace.
            if not await self._ask(lambda: self._foreign.async_exist_workspace(workspace)):
                raise
            await self._ask(insert)

    async def discard(self, owner: str, ids: Sequence[str], *, ban: bool) -> None:
        if not ids:
            return
        await self._remove(owner, ids)
        await super().discard(owner, ids, ban=ban)
        if ban:
            # Whoever was still about to store them has seen the ban, or was before this.
            await self._remove(owner, ids)

    async def _remove(self, owner: str, ids: Sequence[str]) -> None:
        workspace = self._workspace(owner)
        if not await self._ask(lambda: self._foreign.async_exist_workspace(workspace)):
            return
        more = {"raise_on_error": False} if self._backend == "elasticsearch" else {}
        for start in range(0, len(ids), _PAGE):
            portion = list(ids[start : start + _PAGE])
            await self._ask(partial(self._foreign.async_delete, portion, workspace, **more))

    async def nearest(
        self, owner: str, vector: Sequence[float], *, top_k: int, group: str | None
    ) -> Sequence[tuple[Row, float]]:
        vectors = self._vectors
        everything, there = await self._store.in_thread(
            lambda: (vectors.count(owner), vectors.count(owner, group))
        )
        wanted = min(top_k, there)
        if wanted == 0:
            return []
        found: list[tuple[Row, float]] = []
        # Some of what they find may be in Redis no more, and pgvector's index does not find
        # everything of a session: then more is looked at, of all sessions.
        for session, most in ((group, 2 * top_k), (None, 2 * everything + _CHUNK)):
            found = await self._similar(owner, vector, min(most, _MOST_FOUND), session)
            found = [each for each in found if group is None or each[0].group == group]
            if len(found) >= wanted:
                break
        found.sort(key=lambda each: (each[1], each[0].order, each[0].id), reverse=True)
        return found[:top_k]

    async def _similar(
        self, owner: str, vector: Sequence[float], most: int, group: str | None
    ) -> list[tuple[Row, float]]:
        wanted = None if group is None else {SESSION: session_token(group)}
        with drafting() as draft:
            # They would embed the query themselves, and find its vector here.
            draft.vectors[_QUERY] = [*vector]
            nodes = await self._ask(
                lambda: self._foreign.async_search(
                    _QUERY, self._workspace(owner), top_k=most, filter_dict=wanted
                )
            )
        scores = {node.unique_id: float(node.metadata.get("score") or 0.0) for node in nodes}
        rows = await self.get(owner, list(scores))
        return [(row, max(scores[row.id], 0.0)) for row in rows]

    async def delete(self, owner: str, *, group: str | None, before_epoch: int) -> int:
        # Others' store no more from now on; then the vectors go, while the rows say which.
        await self._store.in_thread(
            lambda: self._vectors.fence(owner, group=group, before_epoch=before_epoch)
        )
        offset = 0
        while rows := await self.page(owner, group=group, offset=offset, limit=_PAGE):
            old = [row.id for row in rows if row.epoch < before_epoch]
            if old:
                await self._remove(owner, old)
            offset += len(rows)
        return await super().delete(owner, group=group, before_epoch=before_epoch)

    async def read(self, call: str, *args: Any, **kwargs: Any) -> Any:
        """Asks the store for what a flow wants to read."""
        return await self._ask(lambda: getattr(self._foreign, call)(*args, **kwargs))

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """Asks the store, in the errors that backends raise."""
        if self._foreign is None:
            raise BackendUnavailable(f"{self._backend} is not connected")
        doing = f"asking {self._backend}"
        try:
            if self._turn is None:
                async with asyncio.timeout(_PATIENCE):
                    return await call()
            async with asyncio.timeout(_PATIENCE), self._turn:
                return await self._reconnecting(call)
        except JobError:
            raise
        except Exception as error:
            raise as_job_error(error, doing) or _of_bulk(error, doing) or error from error

    async def _reconnecting(self, call: Callable[[], Awaitable[T]]) -> T:
        """Once more, if the connection was lost before: the store does not make a new one by
        itself. Whatever is asked of it may be repeated."""
        try:
            return await call()
        except BaseException as error:
            # It may be closed for ever, or in the middle of something.
            self._drop_connection()
            if not isinstance(as_job_error(error, ""), BackendUnavailable):
                raise
        try:
            return await call()
        except BaseException:
            self._drop_connection()
            raise

    def _drop_connection(self) -> None:
        # Closing it would wait for an answer, without end.
        connection, self._foreign._async_conn = self._foreign._async_conn, None  # noqa: SLF001
        if connection is not None:
            connection.terminate()


class _Reads:
    """The vector store as flows read it; they share it with everybody else."""

    def __init__(self, storage: ForeignStorage) -> None:
        self._storage = storage
        self.embedding_model = storage.embedding_model

    async def async_search(self, query: str, workspace_id: str, **kwargs: Any) -> Any:
        # Now: where the store would ask for it, others would have to wait.
        await self.embedding_model.embed([query])
        return await self._storage.read("async_search", query, workspace_id, **kwargs)

    async def async_list_workspace_nodes(self, workspace_id: str, **kwargs: Any) -> Any:
        if not await self.async_exist_workspace(workspace_id):
            return []
        return await self._storage.read("async_list_workspace_nodes", workspace_id, **kwargs)

    async def async_exist_workspace(self, workspace_id: str, **kwargs: Any) -> Any:
        return await self._storage.read("async_exist_workspace", workspace_id, **kwargs)


def _sent(node: Any, workspace: str) -> Any:
    """A node as these stores get it: fields of ReMe's, and a session that they can look for. All
    else would be text and numbers that some of them take for dates, or not at all."""
    metadata = {key: value for key, value in node.metadata.items() if not key.startswith("recallq")}
    metadata[SESSION] = session_token(str(node.metadata.get(SESSION) or ""))
    return node.model_copy(update={"metadata": metadata, "workspace_id": workspace})


def _of_bulk(error: Exception, doing: str) -> JobError | None:
    """What Elasticsearch's helper raises of many operations at once."""
    failed = getattr(error, "errors", None)
    if type(error).__name__ != "BulkIndexError" or not isinstance(failed, list):
        return None
    statuses = {
        status
        for each in failed
        for done in (each.values() if isinstance(each, dict) else ())
        if isinstance(done, dict) and isinstance(status := done.get("status"), int)
    }
    passing = any(status == 429 or status >= 500 for status in statuses)
    kind = BackendUnavailable if passing else BackendError
    return kind(f"{doing}: it refused {len(failed)} writes: {sorted(statuses)}")
