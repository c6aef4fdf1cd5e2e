"""mem0's open-source library as a backend, against a loopback OpenAI server and a real Redis."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable, ConfigurationError
from recallq_worker.backends.base import MemoryExtractor
from recallq_worker.backends.mem0.library import Mem0Library
from recallq_worker.backends.mem0.settings import complete
from recallq_worker.models import ModelSettings
from tests.contract.extractor_conformance import ExtractorConformance, Notes, submission
from tests.loopback.openai_api import Answer, OpenAIServer
from tests.support import redis_at

CHAT, EMBEDDINGS = "/v1/chat", "/v1/embeddings"
DIMENSIONS = 256


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def library(
    server: OpenAIServer,
    redis_url: str,
    namespace: str,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Mem0Library:
    models = ModelSettings.load(
        llm_api_key=server.api_key,
        llm_base_url=server.base_url,
        embedding_api_key=server.api_key,
        embedding_base_url=server.base_url,
        embedding_dimensions=DIMENSIONS,
    )
    config = complete(given or {}, models, store_url=redis_url, namespace=namespace, infer=True)
    return Mem0Library(
        config,
        store_url=redis_url,
        namespace=namespace,
        **{"infer": True, "most_texts": 100, "timeout": 5.0, **options},
    )


@asynccontextmanager
async def opened(backend: Mem0Library) -> AsyncIterator[Mem0Library]:
    try:
        await backend.start()
        yield backend
    finally:
        await backend.stop()


@pytest.fixture
async def mem0(server: OpenAIServer, redis_url: str, namespace: str) -> AsyncIterator[Mem0Library]:
    async with opened(library(server, redis_url, namespace)) as backend:
        yield backend


async def texts(backend: MemoryExtractor, user: str, session: str | None = None) -> list[str]:
    found = await backend.list(Scope("default", user, session), offset=0, limit=1000)
    return [str(each.message["content"]) for each in found]


class TestOnRedis(ExtractorConformance):
    @asynccontextmanager
    async def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AsyncIterator[MemoryExtractor]:
        with OpenAIServer() as server:
            async with opened(library(server, redis_url, namespace)) as backend:
                yield backend


class TestOnAVectorStoreOfMem0s(ExtractorConformance):
    """Any other than ours: qdrant, whose client keeps it in memory here."""

    @asynccontextmanager
    async def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AsyncIterator[MemoryExtractor]:
        from qdrant_client import QdrantClient

        store = {
            "provider": "qdrant",
            "config": {
                "client": QdrantClient(":memory:"),
                "collection_name": "memories",
                "embedding_model_dims": DIMENSIONS,
            },
        }
        with OpenAIServer() as server:
            # In memory, qdrant bears one thread only: a server of it bears any number.
            backend = library(server, redis_url, namespace, {"vector_store": store})
            one = ThreadPoolExecutor(1)
            backend._extractors = backend._searchers = backend._readers = one
            async with opened(backend):
                yield backend


async def test_vectors_of_two_sizes_are_not_mixed(
    server: OpenAIServer, redis_url: str, namespace: str, user: str
) -> None:
    async with opened(library(server, redis_url, namespace)) as mem0:
        await mem0.extract([submission(user, "tea")], Notes())
        given = {"embedder": {"provider": "openai", "config": {
            "embedding_dims": 2 * DIMENSIONS, "model": "text-embedding-3-small",
            "openai_base_url": server.base_url, "api_key": server.api_key,
        }}}  # fmt: skip
        with pytest.raises(ConfigurationError, match=f"have vectors of {DIMENSIONS} dimensions"):
            async with opened(library(server, redis_url, namespace, given)):
                pass
        hits = await mem0.search(Scope("default", user), "tea", top_k=3, score_threshold=None)
        assert len(hits) == 1


class TestWhatGoesWrong:
    @pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 529, 408])
    async def test_passing(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, path: str, status: int
    ) -> None:
        server.fail(path, status, times=1, headers={"Retry-After": "7"})
        with pytest.raises(BackendUnavailable, match=f"HTTP {status}") as caught:
            await mem0.extract([submission(user, "tea")], Notes())
        assert caught.value.retry_after == 7
        assert server.count(path) == 1, "tried again behind our back"
        assert await texts(mem0, user) == []
        await mem0.extract([submission(user, "tea")], Notes())
        assert await texts(mem0, user) == ["tea"]

    @pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
    @pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
    async def test_for_good(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, path: str, status: int
    ) -> None:
        server.fail(path, status)
        with pytest.raises(BackendError, match=f"HTTP {status}"):
            await mem0.extract([submission(user, "tea")], Notes())
        server.clear_faults()
        assert await texts(mem0, user) == []

    @pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
    async def test_a_connection_that_is_cut(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, path: str
    ) -> None:
        server.cut(path, 1)
        with pytest.raises(BackendUnavailable, match=r"Connection|RemoteProtocolError"):
            await mem0.extract([submission(user, "tea")], Notes())
        assert await texts(mem0, user) == []

    async def test_a_server_that_does_not_answer(
        self, server: OpenAIServer, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(library(server, redis_url, namespace, timeout=2.0)) as mem0:
            server.hang(CHAT, 30)
            with pytest.raises(BackendUnavailable, match="Timeout"):
                await mem0.extract([submission(user, "tea")], Notes())

    @pytest.mark.parametrize("status", [429, 500, 400])
    async def test_memories_that_cannot_be_embedded_are_not_passed_over(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, status: int
    ) -> None:
        """mem0 would leave them out, say so in its log, and call it a success."""

        def fail_from_now_on(body: dict[str, Any]) -> Any:
            server.fail(EMBEDDINGS, status)
            return server.extract(body)

        server.answer = fail_from_now_on
        notes = Notes()
        with pytest.raises((BackendUnavailable, BackendError), match=f"HTTP {status}"):
            await mem0.extract([submission(user, "tea", "coffee", "milk")], notes)
        assert notes.intents == []
        assert server.embedding_calls == 2, "text by text, after they failed together"
        server.clear_faults()
        assert await texts(mem0, user) == []

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("", "empty"),
            ("I could not find anything.", "not JSON"),
            (Answer('{"memory": [{"text": "te', finish_reason="length"), "cut off"),
            ('{"facts": ["tea"]}', "no list of memories"),
            ('{"memory": "tea"}', "no list of memories"),
            ('["tea"]', "no list of memories"),
            ('{"memory": ["tea"]}', "without a text"),
            ('{"memory": [{"text": "milk"}, {"txt": "tea"}]}', "without a text"),
            ('{"memory": [{"text": "half \\ud83d"}]}', "half a character"),
        ],
    )
    async def test_answers_that_mem0_cannot_use_are_seen(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, answer: Any, reason: str
    ) -> None:
        server.answers.append(answer)
        with pytest.raises(BackendUnavailable, match=reason):
            await mem0.extract([submission(user, "tea")], Notes())
        assert await texts(mem0, user) == []

    @pytest.mark.parametrize("infer", [True, False])
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (CHAT, {"error": {"message": "overloaded"}}),
            (CHAT, {"choices": []}),
            (CHAT, "<html>gateway</html>"),
            (EMBEDDINGS, {"object": "list", "data": [], "model": "m"}),
            (EMBEDDINGS, {"object": "list", "data": [{"index": 0, "embedding": []}]}),
            (EMBEDDINGS, "<html>gateway</html>"),
        ],
    )
    async def test_answers_of_another_shape_are_no_defect_of_ours(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, path: str, body: Any, infer: bool
    ) -> None:
        if path == CHAT and not infer:
            return  # nobody asks
        server.fail(path, 200, body=body)
        notes = Notes()
        with pytest.raises(BackendUnavailable):
            await mem0.extract([submission(user, "tea", "milk", infer=infer)], notes)
        server.clear_faults()
        assert notes.intents == []
        assert await texts(mem0, user) == []

    async def test_an_answer_that_is_cut_off_is_asked_for_in_smaller_parts(
        self, mem0: Mem0Library, server: OpenAIServer, user: str
    ) -> None:
        adds = [submission(user, "tea"), submission(user, "milk")]
        server.answers.append(Answer('{"memory": [{"text": "te', finish_reason="length"))
        with pytest.raises(BackendError, match="cut off"):
            await mem0.extract(adds, Notes())
        server.answers.append(Answer('{"memory": [{"text": "te', finish_reason="length"))
        with pytest.raises(BackendUnavailable, match="cut off"):
            await mem0.extract(adds[:1], Notes())

    async def test_very_long_texts(
        self, mem0: Mem0Library, server: OpenAIServer, user: str
    ) -> None:
        """Embedding models refuse them; the beginning says enough to find them by."""
        long = "zebra " + "and so on " * 20_000
        await mem0.extract([submission(user, long)], Notes())
        await mem0.extract([submission(user, long, infer=False)], Notes())
        assert await texts(mem0, user) == [long.strip(), long]
        found = await mem0.search(Scope("default", user), long, top_k=2, score_threshold=None)
        assert len(found) == 2

    async def test_attributions_that_are_no_role(
        self, mem0: Mem0Library, server: OpenAIServer, user: str
    ) -> None:
        memory = {"text": "tea", "attributed_to": ["user", "assistant"]}
        server.answers.append({"memory": [memory]})
        await mem0.extract([submission(user, "tea")], Notes())
        (found,) = await mem0.list(Scope("default", user), offset=0, limit=5)
        assert found.message["role"] == "user"

    async def test_what_was_said_is_known_later_even_if_nothing_was_memorable(
        self, mem0: Mem0Library, server: OpenAIServer, user: str
    ) -> None:
        server.answers.append('{"memory": []}')
        await mem0.extract([submission(user, "my dog is called Rex")], Notes())
        await mem0.extract([submission(user, "he is brown")], Notes())
        assert "Rex" in str(server.requests_to(CHAT)[-1].body)

    @pytest.mark.parametrize(
        "answer",
        [
            '```json\n{"memory": [{"text": "tea"}]}\n```',
            'Here it is: {"memory": [{"text": "tea"}]}',
            '<think>hm</think>{"memory": [{"text": "tea", "attributed_to": "user"}]}',
        ],
    )
    async def test_answers_that_it_can_use_are_used(
        self, mem0: Mem0Library, server: OpenAIServer, user: str, answer: str
    ) -> None:
        server.answers.append(answer)
        (extracted,) = await mem0.extract([submission(user, "I like tea")], Notes())
        assert extracted.added == 1
        assert await texts(mem0, user) == ["tea"]

    async def test_nothing_to_remember_is_a_success(
        self, mem0: Mem0Library, server: OpenAIServer, user: str
    ) -> None:
        server.answers.append('{"memory": []}')
        notes = Notes()
        (extracted,) = await mem0.extract([submission(user, "hello")], notes)
        assert (extracted.record_ids, extracted.added) == ([], 0)
        assert notes.intents == []

    async def test_searching_while_the_embedder_is_down(
        self, mem0: Mem0Library, server: OpenAIServer, user: str
    ) -> None:
        server.fail(EMBEDDINGS, 429, headers={"Retry-After": "3"})
        with pytest.raises(BackendUnavailable) as caught:
            await mem0.search(Scope("default", user), "tea", top_k=3, score_threshold=None)
        assert caught.value.retry_after == 3

    async def test_keys_and_words_stay_out_of_errors_and_logs(
        self,
        server: OpenAIServer,
        redis_url: str,
        namespace: str,
        user: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.DEBUG, "recallq_worker")
        backend = library(server, redis_url, namespace)
        server.api_key = "sk-another"
        async with opened(backend):
            with pytest.raises(BackendError) as caught:
                await backend.extract([submission(user, "my secret")], Notes())
            health = await backend.health()
        said = f"{caught.value} {health} {caplog.text} {backend!r}"
        assert "check the key" in said
        assert "sk-loopback" not in said
        assert "my secret" not in said
        assert not health.ok

    async def test_vectors_of_other_dimensions(
        self, server: OpenAIServer, redis_url: str, namespace: str, user: str
    ) -> None:
        store = {"provider": "redis", "config": {"embedding_model_dims": 99}}
        backend = library(server, redis_url, namespace, {"vector_store": store})
        async with opened(backend):
            with pytest.raises(BackendError, match=f"{DIMENSIONS} dimensions.*99"):
                await backend.extract([submission(user, "tea")], Notes())

    async def test_a_configuration_that_mem0_does_not_take(
        self, server: OpenAIServer, redis_url: str, namespace: str
    ) -> None:
        given = {"llm": {"provider": "nonsense", "config": {"api_key": "sk-secret"}}}
        backend = library(server, redis_url, namespace, given)
        try:
            with pytest.raises(ConfigurationError, match="nonsense") as caught:
                await backend.start()
        finally:
            await backend.stop()
        assert "sk-secret" not in str(caught.value)


class TestCalls:
    async def test_embeddings_go_out_together(
        self, server: OpenAIServer, redis_url: str, namespace: str, user: str
    ) -> None:
        server.most_inputs = 10
        async with opened(library(server, redis_url, namespace, most_texts=10)) as mem0:
            adds = [submission(user, *(f"text {n} {m}" for m in range(5))) for n in range(5)]
            await mem0.extract(adds, Notes())
            # One for the conversation, and those for 25 memories in portions of ten.
            assert (server.chats, server.embedding_calls) == (1, 1 + 3)
            server.reset_counts()
            raw = [
                submission(user, *(f"raw {n} {m}" for m in range(5)), infer=False) for n in range(5)
            ]
            await mem0.extract(raw, Notes())
            assert (server.chats, server.embedding_calls) == (0, 3)
            server.reset_counts()
            await mem0.search(Scope("default", user), "text 3", top_k=3, score_threshold=None)
            await mem0.list(Scope("default", user), offset=0, limit=5)
            await mem0.delete(Scope("default", user), before_epoch=1)
            assert (server.chats, server.embedding_calls) == (0, 1)

    async def test_searches_do_not_wait_for_extractions(
        self, server: OpenAIServer, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(library(server, redis_url, namespace, extractions=2)) as mem0:
            await mem0.extract([submission(user, "tea")], Notes())
            with server.hold(CHAT):
                tasks = [
                    asyncio.create_task(mem0.extract([submission(f"{user}-{n}", "x")], Notes()))
                    for n in range(5)
                ]
                await asyncio.to_thread(server.wait_for_request, CHAT, 3)
                async with asyncio.timeout(30):  # they are held for as long as it takes
                    assert await mem0.search(
                        Scope("default", user), "tea", top_k=3, score_threshold=None
                    )
                assert not any(task.done() for task in tasks)
            await asyncio.gather(*tasks)

    async def test_the_last_messages_are_known_to_every_process_and_forgotten_with_the_user(
        self, server: OpenAIServer, redis_url: str, namespace: str, user: str
    ) -> None:
        def prompt() -> str:
            return str(server.requests_to(CHAT)[-1].body)

        one, two = (library(server, redis_url, namespace) for _ in range(2))
        async with opened(one), opened(two):
            await one.extract([submission(user, "the word is xylophone")], Notes())
            server.answers.append('{"memory": []}')
            await two.extract([submission(user, "and now?", session="t")], Notes())
            assert "xylophone" not in prompt(), "another session's"
            await two.extract([submission(user, "what was it?")], Notes())
            assert "xylophone" in prompt()
            await one.delete(Scope("default", user, "s"), before_epoch=1)
            await two.extract([submission(user, "and now?", epoch=1)], Notes())
            assert "xylophone" not in prompt()
            await one.extract([submission(user, "the word is zebra", epoch=1)], Notes())
            await two.delete(Scope("default", user), before_epoch=2)
            await two.extract([submission(user, "and now?", epoch=2)], Notes())
            assert "zebra" not in prompt()
        async with redis_at(redis_url) as redis:
            left = [key async for key in redis.scan_iter(f"{namespace}:*")]
            for key in left:
                assert b"zebra" not in (await redis.dump(key) or b""), key

    async def test_what_was_fenced_before_it_was_stored_is_not_stored(
        self, mem0: Mem0Library, user: str
    ) -> None:
        """As a worker finds that was frozen before it could store."""
        await mem0.delete(Scope("default", user), before_epoch=5)
        (extracted,) = await mem0.extract([submission(user, "tea", epoch=4)], Notes())
        assert (extracted.record_ids, extracted.added) == ([], 0)
        assert await texts(mem0, user) == []


def test_mem0_keeps_nothing_of_its_own_and_tells_nobody(
    server: OpenAIServer, redis_url: str, tmp_path: Path
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    program = """
import asyncio, socket, sys
connect = socket.socket.connect
def watched(self, address):
    assert address[0] in ("127.0.0.1", "localhost"), address
    return connect(self, address)
socket.socket.connect = watched
from recallq.contract import Scope
from recallq_worker.backends import registry
from recallq_worker.settings import WorkerSettings
from tests.contract.extractor_conformance import Notes, submission

async def main():
    backend = registry.load("mem0").from_settings(WorkerSettings.load(namespace="quiet"))
    await backend.start()
    await backend.extract([submission("ann", "tea")], Notes())
    assert await backend.search(Scope("default", "ann"), "tea", top_k=1, score_threshold=None)
    await backend.stop()

asyncio.run(main())
from mem0.memory import telemetry
assert telemetry.client_telemetry.posthog is None
"""
    environment = {
        **os.environ,
        "HOME": str(home),
        "MEM0_TELEMETRY": "True",
        "RECALLQ_REDIS_URL": redis_url,
        "OPENAI_API_KEY": server.api_key,
        "OPENAI_BASE_URL": server.base_url,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [*home.rglob("*"), *here.rglob("*")] == []
