"""The feed of conversation logs: a file, plain or gzip-compressed, a pipe, or standard input.

Owns opening, and what can be known before anything is read: whether there is such a file, how
large it is, and whether reading can begin again in the middle.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Self, cast

from recallq.errors import InvalidInput
from recallq.ingest.formats import Defaults, Line, parse
from recallq.ingest.report import IngestOptions
from recallq.ingest.stream import Position

STDIN = "-"

READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file, compressed or not, may raise."""

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Source:
    """A log to ingest. `name` is what people see."""

    noun: ClassVar[str] = "line"
    waiting: ClassVar[str | None] = None

    name: str
    path: Path | None = None
    stream: BinaryIO | None = None
    """Read instead of a file; closed by whoever opened it."""
    size: int | None = None
    """In bytes as it lies on disk; None if it cannot be known."""

    @classmethod
    def of(cls, given: Self | str | Path) -> Self:
        """The source that `given` names; ``"-"`` is standard input. Raises `InvalidInput`."""
        if isinstance(given, cls):
            return given
        if given == STDIN:
            return cls("stdin", stream=_stdin())
        path = Path(cast("str | Path", given))
        try:
            status = path.stat()
        except FileNotFoundError:
            raise InvalidInput(f"{path}: there is no such file") from None
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path}: {_why(error)}") from None
        if stat.S_ISDIR(status.st_mode):
            raise InvalidInput(f"{path} is a directory; name the files in it")
        if not os.access(path, os.R_OK):
            raise InvalidInput(f"{path} cannot be read: permission denied")
        return cls(str(path), path, size=status.st_size if stat.S_ISREG(status.st_mode) else None)

    @property
    def resumable(self) -> bool:
        """Whether it can be read again from the middle: a regular file."""
        return self.size is not None

    @property
    def default_rejects(self) -> Path:
        """Next to a file; a pipe has no place of its own."""
        if self.path is not None and self.resumable:
            return self.path.with_name(f"{self.path.name}.rejects.jsonl")
        return Path(f"{'stdin' if self.path is None else self.path.name}.rejects.jsonl")

    def lines(self, start: Position, options: IngestOptions) -> Iterator[Line]:
        """What its lines say. Raises `READ_ERRORS`."""
        with self.open(start.offset) as (stream, tell):
            yield from parse(
                stream,
                Defaults(options.user, options.session),
                start=start,
                limit=options.max_line_bytes,
                tell=tell,
            )

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[tuple[BinaryIO, Callable[[], int] | None]]:
        """The decompressed bytes from `offset` on, and how far the file itself has been read.

        The latter is None where it is the same. Raises `READ_ERRORS`, as reading does.
        """
        if self.stream is not None:
            plain, _ = _decompressed(_buffered(self.stream))
            yield plain, None
            return
        if self.path is None:
            raise InvalidInput(f"{self.name} has neither a path nor a stream")
        with self.path.open("rb") as file:
            plain, tell = _decompressed(file)
            if offset:
                plain.seek(offset)
            yield plain, tell

    def head_digest(self, size: int) -> str | None:
        """SHA-256 of the first `size` bytes, decompressed; None if it has not that many."""
        with self.open() as (stream, _):
            head = stream.read(size)
        return hashlib.sha256(head).hexdigest() if len(head) == size else None


def _decompressed(file: io.BufferedReader) -> tuple[BinaryIO, Callable[[], int] | None]:
    if file.peek(len(_GZIP))[: len(_GZIP)] != _GZIP:
        return file, None
    return cast("BinaryIO", gzip.GzipFile(fileobj=file, mode="rb")), (
        file.tell if file.seekable() else None
    )


def _buffered(stream: BinaryIO) -> io.BufferedReader:
    if isinstance(stream, io.BufferedReader):
        return stream
    return _Borrowing(cast("io.RawIOBase", stream))


class _Borrowing(io.BufferedReader):
    """Leaves the stream below open."""

    def close(self) -> None:
        with suppress(ValueError):
            self.detach()


def _stdin() -> BinaryIO:
    # Its own reader: a thread may still wait for input when the program ends, and the interpreter
    # cannot close `sys.stdin` while somebody reads from it.
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        if sys.stdin is None:
            raise InvalidInput("there is no standard input") from None
        return cast("BinaryIO", sys.stdin.buffer)
    with suppress(OSError):
        os.set_blocking(descriptor, True)  # else "nothing yet" looks like the end
    return open(descriptor, "rb", closefd=False)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
