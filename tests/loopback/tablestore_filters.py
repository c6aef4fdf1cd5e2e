"""Conditions on columns, as filters of reads and as conditions of writes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import DecodeError
from tablestore.protobuf import table_store_filter_pb2 as pb

from tests.loopback.tablestore_errors import invalid
from tests.loopback.tablestore_rows import Value, decode_value

Condition = Callable[[Mapping[str, Value]], bool]
"""Whether a row's columns fulfil it."""

_LIMIT = 10

_COMPARATORS: dict[int, Callable[[Any, Any], bool]] = {
    pb.CT_EQUAL: operator.eq,
    pb.CT_NOT_EQUAL: operator.ne,
    pb.CT_GREATER_THAN: operator.gt,
    pb.CT_GREATER_EQUAL: operator.ge,
    pb.CT_LESS_THAN: operator.lt,
    pb.CT_LESS_EQUAL: operator.le,
}


def read_condition(data: bytes) -> Condition:
    """The condition that a serialized ``Filter`` says; refuses what it does not understand."""
    condition, count = _read(_parsed(pb.Filter, data, "filter"))
    if count > _LIMIT:
        raise invalid(f"The count of filter exceeds the max:{_LIMIT}.")
    return condition


def _parsed(message: Any, data: bytes, what: str) -> Any:
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise invalid(f"Deserialize {what} failed.") from error


def _read(proto: Any) -> tuple[Condition, int]:
    if proto.type == pb.FT_SINGLE_COLUMN_VALUE:
        return _single(_parsed(pb.SingleColumnValueFilter, proto.filter, "relation filter")), 1
    if proto.type == pb.FT_COMPOSITE_COLUMN_VALUE:
        return _composite(_parsed(pb.CompositeColumnValueFilter, proto.filter, "composite filter"))
    raise invalid(f"Invalid type of filter: {proto.type}.")


def _single(proto: Any) -> Condition:
    name = proto.column_name
    passes_if_missing = not proto.filter_if_missing
    expected = decode_value(proto.column_value, name)
    compare = _COMPARATORS.get(proto.comparator)
    if compare is None or proto.HasField("value_trans_rule"):
        raise invalid(f"Invalid relation operator: {proto.comparator}.")

    def fulfils(columns: Mapping[str, Value]) -> bool:
        actual = columns.get(name)
        if actual is None:
            return passes_if_missing
        # Values of different types are neither equal nor different: nothing holds of them.
        return type(actual) is type(expected) and compare(actual, expected)

    return fulfils


def _composite(proto: Any) -> tuple[Condition, int]:
    read = [_read(each) for each in proto.sub_filters]
    conditions = [condition for condition, _ in read]
    count = sum(count for _, count in read)
    if proto.combinator == pb.LO_NOT:
        if len(conditions) != 1:
            raise invalid("Invalid NOT operator: the number of sub-filters must be 1.")
        return (lambda columns: not conditions[0](columns)), count
    if len(conditions) < 2:
        raise invalid("Invalid AND/OR operator: the number of sub-filters must be 2.")
    if proto.combinator == pb.LO_AND:
        return (lambda columns: all(each(columns) for each in conditions)), count
    return (lambda columns: any(each(columns) for each in conditions)), count
