"""mem0's platform, against a server that speaks as it does."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from blockbuster import BlockingError
from pydantic import SecretStr

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq_worker.backends.mem0 import Mem0Backend
from recallq_worker.backends.mem0.platform import Mem0Platform
from recallq_worker.settings import WorkerSettings
from tests.conftest import no_blocking
from tests.contract.extractor_conformance import (
    ExtractorConformance,
    Notes,
    add,
    everything,
    submission,
    texts,
)
from tests.loopback.mem0_api import ADD, EVENT, LIST, SEARCH, Mem0Server
from tests.loopback.mem0_events import Event
from tests.loopback.server import as_response, json_object


@asynccontextmanager
async def opened(server: Mem0Server, **options: Any) -> AsyncIterator[Mem0Platform]:
    """A started backend, watched for blocking calls."""
    backend = made(server, **options)
    with no_blocking():
        try:
            await backend.start()
            yield backend
        finally:
            await backend.stop()


def made(server: Mem0Server, *, key: str | None = None, **options: Any) -> Mem0Platform:
    settings: dict[str, Any] = {"infer": True, "timeout": 20.0, "settle": 0.4, **options}
    return Mem0Platform(SecretStr(server.api_key if key is None else key), server.url, **settings)


class TestMem0Platform(ExtractorConformance):
    @asynccontextmanager
    async def open_extractor(self, redis_url: str, namespace: str) -> AsyncIterator[Mem0Platform]:
        with Mem0Server() as server:
            async with opened(server) as backend:
                yield backend


@pytest.fixture
def server() -> Iterator[Mem0Server]:
    with Mem0Server() as server:
        yield server


@pytest.fixture
async def backend(server: Mem0Server) -> AsyncIterator[Mem0Platform]:
    async with opened(server) as backend:
        yield backend


class Answering(Mem0Server):
    """Adds take effect before they are answered, and have no event."""

    bare = False
    """Whether the answer is the list of results itself."""

    async def _add_memories(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        event = Event("ADD", body)
        scope = {"user_id": body["user_id"], "run_id": body["run_id"]}
        self._process(event, {"agent_id": None, "app_id": None, **scope})
        return as_response(event.results if self.bare else {"results": event.results})


class Silent(Mem0Server):
    """Events that succeeded do not say what came of them."""

    def _remember(self, event: Event, scope: dict[str, Any], message: dict[str, Any]) -> None:
        super()._remember(event, scope, message)
        event.results.clear()


class Moving(Mem0Server):
    """While it is listed, a memory comes or goes."""

    what = ""

    async def _list(self, request: web.Request) -> web.Response:
        answer = await super()._list(request)
        newest = self.memories[-1]
        if self.what == "goes":
            del self._memories[newest["id"]]
        elif self.what == "comes":
            self._memories["new"] = {**newest, "id": "new", "memory": "new"}
        self.what = ""
        return answer


# --- starting -----------------------------------------------------------------------------------


async def test_is_chosen_by_the_environment(
    server: Mem0Server, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setenv("RECALLQ_MEM0_MODE", "platform")
    monkeypatch.setenv("RECALLQ_MEM0_HOST", server.url + "/")
    monkeypatch.setenv("MEM0_API_KEY", server.api_key)
    monkeypatch.setenv("RECALLQ_MEM0_INFER", "false")
    backend: Mem0Backend = Mem0Backend.from_settings(WorkerSettings.load())
    assert isinstance(backend, Mem0Platform)
    await backend.start()
    try:
        assert not backend.infers(submission(user, "tea", infer=None))  # type: ignore[arg-type]
        await add(backend, submission(user, "tea"))
        assert (await backend.health()).ok
    finally:
        await backend.stop()


@pytest.mark.parametrize("key", ["m0-geheim", "geheim-ü", "geheim\n"])
async def test_a_wrong_key_is_told_at_once(server: Mem0Server, key: str) -> None:
    with pytest.raises(BackendError, match="MEM0_API_KEY") as caught:
        async with opened(server, key=key):
            pass
    assert "geheim" not in "".join(traceback.format_exception(caught.value))


async def test_says_when_nobody_is_there(server: Mem0Server) -> None:
    server.stop()
    backend = made(server)
    assert not (await backend.health()).ok
    with no_blocking(), pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1"):
        await backend.start()
    assert not (await backend.health()).ok
    await backend.stop()


async def test_does_not_wait_for_ever_to_start(server: Mem0Server) -> None:
    server.hang("/v1/ping/", 60)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        async with opened(server, timeout=0.5):
            pass
    assert time.monotonic() - began < 15


async def test_is_unwell_when_the_platform_is(server: Mem0Server, backend: Mem0Platform) -> None:
    server.fail("/v1/ping/", 503, times=1)
    health = await backend.health()
    assert (health.ok, "503" in health.detail) == (False, True)
    server.api_key = "another"
    assert "MEM0_API_KEY" in (await backend.health()).detail
    await asyncio.to_thread(server.stop)
    assert not (await backend.health()).ok


async def test_is_watched_for_blocking_calls(backend: Mem0Platform) -> None:
    with pytest.raises(BlockingError):
        time.sleep(0.001)  # noqa: ASYNC251  # so that the other tests mean something


# --- extracting ---------------------------------------------------------------------------------


async def test_follows_an_event_that_takes_a_while(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    server.processing_time = 1.5
    notes = Notes()
    (done,) = await backend.extract([submission(user, "tea")], notes)
    assert [done.record_ids] == [[each["id"]] for each in server.memories]
    assert server.adds == 1
    assert 3 <= server.event_polls <= 10
    assert notes.last["event"] == server.events[0].id
    assert [sorted(each) for each in notes.intents] == [
        ["extraction", "run_id", "user_id"],
        ["event", "extraction", "run_id", "user_id"],
    ]
    (memory,) = server.memories
    assert memory["metadata"]["recallq_extraction"] == notes.last["extraction"]


async def test_an_event_that_fails_is_tried_again(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    server.fail_events = 1
    notes, given = Notes(), [submission(user, "tea")]
    with pytest.raises(BackendUnavailable, match="process"):
        await backend.extract(given, notes)
    assert await backend.recover(given, notes.last) is None
    assert len(await add(backend, *given)) == 1
    assert texts(await everything(backend, user)) == ["tea"]


async def test_what_an_event_leaves_that_fails_is_removed(user: str) -> None:
    class Half(Mem0Server):
        def _process(self, event: Event, scope: dict[str, Any]) -> None:
            super()._process(event, scope)
            event.status = "FAILED"

    with Half() as server:
        async with opened(server) as backend:
            notes = Notes()
            with pytest.raises(BackendUnavailable):
                await backend.extract([submission(user, "tea", "milk")], notes)
            assert await everything(backend, user) == []
            assert len(server.events) == 1


async def test_bears_failures_while_it_follows(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    server.fail(EVENT, 500, times=1)
    server.cut(EVENT, times=1)
    server.fail(EVENT, 404, times=1, after=True)
    (done,) = await add(backend, submission(user, "tea"))
    assert done.added == 1
    server.fail(EVENT, 429, headers={"Retry-After": "30"})
    with pytest.raises(BackendUnavailable) as caught:
        await add(backend, submission(user, "milk"))
    assert caught.value.retry_after == 30


async def test_an_event_that_is_not_known_any_more_is_looked_for_by_its_key(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    notes, given = Notes(), [submission(user, "tea")]
    (done,) = await backend.extract(given, notes)
    server.fail(EVENT, 404)
    assert await backend.recover(given, notes.last) == [done]
    assert await backend.recover([], notes.last) is None
    assert server.memories == []


@pytest.mark.parametrize("bare", [False, True])
async def test_understands_answers_without_event(user: str, *, bare: bool) -> None:
    with Answering() as server:
        server.bare = bare
        async with opened(server) as backend:
            notes, given = Notes(), [submission(user, "tea", "milk")]
            (done,) = await backend.extract(given, notes)
            assert done.record_ids == [each["id"] for each in server.memories]
            assert (done.added, server.event_polls, len(notes.intents)) == (2, 0, 1)
            assert await backend.recover(given, notes.last) == [done]
            server.cut(ADD, times=1, after=True)
            notes, given = Notes(), [submission(user, "bread")]
            with pytest.raises(BackendUnavailable):
                await backend.extract(given, notes)
            (found,) = await backend.recover(given, notes.last) or []
            assert found.record_ids == [server.memories[-1]["id"]]
            assert texts(await everything(backend, user)) == ["tea", "milk", "bread"]


@pytest.mark.parametrize("kind", [Mem0Server, Silent])
async def test_understands_results_of_every_shape(kind: type[Mem0Server], user: str) -> None:
    with kind() as server:
        server.flat_results = True
        async with opened(server) as backend:
            (done,) = await add(backend, submission(user, "tea", "milk"))
            assert done.record_ids == [each["id"] for each in server.memories]


# --- what is lost on the way --------------------------------------------------------------------


@pytest.mark.parametrize("infer", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
async def test_an_add_whose_answer_was_lost_is_found(
    server: Mem0Server, backend: Mem0Platform, user: str, *, infer: bool, wanted: bool
) -> None:
    server.cut(ADD, after=True)
    notes, given = Notes(), [submission(user, "tea", "milk", infer=infer)]
    with pytest.raises(BackendUnavailable):
        await backend.extract(given, notes)
    assert "event" not in notes.last
    found = await backend.recover(given if wanted else [], notes.last)
    assert server.adds == 1
    if wanted:
        assert found is not None
        assert found[0].record_ids == [each["id"] for each in server.memories]
        assert texts(await everything(backend, user)) == ["tea", "milk"]
    else:
        assert found is None
        assert server.memories == []


@pytest.mark.parametrize("fault", ["cut", "hang", "fail"])
async def test_an_add_that_did_not_arrive_leaves_nothing(
    server: Mem0Server, user: str, fault: str
) -> None:
    if fault == "cut":
        server.cut(ADD, times=1)
    elif fault == "hang":
        server.hang(ADD, 60, times=1)
    else:
        server.fail(ADD, 504, times=1)
    async with opened(server, timeout=2.0) as backend:
        notes, given = Notes(), [submission(user, "tea")]
        with pytest.raises(BackendUnavailable):
            await backend.extract(given, notes)
        assert server.adds == 1
        assert await backend.recover(given, notes.last) is None
        assert await everything(backend, user) == []


async def test_a_turn_that_ends_while_the_add_is_processed_is_recovered(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    server.processing_time = 3.0
    notes, given = Notes(), [submission(user, "tea")]
    task = asyncio.create_task(backend.extract(given, notes))
    await asyncio.to_thread(server.wait_for_request, EVENT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.events[0].status == "PENDING"
    (found,) = await backend.recover(given, notes.last) or []
    assert found.record_ids == [each["id"] for each in server.memories]
    assert server.adds == 1


async def test_a_turn_that_ends_while_the_add_is_sent_keeps_its_event(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    notes, given = Notes(), [submission(user, "tea")]
    with server.hold(ADD, after=True) as held:
        task = asyncio.create_task(backend.extract(given, notes))
        await asyncio.to_thread(server.wait_for_request, ADD)
        for _ in range(2):  # who is told twice, does not lose it either
            task.cancel()
            await asyncio.sleep(0.1)
        assert not task.done()
        assert len(notes.intents) == 1
        held.release()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert notes.last["event"] == server.events[0].id
    assert len(await backend.recover(given, notes.last) or []) == 1
    assert len(server.memories) == server.adds == 1


async def test_who_is_cancelled_does_not_wait_for_ever(server: Mem0Server, user: str) -> None:
    async with opened(server, timeout=2.0) as backend:
        notes = Notes()
        server.hang(ADD, 60)
        task = asyncio.create_task(backend.extract([submission(user, "tea")], notes))
        await asyncio.to_thread(server.wait_for_request, ADD)
        task.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 15


async def test_says_that_an_add_is_still_processed(server: Mem0Server, user: str) -> None:
    server.processing_time = 60
    async with opened(server, patience=0.4) as backend:
        notes, given = Notes(), [submission(user, "tea")]
        with pytest.raises(BackendUnavailable):
            await backend.extract(given, notes)
        with pytest.raises(BackendUnavailable, match="still"):
            await backend.recover(given, notes.last)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, BackendError, "400"), (401, BackendError, "MEM0_API_KEY"),
        (403, BackendError, "MEM0_API_KEY"), (404, BackendError, "404"),
        (422, BackendError, "422"), (307, BackendError, "RECALLQ_MEM0_HOST"),
        (429, BackendUnavailable, "429"), (500, BackendUnavailable, "500"),
        (502, BackendUnavailable, "502"), (200, BackendUnavailable, "JSON"),
    ],
)  # fmt: skip
async def test_every_status_has_its_error(
    server: Mem0Server,
    backend: Mem0Platform,
    user: str,
    status: int,
    error: type[JobError],
    words: str,
) -> None:
    scope = Scope("default", user)
    await add(backend, submission(user, "tea"))
    for path in (ADD, LIST + "$", SEARCH, "DELETE"):
        server.fail(path, status, body="<html>geheim</html>")
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: add(backend, submission(user, "tea")),
        lambda: everything(backend, user),
        lambda: backend.search(scope, "tea", top_k=3, score_threshold=None),
    ]
    for call in calls:
        with pytest.raises(JobError, match=words) as caught:
            await call()
        assert type(caught.value) is error
    server.faults[1].left = 0  # listing works, deleting does not
    with pytest.raises(JobError, match=words) as caught:
        await backend.delete(scope, before_epoch=1)
    assert type(caught.value) is error


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("1.5", 1.5)])
async def test_waits_as_long_as_it_is_told(
    server: Mem0Server, backend: Mem0Platform, user: str, header: str, seconds: float
) -> None:
    for path in (ADD, SEARCH):
        server.fail(path, 429, times=1, headers={"Retry-After": header})
    notes, given = Notes(), [submission(user, "tea")]
    with pytest.raises(BackendUnavailable) as caught:
        await backend.extract(given, notes)
    assert caught.value.retry_after == seconds
    # A refusal needs no looking for what came of it, which would be refused too.
    server.reset_counts()
    assert await backend.recover(given, notes.last) is None
    assert server.requests == []
    with pytest.raises(BackendUnavailable) as caught:
        await backend.search(Scope("default", user), "tea", top_k=1, score_threshold=None)
    assert caught.value.retry_after == seconds


async def test_tells_nobody_what_was_said_and_who_said_it(
    server: Mem0Server, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    user, said = f"{user}-geheim", "tea-geheim"
    server.api_key = "m0-geheim"
    errors: list[BaseException] = []
    async with opened(server, patience=0.4) as backend:
        assert "geheim" not in f"{backend!r} {vars(backend)!r}"
        await add(backend, submission(user, said, "geheim"))
        for status in (400, 401, 404, 429, 500, 302):
            server.fail("/memories/", status, body={"detail": f"geheim {said} {user}"})
            for call in (
                add(backend, submission(user, said)),
                everything(backend, user),
                backend.search(Scope("default", user), said, top_k=1, score_threshold=None),
            ):
                with pytest.raises(JobError) as caught:
                    await call
                errors.append(caught.value)
            server.clear_faults()
            server.fail("DELETE", status, body="geheim")
            with pytest.raises(JobError) as caught:
                await backend.delete(Scope("default", user), before_epoch=1)
            errors.append(caught.value)
            server.clear_faults()
        server.cut("DELETE")
        with pytest.raises(BackendUnavailable) as lost:
            await backend.delete(Scope("default", user), before_epoch=1)
        errors.append(lost.value)
        server.clear_faults()
        assert await backend.delete(Scope("default", user), before_epoch=1) == 2
    for error in errors:
        # The lines of code that a traceback shows are ours, and this test's.
        shown = "".join(traceback.format_exception_only(error))
        assert "geheim" not in shown
        assert error.__suppress_context__
    assert "geheim" not in caplog.text


# --- reading and deleting -----------------------------------------------------------------------


@pytest.mark.parametrize(("what", "count"), [("goes", 149), ("comes", 151)])
async def test_a_list_that_changes_while_it_is_read(user: str, what: str, count: int) -> None:
    with Moving() as server:
        async with opened(server) as backend:
            said = [f"fact {number}" for number in range(150)]
            await add(backend, submission(user, *said, infer=False))
            server.what = what
            found = texts(await everything(backend, user))
            assert len(set(found)) == len(found)
            assert set(said[:-1]) <= set(found)
            assert len(found) == count


async def test_memories_that_are_not_ours_are_shown_and_deleted(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    await add(backend, submission(user, "tea", epoch=3))
    ours = server.memories[0]
    foreign = {**ours, "id": "foreign", "metadata": None, "run_id": None, "memory": "milk"}
    server._memories["foreign"] = {**foreign, "created_at": "2020-01-01T00:00:00Z"}
    found = await everything(backend, user)
    assert texts(found) == ["milk", "tea"]
    assert (found[0].epoch, found[0].scope.session_id) == (0, "default")
    assert await backend.delete(Scope("default", user), before_epoch=3) == 1
    assert texts(await everything(backend, user)) == ["tea"]


async def test_a_delete_ends_when_it_has_taken_effect(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    server.deletion_time = 0.5
    await add(backend, submission(user, "tea"))
    assert await backend.delete(Scope("default", user), before_epoch=1) == 1
    assert await everything(backend, user) == []
    await add(backend, submission(user, "milk", epoch=1))
    await asyncio.sleep(0.6)
    assert texts(await everything(backend, user)) == ["milk"]
    assert server.deletes == 1


async def test_a_delete_without_event_ends_when_the_list_is_empty(
    server: Mem0Server, user: str
) -> None:
    server.deletion_time = 0.8
    async with opened(server, settle=0.1) as backend:
        await add(backend, submission(user, "tea"))
        server.fail(EVENT, 404)
        assert await backend.delete(Scope("default", user), before_epoch=1) == 1
        assert server.memories == []


async def test_a_delete_that_does_not_end_is_tried_again(server: Mem0Server, user: str) -> None:
    server.deletion_time = 60
    async with opened(server, patience=0.4) as backend:
        await add(backend, submission(user, "tea"))
        with pytest.raises(BackendUnavailable):
            await backend.delete(Scope("default", user), before_epoch=1)
        server.deletion_time = 0.0
        assert await backend.delete(Scope("default", user), before_epoch=1) == 1


async def test_deletes_what_is_gone_already(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    await add(backend, submission(user, "tea", "milk"))
    await add(backend, submission(user, "new", epoch=1))
    server.fail("DELETE /v1/memories/", 404, times=2, after=True)
    assert await backend.delete(Scope("default", user), before_epoch=1) == 2
    assert texts(await everything(backend, user)) == ["new"]


async def test_costs_a_request_for_each_hundred_memories(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    await add(backend, submission(user, *(f"fact {n}" for n in range(250)), infer=False))
    server.reset_counts()
    found = await backend.list(Scope("default", user), offset=240, limit=20)
    assert texts(found) == [f"fact {n}" for n in range(240, 250)]
    assert server.lists == 3


async def test_a_long_conversation_is_not_repeated_in_each_memory(
    server: Mem0Server, backend: Mem0Platform, user: str
) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": f"{n} " + "word " * 200} for n in range(20)
    ]
    await add(backend, submission(user, messages=messages, infer=False))
    assert "recallq_message" not in server.memories[0]["metadata"]
    assert len(await everything(backend, user)) == 20
