"""What a worker process tells Prometheus: what became of the jobs it ran, and how the fleet stands.

Each process counts for itself and is asked by itself, so nothing is shared between processes. What
they share is in Redis, and each tells the same of it, as it is at that moment: take the maximum
over workers.

What jobs come to is noted in plain lists, and entered thousands at a time: an observation by itself
costs a good microsecond, a counter with labels two, and a job has three of the one and one of the
other.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from recallq.contract import AnyBatch, Job, JobState, Lane, Operation, Outcome
from recallq.errors import JobError
from recallq.fleet import FleetState
from recallq_worker.model_usage import EMBEDDING_USAGE, LLM_USAGE

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
_TOGETHER = 4096
"""Jobs that are noted before they are entered, if nobody asks before."""
_JOBS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody reads


@dataclass(slots=True)
class _Notes:
    """What jobs of one operation and lane came to, until it is entered."""

    batches: list[int] = field(default_factory=list)
    """Jobs of each."""
    states: list[JobState] = field(default_factory=list)
    submitted: list[float] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    put_off: int = 0


class Histogram(Collector):
    """A Prometheus histogram that takes many values at once."""

    def __init__(
        self, name: str, about: str, labels: Sequence[str], bounds: Sequence[float]
    ) -> None:
        self._name, self._about, self._labels = name, about, tuple(labels)
        self._bounds = np.array(bounds, dtype=np.float64)
        self._counts: dict[tuple[str, ...], np.ndarray] = defaultdict(
            lambda: np.zeros(len(bounds) + 1, dtype=np.int64)
        )
        self._sums: dict[tuple[str, ...], float] = defaultdict(float)
        self._lock = threading.Lock()

    def enter(self, labels: tuple[str, ...], values: np.ndarray) -> None:
        """Observes all of them. For any thread."""
        places = self._bounds.searchsorted(values)
        counts = np.bincount(places, minlength=len(self._bounds) + 1)
        total = float(values.sum())
        with self._lock:
            self._counts[labels] += counts
            self._sums[labels] += total

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._about, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        with self._lock:
            found = [
                (labels, counts.cumsum().tolist(), self._sums[labels])
                for labels, counts in self._counts.items()
            ]
        names = [*map(repr, self._bounds.tolist()), "+Inf"]
        for labels, cumulated, total in found:
            family.add_metric(labels, list(zip(names, cumulated, strict=True)), total)
        yield family


class Metrics:
    """One process's registry; a `recallq_worker.meters.Meter`."""

    def __init__(self, *, backend: str, version: str, worker_id: str) -> None:
        self._lock = threading.Lock()
        self._notes: defaultdict[tuple[Operation, Lane], _Notes] = defaultdict(_Notes)
        self._registry = CollectorRegistry()
        self._registry.register(_Models(backend))
        self._jobs = Counter(
            "recallq_jobs", "Jobs that came to their end in this process.",
            ["operation", "lane", "outcome"], registry=self._registry,
        )  # fmt: skip
        self._retries = Counter(
            "recallq_retries", "Times that a job was put off for another attempt.",
            ["operation", "lane"], registry=self._registry,
        )  # fmt: skip
        self._dead = Counter(
            "recallq_dead_letters", "Jobs of this process that became dead letters.",
            ["operation", "lane"], registry=self._registry,
        )  # fmt: skip
        self._swept = Counter(
            "recallq_swept_batches",
            "Batches that this process sent again: taken_over from a worker that is gone, or lost "
            "between queue and worker.",
            ["why"], registry=self._registry,
        )  # fmt: skip
        for why in ("taken_over", "lost"):
            self._swept.labels(why)
        self._seconds = Histogram(
            "recallq_job_seconds",
            "Of jobs: queued from submission to their run, run, and total from submission to their "
            "end.",
            ["operation", "lane", "phase"], _SECONDS,
        )  # fmt: skip
        self._batches = Histogram(
            "recallq_batch_jobs", "Jobs of a batch that was run.", ["operation", "lane"], _JOBS
        )
        for collector in (self._seconds, self._batches):
            self._registry.register(collector)
        about = {"backend": backend, "version": version, "worker": worker_id}
        Info("recallq_worker", "This worker.", registry=self._registry).info(about)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def ran(
        self,
        batch: AnyBatch,
        ended: Mapping[int, Outcome],
        *,
        began: float,
        ends: float | Mapping[int, float],
    ) -> None:
        jobs = batch.jobs
        with self._lock:
            notes = self._notes[batch.operation, batch.lane]
            notes.batches.append(len(jobs))
            notes.states += [outcome.state for outcome in ended.values()]
            notes.submitted += [jobs[index].submitted_at for index in ended]
            notes.began += [began] * len(ended)
            notes.ended += (
                [ends] * len(ended) if isinstance(ends, float) else [ends[index] for index in ended]
            )
            if len(notes.states) + len(notes.batches) >= _TOGETHER:
                self._enter()

    def put_off(self, operation: Operation, lane: Lane, job: Job, error: JobError) -> None:
        with self._lock:
            self._notes[operation, lane].put_off += 1

    def _enter(self) -> None:
        """Enters what has been noted. With the lock."""
        notes, self._notes = self._notes, defaultdict(_Notes)
        for (operation, lane), each in notes.items():
            labels = (operation.value, lane.value)
            if each.batches:
                self._batches.enter(labels, np.array(each.batches, dtype=np.float64))
            if each.put_off:
                self._retries.labels(*labels).inc(each.put_off)
            for state, count in Tally(each.states).items():
                self._jobs.labels(*labels, state.value).inc(count)
                if state is JobState.DEAD:
                    self._dead.labels(*labels).inc(count)
            submitted, began, ended = (
                np.array(times) for times in (each.submitted, each.began, each.ended)
            )
            for phase, seconds in (
                ("queued", began - submitted),
                ("run", ended - began),
                ("total", ended - submitted),
            ):
                if len(seconds):
                    self._seconds.enter((*labels, phase), np.maximum(seconds, 0.0))

    def swept(self, why: str, batches: int) -> None:
        """Batches were sent again."""
        self._swept.labels(why).inc(batches)

    def text(self, fleet: FleetState | None) -> bytes:
        """Everything, in Prometheus's text format; `fleet` is None if Redis does not answer."""
        with self._lock:
            self._enter()
        told = CollectorRegistry()
        told.register(_Fleet(fleet))
        return generate_latest(self._registry) + generate_latest(told)


class _Models(Collector):
    """What was asked of models, LLMs and embedding models."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "recallq_model_calls", "Requests to models.", labels=["backend", "kind", "outcome"]
        )
        tokens = CounterMetricFamily(
            "recallq_model_tokens",
            "Tokens of these, as far as the provider tells.",
            labels=["backend", "kind", "direction"],
        )
        texts = CounterMetricFamily(
            "recallq_embedded_texts",
            "Texts that became vectors: by asking the model, or from a cache.",
            labels=["backend", "source"],
        )
        for kind, usage in (("llm", LLM_USAGE), ("embedding", EMBEDDING_USAGE)):
            calls.add_metric([self._backend, kind, "ok"], usage.succeeded)
            calls.add_metric([self._backend, kind, "error"], usage.failed)
            tokens.add_metric([self._backend, kind, "input"], usage.input_tokens)
            tokens.add_metric([self._backend, kind, "output"], usage.output_tokens)
        asked = EMBEDDING_USAGE.texts - EMBEDDING_USAGE.cached_texts
        texts.add_metric([self._backend, "model"], asked)
        texts.add_metric([self._backend, "cache"], EMBEDDING_USAGE.cached_texts)
        yield from (calls, tokens, texts)


class _Fleet(Collector):
    """How the fleet stands."""

    def __init__(self, state: FleetState | None) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        yield GaugeMetricFamily(
            "recallq_coordination_up", "Whether the coordination Redis answers.",
            value=float(state is not None),
        )  # fmt: skip
        if state is None:
            return
        accepted = CounterMetricFamily(
            "recallq_accepted_jobs", "Jobs that the fleet has accepted.", labels=["lane"]
        )
        settled = CounterMetricFamily(
            "recallq_settled_jobs",
            "Jobs of the fleet that have settled.",
            labels=["lane"],
        )
        outstanding = GaugeMetricFamily(
            "recallq_outstanding_jobs", "Jobs accepted and not settled.", labels=["lane"]
        )
        queued = GaugeMetricFamily(
            "recallq_queued_batches", "Batches that no worker has begun.", labels=["lane"]
        )
        oldest = GaugeMetricFamily(
            "recallq_oldest_queued_seconds", "Age of the oldest of these; 0 if there is none.",
            labels=["lane"],
        )  # fmt: skip
        workers = GaugeMetricFamily(
            "recallq_workers", "Worker processes that take the lane.", labels=["lane"]
        )
        for each in state.lanes:
            lane = [each.lane.value]
            accepted.add_metric(lane, each.accepted)
            settled.add_metric(lane, each.settled)
            outstanding.add_metric(lane, each.outstanding)
            queued.add_metric(lane, each.queued)
            oldest.add_metric(lane, each.oldest or 0.0)
            workers.add_metric(lane, each.workers)
        yield from (accepted, settled, outstanding, queued, oldest, workers)
        for name, about, value in (
            ("recallq_leases", "Batches that a worker holds under a lease.", state.running),
            ("recallq_delayed_batches", "Batches put off, or in the slow lane.", state.delayed),
            ("recallq_slow_users", "Users with writes in the slow lane.", state.extracting),
            ("recallq_indexing_batches", "Batches stored, not yet searchable.", state.indexing),
            (
                "recallq_slow_waiting_seconds",
                "Age of the first of these that is due; 0 if none waits for a worker.",
                state.slow_waits or 0.0,
            ),
            (
                "recallq_coordination_memory_bytes",
                "Memory that the coordination Redis uses, of what counts.",
                state.memory,
            ),
            (
                "recallq_coordination_memory_limit_bytes",
                "Memory from which on it takes no writes; 0 without a limit.",
                state.memory_limit,
            ),
            ("recallq_kept_dead_letters", "Dead letters that are kept.", state.dead_letters),
        ):
            yield GaugeMetricFamily(name, about, value=float(value))
