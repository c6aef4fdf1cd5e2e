"""The OpenAI API on the loopback interface: chat completions, embeddings and models.

Without further ado it does what Mem0's additive extraction asks a model for, in the simplest way:
each message of the user becomes a memory with its very words, so that a test can tell what became
of which. `answers` and `answer` say otherwise. Embeddings make texts similar that share words.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.loopback.faults import HttpFailure, Received, hang_up
from tests.loopback.server import LoopbackServer, as_response, json_object
from tests.loopback.text import embedding, tokens

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
MODELS = "/v1/models"


@dataclass(frozen=True)
class Answer:
    """What the model says, where the text alone does not say it all."""

    content: str
    finish_reason: str = "stop"
    """"length" for an answer that was cut off at the limit of tokens."""
    cut_after: int | None = None
    """Hangs up after so many chunks of a stream."""
    error: dict[str, Any] | None = None
    """What a stream ends with instead of its last chunk."""


Reply = str | dict[str, Any] | Answer | HttpFailure
"""A dictionary is sent as its JSON; a failure, instead of an answer."""


class OpenAIServer(LoopbackServer):
    """``with OpenAIServer() as server: OpenAI(base_url=server.base_url, ...)``"""

    def __init__(
        self,
        *,
        api_key: str = "sk-loopback",
        dimensions: int = 1536,
        most_inputs: int = 2048,
        most_tokens: int = 8192,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self.api_key = api_key
        self.dimensions = dimensions
        """Of embeddings whose request does not say."""
        self.most_inputs = most_inputs
        """How many texts a request for embeddings may bring."""
        self.most_tokens = most_tokens
        """How long each of them may be."""
        self.models = ["gpt-5-mini", "text-embedding-3-small"]
        self.answers: deque[Reply] = deque()
        """The next answers, one each, before `answer` is asked."""
        self.answer: Callable[[dict[str, Any]], Reply | None] = self.extract
        """Makes the other answers of the request's body, and leaves to `extract` with None.

        Runs on the server's loop: no waiting.
        """
        self.remembered_roles: tuple[str, ...] = ("user",)
        """Whose messages become memories."""
        self.counts_streams = True
        """Whether it knows how to tell what a streamed answer used; else it refuses to be asked."""
        self.spent: Counter[str] = Counter()
        """Tokens that it has told: ``embedding``, ``prompt``, ``completion``."""
        self._embedded: list[str] = []
        self._ids = itertools.count(1)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    # --- what came in ---------------------------------------------------------------------------

    @property
    def chats(self) -> int:
        """Requests for chat completions, refused ones too."""
        return self.count(f"POST {CHAT}$")

    @property
    def embedding_calls(self) -> int:
        """Requests for embeddings, refused ones too."""
        return self.count(f"POST {EMBEDDINGS}$")

    @property
    def embedded_texts(self) -> list[str]:
        """The texts that were embedded, in order."""
        return list(self._embedded)

    def reset_counts(self) -> None:
        super().reset_counts()
        self._embedded.clear()

    # --- what the service is --------------------------------------------------------------------

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(CHAT, self._chat),
            web.post(EMBEDDINGS, self._embeddings),
            web.get(MODELS, self._models),
        ]

    def authorize(self, request: Received) -> None:
        if request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise HttpFailure(401, "Incorrect API key provided.", code="invalid_api_key")

    def error_body(self, failure: HttpFailure) -> object:
        kind = "server_error" if failure.status >= 500 else "invalid_request_error"
        code = failure.code
        if failure.status == 429:
            kind, code = "requests", code or "rate_limit_exceeded"
        details = {
            "message": failure.message,
            "type": kind,
            "param": failure.param,
            "code": code,
        }
        return {"error": details}

    async def _models(self, request: web.Request) -> web.Response:
        models = [
            {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "loopback"}
            for name in self.models
        ]
        return as_response({"object": "list", "data": models})

    # --- embeddings -----------------------------------------------------------------------------

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        texts = self._inputs(body.get("input"))
        dimensions = body.get("dimensions") or self.dimensions
        self._embedded.extend(texts)
        data = []
        for index, text in enumerate(texts):
            vector: list[float] | str = embedding(text, dimensions)
            if body.get("encoding_format") == "base64":
                packed = struct.pack(f"<{dimensions}f", *vector)
                vector = base64.b64encode(packed).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        used = sum(tokens(text) for text in texts)
        self.spent["embedding"] += used
        return as_response(
            {
                "object": "list",
                "data": data,
                "model": body.get("model"),
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )

    def _inputs(self, value: object) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise HttpFailure(400, "'$.input' is invalid. It needs texts that are not empty.")
        if len(texts) > self.most_inputs:
            raise HttpFailure(
                400,
                f"Invalid 'input': array too long. Expected an array with maximum length "
                f"{self.most_inputs}, but got an array with length {len(texts)} instead.",
                code="array_above_max_length",
                param="input",
            )
        for text in texts:
            if tokens(text) > self.most_tokens:
                raise HttpFailure(
                    400,
                    f"This model's maximum context length is {self.most_tokens} tokens, however "
                    f"you requested {tokens(text)} tokens. Please reduce your prompt.",
                )
        return texts

    # --- chat -----------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await json_object(request)
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise HttpFailure(400, "Missing required parameter: 'messages'.", param="messages")
        reply = self.answers.popleft() if self.answers else self.answer(body)
        if reply is None:
            reply = self.extract(body)
        if isinstance(reply, HttpFailure):
            raise reply
        if isinstance(reply, dict):
            reply = json.dumps(reply, ensure_ascii=False)
        answer = Answer(reply) if isinstance(reply, str) else reply
        prompt = sum(tokens(content_of(message)) for message in body["messages"])
        completion = tokens(answer.content) if answer.content else 0
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        base = {
            "id": f"chatcmpl-{next(self._ids)}",
            "created": int(time.time()),
            "model": body.get("model"),
        }
        if body.get("stream_options") and not self.counts_streams:
            raise HttpFailure(
                400, "Unrecognized request argument supplied: stream_options", code="unknown"
            )
        self.spent.update(prompt=prompt, completion=completion)
        if body.get("stream"):
            return await self._stream(request, body, base, answer, usage)
        message = {"role": "assistant", "content": answer.content, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": answer.finish_reason,
            "logprobs": None,
        }
        return as_response(
            {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        base: dict[str, Any],
        answer: Answer,
        usage: dict[str, int],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        counted = bool((body.get("stream_options") or {}).get("include_usage"))
        # With usage asked for, every chunk has the field, and it is null in all but the last.
        base = {**base, "object": "chat.completion.chunk", **({"usage": None} if counted else {})}
        for number, choice in enumerate(_deltas(answer)):
            if number == answer.cut_after:
                hang_up(request)
                return response
            if answer.error is not None and choice["finish_reason"] is not None:
                await _send(response, {"error": answer.error})
                await response.write_eof()
                return response
            await _send(response, {**base, "choices": [choice]})
        if counted:
            await _send(response, {**base, "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    # --- Mem0's extraction ----------------------------------------------------------------------

    def extract(self, body: dict[str, Any]) -> Reply:
        """A memory of each new message, to Mem0's extraction; to anything else, an echo."""
        prompt = content_of(body["messages"][-1])
        messages = new_messages(prompt)
        if messages is None:
            return prompt
        remembered = [each for each in messages if each[0] in self.remembered_roles]
        return {
            "memory": [
                {"id": str(number), "text": text, "attributed_to": role}
                for number, (role, text) in enumerate(remembered)
            ]
        }


# The memories that exist stand before the new messages, as JSON on a single line. What was said may
# itself look like the heading behind, so the last one counts.
_NEW_MESSAGES = re.compile(
    r"\n\n## Existing Memories\n[^\n]*\n\n## New Messages\n(.*)\n\n## Observation Date\n", re.DOTALL
)
_ROLE = re.compile(r"^(system|user|assistant): ", re.MULTILINE)


def new_messages(prompt: str) -> list[tuple[str, str]] | None:
    """Role and text of the messages in a prompt that mem0 2.2.1 makes for its extraction.

    None if the prompt is another. Mem0 writes ``role: text`` lines without quoting, so a line of a
    message that begins like one counts as one.
    """
    section = _NEW_MESSAGES.search(prompt)
    if section is None:
        return None
    _, *parts = _ROLE.split(section[1])
    return [
        (role, text.removesuffix("\n")) for role, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def content_of(message: dict[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _deltas(answer: Answer) -> Iterator[dict[str, Any]]:
    """The choices of a stream: the role, the text a word at a time, and why it ended."""

    def choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}

    yield choice({"role": "assistant", "content": ""})
    for word in re.findall(r"\s*\S+\s*$|\s*\S+|\s+", answer.content):
        yield choice({"content": word})
    yield choice({}, answer.finish_reason)


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
