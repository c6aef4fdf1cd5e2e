"""Traces with OpenTelemetry: from a client's call by way of its job to the backend's call.

Jobs share Celery messages, so what goes along is written into each job: the span that its call made
(a W3C ``traceparent``), if that is sampled. A worker makes a span of each such job, and one of each
call of its backend. A call that serves several jobs is in the trace of the first, and linked with
the spans of the others, and they with it.

Spans carry ids, tenants and a digest of the user's id; neither what was said nor ids of users.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import random
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from recallq.contract import Job, Lane, Operation, Outcome
from recallq.errors import ConfigurationError, MissingExtra

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext, SpanKind

log = logging.getLogger(__name__)

_PARENT = "traceparent"
_FAREWELL = 3.0
"""Seconds for which a process that ends waits until its last spans are sent."""

_CALLS = {operation: f"recallq.{operation.value}" for operation in Operation}

K = TypeVar("K", bound=Hashable)


def user_digest(tenant: str, user_id: str) -> str:
    """What stands for a user in traces and logs: 16 hexadecimal digits.

    It tells users apart and finds one whose id is known; it does not hide ids that can be guessed.
    """
    return hashlib.sha256(f"{len(tenant)}:{tenant}{user_id}".encode()).hexdigest()[:16]


class unharmed:  # noqa: N801  # read as a word: with unharmed("tracing")
    """For what only watches: whatever goes wrong in it harms no job, and is logged by its name."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        with contextlib.suppress(Exception):
            log.warning("%s failed: %s", self._doing, type(error).__name__)
        return True


class OpenSpan:
    """A span that has begun, or none where tracing itself failed. Nothing here raises."""

    def __init__(self, api: Any, span: Span | None) -> None:
        self._api = api
        self._span = span

    @property
    def context(self) -> SpanContext | None:
        """What others refer to it by."""
        with unharmed("tracing"):
            return None if self._span is None else self._span.get_span_context()
        return None

    @property
    def within(self) -> Context | None:
        """For what belongs below it."""
        return None if self._span is None else self._api.set_span_in_context(self._span)

    @property
    def is_recorded(self) -> bool:
        """Whether anybody will see it."""
        with unharmed("tracing"):
            return self._span is not None and self._span.is_recording()
        return False

    def tell_all(self, attributes: Mapping[str, Any]) -> None:
        with unharmed("tracing"):
            if self._span is not None:
                self._span.set_attributes(attributes)

    def tell(self, name: str, value: str) -> None:
        with unharmed("tracing"):
            if self._span is not None:
                self._span.set_attribute(name, value)

    def link(self, other: SpanContext | None) -> None:
        with unharmed("tracing"):
            if self._span is not None and other is not None:
                self._span.add_link(other)

    def failed(self, error: str) -> None:
        """What it stands for failed; `error` is a name or a code, for words may quote what was
        said."""
        with unharmed("tracing"):
            if self._span is not None:
                self._span.set_status(self._api.StatusCode.ERROR, error)

    def settled(self, outcome: Outcome) -> None:
        """What a call comes to."""
        self.tell("recallq.state", outcome.state.value)
        if outcome.error is not None:
            self.failed(str(outcome.error.get("code")))

    def end(self) -> None:
        with unharmed("tracing"):
            if self._span is not None:
                self._span.end()


class Tracer:
    """Makes the spans of one process. Raises `MissingExtra` without the extra ``traces``."""

    def __init__(self, share: float = 1.0) -> None:
        """`share` is that of calls which are traced, from 0 to 1."""
        self._share = share
        try:
            from opentelemetry import context, trace
            from opentelemetry.trace.propagation import tracecontext
        except ImportError as error:
            raise MissingExtra("RECALLQ_TRACES", "traces") from error
        self._api = trace
        self._context = context
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("recallq", version("recallq"))
        self._producer = trace.SpanKind.PRODUCER

    # --- clients --------------------------------------------------------------------------------

    def is_wanted(self) -> bool:
        """Whether a call is to be traced. Asking the SDK's sampler costs a tenth of a call."""
        with unharmed("tracing"):
            around = self._api.get_current_span().get_span_context()
            if around.is_valid:
                return around.trace_flags.sampled
            return self._share >= 1 or random.random() < self._share  # noqa: S311
        return False

    @contextmanager
    def sending(self, operation: Operation, lane: Lane, job: Job) -> Iterator[OpenSpan]:
        """The span of a client's call, which the job tells its worker of."""
        span = self._begin(_CALLS[operation], None, self._producer)
        if not span.is_recorded:  # the SDK samples, too
            yield span
            return
        with self._current(span):
            span.tell_all({**_attributes(job), "recallq.lane": lane.value})
            carrier: dict[str, str] = {}
            with unharmed("tracing"):
                self._propagator.inject(carrier)
            job.trace = carrier.get(_PARENT)
            try:
                yield span
            finally:
                if job.id:
                    span.tell("recallq.job", job.id)

    # --- workers --------------------------------------------------------------------------------

    def running(
        self, name: str, jobs: Mapping[K, Job], more: Mapping[str, Any]
    ) -> JobSpans[K] | None:
        """Begins the spans of those of `jobs` that are traced; None if none is."""
        spans: dict[K, OpenSpan] = {}
        for key, job in jobs.items():
            if job.trace is None:
                continue
            with unharmed("tracing"):
                context = self._propagator.extract({_PARENT: job.trace})
                if self._api.get_current_span(context).get_span_context().is_valid:
                    span = spans[key] = self._begin(name, context, self._api.SpanKind.CONSUMER)
                    span.tell_all({**_attributes(job), "recallq.job": job.id, **more})
        return JobSpans(self, spans) if spans else None

    @contextmanager
    def calling(self, name: str, spans: Sequence[OpenSpan]) -> Iterator[OpenSpan]:
        """The span of a call of the backend for jobs with these spans, of which there is one."""
        first, *others = spans
        span = self._begin(name, first.within, self._api.SpanKind.CLIENT)
        with self._current(span):
            span.tell_all({"recallq.traced_jobs": len(spans)})
            context = span.context
            for each in others:
                span.link(each.context)
                each.link(context)
            yield span

    def _begin(self, name: str, within: Context | None, kind: SpanKind) -> OpenSpan:
        with unharmed("tracing"):
            return OpenSpan(self._api, self._tracer.start_span(name, within, kind))
        return OpenSpan(self._api, None)

    @contextmanager
    def _current(self, span: OpenSpan) -> Iterator[None]:
        """What is called meanwhile finds itself in `span`, which then ends."""
        token = None
        with unharmed("tracing"):
            if (within := span.within) is not None:
                token = self._context.attach(within)
        try:
            yield
        except BaseException as error:
            span.failed(type(error).__name__)
            raise
        finally:
            with unharmed("tracing"):
                if token is not None:
                    self._context.detach(token)
            span.end()


class JobSpans(Generic[K]):
    """The spans of jobs that are run together."""

    def __init__(self, tracer: Tracer, spans: dict[K, OpenSpan]) -> None:
        self._tracer = tracer
        self._spans = spans

    def calling(
        self, name: str, keys: Sequence[K]
    ) -> contextlib.AbstractContextManager[OpenSpan | None]:
        """For a call of the backend on behalf of some of the jobs; None if none is traced."""
        spans = [self._spans[key] for key in keys if key in self._spans]
        return self._tracer.calling(name, spans) if spans else contextlib.nullcontext()

    def ended(self, key: K, state: str, error: str | None = None) -> None:
        """What became of a job, if it is traced."""
        span = self._spans.pop(key, None)
        if span is not None:
            span.tell("recallq.state", state)
            if error is not None:
                span.failed(error)
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
    what is left within a few seconds, or None. Raises `MissingExtra`, `ConfigurationError`.
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
    # By itself it would wait at the process's end for as long as the collector takes.
    provider = TracerProvider(
        resource=Resource.create({"service.name": name}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return _Farewell(provider)


class _Farewell:
    """Sends what is left, but does not wait for a collector that says nothing."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        atexit.register(self.shutdown)

    def shutdown(self) -> None:
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_FAREWELL)
