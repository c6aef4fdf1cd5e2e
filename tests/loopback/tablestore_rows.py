"""PlainBuffer, the format of rows on the wire: reading requests and writing answers.

The SDK's reader serves clients only: it knows neither the open ends of ranges nor the kinds of
changes that requests carry, so requests are read here. A stored column keeps the bytes that answers
are made of: a range is then put together without encoding anything again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tests.loopback.tablestore_errors import invalid

Value = int | float | bool | str | bytes
"""Of a column. Bytes are a BINARY; what is sent as text is a str."""

Part = tuple[int, Value]
"""Of a primary key, so that any two compare, open ends too."""
Key = tuple[Part, ...]

INF_MIN: Part = (0, 0)
INF_MAX: Part = (2, 0)

HEADER = (0x75).to_bytes(4, "little")
_ROW_PK, _ROW_DATA, _CELL, _CELL_NAME, _CELL_VALUE = 1, 2, 3, 4, 5
_CELL_TYPE, _CELL_TIMESTAMP, _DELETE_MARKER, _ROW_CHECKSUM, _CELL_CHECKSUM = 6, 7, 8, 9, 10

DELETE_ALL, DELETE_ONE, INCREMENT = 1, 3, 4
"""What a change does to a column, where it does not put it."""

_INTEGER, _DOUBLE, _BOOLEAN, _STRING, _BLOB = 0, 1, 2, 3, 7
_VT_INF_MIN, _VT_INF_MAX, _AUTO_INCREMENT = 9, 10, 11
VARIANTS = {_INTEGER: "VT_INTEGER", _STRING: "VT_STRING", _BLOB: "VT_BLOB"}

_INT32 = struct.Struct("<i")
_INT64 = struct.Struct("<q")
_FLOAT64 = struct.Struct("<d")


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc << 1) ^ 0x107 if crc & 0x80 else crc << 1
        table.append(crc)
    return table


_CRC = _crc_table()
_FOLD = 127


def crc8(data: bytes, crc: int = 0) -> int:
    """The checksum that goes over names, values and rows.

    Powers of two repeat after 127 in it, so bytes 127 apart count alike and long values can be
    folded first, many bytes at a time.
    """
    if len(data) > 4 * _FOLD:
        data = bytes([data[0] ^ crc]) + data[1:] if crc else data
        crc = 0
        padded = bytes(-len(data) % _FOLD) + data
        folded = 0
        for at in range(0, len(padded), _FOLD):
            folded ^= int.from_bytes(padded[at : at + _FOLD], "big")
        data = folded.to_bytes(_FOLD, "big")
    table = _CRC
    for byte in data:
        crc = table[crc ^ byte]
    return crc


class Change(NamedTuple):
    """What a request says of one column."""

    name: str
    value: Value | None
    kind: int | None
    """`DELETE_ALL`, `DELETE_ONE` or `INCREMENT`; None puts the value."""
    timestamp: int | None


class Cell(NamedTuple):
    """A column of a stored row."""

    value: Value
    timestamp: int
    """Its version, in milliseconds."""
    wire: bytes
    crc: int
    size: int
    """Of name and value, as limits count it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A version of a row; the next one is a new object, so what an index holds stays as it was."""

    key: Key
    cells: Mapping[str, Cell]
    """By names, in their order."""
    key_wire: bytes
    key_crcs: bytes
    size: int


@dataclass(frozen=True, slots=True)
class WireRow:
    """A row of a request."""

    key: tuple[tuple[str, int, Part], ...]
    """Name, variant and value of each part."""
    changes: tuple[Change, ...]
    deletes: bool
    size: int


# --- values -------------------------------------------------------------------------------------


def encode_value(value: Value) -> bytes:
    if isinstance(value, bool):
        return bytes((_BOOLEAN, value))
    if isinstance(value, int):
        return bytes((_INTEGER,)) + _INT64.pack(value)
    if isinstance(value, float):
        return bytes((_DOUBLE,)) + _FLOAT64.pack(value)
    if isinstance(value, str):
        data = value.encode()
        return bytes((_STRING,)) + _INT32.pack(len(data)) + data
    return bytes((_BLOB,)) + _INT32.pack(len(value)) + value


def decode_value(data: bytes, name: str = "") -> Value:
    """The value of a column, as filters and queries carry it."""
    return _decoded(data, name)[1]


def _decoded(data: bytes, name: str) -> tuple[int, Value]:
    if not data:
        raise invalid("data format is invalid.")
    variant = data[0]
    try:
        if variant == _INTEGER:
            return variant, int(_INT64.unpack_from(data, 1)[0])
        if variant == _DOUBLE:
            return variant, float(_FLOAT64.unpack_from(data, 1)[0])
        if variant == _BOOLEAN:
            return variant, data[1] != 0
        if variant in (_STRING, _BLOB):
            (length,) = _INT32.unpack_from(data, 1)
            payload = data[5 : 5 + length]
            if len(payload) != length:
                raise invalid(f"Cell data broken, wrong string format, size: {length}.")
            return variant, payload.decode() if variant == _STRING else bytes(payload)
    except UnicodeDecodeError as error:
        raise invalid(f"Value of column {name} must be UTF8 encoding.") from error
    except (struct.error, IndexError) as error:
        raise invalid("data format is invalid.") from error
    raise invalid("data format is invalid, unknown variant type occured.")


def value_size(value: Value) -> int:
    if isinstance(value, bool):
        return 1
    if isinstance(value, int | float):
        return 8
    return len(value.encode()) if isinstance(value, str) else len(value)


# --- requests -----------------------------------------------------------------------------------


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 4
        self.checksums = bytearray()
        if data[:4] != HEADER:
            raise invalid(f"Cell data broken, mismatch header, actual: {data[:4].hex()}.")

    def tag(self) -> int:
        """The next one, which stays; 0 at the end."""
        return self._data[self._at] if self._at < len(self._data) else 0

    def skip(self, tag: int) -> None:
        if self.tag() != tag:
            raise invalid(
                f"Cell data broken, mismatch tag, actual tag({self.tag()}), expect({tag})."
            )
        self._at += 1

    def take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if count < 0 or len(data) != count:
            raise invalid("Input encoded PK broken, length is shorter than expect.")
        self._at += count
        return data

    def byte(self) -> int:
        return self.take(1)[0]

    def int32(self) -> int:
        return int(_INT32.unpack(self.take(4))[0])

    def cell(self) -> tuple[str, bytes | None, int | None, int | None]:
        """Name, encoded value, kind and timestamp."""
        self.skip(_CELL)
        self.skip(_CELL_NAME)
        raw_name = self.take(self.int32())
        try:
            name = raw_name.decode()
        except UnicodeDecodeError as error:
            raise invalid(f"Invalid column name: {raw_name!r}.") from error
        value = kind = timestamp = None
        if self.tag() == _CELL_VALUE:
            self._at += 1
            length = self.int32()
            value = self._value(length)
        if self.tag() == _CELL_TYPE:
            self._at += 1
            kind = self.byte()
        if self.tag() == _CELL_TIMESTAMP:
            self._at += 1
            timestamp = int(_INT64.unpack(self.take(8))[0])
        self.skip(_CELL_CHECKSUM)
        crc = crc8(raw_name + (value or b""))
        if timestamp is not None:
            crc = crc8(_INT64.pack(timestamp), crc)
        if kind is not None:
            crc = crc8(bytes((kind,)), crc)
        if (given := self.byte()) != crc:
            raise invalid(f"Cell data broken, checksum is mismatch, {given} :{crc} :")
        self.checksums.append(crc)
        return name, value, kind, timestamp

    def _value(self, length: int) -> bytes:
        """`length` is not to be relied on: SDKs differ in whether it counts the variant."""
        start = self._at
        variant = self.byte()
        if variant in (_STRING, _BLOB):
            self.take(self.int32())
        elif variant in (_INTEGER, _DOUBLE):
            self.take(8)
        elif variant == _BOOLEAN:
            self.take(1)
        elif variant not in (_VT_INF_MIN, _VT_INF_MAX, _AUTO_INCREMENT):
            raise invalid("data format is invalid, unknown variant type occured.")
        return self._data[start : self._at]


def read_row(data: bytes) -> WireRow:
    """A row of a request: a primary key, or one with changes, or one to delete."""
    reader = _Reader(data)
    reader.skip(_ROW_PK)
    key = []
    size = 0
    while reader.tag() == _CELL:
        name, value, kind, timestamp = reader.cell()
        if value is None:
            raise invalid(f"Cell data broken, PK value cannot be NULL, name: {name}.")
        if kind is not None or timestamp is not None:
            raise invalid(f"OpType cannot be given for primary key name :{name}.")
        variant, part = _key_part(value, name)
        size += len(name.encode()) + _payload(value)
        key.append((name, variant, part))
    changes = []
    if reader.tag() == _ROW_DATA:
        reader.skip(_ROW_DATA)
        while reader.tag() == _CELL:
            name, value, kind, timestamp = reader.cell()
            changes.append(
                Change(name, None if value is None else decode_value(value, name), kind, timestamp)
            )
            size += len(name.encode()) + (0 if value is None else _payload(value))
    deletes = reader.tag() == _DELETE_MARKER
    if deletes:
        reader.skip(_DELETE_MARKER)
    reader.skip(_ROW_CHECKSUM)
    crc = crc8(bytes((deletes,)), crc8(bytes(reader.checksums)))
    if (given := reader.byte()) != crc:
        raise invalid(f"Cell data broken, checksum is mismatch, {given} :{crc} :")
    return WireRow(tuple(key), tuple(changes), deletes, size)


def _payload(value: bytes) -> int:
    return len(value) - (5 if value[0] in (_STRING, _BLOB) else 1)


def _key_part(value: bytes, name: str) -> tuple[int, Part]:
    variant = value[0]
    if variant == _VT_INF_MIN:
        return variant, INF_MIN
    if variant == _VT_INF_MAX:
        return variant, INF_MAX
    if variant == _AUTO_INCREMENT:
        raise invalid(f"Auto increment pk is not known here, name: {name}.")
    variant, decoded = _decoded(value, name)
    if variant == _DOUBLE:
        raise invalid("double can not be used as primary key.")
    return variant, (1, decoded)


# --- answers ------------------------------------------------------------------------------------


def make_cell(name: str, value: Value, timestamp: int) -> Cell:
    raw_name = name.encode()
    encoded = encode_value(value)
    stamp = _INT64.pack(timestamp)
    crc = crc8(stamp, crc8(raw_name + encoded))
    wire = b"".join(
        (
            bytes((_CELL, _CELL_NAME)),
            _INT32.pack(len(raw_name)),
            raw_name,
            bytes((_CELL_VALUE,)),
            _INT32.pack(len(encoded)),
            encoded,
            bytes((_CELL_TIMESTAMP,)),
            stamp,
            bytes((_CELL_CHECKSUM, crc)),
        )
    )
    return Cell(value, timestamp, wire, crc, len(raw_name) + value_size(value))


def make_row(names: Iterable[str], key: Key, cells: Mapping[str, Cell]) -> Row:
    wires = [bytes((_ROW_PK,))]
    crcs = bytearray()
    size = 0
    for name, (_, value) in zip(names, key, strict=True):
        raw_name = name.encode()
        encoded = encode_value(value)
        crc = crc8(raw_name + encoded)
        crcs.append(crc)
        size += len(raw_name) + value_size(value)
        wires += [
            bytes((_CELL, _CELL_NAME)),
            _INT32.pack(len(raw_name)),
            raw_name,
            bytes((_CELL_VALUE,)),
            _INT32.pack(len(encoded)),
            encoded,
            bytes((_CELL_CHECKSUM, crc)),
        ]
    size += sum(cell.size for cell in cells.values())
    return Row(key, dict(sorted(cells.items())), b"".join(wires), bytes(crcs), size)


def row_wire(row: Row, names: Iterable[str] | None = None) -> bytes:
    """A row without the header, which many of them share; with the columns of `names`, or all."""
    cells = list(row.cells.values())
    if names is not None:
        wanted = set(names)
        cells = [cell for name, cell in row.cells.items() if name in wanted]
    crcs = row.key_crcs + bytes(cell.crc for cell in cells) + b"\0"
    return b"".join(
        (
            row.key_wire,
            bytes((_ROW_DATA,)) if cells else b"",
            *(cell.wire for cell in cells),
            bytes((_ROW_CHECKSUM, crc8(crcs))),
        )
    )
