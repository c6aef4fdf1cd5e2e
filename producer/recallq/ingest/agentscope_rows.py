"""What a row of agentscope-runtime 1.0's Tablestore memory says, and when.

A row is a document of a ``KnowledgeStore``: its primary key is ``(document_id, tenant_id)``, the
document id is the message's id and the tenant is always the same. A column holds each field of the
message that was not null, and besides:

    user_id, session_id   whose it is
    content_list          the content parts as JSON
    text                  of a message of type ``message``, the text of its first text part, which
                          ``content_list`` then lacks
    embedding             its vector, which nobody needs here

Put together again it is the message that was stored, nulls included, so that it equals what the
client makes of the same message. One thing is not in the row: an empty text became no text.

**Order.** What the service did not keep is a message's place in its conversation. It wrote the
messages of one call side by side, each as it came, and Tablestore notes of each column when it was
written, to the millisecond. That is the time of a message and, in microseconds, its order key.
Messages of one millisecond are told apart within it by what they say of themselves: an event's
sequence number, a number that their ids end with, or else what usually comes first (what the user
said before what tools and assistants did). Where messages of one call were written in different
milliseconds and in another order than they were given in, nothing is left that would tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recallq.contract import DEFAULT_SESSION
from recallq.errors import InvalidInput
from recallq.ingest.formats import Turn, gist, make_key
from recallq.messages import Message, to_message

DOCUMENT_ID, TENANT_ID = "document_id", "tenant_id"
USER_ID, SESSION_ID, CONTENT = "user_id", "session_id", "content_list"

_ONLY_TENANT = "__default"
_PLAIN = ("object", "type", "status")
_OBJECTS = ("error", "usage", "metadata")
_NULLABLE = ("sequence_number", "role", "code", "message", *_OBJECTS)
"""A message has these even if they are null; a row has only those that are not."""

FIELDS = frozenset({"id", "content", USER_ID, SESSION_ID, CONTENT, *_PLAIN, *_NULLABLE})
"""Names that mean something already, in a message or in a row."""

_LATEST = 2**53 // 1000


@dataclass(frozen=True, slots=True)
class Row:
    """A row as Tablestore gives it."""

    document_id: str
    tenant_id: str
    columns: Mapping[str, Any]
    written: int | None
    """When, in milliseconds since the epoch."""


def columns_to_read(text_field: str, extra: Sequence[str] = ()) -> list[str]:
    """The columns that `turn_of` looks at; the vector's is none of them.

    The primary key is named too: else Tablestore leaves out rows that have no other of these.
    """
    return [DOCUMENT_ID, TENANT_ID, USER_ID, SESSION_ID, CONTENT, text_field,
            *_PLAIN, *_NULLABLE, *extra]  # fmt: skip


def turn_of(row: Row, table: str, text_field: str, extra: Sequence[str] = ()) -> Turn:
    """The one message of a row, to store by one job. Raises `InvalidInput`.

    `extra` are columns to keep with the message besides those of agentscope's own fields.
    """
    for name, value in row.columns.items():
        if isinstance(value, (bytes, bytearray)):
            raise InvalidInput(f"column {name} is binary")
    if row.tenant_id != _ONLY_TENANT:
        raise InvalidInput(
            f"its {TENANT_ID} is {row.tenant_id!r}, and that of agentscope-runtime's rows is "
            f"{_ONLY_TENANT!r}"
        )
    user, session = _id(row, USER_ID), _id(row, SESSION_ID) or DEFAULT_SESSION
    if not user:
        raise InvalidInput(f"it has no {USER_ID}" if user is None else f"its {USER_ID} is empty")
    message = _message(row, text_field, extra)
    order = _order(row)
    # What it says counts as well: where an id was used again since, neither message is lost.
    key = make_key("tablestore", table, row.document_id, *gist(message.to_dict()))
    return Turn(user, session, [message], key, order)


def _id(row: Row, name: str) -> str | None:
    value = row.columns.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"its {name} is {value!r}; it must be a string or a whole number")
    return value


def _message(row: Row, text_field: str, extra: Sequence[str]) -> Message:
    columns = row.columns
    said: dict[str, Any] = {"id": row.document_id}
    said |= {name: columns[name] for name in (*_PLAIN, *extra) if name in columns}
    said |= {name: columns.get(name) for name in _NULLABLE}
    said |= {name: _object(said[name]) for name in _OBJECTS}
    said["content"] = _content(columns, text_field)
    try:
        return to_message(said, "the message")
    except RecursionError:
        raise InvalidInput("it is nested too deeply") from None


def _content(columns: Mapping[str, Any], text_field: str) -> list[Any] | None:
    if CONTENT not in columns:
        raise InvalidInput(f"it has no {CONTENT}: agentscope-runtime did not write it")
    try:
        content = json.loads(columns[CONTENT])
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"its {CONTENT} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidInput(f"its {CONTENT} is nested too deeply") from None
    if content is not None and not isinstance(content, list):
        raise InvalidInput(f"its {CONTENT} is {type(content).__name__}, not a list of parts")
    texts = [
        part for part in content or [] if isinstance(part, dict) and part.get("type") == "text"
    ]
    if text_field in columns:
        if not texts:
            raise InvalidInput(f"it has a {text_field}, and no part of its content takes it")
        texts[0]["text"] = columns[text_field]
    elif texts:
        texts[0].setdefault("text", None)
    return content


def _object(value: Any) -> Any:
    """What a column holds of a field that is an object, which a column cannot."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict) else value


# --- order --------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"(?:^[A-Za-z]*|[^0-9A-Za-z])([0-9]{1,15})$")
_WHEN_TYPE = {
    "reasoning": 200,
    "function_call": 300,
    "plugin_call": 300,
    "component_call": 300,
    "mcp_call": 300,
    "mcp_list_tools": 300,
    "mcp_approval_request": 300,
    "mcp_approval_response": 350,
    "function_call_output": 400,
    "plugin_call_output": 400,
    "component_call_output": 400,
    "mcp_call_output": 400,
}
_WHEN_ROLE = {"system": 0, "user": 100, "tool": 400}
_LAST = 500


def _order(row: Row) -> int:
    """The order key of a row: microseconds since the epoch."""
    if row.written is None or not 0 < row.written < _LATEST:
        raise InvalidInput(f"the time at which it was written is {row.written}")
    return row.written * 1000 + _within_millisecond(row)


def _within_millisecond(row: Row) -> int:
    sequence = row.columns.get("sequence_number")
    if isinstance(sequence, int) and not isinstance(sequence, bool):
        return sequence % 1000
    numbered = _NUMBERED.search(row.document_id)
    if numbered is not None:
        return int(numbered[1]) % 1000
    by_type = _WHEN_TYPE.get(str(row.columns.get("type")))
    return by_type if by_type is not None else _WHEN_ROLE.get(str(row.columns.get("role")), _LAST)
