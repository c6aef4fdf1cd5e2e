"""Runs a command's coroutine, and turns what goes wrong into one clear line and an exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from recallq.errors import RecallQError

T = TypeVar("T")

INTERRUPTED = 130
"""What a shell expects of a program that ended by Ctrl-C."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. A `RecallQError` ends the program with exit code 1, Ctrl-C with 130."""
    return guarded(lambda: asyncio.run(work))


def guarded(work: Callable[[], T]) -> T:
    """The same for work that is not a coroutine."""
    try:
        return work()
    except RecallQError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("recallq: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output, head say, has seen enough.
        sys.stderr.close()
        raise SystemExit(0) from None


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"recallq: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
