"""What a process remembers of owners' rows, so that a search reads only what has changed.

A replica holds one owner's vectors, or words, as of a version (see `scripts`). It knows nothing of
Redis: `store` brings it up to date and asks it under its lock. `Shelf` keeps the replicas that were
used last, within a number of bytes.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from recallq.errors import BackendError
from recallq_worker.vectors.rows import Head
from recallq_worker.vectors.words import words_of

Floats = npt.NDArray[np.float32]

_DIGITS = 6
"""Decimals of a score that mean anything: behind them, the same vector in another place of the
matrix scores differently, and ties would not be ties."""


class Replica(ABC):
    """One owner's rows as of `version`. Everything is called under `lock`."""

    _EMPTY = 1000

    def __init__(self) -> None:
        self.lock = Lock()
        self.version = 0

    @abstractmethod
    def expect(self, count: int) -> None:
        """Says how many rows there will be."""

    @abstractmethod
    def put(self, ids: Sequence[bytes], heads: Sequence[Head], values: Sequence[bytes]) -> None:
        """Rows that are new, or were written again."""

    @abstractmethod
    def drop(self, ids: Iterable[bytes]) -> None:
        """Rows that are gone; unknown ones do no harm."""

    @abstractmethod
    def ids(self) -> Iterable[bytes]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes, roughly."""


class VectorReplica(Replica):
    """Normalized vectors in one matrix, in no order."""

    _EACH = 300
    """Bytes of a row besides its vector: the id, its place in a list and in a dictionary."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self._dimensions = dimensions
        self._ids: list[bytes] = []
        self._places: dict[bytes, int] = {}
        self._suffixes: list[bytes] = []
        self._orders = np.empty(0, dtype=np.int64)
        self._matrix: Floats = np.empty((0, dimensions), dtype=np.float32)

    def expect(self, count: int) -> None:
        if count > len(self._orders):
            # A little more than is needed: large owners may not fit into the shelf twice.
            capacity = count + min(256, count // 8)
            added = capacity - len(self._orders)
            self._orders = np.concatenate([self._orders, np.zeros(added, dtype=np.int64)])
            more = np.zeros((added, self._dimensions), dtype=np.float32)
            self._matrix = np.concatenate([self._matrix, more])

    def put(self, ids: Sequence[bytes], heads: Sequence[Head], values: Sequence[bytes]) -> None:
        for value in values:
            if len(value) != 4 * self._dimensions:
                raise BackendError(
                    f"there are stored vectors of {len(value) // 4} dimensions, where this worker's"
                    f" have {self._dimensions}: embed with the model that made them, or use"
                    " another collection"
                )
        joined = np.frombuffer(b"".join(values), dtype="<f4")
        vectors = joined.reshape(-1, self._dimensions).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        # A vector without a direction is similar to none.
        np.divide(vectors, lengths, out=vectors, where=lengths > 0)
        self.expect(len(self._ids) + sum(row_id not in self._places for row_id in ids))
        for row_id, head, vector in zip(ids, heads, vectors, strict=True):
            place = self._places.get(row_id)
            if place is None:
                place = self._places[row_id] = len(self._ids)
                self._ids.append(row_id)
                self._suffixes.append(head.suffix)
            self._suffixes[place] = head.suffix
            self._orders[place] = head.order
            self._matrix[place] = vector

    def drop(self, ids: Iterable[bytes]) -> None:
        for row_id in ids:
            place = self._places.pop(row_id, None)
            if place is None:
                continue
            last = self._ids.pop()
            suffix = self._suffixes.pop()
            if last != row_id:
                self._ids[place], self._suffixes[place] = last, suffix
                self._places[last] = place
                self._orders[place] = self._orders[len(self._ids)]
                self._matrix[place] = self._matrix[len(self._ids)]

    def ids(self) -> Iterable[bytes]:
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def size(self) -> int:
        return self._EMPTY + self._matrix.nbytes + self._orders.nbytes + self._EACH * len(self._ids)

    def best(self, vector: Floats, suffix: bytes | None) -> Iterator[tuple[bytes, float]]:
        """Row ids and cosines, best first; equal ones newest first."""
        count = len(self._ids)
        scores = np.round(self._matrix[:count] @ vector, _DIGITS)
        orders = self._orders[:count]
        ranked: list[int] = np.lexsort((orders, scores))[::-1].tolist()
        if suffix is not None:
            ranked = [place for place in ranked if self._suffixes[place] == suffix]
        keys = list(zip(scores.tolist(), orders.tolist(), strict=True))
        for (score, _), equal in groupby(ranked, key=keys.__getitem__):
            for row_id in sorted((self._ids[place] for place in equal), reverse=True):
                yield row_id, min(max(score, 0.0), 1.0)

    def compare(
        self, vector: Floats, suffix: bytes | None, ids: Sequence[bytes], most: int
    ) -> Compared:
        """How similar rows are: the most similar of them, and those of `ids`."""
        scores = np.clip(np.round(self._matrix[: len(self._ids)] @ vector, _DIGITS), 0.0, 1.0)
        asked = {
            row_id: float(scores[place])
            for row_id in ids
            if (place := self._places.get(row_id)) is not None
        }
        if suffix is None:
            places = np.arange(len(scores))
        else:
            places = np.array(
                [place for place, each in enumerate(self._suffixes) if each == suffix], dtype=int
            )
        if len(places) > most:
            found = scores[places]
            edge = np.partition(found, len(found) - most)[len(found) - most]
            better, equal = places[found > edge], places[found == edge]
            # More recent ones win ties at the edge.
            latest = np.argsort(self._orders[equal], kind="stable")[::-1]
            places = np.concatenate([better, equal[latest[: most - len(better)]]])
        best = [(self._ids[place], float(scores[place])) for place in places.tolist()]
        return Compared(sorted(best, key=lambda each: -each[1]), asked)


class Compared(NamedTuple):
    """Cosines, or 0 where they are negative."""

    best: list[tuple[bytes, float]]
    """The most similar rows, best first."""
    asked: dict[bytes, float]
    """Of the rows that were asked for, those that there are."""


class _Text(NamedTuple):
    order: int
    suffix: bytes
    length: int
    words: tuple[str, ...]


class WordReplica(Replica):
    """Which words stand in which row, and how often: what Okapi BM25 asks for."""

    _EACH = 500
    _EACH_WORD = 150
    """Bytes, roughly: its entry in the row, and the row's entry under it."""

    _K1 = 1.5
    _B = 0.75

    def __init__(self, text_of: Callable[[bytes], str]) -> None:
        """`text_of` takes the text to be searched out of a row's value."""
        super().__init__()
        self._text_of = text_of
        self._texts: dict[bytes, _Text] = {}
        self._rows: dict[str, dict[bytes, int]] = {}
        self._length = 0
        self._entries = 0

    def expect(self, count: int) -> None:
        pass

    def put(self, ids: Sequence[bytes], heads: Sequence[Head], values: Sequence[bytes]) -> None:
        self.drop(ids)
        for row_id, head, value in zip(ids, heads, values, strict=True):
            counts = Counter(words_of(self._text_of(value)))
            for word, count in counts.items():
                self._rows.setdefault(sys.intern(word), {})[row_id] = count
            length = counts.total()
            self._texts[row_id] = _Text(head.order, head.suffix, length, tuple(counts))
            self._length += length
            self._entries += len(counts)

    def drop(self, ids: Iterable[bytes]) -> None:
        for row_id in ids:
            text = self._texts.pop(row_id, None)
            if text is None:
                continue
            self._length -= text.length
            self._entries -= len(text.words)
            for word in text.words:
                rows = self._rows[word]
                del rows[row_id]
                if not rows:
                    del self._rows[word]

    def ids(self) -> Iterable[bytes]:
        return self._texts

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def size(self) -> int:
        return self._EMPTY + self._EACH * len(self._texts) + self._EACH_WORD * self._entries

    def best(self, query: str, suffix: bytes | None) -> Iterator[tuple[bytes, float]]:
        """Rows that hold a word of the query, and their scores; equal ones newest first.

        A word is as rare as it is among all of the owner's rows, whatever group is asked for.
        """
        scores: dict[bytes, float] = {}
        average = self._length / len(self._texts) if self._length else 1.0
        for word in dict.fromkeys(words_of(query)):
            rows = self._rows.get(word, {})
            rarity = math.log(1 + (len(self._texts) - len(rows) + 0.5) / (len(rows) + 0.5))
            for row_id, count in rows.items():
                text = self._texts[row_id]
                if suffix is None or text.suffix == suffix:
                    weight = self._K1 * (1 - self._B + self._B * text.length / average)
                    score = rarity * count * (self._K1 + 1) / (count + weight)
                    scores[row_id] = scores.get(row_id, 0.0) + score
        ranked = [
            (round(score, _DIGITS), self._texts[row_id].order, row_id)
            for row_id, score in scores.items()
        ]
        for score, _, row_id in sorted(ranked, reverse=True):
            yield row_id, score


R = TypeVar("R", bound=Replica)


class Shelf:
    """The replicas that were used last, within a number of bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._replicas: OrderedDict[tuple[type[Replica], str], Replica] = OrderedDict()
        self._sizes: dict[tuple[type[Replica], str], int] = {}
        self._size = 0

    def take(self, kind: type[R], owner: str, make: Callable[[], R]) -> R:
        """The owner's replica, perhaps a new one; to be used under its lock."""
        with self._lock:
            replica = self._replicas.get((kind, owner))
            if replica is None:
                replica = self._replicas[kind, owner] = make()
                self._sizes[kind, owner] = 0
            self._replicas.move_to_end((kind, owner))
        assert isinstance(replica, kind)
        return replica

    def weigh(self, kind: type[Replica], owner: str, replica: Replica) -> None:
        """Takes note of the size of a replica that has changed, and lets go of what is too much.

        One that is too large by itself goes too: whoever uses it has it, and nobody after.
        """
        size = replica.size
        with self._lock:
            if self._replicas.get((kind, owner)) is not replica:
                return  # has been let go of meanwhile
            self._size += size - self._sizes[kind, owner]
            self._sizes[kind, owner] = size
            if size > self._most:
                self._let_go((kind, owner))
            while self._size > self._most:
                self._let_go(next(iter(self._replicas)))

    def clear(self) -> None:
        with self._lock:
            self._replicas.clear()
            self._sizes.clear()
            self._size = 0

    @property
    def size(self) -> int:
        with self._lock:
            return self._size

    def _let_go(self, key: tuple[type[Replica], str]) -> None:
        del self._replicas[key]
        self._size -= self._sizes.pop(key)
