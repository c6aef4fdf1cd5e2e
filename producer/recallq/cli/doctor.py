"""``recallq doctor``: what ails the service, and what to do about it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from redis import exceptions as redis_exceptions

from recallq.cli.connection import UrlOption, existing_url
from recallq.cli.memory import JsonOption
from recallq.cli.runner import run
from recallq.client import MemoryClient
from recallq.contract import PROTOCOL_VERSION, Lane
from recallq.errors import AccessDenied, JobTimeout, RecallQError, UndecodableJob
from recallq.fleet import memory_limit, memory_used
from recallq.redis_client import RedisClient, asking, connect, redact
from recallq.settings import ClientSettings
from recallq.workers import WorkerInfo

_OLDEST_REDIS = (6, 2)
_NEARLY_FULL = 0.9
_PATIENCE = 10.0
"""Seconds that doctor waits for a worker's answer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that doctor looked at."""

    check: str
    state: str
    """``ok``, ``warning`` or ``failed``."""
    detail: str
    advice: str = ""


def doctor(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Check Redis, the result backend, the workers and the memory backend."""
    findings = run(_examine(url))
    healthy = all(each.state != "failed" for each in findings)
    if as_json:
        report = {"healthy": healthy, "checks": [asdict(each) for each in findings]}
        sys.stdout.write(orjson.dumps(report).decode() + "\n")
    else:
        for each in findings:
            print(f"{each.state:<9}{each.check}: {each.detail}")
            if each.advice:
                print(f"{'':<9}-> {each.advice}")
    if not healthy:
        raise SystemExit(1)


async def _examine(url: str | None) -> list[Finding]:
    try:
        settings = ClientSettings.load(redis_url=await existing_url(url))
    except RecallQError as error:
        return [Finding("settings", "failed", str(error))]
    findings: list[Finding] = []
    servers = {
        "broker": settings.broker_url,
        "coordination": settings.coordination_url,
        "result backend": settings.result_url,
    }
    looked_at: set[str] = set()
    for role, server in servers.items():
        findings += await _examine_redis(role, server, settings, again=server in looked_at)
        looked_at.add(server)
    if any(each.state == "failed" for each in findings):
        return findings
    try:
        async with MemoryClient(settings=settings) as client:
            workers = await client.workers()
            findings += _judge_workers(workers)
            if workers:  # else the question would wait for one
                findings.append(await _examine_backend(client))
            findings += _judge_dead_letters(await client.dead_letters.count())
    except RecallQError as error:
        findings.append(Finding("client", "failed", str(error)))
    return findings


async def _examine_redis(
    role: str, url: str, settings: ClientSettings, *, again: bool
) -> list[Finding]:
    """`again`: the server has been examined in another role."""
    check = f"Redis ({role})"
    redis = connect(url, connect_timeout=settings.connect_timeout, retries=0)
    try:
        async with asking(url, "cannot reach it"):
            info = await redis.info()
            findings = [_judge_version(check, url, info)]
            if not again:
                findings += _judge_durability(role, check, info) + _judge_memory(check, info)
            if role == "result backend":
                findings.append(await _write_and_read(role, redis, settings))
    except RecallQError as error:
        advice = "start a Redis there, or set the right URL; 'recallq up' runs one for you"
        if isinstance(error, AccessDenied):
            advice = "give the user its password and rights; deploy/security.md has them"
        return [Finding(check, "failed", str(error), advice)]
    finally:
        await redis.aclose(close_connection_pool=True)
    return findings


def _judge_version(check: str, url: str, info: dict[str, Any]) -> Finding:
    version = str(info.get("redis_version", "0"))
    detail = f"{version} at {redact(url)}"
    numbers = tuple(int(each) for each in version.split(".")[:2] if each.isdigit())
    if numbers < _OLDEST_REDIS:
        return Finding(check, "failed", detail, "RecallQ needs Redis 6.2 or later")
    return Finding(check, "ok", detail)


_LOST_WITHOUT_A_FILE = {
    "broker": "what is queued, unless the ledger is elsewhere",
    "coordination": "the ledger of accepted jobs, and dead letters",
    "result backend": "answers that nobody has fetched",
}


_WRITTEN = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")


def _judge_durability(role: str, check: str, info: dict[str, Any]) -> list[Finding]:
    findings = []
    if not info.get("aof_enabled"):
        findings.append(
            Finding(
                f"{check} durability",
                "warning",
                f"no append-only file: a restart of Redis loses {_LOST_WITHOUT_A_FILE[role]}",
                "set 'appendonly yes' in its configuration",
            )
        )
    findings += [
        Finding(
            f"{check} durability",
            "failed",
            f"{name} is {info[name]}: Redis cannot write to its disk",
            "see its log; is the disk full, or not writable?",
        )
        for name in _WRITTEN
        if info.get(name, "ok") != "ok"
    ]
    return findings


def _judge_memory(check: str, info: dict[str, Any]) -> list[Finding]:
    findings = []
    used, limit = memory_used(info), memory_limit(info)
    if used > _NEARLY_FULL * limit > 0:
        findings.append(
            Finding(
                f"{check} memory",
                "failed" if used >= limit else "warning",
                f"{used:,} of {limit:,} bytes (maxmemory) are used; without any, Redis takes no "
                "writes",
                "raise its maxmemory, or delete what nobody needs",
            )
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        findings.append(
            Finding(
                f"{check} memory",
                "warning",
                f"maxmemory-policy is {policy}: Redis may throw jobs and memories away",
                "set 'maxmemory-policy noeviction'",
            )
        )
    return findings


async def _write_and_read(role: str, redis: RedisClient, settings: ClientSettings) -> Finding:
    key = f"{settings.namespace}:doctor"
    try:
        await redis.set(key, b"1", ex=10)
        found = await redis.get(key)
        await redis.delete(key)
    except redis_exceptions.RedisError as error:
        return Finding(
            f"{role} writes", "failed", str(error), "check its memory limit and the user's rights"
        )
    if found != b"1":
        return Finding(f"{role} writes", "failed", "what was written could not be read back")
    return Finding(f"{role} writes", "ok", "written and read back")


def _judge_workers(workers: list[WorkerInfo]) -> list[Finding]:
    if not workers:
        advice = "start one with 'recallq worker'"
        return [Finding("workers", "failed", "none is running", advice)]
    findings = [Finding("workers", "ok", f"{len(workers)} running")]
    idle = [lane.value for lane in Lane if not any(lane in each.lanes for each in workers)]
    if idle:
        findings.append(
            Finding(
                "lanes",
                "warning",
                f"nobody works on {', '.join(idle)}",
                f"start one with 'recallq worker --lanes {','.join(idle)}'",
            )
        )
    backends = {each.backend for each in workers}
    if len(backends) > 1:
        findings.append(
            Finding(
                "backends",
                "failed",
                f"workers of one namespace run {' and '.join(sorted(backends))}: "
                "each would keep a part of the memories",
                "give each backend a RECALLQ_NAMESPACE of its own",
            )
        )
    versions = sorted({each.version for each in workers})
    if len(versions) > 1:
        findings.append(
            Finding(
                "versions",
                "warning",
                f"workers run {', '.join(versions)}",
                "go on with the upgrade: deploy/operations.md says in which order",
            )
        )
    old = [each for each in workers if each.protocol < PROTOCOL_VERSION]
    if old:
        findings.append(
            Finding(
                "protocol",
                "failed" if len(old) == len(workers) else "warning",
                f"{len(old)} of {len(workers)} workers do not read what this version sends: "
                f"{', '.join(sorted(f'{each.host}-{each.pid}' for each in old))}",
                "upgrade them; what is sent waits for newer workers",
            )
        )
    return findings


def _judge_dead_letters(count: int) -> list[Finding]:
    if not count:
        return []
    advice = "see why with 'recallq dead list', then replay or purge them"
    return [Finding("dead letters", "warning", f"{count:,} writes failed for good", advice)]


async def _examine_backend(client: MemoryClient) -> Finding:
    try:
        health = await client.check_backend(_PATIENCE)
    except JobTimeout as error:
        advice = "see the worker's log; is it busy with long jobs, or stuck?"
        return Finding("memory backend", "failed", str(error), advice)
    except UndecodableJob as error:
        advice = "give this command the RECALLQ_SIGNING_KEYS of the workers"
        return Finding("memory backend", "failed", str(error), advice)
    except RecallQError as error:
        return Finding("memory backend", "failed", str(error), "see the worker's log")
    detail = f"{health.backend}: {health.detail}"
    if not health.ok:
        return Finding("memory backend", "failed", detail, "see the backend's own log")
    return Finding("memory backend", "ok", detail)
