"""The feed of the table that agentscope-runtime 1.0's Tablestore memory left behind.

    table = TablestoreTable(TablestoreAccess.load())
    table.check()
    async with MemoryClient(url) as client:
        report = await ingest(client, [table])

Owns reading: page by page by primary key, which is strongly consistent and complete where a search
index is neither, with only the columns that a message is made of. Nothing here writes to a table.
It runs in the reader's thread, so it is the SDK's blocking client, without the SDK's own retries,
which nobody could see: what passes is waited for here, and told as what holds the ingestion back.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import orjson

from recallq.errors import (
    ConfigurationError,
    InvalidInput,
    MissingExtra,
    RecallQError,
    ServiceUnavailable,
)
from recallq.ingest.agentscope_rows import (
    DOCUMENT_ID,
    FIELDS,
    TENANT_ID,
    USER_ID,
    Row,
    columns_to_read,
    turn_of,
)
from recallq.ingest.formats import Line
from recallq.ingest.report import IngestOptions
from recallq.ingest.stream import HEAD_BYTES, Piece, Position
from recallq.tablestore_access import NAME, TablestoreAccess, passes, revealed, variable

if TYPE_CHECKING:
    from tablestore import OTSClient

T = TypeVar("T")

DEFAULT_TABLE = "agentscope_runtime_memory"

_PAGE = 500
"""Rows of one request. It could be more; but decoding holds up the event loop meanwhile."""
_CONNECT_TIMEOUT = 5.0
_ANSWER_TIMEOUT = 30.0
_PATIENCE = 60.0
"""Seconds for which Tablestore may be out of reach before reading ends with an error."""
_FIRST_PATIENCE = 2.0
"""The same before anything was read: then an address is more likely to be wrong."""
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_LONGEST_REASON = 200

_QUIET = logging.getLogger("recallq.tablestore_sdk")
"""The SDK logs refusals that are told as errors anyway."""
_QUIET.setLevel(logging.CRITICAL)


class TablestoreTable:
    """One table, or what one user has in it."""

    noun: ClassVar[str] = "row"
    size: ClassVar[int | None] = None

    def __init__(
        self,
        access: TablestoreAccess,
        table: str = DEFAULT_TABLE,
        *,
        text_field: str = "text",
        extra: Sequence[str] = (),
        user: str | None = None,
    ) -> None:
        """`extra` are further columns to keep with messages. Raises `InvalidInput`."""
        for what, name in (("table", table), *(("column", each) for each in (text_field, *extra))):
            if not re.fullmatch(NAME, name):
                raise InvalidInput(f"{name!r} cannot be the name of a {what} in Tablestore")
        for name in (text_field, *extra):
            if name in FIELDS or name in (DOCUMENT_ID, TENANT_ID):
                raise InvalidInput(f"column {name} has a meaning of its own; name another")
        self.table = table
        self.waiting: str | None = None
        self._access = access
        self._text_field = text_field
        self._extra = tuple(each for each in dict.fromkeys(extra) if each != text_field)
        self._user = user

    @property
    def name(self) -> str:
        return f"table {self.table}"

    @property
    def default_rejects(self) -> Path:
        return Path(f"{self.table}.rejects.jsonl")

    # --- before anything is read ----------------------------------------------------------------

    def check(self) -> None:
        """Whether this is a table of agentscope-runtime's memory that can be read; blocks.

        Raises `InvalidInput` for another kind of table, `ConfigurationError`, `ServiceUnavailable`.
        """
        client = self._connected()
        try:
            found = self._asking(lambda: client.describe_table(self.table), _FIRST_PATIENCE)
            keys = [tuple(column[:2]) for column in found.table_meta.schema_of_primary_key]
            if keys != [(DOCUMENT_ID, "STRING"), (TENANT_ID, "STRING")]:
                names = ", ".join(str(name) for name, *_ in keys)
                raise InvalidInput(
                    f"{self.name} has the primary key ({names}), and the tables that "
                    f"agentscope-runtime's Tablestore memory wrote have ({DOCUMENT_ID}, "
                    f"{TENANT_ID}), both strings; --table names the right one"
                )
            texts = self._indexed_texts(client)
            if texts and self._text_field not in texts:
                raise InvalidInput(
                    f"{self.name} has its texts in column {' or '.join(sorted(texts))}, by its "
                    f"search index, not in {self._text_field}: give --text-field"
                )
        finally:
            client.connection.pool.clear()

    def _indexed_texts(self, client: OTSClient) -> set[str]:
        """The columns that search indexes take for texts; a wrong one would lose all texts."""
        import tablestore as ots

        try:
            indexes = self._asking(lambda: client.list_search_index(self.table), _FIRST_PATIENCE)
            metas = [
                self._asking(
                    lambda name=name: client.describe_search_index(self.table, name, False)[0],  # type: ignore[misc]  # bound now
                    _FIRST_PATIENCE,
                )
                for _, name in indexes
            ]
        except ConfigurationError:  # a key that may read rows need not be allowed this
            return set()
        return {
            field.field_name
            for meta in metas
            for field in meta.fields
            if field.field_type == ots.FieldType.TEXT
        }

    # --- reading --------------------------------------------------------------------------------

    def lines(self, start: Position, options: IngestOptions) -> Iterator[Line]:
        """All rows, in the order of their document ids. Raises `RecallQError`."""
        import tablestore as ots

        client = self._connected()
        columns = columns_to_read(self._text_field, self._extra)
        begin: Any = [(DOCUMENT_ID, ots.INF_MIN), (TENANT_ID, ots.INF_MIN)]
        end = [(DOCUMENT_ID, ots.INF_MAX), (TENANT_ID, ots.INF_MAX)]
        only = None
        if self._user is not None:
            only = ots.SingleColumnCondition(
                USER_ID, self._user, ots.ComparatorType.EQUAL, pass_if_missing=False
            )
        number = 0
        try:
            while begin is not None:
                _, following, rows, rest = self._asking(
                    lambda begin=begin: client.get_range(  # type: ignore[misc]  # bound now
                        self.table, ots.Direction.FORWARD, begin, end, columns, _PAGE, only, 1
                    ),
                    _PATIENCE,
                )
                if rest:
                    raise RecallQError(f"a row of {self.name} is too wide to be read at once")
                for row in rows:
                    number += 1
                    yield self._line(row, number)
                begin = following
        finally:
            client.connection.pool.clear()

    def _line(self, found: Any, number: int) -> Line:
        (_, document_id), (_, tenant_id) = (part[:2] for part in found.primary_key)
        columns = {name: value for name, value, *_ in found.attribute_columns}
        stamps = [each[2] for each in found.attribute_columns if len(each) > 2]
        row = Row(document_id, tenant_id, columns, min(stamps, default=None))
        raw = orjson.dumps(
            {DOCUMENT_ID: document_id, TENANT_ID: tenant_id, **columns}, default=_readable
        )
        piece = Piece(
            line=number,
            item=None,
            raw=raw[:HEAD_BYTES],
            size=len(raw),
            after=Position(line=number),
            consumed=0,
        )
        try:
            return Line(piece, [turn_of(row, self.table, self._text_field, self._extra)])
        except InvalidInput as error:
            return Line(piece, problem=str(error))

    # --- asking ---------------------------------------------------------------------------------

    def _connected(self) -> OTSClient:
        try:
            from tablestore import NoRetryPolicy, OTSClient, OTSClientError
            from urllib3 import Timeout
        except ImportError as error:
            raise MissingExtra("recallq import-tablestore", "tablestore") from error
        access = self._access
        try:
            return OTSClient(
                access.end_point,
                revealed(access.access_key_id),
                revealed(access.access_key_secret),
                access.instance_name,
                region=access.region,
                sts_token=revealed(access.sts_token) if access.sts_token else None,
                socket_timeout=Timeout(connect=_CONNECT_TIMEOUT, read=_ANSWER_TIMEOUT),
                max_connection=1,
                retry_policy=NoRetryPolicy(),
                logger_name=_QUIET.name,
            )
        except OTSClientError as error:
            raise ConfigurationError(f"Tablestore's SDK: {self._told(error)}") from error

    def _asking(self, call: Callable[[], T], patience: float) -> T:
        """What Tablestore answers within so many seconds of trouble. Raises `RecallQError`."""
        from tablestore import OTSClientError, OTSServiceError
        from urllib3.exceptions import HTTPError

        pause = _FIRST_PAUSE
        since = time.monotonic()
        while True:
            try:
                answer = call()
            except OTSServiceError as error:
                problem: RecallQError = self._meaning(error)
                cause: Exception = error
            except (OTSClientError, HTTPError, OSError) as error:
                # The SDK's own error is an answer that is not Tablestore's, but a proxy's, say.
                if isinstance(error, OTSClientError):
                    why = self._told(error)
                else:
                    why = type(getattr(error, "reason", None) or error).__name__
                problem = ServiceUnavailable(
                    f"Tablestore cannot be reached at {self._access.end_point}: {why}"
                )
                cause = error
            else:
                self.waiting = None
                return answer
            late = time.monotonic() - since + pause > patience
            if late or not isinstance(problem, ServiceUnavailable):
                self.waiting = None
                raise problem from cause
            self.waiting = str(problem)
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  # not in step with others
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _meaning(self, error: Any) -> RecallQError:
        code, status = error.get_error_code() or "", error.get_http_status() or 0
        if passes(code, error.get_error_message() or "") or status == 429 or status >= 500:
            return ServiceUnavailable(f"Tablestore answers {status} {code}".rstrip())
        if code == "OTSObjectNotExist":
            return InvalidInput(
                f"there is no {self.name} in instance {self._access.instance_name}; --table names "
                "another"
            )
        reason = f"{code}: {self._told(error)}"
        if status in (401, 403):
            names = ", ".join(map(variable, ("access_key_id", "access_key_secret", "sts_token")))
            return ConfigurationError(
                f"Tablestore refuses the access key for instance {self._access.instance_name} "
                f"({reason}); check {names}"
            )
        return ConfigurationError(f"Tablestore refuses to read {self.name} ({reason})")

    def _told(self, error: Any) -> str:
        """What an error says, without anything that is secret."""
        text = str(error.get_error_message() or error)
        access = self._access
        for secret in (access.access_key_secret, access.sts_token, access.access_key_id):
            if secret is not None and revealed(secret):
                text = text.replace(revealed(secret), "***")
        return text[:_LONGEST_REASON]


def _readable(value: Any) -> str:
    """Binary columns, for a row that is rejected."""
    return bytes(value).decode("utf-8", "backslashreplace")
