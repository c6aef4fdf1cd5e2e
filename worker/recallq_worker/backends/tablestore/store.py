"""The tablestore backend.

Adds, lists and deletes go by the table, which is strongly consistent; only searches go by the
search index. An add writes rows, then looks whether a deletion has come in the meantime, and takes
back what it has written too late; readers go by the fence of the deletion and never see that. So a
process may die, or be frozen, anywhere in between.

With vectors, a row is written without one, and gets it in the second step (`index`), as do rows of
full text that the index is yet to show.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from recallq.contract import Health, Scope
from recallq.errors import (
    BackendUnavailable,
    ConfigurationError,
    JobError,
    MissingExtra,
)
from recallq.keys import escape
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.backends.tablestore.client import create_tablestore_client
from recallq_worker.backends.tablestore.index import SearchIndex
from recallq_worker.backends.tablestore.rows import (
    AT,
    DIGEST,
    EMBEDDED,
    EPOCH,
    FENCES,
    ORDER,
    POINTERS,
    REACHED,
    READ,
    RECORDS,
    SESSION,
    Columns,
    Fences,
    Key,
    digest,
    fence_place,
    owner_of,
    pointer_columns,
    pointer_key,
    read_record,
    record_columns,
    record_key,
    searchable,
)
from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.backends.tablestore.table import (
    Table,
    Write,
    both,
    epoch_below,
    has,
)
from recallq_worker.backends.tablestore.vectors import embedder_from_settings, stored
from recallq_worker.backends.tablestore.visibility import Watch
from recallq_worker.embedding import DocumentEmbedder
from recallq_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from tablestore import AsyncOTSClient, ColumnCondition

_NEW_TABLE = 30
"""Seconds, about, in which a table that was just made may not be there yet."""
_SEVERAL = 500
_NOTED_EVERY = 20
"""Pages of a table after which it is noted how far a delete has come."""
_SWEEP = 0.02
"""Of the deletions of sessions, the share that looks for fences that are not needed any more."""
_KEPT = 30 * 24 * 3600 * 1000
"""Milliseconds for which the fence of a session is kept."""
_ROUNDS = 10
"""How often a row may change under a write before that counts as trouble."""


class TablestoreStore:
    """A `MemoryStore` in Tablestore."""

    name: ClassVar[str] = "tablestore"
    single_process: ClassVar[bool] = False
    indexes = True

    def __init__(
        self,
        settings: TablestoreSettings,
        *,
        vectors: DocumentEmbedder | None = None,
        tablestore_client: AsyncOTSClient | None = None,
    ) -> None:
        """`vectors` are needed for the strategy of that name. A `tablestore_client` that is given
        is closed with the store."""
        self._settings = settings
        self._vectors = vectors
        self._client = tablestore_client
        self._table: Table
        self._notes: Table
        self._index: SearchIndex
        self._watch: Watch

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        for name in ("store_ttl", "max_messages_per_session"):
            if getattr(settings, name) is not None:
                raise ConfigurationError(
                    f"RECALLQ_{name.upper()} does not work with the tablestore backend, which "
                    "keeps everything until it is deleted; unset it"
                )
        own = TablestoreSettings.load()
        try:
            import tablestore  # noqa: F401  # whether it can be
        except ImportError as error:
            raise MissingExtra("the tablestore backend", "tablestore") from error
        vectors = None
        if own.search_strategy == "vector":
            vectors = embedder_from_settings(settings, own)
        return cls(own, vectors=vectors)

    async def start(self) -> None:
        settings = self._settings
        if self._client is None:
            self._client = create_tablestore_client(
                settings.end_point,
                settings.access_key_id,
                settings.access_key_secret,
                settings.instance_name,
                settings.sts_token,
                settings.region,
            )
        self._table = Table(self._client, settings.table_name)
        self._notes = Table(self._client, f"{settings.table_name}_notes")
        dimension = None
        if self._vectors is not None:
            await self._vectors.start()
            dimension = self._vectors.dimensions
        self._index = SearchIndex(self._table, settings, dimension)
        self._watch = Watch(self._table, self._index)
        await self._notes.open()
        made = await self._table.open()
        for attempt in itertools.count(1):
            try:
                await self._index.open()
                break
            except BackendUnavailable:
                if not made or attempt >= _NEW_TABLE:
                    raise
                await asyncio.sleep(1)

    async def stop(self) -> None:
        if hasattr(self, "_watch"):
            await self._watch.stop()
        if self._vectors is not None:
            await self._vectors.stop()
        if self._client is not None:
            await self._client.close()

    # --- add ------------------------------------------------------------------------------------

    async def add(self, records: Sequence[Record]) -> list[Added]:
        # A record that comes twice at once is one, as if it had come twice in a row.
        once: dict[Key, Record] = {}
        for record in records:
            first = once.setdefault(pointer_key(record), record)
            if record.epoch > first.epoch:
                once[pointer_key(record)] = replace(first, epoch=record.epoch)
        made = {
            each: record_columns(record, self._settings.text_field) for each, record in once.items()
        }
        orders = await self._orders([each for each in once.values() if not each.fixed])
        keys: dict[Key, Key] = {}
        rows: dict[Key, tuple[Record, Columns]] = {}
        for each, record in once.items():
            order = orders.get(each, record.order)
            keys[each] = record_key(record, order)
            rows[keys[each]] = (record, {**made[each], ORDER: order})
        known = await self._insert(
            self._table, {key: columns for key, (_, columns) in rows.items()}
        )
        fenced = await self._take_back({key: record for key, (record, _) in rows.items()})
        answers = []
        for record in records:
            key = keys[pointer_key(record)]
            answer = Added.KNOWN if key in known else Added.NEW
            answers.append(Added.FENCED if key in fenced else answer)
            known.setdefault(key, {})
        return answers

    async def _orders(self, movable: Sequence[Record]) -> dict[Key, int]:
        """The order keys that records first came with, of those that came before."""
        rows = {pointer_key(each): pointer_columns(each) for each in movable}
        return {
            key: columns[ORDER] for key, columns in (await self._insert(self._notes, rows)).items()
        }

    async def _insert(self, table: Table, rows: dict[Key, Columns]) -> dict[Key, Columns]:
        """Inserts rows; returns order and epoch of those that are there already.

        These stay as they are, but for their epoch, which becomes the later of the two.
        """
        known: dict[Key, Columns] = {}
        missing = dict(rows)
        for _ in range(_ROUNDS):
            writes = [Write(key, "insert", columns) for key, columns in missing.items()]
            done = await table.write(writes)
            there = [
                write.key for write, inserted in zip(writes, done, strict=True) if not inserted
            ]
            if not there:
                return known
            found = await table.read(there, [EPOCH, ORDER])
            earlier = [key for key, columns in found.items() if columns[EPOCH] < rows[key][EPOCH]]
            raised = await table.write(
                [
                    Write(key, "change", {EPOCH: rows[key][EPOCH]}, epoch_below(rows[key][EPOCH]))
                    for key in earlier
                ]
            )
            # Deleted in between, it is inserted; raised further in between, it will be found so.
            again = {key for key, held in zip(earlier, raised, strict=True) if not held}
            known |= {key: columns for key, columns in found.items() if key not in again}
            missing = {key: rows[key] for key in there if key not in found or key in again}
            if not missing:
                return known
        raise BackendUnavailable("rows in Tablestore change too fast to be written")

    async def _take_back(self, rows: dict[Key, Record]) -> set[Key]:
        """Removes rows that a deletion has fenced off, which may have come before they did."""
        places = {
            (key[0], place)
            for key, record in rows.items()
            for place in (fence_place(None), fence_place(record.scope.session_id))
        }
        fences = await self._notes.read(places, [EPOCH])
        fenced: set[Key] = set()
        deletes: list[Write] = []
        pointers: list[Write] = []
        for key, record in rows.items():
            places_of_it = (fence_place(None), fence_place(record.scope.session_id))
            epochs = [
                fences[key[0], each][EPOCH] for each in places_of_it if (key[0], each) in fences
            ]
            fence = max(epochs, default=0)
            if record.epoch < fence:
                fenced.add(key)
                deletes.append(Write(key, "delete", only_if=epoch_below(fence)))
                if not record.fixed:
                    pointer = pointer_key(record)
                    pointers.append(Write(pointer, "delete", only_if=epoch_below(fence)))
        await self._table.write(deletes)
        await self._notes.write(pointers)
        return fenced

    # --- the second step ------------------------------------------------------------------------

    async def index(
        self, records: Sequence[Record], *, patience: float
    ) -> Sequence[JobError | None]:
        pointers = await self._notes.read(
            [pointer_key(each) for each in records if not each.fixed], [ORDER]
        )
        keys = [
            record_key(each, pointers.get(pointer_key(each), {}).get(ORDER, each.order))
            for each in records
        ]
        errors: list[JobError | None] = [None] * len(records)
        texts = [searchable(each.message) for each in records]
        there = {key for key, text in zip(keys, texts, strict=True) if text}
        if self._vectors is not None:
            errors, there = await self._embed(self._vectors, keys, texts)
        epochs: dict[Key, int] = {}
        for key, record in zip(keys, records, strict=True):
            if key in there:
                epochs[key] = max(record.epoch, epochs.get(key, 0))
        hidden = await self._watch.shown(epochs, patience)
        for at, key in enumerate(keys):
            errors[at] = errors[at] or hidden.get(key)
        return errors

    async def _embed(
        self, vectors: DocumentEmbedder, keys: Sequence[Key], texts: Sequence[str]
    ) -> tuple[list[JobError | None], set[Key]]:
        """Gives rows their vectors; what each failed with, and which rows have one."""
        found = await self._table.read(
            [key for key, text in zip(keys, texts, strict=True) if text], [EPOCH, DIGEST, EMBEDDED]
        )
        embedded = {key for key, columns in found.items() if columns.get(EMBEDDED)}
        # A row that holds another text, stored under the same key before, has its own add to see to
        # it.
        todo = {
            key: text
            for key, text in zip(keys, texts, strict=True)
            if key in found and key not in embedded and found[key].get(DIGEST) == digest(text)
        }
        failed: dict[Key, JobError] = {}
        writes: list[Write] = []
        made = await vectors.of(list(todo.values()))
        for (key, text), vector in zip(todo.items(), made, strict=True):
            if isinstance(vector, JobError):
                failed[key] = vector
                continue
            columns = {self._settings.embedding_field: stored(vector), EMBEDDED: 1}
            writes.append(Write(key, "change", columns, has(DIGEST, digest(text))))
        done = await self._table.write(writes)
        embedded |= {write.key for write, held in zip(writes, done, strict=True) if held}
        return [failed.get(key) for key in keys], embedded

    # --- search, list ---------------------------------------------------------------------------

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        if not query.strip():
            return []
        if self._vectors is None:
            fences = await self._fences(scope)
            found = await self._index.by_text(scope, query, fences, top_k)
        else:
            fences, vector = await asyncio.gather(
                self._fences(scope), self._vectors.of_query(query)
            )
            found = await self._index.by_vector(
                scope, vector.tolist(), fences, top_k, score_threshold
            )
        hits = []
        for each in found:
            if score_threshold is not None and each.score < score_threshold:
                continue
            # A row that the index still knows has lost its columns.
            if EPOCH in each.columns and fences.shows(each.columns):
                record = read_record(each.place, each.columns, scope)
                if record is not None:
                    hits.append(Hit(record, each.score))
        hits.sort(key=lambda hit: (-hit.score, -hit.record.order, hit.record.record_id))
        return hits

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        fences = await self._fences(scope)
        owner, only = owner_of(scope.tenant, scope.user_id), _of_session(scope)
        start = RECORDS[0]
        if offset:
            skipped = 0
            rows = self._table.scan(owner, RECORDS, [EPOCH, SESSION], only_if=only)
            async with aclosing(rows):
                async for place, columns in rows:
                    skipped += fences.shows(columns)
                    if skipped > offset:
                        start = place
                        break
                else:
                    return []
        page: list[Record] = []
        # Where rows are left out, it is not known how many are to be read for a page.
        at_once = limit if only is None else max(limit, _SEVERAL)
        rest = self._table.scan(owner, (start, RECORDS[1]), READ, only_if=only, at_once=at_once)
        async with aclosing(rest):
            async for place, columns in rest:
                record = read_record(place, columns, scope)
                if record is not None and fences.shows(columns):
                    page.append(record)
                if len(page) >= limit:
                    break
        return page

    async def _fences(self, scope: Scope) -> Fences:
        """What deletions have removed, or are about to."""
        owner = owner_of(scope.tenant, scope.user_id)
        whole, sessions = 0, {}
        if scope.session_id is not None:
            place = fence_place(scope.session_id)
            found = await self._notes.read([(owner, "f"), (owner, place)], [EPOCH])
            rows = [(place, columns) for (_, place), columns in found.items()]
        else:
            rows = [row async for row in self._notes.scan(owner, FENCES, [EPOCH])]
        for place, columns in rows:
            if place == "f":
                whole = columns[EPOCH]
            else:
                sessions[place.removeprefix("f:")] = columns[EPOCH]
        return Fences(whole, sessions)

    # --- delete ---------------------------------------------------------------------------------

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        owner = owner_of(scope.tenant, scope.user_id)
        fence = (owner, fence_place(scope.session_id))
        start = await self._raise(fence, before_epoch)
        removed = 0
        for table, places in ((self._notes, POINTERS), (self._table, (start, RECORDS[1]))):
            pages = table.pages(
                owner,
                places,
                [EPOCH, SESSION],
                only_if=both(epoch_below(before_epoch), _of_session(scope)),
            )
            number = 0
            async with aclosing(pages):
                async for page, following in pages:
                    writes = [
                        Write((owner, place), "delete", only_if=epoch_below(before_epoch))
                        for place, _ in page
                    ]
                    done = await table.write(writes)
                    if table is self._notes:
                        continue
                    removed += sum(done)
                    number += 1
                    if number % _NOTED_EVERY == 0:
                        reached = {REACHED: following}
                        await self._notes.write(
                            [Write(fence, "change", reached, has(EPOCH, before_epoch))]
                        )
        if scope.session_id is None:
            await self._forget_fences(owner, before_epoch + 1)
        elif random.random() < _SWEEP:  # noqa: S311  # now and then
            await self._forget_fences(owner, 2**53, older_than=now_ms() - _KEPT)
        return removed

    async def _raise(self, fence: Key, epoch: int) -> str:
        """Raises a fence: from now on nothing older is shown. Returns the place from which on there
        may be something to remove: another try may have come as far."""
        columns = {EPOCH: epoch, AT: now_ms(), REACHED: RECORDS[0]}
        lower = epoch_below(epoch, or_missing=True)
        (raised,) = await self._notes.write([Write(fence, "upsert", columns, lower)])
        if raised:
            return RECORDS[0]
        found = (await self._notes.read([fence], [EPOCH, REACHED])).get(fence)
        if found is None or found[EPOCH] < epoch:
            raise BackendUnavailable("Tablestore has not written what a deletion goes by")
        return str(found.get(REACHED, RECORDS[0])) if found[EPOCH] == epoch else RECORDS[0]

    async def _forget_fences(self, owner: str, epoch: int, older_than: int | None = None) -> None:
        """Removes fences of sessions below an epoch, for what they say the user's own says too; or
        those that are old, for nothing is on its way any more that they would hold off."""
        old = []
        fences = self._notes.scan(owner, (fence_place(""), FENCES[1]), [EPOCH, AT])
        async with aclosing(fences):
            async for place, columns in fences:
                if columns[EPOCH] < epoch and (
                    older_than is None or columns.get(AT, older_than) < older_than
                ):
                    old.append(Write((owner, place), "delete", only_if=epoch_below(epoch)))
        await self._notes.write(old)

    # --- health ---------------------------------------------------------------------------------

    async def health(self) -> Health:
        detail = f"table {self._settings.table_name}, {self._settings.search_strategy} search"
        try:
            await self._table.ping()
            await self._index.ping()
            if self._vectors is not None:
                detail += f" with {await self._vectors.check()}"
        except JobError as error:
            return Health(ok=False, backend=self.name, detail=str(error))
        except Exception as error:  # noqa: BLE001  # health never raises
            return Health(ok=False, backend=self.name, detail=type(error).__name__)
        return Health(ok=True, backend=self.name, detail=detail)


def _of_session(scope: Scope) -> ColumnCondition | None:
    return None if scope.session_id is None else has(SESSION, escape(scope.session_id))


def now_ms() -> int:
    return int(time.time() * 1000)
