"""Every error of the Redis library becomes one of the project's own, on purpose.

The tables name every class there is, so an error that a newer redis-py brings fails these tests
until somebody decides whether trying again helps.
"""

from __future__ import annotations

import asyncio
import builtins
import importlib
import pkgutil
import socket
import ssl
import warnings
from typing import Any, Final, NoReturn

import pytest
import redis
from redis import exceptions
from redis.asyncio.connection import DefaultParser

from recallq.errors import (
    AccessDenied,
    BackendError,
    BackendUnavailable,
    JobFailed,
    ServiceUnavailable,
)
from recallq.redis_client import asking
from recallq_worker.backends.redis import RedisStore

URL = "redis://bob:hunter%402@localhost:6379/0"
PASSWORDS = ("hunter%402", "hunter@2")

LATER: Final = BackendUnavailable
"""A later try may succeed."""
NEVER: Final = BackendError
"""The same call would fail again, until somebody changes something."""

LIBRARY: dict[str, type[JobFailed]] = {
    "redis.exceptions.RedisError": NEVER,
    # The connection, or the server behind it, is in no state to answer.
    "redis.exceptions.ConnectionError": LATER,
    "redis.exceptions.TimeoutError": LATER,
    "redis.exceptions.BusyLoadingError": LATER,
    "redis.exceptions.MaxConnectionsError": LATER,
    "redis.exceptions.ReadOnlyError": LATER,  # a failover is under way
    "redis.exceptions.OutOfMemoryError": LATER,
    "redis.sentinel.MasterNotFoundError": LATER,
    "redis.sentinel.SlaveNotFoundError": LATER,
    "redis.asyncio.sentinel.MasterNotFoundError": LATER,
    "redis.asyncio.sentinel.SlaveNotFoundError": LATER,
    "redis.exceptions.ClusterError": LATER,  # redirected too often: the cluster is being rebuilt
    "redis.exceptions.ClusterDownError": LATER,
    "redis.exceptions.MasterDownError": LATER,
    "redis.exceptions.TryAgainError": LATER,
    "redis.exceptions.AskError": LATER,  # the slot is on its way to another node
    # Scripts are loaded again with each try; it is missing because a server restarted meanwhile.
    "redis.exceptions.NoScriptError": LATER,
    "redis.exceptions.WatchError": LATER,
    # Refused: who asks, or what.
    "redis.exceptions.AuthenticationError": NEVER,
    "redis.exceptions.AuthenticationWrongNumberOfArgsError": NEVER,
    "redis.exceptions.AuthorizationError": NEVER,
    "redis.exceptions.NoPermissionError": NEVER,
    "redis.exceptions.ExternalAuthProviderError": LATER,  # the LDAP service behind Redis is down
    "redis.exceptions.ResponseError": NEVER,
    "redis.exceptions.DataError": NEVER,
    "redis.exceptions.InvalidResponse": NEVER,  # what answers there is no Redis
    "redis.exceptions.ExecAbortError": NEVER,
    "redis.exceptions.ModuleError": NEVER,
    "redis.exceptions.NoSuchFieldsetError": NEVER,
    "redis.exceptions.PubSubError": NEVER,
    "redis.exceptions.LockError": NEVER,
    "redis.exceptions.LockNotOwnedError": NEVER,
    "redis.exceptions.ClusterCrossSlotError": NEVER,
    "redis.exceptions.MovedError": NEVER,  # a plain client does not follow: it needs another URL
}

NOT_RAISED_HERE = {
    # By redis-py's cluster client and its policies, and by its pools of blocking connections.
    "redis.exceptions.RedisClusterException",
    "redis.exceptions.SlotNotCoveredError",
    "redis.exceptions.CrossSlotTransactionError",
    "redis.exceptions.InvalidPipelineStack",
    "redis.exceptions.IncorrectPolicyType",
    "redis.exceptions.ChildDeadlockedError",
}

SYSTEM: dict[str, type[JobFailed]] = {
    # A host that is away, a socket file that is not there yet, a certificate being replaced:
    # redis-py passes most of them on as its ConnectionError, so all are treated as that is.
    "builtins.OSError": LATER,
    "builtins.BlockingIOError": LATER,
    "builtins.BrokenPipeError": LATER,
    "builtins.ChildProcessError": LATER,
    "builtins.ConnectionAbortedError": LATER,
    "builtins.ConnectionError": LATER,
    "builtins.ConnectionRefusedError": LATER,
    "builtins.ConnectionResetError": LATER,
    "builtins.FileExistsError": LATER,
    "builtins.FileNotFoundError": LATER,
    "builtins.InterruptedError": LATER,
    "builtins.IsADirectoryError": LATER,
    "builtins.NotADirectoryError": LATER,
    "builtins.PermissionError": LATER,
    "builtins.ProcessLookupError": LATER,
    "builtins.TimeoutError": LATER,  # asyncio's and socket's, too
    "socket.gaierror": LATER,
    "socket.herror": LATER,
    "ssl.SSLCertVerificationError": LATER,
    "ssl.SSLEOFError": LATER,
    "ssl.SSLError": LATER,
    "ssl.SSLSyscallError": LATER,
    "ssl.SSLWantReadError": LATER,
    "ssl.SSLWantWriteError": LATER,
    "ssl.SSLZeroReturnError": LATER,
    "asyncio.exceptions.IncompleteReadError": LATER,
}

_IN_SCRIPT = "ERR Error running script (call to f_698563126d): @user_script:16: @user_script: 16: "
"""How Redis 6.2 begins what went wrong inside a script; later versions put the code first."""

REPLIES: dict[str, type[JobFailed]] = {
    "LOADING Redis is loading the dataset in memory": LATER,
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": LATER,
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": LATER,
    "READONLY You can't write against a read only replica.": LATER,
    "OOM command not allowed when used memory > 'maxmemory'.": LATER,
    "NOREPLICAS Not enough good replicas to write.": LATER,
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to "
    "disk. Commands that may modify the data set are disabled.": LATER,
    "MISCONF Errors writing to the AOF file: No space left on device": LATER,
    "CLUSTERDOWN The cluster is down": LATER,
    "CLUSTERDOWN Hash slot not served": LATER,
    "TRYAGAIN Multiple keys request during rehashing of slot": LATER,
    "ASK 3999 127.0.0.1:6381": LATER,
    "NOSCRIPT No matching script. Please use EVAL.": LATER,
    "ERR max number of clients reached": LATER,
    "ERR max number of clients + cluster connections reached": LATER,
    "ERR problem with LDAP service": LATER,
    f"{_IN_SCRIPT}-OOM command not allowed when used memory > 'maxmemory'.": LATER,
    f"{_IN_SCRIPT}-READONLY You can't write against a read only replica.": LATER,
    f"{_IN_SCRIPT}-NOREPLICAS Not enough good replicas to write.": LATER,
    f"{_IN_SCRIPT}-MISCONF Errors writing to the AOF file: No space left on device": LATER,
    "OOM command not allowed when used memory > 'maxmemory'. script: 698563126d, on "
    "@user_script:16.": LATER,
    f"{_IN_SCRIPT}The user executing the script can't run this command or subcommand": NEVER,
    f"{_IN_SCRIPT}WRONGTYPE Operation against a key holding the wrong kind of value": NEVER,
    "WRONGTYPE Operation against a key holding the wrong kind of value script: 698563126d, on "
    "@user_script:16.": NEVER,
    "WRONGPASS invalid username-password pair or user is disabled.": NEVER,
    "NOAUTH Authentication required.": NEVER,
    "NOPERM this user has no permissions to run the 'evalsha' command": NEVER,
    "NOPROTO unsupported protocol version": NEVER,
    "ERR invalid password": NEVER,
    "ERR Client sent AUTH, but no password is set": NEVER,
    "ERR wrong number of arguments for 'auth' command": NEVER,
    "ERR DB index is out of range": NEVER,
    "ERR unknown command 'EVALSHA'": NEVER,
    "DENIED Redis is running in protected mode because protected mode is enabled": NEVER,
    "CROSSSLOT Keys in request don't hash to the same slot": NEVER,
    "MOVED 3999 127.0.0.1:6381": NEVER,
    "EXECABORT Transaction discarded because of previous errors.": NEVER,
}

# --- what there is --------------------------------------------------------------------------------


def _name(cls: type[BaseException]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclasses(cls: type[BaseException]) -> set[type[BaseException]]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _errors_in(module: object) -> set[type[BaseException]]:
    return {
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, BaseException)
    }


def _library_errors() -> dict[str, type[BaseException]]:
    """The exceptions of redis-py, wherever in it they are defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(redis.__path__, "redis.", onerror=lambda _: None):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # a part that needs a library of its own
    found = _subclasses(exceptions.RedisError) | _errors_in(exceptions)
    return {_name(cls): cls for cls in found if cls.__module__.startswith("redis.")}


def _system_errors() -> dict[str, type[BaseException]]:
    found = _errors_in(builtins) | _errors_in(socket) | _errors_in(ssl)
    found = {cls for cls in found if issubclass(cls, OSError)}
    return {_name(cls): cls for cls in (*found, asyncio.IncompleteReadError)}


def _made(cls: type[BaseException]) -> BaseException:
    if cls is asyncio.IncompleteReadError:
        return cls(b"$5\r\nhal", 11)
    return cls("3999 127.0.0.1:6381")  # as redirections need it; the others take any text


DENIED = frozenset({
    "redis.exceptions.AuthenticationError",
    "redis.exceptions.AuthorizationError",
    "redis.exceptions.NoPermissionError",
    f"{_IN_SCRIPT}The user executing the script can't run this command or subcommand",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "NOAUTH Authentication required.",
    "NOPERM this user has no permissions to run the 'evalsha' command",
    "ERR invalid password",
    "ERR Client sent AUTH, but no password is set",
})  # fmt: skip
"""What clients are told as `AccessDenied`."""


# --- what becomes of it ---------------------------------------------------------------------------


async def _failing(error: BaseException) -> NoReturn:
    raise error


async def _in_the_store(error: BaseException) -> BaseException:
    """What the redis backend makes of `error`."""
    store = RedisStore(URL, namespace="t")
    with pytest.raises(BaseException) as raised:  # noqa: PT011  # which is what is asked
        await store._asking(_failing(error))
    return raised.value


async def _in_the_client(error: BaseException) -> BaseException:
    """What the client makes of `error`."""
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        async with asking(URL, "storing"):
            raise error
    return raised.value


async def _mistakes(errors: dict[str, BaseException], table: dict[str, Any]) -> list[str]:
    """What is not mapped as the table says, both sides; all of it at once."""
    mistakes = []
    for name, error in errors.items():
        for got, right in (
            (await _in_the_store(error), table[name]),
            (await _in_the_client(error), AccessDenied if name in DENIED else ServiceUnavailable),
        ):
            if type(got) is not right:
                mistakes.append(f"{name}: {right.__name__} is right, not {type(got).__name__}")
            elif any(password in str(got) for password in PASSWORDS):
                mistakes.append(f"{name}: shows the password")
    return mistakes


async def test_every_error_of_the_library_is_mapped() -> None:
    found = _library_errors()
    undecided = sorted(found.keys() - LIBRARY.keys() - NOT_RAISED_HERE)
    assert undecided == [], "does trying again help? say so in LIBRARY"
    errors = {name: _made(cls) for name, cls in found.items() if name in LIBRARY}
    assert await _mistakes(errors, LIBRARY) == []


async def test_every_error_of_the_system_is_mapped() -> None:
    found = _system_errors()
    undecided = sorted(found.keys() - SYSTEM.keys())
    assert undecided == [], "does trying again help? say so in SYSTEM"
    errors = {name: _made(cls) for name, cls in found.items()}
    assert await _mistakes(errors, SYSTEM) == []


async def test_every_reply_of_the_server_is_mapped() -> None:
    """redis-py knows some of the codes; the others come as a plain ResponseError."""
    errors = {
        reply: DefaultParser.parse_error(reply)  # type: ignore[no-untyped-call]
        for reply in REPLIES
    }
    assert await _mistakes(errors, REPLIES) == []


async def test_a_server_that_quotes_the_credentials_is_not_quoted() -> None:
    """What does not know HELLO - Redis 5, some proxies - repeats its arguments."""
    reply = "unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `bob`, `hunter@2`, "
    for cls in (exceptions.ResponseError, exceptions.ConnectionError):
        for error in (await _in_the_store(cls(reply)), await _in_the_client(cls(reply))):
            assert "hunter" not in str(error)


async def test_a_cancellation_stays_one() -> None:
    error = asyncio.CancelledError()
    assert await _in_the_store(error) is error
    assert await _in_the_client(error) is error
