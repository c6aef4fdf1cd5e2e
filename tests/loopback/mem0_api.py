"""The Mem0 platform's API on the loopback interface, as the clients of mem0ai 2.2.1 speak it.

An addition is accepted at once with the id of an event, and takes effect later, when the event is
processed: `processing_time` says when. Until then its memories are in no list and no search. How an
event is polled, and what is known of the answer, is in `mem0_events`.

Of ``DELETE /v1/memories/`` the documentation says only a ``message``; the service is reported to
return an ``event_id`` with it and to delete in the background, and this server does both.

Scope is where the service differs most from what one expects: see `null_scoping`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from tests.loopback.faults import HttpFailure, Received
from tests.loopback.mem0_events import Event
from tests.loopback.mem0_filters import ENTITIES, entities_in, selects
from tests.loopback.server import LoopbackServer, as_response, json_object
from tests.loopback.text import similarity

ADD = "/v3/memories/add/"
SEARCH = "/v3/memories/search/"
LIST = "/v3/memories/"
EVENT = "/v1/event/"
MEMORIES = "/v1/memories/"

_WHITE_SPACE = re.compile(r"\s")


class Mem0Server(LoopbackServer):
    """``with Mem0Server() as server: AsyncMemoryClient(host=server.url, ...)``"""

    def __init__(
        self,
        *,
        api_key: str = "m0-loopback",
        processing_time: float = 0.05,
        deletion_time: float = 0.0,
        null_scoping: bool = True,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self.api_key = api_key
        self.processing_time = processing_time
        """Seconds until an addition takes effect: half of it PENDING, half RUNNING."""
        self.deletion_time = deletion_time
        """Seconds until a deletion takes effect, on what is there then; 0: before its answer."""
        self.null_scoping = null_scoping
        """Whether ``{"user_id": "u"}`` finds only what has no run, as documented, or all of u's."""
        self.fail_events: int | Callable[[dict[str, Any]], bool] = 0
        """How many of the next additions fail in processing, or which, by their request."""
        self.failure: dict[str, Any] = {"error": "Memory processing failed."}
        """The ``metadata`` of events that failed."""
        self.flat_results = False
        """Whether results of events come without ``data``."""
        self._memories: dict[str, dict[str, Any]] = {}
        self._events: dict[str, Event] = {}

    # --- what is in it --------------------------------------------------------------------------

    @property
    def memories(self) -> list[dict[str, Any]]:
        """All there are, oldest first."""
        return list(self._memories.values())

    @property
    def events(self) -> list[Event]:
        return list(self._events.values())

    @property
    def adds(self) -> int:
        """Requests to add, refused ones too."""
        return self.count(f"POST {ADD}$")

    @property
    def event_polls(self) -> int:
        return self.count(f"GET {EVENT}")

    @property
    def searches(self) -> int:
        return self.count(f"POST {SEARCH}$")

    @property
    def lists(self) -> int:
        return self.count(f"POST {LIST}$")

    @property
    def deletes(self) -> int:
        """Requests to delete, by scope or one by one."""
        return self.count(f"DELETE {MEMORIES}")

    # --- what the service is --------------------------------------------------------------------

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/ping/", self._ping),
            web.post(ADD, self._add_memories),
            web.post(SEARCH, self._search),
            web.post(LIST, self._list),
            web.get(EVENT + "{id}/", self._event),
            web.delete(MEMORIES, self._delete_all),
            web.get(MEMORIES + "{id}/", self._get),
            web.delete(MEMORIES + "{id}/", self._delete),
        ]

    def authorize(self, request: Received) -> None:
        if request.headers.get("authorization") != f"Token {self.api_key}":
            raise HttpFailure(401, "Given token not valid for any token type")

    def error_body(self, failure: HttpFailure) -> object:
        if failure.status == 400:
            return {"error": "400 Bad Request", "details": {"message": failure.message}}
        return {"detail": failure.message}

    async def _ping(self, request: web.Request) -> web.Response:
        return as_response(
            {
                "status": "ok",
                "org_id": "org-loopback",
                "project_id": "proj-loopback",
                "user_email": "tests@loopback.invalid",
            }
        )

    # --- additions and their events -------------------------------------------------------------

    async def _add_memories(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        scope = _scope({**body, **(body.get("filters") or {})})
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise HttpFailure(400, "Invalid input data: messages are missing.")
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise HttpFailure(400, "Invalid input data: a message needs role and content.")
        event = Event("ADD", body)
        self._events[event.id] = event
        _later(self.processing_time / 2, event.begin)
        _later(self.processing_time, lambda: self._process(event, scope))
        return as_response(
            {
                "message": "Memory processing has been queued for background execution",
                "status": "PENDING",
                "event_id": event.id,
            }
        )

    def _process(self, event: Event, scope: dict[str, Any]) -> None:
        if self._fails(event.payload):
            event.metadata = self.failure
            event.end("FAILED")
            return
        infer = event.payload.get("infer", True)
        for message in event.payload["messages"]:
            if message["role"] == "user" or (not infer and message["role"] != "system"):
                self._remember(event, scope, message)
        event.end("SUCCEEDED")

    def _fails(self, payload: dict[str, Any]) -> bool:
        if callable(self.fail_events):
            return self.fail_events(payload)
        if self.fail_events > 0:
            self.fail_events -= 1
            return True
        return False

    def _remember(self, event: Event, scope: dict[str, Any], message: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat()
        memory = {
            "id": str(uuid.uuid4()),
            "memory": message["content"],
            **scope,
            "metadata": event.payload.get("metadata"),
            "categories": [],
            "created_at": now,
            "updated_at": now,
            "expiration_date": event.payload.get("expiration_date"),
        }
        self._memories[memory["id"]] = memory
        result = {
            "id": memory["id"],
            "event": "ADD",
            "user_id": memory["user_id"],
            "memory": memory["memory"],
            "data": {"memory": memory["memory"]},
        }
        if self.flat_results:
            del result["data"]
        event.results.append(result)

    async def _event(self, request: web.Request) -> web.Response:
        event = self._events.get(request.match_info["id"])
        if event is None:
            raise HttpFailure(404, "No Event matches the given query.")
        return as_response(event.as_json())

    # --- reading --------------------------------------------------------------------------------

    def _selected(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the request's filters select, newest first."""
        if set(ENTITIES) & body.keys():
            raise HttpFailure(400, "Entity ids belong into filters, not beside them.")
        filters = body.get("filters") or {}
        _check_ids(entities_in(filters))
        selects(filters, {"id": "", "memory": ""}, null_scoping=False)  # refuses invalid ones
        return [
            memory
            for memory in reversed(self.memories)
            if selects(filters, memory, null_scoping=self.null_scoping)
        ]

    async def _search(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        query = body.get("query")
        if not isinstance(query, str) or not query.strip():
            raise HttpFailure(400, "Invalid query: must be a non-empty string.")
        top_k = body.get("top_k", 10)
        if not isinstance(top_k, int) or not 1 <= top_k <= 1000:
            raise HttpFailure(400, "top_k must be between 1 and 1000.")
        threshold = body.get("threshold", 0.1)
        hits = [
            {**memory, "score": round(similarity(query, memory["memory"]), 6)}
            for memory in self._selected(body)
        ]
        # The sort is stable: among equals, the newest stays first.
        hits = sorted((hit for hit in hits if hit["score"] >= threshold), key=_descending)
        return as_response({"results": hits[:top_k]})

    async def _list(self, request: web.Request) -> web.Response:
        selected = self._selected(await json_object(request))
        page = _number(request, "page", 1)
        size = min(_number(request, "page_size", 100), 100)
        pages = max(1, math.ceil(len(selected) / size))
        if page > pages:
            raise HttpFailure(404, "Invalid page.")

        def link(number: int) -> str:
            return str(request.url.update_query(page=number, page_size=size))

        return as_response(
            {
                "count": len(selected),
                "next": link(page + 1) if page < pages else None,
                "previous": link(page - 1) if page > 1 else None,
                "results": list(itertools.islice(selected, (page - 1) * size, page * size)),
            }
        )

    async def _get(self, request: web.Request) -> web.Response:
        return as_response(self._memory(request))

    def _memory(self, request: web.Request) -> dict[str, Any]:
        memory = self._memories.get(request.match_info["id"])
        if memory is None:
            raise HttpFailure(404, "Memory not found!")
        return memory

    # --- deletion -------------------------------------------------------------------------------

    async def _delete(self, request: web.Request) -> web.Response:
        del self._memories[self._memory(request)["id"]]
        return as_response({"message": "Memory deleted successfully!"})

    async def _delete_all(self, request: web.Request) -> web.Response:
        scope = {name: value for name, value in _scope(request.query).items() if value is not None}
        event = Event("DELETE", dict(request.query))
        self._events[event.id] = event

        def delete() -> None:
            # Nothing is null-scoped here: a user's id alone deletes the memories of all runs.
            for memory in self.memories:
                if selects(scope, memory, null_scoping=False):
                    del self._memories[memory["id"]]
            event.end("SUCCEEDED")

        _later(self.deletion_time, delete)
        return as_response({"message": "Memories deleted successfully!", "event_id": event.id})


def _scope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entities that `values` name, and None for the others."""
    scope = {name: values.get(name) for name in ENTITIES}
    named = [value for value in scope.values() if value is not None]
    if not named:
        raise HttpFailure(400, "One of the filters: app_id, user_id, agent_id, run_id is required!")
    _check_ids(named)
    return scope


def _check_ids(ids: list[Any]) -> None:
    for each in ids:
        if not isinstance(each, str) or not each or _WHITE_SPACE.search(each):
            raise HttpFailure(400, "Entity ids must be strings without white space.")


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise HttpFailure(404, "Invalid page.")
    return int(text)


def _descending(hit: Mapping[str, Any]) -> float:
    return -float(hit["score"])


def _later(seconds: float, call: Callable[[], None]) -> None:
    """At no time at all it happens at once, so that tests need not wait for it."""
    if seconds <= 0:
        call()
    else:
        asyncio.get_running_loop().call_later(seconds, call)
