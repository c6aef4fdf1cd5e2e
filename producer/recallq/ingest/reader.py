"""A thread that reads and parses ahead of the event loop.

The loop must never wait for a disk or a pipe. The thread is a daemon of its own rather than one
of the executor's, which a program joins before it ends: one that waits for standard input would
hold Ctrl-C up until somebody typed a line.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator

from recallq.ingest.formats import Line

_AHEAD_LINES = 1000
_AHEAD_BYTES = 8 * 1024 * 1024


class LineReader:
    """Runs an iterator of lines in a thread, a bounded way ahead; begins at once."""

    def __init__(self, lines: Callable[[], Iterator[Line]]) -> None:
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._changed = threading.Condition()
        self._read: deque[Line] = deque()
        self._size = 0
        self._waiting = False
        self._ended = False
        self._stopped = False
        self.error: Exception | None = None
        """What ended the iterator early; to be looked at after the last line."""
        threading.Thread(target=self._run, name="recallq-ingest-read", daemon=True).start()

    async def take(self) -> list[Line]:
        """All lines that are there, at least one; none at the end."""
        while True:
            with self._changed:
                if self._read or self._ended:
                    lines = list(self._read)
                    self._read.clear()
                    self._size = 0
                    self._changed.notify()
                    return lines
                self._news.clear()
                self._waiting = True
            await self._news.wait()

    def stop(self) -> None:
        """Ends the thread after the line that it is reading."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            for line in self._lines():
                if not self._put(line):
                    return
        except Exception as error:  # noqa: BLE001 - belongs to whoever takes the lines
            self.error = error
        with self._changed:
            self._ended = True
            self._wake()

    def _put(self, line: Line) -> bool:
        with self._changed:
            while not self._stopped and (
                len(self._read) >= _AHEAD_LINES or self._size >= _AHEAD_BYTES
            ):
                self._changed.wait()
            if self._stopped:
                return False
            self._read.append(line)
            self._size += line.piece.size
            self._wake()
            return True

    def _wake(self) -> None:
        if self._waiting and not self._stopped:
            self._waiting = False
            self._loop.call_soon_threadsafe(self._news.set)
