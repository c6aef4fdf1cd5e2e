"""The Celery message: what a task looks like on a queue.

Celery itself builds the headers, so that a message is what any standard worker expects; only the
way onto the queue is our own (`recallq.transport`). Workers write messages too, when they send a
job again that came without a ledger entry.
"""

from __future__ import annotations

import base64
import uuid
from typing import Any

import orjson
from celery import Celery

from recallq.contract import Operation
from recallq.signing import HEADER, Signer

LISTED = "recallq-listed"
"""The header of a message that the ledger has a copy of, and sends again if it is lost: workers
need not note in Redis that they hold it."""


class CeleryEnvelope:
    """Writes the JSON that kombu's Redis transport expects on a queue, of batches in the ledger.

    Celery builds the headers and embedded options once per task; only ids differ between messages.
    Arguments are hidden from the headers: their repr would put the users' text there.
    """

    def __init__(self, client_id: str, signer: Signer | None = None) -> None:
        """`signer`: signs the messages, if there is one."""
        app = Celery(set_as_current=False)
        self._templates: dict[Operation, tuple[dict[str, Any], Any]] = {}
        for operation in Operation:
            message = app.amqp.as_task_v2(
                "", operation.task_name, args=("",), argsrepr="-", kwargsrepr="-",
                origin=f"recallq@{client_id}",
            )  # fmt: skip
            self._templates[operation] = (message.headers | {LISTED: True}, message.body[2])
        self._client_id = client_id
        self._signer = signer

    def wrap(self, task_id: str, operation: Operation, payload: str, queue: str) -> bytes:
        """The queue entry of one task whose only argument is `payload`."""
        headers, embedded = self._templates[operation]
        if self._signer is not None:
            signature = self._signer.sign(operation.task_name, task_id, queue, payload)
            headers = headers | {HEADER: signature}
        return orjson.dumps(
            {
                "body": orjson.dumps([[payload], {}, embedded]).decode(),
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": {**headers, "id": task_id, "root_id": task_id},
                "properties": {
                    "correlation_id": task_id,
                    "reply_to": self._client_id,
                    "delivery_mode": 2,
                    "delivery_info": {"exchange": "", "routing_key": queue},
                    "priority": 0,
                    # kombu's default is base64, a third larger and unreadable in redis-cli.
                    "body_encoding": "utf-8",
                    "delivery_tag": str(uuid.uuid4()),
                },
            }
        )


def unwrap(entry: str) -> str | None:
    """The payload in a queue entry, whoever wrote it; None if it is none of a single argument."""
    try:
        message = orjson.loads(entry)
        body = message["body"]
        if message["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        arguments, keywords, _ = orjson.loads(body)
        (payload,) = arguments
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return payload if isinstance(payload, str) and not keywords else None
