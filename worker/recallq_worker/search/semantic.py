"""Search by meaning: vectors of messages, beside the keywords or in their place.

Messages are stored, and found by their words, without any vector; the second step of an add
(`SemanticSearch.index`) embeds what is stored, many jobs' messages in a request. A search that is
to use both asks for the words and for the query's vector at the same time, and adds up what they
say of each message. One that has no vector yet has what its words say; so has every message while
the embedding service does not answer in time, so agents are not without their memory then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from recallq.contract import Scope
from recallq.errors import BackendUnavailable, JobError
from recallq.messages import message_text
from recallq_worker.backends.base import Hit, Record
from recallq_worker.embedding import DocumentEmbedder, Refused, Vector
from recallq_worker.search.finder import Reader, Wanted, best_of, ranked_by_words
from recallq_worker.search.terms import said_by
from recallq_worker.vectors import Compared

log = logging.getLogger(__name__)

_WORDS, _MEANING = 0.7, 0.3
"""What a score by words and a cosine count for, added up. On the conversations of LoCoMo, anything
from 0.6 to 0.8 for the words finds about as much."""
_FEWEST = 200
_FOR_EACH_WANTED = 4
"""How many of the best by each measure are compared."""
_PATIENCE = 3.0
"""Seconds for which a search that can do without waits for the vector of its query."""

Stored: TypeAlias = Callable[[Scope, Sequence[str]], Awaitable[Mapping[str, Record]]]
"""Reads records of a user by their ids; those that there are."""


class VectorRows(Protocol):
    """Where vectors are kept, each under the id of its record. `scope` is a user's, or a session's.

    Raises as backends do.
    """

    async def start(self, dimensions: int, model: str) -> None:
        """Raises `ConfigurationError` if vectors of other dimensions are there."""
        ...

    async def stop(self) -> None: ...

    async def epochs(self, scope: Scope, ids: Sequence[str]) -> Mapping[str, int]:
        """Those that have a vector, and the epochs under which it was stored."""
        ...

    async def put(self, records: Sequence[Record], vectors: Sequence[Vector]) -> None:
        """Stores vectors of one user's records, but for those that a delete has fenced off."""
        ...

    async def remove(self, scope: Scope, up_to: Mapping[str, int]) -> None:
        """Removes those whose epoch is no higher than that."""
        ...

    async def delete(self, scope: Scope, before_epoch: int) -> None:
        """Removes those with a lower epoch, for good."""
        ...

    async def compare(
        self, scope: Scope, vector: Vector, ids: Sequence[str], most: int
    ) -> Compared:
        """The most similar ones, and how similar those of `ids` are."""
        ...


Rows = TypeVar("Rows", bound=VectorRows)


class SemanticSearch(Generic[Rows]):
    """What a store has that searches by meaning."""

    def __init__(
        self, embedder: DocumentEmbedder, rows: Rows, strategy: Literal["vector", "hybrid"]
    ) -> None:
        self.embedder = embedder
        self.rows = rows
        self._strategy = strategy

    async def start(self) -> None:
        """Raises `ConfigurationError`, `MissingExtra`."""
        await self.embedder.start()
        await self.rows.start(self.embedder.dimensions, self.embedder.model)

    async def stop(self) -> None:
        await self.embedder.stop()
        await self.rows.stop()

    # --- the second step ------------------------------------------------------------------------

    async def index(self, records: Sequence[Record], stored: Stored) -> list[JobError | None]:
        """Gives records their vectors; says of each what it failed with. See `IndexedStore`."""
        users: dict[Scope, list[str]] = {}
        for record in records:
            user = Scope(record.scope.tenant, record.scope.user_id, None)
            users.setdefault(user, []).append(record.record_id)
        todo: list[tuple[Scope, Record]] = []
        for user, ids in users.items():
            todo += [(user, record) for record in await self._without(user, ids, stored)]
        vectors = await self.embedder.of([text_of(record.message) for _, record in todo])
        failed: dict[tuple[Scope, str], JobError] = {}
        done: dict[Scope, list[tuple[Record, Vector]]] = {}
        for (user, record), vector in zip(todo, vectors, strict=True):
            if isinstance(vector, JobError):
                failed[user, record.record_id] = vector
            else:
                done.setdefault(user, []).append((record, vector))
        for user, pairs in done.items():
            await self.rows.put([record for record, _ in pairs], [vector for _, vector in pairs])
            # One that was removed meanwhile, by its age say, has left nobody who would remove this.
            ids = [record.record_id for record, _ in pairs]
            there = await stored(user, ids)
            if gone := {
                record.record_id: record.epoch
                for record, _ in pairs
                if record.record_id not in there
            }:
                await self.rows.remove(user, gone)
        return [
            failed.get((Scope(each.scope.tenant, each.scope.user_id, None), each.record_id))
            for each in records
        ]

    async def _without(self, user: Scope, ids: Sequence[str], stored: Stored) -> list[Record]:
        """Records of a user that have text and no vector, or one of an earlier epoch than theirs,
        which a delete may remove."""
        # In this order: what had a vector, and is gone afterwards.
        epochs = await self.rows.epochs(user, list(dict.fromkeys(ids)))
        there = await stored(user, list(dict.fromkeys(ids)))
        if lost := {each: epoch for each, epoch in epochs.items() if each not in there}:
            await self.rows.remove(user, lost)  # who embedded them died before they were gone
        return [
            record
            for record_id, record in there.items()
            if epochs.get(record_id, -1) < record.epoch and text_of(record.message)
        ]

    # --- searching ------------------------------------------------------------------------------

    async def find(self, reader: Reader, scope: Scope, wanted: Wanted) -> list[Hit]:
        """The best matches, best first, ties by recency. Raises what a `Reader` does."""
        if not wanted.query.strip():
            return []
        most = max(_FEWEST, _FOR_EACH_WANTED * wanted.top_k)
        words: dict[str, float] = {}
        vector: Vector | None
        if self._strategy == "hybrid":
            words, vector = await asyncio.gather(
                ranked_by_words(reader, wanted, most), self._meaning_of(wanted.query)
            )
        else:
            vector = await self.embedder.of_query(wanted.query)
        while True:
            scores = {record_id: _WORDS * score for record_id, score in words.items()}
            compared = Compared([], {})
            if vector is not None:
                compared = await self.rows.compare(scope, vector, list(words), most)
            share = _MEANING if self._strategy == "hybrid" else 1.0
            cosines = dict(_named(compared.best)) | dict(_named(compared.asked.items()))
            for record_id, cosine in cosines.items():
                scores[record_id] = scores.get(record_id, 0.0) + share * cosine
            hits, some_are_gone = await best_of(reader, scores, wanted)
            all_there_are = len(words) < most and len(compared.best) < most
            if len(hits) >= wanted.top_k or not some_are_gone or all_there_are:
                return hits
            most *= 4  # what is gone, by its age say, hides others
            if self._strategy == "hybrid":
                words = await ranked_by_words(reader, wanted, most)

    async def _meaning_of(self, query: str) -> Vector | None:
        """The vector of a query; None if there is none in time."""
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self.embedder.of_query(query)
        except (TimeoutError, BackendUnavailable, Refused) as error:
            log.warning("searching by words alone: %s", str(error) or "its vector is not there yet")
            return None


def text_of(message: Mapping[str, Any]) -> str:
    """What is embedded of a message: who speaks, and the text; nothing if there is none."""
    text = message_text(message)
    speaker = said_by(message)
    return f"{speaker}: {text}" if speaker and text.strip() else text.strip() and text


def _named(scored: Iterable[tuple[bytes, float]]) -> Iterable[tuple[str, float]]:
    return ((record_id.decode(), score) for record_id, score in scored)
