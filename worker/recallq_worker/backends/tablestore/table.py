"""The table: made or checked at the start, written in batches, read by rows and by ranges.

Writes are conditional, row by row, and safe to repeat. A batch of up to 200 rows and 4 MB is one
request; rows of it that Tablestore is too busy for are tried again, and the others stay done. The
SDK's own ``batch_delete`` is not used: from its second batch on it sends the rows of the first
again, and is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from recallq.errors import BackendError, BackendUnavailable, ConfigurationError, JobError
from recallq_worker.backends.tablestore.client import (
    ALREADY_THERE,
    CONDITION_FAILED,
    NO_SUCH_OBJECT,
    asking,
    meaning,
)
from recallq_worker.backends.tablestore.rows import EPOCH, OWNER, PLACE, Columns, Key, size_of

if TYPE_CHECKING:
    from tablestore import AsyncOTSClient, ColumnCondition

T = TypeVar("T")
Found: TypeAlias = tuple[str, Columns]
"""A row of an owner: its place, and what is in it."""

_MOST_WRITTEN = 200
_MOST_BYTES = 900 * 1024
"""Of a batch. The limit is 4 MB; but a request is encoded in one go, and others wait meanwhile."""
_MOST_READ = 100
_MOST_SCANNED = 5000
_AT_ONCE = 8
"""Requests of one call that are under way at once."""
_ALTOGETHER = 64
"""Of the process, below the connections that the client may have."""
_TRIES = 5
_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Write:
    """One row to be written; what its condition does not hold for stays as it is."""

    key: Key
    kind: Literal["insert", "change", "upsert", "delete"]
    """Insert: there is no such row. Change: there is. Upsert: either."""
    columns: Columns | None = None
    only_if: ColumnCondition | None = None


class Table:
    """One table of one instance."""

    def __init__(self, client: AsyncOTSClient, name: str) -> None:
        self.client = client
        self.name = name
        self._slots = asyncio.Semaphore(_ALTOGETHER)

    # --- at the start ---------------------------------------------------------------------------

    async def open(self) -> bool:
        """Makes the table, or checks the one that is there; whether it was made.

        Raises `ConfigurationError` for another kind of table, which stays as it is.
        """
        import tablestore as ots

        keys = [(OWNER, "STRING"), (PLACE, "STRING")]
        try:
            found = await asking(
                lambda: self.client.describe_table(self.name), raw=(NO_SUCH_OBJECT,)
            )
        except ots.OTSServiceError:
            made = ots.TableMeta(self.name, keys)
            throughput = ots.ReservedThroughput(ots.CapacityUnit(0, 0))
            try:
                await asking(
                    lambda: self.client.create_table(made, ots.TableOptions(), throughput),
                    raw=(ALREADY_THERE,),
                )
            except ots.OTSServiceError:  # another worker was faster
                return False
            return True
        there = [tuple(column[:2]) for column in found.table_meta.schema_of_primary_key]
        if there != keys:
            names = ", ".join(str(name) for name, _ in there)
            raise ConfigurationError(
                f"table {self.name} in Tablestore has the primary key ({names}): it is not one of "
                "RecallQ's, and is left alone. Set RECALLQ_TABLESTORE_TABLE_NAME to another name; "
                "what agentscope-runtime stored, 'recallq import-tablestore' brings over"
            )
        if found.table_options.time_to_live not in (-1, None):
            raise ConfigurationError(
                f"rows of table {self.name} expire after {found.table_options.time_to_live} s: "
                "memories would be lost, and deletions forgotten. Set its time to live to -1"
            )
        return False

    # --- writing --------------------------------------------------------------------------------

    async def write(self, writes: Sequence[Write]) -> list[bool]:
        """Writes rows; of each, whether its condition held. No two may have the same key.

        Raises what one of them failed with; the others may be written or not.
        """
        done = [False] * len(writes)
        await _all(partial(self._write_batch, writes, batch, done) for batch in _batches(writes))
        return done

    async def _write_batch(
        self, writes: Sequence[Write], batch: list[int], done: list[bool]
    ) -> None:
        pause = _PAUSE
        for attempt in range(1, _TRIES + 1):
            batch, error = await self._try_to_write(writes, batch, done)
            if error is None:
                return
            if attempt == _TRIES or not isinstance(error, BackendUnavailable):
                raise error
            await asyncio.sleep(pause)
            pause *= 2

    async def _try_to_write(
        self, writes: Sequence[Write], batch: list[int], done: list[bool]
    ) -> tuple[list[int], JobError | None]:
        """Sends one request; returns the rows that failed, and what the worst of them says."""
        import tablestore as ots

        request = ots.BatchWriteRowRequest()
        items = [_item(writes[at]) for at in batch]
        request.add(ots.TableInBatchWriteRowItem(self.name, items))
        response = await self._ask(lambda: self.client.batch_write_row(request))
        answers = [
            answer
            for kind in (
                response.table_of_put,
                response.table_of_update,
                response.table_of_delete,
            )
            for answer in kind.get(self.name, ())
        ]
        left: list[int] = []
        refused: JobError | None = None
        for answer in answers:
            at = batch[answer.index]
            done[at] = bool(answer.is_ok)
            if answer.is_ok or answer.error_code == CONDITION_FAILED:
                continue
            error = meaning(answer.error_code, answer.error_message or "")
            left.append(at)
            if refused is None or isinstance(error, BackendError):
                refused = error
        if len(answers) < len(batch):
            raise BackendUnavailable("Tablestore answered for a part of the rows only")
        return left, refused

    # --- reading --------------------------------------------------------------------------------

    async def read(self, keys: Iterable[Key], columns: Sequence[str]) -> dict[Key, Columns]:
        """These columns of rows, of those that exist. `columns` must be such as every row has one
        of."""
        found: dict[Key, Columns] = {}
        wanted = list(dict.fromkeys(keys))

        async def read(some: list[Key]) -> None:
            found.update(await self._read_batch(some, columns))

        await _all(
            partial(read, wanted[start : start + _MOST_READ])
            for start in range(0, len(wanted), _MOST_READ)
        )
        return found

    async def _read_batch(self, keys: list[Key], columns: Sequence[str]) -> dict[Key, Columns]:
        import tablestore as ots

        found: dict[Key, Columns] = {}
        pause = _PAUSE
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            request = ots.BatchGetRowRequest()
            request.add(
                ots.TableInBatchGetRowItem(
                    self.name, [_primary(key) for key in keys], list(columns), None, 1
                )
            )
            response = await self._ask(partial(self.client.batch_get_row, request))
            answers = response.get_result_by_table(self.name) or []
            left = keys[len(answers) :]
            error: JobError = BackendUnavailable("Tablestore answered for a part of the rows only")
            for key, answer in zip(keys, answers, strict=False):
                if not answer.is_ok:
                    error = meaning(answer.error_code, answer.error_message or "")
                    if not isinstance(error, BackendUnavailable):
                        raise error
                    left.append(key)
                elif answer.row is not None:
                    found[key] = _columns(answer.row)
            if not left:
                return found
            keys = left
        raise error

    async def pages(
        self,
        owner: str,
        places: tuple[str, str],
        columns: Sequence[str],
        *,
        only_if: ColumnCondition | None = None,
        at_once: int = _MOST_SCANNED,
    ) -> AsyncGenerator[tuple[list[Found], str], None]:
        """The rows of an owner from one place up to another, in order, with these columns: those of
        one request at a time, perhaps none, and the place at which the next begins.

        With `only_if`, `columns` must hold what it looks at. `at_once` rows are fetched at a time.
        """
        import tablestore as ots

        start: Any = _primary((owner, places[0]))
        end = _primary((owner, places[1]))
        while start is not None:
            _, following, rows, _ = await self._ask(
                partial(
                    self.client.get_range,
                    self.name,
                    ots.Direction.FORWARD,
                    start,
                    end,
                    list(columns),
                    min(at_once, _MOST_SCANNED),
                    only_if,
                    1,
                )
            )
            page = [(row.primary_key[1][1], _columns(row)) for row in rows]
            yield page, places[1] if following is None else following[1][1]
            start = following

    async def scan(
        self,
        owner: str,
        places: tuple[str, str],
        columns: Sequence[str],
        *,
        only_if: ColumnCondition | None = None,
        at_once: int = _MOST_SCANNED,
    ) -> AsyncGenerator[Found, None]:
        """The same, row by row."""
        pages = self.pages(owner, places, columns, only_if=only_if, at_once=at_once)
        async with aclosing(pages):
            async for page, _ in pages:
                for row in page:
                    yield row

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """One request, in its turn: whoever waits to try again holds up nobody."""

        async def in_turn() -> T:
            async with self._slots:
                return await call()

        return await asking(in_turn)

    async def ping(self) -> None:
        """Whether the table can be read. Raises as all calls do."""
        await self.read([("0000-health", "f")], [EPOCH])


def epoch_below(epoch: int, *, or_missing: bool = False) -> ColumnCondition:
    """A condition on a row: that it is of before `epoch`."""
    import tablestore as ots

    return ots.SingleColumnCondition(
        EPOCH, epoch, ots.ComparatorType.LESS_THAN, pass_if_missing=or_missing
    )


def has(column: str, value: str | int) -> ColumnCondition:
    """A condition on a row: what a column holds."""
    import tablestore as ots

    return ots.SingleColumnCondition(column, value, ots.ComparatorType.EQUAL, pass_if_missing=False)


def both(*conditions: ColumnCondition | None) -> ColumnCondition | None:
    """All of the conditions that are given."""
    import tablestore as ots

    given = [each for each in conditions if each is not None]
    if len(given) < 2:
        return given[0] if given else None
    together = ots.CompositeColumnCondition(ots.LogicalOperator.AND)
    for each in given:
        together.add_sub_condition(each)
    return together


async def _all(parts: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Has all parts come to their end, a few at a time, then raises what the first of them failed
    with."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(part: Callable[[], Awaitable[None]]) -> None:
        async with slots:
            await part()

    for outcome in await asyncio.gather(*map(one, parts), return_exceptions=True):
        if outcome is not None:
            raise outcome


def _primary(key: Key) -> list[tuple[str, str]]:
    return [(OWNER, key[0]), (PLACE, key[1])]


def _columns(row: Any) -> Columns:
    return {name: value for name, value, *_ in row.attribute_columns}


def _item(write: Write) -> Any:
    import tablestore as ots

    expects = {
        "insert": ots.RowExistenceExpectation.EXPECT_NOT_EXIST,
        "change": ots.RowExistenceExpectation.EXPECT_EXIST,
    }.get(write.kind, ots.RowExistenceExpectation.IGNORE)
    condition = ots.Condition(expects, write.only_if)
    columns = list((write.columns or {}).items())
    if write.kind == "delete":
        return ots.DeleteRowItem(ots.Row(_primary(write.key)), condition)
    if write.kind == "insert":
        return ots.PutRowItem(ots.Row(_primary(write.key), columns), condition)
    return ots.UpdateRowItem(ots.Row(_primary(write.key), {"PUT": columns}), condition)


def _batches(writes: Sequence[Write]) -> list[list[int]]:
    """Which rows go into which request."""
    batches: list[list[int]] = []
    size = 0
    for at, write in enumerate(writes):
        bytes_of_it = 300 + size_of(write.columns or {})
        full = batches and (len(batches[-1]) >= _MOST_WRITTEN or size + bytes_of_it > _MOST_BYTES)
        if not batches or full:
            batches.append([])
            size = 0
        batches[-1].append(at)
        size += bytes_of_it
    return batches
