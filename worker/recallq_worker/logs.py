"""What a worker logs, and how: as lines for people or as JSON, and never what users said.

A line about a job carries the fields that `recallq_worker.meters` gives it.

Errors are logged without their words, which may quote texts and keys whatever library they come
from: their types, and where they were raised. And of libraries that are not known to be discreet,
only warnings are logged.
"""

from __future__ import annotations

import logging
import traceback
from functools import lru_cache
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, TypeAlias

from celery.signals import after_setup_logger, after_setup_task_logger
from pythonjsonlogger.orjson import OrjsonFormatter

from recallq_worker import settings as worker_settings
from recallq_worker.backends import registry

_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)

_FIELDS = (
    "job", "batch", "operation", "lane", "tenant", "user", "trace", "state", "error",
    "attempts", "queued_seconds", "run_seconds",
)  # fmt: skip
_OWN = frozenset({"time", "level", "logger", "message", "exc_info", "stack_info"})
_ERRORS = 20
"""Most errors that are told together, and most frames of each."""
_FRAMES = 50


def install() -> None:
    """Has Celery's loggers write as the settings say."""
    after_setup_logger.connect(_set_up)
    after_setup_task_logger.connect(_set_up)


def _set_up(logger: logging.Logger, **_: Any) -> None:
    formatter: logging.Formatter = TextFormatter()
    if worker_settings.current().log_format == "json":
        formatter = JsonFormatter()
    for handler in logger.handlers:
        handler.setFormatter(formatter)
        handler.addFilter(_is_discreet)
        handler.addFilter(_without_words)


@lru_cache(maxsize=1)
def _ours() -> frozenset[str]:
    """Packages whose every line may be read: ours, Celery's, and those of backends."""
    backends = {each.module.partition(".")[0] for each in entry_points(group=registry.GROUP)}
    return frozenset({"recallq", "recallq_worker", "celery", "kombu", *backends})


def _is_discreet(record: logging.LogRecord) -> bool:
    """Whether it is none that tells what was sent to a model, or to a task: at level DEBUG the
    libraries that talk to models write down all that they send."""
    if record.levelno >= logging.WARNING:
        return True
    return record.name != "celery.pool" and record.name.partition(".")[0] in _ours()


def _without_words(record: logging.LogRecord) -> bool:
    """Takes the words out of what Celery tells of a task that failed. True: it is logged."""
    if record.name == "celery.app.trace" and isinstance(record.args, dict) and "exc" in record.args:
        name = str(record.args["exc"]).partition("(")[0]
        record.args = {**record.args, "exc": name, "traceback": ""}
    return True


def told_of(error: BaseException) -> str:
    """An error as a traceback has it, its causes first, without their words."""
    return _told(error, set())


def _told(error: BaseException, seen: set[int]) -> str:
    """The same, for each error once: one taken out of a group has the group as its context."""
    told: list[str] = []
    each: BaseException | None = error
    while each is not None and id(each) not in seen and len(seen) < _ERRORS:
        seen.add(id(each))
        stack = "".join(traceback.format_tb(each.__traceback__, limit=-_FRAMES))
        inner = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        told.append(
            f"Traceback (most recent call last):\n{stack}{name} (its words are not logged)"
            + "".join(
                f"\none of its errors:\n{said}" for one in inner if (said := _told(one, seen))
            )
        )
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\nled to:\n".join(reversed(told))


class TextFormatter(logging.Formatter):
    """A line for people; fields of jobs follow the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        fields = [f"{name}={value}" for name, value in _fields_of(record) if value is not None]
        return " ".join([super().formatMessage(record), *fields])

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # as another handler's formatter may have told it
        return super().format(record)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        return "" if ei[1] is None else told_of(ei[1])


class JsonFormatter(OrjsonFormatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and fields of jobs."""

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None
        told: str = super().format(record)
        return told

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_data, record, message_dict)
        # What others give along, as Celery does with a task's arguments and its error, is theirs.
        for name in set(log_data) - _OWN:
            del log_data[name]
        log_data.update(_fields_of(record))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        return "" if ei[1] is None else told_of(ei[1])


def _fields_of(record: logging.LogRecord) -> list[tuple[str, Any]]:
    """Of a line about a job."""
    if record.name.partition(".")[0] != "recallq_worker":
        return []
    return [(name, record.__dict__[name]) for name in _FIELDS if name in record.__dict__]
