"""What watches jobs fails none, whatever goes wrong in it."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from recallq.contract import (
    AddJob,
    AnyBatch,
    JobState,
    Lane,
    Operation,
    Scope,
    decode_batch,
    encode_batch,
    make_batch,
    speaks_newer,
)
from recallq.errors import BackendError, BackendUnavailable
from recallq.tracing import Tracer
from recallq_worker.meters import JobLog, Meters, fields_of, tell_of_dead_letter
from recallq_worker.metrics import Metrics

ID = "0123456789abcdef-1"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def batch_of(*jobs: AddJob) -> AnyBatch:
    return cast("AnyBatch", make_batch(ID, Lane.LIVE, Operation.ADD, list(jobs), None))


def job(trace: Any = TRACE) -> AddJob:
    return AddJob(scope=Scope("t", "ann"), submitted_at=1.0, messages=[], order=1, trace=trace)


class Broken:
    """Of what tracing and metrics are made, any part."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("what Ann said")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("what Ann said")


def test_meters_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    batch = batch_of(job())
    meters = Meters([Broken(), Broken()])
    assert meters
    meters.ran(batch, {}, began=1.0, ends=2.0)
    meters.put_off(Operation.ADD, Lane.LIVE, job(), BackendUnavailable("x"))
    assert caplog.text.count("counting jobs failed: RuntimeError") == 4
    assert "what Ann said" not in caplog.text
    assert not Meters()


@pytest.mark.parametrize("part", ["_tracer", "_propagator", "_context"])
def test_tracing_that_fails(part: str, caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer()
    setattr(tracer, part, Broken())
    with tracer.sending(Operation.ADD, Lane.LIVE, job(None)) as span:
        span.tell("x", "y")
    spans = tracer.running("run", {0: job(), 1: job()}, {})
    if spans is not None:
        with spans.calling("redis.add", [0, 1]) as called:
            if called is not None:
                called.failed("internal")
        spans.ended(0, "succeeded")
        spans.over("interrupted")
    assert "what Ann said" not in caplog.text
    with pytest.raises(ZeroDivisionError), tracer.sending(Operation.ADD, Lane.LIVE, job(None)):
        raise ZeroDivisionError


@pytest.mark.parametrize("trace", ["", "x", "00-1-2-3", TRACE + "-0", 7, {"a": 1}, TRACE.upper()])
def test_what_is_no_trace_is_left_out(trace: Any) -> None:
    batch = batch_of(job(None))
    batch.jobs[0].trace = trace
    (read,) = decode_batch(encode_batch(batch)).jobs
    assert read.trace is None
    assert fields_of(Operation.ADD, Lane.LIVE, read)["trace"] is None


def test_a_trace_is_told_by_its_id() -> None:
    told = fields_of(Operation.ADD, Lane.LIVE, job())
    assert told["trace"] == "0af7651916cd43dd8448eb211c80319c"


def test_a_log_that_fails_harms_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("recallq_worker.jobs"), "warning", Broken())
    batch = batch_of(job())
    tell_of_dead_letter(batch, 0, BackendError("x"), 1)


def test_a_lane_that_only_puts_jobs_off_has_no_batches() -> None:
    metrics = Metrics(backend="redis", version="1", worker_id="w")
    metrics.put_off(Operation.ADD, Lane.SLOW, job(), BackendUnavailable("x"))
    told = metrics.text(None).decode()
    assert 'recallq_retries_total{lane="slow",operation="add"} 1.0' in told
    assert "recallq_batch_jobs_count" not in told
    assert not JobLog.is_wanted()
    assert JobState.DEAD.settled


@pytest.mark.parametrize(
    ("payload", "newer"),
    [('{"v": 2}', True), ('{"v": 1}', False), ("{}", False), ("x", False), (7, False),
     ('{"v": "2"}', False), ('{"v": true}', False), ("[]", False)],
)  # fmt: skip
def test_what_speaks_a_newer_protocol(payload: object, newer: bool) -> None:
    assert speaks_newer(payload) is newer
