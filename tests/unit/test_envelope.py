"""What the client puts on a queue, held against what Celery's own producer puts there."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from celery import Celery
from hypothesis import given, settings
from kombu.connection import Connection
from redis import Redis

from recallq.contract import Operation
from recallq.envelope import LISTED, CeleryEnvelope, unwrap
from tests.strategies import text

CLIENT = "0123456789abcdef"
TASK = f"{CLIENT}-1"
PAYLOAD = '{"v":1,"text":"SECRET 用户 \\u0000 \\" \\\\ {} \n"}'


@pytest.fixture(scope="module")
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def queue(namespace: str) -> str:
    """A queue of the test's own."""
    return f"{namespace}.live"


@pytest.fixture(scope="module")
def envelope() -> CeleryEnvelope:
    return CeleryEnvelope(CLIENT)


@pytest.fixture
def published(redis_url: str, redis: Redis, queue: str) -> dict[str, Any]:
    """A message that Celery itself put on a queue, by an app that no other hears of."""
    app = Celery(broker=redis_url, set_as_current=False)

    @app.task(name=Operation.ADD.task_name, shared=False)  # type: ignore[untyped-decorator]
    def task(payload: str) -> None:
        """Only sent."""

    task.apply_async(args=(PAYLOAD,), task_id=TASK, queue=queue)
    app.close()
    message: dict[str, Any] = orjson.loads(redis.lpop(queue))  # type: ignore[arg-type]
    return message


@pytest.fixture
def wrapped(envelope: CeleryEnvelope, queue: str) -> dict[str, Any]:
    """The same message, as the client writes it."""
    message: dict[str, Any] = orjson.loads(envelope.wrap(TASK, Operation.ADD, PAYLOAD, queue))
    return message


def shape(value: Any) -> Any:
    """`value` with types in place of its values."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value).__name__


def test_a_message_has_the_fields_and_types_of_celerys(
    wrapped: dict[str, Any], published: dict[str, Any]
) -> None:
    """At every level, so that whatever reads a Celery message can read ours."""
    assert wrapped["headers"].pop(LISTED) is True  # a header more, as any sender may add some
    assert shape(wrapped) == shape(published)


def test_a_message_says_what_celerys_says(
    wrapped: dict[str, Any], published: dict[str, Any]
) -> None:
    """All values are equal but those that differ on purpose."""
    on_purpose = {
        "headers": ["argsrepr", "kwargsrepr", "origin"],
        "properties": ["reply_to", "body_encoding", "delivery_tag"],
    }
    for part, names in on_purpose.items():
        for name in names:
            assert wrapped[part].pop(name) != published[part].pop(name)
    del wrapped["body"], published["body"], wrapped["headers"][LISTED]
    assert wrapped == published


def test_the_body_is_celerys(wrapped: dict[str, Any], published: dict[str, Any]) -> None:
    """One argument, no keyword arguments, the same embedded options - and not in base64."""
    assert published["properties"]["body_encoding"] == "base64"
    theirs = orjson.loads(base64.b64decode(published["body"]))
    assert wrapped["properties"]["body_encoding"] == "utf-8"
    assert orjson.loads(wrapped["body"]) == theirs
    assert theirs[:2] == [[PAYLOAD], {}]


def test_users_texts_are_in_the_body_only(wrapped: dict[str, Any]) -> None:
    """Headers are logged, sent as events and shown by monitors."""
    del wrapped["body"]
    assert "SECRET" not in repr(wrapped)


@pytest.mark.parametrize("operation", Operation)
def test_each_operation_names_its_task(envelope: CeleryEnvelope, operation: Operation) -> None:
    message = orjson.loads(envelope.wrap(TASK, operation, "{}", "q"))
    assert message["headers"]["task"] == operation.task_name
    assert message["properties"]["delivery_info"] == {"exchange": "", "routing_key": "q"}


def test_ids_are_the_messages_own(envelope: CeleryEnvelope) -> None:
    """Messages share what Celery built once, but no message sees another's ids."""
    first = orjson.loads(envelope.wrap("c-1", Operation.ADD, "one", "q1"))
    second = orjson.loads(envelope.wrap("c-2", Operation.ADD, "two", "q2"))
    for message, task_id in ((first, "c-1"), (second, "c-2")):
        assert message["headers"]["id"] == task_id
        assert message["headers"]["root_id"] == task_id
        assert message["properties"]["correlation_id"] == task_id
        assert message["properties"]["reply_to"] == CLIENT
        uuid.UUID(message["properties"]["delivery_tag"])
    assert first["properties"]["delivery_tag"] != second["properties"]["delivery_tag"]
    assert orjson.loads(second["body"])[0] == ["two"]


def receive(redis_url: str, redis: Redis, queue: str, entry: bytes) -> Any:
    """What kombu makes of a queue entry."""
    redis.lpush(queue, entry)
    with Connection(redis_url) as connection:  # type: ignore[no-untyped-call]
        taken = connection.SimpleQueue(queue)
        message = taken.get(timeout=5)
        message.ack()
        taken.close()
    assert redis.llen(queue) == 0
    return message


def test_kombu_reads_a_message(
    redis_url: str, redis: Redis, envelope: CeleryEnvelope, queue: str
) -> None:
    """Through kombu's Redis transport, as a worker receives it."""
    entry = envelope.wrap(TASK, Operation.SEARCH, PAYLOAD, queue)
    message = receive(redis_url, redis, queue, entry)
    args, kwargs, embed = message.decode()
    assert args == [PAYLOAD]
    assert kwargs == {}
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}
    assert message.content_type == "application/json"
    assert message.headers["task"] == "recallq.search"
    assert message.properties["correlation_id"] == TASK


@given(text)
@settings(deadline=None)
def test_any_payload_is_the_one_argument(payload: str) -> None:
    """Quotes, escapes, control characters and any script survive the JSON within JSON."""
    message = orjson.loads(_shared.wrap(TASK, Operation.ADD, payload, "q"))
    assert orjson.loads(message["body"])[0] == [payload]


_shared = CeleryEnvelope(CLIENT)


def test_making_messages_leaves_celerys_current_app_alone() -> None:
    """An agent process may be a Celery application itself."""
    from celery import current_app

    before = current_app._get_current_object()
    CeleryEnvelope(CLIENT).wrap(TASK, Operation.ADD, "{}", "q")
    assert current_app._get_current_object() is before


def test_what_was_wrapped_can_be_unwrapped() -> None:
    entry = CeleryEnvelope(CLIENT).wrap(TASK, Operation.ADD, PAYLOAD, "recallq.live")
    assert unwrap(entry.decode()) == PAYLOAD
    message = orjson.loads(entry)
    message["body"] = base64.b64encode(message["body"].encode()).decode()
    message["properties"]["body_encoding"] = "base64"  # as kombu's producers write it
    assert unwrap(orjson.dumps(message).decode()) == PAYLOAD


@pytest.mark.parametrize(
    "body", ['[["a","b"],{},{}]', '[["a"],{"b":1},{}]', "[[1],{},{}]", "[]", "{", "7", '"'],
)  # fmt: skip
def test_what_is_no_single_payload_is_not_unwrapped(body: str) -> None:
    entry = {"body": body, "properties": {"body_encoding": "utf-8"}}
    assert unwrap(orjson.dumps(entry).decode()) is None


@given(text)
def test_anything_may_be_tried_to_be_unwrapped(said: str) -> None:
    assert unwrap(said) is None
