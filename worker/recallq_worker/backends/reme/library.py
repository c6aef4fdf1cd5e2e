"""ReMe's parts, put together for one kind of memory: models, flow, vector store.

ReMe keeps its parts in a dictionary of the process, by names: two kinds in one process would take
each other's. Here each has its own, and the dictionary is left alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from operator import itemgetter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
from flowllm.core.context import C
from flowllm.core.schema import ServiceConfig
from pydantic import ValidationError
from reme_ai.config.config_parser import ConfigParser
from reme_ai.schema.memory import PersonalMemory, TaskMemory

from recallq.contract import Scope
from recallq.errors import BackendError, ConfigurationError
from recallq.keys import Keys
from recallq_worker.backends.base import REPEATABLE, Extracted, Submission, together
from recallq_worker.backends.failures import as_job_error
from recallq_worker.backends.reme import shapes
from recallq_worker.backends.reme.drafts import DraftedStore
from recallq_worker.backends.reme.flows import SUMMARIES, Flow, summary_of
from recallq_worker.backends.reme.foreign import ForeignStorage
from recallq_worker.backends.reme.loading import Imported
from recallq_worker.backends.reme.parts import BatchedEmbedding, StrictLlm, searchable
from recallq_worker.backends.reme.settings import Models, RemeSettings
from recallq_worker.backends.reme.storage import RedisStorage, Storage
from recallq_worker.backends.reme.vector_store import RedisVectorStore, row_of
from recallq_worker.backends.submissions import said
from recallq_worker.embedding import Kind, make_batcher
from recallq_worker.embedding.texts import beginning
from recallq_worker.openai_client import open_client
from recallq_worker.settings import WorkerSettings
from recallq_worker.vectors import Row

log = logging.getLogger(__name__)

_MEMORIES = {"personal": PersonalMemory, "task": TaskMemory}
_OUR_PARAMS = (
    *("api_key", "base_url", "max_retries", "raise_exception"),
    *("model", "messages", "stream", "tools"),
)
"""Of an LLM's parameters in a ReMe configuration, those that do not go with requests."""
_CHECK_TIMEOUT = 5.0


@dataclass(slots=True)
class Made:
    """Memories, to be stored."""

    owner: str
    nodes: list[Any]
    """``VectorNode``s with their vectors."""
    extracted: list[Extracted]
    deleted: list[str] = field(default_factory=list)
    """Memories that are to go instead."""
    repeatable: bool = False
    """Whether they have the same ids whenever they are made."""

    @property
    def intent(self) -> dict[str, Any]:
        """What `RemeBackend.recover` has to know."""
        ids = [node.unique_id for node in self.nodes]
        return {
            "owner": self.owner,
            "ids": ids,
            "deleted": self.deleted,
            REPEATABLE: self.repeatable,
        }


class _Drafted(NamedTuple):
    """What ReMe made of one trajectory."""

    memories: list[tuple[int, Any]]
    """Order key and ``VectorNode``, in the order in which they were said."""
    deleted: list[str]


class Library:
    """One kind of memory."""

    def __init__(
        self,
        kind: str,
        given: dict[str, Any],
        own: RemeSettings,
        models: Models,
        settings: WorkerSettings,
    ) -> None:
        """`given` is the user's ReMe configuration. Connects to nothing yet. Raises
        `ConfigurationError`."""
        self._kind = kind
        self._settings = settings
        self._config = _configuration(given)
        embedding = models.embedding_as(self._config.embedding_model["default"])
        self._batcher = make_batcher(
            embedding, store_url=settings.store_url, namespace=settings.namespace
        )
        self._embedding = BatchedEmbedding(self._batcher)
        self._endpoint = models.llm
        self._llms: dict[str, StrictLlm] = {}
        self._turns = asyncio.Semaphore(settings.slow_users)
        self._client: Any = None
        self._sdk: Any = None
        self._keys = Keys(settings.namespace)
        self.storage: Storage = self._make_storage(given)
        self._imported: Imported | None = None
        # ReMe's English prompts are those of no language, and its task flows have no others.
        chinese = "zh" in (own.language, given.get("language"))
        language = "zh" if chinese and kind == "personal" else ""
        unused = given.get("flow", {}).keys() - {SUMMARIES[kind]} if given.get("flow") else ()
        if unused:
            log.info("flows of the ReMe configuration that are not used here: %s", sorted(unused))
        self._flow = None
        if models.llm is not None:
            self._flow = Flow(
                *summary_of(kind, self._config.flow, given.get("flow") or {}),
                language=language,
                llm=self._llm,
                embedding=self._embedding,
                store=DraftedStore(self.storage.flow_store),
            )

    # --- life -----------------------------------------------------------------------------------

    async def open(self, imported: Imported) -> None:
        """Connects. Raises whatever a vector store raises."""
        self._imported = imported
        await asyncio.to_thread(self._open_client)
        await self._batcher.start()
        await self.storage.open()
        await self.storage.claim(self._embedding.dimensions, self._embedding.model_name)
        if self._endpoint is not None:
            try:
                await self._check_llm()
            except Exception as error:  # noqa: BLE001  # it may be there by the time it is needed
                told = as_job_error(error, self._llm("default").doing)
                log.warning("%s", told or type(error).__name__)

    async def close(self) -> None:
        client, self._client = self._client, None
        parts = [self.storage.close(), self._batcher.stop()]
        if client is not None:
            parts.append(client.close())
        for failed in await asyncio.gather(*parts, return_exceptions=True):
            if isinstance(failed, Exception):  # any library's; and it is over
                log.debug("closing a part of ReMe: %s", type(failed).__name__)

    def _make_storage(self, given: dict[str, Any]) -> Storage:
        store = (given.get("vector_store") or {}).get("default") or {}
        backend, params = store.get("backend") or "redis", dict(store.get("params") or {})
        foreign = backend != "redis"
        if params and not foreign:
            raise ConfigurationError(
                "vector_store.default of the ReMe configuration is redis, which takes no params: "
                "it is the Redis of RECALLQ_STORE_URL"
            )
        rows = RedisVectorStore(
            self._embedding,
            url=self._settings.store_url,
            collection=f"{self._settings.namespace}:reme_{self._kind}",
            dimensions=1 if foreign else self._embedding.dimensions,
            connect_timeout=self._settings.connect_timeout,
        )
        if not foreign:
            return RedisStorage(rows)
        make = C.get_vector_store_class(backend)
        return ForeignStorage(
            rows, backend, partial(make, embedding_model=self._embedding, **params), self._workspace
        )

    # --- whose ----------------------------------------------------------------------------------

    def owner(self, scope: Scope) -> str:
        """Whose memories those of a scope are, as the storage calls it."""
        return self._keys.user_tag(scope.tenant, scope.user_id)

    def _workspace(self, owner: str) -> str:
        """What another vector store calls an owner: each has letters that it does not take."""
        name = f"{self._settings.namespace}\n{owner}".encode()
        return f"recallq_{self._kind}_{sha256(name).hexdigest()[:24]}"

    # --- making memories ------------------------------------------------------------------------

    async def make(self, submissions: Sequence[Submission]) -> Made:
        """Has ReMe make memories of one user's submissions of one group, and stores none."""
        scope, last = submissions[0].scope, submissions[-1]
        owner, lowest = self.owner(scope), min(each.epoch for each in submissions)
        if self._kind == "personal":
            # Messages of a session, whoever submitted them when: each is read by itself.
            drafts = [await self._draft(owner, submissions)]
        else:
            # A task each, as it was done: of several together, ReMe would find a few experiences,
            # and drop those that resemble each other.
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._draft(owner, [each])) for each in submissions]
            drafts = [task.result() for task in tasks]
        nodes: list[Any] = []
        for order, node in itertools.chain.from_iterable(draft.memories for draft in drafts):
            # Sorted by id, memories of one submission are in the order in which they were said.
            node.unique_id = f"{len(nodes):08x}{uuid.uuid4().hex[8:]}"
            node.metadata = shapes.marked(
                node.metadata,
                scope=scope,
                order=order,
                epoch=lowest,
                given=shapes.metadata_of(last),
            )
            nodes.append(node)
        await self._embedding.async_get_node_embeddings(nodes)
        extracted = together([node.unique_id for node in nodes], len(submissions))
        deleted = [each for draft in drafts for each in draft.deleted]
        return Made(owner, nodes, extracted, deleted)

    async def _draft(self, owner: str, submissions: Sequence[Submission]) -> _Drafted:
        """What ReMe makes of one trajectory."""
        flow = self._flow
        if flow is None:
            raise BackendError(
                "RECALLQ_REME_INFER is off, and no LLM set up: add with infer=False, or turn it on"
            )
        orders: dict[str, int] = {}
        messages: list[dict[str, Any]] = []
        for each in submissions:
            for turn in shapes.turns(said(each, infer=True), each.order):
                orders.setdefault(turn["content"], each.order)
                messages.append(turn)
        if not messages:
            return _Drafted([], [])
        foreign = not isinstance(self.storage.flow_store, RedisVectorStore)
        draft = await flow.run(
            workspace_id=self._workspace(owner) if foreign else owner,
            # Of a task that was done, as the memory services of agentscope-runtime told ReMe.
            trajectories=[{"messages": messages, "score": 1.0}],
        )
        found: list[tuple[int, Any]] = []
        for place, node in sorted(_as_said(draft.nodes.values(), messages), key=itemgetter(0)):
            if searchable(node).strip():
                source = messages[place]["content"] if place < len(messages) else None
                found.append((orders.get(source or "", submissions[-1].order), node))
        return _Drafted(found, draft.deleted)

    async def as_they_are(self, submissions: Sequence[Submission]) -> Made:
        """Every message a memory, under an id that is the same whenever it is stored."""
        nodes: list[Any] = []
        extracted: list[Extracted] = []
        for each in submissions:
            ids = []
            for index, message in said(each, infer=False).items():
                text = message["content"]
                memory = _MEMORIES[self._kind](
                    memory_id=each.record_ids[index], when_to_use=text, content=text
                )
                node = memory.to_vector_node()
                node.metadata = shapes.marked(
                    node.metadata,
                    scope=each.scope,
                    order=each.order,
                    epoch=each.epoch,
                    message=each.messages[index],
                )
                nodes.append(node)
                ids.append(node.unique_id)
            extracted.append(Extracted(ids, len(ids), len(submissions)))
        await self._embedding.async_get_node_embeddings(nodes)
        return Made(self.owner(submissions[0].scope), nodes, extracted, repeatable=True)

    async def store(self, made: Made) -> bool:
        """Stores memories; False if a deletion has passed meanwhile. Repeating it after a failure
        changes nothing that was stored."""
        rows = [row_of(node) for node in made.nodes]
        vectors = [node.vector for node in made.nodes]
        stored = not rows or await self.storage.put(made.owner, rows, made.nodes, vectors)
        if stored:
            await self.storage.discard(made.owner, made.deleted, ban=False)
        return stored

    # --- reading --------------------------------------------------------------------------------

    async def nearest(self, scope: Scope, query: str, *, top_k: int) -> Sequence[tuple[Row, float]]:
        """The memories that are most similar to `query`, best first."""
        (vector,) = await self._batcher.embed([beginning(query)], Kind.QUERY)
        return await self.storage.nearest(
            self.owner(scope), vector.tolist(), top_k=top_k, group=scope.session_id
        )

    async def check(self) -> str:
        """Asks everything that is needed; says what it is."""
        stored_in = await self.storage.open()
        model = await self._batcher.check()
        detail = f"{self._imported}; {stored_in}, {model}"
        return detail if self._endpoint is None else f"{detail}; {await self._check_llm()}"

    # --- models ---------------------------------------------------------------------------------

    def _llm(self, name: str) -> StrictLlm:
        """The LLM that the configuration calls so. Raises `ConfigurationError`."""
        assert self._endpoint is not None  # flows are for those who have one
        if name not in self._llms:
            section = self._config.llm.get(name)
            if section is None:
                raise ConfigurationError(f"the ReMe configuration has no llm called {name!r}")
            model = (name == "default" and self._endpoint.model) or section.model_name
            params = {key: each for key, each in section.params.items() if key not in _OUR_PARAMS}
            where = urlsplit(self._endpoint.base_url).netloc.rpartition("@")[2]
            self._llms[name] = StrictLlm(
                lambda: self._client, model, params, where=where, turns=self._turns
            )
        return self._llms[name]

    def _open_client(self) -> None:
        endpoint = self._endpoint
        if endpoint is not None and endpoint.api_key is not None:
            self._client, self._sdk = open_client(
                base_url=endpoint.base_url,
                api_key=endpoint.api_key,
                timeout=self._settings.slow_timeout,
                own_environment=endpoint.is_openai,
                wanted_by=f"memory backend 'reme_{self._kind}'",
                extra="reme",
            )

    async def _check_llm(self) -> str:
        """Asks the LLM's server for its models, which costs nothing; says what is known."""
        llm = self._llm("default")
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                listed = await self._client.models.list()
        except self._sdk.APIStatusError as error:
            if error.status_code not in (403, 404, 405):
                raise as_job_error(error, llm.doing) or error from None
            # Not every server has such a list, and not every key may see it.
            return f"{llm.doing} (not asked: it lists no models)"
        except Exception as error:  # noqa: BLE001  # of whichever library
            raise as_job_error(error, llm.doing) or error from None
        models = {str(each.id) for each in listed.data or ()}
        unknown = models and llm.model_name not in models
        return llm.doing + (" (not among the models that it lists)" if unknown else "")


def _as_said(nodes: Iterable[Any], messages: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """New memories with the place of the message that each is of, as far as ReMe notes it: it
    sorts them by the second in which it made them, the last one first."""
    places = {each["content"]: place for place, each in reversed([*enumerate(messages)])}
    for node in nodes:
        try:
            source = orjson.loads(node.metadata.get("metadata") or "{}").get("source_message")
        except (AttributeError, TypeError, ValueError):
            source = None  # of a flow that keeps other metadata
        yield places.get(source if isinstance(source, str) else "", len(messages)), node


def _configuration(given: dict[str, Any]) -> Any:
    """ReMe's default configuration with what the user's says. Raises `ConfigurationError`."""
    parser = ConfigParser(ServiceConfig)
    parser.parse_args(f"config={ConfigParser.default_config_name}")
    own = {key: value for key, value in given.items() if value is not None}
    try:
        return ServiceConfig.model_validate(parser.merge_configs(parser.config_dict, own))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigurationError(f"the ReMe configuration: {place}: {problem['msg']}") from None
