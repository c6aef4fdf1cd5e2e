"""Checking input: what passes can be sent, stored and read back, and what does not is explained."""

from __future__ import annotations

import decimal
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq.clock import FleetClock
from recallq.contract import (
    AddBatch,
    AddJob,
    AnyJob,
    DeleteJob,
    HealthJob,
    Lane,
    ListJob,
    Operation,
    Scope,
    SearchJob,
    decode_batch,
    encode_batch,
    make_batch,
)
from recallq.errors import ConfigurationError, InvalidInput
from recallq.messages import Message, message_text
from recallq.requests import Requests
from recallq.settings import ClientSettings
from tests.strategies import ids, json_values

NOW = 1_790_000_000.5
BATCH_ID = "0123456789abcdef-1"
OPERATIONS: dict[type[AnyJob], Operation] = {
    AddJob: Operation.ADD,
    SearchJob: Operation.SEARCH,
    ListJob: Operation.LIST,
    DeleteJob: Operation.DELETE,
    HealthJob: Operation.HEALTH,
}


class Clock(FleetClock):
    """A clock that stands still, and counts the order keys it gave."""

    def __init__(self, now: float = NOW) -> None:
        super().__init__()
        self.moment = now
        self.given = 0

    def next_order(self) -> int:
        self.given += 1
        return super().next_order()

    def _now_us(self) -> int:
        return int(self.moment * 1_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def requests(clock: Clock) -> Requests:
    return Requests(ClientSettings.load(), clock)


def configured(**limits: Any) -> Requests:
    return Requests(ClientSettings.load(**limits), Clock())


def add(
    requests: Requests,
    user_id: Any = "ann",
    messages: Any = "hello",
    session_id: Any = "s1",
    *,
    timeout: Any = None,
    lane: Any = None,
    idempotency_key: Any = None,
) -> tuple[AddJob, int]:
    request = requests.add(
        user_id,
        messages,
        session_id,
        timeout=timeout,
        lane=lane,
        idempotency_key=idempotency_key,
    )
    assert request.operation is Operation.ADD
    assert isinstance(request.job, AddJob)
    return request.job, request.size


def search(
    requests: Requests,
    user_id: Any = "ann",
    messages: Any = "tea",
    filters: Any = None,
    *,
    timeout: Any = None,
) -> SearchJob | None:
    request = requests.search(user_id, messages, filters, timeout=timeout, lane=None)
    if request is None:
        return None
    assert request.operation is Operation.SEARCH
    assert isinstance(request.job, SearchJob)
    return request.job


def page(
    requests: Requests, user_id: Any = "ann", filters: Any = None, *, timeout: Any = None
) -> ListJob:
    request = requests.page(user_id, filters, timeout=timeout, lane=None)
    assert request.operation is Operation.LIST
    assert isinstance(request.job, ListJob)
    return request.job


def delete(
    requests: Requests, user_id: Any = "ann", session_id: Any = None, *, timeout: Any = None
) -> DeleteJob:
    request = requests.delete(user_id, session_id, timeout=timeout, lane=None, idempotency_key=None)
    assert request.operation is Operation.DELETE
    assert isinstance(request.job, DeleteJob)
    return request.job


def sent(job: AnyJob) -> AnyJob:
    """`job` as a worker gets to see it."""
    batch = make_batch(BATCH_ID, Lane.LIVE, OPERATIONS[type(job)], [job], None)
    return decode_batch(encode_batch(batch)).jobs[0]


def refused(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """What is said of a bad call, after checking that it took no order key and can be shown."""
    clock = Clock()
    with pytest.raises(InvalidInput) as caught:
        call(Requests(ClientSettings.load(), clock), *args, **kwargs)
    assert clock.given == 0
    said = str(caught.value)
    said.encode()
    return said


# --- what passes --------------------------------------------------------------------------------


def test_an_add_becomes_a_job(requests: Requests) -> None:
    """Scope, times, order key and messages arrive; the size is that of the encoded messages."""
    job, size = add(
        requests, "ann", ["hello", Message.assistant("hi")], "s1", timeout=10, idempotency_key="k"
    )
    read = sent(job)
    assert isinstance(read, AddJob)
    assert read.scope == Scope("default", "ann", "s1")
    assert read.submitted_at == NOW
    assert read.deadline == NOW + 10
    assert read.order == int(NOW * 1_000_000)
    assert read.idempotency_key == "k"
    assert [message["role"] for message in read.messages] == ["user", "assistant"]
    assert size == sum(len(orjson.dumps(message)) for message in read.messages)


def test_what_is_left_out_has_its_default(requests: Requests) -> None:
    job, _ = add(requests, session_id=None)
    assert job.scope.session_id == "default"
    assert job.deadline is None
    assert job.idempotency_key is None
    found = search(requests)
    assert found is not None
    assert (found.top_k, found.score_threshold, found.scope.session_id) == (10, None, None)
    assert (page(requests).offset, page(requests).limit) == (0, 10)
    assert delete(requests).scope == Scope("default", "ann", None)


def test_the_tenant_is_in_every_scope() -> None:
    requests = configured(tenant="acme")
    found = search(requests)
    assert found is not None
    jobs = [
        add(requests)[0],
        found,
        page(requests),
        delete(requests),
        requests.health(timeout=1).job,
    ]
    assert {job.scope.tenant for job in jobs} == {"acme"}


def test_filters_reach_the_job(requests: Requests) -> None:
    found = search(requests, filters={"top_k": 3, "session_id": "s", "score_threshold": 1})
    assert found is not None
    read = sent(found)
    assert isinstance(read, SearchJob)
    assert (read.top_k, read.scope.session_id, read.score_threshold) == (3, "s", 1.0)
    listed = page(requests, filters={"page_num": 3, "page_size": 20, "session_id": "s"})
    assert (listed.offset, listed.limit, listed.scope.session_id) == (40, 20, "s")


def test_a_filter_of_none_is_not_given(requests: Requests) -> None:
    found = search(requests, filters={"top_k": None, "session_id": None, "score_threshold": None})
    assert found is not None
    assert (found.top_k, found.scope.session_id, found.score_threshold) == (10, None, None)


def test_a_search_is_for_the_text_of_the_last_message(requests: Requests) -> None:
    """As in the reference: earlier messages are context."""
    found = search(requests, messages=[Message.user("green"), Message.user("tea")])
    assert found is not None
    assert found.query == "tea"


@pytest.mark.parametrize(
    "messages", ["", "  \n\t", [], [""], ["tea", ""], {"role": "user", "content": None}], ids=repr
)
def test_a_search_for_nothing_is_no_job(requests: Requests, messages: Any) -> None:
    assert search(requests, messages=messages) is None


@given(
    user=ids, session=st.none() | ids, key=st.none() | ids, value=json_values, said=ids,
    timeout=st.none() | st.floats(0.001, 1e6) | st.integers(1, 10**6),
)  # fmt: skip
@settings(deadline=None)
def test_what_passes_reaches_the_worker_unchanged(
    user: str, session: str | None, key: str | None, value: Any, said: str, timeout: float | None
) -> None:
    requests = configured()
    message = {"role": "user", "content": said, "extra": value}
    job, _ = add(requests, user, [message], session, timeout=timeout, idempotency_key=key)
    read = sent(job)
    assert isinstance(read, AddJob)
    assert read.messages == [message]
    assert read.scope == Scope("default", user, "default" if session is None else session)
    assert read.idempotency_key == key
    assert read.deadline == (None if timeout is None else NOW + timeout)


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"a": inner}])
@pytest.mark.parametrize(
    "place",
    [
        lambda deep: {"role": "user", "content": "hi", "extra": deep},
        lambda deep: {"role": "user", "content": [{"type": "data", "data": deep}]},
        lambda deep: {"role": "assistant", "tool_calls": [{"function": {"arguments": deep}}]},
    ],
    ids=["extra", "data", "tool call"],
)
def test_a_message_is_refused_or_arrives_however_deep_it_is_nested(
    wrap: Callable[[Any], Any], place: Callable[[Any], dict[str, Any]]
) -> None:
    """What the worker cannot read would take its whole batch to the dead letters with it."""
    arrived = 0
    for depth in range(0, 300, 3):
        deep: Any = "tea"
        for _ in range(depth):
            deep = wrap(deep)
        try:
            job, _ = add(configured(), messages=[place(deep)])
        except InvalidInput:
            continue
        read = sent(job)
        assert isinstance(read, AddJob)
        assert read.messages == [place(deep)]
        assert isinstance(message_text(read.messages[0]), str)
        arrived += 1
    assert arrived >= 10


@given(st.integers(1, 2**40), st.integers(1, 10_000))
@settings(deadline=None)
def test_any_page_can_be_asked_for(number: int, size: int) -> None:
    """Far beyond any user's last page, and within what Redis can count to."""
    job = page(configured(), filters={"page_num": number, "page_size": size})
    assert job.offset == (number - 1) * size
    assert job.offset + job.limit < 2**63
    assert sent(job) == job


# --- who and where ------------------------------------------------------------------------------

BAD_IDS: dict[str, tuple[Any, str]] = {
    "empty": ("", "empty"),
    "None": (None, "string"),
    "a number": (5, "string"),
    "a bool": (True, "string"),
    "bytes": (b"ann", "string"),
    "a list": (["ann"], "string"),
    "a dictionary": ({"id": "ann"}, "string"),
    "half a character": ("ann\ud800", "Unicode"),
    "too long": ("x" * (64 * 1024 + 1), "longer"),
    "too long in UTF-8": ("用" * (64 * 1024 // 3 + 1), "longer"),
    "enormous": ("x" * 5_000_000, "longer"),
}


@pytest.mark.parametrize("call", [add, search, page, delete])
@pytest.mark.parametrize(("user_id", "word"), BAD_IDS.values(), ids=BAD_IDS)
def test_a_bad_user_is_refused(call: Callable[..., object], user_id: Any, word: str) -> None:
    said = refused(call, user_id)
    assert said.startswith("user_id ")
    assert word in said
    assert len(said) < 200


SESSION_CALLS: dict[str, Callable[[Requests, Any], object]] = {
    "add": lambda requests, session: add(requests, session_id=session),
    "search": lambda requests, session: search(requests, filters={"session_id": session}),
    "list": lambda requests, session: page(requests, filters={"session_id": session}),
    "delete": lambda requests, session: delete(requests, session_id=session),
}


@pytest.mark.parametrize("call", SESSION_CALLS.values(), ids=SESSION_CALLS)
@pytest.mark.parametrize(
    ("session", "word"),
    [value for name, value in BAD_IDS.items() if name != "None"],
    ids=[name for name in BAD_IDS if name != "None"],
)
def test_a_bad_session_is_refused(
    call: Callable[[Requests, Any], object], session: Any, word: str
) -> None:
    """An empty session above all: a delete must not take it for all sessions."""
    said = refused(call, session)
    assert said.startswith("session_id ")
    assert word in said


@pytest.mark.parametrize(
    ("key", "word"),
    [value for name, value in BAD_IDS.items() if name != "None"],
    ids=[name for name in BAD_IDS if name != "None"],
)
def test_a_bad_idempotency_key_is_refused(key: Any, word: str) -> None:
    said = refused(add, idempotency_key=key)
    assert said.startswith("idempotency_key ")
    assert word in said


def test_ids_may_be_as_long_as_the_limit_says() -> None:
    requests = configured(max_id_bytes=7)
    assert delete(requests, "用户x").scope.user_id == "用户x"
    with pytest.raises(InvalidInput, match="7 bytes"):
        delete(requests, "用户xy")


@pytest.mark.parametrize("tenant", ["", "x" * 70_000, "\ud800"], ids=["empty", "long", "half"])
def test_a_bad_tenant_is_a_matter_of_configuration(tenant: str) -> None:
    """It is the same for every call, so it is said when the client starts."""
    with pytest.raises(ConfigurationError, match="tenant"):
        configured(tenant=tenant)


# --- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ((), "messages is empty"),
        (None, "messages must be a list"),
        (5, "messages must be a list"),
        (b"hi", "messages must be a list"),
        ({"hi"}, "messages must be a list"),
        (["hi", None], "messages[1]"),
        (["hi", {"text": "x"}], "messages[1]"),
        (["hi", {"role": 5, "content": "x"}], "messages[1]: role"),
        (["hi", "\ud800"], "messages[1]"),
        (["hi", {"content": "x", "n": 2**64}], "messages[1]"),
        (["hi", "x" * 1024 * 1024], "messages[1] is 1,048,"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_bad_messages_are_refused(messages: Any, words: str) -> None:
    assert words in refused(add, messages=messages)


@pytest.mark.parametrize(
    "messages", [None, 5, b"hi", ["hi", None], ["hi", {"text": "x"}], "\ud800", ["ok", "\ud800"]],
    ids=ascii,
)  # fmt: skip
def test_bad_messages_to_search_for_are_refused(messages: Any) -> None:
    assert refused(search, messages=messages)


def test_messages_may_be_as_large_as_the_limit_says() -> None:
    """Each on its own, and all of a call together."""
    requests = configured(max_message_bytes=1024, max_job_bytes=2048)
    fits = {"content": "x" * (1024 - len('{"content":""}'))}
    assert add(requests, messages=[fits, fits])[1] == 2048
    with pytest.raises(InvalidInput, match=r"messages\[0\].*max_message_bytes"):
        add(requests, messages={"content": fits["content"] + "x"})
    with pytest.raises(InvalidInput, match="max_job_bytes"):
        add(requests, messages=[fits, fits, {"content": ""}])


def test_a_query_may_be_no_larger_than_a_message() -> None:
    """What is too large to store is too large to search for: the limit protects the queue."""
    requests = configured(max_message_bytes=1024)
    assert search(requests, messages="x" * 900) is not None
    for query in ("x" * 1100, "x" * 100_000, "用" * 400):
        with pytest.raises(InvalidInput, match="1,024"):
            search(requests, messages=query)


# --- filters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (search, ["top_k", "session_id", "score_threshold"]),
        (page, ["page_num", "page_size", "session_id"]),
    ],
)
@pytest.mark.parametrize("name", ["topk", "TOP_K", "limit", "", "user_id", 5, None])
def test_an_unknown_filter_is_told_the_known_ones(
    call: Callable[..., object], known: list[str], name: Any
) -> None:
    """Also where its value is None: a misspelt filter would otherwise go unnoticed."""
    for value in (1, None):
        said = refused(call, filters={name: value})
        assert repr(name) in said
        assert all(each in said for each in known)


def test_each_call_has_its_own_filters() -> None:
    assert "'page_num'" in refused(search, filters={"page_num": 1})
    assert "'top_k'" in refused(page, filters={"top_k": 1})


@pytest.mark.parametrize("call", [search, page])
@pytest.mark.parametrize("filters", [5, "top_k", ["top_k"], [("top_k", 1)], True], ids=repr)
def test_filters_are_a_dictionary(call: Callable[..., object], filters: Any) -> None:
    assert refused(call, filters=filters).startswith("filters must be a dictionary")


BAD_COUNTS: list[Any] = [
    0, -1, -(10**30), True, False, 1.0, 1.5, "1", "", b"1", [1], math.nan, math.inf,
    decimal.Decimal(1), 2**63, 10**30,
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "name"), [(search, "top_k"), (page, "page_size"), (page, "page_num")]
)
@pytest.mark.parametrize("value", BAD_COUNTS, ids=repr)
def test_a_bad_count_is_refused(call: Callable[..., object], name: str, value: Any) -> None:
    """Whole numbers from 1, within reason; a bool is no number here."""
    said = refused(call, filters={name: value})
    assert said.startswith(f"{name} must be ")
    assert len(said) < 200


@pytest.mark.parametrize(
    ("call", "name"), [(search, "top_k"), (page, "page_size"), (page, "page_num")]
)
@pytest.mark.parametrize("value", [10**5000, -(10**5000), "x" * 10**6], ids=["+", "-", "text"])
def test_an_enormous_count_is_refused_in_few_words(
    call: Callable[..., object], name: str, value: Any
) -> None:
    """Python itself refuses to write numbers this long."""
    said = refused(call, filters={name: value})
    assert said.startswith(f"{name} must be ")
    assert len(said) < 300


@pytest.mark.parametrize(("call", "name"), [(search, "top_k"), (page, "page_size")])
def test_counts_are_bounded_by_a_setting(call: Callable[..., Any], name: str) -> None:
    requests = configured(max_page_size=25)
    assert call(requests, filters={name: 25}) is not None
    with pytest.raises(InvalidInput, match="at most 25, not 26"):
        call(requests, filters={name: 26})


@pytest.mark.parametrize("value", [0, 0.5, 1, -1, 1e308])
def test_a_threshold_is_any_number(requests: Requests, value: float) -> None:
    found = search(requests, filters={"score_threshold": value})
    assert found is not None
    read = sent(found)
    assert isinstance(read, SearchJob)
    assert read.score_threshold == value


@pytest.mark.parametrize(
    "value", [True, "0.5", [0.5], decimal.Decimal("0.5"), math.nan, math.inf, -math.inf, 10**400],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_threshold_that_is_no_number_is_refused(value: Any) -> None:
    """JSON knows neither NaN nor infinity: the worker would search without a threshold."""
    assert refused(search, filters={"score_threshold": value}).startswith("score_threshold ")


# --- time ---------------------------------------------------------------------------------------

BAD_TIMEOUTS: list[Any] = [
    0, 0.0, -0.0, -1, -1e-9, math.nan, math.inf, -math.inf, True, False, "5", b"5", [5],
    decimal.Decimal(5), timedelta(seconds=5), 10**400,
]  # fmt: skip


@pytest.mark.parametrize("call", [add, search, page, delete])
@pytest.mark.parametrize("timeout", BAD_TIMEOUTS, ids=lambda value: repr(value)[:20])
def test_a_bad_timeout_is_refused(call: Callable[..., object], timeout: Any) -> None:
    said = refused(call, timeout=timeout)
    assert said.startswith("timeout must be a positive number of seconds")


@pytest.mark.parametrize("timeout", BAD_TIMEOUTS, ids=lambda value: repr(value)[:20])
def test_a_bad_timeout_of_a_health_check_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidInput, match="timeout"):
        configured().health(timeout=timeout)


@pytest.mark.parametrize("timeout", [0.001, 1, 30.5, 10**6])
def test_a_timeout_sets_the_deadline(requests: Requests, timeout: float) -> None:
    for job in (
        add(requests, timeout=timeout)[0],
        page(requests, timeout=timeout),
        delete(requests, timeout=timeout),
        requests.health(timeout=timeout).job,
    ):
        assert job.deadline == NOW + timeout
        assert job.submitted_at == NOW


def test_order_keys_rise_even_while_the_clock_stands_still(requests: Requests) -> None:
    """Calls of one microsecond keep the order in which they were made."""
    orders = [add(requests)[0].order for _ in range(100)]
    assert orders == sorted(set(orders))
    assert orders[0] == int(NOW * 1_000_000)


def test_order_keys_rise_even_when_the_clock_goes_back(requests: Requests, clock: Clock) -> None:
    """A new calibration may find that the clock was ahead."""
    orders = []
    for moment in (NOW, NOW + 1, NOW - 5, NOW - 5, NOW + 2):
        clock.moment = moment
        orders.append(add(requests)[0].order)
    assert orders == sorted(set(orders))
    assert orders[-1] == int((NOW + 2) * 1_000_000)


def test_the_uncalibrated_clock_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until Redis was asked, and unmoved by a step of the wall clock afterwards."""
    clock = FleetClock()
    assert abs(clock.now() - time.time()) < 60
    before = clock.now()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert 0 <= clock.now() - before < 60


# --- lanes --------------------------------------------------------------------------------------


def lane_of(requests: Requests, lane: Any) -> Lane:
    ways = {
        requests.page("ann", None, timeout=None, lane=lane).lane,
        requests.delete("ann", None, timeout=None, lane=lane, idempotency_key=None).lane,
        requests.add("ann", "hi", None, timeout=None, lane=lane, idempotency_key=None).lane,
    }
    (way,) = ways
    return way


@pytest.mark.parametrize("lane", Lane)
def test_a_lane_goes_by_its_name(requests: Requests, lane: Lane) -> None:
    assert lane_of(requests, lane) is lane
    assert lane_of(requests, lane.value) is lane


def test_no_lane_is_the_live_one(requests: Requests) -> None:
    assert lane_of(requests, None) is Lane.LIVE


@pytest.mark.parametrize(
    "lane", ["", "fast", "LIVE", "recallq.live", " live", 5, True, ["live"], b"live"], ids=repr
)
def test_an_unknown_lane_is_told_the_known_ones(requests: Requests, lane: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        requests.search("ann", [], None, timeout=None, lane=lane)
    assert repr(lane) in str(caught.value)
    assert "live, bulk, slow" in str(caught.value)


def test_health_needs_no_user(requests: Requests) -> None:
    job = requests.health(timeout=5).job
    batch = make_batch(BATCH_ID, Lane.LIVE, Operation.HEALTH, [job], "redis")
    read = decode_batch(encode_batch(batch))
    assert not isinstance(read, AddBatch)
    assert isinstance(read.jobs[0], HealthJob)
