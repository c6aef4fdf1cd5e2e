"""The load: what agents do with one client, written down call by call.

Every message begins with a token that no other has, so that what is seen later can be told apart.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recallq import (
    ClientClosed,
    JobError,
    JobHandle,
    JobTimeout,
    MemoryClient,
    Message,
    QueueFull,
    RecallQError,
    ServiceUnavailable,
)
from recallq.contract import AddResult, Lane, Operation, StoredMessage
from tests.chaos.history import SUCCEEDED, Call, Journal

_RESULT_TIMEOUT = 10.0
_PAGE = 2000
_WORDS = ("tea", "peanuts", "harbour", "violin", "snow", "ladder", "orchid", "train")
_LANES = (*[Lane.LIVE] * 6, *[Lane.BULK] * 3, Lane.SLOW)

T = TypeVar("T")


@dataclass(slots=True)
class World:
    """Whom the load is about, and what its agents share."""

    users: int
    sessions: int
    call_timeout: float
    """Of calls that wait for their answer, in seconds."""
    poisons: list[str] = field(default_factory=list)
    """Poison to come."""
    poison_every: int = 1
    """So many new adds share one."""
    adds: int = 0
    keyed: dict[tuple[str, str], list[tuple[str, list[str]]]] = field(default_factory=dict)
    """Keys that were used, with the texts, by user and session."""


class Pace:
    """So many jobs per second, for all who share it, and no more than `jobs`."""

    def __init__(self, rate: float, jobs: float) -> None:
        self._gap = 1 / rate
        self._left = jobs
        self._next = 0.0

    async def turn(self) -> bool:
        """Waits for the next job's time; False when there is none."""
        if self._left <= 0:
            return False
        self._left -= 1
        now = time.monotonic()
        # Time that was lost while Redis was away is made up for, as far as a second goes.
        self._next = max(self._next, now - 1.0) + self._gap
        await asyncio.sleep(max(0.0, self._next - now))
        return self._left >= 0

    def finish(self) -> None:
        self._left = -1


class Agents:
    """Agents that share one client."""

    def __init__(
        self, memory: MemoryClient, journal: Journal, world: World, chance: random.Random
    ) -> None:
        self._memory = memory
        self._journal = journal
        self._world = world
        self._chance = chance
        self.others: Sequence[Agents] = (self,)
        """Whose clients look whether a delete has worked."""

    async def work(self, pace: Pace) -> None:
        """One agent: a job after another, while there are any."""
        chance = self._chance
        while await pace.turn():
            dice = chance.random()
            user = f"u{chance.randrange(self._world.users)}"
            session = f"s{chance.randrange(self._world.sessions)}"
            lane = chance.choice(_LANES)
            anywhere = None if chance.random() < 0.2 else session
            if dice < 0.70:
                await self._add(user, session, lane)
            elif dice < 0.80:
                await self.search(user, anywhere, lane)
            elif dice < 0.92:
                await self.read(user, anywhere, lane, submit=chance.random() < 0.3)
            else:
                await self._delete(user, anywhere, lane)

    # --- the four calls -------------------------------------------------------------------------

    async def _add(self, user: str, session: str, lane: Lane, *, again: bool = False) -> None:
        chance, memory = self._chance, self._memory
        call = self._call(Operation.ADD, user, session, lane)
        texts, call.key, call.poison = self._what_to_add(user, session, again=again)
        call.tokens = [text.split()[0] for text in texts]
        messages = [Message.user(text) for text in texts]
        # Nobody gives poison up: it must come to its end.
        key, dice = call.key, 1.0 if call.poison else chance.random()
        if dice < 0.3:
            call.timeout = self._world.call_timeout
            added: AddResult | None = await self._await(
                call,
                memory.add_memory(
                    user,
                    messages,
                    session,
                    lane=lane,
                    idempotency_key=key,
                    timeout=call.timeout,
                ),
            )
            if added is not None and added.record_ids and key is None:
                job_id = added.record_ids[0].rpartition("-")[0]
                if job_id:  # else the memory has an id of another making
                    self._journal.learn(call, job_id=job_id)
        elif dice < 0.32:
            # The caller gives up, at any moment.
            giving_up = self._give_up_soon(
                memory.add_memory(user, messages, session, lane=lane, idempotency_key=key)
            )
            await self._await(call, giving_up)
        else:
            handle = await self._submit(
                call, memory.submit_add(user, messages, session, lane=lane, idempotency_key=key)
            )
            if handle is not None and dice < 0.45:
                await self._result(call, handle)
            elif handle is not None and dice < 0.47:
                await self._cancel(call, handle)

    def _what_to_add(
        self, user: str, session: str, *, again: bool
    ) -> tuple[list[str], str | None, str | None]:
        """Texts, idempotency key and poison; with `again`, of an earlier call if there is one."""
        chance, world = self._chance, self._world
        used = world.keyed.setdefault((user, session), [])
        keyed = chance.random() < 0.15
        if used and (again or (keyed and chance.random() < 0.4)):
            old_key, texts = chance.choice(used)
            return texts, old_key, None
        poison = None
        world.adds += 1
        if world.poisons and world.adds % world.poison_every == 0:
            poison = world.poisons.pop(0)
        number = self._journal.calls + 1
        texts = [
            f"{self._journal.client}.{number}.{index} {chance.choice(_WORDS)} {poison or ''}"
            for index in range(chance.choice((1, 1, 2, 3)))
        ]
        key = f"key-{texts[0].split()[0]}" if keyed and poison is None else None
        if key is not None:
            used.append((key, texts))
        return texts, key, poison

    async def search(self, user: str, session: str | None, lane: Lane) -> None:
        call = self._call(Operation.SEARCH, user, session, lane)
        call.timeout = self._world.call_timeout
        hits = await self._await(
            call,
            self._memory.search(
                user,
                self._chance.choice(_WORDS),
                {"top_k": 20, "session_id": session},
                lane=lane,
                timeout=call.timeout,
            ),
        )
        if hits is not None:
            self._journal.learn(call, seen=_seen(hits))

    async def read(
        self, user: str, session: str | None, lane: Lane, *, submit: bool = False
    ) -> Call:
        call = self._call(Operation.LIST, user, session, lane)
        call.timeout = self._world.call_timeout
        filters = {"page_size": _PAGE, "session_id": session}
        records: Sequence[StoredMessage] | None = None
        if submit:
            handle = await self._submit(
                call,
                self._memory.submit_list(user, filters, lane=lane, timeout=call.timeout),
            )
            if handle is not None:
                records = await self._result(call, handle)
        else:
            records = await self._await(
                call,
                self._memory.list_records(user, filters, lane=lane, timeout=call.timeout),
            )
        if records is not None:
            # What it saw, it saw before the caller heard of it.
            self._journal.learn(
                call, seen=_seen(records), whole=len(records) < _PAGE, ended=call.settled
            )
        return call

    async def _delete(self, user: str, session: str | None, lane: Lane) -> None:
        call = self._call(Operation.DELETE, user, session, lane)
        if self._chance.random() < 0.7:
            call.timeout = self._world.call_timeout
            await self._await(
                call,
                self._memory.delete_memory(user, session, lane=lane, timeout=call.timeout),
            )
        else:
            handle = await self._submit(call, self._memory.submit_delete(user, session, lane=lane))
            if session is not None and self._chance.random() < 0.3:
                # What is submitted after a delete stays, also if it was there before.
                await self._add(user, session, self._chance.choice(_LANES), again=True)
            if handle is not None and self._chance.random() < 0.5:
                await self._result(call, handle)
        if call.settled is not None and self._chance.random() < 0.6:
            other = self._chance.choice(self.others)
            if self._chance.random() < 0.7:
                await other.read(user, session, self._chance.choice(_LANES))
            else:
                await other.search(user, session, self._chance.choice(_LANES))

    # --- writing down ---------------------------------------------------------------------------

    def _call(self, operation: Operation, user: str, session: str | None, lane: Lane) -> Call:
        return Call("", 0, operation, user, session, 0.0, lane=lane.value)

    def _begin(self, call: Call) -> None:
        call.began = time.monotonic()
        self._journal.begin(call)

    async def _await(self, call: Call, work: Awaitable[T]) -> T | None:
        """Makes a call that waits for its answer."""
        self._begin(call)
        try:
            value = await work
        except (JobTimeout, ClientClosed, ServiceUnavailable, _GivenUp) as error:
            job_id = error.job_id if isinstance(error, JobTimeout) else None
            self._failed(call, error, job_id=job_id)
        except QueueFull as error:
            self._failed(call, error, refused=True)
        except JobError as error:
            now = time.monotonic()
            self._failed(call, error, accepted=now, settled=now, job_id=error.job_id)
        except Exception as error:
            self._unexpected(call, error)
        else:
            now = time.monotonic()
            self._journal.learn(call, accepted=now, ended=now, settled=now, outcome=SUCCEEDED)
            return value
        return None

    async def _submit(self, call: Call, work: Awaitable[JobHandle]) -> JobHandle | None:
        """Makes a call that returns when its job is accepted."""
        self._begin(call)
        try:
            handle = await work
        except QueueFull as error:
            self._failed(call, error, refused=True)
        except RecallQError as error:
            self._failed(call, error)
        except Exception as error:
            self._unexpected(call, error)
        else:
            now = time.monotonic()
            self._journal.learn(call, accepted=now, ended=now, job_id=handle.id)
            return handle
        return None

    async def _result(self, call: Call, handle: JobHandle) -> Any:
        """Waits for what was submitted, if it does not take too long; None if it does."""
        try:
            value = await handle.result(timeout=_RESULT_TIMEOUT)
        except (JobTimeout, ClientClosed, ServiceUnavailable):
            return None  # nothing is known yet
        except JobError as error:
            self._journal.learn(
                call, settled=time.monotonic(), outcome=type(error).__name__, error=str(error)
            )
        except Exception as error:
            self._unexpected(call, error)
        else:
            self._journal.learn(call, settled=time.monotonic(), outcome=SUCCEEDED)
            return value
        return None

    async def _cancel(self, call: Call, handle: JobHandle) -> None:
        try:
            if await handle.cancel():
                self._journal.learn(call, cancelled=True)
        except (ClientClosed, ServiceUnavailable):
            return
        except Exception as error:
            self._unexpected(call, error)

    async def _give_up_soon(self, work: Awaitable[T]) -> T:
        seconds = self._chance.choice((0.0, 0.001, 0.005, 0.05))
        try:
            async with asyncio.timeout(seconds):
                return await work
        except JobError:
            raise
        except TimeoutError:
            raise _GivenUp from None

    def _failed(self, call: Call, error: Exception, **news: object) -> None:
        self._journal.learn(
            call, ended=time.monotonic(), outcome=type(error).__name__, error=str(error), **news
        )

    def _unexpected(self, call: Call, error: Exception) -> None:
        self._failed(call, error)
        self._journal.learn(call, outcome=f"unexpected {type(error).__name__}")


class _GivenUp(Exception):
    """The caller did not wait."""


def _seen(records: Sequence[StoredMessage]) -> list[tuple[str, str]]:
    return [(record.message.text.split()[0], record.session_id) for record in records]
