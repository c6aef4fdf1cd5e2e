"""Whatever users, tenants and sessions are called, no call on one reaches another's memories.

Generated casts of hostile and confusable ids act out generated stories through real clients, a real
worker and a real Redis. A dictionary keeps the score: at every point each scope lists, finds and
deletes exactly what the dictionary says.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Self
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from recallq import AddResult, DeleteResult, MemoryClient
from recallq.contract import DEFAULT_SESSION, StoredMessage
from tests.conftest import no_blocking
from tests.strategies import ids
from tests.support import Worker

_numbers = itertools.count(1)

# --- who -----------------------------------------------------------------------------------------

SEPARATORS = [
    ":",
    "/",
    "-",
    ".",
    "%",
    "=",
    "*",
    "}/{",
    "}:{",
    "\0",
    "\n",
    "\x06\x16",
    ",",
    "|",
    " ",
]

LONG = "x" * 10_000
HASHED = "=" + sha256(LONG.encode()).hexdigest()

NAMES = [
    "a", "b", "A", " ", "\t", "\n", "\0", "0", "-1", "null", "None", "default", "=", "%", "%2F",
    "*", "?", "[", "]", "[a-z]", "[^a]", "a*", "a?", "\\", "\\*", "{", "}", "{}", "{a}", "}{", ".",
    "..", "../a", "~", "%s", "{0}", "'", '"', "s:x", "s:*", "s:", "x", "k", "n", "e", "m", "r",
    "o", "f", "\x06\x16", "\x06\x163", "é", "e\u0301", "Ａ", "ﬁ", "ß", "ss", "İ", "ı", "\u212b",
    "用户", "\u202ea", "a\u202e", "\u200fa", "\u200ba", "a\u200b", "a\u200d", "\ufeffa", "\ufeff",
    "👩\u200d👩\u200d👧", "👩👩👧", "🏳\ufe0f", "🏳", "\U0010ffff", "\x7f", "\x85", "\u2028",
    "recallq:ledger", "recallq:outstanding", "recallq:workers", "recallq:dead", "recallq.live",
    "recallq:epoch:{default/a}", "recallq:m:{default/a}", "recallq:m:{a/a}:o", "recallq:batch:a",
    "recallq:m:{a/b}:s:a", "recallq:celery-task-meta-a", "_kombu.binding.recallq.live",
    LONG, LONG + "x", LONG[1:] + "y", "é" * 5_000, "e\u0301" * 3_333, "👩" * 2_500,
    "x" * 200, "x" * 201, HASHED,
]  # fmt: skip
"""The beginning ``recallq`` stands for the namespace that the test runs in."""


def confusable(name: str) -> list[str]:
    """Ids that some way of joining, quoting, matching or tidying would take for `name`, or that
    together with it make up the same joined string in two ways."""
    others = [
        *(name + separator + name for separator in SEPARATORS),
        *(name + separator for separator in SEPARATORS),
        *(separator + name for separator in SEPARATORS),
        name[:-1], name[1:], name + name, name + "x", name[:1] + "*", f"{{{name}}}", f"[{name}]",
        f"s:{name}", f":s:{name}", quote(name, safe=""), quote(quote(name, safe=""), safe=""),
        quote(name), "=" + sha256(name.encode()).hexdigest(), name.upper(), name.lower(),
        name.casefold(), name.strip(), *(unicodedata.normalize(form, name)
        for form in ("NFC", "NFD", "NFKC", "NFKD")),
    ]  # fmt: skip
    return sorted({other for other in others if other and other != name})


@dataclass(frozen=True)
class Cast:
    """Everybody in a story: all combinations of these."""

    tenants: Sequence[str]
    users: Sequence[str]
    sessions: Sequence[str]


def everywhere(*names: str) -> Cast:
    """The same names in every role."""
    return Cast(names[:2], names, names)


@st.composite
def casts(draw: DrawFn) -> Cast:
    """A few names that resemble each other, each in any role."""
    name = draw(st.sampled_from(NAMES) | ids)
    pool = st.sampled_from([name, name, *confusable(name)]) | st.sampled_from(NAMES) | ids
    names = draw(st.lists(pool, min_size=2, max_size=4, unique=True))
    if name not in names:
        names.append(name)
    roles = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
    return Cast(draw(roles)[:2], draw(roles), draw(roles))


# --- what they do --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Who:
    """Indexes into a cast, beyond its end from the beginning again."""

    tenant: int
    user: int
    session: int | None
    """None is the default session of an add, and all sessions of everything else."""


@dataclass(frozen=True)
class Add:
    who: Who
    messages: int = 1
    key: int | None = None
    """Which of the names is the idempotency key."""
    submitted: bool = False


@dataclass(frozen=True)
class Adds:
    """Adds at the same time, and a delete elsewhere."""

    adds: Sequence[Add]
    beside: Who | None = None


@dataclass(frozen=True)
class Delete:
    who: Who
    submitted: bool = False


@dataclass(frozen=True)
class Look:
    """One page of a list, and the same by a handle."""

    who: Who
    page_num: int = 1
    page_size: int = 10


Step = Adds | Delete | Look

someone = st.builds(
    Who, st.integers(0, 1), st.integers(0, 2), st.none() | st.sampled_from([0, 1, 2])
)
adds = st.builds(
    Add, someone, st.integers(1, 2), st.none() | st.sampled_from([0, 1, 2]), st.booleans()
)
steps: SearchStrategy[Step] = st.one_of(
    st.builds(Adds, st.lists(adds, min_size=1, max_size=5), st.none() | someone),
    st.builds(Delete, someone, st.booleans()),
    st.builds(Look, someone, st.integers(1, 3), st.integers(1, 4)),
)
stories = st.lists(steps, min_size=2, max_size=8)

EVERYBODY = Adds(
    [
        Add(Who(tenant, user, session), key=0)
        for tenant in range(2)
        for user in range(3)
        for session in range(3)
    ]
)

CLEARANCE = [
    EVERYBODY,
    *(Delete(Who(0, 0, session)) for session in range(3)),
    EVERYBODY,
    Adds(EVERYBODY.adds[1:], beside=Who(0, 0, 0)),
    Delete(Who(1, 1, None), submitted=True),
]
"""Everybody says something, and one session after another goes."""

# --- what comes of it ----------------------------------------------------------------------------

User = tuple[str, str]
Scope = tuple[str, str, str]
Said = tuple[str, str]
"""Session and text of a message."""


class World:
    """A cast, its clients, and a model of what each of them has stored."""

    def __init__(self, worker: Worker, cast: Cast) -> None:
        self._worker = worker
        self._tenants = self._named(cast.tenants)
        self._users = self._named(cast.users)
        self._sessions = self._named(cast.sessions)
        # Ever new, so that no story depends on what was deleted in the one before.
        self._keys = [f"{each}|{next(_numbers)}" for each in self._sessions]
        self._model: dict[User, list[Said]] = {
            (tenant, user): [] for tenant in self._tenants for user in self._users
        }
        self._keys_used: dict[Scope, dict[str, int]] = {}
        """Idempotency keys of a scope, and for how many messages; 0 once these were deleted."""
        self._clients: dict[str, MemoryClient] = {}
        self._stack = AsyncExitStack()

    def _named(self, names: Iterable[str]) -> list[str]:
        """The names that imitate RecallQ's keys imitate those of this namespace."""
        return [name.replace("recallq", self._worker.namespace) for name in names]

    async def __aenter__(self) -> Self:
        for tenant in self._tenants:
            client = MemoryClient(self._worker.url, namespace=self._worker.namespace, tenant=tenant)
            self._clients[tenant] = await self._stack.enter_async_context(client)
        # What a story that failed left behind.
        await asyncio.gather(*(self._clients[t].delete_memory(u) for t, u in self._model))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def run(self, step: Step) -> None:
        match step:
            case Adds():
                await self._adds(step)
            case Delete():
                await self._delete(step)
            case Look():
                await self._look(step)

    # --- the steps ------------------------------------------------------------------------------

    async def _adds(self, step: Adds) -> None:
        calls: list[Awaitable[int]] = []
        expected: list[int] = []
        together: set[tuple[Scope, str]] = set()
        for add in step.adds:
            tenant, user, named = self._resolve(add.who)
            scope = (tenant, user, DEFAULT_SESSION if named is None else named)
            if step.beside is not None and self._covers(step.beside, scope):
                continue  # which of the two comes first is for other tests
            key = None if add.key is None else self._keys[add.key % len(self._keys)]
            count, new = add.messages, True
            if key is not None:
                used = self._keys_used.setdefault(scope, {})
                new = key not in used
                count = used.setdefault(key, count)
                if (scope, key) in together or not count:
                    continue  # so is which of two wins, and a key whose messages were deleted
                together.add((scope, key))
            texts = [f"tea {next(_numbers)}" for _ in range(count)]
            if new:
                self._model[tenant, user] += [(scope[2], text) for text in texts]
            calls.append(self._added(add, texts, key))
            expected.append(len(texts) if new else 0)
        if step.beside is not None:  # submitted last, so that what is on its way is older than it
            expected.append(self._forget(step.beside))
            calls.append(self._deleted(step.beside))
        assert await asyncio.gather(*calls) == expected

    async def _added(self, add: Add, texts: list[str], key: str | None) -> int:
        tenant, user, session = self._resolve(add.who)
        client = self._clients[tenant]
        result: AddResult
        if add.submitted:
            handle = await client.submit_add(user, texts, session, idempotency_key=key)
            result = await client.handle(handle.id).result(30)
        else:
            result = await client.add_memory(user, texts, session, idempotency_key=key)
        assert len(result.record_ids) == len(texts)
        return result.added

    async def _delete(self, step: Delete) -> None:
        expected = self._forget(step.who)
        assert await self._deleted(step.who, submitted=step.submitted) == expected
        await self.check()

    async def _deleted(self, who: Who, *, submitted: bool = False) -> int:
        tenant, user, session = self._resolve(who)
        client = self._clients[tenant]
        result: DeleteResult
        if submitted:
            handle = await client.submit_delete(user, session)
            result = await client.handle(handle.id).result(30)
        else:
            result = await client.delete_memory(user, session)
        return result.removed

    async def _look(self, step: Look) -> None:
        tenant, user, session = self._resolve(step.who)
        client = self._clients[tenant]
        filters = {
            "page_num": step.page_num, "page_size": step.page_size, "session_id": session
        }  # fmt: skip
        listing = await client.submit_list(user, filters)
        searching = await client.submit_search(user, "tea", {"top_k": 1000, "session_id": session})
        everything = self._expected(tenant, user, session)
        first = (step.page_num - 1) * step.page_size
        page = everything[first : first + step.page_size]
        assert _said(await client.handle(listing.id).result(30)) == page
        assert Counter(_said(await client.handle(searching.id).result(30))) == Counter(everything)
        assert _said(await client.list_records(user, filters)) == page

    # --- all of it ------------------------------------------------------------------------------

    async def check(self, *, by_session: bool = True) -> None:
        """Every scope lists and finds what the model says: all of it and nothing else."""
        sessions = {None, DEFAULT_SESSION, *self._sessions} if by_session else {None}
        scopes = [(tenant, user, session) for tenant, user in self._model for session in sessions]
        lists = [
            self._clients[tenant].list_records(user, {"page_size": 1000, "session_id": session})
            for tenant, user, session in scopes
        ]
        searches = [
            self._clients[tenant].search(user, "tea", {"top_k": 1000, "session_id": session})
            for tenant, user, session in scopes
        ]
        listed, found = await asyncio.gather(asyncio.gather(*lists), asyncio.gather(*searches))
        for scope, records, hits in zip(scopes, listed, found, strict=True):
            assert _said(records) == self._expected(*scope), f"listed in {scope!r}"
            assert Counter(_said(hits)) == Counter(self._expected(*scope)), f"found in {scope!r}"

    async def end(self) -> None:
        """Deletes user after user, and each time what the others have stays."""
        await self.check()
        for tenant, user in list(self._model):
            expected = len(self._model[tenant, user])
            self._model[tenant, user] = []
            assert (await self._clients[tenant].delete_memory(user)).removed == expected
            await self.check(by_session=False)

    # --- the model ------------------------------------------------------------------------------

    def _resolve(self, who: Who) -> tuple[str, str, str | None]:
        return (
            self._tenants[who.tenant % len(self._tenants)],
            self._users[who.user % len(self._users)],
            None if who.session is None else self._sessions[who.session % len(self._sessions)],
        )

    def _covers(self, who: Who, scope: Scope) -> bool:
        tenant, user, session = self._resolve(who)
        return (tenant, user) == scope[:2] and session in (None, scope[2])

    def _forget(self, who: Who) -> int:
        """Takes a scope out of the model; how many messages that were."""
        tenant, user, _ = self._resolve(who)
        said = self._model[tenant, user]
        kept = [each for each in said if not self._covers(who, (tenant, user, each[0]))]
        self._model[tenant, user] = kept
        for scope, used in self._keys_used.items():
            if self._covers(who, scope):
                used.update(dict.fromkeys(used, 0))
        return len(said) - len(kept)

    def _expected(self, tenant: str, user: str, session: str | None) -> list[Said]:
        said = self._model[tenant, user]
        return [each for each in said if session is None or each[0] == session]


def _said(records: Iterable[StoredMessage]) -> list[Said]:
    return [(record.session_id, record.message.text) for record in records]


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["redis", "in_memory"])
def worker(
    request: pytest.FixtureRequest, redis_url: str, module_namespace: str
) -> Iterator[Worker]:
    """A running worker of each backend."""
    namespace = f"{module_namespace}-{request.param}"
    with Worker(redis_url, namespace=namespace, backend=request.param) as worker:
        yield worker


@pytest.fixture(autouse=True)
async def _watched() -> AsyncIterator[None]:
    with no_blocking():
        yield


@pytest.mark.timeout(400)  # making a failure small takes a while
@given(cast=casts(), story=stories)
@example(cast=everywhere("a", "a/a", "a%2Fa"), story=CLEARANCE)
@example(cast=everywhere("a", "a:a", "a:s:a"), story=CLEARANCE)
@example(cast=everywhere("a", "a}/{a", "{a}"), story=CLEARANCE)
@example(cast=everywhere("*", "s:*", "default"), story=CLEARANCE)
@example(cast=everywhere("\u00e9", "e\u0301", "%C3%A9"), story=CLEARANCE)
@example(cast=everywhere("a", "A", "\uff41"), story=CLEARANCE)
@example(cast=everywhere(LONG, HASHED, HASHED[1:]), story=CLEARANCE)
@example(cast=everywhere(LONG, LONG + "x", LONG[:200]), story=CLEARANCE)
@settings(
    max_examples=40,
    deadline=None,
    # Examples share a worker on purpose, and clean up after one another.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_id_reaches_into_anothers_memories(
    worker: Worker, cast: Cast, story: Sequence[Step]
) -> None:
    async with World(worker, cast) as world:
        for step in story:
            await world.run(step)
        await world.end()


async def test_a_delete_fences_off_nobody_elses_adds(worker: Worker, user: str) -> None:
    """Adds that were submitted before a delete of other sessions, and that run after it."""
    sessions = ["a", "*", "s:a", "s:*", "a:s", "default", "n", "\0"]
    async with MemoryClient(worker.url, namespace=worker.namespace) as client:
        for doomed in sessions:
            await client.add_memory(user, "tea", doomed)
            worker.signal(signal.SIGSTOP)
            try:  # while nothing runs, let both wait; the live lane is served first
                adds = [
                    await client.submit_add(owner, "tea", session, lane="bulk")
                    for session in sessions
                    for owner in (user, f"{user}:{session}", f"{user}/s:{session}")
                    if (owner, session) != (user, doomed)
                ]
                delete = await client.submit_delete(user, doomed)
            finally:
                worker.signal(signal.SIGCONT)
            assert (await delete.result(30)).removed >= 1
            assert [(await add.result(30)).added for add in adds] == [1] * len(adds), doomed
