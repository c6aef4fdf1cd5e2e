"""ReMe as a memory backend: one class for each of its two kinds of memory.

An extraction runs ReMe's flow (`flows`) into a draft (`drafts`), embeds what came of it, and stores
it in one step, under ids and with fields of ours. A search asks the vector store: of ReMe's own
retrieval nothing else is left, since its step that reads dates in a query fails whenever it reads
one, and the others would drop all but five memories and change nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import traceback
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import orjson

from recallq.contract import Health, Scope
from recallq.errors import (
    BackendError,
    BackendUnavailable,
    ConfigurationError,
    InternalError,
    JobError,
    MissingExtra,
)
from recallq_worker.backends.base import (
    REPEATABLE,
    Extracted,
    Hit,
    Journal,
    Record,
    Submission,
    Superseded,
    together,
)
from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer, as_job_error
from recallq_worker.backends.reme import shapes
from recallq_worker.backends.reme.loading import import_reme
from recallq_worker.backends.reme.settings import Models, RemeSettings
from recallq_worker.backends.submissions import tokens
from recallq_worker.insistence import to_its_end
from recallq_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from recallq_worker.backends.reme.library import Library

log = logging.getLogger(__name__)

Hits = list[Hit]
Records = list[Record]
"""Inside the class, `list` is a method."""


class RemeBackend:
    """What both kinds have in common. `name` and `kind` tell them apart."""

    name: ClassVar[str]
    kind: ClassVar[str]
    prompt_tokens: ClassVar[int] = 0
    """Of a prompt that is the submission's own, without what it says."""
    single_process: ClassVar[bool] = False

    def __init__(self, settings: WorkerSettings, own: RemeSettings) -> None:
        """Imports nothing yet. Raises `ConfigurationError`."""
        self._settings = settings
        self._own = own
        self._given = own.given()
        self._models = Models.load(self._given, infer=own.infer)
        self._library: Library | None = None

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        if importlib.util.find_spec("reme_ai") is None:
            raise MissingExtra(f"memory backend {cls.name!r}", "reme")
        return cls(settings, RemeSettings.load())

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Imports ReMe, which takes seconds, and connects. Raises `ConfigurationError`,
        `MissingExtra` and the errors of a backend."""
        imported = await asyncio.to_thread(import_reme, f"memory backend {self.name!r}")
        log.info("%s", imported)
        from recallq_worker.backends.reme.library import Library

        with _told("starting ReMe"):
            library = Library(self.kind, self._given, self._own, self._models, self._settings)
            self._library = library
            await library.open(imported)

    async def stop(self) -> None:
        library, self._library = self._library, None
        if library is not None:
            await library.close()

    @property
    def _running(self) -> Library:
        if self._library is None:
            raise BackendUnavailable(f"{self.name} is not started")
        return self._library

    # --- extracting -----------------------------------------------------------------------------

    def infers(self, submission: Submission) -> bool:
        """Whether an LLM makes memories of it."""
        return self._own.infer if submission.infer is None else submission.infer

    def group(self, submission: Submission) -> Hashable:
        session = submission.scope.session_id
        if not self.infers(submission):
            return (session, False)
        fields = orjson.dumps(shapes.metadata_of(submission), option=orjson.OPT_SORT_KEYS)
        return (session, True, fields)

    def tokens(self, submission: Submission) -> int:
        if not self.infers(submission):
            return 0
        return tokens(submission) + self.prompt_tokens

    async def extract(self, submissions: Sequence[Submission], journal: Journal) -> list[Extracted]:
        library = self._running
        with _told("extracting memories with ReMe"):
            try:
                if self.infers(submissions[-1]):
                    made = await library.make(submissions)
                else:
                    made = await library.as_they_are(submissions)
            except* Exception as errors:  # noqa: BLE001  # one of them is raised
                apart = UnusableAnswer if self.kind == "task" else CutOffAnswer
                raise _first(errors, apart if len(submissions) > 1 else None) from None
        if not made.nodes and not made.deleted:
            return made.extracted
        await journal(made.intent)
        # From here on something is written: whoever is to stop waits until it has been.
        with _told("storing memories"):
            stored = await to_its_end(library.store(made))
        return made.extracted if stored else together([], len(submissions))

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        library, owner, ids = self._running, intent["owner"], intent["ids"]
        repeatable = bool(intent.get(REPEATABLE))
        with _told("looking for memories that were stored"):
            found = await library.storage.get(owner, ids)
            if submissions and len(found) == len(ids):
                await library.storage.discard(owner, intent["deleted"], ban=False)
                if repeatable:
                    return _by_submission(submissions, ids)
                return together(ids, len(submissions))
            # Whoever was interrupted may still be about to store them.
            await to_its_end(library.storage.discard(owner, ids, ban=not repeatable))
        return None

    # --- reading and deleting -------------------------------------------------------------------

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> Hits:
        library = self._running
        if not query.strip() or (score_threshold is not None and score_threshold > 1):
            return []
        with _told("searching memories"):
            found = await library.nearest(scope, query, top_k=top_k)
        hits = [shapes.hit(scope, row, score) for row, score in found]
        if score_threshold is None:
            return [each for each in hits if each.score > 0]
        return [each for each in hits if each.score >= score_threshold]

    async def list(self, scope: Scope, *, offset: int, limit: int) -> Records:
        library = self._running
        with _told("listing memories"):
            rows = await library.storage.page(
                library.owner(scope), group=scope.session_id, offset=offset, limit=limit
            )
        return [shapes.record(scope, row) for row in rows]

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        library = self._running
        with _told("deleting memories"):
            return await library.storage.delete(
                library.owner(scope), group=scope.session_id, before_epoch=before_epoch
            )

    async def health(self) -> Health:
        try:
            with _told("asking ReMe's parts"):
                detail = await self._running.check()
        except JobError as error:
            return Health(ok=False, backend=self.name, detail=str(error))
        except Exception as error:  # noqa: BLE001  # it does not raise
            return Health(ok=False, backend=self.name, detail=type(error).__name__)
        return Health(ok=True, backend=self.name, detail=detail)


class RemePersonal(RemeBackend):
    """What ReMe learns of a user."""

    name: ClassVar[str] = "reme_personal"
    kind: ClassVar[str] = "personal"


class RemeTask(RemeBackend):
    """What ReMe learns of how tasks are done."""

    name: ClassVar[str] = "reme_task"
    kind: ClassVar[str] = "task"
    prompt_tokens: ClassVar[int] = 1000


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """Turns whatever ReMe's parts raise into what backends raise."""
    try:
        yield
    except (JobError, ConfigurationError, MissingExtra, Superseded):
        raise
    except Exception as error:
        told = as_job_error(error, doing)
        if told is None:
            # Its words may quote what users said; where it comes from does not.
            name, places = type(error).__name__, traceback.format_tb(error.__traceback__)
            log.error("unexpected %s when %s\n%s", name, doing, "".join(places))  # noqa: TRY400
            raise InternalError(f"{doing}: {name}; see the worker's log") from None
        raise told from error


def _first(errors: BaseExceptionGroup[Exception], apart: type[UnusableAnswer] | None) -> Exception:
    """What to raise for what went wrong in extractions side by side.

    After an answer that is an `apart`, they are not to be tried together again: it was asked for
    too much, perhaps, or one of them always has such an answer, and the others' are paid for.
    """
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    if apart is not None and isinstance(found.__cause__, apart):
        return BackendError(str(found))
    return found if isinstance(found, Exception) else InternalError(type(found).__name__)


def _by_submission(submissions: Sequence[Submission], ids: Sequence[str]) -> list[Extracted]:
    known, found = set(ids), []
    for each in submissions:
        mine = [record_id for record_id in each.record_ids if record_id in known]
        found.append(Extracted(mine, len(mine), len(submissions)))
    return found
