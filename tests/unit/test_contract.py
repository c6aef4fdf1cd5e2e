"""The contract: what is written is what is read, and what cannot be read is said to be so."""

from __future__ import annotations

import contextlib
import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recallq.contract import (
    DEFAULT_SESSION,
    PROTOCOL_VERSION,
    RESULT_TYPES,
    AddBatch,
    AddJob,
    AnyJob,
    Batch,
    BatchResult,
    DeleteBatch,
    DeleteJob,
    HealthBatch,
    HealthJob,
    JobRef,
    JobState,
    Lane,
    ListBatch,
    ListJob,
    Operation,
    Outcome,
    Scope,
    SearchBatch,
    SearchJob,
    cancelled,
    client_of,
    decode_batch,
    encode_batch,
    failed,
    fields_of,
    make_batch,
    timestamp,
)
from recallq.errors import (
    BackendError,
    InternalError,
    JobCancelled,
    JobExpired,
    JobTimeout,
    UndecodableJob,
    UnknownJob,
)
from tests.strategies import ids, json_objects, json_values, text

BATCH_ID = "0123456789abcdef-1f"
SCOPE = Scope("default", "ann", "s1")
TIMES: dict[str, Any] = {"submitted_at": 1_790_000_000.25, "deadline": 1_790_000_030.25}

JOBS: dict[Operation, list[AnyJob]] = {
    Operation.ADD: [
        AddJob(scope=SCOPE, **TIMES, messages=[{"role": "user", "content": "hi"}], order=1),
        AddJob(
            scope=SCOPE, submitted_at=0.0, messages=[{"content": "用户\n\0"}, {"content": None}],
            order=4_102_444_800_000_000, idempotency_key="k",
        ),
    ],
    Operation.SEARCH: [
        SearchJob(scope=Scope("t", "u"), **TIMES, query="tea", top_k=1),
        SearchJob(scope=SCOPE, **TIMES, query="", top_k=10_000, score_threshold=0.25),
    ],
    Operation.LIST: [ListJob(scope=SCOPE, **TIMES, offset=0, limit=1)],
    Operation.DELETE: [DeleteJob(scope=Scope("t", "u"), **TIMES), DeleteJob(scope=SCOPE, **TIMES)],
    Operation.HEALTH: [HealthJob(scope=Scope("t", ""), **TIMES)],
}  # fmt: skip
BATCHES: dict[Operation, type[Batch[Any]]] = {
    Operation.ADD: AddBatch,
    Operation.SEARCH: SearchBatch,
    Operation.LIST: ListBatch,
    Operation.DELETE: DeleteBatch,
    Operation.HEALTH: HealthBatch,
}


def batch_of(
    operation: Operation, lane: Lane = Lane.LIVE, backend: str | None = None
) -> Batch[Any]:
    return make_batch(BATCH_ID, lane, operation, copy.deepcopy(JOBS[operation]), backend)


def payload_of(operation: Operation) -> dict[str, Any]:
    """A good batch as the JSON object that crosses the wire."""
    wire: dict[str, Any] = orjson.loads(encode_batch(batch_of(operation)))
    return wire


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize("backend", [None, "redis"])
def test_a_batch_is_read_as_it_was_written(
    operation: Operation, lane: Lane, backend: str | None
) -> None:
    batch = batch_of(operation, lane, backend)
    read = decode_batch(encode_batch(batch))
    assert type(read) is BATCHES[operation]
    assert read.model_dump() == batch.model_dump()
    assert read.jobs == batch.jobs
    assert all(type(job) is type(JOBS[operation][0]) for job in read.jobs)


def test_every_operation_has_its_batch_and_its_result() -> None:
    assert set(BATCHES) == set(JOBS) == set(RESULT_TYPES) == set(Operation)
    assert len({operation.task_name for operation in Operation}) == len(Operation)


def test_jobs_get_the_id_of_their_place() -> None:
    batch = batch_of(Operation.ADD)
    assert [job.id for job in batch.jobs] == [f"{BATCH_ID}-0", f"{BATCH_ID}-1"]
    assert [JobRef.parse(job.id).index for job in batch.jobs] == [0, 1]


def test_messages_that_are_encoded_already_are_not_encoded_again() -> None:
    """The producer encodes a message once, to check it; the same bytes go into the batch."""
    fragments: list[Any] = [orjson.Fragment(b'{"content":"\\u00e9 as it is"}')]
    job = AddJob.model_construct(
        id="", scope=SCOPE, **TIMES, messages=fragments, order=1, idempotency_key=None
    )
    payload = encode_batch(make_batch(BATCH_ID, Lane.LIVE, Operation.ADD, [job], None))
    assert '[{"content":"\\u00e9 as it is"}]' in payload
    read = decode_batch(payload)
    assert isinstance(read, AddBatch)
    assert read.jobs[0].messages == [{"content": "é as it is"}]


@given(
    st.lists(
        st.builds(
            AddJob,
            scope=st.builds(Scope, ids, ids, st.none() | ids),
            submitted_at=st.floats(0, 1e12),
            deadline=st.none() | st.floats(0, 1e12),
            messages=st.lists(json_objects, max_size=3),
            order=st.integers(0, 4_102_444_800_000_000),
            idempotency_key=st.none() | ids,
        ),
        max_size=4,
    ),
    st.sampled_from(Lane),
    st.none() | text,
)
@settings(deadline=None)
def test_any_adds_are_read_as_they_were_written(
    jobs: list[AnyJob], lane: Lane, backend: str | None
) -> None:
    """Whatever ids and messages hold, they are not changed on their way."""
    batch = make_batch(BATCH_ID, lane, Operation.ADD, jobs, backend)
    read = decode_batch(encode_batch(batch))
    assert read.jobs == jobs
    assert (read.id, read.lane, read.backend) == (BATCH_ID, lane, backend)


@pytest.mark.parametrize("operation", Operation)
def test_fields_of_a_newer_version_that_change_nothing_are_let_pass(operation: Operation) -> None:
    """A newer client may say more, as long as it speaks the same protocol version."""
    payload = payload_of(operation)
    payload["mood"] = {"id": "x"}
    for job in payload["jobs"]:
        job["mood"] = "x"
    assert decode_batch(orjson.dumps(payload).decode()) == decode_batch(
        encode_batch(batch_of(operation))
    )


def test_a_batch_says_which_protocol_it_speaks() -> None:
    assert payload_of(Operation.ADD)["v"] == PROTOCOL_VERSION


def test_only_models_can_be_sent() -> None:
    with pytest.raises(TypeError, match="datetime"):
        fields_of(datetime.now(UTC))
    assert fields_of(JOBS[Operation.ADD][0])["order"] == 1


# --- what cannot be read ------------------------------------------------------------------------


def try_to_read(payload: object) -> None:
    """Only one error is allowed, and it says something."""
    reason: object = "none: it was read"
    try:
        decode_batch(payload)
    except UndecodableJob as error:
        reason = error
    assert str(reason)


@given(json_values.map(lambda value: orjson.dumps(value).decode()) | st.text())
@example("\ud800")
@example("")
@example("[" * 5000)
@example('{"v":' * 5000)
@example('{"v":1' + "0" * 5000 + "}")
@example('{"v":NaN}')
@settings(deadline=None)
def test_whatever_text_comes_is_read_or_undecodable(payload: str) -> None:
    try_to_read(payload)


@given(json_values | st.binary())
@settings(deadline=None)
def test_what_is_no_text_is_undecodable(payload: Any) -> None:
    if not isinstance(payload, str):
        with pytest.raises(UndecodableJob, match=type(payload).__name__):
            decode_batch(payload)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A good batch in which one value, anywhere, was replaced or removed."""
    payload = payload_of(draw(st.sampled_from(Operation)))
    node: Any = payload
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
            node = inner
            continue
        if draw(st.booleans()):
            node[key] = draw(json_values)
        else:
            del node[key]
        return orjson.dumps(payload).decode()


@given(damaged())
@settings(max_examples=500, deadline=None)
def test_a_damaged_batch_is_read_or_undecodable(payload: str) -> None:
    """One wrong value anywhere ends in the one error that dead-letters the message."""
    try_to_read(payload)


@pytest.mark.parametrize("version", [0, 2, 99, -1, "2", 1.5, None, [], {}, False])
@pytest.mark.parametrize("shape", [{}, {"jobs": 5}, None])
def test_another_protocol_version_is_refused_whatever_its_shape(
    version: object, shape: dict[str, Any] | None
) -> None:
    """The reason given is the version, not the first field that looks odd to this one."""
    payload = payload_of(Operation.ADD) if shape is None else shape
    payload["v"] = version
    with pytest.raises(UndecodableJob) as caught:
        decode_batch(orjson.dumps(payload).decode())
    assert str(caught.value).startswith("protocol version ")
    assert str(caught.value).endswith(f"this worker speaks {PROTOCOL_VERSION}")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"operation": "forget"}, "batch"),
        ({"operation": None}, "batch"),
        ({"id": None}, "add.id"),
        ({"lane": "fast"}, "add.lane"),
        ({"jobs": None}, "add.jobs"),
        ({"jobs": [5]}, "add.jobs.0"),
        ({"jobs": [{}]}, "add.jobs.0"),
        ({"backend": 5}, "add.backend"),
    ],
)
def test_an_unreadable_batch_names_the_place(change: dict[str, Any], place: str) -> None:
    with pytest.raises(UndecodableJob) as caught:
        decode_batch(orjson.dumps({**payload_of(Operation.ADD), **change}).decode())
    assert str(caught.value).startswith(place)


def test_an_unreadable_batch_does_not_quote_what_users_said() -> None:
    """The reason goes to logs and dead letter lists."""
    payload = payload_of(Operation.ADD)
    payload["jobs"][0]["messages"] = "my password is hunter2"
    payload["jobs"][0]["order"] = "my password is hunter2"
    with pytest.raises(UndecodableJob) as caught:
        decode_batch(orjson.dumps(payload).decode())
    assert "hunter2" not in str(caught.value)


JOB_PROBLEMS: dict[str, tuple[Operation, dict[str, Any]]] = {
    "no scope": (Operation.ADD, {"scope": None}),
    "no user": (Operation.ADD, {"scope": {"tenant": "t"}}),
    "user is a number": (Operation.ADD, {"scope": {"tenant": "t", "user_id": 5}}),
    "scope is a list": (Operation.DELETE, {"scope": ["t", "u"]}),
    "no time": (Operation.DELETE, {"submitted_at": None}),
    "deadline is a word": (Operation.DELETE, {"deadline": "soon"}),
    "messages is an object": (Operation.ADD, {"messages": {"role": "user"}}),
    "a message is a number": (Operation.ADD, {"messages": [1]}),
    "a message is a string": (Operation.ADD, {"messages": [{"content": "x"}, "hi"]}),
    "a message is null": (Operation.ADD, {"messages": [None]}),
    "a message is a list": (Operation.ADD, {"messages": [[]]}),
    "no order key": (Operation.ADD, {"order": None}),
    "order key in the far future": (Operation.ADD, {"order": 10**30}),
    "order key in the far past": (Operation.ADD, {"order": -(10**30)}),
    "top_k of 0": (Operation.SEARCH, {"top_k": 0}),
    "query is null": (Operation.SEARCH, {"query": None}),
    "offset below 0": (Operation.LIST, {"offset": -1}),
    "limit of 0": (Operation.LIST, {"limit": 0}),
}


@pytest.mark.parametrize(("operation", "change"), JOB_PROBLEMS.values(), ids=JOB_PROBLEMS)
def test_a_job_that_would_do_harm_is_undecodable(
    operation: Operation, change: dict[str, Any]
) -> None:
    """Nothing is run that would leave records behind which break its user's searches and lists."""
    payload = payload_of(operation)
    payload["jobs"][0].update(change)
    with pytest.raises(UndecodableJob, match=r"jobs\.0"):
        decode_batch(json.dumps(payload))  # orjson writes no number beyond 64 bits; others do


def test_a_batch_that_came_without_job_ids_collides_with_no_other() -> None:
    """Plain Celery producers may leave ids to us; their records must not take each other's."""

    def records(batch_id: str) -> list[str]:
        payload = payload_of(Operation.ADD)
        payload["id"] = batch_id
        for job in payload["jobs"]:
            del job["id"]
            job["idempotency_key"] = None
        try:
            batch = decode_batch(orjson.dumps(payload).decode())
        except UndecodableJob:
            return []
        assert isinstance(batch, AddBatch)
        return [record_id for job in batch.jobs for record_id in job.record_ids()]

    found = records("0123456789abcdef-1") + records("0123456789abcdef-2")
    assert len(set(found)) == len(found)


def test_jobs_that_share_an_id_do_not_share_records() -> None:
    """Wherever a batch comes from: the second job's messages must not vanish as known ones."""
    payload = payload_of(Operation.ADD)
    for job in payload["jobs"]:
        job["id"] = "mine"
        job["idempotency_key"] = None
    found: list[str] = []
    with contextlib.suppress(UndecodableJob):
        batch = decode_batch(orjson.dumps(payload).decode())
        assert isinstance(batch, AddBatch)
        found = [record_id for job in batch.jobs for record_id in job.record_ids()]
    assert len(set(found)) == len(found)


# --- record ids ---------------------------------------------------------------------------------


def add_job(
    job_id: str = f"{BATCH_ID}-0",
    tenant: str = "t",
    user: str = "u",
    session: str | None = "s",
    key: str | None = None,
    messages: int = 11,
) -> AddJob:
    return AddJob(
        id=job_id, scope=Scope(tenant, user, session), submitted_at=0, order=1,
        messages=[{}] * messages, idempotency_key=key,
    )  # fmt: skip


@pytest.mark.parametrize("key", [None, "k", "用户"])
def test_a_record_has_the_same_id_however_often_its_job_runs(key: str | None) -> None:
    ids = add_job(key=key).record_ids()
    assert add_job(key=key).record_ids() == ids
    assert sorted(set(ids)) == ids


def test_record_ids_do_not_change_between_releases() -> None:
    """A retry after an upgrade must meet the records of the first attempt."""
    assert add_job().record_ids()[10] == "0123456789abcdef-1f-0-0000a"
    assert add_job(key="k").record_ids()[1] == "k36878665935b959958ea6fab4376714b-00001"


@pytest.mark.parametrize("key", [None, "k"])
def test_record_ids_of_a_job_sort_by_index(key: str | None) -> None:
    """Messages of one job have one order key, so their ids keep them in order."""
    found = add_job(key=key, messages=70_000).record_ids()
    assert sorted(set(found)) == found


def test_an_idempotency_key_replaces_the_job_id() -> None:
    """The second call with the key writes the records of the first."""
    assert add_job("a-1-0", key="k").record_ids()[0] == add_job("b-2-5", key="k").record_ids()[0]
    assert add_job("a-1-0").record_ids()[0] != add_job("b-2-5").record_ids()[0]


def test_no_session_is_the_default_session() -> None:
    """A key means the same whether the session was named or left out."""
    assert (
        add_job(session=None, key="k").record_ids()[0]
        == (add_job(session=DEFAULT_SESSION, key="k").record_ids()[0])
    )


def test_a_key_cannot_pass_for_a_job_id() -> None:
    """Whoever uses another's job id as their key does not meet that job's records."""
    victim = add_job("0123456789abcdef-1-0")
    assert add_job(key="0123456789abcdef-1-0").record_ids()[0] != victim.record_ids()[0]


PIECES = st.sampled_from(["", "a", "b", "ab", ":", "1:", "1:a", "2:ab", "\0", "-", "/", "1:a1:b"])


@given(st.tuples(*[PIECES | ids] * 4), st.tuples(*[PIECES | ids] * 4))
@example(("a", "b", "c", "d"), ("ab", "", "c", "d"))
@example(("t", "1:a", "s", "k"), ("t1:1", ":a", "s", "k"))
@example(("t", "u", "s:k", "x"), ("t", "u", "s", "k:x"))
@settings(max_examples=500, deadline=None)
def test_a_key_is_its_sessions_own(
    first: tuple[str, str, str, str], second: tuple[str, str, str, str]
) -> None:
    """No way of cutting the same letters into tenant, user, session and key is another's."""
    tuples = [(*each[:2], each[2] or DEFAULT_SESSION, each[3]) for each in (first, second)]
    made = [add_job(tenant=t, user=u, session=s, key=k).record_ids()[0] for t, u, s, k in tuples]
    assert (made[0] == made[1]) == (tuples[0] == tuples[1])


# --- job ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 9, 10, 9999, 999_999])
@pytest.mark.parametrize("sequence", ["1", "f", "10", "f" * 16])
def test_a_job_id_is_taken_apart(sequence: str, index: int) -> None:
    ref = JobRef.parse(f"0123456789abcdef-{sequence}-{index}")
    assert ref == JobRef("0123456789abcdef", f"0123456789abcdef-{sequence}", index)
    assert client_of(ref.batch_id) == ref.client_id


@pytest.mark.parametrize(
    "job_id",
    [
        "", "x", "-", "--", "0123456789abcdef", "0123456789abcdef-1", "0123456789abcdef-1-",
        "0123456789abcdef--0", "0123456789abcde-1-0", "0123456789abcdef0-1-0",
        "0123456789ABCDEF-1-0", "0123456789abcdeg-1-0", "0123456789abcdef-1-0\n",
        "\n0123456789abcdef-1-0", " 0123456789abcdef-1-0", "0123456789abcdef-1-0 ",
        "0123456789abcdef-1--1", "0123456789abcdef-1-+1", "0123456789abcdef-1-1_0",
        "0123456789abcdef-1-0x1", "0123456789abcdef-1-٣", "０123456789abcdef-1-0",
        "0123456789abcdef-1-1000000", "0123456789abcdef-" + "1" * 17 + "-0",
        "0123456789abcdef-1-0\0", "0123456789abcdef-1-0-0", "*", "0123456789abcdef-*-0",
        "\ud800", None, 5, b"0123456789abcdef-1-0", ["0123456789abcdef-1-0"],
    ],
    ids=ascii,
)  # fmt: skip
def test_what_was_never_a_job_id_is_unknown(job_id: Any) -> None:
    """It reaches no key: an error says so at once."""
    with pytest.raises(UnknownJob, match="not a job id"):
        JobRef.parse(job_id)


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_job_id_or_unknown(job_id: str) -> None:
    with pytest.raises(UnknownJob):
        JobRef.parse(job_id)


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", JobState)
def test_which_states_are_not_the_last(state: JobState) -> None:
    assert state.settled == (state.value not in ("queued", "running", "stored"))


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (BackendError("x"), JobState.FAILED),
        (InternalError("x"), JobState.FAILED),
        (UndecodableJob("x"), JobState.FAILED),
        (JobTimeout("x"), JobState.FAILED),
        (JobCancelled("x"), JobState.CANCELLED),
        (JobExpired("x"), JobState.EXPIRED),
    ],
    ids=lambda value: str(getattr(value, "code", value)),
)
def test_an_error_decides_the_state(error: Any, state: JobState) -> None:
    outcome = failed(error)
    assert outcome.state is state
    assert outcome.error == {"code": error.code, "message": "x"}
    assert outcome.result is None


def test_a_cancelled_job_says_so() -> None:
    assert cancelled().state is JobState.CANCELLED
    assert (cancelled().error or {})["code"] == "cancelled"


def test_a_result_is_read_as_it_was_written() -> None:
    """Pending jobs are null, and what users said is not in the repr that Celery logs."""
    result = BatchResult(
        operation=Operation.ADD,
        outcomes=[
            Outcome(state=JobState.SUCCEEDED, result={"record_ids": ["hunter2"], "added": 1}),
            None,
            failed(BackendError("no")),
        ],
    )
    encoded = orjson.dumps(result, default=fields_of)
    assert BatchResult.model_validate_json(encoded) == result
    assert "hunter2" not in repr(result)
    assert "hunter2" not in str(result)


@given(st.integers(0, 4_102_444_800_000_000))
@settings(deadline=None)
def test_an_order_key_tells_the_time_to_the_microsecond(order: int) -> None:
    """In UTC, wherever the worker runs."""
    moment = timestamp(order)
    assert moment.tzinfo is UTC
    assert moment == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=order)


@pytest.mark.parametrize("lane", Lane)
def test_a_queue_is_named_for_namespace_and_lane(lane: Lane) -> None:
    assert lane.queue() == f"recallq.{lane.value}"
    assert lane.queue("other") == f"other.{lane.value}"


def test_weights_bound_the_records_of_a_result() -> None:
    weights = {operation: [job.weight for job in jobs] for operation, jobs in JOBS.items()}
    assert weights[Operation.SEARCH] == [1, 10_000]
    assert weights[Operation.LIST] == [1]
    assert set(weights[Operation.ADD] + weights[Operation.DELETE]) == {1}
