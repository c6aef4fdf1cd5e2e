"""The models that ReMe's flows are given.

ReMe's own make a client for every step of every flow, try five times, each answer three times, and
then return nothing. These ask once, over connections that are kept; trying again is the slow lane's
work. Embeddings go through the process's batcher, with those of all other users.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import openai
import orjson
from flowllm.core.embedding_model import BaseEmbeddingModel
from flowllm.core.enumeration import Role
from flowllm.core.llm import BaseLLM
from flowllm.core.schema import Message

from recallq.errors import BackendError, BackendUnavailable
from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer, as_job_error, noting
from recallq_worker.backends.reme.answers import in_form, without_thoughts
from recallq_worker.backends.reme.drafts import current
from recallq_worker.embedding import EmbeddingBatcher
from recallq_worker.embedding.texts import beginning
from recallq_worker.model_usage import LLM_USAGE

_DONE = "done"
_BROKEN_OFF = frozenset({"length", "model_length", "max_tokens", "error", "abort"})
"""Why an answer ended that has not come to its end. Servers have many names for the other case."""


class StrictLlm(BaseLLM):  # type: ignore[misc]  # to the type checker it is Any
    """One model of an OpenAI-compatible server, asked once, whose failures are raised."""

    def __init__(
        self,
        client: Callable[[], Any],
        model_name: str,
        params: dict[str, Any],
        *,
        where: str,
        turns: asyncio.Semaphore,
    ) -> None:
        """`client` gives the ``AsyncOpenAI`` to ask; `params` go with every request. `where` is the
        server, to be told with errors; `turns` bounds requests at once."""
        super().__init__(model_name, max_retries=1, raise_exception=True)
        self._client = client
        self._params = params
        self._turns = turns
        self._counts_tokens = True
        self.doing = f"the LLM {model_name} at {where}"

    async def achat(
        self,
        messages: list[Any],
        tools: Any = None,
        enable_stream_print: bool = False,
        callback_fn: Callable[[Any], Any] | None = None,
        default_value: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The answer, or what `callback_fn` makes of it. Raises what backends raise; the cause of
        an answer that is not what was asked for is an `UnusableAnswer`."""
        with noting(current()):
            failed = True
            try:
                text = await self._ask(messages, **kwargs)
                answer = Message(role=Role.ASSISTANT, content=text)
                if callback_fn is not None:
                    text = in_form(callback_fn, text)
                    answer = _read(callback_fn, Message(role=Role.ASSISTANT, content=text))
            except Exception as error:
                told = as_job_error(error, self.doing)
                if told is None or told is error:
                    raise
                raise told from error
            else:
                failed = False
                return answer
            finally:
                LLM_USAGE.ended(failed=failed)

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        with noting(current()):
            raise BackendError("ReMe's flow asks its LLM synchronously, which would hold up others")

    async def _ask(self, messages: list[Any], **kwargs: Any) -> str:
        try:
            return await self._stream(messages, **kwargs)
        except openai.BadRequestError as error:
            if not self._counts_tokens or "stream_options" not in error.message:
                raise
            self._counts_tokens = False  # a server that does not know how to
            LLM_USAGE.ended(failed=True)
            return await self._stream(messages, **kwargs)

    async def _stream(self, messages: list[Any], **kwargs: Any) -> str:
        """A streamed answer, since not every model answers otherwise.

        The SDK would make half a dozen objects of each of its hundreds of chunks.
        """
        body = {
            **self._params,
            **kwargs,
            "model": self.model_name,
            # Servers may refuse to hear of reasoning, and there is none yet.
            "messages": [each.simple_dump(add_reasoning=False) for each in messages],
            "stream": True,
        }
        if self._counts_tokens:
            body.setdefault("stream_options", {"include_usage": True})
        parts: list[str] = []
        ended: str | None = None
        events = False
        spent: dict[str, Any] | None = None
        create = self._client().chat.completions.with_streaming_response.create
        try:
            async with (
                self._turns,
                create(model=body["model"], messages=[], stream=True, extra_body=body) as answer,
            ):
                async for line in _lines(answer.iter_bytes()):
                    name, _, data = line.partition(":")
                    if name != "data" or not data.strip():
                        continue
                    events = True
                    if data.strip() == "[DONE]":
                        ended = ended or _DONE
                        break  # whether or not the server hangs up
                    said, finished, usage = _chunk(data)
                    parts.append(said)
                    ended = finished or ended
                    spent = usage or spent
        except openai.APIStatusError:
            raise
        except openai.APIError as error:
            if isinstance(error, openai.APIConnectionError):
                raise
            raise BackendUnavailable(f"{self.doing}: it broke off its answer") from None
        finally:
            LLM_USAGE.spent_as_told(spent)  # some tell it with every chunk: the last one counts
        if not events:
            raise UnusableAnswer("the answer is no stream")
        if ended == "content_filter":
            raise BackendError(f"{self.doing}: its provider withholds the answer")
        if ended is None or ended in _BROKEN_OFF:
            raise CutOffAnswer("the answer was cut off")
        text = without_thoughts("".join(parts))
        if not text.strip():
            raise UnusableAnswer("the answer is empty")
        return text


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines of an event stream, which end as its standard says, and not where other characters
    within a text may end one."""
    decoder, rest = codecs.getincrementaldecoder("utf-8-sig")("replace"), ""
    async for chunk in chunks:
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        for line in lines:
            yield line.rstrip("\r")
    yield rest


def _chunk(data: str) -> tuple[str, str | None, dict[str, Any] | None]:
    """What one event of a stream adds to the answer, why the answer ends, if it does, and what has
    been used, if it says so."""
    try:
        event = orjson.loads(data)
        if event.get("error"):
            # Its words may quote what was sent.
            raise UnusableAnswer("it broke off its answer, and called that an error")
        choices = event.get("choices") or [{}]
        said = (choices[0].get("delta") or {}).get("content") or ""
        return said, choices[0].get("finish_reason"), event.get("usage")
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UnusableAnswer("the answer cannot be read") from None


def _read(callback: Callable[[Any], Any], answer: Any) -> Any:
    """What a step makes of an answer; it may stumble over what nobody has foreseen."""
    try:
        return callback(answer)
    except Exception as error:
        name = type(error).__name__
        raise UnusableAnswer(f"the answer cannot be read ({name})") from error


class BatchedEmbedding(BaseEmbeddingModel):  # type: ignore[misc]  # see above
    """The embedding model of the process, as flowllm's vector stores and ReMe's flows ask it."""

    def __init__(self, batcher: EmbeddingBatcher) -> None:
        super().__init__(
            batcher.embedder.model,
            dimensions=batcher.embedder.dimensions,
            max_batch_size=batcher.embedder.most_texts,
            max_retries=1,
            raise_exception=True,
        )
        self._batcher = batcher

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The vectors of texts; those of an open draft are not asked for again."""
        draft = current()
        known = draft.vectors if draft is not None else {}
        wanted = [text for text in dict.fromkeys(texts) if text not in known]
        if wanted:
            with noting(draft):
                vectors = await self._batcher.embed([beginning(text) for text in wanted])
            found = {text: vector.tolist() for text, vector in zip(wanted, vectors, strict=True)}
            if draft is not None:
                known.update(found)
            else:
                known = found
        return [known[text] for text in texts]

    async def async_get_embeddings(self, input_text: str | list[str]) -> Any:
        if isinstance(input_text, str):
            return (await self.embed([input_text]))[0]
        return await self.embed(input_text)

    async def async_get_node_embeddings(self, nodes: Any) -> Any:
        """Sets the vectors of nodes that have none."""
        several = nodes if isinstance(nodes, list) else [nodes]
        bare = [node for node in several if not node.vector]
        vectors = await self.embed([searchable(node) for node in bare])
        for node, vector in zip(bare, vectors, strict=True):
            node.vector = vector
        return nodes

    def get_embeddings(self, input_text: str | list[str]) -> Any:
        """Only what is known already: a flow that waited here would hold up all others."""
        draft = current()
        known = draft.vectors if draft is not None else {}
        texts = [input_text] if isinstance(input_text, str) else input_text
        with noting(draft):
            if any(text not in known for text in texts):
                raise BackendError("ReMe's flow embeds synchronously, which would hold up others")
        found = [known[text] for text in texts]
        return found[0] if isinstance(input_text, str) else found


def searchable(node: Any) -> str:
    """The text of a node that searches look for: when it is of use, else what it says."""
    when, what = str(node.content or ""), str(node.metadata.get("content") or "")
    return when if when.strip() else what
