"""ReMe's flows, run in such a way that nothing that fails in them is passed over.

A flow is a tree of steps. ReMe builds it anew for each call, which reads all prompts from their
files again; and each step looks up models and vector store in a dictionary of the process, and
swallows what goes wrong. Here a flow is built once, and each call has a copy whose steps are given
their parts and hand on their errors.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flowllm.core.context import BaseContext, C, FlowContext
from flowllm.core.op import BaseAsyncOp, ParallelOp
from flowllm.core.utils import parse_flow_expression
from reme_ai.constants.language_constants import DATATIME_WORD_LIST
from reme_ai.enumeration.language_enum import LanguageEnum
from reme_ai.summary.personal import (
    GetObservationOp,
    GetObservationWithTimeOp,
    InfoFilterOp,
)
from reme_ai.summary.task import MemoryDeduplicationOp
from reme_ai.utils.datetime_handler import DatetimeHandler

from recallq.errors import ConfigurationError
from recallq_worker.backends.reme.drafts import Draft, DraftedStore, drafting
from recallq_worker.backends.reme.parts import BatchedEmbedding

SUMMARIES = {
    "personal": "summary_personal_memory",
    "task": "summary_task_memory",
}
"""The flows that make memories, as ReMe calls them."""

# As in ReMe's default configuration, but for three things. It cuts whatever is longer than 200
# characters down to its beginning and its end, and of what it has found in one go it drops all but
# the last 50: with several submissions in one go, that would lose what they say. And its step that
# looks for today's memories searches by a field that no memory of this version has.
PERSONAL = (
    "InfoFilterOp(info_filter_msg_max_size=1000000)"
    " >> (GetObservationOp() | GetObservationWithTimeOp())"
    " >> ContraRepeatOp(contra_repeat_max_count=1000000)"
    " >> UpdateVectorStoreOp()"
)

_building = threading.Lock()


class Flow:
    """One of ReMe's flows, for any number of calls at once."""

    def __init__(
        self,
        name: str,
        expression: str,
        *,
        language: str,
        llm: Callable[[str], Any],
        embedding: BatchedEmbedding,
        store: DraftedStore,
    ) -> None:
        """`llm` gives the LLM of a name in the configuration. Raises `ConfigurationError`."""
        self._llm = llm
        self._embedding = embedding
        self._store = store
        with _building:
            # Steps read their prompts as they are made, in the language of the process.
            before, C.language = C.language, language
            try:
                self._tree = parse_flow_expression(expression)
            except Exception as error:  # noqa: BLE001  # an expression is code, in any state
                raise ConfigurationError(
                    f"the ReMe configuration: {name} cannot be built: {type(error).__name__}: "
                    f"{error}"
                ) from None
            finally:
                C.language = before
        self._prepared(self._tree)  # a name that the configuration lacks is told now

    async def run(self, **context: Any) -> Draft:
        """What the flow came to with `context`. Raises what went wrong in it."""
        with drafting() as draft:
            await self._prepared(self._tree).async_call(context=FlowContext(**context))
        return draft

    def _prepared(self, step: Any) -> Any:
        """A copy of a step and of what is below it, for one call."""
        own = copy.copy(step)
        own.task_list, own.context = [], None
        # These are private; their public counterparts would have each prompt read again.
        if isinstance(step._llm, str):  # noqa: SLF001
            own._llm = self._llm(step._llm)  # noqa: SLF001
        own._embedding_model, own._vector_store = self._embedding, self._store  # noqa: SLF001
        own.raise_exception, own.max_retries = True, 1
        if isinstance(own, ParallelOp):
            own.join_async_task = partial(own.join_async_task, return_exceptions=False)
        if isinstance(own, MemoryDeduplicationOp):
            own.async_before_execute = partial(_embed_ahead, own, self._embedding)
        if isinstance(own, InfoFilterOp):
            own.async_after_execute = partial(_tell_times, own)
        if isinstance(own, GetObservationOp | GetObservationWithTimeOp):
            timed = isinstance(own, GetObservationWithTimeOp)
            own._filter_messages = partial(_filtered, own.language, timed=timed)  # noqa: SLF001
        if isinstance(step.ops, list):
            own.ops = [self._prepared(each) for each in step.ops]
        elif isinstance(step.ops, BaseContext):
            own.ops = BaseContext()
            for name, each in step.ops.items():
                own.ops[name] = self._prepared(each)
        return own


async def _embed_ahead(step: BaseAsyncOp, embedding: BatchedEmbedding) -> None:
    """Embeds together what the step would embed one by one, again and again, and synchronously."""
    memories = step.context.response.metadata.get("memory_list") or []
    texts = [f"{each.when_to_use} {each.content}" for each in memories]
    await embedding.embed(texts)


async def _tell_times(step: BaseAsyncOp) -> None:
    """Says when messages were said: the step makes new ones of them, which were said now. What is
    "tomorrow" in one that has waited, is reckoned from that."""
    for message in step.context.get("messages") or []:
        message.time_created = message.metadata.get("original_message_time", message.time_created)


def _filtered(language: str, messages: Sequence[Any], *, timed: bool) -> list[Any]:
    """The messages that have a word in them that speaks of a time, or those that have none.

    As ReMe finds them; but for English it would split the message anew for each such word.
    """
    if DatetimeHandler.language_transform(language) is not LanguageEnum.EN:
        has_time = partial(DatetimeHandler.has_time_word, language=language)
        return [each for each in messages if has_time(query=each.content) is timed]
    return [each for each in messages if _TIME_WORDS.isdisjoint(_words(each.content)) is not timed]


def _words(text: str) -> Iterator[str]:
    for word in text.lower().split(" "):
        yield word.strip().strip(",").strip(".").strip("?").strip(":")


_TIME_WORDS = frozenset(word.lower() for word in DATATIME_WORD_LIST[LanguageEnum.EN])


def summary_of(kind: str, flows: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str]:
    """The flow that makes memories of a kind, the user's `own` or ReMe's: name and expression."""
    name = SUMMARIES[kind]
    if kind == "personal" and name not in own:
        return name, PERSONAL
    return name, str(flows[name].flow_content)
