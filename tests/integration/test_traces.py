"""Traces: from the call of a client to the call of the backend, whatever lies between."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from recallq import BackendError, MemoryClient
from recallq.tracing import user_digest
from tests.integration.test_slow_lane import EXTRACTOR
from tests.loopback.otlp_collector import OtlpCollector, SentSpan
from tests.support import Shell, Worker, eventually

StartWorker = Callable[..., Worker]


SPANS = InMemorySpanExporter()


@pytest.fixture(scope="session", autouse=True)
def _provider() -> None:
    """A process has one, for good."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(SPANS))
    trace.set_tracer_provider(provider)


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    SPANS.clear()
    with OtlpCollector() as collector:
        yield collector


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=30, traces=True) as memory:
        yield memory


@pytest.fixture
def start_traced(start_worker: StartWorker, collector: OtlpCollector) -> StartWorker:
    def start(**options: Any) -> Worker:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        return start_worker(traces=True, environment=environment, **options)

    return start


async def arrived(collector: OtlpCollector, count: int) -> list[SentSpan]:
    async def enough() -> bool:
        return len(collector.spans) >= count

    await eventually(enough)
    return collector.spans


def sent() -> list[ReadableSpan]:
    return list(SPANS.get_finished_spans())


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def id_of(span: ReadableSpan) -> str:
    return f"{context_of(span).span_id:016x}"


async def test_from_the_call_to_the_backend(
    client: MemoryClient, start_traced: StartWorker, collector: OtlpCollector
) -> None:
    worker = await asyncio.to_thread(start_traced)
    with trace.get_tracer("agent").start_as_current_span("a turn of the agent"):
        await client.add_memory("ann lee", "green tea is what I like", "kitchen")
        await client.search_memory("ann lee", "tea")
    add, search, turn = sent()
    assert [each.name for each in (add, search)] == ["recallq.add", "recallq.search"]
    assert add.parent == context_of(turn)
    spans = await arrived(collector, 4)
    assert [each.name for each in spans] == [
        "redis.add", "recallq.run add", "redis.search", "recallq.run search",
    ]  # fmt: skip
    assert {each.trace_id for each in spans} == {f"{context_of(turn).trace_id:032x}"}
    for called, (backend, run) in ((add, spans[:2]), (search, spans[2:])):
        assert run.parent_id == id_of(called)
        assert backend.parent_id == run.span_id
        assert called.attributes is not None
        for name in ("recallq.job", "recallq.tenant", "recallq.user", "recallq.state"):
            assert run.attributes[name] == called.attributes[name], name
        assert run.attributes["recallq.user"] == user_digest("default", "ann lee")
        assert run.service == "recallq-worker"
    for secret in (b"green tea", b"ann lee", b"kitchen"):
        assert secret not in collector.raw
        assert secret.decode() not in "".join(each.to_json() for each in sent())
    await asyncio.to_thread(worker.stop)


async def test_jobs_of_one_batch_have_traces_of_their_own(
    client: MemoryClient, start_traced: StartWorker, collector: OtlpCollector
) -> None:
    await asyncio.to_thread(start_traced)
    await asyncio.gather(*(client.add_memory(f"u{n}", "tea") for n in range(30)))
    calls = {id_of(each): each for each in sent()}
    assert len(calls) == 30

    async def all_there() -> bool:
        return sum(each.name == "recallq.run add" for each in collector.spans) == 30

    await eventually(all_there)
    runs = [each for each in collector.spans if each.name == "recallq.run add"]
    stores = {each.span_id: each for each in collector.spans if each.name == "redis.add"}
    assert 1 <= len(stores) < 30
    assert {each.parent_id for each in runs} == set(calls)
    by_id = {each.span_id: each for each in runs}
    served = [
        {each.parent_id, *each.links} for each in stores.values()
    ]  # each run is part of one call of the store: as its parent, or linked both ways
    assert sorted(run for runs in served for run in runs) == sorted(by_id)
    for store in stores.values():
        assert all(store.span_id in by_id[run].links for run in store.links)


async def test_what_goes_wrong(
    client: MemoryClient, start_traced: StartWorker, collector: OtlpCollector
) -> None:
    await asyncio.to_thread(start_traced, backend="slow_redis", retry_base=0.05)
    with pytest.raises(BackendError):
        await client.add_memory("ann", "refuse this")
    (call,) = sent()
    assert call.status.description == "backend_error"
    spans = await arrived(collector, 2)
    assert {each.error for each in spans if each.name == "recallq.run add"} >= {"backend_error"}
    assert b"refuse this" not in collector.raw


async def test_through_the_slow_lane(
    client: MemoryClient, start_traced: StartWorker, collector: OtlpCollector
) -> None:
    await asyncio.to_thread(start_traced, backend=EXTRACTOR)
    await client.add_memory("ann", "something memorable")
    (call,) = sent()

    async def extracted() -> bool:
        return any(each.name.endswith(".extract") for each in collector.spans)

    await eventually(extracted)
    named = {each.name: each for each in collector.spans}
    slow = named["recallq.slow extract"]
    assert (slow.parent_id, slow.attributes["recallq.state"]) == (id_of(call), "done")
    (extract,) = (each for name, each in named.items() if name.endswith(".extract"))
    assert extract.parent_id == slow.span_id

    async def answered() -> bool:
        runs = [each for each in collector.spans if each.name == "recallq.run add"]
        return [each.attributes["recallq.state"] for each in runs] == [
            "to_the_slow_lane",
            "succeeded",
        ]

    await eventually(answered)


async def test_some_calls_and_those_within_a_span_that_is_sampled(
    redis_url: str, namespace: str, start_traced: StartWorker, collector: OtlpCollector
) -> None:
    worker = await asyncio.to_thread(start_traced)
    agent = trace.get_tracer("agent")
    async with MemoryClient(redis_url, namespace=namespace, timeout=30, traces=1e-12) as client:
        await client.add_memory("ann", "tea")
        with agent.start_as_current_span("sampled"):
            await client.search_memory("ann", "tea")
        with trace.use_span(trace.NonRecordingSpan(SpanContext(1, 1, is_remote=False))):
            await client.list_memory("ann")
    async with MemoryClient(redis_url, namespace=namespace, timeout=30, traces=0.5) as client:
        for _ in range(60):
            await client.list_memory("ann")
    await asyncio.to_thread(worker.stop)  # what is left is sent
    names = Counter(each.name for each in collector.spans)
    assert names["recallq.run search"] == 1
    assert names["recallq.run add"] == 0
    assert 5 < names["recallq.run list"] < 55


@pytest.mark.parametrize("listens", [True, False])
async def test_none_waits_for_a_collector_that_says_nothing(
    client: MemoryClient, start_worker: StartWorker, listens: bool
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    if not listens:
        silent.close()
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    worker = await asyncio.to_thread(lambda: start_worker(traces=True, environment=environment))
    for number in range(20):
        await client.add_memory("ann", f"tea {number}")
    assert len(await client.list_memory("ann", {"page_size": 100})) == 20
    worker.signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.wait, 8) == 0
    silent.close()


def test_commands_are_traced_too(
    redis_url: str,
    namespace: str,
    start_traced: StartWorker,
    collector: OtlpCollector,
    tmp_path: Any,
) -> None:
    start_traced()
    shell = Shell(
        tmp_path, RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace, RECALLQ_TRACES="true",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
    )  # fmt: skip
    shell("add", "ann", "tea")
    assert [each.name for each in collector.spans if each.service == "recallq"] == ["recallq.add"]
    shell.environment["OTEL_TRACES_EXPORTER"] = "smoke signals"
    refused = shell("search", "ann", "tea", code=1)
    assert "OTEL_TRACES_EXPORTER" in refused.stderr
