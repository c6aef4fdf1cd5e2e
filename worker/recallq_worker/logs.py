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

_FIELDS = ("job", "batch", "operation", "lane", "tenant", "user", "trace", "state", "error")
_NUMBERS = ("attempts", "queued_seconds", "run_seconds")


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


def told_of(error: BaseException) -> str:
    """An error as a traceback has it, its causes first, without their words."""
    told: list[str] = []
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        stack = "".join(traceback.format_tb(each.__traceback__))
        inner = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        told.append(
            f"Traceback (most recent call last):\n{stack}{name} (its words are not logged)"
            + "".join(f"\none of its errors:\n{told_of(one)}" for one in inner)
        )
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\nled to:\n".join(reversed(told))


class TextFormatter(logging.Formatter):
    """A line for people; fields of jobs follow the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        fields = [
            f"{name}={value}"
            for name in (*_FIELDS, *_NUMBERS)
            if (value := record.__dict__.get(name)) is not None
        ]
        return " ".join([super().formatMessage(record), *fields])

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

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        return "" if ei[1] is None else told_of(ei[1])
