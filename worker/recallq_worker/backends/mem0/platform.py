"""mem0's hosted platform, by its own client.

The platform accepts an add at once and works on it later; what came of it, an *event* tells. An add
is not idempotent, and nothing here repeats one: each carries a key of its own in the metadata of
its memories, which is in the journal before the add is sent, and the event's id is as soon as it is
known. So `recover` can tell what became of an add that nobody saw the end of.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar

import orjson
from pydantic import SecretStr

from recallq.contract import Health, Scope
from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq.messages import message_text
from recallq_worker.backends.base import Extracted, Hit, Journal, Record, Submission, together
from recallq_worker.backends.mem0 import shapes
from recallq_worker.backends.mem0.backend import Mem0Backend
from recallq_worker.backends.mem0.platform_client import (
    PlatformClient,
    Row,
    event_id_in,
    rows_in,
)
from recallq_worker.backends.mem0.settings import Mem0Settings
from recallq_worker.backends.submissions import said
from recallq_worker.settings import WorkerSettings

EXTRACTION = "recallq_extraction"

_ANY_RUN = {"OR": [{shapes.SESSION: "*"}, {"NOT": [{shapes.SESSION: "*"}]}]}
"""With a run or without: what a filter does not mention, must be null."""
_MOST_HITS = 1000
_POLL_FAILURES = 3
"""Polls in a row that may fail before the following is given up."""
_KEPT_TOGETHER = 8192
"""Characters that the messages of one call may take in the metadata of each of its memories."""

# Inside the class, `list` is a method.
Rows: TypeAlias = list[Row]
Names: TypeAlias = list[str]
T = TypeVar("T")


class Mem0Platform(Mem0Backend):
    """A `MemoryExtractor` on mem0's platform."""

    def __init__(
        self,
        api_key: SecretStr,
        host: str,
        *,
        infer: bool,
        timeout: float,
        patience: float | None = None,
        settle: float = 5.0,
    ) -> None:
        """In seconds: `timeout` is the longest that one request may take, `patience` (by default
        the same) how long the platform may take to process what it accepted, and `settle` how long
        something may be under way there of which no event is known."""
        super().__init__(infer=infer)
        self._platform = PlatformClient(api_key, host, timeout=timeout)
        self._timeout = timeout
        self._patience = timeout if patience is None else patience
        self._settle = settle

    @classmethod
    def from_both(cls, settings: WorkerSettings, own: Mem0Settings) -> Self:
        if own.api_key is None:
            raise BackendError("mem0's platform needs a key: set MEM0_API_KEY")
        # Less than the slow lane allows, so that here is said what it was that took so long.
        timeout = min(settings.job_timeout, settings.slow_timeout / 4)
        patience = settings.slow_timeout * 0.75
        return cls(own.api_key, own.host, infer=own.infer, timeout=timeout, patience=patience)

    def group(self, submission: Submission) -> Hashable:
        """What is stored as it is, keeps its own order key and ids only in a call of its own."""
        return super().group(submission) if self.infers(submission) else submission.job_id

    async def start(self) -> None:
        await self._platform.connect()

    async def stop(self) -> None:
        await self._platform.close()

    # --- extracting -----------------------------------------------------------------------------

    async def extract(self, submissions: Sequence[Submission], journal: Journal) -> list[Extracted]:
        infer = self.infers(submissions[0])
        sent = [said(each, infer=infer) for each in submissions]
        messages = [message for each in sent for message in each.values()]
        if not messages:
            return together([], len(submissions))
        metadata: dict[str, Any] = {}
        for submission, kept in zip(submissions, sent, strict=True):
            metadata |= shapes.metadata_of_all(submission)
            if not infer:
                metadata |= _wholes(submission, kept)
        key, last = uuid.uuid4().hex, submissions[-1]
        metadata[shapes.ORDER] = last.order
        metadata[shapes.EPOCH] = min(each.epoch for each in submissions)
        metadata[EXTRACTION] = key
        whose = {shapes.USER: shapes.owner(last.scope), shapes.SESSION: shapes.session(last.scope)}
        request = {**whose, "metadata": metadata, "infer": infer}
        intent: Row = {"extraction": key, **whose}
        await journal(intent)
        submitting = self._submit(messages, request, intent, journal)
        intent, answer = await _to_its_end(submitting, 2 * self._timeout)
        if "event" not in intent:
            ids = await self._ids(intent, answer)
        elif (event := await self._follow(intent["event"])) is None:
            raise BackendUnavailable("mem0's platform does not know an event of its own")
        elif event["status"] == "FAILED":
            await self._remove(intent)
            raise BackendUnavailable("mem0's platform failed to process an add")
        else:
            ids = await self._ids(intent, event)
        return together(ids, len(submissions))

    async def _submit(
        self, messages: Rows, request: Row, intent: Row, journal: Journal
    ) -> tuple[Row, Any]:
        """Sends an add, once. What the journal says then, and the platform's answer."""

        async def refused() -> None:
            # Then nobody needs to look for what came of it.
            await journal({**intent, "refused": True})

        answer = await self._platform.add(messages, request, refused)
        event_id = event_id_in(answer)
        if event_id is not None:
            known = {**intent, "event": event_id}
            await journal(known)
            return known, answer
        if not isinstance(answer, list) and not (isinstance(answer, dict) and "results" in answer):
            raise BackendUnavailable("mem0's platform answered an add in a way nobody expects")
        return intent, answer

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        """As the protocol says; from the event if its id is known, else by the extraction's key.

        One window stays open: the platform has accepted an add, the connection (or the process, or
        the turn) was lost before the event's id was read and journaled, and the add is still in
        work there after `settle` seconds of looking for its memories. They come then nevertheless,
        beside those of the next try.
        """
        if intent.get("refused"):
            return None
        event = await self._follow(intent["event"]) if "event" in intent else None
        if event is None:
            ids = await self._appeared(intent)
            stored = bool(ids)
        else:
            stored = event["status"] == "SUCCEEDED"
            ids = await self._ids(intent, event) if stored else []
        if stored and submissions:
            return together(ids, len(submissions))
        if stored or event is not None:
            await self._remove(intent)
        return None

    async def _follow(self, event_id: str) -> Row | None:
        """The event when it has ended; None if the platform knows of none."""
        clock, failures = asyncio.get_running_loop().time, 0
        began, missed = clock(), 0.0
        for pause in _pauses():
            try:
                event = await self._platform.event(event_id)
            except BackendUnavailable as error:
                failures, wait = failures + 1, max(pause, error.retry_after or 0.0)
                if failures >= _POLL_FAILURES or clock() + wait > began + self._patience:
                    raise
            else:
                failures, wait = 0, pause
                if event is not None and event.get("status") in ("SUCCEEDED", "FAILED"):
                    return event
                missed = missed or clock() if event is None else 0.0
                if missed and clock() + wait > missed + self._settle:
                    return None
                if clock() + wait > began + self._patience:
                    raise BackendUnavailable("mem0's platform is still processing what it accepted")
            await asyncio.sleep(wait)
        raise AssertionError("pauses never end")

    async def _ids(self, intent: Row, answer: Any) -> Names:
        """The memories that an answer tells of; looked up if it tells of none."""
        rows = [row for row in rows_in(answer) if (row.get("event") or "ADD") in ("ADD", "UPDATE")]
        ids = [str(row["id"]) for row in rows if row.get("id")]
        return ids or await self._carrying(intent)

    async def _carrying(self, intent: Row) -> Names:
        """The memories that carry an extraction's key."""
        key = {"metadata": {EXTRACTION: intent["extraction"]}}
        rows = await self._platform.every(
            _filters(intent[shapes.USER], intent[shapes.SESSION], key)
        )
        return [row["id"] for row in sorted(rows, key=_created)]

    async def _appeared(self, intent: Row) -> Names:
        """As `_carrying`, where it is not known when they come: when two looks see the same."""
        clock = asyncio.get_running_loop().time
        until, before = clock() + self._settle, Names()
        for pause in _pauses():
            found = await self._carrying(intent)
            if (found and found == before) or (not found and clock() + pause > until):
                return found
            before = found
            await asyncio.sleep(pause)
        raise AssertionError("pauses never end")

    async def _remove(self, intent: Row) -> None:
        """Deletes what carries an extraction's key."""
        await self._until_none(partial(self._carrying, intent), self._platform.delete_each)

    # --- reading --------------------------------------------------------------------------------

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        if not query.strip() or (score_threshold is not None and score_threshold > 1):
            return []
        options: dict[str, Any] = {"top_k": min(top_k, _MOST_HITS), "filters": _filters_of(scope)}
        if score_threshold is not None:
            options["threshold"] = max(0.0, score_threshold)
        rows = await self._platform.search(query, options)
        rows = sorted(rows, key=partial(_place, scope), reverse=True)
        hits = [shapes.hit(scope, _unfolded(row)) for row in rows]
        hits = [hit for hit in hits if score_threshold is None or hit.score >= score_threshold]
        return sorted(hits, key=lambda hit: -hit.score)[:top_k]

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        """As the protocol says. Of one order key, what the platform made first comes first.

        It pages newest first and cannot be asked for another order, so that every call fetches all
        there is: a request for each hundred memories in the scope.
        """
        rows = await self._platform.every(_filters_of(scope))
        rows = sorted(rows, key=partial(_place, scope))[offset : offset + limit]
        return [shapes.record(scope, _unfolded(row)) for row in rows]

    # --- deleting -------------------------------------------------------------------------------

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        """As the protocol says. Returns when the platform does not list the memories any more: it
        may delete in the background, and what is added next must not fall to that."""
        rows = await self._platform.every(_filters_of(scope))
        victims = [row["id"] for row in rows if _epoch(row) < before_epoch]
        if victims and len(victims) == len(rows):
            whose = {shapes.USER: shapes.owner(scope), shapes.SESSION: shapes.session(scope)}
            event_id = await self._platform.delete_all(whose)
            event = None if event_id is None else await self._follow(event_id)
            if event is not None and event["status"] == "FAILED":
                raise BackendUnavailable("mem0's platform failed to process a deletion")
        elif victims:
            await self._platform.delete_each(victims)
        doomed = set(victims)

        async def left() -> Names:
            rows = await self._platform.every(_filters_of(scope))
            return [row["id"] for row in rows if row["id"] in doomed]

        if victims:
            await self._until_none(left)
        return len(victims)

    async def _until_none(
        self,
        look: Callable[[], Awaitable[Names]],
        act: Callable[[Names], Awaitable[None]] | None = None,
    ) -> None:
        """Does `act` to what `look` finds, until it finds nothing more."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._patience
        for pause in _pauses():
            found = await look()
            if not found:
                return
            if clock() + pause > until:
                raise BackendUnavailable("mem0's platform has not deleted everything yet")
            if act is not None:
                await act(found)
            await asyncio.sleep(pause)

    # --- asking ---------------------------------------------------------------------------------

    async def health(self) -> Health:
        detail, where = "", self._platform.where
        try:
            await self._platform.ping()
        except JobError as error:
            detail = f": {error}"
        except Exception as error:  # noqa: BLE001  # it must not raise
            detail = f": {type(error).__name__}"
        return Health(ok=not detail, backend=self.name, detail=where + detail)


# --- what goes there and comes back -------------------------------------------------------------


def _filters(owner: str, run: str | None, *more: Row) -> Row:
    return {
        "AND": [{shapes.USER: owner}, _ANY_RUN if run is None else {shapes.SESSION: run}, *more]
    }


def _filters_of(scope: Scope) -> Row:
    return _filters(shapes.owner(scope), shapes.session(scope))


def _epoch(row: Row) -> int:
    own = row.get("metadata")
    return shapes.epoch(own) if isinstance(own, Mapping) else 0


def _created(row: Row) -> tuple[str, str]:
    return str(row.get("created_at") or ""), row["id"]


def _place(scope: Scope, row: Row) -> tuple[int, str, str]:
    record = shapes.record(scope, row)
    return record.order, str(row.get("created_at") or ""), record.record_id


def _wholes(submission: Submission, sent: Mapping[int, Row]) -> Row:
    """The field that keeps messages whole, which are stored as they are.

    The platform keeps their texts, not their roles. One set of metadata goes with all memories of a
    call; so of several messages, each memory carries all, unless that is too much.
    """
    messages = [submission.messages[index] for index in sent]
    plain = [{"role": "user", "content": each["content"]} for each in sent.values()]
    if messages == plain:
        return {}
    kept = orjson.dumps(messages[0] if len(messages) == 1 else messages).decode()
    return {shapes.MESSAGE: kept} if len(messages) == 1 or len(kept) <= _KEPT_TOGETHER else {}


def _unfolded(row: Row) -> Row:
    """A row with its own message, of those that were kept together."""
    own = row.get("metadata")
    kept = own.get(shapes.MESSAGE) if isinstance(own, Mapping) else None
    if isinstance(own, Mapping) and isinstance(kept, str) and kept.startswith("["):
        with suppress(ValueError):
            for each in orjson.loads(kept):
                if isinstance(each, dict) and message_text(each).strip() == row.get("memory"):
                    return {**row, "metadata": {**own, shapes.MESSAGE: orjson.dumps(each).decode()}}
    return row


# --- waiting ------------------------------------------------------------------------------------


def _pauses() -> Iterator[float]:
    """Between two looks, in seconds."""
    for count in itertools.count():
        yield min(0.1 * 1.5 ** min(count, 20), 2.0)


async def _to_its_end(work: Coroutine[Any, Any, T], limit: float) -> T:
    """Awaits `work`; if it is cancelled, only when that has ended, for at most `limit` seconds."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        clock = asyncio.get_running_loop().time
        until = clock() + limit
        while not task.done() and clock() < until:
            with suppress(asyncio.CancelledError):  # told once more
                await asyncio.wait({task}, timeout=until - clock())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # nobody else wants to know
        raise
