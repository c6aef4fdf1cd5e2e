"""ReMe as a backend, against a loopback OpenAI server and a real Redis."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from recallq.contract import Scope
from recallq_worker.backends.base import MemoryExtractor
from recallq_worker.backends.reme import RemePersonal, RemeTask
from recallq_worker.backends.reme.backend import RemeBackend
from recallq_worker.backends.reme.settings import RemeSettings
from recallq_worker.settings import WorkerSettings
from tests.contract.extractor_conformance import ExtractorConformance
from tests.loopback.openai_api import OpenAIServer
from tests.loopback.reme_prompts import ReMeAnswers

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
        # What tests say is similar: ReMe drops experiences that are, within one add.
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


class TestPersonal(ExtractorConformance):
    @asynccontextmanager
    async def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AsyncIterator[MemoryExtractor]:
        with reme_server() as server:
            async with opened(reme(RemePersonal, server, redis_url, namespace)) as backend:
                yield backend


class TestTask(ExtractorConformance):
    @asynccontextmanager
    async def open_extractor(
        self, redis_url: str, namespace: str
    ) -> AsyncIterator[MemoryExtractor]:
        with reme_server() as server:
            async with opened(reme(RemeTask, server, redis_url, namespace)) as backend:
                yield backend
