"""Providers of embeddings: the real SDKs against the loopback servers, and functions."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from recallq.errors import BackendError, BackendUnavailable, ConfigurationError, MissingExtra
from recallq_worker.embedding import Embedder, Kind, Refused, Throttled, make_batcher, make_embedder
from recallq_worker.embedding.failures import failure
from recallq_worker.models import ModelSettings
from recallq_worker.retries import retry_after
from tests.conftest import no_blocking
from tests.loopback import dashscope_api as native
from tests.loopback.dashscope_api import DashScopeServer
from tests.loopback.openai_api import OpenAIServer
from tests.loopback.text import embedding

SECRET = "the secret of the user"
DASHSCOPE_KEY = "sk-loopback-dashscope"


@pytest.fixture(scope="module")
def _dashscope() -> Iterator[DashScopeServer]:
    with DashScopeServer(api_key=DASHSCOPE_KEY) as server:
        yield server


@pytest.fixture
def dashscope(_dashscope: DashScopeServer) -> DashScopeServer:
    """The same server for all tests, as new."""
    _dashscope.clear_faults()
    _dashscope.reset_counts()
    _dashscope.spoil.clear()
    _dashscope.inappropriate = lambda text: False
    return _dashscope


@pytest.fixture
def openai() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=256) as server:
        yield server


def dashscope_settings(server: DashScopeServer, **more: Any) -> ModelSettings:
    settings = {
        "embedding_provider": "dashscope",
        "embedding_base_url": server.base_url,
        "embedding_api_key": DASHSCOPE_KEY,
    }
    return ModelSettings.load(**{**settings, **more})


def openai_settings(server: OpenAIServer, **more: Any) -> ModelSettings:
    settings = {
        "embedding_provider": "openai",
        "embedding_base_url": server.base_url,
        "embedding_api_key": server.api_key,
        "embedding_dimensions": 256,
    }
    return ModelSettings.load(**{**settings, **more})


@asynccontextmanager
async def running(settings: ModelSettings) -> AsyncIterator[Embedder]:
    """The embedder, in whose start, use and stop nothing blocks."""
    with no_blocking():
        embedder = make_embedder(settings)
        await embedder.start()
        try:
            yield embedder
        finally:
            await embedder.stop()


def assert_right(vectors: Sequence[npt.NDArray[np.float32]], texts: Sequence[str]) -> None:
    assert len(vectors) == len(texts)
    for vector, text in zip(vectors, texts, strict=True):
        assert vector.dtype == np.float32
        assert not vector.flags.writeable
        np.testing.assert_allclose(vector, embedding(text, vector.size), atol=1e-6)


# --- DashScope ------------------------------------------------------------------------------------


async def test_dashscope_embeds_documents_and_queries(dashscope: DashScopeServer) -> None:
    async with running(dashscope_settings(dashscope)) as embedder:
        assert (embedder.model, embedder.dimensions) == ("text-embedding-v4", 1024)
        assert embedder.most_texts == 10
        texts = ["green tea", "a red bicycle", "绿茶"]
        done = await embedder.embed(texts, Kind.DOCUMENT)
        assert_right(done.vectors, texts)
        assert done.tokens == 9
        assert_right((await embedder.embed(["tea?"], Kind.QUERY)).vectors, ["tea?"])
    assert dashscope.text_types == ["document"] * 3 + ["query"]
    body = dashscope.requests[0].body
    assert body["parameters"] == {"text_type": "document"}
    sdk: Any = import_module("dashscope")
    assert sdk.api_key is None
    assert dashscope.base_url not in str(sdk.base_http_api_url)


async def test_dashscope_is_asked_for_dimensions_where_they_are_set(
    dashscope: DashScopeServer,
) -> None:
    settings = dashscope_settings(dashscope, embedding_dimensions=64)
    async with running(settings) as embedder:
        (vector,) = (await embedder.embed(["one"], Kind.DOCUMENT)).vectors
        assert vector.size == embedder.dimensions == 64
    assert dashscope.requests[0].body["parameters"]["dimension"] == 64
    settings = dashscope_settings(dashscope, embedding_dimensions=100)
    async with running(settings) as embedder:
        with pytest.raises(Refused, match=r"HTTP 400 \(InvalidParameter\), request "):
            await embedder.embed(["one"], Kind.DOCUMENT)


async def test_dashscopes_first_models(dashscope: DashScopeServer) -> None:
    settings = dashscope_settings(dashscope, embedding_model="text-embedding-v2")
    async with running(settings) as embedder:
        assert (embedder.most_texts, embedder.dimensions) == (25, 1536)
        texts = [f"text {number}" for number in range(25)]
        assert_right((await embedder.embed(texts, Kind.DOCUMENT)).vectors, texts)
    with pytest.raises(ConfigurationError, match="1536 dimensions and no others"):
        make_embedder(
            dashscope_settings(
                dashscope, embedding_model="text-embedding-v1", embedding_dimensions=1024
            )
        )


@pytest.mark.parametrize(
    ("spoiler", "error", "words"),
    [
        (native.one_missing, BackendUnavailable, "not those of the texts"),
        (native.one_twice, BackendUnavailable, "not those of the texts"),
        (native.without_indices, BackendUnavailable, "not those of the texts"),
        (native.of_other_dimensions, BackendError, "64 dimensions where 1024 are expected"),
        (native.not_a_number, Refused, "finite"),
        (native.words_for_numbers, BackendUnavailable, "cannot be read"),
        (native.a_page, BackendUnavailable, "cannot be read"),
        (lambda answer: [answer], BackendUnavailable, "cannot be read"),
        (lambda answer: {"output": None}, BackendUnavailable, "not those of the texts"),
        (lambda answer: {"output": {"embeddings": {}}}, BackendUnavailable, "not those"),
        (native.a_failure_in_a_success("InternalError.Algo"), BackendUnavailable, "HTTP 200"),
        (native.a_failure_in_a_success("DataInspectionFailed"), Refused, "DataInspectionFailed"),
        (native.a_failure_in_a_success("Throttling.RateQuota"), Throttled, "Throttling"),
        (native.a_failure_in_a_success("InvalidApiKey"), BackendError, "check the key"),
    ],
)
async def test_dashscopes_answer_is_not_what_it_should_be(
    dashscope: DashScopeServer, spoiler: Any, error: type[Exception], words: str
) -> None:
    async with running(dashscope_settings(dashscope)) as embedder:
        dashscope.spoil.append(spoiler)
        with pytest.raises(error, match=words) as caught:
            await embedder.embed([SECRET, "two", "three"], Kind.DOCUMENT)
        assert type(caught.value) is error
        dashscope.spoil.append(native.out_of_order)
        assert_right((await embedder.embed(["a", "b"], Kind.QUERY)).vectors, ["a", "b"])


@pytest.mark.parametrize(
    ("status", "code", "error", "retry"),
    [
        (400, "InvalidParameter", Refused, None),
        (400, "DataInspectionFailed", Refused, None),
        (400, "Arrearage", BackendError, None),
        (401, "InvalidApiKey", BackendError, None),
        (403, "AccessDenied", BackendError, None),
        (403, "AllocationQuota.FreeTierOnly", BackendError, None),
        (404, "ModelNotFound", BackendError, None),
        (400, "Model.NotExist", BackendError, None),
        (408, "RequestTimeOut", BackendUnavailable, None),
        (429, "Throttling.RateQuota", Throttled, None),
        (429, "Throttling.RateQuota", Throttled, 7.0),
        (429, "Throttling.AllocationQuota", Throttled, None),
        (429, "insufficient_quota", Throttled, None),
        (429, "CommodityNotPurchased", BackendError, None),
        (429, "PrepaidBillOverdue", BackendError, None),
        (500, "InternalError", BackendUnavailable, None),
        (503, "ServiceUnavailable", BackendUnavailable, 3.0),
    ],
)
async def test_what_dashscope_refuses(
    dashscope: DashScopeServer,
    status: int,
    code: str,
    error: type[Exception],
    retry: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"code": code, "message": f"not {SECRET}", "request_id": "3f2-ab"}
    headers = {} if retry is None else {"Retry-After": str(int(retry))}
    dashscope.fail("embeddings", status, body=body, headers=headers)
    async with running(dashscope_settings(dashscope)) as embedder:
        with pytest.raises(error, match=f"HTTP {status}") as caught:
            await embedder.embed([SECRET], Kind.DOCUMENT)
        told = caught.value
        assert type(told) is error
        assert str(told).startswith(
            f"embedding with text-embedding-v4: HTTP {status} ({code}), request 3f2-ab"
        )
        assert getattr(told, "retry_after", None) == retry
        for shown in (repr(told), repr(embedder), caplog.text):
            assert SECRET not in shown
            assert DASHSCOPE_KEY not in shown
        assert told.__cause__ is None
        assert told.__context__ is None
    assert dashscope.embedding_calls == 1, "trying again is not the SDK's work"


async def test_a_text_that_is_too_long_is_not_cut_off(dashscope: DashScopeServer) -> None:
    async with running(dashscope_settings(dashscope)) as embedder:
        with pytest.raises(Refused, match="InvalidParameter"):
            await embedder.embed(["word " * 10_000], Kind.DOCUMENT)


async def test_dashscope_cannot_be_reached(dashscope: DashScopeServer) -> None:
    async with running(dashscope_settings(dashscope, embedding_timeout=0.2)) as embedder:
        dashscope.cut("embeddings", 1)
        with pytest.raises(BackendUnavailable, match="the connection failed"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
        dashscope.hang("embeddings", 5, times=1)
        with pytest.raises(BackendUnavailable, match="no answer in time"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
        dashscope.fail("embeddings", 502, times=1, body="<html>Bad gateway</html>")
        with pytest.raises(BackendUnavailable, match="HTTP 502"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
        dashscope.fail("embeddings", 403, times=1, body="<html>Forbidden by a firewall</html>")
        with pytest.raises(Refused, match="HTTP 403"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
    nowhere = dashscope_settings(dashscope, embedding_base_url="http://127.0.0.1:9/api/v1")
    async with running(nowhere) as embedder:
        with pytest.raises(BackendUnavailable, match="the connection failed"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
    with pytest.raises(BackendUnavailable, match="not started"):
        await embedder.embed([SECRET], Kind.DOCUMENT)


# --- OpenAI ---------------------------------------------------------------------------------------


async def test_openai_embeds(openai: OpenAIServer) -> None:
    async with running(openai_settings(openai, embedding_dimensions=None)) as embedder:
        with pytest.raises(BackendError, match="256 dimensions where 1536 are expected"):
            await embedder.embed(["one"], Kind.DOCUMENT)
    assert "dimensions" not in openai.requests[0].body
    async with running(openai_settings(openai, embedding_dimensions=128)) as embedder:
        assert (embedder.model, embedder.most_texts) == ("text-embedding-3-small", 100)
        texts = [f"text number {number}" for number in range(100)]
        done = await embedder.embed(texts, Kind.DOCUMENT)
        assert_right(done.vectors, texts)
        assert done.tokens == sum(-(-len(text) // 4) for text in texts)
    assert openai.requests[-1].body["dimensions"] == 128
    assert openai.requests[-1].body["encoding_format"] == "base64"


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("dimensions", 'Model "bge-m3" does not support matryoshka representation'),
        ("dimensions", "This model does not support specifying dimensions."),
        ("encoding_format", "Only the encoding_format 'float' is supported"),
    ],
)
async def test_what_a_server_does_not_know_is_left_away(
    openai: OpenAIServer, parameter: str, words: str
) -> None:
    body = {"error": {"message": words, "type": "invalid_request_error", "param": None}}
    openai.fail("embeddings", 400, times=1, body=body)
    async with running(openai_settings(openai)) as embedder:
        for text in ("one", "two"):
            assert_right((await embedder.embed([text], Kind.DOCUMENT)).vectors, [text])
    sent = [request.body.get(parameter) for request in openai.requests]
    assert sent in ([256, None, None], ["base64", "float", "float"])


@pytest.mark.parametrize(
    ("status", "code", "error", "retry"),
    [
        (400, None, Refused, None),
        (413, None, Refused, None),
        (401, "invalid_api_key", BackendError, None),
        (403, "unsupported_country_region_territory", BackendError, None),
        (404, "model_not_found", BackendError, None),
        (409, None, BackendUnavailable, None),
        (429, "rate_limit_exceeded", Throttled, 0.25),
        (429, "insufficient_quota", BackendError, None),
        (429, "billing_hard_limit_reached", BackendError, None),
        (500, None, BackendUnavailable, None),
        (529, None, BackendUnavailable, None),
    ],
)
async def test_what_openai_refuses(
    openai: OpenAIServer,
    status: int,
    code: str | None,
    error: type[Exception],
    retry: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = {"error": {"message": f"not {SECRET}", "type": "x", "code": code, "param": None}}
    headers = {} if retry is None else {"retry-after-ms": str(int(retry * 1000))}
    openai.fail("embeddings", status, body=body, headers=headers)
    async with running(openai_settings(openai)) as embedder:
        with pytest.raises(error, match=f"HTTP {status}") as caught:
            await embedder.embed([SECRET], Kind.DOCUMENT)
        told = caught.value
        assert type(told) is error
        assert getattr(told, "retry_after", None) == retry
        for shown in (repr(told), repr(embedder), caplog.text):
            assert SECRET not in shown
            assert openai.api_key not in shown
        assert told.__cause__ is None
        assert told.__context__ is None
    assert openai.embedding_calls == 1, "trying again is not the SDK's work"


async def test_openai_cannot_be_reached_or_understood(openai: OpenAIServer) -> None:
    async with running(openai_settings(openai, embedding_timeout=0.2)) as embedder:
        openai.cut("embeddings", 1)
        with pytest.raises(BackendUnavailable, match="the connection failed"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
        openai.hang("embeddings", 5, times=1)
        with pytest.raises(BackendUnavailable, match="no answer in time"):
            await embedder.embed([SECRET], Kind.DOCUMENT)
        answers: list[object] = [
            "<html>Welcome</html>",
            {"data": []},
            {"data": None},
            [],
            {"data": [{"index": 0, "embedding": [0.0] * 256}]},
            {"data": [{"index": 0, "embedding": "not base64"}] * 2},
            {"data": [{"index": 0, "embedding": [0.0] * 256}] * 2},
            {"data": [{"index": n, "embedding": {"a": 1}} for n in range(2)]},
            {"data": [{"embedding": [0.0] * 256}] * 2},
        ]
        for answer in answers:
            openai.fail("embeddings", 200, times=1, body=answer)
            with pytest.raises(BackendUnavailable, match=r"cannot be read|not those|than vectors"):
                await embedder.embed([SECRET, "two"], Kind.DOCUMENT)


async def test_other_servers_do_not_hear_of_openais_environment(
    openai: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: 1\nauthorization: Bearer other")
    async with running(openai_settings(openai)) as embedder:
        await embedder.embed(["one"], Kind.DOCUMENT)
    headers = openai.requests[-1].headers
    assert headers["authorization"] == f"Bearer {openai.api_key}"
    assert not {"openai-organization", "openai-project", "x-secret"} & headers.keys()
    # What OPENAI_BASE_URL names does.
    monkeypatch.setenv("OPENAI_BASE_URL", openai.base_url)
    async with running(openai_settings(openai, embedding_base_url=None)) as embedder:
        await embedder.embed(["one"], Kind.DOCUMENT)
    headers = openai.requests[-1].headers
    assert headers["openai-organization"] == "org-1"
    assert headers["x-secret"] == "1"
    assert headers["authorization"] == f"Bearer {openai.api_key}"


# --- functions ------------------------------------------------------------------------------------

_calls: list[tuple[list[str], Any, str]] = []


def embed_texts(texts: list[str]) -> list[list[float]]:
    _calls.append((texts, None, threading.current_thread().name))
    return [embedding(text, 16) for text in texts]


async def embed_async(texts: list[str], *, kind: str) -> npt.NDArray[np.float64]:
    _calls.append((texts, kind, threading.current_thread().name))
    return np.array([embedding(text, 16) for text in texts])


def embed_badly(texts: list[str]) -> list[list[float]]:
    match texts[0]:
        case "too few":
            return []
        case "none":
            return None  # type: ignore[return-value]
        case "refused":
            raise BackendError("not this")
        case other:
            raise ValueError(other)


class Embedding:
    def __call__(self, texts: list[str]) -> list[list[float]]:
        return embed_texts(texts)


embedding_object = Embedding()
not_callable = 1


def callable_settings(name: str, **more: Any) -> ModelSettings:
    return ModelSettings.load(
        embedding_callable=f"{__name__}:{name}", **{"embedding_dimensions": 16, **more}
    )


@pytest.mark.parametrize("name", ["embed_texts", "embed_async", "embedding_object"])
async def test_a_function_embeds(name: str) -> None:
    _calls.clear()
    async with running(callable_settings(name)) as embedder:
        texts = ["one", "two words"]
        assert_right((await embedder.embed(texts, Kind.QUERY)).vectors, texts)
        assert embedder.most_at_once == (None if name == "embed_async" else 1)
    ((given, kind, thread),) = _calls
    assert given == texts
    assert kind == ("query" if name == "embed_async" else None)
    assert thread.startswith("MainThread" if name == "embed_async" else "embedding")


async def test_a_function_fails() -> None:
    async with running(callable_settings("embed_badly")) as embedder:
        for text, error, words in (
            ("too few", BackendUnavailable, "0 vectors came for 1 texts"),
            ("none", BackendUnavailable, "TypeError"),
            ("refused", BackendError, "not this"),
            (SECRET, BackendUnavailable, "ValueError"),
        ):
            with pytest.raises(error, match=words) as caught:
                await embedder.embed([text], Kind.DOCUMENT)
            assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_here:f", "importing no_such_module_here failed: ModuleNotFoundError"),
        ("json:nothing.there", "json has no nothing.there"),
        ("json:__name__", "json:__name__ cannot be called"),
        ("json", "must read package.module:function"),
        ("a b:c", "must read package.module:function"),
    ],
)
async def test_a_function_that_is_none(name: str, words: str) -> None:
    settings = ModelSettings.load(embedding_callable=name, embedding_dimensions=16)
    with pytest.raises(ConfigurationError, match=words):
        async with running(settings):
            pass


# --- choosing -------------------------------------------------------------------------------------


def chosen(**environment: str) -> tuple[str, str, str]:
    """Class, model and base URL that come of the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        embedder = make_embedder(ModelSettings.load())
    url = getattr(embedder, "_base_url", "")
    return type(embedder).__name__.removesuffix("Embedder"), embedder.model, url


NATIVE = "https://dashscope.aliyuncs.com/api/v1"
COMPATIBLE = "https://dashscope.aliyuncs.com/compatible-mode/v1"
OPENAI = "https://api.openai.com/v1"
SMALL, V4 = "text-embedding-3-small", "text-embedding-v4"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OPENAI_API_KEY": "k"}, ("OpenAI", SMALL, OPENAI)),
        ({"DASHSCOPE_API_KEY": "k"}, ("DashScope", V4, NATIVE)),
        ({"OPENAI_API_KEY": "k", "DASHSCOPE_API_KEY": "k"}, ("OpenAI", SMALL, OPENAI)),
        (
            {"OPENAI_API_KEY": "k", "DASHSCOPE_API_KEY": "k", "RECALLQ_EMBEDDING_MODEL": V4},
            ("DashScope", V4, NATIVE),
        ),
        (
            {
                "OPENAI_API_KEY": "k",
                "DASHSCOPE_API_KEY": "k",
                "RECALLQ_EMBEDDING_PROVIDER": "dashscope",
            },
            ("DashScope", V4, NATIVE),
        ),
        (
            {"DASHSCOPE_API_KEY": "k", "RECALLQ_EMBEDDING_BASE_URL": COMPATIBLE},
            ("DashScope", V4, NATIVE),
        ),
        (
            {"DASHSCOPE_API_KEY": "k", "DASHSCOPE_HTTP_BASE_URL": "http://gateway:8000/api/v1/"},
            ("DashScope", V4, "http://gateway:8000/api/v1"),
        ),
        (
            {"DASHSCOPE_API_KEY": "k", "RECALLQ_EMBEDDING_BASE_URL": f"{NATIVE}{native.PATH}"},
            ("DashScope", V4, NATIVE),
        ),
        (
            {
                "DASHSCOPE_API_KEY": "k",
                "RECALLQ_EMBEDDING_BASE_URL": "https://dashscope-intl.aliyuncs.com",
            },
            ("DashScope", V4, "https://dashscope-intl.aliyuncs.com/api/v1"),
        ),
        (
            {
                "RECALLQ_EMBEDDING_API_KEY": "k",
                "RECALLQ_EMBEDDING_BASE_URL": "https://ws.eu-central-1.maas.aliyuncs.com/api/v1",
            },
            ("DashScope", V4, "https://ws.eu-central-1.maas.aliyuncs.com/api/v1"),
        ),
        (
            {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": COMPATIBLE},
            ("DashScope", V4, NATIVE),
        ),
        (
            {
                "DASHSCOPE_API_KEY": "k",
                "RECALLQ_EMBEDDING_BASE_URL": NATIVE,
                "RECALLQ_EMBEDDING_PROVIDER": "openai",
            },
            ("OpenAI", V4, COMPATIBLE),
        ),
        (
            {
                "RECALLQ_EMBEDDING_API_KEY": "k",
                "RECALLQ_EMBEDDING_BASE_URL": "http://vllm:8000/v1",
                "RECALLQ_EMBEDDING_MODEL": "text-embedding-v4",
            },
            ("OpenAI", V4, "http://vllm:8000/v1"),
        ),
        (
            {
                "OPENAI_API_KEY": "k",
                "RECALLQ_EMBEDDING_CALLABLE": "json:dumps",
                "RECALLQ_EMBEDDING_DIMENSIONS": "3",
            },
            ("Callable", "json:dumps", ""),
        ),
    ],
)
def test_which_provider_is_meant(
    environment: dict[str, str], expected: tuple[str, str, str]
) -> None:
    assert chosen(**environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "OPENAI_API_KEY, DASHSCOPE_API_KEY or RECALLQ_EMBEDDING_API_KEY"),
        ({"RECALLQ_EMBEDDING_PROVIDER": "dashscope"}, "set DASHSCOPE_API_KEY or"),
        ({"RECALLQ_EMBEDDING_MODEL": V4, "OPENAI_API_KEY": "k"}, "set DASHSCOPE_API_KEY or"),
        ({"RECALLQ_EMBEDDING_PROVIDER": "callable"}, "RECALLQ_EMBEDDING_CALLABLE must name"),
        ({"RECALLQ_EMBEDDING_CALLABLE": "a:b"}, "RECALLQ_EMBEDDING_DIMENSIONS must say"),
        ({"RECALLQ_EMBEDDING_PROVIDER": "cohere"}, "RECALLQ_EMBEDDING_PROVIDER: Input should be"),
        ({"OPENAI_API_KEY": "sk secret"}, "key for embeddings is none"),
        ({"DASHSCOPE_API_KEY": "密钥"}, "key for embeddings is none"),
        (
            {"OPENAI_API_KEY": "k", "RECALLQ_EMBEDDING_BASE_URL": "localhost:8000"},
            "must begin with http:// or https://",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        chosen(**environment)
    assert "secret" not in str(caught.value)
    assert "密钥" not in str(caught.value)


async def test_a_key_from_a_file_may_end_in_a_new_line(dashscope: DashScopeServer) -> None:
    settings = dashscope_settings(dashscope, embedding_api_key=f"{DASHSCOPE_KEY}\n")
    async with running(settings) as embedder:
        assert_right((await embedder.embed(["one"], Kind.DOCUMENT)).vectors, ["one"])


@pytest.mark.parametrize("name", ["dashscope", "openai"])
async def test_a_library_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    settings = ModelSettings.load(embedding_provider=name, embedding_api_key="k")
    with pytest.raises(MissingExtra, match=rf"pip install 'recallq\[{name}\]'"):
        async with running(settings):
            pass


async def test_dashscopes_own_settings_are_wrong(
    dashscope: DashScopeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASHSCOPE_REGION", "atlantis")
    with pytest.raises(ConfigurationError, match="atlantis"):
        async with running(dashscope_settings(dashscope)):
            pass


def test_waits_that_are_named_in_headers() -> None:
    assert retry_after(None) is None
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after": "-3"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "inf"}) is None
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5


def test_a_free_quota_does_not_renew() -> None:
    error = failure(
        "x", 429, codes=("Throttling.AllocationQuota",), message="Free allocated quota exceeded."
    )
    assert type(error) is BackendError


# --- together -------------------------------------------------------------------------------------


async def test_a_thousand_callers_and_dashscope(dashscope: DashScopeServer) -> None:
    texts = [f"text {number}" for number in range(1000)]
    settings = dashscope_settings(dashscope, embedding_dimensions=64)
    batcher = make_batcher(settings)
    with no_blocking():
        await batcher.start()
        found = await asyncio.gather(*(batcher.embed([text]) for text in texts))
        assert_right([vectors[0] for vectors in found], texts)
        assert dashscope.embedding_calls == 100
        assert max(dashscope.most_in_flight.values()) <= 8
        assert batcher.usage().tokens_used > 0
        await batcher.stop()


async def test_one_inappropriate_text_among_those_of_many(dashscope: DashScopeServer) -> None:
    dashscope.inappropriate = lambda text: "bad" in text
    texts = [*(f"text {number}" for number in range(18)), "bad", "word " * 10_000]
    batcher = make_batcher(dashscope_settings(dashscope))
    with no_blocking():
        await batcher.start()
        outcomes = await asyncio.gather(
            *(batcher.embed([text]) for text in texts), return_exceptions=True
        )
        await batcher.stop()
    assert [type(outcome) for outcome in outcomes] == [list] * 18 + [Refused] * 2
    assert "DataInspectionFailed" in str(outcomes[18])
    assert "InvalidParameter" in str(outcomes[19])


async def test_dashscope_is_left_alone_for_as_long_as_it_says(dashscope: DashScopeServer) -> None:
    dashscope.fail("embeddings", 429, times=1, headers={"Retry-After": "1"})
    batcher = make_batcher(dashscope_settings(dashscope))
    await batcher.start()
    found = await asyncio.gather(*(batcher.embed([text]) for text in ("a", "b")))
    await batcher.stop()
    assert_right([vectors[0] for vectors in found], ["a", "b"])
    first, second = dashscope.requests
    assert 1.0 <= second.at - first.at < 3.0
