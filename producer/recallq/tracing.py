"""Traces with OpenTelemetry: from a client's call by way of its job to the backend's call.

Jobs share Celery messages, so what goes along is written into each job: the span that its call made
(a W3C ``traceparent``), if that is sampled. A worker makes a span of each such job, and one of each
call of its backend. A call that serves several jobs is in the trace of the first, and linked with
the spans of the others, and they with it.

Spans carry ids, tenants and a digest of the user's id; neither what was said nor ids of users.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from recallq.contract import Job, Lane, Operation, Outcome
from recallq.errors import ConfigurationError, MissingExtra

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext

_PARENT = "traceparent"

K = TypeVar("K", bound=Hashable)


def user_digest(tenant: str, user_id: str) -> str:
    """What stands for a user in traces and logs: 16 hexadecimal digits.

    It tells users apart and finds one whose id is known; it does not hide ids that can be guessed.
    """
    return hashlib.sha256(f"{len(tenant)}:{tenant}{user_id}".encode()).hexdigest()[:16]


class Tracer:
    """Makes the spans of one process. Raises `MissingExtra` without the extra ``traces``."""

    def __init__(self) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation import tracecontext
        except ImportError as error:
            raise MissingExtra("RECALLQ_TRACES", "traces") from error
        self._api = trace
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("recallq", version("recallq"))

    # --- clients --------------------------------------------------------------------------------

    @contextmanager
    def sending(self, operation: Operation, lane: Lane, job: Job) -> Iterator[Sent]:
        """The span of a client's call, which the job tells its worker of."""
        with self._tracer.start_as_current_span(
            f"recallq.{operation.value}",
            kind=self._api.SpanKind.PRODUCER,
            attributes=_attributes(job) | {"recallq.lane": lane.value},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            if span.get_span_context().trace_flags.sampled:
                carrier: dict[str, str] = {}
                self._propagator.inject(carrier)
                job.trace = carrier[_PARENT]
            try:
                yield Sent(self, span)
            except BaseException as error:
                # Its name only: the words of an error may quote what was said.
                self.failed(span, type(error).__name__)
                raise
            finally:
                if job.id:
                    span.set_attribute("recallq.job", job.id)

    # --- workers --------------------------------------------------------------------------------

    def running(
        self, name: str, jobs: Mapping[K, Job], more: Mapping[str, Any]
    ) -> JobSpans[K] | None:
        """Begins the spans of those of `jobs` that are traced; None if none is."""
        spans: dict[K, Span] = {}
        for key, job in jobs.items():
            if job.trace is None:
                continue
            context = self._propagator.extract({_PARENT: job.trace})
            if not self._api.get_current_span(context).get_span_context().is_valid:
                continue  # somebody else's writing
            spans[key] = self._tracer.start_span(
                name,
                context=context,
                kind=self._api.SpanKind.CONSUMER,
                attributes={**_attributes(job), "recallq.job": job.id, **more},
            )
        return JobSpans(self, spans) if spans else None

    @contextmanager
    def calling(self, name: str, spans: Sequence[Span]) -> Iterator[None]:
        """The span of a call of the backend for jobs with these spans, of which there is one."""
        first, *others = spans
        with self._tracer.start_as_current_span(
            name,
            context=self._within(first),
            kind=self._api.SpanKind.CLIENT,
            links=[self._api.Link(each.get_span_context()) for each in others],
            attributes={"recallq.traced_jobs": len(spans)},
            record_exception=False,
        ) as span:
            context: SpanContext = span.get_span_context()
            for each in others:
                each.add_link(context)
            yield

    def failed(self, span: Span, error: str) -> None:
        """What a span stands for failed; `error` is a name or a code."""
        span.set_status(self._api.StatusCode.ERROR, error)

    def _within(self, span: Span) -> Context:
        return self._api.set_span_in_context(span)


class Sent:
    """The span of a client's call."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    def settled(self, outcome: Outcome) -> None:
        """What the call comes to."""
        self._span.set_attribute("recallq.state", outcome.state.value)
        if outcome.error is not None:
            self._tracer.failed(self._span, str(outcome.error.get("code")))


class JobSpans(Generic[K]):
    """The spans of jobs that are run together."""

    def __init__(self, tracer: Tracer, spans: dict[K, Span]) -> None:
        self._tracer = tracer
        self._spans = spans

    def calling(self, name: str, keys: Sequence[K]) -> contextlib.AbstractContextManager[None]:
        """For a call of the backend on behalf of some of the jobs."""
        spans = [self._spans[key] for key in keys if key in self._spans]
        return self._tracer.calling(name, spans) if spans else contextlib.nullcontext()

    def ended(self, key: K, state: str, error: str | None = None) -> None:
        """What became of a job, if it is traced."""
        span = self._spans.pop(key, None)
        if span is None:
            return
        span.set_attribute("recallq.state", state)
        if error is not None:
            self._tracer.failed(span, error)
        span.end()

    def over(self, state: str) -> None:
        """The run is over; this is what became of all others."""
        for key in list(self._spans):
            self.ended(key, state)


def _attributes(job: Job) -> dict[str, Any]:
    scope = job.scope
    return {
        "messaging.system": "celery",
        "recallq.tenant": scope.tenant,
        "recallq.user": user_digest(scope.tenant, scope.user_id),
    }


# --- exporting ----------------------------------------------------------------------------------


def export(service: str) -> Any:
    """Has this process's spans exported, unless the program has seen to that itself.

    Goes by OpenTelemetry's variables: ``OTEL_TRACES_EXPORTER`` (``otlp`` by default, ``console``,
    ``none``), ``OTEL_EXPORTER_OTLP_*`` (by HTTP), ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME``
    (`service` by default), ``OTEL_RESOURCE_ATTRIBUTES``. Returns what has a ``shutdown`` that sends
    what is left, or None. Raises `MissingExtra`, `ConfigurationError`.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import (
            BatchSpanProcessor,
            ConsoleSpanExporter,
            SpanExporter,
        )
    except ImportError as error:
        raise MissingExtra("RECALLQ_TRACES", "traces") from error
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    exporter: SpanExporter
    match os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower():
        case "none":
            return None
        case "console":
            exporter = ConsoleSpanExporter()
        case "otlp":
            try:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            except ImportError as error:
                raise MissingExtra("RECALLQ_TRACES", "traces") from error
            exporter = OTLPSpanExporter()
        case other:
            raise ConfigurationError(
                f"OTEL_TRACES_EXPORTER is {other!r}; say otlp, console or none"
            )
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider
