"""mem0's open-source library as a memory backend.

The library is synchronous, so its calls run in threads: extractions in some of their own, so that
searches never wait for them. What it extracts comes out as a draft (`drafts`), which is then stored
in one step, under ids and with fields of ours. mem0's vector stores know nothing of deletion
epochs; the one on Redis does (`vector_store`), and reads pages and deletes a user at a flat cost.
With any other, listing and deleting read all of a user's memories.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from copy import copy
from functools import partial
from importlib import import_module
from typing import Any, Self, TypeAlias, TypeVar

# mem0 carries annotations here and there, and no marker that it does.
from mem0 import Memory  # type: ignore[import-untyped]
from mem0.vector_stores.configs import VectorStoreConfig  # type: ignore[import-untyped]
from pydantic import ValidationError

from recallq.contract import Health, Scope
from recallq.errors import BackendError, BackendUnavailable, ConfigurationError, JobError
from recallq_worker.backends.base import (
    REPEATABLE,
    Added,
    Extracted,
    Hit,
    Journal,
    Record,
    Submission,
    Superseded,
    together,
)
from recallq_worker.backends.failures import CutOffAnswer, as_job_error
from recallq_worker.backends.mem0 import shapes
from recallq_worker.backends.mem0.backend import Mem0Backend
from recallq_worker.backends.mem0.drafts import (
    CheckedLlm,
    Draft,
    DraftedStore,
    DraftingEmbedder,
    count_tokens,
)
from recallq_worker.backends.mem0.extraction import Finished, by_submission, extract
from recallq_worker.backends.mem0.recent import RecentMessages
from recallq_worker.backends.mem0.settings import Mem0Settings, batch_limit, complete
from recallq_worker.backends.mem0.vector_store import RedisVectorStore, owner_is, register
from recallq_worker.daemon_threads import DaemonThreads
from recallq_worker.insistence import to_its_end
from recallq_worker.models import ModelSettings
from recallq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

Rows: TypeAlias = list[tuple[str, dict[str, Any]]]
"""Ids and payloads. Inside the class, `list` is a method."""
Records: TypeAlias = list[Record]

_SEARCHERS = 64
"""Searches that wait for an embedding at once."""
_READERS = 16
"""Lists and deletes that wait for the vector store at once."""
_SEARCH_TIMEOUT = 15.0
"""Seconds that a search waits for its embedding."""
_NEXT_ROUND = 0.2
"""Seconds between two looks whether a vector store still shows what was deleted."""
_DEFAULT_THRESHOLD = 0.1
"""mem0's own: less similar memories are not looked at."""
_FIRST_PAGE = 1000


class Mem0Library(Mem0Backend):
    """One ``mem0.Memory`` for all users."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        infer: bool,
        store_url: str,
        namespace: str,
        most_texts: int,
        extractions: int = 64,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
    ) -> None:
        """`config` is a complete mem0 configuration. `most_texts` may be embedded by one request;
        `extractions` run at once; `timeout`, in seconds, bounds each request."""
        super().__init__(infer=infer)
        self._config = config
        self._store_url = store_url
        self._namespace = namespace
        self._most_texts = most_texts
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        # Twice as many: a call that was given up keeps its thread until it comes to its end.
        self._extractors: Executor = DaemonThreads(2 * extractions, "mem0-extract")
        self._searchers: Executor = DaemonThreads(_SEARCHERS, "mem0-search")
        self._readers: Executor = DaemonThreads(_READERS, "mem0-read")
        self._memory: Any = None
        self._store: Any = None
        self._entities: Any = None
        self._recent: Any = None

    @classmethod
    def from_both(cls, settings: WorkerSettings, own: Mem0Settings) -> Self:
        models = ModelSettings.load()
        config = complete(
            own.given(),
            models,
            store_url=settings.store_url,
            namespace=settings.namespace,
            infer=own.infer,
        )
        return cls(
            config,
            infer=own.infer,
            store_url=settings.store_url,
            namespace=settings.namespace,
            most_texts=batch_limit(config, models),
            extractions=settings.slow_users,
            timeout=settings.slow_timeout,
            connect_timeout=settings.connect_timeout,
        )

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Makes the ``Memory``, which may connect and take seconds. Raises `ConfigurationError`
        and the errors of a backend."""
        await self._reading(self._open, "starting mem0")

    def _open(self) -> None:
        register()
        # It is told apart below what fails, and its own words quote users.
        logging.getLogger("mem0").setLevel(logging.CRITICAL)
        try:
            memory = Memory.from_config(_with_dimensions(self._config))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise ConfigurationError(f"the mem0 configuration: {place}: {problem['msg']}") from None
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"mem0 does not take its configuration: {type(error).__name__}: {error}"
            ) from None
        self._store = memory.vector_store
        # mem0 makes it when it first needs it, and removes nobody from it before.
        self._entities = memory.entity_store
        for part in (memory.llm, memory.embedding_model):
            _settle_client(part, self._timeout)
        searcher = copy(memory.embedding_model)
        _settle_client(searcher, min(self._timeout, _SEARCH_TIMEOUT))
        memory.embedding_model = DraftingEmbedder(
            memory.embedding_model,
            self._most_texts,
            dimensions=getattr(memory.config.vector_store.config, "embedding_model_dims", None),
            searcher=searcher,
        )
        memory.llm = CheckedLlm(memory.llm)
        memory.vector_store = DraftedStore(self._store)
        memory._entity_store = DraftedStore(self._entities, entities=True)  # noqa: SLF001
        memory.db.close()
        memory.db = self._recent = RecentMessages(
            self._store_url, f"{self._namespace}:mem0", connect_timeout=self._connect_timeout
        )
        self._memory = memory
        self._ask_store()
        if isinstance(self._store, RedisVectorStore):
            model = getattr(memory.embedding_model.inner.config, "model", None)
            self._store.vectors.claim(self._store.embedding_model_dims, str(model))

    async def stop(self) -> None:
        memory, self._memory = self._memory, None
        parts: list[Any] = [self._recent, self._store, self._entities]
        if memory is not None:
            parts += [memory.llm.inner, memory.embedding_model.inner]
        parts += [getattr(part, "client", None) for part in parts]
        for part in parts:
            close = getattr(part, "close", None)
            if callable(close):
                try:
                    close()
                except Exception as error:  # noqa: BLE001  # any library's; and it is over
                    log.debug("closing a part of mem0: %s", type(error).__name__)
        for threads in (self._extractors, self._searchers, self._readers):
            threads.shutdown(wait=False)

    # --- extracting -----------------------------------------------------------------------------

    async def extract(self, submissions: Sequence[Submission], journal: Journal) -> list[Extracted]:
        scope = submissions[0].scope
        draft = Draft(run=shapes.session(scope) or "", owner=shapes.owner(scope))
        infer = self.infers(submissions[-1])
        doing = "extracting memories with mem0"
        try:
            finished = await self._extracting(
                lambda: extract(self._memory, submissions, draft, infer=infer), doing
            )
        except asyncio.CancelledError:
            draft.failure = draft.failure or Superseded()  # no further call to a model
            raise
        except BackendUnavailable as error:
            if len(submissions) > 1 and isinstance(error.__cause__, CutOffAnswer):
                # The answer to so much would be cut off again; to one at a time, perhaps not.
                raise BackendError(str(error)) from error
            raise
        if finished.ids:
            await journal(finished.intent)
        # From here on a thread writes: whoever is to stop waits until it has.
        write = self._extracting(lambda: self._write(finished), "storing memories")
        if not await to_its_end(write):
            return together([], len(submissions))
        return finished.extracted

    def _write(self, finished: Finished) -> bool:
        """Stores a draft; False if a deletion has passed meanwhile. Repeating it after a failure
        changes nothing that was stored."""
        draft = finished.draft
        rows = draft.memories
        vectors, payloads, ids = [r.vector for r in rows], [r.payload for r in rows], finished.ids
        if not rows:
            pass
        elif isinstance(self._store, RedisVectorStore):
            added = self._store.store(vectors, payloads, ids)
            if set(added) == {Added.FENCED}:
                return False
        else:
            # It knows no epochs: before it, and once more in case a deletion came at that moment.
            if self._is_fenced(finished):
                return False
            self._store.insert(vectors=vectors, payloads=payloads, ids=ids)
            if self._is_fenced(finished):
                self._remove(draft.owner, ids)
                return False
        with owner_is(draft.owner, epoch=finished.epoch):
            self._write_beside(finished)
        return True

    def _is_fenced(self, finished: Finished) -> bool:
        draft = finished.draft
        fenced: bool = self._recent.fences.stand_before(draft.owner, draft.run, finished.epoch)
        return fenced

    def _write_beside(self, finished: Finished) -> None:
        """What helps mem0 find and make memories, and is no memory: if it fails, it is missing."""
        draft = finished.draft
        steps: list[Callable[[], object]] = []
        if draft.entities:
            steps.append(
                lambda: self._entities.insert(
                    vectors=[row.vector for row in draft.entities],
                    payloads=[row.payload for row in draft.entities],
                    ids=[row.id for row in draft.entities],
                )
            )
        for entity_id, payload in draft.entity_updates.items():
            steps.append(partial(self._entities.update, entity_id, None, payload))
        if draft.said:
            steps.append(
                lambda: self._recent.save(draft.owner, draft.run, draft.said, finished.epoch)
            )
        for step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001  # of whichever library
                log.warning("what mem0 keeps beside memories is missing: %s", type(error).__name__)

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        return await to_its_end(
            self._extracting(
                lambda: self._recover(submissions, intent),
                "looking for memories that were stored",
            )
        )

    def _recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        owner, ids = intent["owner"], intent["ids"]
        as_it_is = bool(submissions) and not self.infers(submissions[0])
        repeatable = bool(intent.get(REPEATABLE, as_it_is))  # older journals do not say
        with owner_is(owner):
            found = [each for each in ids if self._store.get(vector_id=each) is not None]
            if submissions and len(found) == len(ids):
                if repeatable:
                    return by_submission(submissions, ids)
                return together(ids, len(submissions))
        if isinstance(self._store, RedisVectorStore) and not repeatable:
            # Whoever was interrupted may still be about to store them.
            self._store.vectors.ban(owner, ids)
            if isinstance(self._entities, RedisVectorStore):
                self._entities.vectors.ban(owner, intent["entities"])
        else:
            self._remove(owner, found, intent["entities"])
        return None

    def _remove(self, owner: str, ids: Sequence[str], entities: Sequence[str] = ()) -> None:
        with owner_is(owner):
            for store, rows in ((self._entities, entities), (self._store, ids)):
                for row_id in rows:
                    store.delete(vector_id=row_id)

    # --- reading --------------------------------------------------------------------------------

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        least = 0.0 if score_threshold is None else score_threshold
        if least > 1 or not query.strip():
            return []
        considered = min(max(least, 0.0), _DEFAULT_THRESHOLD)
        if score_threshold is None:
            considered = _DEFAULT_THRESHOLD
        filters = self._filters(scope)

        def look() -> list[dict[str, Any]]:
            with owner_is(filters[shapes.USER]):
                found = self._memory.search(
                    query, top_k=top_k, filters=filters, threshold=considered
                )
            return list(found["results"])

        rows = await self._in_thread(self._searchers, look, "searching with mem0")
        hits = [shapes.hit(scope, row) for row in rows]
        hits.sort(key=lambda hit: (-hit.score, -hit.record.order, hit.record.record_id))
        return [hit for hit in hits if hit.score >= least]

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        def look() -> Records:
            if isinstance(self._store, RedisVectorStore):
                page = self._store.vectors.page(
                    shapes.owner(scope), group=shapes.session(scope), offset=offset, limit=limit
                )
                return _records(scope, ((row.id, row.payload) for row in page))
            records = _records(scope, self._every_row(scope, self._store))
            records.sort(key=lambda record: (record.order, record.record_id))
            return records[offset : offset + limit]

        return await self._reading(look, "listing memories")

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        def remove() -> int:
            owner, run = shapes.owner(scope), shapes.session(scope)
            self._recent.forget(owner, run, before_epoch)
            if not isinstance(self._store, RedisVectorStore):
                return self._delete_one_by_one(scope, before_epoch)
            if isinstance(self._entities, RedisVectorStore):
                self._entities.vectors.delete(owner, group=run, before_epoch=before_epoch)
            return self._store.vectors.delete(owner, group=run, before_epoch=before_epoch)

        return await self._reading(remove, "deleting memories")

    def _delete_one_by_one(self, scope: Scope, before_epoch: int) -> int:
        """Not by mem0's own calls, which pass over what goes wrong with entities."""
        removed: set[str] = set()
        for store in (self._entities, self._store):
            tried: set[str] = set()
            while True:
                victims = {
                    row_id
                    for row_id, payload in self._every_row(scope, store)
                    if shapes.epoch(payload) < before_epoch
                }
                if not victims:
                    break
                if victims <= tried:
                    time.sleep(_NEXT_ROUND)  # what is listed may lag behind
                for row_id in victims:
                    store.delete(vector_id=row_id)
                tried |= victims
            removed = tried
        return len(removed)

    def _every_row(self, scope: Scope, store: Any) -> Rows:
        """All of a scope's rows, from a store that can only be asked for the first so many."""
        wanted = _FIRST_PAGE
        while True:
            listed = store.list(filters=self._filters(scope), top_k=wanted)
            rows = listed[0] if listed and isinstance(listed[0], list | tuple) else listed
            if len(rows or ()) < wanted:
                return [(str(row.id), row.payload or {}) for row in rows or ()]
            wanted *= 4

    def _filters(self, scope: Scope) -> dict[str, str]:
        filters = {shapes.USER: shapes.owner(scope)}
        run = shapes.session(scope)
        return filters if run is None else {**filters, shapes.SESSION: run}

    # --- the rest -------------------------------------------------------------------------------

    async def health(self) -> Health:
        try:
            detail = await self._reading(self._ask, "asking mem0's parts")
        except JobError as error:
            return Health(ok=False, backend=self.name, detail=str(error))
        except Exception as error:  # noqa: BLE001  # it does not raise
            return Health(ok=False, backend=self.name, detail=type(error).__name__)
        return Health(ok=True, backend=self.name, detail=detail)

    def _ask(self) -> str:
        self._ask_store()
        _ask_models(self._memory.embedding_model.inner)
        if self._infer:
            _ask_models(self._memory.llm.inner)
        return f"mem0 with {self._memory.config.vector_store.provider}"

    def _ask_store(self) -> None:
        if isinstance(self._store, RedisVectorStore):
            self._store.vectors.ping()
        else:
            self._store.list_cols()

    async def _extracting(self, work: Callable[[], T], doing: str) -> T:
        return await self._in_thread(self._extractors, work, doing)

    async def _reading(self, work: Callable[[], T], doing: str) -> T:
        return await self._in_thread(self._readers, work, doing)

    async def _in_thread(self, threads: Executor, work: Callable[[], T], doing: str) -> T:
        """Runs mem0's code in a thread, in the errors that backends raise."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(threads, partial(context.run, work))
        except (JobError, ConfigurationError, Superseded):
            raise
        except Exception as error:
            told = as_job_error(error, doing)
            if told is None:
                raise
            raise told from error


def _with_dimensions(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the vector store's dimensions, where it has such a field and leaves it
    open: mem0 would take OpenAI's, whatever the embedder's are."""
    dimensions = config["embedder"]["config"].get("embedding_dims")
    store = config["vector_store"]
    try:
        name = VectorStoreConfig.__private_attributes__["_provider_configs"].default[
            store["provider"]
        ]
        fields = getattr(
            import_module(f"mem0.configs.vector_stores.{store['provider']}"), name
        ).model_fields
    except (ImportError, KeyError, AttributeError):
        return config  # mem0 says what is wrong with it
    if dimensions is None or "embedding_model_dims" not in fields:
        return config
    filled = {"embedding_model_dims": dimensions, **store["config"]}
    return {**config, "vector_store": {**store, "config": filled}}


def _settle_client(part: Any, timeout: float) -> None:
    """An openai client's patience. It would try again by itself, three times in all, and wait ten
    minutes; trying again is the slow lane's work, and searches are tried again by whoever asked."""
    client: Any = getattr(part, "client", None)
    if callable(getattr(client, "with_options", None)):
        part.client = client.with_options(max_retries=0, timeout=timeout)
        count_tokens(part.client)


def _ask_models(part: Any) -> None:
    """Asks an OpenAI-compatible server for its models, which costs nothing."""
    client: Any = getattr(part, "client", None)
    if callable(getattr(client, "with_options", None)):
        try:
            client.with_options(timeout=5.0).models.list()
        except Exception as error:
            told = as_job_error(error, f"asking {type(part).__name__} for its models")
            if isinstance(told, BackendError) and getattr(error, "status_code", 0) in (403, 404):
                return  # not every server has such a list, and not every key may see it
            raise


def _records(scope: Scope, rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Record]:
    return [shapes.record(scope, shapes.row_of(row_id, payload)) for row_id, payload in rows]
