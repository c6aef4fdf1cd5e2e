"""The embedder that a process's backends use: texts of many callers, joined into few requests.

Callers come with one text or with thousands. What they bring within a few milliseconds fills the
provider's requests; a text that several want is sent once; one that was embedded lately is not sent
at all. Queries go before documents, and callers take turns (`lanes`). What may go when, and what
becomes of requests that fail, `dispatcher` knows.

Each caller has an outcome of its own. A request that fails in passing is tried again, shortly, and
then fails for those whose texts are in it: whoever runs their jobs tries again later, and only what
had not succeeded is sent once more. One that is refused for what is in it is halved until it is
known which text is to blame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq_worker.embedding.base import Embedder, Kind, Refused, Vector
from recallq_worker.embedding.cache import Digests, VectorCache
from recallq_worker.embedding.dispatcher import Dispatcher
from recallq_worker.embedding.lanes import Call, Item, State
from recallq_worker.embedding.limiter import shared_limiter
from recallq_worker.embedding.shared_cache import SharedCache
from recallq_worker.embedding.usage import EmbeddingUsage, UsageCounter
from recallq_worker.model_usage import EMBEDDING_USAGE

_SLICE = 256
"""Texts that are looked at in one go, so that a long list does not hold up the loop."""
_LEFTOVERS_BYTES = 256e6
_LEFTOVERS_LIFETIME = 900.0
"""Bytes and seconds for which vectors are kept of calls that did not come to their end."""
_BYTES_A_TOKEN = 3
"""Of UTF-8, about: of English text it is four, of Chinese two or three."""
_FRESH = 10.0
"""Seconds for which a request that succeeded says that the provider is well."""


class EmbeddingBatcher:
    """Texts to vectors, by one embedder. Belongs to the event loop that starts it."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        linger: float = 0.005,
        at_once: int = 8,
        timeout: float = 15.0,
        patience: float = 30.0,
        rpm: float | None = None,
        tpm: float | None = None,
        cache_bytes: float = 64e6,
        shared_cache: SharedCache | None = None,
    ) -> None:
        """Times are in seconds. A request takes at most `timeout`; a text waits for others for
        `linger`, and at most `patience` for its turn or for a rate limit. `rpm` and `tpm` are
        requests and tokens a minute."""
        self.embedder = embedder
        self._linger, self._at_once = linger, at_once
        self._timeout, self._patience = timeout, patience
        self._rpm, self._tpm = rpm, tpm
        self._cache = VectorCache(cache_bytes)
        self._leftovers = VectorCache(_LEFTOVERS_BYTES, lifetime=_LEFTOVERS_LIFETIME)
        self._shared = shared_cache
        self._doing = f"embedding with {embedder.model}"
        self._digests = {kind: Digests(embedder.model, embedder.dimensions, kind) for kind in Kind}
        self._items: dict[bytes, Item] = {}
        """Texts that wait or are under way."""
        self._usage = UsageCounter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dispatcher: Dispatcher | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._well_at: float | None = None

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `MissingExtra`, `ConfigurationError`."""
        await self.embedder.start()
        self._loop = asyncio.get_running_loop()
        limiter = shared_limiter(self.embedder.account)
        limiter.configure(rpm=self._rpm, tpm=self._tpm)
        self._dispatcher = Dispatcher(
            self.embedder,
            limiter,
            self,
            self._usage,
            linger=self._linger,
            at_once=self._at_once,
            timeout=self._timeout,
            patience=self._patience,
        )

    async def stop(self) -> None:
        """Ends everything under way: callers get `BackendUnavailable`."""
        dispatcher, self._dispatcher = self._dispatcher, None
        stopped = self._not_running()
        for item in list(self._items.values()):
            self.failed([item], stopped)
        if self._expiry is not None:
            self._expiry.cancel()
        if dispatcher is not None:
            await dispatcher.stop()
        await asyncio.gather(*self._chores, return_exceptions=True)
        if self._shared is not None:
            await self._shared.close()
        await self.embedder.stop()
        self._cache.clear()
        self._leftovers.clear()

    def usage(self) -> EmbeddingUsage:
        """What was embedded since the start."""
        return self._usage.snapshot(self.embedder.model)

    async def check(self) -> str:
        """Asks the provider, unless a request has just succeeded; says what it is.

        Raises `BackendUnavailable`, `BackendError`.
        """
        dispatcher = self._running()
        assert self._loop is not None
        if self._well_at is None or self._loop.time() - self._well_at > _FRESH:
            await dispatcher.probe()
            self._well_at = self._loop.time()
        return f"{self.embedder.model}, {self.embedder.dimensions} dimensions"

    # --- embedding ------------------------------------------------------------------------------

    async def embed(self, texts: Sequence[str], kind: Kind = Kind.DOCUMENT) -> list[Vector]:
        """The vectors of `texts`, in their order. They are shared, and read-only.

        Raises `BackendUnavailable` where a later call may succeed: it costs only what did not
        succeed in this one. Raises `BackendError` for a text that cannot be embedded, and where
        none can. May be cancelled at any moment.
        """
        dispatcher = self._running()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            raise RuntimeError("an EmbeddingBatcher belongs to the event loop that started it")
        call = Call(len(texts), loop)
        self._usage.texts += len(texts)
        try:
            for start in range(0, len(texts), _SLICE):
                if start:
                    await asyncio.sleep(0)
                if not call.done.done():
                    await self._enlist(dispatcher, call, texts[start : start + _SLICE], kind)
            if call.missing:
                await call.done
            EMBEDDING_USAGE.embedded(len(texts), cached=call.cached)
        except BaseException:
            self._leave(call)
            raise
        return cast("list[Vector]", call.vectors)

    async def _enlist(
        self, dispatcher: Dispatcher, call: Call, texts: Sequence[str], kind: Kind
    ) -> None:
        """Gives a caller what there is already, and queues the rest of its next `texts`."""
        first = len(call.keys)
        digest, usage = self._digests[kind].of, self._usage
        wanted: list[tuple[int, bytes, str, int]] = []
        for position, text in enumerate(texts, first):
            if not text:
                raise BackendError(f"{self._doing}: an empty text has no vector")
            try:
                encoded = text.encode()
            except UnicodeEncodeError:  # half a character, which no request can hold
                text = text.encode(errors="replace").decode()  # noqa: PLW2901
                encoded = text.encode()
            key = digest(encoded)
            call.keys.append(key)
            vector = self._cache.get(key)
            if vector is None:
                vector = self._leftovers.get(key)
            if vector is None:
                wanted.append((position, key, text, len(encoded)))
            else:
                usage.cache_hits += 1
                call.deliver([position], vector)
        if wanted and self._shared is not None:
            wanted = await self._from_shared(self._shared, call, wanted)
            if call.done.done():
                return  # it has failed meanwhile
        if self._dispatcher is not dispatcher:
            raise self._not_running()
        joined = 0
        for position, key, text, size in wanted:
            item = self._items.get(key)
            if item is None:
                item = self._items[key] = Item(key, kind, text, size // _BYTES_A_TOKEN + 1)
            else:
                joined += 1
            positions = item.waiters.get(call)
            if positions is not None:
                positions.append(position)
                continue
            if item.state is State.WAITING:
                dispatcher.add(call, item)
            item.waiters[call] = [position]
            call.items.add(item)
        usage.joined += joined
        call.cached += len(texts) - len(wanted) + joined
        if wanted:
            dispatcher.poke()

    async def _from_shared(
        self, shared: SharedCache, call: Call, wanted: list[tuple[int, bytes, str, int]]
    ) -> list[tuple[int, bytes, str, int]]:
        """Gives a caller what Redis keeps; says what is left."""
        found = await shared.get([key for _, key, _, _ in wanted])
        if not found:
            return wanted
        left = []
        for each, vector in zip(wanted, found, strict=True):
            position, key, _, _ = each
            if vector is None:
                left.append(each)
            else:
                self._usage.shared_hits += 1
                self._cache.put(key, vector)
                call.deliver([position], vector)
        return left

    def _leave(self, call: Call) -> None:
        """Takes a caller out of everything, and keeps what it had for when it comes again."""
        if not call.done.done():
            call.done.cancel()
        elif not call.done.cancelled():
            call.done.exception()  # whether or not the caller is still there to see it
        for item in call.items:
            item.waiters.pop(call, None)
            if item.state is State.WAITING and not item.waiters:
                self._settled(item)
        call.items.clear()
        for key, vector in zip(call.keys, call.vectors, strict=False):
            if vector is not None and key not in self._cache:
                self._leftovers.put(key, vector)
        call.keys.clear()
        if len(self._leftovers) and self._expiry is None and self._loop is not None:
            self._expiry = self._loop.call_later(_LEFTOVERS_LIFETIME, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self._leftovers.expire()
        if len(self._leftovers) and self._loop is not None:
            self._expiry = self._loop.call_later(_LEFTOVERS_LIFETIME, self._expire)

    # --- what became of texts; see `dispatcher.Outcomes` ----------------------------------------

    def delivered(self, items: list[Item], vectors: list[Vector]) -> None:
        assert self._loop is not None
        self._well_at = self._loop.time()
        for item, vector in zip(items, vectors, strict=True):
            self._settled(item)
            self._cache.put(item.key, vector)
            for call, positions in item.waiters.items():
                call.items.discard(item)
                call.deliver(positions, vector)
        if self._shared is not None:
            kept = {item.key: vector for item, vector in zip(items, vectors, strict=True)}
            chore = self._loop.create_task(self._shared.put(kept))
            self._chores.add(chore)
            chore.add_done_callback(self._chores.discard)

    def failed(self, items: list[Item], error: JobError) -> None:
        self._well_at = None
        for item in items:
            self._settled(item)
            for call in list(item.waiters):
                self.gave_up(call, error)

    def gave_up(self, call: Call, error: JobError) -> None:
        if not call.done.done():
            call.done.set_exception(_again(error))
            self._leave(call)

    def _settled(self, item: Item) -> None:
        if item.state is State.WAITING and self._dispatcher is not None:
            self._dispatcher.drop(item)
        item.state = State.DONE
        if self._items.get(item.key) is item:
            del self._items[item.key]

    def _running(self) -> Dispatcher:
        if self._dispatcher is None:
            raise self._not_running()
        return self._dispatcher

    def _not_running(self) -> BackendUnavailable:
        return BackendUnavailable(f"{self._doing}: it is not running")


def _again(error: JobError) -> JobError:
    """The same error for another caller: each has a traceback of its own."""
    if isinstance(error, BackendUnavailable):
        return BackendUnavailable(str(error), retry_after=error.retry_after)
    return Refused(str(error)) if isinstance(error, Refused) else BackendError(str(error))
