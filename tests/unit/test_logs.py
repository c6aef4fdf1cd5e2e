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
    record = logging.LogRecord("name", logging.ERROR, __file__, 1, "it %s", ("failed",), info)
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
