"""Embeddings by OpenAI's protocol, on its SDK: OpenAI, vLLM, Ollama and most others.

Servers differ in what they know of it. What one refuses to hear of, the dimensions that are asked
for or the encoding of the answer, is left away from then on; vectors are checked in any case.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import SecretStr

from recallq.errors import BackendUnavailable, JobError
from recallq_worker.embedding.base import Embedded, Kind, as_vectors
from recallq_worker.embedding.failures import failure
from recallq_worker.embedding.keys import account_of, clean_key
from recallq_worker.openai_client import open_client

_UNKNOWN_PARAMETERS = {
    "dimensions": ("dimension", "matryoshka"),
    "encoding_format": ("encoding_format", "base64"),
}
"""By what words a refusal speaks of a parameter."""


class OpenAIEmbedder:
    """A model behind OpenAI's protocol."""

    most_at_once = None

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        api_key: SecretStr,
        dimensions: int,
        ask_for_dimensions: bool,
        own_environment: bool,
        quota_renews: bool = False,
        most_texts: int = 100,
        timeout: float = 15.0,
    ) -> None:
        """`dimensions` are what vectors have, and are asked for with `ask_for_dimensions`.

        With `own_environment`, what ``OPENAI_ORG_ID``, ``OPENAI_PROJECT_ID`` and
        ``OPENAI_CUSTOM_HEADERS`` say goes with requests; other servers shall not hear of it. With
        `quota_renews`, "insufficient_quota" passes by itself. `timeout` is in seconds.
        """
        self.model = model
        self.dimensions = dimensions
        self.most_texts = most_texts
        # OpenAI takes 300,000, as it counts them.
        self.most_request_tokens = 250_000
        self.account = account_of(base_url, api_key)
        self._base_url = base_url
        self._api_key = SecretStr(clean_key(api_key))
        self._own_environment = own_environment
        self._quota_renews = quota_renews
        self._timeout = timeout
        self._doing = f"embedding with {model}"
        self._parameters: dict[str, Any] = {"encoding_format": "base64"}
        if ask_for_dimensions:
            self._parameters["dimensions"] = dimensions
        self._client: Any = None
        self._sdk: Any = None

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self.model!r})"

    async def start(self) -> None:
        if self._client is None:
            # Importing takes most of a second, and making a client reads the certificates.
            await asyncio.to_thread(self._open)

    def _open(self) -> None:
        client, self._sdk = open_client(
            base_url=self._base_url,
            api_key=self._api_key,
            timeout=self._timeout,
            own_environment=self._own_environment,
            wanted_by="embedding with OpenAI's protocol",
            extra="openai",
        )
        _ = client.embeddings
        self._client = client

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        if self._client is None:
            raise BackendUnavailable(f"{self._doing}: it is not started")
        sent = dict(self._parameters)
        while True:
            sdk, failed = self._sdk, None
            try:
                answer = await self._client.embeddings.create(
                    model=self.model, input=list(texts), **sent
                )
            except sdk.APIStatusError as error:
                unknown = _unknown_parameter(error, sent)
                if unknown is None:
                    failed = self._failure(error)
                else:
                    self._leave_away(unknown)
            except sdk.APITimeoutError:
                failed = BackendUnavailable(f"{self._doing}: no answer in time")
            except sdk.APIConnectionError:
                failed = BackendUnavailable(f"{self._doing}: the connection failed")
            except (sdk.OpenAIError, ValueError, TypeError, AttributeError):
                failed = BackendUnavailable(f"{self._doing}: the answer cannot be read")
            else:
                return self._embedded(answer, len(texts))
            if failed is not None:
                raise failed
            sent = dict(self._parameters)

    def _leave_away(self, parameter: str) -> None:
        if parameter == "encoding_format":
            # Left away altogether, the SDK would ask for base64 by itself.
            self._parameters[parameter] = "float"
        else:
            self._parameters.pop(parameter, None)

    def _embedded(self, answer: Any, texts: int) -> Embedded:
        try:
            by_index = {each.index: each.embedding for each in answer.data}
            complete = len(answer.data) == texts and by_index.keys() == set(range(texts))
            rows = [_decoded(by_index[index]) for index in range(texts)] if complete else []
            tokens = answer.usage.total_tokens if answer.usage is not None else 0
        except (ValueError, TypeError, AttributeError):
            raise BackendUnavailable(f"{self._doing}: the answer cannot be read") from None
        if not complete:
            raise BackendUnavailable(
                f"{self._doing}: the vectors that came are not those of the texts"
            )
        vectors = as_vectors(rows, texts=texts, dimensions=self.dimensions, doing=self._doing)
        return Embedded(vectors, tokens if isinstance(tokens, int) else 0)

    def _failure(self, error: Any) -> JobError:
        return failure(
            self._doing,
            error.status_code,
            codes=(error.code, error.type),
            message=error.message,
            request_id=error.request_id,
            headers=error.response.headers,
            quota_renews=self._quota_renews,
            key_hint="check the key and its rights",
        )


def _decoded(embedding: Any) -> Any:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    return embedding


def _unknown_parameter(error: Any, sent: dict[str, Any]) -> str | None:
    """Which of the parameters that were sent the server does not take, if that is what it says."""
    if error.status_code not in (400, 422):
        return None
    said = f"{error.param} {error.message}".lower()
    for name, words in _UNKNOWN_PARAMETERS.items():
        asked = name in sent and sent[name] != "float"
        if asked and any(word in said for word in words):
            return name
    return None
