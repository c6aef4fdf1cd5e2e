"""Vectors in Redis: a row is an id, a vector and a payload, and belongs to one owner.

Each owner has a hash of rows, a hash of vectors, a sorted set of all rows by order key, and one
such set per group, so that writing, reading a page anywhere and deleting one row cost the same
however much the owner has. A further sorted set knows which rows were written since a version, so
that a process which remembers an owner's vectors (see `replicas`) reads only the newer ones: a
search costs one round trip to learn that nothing has changed, and one to read the winners.

A delete leaves a fence, as in the redis backend. Each fence is a key of its own, which expires by
itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from redis.commands.core import Script

from recallq.errors import BackendError, ConfigurationError
from recallq.redis_client import COMMAND_TIMEOUT, check_url, connect_threads
from recallq_worker.backends.base import Added
from recallq_worker.vectors import scripts
from recallq_worker.vectors.client import asking
from recallq_worker.vectors.replicas import (
    Compared,
    Floats,
    Replica,
    Shelf,
    VectorReplica,
    WordReplica,
)
from recallq_worker.vectors.rows import (
    NEVER_FENCED,
    Head,
    Row,
    escaped,
    parse_row,
    to_bytes,
    to_json,
)

log = logging.getLogger(__name__)

_FENCES_LIVE_MS = 30 * 24 * 3600 * 1000
"""How long a fence outlives its delete: longer than any write may lie in a queue."""
_BANS_LIVE = 24 * 3600
"""Seconds: longer than any write may be on its way."""
_WRITE_CHUNK = 200
_READ_CHUNK = 1000
_VECTORS_CHUNK = 500
"""Some megabytes a portion, at the usual dimensions."""
_DELETE_CHUNK = 500
_MOST_FOUND = 1_000_000
"""More is no use to anybody, and beyond what ranges hold, an error."""

_ADDED = {"n": Added.NEW, "k": Added.KNOWN, "f": Added.FENCED}
"""What the script says of each row."""

Vector = Sequence[float] | npt.NDArray[Any]
Where = Callable[[dict[str, Any]], bool]
R = TypeVar("R", bound=Replica)


def text_in(payload: Mapping[str, Any]) -> str:
    """The text of a payload that mem0 made."""
    text = payload.get("text_lemmatized") or payload.get("data")
    return text if isinstance(text, str) else ""


class RedisVectors:
    """The rows of any number of owners, in one collection; for use by any number of threads.

    Raises `BackendUnavailable` where a later try may succeed, `BackendError` where none will.
    """

    def __init__(
        self,
        url: str,
        collection: str,
        *,
        dimensions: int,
        connect_timeout: float = 5.0,
        command_timeout: float = COMMAND_TIMEOUT,
        cache_bytes: int = 64 * 2**20,
        text: Callable[[Mapping[str, Any]], str] = text_in,
    ) -> None:
        """Connects to nothing yet. `text` is what `keywords` searches in a payload."""
        if not collection or "{" in collection or "}" in collection:
            raise ValueError("a collection needs a name, without braces: it begins key names")
        if dimensions < 1:
            raise ValueError("dimensions must be 1 or more")
        self.collection = collection
        self.dimensions = dimensions
        self._url = check_url(url)
        self._text = text
        self._shelf = Shelf(cache_bytes)
        self._redis = connect_threads(
            url, connect_timeout=connect_timeout, command_timeout=command_timeout
        )
        self._upsert = self._redis.register_script(scripts.UPSERT)
        self._update = self._redis.register_script(scripts.UPDATE)
        self._remove = self._redis.register_script(scripts.REMOVE)
        self._delete = self._redis.register_script(scripts.DELETE)
        self._fence = self._redis.register_script(scripts.FENCE)
        self._claim = self._redis.register_script(scripts.CLAIM)
        self._page = self._redis.register_script(scripts.PAGE)
        self._changes = self._redis.register_script(scripts.CHANGES)
        self._ids = self._redis.register_script(scripts.IDS)

    def close(self) -> None:
        self._shelf.clear()
        self._redis.close()

    def ping(self) -> None:
        """Returns if Redis answers."""
        with asking(self._url):
            self._redis.ping()

    def claim(self, dimensions: int, model: str) -> None:
        """Notes which model's vectors are kept; called before any are. They may be kept elsewhere,
        where this collection has other `dimensions` of its own.

        Vectors of other dimensions cannot be compared, and those of another model mean nothing to
        each other. Raises `ConfigurationError` if the former are there; of the latter the log
        speaks, since a model may have many names.
        """
        key = f"{self.collection}:vectors"
        before, by, new = self._call(self._claim, [key], [dimensions, model])
        if int(before) == dimensions and not new:
            if by.decode() != model:
                log.warning(
                    "vectors of %s are there, and compared with those of %s", by.decode(), model
                )
            return
        there = self._stored_dimensions()
        if there == self.dimensions != dimensions and not new:
            there = int(before)  # those elsewhere are as was said first
        # Else only a worker that stored nothing was of another mind.
        if there in (None, dimensions, self.dimensions):
            with asking(self._url):
                self._redis.hset(key, mapping={"dimensions": str(dimensions), "model": model})
            return
        if new:  # they were stored before anybody said
            by = b"a model that nobody noted"
            with asking(self._url):
                self._redis.hset(key, mapping={"dimensions": str(there), "model": by})
        raise ConfigurationError(
            f"the memories in Redis have vectors of {there} dimensions (of {by.decode()}), and "
            f"this worker's model, {model}, makes {dimensions}: set it up as before, or give it a "
            "RECALLQ_NAMESPACE of its own"
        )

    def _stored_dimensions(self) -> int | None:
        """What some stored vector has; None if there is none."""
        with asking(self._url):
            for key in self._redis.scan_iter(match=self._keys_of_all("v"), count=_READ_CHUNK):
                found: Any = self._redis.hrandfield(key, 1, withvalues=True)
                if found:
                    return len(found[1]) // 4
        return None

    @property
    def cached_bytes(self) -> int:
        """What is remembered of owners, roughly."""
        return self._shelf.size

    # --- write ----------------------------------------------------------------------------------

    def upsert(
        self, owner: str, rows: Sequence[Row], vectors: Iterable[Vector], *, ttl: int | None = None
    ) -> list[Added]:
        """Stores rows, each with its vector; says what became of each. With `ttl`, all that is the
        owner's, in these groups, vanishes in so many seconds.

        A row whose id is stored already is overwritten, but keeps the later of both epochs: a
        delete between them leaves it. One whose epoch is below a fence is not stored. All or some
        are stored when Redis fails; upserting again stores the rest.
        """
        encoded = [(row, self._encoded(vector)) for row, vector in zip(rows, vectors, strict=True)]
        for row in rows:
            if not (0 <= row.epoch <= NEVER_FENCED and abs(row.order) <= 2**53):
                raise BackendError("a row's epoch or order key is beyond 2**53: sorted sets round")
        base = self._base(owner)
        added: list[Added] = []
        for start in range(0, len(encoded), _WRITE_CHUNK):
            portion = encoded[start : start + _WRITE_CHUNK]
            groups = {row.group: 0 for row, _ in portion}
            keys = [*_keys(base, "rvocn"), f"{base}:f"]
            args: list[Any] = [f"{base}:g:", (ttl or 0) * 1000, len(groups)]
            for number, group in enumerate(groups, start=1):
                groups[group] = number
                suffix = escaped(group)
                keys += [f"{base}:g:{suffix}", f"{base}:f:{suffix}"]
                args.append(suffix)
            keys.append(f"{base}:x")
            for row, vector in portion:
                content = to_json(row.group) + b"\n" + to_json(row.payload)
                args += [groups[row.group], to_bytes(row.id), row.order, row.epoch, content, vector]
            flags: bytes = self._call(self._upsert, keys, args)
            added += [_ADDED[flag] for flag in flags.decode()]
        return added

    def update(
        self,
        owner: str,
        row_id: str,
        *,
        vector: Vector | None = None,
        payload: dict[str, Any] | None = None,
    ) -> bool:
        """Replaces the vector, the payload or both, and says whether there is such a row."""
        keys = _keys(self._base(owner), "rvcn")
        args = [
            to_bytes(row_id),
            b"" if payload is None else to_json(payload),
            b"" if vector is None else self._encoded(vector),
        ]
        return bool(self._call(self._update, keys, args))

    def remove(self, owner: str, ids: Sequence[str], up_to: Mapping[str, int] | None = None) -> int:
        """Removes rows by their ids, and says how many there were; with `up_to`, only those whose
        epoch is no higher than that: who was stored anew since stays."""
        base = self._base(owner)
        removed = 0
        for portion in _portions([*dict.fromkeys(ids)], _DELETE_CHUNK):
            args: list[Any] = [f"{base}:g:", len(portion), *map(to_bytes, portion)]
            if up_to is not None:
                args += [up_to[row_id] for row_id in portion]
            removed += int(self._call(self._remove, _keys(base, "rvocn"), args))
        return removed

    def ban(self, owner: str, ids: Sequence[str]) -> None:
        """Removes rows, and sees to it for a day that nobody stores one of these ids: a write that
        was begun long ago may still be on its way."""
        if not ids:
            return
        banned = f"{self._base(owner)}:x"
        with asking(self._url), self._redis.pipeline(transaction=True) as pipe:
            pipe.sadd(banned, *map(to_bytes, ids))
            pipe.expire(banned, _BANS_LIVE)
            pipe.execute()
        self.remove(owner, ids)

    def delete(self, owner: str, *, group: str | None, before_epoch: int) -> int:
        """Removes every row with a lower epoch, of a group or of all, and says how many.

        From its first step on, rows with a lower epoch are not stored any more. Repeating it after
        a crash finishes the work.
        """
        self.fence(owner, group=group, before_epoch=before_epoch)
        return self._delete_from(self._base(owner), self._places(owner, group), before_epoch)

    def fence(self, owner: str, *, group: str | None, before_epoch: int) -> None:
        """The first step of a delete: from now on, rows with a lower epoch are not stored."""
        fence = f"{self._base(owner)}:f"
        if group is not None:
            fence += f":{escaped(group)}"
        self._call(self._fence, [fence], [before_epoch, _FENCES_LIVE_MS])

    def clear(self) -> int:
        """Removes every row of every owner, and says how many. Fences stay."""
        removed = 0
        with asking(self._url):
            for key in self._redis.scan_iter(match=self._keys_of_all("o"), count=_READ_CHUNK):
                base = bytes(key).decode().removesuffix(":o")
                removed += self._delete_from(base, f"{base}:o", NEVER_FENCED + 1)
        return removed

    def _delete_from(self, base: str, places: str, before_epoch: int) -> int:
        """Removes the old ones of the rows in the sorted set `places`."""
        keys = [*_keys(base, "rvocn"), places]
        removed = 0
        while True:
            offset = passed = 0
            while True:
                looked_at, gone = self._call(
                    self._delete, keys, [f"{base}:g:", before_epoch, offset, _DELETE_CHUNK]
                )
                passed += int(gone)
                offset += looked_at - int(gone)
                if looked_at < _DELETE_CHUNK:
                    break
            removed += passed
            if passed == 0 or offset < _DELETE_CHUNK:
                return removed
            # Others may have removed rows meanwhile, and so moved some past our place.

    # --- read -----------------------------------------------------------------------------------

    def get(self, owner: str, row_id: str) -> Row | None:
        return next(iter(self.get_many(owner, [row_id])), None)

    def get_many(self, owner: str, ids: Sequence[str]) -> list[Row]:
        """Those that there are, in the order of `ids`."""
        found = self._rows(self._base(owner), [to_bytes(row_id) for row_id in ids])
        return [row for row in found if row is not None]

    def count(self, owner: str, group: str | None = None) -> int:
        with asking(self._url):
            count: Any = self._redis.zcard(self._places(owner, group))
        return int(count)

    def page(self, owner: str, *, group: str | None, offset: int, limit: int) -> list[Row]:
        """Rows by (order, id), oldest first. A page costs the same at any depth."""
        rows: list[Row] = []
        keys = [f"{self._base(owner)}:r", self._places(owner, group)]
        for first in range(offset, offset + limit, _READ_CHUNK):
            last = min(first + _READ_CHUNK, offset + limit) - 1
            ids, values = self._call(self._page, keys, [first, last])
            found = (parse_row(row_id, value) for row_id, value in zip(ids, values, strict=True))
            rows += [row for row in found if row is not None]
            if len(ids) <= last - first:
                break
        return rows

    def _rows(self, base: str, ids: Sequence[bytes]) -> Iterator[Row | None]:
        for portion in _portions(ids, _READ_CHUNK):
            with asking(self._url):
                values: Any = self._redis.hmget(f"{base}:r", portion)
            for row_id, value in zip(portion, values, strict=True):
                yield parse_row(row_id, value) if value is not None else None

    # --- search ---------------------------------------------------------------------------------

    def nearest(
        self,
        owner: str,
        vector: Vector,
        *,
        top_k: int,
        group: str | None = None,
        where: Where | None = None,
    ) -> list[tuple[Row, float]]:
        """The rows with the most similar vectors, best first, ties by recency; with the cosine,
        or 0 where that is negative."""
        direction = self._direction(vector)

        def best(replica: VectorReplica) -> Iterator[tuple[bytes, float]]:
            return replica.best(direction, _suffix(group))

        return self._search(
            owner, VectorReplica, lambda: VectorReplica(self.dimensions), best, top_k, where
        )

    def compare(
        self,
        owner: str,
        vector: Vector,
        *,
        group: str | None = None,
        ids: Sequence[str],
        most: int,
    ) -> Compared:
        """How similar the owner's rows are to a vector; reads no row. See `VectorReplica`."""
        base = self._base(owner)
        direction = self._direction(vector)
        replica = self._shelf.take(VectorReplica, base, lambda: VectorReplica(self.dimensions))
        with replica.lock:
            try:
                self._catch_up(base, replica)
            finally:
                self._shelf.weigh(VectorReplica, base, replica)
            return replica.compare(direction, _suffix(group), [*map(to_bytes, ids)], most)

    def keywords(
        self,
        owner: str,
        query: str,
        *,
        top_k: int,
        group: str | None = None,
        where: Where | None = None,
    ) -> list[tuple[Row, float]]:
        """The rows whose texts hold words of `query`, by Okapi BM25, best first, ties by
        recency."""

        def best(replica: WordReplica) -> Iterator[tuple[bytes, float]]:
            return replica.best(query, _suffix(group))

        return self._search(
            owner, WordReplica, lambda: WordReplica(self._text_of), best, top_k, where
        )

    def _search(
        self,
        owner: str,
        kind: type[R],
        make: Callable[[], R],
        best: Callable[[R], Iterator[tuple[bytes, float]]],
        top_k: int,
        where: Where | None,
    ) -> list[tuple[Row, float]]:
        top_k = min(top_k, _MOST_FOUND)
        if top_k < 1:
            return []
        base = self._base(owner)
        replica = self._shelf.take(kind, base, make)
        with replica.lock:
            try:
                self._catch_up(base, replica)
            finally:
                self._shelf.weigh(kind, base, replica)
            # Some more than are wanted: others may delete a winner before it is read.
            enough = 2 * top_k if where is None else None
            ranked = list(islice(best(replica), enough))
        found: list[tuple[Row, float]] = []
        portion = top_k if where is None else min(max(2 * top_k, 100), _READ_CHUNK)
        for scored in _portions(ranked, portion):
            rows = self._rows(base, [row_id for row_id, _ in scored])
            for row, (_, score) in zip(rows, scored, strict=True):
                if row is not None and (where is None or where(row.payload)):
                    found.append((row, score))
            if len(found) >= top_k:
                break
        return found[:top_k]

    def _catch_up(self, base: str, replica: Replica) -> None:
        """Brings a replica up to the version that Redis has now.

        The last portion tells, in one step, the version and that nothing else was written up to
        it. A replica then holds every row there is, so it holds others too just if it has more.
        """
        content = f"{base}:v" if isinstance(replica, VectorReplica) else f"{base}:r"
        keys = [*_keys(base, "ncr"), content]
        since = replica.version
        count = len(replica)
        while True:
            version, *news = self._call(self._changes, keys, [since, _VECTORS_CHUNK])
            if version == since:
                break
            if version < since:
                # All was deleted, or the server has lost its last second.
                replica.drop([*replica.ids()])
                replica.version = since = count = 0
                continue
            count, last, ids, heads, values = news
            replica.expect(count)
            _put(replica, ids, heads, values)
            since = int(last)
            if len(ids) < _VECTORS_CHUNK:
                break
        if len(replica) != count:
            self._drop_missing(base, replica)
        replica.version = version

    def _drop_missing(self, base: str, replica: Replica) -> None:
        missing = set(replica.ids())
        last = b"0"
        while True:
            ids, last = self._call(self._ids, [f"{base}:c"], [last, _READ_CHUNK])
            missing.difference_update(ids)
            if len(ids) < _READ_CHUNK:
                break
        replica.drop(missing)

    # --- the rest -------------------------------------------------------------------------------

    def _base(self, owner: str) -> str:
        # Without anything between its braces, a tag is none.
        return f"{self.collection}:{{{escaped(owner) or '='}}}"

    def _keys_of_all(self, name: str) -> str:
        """A pattern of the keys that every owner has one of."""
        own = "".join(f"\\{each}" if each in "*?[]\\" else each for each in self.collection)
        return f"{own}:{{*}}:{name}"

    def _places(self, owner: str, group: str | None) -> str:
        base = self._base(owner)
        return f"{base}:o" if group is None else f"{base}:g:{escaped(group)}"

    def _direction(self, vector: Vector) -> Floats:
        wanted = np.frombuffer(self._encoded(vector), dtype="<f4").astype(np.float64)
        length = np.linalg.norm(wanted)
        return (wanted / length if length > 0 else wanted).astype(np.float32)

    def _encoded(self, vector: Vector) -> bytes:
        try:
            with np.errstate(over="ignore"):
                array = np.asarray(vector, dtype="<f4")
        except (TypeError, ValueError):
            raise BackendError("a vector is not a sequence of numbers") from None
        if array.shape != (self.dimensions,):
            raise BackendError(
                f"a vector has {'x'.join(map(str, array.shape)) or 'no'} dimensions, and this"
                f" collection's have {self.dimensions}: set the dimensions that the embedding"
                " model gives, and use another collection where vectors are stored already"
            )
        if not np.isfinite(array).all():
            raise BackendError("a vector holds what is no finite number; embed the text again")
        return array.tobytes()

    def _text_of(self, value: bytes) -> str:
        row = parse_row(b"", value)
        return "" if row is None else self._text(row.payload)

    def _call(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        with asking(self._url):
            return script(keys, args)


def _put(
    replica: Replica,
    ids: Sequence[bytes],
    heads: Sequence[bytes | None],
    values: Sequence[bytes | None],
) -> None:
    """Puts what is there and whole; a row that is not, another hand has damaged."""
    whole: list[tuple[bytes, Head, bytes]] = []
    for row_id, head, value in zip(ids, heads, values, strict=True):
        if head is None or value is None:
            continue
        try:
            whole.append((row_id, Head.parse(head), value))
        except ValueError:
            log.error("a row is damaged and left out")  # noqa: TRY400  # would quote it
    if whole:
        replica.put(*zip(*whole, strict=True))


def _suffix(group: str | None) -> bytes | None:
    return None if group is None else escaped(group).encode()


def _keys(base: str, names: str) -> list[str]:
    """r rows, v vectors, o order, c changes, n version."""
    return [f"{base}:{name}" for name in names]


T = TypeVar("T")


def _portions(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]
