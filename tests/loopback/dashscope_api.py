"""DashScope's own API for text embeddings on the loopback interface.

It knows the models' limits and refuses what is beyond them in DashScope's words. Embeddings make
texts similar that share words. `spoil` makes of the next answers what they should not be.
"""

from __future__ import annotations

import math
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.loopback.faults import HttpFailure, Received
from tests.loopback.server import LoopbackServer, as_response, json_object
from tests.loopback.text import embedding, tokens

PATH = "/services/embeddings/text-embedding/text-embedding"
EMBEDDINGS = f"/api/v1{PATH}"


@dataclass(frozen=True)
class Model:
    """What a model takes and makes."""

    most_texts: int
    most_tokens: int
    """Of each text."""
    dimensions: tuple[int, ...]
    """Those that may be asked for; the first is what it makes without being asked."""


MODELS = {
    "text-embedding-v4": Model(10, 8192, (1024, 2048, 1536, 768, 512, 256, 128, 64)),
    "text-embedding-v3": Model(10, 8192, (1024, 768, 512, 256, 128, 64)),
    "text-embedding-v2": Model(25, 2048, (1536,)),
    "text-embedding-v1": Model(25, 2048, (1536,)),
}

_ERRORS = {
    400: ("InvalidParameter", "Required parameter(s) missing or invalid."),
    401: ("InvalidApiKey", "Invalid API-key provided."),
    403: ("AccessDenied", "Access denied."),
    404: ("ModelNotFound", "Model can not be found."),
    408: ("RequestTimeOut", "Request timed out, please try again later."),
    429: ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    500: ("InternalError", "An internal error has occured, please try again later."),
    503: ("ServiceUnavailable", "Service is unavailable, please try again later."),
}

Spoiler = Callable[[dict[str, Any]], object]
"""Makes of a right answer another one. What is no JSON object is sent as it stands."""


class DashScopeServer(LoopbackServer):
    """``with DashScopeServer() as server: dashscope.AsyncClient(base_url=server.base_url, ...)``"""

    def __init__(self, *, api_key: str = "sk-loopback-dashscope", port: int = 0) -> None:
        super().__init__(port=port)
        self.api_key = api_key
        self.spoil: deque[Spoiler] = deque()
        """For the next answers, one each."""
        self.inappropriate: Callable[[str], bool] = lambda text: False
        """Texts for which a request is refused as a whole."""
        self._embedded: list[tuple[str, str]] = []

    @property
    def base_url(self) -> str:
        return f"{self.url}/api/v1"

    # --- what came in ---------------------------------------------------------------------------

    @property
    def embedding_calls(self) -> int:
        """Requests for embeddings, refused ones too."""
        return self.count(f"POST {EMBEDDINGS}$")

    @property
    def embedded_texts(self) -> list[str]:
        """The texts that were embedded, in order."""
        return [text for text, _ in list(self._embedded)]

    @property
    def text_types(self) -> list[str]:
        """What each of them was said to be."""
        return [text_type for _, text_type in list(self._embedded)]

    def reset_counts(self) -> None:
        super().reset_counts()
        self._embedded.clear()

    # --- what the service is --------------------------------------------------------------------

    def routes(self) -> list[web.RouteDef]:
        return [web.post(EMBEDDINGS, self._embeddings)]

    def authorize(self, request: Received) -> None:
        if request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise HttpFailure(401)

    def error_body(self, failure: HttpFailure) -> object:
        code, message = _ERRORS.get(failure.status, ("InternalError.Algo", "An error has occured."))
        if failure.code is not None:
            code, message = failure.code, failure.message
        return {"code": code, "message": message, "request_id": str(uuid.uuid4())}

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        model = MODELS.get(body.get("model", ""))
        if model is None:
            raise HttpFailure(400, "Model not exist.", code="Model.NotExist")
        texts = self._texts(body.get("input"), model)
        parameters = body.get("parameters") or {}
        text_type = parameters.get("text_type", "document")
        if text_type not in {"document", "query"}:
            raise _invalid("text_type should be 'query' or 'document': parameters.text_type")
        dimension = parameters.get("dimension", model.dimensions[0])
        if dimension not in model.dimensions:
            allowed = ", ".join(str(each) for each in model.dimensions)
            raise _invalid(f"Value error, dimension should be in [{allowed}]: parameters.dimension")
        self._embedded.extend((text, text_type) for text in texts)
        answer: dict[str, Any] = {
            "status_code": 200,
            "request_id": str(uuid.uuid4()),
            "code": "",
            "message": "",
            "output": {
                "embeddings": [
                    {"text_index": index, "embedding": embedding(text, dimension)}
                    for index, text in enumerate(texts)
                ]
            },
            "usage": {"total_tokens": sum(tokens(text) for text in texts)},
        }
        return as_response(self.spoil.popleft()(answer) if self.spoil else answer)

    def _texts(self, given: object, model: Model) -> list[str]:
        texts = given.get("texts") if isinstance(given, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise HttpFailure(
                400, "Required input parameter missing from request.", code="BadRequest.EmptyInput"
            )
        if not 1 <= len(texts) <= model.most_texts:
            raise _invalid(
                "Value error, batch size is invalid, it should not be larger than "
                f"{model.most_texts}.: input.contents"
            )
        if not all(text and tokens(text) <= model.most_tokens for text in texts):
            raise _invalid(f"Range of input length should be [1, {model.most_tokens}]")
        if any(self.inappropriate(text) for text in texts):
            raise HttpFailure(
                400,
                "Input data may contain inappropriate content.",
                code="DataInspectionFailed",
            )
        return texts


def _invalid(message: str) -> HttpFailure:
    said = f"<400> InternalError.Algo.InvalidParameter: {message}"
    return HttpFailure(400, said, code="InvalidParameter")


# --- answers as they should not be ----------------------------------------------------------------


def embeddings_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The embeddings of an answer, to be changed in place."""
    found: list[dict[str, Any]] = answer["output"]["embeddings"]
    return found


def one_missing(answer: dict[str, Any]) -> object:
    embeddings_of(answer).pop()
    return answer


def one_twice(answer: dict[str, Any]) -> object:
    """The last text's embedding claims to be the first one's."""
    embeddings_of(answer)[-1]["text_index"] = 0
    return answer


def without_indices(answer: dict[str, Any]) -> object:
    for each in embeddings_of(answer):
        del each["text_index"]
    return answer


def out_of_order(answer: dict[str, Any]) -> object:
    """Which is as right as any other order."""
    embeddings_of(answer).reverse()
    return answer


def of_other_dimensions(answer: dict[str, Any]) -> object:
    for each in embeddings_of(answer):
        each["embedding"] = each["embedding"][:64]
    return answer


def not_a_number(answer: dict[str, Any]) -> object:
    embeddings_of(answer)[0]["embedding"][0] = math.nan
    return answer


def words_for_numbers(answer: dict[str, Any]) -> object:
    embeddings_of(answer)[0]["embedding"] = ["a", "b"]
    return answer


def a_failure_in_a_success(code: str) -> Spoiler:
    """HTTP 200, and an error in the body."""
    return lambda answer: {"request_id": answer["request_id"], "code": code, "message": "Sorry."}


def a_page(answer: dict[str, Any]) -> object:
    """What a gateway shows."""
    return "<html>Welcome</html>"
