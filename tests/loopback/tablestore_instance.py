"""An instance of Tablestore: its tables and search indexes, how they come and go.

It knows nothing of HTTP; `tablestore_api` serves it.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tablestore.protobuf import search_pb2, table_store_pb2

from tests.loopback.tablestore_errors import failure, invalid
from tests.loopback.tablestore_index import SearchIndex
from tests.loopback.tablestore_rows import Key, Row
from tests.loopback.tablestore_search import search
from tests.loopback.tablestore_tables import NAME, Table

_TABLES = 64


class Instance:
    def __init__(self, *, index_lag: float, index_build_time: float) -> None:
        self.index_lag = index_lag
        """Seconds until the search indexes see what is written from now on."""
        self.index_build_time = index_build_time
        """Seconds in which a new index cannot be searched."""
        self.table_ready_time = 0.0
        """Seconds in which the rows of a new table cannot be reached."""
        self._tables: dict[str, Table] = {}
        self._indexes: dict[tuple[str, str], SearchIndex] = {}
        self._lags = True

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
        if not NAME.fullmatch(meta.table_name):
            raise invalid(f"Invalid table name: '{meta.table_name}'.")
        if not 1 <= len(meta.primary_key) <= 4:
            raise invalid("The number of primary key columns must be in range: [1, 4].")
        names = Counter(each.name for each in meta.primary_key)
        for each in meta.primary_key:
            if not NAME.fullmatch(each.name):
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
        # A copy, for what came in is kept as it was.
        own = copy.deepcopy(request)
        self._tables[meta.table_name] = Table(
            own.table_meta, own.table_options, own.reserved_throughput
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
        if not NAME.fullmatch(request.index_name):
            raise invalid(f"Invalid index name: '{request.index_name}'.")
        if (table.name, request.index_name) in self._indexes:
            raise failure("OTSObjectAlreadyExist", "Requested index already exists.")
        options = table.options
        if options.max_versions != 1:
            raise invalid("a search index needs a table whose max versions are 1")
        if options.time_to_live != -1 and not (
            options.HasField("allow_update") and not options.allow_update
        ):
            raise invalid("a search index needs a table whose rows never expire or never change")
        schema = copy.deepcopy(request.schema)
        index = SearchIndex(table, request.index_name, schema, request.time_to_live)
        index.ready_at += self.index_build_time

        def follow(key: Key, row: Row | None) -> None:
            if self._lags:
                index.expect(time.monotonic() + self.index_lag, key, row)
            else:
                index.see(key, row)

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

    def _at_once(self, change: Callable[[], None]) -> None:
        """Makes changes that the indexes see without delay."""
        self._lags = False
        try:
            change()
        finally:
            self._lags = True

    def _catch_up_all(self) -> None:
        """Lets the indexes see all there is, as if enough time had passed."""
        for index in self._indexes.values():
            index.ready_at = min(index.ready_at, time.monotonic())
            index.catch_up(float("inf"))
