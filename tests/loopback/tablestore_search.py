"""Searches: what a request wants, in which order, which page of it, and with which columns."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tablestore.protobuf import search_pb2 as pb

from tests.loopback.tablestore_errors import invalid
from tests.loopback.tablestore_index import Document, SearchIndex
from tests.loopback.tablestore_queries import Hits, Searcher
from tests.loopback.tablestore_rows import HEADER, Key, Row, read_row, row_wire

DEFAULT_LIMIT = 10
TABLE_LIMIT = 100
"""Rows in an answer of which columns are read from the table."""
INDEX_LIMIT = 1000
"""Rows in an answer that comes from the index alone."""
WINDOW = 100_000

_SORTABLE = (pb.LONG, pb.DOUBLE, pb.BOOLEAN, pb.KEYWORD)

Rank = tuple[Any, ...]
"""What a hit is sorted by: by each sorter, and by its key at last."""


class Order(NamedTuple):
    rank: Callable[[Any], Any]
    """Of a hit; None sorts last, whatever the direction."""
    descending: bool


class Hit(NamedTuple):
    key: Key
    score: float


def search(index: SearchIndex, request: Any) -> bytes:
    query = _parsed(request.search_query)
    for name in ("collapse", "aggs", "group_bys", "highlight"):
        if query.HasField(name):
            raise invalid(f"{name} is not known here")
    limit = query.limit if query.HasField("limit") else DEFAULT_LIMIT
    columns = _Columns(index, request.columns_to_get)
    columns.check(limit)
    if query.offset < 0 or query.offset + limit > WINDOW:
        raise invalid(f"offset + limit must be in [0, {WINDOW}]")
    hits = Searcher(index, limit).find(query.query)
    if request.routing_values:
        hits = _routed(index, hits, request.routing_values)
    sorters = query.sort if query.HasField("sort") else index.schema.index_sort
    orders = _orders(index, sorters)
    ordered = _ordered(hits, orders)
    if query.HasField("token"):
        ordered = _after(ordered, orders, query.token)
    ordered = ordered[query.offset :]
    page = ordered[:limit]
    scored = any(each.HasField("score_sort") for each in sorters.sorter)
    response = pb.SearchResponse(is_all_succeed=True)
    response.total_hits = len(hits) if query.get_total_count else -1
    for hit in page:
        response.rows.append(columns.of(index.documents[hit.key]))
        # There are no scores where nothing is sorted by them.
        response.search_hits.add().score = hit.score if scored else math.nan
    if page and len(ordered) > limit:
        response.next_token = _token(page[-1], orders)
    return bytes(response.SerializeToString())


def _parsed(data: bytes) -> Any:
    try:
        return pb.SearchQuery.FromString(data)
    except DecodeError as error:
        raise invalid("failed to parse search query") from error


def _routed(index: SearchIndex, hits: Hits, routing: Iterable[bytes]) -> Hits:
    """Only what lies where the routing values lead."""
    wanted = [{name: value for name, _, (_, value) in read_row(each).key} for each in routing]
    fields = list(index.schema.index_setting.routing_fields)
    names = index.table.key_names
    if any(set(each) != set(fields) for each in wanted):
        raise invalid("the routing values do not fit the routing fields of the index")
    return {
        key: score
        for key, score in hits.items()
        if {name: value for name, (_, value) in zip(names, key, strict=True) if name in fields}
        in wanted
    }


# --- the order ----------------------------------------------------------------------------------


def _orders(index: SearchIndex, sort: Any) -> list[Order]:
    orders = [_order(index, each) for each in sort.sorter]
    return [*orders, Order(lambda hit: hit.key, descending=False)]


def _order(index: SearchIndex, sorter: Any) -> Order:
    if sorter.HasField("pk_sort"):
        return Order(lambda hit: hit.key, sorter.pk_sort.order == pb.SORT_ORDER_DESC)
    if sorter.HasField("score_sort"):
        return Order(lambda hit: hit.score, sorter.score_sort.order == pb.SORT_ORDER_DESC)
    if not sorter.HasField("field_sort"):
        raise invalid("this sorter is not known here")
    field = sorter.field_sort
    schema = index.fields.get(field.field_name)
    if schema is None:
        raise invalid(f"field [{field.field_name}] does not exist in index [{index.name}]")
    sortable = not schema.HasField("enable_sort_and_agg") or schema.enable_sort_and_agg
    if schema.field_type not in _SORTABLE or not sortable:
        raise invalid(f"field [{field.field_name}] does not support sorting")

    descending = field.order == pb.SORT_ORDER_DESC
    pick: Callable[[Any], Any] = max if descending else min
    if field.HasField("mode"):
        pick = {pb.SORT_MODE_MIN: min, pb.SORT_MODE_MAX: max}.get(field.mode, _average)

    def rank(hit: Hit) -> Any:
        values = index.documents[hit.key].plain.get(field.field_name)
        return pick(values) if values else None

    return Order(rank, descending)


def _average(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _ordered(hits: Hits, orders: list[Order]) -> list[Hit]:
    found = [Hit(key, score) for key, score in hits.items()]
    for rank, descending in reversed(orders):  # a sort keeps the order among equals

        def place(hit: Hit, rank: Any = rank, descending: bool = descending) -> tuple[bool, Any]:
            value = rank(hit)
            return (value is None) != descending, 0 if value is None else value

        found.sort(key=place, reverse=descending)
    return found


def _rank(hit: Hit, orders: list[Order]) -> Rank:
    return tuple(order.rank(hit) for order in orders)


def _is_after(rank: Rank, other: Rank, orders: list[Order]) -> bool:
    for one, two, order in zip(rank, other, orders, strict=True):
        if one == two:
            continue
        if one is None or two is None:
            return one is None
        return bool(one < two if order.descending else one > two)
    return False


def _token(last: Hit, orders: list[Order]) -> bytes:
    """Where the next page begins: after this hit, wherever others are by then."""
    return base64.b64encode(json.dumps(_rank(last, orders), default=_jsonable).encode())


def _jsonable(value: Any) -> Any:
    return {"hex": value.hex()}


def _after(ordered: list[Hit], orders: list[Order], token: bytes) -> list[Hit]:
    try:
        rank = tuple(_frozen(each) for each in json.loads(base64.b64decode(token)))
        start = next(
            (at for at, hit in enumerate(ordered) if _is_after(_rank(hit, orders), rank, orders)),
            len(ordered),
        )
    except (ValueError, TypeError, LookupError) as error:
        raise invalid("invalid next_token") from error
    return ordered[start:]


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return value


# --- the columns --------------------------------------------------------------------------------


class _Columns:
    """The columns that an answer has, from the index as far as it has them all."""

    def __init__(self, index: SearchIndex, proto: Any) -> None:
        self._index = index
        kind = proto.return_type if proto.HasField("return_type") else pb.RETURN_NONE
        stored = {
            name
            for name, schema in index.fields.items()
            if schema.store and not schema.is_virtual_field
        }
        self._names: frozenset[str] | None = frozenset()
        if kind == pb.RETURN_ALL:
            self._names = None
        elif kind == pb.RETURN_ALL_FROM_INDEX:
            self._names = frozenset(stored)
        elif kind == pb.RETURN_SPECIFIED:
            self._names = frozenset(proto.column_names)
        self._stored = frozenset(stored)
        known = stored.union(index.table.key_names)
        self._from_index = self._names is not None and self._names <= known

    def check(self, limit: int) -> None:
        most = INDEX_LIMIT if self._from_index else TABLE_LIMIT
        if not 0 <= limit <= most:
            raise invalid(f"the limit must be in [0, {most}], but is {limit}")

    def of(self, document: Document) -> bytes:
        """A row that the table has no more is answered with what the index still has of it.

        What the service does then is not documented; this is what surprises a client most.
        """
        row: Row | None = document.row
        names = self._names
        if not self._from_index:
            row = self._index.table.rows.get(document.row.key)
            if row is None:
                row = document.row
                names = self._stored if names is None else names & self._stored
        assert row is not None
        return HEADER + row_wire(row, names)
