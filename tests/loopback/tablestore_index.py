"""A search index of a table: what it knows of the rows, and since when.

An index follows its table some time later, which the server decides. Rows with a value that does
not fit the schema, such as a vector of another dimension, are documented to be discarded as dirty
data: they stay in the table and are in no search.
"""

from __future__ import annotations

import json
import math
import operator
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tablestore.protobuf import search_pb2 as pb

from tests.loopback.tablestore_errors import invalid
from tests.loopback.tablestore_rows import Key, Row, Value, value_size
from tests.loopback.tablestore_tables import Table
from tests.loopback.tablestore_text import Analyzer, analyzer_of

DIMENSIONS = 2048
KEYWORD_BYTES = 4096
ARRAY_VALUES = 256
KEY_BYTES = 1000
"""Of all primary keys of a row together, which is less than what a table takes."""

Plain = int | float | bool | str

_PLAIN: dict[int, type] = {
    pb.LONG: int,
    pb.DOUBLE: float,
    pb.BOOLEAN: bool,
    pb.KEYWORD: str,
    pb.TEXT: str,
}


class DirtyData(Exception):
    """A value that does not fit the schema."""


@dataclass(frozen=True, slots=True)
class Vector:
    values: tuple[float, ...]
    """As 32 bits hold them."""
    square: float


@dataclass(slots=True)
class Document:
    """A row as the index knows it."""

    row: Row
    plain: dict[str, tuple[Plain, ...]] = field(default_factory=dict)
    vectors: dict[str, Vector] = field(default_factory=dict)
    words: dict[str, Counter[str]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Postings:
    """Which documents have which values of a field, or words of it."""

    def __init__(self) -> None:
        self.holders: dict[Plain, dict[Key, None]] = {}
        self.documents = 0
        self.length = 0

    def add(self, key: Key, values: Iterator[Plain], length: int) -> None:
        self.documents += 1
        self.length += length
        for value in values:
            self.holders.setdefault(value, {})[key] = None

    def remove(self, key: Key, values: Iterator[Plain], length: int) -> None:
        self.documents -= 1
        self.length -= length
        for value in values:
            holders = self.holders[value]
            del holders[key]
            if not holders:
                del self.holders[value]


class SearchIndex:
    def __init__(self, table: Table, name: str, schema: Any, time_to_live: int) -> None:
        self.table = table
        self.name = name
        self.schema = schema
        self.time_to_live = time_to_live
        self.created_at = time.time_ns() // 1000
        self.ready_at = time.monotonic()
        """When the rows that the table had already are all in it."""
        self.fields: dict[str, Any] = {}
        self.analyzers: dict[str, Analyzer] = {}
        self.documents: dict[Key, Document] = {}
        self.postings: dict[str, Postings] = {}
        self.dirty: set[Key] = set()
        """Rows that were discarded."""
        self.stop_following: Callable[[], object] = lambda: None
        self._coming: deque[tuple[float, Key, Row | None]] = deque()
        for each in schema.field_schemas:
            self._add_field(each)
        if not schema.HasField("index_sort"):
            schema.index_sort.sorter.add().pk_sort.order = pb.SORT_ORDER_ASC

    def _add_field(self, schema: Any) -> None:
        name = schema.field_name
        if not name or name in self.fields:
            raise invalid(f"duplicated or empty field name: [{name}]")
        if schema.field_type not in (*_PLAIN, pb.VECTOR):
            raise invalid(f"field [{name}]: this type is not known here")
        for attribute in ("index", "store"):
            if not schema.HasField(attribute):
                setattr(schema, attribute, True)
        if schema.field_type == pb.TEXT:
            if not schema.analyzer:
                schema.analyzer = "single_word"
            self.analyzers[name] = analyzer_of(schema)
        if schema.field_type == pb.VECTOR:
            options = schema.vector_options
            if not 1 <= options.dimension <= DIMENSIONS:
                raise invalid(f"field [{name}]: dimension must be in [1, {DIMENSIONS}]")
        self.fields[name] = schema
        self.postings[name] = Postings()

    # --- following the table --------------------------------------------------------------------

    def expect(self, visible_at: float, key: Key, row: Row | None) -> None:
        self._coming.append((visible_at, key, row))

    def catch_up(self, until: float) -> None:
        """Takes in what has become visible, in the order of the changes."""
        while self._coming and self._coming[0][0] <= until:
            _, key, row = self._coming.popleft()
            self._forget(key)
            if row is not None:
                self._learn(row)

    def see(self, key: Key, row: Row | None) -> None:
        """Takes in a change ahead of all others; older ones of the row are no longer news."""
        self._coming = deque(each for each in self._coming if each[1] != key)
        self._forget(key)
        if row is not None:
            self._learn(row)

    def _learn(self, row: Row) -> None:
        try:
            document = self._document(row)
        except DirtyData:
            self.dirty.add(row.key)
            return
        self.documents[row.key] = document
        for name in document.plain:
            length = document.lengths.get(name, 0)
            self.postings[name].add(row.key, _entries(document, name), length)

    def _forget(self, key: Key) -> None:
        self.dirty.discard(key)
        document = self.documents.pop(key, None)
        if document is None:
            return
        for name in document.plain:
            length = document.lengths.get(name, 0)
            self.postings[name].remove(key, _entries(document, name), length)

    def _document(self, row: Row) -> Document:
        values: dict[str, Value] = {name: cell.value for name, cell in row.cells.items()}
        if sum(value_size(part) for _, part in row.key) > KEY_BYTES:
            raise DirtyData
        for name, (_, part) in zip(self.table.key_names, row.key, strict=True):
            values[name] = part
        document = Document(row)
        for name, schema in self.fields.items():
            source = schema.source_field_names[0] if schema.is_virtual_field else name
            value = values.get(source)
            if value is None:
                continue
            if schema.field_type == pb.VECTOR:
                document.vectors[name] = _vector(value, schema.vector_options.dimension)
                continue
            document.plain[name] = plain = _plain_values(value, schema)
            if (analyzer := self.analyzers.get(name)) is not None:
                texts = [str(each) for each in plain]
                document.words[name] = Counter(w for text in texts for w in analyzer.words(text))
                document.lengths[name] = document.words[name].total()
                document.sequences[name] = tuple(
                    w for text in texts for w in analyzer.sequence(text)
                )
        return document


def _entries(document: Document, name: str) -> Iterator[Plain]:
    words = document.words.get(name)
    return iter(words if words is not None else set(document.plain[name]))


def _plain_values(value: Value, schema: Any) -> tuple[Plain, ...]:
    if not schema.is_array:
        return (_plain(value, schema),)
    try:
        values = json.loads(value) if isinstance(value, str) else None
    except ValueError as error:
        raise DirtyData from error
    if not isinstance(values, list) or len(values) > ARRAY_VALUES:
        raise DirtyData
    return tuple(_plain(each, schema) for each in values)


def _plain(value: Any, schema: Any) -> Plain:
    if not isinstance(value, Plain) or type(value) is not _PLAIN[schema.field_type]:
        raise DirtyData
    if schema.field_type == pb.KEYWORD and len(str(value).encode()) > KEYWORD_BYTES:
        raise DirtyData
    return value


def _vector(value: Value, dimension: int) -> Vector:
    """A vector is a text, ``[0.1, 0.2]``, or 32-bit floats one after the other."""
    if isinstance(value, bytes):
        if len(value) != dimension * 4:
            raise DirtyData
        return vector_of(array("f", value))
    try:
        numbers = json.loads(value) if isinstance(value, str) else None
    except ValueError as error:
        raise DirtyData from error
    if not isinstance(numbers, list) or len(numbers) != dimension:
        raise DirtyData
    if not all(type(each) in (int, float) and math.isfinite(each) for each in numbers):
        raise DirtyData
    return vector_of(array("f", numbers))


def vector_of(numbers: array[float]) -> Vector:
    values = tuple(numbers)
    return Vector(values, sum(map(operator.mul, values, values)))
