"""Clients and workers on a Redis that speaks TLS only: a real server, real certificates."""

# mypy: allow-untyped-calls

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.backends.base import Backend
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError

from recallq import AccessDenied, MemoryClient, ServiceUnavailable
from recallq.redis_client import asking, connect, redact
from recallq_worker import broker
from recallq_worker.app import celery_url
from tests.secure_redis import Certificates, SecureRedis, tls_server
from tests.support import Shell, Worker, clean_environment

PASSWORD = "pä$$/w@rd-#1"

Start = Callable[..., SecureRedis]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers that the module's tests share."""
    binary, environment = tls_server()
    started: list[SecureRedis] = []

    def start(**options: object) -> SecureRedis:
        directory = tmp_path_factory.mktemp("redis")
        server = SecureRedis(directory, binary=binary, environment=environment, **options)  # type: ignore[arg-type]
        started.append(server)
        return server

    yield start
    for each in started:
        each.stop()


@pytest.fixture(scope="module")
def server(start: Start, certificates: Certificates) -> SecureRedis:
    """With a certificate for its address, and a password."""
    return start(certificate=certificates.issue("server", "127.0.0.1"), password=PASSWORD)


@pytest.fixture(scope="module")
def elsewhere(start: Start, certificates: Certificates) -> SecureRedis:
    """With the certificate of another machine."""
    return start(certificate=certificates.issue("elsewhere", "elsewhere.example"))


@pytest.fixture(scope="module")
def mutual(start: Start, certificates: Certificates) -> SecureRedis:
    """Asks clients for a certificate."""
    certificate = certificates.issue("mutual", "127.0.0.1")
    return start(certificate=certificate, ca=certificates.ca)


async def add_and_search(url: str) -> None:
    async with MemoryClient(url, timeout=30) as client:
        assert (await client.add_memory("ann", "I drink tea")).added == 1
        assert [each.text for each in await client.search_memory("ann", "tea")] == ["I drink tea"]


async def refusal(url: str) -> ServiceUnavailable:
    """What a client that cannot start raises, within seconds, without the password anywhere."""
    began = time.monotonic()
    client = MemoryClient(url)
    with pytest.raises(ServiceUnavailable) as caught:
        await client.start()
    assert time.monotonic() - began < 8
    told = "".join(traceback.format_exception(caught.value))
    for shown in (told, repr(caught.value), repr(client.settings), repr(client)):
        assert PASSWORD not in shown and "p%C3%A4" not in shown and "secret" not in shown
    return caught.value


class TestItWorks:
    def test_with_a_password_and_the_authority_in_the_url(
        self, server: SecureRedis, certificates: Certificates, tmp_path: Path
    ) -> None:
        url = server.url("", PASSWORD, ssl_ca_certs=certificates.ca)
        with Worker(url) as worker:
            asyncio.run(add_and_search(url))
            shell = Shell(tmp_path, RECALLQ_REDIS_URL=url)
            assert "1 running" in shell("doctor").stdout
            assert "I drink tea" in shell("search", "ann", "tea").stdout
            assert "Traceback" not in worker.output

    def test_with_a_client_certificate_and_the_authority_of_the_system(
        self, mutual: SecureRedis, certificates: Certificates, tmp_path: Path
    ) -> None:
        certificate, key = certificates.issue("client", "client.example")
        url = mutual.url(ssl_certfile=certificate, ssl_keyfile=key)
        trusted = {"SSL_CERT_FILE": str(certificates.ca)}
        with Worker(url, environment=trusted) as worker:
            shell = Shell(tmp_path, RECALLQ_REDIS_URL=url, **trusted)
            shell("add", "ann", "I drink tea")
            assert "I drink tea" in shell("list", "ann").stdout
            assert "1 running" in shell("doctor").stdout
            assert "Traceback" not in worker.output


class TestItIsRefused:
    async def test_an_authority_that_nobody_named(self, server: SecureRedis) -> None:
        error = await refusal(server.url("", PASSWORD))
        assert "CERTIFICATE_VERIFY_FAILED" in str(error) and "ssl_ca_certs" in str(error)

    async def test_another_authority(self, server: SecureRedis, certificates: Certificates) -> None:
        error = await refusal(server.url("", PASSWORD, ssl_ca_certs=certificates.other_ca))
        assert "ssl_ca_certs" in str(error) and "SSL_CERT_FILE" in str(error)

    async def test_another_machines_certificate(
        self, elsewhere: SecureRedis, certificates: Certificates
    ) -> None:
        error = await refusal(elsewhere.url(ssl_ca_certs=certificates.ca))
        assert "a name or address that its certificate has" in str(error)

    async def test_an_expired_certificate(self, start: Start, certificates: Certificates) -> None:
        server = start(certificate=certificates.issue("old", "127.0.0.1", expired=True))
        error = await refusal(server.url(ssl_ca_certs=certificates.ca))
        assert "renew the server's certificate" in str(error)

    async def test_a_file_that_is_not_there(self, server: SecureRedis) -> None:
        error = await refusal(server.url("", PASSWORD, ssl_ca_certs="/nowhere/ca.pem"))
        assert "/nowhere/ca.pem" in str(error) or "%2Fnowhere" in str(error)
        assert "check the files" in str(error)

    async def test_no_tls_to_a_server_that_speaks_it(self, server: SecureRedis) -> None:
        error = await refusal(server.url("", PASSWORD, scheme="redis"))
        assert "rediss://" in str(error)

    async def test_tls_to_a_server_that_does_not_speak_it(self, redis_url: str) -> None:
        url = redis_url.replace("redis://", "rediss://")
        redis = connect(url, retries=0)
        with pytest.raises(ServiceUnavailable, match="does not speak TLS"):
            async with asking(url, "cannot look", timeout=1):
                await redis.ping()
        await redis.aclose(close_connection_pool=True)

    async def test_no_password(self, server: SecureRedis, certificates: Certificates) -> None:
        error = await refusal(server.url(ssl_ca_certs=certificates.ca))
        assert isinstance(error, AccessDenied) and "check the user and password" in str(error)

    async def test_a_wrong_password(self, server: SecureRedis, certificates: Certificates) -> None:
        error = await refusal(server.url("", "secret?", ssl_ca_certs=certificates.ca))
        assert isinstance(error, AccessDenied) and "check the user and password" in str(error)

    async def test_a_client_without_the_certificate_that_is_asked_for(
        self, mutual: SecureRedis, certificates: Certificates
    ) -> None:
        error = await refusal(mutual.url(ssl_ca_certs=certificates.ca))
        assert "ssl_certfile" in str(error)

    def test_a_worker_and_doctor_say_the_same(
        self, server: SecureRedis, certificates: Certificates, tmp_path: Path
    ) -> None:
        url = server.url("", PASSWORD, ssl_ca_certs=certificates.other_ca)
        began = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-m", "recallq_worker", "worker"],
            env=clean_environment(RECALLQ_REDIS_URL=url),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert time.monotonic() - began < 20
        assert run.returncode == 1 and "ssl_ca_certs" in run.stderr, run.stderr
        told = run.stdout + run.stderr
        doctor = Shell(tmp_path, RECALLQ_REDIS_URL=url)("doctor", code=1)
        assert "ssl_ca_certs" in doctor.stdout
        assert PASSWORD not in told + doctor.stdout and "p%C3%A4" not in told + doctor.stdout
        assert "Traceback" not in told


class TestEveryConnectionChecks:
    """Celery's broker and result connections are not redis-py's asyncio ones: they see the same."""

    def broker(self, url: str) -> None:
        broker.install()
        with Connection(celery_url(url)) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)

    def results(self, url: str) -> None:
        app = Celery(set_as_current=False)
        app.conf.update(result_backend="recallq_worker.results:ResultBackend+" + celery_url(url))
        backend: Backend = app.backend
        try:
            backend.client.ping()
        finally:
            backend.client.close()
            app.close()

    @pytest.mark.parametrize("part", ["broker", "results"])
    def test_the_certificate_and_the_name(
        self, part: str, server: SecureRedis, elsewhere: SecureRedis, certificates: Certificates
    ) -> None:
        reach = getattr(self, part)
        reach(server.url("", PASSWORD, ssl_ca_certs=certificates.ca))
        refused = (OperationalError, RedisConnectionError)
        with pytest.raises(refused, match="CERTIFICATE_VERIFY_FAILED"):
            reach(server.url("", PASSWORD, ssl_ca_certs=certificates.other_ca))
        with pytest.raises(refused, match="not valid for"):
            reach(elsewhere.url(ssl_ca_certs=certificates.ca))
        # Said in so many words, the name goes unchecked.
        for no in ("false", "no", "0"):
            reach(elsewhere.url(ssl_ca_certs=certificates.ca, ssl_check_hostname=no))


def test_the_word_that_opens_a_key_is_shown_nowhere() -> None:
    url = "rediss://ann:pass@h:1/0?ssl_password=opens&password=pass&ssl_ca_certs=/ca.pem"
    assert redact(url) == "rediss://h:1/0?ssl_ca_certs=%2Fca.pem"
    broker.install()
    assert "opens" not in Connection(celery_url(url)).as_uri()
