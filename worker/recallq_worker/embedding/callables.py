"""Embeddings by a function of the user's own: a model in the process, or a service of any kind.

``def embed(texts: list[str]) -> list[list[float]]``, or ``async def``; an array of numpy does as
well. It may take ``kind``, which is then "document" or "query". What it raises counts as passing,
but for `recallq.errors.BackendError`; its words are not shown, as they may quote texts.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from recallq.errors import BackendError, BackendUnavailable, ConfigurationError, JobError
from recallq_worker.daemon_threads import DaemonThreads
from recallq_worker.embedding.base import Embedded, Kind, as_vectors

_SETTING = "RECALLQ_EMBEDDING_CALLABLE"
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class CallableEmbedder:
    """A function as an embedder. One that is not async runs in threads of its own."""

    most_request_tokens = None

    def __init__(
        self,
        name: str,
        *,
        dimensions: int,
        model: str | None = None,
        most_texts: int = 100,
        at_once: int | None = None,
    ) -> None:
        """`name` is ``package.module:function``. Raises `ConfigurationError`.

        `at_once` calls run at the same time; None means one for a function that is not async, as
        few models may be called by two threads.
        """
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{_SETTING} must read package.module:function, not {name!r}")
        self.model = model or name
        self.dimensions = dimensions
        self.most_texts = most_texts
        self.account = f"callable {name}"
        self._name = name
        self._at_once = at_once
        self._doing = f"embedding with {name}"
        self._function: Callable[..., Any] | None = None
        self._takes_kind = False
        self._threads: DaemonThreads | None = None

    def __repr__(self) -> str:
        return f"CallableEmbedder({self._name!r})"

    @property
    def most_at_once(self) -> int | None:
        return (self._at_once or 1) if self._threads is not None else self._at_once

    async def start(self) -> None:
        if self._function is None:
            # Importing may load a model, which takes its time.
            function = await asyncio.to_thread(self._load)
            if not _is_async(function):
                self._threads = DaemonThreads(self._at_once or 1, "embedding")
            self._takes_kind = _takes_kind(function)
            self._function = function

    def _load(self) -> Callable[..., Any]:
        module, _, path = self._name.partition(":")
        try:
            found: Any = import_module(module)
        except Exception as error:
            raise ConfigurationError(
                f"{_SETTING}: importing {module} failed: {type(error).__name__}: {error}"
            ) from error
        for part in path.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise ConfigurationError(f"{_SETTING}: {module} has no {path}") from None
        if not callable(found):
            raise ConfigurationError(f"{_SETTING}: {self._name} cannot be called")
        function: Callable[..., Any] = found
        return function

    async def stop(self) -> None:
        threads, self._threads, self._function = self._threads, None, None
        if threads is not None:
            threads.shutdown()

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        function, threads = self._function, self._threads
        if function is None:
            raise BackendUnavailable(f"{self._doing}: it is not started")
        call = partial(function, list(texts), **({"kind": kind.value} if self._takes_kind else {}))
        failed: JobError
        try:
            if threads is None:
                rows = await call()
            else:
                rows = await asyncio.get_running_loop().run_in_executor(threads, call)
            rows = list(await rows if inspect.isawaitable(rows) else rows)
        except (BackendError, BackendUnavailable):
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the function's
            failed = BackendUnavailable(f"{self._doing}: {type(error).__name__}")
        else:
            vectors = as_vectors(
                rows, texts=len(texts), dimensions=self.dimensions, doing=self._doing
            )
            return Embedded(vectors, 0)
        raise failed


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # of an object that is called
    )


def _takes_kind(function: Callable[..., Any]) -> bool:
    try:
        return "kind" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions that are not written in Python
        return False
