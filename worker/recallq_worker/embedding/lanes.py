"""What waits to be embedded: texts, the callers who want them, and whose turn it is.

A text is sent once, however many callers want it, and stands in the queue of each of them, so that
it goes when the first of them has its turn. Callers take turns, a few texts each, so that ten
thousand texts of one do not keep another's one waiting.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from recallq_worker.embedding.base import Kind, Vector


class State(Enum):
    """Of a text."""

    WAITING = "waiting"
    SENT = "sent"
    DONE = "done"
    """It has its vector, has failed, or nobody wants it any more."""


class Item:
    """A text that is to be embedded."""

    __slots__ = ("key", "kind", "state", "text", "tokens", "waiters")

    def __init__(self, key: bytes, kind: Kind, text: str, tokens: int) -> None:
        self.key = key
        self.kind = kind
        self.text = text
        self.tokens = tokens
        """About how many it has."""
        self.state = State.WAITING
        self.waiters: dict[Call, list[int]] = {}
        """Who wants it, and where among its texts it stands."""


class Call:
    """A caller and what it has so far."""

    __slots__ = (
        "cached",
        "done",
        "has_turn",
        "items",
        "keys",
        "missing",
        "moved",
        "queue",
        "vectors",
    )

    def __init__(self, texts: int, loop: asyncio.AbstractEventLoop) -> None:
        self.vectors: list[Vector | None] = [None] * texts
        self.keys: list[bytes] = []
        self.missing = texts
        """How many vectors it does not have."""
        self.cached = 0
        """Texts for which no request is needed."""
        self.items: set[Item] = set()
        """What it waits for."""
        self.queue: deque[Item] = deque()
        """What it waits for and nobody has sent yet; others may have, meanwhile."""
        self.has_turn = False
        """Whether a lane will come to its queue."""
        self.done: asyncio.Future[None] = loop.create_future()
        self.moved = loop.time()
        """When it was last seen to get on."""

    def deliver(self, positions: list[int], vector: Vector) -> None:
        for position in positions:
            self.vectors[position] = vector
        self.missing -= len(positions)
        if self.missing == 0 and not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True)
class Batch:
    """Texts that go with one request."""

    kind: Kind
    items: list[Item]
    tries: int = 0
    """How often it failed in passing."""
    first_sent: float | None = None

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)


@dataclass(order=True, slots=True)
class _Later:
    at: float
    number: int
    batch: Batch = field(compare=False)


class Lane:
    """What waits of one kind. Times are those of the event loop, in seconds."""

    def __init__(
        self, kind: Kind, *, most_texts: int, most_tokens: int | None, linger: float
    ) -> None:
        self.kind = kind
        self.waiting = 0
        """Texts that wait for their first request."""
        self.tokens = 0
        """What they have, about."""
        self.in_flight = 0
        """Requests."""
        self._most_texts = most_texts
        self._most_tokens = most_tokens
        self._linger = linger
        self._due = 0.0
        self._turns: deque[Call] = deque()
        self._again: list[_Later] = []
        self._numbers = itertools.count()

    def add(self, call: Call, item: Item, now: float) -> None:
        """Queues a text that nobody has sent yet for a caller who wants it."""
        if not item.waiters:
            if self.waiting == 0:
                self._due = now + self._linger
            self.waiting += 1
            self.tokens += item.tokens
        call.queue.append(item)
        if not call.has_turn:
            call.has_turn = True
            self._turns.append(call)

    def drop(self, item: Item) -> None:
        """Forgets a waiting text: nobody wants it any more."""
        item.state = State.DONE
        self._leaves(item)
        self._forget_if_empty()

    def again(self, batch: Batch, at: float) -> None:
        """Puts a batch back that shall be sent again, not before `at`."""
        heapq.heappush(self._again, _Later(at, next(self._numbers), batch))

    def ready_at(self, now: float) -> float | None:
        """When there is something to send; None: nothing is here."""
        times = [self._again[0].at] if self._again else []
        if self.waiting:
            full = self.waiting >= self._most_texts or (
                self._most_tokens is not None and self.tokens >= self._most_tokens
            )
            times.append(now if full else self._due)
        return min(times, default=None)

    def take(self, now: float) -> Batch | None:
        """What is to be sent next, if that time has come; batches that go again go first."""
        if self._again and self._again[0].at <= now:
            return heapq.heappop(self._again).batch
        if not self.waiting:
            return None
        items = self._next_items()
        for item in items:
            for call in item.waiters:
                call.moved = now
        self._forget_if_empty()
        return Batch(self.kind, items) if items else None

    def _next_items(self) -> list[Item]:
        items: list[Item] = []
        turns = self._turns
        left = float("inf") if self._most_tokens is None else self._most_tokens
        while turns and (room := self._most_texts - len(items)):
            share = max(1, room // len(turns))
            call = turns[0]
            queue = call.queue
            while queue and share:
                item = queue[0]
                if item.state is State.WAITING:
                    if items and item.tokens > left:
                        return items
                    item.state = State.SENT
                    self._leaves(item)
                    items.append(item)
                    left -= item.tokens
                    share -= 1
                queue.popleft()
            turns.popleft()
            call.has_turn = bool(queue)
            if queue:
                turns.append(call)
        return items

    def _leaves(self, item: Item) -> None:
        self.waiting -= 1
        self.tokens -= item.tokens

    def _forget_if_empty(self) -> None:
        """Lets go of callers in whose queues nothing is left that waits."""
        if self.waiting == 0:
            while self._turns:
                call = self._turns.popleft()
                call.has_turn = False
                call.queue.clear()

    def everything(self) -> tuple[list[Call], list[Batch]]:
        """Callers whose texts wait for their turn, and batches that wait to go again."""
        return list(self._turns), [later.batch for later in self._again]

    def clear_again(self) -> None:
        self._again.clear()
