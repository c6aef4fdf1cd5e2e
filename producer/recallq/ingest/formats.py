"""What the lines of a conversation log say: three formats, told apart line by line by looking.

- one message: ``{"user_id", "session_id", "role", "content", "timestamp"?, "id"?, ...}``
- OpenAI: ``{"messages": [{"role", "content", ...}, ...], ...}``
- ShareGPT: ``{"conversations": [{"from", "value", ...}, ...], ...}``

A file may also be one JSON array of such objects. Messages are kept as they came, fields that
nobody here knows included: of a one-message line everything but user and session, and of a
ShareGPT message everything, with ``from`` and ``value`` under the names ``role`` and ``content``.
What a conversation says beside its messages (model, tools, scores) is not stored.

A turn becomes one add job. Its idempotency key says what makes its messages the same ones when the
file is read again, under whatever name:

- a message with an ``id`` of its own is a turn, known by the id, role and content: in one session
  an id that comes a second time is a duplicate and is not stored again, but an id that two
  different messages share loses neither;
- a message of a conversation with an ``id`` is a turn, known by that id, its place, role and
  content: a conversation that has grown adds only what is new;
- what has no id at all, a message or the messages of a conversation, is known by the number of its
  line (or of its item in the array) and all that it says: two equal lines are two messages, and a
  log that has grown at its end adds only its new lines.

The user and the session are part of every record's id already.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import orjson

from recallq.errors import InvalidInput
from recallq.ingest.stream import HEAD_BYTES, MAX_PIECE_BYTES, Piece, Position, pieces
from recallq.messages import Message, to_message

_JOB_MESSAGES = 50
_JOB_BYTES = 1024 * 1024
"""Most messages and bytes of a conversation in one job, a single message excepted. Part of what
makes keys: other numbers would store long conversations again."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Whose a line is that does not say so; None rejects it."""

    user: str | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """Messages to store by one job."""

    user_id: str
    session_id: str
    messages: list[Message]
    key: str
    """Idempotency key."""
    order: int | None = None
    """Its place in the listing where that is known; None gives it the next one."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A line that cannot be stored, and why."""

    line: int
    reason: str
    raw: str
    """The line. Of a long one the beginning and its size; bytes that are not UTF-8 show as
    ``\\xNN``."""


@dataclass(slots=True)
class Line:
    """What one line that is not blank, or one item of the array, came to: turns or a reject."""

    piece: Piece
    """Where it was, its `raw` cut to `HEAD_BYTES`."""
    turns: list[Turn] = field(default_factory=list)
    problem: str | None = None
    """Why it is rejected as a whole; then there are no turns."""

    def reject(self, problem: str) -> Reject:
        """The reject that says `problem` of this line."""
        piece = self.piece
        where = "" if piece.item is None else f"item {piece.item:,} of the array: "
        raw = piece.raw[:HEAD_BYTES].decode("utf-8", "backslashreplace")
        if piece.size > HEAD_BYTES:
            raw += f" ... ({piece.size:,} bytes in all)"
        return Reject(piece.line, where + problem, raw)


def parse(
    stream: BinaryIO,
    defaults: Defaults | None = None,
    *,
    start: Position | None = None,
    limit: int = MAX_PIECE_BYTES,
    tell: Callable[[], int] | None = None,
) -> Iterator[Line]:
    """The lines of `stream`, which stands at `start`; `limit` is the longest that is read.

    Raises only what reading `stream` raises. `tell` is as in `stream.pieces`.
    """
    defaults = defaults or Defaults()
    for piece in pieces(stream, start, limit=limit, tell=tell):
        yield parse_piece(piece, defaults)


def parse_piece(piece: Piece, defaults: Defaults) -> Line:
    """What one line or item says."""
    try:
        if piece.problem is not None:
            raise _Unusable(piece.problem)
        return Line(
            _shortened(piece), _turns(_decode(piece.raw), piece.item or piece.line, defaults)
        )
    except (_Unusable, InvalidInput) as error:
        return Line(_shortened(piece), problem=str(error))
    except RecursionError:
        return Line(_shortened(piece), problem="nested too deeply")


class _Unusable(ValueError):
    """Says why a line is rejected."""


def _shortened(piece: Piece) -> Piece:
    # Lines wait in memory until they are stored, and their text is needed only to show a reject.
    if len(piece.raw) <= HEAD_BYTES:
        return piece
    return replace(piece, raw=piece.raw[:HEAD_BYTES])


# --- JSON ---------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers disagree on which of two equal keys counts; with a user's id that must not be.
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Unusable(f"the key {_quoted(key)} is there twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise _Unusable(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Unusable(f"the number {text[:40]} is too large")
    return value


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)


def _decode(raw: bytes) -> Any:
    if b"\0" in raw:
        raise _Unusable("contains a NUL byte: the file is damaged, or not UTF-8")
    try:
        return _JSON.decode(raw.decode())
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise _Unusable(f"not UTF-8: byte 0x{byte:02x} at position {error.start + 1:,}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno:,}, " if error.lineno > 1 else ""
        place += f"column {error.colno:,}"
        raise _Unusable(f"not JSON: {error.msg} at {place}") from None
    except ValueError as error:
        if isinstance(error, _Unusable):
            raise
        raise _Unusable(f"not JSON that can be read: {error}") from None  # thousands of digits


_KINDS = {str: "a string", bool: "true or false", int: "a number", float: "a number",
          list: "an array", dict: "an object", type(None): "null"}  # fmt: skip


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:60] + "...")


# --- lines --------------------------------------------------------------------------------------


def _turns(value: Any, number: int, defaults: Defaults) -> list[Turn]:
    if not isinstance(value, dict):
        raise _Unusable(f"{_kind(value)} where a JSON object is expected")
    if "role" in value and "content" in value:
        return [_single(value, number, defaults)]
    for name in ("messages", "conversations", "conversation"):
        if name in value:
            return _conversation(value, name, number, defaults)
    if "role" in value or "content" in value or ("from" in value and "value" in value):
        return [_single(value, number, defaults)]
    if value.keys() >= {"line", "reason", "raw"}:
        raise _Unusable("a line of a rejects file; ingest what its 'raw' says, once corrected")
    raise _Unusable(
        "neither a message ('role' and 'content') nor a conversation ('messages' or "
        "'conversations')"
    )


def _single(value: dict[str, Any], number: int, defaults: Defaults) -> Turn:
    user = _user(value, defaults)
    session = _first(value, "session_id", "conversation_id") or defaults.session
    if session is None:
        raise _Unusable("no session_id; --session names one for such lines")
    kept = {key: each for key, each in value.items() if key not in ("user_id", "session_id")}
    said = _said(kept, "message")
    own = _own_id(kept)
    key = make_key("line", number, kept) if own is None else make_key("message", own, *gist(said))
    message, _ = _checked(said, "message")
    return Turn(user, session, [message], key)


def _conversation(value: dict[str, Any], name: str, number: int, defaults: Defaults) -> list[Turn]:
    inside = value[name]
    if not isinstance(inside, list):
        raise _Unusable(f"{name!r} is {_kind(inside)}, not an array")
    if not inside:
        raise _Unusable(f"{name!r} is empty")
    user = _user(value, defaults)
    own = _own_id(value)
    # Its number alone would put conversations of different files into one session.
    session = (
        _first(value, "session_id", "conversation_id")
        or own
        or defaults.session
        or f"line-{number}-{_digest(inside)[:12]}"
    )
    said = [_said(each, f"{name}[{index}]") for index, each in enumerate(inside)]
    ids = [_own_id(each) for each in said]
    checked = [_checked(each, f"{name}[{index}]") for index, each in enumerate(said)]
    if own is None and not any(ids):
        return [
            Turn(user, session, [message for message, _ in checked[start:end]],
                 make_key("line", number, start, said[start:end]))
            for start, end in _groups([size for _, size in checked])
        ]  # fmt: skip
    turns = []
    for index, (each, each_id, (message, _)) in enumerate(zip(said, ids, checked, strict=True)):
        if each_id is not None:
            key = make_key("message", each_id, *gist(each))
        elif own is not None:
            key = make_key("conversation", own, index, *gist(each))
        else:
            key = make_key("line", number, index, each)
        turns.append(Turn(user, session, [message], key))
    return turns


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Where to cut messages of so many bytes into jobs; only they say, as the keys go by it."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= _JOB_MESSAGES or total + size > _JOB_BYTES):
            yield start, index
            start, total = index, 0
        total += size
    yield start, len(sizes)


# --- fields -------------------------------------------------------------------------------------


def _user(value: dict[str, Any], defaults: Defaults) -> str:
    user = _first(value, "user_id", "user") or defaults.user
    if user is None:
        raise _Unusable("no user_id; --user names one for such lines")
    return user


def _first(value: dict[str, Any], *names: str) -> str | None:
    """The first identifier under one of `names`, in the line or its ``metadata``; null is none."""
    metadata = value.get("metadata")
    for holder in (value, metadata if isinstance(metadata, dict) else {}):
        for name in names:
            if holder.get(name) is not None:
                return _identifier(holder[name], name)
    return None


def _identifier(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _Unusable(f"{name} is {_kind(value)}; it must be a string or a whole number")
    if not value.strip():
        raise _Unusable(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{name} is not valid Unicode text") from None
    return value


def _own_id(value: Mapping[str, Any]) -> str | None:
    own = value.get("id")
    return None if own is None or own == "" else _identifier(own, "id")


_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "claude": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""ShareGPT's speakers. One that is not among them keeps its name as its role."""

_SPEECH = frozenset({"human", "user", "gpt", "assistant", "system", "tool"})
"""Speakers of whom the role says all; of the others ``from`` is kept as well."""

_SAYS_WITHOUT_CONTENT = ("tool_calls", "function_call", "refusal", "audio")


def _said(value: Any, where: str) -> dict[str, Any]:
    """The message that `value` is, as a ``{"role", "content", ...}`` object. Raises `_Unusable`."""
    if not isinstance(value, dict):
        raise _Unusable(f"{where} is {_kind(value)}, not an object")
    sharegpt = "role" not in value and "from" in value
    said: dict[str, Any] = _from_sharegpt(value, where) if sharegpt else value
    role = said.get("role")
    if not isinstance(role, str) or not role.strip():
        what = (
            "no" if role is None else "an empty" if isinstance(role, str) else _kind(role) + " as"
        )
        raise _Unusable(f"{where} has {what} 'role'")
    content = said.get("content")
    if content is None and not any(said.get(name) for name in _SAYS_WITHOUT_CONTENT):
        raise _Unusable(f"{where} has no 'content'")
    if content is not None and not isinstance(content, (str, list)):
        raise _Unusable(f"{where} has {_kind(content)} as its 'content', not text or parts")
    return said


def _checked(said: dict[str, Any], where: str) -> tuple[Message, int]:
    """`said` as a message that can be sent, and its bytes. Raises `_Unusable` or `InvalidInput`.

    The client would refuse it too, but when the rest of its conversation may be stored already.
    """
    try:
        size = len(orjson.dumps(said))
    except (TypeError, ValueError) as error:  # lone surrogates, large integers, deep nesting
        raise _Unusable(f"{where} cannot be sent as JSON: {error}") from None
    return to_message(said, where), size


def _from_sharegpt(value: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = value["from"]
    if not isinstance(speaker, str) or not speaker.strip():
        raise _Unusable(f"{where} has {_kind(speaker)} as its 'from', not a speaker")
    name = speaker.strip().lower()
    renamed = {"role": _ROLES.get(name, speaker)}
    if "content" not in value and "value" in value:
        renamed["content"] = value["value"]
    dropped = {"value"} if "content" in renamed else set()
    if name in _SPEECH or name not in _ROLES:
        dropped.add("from")
    return renamed | {key: each for key, each in value.items() if key not in dropped}


# --- identity -----------------------------------------------------------------------------------


def gist(said: dict[str, Any]) -> list[Any]:
    """What a message says, whatever else was noted about it."""
    return [said.get(name) for name in ("role", "content", *_SAYS_WITHOUT_CONTENT)]


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def make_key(*parts: Any) -> str:
    return f"ingest-{_digest(parts)[:32]}"


def _digest(value: Any) -> str:
    # Not orjson: it has no word for lone surrogates and large integers, and neither is our affair.
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()
