"""Alibaba Tablestore on the loopback interface, as the clients of tablestore 6.4.8 speak it.

It is the real protocol over real HTTP: protobuf messages, rows in PlainBuffer with their checksums,
signatures that are checked, and given, as the SDK checks them. Tables are strongly consistent, and
a search index follows its table `index_lag` seconds later, as it does in the service: until then a
search neither finds what was added nor misses what was deleted.

What is known of the service comes from its public documentation and the tests of its SDKs; where it
is silent, this server does what is harder on a client.
"""

from __future__ import annotations

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
from tests.loopback.tablestore_instance import Instance
from tests.loopback.tablestore_rows import Key, Row, Value, make_cell
from tests.loopback.tablestore_signatures import Credentials
from tests.loopback.tablestore_tables import now_ms

_WRITES = ("PutRow", "UpdateRow", "DeleteRow", "BatchWriteRow")
_READS = ("GetRow", "BatchGetRow", "GetRange")

KeyLike = Mapping[str, Value] | tuple[Value, ...] | Value
"""A primary key for tests: by names, in order, or its only part."""

_T = TypeVar("_T")


class TablestoreServer(LoopbackServer, Instance):
    """``with TablestoreServer() as server: OTSClient(server.url, server.access_key_id, ...)``

    The `body` of its `requests` is the protobuf message of the action, and their paths are
    ``/PutRow`` and so on, which is what faults, holds and latencies are asked for by.
    """

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
        LoopbackServer.__init__(self, port=port)
        Instance.__init__(self, index_lag=index_lag, index_build_time=index_build_time)
        self.instance_name = instance_name
        self.access_key_id = access_key_id
        self.access_key_secret = access_key_secret
        self.sts_token = sts_token
        self.region = region
        self.keep_bodies = True
        """Whether `requests` keep their messages; not, in tests that make very many."""
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
        """Puts rows into a table; without `lag`, its indexes see them at the same time."""

        def put() -> None:
            target = self._tables[table]
            now = now_ms()
            for key, columns in rows:
                cells = {name: make_cell(name, value, now) for name, value in columns.items()}
                target.store(target.key_from(key), cells)

        self._on_loop(put if lag else lambda: self._at_once(put))

    def remove(self, table: str, keys: Iterable[KeyLike], *, lag: bool = False) -> None:
        """Deletes rows, as somebody else would."""

        def delete() -> None:
            target = self._tables[table]
            for key in keys:
                target.remove(target.key_from(key))

        self._on_loop(delete if lag else lambda: self._at_once(delete))

    def sync_indexes(self) -> None:
        """Lets all indexes catch up with their tables at once."""
        self._on_loop(self._catch_up_all)

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
        """What `call` returns, run where state may change. It blocks until then."""
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
        if response.content_type != "text/html":  # which would be the page of a gateway
            body = response.body if isinstance(response.body, bytes) else b""
            response.headers.update(self._credentials.answer_headers(request, body))
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


def _columns(row: Row) -> dict[str, Value]:
    return {name: cell.value for name, cell in row.cells.items()}
