"""The error tree: what it says of itself, what callers may catch, and its way across the wire."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq import errors
from recallq.errors import (
    BackendUnavailable,
    ClientClosed,
    ConfigurationError,
    InternalError,
    InvalidInput,
    JobCancelled,
    JobError,
    JobExpired,
    JobFailed,
    JobTimeout,
    MissingExtra,
    QueueFull,
    RecallQError,
    ServiceUnavailable,
    UnknownJob,
    from_wire,
    to_wire,
)
from tests.strategies import json_objects, json_values, text

DEFINED = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, RecallQError)
}


JOB_ERRORS = [cls for cls in DEFINED.values() if issubclass(cls, JobError)]


def every_error() -> list[RecallQError]:
    """One of each class, with everything it can carry."""
    odd: dict[type[RecallQError], RecallQError] = {
        MissingExtra: MissingExtra("the redis backend", "worker"),
        QueueFull: QueueFull("the lane is full", retry_after=1.5),
        BackendUnavailable: BackendUnavailable("overloaded", job_id="j", retry_after=2.5),
    }
    made: list[RecallQError] = []
    for cls in DEFINED.values():
        if cls in odd:
            made.append(odd[cls])
        elif issubclass(cls, JobError):
            made.append(cls("what happened", job_id="j"))
        else:
            made.append(cls("what happened"))
    return made


def name_of(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    """Reads the drawing line by line and compares every class and its bases."""
    drawn: dict[str, set[str]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([ │├└─]*)([A-Z]\w+)(?: \((\w+)\))?(?:\s|$)", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        path[depth:] = [found[2]]
        drawn[found[2]] = {*(path[depth - 1 : depth] if depth else ["Exception"])}
        if found[3]:
            drawn[found[2]].add(found[3])
    assert drawn == {
        name: {base.__name__ for base in cls.__bases__} for name, cls in DEFINED.items()
    }


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidInput("x"), ValueError),
        (ServiceUnavailable("x"), ConnectionError),
        (JobTimeout("x"), TimeoutError),
        (UnknownJob("x"), LookupError),
    ],
    ids=name_of,
)
def test_an_error_is_also_the_builtin_that_callers_expect(
    error: RecallQError, builtin: type[Exception]
) -> None:
    """Code that knows nothing of RecallQ catches the error by its builtin kind."""
    assert isinstance(error, builtin)
    assert str(error) == "x"


@pytest.mark.parametrize("cls", [InvalidInput, ConfigurationError, QueueFull, ClientClosed])
def test_an_error_without_a_job_is_no_job_error(cls: type[RecallQError]) -> None:
    """What refuses a call before it is enqueued cannot be taken for a job's outcome."""
    assert not issubclass(cls, JobError)


def test_every_error_is_a_recallq_error() -> None:
    """One except clause catches all that is raised on purpose."""
    exceptions = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }
    assert exceptions == set(DEFINED)
    assert len(exceptions) > 15


def test_a_missing_extra_tells_what_to_install() -> None:
    error = MissingExtra("the mem0 backend", "mem0")
    assert error.extra == "mem0"
    assert str(error) == "the mem0 backend needs an extra: pip install 'recallq[mem0]'"


@pytest.mark.parametrize("error", every_error(), ids=name_of)
@pytest.mark.parametrize(
    "travel", [copy.copy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_an_error_survives_the_way_between_processes(error: RecallQError, travel: Any) -> None:
    """Process pools and other task queues pickle what a call raised."""
    back = travel(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


# --- the wire -----------------------------------------------------------------------------------


def test_every_code_belongs_to_one_error() -> None:
    codes = [cls.code for cls in JOB_ERRORS]
    assert sorted(set(codes)) == sorted(codes)


@pytest.mark.parametrize("cls", JOB_ERRORS, ids=name_of)
def test_a_job_error_crosses_the_wire(cls: type[JobError]) -> None:
    """Class and message come back after JSON; the job id is the reader's to give."""
    wire = orjson.loads(orjson.dumps(to_wire(cls("it went wrong: 出错了", job_id="elsewhere"))))
    back = from_wire(wire, job_id="c-1-0")
    assert type(back) is cls
    assert str(back) == "it went wrong: 出错了"
    assert back.job_id == "c-1-0"


@pytest.mark.parametrize("retry_after", [None, 0.0, 1.5, 30])
def test_the_time_to_wait_crosses_the_wire(retry_after: float | None) -> None:
    wire = to_wire(BackendUnavailable("busy", retry_after=retry_after))
    assert ("retry_after" in wire) == (retry_after is not None)
    back = from_wire(orjson.loads(orjson.dumps(wire)), job_id=None)
    assert isinstance(back, BackendUnavailable)
    assert back.retry_after == retry_after


@pytest.mark.parametrize("retry_after", ["5", True, [5], {}, None])
def test_a_time_to_wait_that_is_no_number_is_none(retry_after: object) -> None:
    """Callers sleep for it."""
    wire = {"code": "backend_unavailable", "message": "m", "retry_after": retry_after}
    back = from_wire(wire, job_id=None)
    assert isinstance(back, BackendUnavailable)
    assert back.retry_after is None


def test_a_job_error_carries_nothing_but_code_and_message() -> None:
    """Causes and tracebacks, which may hold credentials, stay where they were."""
    error = InternalError("a defect", job_id="j")
    error.__cause__ = ValueError("password")
    error.add_note("password")
    assert to_wire(error) == {"code": "internal", "message": "a defect"}


@pytest.mark.parametrize("code", ["", "rate_limited", "Timeout", "JobTimeout", None, 5, True])
def test_an_unknown_code_becomes_a_plain_failure(code: object) -> None:
    """An old client keeps a newer worker's message even if it does not know the kind."""
    error = from_wire({"code": code, "message": "new trouble"}, job_id="j")
    assert type(error) is JobFailed
    assert str(error) == "new trouble"


def test_an_error_without_a_message_still_says_something() -> None:
    assert str(from_wire({}, job_id=None))
    assert type(from_wire({"code": "cancelled"}, job_id=None)) is JobCancelled
    assert str(from_wire({"code": "expired"}, job_id=None))
    assert type(from_wire({"code": "expired"}, job_id=None)) is JobExpired


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "code": json_values | st.sampled_from([cls.code for cls in JOB_ERRORS]),
            "message": json_values,
            "retry_after": json_values,
        },
    )
    | json_objects,
    st.none() | text,
)
@settings(deadline=None)
def test_no_error_object_is_too_strange_to_read(wire: dict[str, Any], job_id: str | None) -> None:
    """Whatever object comes as an error, the caller gets a `JobError` with usable fields."""
    error = from_wire(wire, job_id=job_id)
    assert isinstance(error, JobError)
    assert isinstance(str(error), str)
    assert error.job_id == job_id
    if isinstance(error, BackendUnavailable):
        wait = error.retry_after
        assert wait is None or (isinstance(wait, (int, float)) and not isinstance(wait, bool))


@pytest.mark.parametrize("code", [["failed"], {"failed": 1}])
def test_a_code_of_the_wrong_type_becomes_a_plain_failure(code: object) -> None:
    assert type(from_wire({"code": code, "message": "m"}, job_id=None)) is JobFailed
