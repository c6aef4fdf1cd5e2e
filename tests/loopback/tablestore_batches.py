"""Rows of requests: single ones, and batches whose rows succeed and fail one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tablestore.protobuf import table_store_pb2 as pb

from tests.loopback.faults import HttpFailure
from tests.loopback.tablestore_errors import code_and_message, failure, invalid
from tests.loopback.tablestore_filters import read_condition
from tests.loopback.tablestore_rows import (
    HEADER,
    Key,
    Row,
    Value,
    WireRow,
    make_row,
    read_row,
    row_wire,
)
from tests.loopback.tablestore_tables import Selection, Table

GET_ROWS = 100
WRITE_ROWS = 200
WRITE_BYTES = 4 * 2**20

RowPredicate = Callable[[dict[str, Value]], bool]
"""Whether it is this row, by its primary key."""


@dataclass
class RowFault:
    """Rows of batches that fail on request while the others succeed."""

    which: RowPredicate
    code: str
    left: int | None
    """How many more rows; None: until cleared."""
    actions: tuple[str, ...]

    def strikes(self, action: str, key: dict[str, Value]) -> bool:
        if self.left == 0 or action not in self.actions or not self.which(key):
            return False
        if self.left is not None:
            self.left -= 1
        return True


class Rows:
    """The actions on rows, over the tables of a server."""

    def __init__(self, table: Callable[[str], Table]) -> None:
        self._table = table
        self.faults: list[RowFault] = []
        self.written = 0

    # --- reading --------------------------------------------------------------------------------

    def get(self, request: Any) -> Any:
        table = self._table(request.table_name)
        row = table.rows.get(table.key_of(read_row(request.primary_key)))
        selection = selection_of(request)
        response = pb.GetRowResponse(row=b"")
        consume(response, read=row.size if row is not None else 0)
        if row is not None and selection.applies(row, table.key_names):
            response.row = HEADER + row_wire(row, selection.names)
        return response

    def batch_get(self, request: Any) -> Any:
        count = sum(len(each.primary_key) for each in request.tables)
        if count == 0 or not all(each.primary_key for each in request.tables):
            raise invalid("No row specified in the request of BatchGetRow.")
        _check_names(request)
        if count > GET_ROWS:
            raise invalid(f"Rows count exceeds the upper limit: {GET_ROWS}.")
        response = pb.BatchGetRowResponse()
        for wanted in request.tables:
            selection = selection_of(wanted)
            answer = response.tables.add(table_name=wanted.table_name)
            for data in wanted.primary_key:
                result = answer.rows.add(is_ok=True)
                try:
                    self._get_in_batch(wanted.table_name, read_row(data), selection, result)
                except HttpFailure as error:
                    fail(result, error)
        return response

    def _get_in_batch(
        self, table_name: str, wire: WireRow, selection: Selection, result: Any
    ) -> None:
        table = self._table(table_name)
        key = table.key_of(wire)
        self._strike("BatchGetRow", table, key)
        row = table.rows.get(key)
        consume(result, read=row.size if row is not None else 0)
        result.row = b""
        if row is not None and selection.applies(row, table.key_names):
            result.row = HEADER + row_wire(row, selection.names)

    def get_range(self, request: Any) -> Any:
        table = self._table(request.table_name)
        start, end = (
            table.key_of(read_row(data), open_ends=True)
            for data in (request.inclusive_start_primary_key, request.exclusive_end_primary_key)
        )
        if request.HasField("limit") and request.limit <= 0:
            raise invalid("The limit must be greater than 0.")
        selection = selection_of(request)
        scan = table.scan(
            start,
            end,
            forward=request.direction == pb.FORWARD,
            limit=request.limit if request.HasField("limit") else None,
            selection=selection,
        )
        wires = [row_wire(row, selection.names) for row in scan.rows]
        response = pb.GetRangeResponse(rows=HEADER + b"".join(wires) if wires else b"")
        consume(response, read=scan.size)
        if scan.next_key is not None:
            response.next_start_primary_key = key_wire(table, scan.next_key)
        return response

    # --- writing --------------------------------------------------------------------------------

    def put(self, request: Any) -> Any:
        wire = read_row(request.row)
        _check_size("PutRow", wire.size)
        return self._write_one(pb.PUT, request, wire, pb.PutRowResponse())

    def update(self, request: Any) -> Any:
        wire = read_row(request.row_change)
        _check_size("UpdateRow", wire.size)
        return self._write_one(pb.UPDATE, request, wire, pb.UpdateRowResponse())

    def delete(self, request: Any) -> Any:
        wire = read_row(request.primary_key)
        return self._write_one(pb.DELETE, request, wire, pb.DeleteRowResponse())

    def _write_one(self, kind: int, request: Any, wire: WireRow, response: Any) -> Any:
        _check_no_transaction(request)
        table = self._table(request.table_name)
        check_write(table, kind, wire)
        self._write(table, kind, wire, request, response)
        return response

    def batch_write(self, request: Any) -> Any:
        """Whatever is wrong with the request itself is refused before any row is written."""
        if not request.tables:
            raise invalid("No row specified in the request of BatchWriteRow.")
        _check_no_transaction(request)
        _check_names(request)
        for each in request.tables:
            if not each.rows:
                raise invalid(f"No operation is specified for table: '{each.table_name}'.")
        if sum(len(each.rows) for each in request.tables) > WRITE_ROWS:
            raise invalid(f"Rows count exceeds the upper limit: {WRITE_ROWS}.")
        wires = {
            each.table_name: [(row, read_row(row.row_change)) for row in each.rows]
            for each in request.tables
        }
        _check_size("BatchWriteRow", sum(wire.size for rows in wires.values() for _, wire in rows))
        response = pb.BatchWriteRowResponse()
        for name, rows in wires.items():
            table = self._existing(name)
            if table is not None:
                for row, wire in rows:
                    check_write(table, row.type, wire)
            _check_repeated(rows)
        for name, rows in wires.items():
            answer = response.tables.add(table_name=name)
            for row, wire in rows:
                result = answer.rows.add(is_ok=True)
                try:
                    table = self._table(name)
                    self._strike("BatchWriteRow", table, table.key_of(wire))
                    self._write(table, row.type, wire, row, result)
                except HttpFailure as error:
                    fail(result, error)
        return response

    def _existing(self, name: str) -> Table | None:
        try:
            return self._table(name)
        except HttpFailure:
            return None

    def _write(self, table: Table, kind: int, wire: WireRow, request: Any, result: Any) -> None:
        key = table.key_of(wire)
        table.check_condition(key, request.condition)
        if kind == pb.PUT:
            table.put(key, wire)
        elif kind == pb.UPDATE:
            table.update(key, wire)
        else:
            table.remove(key)
        self.written += 1
        consume(result, write=wire.size)
        if request.return_content.return_type == pb.RT_PK:
            result.row = key_wire(table, key)

    def _strike(self, action: str, table: Table, key: Key) -> None:
        if not self.faults:
            return
        values = {name: value for name, (_, value) in zip(table.key_names, key, strict=True)}
        for fault in list(self.faults):
            if fault.strikes(action, values):
                raise failure(fault.code)


def selection_of(request: Any) -> Selection:
    """The columns and the filter of a read."""
    for name in ("time_range", "start_column", "end_column", "token", "transaction_id"):
        if name in request.DESCRIPTOR.fields_by_name and _is_given(request, name):
            raise invalid(f"{name} is not known here")
    if not request.HasField("max_versions"):
        raise invalid("No version condition is specified while querying row.")
    if request.max_versions <= 0:
        raise invalid(
            f"Invalid max versions: {request.max_versions}. Reason: Max versions must be positive."
        )
    names = frozenset(request.columns_to_get) if request.columns_to_get else None
    condition = read_condition(request.filter) if request.HasField("filter") else None
    return Selection(names, condition)


def _check_no_transaction(request: Any) -> None:
    if request.HasField("transaction_id"):
        raise invalid("transaction_id is not known here")


def _is_given(request: Any, name: str) -> bool:
    value = getattr(request, name)
    return any(value) if name == "token" else request.HasField(name)


def check_write(table: Table, kind: int, wire: WireRow) -> None:
    if kind == pb.DELETE:
        if wire.changes:
            raise invalid("Invalid delete row request: unexpected cells in request.")
        if not wire.deletes:
            raise invalid("Invalid request of delete row: missing RowDeleteMarker in request.")
    else:
        table.check_changes(wire, update=kind == pb.UPDATE)


def _check_repeated(rows: list[tuple[Any, WireRow]]) -> None:
    """A row may be in a batch more than once only as long as nothing is expected of it."""
    counts = Counter(wire.key for _, wire in rows)
    for row, wire in rows:
        if counts[wire.key] == 1:
            continue
        if row.condition.row_existence != pb.IGNORE:
            raise invalid(
                "Repeated rows do not support row exist expectation check in BatchModify."
            )
        if row.condition.HasField("column_condition"):
            raise invalid("Repeated rows do not support row condition check in BatchModify.")


def _check_names(request: Any) -> None:
    names = Counter(each.table_name for each in request.tables)
    for name, count in names.items():
        if count > 1:
            raise invalid(f"Duplicated table name: '{name}'.")


def _check_size(action: str, size: int) -> None:
    if size > WRITE_BYTES:
        raise invalid(
            f"The total data size of {action} request exceeds the limit,"
            f" limit size: {WRITE_BYTES}, data size: {size}."
        )


def key_wire(table: Table, key: Key) -> bytes:
    row: Row = make_row(table.key_names, key, {})
    return HEADER + row_wire(row)


def consume(message: Any, *, read: int = 0, write: int = 0) -> None:
    unit = message.consumed.capacity_unit
    unit.read = -(-read // 4096)
    unit.write = -(-write // 4096)


def fail(result: Any, error: HttpFailure) -> None:
    """Makes a row's result in a batch that of a failure."""
    result.Clear()
    result.is_ok = False
    result.error.code, result.error.message = code_and_message(error)
