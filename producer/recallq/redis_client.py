"""The single point of control for Redis connections.

Every pool is made here, with limits set on purpose. redis-py's own pool fails beyond 100
connections instead of waiting. Its socket timeout is left off: with one set, every command passes
through ``asyncio.wait_for``, which on Python 3.11 swallows a cancellation that comes as the data is
written (python/cpython#86296), and a call that nobody can cancel never ends. `asking` bounds the
time instead, and TCP keepalive finds connections whose other end is gone.

Driver errors become `ServiceUnavailable` here and nowhere else in the client, and no URL is ever
shown with its credentials.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from hiredis import pack_command
from redis import exceptions
from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    ConnectionPool,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.connection import URL_QUERY_ARGUMENT_PARSERS as _URL_PARSERS
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry as SyncRetry

from recallq.errors import AccessDenied, ServiceUnavailable

COMMAND_TIMEOUT = 10.0
"""Seconds after which an unanswered command counts as a lost connection."""

NO_INTRODUCTION: dict[str, Any] = {
    "driver_info": None,
    "maint_notifications_config": MaintNotificationsConfig(enabled=False),
}
"""For every connection. Left to itself, redis-py begins it with two CLIENT commands: its own name,
for which it reads its package's metadata from disk, in the middle of the event loop, and a question
that only one vendor's servers know. A user would need rights for them that cannot be given by the
same words to every version of Redis."""

_URL_OPTIONS = ("db", "username", "password")
_KNOWN_OPTIONS = ", ".join((*_URL_OPTIONS, "ssl_*"))
_SCHEMES = ("redis://", "rediss://", "unix://")

# A silent peer is asked after 15 s, and given up after three more unanswered questions.
_KEEPALIVE = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}

LOST = (exceptions.RedisError, OSError, EOFError)
"""What commands raise when Redis does not answer as it should."""

RedisClient: TypeAlias = Redis
"""An asyncio client whose replies are bytes, whatever its annotations allow besides."""


class _Packing:
    """Commands packed by hiredis, as redis-py's blocking connections do: its asyncio ones do it in
    Python, which takes five times as long and is much of what a batch costs. Arguments are text,
    bytes and numbers."""

    def pack_command(self, *args: Any) -> list[bytes]:
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        try:
            return [pack_command((*name.split(), *args[1:]))]
        except TypeError as error:
            raise exceptions.DataError(str(error)) from error


class _Connection(_Packing, Connection):
    pass


class _SSLConnection(_Packing, SSLConnection):
    pass


class _UnixConnection(_Packing, UnixDomainSocketConnection):
    pass


_PACKING: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _Connection,
    SSLConnection: _SSLConnection,
    UnixDomainSocketConnection: _UnixConnection,
}


def connect(
    url: str,
    *,
    max_connections: int = 16,
    connect_timeout: float = 5.0,
    retries: int = 3,
    subscribes: bool = False,
) -> RedisClient:
    """An asyncio client for `url` (``redis://``, ``rediss://`` or ``unix://``); replies are bytes.

    Connections are made on first use, inside the running event loop. Callers beyond
    `max_connections` wait for a free one. A command that fails with the connection is repeated up
    to `retries` times, so only commands that may be repeated belong here; `retries=0` for the
    others. Commands have no time limit of their own: see `asking`.

    `subscribes`: for pub/sub, which takes the older protocol: with RESP3, redis-py writes every
    message out for a debug log, whether or not there is one.
    """
    options: dict[str, Any] = {}
    if not url.startswith("unix://"):
        options = {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=COMMAND_TIMEOUT,
        socket_connect_timeout=connect_timeout,
        socket_timeout=None,
        health_check_interval=30,
        **NO_INTRODUCTION,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), retries),
        retry_on_error=[exceptions.BusyLoadingError],
        protocol=2 if subscribes else 3,
        **options,
    )
    pool.connection_class = _PACKING[pool.connection_class]
    return Redis.from_pool(pool)


def connect_threads(
    url: str,
    *,
    max_connections: int = 16,
    connect_timeout: float = 5.0,
    command_timeout: float = COMMAND_TIMEOUT,
) -> redis.Redis:
    """The same for code that runs in threads; replies are bytes.

    A socket timeout bounds every command here. One that ran into it is not sent again, so that a
    call ends in a known time; one whose connection broke is, so only commands that may be repeated
    belong here. Threads beyond `max_connections` wait for a free one.
    """
    options: dict[str, Any] = {}
    if not url.startswith("unix://"):
        options = {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=command_timeout,
        socket_connect_timeout=connect_timeout,
        socket_timeout=command_timeout,
        health_check_interval=30,
        **NO_INTRODUCTION,
        retry=SyncRetry(
            ExponentialWithJitterBackoff(base=0.05, cap=1.0),
            3,
            supported_errors=(exceptions.ConnectionError,),
        ),
        **options,
    )
    return redis.Redis.from_pool(pool)


def check_url(url: str) -> str:
    """`url`, if a connection can be made from it. Raises ValueError, without showing any of it."""
    if not url.startswith(_SCHEMES):
        raise ValueError(f"must start with one of {', '.join(_SCHEMES)}")
    if "#" in url:
        raise ValueError("has a '#', which ends a URL; write %23 for one in a password")
    for option in dict(parse_qsl(urlsplit(url).query)):
        if option not in _URL_OPTIONS and not option.startswith("ssl_"):
            raise ValueError(f"has options that workers do not know; known are {_KNOWN_OPTIONS}")
    try:
        # Makes the object, and connects to nothing.
        ConnectionPool.from_url(url, **NO_INTRODUCTION).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError):
        # Its own words may quote a password that was taken for a port.
        raise ValueError("is not a Redis URL; percent-encode special characters") from None
    return url


def tls_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a connection's options that say how TLS is spoken, as redis-py reads them in a URL:
    Celery and kombu leave most of them text."""
    found = {name: value for name, value in options.items() if name.startswith("ssl_")}
    for name, value in found.items():
        if isinstance(value, str) and name in _URL_PARSERS:
            found[name] = _URL_PARSERS[name](value)
    return found


def redact(url: str) -> str:
    """`url` without its credentials, for errors and logs."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = urlencode([(k, v) for k, v in parse_qsl(parts.query) if k not in _SECRET_QUERY])
    return urlunsplit((parts.scheme, host, parts.path, query, ""))


_SECRET_QUERY = frozenset({"password", "username", "ssl_password"})


@asynccontextmanager
async def asking(url: str, doing: str, timeout: float = COMMAND_TIMEOUT) -> AsyncIterator[None]:
    """Bounds commands in time, and turns redis-py's errors into `ServiceUnavailable`.

    The error says what was being done, and where.
    """
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError as error:
        raise ServiceUnavailable(
            f"{doing}: Redis at {redact(url)} did not answer within {timeout:g} s"
            + _advice(url, error)
        ) from error
    except exceptions.AuthenticationError as error:
        raise AccessDenied(
            f"{doing}: Redis at {redact(url)} refused the credentials; check the user and password"
        ) from error
    except LOST as error:
        why = refusal_of(error)
        if why is not None:
            raise ServiceUnavailable(
                f"{doing}: Redis at {redact(url)} takes no writes: {why}; nothing was enqueued"
            ) from error
        kind = AccessDenied if is_denied(error) else ServiceUnavailable
        said = reason_of(error).rstrip(".") + _advice(url, error)
        raise kind(f"{doing}: Redis at {redact(url)}: {said}") from error


# What TLS says of its own accord names neither the setting nor the file.
_TLS_ADVICE = (
    ("certificate has expired", "renew the server's certificate"),
    ("not yet valid", "set this machine's clock, or that of whoever issued the certificate"),
    ("certificate is not valid for", "connect by a name or address that its certificate has"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "name the file of the authority that signed it: ?ssl_ca_certs=<file>, or SSL_CERT_FILE",
    ),
    (
        "CERTIFICATE_REQUIRED",
        "it wants a certificate of the client: ?ssl_certfile=<file>&ssl_keyfile=<file>",
    ),
    ("WRONG_VERSION_NUMBER", "if it does not speak TLS, the URL begins with redis://"),
    (
        "No such file|Permission denied|NO_CERTIFICATE_OR_CRL|PEM|KEY_VALUES_MISMATCH|BAD_DECRYPT",
        "check the files that its ssl_ options name",
    ),
)
_CUT_OFF = re.compile("reset by peer|closed by server|Broken pipe|EOF occurred|Connection lost")


def _advice(url: str, error: Exception) -> str:
    """What to do about a connection that fails for how it is secured, as the end of a sentence."""
    said = str(error)
    secure = url.startswith("rediss://")
    if secure:
        for pattern, advice in _TLS_ADVICE:
            if re.search(pattern, said):
                return f"; {advice}"
    if secure and isinstance(error, (TimeoutError, exceptions.TimeoutError)):
        return "; if it does not speak TLS, the URL begins with redis://"
    if secure and _CUT_OFF.search(said):
        return "; if it wants a certificate of the client: ?ssl_certfile=<file>&ssl_keyfile=<file>"
    if url.startswith("redis://") and _CUT_OFF.search(said):
        return "; if it speaks TLS only, the URL begins with rediss://"
    return ""


# Redis says NOPERM where a command was sent, and this where a script ran it.
_DENIED = re.compile("^NOPERM|user executing the script can't|has no permissions|No permissions")


def is_denied(error: BaseException) -> bool:
    """Whether Redis refuses a user, or what the user asks for."""
    kinds = (exceptions.AuthenticationError, exceptions.AuthorizationError)
    denied = (*kinds, exceptions.NoPermissionError)
    return isinstance(error, denied) or (
        isinstance(error, RedisError) and bool(_DENIED.search(str(error)))
    )


# The codes that redis-py takes off where it knows them, and that stand behind a script's own words.
_REFUSALS: tuple[tuple[type[RedisError] | None, str, str], ...] = (
    (exceptions.OutOfMemoryError, "OOM", "it is out of memory (maxmemory)"),
    (exceptions.ReadOnlyError, "READONLY", "it is a replica (READONLY)"),
    (None, "MISCONF", "it cannot save to its disk (MISCONF)"),
    (None, "NOREPLICAS", "it has too few replicas (NOREPLICAS)"),
)


def refusal_of(error: BaseException) -> str | None:
    """Why Redis takes no writes, if that is what an error says."""
    said = str(error)
    for kind, code, why in _REFUSALS:
        if kind is not None and isinstance(error, kind):
            return why
        if isinstance(error, RedisError) and re.search(rf"(^|-){code} ", said):
            return why
    return None


def trouble_of(error: BaseException) -> str:
    """What to log of an error that is waited out."""
    why = refusal_of(error)
    return type(error).__name__ if why is None else f"{why}; no writes are taken"


_PERMANENT = (
    exceptions.AuthenticationError,  # to redis-py these two are connection errors
    exceptions.AuthorizationError,
    exceptions.MovedError,  # to redis-py an AskError
)
_TRANSIENT = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.TryAgainError,
    exceptions.AskError,
    exceptions.ClusterError,
    exceptions.NoScriptError,
    exceptions.WatchError,
    OSError,
    EOFError,
)
# Replies that redis-py has no class for; Redis 6.2 puts the code behind others' words when it
# comes from inside a script.
_TRANSIENT_REPLY = re.compile(
    r"^BUSY |^max number of clients |^Error running script .*-MASTERDOWN ", re.DOTALL
)


def is_transient(error: Exception) -> bool:
    """Whether a later try may succeed."""
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, _TRANSIENT) or refusal_of(error) is not None:
        return True
    return bool(_TRANSIENT_REPLY.search(str(error)))


def reason_of(error: BaseException) -> str:
    """What an error says, without the arguments that some servers repeat: a HELLO's hold the
    password."""
    said = re.split(r",? with args beginning with", str(error))[0] or type(error).__name__
    if is_denied(error) and not isinstance(error, exceptions.AuthenticationError):
        said += "; compare the user's rules with deploy/redis/users.acl (ACL LOG names what it is)"
    return said
