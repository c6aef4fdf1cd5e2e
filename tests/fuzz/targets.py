"""The readers, inputs for them, and what may come of these: a value, or a documented error."""

# mypy: allow-untyped-calls

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from kombu.utils.json import dumps

from recallq import (
    InvalidInput,
    MemoryClient,
    RecallQError,
    UndecodableJob,
    UnknownJob,
    dead_letters,
    transport,
)
from recallq.contract import (
    AddJob,
    AddResult,
    BatchResult,
    JobRef,
    JobState,
    Lane,
    Operation,
    Outcome,
    Scope,
    decode_batch,
    encode_batch,
    make_batch,
)
from recallq.dead_letter_box import DeadLetterBox
from recallq.dead_letters import DeadLetter
from recallq.envelope import CeleryEnvelope
from recallq.errors import from_wire
from recallq.settings import ClientSettings
from recallq_worker import broker, consumer, slow_ledger
from recallq_worker.backends.redis.values import parts_of
from recallq_worker.search.entries import DamagedIndex, Messages, entries_of
from recallq_worker.search.segments import (
    decode,
    encode,
    postings_in,
    recency_in,
    sessions_in,
    vocabulary_in,
)
from recallq_worker.vectors.rows import parse_row
from tests import strategies

Mutation = Callable[[bytes], bytes]

_ODD_BYTES = [
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"\\ud800",
    b"[",
    b"]" * 3,
    b"{}",
    b"1e999",
    b"-1",
    b"null",
]


def mutated(*seeds: bytes) -> SearchStrategy[bytes]:
    """The seeds with a few things done to them, or any bytes."""

    @st.composite
    def bytes_of(draw: st.DrawFn) -> bytes:
        value = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(value)))
            end = min(len(value), at + draw(st.integers(0, 8)))
            value[at:end] = draw(st.sampled_from(_ODD_BYTES) | st.binary(max_size=8))
        return bytes(value)

    return bytes_of() | st.binary(max_size=200)


def other(value: Any) -> SearchStrategy[Any]:
    """A JSON value with one of its parts exchanged, or left out."""

    @st.composite
    def exchanged(draw: st.DrawFn) -> Any:
        return _exchange(draw, json.loads(json.dumps(value)))

    return exchanged()


_STRANGE = strategies.json_values | st.sampled_from(
    [10**30, -(10**30), 1e308, float("inf"), "\ud800", "x" * 5000, [[]], {"__type__": "uuid"}]
)


def _exchange(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(_STRANGE)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 5)) == 0:
        del value[key]
    else:
        value[key] = _exchange(draw, value[key])
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@contextmanager
def only(*allowed: type[BaseException]) -> Iterator[None]:
    """Nothing but these errors may come out."""
    with suppress(*allowed):
        yield


# --- seeds ----------------------------------------------------------------------------------------

BATCH_ID = "0123456789abcdef-1"
_JOB = AddJob(
    scope=Scope("default", "ann", "s"),
    submitted_at=1.0,
    deadline=2.0,
    messages=[{"role": "user", "content": "tea"}],
    order=1,
    idempotency_key="k",
)
PAYLOAD = encode_batch(make_batch(BATCH_ID, Lane.LIVE, Operation.ADD, [_JOB], "redis"))
ENVELOPE = CeleryEnvelope("0123456789abcdef").wrap(BATCH_ID, Operation.ADD, PAYLOAD, "recallq.live")
_OUTCOME = Outcome(
    state=JobState.SUCCEEDED, result=AddResult(record_ids=["r"], added=1).model_dump()
)
_RESULT = BatchResult(operation=Operation.ADD, outcomes=[_OUTCOME], users=["{t/u}"], epochs=[1])
_SEARCH_RESULT = {
    "v": 1,
    "operation": "search",
    "outcomes": [
        {
            "state": "succeeded",
            "result": {
                "hits": [
                    {
                        "message": {"role": "user", "content": "tea"},
                        "record_id": "r",
                        "session_id": "s",
                        "created_at": "2026-01-01T00:00:00Z",
                        "score": 0.5,
                    }
                ]
            },
        },
        {
            "state": "failed",
            "error": {"code": "backend_unavailable", "message": "m", "retry_after": 1},
        },
    ],
}
STORED_RESULTS = [
    {"status": "SUCCESS", "result": json.loads(_RESULT.model_dump_json())},
    {"status": "SUCCESS", "result": _SEARCH_RESULT},
    {"status": "FAILURE", "result": {"exc_type": "ValueError", "exc_message": ["x"]}},
]
_LETTER = DeadLetter(
    id=f"{BATCH_ID}-0",
    kind="job",
    operation=Operation.ADD,
    lane=Lane.LIVE,
    scope=_JOB.scope,
    job=json.loads(_JOB.model_dump_json()),
    epochs=[1],
    code="failed",
    error="e",
    died_at=datetime.fromtimestamp(1, UTC),
)
_MESSAGE_LETTER = _LETTER.model_copy(update={"kind": "message", "job": None, "payload": PAYLOAD})
_PENDING = b"a|1|x\n" + _JOB.model_dump_json().encode()
_STORED = b'i|1|x\n{"record_ids":["r"],"added":1}\n' + _JOB.model_dump_json().encode()
_TRIED = b'{"attempts":1,"history":[{"at":1.0,"error":"e"}],"due":2.0}'
_ENTRIES = {
    b"r%d" % number: entry
    for number, (entry, _) in enumerate(
        entries_of(
            ["s", "s", "t"],
            [1, 2, 3],
            [{"content": each} for each in ("green tea", "tea and coffee", "龙井茶")],
        )
    )
}
_SEGMENT = encode(Messages.of_entries(_ENTRIES), ["green", "tea"]).fields
_ROW = b'1 2 suffix\n"group"\n{"data":"tea"}'


# --- what is done with an input -------------------------------------------------------------------


def _batch(payload: Any) -> None:
    with only(UndecodableJob):
        decode_batch(payload)


class _Channel:
    no_ack_consumers: frozenset[str] = frozenset()

    def decode_body(self, body: Any, encoding: Any = None) -> Any:
        if encoding and encoding.lower() != "utf-8":
            return {"base64": base64.b64decode}[encoding](body)
        return body


def _envelope(raw: bytes) -> None:
    """As a worker's event loop does it, where no error may get through."""
    broker.install()
    with only(broker.Undecodable):
        envelope = broker._parse(raw)
        message = broker.Message(envelope, _Channel())
        with suppress(
            Exception
        ):  # the loop's own net, as for whatever a malformed message provokes
            consumer._defect(message)
        dumps(envelope).encode()  # it is buried by these words


def _job_id(value: Any) -> None:
    with only(UnknownJob):
        JobRef.parse(value)


_client = MemoryClient("redis://localhost:1")
_box = DeadLetterBox.__new__(DeadLetterBox)  # without a connection
_box._transport = transport.Transport(ClientSettings())


def _result(stored: bytes) -> None:
    with only(RecallQError):
        result = transport._read_result(stored)
        for index in range(3):
            outcome = transport._outcome_of(result, index)
            if outcome is not None:
                with only(RecallQError):
                    _client.value_of(outcome, f"{BATCH_ID}-{index}")


def _letter(stored: bytes) -> None:
    letter = dead_letters._read("id", stored)
    repr(letter)
    with only(InvalidInput):
        _box._revived(letter)


def _pending(item: bytes) -> None:
    with only(ValueError):
        slow_ledger._pending("id", item, _TRIED)


def _tried(tried: bytes) -> None:
    with only(ValueError):
        slow_ledger._pending("id", _PENDING, tried)


def _segment(field: tuple[bytes, bytes]) -> None:
    name, value = field
    fields = _SEGMENT | {name: value}
    for read in (
        lambda: decode(fields),
        lambda: sessions_in(value),
        lambda: postings_in(value, 1),
        lambda: recency_in(value, 3),
        lambda: vocabulary_in(value),
    ):
        with only(DamagedIndex):
            read()


def _entry(value: bytes) -> None:
    with only(DamagedIndex):
        Messages.of_entries(_ENTRIES | {b"r0": value})


def _row(value: bytes) -> None:
    row = parse_row(b"id", value)
    assert row is None or isinstance(row.payload, dict)


def _record(value: bytes) -> None:
    parts_of(b"id", value)


def _wire(wire: dict[str, Any]) -> None:
    str(from_wire(wire, job_id="x"))


@dataclass(frozen=True, slots=True)
class Target:
    inputs: SearchStrategy[Any]
    use: Callable[[Any], None]


def _fields() -> SearchStrategy[tuple[bytes, bytes]]:
    def of(name: bytes) -> SearchStrategy[tuple[bytes, bytes]]:
        value = _SEGMENT[name]
        values = mutated(value)
        if name in (b"o", b"v"):
            values = values | mutated(zlib.decompress(value)).map(zlib.compress)
        return st.tuples(st.just(name), values)

    return st.sampled_from(sorted(_SEGMENT)).flatmap(of)


_EMBEDDED = orjson.loads(ENVELOPE)
_FORMER = _EMBEDDED | {"body": base64.b64encode(_EMBEDDED["body"].encode()).decode()}
_FORMER["properties"] = _FORMER["properties"] | {"body_encoding": "base64"}

TARGETS: dict[str, Target] = {
    "batches": Target(
        mutated(PAYLOAD.encode()).map(lambda raw: raw.decode(errors="surrogateescape"))
        | other(json.loads(PAYLOAD)).map(json.dumps)
        | strategies.json_values,
        _batch,
    ),
    "envelopes": Target(
        mutated(ENVELOPE)
        | other(_EMBEDDED).map(as_json)
        | other(_FORMER).map(as_json)
        | other([[PAYLOAD], {}, {"callbacks": None}]).map(
            lambda body: as_json(_EMBEDDED | {"body": json.dumps(body)})
        ),
        _envelope,
    ),
    "job ids": Target(st.text() | st.from_regex(r"[0-9a-f]{16}-[0-9a-f]+-[0-9]+"), _job_id),
    "results": Target(
        mutated(*map(as_json, STORED_RESULTS))
        | st.sampled_from(STORED_RESULTS).flatmap(other).map(as_json),
        _result,
    ),
    "errors": Target(
        st.dictionaries(st.sampled_from(["code", "message", "retry_after"]), _STRANGE), _wire
    ),
    "dead letters": Target(
        mutated(_LETTER.model_dump_json().encode())
        | other(json.loads(_LETTER.model_dump_json())).map(as_json)
        | other(json.loads(_MESSAGE_LETTER.model_dump_json())).map(as_json),
        _letter,
    ),
    "jobs in the slow lane": Target(mutated(_PENDING, _STORED), _pending),
    "tries in the slow lane": Target(
        mutated(_TRIED) | other(json.loads(_TRIED)).map(as_json), _tried
    ),
    "segments": Target(_fields(), _segment),
    "entries": Target(mutated(*_ENTRIES.values()), _entry),
    "rows": Target(mutated(_ROW, b'1 2 s\n "g"\n {"a":1}', b"1 2 s\n1\n " + b"[" * 5000), _row),
    "records": Target(mutated(b'[1,2,"s",{"role":"user","content":"tea"}]'), _record),
}
