"""The ``recallq`` command as a shell or a script sees it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from recallq import MemoryClient, __version__, sample
from tests.support import RECALLQ, Shell, Worker, one_line, redis_at


@pytest.fixture
def bare(tmp_path: Path) -> Shell:
    """No Redis named, nothing running."""
    return Shell(tmp_path)


@pytest.fixture
def shell(tmp_path: Path, redis_worker: Worker) -> Shell:
    """A Redis and a worker that run already."""
    return Shell(
        tmp_path,
        RECALLQ_REDIS_URL=redis_worker.url,
        RECALLQ_NAMESPACE=redis_worker.namespace,
    )


class TestTheFourCalls:
    def test_in_words(self, shell: Shell, user: str) -> None:
        assert shell("add", user, "I like green tea", "and 龙井茶", "-s", "s1").stdout == (
            f"stored 2 messages for {user}\n"
        )
        found = shell("search", user, "green", "tea").stdout
        assert "I like green tea" in found
        assert "0.6" in found
        listed = shell("list", user, "--size", "1").stdout
        assert "the next is --page 2" in listed
        assert "龙井茶" in shell("list", user, "--page", "2", "--size", "1").stdout
        assert shell("list", user, "--page", "9").stdout == "no messages on page 9\n"
        assert "2 messages" in shell("delete", user, "--session", "s1").stdout
        assert shell("list", user).stdout == "no messages\n"
        assert shell("search", user, "tea").stdout == "nothing found\n"

    def test_in_json(self, shell: Shell, user: str) -> None:
        added = json.loads(shell("add", user, "tea", "--role", "assistant", "--json").stdout)
        assert added["added"] == 1
        (hit,) = json.loads(shell("search", user, "tea", "--json").stdout)
        assert hit["message"] == {"role": "assistant", "content": "tea"}
        assert hit["record_id"] == added["record_ids"][0]
        (record,) = json.loads(shell("list", user, "--json").stdout)
        assert record["session_id"] == "default"
        assert json.loads(shell("delete", user, "--all", "--json").stdout) == {"removed": 1}

    def test_a_message_from_standard_input(self, shell: Shell, user: str) -> None:
        shell("add", user, "-", stdin="from a pipe\n")
        assert json.loads(shell("list", user, "--json").stdout)[0]["message"]["content"] == (
            "from a pipe"
        )

    def test_control_characters_do_not_reach_the_terminal(self, shell: Shell, user: str) -> None:
        shell("add", user, "red \x1b[31m alert")
        assert "\x1b" not in shell("list", user).stdout

    def test_deleting_wants_to_know_what(self, shell: Shell, user: str) -> None:
        assert "--all" in one_line(shell("delete", user, code=2))
        assert "--all" in one_line(shell("delete", user, "--all", "-s", "x", code=2))

    def test_bad_input_is_one_line(self, shell: Shell, user: str) -> None:
        assert "top_k" in one_line(shell("search", user, "tea", "-k", "0", code=1))
        assert "page_num" in one_line(shell("list", user, "--page", "0", code=1))
        assert "user_id is empty" in one_line(shell("add", "", "tea", code=1))


class TestWrongUse:
    def test_unknown_commands_and_options_say_so(self, bare: Shell) -> None:
        assert "No such command 'serach'" in bare("serach", code=2).stderr
        assert "No such option" in bare("list", "u", "--colour", code=2).stderr

    def test_no_redis_there(self, bare: Shell) -> None:
        told = one_line(bare("add", "u", "x", "--url", "redis://:geheim@127.0.0.1:1", code=1))
        assert "127.0.0.1:1" in told
        assert "geheim" not in told
        assert "must start with" in one_line(bare("list", "u", "--url", "http://x", code=1))

    def test_a_wrong_setting_names_the_variable(self, tmp_path: Path) -> None:
        shell = Shell(tmp_path, RECALLQ_REDIS_URL="redis://x", RECALLQ_TIMEOUT="soon")
        assert "RECALLQ_TIMEOUT" in one_line(shell("list", "u", code=1))

    def test_nobody_works(self, redis_url: str, namespace: str, tmp_path: Path) -> None:
        shell = Shell(tmp_path, RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace)
        told = one_line(shell("add", "u", "x", "--timeout", "0.3", code=1))
        assert "no worker is running" in told

    def test_the_version(self, bare: Shell) -> None:
        assert bare("--version").stdout == f"recallq {__version__}\n"

    def test_help_and_every_commands_help(self, bare: Shell) -> None:
        commands = bare("--help").stdout
        for name in ("demo", "up", "worker", "add", "search", "list", "delete", "ingest",
                     "import-tablestore", "status", "doctor", "backends"):  # fmt: skip
            assert name in commands
            assert bare(name, "--help").stdout


class TestWithoutARedis:
    def test_a_command_brings_its_own_and_data_stays(self, bare: Shell) -> None:
        first = bare("add", "u", "remember me")
        assert "embedded" in first.stderr
        assert "remember me" in bare("list", "u").stdout
        assert "nothing" not in bare("search", "u", "remember").stdout
        assert "nothing is running" not in bare("status", code=1).stdout

    def test_status_and_doctor_do_not_start_one(self, bare: Shell) -> None:
        assert "recallq up" in one_line(bare("status", code=1))
        assert "recallq up" in bare("doctor", code=1).stdout


class TestUp:
    @pytest.fixture
    def up(self, bare: Shell) -> Iterator[tuple[subprocess.Popen[str], str]]:
        process = bare.start("up", "--json")
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        yield process, url
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)

    def test_the_others_find_it_and_ctrl_c_ends_it(
        self, bare: Shell, up: tuple[subprocess.Popen[str], str]
    ) -> None:
        process, url = up
        added = bare("add", "u", "tea")
        assert added.stderr == ""  # no embedded one of its own
        assert "tea" in bare("list", "u").stdout
        assert "tea" in bare("list", "u", "--url", url).stdout
        status = json.loads(bare("status", "--json").stdout)
        assert [each["backend"] for each in status["workers"]] == ["redis"]
        assert status["lanes"]["live"] == {
            "outstanding": 0,
            "queued_batches": 0,
            "oldest": None,
            "accepted": 3,
            "settled": 3,
            "workers": 1,
        }
        assert "worker" in bare("status").stdout
        doctor = json.loads(bare("doctor", "--json").stdout)
        assert doctor["healthy"], doctor
        assert {each["state"] for each in doctor["checks"]} == {"ok"}

        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert "recallq up" in one_line(bare("status", code=1))

    def test_status_is_watched_until_ctrl_c(
        self, bare: Shell, up: tuple[subprocess.Popen[str], str]
    ) -> None:
        process, _ = up
        watching = bare.start("status", "--watch", "--json", "--every", "0.2")
        assert watching.stdout is not None
        lanes = json.loads(watching.stdout.readline())["lanes"]
        assert lanes["live"]["accepted"] == 0
        bare("add", "u", "tea")
        while json.loads(watching.stdout.readline())["lanes"]["live"]["settled"] == 0:
            pass
        process.send_signal(signal.SIGINT)  # the service stops, and may come back
        while "error" not in json.loads(watching.stdout.readline()):
            pass
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=60)
        assert (watching.returncode, said) == (0, "")

    def test_status_on_a_terminal(self, bare: Shell, up: tuple[subprocess.Popen[str], str]) -> None:
        ours, theirs = pty.openpty()
        environment = bare.environment | {"TERM": "xterm-256color", "LINES": "40"}
        watching = subprocess.Popen(
            [RECALLQ, "status", "-w", "--every", "0.2"],
            env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        seen = b""
        while seen.count(b"settled/s") < 3 or b"dead letters: 0" not in seen:
            seen += os.read(ours, 4096)
        assert b"\x1b[" in seen  # drawn in place
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0
        os.close(ours)

    def test_a_worker_that_dies_is_replaced(
        self, bare: Shell, up: tuple[subprocess.Popen[str], str]
    ) -> None:
        (worker,) = json.loads(bare("status", "--json").stdout)["workers"]
        os.kill(worker["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while True:
            workers = json.loads(bare("status", "--json").stdout)["workers"]
            if any(each["pid"] != worker["pid"] for each in workers):
                break
            assert time.monotonic() < deadline
        assert "tea" in (bare("add", "u", "tea"), bare("list", "u"))[1].stdout

    def test_nothing_outlives_it_even_if_it_is_killed(
        self, bare: Shell, up: tuple[subprocess.Popen[str], str]
    ) -> None:
        process, _ = up
        (worker,) = json.loads(bare("status", "--json").stdout)["workers"]
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 60
        while _is_running(worker["pid"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "recallq up" in one_line(bare("status", code=1))

    def test_a_second_one_on_the_same_data_is_refused(
        self, bare: Shell, up: tuple[subprocess.Popen[str], str]
    ) -> None:
        _, url = up
        assert url in one_line(bare("up", code=1))

    def test_a_worker_joins_it(self, bare: Shell, up: tuple[subprocess.Popen[str], str]) -> None:
        joining = bare.start("worker", "--lanes", "bulk")
        try:
            deadline = time.monotonic() + 60
            while len(json.loads(bare("status", "--json").stdout)["workers"]) < 2:
                assert time.monotonic() < deadline
        finally:
            joining.send_signal(signal.SIGTERM)
            joining.communicate(timeout=60)
        assert joining.returncode == 0


class TestDoctor:
    def test_it_says_what_to_do(self, redis_url: str, namespace: str, tmp_path: Path) -> None:
        shell = Shell(tmp_path, RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace)
        told = shell("doctor", code=1).stdout
        assert "failed   workers: none is running" in told
        assert "recallq worker" in told
        unreachable = shell("doctor", "--url", "redis://127.0.0.1:1", code=1).stdout
        assert "failed   Redis (broker)" in unreachable

    def test_it_warns_of_a_redis_that_forgets(self, tmp_path: Path, namespace: str) -> None:
        from recallq.embedded import EmbeddedRedis

        with EmbeddedRedis() as server:

            async def forget() -> None:
                async with redis_at(server.url) as redis:
                    await redis.config_set("appendonly", "no")
                    await redis.config_set("maxmemory-policy", "allkeys-lru")

            asyncio.run(forget())
            shell = Shell(tmp_path, RECALLQ_REDIS_URL=server.url, RECALLQ_NAMESPACE=namespace)
            checks = json.loads(shell("doctor", "--json", code=1).stdout)["checks"]
        warnings = [each["detail"] for each in checks if each["state"] == "warning"]
        assert len(warnings) == 2, checks

    def test_it_looks_at_each_redis(self, redis_url: str, tmp_path: Path, namespace: str) -> None:
        from recallq.embedded import EmbeddedRedis

        with EmbeddedRedis() as server:

            async def limit() -> None:
                async with redis_at(server.url) as redis:
                    await redis.config_set("appendonly", "no")
                    used = (await redis.info("memory"))["used_memory"]
                    await redis.config_set("maxmemory", used + 100_000)

            asyncio.run(limit())
            shell = Shell(
                tmp_path,
                RECALLQ_REDIS_URL=redis_url,
                RECALLQ_COORDINATION_URL=server.url,
                RECALLQ_NAMESPACE=namespace,
            )
            checks = json.loads(shell("doctor", "--json", code=1).stdout)["checks"]
        warned = {each["check"]: each for each in checks if each["state"] == "warning"}
        assert set(warned) == {"Redis (coordination) durability", "Redis (coordination) memory"}
        assert "dead letters" in warned["Redis (coordination) durability"]["detail"]
        assert "maxmemory" in warned["Redis (coordination) memory"]["advice"]


class TestDead:
    @pytest.fixture
    def there(
        self, redis_url: str, namespace: str, tmp_path: Path, start_worker: Callable[..., Worker]
    ) -> Shell:
        """A worker that refuses what it is told to, in a namespace of the test's own."""
        start_worker(backend="slow_redis")
        return Shell(tmp_path, RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace)

    def test_listed_shown_replayed_and_purged(
        self, there: Shell, redis_url: str, namespace: str
    ) -> None:
        assert there("dead", "list").stdout == "no dead letters\n"
        for user, text in (("ann", "refuse \x1b[31mone"), ("ann", "refuse two"), ("bob", "refuse")):
            assert "refused, as told" in one_line(there("add", user, text, "-s", "s", code=1))
        table = there("dead", "list").stdout
        assert table.count("backend_error: refused, as told") == 3
        assert "\x1b" not in table
        assert "3 writes failed for good" in there("doctor").stdout
        assert "none of these; 3 in all" in there("dead", "list", "--user", "eve").stdout
        first, second = json.loads(there("dead", "list", "--user", "ann", "--json").stdout)
        assert "one" not in json.dumps(first)  # what the user said is for 'show'
        shown = json.loads(there("dead", "show", first["id"]).stdout)
        assert "one" in shown["job"]["messages"][0]["content"]
        assert shown["attempts"] == 1
        assert "no dead letter nonsense" in one_line(there("dead", "show", "nonsense", code=1))

        there.environment["COLUMNS"] = "40"
        told = there("dead", "list").stdout
        assert all(each["id"] in told for each in (first, second))  # what commands take
        there.environment["COLUMNS"] = "200"

        asyncio.run(self._allow(redis_url, namespace))
        assert "replayed 1 dead letter\n" in there("dead", "replay", first["id"]).stdout
        assert there("dead", "purge", second["id"]).stdout == "purged 1 dead letter\n"
        assert "replayed 1 dead letter\n" in there("dead", "replay", "--all").stdout
        for user in ("ann", "bob"):
            assert "refuse" in there("list", user).stdout
        assert "two" not in there("list", "ann").stdout
        assert there("dead", "purge", "--all").stdout == "purged 0 dead letters\n"

        asyncio.run(self._spoil(redis_url, namespace))
        replayed = there("dead", "replay", "--all", code=1)
        assert replayed.stdout == "replayed 0 dead letters\n"
        assert "cannot be read" in one_line(replayed)

    async def _spoil(self, redis_url: str, namespace: str) -> None:
        """Leaves a letter that nobody can read."""
        async with MemoryClient(redis_url, namespace=namespace) as client:
            keys = client.transport.keys
            async with redis_at(redis_url) as redis:
                await redis.hset(keys.dead_letter("spoilt"), "letter", "{")
                await redis.zadd(keys.dead, {"spoilt": 1})

    async def _allow(self, redis_url: str, namespace: str) -> None:
        async with redis_at(redis_url) as redis:
            await redis.set(f"{namespace}:allowed", 1)

    def test_they_want_to_know_which(self, there: Shell) -> None:
        for command in ("replay", "purge"):
            for options in ((), ("--all", "--user", "u"), ("id", "--all")):
                assert "say which" in one_line(there("dead", command, *options, code=2))
        assert "user_id" in one_line(there("dead", "list", "--session", "s", code=1))
        assert there("dead", "purge", "--older-than", "7").stdout == "purged 0 dead letters\n"


def test_backends_are_listed_with_their_extras(bare: Shell) -> None:
    listed = json.loads(bare("backends", "--json").stdout)
    assert {"name": "redis", "extra": "worker", "installed": True, "provider": "recallq"} in listed
    assert "in_memory" in bare("backends").stdout


def test_the_demo_shows_the_main_job(bare: Shell) -> None:
    told = bare("demo").stdout
    for step in ("Ingest:", "Search:", "List:", "Delete a session:", "Delete a user:"):
        assert step in told
    assert "龙井" in told


class TestIngest:
    def test_twice_adds_nothing_the_second_time(
        self, shell: Shell, tmp_path: Path, user: str
    ) -> None:
        log = tmp_path / "log.jsonl"
        lines = [
            {"user_id": user, "session_id": "s", "role": "user", "content": f"line {number}"}
            for number in range(200)
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        first = json.loads(shell("ingest", str(log), "--json").stdout)
        again = json.loads(shell("ingest", str(log), "--json").stdout)
        piped = json.loads(shell("ingest", "-", "--json", stdin=log.read_text()).stdout)
        assert (first["added"], again["added"], piped["added"]) == (200, 0, 0)
        listed = json.loads(shell("list", user, "--size", "1000", "--json").stdout)
        assert [each["message"]["content"] for each in listed] == [
            line["content"] for line in lines
        ]

    def test_the_three_formats_are_told_apart(
        self, shell: Shell, tmp_path: Path, user: str
    ) -> None:
        log = tmp_path / "mixed.jsonl"
        lines = [
            {"user_id": user, "session_id": "flat", "role": "user", "content": "one", "id": "x"},
            {
                "messages": [
                    {"role": "user", "content": "two"},
                    {"role": "assistant", "content": "3"},
                ]
            },
            {"conversations": [{"from": "human", "value": "four"}, {"from": "gpt", "value": "5"}]},
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = json.loads(shell("ingest", str(log), "--user", user, "--json").stdout)
        assert (report["lines"], report["added"]) == (3, 5)
        listed = json.loads(shell("list", user, "--json").stdout)
        assert [each["message"]["role"] for each in listed] == [
            "user", "user", "assistant", "user", "assistant",
        ]  # fmt: skip

    def test_bad_lines_go_to_the_rejects_and_stop_nothing(
        self, shell: Shell, tmp_path: Path, user: str
    ) -> None:
        log = tmp_path / "bad.jsonl"
        good = {"user_id": user, "session_id": "s", "role": "user", "content": "good"}
        log.write_text(
            f'{json.dumps(good)}\n{{"torn": \n[]\n{json.dumps(good | {"content": "b"})}\n'
        )
        run = shell("ingest", str(log), code=1)
        assert "stored 2 messages" in run.stdout
        rejects = [
            json.loads(line) for line in Path(f"{log}.rejects.jsonl").read_text().splitlines()
        ]
        assert [reject["line"] for reject in rejects] == [2, 3]
        assert all(reject["reason"] for reject in rejects)

    def test_a_file_that_is_not_there(self, shell: Shell, tmp_path: Path) -> None:
        assert "nowhere" in one_line(shell("ingest", str(tmp_path / "nowhere.jsonl"), code=2))

    def test_interrupted_and_resumed_it_stores_each_line_once(
        self, shell: Shell, tmp_path: Path, redis_worker: Worker, user: str
    ) -> None:
        """Ctrl-C in the middle, then SIGKILL in the middle, then to the end."""
        count = 0
        log = tmp_path / "long.jsonl"

        def go_on_writing() -> None:
            nonlocal count
            with log.open("a") as file:
                for number in range(count, count + 10_000):
                    line = {
                        "user_id": f"{user}-{number % 7}",
                        "session_id": "s",
                        "role": "user",
                        "content": f"line {number}",
                    }
                    file.write(json.dumps(line) + "\n")
            count += 10_000

        go_on_writing()
        for number in (signal.SIGINT, signal.SIGKILL):
            # If it comes to its end before it is interrupted, there is more for it to do.
            for _ in range(5):
                before = _stored(redis_worker, user)
                process = shell.start("ingest", str(log), "--resume")
                deadline = time.monotonic() + 60
                while _stored(redis_worker, user) < before + 1000 and process.poll() is None:
                    assert time.monotonic() < deadline
                redis_worker.signal(signal.SIGSTOP)  # so that it cannot be done before it hears
                process.send_signal(number)
                time.sleep(0.5)
                redis_worker.signal(signal.SIGCONT)
                _, said = process.communicate(timeout=60)
                if process.returncode != 0:
                    break
                go_on_writing()
            assert process.returncode == (130 if number == signal.SIGINT else -number), said
            if number == signal.SIGINT:
                assert "--resume" in said
        report = json.loads(shell("ingest", str(log), "--resume", "--json").stdout)
        assert report["error"] is None
        assert report["lines"] < count
        listed: list[str] = []
        for each in range(7):
            page = json.loads(shell("list", f"{user}-{each}", "--size", "10000", "--json").stdout)
            numbers = [int(one["message"]["content"].split()[1]) for one in page]
            assert numbers == sorted(numbers)
            listed += [str(one) for one in numbers]
        assert len(listed) == len(set(listed)) == count

    def test_a_progress_bar_on_a_terminal(self, shell: Shell, tmp_path: Path, user: str) -> None:
        log = tmp_path / "log.jsonl"
        log.write_bytes(sample.path().read_bytes())
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [RECALLQ, "ingest", str(log)],
            env={**shell.environment, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:
                    break  # the other end is closed
        process.wait(30)
        os.close(ours)
        assert process.returncode == 0
        assert b"100%" in shown
        assert b"81 messages" in shown


def _is_running(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _stored(worker: Worker, user: str) -> int:
    async def count() -> int:
        async with redis_at(worker.url) as redis:
            lengths = [
                await redis.zcard(f"{worker.namespace}:m:{{default/{user}-{each}}}:o")
                for each in range(7)
            ]
        return int(sum(lengths))

    return asyncio.run(count())


def test_a_worker_started_by_the_command_is_the_worker(
    shell: Shell, start_worker: Callable[..., Worker]
) -> None:
    """`recallq worker` becomes the worker: signals and exit codes are its own."""
    process = shell.start("worker", "--lanes", "slow")
    assert process.stdout is not None
    assert "recallq worker ready" in process.stdout.readline()
    command = Path(f"/proc/{process.pid}/cmdline")
    if command.exists():
        assert b"recallq_worker" in command.read_bytes()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_sample_log_speaks_two_languages_of_several_users() -> None:
    lines = [json.loads(line) for line in sample.path().read_text("utf-8").splitlines()]
    assert len({line["user_id"] for line in lines}) >= 3
    assert len({(line["user_id"], line["session_id"]) for line in lines}) >= 6
    assert any("\u4e00" <= each <= "\u9fff" for line in lines for each in str(line["content"]))
