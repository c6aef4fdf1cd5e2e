"""Search through the whole service: strategies of real workers, and the commands about them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recallq import MemoryClient
from tests.plugins.word_vectors import DIMENSIONS
from tests.support import Shell, Worker, eventually, one_line, redis_at

StartWorker = Callable[..., Worker]

BY_MEANING: dict[str, Any] = {
    "embedding_callable": "word_vectors:embed",
    "embedding_dimensions": DIMENSIONS,
}

TALK = {
    "speaker_a": "Ann",
    "speaker_b": "Bob",
    "session_1_date_time": "1:56 pm on 8 May, 2023",
    "session_1": [
        {"speaker": "Ann", "dia_id": "D1:1", "text": "We got a dog last week!"},
        {"speaker": "Bob", "dia_id": "D1:2", "text": "Lovely. What is it called?"},
        {"speaker": "Ann", "dia_id": "D1:3", "text": "Rex. He sleeps on the sofa."},
    ],
    "session_2_date_time": "10:00 am on 2 June, 2023",
    "session_2": [
        {"speaker": "Bob", "dia_id": "D2:1", "text": "I went sailing yesterday."},
        {"speaker": "Ann", "dia_id": "D2:2", "text": "Where did you sail to?"},
    ],
}
QUESTIONS = [
    {"question": "When did Bob go sailing?", "evidence": ["D2:1"], "category": 2},
    {"question": "What is Ann's dog called?", "evidence": ["D1:2; D1:3"], "category": 1},
    {"question": "Of what is nothing said?", "evidence": [], "category": 5},
    {"question": "Who is it not about?", "evidence": ["D1:1"], "category": 5},
]


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A file with two small ones."""
    path = tmp_path / "talks.json"
    sample = {"conversation": TALK, "qa": QUESTIONS}
    path.write_text(json.dumps([{"sample_id": f"talk-{n}", **sample} for n in range(2)]))
    return path


@pytest.fixture
def shell(tmp_path: Path, redis_url: str, namespace: str) -> Shell:
    return Shell(tmp_path, RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace)


@pytest.mark.parametrize("backend", ["redis", "in_memory"])
async def test_by_words_and_by_meaning(
    start_worker: StartWorker, redis_url: str, namespace: str, user: str, backend: str
) -> None:
    start_worker(backend=backend, search_strategy="hybrid", **BY_MEANING)
    async with MemoryClient(redis_url, namespace=namespace) as memory:
        added = await memory.add_memory(user, ["the dog sleeps", "bread with butter"])
        assert added.added == 2
        (found,) = await memory.search(user, "hound", {"top_k": 1})
        assert found.message.text == "the dog sleeps"
        both = await memory.search(user, "dog", {"top_k": 1})
        assert both[0].score > found.score
        await memory.delete_memory(user)
        assert await memory.search(user, "hound") == []


async def test_a_message_whose_worker_dies_before_it_is_embedded_is_found_all_the_same(
    start_worker: StartWorker, redis_url: str, namespace: str, user: str
) -> None:
    """By its words at once, and by its meaning as soon as another worker has come to it."""
    settings = {"search_strategy": "hybrid", **BY_MEANING}
    worker = start_worker(lanes="live,bulk", **settings)  # it leaves the second step to others
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        await memory.add_memory(user, "the dog sleeps", wait="stored")
        assert len(await memory.search_memory(user, "dog")) == 1
        assert await memory.search_memory(user, "hound") == []
        worker.signal(signal.SIGKILL)
        start_worker(**settings)

        async def found() -> bool:
            return len(await memory.search_memory(user, "hound")) == 1

        await eventually(found)


async def test_workers_of_an_index_that_is_not_there_yet(
    start_worker: StartWorker, redis_url: str, namespace: str, user: str
) -> None:
    """As after an upgrade: what was stored before is found by the first search."""
    start_worker()
    async with MemoryClient(redis_url, namespace=namespace) as memory:
        await memory.add_memory(user, [f"tea {n}" for n in range(300)])
        keys: list[bytes] = []
        async with redis_at(redis_url) as redis:

            async def is_tended() -> bool:
                """What was added is in a segment, and the worker does nothing more."""
                keys[:] = [
                    key
                    async for key in redis.scan_iter(f"{namespace}:m:*")
                    if b"}:i" in key or b"}:e" in key or b"}:n:" in key
                ]
                return any(b"}:n:" in key for key in keys) and not any(
                    b"}:e" in key for key in keys
                )

            await eventually(is_tended)
            assert await redis.delete(*keys) == len(keys) > 0
        assert len(await memory.search_memory(user, "tea", {"top_k": 500})) == 300


class TestEval:
    def test_in_a_table(self, start_worker: StartWorker, shell: Shell, conversations: Path) -> None:
        start_worker()
        said = shell("eval", str(conversations)).stdout
        rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()}
        assert rows["all"] == ["4", "1.000", "1.000", "1.000"]
        assert rows["temporal"][0] == rows["multi-hop"][0] == "2"
        assert "single-hop" not in rows
        assert "redis: Redis" in said
        assert "10 messages of 2 conversations" in said

    def test_in_json_and_nothing_is_left(
        self,
        start_worker: StartWorker,
        shell: Shell,
        conversations: Path,
        redis_url: str,
        namespace: str,
    ) -> None:
        start_worker(search_strategy="vector", **BY_MEANING)
        report = json.loads(shell("eval", str(conversations), "--json").stdout)
        assert report["questions"] == 4
        assert 0 < report["recall"]["10"] <= 1
        assert report["by_category"]["temporal"]["questions"] == 2
        assert "by meaning" in report["backend"]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("[]", "no question"),
            ("{", "not JSON"),
            ('[{"a": 1}]', "entry 0 is not a conversation"),
            (json.dumps([{"conversation": TALK, "qa": QUESTIONS[2:]}]), "no question"),
        ],
    )
    def test_a_file_that_is_none(
        self, shell: Shell, tmp_path: Path, content: str, reason: str
    ) -> None:
        path = tmp_path / "other.json"
        path.write_text(content)
        assert reason in one_line(shell("eval", str(path), code=1))

    def test_no_worker(self, shell: Shell, conversations: Path) -> None:
        assert "no worker" in one_line(shell("eval", str(conversations), "--timeout", "2", code=1))

    def test_a_file_that_is_not_there(self, shell: Shell) -> None:
        assert "cannot be read" in one_line(shell("eval", "nowhere.json", code=1))


class TestReindex:
    def test_says_what_it_did(
        self, start_worker: StartWorker, shell: Shell, redis_url: str, user: str
    ) -> None:
        start_worker()
        shell("add", user, "tea", "coffee")
        shell("add", "-s", "x", "--", "--odd", "tea")
        said = shell("reindex").stdout
        assert said == "looked at the indexes of 2 users: rebuilt 0, of 0 messages\n"
        assert "rebuilt 2, of 3 messages" in shell("reindex", "--all").stdout
        assert "of 1 users: rebuilt 1, of 1" in shell("reindex", "--all", "--", "--odd").stdout
        done = json.loads(shell("reindex", user, "--all", "--json").stdout)
        assert (done["users"], done["messages"]) == (1, 2)

    def test_a_backend_without_such_an_index(self, shell: Shell) -> None:
        shell.environment["RECALLQ_BACKEND"] = "in_memory"
        assert "in_memory backend has no index" in one_line(shell("reindex", code=1))

    def test_no_redis(self, shell: Shell) -> None:
        shell.environment["RECALLQ_REDIS_URL"] = "redis://127.0.0.1:1/0"
        assert "127.0.0.1:1" in one_line(shell("reindex", code=1))


def test_a_strategy_that_is_none(redis_url: str, namespace: str) -> None:
    worker = Worker(redis_url, namespace=namespace, search_strategy="words")
    worker.launch()
    assert worker.wait() == 1
    assert "RECALLQ_SEARCH_STRATEGY" in worker.output
    worker.close()


def test_a_strategy_without_a_model(redis_url: str, namespace: str) -> None:
    worker = Worker(redis_url, namespace=namespace, search_strategy="hybrid")
    worker.launch()
    assert worker.wait() == 1
    assert "OPENAI_API_KEY" in worker.output
    worker.close()
