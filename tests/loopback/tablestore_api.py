"""Alibaba Tablestore on the loopback interface, as the clients of tablestore 6.4.8 speak it.

It is the real protocol over real HTTP: protobuf messages, rows in PlainBuffer with their checksums,
signatures that are checked, and given, as the SDK checks them. Tables are strongly consistent, and
a search index follows its table `index_lag` seconds later, as it does in the service: until then a
search neither finds what was added nor misses what was deleted.

What is known of the service comes from its public documentation and the tests of its SDKs; where it
is silent, this server does what is harder on a client.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from aiohttp import web
from google.protobuf.message import DecodeError
from tablestore.protobuf import search_pb2, table_store_pb2

from tests.loopback.faults import Fault, HttpFailure, Received
from tests.loopback.server import RECEIVED, LoopbackServer
from tests.loopback.tablestore_batches import RowFault, RowPredicate, Rows
from tests.loopback.tablestore_errors import STATUS, error_bytes, failure, invalid
from tests.loopback.tablestore_index import SearchIndex
from tests.loopback.tablestore_rows import Key, Row, Value, make_cell
from tests.loopback.tablestore_search import search
from tests.loopback.tablestore_signatures import Credentials
from tests.loopback.tablestore_tables import Table, now_ms

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_TABLES = 64
_WRITES = ("PutRow", "UpdateRow", "DeleteRow", "BatchWriteRow")
_READS = ("GetRow", "BatchGetRow", "GetRange")

KeyLike = Mapping[str, Value] | tuple[Value, ...] | Value
"""A primary key for tests: by names, in order, or its only part."""

_T = TypeVar("_T")


class TablestoreServer(LoopbackServer):
    """``with TablestoreServer() as server: OTSClient(server.url, server.access_key_id, ...)``"""

    def __init__(
        self,
        *,
        instance_name: str = "loopback",
        access_key_id: str = "ak-loopback",
        access_key_secret: str = "sk-loopback",
        sts_token: str | None = None,
        region: str | None = None,
        index_lag: float = 0.0,
        index_build_time: float = 0.0,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self.instance_name = instance_name
        self.access_key_id = access_key_id
        self.access_key_secret = access_key_secret
        self.sts_token = sts_token
        self.region = region
        self.index_lag = index_lag
        """Seconds until the search indexes see what is written from now on."""
        self.index_build_time = index_build_time
        """Seconds in which a new index cannot be searched."""
        self.table_ready_time = 0.0
        """Seconds in which the rows of a new table cannot be reached."""
        self.keep_bodies = True
        """Whether `requests` keep their messages; not, in tests that make very many."""
        self._tables: dict[str, Table] = {}
        self._indexes: dict[tuple[str, str], SearchIndex] = {}
        self._rows = Rows(self._ready_table)
        pb, search_pb = table_store_pb2, search_pb2
        self._actions: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "ListTable": (pb.ListTableRequest, self._list_table),
            "CreateTable": (pb.CreateTableRequest, self._create_table),
            "DescribeTable": (pb.DescribeTableRequest, self._describe_table),
            "UpdateTable": (pb.UpdateTableRequest, self._update_table),
            "DeleteTable": (pb.DeleteTableRequest, self._delete_table),
            "GetRow": (pb.GetRowRequest, self._rows.get),
            "PutRow": (pb.PutRowRequest, self._rows.put),
            "UpdateRow": (pb.UpdateRowRequest, self._rows.update),
            "DeleteRow": (pb.DeleteRowRequest, self._rows.delete),
            "BatchGetRow": (pb.BatchGetRowRequest, self._rows.batch_get),
            "BatchWriteRow": (pb.BatchWriteRowRequest, self._rows.batch_write),
            "GetRange": (pb.GetRangeRequest, self._rows.get_range),
            "CreateSearchIndex": (search_pb.CreateSearchIndexRequest, self._create_index),
            "UpdateSearchIndex": (search_pb.UpdateSearchIndexRequest, self._update_index),
            "DescribeSearchIndex": (search_pb.DescribeSearchIndexRequest, self._describe_index),
            "ListSearchIndex": (search_pb.ListSearchIndexRequest, self._list_index),
            "DeleteSearchIndex": (search_pb.DeleteSearchIndexRequest, self._delete_index),
            "Search": (search_pb.SearchRequest, self._search),
        }

    # --- what is in it, and what came in --------------------------------------------------------

    @property
    def tables(self) -> list[str]:
        return list(self._tables)

    @property
    def indexes(self) -> list[tuple[str, str]]:
        """Table and index."""
        return list(self._indexes)

    def keys(self, table: str) -> list[tuple[Value, ...]]:
        """Of all rows, in their order."""
        return [tuple(part for _, part in key) for key in sorted(self._rows_of(table))]

    def row_count(self, table: str) -> int:
        return len(self._rows_of(table))

    def row(self, table: str, key: KeyLike) -> dict[str, Value] | None:
        """The columns of a row; None where there is none."""
        row = self._rows_of(table).get(self._tables[table].key_from(key))
        return _columns(row) if row is not None else None

    def rows(self, table: str) -> list[dict[str, Value]]:
        """All rows, primary keys and columns together."""
        names = self._tables[table].key_names
        return [
            {**dict(zip(names, (part for _, part in key), strict=True)), **_columns(row)}
            for key, row in sorted(self._rows_of(table).items())
        ]

    def _rows_of(self, table: str) -> dict[Key, Row]:
        return dict(self._tables[table].rows)

    def indexed(self, table: str, index: str) -> list[tuple[Value, ...]]:
        """The keys that a search can find by now."""

        def keys() -> list[tuple[Value, ...]]:
            found = self._current_index(table, index).documents
            return [tuple(part for _, part in key) for key in sorted(found)]

        return self._on_loop(keys)

    def dirty(self, table: str, index: str) -> list[tuple[Value, ...]]:
        """The keys of rows that the index discarded because a value does not fit its schema."""

        def keys() -> list[tuple[Value, ...]]:
            found = self._current_index(table, index).dirty
            return [tuple(part for _, part in key) for key in sorted(found)]

        return self._on_loop(keys)

    @property
    def calls(self) -> Counter[str]:
        """How many requests came in by action, refused ones too."""
        return Counter(each.path.removeprefix("/") for each in self.requests)

    @property
    def writes(self) -> int:
        """Requests to write rows, refused ones too."""
        calls = self.calls
        return sum(calls[action] for action in _WRITES)

    @property
    def reads(self) -> int:
        """Requests for rows, other than searches."""
        calls = self.calls
        return sum(calls[action] for action in _READS)

    @property
    def searches(self) -> int:
        return self.calls["Search"]

    @property
    def rows_written(self) -> int:
        """Rows that were put, updated or deleted since the start, batches and all."""
        return self._rows.written

    # --- what tests do to it --------------------------------------------------------------------

    def seed(
        self, table: str, rows: Iterable[tuple[KeyLike, Mapping[str, Value]]], *, lag: bool = False
    ) -> None:
        """Puts rows into a table, and without `lag` into its indexes at the same time."""

        def put() -> None:
            target = self._tables[table]
            now = now_ms()
            for key, columns in rows:
                cells = {name: make_cell(name, value, now) for name, value in columns.items()}
                target.store(target.key_from(key), cells)
            if not lag:
                self._catch_up_all()

        self._on_loop(put)

    def remove(self, table: str, keys: Iterable[KeyLike], *, lag: bool = False) -> None:
        """Deletes rows, as somebody else would."""

        def delete() -> None:
            target = self._tables[table]
            for key in keys:
                target.remove(target.key_from(key))
            if not lag:
                self._catch_up_all()

        self._on_loop(delete)

    def sync_indexes(self) -> None:
        """Lets all indexes catch up with their tables at once."""
        self._on_loop(self._catch_up_all)

    def _catch_up_all(self) -> None:
        for index in self._indexes.values():
            index.ready_at = min(index.ready_at, time.monotonic())
            index.catch_up(float("inf"))

    def fail_with(
        self,
        action: str,
        code: str,
        *,
        times: int | None = None,
        after: bool = False,
        message: str = "",
    ) -> Fault:
        """Answers an action, such as ``"PutRow"``, with an error of the service, by its code."""
        error = failure(code, message)
        return self._add(Fault("fail", f"/{action}$", times, after, failure=error))

    def fail_rows(
        self,
        which: int | RowPredicate,
        code: str = "OTSServerBusy",
        *,
        times: int | None = None,
        actions: tuple[str, ...] = ("BatchWriteRow", "BatchGetRow"),
    ) -> RowFault:
        """Fails rows in batches, the others succeed: the next so many, or some by their keys."""
        assert code in STATUS or code == "OTSParameterInvalid", "no such code"
        fault = (
            RowFault(lambda key: True, code, which, actions)
            if isinstance(which, int)
            else RowFault(which, code, times, actions)
        )
        self._rows.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        super().clear_faults()
        self._rows.faults.clear()

    def _on_loop(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, run where state may change."""
        result: Future[_T] = Future()

        def run() -> None:
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)

        self._call(run)
        return result.result(10.0)

    # --- what the service is --------------------------------------------------------------------

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/{action}", self._serve)]

    def authorize(self, request: Received) -> None:
        self._credentials.check(request)

    @property
    def _credentials(self) -> Credentials:
        return Credentials(
            self.instance_name,
            self.access_key_id,
            self.access_key_secret,
            self.sts_token,
            self.region,
        )

    def parse_body(self, path: str, raw: bytes) -> Any:
        """The message of the action; the bytes themselves where they are none."""
        known = self._actions.get(path.removeprefix("/"))
        if known is None:
            return raw
        try:
            return known[0].FromString(raw)
        except DecodeError:
            return raw

    def error_body(self, failure: HttpFailure) -> object:
        return error_bytes(failure)

    def finish(self, request: Received, response: web.Response) -> None:
        body = response.body if isinstance(response.body, bytes) else b""
        response.headers.update(self._credentials.answer_headers(request, body))
        request.raw = b""
        if not self.keep_bodies:
            request.body = None

    async def _serve(self, request: web.Request) -> web.Response:
        action = request.match_info["action"]
        known = self._actions.get(action)
        if known is None:
            raise invalid(f"Unsupported operation: '{action}'.")
        message, act = known
        body = RECEIVED.get().body
        if body is None:
            body = message()
        if not isinstance(body, message):
            raise invalid("Parse PBMessage from RawString failed.")
        answer = act(body)
        return web.Response(
            body=answer if isinstance(answer, bytes) else answer.SerializeToString()
        )

    # --- tables ---------------------------------------------------------------------------------

    def _table(self, name: str) -> Table:
        table = self._tables.get(name)
        if table is None:
            raise failure("OTSObjectNotExist")
        return table

    def _ready_table(self, name: str) -> Table:
        table = self._table(name)
        if time.monotonic() < table.created_at + self.table_ready_time:
            raise failure("OTSTableNotReady")
        return table

    def _list_table(self, request: Any) -> Any:
        return table_store_pb2.ListTableResponse(table_names=sorted(self._tables))

    def _create_table(self, request: Any) -> Any:
        meta = request.table_meta
        if not _NAME.fullmatch(meta.table_name):
            raise invalid(f"Invalid table name: '{meta.table_name}'.")
        if not 1 <= len(meta.primary_key) <= 4:
            raise invalid("The number of primary key columns must be in range: [1, 4].")
        names = Counter(each.name for each in meta.primary_key)
        for each in meta.primary_key:
            if not _NAME.fullmatch(each.name):
                raise invalid(f"Invalid column name: '{each.name}'.")
            if names[each.name] > 1:
                raise invalid(f"Duplicated primary key name: '{each.name}'.")
            if each.type == table_store_pb2.PK_BOOLEAN:
                raise invalid("BOOLEAN is an invalid type for the primary key.")
            if each.HasField("option"):
                raise invalid(f"Auto increment pk is not known here, name: {each.name}.")
        if meta.table_name in self._tables:
            raise failure("OTSObjectAlreadyExist")
        if len(self._tables) >= _TABLES:
            raise failure("OTSQuotaExhausted", "Number of tables exceeded the quota.")
        self._tables[meta.table_name] = Table(
            meta, request.table_options, request.reserved_throughput
        )
        return table_store_pb2.CreateTableResponse()

    def _describe_table(self, request: Any) -> Any:
        table = self._table(request.table_name)
        response = table_store_pb2.DescribeTableResponse(
            table_meta=table.meta, table_options=table.options
        )
        details = response.reserved_throughput_details
        details.capacity_unit.CopyFrom(table.throughput.capacity_unit)
        details.last_increase_time = int(time.time())
        response.sse_details.enable = False
        return response

    def _update_table(self, request: Any) -> Any:
        table = self._table(request.table_name)
        table.options.MergeFrom(request.table_options)
        table.throughput.capacity_unit.MergeFrom(request.reserved_throughput.capacity_unit)
        response = table_store_pb2.UpdateTableResponse(table_options=table.options)
        details = response.reserved_throughput_details
        details.capacity_unit.CopyFrom(table.throughput.capacity_unit)
        details.last_increase_time = int(time.time())
        return response

    def _delete_table(self, request: Any) -> Any:
        self._table(request.table_name)
        if any(table == request.table_name for table, _ in self._indexes):
            raise invalid(
                f"Table[{request.table_name}] who has at least one search index cannot be deleted."
            )
        del self._tables[request.table_name]
        return table_store_pb2.DeleteTableResponse()

    # --- search indexes -------------------------------------------------------------------------

    def _current_index(self, table: str, name: str) -> SearchIndex:
        """The index, with all in it that it sees by now."""
        self._table(table)
        index = self._indexes.get((table, name))
        if index is None:
            raise failure("OTSObjectNotExist", f"index [{table}, {name}] does not exist")
        index.catch_up(time.monotonic())
        return index

    def _create_index(self, request: Any) -> Any:
        table = self._table(request.table_name)
        if not _NAME.fullmatch(request.index_name):
            raise invalid(f"Invalid index name: '{request.index_name}'.")
        if (table.name, request.index_name) in self._indexes:
            raise failure("OTSObjectAlreadyExist", "Requested index already exists.")
        index = SearchIndex(table, request.index_name, request.schema, request.time_to_live)
        index.ready_at += self.index_build_time

        def follow(key: Key, row: Row | None) -> None:
            index.expect(time.monotonic() + self.index_lag, key, row)

        for key, row in table.rows.items():
            index.expect(index.ready_at + self.index_lag, key, row)
        table.on_change.append(follow)
        index.stop_following = lambda: table.on_change.remove(follow)
        self._indexes[table.name, index.name] = index
        return search_pb2.CreateSearchIndexResponse()

    def _update_index(self, request: Any) -> Any:
        index = self._current_index(request.table_name, request.index_name)
        if request.HasField("time_to_live"):
            index.time_to_live = request.time_to_live
        return search_pb2.UpdateSearchIndexResponse()

    def _describe_index(self, request: Any) -> Any:
        index = self._current_index(request.table_name, request.index_name)
        response = search_pb2.DescribeSearchIndexResponse(
            schema=index.schema, create_time=index.created_at, time_to_live=index.time_to_live
        )
        if request.include_sync_stat:
            building = time.monotonic() < index.ready_at
            response.sync_stat.sync_phase = search_pb2.FULL if building else search_pb2.INCR
            response.sync_stat.current_sync_timestamp = 0 if building else time.time_ns() // 1000
        return response

    def _list_index(self, request: Any) -> Any:
        if request.table_name:
            self._table(request.table_name)
        response = search_pb2.ListSearchIndexResponse()
        for table, index in sorted(self._indexes):
            if request.table_name in ("", table):
                response.indices.add(table_name=table, index_name=index)
        return response

    def _delete_index(self, request: Any) -> Any:
        index = self._current_index(request.table_name, request.index_name)
        index.stop_following()
        del self._indexes[request.table_name, request.index_name]
        return search_pb2.DeleteSearchIndexResponse()

    def _search(self, request: Any) -> bytes:
        index = self._current_index(request.table_name, request.index_name)
        if time.monotonic() < index.ready_at:
            raise invalid("Disallow read index table in building base state")
        return search(index, request)


def _columns(row: Row) -> dict[str, Value]:
    return {name: cell.value for name, cell in row.cells.items()}
