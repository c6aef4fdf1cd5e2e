"""What a row of agentscope-runtime's table becomes, and in which order."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from recallq.errors import InvalidInput
from recallq.ingest.agentscope_rows import Row, turn_of
from recallq.ingest.formats import Turn
from recallq.messages import to_message
from tests.agentscope_table import data_part, document_of, message, text_part

WRITTEN = 1_740_000_000_123


def row_of(
    said: dict[str, Any], user: str = "ann", session: str = "s", written: int = WRITTEN
) -> Row:
    """As the old service wrote it, and Tablestore gives it back without the vector."""
    document = document_of(said, user, session)
    columns = dict(document.metadata or {})
    if document.text:
        columns["text"] = document.text
    return Row(document.document_id, "__default", columns, written)


def turn(row: Row, *extra: str, table: str = "t") -> Turn:
    return turn_of(row, table, "text", extra)


def changed(**columns: Any) -> Row:
    """A row that is good but for these columns; None leaves one out."""
    row = row_of(message("m", text_part("tea")))
    kept = {name: each for name, each in {**row.columns, **columns}.items() if each is not None}
    return Row(row.document_id, row.tenant_id, kept, row.written)


MESSAGES = {
    "text": message("m1", text_part("I like 龙井茶")),
    "several parts": message(
        "m2", data_part({"a": [1, None]}), text_part("one"), text_part("two"), role="assistant"
    ),
    "a tool call": message(
        "m3",
        data_part({"call_id": "c", "name": "f", "arguments": '{"q": "茶"}'}),
        role=None,
        type="plugin_call",
        status="completed",
        sequence_number=7,
    ),
    "text of another type": message("m4", text_part("hm"), role="assistant", type="reasoning"),
    "no content": message("m5", content=None, type="heartbeat", role=None),
    "empty content": message("m6", role="assistant"),
    "an error": message("m7", type="error", code="500", message="42"),
    "text that is JSON": message("m8", text_part('{"not": "parsed"}')),
    "no text": message("m9", text_part(None)),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_what_the_client_makes_of_it_itself(name: str) -> None:
    said = MESSAGES[name]
    found = turn(row_of(said, "王芳", "default"))
    assert (found.user_id, found.session_id) == ("王芳", "default")
    assert found.messages == [to_message(said)]
    assert found.messages[0].to_dict() == said


def test_an_empty_text_was_lost_by_who_stored_it() -> None:
    found = turn(row_of(message("m", text_part(""))))
    assert found.messages[0].to_dict() == message("m", text_part(None))


def test_objects_are_read_where_a_column_holds_their_json() -> None:
    found = turn(changed(usage='{"tokens": 3}', metadata="a note", error="[1]")).messages[0]
    said = found.to_dict()
    assert (said["usage"], said["metadata"], said["error"]) == ({"tokens": 3}, "a note", "[1]")


def test_columns_of_ones_own_are_kept_where_they_are_named() -> None:
    row = changed(mood="happy", weight=2.5)
    assert turn(row, "mood", "missing").messages[0].to_dict() == {
        **message("m", text_part("tea")),
        "mood": "happy",
    }


def test_a_row_that_names_no_session_is_of_the_default_one() -> None:
    assert turn(changed(session_id=None)).session_id == "default"
    assert turn(changed(session_id="")).session_id == "default"
    assert turn(changed(user_id=12)).user_id == "12"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (changed(user_id=None), "it has no user_id"),
        (changed(user_id=""), "its user_id is empty"),
        (changed(user_id=True), "its user_id is True"),
        (changed(content_list=None), "agentscope-runtime did not write it"),
        (changed(content_list="[{"), "its content_list is not JSON"),
        (changed(content_list=5), "its content_list is not JSON"),
        (changed(content_list="[" * 100_000), "nested too deeply"),
        (changed(content_list='{"type": "text"}'), "its content_list is dict"),
        (changed(content_list='[{"text": "no type"}]', text=None), "content.0"),
        (changed(content_list="null"), "no part of its content takes it"),
        (changed(role=5), "role"),
        (changed(metadata=bytearray(b"\xff")), "column metadata is binary"),
        (Row("m", "tenant", changed().columns, WRITTEN), "its tenant_id is 'tenant'"),
        (Row("m", "__default", changed().columns, 0), "the time at which it was written is 0"),
        (Row("m", "__default", changed().columns, 10**15), "the time at which it was written"),
    ],
)
def test_what_cannot_be_stored_says_why(row: Row, reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        turn(row)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


# --- identity -----------------------------------------------------------------------------------


def test_the_same_row_has_the_same_key_whenever_it_was_written() -> None:
    said = message("m", text_part("tea"))
    assert turn(row_of(said)).key == turn(row_of(said, written=WRITTEN + 5)).key


def test_another_table_id_or_message_has_another_key() -> None:
    said = message("m", text_part("tea"))
    keys = {
        turn(row_of(said)).key,
        turn(row_of(said), table="other").key,
        turn(row_of(said | {"id": "n"})).key,
        turn(row_of(message("m", text_part("coffee")))).key,
    }
    assert len(keys) == 4


# --- order --------------------------------------------------------------------------------------


def in_order(*said: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of one millisecond, as they will be listed."""
    return sorted(said, key=lambda each: turn(row_of(each)).order or 0)


def test_the_time_of_writing_is_the_order() -> None:
    turns = [turn(row_of(MESSAGES[name], written=WRITTEN)) for name in MESSAGES]
    for each in turns:
        assert each.order is not None
        assert each.order // 1000 == WRITTEN
    late = turn(row_of(message("m0", text_part("later")), written=WRITTEN + 1))
    assert max(each.order or 0 for each in turns) < (late.order or 0)


def test_within_a_millisecond_sequence_numbers_count() -> None:
    said = [message(f"m{9 - n}", text_part("x"), sequence_number=n) for n in range(5)]
    assert in_order(*reversed(said)) == said


@pytest.mark.parametrize("shape", ["{}", "m{}", "msg-{:05}", "ann/7-{}", "chat_1_{}"])
def test_within_a_millisecond_numbered_ids_count(shape: str) -> None:
    said = [message(shape.format(n), text_part("x")) for n in (1, 2, 9, 10, 11, 100)]
    assert in_order(*reversed(said)) == said


def test_within_a_millisecond_what_usually_comes_first_does() -> None:
    def made(kind: str, role: str | None) -> dict[str, Any]:
        number = uuid.uuid4().hex[:-1] + "e"
        return message(f"msg_{number}", text_part("x"), type=kind, role=role)

    said = [
        made("message", "system"),
        made("message", "user"),
        made("reasoning", "assistant"),
        made("plugin_call", "assistant"),
        made("plugin_call_output", "tool"),
        made("message", "assistant"),
    ]
    assert in_order(*reversed(said)) == said


def test_a_row_as_json_says_what_the_message_was() -> None:
    """The helper writes what the old service did: the first text stands in its own column."""
    row = row_of(message("m", text_part("one"), text_part("two")))
    parts = json.loads(row.columns["content_list"])
    assert ("text" in parts[0], parts[1]["text"], row.columns["text"]) == (False, "two", "one")
    assert not {"id", "content", "usage", "role_"} & row.columns.keys()
