"""Queries of Elasticsearch's loopback server: which documents match, and how well."""

from __future__ import annotations

import math
import operator
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.loopback.elasticsearch_mapping import Field, Mapping, Terms, comparable, days
from tests.loopback.faults import HttpFailure

_COSINE = re.compile(r"cosineSimilarity\(params\.(\w+), '([\w.]+)'\) \+ 1\.0")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


@dataclass
class Document:
    id: str
    source: dict[str, Any]
    version: int = 1
    terms: Terms = field(default_factory=dict)


def score(query: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    """How well `document` matches; None if it does not. Refuses what it does not understand."""
    if len(query) != 1:
        raise refused("[_na] query malformed, must start with one query")
    ((name, body),) = query.items()
    if name not in _QUERIES:
        raise refused(f"unknown query [{name}]")
    return _QUERIES[name](body, document, mapping)


def refused(words: str, code: str = "parsing_exception") -> HttpFailure:
    return HttpFailure(400, words, code=code)


def _match_all(body: Any, document: Document, mapping: Mapping) -> float | None:
    return 1.0


def _bool(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    def scores(clause: str) -> list[float | None]:
        found = body.get(clause) or []
        queries = [found] if isinstance(found, dict) else found
        return [score(query, document, mapping) for query in queries]

    must, filters, should = scores("must"), scores("filter"), scores("should")
    if None in must or None in filters:
        return None
    if any(each is not None for each in scores("must_not")):
        return None
    needed = body.get("minimum_should_match", 0 if must or filters else min(1, len(should)))
    matching = [each for each in should if each is not None]
    if len(matching) < needed:
        return None
    # Without relevance: each match counts the same, and filters do not count.
    return float(sum(each for each in must if each is not None) + sum(matching))


def _term(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    ((name, value),) = body.items()
    if isinstance(value, dict):
        value = value["value"]
    return _found(name, [value], document, mapping)


def _terms(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    ((name, values),) = body.items()
    if not isinstance(values, list):
        raise refused(f"[terms] query does not support [{name}]")
    return _found(name, values, document, mapping)


def _found(name: str, values: list[Any], document: Document, mapping: Mapping) -> float | None:
    known = mapping.fields.get(name)
    if known is None:
        return None
    held = document.terms.get(name, set())
    return 1.0 if any(_is_held(name, known, value, held) for value in values) else None


def _is_held(name: str, known: Field, value: Any, held: set[object]) -> bool:
    if known.type in ("text", "keyword"):
        # As it stands, also where it is words that are held.
        return (str(value).lower() if isinstance(value, bool) else str(value)) in held
    if known.type == "date" and (span := days(value)) is not None:
        return any(span[0] <= each < span[1] for each in held)  # type: ignore[operator]
    if known.type == "long" and isinstance(value, float) and not value.is_integer():
        return False
    return _comparable(name, known, value) in held


def _comparable(name: str, known: Field, value: Any) -> Any:
    try:
        return comparable(known, value)
    except ValueError:
        if known.type == "date":
            words = f"failed to parse date field [{value}] with format [strict_date_optional_time]"
            raise refused(words, "parse_exception") from None
        words = f'failed to create query: For input string: "{value}"'
        raise refused(words, "query_shard_exception") from None


def _ids(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    return 1.0 if document.id in body["values"] else None


def _exists(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    return 1.0 if document.terms.get(body["field"]) else None


def _range(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    ((name, bounds),) = body.items()
    known = mapping.fields.get(name)
    if known is None:
        return None
    is_text = known.type in ("text", "keyword")
    wanted = [
        (_COMPARISONS[each], str(bound) if is_text else _comparable(name, known, bound))
        for each, bound in bounds.items()
    ]
    held = document.terms.get(name, set())
    return 1.0 if any(all(ok(term, bound) for ok, bound in wanted) for term in held) else None


def _script_score(body: dict[str, Any], document: Document, mapping: Mapping) -> float | None:
    if score(body["query"], document, mapping) is None:
        return None
    script = body["script"]
    found = _COSINE.fullmatch(script["source"])
    if found is None:
        raise refused("this server knows one script", "script_exception")
    vector, name = script["params"][found[1]], found[2]
    known = mapping.fields.get(name)
    if known is None or known.type != "dense_vector":
        raise refused(f"No field found for [{name}] in mapping", "script_exception")
    held: Any = next(iter(document.terms.get(name, ())), None)
    if held is None:
        raise refused("A document doesn't have a value for a vector field!", "script_exception")
    if len(vector) != known.dimensions:
        raise refused(
            f"The query vector has a different number of dimensions [{len(vector)}] than the "
            f"document vectors [{known.dimensions}].",
            "script_exception",
        )
    lengths = math.hypot(*vector) * math.hypot(*held)
    if not lengths:
        raise refused("script_score script returned an invalid score [NaN]", "script_exception")
    product = sum(a * b for a, b in zip(vector, held, strict=True))
    value: float = array("f", [product / lengths + 1.0])[0]
    return value


_QUERIES: dict[str, Callable[[Any, Document, Mapping], float | None]] = {
    "match_all": _match_all,
    "bool": _bool,
    "term": _term,
    "terms": _terms,
    "ids": _ids,
    "exists": _exists,
    "range": _range,
    "script_score": _script_score,
}
