"""When a failed job is tried again, and when not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallq.errors import (
    BackendError,
    BackendUnavailable,
    InternalError,
    JobError,
    JobExpired,
    WorkerLost,
    WrongBackend,
)
from recallq_worker.retries import RetryPolicy

POLICY = RetryPolicy(attempts=5, base=0.5, cap=4.0)
DOWN = BackendUnavailable("down")


@given(st.integers(1, 4))
def test_waits_lie_anywhere_below_a_bound_that_doubles(attempts: int) -> None:
    bound = min(4.0, 0.5 * 2 ** (attempts - 1))
    waits = [POLICY.wait(DOWN, attempts, left=None) for _ in range(300)]
    known = [wait for wait in waits if wait is not None]
    assert len(known) == 300
    assert max(known) <= bound
    assert max(known) > bound * 0.9  # full jitter: all of it is used
    assert min(known) < bound * 0.1


def test_attempts_are_bounded() -> None:
    assert POLICY.wait(DOWN, 4, left=None) is not None
    assert POLICY.wait(DOWN, 5, left=None) is None
    assert RetryPolicy(1, 0.5, 4).wait(DOWN, 1, left=None) is None


@given(st.integers(1, 10**6))
def test_however_often_it_is_tried_the_wait_is_a_number(attempts: int) -> None:
    wait = RetryPolicy(10**9, 0.5, 60).wait(DOWN, attempts, left=None)
    assert wait is not None
    assert 0 <= wait <= 60


@pytest.mark.parametrize(
    "error",
    [BackendError("no"), InternalError("no"), WrongBackend("no"), JobExpired("no"),
     WorkerLost("no"), JobError("no")],
)  # fmt: skip
def test_what_would_fail_again_is_not_tried_again(error: JobError) -> None:
    assert POLICY.wait(error, 1, left=None) is None


def test_a_wait_that_the_backend_asks_for_is_kept_in_full() -> None:
    for _ in range(100):
        wait = POLICY.wait(BackendUnavailable("busy", retry_after=30), 1, left=None)
        assert wait is not None
        assert 30 <= wait <= 30.5


@pytest.mark.parametrize("nonsense", [-5.0, 0.0])
def test_a_wait_of_less_than_nothing_is_none(nonsense: float) -> None:
    wait = POLICY.wait(BackendUnavailable("busy", retry_after=nonsense), 1, left=None)
    assert wait is not None
    assert 0 <= wait <= 0.5


def test_nobody_waits_for_ever() -> None:
    wait = POLICY.wait(BackendUnavailable("busy", retry_after=1e12), 1, left=None)
    assert wait is not None
    assert wait < 2 * 24 * 3600


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    assert POLICY.wait(BackendUnavailable("busy", retry_after=30), 1, left=20) is None
    assert POLICY.wait(DOWN, 1, left=0) is None
    assert POLICY.wait(DOWN, 1, left=-1) is None
    assert POLICY.wait(DOWN, 1, left=20) is not None
