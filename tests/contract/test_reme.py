"""ReMe as a backend, against a loopback OpenAI server and a real Redis."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable, ConfigurationError, InternalError
from recallq_worker.backends.base import MemoryExtractor
from recallq_worker.backends.reme import RemePersonal, RemeTask
from recallq_worker.backends.reme.backend import RemeBackend
from recallq_worker.backends.reme.settings import RemeSettings
from recallq_worker.settings import WorkerSettings
from tests.contract.extractor_conformance import ExtractorConformance, Notes, everything, submission
from tests.loopback.elasticsearch_api import ElasticsearchServer
from tests.loopback.faults import HttpFailure
from tests.loopback.openai_api import Answer, OpenAIServer
from tests.loopback.qdrant_api import QdrantServer
from tests.loopback.reme_prompts import ReMeAnswers
from tests.postgres import PostgresServer
from tests.support import clean_environment, redis_at

CHAT, EMBEDDINGS = "/v1/chat", "/v1/embeddings"
DIMENSIONS = 256


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with reme_server() as server:
        yield server


def reme_server() -> OpenAIServer:
    server = OpenAIServer()
    server.answer = ReMeAnswers()
    return server


def reme(
    kind: type[RemeBackend],
    server: OpenAIServer,
    redis_url: str,
    namespace: str,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> RemeBackend:
    """A backend that is not started."""
    params = {"api_key": server.api_key, "base_url": server.base_url}
    config: dict[str, Any] = {
        "llm": {"default": {"params": params}},
        "embedding_model": {"default": {"params": {**params, "dimensions": DIMENSIONS}}},
        # Within one add, ReMe drops experiences that resemble each other: what tests say does.
        "flow": {
            "summary_task_memory": {
                "flow_content": (
                    "TrajectoryPreprocessOp() >> (SuccessExtractionOp() | FailureExtractionOp()"
                    " | ComparativeExtractionOp()) >> MemoryValidationOp()"
                    " >> MemoryDeduplicationOp(similarity_threshold=0.999) >> UpdateVectorStoreOp()"
                )
            }
        },
        **(given or {}),
    }
    settings = WorkerSettings.load(
        redis_url=redis_url, namespace=namespace, backend=kind.name, slow_timeout=5.0, **options
    )
    return kind(settings, RemeSettings(config=json.dumps(config)))


@asynccontextmanager
async def opened(backend: RemeBackend) -> AsyncIterator[RemeBackend]:
    try:
        await backend.start()
        yield backend
    finally:
        await backend.stop()


@pytest.fixture(params=[RemePersonal, RemeTask], ids=["personal", "task"])
def kind(request: pytest.FixtureRequest) -> type[RemeBackend]:
    found: type[RemeBackend] = request.param
    return found


@pytest.fixture
async def backend(
    kind: type[RemeBackend], server: OpenAIServer, redis_url: str, namespace: str
) -> AsyncIterator[RemeBackend]:
    async with opened(reme(kind, server, redis_url, namespace)) as backend:
        yield backend


async def texts(backend: MemoryExtractor, user: str, session: str | None = None) -> list[str]:
    found = await backend.list(Scope("default", user, session), offset=0, limit=1000)
    return [str(each.message["content"]) for each in found]


class OnRedis(ExtractorConformance):
    kind: type[RemeBackend]

    @asynccontextmanager
    async def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AsyncIterator[MemoryExtractor]:
        with reme_server() as server:
            async with opened(reme(self.kind, server, redis_url, namespace)) as backend:
                yield backend


class TestPersonal(OnRedis):
    kind = RemePersonal


class TestTask(OnRedis):
    kind = RemeTask


class OnAStoreOfReMes(ExtractorConformance):
    """Vectors elsewhere, the rest in Redis."""

    @abstractmethod
    def store(self) -> AbstractContextManager[dict[str, Any]]:
        """A server of the store's, and what the ReMe configuration says of it."""

    @asynccontextmanager
    async def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AsyncIterator[MemoryExtractor]:
        with reme_server() as server, self.store() as store:
            given = {"vector_store": {"default": store}}
            async with opened(reme(RemePersonal, server, redis_url, namespace, given)) as backend:
                yield backend


class TestOnQdrant(OnAStoreOfReMes):
    @contextmanager
    def store(self) -> Iterator[dict[str, Any]]:
        with QdrantServer() as qdrant:
            yield {"backend": "qdrant", "params": {"url": qdrant.url}}
            # Its two clients ask for the version in threads, whenever they come to it.
            qdrant.wait_for_request("GET /$", 2)


class TestOnElasticsearch(OnAStoreOfReMes):
    @contextmanager
    def store(self) -> Iterator[dict[str, Any]]:
        with ElasticsearchServer() as elastic:
            yield {"backend": "elasticsearch", "params": {"hosts": elastic.url}}


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as postgres:
        yield postgres


class TestOnPgvector(OnAStoreOfReMes):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: PostgresServer) -> None:
        self.postgres = postgres

    @contextmanager
    def store(self) -> Iterator[dict[str, Any]]:
        yield {"backend": "pgvector", "params": {"connection_string": self.postgres.url}}

    async def test_its_vectors_have_dimensions_of_their_own(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which are noted in Redis, where its rows have none."""
        with reme_server() as server, self.store() as store:
            given = {"vector_store": {"default": store}}
            async with opened(reme(RemePersonal, server, redis_url, namespace, given)) as backend:
                await backend.extract([submission("ann", "tea is green")], Notes())
            async with redis_at(redis_url) as redis:
                await redis.delete(f"{namespace}:reme_personal:vectors")  # as an eviction would
            async with opened(reme(RemePersonal, server, redis_url, namespace, given)) as backend:
                assert await texts(backend, "ann") == ["tea is green"]
            monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", "512")
            with pytest.raises(ConfigurationError, match="have vectors of 256 dimensions"):
                async with opened(reme(RemePersonal, server, redis_url, namespace, given)):
                    pass

    async def test_flows_take_turns_with_everybody_else(
        self, redis_url: str, namespace: str
    ) -> None:
        """The store has one connection, and ReMe's flow for tasks searches, too."""
        given = {"vector_store": {"default": {
            "backend": "pgvector", "params": {"connection_string": self.postgres.url}
        }}}  # fmt: skip
        with reme_server() as server:
            async with opened(reme(RemeTask, server, redis_url, namespace, given)) as backend:
                for _ in range(2):
                    adds = (
                        backend.extract([submission(f"u{n}", f"fact {n} is new")], Notes())
                        for n in range(16)
                    )
                    await asyncio.gather(*adds)
                for n in range(16):
                    assert await texts(backend, f"u{n}") == [f"fact {n} is new"] * 2

    async def test_a_connection_that_says_nothing_is_left(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Closing it would wait for an answer as well, and everybody else with it."""
        monkeypatch.setattr("recallq_worker.backends.reme.foreign._PATIENCE", 1.0)
        scope = Scope("default", "ann")
        with reme_server() as server, self.store() as store:
            given = {"vector_store": {"default": store}}
            async with opened(reme(RemePersonal, server, redis_url, namespace, given)) as backend:
                await backend.extract([submission("ann", "tea is green")], Notes())
                with self.postgres.frozen_connections():
                    with pytest.raises(BackendUnavailable, match="asking pgvector"):
                        await backend.search(scope, "tea", top_k=3, score_threshold=None)
                    (hit,) = await backend.search(scope, "tea", top_k=3, score_threshold=None)
                    assert hit.record.message["content"] == "tea is green"

    async def test_an_outage_is_over_when_it_is_over(self, redis_url: str, namespace: str) -> None:
        with reme_server() as server, self.store() as store:
            given = {"vector_store": {"default": store}}
            async with opened(reme(RemePersonal, server, redis_url, namespace, given)) as backend:
                await backend.extract([submission("ann", "tea is green")], Notes())
                self.postgres.stop()
                try:
                    for _ in range(2):
                        with pytest.raises(BackendUnavailable, match="asking pgvector"):
                            await backend.extract([submission("ann", "snow fell")], Notes())
                finally:
                    self.postgres.start()
                await backend.extract([submission("ann", "snow fell")], Notes())
                assert await texts(backend, "ann") == ["tea is green", "snow fell"]


class TestWhatGoesWrong:
    @pytest.mark.parametrize("status", [429, 500, 503, 529, 408])
    async def test_passing(
        self, backend: RemeBackend, server: OpenAIServer, user: str, status: int
    ) -> None:
        server.fail(CHAT, status, times=1, headers={"Retry-After": "7"})
        with pytest.raises(BackendUnavailable, match=f"HTTP {status}") as caught:
            await backend.extract([submission(user, "tea is green")], Notes())
        assert caught.value.retry_after == 7
        assert server.chats == 1, "tried again behind our back"
        assert await texts(backend, user) == []
        await backend.extract([submission(user, "tea is green")], Notes())
        assert await texts(backend, user) == ["tea is green"]

    async def test_embeddings_that_fail_for_now(
        self, backend: RemeBackend, server: OpenAIServer, user: str
    ) -> None:
        server.fail(EMBEDDINGS, 500)
        notes = Notes()
        with pytest.raises(BackendUnavailable, match="HTTP 500"):
            await backend.extract([submission(user, "tea is green", "snow fell")], notes)
        assert notes.intents == []
        server.clear_faults()
        assert await texts(backend, user) == []

    @pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
    @pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
    async def test_for_good(
        self, backend: RemeBackend, server: OpenAIServer, user: str, path: str, status: int
    ) -> None:
        server.fail(path, status)
        with pytest.raises(BackendError, match=f"HTTP {status}"):
            await backend.extract([submission(user, "tea is green")], Notes())
        server.clear_faults()
        assert await texts(backend, user) == []

    @pytest.mark.parametrize("number", [0, 1, 2])
    async def test_whichever_of_the_chats_fails(
        self, backend: RemeBackend, server: OpenAIServer, user: str, number: int
    ) -> None:
        """ReMe would go on without what that one was to say."""
        asked: list[str] = []
        answers = ReMeAnswers()

        def answer(body: dict[str, Any]) -> Any:
            asked.append("")
            if len(asked) == number + 1:
                return HttpFailure(500)
            return answers(body)

        server.answer = answer
        notes, given = Notes(), submission(user, "tea is green", "I met Bob today", "snow fell")
        with pytest.raises(BackendUnavailable, match="HTTP 500"):
            await backend.extract([given], notes)
        assert notes.intents == []
        assert await texts(backend, user) == []

    async def test_a_stream_that_breaks_off(
        self, backend: RemeBackend, server: OpenAIServer, user: str
    ) -> None:
        server.answers.append(Answer("one two three four", cut_after=2))
        with pytest.raises(BackendUnavailable, match=r"RemoteProtocolError|Connection"):
            await backend.extract([submission(user, "tea is green")], Notes())
        assert await texts(backend, user) == []

    @pytest.mark.parametrize("code", [None, "rate_limit", 503])
    async def test_a_stream_that_ends_with_an_error(
        self,
        backend: RemeBackend,
        server: OpenAIServer,
        user: str,
        caplog: pytest.LogCaptureFixture,
        code: object,
    ) -> None:
        error = {"message": "overloaded; you said: secret", "code": code, "type": "server_error"}
        server.answers.append(Answer("Result: <1> <3>", error=error))
        with pytest.raises(BackendUnavailable, match="broke off its answer") as caught:
            await backend.extract([submission(user, "a secret")], Notes())
        assert "secret" not in caplog.text + str(caught.value)
        assert await texts(backend, user) == []

    async def test_what_nobody_has_foreseen_is_told_without_its_words(
        self,
        backend: RemeBackend,
        user: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("secret")

        monkeypatch.setattr(backend._running.storage, "get", broken)
        with pytest.raises(InternalError, match="RuntimeError; see the worker's log"):
            await backend.recover([], {"owner": "x", "ids": ["a"], "deleted": []})
        assert "in broken" in caplog.text
        assert "secret" not in caplog.text.replace('RuntimeError("secret")', "")

    async def test_cancelled_while_one_of_its_steps_fails(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        """It is cancelled, and has not failed."""
        answers = ReMeAnswers()

        def answer(body: dict[str, Any]) -> Any:
            reply = answers(body)
            return HttpFailure(500) if answers.asked[-1] == "observation" else reply

        server.answer = answer
        given = submission("ann", "I like tea", "I met Bob today")
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            for wait in (0.0, 0.01, 0.02, 0.03, 0.05):
                task = asyncio.create_task(backend.extract([given], Notes()))
                await asyncio.sleep(wait)
                task.cancel()
                with pytest.raises((asyncio.CancelledError, BackendUnavailable)) as caught:
                    await task
                assert task.cancelled() or "HTTP 500" in str(caught.value)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("", "empty"),
            (" \n", "empty"),
            ("I cannot help with that.", "judges no message|not JSON"),
            (Answer("Result: <1> <3>", finish_reason="length"), "cut off"),
            ('```json\n[{"when_to_use": "always"}]\n```', "judges no message|something else"),
            ('```json\n[{"when_to_use": "always", "experience": 3}]\n```', "no message|else"),
            ('```json\n["tea"]\n```', "judges no message|something else"),
        ],
    )
    async def test_an_answer_that_is_no_answer(
        self, backend: RemeBackend, server: OpenAIServer, user: str, answer: Any, reason: str
    ) -> None:
        server.answers.append(answer)
        with pytest.raises(BackendUnavailable, match=reason):
            await backend.extract([submission(user, "tea is green")], Notes())
        assert await texts(backend, user) == []
        await backend.extract([submission(user, "tea is green")], Notes())
        assert await texts(backend, user) == ["tea is green"]

    async def test_too_much_at_once_is_told_from_too_much(
        self, backend: RemeBackend, server: OpenAIServer, user: str
    ) -> None:
        """Cut off, together they will be again: each is to go by itself."""
        server.answers.append(Answer("Result: <1>", finish_reason="length"))
        given = [submission(user, "tea is green"), submission(user, "snow fell")]
        with pytest.raises(BackendError, match="cut off"):
            await backend.extract(given, Notes())

    async def test_a_server_that_does_not_answer(
        self, kind: type[RemeBackend], server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        async with opened(reme(kind, server, redis_url, namespace)) as backend:
            server.hang(CHAT, 30)
            with pytest.raises(BackendUnavailable, match="Timeout"):
                await backend.extract([submission("ann", "tea is green")], Notes())

    async def test_cancelled_it_asks_nothing_more(
        self, backend: RemeBackend, server: OpenAIServer, user: str
    ) -> None:
        with server.hold(CHAT):
            task = asyncio.create_task(
                backend.extract([submission(user, "tea is green", "I met Bob today")], Notes())
            )
            await asyncio.to_thread(server.wait_for_request, CHAT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert server.chats == 1
        assert await texts(backend, user) == []

    async def test_errors_and_logs_quote_nobody(
        self,
        backend: RemeBackend,
        server: OpenAIServer,
        user: str,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        caplog.set_level("DEBUG", "recallq_worker")
        for failure in (HttpFailure(500, "secret"), "secret, not JSON", HttpFailure(400, "secret")):
            server.answers.append(failure)
            with pytest.raises((BackendError, BackendUnavailable)) as caught:
                await backend.extract([submission(user, "a secret of mine")], Notes())
            assert "secret" not in str(caught.value)
        await backend.extract([submission(user, "a secret of mine")], Notes())
        assert len(await texts(backend, user)) == 1
        assert "secret" not in caplog.text
        assert capfd.readouterr() == ("", "")

    async def test_health_says_what_is_wrong(
        self, backend: RemeBackend, server: OpenAIServer
    ) -> None:
        assert (await backend.health()).ok
        server.fail("/v1/models", 401)
        health = await backend.health()
        assert not health.ok
        assert "check the key" in health.detail
        server.clear_faults()
        server.fail("/v1/models", 404)  # not every server has it
        assert (await backend.health()).ok
        server.stop()
        health = await backend.health()
        assert not health.ok


class TestWhatReMeWouldLose:
    async def test_long_messages_are_read_whole(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        said = "my first word " + "and so on " * 100 + "a needle " + "and so on " * 100 + "the end"
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract([submission("ann", said)], Notes())
            assert await texts(backend, "ann") == [said]

    async def test_more_than_fifty_facts_at_once(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        said = [f"fact number {number}" for number in range(60)]
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract([submission("ann", *said)], Notes())
            assert sorted(await texts(backend, "ann")) == sorted(said)

    async def test_a_validation_without_a_fence_counts(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        answers = ReMeAnswers()
        async with opened(reme(RemeTask, server, redis_url, namespace)) as backend:

            def answer(body: dict[str, Any]) -> Any:
                reply = answers(body)
                return '{"is_valid": false, "score": 0.1}' if _validates(answers) else reply

            server.answer = answer
            await backend.extract([submission("ann", "tea is green")], Notes())
            assert await texts(backend, "ann") == []

    @pytest.mark.parametrize("said", ["roses\u2028violets", "roses\x85violets", "\ufeffroses"])
    async def test_characters_that_some_take_for_the_end_of_a_line(
        self, backend: RemeBackend, user: str, said: str
    ) -> None:
        await backend.extract([submission(user, said)], Notes())
        (text,) = await texts(backend, user)
        assert text.split() == said.split()

    async def test_tasks_that_resemble_each_other_are_all_kept(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        """Waiting together, they fare as they would one by one."""
        given = [
            submission("ann", f"before you deploy service {n} check its config") for n in range(5)
        ]
        backend = reme(RemeTask, server, redis_url, namespace, {"flow": {}})
        async with opened(backend):
            done = await backend.extract(given, Notes())
            assert [each.added for each in done] == [5, 0, 0, 0, 0]
            assert await texts(backend, "ann") == [each.messages[0]["content"] for each in given]
            found = await everything(backend, "ann")
            assert [each.order for each in found] == [each.order for each in given]

    async def test_memories_are_listed_as_they_were_said(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        """ReMe lists those that speak of a time by themselves, and the latest first."""
        given = [
            submission("ann", "one today", "two is red"),
            submission("ann", "three is blue", "four tomorrow"),
        ]
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract(given, Notes())
            said = ["one today", "two is red", "three is blue", "four tomorrow"]
            assert await texts(backend, "ann") == said
            orders = [each.order for each in await everything(backend, "ann")]
            assert orders == [given[0].order] * 2 + [given[1].order] * 2

    async def test_a_message_is_read_as_of_when_it_was_said(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        nine_years = 9 * 365 * 24 * 3600 * 1_000_000
        given = submission("ann", "I met Bob yesterday", order=-nine_years)
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract([given], Notes())
        prompt = str(server.requests_to(CHAT)[-1].body)
        assert "2017" in prompt.rpartition("I met Bob yesterday")[0][-100:]

    async def test_what_reme_notes_of_a_memory_is_told(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        server.answers += [
            "Result: <1> <3>",
            "Information: <1> <May 3, 2026> <ann meets Bob> <Bob>",
        ]
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract([submission("ann", "I meet Bob tomorrow")], Notes())
            (found,) = await everything(backend, "ann")
        assert found.message["content"] == "ann meets Bob"
        assert found.message["when_to_use"] == "Bob"
        assert found.message["reme"]["time_info"] == "May 3, 2026"
        assert found.message["reme"]["source_message"] == "I meet Bob tomorrow"

    async def test_what_the_llm_finds_contained_is_left_out(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        answers = ReMeAnswers()
        answers.judgments["again"] = "Contained"
        answers.scores["boring"] = 0
        server.answer = answers
        said = ["tea is green", "tea is green again", "something boring"]
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            (done,) = await backend.extract([submission("ann", *said)], Notes())
            assert await texts(backend, "ann") == ["tea is green"]
            assert done.added == 1


def _validates(answers: ReMeAnswers) -> bool:
    return bool(answers.asked) and answers.asked[-1] == "validation"


class TestSettings:
    def test_all_that_is_missing_is_named_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = [
            f"FLOW_{part}_{name}"
            for part in ("LLM", "EMBEDDING")
            for name in ("BASE_URL", "API_KEY")
        ]
        for name in needed:
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ConfigurationError) as caught:
            RemePersonal.from_settings(WorkerSettings.load(backend="reme_personal"))
        assert all(name in str(caught.value) for name in needed)
        monkeypatch.setenv("FLOW_LLM_API_KEY", "sk-secret")
        monkeypatch.setenv("FLOW_LLM_BASE_URL", "http://127.0.0.1:1/v1")
        monkeypatch.setenv("RECALLQ_EMBEDDING_API_KEY", "sk-secret")
        with pytest.raises(ConfigurationError) as caught:
            RemePersonal.from_settings(WorkerSettings.load(backend="reme_personal"))
        said = str(caught.value)
        assert "FLOW_EMBEDDING_BASE_URL" in said
        assert "FLOW_LLM" not in said
        assert "API_KEY" not in said
        monkeypatch.setenv("FLOW_EMBEDDING_BASE_URL", "127.0.0.1:1/v1")
        with pytest.raises(ConfigurationError, match="must begin with http"):
            RemePersonal.from_settings(WorkerSettings.load(backend="reme_personal"))

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ("/no/such/file.yaml", "cannot be read"),
            ('{"llm": [1]}', "llm of the ReMe configuration must be an object"),
            ('{"llm": {"default": 3}}', "llm of the ReMe configuration must be an object"),
            ('{"llm": {', "RECALLQ_REME_CONFIG is not YAML"),
            ('{"lm": {}}', "has no section 'lm'"),
            ('{"llm": {"x": {"backend": "litellm"}}}', "llm.x.backend .* openai_compatible"),
            ('{"vector_store": {"default": {"backend": "memory"}}}', "workers cannot share"),
        ],
    )
    def test_a_configuration_that_cannot_be_read(self, config: str, said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            RemePersonal(WorkerSettings.load(backend="reme_personal"), RemeSettings(config=config))

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (
                {"vector_store": {"default": {"backend": "redis", "params": {"url": "x"}}}},
                "takes no params",
            ),
            (
                {"flow": {"summary_personal_memory": {"flow_content": "NoSuchOp()"}}},
                "summary_personal_memory cannot be built: NameError",
            ),
            (
                {"flow": {"summary_personal_memory": {"flow_content": "InfoFilterOp(llm='x')"}}},
                "no llm called 'x'",
            ),
            ({"thread_pool_max_workers": "many"}, "thread_pool_max_workers"),
        ],
    )
    async def test_a_configuration_that_is_wrong(
        self,
        server: OpenAIServer,
        redis_url: str,
        namespace: str,
        given: dict[str, Any],
        said: str,
    ) -> None:
        backend = reme(RemePersonal, server, redis_url, namespace, given)
        with pytest.raises(ConfigurationError, match=said):
            async with opened(backend):
                pass

    async def test_vectors_of_two_sizes_are_not_mixed(
        self, server: OpenAIServer, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract([submission("ann", "tea is green")], Notes())
            monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", "512")
            with pytest.raises(ConfigurationError, match="have vectors of 256 dimensions"):
                async with opened(reme(RemePersonal, server, redis_url, namespace)):
                    pass
            async with opened(reme(RemeTask, server, redis_url, namespace)):
                pass  # it has vectors of its own
            assert (
                len(
                    await backend.search(
                        Scope("default", "ann"), "tea", top_k=3, score_threshold=None
                    )
                )
                == 1
            )

    async def test_who_stored_nothing_binds_nobody(
        self, server: OpenAIServer, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with opened(reme(RemePersonal, server, redis_url, namespace)):
            pass
        monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", "512")
        async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
            await backend.extract([submission("ann", "tea is green")], Notes())
        monkeypatch.delenv("RECALLQ_EMBEDDING_DIMENSIONS")
        async with redis_at(redis_url) as redis:
            for claimed in (True, False):  # also of what was stored before anybody noted it
                if not claimed:
                    await redis.delete(f"{namespace}:reme_personal:vectors")
                with pytest.raises(ConfigurationError, match="have vectors of 512 dimensions"):
                    async with opened(reme(RemePersonal, server, redis_url, namespace)):
                        pass

    async def test_in_chinese(self, server: OpenAIServer, redis_url: str, namespace: str) -> None:
        backend = reme(RemePersonal, server, redis_url, namespace, {"language": "zh"})
        async with opened(backend):
            await backend.extract([submission("ann", "我喜欢龙井茶", "今天下雪了")], Notes())
            assert sorted(await texts(backend, "ann")) == ["今天下雪了", "我喜欢龙井茶"]
        prompts = json.dumps([each.body for each in server.requests_to(CHAT)], ensure_ascii=False)
        assert "信息" in prompts

    async def test_both_kinds_in_one_process(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        from flowllm.core.context import C

        before = (C.language, C.service_config, dict(C.vector_store_dict), dict(C.flow_dict))
        async with (
            opened(reme(RemePersonal, server, redis_url, namespace)) as personal,
            opened(reme(RemeTask, server, redis_url, namespace)) as task,
        ):
            await asyncio.gather(
                *(
                    each.extract([submission(f"user {n}", f"fact {n} of {each.kind}")], Notes())
                    for n in range(10)
                    for each in (personal, task)
                )
            )
            for each in (personal, task):
                for n in range(10):
                    assert await texts(each, f"user {n}") == [f"fact {n} of {each.kind}"]
        assert before == (C.language, C.service_config, C.vector_store_dict, C.flow_dict)


_IMPORT = """
import logging, os, signal, sys, threading, warnings
def state():
    return {
        "environment": dict(os.environ), "filters": [*warnings.filters],
        "root": (logging.root.level, [*logging.root.handlers]),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "signals": [signal.getsignal(each) for each in signal.valid_signals()],
        "threads": [each.name for each in threading.enumerate()], "path": [*sys.path],
    }
import recallq_worker.backends.redis, recallq_worker.backends.reme
assert "flowllm" not in sys.modules and "reme_ai" not in sys.modules
before = state()
from recallq_worker.backends.reme.loading import import_reme
done = import_reme("a test")
assert import_reme("a test") is done
assert "reme_ai" in sys.modules
after = state()
for name, value in before.items():
    assert after[name] == value, (name, value, after[name])
print(done)
"""


def test_importing_leaves_no_trace(tmp_path: Path) -> None:
    """Nothing printed, written, or changed for others; a ``.env`` file is not read."""
    (tmp_path / ".env").write_text("OPENAI_API_KEY=from a file\nFLOW_LLM_API_KEY=too\n")
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT], cwd=tmp_path, env=clean_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.fullmatch(r"ReMe 0\.3\.1\.10, imported in [\d.]+ s, \d+ MB\n", done.stdout)
    assert [each.name for each in tmp_path.iterdir()] == [".env"]
