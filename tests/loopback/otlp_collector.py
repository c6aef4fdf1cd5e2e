"""What OpenTelemetry's exporters send their spans to, by OTLP over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.loopback.server import LoopbackServer


@dataclass(frozen=True, slots=True)
class SentSpan:
    """A span as it came in; ids are hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty if there is none."""
    links: frozenset[str]
    """Ids of spans."""
    attributes: dict[str, Any]
    error: str
    """What its status says; empty if nothing went wrong."""


class OtlpCollector(LoopbackServer):
    """``with OtlpCollector() as collector:``, and give its `url` as OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = b""
        """All that came in."""
        self.spans: list[SentSpan] = []

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/traces", self._traces)]

    def parse_body(self, path: str, raw: bytes) -> None:
        self.raw += raw
        told = ExportTraceServiceRequest()
        told.ParseFromString(raw)
        for resource in told.resource_spans:
            service = _plain(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                self.spans += [_span(service, each) for each in scope.spans]

    async def _traces(self, _: web.Request) -> web.Response:
        return web.Response(content_type="application/x-protobuf")


def _span(service: str, span: Any) -> SentSpan:
    return SentSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        links=frozenset(link.span_id.hex() for link in span.links),
        attributes=_plain(span.attributes),
        error=span.status.message,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
