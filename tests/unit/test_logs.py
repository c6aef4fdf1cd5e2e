"""How workers tell of errors."""

from __future__ import annotations

import logging

import orjson
import pytest

from recallq_worker.logs import JsonFormatter, TextFormatter, told_of

WORDS = ["what Ann said", "a note on it", "once more what she said"]
"""In no line of code that raises: those are logged."""


def secret() -> None:
    raise ValueError(WORDS[0])


def fail() -> None:
    try:
        secret()
    except ValueError as error:
        error.add_note(WORDS[1])
        raise RuntimeError(WORDS[2]) from error


def failing() -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        fail()
    return raised.value


def record_of(error: BaseException) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__)
    record = logging.LogRecord(
        "recallq_worker.jobs", logging.ERROR, __file__, 1, "it %s", ("failed",), info
    )
    record.job = "j1"
    return record


def test_an_error_and_its_cause_without_their_words() -> None:
    told = told_of(failing())
    assert told.index("builtins.ValueError") < told.index("builtins.RuntimeError")
    assert "in secret" in told
    assert "\nled to:\n" in told


def test_a_group_of_errors() -> None:
    told = told_of(ExceptionGroup("what Ann said", [failing(), KeyError("Ann")]))
    assert told.count("(its words are not logged)") == 4
    assert "builtins.KeyError" in told


def test_errors_that_go_round_in_circles() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert told_of(first).count("ValueError") == 2


def test_an_error_taken_out_of_its_group() -> None:
    """Its context is the group, which holds it."""
    error = failing()
    error.__context__, error.__cause__ = ExceptionGroup(WORDS[0], [error]), None
    error.__suppress_context__ = False
    for formatter in (TextFormatter(), JsonFormatter()):
        told = formatter.format(record_of(error))
        assert told.count("builtins.RuntimeError (") == 1
        assert not any(words in told for words in WORDS)


def test_a_long_chain_is_cut() -> None:
    error: Exception = ValueError()
    for _ in range(10_000):
        error, before = ValueError(), error
        error.__cause__ = before
    assert len(told_of(error)) < 10_000


def test_what_others_give_along_is_left_out() -> None:
    record = logging.LogRecord("celery.app.trace", logging.INFO, __file__, 1, "task", (), None)
    record.data = {"args": WORDS[0]}
    record.user = "not ours"
    assert orjson.loads(JsonFormatter().format(record)).keys() == {
        "time", "level", "logger", "message",
    }  # fmt: skip
    assert "not ours" not in TextFormatter().format(record)


def test_a_text_that_another_handler_made_is_not_used() -> None:
    record = record_of(failing())
    logging.Formatter().format(record)
    assert not any(words in TextFormatter().format(record) for words in WORDS)


def test_both_formats_leave_words_out() -> None:
    error = failing()
    for formatter in (TextFormatter(), JsonFormatter()):
        told = formatter.format(record_of(error))
        assert "j1" in told
        assert "it failed" in told
        assert not any(words in told for words in WORDS)


def test_json_is_one_line() -> None:
    told = orjson.loads(JsonFormatter().format(record_of(failing())))
    assert told["level"] == "ERROR"
    assert told["message"] == "it failed"
    assert "Traceback" in told["exc_info"]
