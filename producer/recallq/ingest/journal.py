"""What outlives a run of one source: its rejects, and how far it came.

Lines settle out of order, but are written down in order, so that one position in the file says it
all: what is before it is stored or among the rejects, what is behind it will be read again. After
a kill at any instant the rejects file is at most ahead of the checkpoint and is cut back to it.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from recallq.errors import InvalidInput
from recallq.ingest.feed import Feed
from recallq.ingest.formats import Reject
from recallq.ingest.source import READ_ERRORS, Source
from recallq.ingest.stream import Position

_HEAD_BYTES = 64 * 1024
"""How much of a file's beginning tells whether it is still the same file."""


class Checkpoint(BaseModel):
    """How far a file has been ingested. ``FILE.recallq-ingest.json`` holds one."""

    version: int = 1
    target: str
    """Where it went, as the caller describes it."""
    offset: int
    line: int
    item: int | None
    head_bytes: int
    head_sha256: str | None
    rejects: str
    rejects_bytes: int
    rejected: int
    """Lines rejected since the file was last ingested from its start or to its end."""
    complete: bool

    @property
    def position(self) -> Position:
        return Position(self.offset, self.line, self.item)


class Journal:
    """The rejects and the checkpoint of one run. Not for two runs at a time."""

    def __init__(
        self,
        source: Feed,
        rejects: Path | None = None,
        *,
        resume: bool = False,
        checkpoint: bool = True,
        shared: bool = False,
        first: bool = True,
        target: str = "",
    ) -> None:
        """`shared` rejects belong to several sources, of which this is the `first`, or not.

        Raises `InvalidInput`: there is nowhere to write rejects to, or the source is not what the
        checkpoint says.
        """
        self.rejects = rejects or source.default_rejects
        self.start = Position()
        self.rejected_earlier = 0
        self.warning: str | None = None
        """Why no checkpoint can be written, if so."""
        self.source = source
        self._shared = shared
        self._target = target
        self._log = source if isinstance(source, Source) else None
        """The source, if it is one that a checkpoint can be of."""
        self._path: Path | None = None
        if checkpoint and self._log is not None and self._log.resumable and self._log.path:
            self._path = self._log.path.with_name(f"{self._log.path.name}.recallq-ingest.json")
        self._found = self._load() if resume else None
        self._fresh_rejects = first and not resume if shared else self._found is None
        self._mark = self.start
        self._rejected = self.rejected_earlier
        self._pending: list[Reject] = []
        self._unfinished: list[Reject] = []
        self._rejects_bytes: int | None = None
        self._head: tuple[int, str | None] = (0, None)
        self._saved: tuple[Position, bool] | None = None
        self._state = threading.Lock()
        self._files = threading.Lock()
        self._check_rejects()

    @property
    def keeps_checkpoint(self) -> bool:
        return self._path is not None and self.warning is None

    @property
    def mark(self) -> Position:
        """Everything before it has settled."""
        return self._mark

    @property
    def pending(self) -> int:
        """Rejects not written yet."""
        return len(self._pending)

    def begin(self) -> None:
        """Makes the rejects file what it was at `start`. Raises `InvalidInput`."""
        if self._path is not None and self._found is None:
            # Killed before its first save, this run must not be resumed at an earlier one's end.
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        try:
            if self._fresh_rejects:
                if self.rejects.is_file():
                    self.rejects.unlink()
            elif (
                self._found is not None
                and not self._shared
                and self._found.rejects == str(self.rejects.absolute())
                and self.rejects.is_file()
                and self.rejects.stat().st_size > self._found.rejects_bytes
            ):
                if self._found.rejects_bytes:
                    os.truncate(self.rejects, self._found.rejects_bytes)
                else:
                    self.rejects.unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def settle(
        self, after: Position, reject: Reject | None = None, *, unfinished: bool = False
    ) -> None:
        """Notes that the next line is stored, or is a `reject`, and that `after` is what to read
        next. An `unfinished` line is the last, and its reject does not count once it is read again.
        """
        with self._state:
            self._mark = after
            if reject is not None and unfinished:
                self._unfinished.append(reject)
            elif reject is not None:
                self._rejected += 1
                self._pending.append(reject)

    def save(self, *, complete: bool = False) -> None:
        """Writes what has been noted; blocks. From any thread. Raises `InvalidInput`."""
        with self._files:
            with self._state:
                mark, rejected = self._mark, self._rejected
                pending, self._pending = self._pending, []
                unfinished, self._unfinished = self._unfinished, []
            try:
                self._write_rejects(pending)
                if unfinished:
                    self._rejects_bytes = self._size_of_rejects()
                    self._write_rejects(unfinished)
            except OSError as error:
                raise self._unwritable(error) from None
            if self.keeps_checkpoint and self._saved != (mark, complete):
                try:
                    self._write_checkpoint(mark, rejected, complete)
                    self._saved = (mark, complete)
                except READ_ERRORS as error:
                    why = (isinstance(error, OSError) and error.strerror) or error
                    self.warning = f"cannot write {self._path} ({why}): --resume will not find it"

    def _size_of_rejects(self) -> int:
        return self.rejects.stat().st_size if self.rejects.is_file() else 0

    def _write_rejects(self, rejects: list[Reject]) -> None:
        if not rejects:
            return
        with self.rejects.open("ab") as file:
            for reject in rejects:
                entry: dict[str, object] = {"file": self.source.name} if self._shared else {}
                entry |= {"line": reject.line, "reason": reject.reason, "raw": reject.raw}
                text = json.dumps(entry, ensure_ascii=False)
                file.write(text.encode("utf-8", "backslashreplace") + b"\n")

    def _write_checkpoint(self, mark: Position, rejected: int, complete: bool) -> None:
        assert self._path is not None  # keeps_checkpoint
        assert self._log is not None
        head = min(mark.offset, _HEAD_BYTES)
        if self._head[0] != head:
            self._head = (head, self._log.head_digest(head))
        rejects_bytes = self._rejects_bytes
        checkpoint = Checkpoint(
            target=self._target,
            offset=mark.offset,
            line=mark.line,
            item=mark.item,
            head_bytes=head,
            head_sha256=self._head[1],
            rejects=str(self.rejects.absolute()),
            rejects_bytes=self._size_of_rejects() if rejects_bytes is None else rejects_bytes,
            rejected=0 if complete else rejected,
            complete=complete,
        )
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(checkpoint.model_dump_json(indent=2) + "\n")
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self) -> Checkpoint | None:
        """The checkpoint, if there is one, checked against the source; sets where to begin."""
        log = self._log
        if log is None or self._path is None or not self._path.exists():
            return None
        again = (
            "without --resume it is ingested from its start, and what is stored is not stored twice"
        )
        try:
            found = Checkpoint.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            raise InvalidInput(
                f"{self._path} is not a checkpoint that can be read; {again}"
            ) from None
        if found.target != self._target:
            raise InvalidInput(
                f"{self.source.name} was last ingested to {found.target or 'another place'}, and "
                f"this would go to {self._target or 'another'}; {again}"
            )
        try:
            same = log.head_digest(found.head_bytes) == found.head_sha256
            size = log.size
        except READ_ERRORS as error:
            raise InvalidInput(f"{self.source.name} cannot be read: {error}") from None
        if not same or (size is not None and not _compressed(log) and size < found.offset):
            raise InvalidInput(
                f"{self.source.name} is not the file that was ingested as far as line "
                f"{found.line:,}: its beginning has changed; {again}"
            )
        self.start = found.position
        self.rejected_earlier = found.rejected
        return found

    def _check_rejects(self) -> None:
        path, log = self.rejects, self._log
        if log is not None and log.path and path.exists() and path.samefile(log.path):
            raise InvalidInput(f"the rejects of {log.name} cannot go to that file itself")
        if path.is_dir():
            raise InvalidInput(f"--rejects {path} is a directory; name a file")
        if not path.parent.is_dir():
            raise InvalidInput(f"--rejects {path}: there is no directory {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidInput(
                f"rejected {self.source.noun}s could not be written to {path}: permission denied; "
                "--rejects names another file"
            )

    def _unwritable(self, error: OSError) -> InvalidInput:
        return InvalidInput(
            f"cannot write the rejected {self.source.noun}s to {self.rejects}: {error.strerror}"
        )


def _compressed(log: Source) -> bool:
    with log.open() as (_, tell):
        return tell is not None
