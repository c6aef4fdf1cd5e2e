"""Embeddings by DashScope's own protocol, on its SDK.

Unlike the OpenAI-compatible one it tells queries from documents, for which the models make
different vectors. Only the SDK's client object is used, with everything said to it: the SDK's own
globals stay as they are for whoever else uses them in the process.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pydantic import SecretStr

from recallq.errors import BackendUnavailable, ConfigurationError, JobError, MissingExtra
from recallq_worker.embedding.base import Embedded, Kind, as_vectors
from recallq_worker.embedding.failures import failure
from recallq_worker.embedding.keys import account_of, clean_key

_FIRST_MODELS = re.compile(r"text-embedding-(async-)?v[12]$")
_FIRST_DIMENSIONS = 1536
_CONNECT_TIMEOUT = 5.0
_KEEP_ALIVE = 60.0
"""Seconds that an idle connection is kept, so that a search does not begin with a handshake."""


class DashScopeEmbedder:
    """A model of DashScope."""

    most_at_once = None

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        api_key: SecretStr,
        dimensions: int,
        ask_for_dimensions: bool,
        most_texts: int | None = None,
        timeout: float = 15.0,
    ) -> None:
        """`dimensions` are what vectors have, and are asked for with `ask_for_dimensions`.
        `timeout` is in seconds. Raises `ConfigurationError`."""
        first = _FIRST_MODELS.match(model) is not None
        if first and dimensions != _FIRST_DIMENSIONS:
            raise ConfigurationError(
                f"{model} makes vectors of {_FIRST_DIMENSIONS} dimensions and no others: unset "
                "RECALLQ_EMBEDDING_DIMENSIONS, or use text-embedding-v4"
            )
        self.model = model
        self.dimensions = dimensions
        self.most_texts = most_texts or (25 if first else 10)
        self.most_request_tokens = None if first else 30_000
        self.account = account_of(base_url, api_key)
        self._dimension = dimensions if ask_for_dimensions and not first else None
        self._base_url = base_url
        self._api_key = SecretStr(clean_key(api_key))
        self._timeout = timeout
        self._doing = f"embedding with {model}"
        self._client: Any = None
        self._http: Any = None
        self._errors: Any = None
        self._transport_errors: tuple[type[Exception], ...] = ()

    def __repr__(self) -> str:
        return f"DashScopeEmbedder({self.model!r})"

    async def start(self) -> None:
        if self._client is None:
            # Importing takes a second, and making a client reads files: certificates, and the
            # SDK's own configuration.
            await asyncio.to_thread(self._open)

    def _open(self) -> None:
        try:
            dashscope: Any = import_module("dashscope")
            errors = import_module("dashscope.v2.errors")
            httpx = import_module("httpx")
            make_client = dashscope.AsyncClient
        except (ImportError, AttributeError):
            raise MissingExtra("embedding with DashScope", "dashscope") from None
        # Made here for its limits alone: the SDK's lets connections go after five seconds.
        http = httpx.AsyncClient(
            base_url=self._base_url,
            timeout=httpx.Timeout(self._timeout, connect=min(_CONNECT_TIMEOUT, self._timeout)),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE
            ),
        )
        try:
            self._client = make_client(
                api_key=self._api_key.get_secret_value(),
                base_url=self._base_url,
                max_retries=0,
                timeout=self._timeout,
                http_client=http,
            )
        except ValueError as error:
            # One of DASHSCOPE_* is wrong, or a line of ~/.dashscope/config.toml; it says which.
            raise ConfigurationError(f"DashScope's SDK: {error}") from None
        self._http, self._errors = http, errors
        self._transport_errors = (httpx.HTTPError, httpx.InvalidURL, OSError)

    async def stop(self) -> None:
        http, self._http, self._client = self._http, None, None
        if http is not None:
            await http.aclose()

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        if self._client is None:
            raise BackendUnavailable(f"{self._doing}: it is not started")
        failed: JobError
        try:
            answer = await self._client.embeddings.create(
                model=self.model,
                input=list(texts),
                text_type=kind.value,
                dimension=self._dimension,
                api_key=self._api_key.get_secret_value(),
                workspace=self._client.config.workspace,
            )
        except self._errors.DashScopeError as error:
            failed = self._failure(error)
        except (ValueError, TypeError, AttributeError):
            # No JSON, or JSON that is no answer: perhaps the page of a gateway.
            failed = BackendUnavailable(f"{self._doing}: the answer cannot be read")
        except self._transport_errors as error:
            failed = BackendUnavailable(f"{self._doing}: {type(error).__name__}")
        else:
            return self._embedded(answer, len(texts))
        raise failed

    def _embedded(self, answer: Any, texts: int) -> Embedded:
        by_index = {each.index: each.embedding for each in answer.embeddings}
        if len(answer.embeddings) != texts or by_index.keys() != set(range(texts)):
            raise BackendUnavailable(
                f"{self._doing}: the vectors that came are not those of the texts"
            )
        rows = [by_index[index] for index in range(texts)]
        vectors = as_vectors(rows, texts=texts, dimensions=self.dimensions, doing=self._doing)
        return Embedded(vectors, answer.usage.total_tokens if answer.usage is not None else 0)

    def _failure(self, error: Any) -> JobError:
        status = error.status_code
        if status is None:
            what = "no answer in time"
            if not isinstance(error, self._errors.APITimeoutError):
                what = "the connection failed"
            return BackendUnavailable(f"{self._doing}: {what}")
        return failure(
            self._doing,
            status,
            codes=(error.code,),
            message=error.message,
            request_id=error.request_id,
            headers=error.headers,
            quota_renews=True,
            key_hint="check the key, its rights, and that RECALLQ_EMBEDDING_BASE_URL is the "
            "server of its region",
        )
