"""The loopback Tablestore, driven by the official SDKs that it is made for, unpatched."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import tablestore as ts
from hypothesis import given
from hypothesis import strategies as st
from tablestore.auth import RequestContext
from tablestore.plainbuffer.plain_buffer_builder import PlainBufferBuilder
from tablestore.plainbuffer.plain_buffer_crc8 import PlainBufferCrc8
from tablestore.protobuf import table_store_pb2 as pb
from tablestore.retry import NoDelayRetryPolicy, NoRetryPolicy
from tablestore_for_agent_memory.base.base_knowledge_store import Document
from tablestore_for_agent_memory.knowledge.async_knowledge_store import AsyncKnowledgeStore

from tests.conftest import no_blocking
from tests.loopback.tablestore_api import TablestoreServer
from tests.loopback.tablestore_rows import crc8, read_row

TABLE = "memories"
INDEX = "memories_index"
ANY = ts.Condition(ts.RowExistenceExpectation.IGNORE)
NEVER = 600.0
"""Seconds that no test lasts."""
ALL_KEYS = (
    [("user", ts.INF_MIN), ("id", ts.INF_MIN)],
    [("user", ts.INF_MAX), ("id", ts.INF_MAX)],
)


def credentials(server: TablestoreServer) -> dict[str, Any]:
    return {
        "end_point": server.url,
        "access_key_id": server.access_key_id,
        "access_key_secret": server.access_key_secret,
        "instance_name": server.instance_name,
        "sts_token": server.sts_token,
        "retry_policy": NoRetryPolicy(),
        "socket_timeout": 10,
    }


@pytest.fixture
def server() -> Iterator[TablestoreServer]:
    with TablestoreServer() as server:
        yield server


@pytest.fixture
def client(server: TablestoreServer) -> Any:
    return ts.OTSClient(**credentials(server))


@pytest.fixture
async def async_client(server: TablestoreServer) -> AsyncIterator[Any]:
    async with ts.AsyncOTSClient(**credentials(server)) as client:
        yield client


def table_of(*key: tuple[str, str], name: str = TABLE) -> tuple[Any, Any, Any]:
    return (
        ts.TableMeta(name, list(key)),
        ts.TableOptions(),
        ts.ReservedThroughput(ts.CapacityUnit(0, 0)),
    )


@pytest.fixture
def table(client: Any) -> str:
    client.create_table(*table_of(("user", "STRING"), ("id", "INTEGER")))
    return TABLE


@pytest.fixture
def index(client: Any, table: str) -> str:
    fields = [
        ts.FieldSchema("user", ts.FieldType.KEYWORD),
        ts.FieldSchema("id", ts.FieldType.LONG),
        ts.FieldSchema("tag", ts.FieldType.KEYWORD),
        ts.FieldSchema("tags", ts.FieldType.KEYWORD, is_array=True),
        ts.FieldSchema("at", ts.FieldType.LONG),
        ts.FieldSchema("weight", ts.FieldType.DOUBLE),
        ts.FieldSchema("done", ts.FieldType.BOOLEAN),
        ts.FieldSchema("hidden", ts.FieldType.KEYWORD, index=False),
        ts.FieldSchema("text", ts.FieldType.TEXT, analyzer=ts.AnalyzerType.MAXWORD),
        ts.FieldSchema("single", ts.FieldType.TEXT),
        ts.FieldSchema(
            "vector",
            ts.FieldType.VECTOR,
            vector_options=ts.VectorOptions(
                ts.VectorDataType.VD_FLOAT_32, ts.VectorMetricType.VM_COSINE, 2
            ),
        ),
    ]
    client.create_search_index(table, INDEX, ts.SearchIndexMeta(fields))
    return INDEX


def key(user: str, number: int) -> list[tuple[str, Any]]:
    return [("user", user), ("id", number)]


def put(user: str, number: int, **columns: Any) -> Any:
    return ts.PutRowItem(ts.Row(key(user, number), list(columns.items())), ANY)


def batch(*items: Any, table: str = TABLE) -> Any:
    request = ts.BatchWriteRowRequest()
    request.add(ts.TableInBatchWriteRowItem(table, list(items)))
    return request


def columns_of(row: Any) -> dict[str, Any]:
    return {name: value for name, value, _ in row.attribute_columns}


def refused(code: str, message: str = "", status: int | None = None) -> Any:
    """Expects the service to refuse, with this code."""

    def is_it(error: BaseException) -> bool:
        assert isinstance(error, ts.OTSServiceError)
        found = (error.get_error_code(), error.get_http_status())
        assert found[0] == code, error
        assert status is None or found[1] == status, error
        assert message in error.get_error_message(), error
        return True

    return pytest.raises(ts.OTSServiceError, check=is_it)


# --- the wire -----------------------------------------------------------------------------------


@given(st.binary(max_size=2000), st.integers(0, 255))
def test_the_checksum_is_that_of_the_sdk(data: bytes, crc: int) -> None:
    assert crc8(data, crc) == PlainBufferCrc8.crc_bytes(crc, data)


def test_a_broken_checksum_is_noticed() -> None:
    wire = bytearray(PlainBufferBuilder.serialize_for_put_row(key("u", 1), [("a", "漢字")]))
    assert read_row(bytes(wire)).changes[0].value == "漢字"
    at = wire.index("漢".encode())
    wire[at : at + 3] = "字".encode()
    with pytest.raises(Exception, match="checksum is mismatch"):
        read_row(bytes(wire))


@pytest.mark.parametrize("region", [None, "cn-hangzhou"])
@pytest.mark.parametrize("sts_token", [None, "token"])
def test_requests_of_both_versions_of_the_signature(
    region: str | None, sts_token: str | None
) -> None:
    with TablestoreServer(region=region, sts_token=sts_token) as server:
        client = ts.OTSClient(**credentials(server), region=region)
        assert client.list_table() == ()
        assert server.requests[0].status == 200
        signature = "x-ots-signature" if region is None else "x-ots-signaturev4"
        assert signature in server.requests[0].headers


@pytest.mark.parametrize("region", [None, "cn-hangzhou"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("access_key_id", "nobody", "The AccessKeyID does not exist."),
        ("access_key_secret", "guess", "Signature mismatch."),
        ("instance_name", "elsewhere", "The instance is not found."),
        ("sts_token", "old", "The security token is invalid."),
    ],
)
def test_strangers_are_refused(
    server: TablestoreServer, name: str, value: str, message: str, region: str | None
) -> None:
    client = ts.OTSClient(**{**credentials(server), name: value}, region=region)
    with refused("OTSAuthFailed", message, 403):
        client.list_table()


def test_another_region_is_refused() -> None:
    with TablestoreServer(region="cn-hangzhou") as server:
        client = ts.OTSClient(**credentials(server), region="cn-beijing")
        with refused("OTSAuthFailed", "Signature mismatch.", 403):
            client.list_table()


def test_what_was_changed_on_the_way_or_is_old_is_refused(
    server: TablestoreServer, client: Any, table: str
) -> None:
    context = RequestContext(client.credentials_provider.get_credentials())
    path, headers, body = client.protocol.make_request(
        "DescribeTable", client._signer, context, table
    )

    def answer(path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, str]:
        response = httpx.post(server.url + path, headers=headers, content=body)
        error = pb.Error.FromString(response.content)
        return response.status_code, error.code, error.message

    response = httpx.post(server.url + path, headers=headers, content=body)
    assert response.status_code == 200
    assert answer(path, headers, body + b"\x08\x01") == (
        403,
        "OTSAuthFailed",
        "Mismatch between MD5 value of request body and x-ots-contentmd5 in header.",
    )
    assert answer("/DeleteTable", headers, body)[2] == "Signature mismatch."
    missing = {name: value for name, value in headers.items() if name != "x-ots-date"}
    assert answer(path, missing, body)[:2] == (400, "OTSParameterInvalid")
    old = datetime.now(UTC) - timedelta(minutes=16)
    headers["x-ots-date"] = old.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    del headers["x-ots-signature"]
    client._signer.make_request_signature_and_add_headers(path, headers, context)
    assert "Mismatch between system time" in answer(path, headers, body)[2]
    assert table in server.tables


# --- tables and single rows ---------------------------------------------------------------------


def test_tables_come_and_go(server: TablestoreServer, client: Any, table: str) -> None:
    assert client.list_table() == (TABLE,)
    described = client.describe_table(table)
    assert described.table_meta.schema_of_primary_key == [("user", "STRING"), ("id", "INTEGER")]
    assert described.table_options.max_version == 1
    with refused("OTSObjectAlreadyExist", status=409):
        client.create_table(*table_of(("user", "STRING")))
    updated = client.update_table(table, ts.TableOptions(86400 * 2, 1, 86400))
    assert updated.table_options.time_to_live == 86400 * 2
    client.delete_table(table)
    assert server.tables == []
    for use in (client.delete_table, client.describe_table):
        with refused("OTSObjectNotExist", "does not exist", 404):
            use(table)
    with refused("OTSObjectNotExist", status=404):
        client.get_row(table, key("u", 1))
    with refused("OTSParameterInvalid", "Invalid table name"):
        client.create_table(*table_of(("user", "STRING"), name="1-2"))
    with refused("OTSParameterInvalid", "[1, 4]"):
        client.create_table(*table_of(*((f"k{number}", "STRING") for number in range(5))))


def test_a_new_table_takes_its_time_if_told_so(server: TablestoreServer, client: Any) -> None:
    server.table_ready_time = NEVER
    client.create_table(*table_of(("user", "STRING")))
    with refused("OTSTableNotReady", status=404):
        client.get_row(TABLE, [("user", "u")])
    server.table_ready_time = 0.0
    assert client.get_row(TABLE, [("user", "u")])[1] is None


@pytest.mark.parametrize("native", [True, False])
def test_a_row_keeps_what_was_put(server: TablestoreServer, table: str, native: bool) -> None:
    client = ts.OTSClient(**credentials(server), enable_native=native, native_fallback=False)
    columns = {
        "blob": bytearray(b"\x00\xff" * 600),
        "false": False,
        "float": -1.5e300,
        "integer": -(2**63),
        "text": "漢字 and more " * 400,
        "empty": "",
    }
    client.put_row(table, ts.Row(key("漢", -7), list(columns.items())), ANY)
    _, row, _ = client.get_row(table, key("漢", -7))
    assert row.primary_key == key("漢", -7)
    assert columns_of(row) == columns
    assert [name for name, *_ in row.attribute_columns] == sorted(columns)
    assert all(abs(stamp / 1000 - time.time()) < 60 for _, _, stamp in row.attribute_columns)
    assert server.row(table, ("漢", -7)) == {**columns, "blob": b"\x00\xff" * 600}
    assert server.keys(table) == [("漢", -7)]
    client.put_row(table, ts.Row(key("漢", -7), [("only", 1)]), ANY)
    assert server.rows(table) == [{"user": "漢", "id": -7, "only": 1}]
    client.delete_row(table, ts.Row(key("漢", -7)), ANY)
    client.delete_row(table, ts.Row(key("漢", -7)), ANY)
    assert client.get_row(table, key("漢", -7))[1] is None
    assert (server.writes, server.reads, server.rows_written) == (4, 2, 4)


def test_what_a_read_selects(server: TablestoreServer, client: Any, table: str) -> None:
    server.seed(table, [(("u", 1), {"a": 1, "b": "x"})])

    def read(names: list[str], condition: Any = None) -> dict[str, Any] | None:
        _, row, _ = client.get_row(table, key("u", 1), names, condition)
        return None if row is None else columns_of(row)

    assert read([]) == {"a": 1, "b": "x"}
    assert read(["a", "none"]) == {"a": 1}
    assert read(["none"]) is None, "no row without one of the columns"
    assert read(["none", "user"]) == {}
    is_x = ts.SingleColumnCondition("b", "x", ts.ComparatorType.EQUAL, pass_if_missing=False)
    assert read([], is_x) == {"a": 1, "b": "x"}
    assert read(["a"], is_x) is None, "a filter sees the selected columns only"
    with refused("OTSParameterInvalid", "No version condition"):
        client.get_row(table, key("u", 1), max_version=None)


def test_updates_of_columns(server: TablestoreServer, client: Any, table: str) -> None:
    def update(changes: dict[str, Any], number: int = 1) -> None:
        client.update_row(table, ts.Row(key("u", number), changes), ANY)

    update({"PUT": [("a", 1), ("b", "x"), ("old", 1, int(time.time() * 1000) - 5)]})
    update({"INCREMENT": [("a", 41), ("new", 7)], "DELETE_ALL": ["b", "none"]})
    row = server.row(table, ("u", 1))
    assert row == {"a": 42, "new": 7, "old": 1}
    _, read, _ = client.get_row(table, key("u", 1))
    stamp = next(stamp for name, _, stamp in read.attribute_columns if name == "old")
    update({"DELETE": [("old", None, stamp + 1)]})
    assert server.row(table, ("u", 1)) == row
    update({"DELETE": [("old", None, stamp)]})
    assert server.row(table, ("u", 1)) == {"a": 42, "new": 7}
    update({"DELETE_ALL": ["a"]}, number=2)
    assert server.row(table, ("u", 2)) is None, "deleting columns makes no row"
    update({"DELETE_ALL": ["a", "new"]})
    assert server.row(table, ("u", 1)) == {}, "a row without columns is still one"
    update({"PUT": [("text", "x")]})
    with refused("OTSParameterInvalid", "Increment"):
        update({"INCREMENT": [("text", 1)]})


def test_conditions_of_writes(server: TablestoreServer, client: Any, table: str) -> None:
    absent = ts.Condition(ts.RowExistenceExpectation.EXPECT_NOT_EXIST)
    present = ts.Condition(ts.RowExistenceExpectation.EXPECT_EXIST)
    row = ts.Row(key("u", 1), [("a", 1)])
    with refused("OTSConditionCheckFail", "Condition check failed.", 403):
        client.put_row(table, row, present)
    _, returned = client.put_row(table, row, absent, ts.ReturnType.RT_PK)
    assert returned.primary_key == key("u", 1)
    with refused("OTSConditionCheckFail"):
        client.put_row(table, row, absent)

    def delete_if(column: Any) -> None:
        condition = ts.Condition(ts.RowExistenceExpectation.IGNORE, column)
        client.delete_row(table, ts.Row(key("u", 1)), condition)

    equal, less = ts.ComparatorType.EQUAL, ts.ComparatorType.LESS_THAN
    both = ts.CompositeColumnCondition(ts.LogicalOperator.AND)
    both.add_sub_condition(ts.SingleColumnCondition("a", 5, less))
    both.add_sub_condition(ts.SingleColumnCondition("b", 1, equal, pass_if_missing=False))
    for fails in (
        ts.SingleColumnCondition("a", 2, equal),
        ts.SingleColumnCondition("a", "1", equal),
        ts.SingleColumnCondition("b", 1, equal, pass_if_missing=False),
        both,
    ):
        with refused("OTSConditionCheckFail"):
            delete_if(fails)
    assert server.row_count(table) == 1
    for count, code in ((10, "OTSConditionCheckFail"), (11, "OTSParameterInvalid")):
        many = ts.CompositeColumnCondition(ts.LogicalOperator.OR)
        for _ in range(count):
            many.add_sub_condition(ts.SingleColumnCondition("a", 2, equal))
        with refused(code):
            delete_if(many)
    wrong = ts.CompositeColumnCondition(ts.LogicalOperator.NOT)
    wrong.add_sub_condition(both)
    delete_if(wrong)
    assert server.row_count(table) == 0


def test_what_the_service_refuses_of_rows(client: Any, table: str) -> None:
    def put_one(primary_key: list[tuple[str, Any]], columns: list[tuple[str, Any]]) -> None:
        client.put_row(table, ts.Row(primary_key, columns), ANY)

    fine = [("a", 1)]
    put_one(key("u" * 1024, 1), [("a", "x" * 2**21)])
    put_one(key("u", 1), [])
    assert client.get_row(table, key("u", 1))[1].attribute_columns == []
    for primary_key, columns, code, message in (
        (key("u" * 1025, 1), fine, "OTSParameterInvalid", "1024"),
        (key("u", 1), [("a", "x" * (2**21 + 1))], "OTSParameterInvalid", "2097152"),
        (key("u", 1), [("1a", 1)], "OTSParameterInvalid", "Invalid column name"),
        (key("u", 1), [("id", 1)], "OTSParameterInvalid", "Duplicated attribute column"),
        (key("u", 1), [("a", math.nan)], "OTSParameterInvalid", "NaN"),
        ([("user", "u")], fine, "OTSInvalidPK", "Validate PK size fail. Input: 1, Meta: 2."),
        ([("user", 1), ("id", 1)], fine, "OTSInvalidPK", "Input: VT_INTEGER, Meta: VT_STRING."),
        ([("x", "u"), ("id", 1)], fine, "OTSInvalidPK", "Input: x, Meta: user."),
        (key(ts.INF_MIN, 1), fine, "OTSParameterInvalid", ""),
    ):
        with refused(code, message, 400):
            put_one(primary_key, columns)


# --- batches and ranges -------------------------------------------------------------------------


def test_rows_of_a_batch_fail_one_by_one(server: TablestoreServer, client: Any, table: str) -> None:
    server.seed(table, [(("u", 1), {"a": 0}), (("u", 3), {"a": 0})])
    absent = ts.Condition(ts.RowExistenceExpectation.EXPECT_NOT_EXIST)
    response = client.batch_write_row(
        batch(
            ts.PutRowItem(ts.Row(key("u", 1), [("a", 1)]), absent),
            put("u", 2, a=2),
            ts.UpdateRowItem(ts.Row(key("u", 4), {"PUT": [("b", 1)]}), ANY),
            ts.DeleteRowItem(ts.Row([("x", "u"), ("id", 1)]), ANY),
            ts.DeleteRowItem(ts.Row(key("u", 3)), ANY),
        )
    )
    assert not response.is_all_succeed()
    succeeded, failed = response.get_put()
    assert [(each.index, each.error_code) for each in failed] == [(0, "OTSConditionCheckFail")]
    assert [each.index for each in succeeded] == [1]
    assert [each.error_code for each in response.get_delete()[1]] == ["OTSInvalidPK"]
    assert server.rows(table) == [
        {"user": "u", "id": 1, "a": 0},
        {"user": "u", "id": 2, "a": 2},
        {"user": "u", "id": 4, "b": 1},
    ]
    missing = client.batch_write_row(batch(put("u", 9, a=1), table="none"))
    assert [each.error_code for each in missing.get_put()[1]] == ["OTSObjectNotExist"]


def test_limits_of_batches(server: TablestoreServer, client: Any, table: str) -> None:
    assert client.batch_write_row(batch(*(put("u", n, a=n) for n in range(200)))).is_all_succeed()
    with refused("OTSParameterInvalid", "Rows count exceeds the upper limit: 200.", 400):
        client.batch_write_row(batch(*(put("v", n, a=n) for n in range(201))))
    megabyte = "x" * 2**20
    with refused("OTSParameterInvalid", "limit size: 4194304"):
        client.batch_write_row(batch(*(put("v", n, a=megabyte) for n in range(4))))
    with refused("OTSParameterInvalid", "No operation is specified"):
        client.batch_write_row(batch())
    again = ts.PutRowItem(
        ts.Row(key("v", 1), [("a", 1)]),
        ts.Condition(ts.RowExistenceExpectation.EXPECT_NOT_EXIST),
    )
    with refused("OTSParameterInvalid", "Repeated rows"):
        client.batch_write_row(batch(put("v", 1, a=2), again))
    with refused("OTSParameterInvalid", "missing cells"):
        nothing = ts.UpdateRowItem(ts.Row(key("v", 2), {}), ANY)
        client.batch_write_row(batch(put("v", 1, a=2), nothing))
    assert server.row_count(table) == 200, "nothing of a refused batch is written"
    assert client.batch_write_row(batch(put("u", 1, a=1), put("u", 1, a=2))).is_all_succeed()
    assert server.row(table, ("u", 1)) == {"a": 2}


def test_rows_are_got_in_batches(server: TablestoreServer, client: Any, table: str) -> None:
    server.seed(table, ((("u", n), {"a": n, "b": n}) for n in range(100)))

    def get(*keys: list[tuple[str, Any]]) -> Any:
        request = ts.BatchGetRowRequest()
        request.add(ts.TableInBatchGetRowItem(table, list(keys), ["a"], None, 1))
        return client.batch_get_row(request).get_result_by_table(table)

    found = get(*(key("u", n) for n in range(50, 150)))
    assert [columns_of(each.row)["a"] for each in found[:50]] == list(range(50, 100))
    assert all(each.is_ok and each.row is None for each in found[50:])
    assert [each.error_code for each in get(key("u", 1), [("user", "u")])] == [None, "OTSInvalidPK"]
    with refused("OTSParameterInvalid", "Rows count exceeds the upper limit: 100."):
        get(*(key("u", n) for n in range(101)))


def range_of(client: Any, start: Any, end: Any, direction: str = "FORWARD", **options: Any) -> Any:
    _, following, rows, _ = client.get_range(TABLE, direction, start, end, **options)
    return [tuple(value for _, value in row.primary_key) for row in rows], following


def test_ranges(server: TablestoreServer, client: Any, table: str) -> None:
    keys = [(user, number) for user in ("a", "b", "漢") for number in (-1, 0, 5)]
    server.seed(table, ((each, {"n": each[1]}) for each in reversed(keys)))
    start, end = ALL_KEYS
    assert range_of(client, start, end) == (keys, None)
    assert range_of(client, end, start, "BACKWARD") == (keys[::-1], None)
    assert range_of(client, key("b", ts.INF_MIN), key("b", ts.INF_MAX)) == (keys[3:6], None)
    assert range_of(client, key("b", 0), key("漢", 0)) == (keys[4:7], None)
    assert range_of(client, key("漢", 0), key("b", 0), "BACKWARD") == (keys[7:4:-1], None)
    found, following = range_of(client, start, end, limit=4)
    assert (found, following) == (keys[:4], key(*keys[4]))
    assert range_of(client, following, end, limit=5) == (keys[4:], None)
    assert range_of(client, start, end, columns_to_get=["none"]) == ([], None)
    for direction, wrong in (("FORWARD", (end, start)), ("BACKWARD", (start, end))):
        with refused("OTSParameterInvalid", direction):
            range_of(client, *wrong, direction)
    with refused("OTSParameterInvalid", "limit must be greater than 0"):
        range_of(client, start, end, limit=0)
    assert len(list(client.xget_range(table, "FORWARD", start, end, ts.CapacityUnit()))) == 9


def test_a_range_stops_where_enough_was_looked_at(
    server: TablestoreServer, client: Any, table: str
) -> None:
    start, end = ALL_KEYS
    server.seed(table, ((("u", n), {"n": n}) for n in range(5100)))
    last = ts.SingleColumnCondition("n", 5050, ts.ComparatorType.EQUAL)
    assert range_of(client, start, end, column_filter=last) == ([], key("u", 5000))
    assert range_of(client, key("u", 5000), end, column_filter=last) == ([("u", 5050)], None)
    found, following = range_of(client, start, end)
    assert (len(found), following) == (5000, key("u", 5000))
    server.seed(table, ((("v", n), {"x": "x" * 2**20}) for n in range(6)))
    found, following = range_of(client, key("v", ts.INF_MIN), end, columns_to_get=["user"])
    assert (len(found), following) == (4, key("v", 4)), "columns that are not wanted count too"


# --- search -------------------------------------------------------------------------------------


def search(client: Any, query: Any, *, columns: Any = None, **options: Any) -> Any:
    options = {"limit": 100, "get_total_count": True, **options}
    return client.search(
        TABLE, INDEX, ts.SearchQuery(query, **options), columns or ts.ColumnsToGet()
    )


def ids(response: Any) -> list[int]:
    return [primary_key[1][1] for primary_key, _ in response.rows]


def by_score() -> Any:
    return ts.Sort(sorters=[ts.ScoreSort(sort_order=ts.SortOrder.DESC)])


def test_indexes_come_and_go(server: TablestoreServer, client: Any, index: str) -> None:
    assert client.list_search_index(TABLE) == [(TABLE, INDEX)]
    assert client.list_search_index() == [(TABLE, INDEX)]
    meta, sync = client.describe_search_index(TABLE, index)
    assert sync.sync_phase == ts.SyncPhase.INCR
    fields = {field.field_name: field for field in meta.fields}
    assert fields["vector"].vector_options.dimension == 2
    assert fields["vector"].vector_options.metric_type == ts.VectorMetricType.VM_COSINE
    assert fields["text"].analyzer == ts.AnalyzerType.MAXWORD
    assert fields["single"].analyzer == ts.AnalyzerType.SINGLEWORD
    assert fields["tags"].is_array
    assert (fields["tag"].index, fields["hidden"].index) == (True, False)
    assert meta.time_to_live == -1
    (created,) = server.requests_to("/CreateSearchIndex$")
    assert created.body.schema.field_schemas[0].field_name == "user"
    assert not created.body.schema.field_schemas[0].HasField("index"), "kept as it came"
    with refused("OTSObjectAlreadyExist"):
        client.create_search_index(TABLE, index, ts.SearchIndexMeta([]))
    client.update_table(TABLE, ts.TableOptions(max_version=2))
    with refused("OTSParameterInvalid", "max versions"):
        client.create_search_index(TABLE, "other", ts.SearchIndexMeta([]))
    with refused("OTSParameterInvalid", "search index cannot be deleted"):
        client.delete_table(TABLE)
    client.delete_search_index(TABLE, index)
    for use in (client.delete_search_index, client.describe_search_index):
        with refused("OTSObjectNotExist", "does not exist"):
            use(TABLE, index)
    with refused("OTSObjectNotExist", "does not exist"):
        client.list_search_index("none")
    client.delete_table(TABLE)
    assert server.tables == []


def test_a_new_index_takes_in_what_is_there(
    server: TablestoreServer, client: Any, table: str
) -> None:
    server.seed(table, [(("u", 1), {"tag": "x"})])
    server.index_build_time = NEVER
    meta = ts.SearchIndexMeta([ts.FieldSchema("tag", ts.FieldType.KEYWORD)])
    client.create_search_index(table, INDEX, meta)
    assert client.describe_search_index(table, INDEX)[1].sync_phase == ts.SyncPhase.FULL
    with refused("OTSParameterInvalid", "building"):
        search(client, ts.MatchAllQuery())
    server.sync_indexes()
    assert ids(search(client, ts.MatchAllQuery())) == [1]
    assert client.describe_search_index(table, INDEX)[1].sync_phase == ts.SyncPhase.INCR


@pytest.fixture
def rows(server: TablestoreServer, index: str) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    server.seed(
        TABLE,
        (
            (
                ("u" if n < 5 else "v", n),
                {
                    "tag": f"t{n % 3}",
                    "tags": json.dumps(["all", f"t{n}"]),
                    "at": n * 10,
                    "weight": n / 4,
                    "done": n % 2 == 0,
                    "text": f"The word is {word.upper()}",
                    "single": word,
                    **({"note": "x", "hidden": "x"} if n else {}),
                },
            )
            for n, word in enumerate(words)
        ),
    )


def bool_of(**clauses: Any) -> Any:
    names = ("must", "must_not", "filter", "should")
    queries = {f"{name}_queries": clauses.pop(name, []) for name in names}
    return ts.BoolQuery(**queries, **clauses)


TERM = ts.TermQuery


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (ts.MatchAllQuery(), range(10)),
        (TERM("user", "v"), range(5, 10)),
        (TERM("id", 3), [3]),
        (TERM("id", "3"), [3]),
        (TERM("tag", "t1"), [1, 4, 7]),
        (TERM("tags", "t4"), [4]),
        (TERM("done", True), [0, 2, 4, 6, 8]),
        (TERM("weight", 0.5), [2]),
        (TERM("text", "seven"), [7]),
        (TERM("text", "SEVEN"), []),
        (ts.TermsQuery("tag", ["t1", "t2", "none"]), [1, 2, 4, 5, 7, 8]),
        (ts.RangeQuery("at", 20, 50), [2, 3, 4]),
        (ts.RangeQuery("at", 20, 50, include_lower=False, include_upper=True), [3, 4, 5]),
        (ts.RangeQuery("at", range_from=80), [8, 9]),
        (ts.RangeQuery("tag", range_to="t1"), [0, 3, 6, 9]),
        (ts.PrefixQuery("tags", "al"), range(10)),
        (ts.PrefixQuery("text", "s"), [6, 7]),
        (ts.WildcardQuery("text", "?i*e"), [5, 9]),
        (ts.ExistsQuery("single"), range(10)),
        (ts.ExistsQuery("vector"), []),
        (ts.MatchQuery("text", "Seven, EIGHT!"), [7, 8]),
        (ts.MatchQuery("text", "word eight", operator=ts.QueryOperator.AND), [8]),
        (ts.MatchQuery("text", "the word nine", minimum_should_match=3), [9]),
        (ts.MatchQuery("text", "the word nine", minimum_should_match="-1"), range(10)),
        (ts.MatchQuery("tag", "t1"), [1, 4, 7]),
        (ts.MatchPhraseQuery("text", "word is four"), [4]),
        (ts.MatchPhraseQuery("text", "word four"), []),
        (ts.MatchPhraseQuery("text", "word four", slop=1), [4]),
        (ts.FunctionScoreQuery(TERM("tag", "t1"), ts.FieldValueFactor("at")), [1, 4, 7]),
        (ts.DisMaxQuery([TERM("id", 1), TERM("tag", "t1")]), [1, 4, 7]),
        (bool_of(), range(10)),
        (bool_of(must=[TERM("tag", "t1"), TERM("user", "v")]), [7]),
        (bool_of(filter=[TERM("tag", "t1")], must_not=[TERM("user", "v")]), [1, 4]),
        (bool_of(must_not=[ts.RangeQuery("at", 10)]), [0]),
        (bool_of(should=[TERM("id", 1), TERM("id", 2)]), [1, 2]),
        (bool_of(should=[TERM("id", 1), TERM("tag", "t1")], minimum_should_match=2), [1]),
        (bool_of(must=[TERM("tag", "t1")], should=[TERM("id", 1)]), [1, 4, 7]),
        (bool_of(must=[bool_of(should=[TERM("id", 1), TERM("id", 4)]), TERM("id", 4)]), [4]),
    ],
)
def test_queries(client: Any, rows: None, query: Any, found: Any) -> None:
    response = search(client, query)
    assert ids(response) == list(found)
    assert response.total_count == len(list(found))
    assert response.is_all_succeed
    assert not response.next_token
    assert all(math.isnan(hit.score) for hit in response.search_hits), "unsorted, unscored"


@pytest.mark.parametrize(
    ("query", "options"),
    [
        (TERM("none", 1), {}),
        (TERM("id", "x"), {}),
        (TERM("hidden", "x"), {}),
        (TERM("vector", "x"), {}),
        (ts.MatchQuery("at", "1"), {}),
        (ts.WildcardQuery("tag", "x" * 33), {}),
        (ts.KnnVectorQuery("tag", 1, [1.0, 0.0]), {}),
        (ts.KnnVectorQuery("vector", 1, [1.0, 0.0, 0.0]), {}),
        (ts.KnnVectorQuery("vector", 1001, [1.0, 0.0]), {}),
        (ts.MatchAllQuery(), {"limit": 1001}),
        (ts.MatchAllQuery(), {"limit": 101, "columns": ts.ColumnsToGet(["note"], 2)}),
        (ts.MatchAllQuery(), {"limit": 100, "offset": 100_000}),
        (ts.MatchAllQuery(), {"next_token": b"nonsense"}),
        (ts.MatchAllQuery(), {"sort": ts.Sort([ts.FieldSort("text")])}),
        (ts.MatchAllQuery(), {"sort": ts.Sort([ts.FieldSort("none")])}),
    ],
)
def test_searches_that_are_refused(client: Any, rows: None, query: Any, options: Any) -> None:
    with refused("OTSParameterInvalid", status=400):
        search(client, query, **options)


def test_searches_page_by_page(server: TablestoreServer, client: Any, rows: None) -> None:
    descending = ts.Sort([ts.FieldSort("tag", ts.SortOrder.DESC), ts.PrimaryKeySort()])
    everything = [2, 5, 8, 1, 4, 7, 0, 3, 6, 9]
    assert ids(search(client, ts.MatchAllQuery(), sort=descending)) == everything
    assert ids(search(client, ts.MatchAllQuery(), sort=descending, offset=2, limit=3)) == [8, 1, 4]
    found: list[int] = []
    token = None
    for size in (4, 4, 2):
        page = search(client, ts.MatchAllQuery(), sort=descending, limit=4, next_token=token)
        assert len(page.rows) == size
        found += ids(page)
        token = page.next_token
        server.remove(TABLE, [("u", 2)])  # what was seen already moves nothing
    assert found == everything
    assert not token
    no_rows = search(client, ts.MatchAllQuery(), limit=0)
    assert (ids(no_rows), no_rows.total_count, no_rows.next_token) == ([], 9, b"")
    assert search(client, ts.MatchAllQuery(), get_total_count=False).total_count == -1
    assert len(search(client, ts.MatchAllQuery(), limit=None).rows) == 9
    missing = ts.Sort([ts.FieldSort("hidden", ts.SortOrder.DESC)])
    assert ids(search(client, ts.MatchAllQuery(), sort=missing))[-1] == 0, "missing values last"


def test_a_thousand_rows_come_from_the_index_only(
    server: TablestoreServer, client: Any, index: str
) -> None:
    server.seed(TABLE, ((("u", n), {"tag": "x", "note": "x"}) for n in range(1000)))
    specified = ts.ColumnReturnType.SPECIFIED
    for columns in (
        ts.ColumnsToGet(),
        ts.ColumnsToGet(return_type=ts.ColumnReturnType.ALL_FROM_INDEX),
        ts.ColumnsToGet(["tag", "user"], specified),
    ):
        assert len(search(client, ts.MatchAllQuery(), limit=1000, columns=columns).rows) == 1000
    with refused("OTSParameterInvalid"):
        search(client, ts.MatchAllQuery(), limit=101, columns=ts.ColumnsToGet(["note"], specified))


def test_columns_come_from_the_index_or_from_the_table(
    server: TablestoreServer, client: Any, index: str
) -> None:
    server.seed(TABLE, [(("u", 1), {"tag": "old", "note": "old"}), (("u", 2), {"tag": "old"})])
    server.index_lag = NEVER
    client.put_row(TABLE, ts.Row(key("u", 1), [("tag", "lost")]), ANY)
    server.seed(TABLE, [(("u", 1), {"tag": "new", "note": "new"})])
    client.put_row(TABLE, ts.Row(key("u", 1), [("tag", "newest"), ("note", "newest")]), ANY)
    client.delete_row(TABLE, ts.Row(key("u", 2)), ANY)

    def columns(return_type: Any, names: list[str] | None = None) -> list[dict[str, Any]]:
        wanted = ts.ColumnsToGet(names, return_type)
        response = search(client, ts.MatchAllQuery(), columns=wanted)
        return [{name: value for name, value, _ in found} for _, found in response.rows]

    kinds = ts.ColumnReturnType
    assert columns(kinds.NONE) == [{}, {}]
    assert columns(kinds.ALL_FROM_INDEX) == [{"tag": "new"}, {"tag": "old"}]
    assert columns(kinds.SPECIFIED, ["tag"]) == [{"tag": "new"}, {"tag": "old"}]
    assert columns(kinds.SPECIFIED, ["tag", "note"]) == [
        {"tag": "newest", "note": "newest"},
        {"tag": "old"},
    ]
    assert columns(kinds.ALL) == [{"tag": "newest", "note": "newest"}, {"tag": "old"}]


def test_texts_are_ranked(server: TablestoreServer, client: Any, index: str) -> None:
    titles = [
        "菊花茶是一款大部分人都适合的经典花茶",
        "秋天最适合饮用的几种花茶",
        "求推荐几款菊花茶店铺",
        "路边的野生菊花",
    ]
    server.seed(TABLE, ((("u", n), {"text": t, "single": t}) for n, t in enumerate(titles)))

    def find(text: str, field: str = "text", **options: Any) -> list[int]:
        return sorted(ids(search(client, ts.MatchQuery(field, text, **options))))

    # As the tests of the SDK have it from the service.
    assert find("菊花茶") == [0, 1, 2, 3]
    assert find("梨花茶") == [0, 1, 2]
    assert find("花茶") == [0, 1, 2]
    assert find("菊花") == [0, 2, 3]
    assert find("茶") == [0, 1, 2]
    assert find("茶", "single") == [0, 1, 2]
    assert find("花茶", "single") == [0, 1, 2, 3]
    assert find("花茶", "single", operator=ts.QueryOperator.AND) == [0, 1, 2]
    assert ids(search(client, ts.MatchPhraseQuery("text", "野生菊花"))) == [3]
    assert ids(search(client, ts.MatchPhraseQuery("text", "秋天菊花"))) == []
    ranked = search(client, ts.MatchQuery("text", "菊花茶"), sort=by_score())
    assert ids(ranked)[-1] in (1, 3), "those with half of it come last"
    scores = [hit.score for hit in ranked.search_hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0
    weighted = search(client, ts.MatchQuery("text", "菊花茶", weight=3), sort=by_score())
    assert [hit.score for hit in weighted.search_hits] == pytest.approx([3 * s for s in scores])
    first = search(client, ts.MatchQuery("text", "菊花茶"), sort=by_score(), limit=2)
    second = search(
        client, ts.MatchQuery("text", "菊花茶"), sort=by_score(), next_token=first.next_token
    )
    assert ids(first) + ids(second) == ids(ranked)


@pytest.mark.parametrize(
    ("metric", "scores"),
    [
        ("VM_COSINE", [1.0, 0.8, 0.5, 0.0]),
        ("VM_DOT_PRODUCT", [3.0, 2.0, 0.5, 0.0]),
        ("VM_EUCLIDEAN", [1 / 17, 1 / 21, 1 / 3, 1 / 5]),
    ],
)
def test_vectors_are_scored_by_the_metric(
    server: TablestoreServer, client: Any, table: str, metric: str, scores: list[float]
) -> None:
    options = ts.VectorOptions(
        ts.VectorDataType.VD_FLOAT_32, getattr(ts.VectorMetricType, metric), 2
    )
    field = ts.FieldSchema("vector", ts.FieldType.VECTOR, vector_options=options)
    client.create_search_index(table, INDEX, ts.SearchIndexMeta([field]))
    vectors = ["[5, 0]", "[3.0, 4.0]", "[0, 1]", "[-1, 0]"]
    server.seed(table, ((("u", n), {"vector": vector}) for n, vector in enumerate(vectors)))
    query = ts.KnnVectorQuery("vector", 4, [1.0, 0.0])
    response = search(client, query, sort=by_score(), limit=4)
    found = dict(zip(ids(response), (hit.score for hit in response.search_hits), strict=True))
    assert [found[n] for n in range(4)] == pytest.approx(scores)
    assert ids(search(client, query)) == [0, 1, 2, 3], "by key, unless it is sorted by score"


def test_vectors_with_filters_and_limits(server: TablestoreServer, client: Any, index: str) -> None:
    def row(number: int, x: float, y: float) -> tuple[Any, dict[str, Any]]:
        return ("u", number), {"vector": json.dumps([x, y]), "tag": f"t{number % 2}"}

    server.seed(TABLE, (row(n, 1.0, n / 10) for n in range(10)))

    def find(top_k: int = 10, limit: int = 10, **options: Any) -> list[int]:
        query = ts.KnnVectorQuery("vector", top_k, [1.0, 0.0], **options)
        return ids(search(client, query, sort=by_score(), limit=limit))

    assert find() == list(range(10))
    assert find(top_k=3, limit=2) == [0, 1]
    assert find(top_k=3, limit=5) == [0, 1, 2, 3, 4], "the limit takes the place of top_k"
    assert find(filter=TERM("tag", "t1")) == [1, 3, 5, 7, 9]
    assert find(min_score=0.99) == [0, 1, 2]
    both = bool_of(
        must=[TERM("tag", "t0")],
        should=[ts.KnnVectorQuery("vector", 2, [1.0, 0.0])],
    )
    assert ids(search(client, both, sort=by_score(), limit=2)) == [0, 2]


def test_what_does_not_fit_the_index_is_in_no_search(
    server: TablestoreServer, client: Any, index: str
) -> None:
    values: list[dict[str, Any]] = [
        {"vector": "[1.0, 0.0]"},
        {"vector": "[1.0, 0.0, 0.0]"},
        {"vector": "nonsense"},
        {"vector": bytearray(b"\0\0\x80\x3f\0\0\0\0")},
        {"vector": bytearray(b"\0\0\x80\x3f")},
        {"tag": 1},
        {"at": "1"},
        {"tags": "no list"},
        {"tag": "x" * 4097},
        {"note": 1},
        {"tags": json.dumps(["x"] * 257)},
    ]
    client.batch_write_row(batch(*(put("u", n, **value) for n, value in enumerate(values))))
    assert ids(search(client, ts.MatchAllQuery())) == [0, 3, 9]
    assert len(server.dirty(TABLE, index)) == 8
    assert server.row_count(TABLE) == 11
    client.put_row(TABLE, ts.Row(key("u" * 1000, 1), [("tag", "x")]), ANY)
    assert server.dirty(TABLE, index)[-1] == ("u" * 1000, 1)
    knn = ts.KnnVectorQuery("vector", 10, [1.0, 0.0])
    assert ids(search(client, knn, sort=by_score())) == [0, 3]
    client.put_row(TABLE, ts.Row(key("u", 0), [("vector", "[1.0]")]), ANY)
    assert ids(search(client, knn)) == [3], "an older version does not stay behind"
    client.put_row(TABLE, ts.Row(key("u", 0), [("vector", "[0.0, 1.0]")]), ANY)
    assert ids(search(client, knn)) == [0, 3]


def test_the_index_follows_later(server: TablestoreServer, client: Any, index: str) -> None:
    def found() -> list[int]:
        return ids(search(client, TERM("tag", "x")))

    server.index_lag = NEVER
    client.batch_write_row(batch(put("u", 1, tag="x"), put("u", 2, tag="x")))
    assert found() == []
    assert client.get_row(TABLE, key("u", 1))[1] is not None, "the table knows at once"
    assert range_of(client, *ALL_KEYS)[0] == [("u", 1), ("u", 2)]
    server.sync_indexes()
    assert found() == [1, 2]
    client.delete_row(TABLE, ts.Row(key("u", 1)), ANY)
    client.update_row(TABLE, ts.Row(key("u", 2), {"PUT": [("tag", "y")]}), ANY)
    assert found() == [1, 2], "deletions and updates come later too"
    assert server.indexed(TABLE, index) == [("u", 1), ("u", 2)]
    assert range_of(client, *ALL_KEYS)[0] == [("u", 2)]
    server.sync_indexes()
    assert found() == []
    server.index_lag = 0.02
    client.put_row(TABLE, ts.Row(key("u", 3), [("tag", "x")]), ANY)
    deadline = time.monotonic() + 10
    while found() != [3]:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_routing_leads_to_what_it_names(server: TablestoreServer, client: Any, table: str) -> None:
    meta = ts.SearchIndexMeta(
        [ts.FieldSchema("tag", ts.FieldType.KEYWORD)], ts.IndexSetting(routing_fields=["user"])
    )
    client.create_search_index(table, INDEX, meta)
    server.seed(table, (((user, n), {"tag": "x"}) for n, user in enumerate("abab")))
    query = ts.SearchQuery(ts.MatchAllQuery())
    response = client.search(table, INDEX, query, routing_keys=[[("user", "b")]])
    assert ids(response) == [1, 3]


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("OTSServerBusy", 503),
        ("OTSServerUnavailable", 503),
        ("OTSTimeout", 503),
        ("OTSPartitionUnavailable", 503),
        ("OTSInternalServerError", 500),
        ("OTSQuotaExhausted", 403),
        ("OTSNotEnoughCapacityUnit", 403),
        ("OTSRowOperationConflict", 409),
        ("OTSFlowControl", 429),
    ],
)
def test_errors_on_request(
    server: TablestoreServer, client: Any, table: str, code: str, status: int
) -> None:
    row = ts.Row(key("u", 1), [("a", 1)])
    server.fail_with("PutRow", code, times=1)
    with refused(code, status=status):
        client.put_row(table, row, ANY)
    assert server.row_count(table) == 0
    server.fail_with("PutRow", code, times=1, after=True)
    with refused(code, status=status):
        client.put_row(table, row, ANY)
    assert server.row_count(table) == 1, "it took effect nevertheless"
    client.put_row(table, row, ANY)
    assert server.calls["PutRow"] == 3


def test_errors_by_status_and_pages_of_gateways(
    server: TablestoreServer, client: Any, table: str
) -> None:
    server.fail("/GetRow$", 503, times=1)
    with refused("OTSServerBusy", status=503):
        client.get_row(table, key("u", 1))
    server.fail("/GetRow$", 502, times=1, body="<html>Bad Gateway</html>")
    with pytest.raises(ts.OTSClientError, match="502"):
        client.get_row(table, key("u", 1))


def test_the_sdk_tries_again_by_its_own_rules(
    server: TablestoreServer, client: Any, table: str
) -> None:
    client.retry_policy = NoDelayRetryPolicy()
    server.fail_with("GetRow", "OTSInternalServerError", times=3)
    assert client.get_row(table, key("u", 1))[1] is None
    assert server.reads == 4


def test_some_rows_of_batches_fail_on_request(
    server: TablestoreServer, client: Any, table: str
) -> None:
    server.fail_rows(2)
    items = [put("u", n, a=n) for n in range(5)]
    failed = client.batch_write_row(batch(*items)).get_put()[1]
    assert [(each.index, each.error_code) for each in failed] == [
        (0, "OTSServerBusy"),
        (1, "OTSServerBusy"),
    ]
    assert server.keys(table) == [("u", 2), ("u", 3), ("u", 4)]
    assert client.batch_write_row(batch(*items)).is_all_succeed()
    fault = server.fail_rows(lambda key: key["id"] == 3, "OTSNotEnoughCapacityUnit")
    for _ in range(2):
        failed = client.batch_write_row(batch(*items)).get_put()[1]
        assert [(each.index, each.error_code) for each in failed] == [
            (3, "OTSNotEnoughCapacityUnit")
        ]
    request = ts.BatchGetRowRequest()
    request.add(ts.TableInBatchGetRowItem(table, [key("u", 3), key("u", 4)], [], None, 1))
    assert [each.is_ok for each in client.batch_get_row(request).get_result_by_table(table)] == [
        False,
        True,
    ]
    server.clear_faults()
    assert fault.left is None
    assert client.batch_write_row(batch(*items)).is_all_succeed()


async def test_cut_hung_and_held_requests(
    server: TablestoreServer, async_client: Any, client: Any, table: str
) -> None:
    row = ts.Row(key("u", 1), [("a", 1)])
    server.cut("/PutRow$", times=1)
    with pytest.raises(Exception, match=r"[Dd]isconnected|reset"):
        await async_client.put_row(table, row, ANY)
    assert server.row_count(table) == 0
    server.cut("/PutRow$", times=1, after=True)
    with pytest.raises(Exception, match=r"[Dd]isconnected|reset"):
        await async_client.put_row(table, row, ANY)
    assert server.row_count(table) == 1
    server.hang("/GetRow$", 0.05, times=1)
    began = time.monotonic()
    assert (await async_client.get_row(table, key("u", 1)))[1] is not None
    assert time.monotonic() - began >= 0.05
    with server.hold("/Search$") as held:
        waiting = asyncio.create_task(
            async_client.search(table, INDEX, ts.SearchQuery(ts.MatchAllQuery()))
        )
        while not held.waiting:
            await asyncio.sleep(0.001)
        held.release()
        with refused("OTSObjectNotExist"):
            await waiting


# --- everybody at once --------------------------------------------------------------------------


async def test_the_async_client(server: TablestoreServer, async_client: Any, table: str) -> None:
    increment = ts.Row(key("u", 1), {"INCREMENT": [("a", 1)]})
    await async_client.list_table()
    with no_blocking():
        await asyncio.gather(*(async_client.update_row(table, increment, ANY) for _ in range(50)))
        assert server.row(table, ("u", 1)) == {"a": 50}
        _, row, _ = await async_client.get_row(table, key("u", 1))
        assert columns_of(row) == {"a": 50}
        _, _, rows, _ = await async_client.get_range(table, "FORWARD", *ALL_KEYS)
        assert len(rows) == 1


async def test_the_store_for_agents(server: TablestoreServer, async_client: Any) -> None:
    store = AsyncKnowledgeStore(
        async_client,
        vector_dimension=2,
        enable_multi_tenant=True,
        search_index_schema=[ts.FieldSchema("tag", ts.FieldType.KEYWORD)],
    )
    await store._create_table()
    await store._create_search_index()
    for number, tenant in enumerate(("one", "one", "two")):
        document = Document(
            document_id=str(number),
            tenant_id=tenant,
            text=f"我喜欢喝茶 tea {number}",
            embedding=[1.0, float(number)],
            metadata={"tag": "x"},
        )
        await store.put_document(document)
    hits = (await store.full_text_search("喝茶", tenant_id="one")).hits
    assert sorted(hit.document.document_id for hit in hits) == ["0", "1"]
    assert all(hit.score > 0 for hit in hits)
    hits = (await store.vector_search([1.0, 2.0], top_k=2, tenant_id="two")).hits
    assert [hit.document.document_id for hit in hits] == ["2"]
    assert hits[0].document.metadata == {"tag": "x"}
    assert hits[0].score == pytest.approx(1.0)
    page = await store.search_documents(tenant_id=["one", "two"], limit=2)
    assert len(page.hits) == 2
    rest = await store.search_documents(tenant_id=["one", "two"], next_token=page.next_token)
    assert [hit.document.document_id for hit in rest.hits] == ["2"]
    found = await store.get_documents(["0", "none"], "one")
    assert [each.text if each else None for each in found] == ["我喜欢喝茶 tea 0", None]
    await store.delete_all_documents()
    assert server.row_count("knowledge") == 0


def test_ten_thousand_rows_are_no_burden(server: TablestoreServer, client: Any, table: str) -> None:
    server.keep_bodies = False
    began = time.monotonic()
    for start in range(0, 10_000, 200):
        items = [put(f"u{n % 7}", n, text=f"some text {n}") for n in range(start, start + 200)]
        assert client.batch_write_row(batch(*items)).is_all_succeed()
    found: list[Any] = []
    following: Any
    following, end = ALL_KEYS
    while following is not None:
        page, following = range_of(client, following, end)
        found += page
    assert found == server.keys(table)
    assert len(found) == 10_000
    assert server.requests[-1].body is None
    assert time.monotonic() - began < 30


def test_threads_and_a_restart(server: TablestoreServer, client: Any, table: str) -> None:
    def write(user: str) -> None:
        for number in range(20):
            client.put_row(table, ts.Row(key(user, number), [("a", number)]), ANY)

    threads = [threading.Thread(target=write, args=(user,)) for user in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.row_count(table) == 80
    server.stop()
    server.start()
    assert len(range_of(client, *ALL_KEYS)[0]) == 80
