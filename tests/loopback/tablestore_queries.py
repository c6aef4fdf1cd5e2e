"""Queries of a search index: which documents one finds, and how well each of them fits."""

from __future__ import annotations

import heapq
import math
import operator
import re
from array import array
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.message import DecodeError
from tablestore.protobuf import search_pb2 as pb

from tests.loopback.tablestore_errors import invalid
from tests.loopback.tablestore_index import Plain, SearchIndex, Vector, vector_of
from tests.loopback.tablestore_rows import Key, decode_value
from tests.loopback.tablestore_text import bm25, has_phrase

Hits = dict[Key, float]
"""Scores of what was found."""

TOP_K = 1000
_TERMS = 1024
_WILDCARD_CHARACTERS = 32
_PREFIX_BYTES = 1000


class Searcher:
    """Evaluates queries for an answer of up to `limit` rows."""

    def __init__(self, index: SearchIndex, limit: int) -> None:
        self.index = index
        self._limit = limit
        self._kinds: dict[int, tuple[Any, Callable[[Any], Hits]]] = {
            pb.MATCH_ALL_QUERY: (pb.MatchAllQuery, self._match_all),
            pb.MATCH_QUERY: (pb.MatchQuery, self._match),
            pb.MATCH_PHRASE_QUERY: (pb.MatchPhraseQuery, self._match_phrase),
            pb.TERM_QUERY: (pb.TermQuery, self._term),
            pb.TERMS_QUERY: (pb.TermsQuery, self._terms),
            pb.RANGE_QUERY: (pb.RangeQuery, self._range),
            pb.PREFIX_QUERY: (pb.PrefixQuery, self._prefix),
            pb.WILDCARD_QUERY: (pb.WildcardQuery, self._wildcard),
            pb.EXISTS_QUERY: (pb.ExistsQuery, self._exists),
            pb.BOOL_QUERY: (pb.BoolQuery, self._bool),
            pb.CONST_SCORE_QUERY: (pb.ConstScoreQuery, self._const_score),
            pb.FUNCTION_SCORE_QUERY: (pb.FunctionScoreQuery, self._function_score),
            pb.DIS_MAX_QUERY: (pb.DisMaxQuery, self._dis_max),
            pb.KNN_VECTOR_QUERY: (pb.KnnVectorQuery, self._knn),
        }

    def find(self, query: Any) -> Hits:
        kind = self._kinds.get(query.type)
        if kind is None:
            raise invalid(f"this type of query is not known here: {query.type}")
        message, evaluate = kind
        try:
            return evaluate(message.FromString(query.query))
        except DecodeError as error:
            raise invalid("failed to parse query") from error

    # --- fields ---------------------------------------------------------------------------------

    def _field(self, name: str) -> Any:
        schema = self.index.fields.get(name)
        if schema is None:
            raise invalid(f"field [{name}] does not exist in index [{self.index.name}]")
        if not schema.index:
            raise invalid(
                "failed to query index, please check if 'Index' is enabled for query fields."
            )
        return schema

    def _scalar(self, name: str) -> Any:
        schema = self._field(name)
        if schema.field_type == pb.VECTOR:
            raise invalid(f"vector field [{name}] only supports knn vector query")
        return schema

    def _text(self, name: str) -> Any:
        schema = self._scalar(name)
        if schema.field_type not in (pb.TEXT, pb.KEYWORD):
            raise invalid(f"field [{name}] is neither Text nor Keyword")
        return schema

    def _value(self, data: bytes, schema: Any) -> Plain:
        """Of a term; numbers may come as texts."""
        value = decode_value(data, schema.field_name)
        kind = schema.field_type
        try:
            if kind in (pb.KEYWORD, pb.TEXT) and isinstance(value, str):
                return value
            if kind == pb.LONG and not isinstance(value, bytes | bool):
                return int(value)
            if kind == pb.DOUBLE and not isinstance(value, bytes | bool):
                return float(value)
            if kind == pb.BOOLEAN and isinstance(value, bool):
                return value
        except ValueError:
            pass
        raise invalid(f"value of field [{schema.field_name}] is of another type than the field")

    # --- all, terms, ranges ---------------------------------------------------------------------

    def _match_all(self, query: Any) -> Hits:
        return dict.fromkeys(self.index.documents, 1.0)

    def _term(self, query: Any) -> Hits:
        schema = self._scalar(query.field_name)
        value = self._value(query.term, schema)
        if schema.field_type == pb.TEXT:
            return _sum([self._scored(schema.field_name, str(value))], 1, _weight(query))
        return self._holders(schema, [value], _weight(query))

    def _terms(self, query: Any) -> Hits:
        schema = self._scalar(query.field_name)
        if not 0 < len(query.terms) <= _TERMS:
            raise invalid(f"the number of terms must be in [1, {_TERMS}]")
        values = [self._value(each, schema) for each in query.terms]
        return self._holders(schema, values, _weight(query))

    def _holders(self, schema: Any, values: Iterable[Plain], weight: float) -> Hits:
        holders = self.index.postings[schema.field_name].holders
        return {key: weight for value in values for key in holders.get(value, ())}

    def _where(self, schema: Any, holds: Callable[[Any], bool], weight: float = 1.0) -> Hits:
        """Documents with a value, or a word, of which it holds."""
        holders = self.index.postings[schema.field_name].holders
        return {key: weight for value, keys in holders.items() if holds(value) for key in keys}

    def _range(self, query: Any) -> Hits:
        schema = self._scalar(query.field_name)
        low = self._value(query.range_from, schema) if query.HasField("range_from") else None
        high = self._value(query.range_to, schema) if query.HasField("range_to") else None
        with_low = not query.HasField("include_lower") or query.include_lower
        with_high = query.include_upper

        def holds(value: Any) -> bool:
            if low is not None and (value < low or (value == low and not with_low)):
                return False
            return high is None or value < high or (value == high and with_high)

        return self._where(schema, holds)

    def _prefix(self, query: Any) -> Hits:
        schema = self._text(query.field_name)
        if len(query.prefix.encode()) > _PREFIX_BYTES:
            raise invalid(f"the prefix is longer than {_PREFIX_BYTES} bytes")
        prefix = query.prefix
        return self._where(schema, lambda value: bool(value.startswith(prefix)), _weight(query))

    def _wildcard(self, query: Any) -> Hits:
        schema = self._text(query.field_name)
        if len(query.value) > _WILDCARD_CHARACTERS:
            raise invalid(f"the wildcard query is longer than {_WILDCARD_CHARACTERS}")
        pattern = "".join({"*": ".*", "?": "."}.get(each, re.escape(each)) for each in query.value)
        matches = re.compile(pattern, re.DOTALL).fullmatch
        return self._where(schema, lambda value: matches(value) is not None, _weight(query))

    def _exists(self, query: Any) -> Hits:
        name = self._field(query.field_name).field_name
        return {
            key: 1.0
            for key, document in self.index.documents.items()
            if document.plain.get(name) or name in document.vectors
        }

    # --- texts ----------------------------------------------------------------------------------

    def _match(self, query: Any) -> Hits:
        schema = self._text(query.field_name)
        name = schema.field_name
        analyzer = self.index.analyzers.get(name)
        if analyzer is None:
            return self._holders(schema, [query.text], _weight(query))
        words = list(dict.fromkeys(analyzer.query(query.text)))
        found = [self._scored(name, word) for word in words]
        needed = _minimum(query, len(words), 1)
        if query.operator == pb.AND:
            needed = len(words)
        return _sum(found, max(needed, 1), _weight(query))

    def _scored(self, name: str, word: str) -> Hits:
        postings = self.index.postings[name]
        holders = postings.holders.get(word, {})
        average = postings.length / postings.documents if postings.documents else 0.0
        documents = self.index.documents
        return {
            key: bm25(
                documents[key].words[name][word],
                documents[key].lengths[name],
                average,
                len(holders),
                postings.documents,
            )
            for key in holders
        }

    def _match_phrase(self, query: Any) -> Hits:
        schema = self._text(query.field_name)
        name = schema.field_name
        analyzer = self.index.analyzers.get(name)
        if analyzer is None:
            return self._holders(schema, [query.text], _weight(query))
        phrase = analyzer.sequence(query.text)
        scores = _sum(
            [self._scored(name, word) for word in dict.fromkeys(analyzer.query(query.text))],
            1,
            _weight(query),
        )
        return {
            key: scores.get(key, 1.0)
            for key, document in self.index.documents.items()
            if has_phrase(document.sequences.get(name, ()), phrase, query.slop)
        }

    # --- queries of queries ---------------------------------------------------------------------

    def _bool(self, query: Any) -> Hits:
        must = [self.find(each) for each in query.must_queries]
        filters = [self.find(each) for each in query.filter_queries]
        must_not = [self.find(each) for each in query.must_not_queries]
        should = [self.find(each) for each in query.should_queries]
        # As documented, the default depends on all other clauses, negative ones too.
        needed = _minimum(query, len(should), 0 if must or filters or must_not else 1)
        chosen = _sum(should, needed, 1.0) if should else {}
        required = [*must, *filters]
        if should and needed > 0:
            required.append(chosen)
        keys = min(required, key=len) if required else self.index.documents
        weight = _weight(query)
        return {
            key: weight * (sum(hits[key] for hits in must) + chosen.get(key, 0.0))
            for key in keys
            if all(key in hits for hits in required) and not any(key in each for each in must_not)
        }

    def _const_score(self, query: Any) -> Hits:
        return dict.fromkeys(self.find(query.filter), 1.0)

    def _function_score(self, query: Any) -> Hits:
        schema = self._scalar(query.field_value_factor.field_name)
        if schema.field_type not in (pb.LONG, pb.DOUBLE):
            raise invalid(f"field [{schema.field_name}] is no number")
        documents = self.index.documents
        return {
            key: score * float(next(iter(documents[key].plain.get(schema.field_name, ())), 1.0))
            for key, score in self.find(query.query).items()
        }

    def _dis_max(self, query: Any) -> Hits:
        best: Hits = {}
        total: Hits = {}
        for each in query.queries:
            for key, score in self.find(each).items():
                best[key] = max(best.get(key, -math.inf), score)
                total[key] = total.get(key, 0.0) + score
        weight = _weight(query)
        return {
            key: weight * (score + query.tie_breaker * (total[key] - score))
            for key, score in best.items()
        }

    # --- vectors --------------------------------------------------------------------------------

    def _knn(self, query: Any) -> Hits:
        schema = self._field(query.field_name)
        if schema.field_type != pb.VECTOR:
            raise invalid(f"field [{query.field_name}] is no Vector")
        dimension = schema.vector_options.dimension
        if len(query.float32_query_vector) != dimension:
            raise invalid(
                f"the dimension of the query vector is {len(query.float32_query_vector)},"
                f" that of field [{query.field_name}] is {dimension}"
            )
        if not 1 <= query.top_k <= TOP_K:
            raise invalid(f"top_k must be in [1, {TOP_K}]")
        # As documented, the limit of the search takes the place of a smaller top_k.
        top_k = max(query.top_k, self._limit)
        wanted = vector_of(array("f", query.float32_query_vector))
        metric = schema.vector_options.metric_type
        among: Iterable[Key] = self.index.documents
        if query.HasField("filter"):
            among = self.find(query.filter)
        weight = _weight(query)
        scores = (
            (weight * similarity(wanted, vector, metric), key)
            for key in among
            if (vector := self.index.documents[key].vectors.get(schema.field_name)) is not None
        )
        if query.HasField("min_score"):
            scores = (each for each in scores if each[0] >= query.min_score)
        best = heapq.nsmallest(top_k, scores, key=lambda each: (-each[0], each[1]))
        return {key: score for score, key in best}


def similarity(one: Vector, other: Vector, metric: int) -> float:
    """The score of a vector.

    The documentation shows the formulas as pictures only; these are those of Lucene's
    ``VectorSimilarityFunction``, whose metrics are the same three: ``1 / (1 + d²)`` for Euclidean,
    ``(1 + a·b) / 2`` for the dot product, and the same of the cosine.
    """
    if metric == pb.VM_EUCLIDEAN:
        distance = sum((a - b) ** 2 for a, b in zip(one.values, other.values, strict=True))
        return 1 / (1 + distance)
    product: float = sum(map(operator.mul, one.values, other.values))
    if metric == pb.VM_COSINE:
        lengths = math.sqrt(one.square * other.square)
        product = product / lengths if lengths else 0.0
    return (1 + product) / 2


def _weight(query: Any) -> float:
    return float(query.weight) if query.HasField("weight") else 1.0


def _sum(found: list[Hits], needed: int, weight: float) -> Hits:
    """What at least `needed` of them found, with the sum of the scores."""
    total: Hits = {}
    counts: dict[Key, int] = {}
    for hits in found:
        for key, score in hits.items():
            total[key] = total.get(key, 0.0) + weight * score
            counts[key] = counts.get(key, 0) + 1
    return {key: score for key, score in total.items() if counts[key] >= needed}


def _minimum(query: Any, clauses: int, default: int) -> int:
    """``minimum_should_match``: a number or a percentage; negative: how many may be missing."""
    if query.HasField("new_minimum_should_match"):
        text = query.new_minimum_should_match.strip()
        if not re.fullmatch(r"-?\d+%?", text):
            raise invalid(f"invalid minimum_should_match: {text}")
        number = int(text.rstrip("%"))
        if text.endswith("%"):
            number = int(clauses * number / 100)
        return clauses + number if text.startswith("-") else number
    return int(query.minimum_should_match) if query.HasField("minimum_should_match") else default
