"""``recallq import-tablestore``: tables as the old service wrote them, a real worker, a shell."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from recallq import MemoryClient, StoredMessage
from recallq.contract import AddResult
from recallq.errors import (
    ConfigurationError,
    InvalidInput,
    MissingExtra,
    ServiceUnavailable,
)
from recallq.ingest import IngestOptions, IngestReport, ingest
from recallq.ingest import tablestore as feed
from recallq.ingest.tablestore import TablestoreTable
from recallq.messages import Message, to_message
from recallq.tablestore_access import TablestoreAccess
from tests.agentscope_table import TABLE, AgentscopeTable, data_part, message, text_part
from tests.loopback import tablestore_tables
from tests.loopback.tablestore_api import TablestoreServer
from tests.support import Shell, Worker, one_line

SECRET, TOKEN = "sk-top-secret", "sts-top-secret"
USERS = ("ann", "bob/2", "王芳")
ROWS = 1203
BEGAN = datetime(2025, 3, 1, tzinfo=UTC)
READS = {"DescribeTable", "ListSearchIndex", "DescribeSearchIndex", "GetRange"}

Said = tuple[str, dict[str, Any], datetime]
"""Session, message, and when it was written."""


class Clock:
    """The old service's: each message three seconds after the one before."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> int:
        return round(self.now.timestamp() * 1000)


class Old:
    """The server with the old table, and what was said, in order."""

    def __init__(self, server: TablestoreServer) -> None:
        self.server = server
        self.said: dict[str, list[Said]] = {user: [] for user in USERS}

    def fill(self) -> None:
        clock = Clock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tablestore_tables, "now_ms", clock)
            table = AgentscopeTable(self.server)
            for number in range(ROWS):
                user = USERS[number % 3]
                session = (None, "s1", "旅行")[number // 3 % 3]
                said = _message(number)
                table.add(user, said, session)
                self.said[user].append((session or "default", said, clock.now))
                if number % 50:  # some of three users at the same moment
                    clock.now += timedelta(seconds=3)
            table.close()

    def count(self, user: str) -> int:
        return len(self.said[user])


def _message(number: int) -> dict[str, Any]:
    own_id = f"msg_{number * 7919 % 10_007:05}-x"  # their order is not that of what was said
    if number % 10 == 3:
        call = data_part({"call_id": str(number), "name": "search", "arguments": '{"q": "茶"}'})
        return message(own_id, call, role=None, type="plugin_call", status="completed")
    if number % 10 == 4:
        output = data_part({"call_id": str(number), "output": '["龙井", "green"]'})
        return message(own_id, output, role="tool", type="plugin_call_output")
    role = "assistant" if number % 2 else "user"
    return message(own_id, text_part(f"第{number}句 line {number}"), role=role)


@pytest.fixture(scope="module")
def old() -> Iterator[Old]:
    with TablestoreServer(access_key_secret=SECRET, sts_token=TOKEN) as server:
        # The old service used a key without a token, as it was.
        server.sts_token = None
        filled = Old(server)
        filled.fill()
        server.sts_token = TOKEN
        yield filled


@pytest.fixture(autouse=True)
def _well_again(old: Old) -> Iterator[None]:
    old.server.reset_counts()
    yield
    old.server.clear_faults()


@pytest.fixture
def server() -> Iterator[TablestoreServer]:
    """One of the test's own, with nothing in it."""
    with TablestoreServer(access_key_secret=SECRET) as server:
        yield server


def keys(server: TablestoreServer) -> dict[str, str]:
    """The environment of somebody who may read it."""
    given = {
        "RECALLQ_TABLESTORE_END_POINT": server.url,
        "RECALLQ_TABLESTORE_INSTANCE_NAME": server.instance_name,
        "RECALLQ_TABLESTORE_ACCESS_KEY_ID": server.access_key_id,
        "RECALLQ_TABLESTORE_ACCESS_KEY_SECRET": server.access_key_secret,
    }
    if server.sts_token is not None:
        given["RECALLQ_TABLESTORE_STS_TOKEN"] = server.sts_token
    return given


@pytest.fixture
def shell_for(
    tmp_path: Path, redis_worker: Worker, user: str
) -> Callable[[TablestoreServer], Shell]:
    """Makes shells with a key to a server, and a tenant of the test's own to store for."""

    def make(server: TablestoreServer) -> Shell:
        return Shell(
            tmp_path,
            RECALLQ_REDIS_URL=redis_worker.url,
            RECALLQ_NAMESPACE=redis_worker.namespace,
            RECALLQ_TENANT=user,
            **keys(server),
        )

    return make


@pytest.fixture
def shell(shell_for: Callable[[TablestoreServer], Shell], old: Old) -> Shell:
    return shell_for(old.server)


def imported(shell: Shell, *arguments: str, code: int = 0) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        shell("import-tablestore", "--json", *arguments, code=code).stdout
    )
    return report


def listed(shell: Shell, user: str) -> list[StoredMessage]:
    async def ask() -> list[StoredMessage]:
        settings = shell.environment
        async with MemoryClient(
            settings["RECALLQ_REDIS_URL"],
            namespace=settings["RECALLQ_NAMESPACE"],
            tenant=settings["RECALLQ_TENANT"],
        ) as client:
            return await client.list_records(user, {"page_size": 10_000})

    return asyncio.run(ask())


def check_all_there(shell: Shell, old: Old) -> None:
    """Each message once, as it was said, where it was said, when, and in this order."""
    for user in USERS:
        records = listed(shell, user)
        expected = old.said[user]
        assert [each.message for each in records] == [to_message(said) for _, said, _ in expected]
        assert [each.message.to_dict() for each in records] == [said for _, said, _ in expected]
        assert [each.session_id for each in records] == [session for session, _, _ in expected]
        for record, (_, _, when) in zip(records, expected, strict=True):
            assert timedelta() <= record.created_at - when < timedelta(milliseconds=1)


class TestTheWholeTable:
    def test_comes_over_as_it_was_and_stays_as_it_was(self, shell: Shell, old: Old) -> None:
        server = old.server
        before, written = server.rows(TABLE), server.rows_written
        assert len(before) == ROWS
        assert all(("embedding" in row) == ("text" in row) for row in before)
        first = imported(shell)
        assert (first["lines"], first["messages"], first["added"]) == (ROWS, ROWS, ROWS)
        assert (first["already_stored"], first["rejected"], first["error"]) == (0, 0, None)
        check_all_there(shell, old)

        again = imported(shell)
        assert (again["lines"], again["added"], again["already_stored"]) == (ROWS, 0, ROWS)
        check_all_there(shell, old)

        assert server.rows(TABLE) == before
        assert server.rows_written == written
        assert set(server.calls) == READS
        ranges = [each.body for each in server.requests_to("/GetRange")]
        assert len(ranges) == 2 * 3
        for each in ranges:
            assert {"user_id", "content_list", "text"} <= set(each.columns_to_get)
            assert "embedding" not in each.columns_to_get

    def test_a_dry_run_counts_and_needs_no_redis(
        self, shell: Shell, old: Old, tmp_path: Path
    ) -> None:
        gone = "redis://:geheim@127.0.0.1:1"
        told = shell("import-tablestore", "--dry-run", "--url", gone)
        assert f"would store {ROWS:,} messages of 3 users in 9 sessions" in told.stdout
        assert "written from 2025-03-01 00:00 to 2025-03-01 00:58 (UTC)" in told.stdout
        assert "127.0.0.1:1, namespace" in told.stdout
        assert "geheim" not in told.stdout + told.stderr
        report = imported(shell, "--dry-run", "--url", gone, "--user", "ann")
        assert (report["dry_run"], report["added"], report["rejected"]) == (True, 0, 0)
        assert report["would_add"] == report["lines"] == old.count("ann")
        assert (report["users"], report["sessions"]) == (1, 3)
        assert set(old.server.calls) == READS
        assert listed(shell, "ann") == []
        assert not list(tmp_path.glob("*.rejects.jsonl"))

    def test_interrupted_it_is_run_again(self, shell: Shell, old: Old) -> None:
        """Ctrl-C after a page, then SIGKILL after a page, then to the end."""
        for number in (signal.SIGINT, signal.SIGKILL):
            before = old.server.count("/GetRange")
            first = old.server.hold("/GetRange")
            process = shell.start("import-tablestore")
            old.server.wait_for_request("/GetRange", before + 1, timeout=30)
            second = old.server.hold("/GetRange")
            first.release()  # the first page goes out, and the second waits
            try:
                deadline = time.monotonic() + 30
                while sum(len(listed(shell, user)) for user in USERS) < 500:
                    assert time.monotonic() < deadline
                    assert process.poll() is None, process.communicate()
                process.send_signal(number)
                _, said = process.communicate(timeout=30)
            finally:
                second.release()
                process.kill()
            assert process.returncode == (130 if number == signal.SIGINT else -number)
            if number == signal.SIGINT:
                assert "stopped after row 500 of table agentscope_runtime_memory" in said
                assert "what is stored is not stored twice" in said
        report = imported(shell)
        assert (report["lines"], report["added"], report["already_stored"]) == (
            ROWS, ROWS - 500, 500,
        )  # fmt: skip
        check_all_there(shell, old)

    def test_of_one_user_and_tablestore_is_busy_for_a_while(self, shell: Shell, old: Old) -> None:
        old.server.fail_with("DescribeTable", "OTSServerBusy", times=1)
        old.server.fail_with("GetRange", "OTSServerBusy", times=1)
        old.server.cut("/GetRange", times=1)
        old.server.fail("/GetRange", 502, times=1, body="<html>bad gateway</html>")
        count = old.count("王芳")
        run = shell("import-tablestore", "--user", "王芳")
        assert f"stored {count} messages from {count} rows in " in run.stdout
        assert "0 stored before, 0 rows rejected" in run.stdout
        assert not old.server.faults
        assert [each.message.to_dict() for each in listed(shell, "王芳")] == [
            said for _, said, _ in old.said["王芳"]
        ]
        assert [listed(shell, user) for user in ("ann", "bob/2")] == [[], []]


class TestBadRows:
    def test_they_go_to_the_rejects_and_stop_nothing(
        self,
        shell_for: Callable[[TablestoreServer], Shell],
        server: TablestoreServer,
        tmp_path: Path,
    ) -> None:
        table = AgentscopeTable(server, "old_memory", text_field="body")
        for number in range(20):
            table.add("ann", message(f"good-{number:02}", text_part(f"茶 {number}")))
        table.put("bad-1", {"session_id": "s", "content_list": "[]"})
        table.put("bad-2", {"user_id": "ann", "content_list": "[{", "note": bytearray(b"\x00\xff")})
        table.put("bad-3", {"user_id": "ann", "unknown": 1})
        table.put("bad-4", {"user_id": "ann", "content_list": "null"}, tenant="somebody")
        table.put("bad-5", {"unknown": 1})
        table.put("own-1", {"user_id": "bob", "content_list": "[]", "role": "user", "mood": "gut"})
        table.close()
        shell = shell_for(server)
        rejects = tmp_path / "bad.jsonl"
        options = ["--table", "old_memory", "--text-field", "body", "--rejects", str(rejects),
                   "--column", "mood"]  # fmt: skip
        for dry in (True, False):
            run = shell("import-tablestore", *options, *(["--dry-run"] if dry else []), code=1)
            assert "21 messages" in run.stdout
            assert "26 rows" in run.stdout
            assert "5 rows rejected; which and why is in" in run.stderr
            assert "2 x it has no user_id" in run.stderr
            lines = [json.loads(line) for line in rejects.read_text().splitlines()]
            assert [json.loads(line["raw"])["document_id"] for line in lines] == [
                f"bad-{number}" for number in range(1, 6)
            ]
            assert [line["reason"][:23] for line in lines] == [
                "it has no user_id",
                "its content_list is not",
                "it has no content_list:",
                "its tenant_id is 'someb",
                "it has no user_id",
            ]
        assert [each.message.text for each in listed(shell, "ann")] == [
            f"茶 {number}" for number in range(20)
        ]
        (own,) = listed(shell, "bob")
        assert own.message.to_dict()["mood"] == "gut"
        with pytest.raises(InvalidInput, match="in column body, by its search index, not in text"):
            TablestoreTable(access_to(server), "old_memory").check()


class TestWrongUse:
    def test_another_kind_of_table(
        self, shell_for: Callable[[TablestoreServer], Shell], server: TablestoreServer
    ) -> None:
        import tablestore

        client = tablestore.OTSClient(
            server.url, server.access_key_id, server.access_key_secret, server.instance_name
        )
        client.create_table(
            tablestore.TableMeta("recallq_memory", [("owner", "STRING"), ("place", "STRING")]),
            tablestore.TableOptions(),
            tablestore.ReservedThroughput(tablestore.CapacityUnit(0, 0)),
        )
        client.connection.pool.clear()
        told = one_line(shell_for(server)("import-tablestore", "--table", "recallq_memory", code=1))
        assert "(owner, place)" in told
        assert "(document_id, tenant_id)" in told

    def test_no_such_table(self, old: Old) -> None:
        access = access_to(old.server)
        with pytest.raises(InvalidInput, match="there is no table nowhere in instance loopback"):
            TablestoreTable(access, "nowhere").check()
        with pytest.raises(InvalidInput, match="cannot be the name of a table"):
            TablestoreTable(access, "../x")
        with pytest.raises(InvalidInput, match="content has a meaning of its own"):
            TablestoreTable(access, extra=["content"])

    def test_a_wrong_key_is_told_and_not_shown(self, shell: Shell) -> None:
        shell.environment["RECALLQ_TABLESTORE_ACCESS_KEY_SECRET"] = "wrong-secret"
        told = one_line(shell("import-tablestore", code=1))
        assert "OTSAuthFailed" in told
        assert "RECALLQ_TABLESTORE_ACCESS_KEY_SECRET" in told
        for secret in (SECRET, TOKEN, "wrong-secret"):
            assert secret not in told

    @pytest.mark.parametrize("name", ["access_key_id", "sts_token", "instance_name"])
    def test_other_ways_of_not_being_let_in(self, old: Old, name: str) -> None:
        access = access_to(old.server, **{name: "wrong-one"})
        with pytest.raises(ConfigurationError, match="OTSAuthFailed") as caught:
            TablestoreTable(access).check()
        assert ("wrong-one" in str(caught.value)) == (name == "instance_name")

    def test_what_is_missing_is_named(self, shell: Shell) -> None:
        del shell.environment["RECALLQ_TABLESTORE_ACCESS_KEY_SECRET"]
        told = one_line(shell("import-tablestore", code=1))
        assert "needs RECALLQ_TABLESTORE_ACCESS_KEY_SECRET" in told

    def test_nobody_answers(self, shell: Shell) -> None:
        run = shell("import-tablestore", "--end-point", "http://127.0.0.1:1", code=1)
        assert "cannot be reached at http://127.0.0.1:1" in one_line(run)

    def test_without_the_extra(self, old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tablestore", None)
        with pytest.raises(MissingExtra, match=r"recallq\[tablestore\]"):
            TablestoreTable(access_to(old.server)).check()


def access_to(server: TablestoreServer, **other: str) -> TablestoreAccess:
    given = {
        name.removeprefix("RECALLQ_TABLESTORE_").lower(): value
        for name, value in keys(server).items()
    }
    return TablestoreAccess.load(**given | other)


class Taking:
    """A client that takes everything."""

    def __init__(self) -> None:
        self.taken: list[Message] = []

    def next_order(self) -> int:
        raise AssertionError("rows bring their order")

    async def add_memory(
        self, user_id: str, messages: list[Message], session_id: str, **_: Any
    ) -> AddResult:
        self.taken += messages
        return AddResult(record_ids=[], added=len(messages))


async def test_tablestore_that_stays_away_ends_the_run(
    old: Old, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(feed, "_PATIENCE", 0.2)
    monkeypatch.setattr(feed, "_FIRST_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    waited: set[str | None] = set()

    def progress(report: IngestReport) -> None:
        waited.add(report.waiting)

    client = Taking()
    first = old.server.hold("/GetRange")
    running = asyncio.create_task(
        ingest(
            client,
            [TablestoreTable(access_to(old.server))],
            IngestOptions(checkpoint=False),
            progress,
        )
    )
    await asyncio.to_thread(old.server.wait_for_request, "/GetRange")
    second = old.server.hold("/GetRange")
    first.release()
    while len(client.taken) < 500:
        await asyncio.sleep(0.01)
    old.server.fail_with("GetRange", "OTSServerBusy")
    second.release()
    with pytest.raises(ServiceUnavailable, match="503 OTSServerBusy; stopped after row 500 of"):
        await running
    assert "Tablestore answers 503 OTSServerBusy" in waited
    assert not list(tmp_path.iterdir())


def test_both_tables_may_be_in_one_instance(
    redis_url: str,
    namespace: str,
    tmp_path: Path,
    server: TablestoreServer,
    start_worker: Callable[..., Worker],
) -> None:
    table = AgentscopeTable(server)
    said = [message(f"m-{n}", text_part(f"龙井茶 {n}"), role="assistant") for n in range(12)]
    for each in said:
        table.add("ann", each, "s")
    table.close()
    before = server.rows(TABLE)
    settings = {
        name.removeprefix("RECALLQ_").lower(): value for name, value in keys(server).items()
    }
    start_worker(backend="tablestore", **settings)
    server.reset_counts()
    shell = Shell(
        tmp_path,
        RECALLQ_REDIS_URL=redis_url,
        RECALLQ_NAMESPACE=namespace,
        RECALLQ_TENANT="default",
        **keys(server),
    )
    for added in (12, 0):
        assert imported(shell)["added"] == added
    assert [each.message.to_dict() for each in listed(shell, "ann")] == said
    assert server.rows(TABLE) == before
    written = {
        each.table_name
        for request in server.requests_to("/BatchWriteRow")
        for each in request.body.tables
    }
    assert written == {"recallq_memory", "recallq_memory_notes"}
    assert not {"PutRow", "UpdateRow", "DeleteRow", "UpdateTable"} & set(server.calls)
