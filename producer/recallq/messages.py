"""Messages: what callers store and get back, and how other libraries' shapes become them.

A `Message` keeps what it was given, unknown fields included, so that what comes back from the
queue equals what went in; only its known fields are typed. The worker never needs the classes: it
keeps messages as plain JSON objects and takes their searchable text with `message_text`, the same
function that `Message.text` uses.

The shape follows agentscope-runtime's ``Message`` (role, type, list of content parts); OpenAI chat
dictionaries, plain strings and any pydantic model or object with ``to_dict`` are taken too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias, cast

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    JsonValue,
    StrictStr,
    Tag,
    ValidationError,
)

from recallq.errors import ConfigurationError, InvalidInput
from recallq.jsonable import MAX_DEPTH, why_not_json


class ContentPart(BaseModel):
    """One part of a message's content, of a type that RecallQ knows nothing special about."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue]

    type: StrictStr

    def model_post_init(self, context: Any, /) -> None:
        # Messages are stored without the defaults nobody set, but a part without its type could
        # not be read back.
        self.__pydantic_fields_set__.add("type")


class TextPart(ContentPart):
    type: Literal["text"] = "text"
    text: StrictStr | None = None


class DataPart(ContentPart):
    """Structured data: a tool call, its output, anything JSON."""

    type: Literal["data"] = "data"
    data: JsonValue = None


class ImagePart(ContentPart):
    type: Literal["image"] = "image"
    image_url: JsonValue = None


class AudioPart(ContentPart):
    type: Literal["audio"] = "audio"
    data: JsonValue = None
    format: StrictStr | None = None


class FilePart(ContentPart):
    type: Literal["file"] = "file"
    file_url: StrictStr | None = None
    file_id: StrictStr | None = None
    filename: StrictStr | None = None
    file_data: StrictStr | None = None


class RefusalPart(ContentPart):
    type: Literal["refusal"] = "refusal"
    refusal: StrictStr | None = None


_PART_TYPES = frozenset({"text", "data", "image", "audio", "file", "refusal"})
_PART_TAGS = _PART_TYPES | {"other"}


def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind in _PART_TYPES else "other"


AnyPart: TypeAlias = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[DataPart, Tag("data")]
    | Annotated[ImagePart, Tag("image")]
    | Annotated[AudioPart, Tag("audio")]
    | Annotated[FilePart, Tag("file")]
    | Annotated[RefusalPart, Tag("refusal")]
    | Annotated[ContentPart, Tag("other")],
    Discriminator(_part_tag),
]


class Message(BaseModel):
    """One message of a conversation.

    Extra fields must be JSON values and are kept as they are. Two messages are equal if all their
    fields are, extra ones included.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue]

    role: StrictStr | None = None
    type: StrictStr = "message"
    content: StrictStr | list[AnyPart] | None = None

    @classmethod
    def _of(cls, role: str, text: str, extra: dict[str, Any]) -> Self:
        return cls.model_validate(
            {"role": role, "content": [{"type": "text", "text": text}], **extra}
        )

    @classmethod
    def user(cls, text: str, **extra: Any) -> Self:
        """A user's message; `extra` fields are kept with it."""
        return cls._of("user", text, extra)

    @classmethod
    def assistant(cls, text: str, **extra: Any) -> Self:
        """An assistant's message; `extra` fields are kept with it."""
        return cls._of("assistant", text, extra)

    @classmethod
    def system(cls, text: str, **extra: Any) -> Self:
        """A system message; `extra` fields are kept with it."""
        return cls._of("system", text, extra)

    @classmethod
    def tool(cls, text: str, **extra: Any) -> Self:
        """A tool's output; `extra` fields, such as ``tool_call_id``, are kept with it."""
        return cls._of("tool", text, extra)

    @property
    def text(self) -> str:
        """All the text in the message, parts joined by newlines: what search looks at."""
        return message_text(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The message as a JSON object, with the fields that were set and no others."""
        return self.model_dump(mode="json", exclude_unset=True)


MessageLike: TypeAlias = Message | str | Mapping[str, Any] | BaseModel | Any


def to_message(value: MessageLike, where: str = "message") -> Message:
    """The `Message` that `value` stands for.

    `value` is a `Message`, a string (a user's message), a mapping in OpenAI's, mem0's or
    agentscope's shape, a pydantic model, or an object with ``to_dict()``. `where` names the value
    in errors. Raises `InvalidInput`.
    """
    if isinstance(value, Message):
        return value
    if isinstance(value, str):
        return Message.user(value)
    if isinstance(value, BaseModel):
        try:
            value = value.model_dump(mode="json")
        except Exception as error:
            raise InvalidInput(f"{where} cannot be written as JSON: {error}") from error
    elif not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        raise InvalidInput(
            f"{where} is a {type(value).__name__}; give a Message, a string or a "
            '{"role": ..., "content": ...} dictionary'
        )
    if "content" not in value and "role" not in value:
        raise InvalidInput(f"{where} has neither 'role' nor 'content'")
    try:
        return Message.model_validate(value)
    except ValidationError as error:
        raise InvalidInput(f"{where}: {_explain(value, error)}") from error


def to_messages(values: MessageLike | Sequence[MessageLike]) -> list[Message]:
    """`values` as a list of messages; a single message or string counts as a list of one."""
    return [to_message(value, where) for where, value in _one_by_one(values)]


def _one_by_one(
    values: MessageLike | Sequence[MessageLike],
) -> Iterator[tuple[str, MessageLike]]:
    """Each of them, and what it is called in errors."""
    single = isinstance(values, (str, Mapping, BaseModel))
    if not single and (not isinstance(values, Sequence) or isinstance(values, (bytes, bytearray))):
        if not callable(getattr(values, "to_dict", None)):
            raise InvalidInput(
                f"messages must be a list of messages, not a {type(values).__name__}"
            )
        single = True
    if single:
        yield "message", values
        return
    for index, value in enumerate(values):
        yield f"messages[{index}]", value


def encode_messages(values: MessageLike | Sequence[MessageLike], limit: int) -> list[bytes]:
    """What is sent of `values`, as `to_messages` and `encode_message` make it."""
    return [
        _encode_plain(value, limit)
        or encode_message(to_message(value, where), f"messages[{index}]", limit)
        for index, (where, value) in enumerate(_one_by_one(values))
    ]


def _encode_plain(value: MessageLike, limit: int) -> bytes | None:
    """The same for a string, and for a role and a text, which are messages as they are and most of
    what agents store: without the way through `Message`, which costs ten times as much. None for
    anything else, and for what cannot be sent."""
    if type(value) is str:
        plain: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": value}]}
    elif (
        type(value) is dict
        and len(value) == 2
        and type(role := value.get("role")) is str
        and type(content := value.get("content")) is str
    ):
        plain = {"role": role, "content": content}
    else:
        return None
    try:
        encoded = orjson.dumps(plain)
    except TypeError:
        return None
    return encoded if len(encoded) <= limit else None


def encode_message(message: Message, where: str, limit: int) -> bytes:
    """`message` as compact JSON of at most `limit` bytes; `InvalidInput` where it cannot be."""
    try:
        plain = message.model_dump(exclude_unset=True, warnings="error")
        encoded = orjson.dumps(plain)
    except (TypeError, ValueError) as error:
        # Lone surrogates, integers beyond 64 bits, fields that were assigned after validation.
        raise InvalidInput(f"{where}: {why_not_json(message) or error}") from error
    # orjson writes null for what is no number, and anything up to its own depth.
    brackets = encoded.count(b"{") + encoded.count(b"[")
    if (b"null" in encoded or brackets > MAX_DEPTH) and (
        problem := why_not_json(plain, encoded=True)
    ):
        raise InvalidInput(f"{where}: {problem}")
    if len(encoded) > limit:
        raise InvalidInput(
            f"{where} is {len(encoded):,} bytes and the limit is {limit:,}; "
            "store large content elsewhere and keep a reference, or raise max_message_bytes"
        )
    return encoded


def _explain(value: Mapping[str, Any], error: ValidationError) -> str:
    """Why `value` is no message, in the caller's words."""
    problem = why_not_json(value)
    if problem is not None:
        return problem
    # It is JSON, so one of the known fields is wrong. Of a union's complaints the one that got
    # furthest in is the one about what the caller meant.
    complaint = max(
        error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"])
    )
    place: list[str] = []
    before: int | str = ""
    for step in complaint["loc"]:
        is_tag = isinstance(before, int) and step in _PART_TAGS
        if not is_tag and step != "str" and not str(step).startswith("list["):
            place.append(str(step))
        before = step
    said = complaint["msg"]
    if complaint["type"] in ("model_type", "model_attributes_type"):
        said = "must be a dictionary with a 'type'"
    return f"{'.'.join(place) or 'value'}: {said}"


def returning(message_type: type[Any]) -> Callable[[dict[str, Any]], Any]:
    """What turns a stored JSON object into the caller's own message class.

    `message_type` is `Message`, ``dict``, any pydantic model, or a class with ``from_dict``.
    Raises `ConfigurationError` for anything else.
    """
    if message_type is dict:
        return dict
    if isinstance(message_type, type) and issubclass(message_type, BaseModel):
        return message_type.model_validate
    from_dict = getattr(message_type, "from_dict", None)
    if callable(from_dict):
        return cast("Callable[[dict[str, Any]], Any]", from_dict)
    raise ConfigurationError(
        f"message_type {message_type!r} is neither dict, a pydantic model, nor has from_dict()"
    )


# --- text ---------------------------------------------------------------------------------------

# Where a message or part keeps what a person or a tool said. Ids, URLs, media and bookkeeping are
# not text.
_MESSAGE_FIELDS = ("content", "refusal", "tool_calls", "function_call", "message")
_MORE_FIELDS = frozenset(_MESSAGE_FIELDS) - {"content"}
_PART_FIELDS = ("text", "refusal", "data", "name", "arguments", "input", "output", "content",
                "transcript", "filename", "title", "function", "input_audio")  # fmt: skip
_MEDIA_TYPES = frozenset({"audio", "input_audio", "image", "image_url", "video"})


def message_text(message: Mapping[str, Any]) -> str:
    """All the text of a message given as a JSON object: content, data parts and tool calls."""
    if _MORE_FIELDS.isdisjoint(message):  # most messages are nothing but a text
        content = message.get("content")
        if isinstance(content, str):
            return content
        if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
            [part] = content
            if len(part) == 2 and part.get("type") == "text" and isinstance(part.get("text"), str):
                return str(part["text"])
    pieces: list[str] = []
    for field in _MESSAGE_FIELDS:
        value = message.get(field)
        if value is None:
            continue
        if isinstance(value, str):
            pieces.append(value)
        elif isinstance(value, list):
            for part in value:
                pieces.extend([part] if isinstance(part, str) else _part_text(part))
        elif isinstance(value, Mapping):
            pieces.extend(_part_text(value))
    return "\n".join(piece for piece in pieces if piece)


def _part_text(part: Any) -> Iterator[str]:
    if not isinstance(part, Mapping):
        return
    kind = part.get("type")
    media = isinstance(kind, str) and kind in _MEDIA_TYPES
    for field in _PART_FIELDS:
        value = part.get(field)
        if value is None or (media and field == "data"):
            continue
        if field in ("function", "input_audio") and isinstance(value, Mapping):
            inner = {name: value.get(name) for name in ("name", "arguments", "transcript")}
            yield from _leaves(inner, parse=True)
        elif field == "content" and isinstance(value, list):
            for inner_part in value:
                if isinstance(inner_part, Mapping):
                    yield from _part_text(inner_part)
                else:
                    yield from _leaves(inner_part, parse=False)
        else:
            yield from _leaves(value, parse=field != "text")


def _leaves(value: Any, *, parse: bool) -> Iterator[str]:
    """The strings and numbers inside `value`, in order.

    With `parse`, a string that is itself a JSON object or array - as tool-call arguments are - is
    looked into: its text may be escaped (``\\u676d``) and would otherwise never be found.
    """
    waiting = [(value, parse)]
    while waiting:
        each, look_into = waiting.pop()
        if isinstance(each, str):
            inner = _parsed(each) if look_into and each[:1] in ("{", "[") else None
            if inner is None:
                yield each
            else:
                waiting.append((inner, False))
        elif isinstance(each, Mapping):
            waiting += [(inner, look_into) for inner in reversed(list(each.values()))]
        elif isinstance(each, list):
            waiting += [(inner, look_into) for inner in reversed(each)]
        elif isinstance(each, (int, float)) and not isinstance(each, bool):
            yield str(each)


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        return None
