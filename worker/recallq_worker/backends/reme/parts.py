"""The models that ReMe's flows are given.

ReMe's own make a client for every step of every flow, try five times, each answer three times, and
then return nothing. These ask once, over connections that are kept; trying again is the slow lane's
work. Embeddings go through the process's batcher, with those of all other users.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from flowllm.core.embedding_model import (
    BaseEmbeddingModel,
)
from flowllm.core.enumeration import Role
from flowllm.core.llm import BaseLLM
from flowllm.core.schema import Message

from recallq.errors import BackendError
from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer, noting
from recallq_worker.backends.reme.drafts import current
from recallq_worker.embedding import EmbeddingBatcher
from recallq_worker.embedding.texts import beginning

_FENCED = re.compile(r"```json\s*([\s\S]*?)\s*```")
_JUDGED = re.compile(r"(结果：|Result:)\s*<\d+>\s*<[0-3]>", re.IGNORECASE)
_OBSERVED = re.compile(r"(信息：|Information:)\s*<\d+>", re.IGNORECASE)
_NOTHING = re.compile(r"无|\b(none|no|nothing)\b", re.IGNORECASE)


class StrictLlm(BaseLLM):  # type: ignore[misc]  # to the type checker it is Any
    """One model of an OpenAI-compatible server, asked once, whose failures are raised."""

    def __init__(self, client: Callable[[], Any], model_name: str, params: dict[str, Any]) -> None:
        """`client` gives the ``AsyncOpenAI`` to ask; `params` go with every request."""
        super().__init__(model_name, max_retries=1, raise_exception=True)
        self._client = client
        self._params = params

    async def achat(
        self,
        messages: list[Any],
        tools: Any = None,
        enable_stream_print: bool = False,
        callback_fn: Callable[[Any], Any] | None = None,
        default_value: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The answer, or what `callback_fn` makes of it. Raises `UnusableAnswer` for one that is
        not what was asked for, and openai's errors."""
        with noting(current()):
            answer = await self._ask(messages, **kwargs)
            if callback_fn is None:
                return answer
            answer.content = checked(callback_fn, answer.content)
            return callback_fn(answer)

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        with noting(current()):
            raise BackendError("ReMe's flow asks its LLM synchronously, which would hold up others")

    async def _ask(self, messages: list[Any], **kwargs: Any) -> Any:
        """A streamed answer, since not every model answers otherwise."""
        stream = await self._client().chat.completions.create(
            model=self.model_name,
            # Servers may refuse to hear of reasoning, and there is none yet.
            messages=[each.simple_dump(add_reasoning=False) for each in messages],
            stream=True,
            **{**self._params, **kwargs},
        )
        parts: list[str] = []
        reasoning: list[str] = []
        ended: str | None = None
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices[:1]:
                    delta = choice.delta
                    if delta is not None:
                        parts.append(delta.content or "")
                        reasoning.append(getattr(delta, "reasoning_content", None) or "")
                    ended = choice.finish_reason or ended
        if ended == "content_filter":
            raise BackendError("the LLM's provider withholds the answer")
        if ended != "stop":
            raise CutOffAnswer("the LLM's answer was cut off")
        text = "".join(parts)
        if not text.strip():
            raise UnusableAnswer("the LLM's answer is empty")
        return Message(role=Role.ASSISTANT, content=text, reasoning_content="".join(reasoning))


def checked(callback: Callable[[Any], Any], answer: str) -> str:
    """The answer, in the form that the step reads which `callback` belongs to, by whose name it is
    told. Raises `UnusableAnswer` where the step would take one that it cannot read for one that
    says nothing."""
    step = callback.__qualname__.partition(".")[0]
    match step:
        case "InfoFilterOp":
            if not _JUDGED.search(answer):
                raise UnusableAnswer("the LLM's answer judges no message")
        case "GetObservationOp" | "GetObservationWithTimeOp":
            if not _OBSERVED.search(answer) and not _NOTHING.search(answer):
                raise UnusableAnswer("the LLM's answer is no list of observations")
        case "SuccessExtractionOp" | "FailureExtractionOp" | "ComparativeExtractionOp":
            _check_experiences(_json_in(answer))
        case "MemoryValidationOp":
            # Without a fence, it would take whatever is said for a yes.
            return f"```json\n{json.dumps(_json_in(answer))}\n```"
        case _:
            pass  # a step of the user's own flow reads answers in a way of its own
    return answer


def _json_in(answer: str) -> Any:
    fenced = _FENCED.search(answer)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except ValueError:
        raise UnusableAnswer("the LLM's answer is not JSON") from None


def _check_experiences(found: Any) -> None:
    for each in found if isinstance(found, list) else [found]:
        condition = isinstance(each, dict) and (each.get("when_to_use") or each.get("condition"))
        if not condition or not isinstance(each.get("experience"), str) or not each["experience"]:
            raise UnusableAnswer("the LLM's answer holds something else than experiences")


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
