"""Qdrant's REST interface on the loopback interface: collections, and points with one vector each.

It does what a single Qdrant does of what vector stores ask of it: cosine collections hold vectors
at length one, as 32-bit floats; ids are numbers or UUIDs; filters look into nested payloads and
compare with types. It searches exactly, and knows no named or sparse vectors, shards or aliases.
"""

from __future__ import annotations

import math
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.loopback.faults import HttpFailure, Received
from tests.loopback.qdrant_filters import passes
from tests.loopback.server import RECEIVED, LoopbackServer, as_response, json_object

COLLECTION = "/collections/{name}"
POINTS = f"{COLLECTION}/points"

_LARGEST_REQUEST = 32 * 2**20
_LONGEST_NAME = 255
_FORBIDDEN_IN_NAMES = '<>:"/\\|?*\0\x1f'


@dataclass
class Point:
    id: int | str
    vector: list[float]
    payload: dict[str, Any]


@dataclass
class Collection:
    size: int
    distance: str
    points: dict[int | str, Point] = field(default_factory=dict)
    operations: int = 0

    def in_order(self) -> list[Point]:
        """As scrolling shows them: by id, numbers before UUIDs."""
        return sorted(self.points.values(), key=lambda point: _order(point.id))


class QdrantServer(LoopbackServer):
    """``with QdrantServer() as server: AsyncQdrantClient(url=server.url)``"""

    def __init__(
        self, *, api_key: str | None = None, version: str | None = None, port: int = 0
    ) -> None:
        super().__init__(port=port)
        self.api_key = api_key
        self.version = version or _client_version()
        """What clients compare with their own when they are made; without more said, the same."""
        self.collections: dict[str, Collection] = {}

    # --- what it holds --------------------------------------------------------------------------

    def payloads(self, collection: str) -> list[dict[str, Any]]:
        """Of all points of a collection, by id; none if there is no such collection."""
        found = self.collections.get(collection)
        return [] if found is None else [point.payload for point in found.in_order()]

    def clear(self) -> None:
        """Forgets all collections, so that tests can share the server."""
        self.collections.clear()

    # --- what the service is --------------------------------------------------------------------

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self._version),
            web.get("/collections", self._list),
            web.get(f"{COLLECTION}/exists", self._exists),
            web.get(COLLECTION, self._info),
            web.put(COLLECTION, self._create),
            web.delete(COLLECTION, self._drop),
            web.put(POINTS, self._upsert),
            web.post(POINTS, self._retrieve),
            web.post(f"{POINTS}/delete", self._delete),
            web.post(f"{POINTS}/scroll", self._scroll),
            web.post(f"{POINTS}/query", self._query),
        ]

    def authorize(self, request: Received) -> None:
        if self.api_key is not None and request.headers.get("api-key") != self.api_key:
            words = "Must provide an API key or an Authorization bearer token"
            raise HttpFailure(401, body=words)

    def error_body(self, failure: HttpFailure) -> object:
        return {"status": {"error": failure.message}, "time": 0.0}

    async def _version(self, request: web.Request) -> web.Response:
        return as_response(
            {"title": "qdrant - vector search engine", "version": self.version, "commit": "0" * 40}
        )

    # --- collections ----------------------------------------------------------------------------

    async def _list(self, request: web.Request) -> web.Response:
        return _answer({"collections": [{"name": name} for name in list(self.collections)]})

    async def _exists(self, request: web.Request) -> web.Response:
        return _answer({"exists": _name(request) in self.collections})

    async def _info(self, request: web.Request) -> web.Response:
        collection = self._collection(request)
        params = {
            "vectors": {"size": collection.size, "distance": collection.distance},
            "shard_number": 1,
            "replication_factor": 1,
            "write_consistency_factor": 1,
            "on_disk_payload": True,
        }
        return _answer(
            {
                "status": "green",
                "optimizer_status": "ok",
                "indexed_vectors_count": 0,
                "points_count": len(collection.points),
                "segments_count": 1,
                "config": {"params": params, **_CONFIG},
                "payload_schema": {},
            }
        )

    async def _create(self, request: web.Request) -> web.Response:
        name, body = _name(request), await json_object(request)
        for character in name:
            if character in _FORBIDDEN_IN_NAMES:
                raise _invalid_name(name, f'collection name cannot contain "{character}" char')
        if name in self.collections:
            raise HttpFailure(409, f"Wrong input: Collection `{name}` already exists!")
        vectors = body.get("vectors")
        if not isinstance(vectors, dict) or not isinstance(vectors.get("size"), int):
            raise HttpFailure(400, "Format error in JSON body: this server wants one vector")
        if not 1 <= vectors["size"] <= 65536:
            raise HttpFailure(422, "Validation error in JSON body: [vectors.size: out of range]")
        if vectors.get("distance") not in _SCORES:
            raise HttpFailure(400, "Format error in JSON body: unknown distance")
        self.collections[name] = Collection(vectors["size"], vectors["distance"])
        return _answer(True)

    async def _drop(self, request: web.Request) -> web.Response:
        return _answer(self.collections.pop(_name(request), None) is not None)

    def _collection(self, request: web.Request) -> Collection:
        name = _name(request)
        if name not in self.collections:
            raise HttpFailure(404, f"Not found: Collection `{name}` doesn't exist!")
        return self.collections[name]

    # --- points ---------------------------------------------------------------------------------

    async def _upsert(self, request: web.Request) -> web.Response:
        size = len(RECEIVED.get().raw)
        if size > _LARGEST_REQUEST:
            raise HttpFailure(
                413,
                f"Payload error: JSON payload ({size} bytes) is larger than allowed "
                f"(limit: {_LARGEST_REQUEST} bytes).",
            )
        collection, body = self._collection(request), await json_object(request)
        # All or none: a point that does not fit keeps out those beside it.
        points = [_point(raw, collection) for raw in body.get("points") or []]
        collection.points.update({point.id: point for point in points})
        return _updated(request, collection)

    async def _retrieve(self, request: web.Request) -> web.Response:
        collection, body = self._collection(request), await json_object(request)
        ids = [_id(each) for each in body.get("ids") or []]
        found = [collection.points[each] for each in ids if each in collection.points]
        return _answer([_shown(point, body, with_payload=True) for point in found])

    async def _delete(self, request: web.Request) -> web.Response:
        collection, body = self._collection(request), await json_object(request)
        if "points" in body:
            ids = [_id(each) for each in body["points"]]
        elif "filter" in body:
            ids = [point.id for point in _matching(collection, body)]
        else:
            raise HttpFailure(400, "Format error in JSON body: neither points nor filter")
        for each in ids:
            collection.points.pop(each, None)
        return _updated(request, collection)

    async def _scroll(self, request: web.Request) -> web.Response:
        collection, body = self._collection(request), await json_object(request)
        points = _matching(collection, body)
        if body.get("offset") is not None:
            first = _order(_id(body["offset"]))
            points = [point for point in points if _order(point.id) >= first]
        limit = _limit(body)
        shown = [_shown(point, body, with_payload=True) for point in points[:limit]]
        following = points[limit].id if limit < len(points) else None
        return _answer({"points": shown, "next_page_offset": following})

    async def _query(self, request: web.Request) -> web.Response:
        collection, body = self._collection(request), await json_object(request)
        query = body.get("query")
        if isinstance(query, dict):
            query = query.get("nearest")
        vector = _vector(query, collection)
        score = _SCORES[collection.distance]
        scored = [(score(vector, point.vector), point) for point in _matching(collection, body)]
        nearest_first = collection.distance not in ("Euclid", "Manhattan")
        scored.sort(key=lambda pair: pair[0], reverse=nearest_first)
        if (threshold := body.get("score_threshold")) is not None:
            sign = 1 if nearest_first else -1
            scored = [pair for pair in scored if sign * pair[0] >= sign * threshold]
        offset = body.get("offset") or 0
        points = [
            {**_shown(point, body, with_payload=False), "version": 0, "score": value}
            for value, point in scored[offset : offset + _limit(body)]
        ]
        return _answer({"points": points})


# --- what is read out of requests ---------------------------------------------------------------


def _name(request: web.Request) -> str:
    name = request.match_info["name"]
    if len(name.encode()) > _LONGEST_NAME:
        raise _invalid_name(name, f"length must be between 1 and {_LONGEST_NAME}")
    return name


def _invalid_name(name: str, words: str) -> HttpFailure:
    return HttpFailure(
        422,
        f'Validation error in path parameters: [collection_name: value "{name}" invalid, {words}]',
    )


def _id(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64:
        return value
    if isinstance(value, str):
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    raise HttpFailure(
        400,
        f"Format error in JSON body: value {value} is not a valid point ID, "
        "valid values are either an unsigned integer or a UUID",
    )


def _order(point_id: int | str) -> tuple[bool, int]:
    if isinstance(point_id, int):
        return False, point_id
    return True, uuid.UUID(point_id).int


def _point(raw: dict[str, Any], collection: Collection) -> Point:
    return Point(
        _id(raw.get("id")), _vector(raw.get("vector"), collection), raw.get("payload") or {}
    )


def _vector(value: object, collection: Collection) -> list[float]:
    if not isinstance(value, list) or not all(isinstance(each, int | float) for each in value):
        raise HttpFailure(400, "Format error in JSON body: this server wants one dense vector")
    if len(value) != collection.size:
        raise HttpFailure(
            400,
            "Wrong input: Vector dimension error: "
            f"expected dim: {collection.size}, got {len(value)}",
        )
    length = math.sqrt(sum(each * each for each in value)) if collection.distance == "Cosine" else 1
    return array("f", (each / length for each in value) if length else value).tolist()


def _limit(body: dict[str, Any]) -> int:
    limit = body.get("limit", 10)
    if not isinstance(limit, int) or limit < 1:
        raise HttpFailure(
            422,
            f"Validation error in JSON body: [limit: value {limit} invalid, must be 1 or larger]",
        )
    return limit


def _matching(collection: Collection, body: dict[str, Any]) -> list[Point]:
    conditions = body.get("filter")
    points = collection.in_order()
    if not conditions:
        return points
    return [point for point in points if passes(conditions, point.id, point.payload)]


# --- what is answered ---------------------------------------------------------------------------


def _answer(result: object) -> web.Response:
    return as_response({"result": result, "status": "ok", "time": 0.0})


def _updated(request: web.Request, collection: Collection) -> web.Response:
    # What is not waited for happens at once here too, only the answer does not promise it.
    status = "completed" if request.query.get("wait") == "true" else "acknowledged"
    collection.operations += 1
    return _answer({"operation_id": collection.operations, "status": status})


def _shown(point: Point, body: dict[str, Any], *, with_payload: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": point.id}
    if body.get("with_payload", with_payload):
        shown["payload"] = point.payload
    if body.get("with_vector"):
        shown["vector"] = point.vector
    return shown


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True) if a and b)


_SCORES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "Cosine": _dot,
    "Dot": _dot,
    "Euclid": math.dist,
    "Manhattan": lambda one, other: sum(abs(a - b) for a, b in zip(one, other, strict=True)),
}

# What clients want to read of a collection's settings, at the service's defaults.
_CONFIG = {
    "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000},
    "optimizer_config": {
        "deleted_threshold": 0.2,
        "vacuum_min_vector_number": 1000,
        "default_segment_number": 0,
        "flush_interval_sec": 5,
    },
    "wal_config": {"wal_capacity_mb": 32, "wal_segments_ahead": 0},
}


def _client_version() -> str:
    from importlib.metadata import version

    return version("qdrant-client")
