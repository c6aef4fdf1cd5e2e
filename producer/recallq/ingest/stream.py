"""Byte streams cut into the pieces that are parsed one by one: lines, or the items of one array.

Owns where a piece begins and ends, and nothing of what it says. Everything is done in bytes and
in a buffer of at most one piece's limit, because a log may be larger than memory and a damaged
one may be a single line; offsets stay exact, so that reading can begin again after any piece.

A file that is one JSON array of objects, as ShareGPT exports are, is cut at the brackets that
close its items. ``JSONDecoder.raw_decode`` over a growing buffer cannot tell an item that is
incomplete from one that is wrong, and a streaming parser ends at the first error; brackets and
quotes alone confine a bad item to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

MAX_PIECE_BYTES = 16 * 1024 * 1024
"""Longest line, or item of an array, that is read."""

HEAD_BYTES = 16 * 1024
"""How much of a piece that is too long is kept, to show which one it was."""

BOM = b"\xef\xbb\xbf"

_CHUNK = 64 * 1024
_SPACE = b" \t\r\n"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[(?=[ \t\r\n]*[{\]])")
_ARRAY_SO_FAR = re.compile(rb"(?:\xef(?:\xbb(?:\xbf)?)?)?[ \t\r\n]*(?:\[[ \t\r\n]*)?")
_OUTSIDE_STRING = re.compile(rb'["{}\[\],]')
_INSIDE_STRING = re.compile(rb'["\\]')
_BLANK = re.compile(rb"[ \t\r\n]*")
_GAP = re.compile(rb"[ \t\r\n,]*")


@dataclass(frozen=True, slots=True)
class Position:
    """Where reading can begin again."""

    offset: int = 0
    """Bytes before it."""
    line: int = 0
    """Line ends before it."""
    item: int | None = None
    """Inside an array: the items before it. None between lines."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One line that is not blank, or one item of the array."""

    line: int
    """The line it begins on, from 1."""
    item: int | None
    """Which item of the array it is, from 1; None for a line."""
    raw: bytes
    """Without byte order mark and surrounding white space. Where it was too long, only its first
    `HEAD_BYTES`."""
    size: int
    """Bytes it takes in the stream."""
    after: Position
    """Where to read on: just behind it, but at its beginning if it is `unfinished`."""
    consumed: int
    """How far the underlying file had been read, in bytes of that file."""
    unfinished: bool = False
    """The stream ended, and the piece had not: when the stream has grown it may be another."""
    problem: str | None = None
    """Why it cannot be parsed, if that is known already."""


def pieces(
    stream: BinaryIO,
    start: Position | None = None,
    *,
    limit: int = MAX_PIECE_BYTES,
    tell: Callable[[], int] | None = None,
) -> Iterator[Piece]:
    """The pieces of `stream`, which stands at `start`. Raises what reading the stream raises.

    `limit` is in bytes. `tell` says how far the underlying file has been read where that is not
    the offset in `stream`, as with a compressed file.
    """
    window = _Window(stream, start or Position(), tell)
    item = start.item if start is not None else None
    if window.position(None) == Position():
        while len(window.data) < 2 and window.fill():
            pass
        if bytes(window.data[:2]) in _UTF_16:
            problem = "the file is UTF-16; convert it to UTF-8"
            yield window.piece(window.mark(None), 2, after=None, problem=problem)
            return
        if _enter_array(window):
            item = 0
    if item is not None:
        yield from _items(window, item, limit)
    yield from _lines(window, limit)


class _Window:
    """The part of the stream that was read and is not used yet: `data` from `at` on."""

    def __init__(self, stream: BinaryIO, start: Position, tell: Callable[[], int] | None) -> None:
        # On a pipe read() would wait for a full chunk; read1() takes what is there.
        self._read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
        self._tell = tell
        self._base = start.offset
        self._read_to = 0
        self.data = bytearray()
        self.at = 0
        self.line = start.line

    def fill(self) -> bool:
        """Reads more behind what is not used yet; False at the end of the stream."""
        del self.data[: self.at]
        self._base += self.at
        self.at = 0
        chunk = self._read(_CHUNK)
        self.data += chunk
        self._read_to = self._tell() if self._tell else 0
        return bool(chunk)

    def skip(self, end: int) -> None:
        """Uses the data up to index `end`."""
        self.line += self.data.count(b"\n", self.at, end)
        self.at = end

    def skip_over(self, pattern: re.Pattern[bytes]) -> int:
        """Uses what matches; the index of what comes next."""
        match = pattern.match(self.data, self.at)
        if match is not None:
            self.skip(match.end())
        return self.at

    def position(self, item: int | None) -> Position:
        return Position(self._base + self.at, self.line, item)

    def mark(self, item: int | None) -> _Mark:
        return _Mark(self, item)

    def piece(
        self, mark: _Mark, size: int, *, after: Position | None, problem: str | None
    ) -> Piece:
        """The piece that began at `mark` and takes `size` bytes; without `after` the last."""
        begin = mark.begin
        return Piece(
            line=begin.line + 1,
            item=None if begin.item is None else begin.item + 1,
            raw=mark.head if mark.head is not None else bytes(self.data[self.at : self.at + size]),
            size=size,
            after=after or begin,
            unfinished=after is None,
            consumed=self._read_to if self._tell else begin.offset + size,
            problem=problem,
        )


class _Mark:
    """Where a piece began, and its head if the rest of it is being skipped."""

    def __init__(self, window: _Window, item: int | None) -> None:
        self.begin = window.position(item)
        self.head: bytes | None = None
        self.dropped = 0
        self._window = window

    def drop(self, end: int, limit: int) -> None:
        """Skips the data up to index `end`, which belongs to a piece longer than `limit`."""
        window = self._window
        if self.head is None:
            self.head = bytes(window.data[window.at : window.at + min(limit, HEAD_BYTES)])
        self.dropped += end - window.at
        window.skip(end)


def _enter_array(window: _Window) -> bool:
    """Whether the stream is an array of objects; then `window` is left behind its bracket.

    ``[1, 2]`` alone is no such array but a bad line, and the lines after it may be good.
    """
    while True:
        if match := _ARRAY.match(window.data):
            window.skip(match.end())
            return True
        undecided = _ARRAY_SO_FAR.fullmatch(window.data)
        if not undecided or len(window.data) > _CHUNK or not window.fill():
            return False


def _lines(window: _Window, limit: int) -> Iterator[Piece]:
    """The rest of the stream, line by line."""
    while True:
        while window.skip_over(_BLANK) == len(window.data):
            if not window.fill():
                return
        mark = window.mark(None)
        ended = False
        searched = window.at
        while (end := window.data.find(b"\n", searched)) < 0:
            if len(window.data) - window.at > limit:
                mark.drop(len(window.data), limit)
            searched = len(window.data) - window.at
            if not window.fill():
                ended, end = True, len(window.data)
                break
        piece = _finish(window, mark, end, end if ended else end + 1, None, limit, ended=ended)
        if piece is not None:
            yield piece
        if ended:
            return


def _items(window: _Window, item: int, limit: int) -> Iterator[Piece]:
    """The array's items after the first `item` of them; leaves `window` behind the array."""
    while True:
        while window.skip_over(_GAP) == len(window.data):
            if not window.fill():
                problem = "the file ends before its array does"
                yield window.piece(window.mark(item), 0, after=None, problem=problem)
                return
        if window.data[window.at] == ord("]"):
            window.skip(window.at + 1)
            return
        mark = window.mark(item)
        end = _item_end(window, mark, limit)
        ended = end is None
        end = len(window.data) if end is None else end
        item += 1
        piece = _finish(window, mark, end, end, item, limit, ended=ended)
        if piece is not None:
            yield piece
        if ended:
            return


def _item_end(window: _Window, mark: _Mark, limit: int) -> int | None:
    """The index behind the item that begins at the window's; None if the stream ends inside it."""
    depth = 0
    in_string = False
    searched = window.at
    while True:
        found = (_INSIDE_STRING if in_string else _OUTSIDE_STRING).search(window.data, searched)
        if found is None or found.end() + (in_string and found[0] == b"\\") > len(window.data):
            # An escape at the end of the data is searched again together with what it escapes.
            keep = len(window.data) if found is None else found.start()
            if keep - window.at > limit:
                mark.drop(keep, limit)
            searched = keep - window.at
            if not window.fill():
                return None
            continue
        token, searched = found[0], found.end()
        if in_string:
            if token == b"\\":
                searched += 1
            else:
                in_string = False
        elif token == b'"':
            in_string = True
        elif token in b"{[":
            depth += 1
        elif depth == 0:
            if token in b",]":
                return found.start()
        elif token in b"}]":
            depth -= 1
            if depth == 0:
                return searched


def _finish(
    window: _Window, mark: _Mark, end: int, used: int, item: int | None, limit: int, *, ended: bool
) -> Piece | None:
    """The piece from `mark` to index `end`, None if blank; uses the data up to index `used`."""
    size = mark.dropped + end - window.at
    problem = None
    if size > limit:
        problem = f"longer than the limit of {limit:,} bytes"
        mark.drop(end, limit)
    elif ended and item is not None:
        problem = "the file ends inside this item"
    if mark.head is None:
        mark.head = bytes(window.data[window.at : end]).removeprefix(BOM).strip(_SPACE)
    window.skip(used)
    blank = not mark.head and not problem
    after = None if ended else window.position(item)
    return None if blank else window.piece(mark, size, after=after, problem=problem)
