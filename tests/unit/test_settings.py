"""Settings: where they come from, what beats what, and errors that never show a value."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from blockbuster import blockbuster_ctx

from recallq import MemoryClient, MemoryServiceFactory
from recallq.errors import ConfigurationError, RecallQError, ServiceUnavailable
from recallq.keys import Keys
from recallq.messages import Message
from recallq.redis_client import connect
from recallq.reference import ReferenceSettings
from recallq.settings import ClientSettings
from recallq.workers import WorkerInfo, WorkerRegistry
from recallq_worker.settings import WorkerSettings, misspelt

SECRET = "hunter2"
NOBODY = "redis://127.0.0.1:1/0"
"""Where nothing listens."""


def everything_said(error: BaseException) -> str:
    """All that a log or a console would show of `error`."""
    return "".join(traceback.format_exception(error)) + repr(error)


# --- where settings come from -------------------------------------------------------------------


def test_without_anything_there_are_defaults() -> None:
    settings = ClientSettings.load()
    assert settings.redis_url == "redis://localhost:6379/0"
    assert (settings.namespace, settings.tenant, settings.backend) == ("recallq", "default", None)
    assert settings.model_fields_set == set()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("redis_url", "rediss://h:1/2", "rediss://h:1/2"),
        ("namespace", "blue", "blue"),
        ("tenant", "ACME Inc.", "ACME Inc."),
        ("backend", "redis", "redis"),
        ("timeout", "2.5", 2.5),
        ("max_in_flight", "7", 7),
        ("max_message_bytes", "2048", 2048),
        ("batch_linger", "0", 0.0),
    ],
)
def test_a_variable_sets_a_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    """``RECALLQ_`` and the name, with the type that the setting has."""
    monkeypatch.setenv(f"RECALLQ_{name.upper()}", text)
    found = getattr(ClientSettings.load(), name)
    assert found == value
    assert type(found) is type(value)


def test_an_argument_beats_a_variable_beats_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ClientSettings.load().timeout == 30
    monkeypatch.setenv("RECALLQ_TIMEOUT", "20")
    assert ClientSettings.load().timeout == 20
    assert ClientSettings.load(timeout=10).timeout == 10


def test_an_argument_of_none_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLQ_TIMEOUT", "20")
    assert ClientSettings.load(timeout=None).timeout == 20
    assert ClientSettings.load(redis_url=None).redis_url == "redis://localhost:6379/0"


def test_variables_of_others_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client shares its environment with workers, which have settings of their own."""
    monkeypatch.setenv("RECALLQ_CONCURRENCY", "many")
    monkeypatch.setenv("RECALLQ_FUTURE_SETTING", "x")
    monkeypatch.setenv("TIMEOUT", "1")
    assert ClientSettings.load() == ClientSettings()


@pytest.mark.parametrize("name", ["redis_url", "backend"])
def test_an_empty_variable_is_refused_or_as_good_as_none(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Compose files and Helm charts set variables to nothing; no worker runs backend ''."""
    default = getattr(ClientSettings.load(), name)
    monkeypatch.setenv(f"RECALLQ_{name.upper()}", "")
    try:
        settings = ClientSettings.load()
    except ConfigurationError:
        return
    assert getattr(settings, name) == default


def test_an_empty_url_is_refused() -> None:
    """A missing value must not end as an error from deep inside a library."""
    with pytest.raises(ConfigurationError, match="redis_url"):
        ClientSettings.load(redis_url="")


def test_urls_that_are_not_split_are_one() -> None:
    one = ClientSettings.load(redis_url="redis://one")
    assert one.broker_url == one.coordination_url == one.result_url == "redis://one"
    split = ClientSettings.load(redis_url="redis://one", result_url="redis://two")
    assert (split.broker_url, split.result_url) == ("redis://one", "redis://two")


# --- changing -----------------------------------------------------------------------------------


def test_a_changed_copy_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given, by argument or variable, stays given; the original is left alone."""
    monkeypatch.setenv("RECALLQ_TENANT", "acme")
    settings = ClientSettings.load(timeout=5, result_url="redis://two")
    monkeypatch.delenv("RECALLQ_TENANT")
    changed = settings.changed(timeout=7, namespace=None)
    assert (changed.timeout, changed.tenant, changed.namespace) == (7, "acme", "recallq")
    assert changed.result_url == "redis://two"
    assert settings.timeout == 5


def test_a_changed_url_takes_those_along_that_were_not_split() -> None:
    settings = ClientSettings.load(redis_url="redis://one", result_url="redis://two")
    changed = settings.changed(redis_url="redis://three")
    assert changed.broker_url == changed.coordination_url == "redis://three"
    assert changed.result_url == "redis://two"


def test_a_change_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        ClientSettings.load().changed(timeout=-1)
    with pytest.raises(ConfigurationError, match="colour"):
        ClientSettings.load().changed(colour="blue")


def test_a_client_takes_settings_and_arguments() -> None:
    """Arguments beat the settings object."""
    settings = ClientSettings.load(tenant="acme", timeout=5)
    client = MemoryClient("redis://one", settings=settings, timeout=7)
    assert client.settings.redis_url == "redis://one"
    assert (client.settings.tenant, client.settings.timeout) == ("acme", 7)
    assert MemoryClient(settings=settings).settings is settings


# --- what is refused ----------------------------------------------------------------------------

BAD: list[tuple[str, Any]] = [
    ("redis_url", f"http://user:{SECRET}@host"),
    ("redis_url", f"user:{SECRET}@host:6379"),
    ("redis_url", f" redis://:{SECRET}@host"),
    ("redis_url", f"redis://:{SECRET}/x@host:6379/0"),
    ("redis_url", f"redis://:#{SECRET}@host:6379/0"),
    ("redis_url", f"redis://host:{SECRET}/0"),
    ("redis_url", f"redis://host/0?db={SECRET}"),
    ("redis_url", f"redis://host/0?{SECRET}=1"),
    ("redis_url", f"redis://[{SECRET}"),
    ("redis_url", 6379),
    ("broker_url", f"amqp://user:{SECRET}@host"),
    ("coordination_url", f"memcached://:{SECRET}@host"),
    ("result_url", f"db+sqlite:///{SECRET}"),
    ("namespace", ""),
    ("namespace", "a:b"),
    ("namespace", "a.b"),
    ("namespace", "a\n"),
    ("namespace", "{a}"),
    ("namespace", "x" * 65),
    ("tenant", 5),
    ("backend", 5),
    ("timeout", 0),
    ("timeout", -1),
    ("timeout", math.nan),
    ("timeout", SECRET),
    ("connect_timeout", 0),
    ("default_top_k", 0),
    ("default_page_size", 0),
    ("max_in_flight", 0),
    ("max_in_flight", 1.5),
    ("max_in_flight", SECRET),
    ("high_water_mark", 0),
    ("max_message_bytes", 0),
    ("max_job_bytes", "many"),
    ("max_id_bytes", 0),
    ("max_page_size", 0),
    ("batch_max_jobs", 0),
    ("batch_max_jobs", 10_001),
    ("batch_max_bytes", 0),
    ("batch_window", 0),
    ("batch_linger", -0.001),
    ("batch_linger", math.nan),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: ascii(value)[:40])
def test_a_bad_setting_is_refused_by_name_and_never_shown(name: str, value: Any) -> None:
    """The error names setting and variable; the value may be a credential."""
    with pytest.raises(ConfigurationError) as caught:
        ClientSettings.load(**{name: value})
    said = str(caught.value)
    assert name in said
    assert f"RECALLQ_{name.upper()}" in said
    assert SECRET not in everything_said(caught.value)
    assert "pydantic" not in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("redis_url", f"http://:{SECRET}@h"), ("timeout", SECRET), ("max_in_flight", SECRET)],
)
def test_a_bad_variable_is_refused_by_name_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"RECALLQ_{name.upper()}", value)
    with pytest.raises(ConfigurationError, match=f"RECALLQ_{name.upper()}") as caught:
        ClientSettings.load()
    assert SECRET not in everything_said(caught.value)


async def test_making_a_client_does_not_block_the_loop(redis_url: str) -> None:
    """Agents make clients inside coroutines; checking a URL reads no files."""
    with blockbuster_ctx():
        assert MemoryClient(redis_url).settings.redis_url == redis_url


@pytest.mark.parametrize(
    "url",
    [
        "redis://[::1]:6379/0",
        "rediss://user:p%40ss%23word@host:1/2?ssl_cert_reqs=required&ssl_ca_certs=/etc/ca.pem",
        "redis://host?db=3&username=u&password=p",
        "unix:///run/redis.sock?db=3",
    ],
)
def test_urls_may_have_options(url: str) -> None:
    """Those that clients and workers know; special characters are percent-encoded."""
    assert ClientSettings.load(redis_url=url).redis_url == url


@pytest.mark.parametrize("option", ["socket_timeout=5", "protocol=3", "health_check_interval=10"])
def test_an_option_that_celery_would_stumble_over_is_refused(option: str) -> None:
    """A client could use it, and the worker would die of it."""
    with pytest.raises(ConfigurationError, match="ssl_"):
        ClientSettings.load(redis_url=f"redis://host/0?{option}")


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
def test_a_url_of_redis_is_taken(scheme: str) -> None:
    url = f"{scheme}:///run/redis.sock" if scheme == "unix" else f"{scheme}://u:p@h:1/2"
    assert ClientSettings.load(redis_url=url).redis_url == url


def test_an_unknown_setting_is_told_the_known_ones() -> None:
    """A misspelt limit must not silently be the default."""
    with pytest.raises(ConfigurationError) as caught:
        ClientSettings.load(max_inflight=5)
    assert "'max_inflight'" in str(caught.value)
    assert "max_in_flight" in str(caught.value)
    with pytest.raises(ConfigurationError, match="'max_inflight'"):
        MemoryClient(max_inflight=5)


@pytest.mark.parametrize("default", ["default_top_k", "default_page_size"])
def test_a_default_beyond_its_limit_is_refused(default: str) -> None:
    """Else every call that gives no number is refused for a number it never gave."""
    with pytest.raises(ConfigurationError, match=default):
        ClientSettings.load(**{default: 11}, max_page_size=10)


def test_the_references_settings_do_not_show_credentials() -> None:
    settings = ReferenceSettings.load(redis_redis_url=f"redis://user:{SECRET}@host")
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


@pytest.mark.parametrize("load", [ClientSettings.load, WorkerSettings.load])
@pytest.mark.parametrize("show", [repr, str], ids=["repr", "str"])
def test_settings_do_not_show_credentials(
    load: Callable[..., ClientSettings], show: Callable[[object], str]
) -> None:
    """Not even where one URL stands in for another."""
    url = f"redis://user:{SECRET}@host"
    shown = show(load(redis_url=url, broker_url=url, result_url=url))
    assert SECRET not in shown
    assert "namespace" in shown


async def test_a_refused_connection_does_not_show_credentials() -> None:
    """The error says where nobody listens, without who wanted to go there."""
    client = MemoryClient(f"redis://user:{SECRET}@127.0.0.1:1/0?password={SECRET}")
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1") as caught:
        await client.start()
    assert SECRET not in everything_said(caught.value)


# --- the reference's variables ------------------------------------------------------------------


@pytest.fixture
def memory_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BACKEND": "Redis",
        "REDIS_REDIS_URL": "redis://reference:6379/3",
        "REDIS_TTL_SECONDS": "3600",
        "REDIS_MAX_MESSAGES_PER_SESSION": "50",
        "REDIS_SOCKET_TIMEOUT": "2.5",
        "REDIS_SOCKET_CONNECT_TIMEOUT": "1.5",
        "REDIS_MAX_CONNECTIONS": "20",
        "REDIS_RETRY_ON_TIMEOUT": "true",
        "REDIS_HEALTH_CHECK_INTERVAL": "30",
        "REDIS_SOCKET_KEEPALIVE": "no",
    }.items():
        monkeypatch.setenv(f"MEMORY_{name}", value)


@pytest.mark.usefixtures("memory_variables")
def test_the_references_variables_have_types() -> None:
    """The reference passed them on as strings."""
    settings = ReferenceSettings.load()
    assert settings.backend == "redis"
    assert settings.redis_redis_url == "redis://reference:6379/3"
    assert (settings.redis_ttl_seconds, settings.redis_max_messages_per_session) == (3600, 50)
    assert (settings.redis_socket_timeout, settings.redis_socket_connect_timeout) == (2.5, 1.5)
    assert settings.redis_max_connections == 20
    assert settings.redis_health_check_interval == 30
    assert settings.redis_retry_on_timeout is True
    assert settings.redis_socket_keepalive is False


def test_without_the_references_variables_nothing_is_set() -> None:
    assert set(ReferenceSettings.load().model_dump().values()) == {None}


@pytest.mark.parametrize(
    "name",
    ["TTL_SECONDS", "MAX_MESSAGES_PER_SESSION", "SOCKET_TIMEOUT", "MAX_CONNECTIONS",
     "RETRY_ON_TIMEOUT"],
)  # fmt: skip
@pytest.mark.parametrize("value", [SECRET, "-1"])
def test_a_bad_variable_of_the_reference_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    variable = f"MEMORY_REDIS_{name}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable) as caught:
        ReferenceSettings.load()
    assert SECRET not in everything_said(caught.value)


@pytest.mark.usefixtures("memory_variables")
def test_a_worker_honours_the_references_variables() -> None:
    settings = WorkerSettings.load()
    assert settings.backend == "redis"
    assert settings.redis_url == settings.broker_url == settings.store_url
    assert settings.redis_url == "redis://reference:6379/3"
    assert (settings.store_ttl, settings.max_messages_per_session) == (3600, 50)
    assert settings.connect_timeout == 1.5


@pytest.mark.usefixtures("memory_variables")
def test_a_workers_own_variables_beat_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLQ_REDIS_URL", "redis://own")
    monkeypatch.setenv("RECALLQ_BACKEND", "in_memory")
    monkeypatch.setenv("RECALLQ_STORE_TTL", "60")
    settings = WorkerSettings.load(max_messages_per_session=5)
    assert (settings.redis_url, settings.backend) == ("redis://own", "in_memory")
    assert (settings.store_ttl, settings.max_messages_per_session) == (60, 5)
    assert settings.connect_timeout == 1.5


def test_a_worker_names_the_variable_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was set, not the one that it stands in for."""
    monkeypatch.setenv("MEMORY_REDIS_REDIS_URL", f"http://:{SECRET}@host")
    with pytest.raises(ConfigurationError, match="MEMORY_REDIS_REDIS_URL") as caught:
        WorkerSettings.load()
    assert SECRET not in everything_said(caught.value)


def test_a_worker_knows_the_clients_settings_and_its_own() -> None:
    assert WorkerSettings.load().backend == "redis"
    assert WorkerSettings.load(store_url="redis://two").store_url == "redis://two"
    with pytest.raises(ConfigurationError, match="store_url"):
        WorkerSettings.load(store_url=f"http://:{SECRET}@host")
    with pytest.raises(ConfigurationError, match="'parallel'"):
        WorkerSettings.load(parallel=5)


# --- the factory --------------------------------------------------------------------------------


async def create(*args: Any, **kwargs: Any) -> ClientSettings:
    """The settings of a client that the factory made, after stopping it."""
    client = await MemoryServiceFactory.create(*args, **kwargs)
    settings = client.settings
    await client.stop()
    return settings


async def test_the_factory_returns_a_started_client(redis_url: str, namespace: str) -> None:
    client = await MemoryServiceFactory.create("redis", redis_url=redis_url, namespace=namespace)
    try:
        assert isinstance(client, MemoryClient)
        assert await client.workers() == []
        assert client.settings.backend == "redis"
    finally:
        await client.stop()


async def test_the_factory_takes_the_references_arguments(redis_url: str) -> None:
    """Those that have no meaning any more included: old programs go on running."""
    settings = await create(
        "Redis",
        redis_url=redis_url,
        socket_timeout=2.0,
        socket_connect_timeout=1.5,
        max_connections=20,
        retry_on_timeout=True,
        health_check_interval=30.0,
        socket_keepalive=True,
        message_type=Message,
    )
    assert settings.backend == "redis"
    assert settings.connect_timeout == 1.5


@pytest.mark.parametrize(("wanted", "found"), [("in_memory", False), ("redis", True), (None, True)])
async def test_the_factory_looks_whether_workers_have_the_backend(
    redis_url: str, namespace: str, wanted: str | None, found: bool
) -> None:
    """Better than to let every job fail: it says what runs and what to do."""
    worker = WorkerInfo(
        id="w", host="h", pid=1, version="0", backend="redis", lanes=[], concurrency=1, started_at=0
    )  # fmt: skip
    redis = connect(redis_url)
    await WorkerRegistry(redis, Keys(namespace)).sign(worker)
    await redis.aclose(close_connection_pool=True)
    if found:
        assert (await create(wanted, redis_url=redis_url, namespace=namespace)).backend == wanted
    else:
        with pytest.raises(ConfigurationError, match="the workers run redis, not in_memory"):
            await create(wanted, redis_url=redis_url, namespace=namespace)


@pytest.mark.parametrize("name", ["ttl_seconds", "max_messages_per_session"])
async def test_the_factory_says_where_a_workers_argument_belongs(name: str) -> None:
    """Ignoring it would change what the program does."""
    with pytest.raises(ConfigurationError, match="RECALLQ_") as caught:
        await create("redis", **{name: 5})
    assert name in str(caught.value)
    assert f"MEMORY_REDIS_{name.upper()}" in str(caught.value)


async def test_the_factory_takes_a_workers_argument_of_none(redis_url: str) -> None:
    """The reference's way to ask for no limit is what there is anyway."""
    await create("redis", redis_url=redis_url, ttl_seconds=None, max_messages_per_session=None)


async def test_the_factory_refuses_what_it_does_not_know(redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="'colour'"):
        await create("redis", redis_url=redis_url, colour="blue")


@pytest.mark.parametrize(
    ("name", "value"), [("socket_timeout", SECRET), ("max_connections", 0), ("redis_url", 5)]
)
async def test_the_factory_refuses_bad_arguments(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"(?i){name}") as caught:
        await create("redis", **{name: value})
    assert SECRET not in everything_said(caught.value)


async def test_the_factory_reads_the_references_variables(
    monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setenv("MEMORY_BACKEND", "REDIS")
    monkeypatch.setenv("MEMORY_REDIS_REDIS_URL", redis_url)
    monkeypatch.setenv("MEMORY_REDIS_SOCKET_CONNECT_TIMEOUT", "1.5")
    settings = await create()
    assert (settings.backend, settings.redis_url) == ("redis", redis_url)
    assert settings.connect_timeout == 1.5


async def test_an_argument_of_the_factory_beats_every_variable(
    monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setenv("MEMORY_BACKEND", "mem0")
    monkeypatch.setenv("RECALLQ_BACKEND", "mem0")
    monkeypatch.setenv("MEMORY_REDIS_REDIS_URL", NOBODY)
    monkeypatch.setenv("RECALLQ_REDIS_URL", NOBODY)
    settings = await create("redis", redis_url=redis_url)
    assert (settings.backend, settings.redis_url) == ("redis", redis_url)


@pytest.mark.parametrize("backend", ["in_memory", "mem0", "redis", None])
async def test_a_url_given_to_the_factory_is_used_whatever_the_backend(
    redis_url: str, backend: str | None
) -> None:
    """Every backend is reached through Redis."""
    settings = await create(backend, redis_url=redis_url, connect_timeout=1.0)
    assert settings.redis_url == redis_url


async def test_recallqs_own_variables_beat_the_references_in_the_factory_too(
    monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """As they do in workers: otherwise client and workers meet different Redis servers."""
    monkeypatch.setenv("RECALLQ_REDIS_URL", redis_url)
    monkeypatch.setenv("RECALLQ_BACKEND", "in_memory")
    monkeypatch.setenv("RECALLQ_CONNECT_TIMEOUT", "4")
    monkeypatch.setenv("MEMORY_REDIS_REDIS_URL", NOBODY)
    monkeypatch.setenv("MEMORY_REDIS_SOCKET_CONNECT_TIMEOUT", "1")
    settings = await create()
    assert settings.redis_url == redis_url
    assert settings.connect_timeout == 4
    monkeypatch.setenv("MEMORY_BACKEND", "redis")
    assert (await create()).backend == "in_memory"


async def test_an_argument_of_none_leaves_the_variable_standing(
    monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """Programs pass on optional arguments of their own."""
    monkeypatch.setenv("MEMORY_REDIS_REDIS_URL", redis_url)
    settings = await create("redis", redis_url=None, connect_timeout=1.0)
    assert settings.redis_url == redis_url


async def test_a_factory_that_cannot_connect_says_so() -> None:
    with pytest.raises(RecallQError) as caught:
        await create("redis", redis_url=f"redis://user:{SECRET}@127.0.0.1:1/0")
    assert isinstance(caught.value, ServiceUnavailable)
    assert SECRET not in everything_said(caught.value)


@pytest.mark.parametrize("name", ["timeout", "connect_timeout"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e12"])
def test_times_without_an_end_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"RECALLQ_{name.upper()}", value)
    with pytest.raises(ConfigurationError, match=f"RECALLQ_{name.upper()}"):
        ClientSettings.load()


def test_names_that_are_nearly_settings() -> None:
    names = [
        "RECALLQ_SIGNING_KEY", "RECALLQ_HTPP_PORT", "RECALLQ_HTTP_PORT", "RECALLQ_EMBEDDING_TPM",
        "RECALLQ_MEM0_MODE", "RECALLQ_DATA_DIR", "RECALLQ_OWN_THING", "SIGNING_KEY",
    ]  # fmt: skip
    assert misspelt(names) == {
        "RECALLQ_SIGNING_KEY": "RECALLQ_SIGNING_KEYS",
        "RECALLQ_HTPP_PORT": "RECALLQ_HTTP_PORT",
    }
