"""What a line of a conversation log becomes, and that no bytes whatever upset the parser."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallq import sample
from recallq.ingest import Defaults, Line, Turn, parse
from recallq.ingest.stream import HEAD_BYTES, Position

FLAT = {"user_id": "ann", "session_id": "s1", "role": "user", "content": "hello"}


def lines_of(data: bytes, user: str | None = None, session: str | None = None) -> list[Line]:
    return list(parse(io.BytesIO(data), Defaults(user, session)))


def jsonl(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def turns_of(*values: Any, user: str | None = None, session: str | None = None) -> list[Turn]:
    """The turns of lines that are all good."""
    lines = lines_of(jsonl(*values), user, session)
    assert [line.problem for line in lines if line.problem] == []
    return [turn for line in lines for turn in line.turns]


def keys_of(*values: Any, user: str | None = None) -> list[str]:
    return [turn.key for turn in turns_of(*values, user=user)]


def problem_of(value: Any, user: str | None = None, session: str | None = None) -> str:
    """Why the one line that `value` makes is rejected."""
    data = value if isinstance(value, bytes) else jsonl(value)
    [line] = lines_of(data, user, session)
    assert line.turns == []
    assert line.problem is not None
    return line.problem


def stored(turn: Turn) -> tuple[str, str, dict[str, Any]]:
    [message] = turn.messages
    return turn.user_id, turn.session_id, message.to_dict()


# --- the three formats --------------------------------------------------------------------------


def test_a_flat_line_is_stored_as_it_came_without_user_and_session() -> None:
    said = {
        "role": "user",
        "content": "hello",
        "timestamp": "2025-01-01T10:00:00Z",
        "id": "m1",
        "name": "Ann",
        "mood": {"happy": True, "scale": [1, 2.5, None]},
    }
    [turn] = turns_of({"user_id": "ann", "session_id": "s1", **said})
    assert stored(turn) == ("ann", "s1", said)


def test_parts_and_tool_calls_are_kept() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "x", "y": 1}]}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}],
    }
    turns = turns_of(
        {"user_id": "ann", "session_id": "s", **parts},
        {"user_id": "ann", "session_id": "s", **call},
    )
    assert [turn.messages[0].to_dict() for turn in turns] == [parts, call]


@pytest.mark.parametrize("name", ["user_id", "user"])
@pytest.mark.parametrize("inside", [False, True], ids=["in the line", "in its metadata"])
def test_an_openai_line_is_stored_as_it_came(name: str, inside: bool) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi", "weight": 1},
        {"role": "assistant", "content": "hello"},
    ]
    who = {"metadata": {name: "ann"}} if inside else {name: "ann"}
    [turn] = turns_of({"messages": messages, "session_id": "s1", **who})
    assert (turn.user_id, turn.session_id) == ("ann", "s1")
    assert [message.to_dict() for message in turn.messages] == messages


def test_sharegpt_speakers_become_roles() -> None:
    turns = turns_of(
        {
            "id": "chat-1",
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hi", "lang": "en"},
                {"from": "gpt", "value": "hello"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "42"},
                {"from": "Narrator", "value": "a pause"},
                {"role": "user", "content": "as OpenAI would say it"},
            ],
        },
        user="ann",
    )
    assert {(turn.user_id, turn.session_id) for turn in turns} == {("ann", "chat-1")}
    assert [turn.messages[0].to_dict() for turn in turns] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi", "lang": "en"},
        {"role": "assistant", "content": "hello"},
        {"role": "assistant", "content": "{}", "from": "function_call"},
        {"role": "tool", "content": "42", "from": "observation"},
        {"role": "Narrator", "content": "a pause"},
        {"role": "user", "content": "as OpenAI would say it"},
    ]


def test_formats_are_told_apart_line_by_line() -> None:
    turns = turns_of(
        FLAT,
        {"user": "bob", "id": "c1", "messages": [{"role": "user", "content": "one"}]},
        {"user": "eve", "id": "c2", "conversations": [{"from": "human", "value": "two"}]},
    )
    assert [stored(turn) for turn in turns] == [
        ("ann", "s1", {"role": "user", "content": "hello"}),
        ("bob", "c1", {"role": "user", "content": "one"}),
        ("eve", "c2", {"role": "user", "content": "two"}),
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_is_read_item_by_item(indent: int | None) -> None:
    values = [
        {"id": f"c{n}", "conversations": [{"from": "human", "value": 'a "]" \\ { [' + str(n)}]}
        for n in range(5)
    ]
    array = json.dumps(values, indent=indent).encode()
    for data in (array, b"\xef\xbb\xbf \n" + array, array + b"\n"):
        lines = lines_of(data, user="ann")
        assert [line.problem for line in lines] == [None] * 5
        assert [line.piece.item for line in lines] == [1, 2, 3, 4, 5]
        assert [line.turns for line in lines] == [
            line.turns for line in lines_of(jsonl(*values), user="ann")
        ]


def test_a_bad_item_of_an_array_does_not_cost_the_others() -> None:
    good = json.dumps(FLAT)
    data = f'[{good},\n {{"a": tru}},\n 7, "text, with ]",\n {{"a": [1}}}}, {good}]\n{good}\n'
    lines = lines_of(data.encode())
    assert [bool(line.turns) for line in lines] == [True, False, False, False, False, True, True]
    assert [line.piece.line for line in lines] == [1, 2, 3, 3, 4, 4, 5]
    assert lines[1].reject("why").reason == "item 2 of the array: why"
    assert lines[-1].piece.item is None


def test_an_array_that_is_cut_off_says_so() -> None:
    good = json.dumps(FLAT)
    [first, cut] = lines_of(f'[{good}, {{"user_id": "an'.encode())
    assert first.turns
    assert cut.problem == "the file ends inside this item"
    [first, cut] = lines_of(f"[{good},\n".encode())
    assert first.turns
    assert cut.problem == "the file ends before its array does"
    assert lines_of(b"[]") == []


def test_the_sample_log_is_good_and_each_of_its_messages_is_another() -> None:
    with sample.path().open("rb") as stream:
        lines = list(parse(stream))
    assert len(lines) >= 60
    assert all(line.problem is None for line in lines)
    assert len({line.turns[0].key for line in lines}) == len(lines)


# --- users and sessions -------------------------------------------------------------------------


def test_whole_numbers_are_taken_as_ids() -> None:
    [turn] = turns_of({"user_id": 42, "session_id": 7, "role": "user", "content": "hi"})
    assert (turn.user_id, turn.session_id) == ("42", "7")


def test_defaults_are_for_lines_that_name_nobody() -> None:
    named = {**FLAT}
    unnamed = {"user_id": None, "role": "user", "content": "hi"}
    turns = turns_of(named, unnamed, user="def", session="main")
    assert [(turn.user_id, turn.session_id) for turn in turns] == [("ann", "s1"), ("def", "main")]


def test_a_conversation_that_names_no_session_gets_one_of_its_own() -> None:
    one = {"user": "ann", "messages": [{"role": "user", "content": "hi"}]}
    two = {"user": "ann", "messages": [{"role": "user", "content": "ho"}]}
    sessions = [turn.session_id for turn in turns_of(one, one, two)]
    assert len(set(sessions)) == 3
    assert [turn.session_id for turn in turns_of(one, one, two)] == sessions
    assert turns_of(two)[0].session_id != sessions[0]  # the first line of another file


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"session_id": "s", "role": "user", "content": "x"}, "--user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "--user"),
        ({"user_id": "a", "role": "user", "content": "x"}, "--session"),
        ({**FLAT, "user_id": 1.5}, "user_id is a number"),
        ({**FLAT, "user_id": True}, "user_id is true or false"),
        ({**FLAT, "user_id": ["a"]}, "user_id is an array"),
        ({**FLAT, "user_id": " "}, "user_id is empty"),
        ({**FLAT, "session_id": {}}, "session_id is an object"),
        ({**FLAT, "user_id": "\ud800"}, "user_id is not valid Unicode"),
        ({**FLAT, "id": [1]}, "id is an array"),
    ],
)
def test_a_line_that_is_nobodys_is_rejected_and_says_what_to_do(value: Any, words: str) -> None:
    assert words in problem_of(value)


# --- bad lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"{", "not JSON"),
        (b"hello", "not JSON: Expecting value at column 1"),
        (b'{"a": 1} x', "not JSON: Extra data"),
        (b"[1, 2]", "an array where a JSON object is expected"),
        (b'"text"', "a string where"),
        (b"12", "a number where"),
        (b"null", "null where"),
        (b'{"user_id": "\xff"}', "not UTF-8: byte 0xff at position 14"),
        (b'{"a": "\0"}', "NUL byte"),
        (b"\0\0\0", "NUL byte"),
        (b'{"user_id": "a", "user_id": "b"}', 'the key "user_id" is there twice'),
        (b'{"x": {"a": 1, "a": 1}}', 'the key "a" is there twice'),
        (b'{"x": NaN}', "NaN is not JSON"),
        (b'{"x": 1e999}', "1e999 is too large"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        ({}, "neither a message"),
        ({"prompt": "a", "completion": "b"}, "neither a message"),
        ({"line": 3, "reason": "r", "raw": "{}"}, "rejects file"),
        ({"user": "a", "messages": "text"}, "'messages' is a string, not an array"),
        ({"user": "a", "messages": []}, "'messages' is empty"),
        ({"user": "a", "messages": ["text"]}, "messages[0] is a string, not an object"),
        ({"user": "a", "conversations": [{"from": 1, "value": "x"}]}, "conversations[0] has a num"),
        ({"user": "a", "conversations": [{"from": "human"}]}, "conversations[0] has no 'content'"),
        ({k: v for k, v in FLAT.items() if k != "role"}, "message has no 'role'"),
        ({**FLAT, "role": ""}, "message has an empty 'role'"),
        ({**FLAT, "role": 3}, "message has a number as 'role'"),
        ({k: v for k, v in FLAT.items() if k != "content"}, "message has no 'content'"),
        ({**FLAT, "content": None}, "message has no 'content'"),
        ({**FLAT, "content": 5}, "message has a number as its 'content'"),
        ({**FLAT, "content": {"text": "x"}}, "message has an object as its 'content'"),
        ({**FLAT, "content": ["x"]}, "content"),
        ({**FLAT, "content": [{"type": "text", "text": 5}]}, "content.0"),
        ({**FLAT, "content": "\ud800"}, "cannot be sent as JSON"),
        ({**FLAT, "n": 2**70}, "cannot be sent as JSON"),
        ({**FLAT, "deep": json.loads("[" * 300 + "]" * 300)}, "cannot be sent as JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_line_is_rejected_with_its_reason(value: Any, words: str) -> None:
    assert words in problem_of(value)


def test_a_conversation_with_one_bad_message_is_rejected_as_a_whole() -> None:
    good = {"role": "user", "content": "x"}
    assert problem_of({"user": "a", "messages": [good, {"role": "user"}]}).startswith("messages[1]")


def test_bad_lines_do_not_stop_the_rest_and_keep_their_numbers() -> None:
    data = b"\xef\xbb\xbf" + jsonl(FLAT) + b"\n  \t\r\nbad\r\n" + jsonl(FLAT) + b"\xff\n"
    data += json.dumps(FLAT).encode()  # no line end
    lines = lines_of(data)
    assert [(line.piece.line, line.problem is None) for line in lines] == [
        (1, True),
        (4, False),
        (5, True),
        (6, False),
        (7, True),
    ]
    reject = lines[1].reject("why")
    assert (reject.line, reject.reason, reject.raw) == (4, "why", "bad")
    assert lines[3].reject("why").raw == "\\xff"


def test_a_line_over_the_limit_is_rejected_and_skipped() -> None:
    long = json.dumps({**FLAT, "content": "x" * 200_000}).encode()
    data = jsonl(FLAT) + long + b"\n" + jsonl(FLAT) + long
    lines = list(parse(io.BytesIO(data), limit=100_000))
    assert [line.problem for line in lines] == [
        None,
        "longer than the limit of 100,000 bytes",
        None,
        "longer than the limit of 100,000 bytes",
    ]
    assert lines[1].reject("").raw == (
        f"{long[:HEAD_BYTES].decode()} ... ({len(long):,} bytes in all)"
    )
    array = b"[" + json.dumps(FLAT).encode() + b", " + long + b", " + json.dumps(FLAT).encode()
    lines = list(parse(io.BytesIO(array + b"]"), limit=100_000))
    assert [line.problem is None for line in lines] == [True, False, True]


# --- identity -----------------------------------------------------------------------------------


def test_equal_lines_without_ids_are_messages_of_their_own_and_the_same_when_read_again() -> None:
    keys = keys_of({**FLAT, "content": "ok"}, {**FLAT, "content": "ok"})
    assert len(set(keys)) == 2
    assert keys_of({**FLAT, "content": "ok"}, {**FLAT, "content": "ok"}) == keys


def test_a_message_with_an_id_is_the_same_wherever_it_stands() -> None:
    message = {**FLAT, "id": "m1"}
    [key] = keys_of(message)
    assert keys_of(FLAT, message)[1] == key
    assert keys_of({**message, "timestamp": "later", "id": "m1"}) == [key]
    assert keys_of({"user": "ann", "messages": [{"role": "user", "content": "hello", "id": "m1"}]})[
        0
    ] == (key)


def test_an_id_shared_by_different_messages_loses_neither() -> None:
    question = {**FLAT, "id": 1, "content": "why?"}
    answer = {**FLAT, "id": 1, "role": "assistant", "content": "because"}
    assert len(set(keys_of(question, answer, question))) == 2


def test_a_conversation_that_has_grown_adds_only_what_is_new() -> None:
    messages = [{"role": "user", "content": f"{n}"} for n in range(4)]
    before = keys_of({"id": "c", "messages": messages[:2]}, user="ann")
    after = keys_of(FLAT, {"id": "c", "messages": messages}, user="ann")[1:]
    assert after[:2] == before
    assert len(set(after)) == 4


def test_a_conversation_without_ids_is_cut_into_jobs_of_bounded_size() -> None:
    messages = [{"role": "user", "content": f"{n}"} for n in range(120)]
    turns = turns_of({"user": "ann", "messages": messages})
    assert [len(turn.messages) for turn in turns] == [50, 50, 20]
    assert [message.text for turn in turns for message in turn.messages] == [
        f"{n}" for n in range(120)
    ]
    assert len({turn.key for turn in turns}) == 3
    large = [{"role": "user", "content": "x" * 600_000} for _ in range(3)]
    turns = turns_of({"user": "ann", "messages": large})
    assert [len(turn.messages) for turn in turns] == [1, 1, 1]


def test_parts_of_a_conversation_without_ids_are_all_kept() -> None:
    part = {"conversation_id": "c", "user": "ann", "messages": [{"role": "user", "content": "go"}]}
    turns = turns_of(part, part)
    assert {turn.session_id for turn in turns} == {"c"}
    assert len({turn.key for turn in turns}) == 2


def test_a_log_that_has_grown_keeps_the_keys_of_its_old_lines() -> None:
    old = [{**FLAT, "content": f"{n % 3}"} for n in range(10)]
    assert keys_of(*old, FLAT)[:10] == keys_of(*old)


# --- any bytes ----------------------------------------------------------------------------------


class Trickle(io.RawIOBase):
    """Gives its data in pieces of the given sizes, over and over."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes, self._at, self._turn = data, sizes, 0, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        size = self._sizes[self._turn % len(self._sizes)]
        self._turn += 1
        self._at += size
        return self._data[self._at - size : self._at]


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "user_id",
                    "session_id",
                    "role",
                    "content",
                    "id",
                    "messages",
                    "conversations",
                    "from",
                    "value",
                    "metadata",
                    "user",
                    "x",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=8,
)
_logs = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.builds(lambda value: json.dumps(value).encode(), _values),
        st.just(json.dumps(FLAT).encode()),
        st.just(json.dumps({"user": "a", "messages": [FLAT]}, indent=1).encode()),
        st.sampled_from([b"[", b"]", b",", b"[{", b'"', b"\\", b"\n", b"\r\n", b"\xef\xbb\xbf"]),
    ),
    max_size=8,
).map(b"\n".join)
_arrays = st.lists(_values, max_size=6).map(lambda values: json.dumps(values, indent=1).encode())


@given(st.binary(max_size=200) | _logs | _arrays)
def test_any_bytes_come_to_turns_or_rejects(data: bytes) -> None:
    for line in lines_of(data, user="u"):
        assert bool(line.turns) != (line.problem is not None)
        reject = line.reject("why")
        assert 1 <= reject.line <= data.count(b"\n") + 1
        reject.raw.encode()
        for turn in line.turns:
            assert all((turn.user_id, turn.session_id, turn.key, turn.messages))


@given(_logs | _arrays, st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_how_the_bytes_arrive_makes_no_difference(data: bytes, sizes: list[int]) -> None:
    expected = list(parse(io.BytesIO(data), limit=60))
    trickled = list(parse(Trickle(data, sizes), limit=60))  # type: ignore[arg-type]
    assert trickled == expected


@given(_logs | _arrays | _arrays.map(lambda array: array + b"\n{}\nx"))
def test_reading_can_begin_again_after_any_line(data: bytes) -> None:
    lines = lines_of(data, user="u")
    for index, line in enumerate(lines):
        stream = io.BytesIO(data)
        stream.seek(line.piece.after.offset)
        rest = list(parse(stream, Defaults("u"), start=line.piece.after))
        assert rest == ([line] if line.piece.unfinished else lines[index + 1 :])


def test_a_last_line_without_an_end_is_read_again_when_it_has_one() -> None:
    whole = jsonl(FLAT) * 2
    [first, cut] = lines_of(whole[:-10])
    assert cut.problem is not None
    assert cut.piece.after == first.piece.after == Position(len(jsonl(FLAT)), 1, None)
    stream = io.BytesIO(whole)
    stream.seek(cut.piece.after.offset)
    [again] = parse(stream, start=cut.piece.after)
    assert again == lines_of(whole)[1]


# --- memory -------------------------------------------------------------------------------------


class Endless(io.RawIOBase):
    """`count` times `chunk`, made as it is read."""

    def __init__(self, chunk: bytes, count: int, head: bytes = b"") -> None:
        self._chunk, self._left, self._head = chunk, count, head

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        self._left -= 1
        return self._chunk if self._left >= 0 else b""


_LINES = b"".join(json.dumps({**FLAT, "content": "x" * 1000}).encode() + b"\n" for _ in range(60))
_ITEMS = _LINES.replace(b"\n", b",\n")


@pytest.mark.parametrize(
    ("stream", "lines"),
    [
        (Endless(_LINES, 500), 30_000),
        (Endless(_ITEMS, 500, b"["), 30_001),  # the array does not end
        (Endless(b"x" * 64_000, 500), 1),
        (Endless(b'"' + b"x" * 64_000, 500, b'[{"a": "'), 1),
        (Endless(b" \n" * 32_000, 500), 0),
    ],
    ids=["lines", "array", "one line", "one item", "nothing"],
)
def test_memory_stays_bounded_on_30_megabytes(stream: Any, lines: int) -> None:
    tracemalloc.start()
    try:
        read = sum(1 for _ in parse(stream, limit=1024 * 1024))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == lines
    assert peak < 5 * 1024 * 1024
