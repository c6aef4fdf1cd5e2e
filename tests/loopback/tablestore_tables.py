"""Tables of the Tablestore server: their rows in the order of the keys, and what changes them.

A table keeps one version of each column, whatever its options allow, and no row ever expires.
"""

from __future__ import annotations

import bisect
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tablestore.protobuf import table_store_pb2 as pb

from tests.loopback.tablestore_errors import failure, invalid
from tests.loopback.tablestore_filters import Condition, read_condition
from tests.loopback.tablestore_rows import (
    DELETE_ALL,
    DELETE_ONE,
    INCREMENT,
    INF_MAX,
    INF_MIN,
    Cell,
    Change,
    Key,
    Part,
    Row,
    Value,
    WireRow,
    make_cell,
    make_row,
    value_size,
)

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
"""Of tables, indexes and columns."""

SCAN_ROWS = 5000
SCAN_BYTES = 4 * 2**20
KEY_BYTES = 1024
VALUE_BYTES = 2 * 2**20

_TYPES: dict[int, tuple[type, int]] = {
    pb.INTEGER: (int, 0),
    pb.STRING: (str, 3),
    pb.BINARY: (bytes, 7),
}
"""Of primary keys: what a value is here, and its variant on the wire."""
_VARIANTS = {
    0: "VT_INTEGER",
    1: "VT_DOUBLE",
    2: "VT_BOOLEAN",
    3: "VT_STRING",
    7: "VT_BLOB",
}
_OPEN_ENDS = (INF_MIN, INF_MAX)


@dataclass(frozen=True)
class Selection:
    """What a read wants of a row."""

    names: frozenset[str] | None
    """Columns, and primary keys; None: all."""
    condition: Condition | None

    def applies(self, row: Row, key_names: tuple[str, ...]) -> bool:
        """Whether the row is in the answer.

        As documented, columns are selected first and the filter sees the selected ones only. A row
        is no part of the answer if it has none of the columns and no key was asked for by name.
        """
        names = self.names
        if names is not None and names.isdisjoint(key_names) and names.isdisjoint(row.cells):
            return False
        if self.condition is None:
            return True
        columns: dict[str, Value] = {
            name: cell.value for name, cell in row.cells.items() if names is None or name in names
        }
        for name, (_, value) in zip(key_names, row.key, strict=True):
            columns[name] = value
        return self.condition(columns)


@dataclass(frozen=True)
class Scan:
    """What a range gave: the rows, and where to go on, if that is not the end."""

    rows: list[Row]
    next_key: Key | None
    size: int


class Table:
    """One table. `on_change` hears of every row that is written (with it) or deleted (None)."""

    def __init__(self, meta: Any, options: Any, throughput: Any) -> None:
        self.meta = meta
        self.options = options
        self.throughput = throughput
        self.created_at = time.monotonic()
        self.key_names: tuple[str, ...] = tuple(each.name for each in meta.primary_key)
        self._key_types = tuple(_TYPES[each.type] for each in meta.primary_key)
        self.rows: dict[Key, Row] = {}
        self._order: list[Key] = []
        self.on_change: list[Callable[[Key, Row | None], None]] = []

    @property
    def name(self) -> str:
        return str(self.meta.table_name)

    # --- keys -----------------------------------------------------------------------------------

    def key_of(self, row: WireRow, *, open_ends: bool = False) -> Key:
        if len(row.key) != len(self.key_names):
            raise failure(
                "OTSInvalidPK",
                f"Validate PK size fail. Input: {len(row.key)}, Meta: {len(self.key_names)}.",
            )
        key: list[Part] = []
        for name, (_, expected), (given, variant, part) in zip(
            self.key_names, self._key_types, row.key, strict=True
        ):
            if given != name:
                raise failure(
                    "OTSInvalidPK", f"Validate PK name fail. Input: {given}, Meta: {name}."
                )
            if part in _OPEN_ENDS:
                if not open_ends:
                    raise invalid("data format is invalid.")
            elif variant != expected:
                raise failure(
                    "OTSInvalidPK",
                    f"Validate PK type fail. Input: {_VARIANTS.get(variant, variant)},"
                    f" Meta: {_VARIANTS[expected]}.",
                )
            elif (size := value_size(part[1])) > KEY_BYTES and expected != 0:
                raise invalid(
                    f"The length of primary key column: '{name}' exceeds the MaxLength:"
                    f" {KEY_BYTES} with CurrentLength: {size}."
                )
            key.append(part)
        return tuple(key)

    def key_from(self, values: Mapping[str, Value] | tuple[Value, ...] | Value) -> Key:
        """For tests: a key by its names, by its order, or the only part of it."""
        if isinstance(values, Mapping):
            values = tuple(values[name] for name in self.key_names)
        if not isinstance(values, tuple):
            values = (values,)
        assert len(values) == len(self.key_names), "wrong number of primary keys"
        return tuple((1, value) for value in values)

    # --- writing --------------------------------------------------------------------------------

    def store(self, key: Key, cells: Mapping[str, Cell]) -> None:
        row = make_row(self.key_names, key, cells)
        if key not in self.rows:
            bisect.insort(self._order, key)
        self.rows[key] = row
        self._tell(key, row)

    def remove(self, key: Key) -> None:
        if self.rows.pop(key, None) is not None:
            del self._order[bisect.bisect_left(self._order, key)]
            self._tell(key, None)

    def _tell(self, key: Key, row: Row | None) -> None:
        for hear in self.on_change:
            hear(key, row)

    def check_condition(self, key: Key, proto: Any) -> None:
        """Raises if the condition of a write does not hold."""
        row = self.rows.get(key)
        if proto.row_existence == pb.EXPECT_EXIST and row is None:
            raise failure("OTSConditionCheckFail")
        if proto.row_existence == pb.EXPECT_NOT_EXIST and row is not None:
            raise failure("OTSConditionCheckFail")
        if proto.HasField("column_condition"):
            condition = read_condition(proto.column_condition)
            cells = row.cells if row is not None else {}
            if not condition({name: cell.value for name, cell in cells.items()}):
                raise failure("OTSConditionCheckFail")

    def put(self, key: Key, wire: WireRow) -> None:
        if wire.deletes:
            raise invalid(
                "Invalid request of put/update row: unexpected RowDeleteMarker in request."
            )
        now = now_ms()
        cells: dict[str, Cell] = {}
        for change in wire.changes:
            if change.kind is not None:
                raise invalid(f"OpType cannot be given for column name:{change.name} in PutRow.")
            cells[change.name] = _new_cell(change, now)
        self.store(key, cells)

    def update(self, key: Key, wire: WireRow) -> None:
        if wire.deletes:
            raise invalid(
                "Invalid request of put/update row: unexpected RowDeleteMarker in request."
            )
        row = self.rows.get(key)
        cells = dict(row.cells) if row is not None else {}
        now = now_ms()
        puts = False
        for change in wire.changes:
            if change.kind in (DELETE_ALL, DELETE_ONE):
                old = cells.get(change.name)
                if old is not None and change.timestamp in (None, old.timestamp):
                    del cells[change.name]
                continue
            puts = True
            if change.kind not in (None, INCREMENT):
                raise invalid(f"Invalid op type of cell: {change.kind}.")
            put = change if change.kind is None else _incremented(change, cells.get(change.name))
            cells[change.name] = _new_cell(put, now)
        # Deleting columns makes no row where there was none.
        if row is not None or puts:
            self.store(key, cells)

    def check_changes(self, wire: WireRow, *, update: bool) -> None:
        """Refuses changes that the service refuses before it looks at any row."""
        if update and not wire.changes:
            raise invalid("Invalid update row request: missing cells in request.")
        for change in wire.changes:
            if change.name in self.key_names:
                raise invalid(
                    "Duplicated attribute column name with primary key column:"
                    f" '{change.name}' while putting/updating row."
                )
            check_column(change, update=update)

    # --- reading --------------------------------------------------------------------------------

    def scan(
        self, start: Key, end: Key, *, forward: bool, limit: int | None, selection: Selection
    ) -> Scan:
        """Rows from `start` on, up to `end`, which is not one of them.

        It stops where the answer has `limit` rows, and also where 5,000 rows or 4 MB were looked
        at, whether they are in the answer or not.
        """
        rows: list[Row] = []
        size = 0
        for seen, key in enumerate(self._keys(start, end, forward=forward)):
            full = limit is not None and len(rows) >= limit
            if full or seen >= SCAN_ROWS or size >= SCAN_BYTES:
                return Scan(rows, key, size)
            row = self.rows[key]
            size += row.size
            if selection.applies(row, self.key_names):
                rows.append(row)
        return Scan(rows, None, size)

    def _keys(self, start: Key, end: Key, *, forward: bool) -> Iterator[Key]:
        if forward:
            if start >= end:
                raise invalid("Begin key must less than end key in FORWARD")
            first, last = (bisect.bisect_left(self._order, key) for key in (start, end))
            return (self._order[at] for at in range(first, last))
        if start <= end:
            raise invalid("Begin key must more than end key in BACKWARD")
        first, last = (bisect.bisect_right(self._order, key) for key in (start, end))
        return (self._order[at] for at in range(first - 1, last - 1, -1))


def check_column(change: Change, *, update: bool) -> None:
    name, value = change.name, change.value
    if not NAME.fullmatch(name):
        raise invalid(f"Invalid column name: '{name}'.")
    if change.kind == DELETE_ONE and change.timestamp is None:
        raise invalid("Timestamp must be given when type is DELETE_ONE_VERSION.")
    if change.kind in (DELETE_ALL, DELETE_ONE):
        if value is not None:
            raise invalid(
                "Column value cannot be given when type is DELETE_ONE_VERSION,DELETE_ALL_VERSION."
            )
        return
    if value is None:
        raise invalid(
            f"Invalid cell: {name}. Reason: missing value."
            if update
            else "Invalid request of put row: find cells without values."
        )
    if isinstance(value, float) and not math.isfinite(value):
        what = "NaN" if math.isnan(value) else "Infinity"
        raise invalid(f"{what} can't be set to double value.")
    if isinstance(value, str | bytes) and (size := value_size(value)) > VALUE_BYTES:
        raise invalid(
            f"The length of attribute column: '{name}' exceeds the MaxLength:"
            f" {VALUE_BYTES} with CurrentLength: {size}."
        )


def _new_cell(change: Change, now: int) -> Cell:
    assert change.value is not None
    timestamp = now if change.timestamp is None else change.timestamp
    return make_cell(change.name, change.value, timestamp)


def _incremented(change: Change, old: Cell | None) -> Change:
    before = old.value if old is not None else 0
    if type(before) is not int or type(change.value) is not int:
        raise invalid(f"Increment needs INTEGER columns, name: {change.name}.")
    return change._replace(value=(before + change.value + 2**63) % 2**64 - 2**63)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
