"""Elasticsearch's REST interface on the loopback interface: indices, bulk writes and searches.

It does what a single node does of what vector stores ask of it. Writes are there at once, but
searches see them after a refresh only, or when the refresh interval is over. What may be asked of
a field depends on its mapping, and that on what was written first; `elasticsearch_mapping` says
how. Vectors are compared exactly, by script; relevance of texts is not computed.
"""

from __future__ import annotations

import base64
import fnmatch
import itertools
import json
import re
from typing import Any

from aiohttp import web

from tests.loopback.elasticsearch_index import Hit, Index, window
from tests.loopback.faults import HttpFailure, Received
from tests.loopback.server import RECEIVED, LoopbackServer, as_response

_JSON = "application/vnd.elasticsearch+json;compatible-with=9"
_FORBIDDEN_IN_NAMES = re.compile(r'[\\/*?"<>| ,#:]')


class ElasticsearchServer(LoopbackServer):
    """``with ElasticsearchServer() as server: AsyncElasticsearch(server.url)``"""

    def __init__(
        self,
        *,
        basic_auth: tuple[str, str] | None = None,
        shows_vectors: bool = False,
        refresh_interval: float = 1.0,
        port: int = 0,
    ) -> None:
        super().__init__(port=port)
        self.basic_auth = basic_auth
        self.shows_vectors = shows_vectors
        """Whether searches show the vectors of what they find; since 9.2, not unless asked."""
        self.refresh_interval = refresh_interval
        """Of new indices: after how many seconds searches see what nobody refreshed."""
        self.indices: dict[str, Index] = {}
        self._scrolls: dict[str, tuple[Index, list[Hit], int, bool]] = {}
        self._numbers = itertools.count(1)

    # --- what it holds --------------------------------------------------------------------------

    def sources(self, index: str) -> dict[str, dict[str, Any]]:
        """All documents of an index as they were written, by id; none if there is no such index."""
        found = self.indices.get(index)
        return {} if found is None else {each.id: each.source for each in found.documents.values()}

    def clear(self) -> None:
        """Forgets all indices, so that tests can share the server."""
        self.indices.clear()
        self._scrolls.clear()

    # --- what the service is --------------------------------------------------------------------

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self._info, allow_head=False),
            web.put("/_bulk", self._bulk),
            web.post("/_bulk", self._bulk),
            web.post("/_search/scroll", self._scroll),
            web.delete("/_search/scroll", self._end_scroll),
            web.head("/{index}", self._exists),
            web.get("/{index}", self._get, allow_head=False),
            web.put("/{index}", self._create),
            web.delete("/{index}", self._delete),
            web.post("/{index}/_refresh", self._refresh),
            web.post("/{index}/_search", self._search),
        ]

    def parse_body(self, path: str, raw: bytes) -> Any:
        if path.endswith("/_bulk"):
            return [json.loads(line) for line in raw.splitlines() if line.strip()]
        return super().parse_body(path, raw)

    def authorize(self, request: Received) -> None:
        accepted = request.headers.get("accept", "")
        if "compatible-with=" in accepted and "compatible-with=9" not in accepted:
            words = f"Invalid media-type value on headers [Accept]: {accepted}"
            raise HttpFailure(400, words, code="media_type_header_exception")
        if self.basic_auth is not None:
            secret = base64.b64encode(":".join(self.basic_auth).encode()).decode()
            if request.headers.get("authorization") != f"Basic {secret}":
                words = "missing or wrong authentication credentials for REST request"
                raise HttpFailure(401, words, code="security_exception")

    def error_body(self, failure: HttpFailure) -> object:
        code = failure.code or {429: "es_rejected_execution_exception"}.get(failure.status)
        error = {"type": code or "exception", "reason": failure.message}
        return {"error": {"root_cause": [error], **error}, "status": failure.status}

    def finish(self, request: Received, response: web.Response) -> None:
        response.headers["X-Elastic-Product"] = "Elasticsearch"  # without it, clients go away
        if response.content_type == "application/json":
            response.headers["Content-Type"] = _JSON

    async def _info(self, request: web.Request) -> web.Response:
        return as_response(
            {
                "name": "loopback",
                "cluster_name": "loopback",
                "cluster_uuid": "loopback",
                "version": {"number": "9.5.1", "build_flavor": "default"},
                "tagline": "You Know, for Search",
            }
        )

    # --- indices --------------------------------------------------------------------------------

    async def _exists(self, request: web.Request) -> web.Response:
        try:
            self._named(request)
        except HttpFailure as failure:
            return web.Response(status=failure.status)
        return web.Response()

    async def _get(self, request: web.Request) -> web.Response:
        found = self._named(request)
        return as_response({index.name: {"aliases": {}, "mappings": {}} for index in found})

    async def _create(self, request: web.Request) -> web.Response:
        name = request.match_info["index"]
        _check_name(name)
        if (existing := self.indices.get(name)) is not None:
            words = f"index [{name}/{existing.uuid}] already exists"
            raise HttpFailure(400, words, code="resource_already_exists_exception")
        self._new_index(name, RECEIVED.get().body or {})
        return as_response({"acknowledged": True, "shards_acknowledged": True, "index": name})

    async def _delete(self, request: web.Request) -> web.Response:
        for index in self._named(request):
            del self.indices[index.name]
        return as_response({"acknowledged": True})

    async def _refresh(self, request: web.Request) -> web.Response:
        for index in self._named(request):
            index.refresh()
        return as_response({"_shards": _SHARDS})

    def _new_index(self, name: str, body: dict[str, Any]) -> Index:
        index = Index(name, body, refresh_interval=self.refresh_interval)
        self.indices[name] = index
        return index

    def _named(self, request: web.Request) -> list[Index]:
        """Those that a path names, which may be several, and may have wildcards."""
        found: list[Index] = []
        for name in request.match_info["index"].split(","):
            if name.startswith("_"):
                raise _invalid_name(name, "must not start with '_'.")
            if "*" in name:
                matching = fnmatch.filter(list(self.indices), name)
                found += [self.indices[each] for each in matching]
            elif name in self.indices:
                found.append(self.indices[name])
            else:
                raise HttpFailure(404, f"no such index [{name}]", code="index_not_found_exception")
        return found

    # --- bulk -----------------------------------------------------------------------------------

    async def _bulk(self, request: web.Request) -> web.Response:
        lines = iter(RECEIVED.get().body)
        items = []
        written = []
        for action in lines:
            ((name, target),) = action.items()
            if name not in ("index", "delete"):
                words = f"Malformed action/metadata line, found [{name}]"
                raise HttpFailure(400, words, code="illegal_argument_exception")
            source = next(lines) if name == "index" else None
            try:
                index = self.indices.get(target["_index"])
                if index is None:
                    _check_name(target["_index"])
                    index = self._new_index(target["_index"], {})  # also to delete from it
                outcome = (
                    index.remove(target["_id"])
                    if source is None
                    else index.put(target.get("_id") or self._fresh_id(), source)
                )
                written.append(index)
            except HttpFailure as failure:
                error = {"type": failure.code, "reason": failure.message}
                outcome = {
                    "_index": target["_index"],
                    "_id": target.get("_id"),
                    "status": failure.status,
                    "error": error,
                }
            items.append({name: outcome})
        if request.query.get("refresh", "false") != "false":
            for index in written:
                index.refresh()
        failed = any("error" in outcome for item in items for outcome in item.values())
        return as_response({"took": 1, "errors": failed, "items": items})

    def _fresh_id(self) -> str:
        return f"loopback-{next(self._numbers)}"

    # --- searches -------------------------------------------------------------------------------

    async def _search(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = RECEIVED.get().body or {}
        start, end = window(body, dict(request.query))
        shows_vectors = self._shows_vectors(request, body)
        hits: list[tuple[Index, Hit]] = []
        for index in self._named(request):
            hits += [(index, hit) for hit in index.search(body)]
        if "sort" not in body:
            hits.sort(key=lambda pair: -pair[1][0])
        answer = _found(hits[start:end], len(hits), shows_vectors)
        if "scroll" in request.query and hits:
            scroll_id = answer["_scroll_id"] = f"scroll-{next(self._numbers)}"
            self._scrolls[scroll_id] = (
                hits[0][0],
                [hit for _, hit in hits[end:]],
                end - start,
                shows_vectors,
            )
        return as_response(answer)

    async def _scroll(self, request: web.Request) -> web.Response:
        scroll_id = RECEIVED.get().body["scroll_id"]
        if scroll_id not in self._scrolls:
            words = f"No search context found for id [{scroll_id}]"
            raise HttpFailure(404, words, code="search_context_missing_exception")
        index, hits, size, shows_vectors = self._scrolls[scroll_id]
        self._scrolls[scroll_id] = (index, hits[size:], size, shows_vectors)
        answer = _found([(index, hit) for hit in hits[:size]], len(hits), shows_vectors)
        return as_response({**answer, "_scroll_id": scroll_id})

    async def _end_scroll(self, request: web.Request) -> web.Response:
        ids = RECEIVED.get().body["scroll_id"]
        ended = [self._scrolls.pop(each, None) for each in ([ids] if isinstance(ids, str) else ids)]
        return as_response({"succeeded": True, "num_freed": len(ended)})

    def _shows_vectors(self, request: web.Request, body: dict[str, Any]) -> bool:
        source = body.get("_source")
        asked = source.get("exclude_vectors") if isinstance(source, dict) else None
        if "_source_exclude_vectors" in request.query:
            asked = request.query["_source_exclude_vectors"] == "true"
        return self.shows_vectors if asked is None else not asked


_SHARDS = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}


def _found(hits: list[tuple[Index, Hit]], total: int, shows_vectors: bool) -> dict[str, Any]:
    shown = []
    for index, (score, document) in hits:
        source = document.source
        if not shows_vectors:
            fields = index.mapping.fields
            hidden = {name for name in source if name in fields and fields[name].dimensions}
            source = {name: value for name, value in source.items() if name not in hidden}
        shown.append({"_index": index.name, "_id": document.id, "_score": score, "_source": source})
    return {
        "took": 1,
        "timed_out": False,
        "_shards": _SHARDS,
        "hits": {
            "total": {"value": min(total, 10_000), "relation": "eq" if total <= 10_000 else "gte"},
            "max_score": max((score for _, (score, _) in hits), default=None),
            "hits": shown,
        },
    }


def _check_name(name: str) -> None:
    if found := _FORBIDDEN_IN_NAMES.search(name):
        raise _invalid_name(name, f"must not contain the following characters, as [{found[0]}]")
    if name[0] in "_-+":
        raise _invalid_name(name, "must not start with '_', '-', or '+'")
    if name in (".", ".."):
        raise _invalid_name(name, "must not be '.' or '..'")
    if name != name.lower():
        raise _invalid_name(name, "must be lowercase")
    if len(name.encode()) > 255:
        raise _invalid_name(name, f"index name is too long, ({len(name.encode())} > 255)")


def _invalid_name(name: str, words: str) -> HttpFailure:
    words = f"Invalid index name [{name}], {words}"
    return HttpFailure(400, words, code="invalid_index_name_exception")
