"""Messages: every shape callers use comes back as it went in, and all its text can be searched."""

from __future__ import annotations

import decimal
import enum
import json
import math
import pickle
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel, ConfigDict, Field

from recallq.errors import ConfigurationError, InvalidInput
from recallq.messages import (
    AudioPart,
    ContentPart,
    DataPart,
    FilePart,
    ImagePart,
    Message,
    RefusalPart,
    TextPart,
    encode_message,
    encode_messages,
    message_text,
    returning,
    to_message,
    to_messages,
)
from tests.strategies import json_objects, json_values, text

LIMIT = 1 << 20


def kind_of(value: object) -> str:
    return type(value).__name__


def stored(message: Message) -> dict[str, Any]:
    """What a worker gets to see of `message`."""
    wire: dict[str, Any] = orjson.loads(encode_message(message, "messages[0]", LIMIT))
    return wire


def there_and_back(message: Message) -> Message:
    return Message.model_validate(stored(message))


def refusal(value: Any) -> str:
    """What is said of a value that is no message, or cannot be sent as one."""
    with pytest.raises(InvalidInput) as caught:
        encode_message(to_message(value, "messages[3]"), "messages[3]", LIMIT)
    return str(caught.value)


# --- agentscope's shape -------------------------------------------------------------------------

EVENT = {"sequence_number": 7, "object": "content", "status": "completed", "error": None}
PLACE = {"index": 0, "delta": False, "msg_id": "msg_1"}

PARTS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", **EVENT, **PLACE, "text": "green tea, please"},
    "data": {
        "type": "data", **EVENT, **PLACE,
        "data": {"call_id": "call_1", "name": "order", "arguments": '{"what": "tea"}'},
    },
    "image": {"type": "image", **EVENT, **PLACE, "image_url": "https://example.com/tea.png"},
    "audio": {"type": "audio", **EVENT, **PLACE, "data": "UklGRg==", "format": "wav"},
    "file": {
        "type": "file", **EVENT, **PLACE, "file_url": "https://example.com/menu.pdf",
        "file_id": "f1", "filename": "menu.pdf", "file_data": "JVBERi0=",
    },
    "refusal": {"type": "refusal", **EVENT, **PLACE, "refusal": "I would rather not"},
}  # fmt: skip

MESSAGE_TYPES = [
    "message", "function_call", "function_call_output", "plugin_call", "plugin_call_output",
    "component_call", "component_call_output", "mcp_list_tools", "mcp_approval_request",
    "mcp_call", "mcp_approval_response", "mcp_call_output", "reasoning", "heartbeat", "error",
]  # fmt: skip


def agentscope(kind: str = "message", *parts: dict[str, Any]) -> dict[str, Any]:
    """A message with every field that agentscope-runtime 1.0 gives it."""
    return {
        "sequence_number": 3,
        "object": "message",
        "status": "completed",
        "error": {"code": "500", "message": "the tool broke"} if kind == "error" else None,
        "id": "msg_1",
        "type": kind,
        "role": "assistant",
        "content": list(parts) or None,
        "code": None,
        "message": None,
        "usage": {"input_tokens": 12, "output_tokens": 30},
        "metadata": {"original_id": "abc", "nested": {"deep": [1, 2.5, True, None, "é"]}},
    }


class Event(BaseModel):
    sequence_number: int | None = None
    object: str
    status: str | None = None
    error: dict[str, str] | None = None


class Content(Event):
    type: str
    object: str = "content"
    index: int | None = None
    delta: bool | None = False
    msg_id: str | None = None


class TextContent(Content):
    type: Literal["text"] = "text"
    text: str | None = None


class DataContent(Content):
    type: Literal["data"] = "data"
    data: dict[str, Any] | None = None


class ImageContent(Content):
    type: Literal["image"] = "image"
    image_url: str | None = None


class AudioContent(Content):
    type: Literal["audio"] = "audio"
    data: str | None = None
    format: str | None = None


class FileContent(Content):
    type: Literal["file"] = "file"
    file_url: str | None = None
    file_id: str | None = None
    filename: str | None = None
    file_data: str | None = None


class RefusalContent(Content):
    type: Literal["refusal"] = "refusal"
    refusal: str | None = None


AgentContent = (
    TextContent | DataContent | ImageContent | AudioContent | FileContent | RefusalContent
)


class AgentMessage(Event):
    """agentscope-runtime's ``Message``, as far as its fields go."""

    id: str = Field(default_factory=lambda: f"msg_{uuid.uuid4()}")
    object: str = "message"
    type: str = "message"
    status: str = "created"
    role: Literal["assistant", "system", "user", "tool"] | None = None
    content: list[Annotated[AgentContent, Field(discriminator="type")]] | None = None
    code: str | None = None
    message: str | None = None
    usage: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


@pytest.mark.parametrize("kind", MESSAGE_TYPES)
def test_every_message_type_comes_back_as_it_went_in(kind: str) -> None:
    """All fields of agentscope's shape survive, those RecallQ knows nothing of included."""
    given_ = agentscope(kind, *PARTS.values())
    message = to_message(given_)
    assert message.type == kind
    assert message.to_dict() == stored(message) == given_
    assert there_and_back(message) == message


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("text", TextPart),
        ("data", DataPart),
        ("image", ImagePart),
        ("audio", AudioPart),
        ("file", FilePart),
        ("refusal", RefusalPart),
    ],
)
def test_every_part_type_has_its_class(name: str, cls: type[ContentPart]) -> None:
    """A part is told by its type, keeps all fields, and comes back as the same class."""
    message = there_and_back(to_message(agentscope("message", PARTS[name])))
    assert isinstance(message.content, list)
    assert type(message.content[0]) is cls
    assert message.content[0].model_dump(exclude_unset=True) == PARTS[name]


@pytest.mark.parametrize("cls", [TextPart, DataPart, ImagePart, AudioPart, FilePart, RefusalPart])
def test_a_part_made_without_naming_its_type_can_be_read_back(cls: type[ContentPart]) -> None:
    """A part's type is part of what is stored even though nobody set it."""
    message = Message(role="user", content=[cls()])  # type: ignore[call-arg]
    assert there_and_back(message) == message


def test_a_part_of_an_unknown_type_is_kept() -> None:
    given_ = {"role": "user", "content": [{"type": "hologram", "frames": [1, 2], "text": None}]}
    message = to_message(given_)
    assert isinstance(message.content, list)
    assert type(message.content[0]) is ContentPart
    assert there_and_back(message).to_dict() == given_


def test_an_agentscope_message_comes_back_as_an_agentscope_message() -> None:
    """With ``message_type``, callers get their own class, equal to what they stored."""
    sent = AgentMessage.model_validate(agentscope("function_call", *PARTS.values()))
    back = returning(AgentMessage)(stored(to_message(sent)))
    assert type(back) is AgentMessage
    assert back == sent
    assert [type(part) for part in back.content or []] == [
        type(part) for part in sent.content or []
    ]


def test_a_message_of_defaults_comes_back_with_its_generated_id() -> None:
    """An id that the caller's class made up is stored, not made up again."""
    sent = AgentMessage(role="user", content=[TextContent(text="hi")])
    assert returning(AgentMessage)(stored(to_message(sent))) == sent


# --- OpenAI's and other shapes ------------------------------------------------------------------

CALL = {
    "id": "call_1", "type": "function",
    "function": {"name": "book_train", "arguments": '{"to": "\\u676d\\u5dde"}'},
}  # fmt: skip

OPENAI: dict[str, dict[str, Any]] = {
    "text": {"role": "user", "content": "hello"},
    "empty": {"role": "user", "content": ""},
    "developer": {"role": "developer", "content": "be brief", "name": "boss"},
    "tool calls": {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    "tool calls only": {"role": "assistant", "tool_calls": [CALL]},
    "function call": {
        "role": "assistant", "content": None,
        "function_call": {"name": "weather", "arguments": "{}"},
    },
    "tool": {"role": "tool", "tool_call_id": "call_1", "content": "booked"},
    "parts": {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            {"type": "file", "file": {"file_id": "f1", "filename": "a.pdf"}},
        ],
    },
    "empty list": {"role": "user", "content": []},
    "refusal": {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    "no role": {"content": "hello"},
    "responses API": {
        "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
        "content": [{"type": "output_text", "text": "hi", "annotations": [{"start": 0}]}],
    },
    "tool result": {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "5"}]}
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("given_", OPENAI.values(), ids=OPENAI)
def test_an_openai_dictionary_comes_back_as_it_went_in(given_: dict[str, Any]) -> None:
    """Nothing is added, dropped or renamed."""
    message = to_message(given_)
    assert message.to_dict() == stored(message) == given_
    assert there_and_back(message) == message
    assert returning(dict)(stored(message)) == given_


def test_a_string_is_a_users_message() -> None:
    assert to_message("hello") == Message.user("hello")
    assert stored(to_message("hello")) == {
        "role": "user",
        "content": [{"type": "text", "text": "hello"}],
    }


def test_a_message_is_taken_as_it_is() -> None:
    message = Message.user("hello")
    assert to_message(message) is message


@pytest.mark.parametrize("wrap", [MappingProxyType, OrderedDict], ids=["proxy", "ordered"])
def test_any_mapping_will_do(wrap: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    given_ = {"role": "user", "content": "hello", "extra": 1}
    assert to_message(wrap(given_)).to_dict() == given_


class Homemade:
    """A message class of the kind that frameworks write: with ``to_dict`` and ``from_dict``."""

    def __init__(self, said: object) -> None:
        self.said = said

    def to_dict(self) -> object:
        return {"role": "user", "content": self.said, "made": "at home"}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        return cls(fields["content"])


def test_an_object_with_to_dict_goes_there_and_back() -> None:
    message = to_message(Homemade("hello"))
    assert message.to_dict() == {"role": "user", "content": "hello", "made": "at home"}
    back = returning(Homemade)(stored(message))
    assert isinstance(back, Homemade)
    assert back.said == "hello"


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_a_message_is_built_by_its_role(role: str) -> None:
    """The short way of writing a message keeps extra fields."""
    message = getattr(Message, role)("hello", tool_call_id="c1", tags=["a"])
    assert stored(message) == {
        "role": role,
        "content": [{"type": "text", "text": "hello"}],
        "tool_call_id": "c1",
        "tags": ["a"],
    }


class Role(enum.StrEnum):
    USER = "user"


def test_a_string_enumeration_is_a_string() -> None:
    assert stored(to_message({"role": Role.USER, "content": "x", "tag": Role.USER})) == {
        "role": "user",
        "content": "x",
        "tag": "user",
    }


# --- equality -----------------------------------------------------------------------------------

BASE: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "x"}], "extra": [1]}


def test_messages_with_equal_fields_are_equal() -> None:
    assert to_message(BASE) == to_message(json.loads(json.dumps(BASE)))
    assert Message(role="user", content="x") == Message(role="user", content="x", type="message")


@pytest.mark.parametrize(
    "change",
    [
        {"role": "assistant"},
        {"type": "reasoning"},
        {"content": "x"},
        {"content": [{"type": "text", "text": "y"}]},
        {"content": [{"type": "text", "text": "x", "index": 0}]},
        {"content": [{"type": "text", "text": "x"}, {"type": "text", "text": ""}]},
        {"extra": [2]},
        {"more": None},
    ],
    ids=repr,
)
def test_messages_that_differ_anywhere_are_not_equal(change: dict[str, Any]) -> None:
    """Extra fields, and those of parts, count too."""
    assert to_message(BASE) != to_message({**BASE, **change})


# --- generated messages -------------------------------------------------------------------------

maybe_text = st.none() | text
TYPED: dict[str, dict[str, SearchStrategy[Any]]] = {
    "text": {"text": maybe_text},
    "data": {"data": json_values},
    "image": {"image_url": json_values},
    "audio": {"data": json_values, "format": maybe_text},
    "file": dict.fromkeys(("file_url", "file_id", "filename", "file_data"), maybe_text),
    "refusal": {"refusal": maybe_text},
}  # fmt: skip

# Names that mean something to Python, pydantic or RecallQ must not be special in a message.
AWKWARD = st.sampled_from(
    ["text", "to_dict", "model_config", "model_fields", "model_extra", "__class__", "__dict__",
     "__pydantic_extra__", "self", "cls", "value", "user", "copy", "json", "id", "$ref", "", "_x",
     "object", "message", "data", "name", "arguments", "index", "file", "other", "input"]
)  # fmt: skip


def extras(*taken: str) -> SearchStrategy[dict[str, Any]]:
    names = (text | AWKWARD).filter(lambda name: name not in taken)
    return st.dictionaries(names, json_values, max_size=4)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from([*TYPED, "image_url", "hologram", ""]) | text)
    typed = TYPED.get(kind, {})
    return {
        **draw(extras("type", *typed)),
        "type": kind,
        **draw(st.fixed_dictionaries({}, optional=typed)),
    }


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """Any JSON object that is a message."""
    return {
        **draw(extras("role", "type", "content")),
        **draw(st.fixed_dictionaries({}, optional={"type": text})),
        "role": draw(maybe_text),
        "content": draw(maybe_text | st.lists(parts(), max_size=3)),
    }


@given(messages())
@settings(deadline=None)
def test_any_message_comes_back_equal(value: dict[str, Any]) -> None:
    """What is returned from the queue equals what went in, unknown fields included."""
    message = to_message(value)
    assert message.to_dict() == value
    assert stored(message) == value
    back = Message.model_validate(orjson.loads(encode_message(message, "m", LIMIT)))
    assert back == message
    assert encode_message(back, "m", LIMIT) == encode_message(message, "m", LIMIT)


@given(messages())
@settings(deadline=None)
def test_client_and_worker_agree_on_a_messages_text(value: dict[str, Any]) -> None:
    message = to_message(value)
    assert message.text == message_text(stored(message))


@given(messages(), text)
@settings(deadline=None)
def test_what_a_text_part_says_is_in_the_text(value: dict[str, Any], said: str) -> None:
    """However odd a message's other parts, they hide nothing."""
    content = value["content"] if isinstance(value["content"], list) else []
    value = {**value, "content": [*content, {"type": "text", "text": said}]}
    assert said in to_message(value).text


KNOWN_NAMES = st.sampled_from(
    ["content", "type", "text", "data", "tool_calls", "function_call", "function", "input_audio",
     "arguments", "name", "input", "output", "refusal", "message", "transcript", "title"]
)  # fmt: skip
nested_json = st.builds(
    lambda depth, inner: "[" * depth + inner + "]" * depth,
    st.integers(0, 1024),
    st.sampled_from(["1", '"tea"', "{}", ""]),
)
anything: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | text
    | nested_json | st.sampled_from(["text", "audio", "data", '{"a": "b"}', "{", "["]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(KNOWN_NAMES | text, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(KNOWN_NAMES | text, anything, max_size=4))
@settings(deadline=None)
def test_no_json_object_is_too_strange_to_take_text_from(value: dict[str, Any]) -> None:
    """One odd record must not fail its user's searches."""
    assert isinstance(message_text(value), str)


@pytest.mark.parametrize("kind", [["text"], {"text": 1}, 5, None, True])
def test_a_tool_call_with_an_odd_type_has_text(kind: object) -> None:
    """Such a message passes for one, is stored, and is met by every later search of its user."""
    message = to_message(
        {"role": "assistant", "tool_calls": [{"type": kind, "function": {"name": "book"}}]}
    )
    assert message.text == "book"


def test_arguments_nested_as_deep_as_json_may_be_have_text() -> None:
    """A model that repeats brackets must not fail its user's searches."""
    arguments = "[" * 1000 + '"tea"' + "]" * 1000
    message = to_message(
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    )
    assert "tea" in message.text


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one",
    ["hi", {"role": "user", "content": "hi"}, Message.user("hi"), AgentMessage(), Homemade("hi")],
    ids=kind_of,
)
def test_a_single_message_counts_as_a_list_of_one(one: Any) -> None:
    assert to_messages(one) == [to_message(one)]
    assert to_messages([one]) == to_messages((one,)) == [to_message(one)]


def test_shapes_mix_in_one_list() -> None:
    found = to_messages(["a", {"content": "b"}, Message.tool("c"), Homemade("d")])
    assert [message.text for message in found] == ["a", "b", "c", "d"]
    assert to_messages([]) == []


def forever() -> Iterator[str]:
    while True:
        yield "hi"


@pytest.mark.parametrize(
    "values",
    [None, 5, b"hi", bytearray(b"hi"), {"hi"}, forever(), object(), True],
    ids=kind_of,
)
def test_what_is_no_list_of_messages_is_refused(values: Any) -> None:
    with pytest.raises(InvalidInput, match=type(values).__name__):
        to_messages(values)


@pytest.mark.parametrize("value", [None, 5, b"hi", ["hi"], object(), Role], ids=kind_of)
def test_what_is_no_message_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^messages\[1\]"):
        to_messages(["fine", value])


def test_to_dict_must_give_a_dictionary() -> None:
    class Odd:
        def to_dict(self) -> str:
            return "no dictionary"

    assert "messages[3]" in refusal(Odd())


def test_a_dictionary_without_role_and_content_is_no_message() -> None:
    assert refusal({"text": "hi"}) == "messages[3] has neither 'role' nor 'content'"


class Untold(BaseModel):
    """A model that cannot write itself as JSON."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    role: str = "user"
    content: Any = None


@pytest.mark.parametrize("content", [object(), b"\xff", {b"\xff": 1}], ids=kind_of)
def test_a_model_that_is_not_json_is_refused(content: object) -> None:
    """The error is ours, and tells which message it was."""
    assert refusal(Untold(content=content)).startswith("messages[3]")


# --- errors -------------------------------------------------------------------------------------


def data(value: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "data", "data": value}]}


def extra(value: Any) -> dict[str, Any]:
    return {"role": "user", "content": "hi", "extra": value}


NOW = datetime(2026, 1, 1, tzinfo=UTC)

BAD: dict[str, tuple[Any, str]] = {
    "role": ({"role": 5, "content": "hi"}, "role"),
    "type": ({"role": "user", "type": None, "content": "hi"}, "type"),
    "content": ({"role": "user", "content": 5}, "content"),
    "content is bytes": ({"role": "user", "content": b"hi"}, "content"),
    "content is one part": ({"role": "user", "content": {"type": "text"}}, "content"),
    "part is a number": ({"role": "user", "content": [5]}, "content.0"),
    "part is a string": ({"role": "user", "content": ["hi"]}, "content.0"),
    "part is None": ({"role": "user", "content": [{"type": "text"}, None]}, "content.1"),
    "part without type": ({"role": "user", "content": [{"text": "hi"}]}, "content.0.type"),
    "type of a part": ({"role": "user", "content": [{"type": 5}]}, "content.0.type"),
    "text": ({"role": "user", "content": [{"type": "text", "text": 5}]}, "content.0.text"),
    "refusal": (
        {"role": "user", "content": [{"type": "refusal", "refusal": []}]}, "content.0.refusal",
    ),
    "filename": (
        {"role": "user", "content": [{"type": "file", "filename": 5}]}, "content.0.filename",
    ),
    "datetime": (extra(NOW), "extra"),
    "bytes": (extra(b"hi"), "extra"),
    "tuple": (extra((1, 2)), "extra"),
    "set": (extra({1}), "extra"),
    "object": (extra(object()), "extra"),
    "decimal": (extra(decimal.Decimal("1.5")), "extra"),
    "uuid": (extra(uuid.uuid4()), "extra"),
    "NaN": (extra(math.nan), "extra"),
    "infinity": (extra([1.0, {"x": -math.inf}]), "extra.1.x"),
    "nested datetime": (data({"when": [1, NOW]}), "content.0.data.when.1"),
    "nested NaN": (data({"when": [1, math.nan]}), "content.0.data.when.1"),
    "nested tuple": (data([{"a": (1,)}]), "content.0.data.0.a"),
    "extra called data": ({"role": "user", "content": "hi", "data": NOW}, "data"),
    "extra called file": ({"role": "user", "content": "hi", "file": b"x"}, "file"),
    "extra called other": ({"role": "user", "content": "hi", "other": math.nan}, "other"),
    "extra called a[0]": ({"role": "user", "content": "hi", "a[0]": NOW}, "a[0]"),
    "extra called list": ({"role": "user", "content": "hi", "list": [NOW]}, "list.0"),
    "extra of a part": (
        {"role": "user", "content": [{"type": "image", "when": {"at": NOW}}]}, "content.0.when.at",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("value", "place"), BAD.values(), ids=BAD)
def test_an_error_names_the_place(value: Any, place: str) -> None:
    """The path is the caller's own: keys and indexes, and nothing between them."""
    assert refusal(value).startswith(f"messages[3]: {place}: ")


JARGON = [
    "pydantic", "http", "Part", "JsonValue", "instance of", "union", "tag", "discriminator",
    "[type=", "input_value", "validation error", "model", "__", "Traceback",
]  # fmt: skip


@pytest.mark.parametrize("value", [value for value, _ in BAD.values()], ids=BAD)
def test_an_error_is_in_the_callers_words(value: Any) -> None:
    """No class, library or type system of ours is needed to understand it."""
    said = refusal(value)
    assert [word for word in JARGON if word in said] == []
    assert len(said) < 300


@pytest.mark.parametrize(
    "value",
    [
        {"role": "user", "content": "a\ud800b"},
        {"role": "us\udc00er", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
        extra("\udfff"),
        extra({"\ud800": 1}),
        extra({"x": ["\ud800"]}),
        {"role": "user", "content": "hi", "\ud800": 1},
        "\ud800",
    ],
    ids=ascii,
)
def test_half_a_character_is_refused(value: Any) -> None:
    """A lone surrogate cannot be written as UTF-8, be it in a key or in a value."""
    said = refusal(value)
    assert said.startswith("messages[3]")
    said.encode()


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("place", [extra, data])
def test_a_number_beyond_64_bits_is_refused(
    number: int, place: Callable[[int], dict[str, Any]]
) -> None:
    assert "64-bit" in refusal(place(number))


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63), 2**53 + 1, 0.1, 1e308, 5e-324, -0.0])
def test_a_number_within_64_bits_comes_back_exactly(number: float) -> None:
    back = stored(to_message(extra(number)))["extra"]
    assert back == number
    assert type(back) is type(number)


def test_a_number_as_a_key_is_refused() -> None:
    assert refusal(extra({1: 2})).startswith("messages[3]: extra.1: ")
    assert refusal({"role": "user", 1: 2}).startswith("messages[3]: 1: ")


def test_a_message_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    said = refusal(extra(loop))
    assert said.startswith("messages[3]")
    assert len(said) < 300


@pytest.mark.parametrize("depth", [300, 1_000, 20_000])
def test_nesting_without_end_is_refused_in_few_words(depth: int) -> None:
    """The error says that it is the nesting, rather than to spell out the way down."""
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    said = refusal(extra(deep))
    assert said.startswith("messages[3]")
    assert len(said) < 300
    assert "nest" in said or "deep" in said


def assign_and_encode(message: Message, field: str, value: Any) -> None:
    setattr(message, field, value)
    encode_message(message, "messages[3]", LIMIT)


@pytest.mark.parametrize("value", [math.nan, math.inf, [math.nan], {"a": -math.inf}], ids=repr)
def test_what_is_no_number_does_not_become_null_unseen(value: Any) -> None:
    """A field set on a finished message is checked like one that it was made with."""
    message = Message.user("hi")
    with pytest.raises(ValueError):  # noqa: PT011  # at the assignment or when it is written
        assign_and_encode(message, "score", value)


@pytest.mark.parametrize("content", [5, {"type": "text"}, ["hi"], [{"text": "no type"}]], ids=repr)
def test_content_of_a_wrong_type_does_not_slip_in_later(content: Any) -> None:
    """Nothing is stored that cannot be read back: one such record would fail whole pages."""
    message = Message.user("hi")
    with pytest.raises(ValueError):  # noqa: PT011  # at the assignment or when it is written
        assign_and_encode(message, "content", content)


def test_a_part_of_a_wrong_type_does_not_slip_in_later() -> None:
    message = Message.user("hi")
    assert isinstance(message.content, list)
    message.content.append("more")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^messages\[3\]"):
        encode_message(message, "messages[3]", LIMIT)


LATER: dict[str, Any] = {
    "datetime": NOW, "tuple": (1, 2), "set": {1}, "bytes": b"SECRET", "object": object(),
    "key": {1: "SECRET"}, "NaN": math.nan, "half a character": "\ud800",
}  # fmt: skip


@pytest.mark.parametrize("value", LATER.values(), ids=LATER)
def test_an_extra_field_set_later_is_refused_in_the_callers_words(value: Any) -> None:
    """The error names the place like any other, and quotes nothing of what was said."""
    message = Message.user("SECRET")
    message.extra = value  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput) as caught:
        encode_message(message, "messages[3]", LIMIT)
    said = str(caught.value)
    assert said.startswith("messages[3]: extra")
    assert [word for word in [*JARGON, "SECRET"] if word in said] == []
    assert len(said) < 300


class Stamped(Message):
    """A message class of a caller's, with a field that has a type of its own."""

    when: datetime


@pytest.mark.parametrize(
    "content",
    ["hi", None, "a null pointer", [{"type": "data", "data": None}], "[" * 200],
    ids=lambda content: repr(content)[:20],
)
def test_a_callers_own_kind_of_message_goes_there_and_back_whatever_it_says(content: Any) -> None:
    """Its typed fields are JSON as pydantic writes them, and no text changes that."""
    sent = Stamped.model_validate({"role": "user", "content": content, "when": NOW})
    assert returning(Stamped)(stored(to_message(sent))) == sent


# --- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "é", "用", "👩"])
def test_the_limit_counts_encoded_bytes(letter: str) -> None:
    """A message of exactly the limit passes; one byte less of room and it does not."""
    message = to_message({"content": letter * 1000})
    size = len(json.dumps({"content": letter * 1000}, ensure_ascii=False).encode()) - 1
    assert len(encode_message(message, "m", size)) == size
    with pytest.raises(InvalidInput):
        encode_message(message, "m", size - 1)


def test_an_oversized_message_is_told_the_limit_and_the_way_out() -> None:
    with pytest.raises(InvalidInput) as caught:
        encode_message(Message.user("x" * 5000), "messages[2]", 4096)
    said = str(caught.value)
    assert said.startswith("messages[2] is 5,")
    assert "4,096" in said
    assert "max_message_bytes" in said
    assert "xxx" not in said


# --- text ---------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "content": ({"content": "green tea"}, "green tea"),
    "nothing": ({"role": "user"}, ""),
    "None": ({"content": None}, ""),
    "empty": ({"content": []}, ""),
    "parts": (
        {"content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}, "one\ntwo",
    ),
    "text of None": ({"content": [{"type": "text", "text": None}]}, ""),
    "a text that looks like JSON": (
        {"content": [{"type": "text", "text": '{"a": 1}'}]}, '{"a": 1}',
    ),
    "unknown part": ({"content": [{"type": "output_text", "text": "hi"}]}, "hi"),
    "data": (
        {"content": [{"type": "data", "data": {"order": "A-1043", "n": 2, "ok": True, "x": None}}]},
        "A-1043\n2",
    ),
    "nested data": (
        {"content": [{"type": "data", "data": {"a": [{"b": "deep"}, 1.5]}}]}, "deep\n1.5",
    ),
    "data in a string": (
        {"content": [{"type": "data", "data": {"arguments": '{"to": "\\u676d\\u5dde"}'}}]}, "杭州",
    ),
    "data that is nearly JSON": ({"content": [{"type": "data", "data": "{not json"}]}, "{not json"),
    "tool calls": ({"content": None, "tool_calls": [CALL]}, "book_train\n杭州"),
    "two tool calls": (
        {"tool_calls": [{"function": {"name": "a"}}, {"function": {"name": "b"}}]}, "a\nb",
    ),
    "function call": ({"function_call": {"name": "f", "arguments": '{"x": "y"}'}}, "f\ny"),
    "function output": (
        {"type": "function_call_output", "content": [
            {"type": "data", "data": {"output": '{"result": "sold out"}'}},
        ]},
        "sold out",
    ),
    "data in a string in data in a string": (
        {"content": [{"type": "data", "data": '{"pattern": "[a-z] or {x}"}'}]}, "[a-z] or {x}",
    ),
    "a string in it that is JSON itself": (
        {"content": [{"type": "data", "data": '{"list": "[1, 2]"}'}]}, "[1, 2]",
    ),
    "tool result": (OPENAI["tool result"], "5"),
    "data in a tool result": (
        {"content": [{"type": "tool_result", "content": [
            {"type": "text", "text": "found:"}, {"type": "data", "data": {"seat": "12A"}},
        ]}]},
        "found:\n12A",
    ),
    "tool result as a string": (
        {"content": [{"type": "tool_result", "content": "sold out"}]}, "sold out",
    ),
    "refusal": ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
    "refusal of a message": ({"content": None, "refusal": "no"}, "no"),
    "transcript": (
        {"content": [{"type": "input_audio", "transcript": "spoken", "data": "UklGRg=="}]},
        "spoken",
    ),
    "input audio": ({"content": [{"type": "input_audio", "input_audio": {"data": "AAAA"}}]}, ""),
    "audio": ({"content": [PARTS["audio"]]}, ""),
    "image": ({"content": [PARTS["image"]]}, ""),
    "file": ({"content": [PARTS["file"]]}, "menu.pdf"),
    "error": ({"type": "error", "content": None, "message": "the tool broke"}, "the tool broke"),
    "strings as parts": ({"content": ["one", {"type": "text", "text": "two"}]}, "one\ntwo"),
    "bookkeeping": (
        {"id": "msg_1", "role": "user", "metadata": {"a": "b"}, "usage": {"t": 1}, "content": "x"},
        "x",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("message", "expected"), TEXTS.values(), ids=TEXTS)
def test_the_text_of_a_message_is_what_somebody_said(
    message: dict[str, Any], expected: str
) -> None:
    """Every text part, data and tool call, and neither ids nor media nor bookkeeping."""
    assert message_text(message) == expected


@given(json_objects)
@settings(deadline=None)
def test_all_strings_of_a_data_part_are_text(value: dict[str, Any]) -> None:
    """Keys are names of fields; values are what was said."""
    found = message_text({"content": [{"type": "data", "data": value}]})

    def strings(inner: Any) -> Iterator[str]:
        if isinstance(inner, str):
            yield inner
        for each in inner.values() if isinstance(inner, dict) else ():
            yield from strings(each)
        for each in inner if isinstance(inner, list) else ():
            yield from strings(each)

    for said in strings(value):
        if said[:1] not in ("{", "["):
            assert said in found


# --- the caller's own class ---------------------------------------------------------------------


def test_results_come_back_as_the_class_that_was_asked_for() -> None:
    wire = {"role": "user", "content": "hi"}
    assert returning(Message)(wire) == Message(role="user", content="hi")
    assert returning(dict)(wire) == wire
    assert returning(Homemade)(wire).said == "hi"


@pytest.mark.parametrize("message_type", [str, int, object, list, None, "Message", Untold()])
def test_a_class_that_cannot_be_made_from_a_message_is_refused(message_type: Any) -> None:
    """Said when the client is made, not when the first result comes back."""
    with pytest.raises(ConfigurationError, match="message_type"):
        returning(message_type)


@pytest.mark.parametrize(
    "stored",
    [
        {"role": "user", "content": "tea"},
        {"content": "tea", "role": "user"},
        {"role": "user", "content": [{"type": "text", "text": "tea"}]},
        {"role": "user", "content": [{"text": "tea", "type": "text"}]},
        {"role": "user", "content": ""},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "text", "text": "tea", "x": 1}]},
        {"role": "user", "content": [{"type": "data", "data": "tea"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "tea", "name": "Ann"},
        {"role": "user", "type": "message"},
        {"role": None, "content": "tea"},
        {"content": "tea"},
    ],
    ids=str,
)
def test_what_comes_back_is_what_pydantic_makes_of_it(stored: dict[str, Any]) -> None:
    made, validated = returning(Message)(stored), Message.model_validate(stored)
    assert made == validated
    assert made.model_fields_set == validated.model_fields_set
    assert (made.to_dict(), repr(made)) == (validated.to_dict(), repr(validated))
    assert made.model_copy(deep=True) == validated
    assert pickle.loads(pickle.dumps(made)) == validated  # our own


@pytest.mark.parametrize(
    "value",
    [
        "tea", "", "null", "\u2603 [{", {"role": "user", "content": "tea"},
        {"content": "tea", "role": "user"}, {"role": "user", "content": ""},
        Message.user("tea"), {"role": "user", "content": None},
        {"role": "user", "content": "x", "y": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_plain_message_is_sent_as_any_other(value: Any) -> None:
    assert encode_messages(value, LIMIT) == [encode_message(to_message(value), "m", LIMIT)]
    assert encode_messages([value], LIMIT) == encode_messages(value, LIMIT)


def test_a_plain_message_that_cannot_be_sent_is_refused_as_any_other() -> None:
    with pytest.raises(InvalidInput, match="not valid Unicode"):
        encode_messages({"role": "user", "content": "\ud800"}, LIMIT)
    with pytest.raises(InvalidInput, match="the limit is 1,024"):
        encode_messages("x" * 2000, 1024)
