"""Segments: the terms of many messages, so that those that hold a term are found at once.

What is new has entries. From time to time they become a segment, which never changes: it answers
what a term occurs in by a few hundred bytes, whatever the number of its messages. Segments of about
equal size are merged, so there are few of them. (The shape is Lucene's; the postings carry the
finished weight of a term, so nothing else of a message is read for its score.)

In a segment, the messages of a session stand together in their order, so a message's neighbours in
the conversation are its neighbours there.

A segment is a dictionary of small values, which is a hash in Redis:

  b<n>   bucket n of the terms, by their first bits: how many (u16), the terms (u32), in how many
         messages each occurs (u16), for each in turn the numbers of the messages (u16), the weights
         (u8)
  d<n>   the record ids of messages 32n to 32n+31, as a JSON array
  s      the sessions: how many (u32), the number of each one's first message (u32), digests (u64)
  o      the messages' order keys, as differences (i64), compressed
  v      the tokens that occur, sorted, one a line, compressed
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import orjson

from recallq_worker.search.entries import DamagedIndex, Messages, starts_of
from recallq_worker.search.terms import Array

MOST_MESSAGES = 60_000
"""Of a segment: their numbers take 16 bits."""
IDS_TOGETHER = 32

Fields: TypeAlias = dict[bytes, bytes]

_BUCKET_POSTINGS = 400
"""About how many there are in a bucket."""
_DAMAGED = (
    AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
"""What reading a segment raises that another hand has touched."""


class Segment(NamedTuple):
    """An encoded segment, and what is to be known of it before it is read."""

    size: int
    """How many messages it has."""
    bits: int
    """Of a term, by which it is found: the segment has two to the power of that buckets."""
    last: int
    """The highest order key."""
    ordered: bool
    """Whether all messages stand in their order: no session begins before another ends."""
    fields: Fields

    def describe(self) -> bytes:
        return b"%d %d %d %d" % (self.size, self.bits, self.last, self.ordered)


def encode(messages: Messages, vocabulary: Iterable[str]) -> Segment:
    """The segment of at least one message, `MOST_MESSAGES` at most, in which tokens occur."""
    size = len(messages)
    if not 0 < size <= MOST_MESSAGES:
        raise ValueError(f"a segment of {size:,} messages")
    place_of = messages.places()
    sessions = np.empty_like(messages.sessions)
    sessions[place_of] = messages.sessions
    orders = np.empty_like(messages.orders)
    orders[place_of] = messages.orders
    ids = [""] * size
    for place, record_id in zip(place_of.tolist(), messages.ids, strict=True):
        ids[place] = record_id.decode()

    starts = starts_of(sessions)
    fields: Fields = {
        b"s": struct.pack("<I", len(starts))
        + starts.astype("<u4").tobytes()
        + sessions[starts].astype("<u8").tobytes(),
        b"o": zlib.compress(np.diff(orders, prepend=0).astype("<i8").tobytes(), 1),
        b"v": zlib.compress("\n".join(sorted(vocabulary)).encode(errors="replace"), 1),
    }
    for number, first in enumerate(range(0, size, IDS_TOGETHER)):
        fields[b"d%d" % number] = orjson.dumps(ids[first : first + IDS_TOGETHER])

    bits = (len(messages.terms) // _BUCKET_POSTINGS).bit_length()
    terms = messages.terms.astype(np.uint64)
    keys = (terms << np.uint64(16)) | place_of[messages.numbers].astype(np.uint64)
    by_term = np.argsort(keys)
    fields |= _buckets(keys[by_term], messages.weights[by_term], bits)
    ordered = bool((np.diff(orders) >= 0).all())
    return Segment(size, bits, int(orders.max()), ordered, fields)


def _buckets(keys: Array, weights: Array, bits: int) -> Fields:
    """The postings in their order; a key has the term, and the message in the last 16 bits."""
    if not len(keys):
        return {}
    terms = keys >> np.uint64(16)
    begins = np.flatnonzero(np.diff(terms, prepend=terms[:1] + np.uint64(1)))
    distinct = terms[begins].astype("<u4")
    counts = np.diff(begins, append=len(terms)).astype("<u2")
    numbers = keys.astype("<u2")
    bucket = (terms[begins] >> np.uint64(32 - bits)).astype(np.int64)
    firsts = np.flatnonzero(np.diff(bucket, prepend=-1))
    lasts = np.append(firsts[1:], len(distinct)).tolist()
    edges = np.append(begins, len(terms)).tolist()
    fields: Fields = {}
    for first, last in zip(firsts.tolist(), lasts, strict=True):
        postings = slice(edges[first], edges[last])
        fields[b"b%d" % bucket[first]] = (
            struct.pack("<H", last - first)
            + distinct[first:last].tobytes()
            + counts[first:last].tobytes()
            + numbers[postings].tobytes()
            + weights[postings].tobytes()
        )
    return fields


def decode(fields: Mapping[bytes, bytes]) -> tuple[Messages, set[str]]:
    """A segment's messages, and the tokens that occur. Raises `DamagedIndex`."""
    try:
        vocabulary = vocabulary_in(fields[b"v"])
        return _decoded(fields), set(vocabulary.split("\n")) - {""}
    except _DAMAGED as error:
        raise DamagedIndex(f"a segment: {type(error).__name__}") from error


def _decoded(fields: Mapping[bytes, bytes]) -> Messages:
    orders = np.cumsum(np.frombuffer(zlib.decompress(fields[b"o"]), dtype="<i8"))
    starts, digests = sessions_in(fields[b"s"])
    ids: list[bytes] = []
    for number in range(-(-len(orders) // IDS_TOGETHER)):
        ids += [each.encode() for each in orjson.loads(fields[b"d%d" % number])]
    if len(ids) != len(orders) or starts[-1] >= len(orders):
        raise ValueError("its parts do not fit")
    terms: list[Array] = [np.empty(0, "<u4")]
    numbers: list[Array] = [np.empty(0, np.int64)]
    weights: list[Array] = [np.empty(0, "u1")]
    for name, bucket in fields.items():
        if not name.startswith(b"b"):
            continue
        many = int.from_bytes(bucket[:2], "little")
        counts = np.frombuffer(bucket, "<u2", many, 2 + 4 * many)
        total = int(counts.sum())
        at = 2 + 6 * many
        if len(bucket) != at + 3 * total:  # before room is made for as many as it says
            raise ValueError("a bucket of another size")
        terms.append(np.repeat(np.frombuffer(bucket, "<u4", many, 2), counts))
        numbers.append(np.frombuffer(bucket, "<u2", total, at).astype(np.int64))
        weights.append(np.frombuffer(bucket, "u1", total, at + 2 * total))
    if any((each >= len(orders)).any() for each in numbers):
        raise ValueError("postings of messages that there are not")
    return Messages(
        ids=ids,
        sessions=np.repeat(digests, np.diff(starts, append=len(orders))),
        orders=orders,
        terms=np.concatenate(terms),
        numbers=np.concatenate(numbers),
        weights=np.concatenate(weights),
    )


def sessions_in(value: bytes) -> tuple[Array, Array]:
    """The numbers of the first messages of a segment's sessions, and their digests.

    Raises `DamagedIndex`.
    """
    try:
        (many,) = struct.unpack_from("<I", value)
        starts = np.frombuffer(value, "<u4", many, 4).astype(np.int64)
        digests = np.frombuffer(value, "<u8", many, 4 + 4 * many)
    except _DAMAGED as error:
        raise DamagedIndex("the sessions of a segment") from error
    if not many or starts[0] or (np.diff(starts) <= 0).any():
        raise DamagedIndex("the sessions of a segment")
    return starts, digests


def bucket_of(term: int, bits: int) -> bytes:
    """Where a term is found."""
    return b"b%d" % (term >> (32 - bits))


def postings_in(bucket: bytes, term: int) -> tuple[Array, Array] | None:
    """The numbers of the messages that a term occurs in, ascending, and its weights there.

    Raises `DamagedIndex`.
    """
    many = int.from_bytes(bucket[:2], "little")
    if len(bucket) < 2 + 6 * many:
        raise DamagedIndex("a bucket of a segment")
    wanted = term.to_bytes(4, "little")
    at = bucket.find(wanted, 2, 2 + 4 * many)
    while at >= 0 and (at - 2) % 4:
        at = bucket.find(wanted, at + 1, 2 + 4 * many)
    if at < 0:
        return None
    which = (at - 2) // 4
    try:
        counts = struct.unpack_from(f"<{which + 1}H", bucket, 2 + 4 * many)
        begin, count = sum(counts[:-1]), counts[-1]
        numbers = 2 + 6 * many
        weights = len(bucket) - (len(bucket) - numbers) // 3
        return (
            np.frombuffer(bucket, "<u2", count, numbers + 2 * begin),
            np.frombuffer(bucket, "u1", count, weights + begin),
        )
    except _DAMAGED as error:
        raise DamagedIndex("a bucket of a segment") from error


def recency_in(value: bytes, size: int) -> Array:
    """Of each of a segment's messages a number that is higher for a later one; `value` is its field
    ``o``. Raises `DamagedIndex`."""
    try:
        orders = np.cumsum(np.frombuffer(zlib.decompress(value), dtype="<i8"))
    except _DAMAGED as error:
        raise DamagedIndex("the order of a segment") from error
    if len(orders) != size:
        raise DamagedIndex("the order of a segment")
    places = np.empty(size, dtype=np.int64)
    places[np.argsort(orders, kind="stable")] = np.arange(size)
    return places


def vocabulary_in(value: bytes) -> str:
    """The tokens of a segment, one a line. Raises `DamagedIndex`."""
    try:
        return zlib.decompress(value).decode()
    except _DAMAGED as error:
        raise DamagedIndex("the vocabulary of a segment") from error
