"""The search index: made or checked at the start, and the queries that go to it.

It follows the table in its own time, within seconds as a rule, so nothing but searching goes by it,
and what it returns is held against the user's fences: what was deleted is not found, even while the
index still has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recallq.contract import Scope
from recallq.errors import BackendError, ConfigurationError
from recallq.keys import escape
from recallq_worker.backends.tablestore.client import asking
from recallq_worker.backends.tablestore.rows import (
    EMBEDDED,
    EPOCH,
    ORDER,
    OWNER,
    PLACE,
    READ,
    SESSION,
    Columns,
    Fences,
    Key,
    owner_of,
)
from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.backends.tablestore.table import Table

if TYPE_CHECKING:
    from tablestore import FieldSchema, Query

_MOST_HITS = 100
"""Of one request, where columns come from the table."""
_MOST_NEIGHBOURS = 1000
"""What a query for vectors may ask for at all."""
_MOST_QUERY = 500
"""Characters of a query that are looked for: its words are clauses, and those are limited."""
_HARDLY = 1e-6
_MOST_SESSIONS = 100
"""Fences of sessions that a query names; what is behind the others is sorted out afterwards."""


@dataclass(frozen=True, slots=True)
class Found:
    """A row that a search found."""

    place: str
    columns: Columns
    score: float


class SearchIndex:
    """The index of one table that serves one strategy."""

    def __init__(self, table: Table, settings: TablestoreSettings, dimension: int | None) -> None:
        """`dimension` of the vectors; None for full text."""
        self._table = table
        self._settings = settings
        self._dimension = dimension
        self.name = settings.index_name

    # --- at the start ---------------------------------------------------------------------------

    async def open(self) -> None:
        """Makes the index, or checks the one that is there. Raises `ConfigurationError`."""
        import tablestore as ots

        client, table = self._table.client, self._table.name
        if not await self._is_there():
            made = ots.SearchIndexMeta(self._schema())
            try:
                await asking(lambda: client.create_search_index(table, self.name, made))
            except BackendError:
                if not await self._is_there():  # or another worker was faster
                    raise
            else:
                return
        found, _ = await asking(lambda: client.describe_search_index(table, self.name))
        self._check({field.field_name: field for field in found.fields})

    async def _is_there(self) -> bool:
        # By the list: what asking for one that does not exist is answered, differs.
        names = await asking(lambda: self._table.client.list_search_index(self._table.name))
        return any(name == self.name for _, name in names)

    def _schema(self) -> list[FieldSchema]:
        import tablestore as ots

        settings = self._settings
        keyword, number = ots.FieldType.KEYWORD, ots.FieldType.LONG
        fields = [
            ots.FieldSchema(OWNER, keyword, index=True, enable_sort_and_agg=True),
            ots.FieldSchema(PLACE, keyword, index=True, enable_sort_and_agg=True),
            ots.FieldSchema(SESSION, keyword, index=True),
            ots.FieldSchema(ORDER, number, index=True, enable_sort_and_agg=True),
            ots.FieldSchema(EPOCH, number, index=True),
        ]
        if self._dimension is None:
            # Chinese in words of every length, as agentscope-runtime's tables have it.
            analyzer = ots.AnalyzerType.MAXWORD
            text = settings.text_field
            return [*fields, ots.FieldSchema(text, ots.FieldType.TEXT, analyzer=analyzer)]
        options = ots.VectorOptions(
            data_type=ots.VectorDataType.VD_FLOAT_32,
            metric_type=_metric(settings),
            dimension=self._dimension,
        )
        vector = settings.embedding_field
        return [
            *fields,
            ots.FieldSchema(EMBEDDED, number, index=True),
            ots.FieldSchema(vector, ots.FieldType.VECTOR, vector_options=options),
        ]

    def _check(self, there: dict[str, FieldSchema]) -> None:
        """Whether the index that is there does. It is never changed."""
        for wanted in self._schema():
            found = there.get(wanted.field_name)
            if found is None or found.field_type != wanted.field_type:
                raise self._unfit(
                    f"it has no field {wanted.field_name} of type {wanted.field_type.name.lower()}"
                )
            options = found.vector_options
            if wanted.vector_options is None or options is None:
                continue
            if options.dimension != self._dimension:
                raise self._unfit(
                    f"its vectors have {options.dimension} dimensions, and those of the embedding "
                    f"model have {self._dimension}"
                )
            metric = _metric(self._settings)
            if options.metric_type != metric:
                raise self._unfit(
                    f"it compares vectors by {ots_name(options.metric_type)}, and "
                    f"{ots_name(metric)} is configured"
                )

    def _unfit(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"search index {self.name} of table {self._table.name} in Tablestore does not fit: "
            f"{reason}. It is left as it is: change the configuration, or name another index with "
            "RECALLQ_TABLESTORE_SEARCH_INDEX_NAME"
        )

    # --- searching ------------------------------------------------------------------------------

    async def by_text(self, scope: Scope, query: str, fences: Fences, most: int) -> list[Found]:
        """Rows whose text has words of the query, best first, the later of equals first."""
        import tablestore as ots

        matching = ots.MatchQuery(self._settings.text_field, query[:_MOST_QUERY])
        where, unless = self._within(scope, fences)
        whole = ots.BoolQuery(
            must_queries=[matching], filter_queries=where, must_not_queries=unless
        )
        return await self._found(whole, most)

    async def by_vector(
        self,
        scope: Scope,
        vector: Sequence[float],
        fences: Fences,
        most: int,
        min_score: float | None,
    ) -> list[Found]:
        """Rows whose vectors are nearest, nearest first; 1,000 at most. Some may score less than
        `min_score`."""
        import tablestore as ots

        where, unless = self._within(scope, fences)
        nearest = ots.KnnVectorQuery(
            self._settings.embedding_field,
            top_k=min(most, _MOST_NEIGHBOURS),
            float32_query_vector=list(vector),
            filter=ots.BoolQuery(filter_queries=where, must_not_queries=unless),
            # Tablestore takes none below zero, and leaves out what scores just as much.
            min_score=min_score - _HARDLY
            if min_score is not None and min_score > _HARDLY
            else None,
        )
        return await self._found(nearest, min(most, _MOST_NEIGHBOURS))

    def _within(self, scope: Scope, fences: Fences) -> tuple[list[Query], list[Query]]:
        """What is the scope's, and what of it was deleted."""
        import tablestore as ots

        where: list[Query] = [ots.TermQuery(OWNER, owner_of(scope.tenant, scope.user_id))]
        lowest = fences.whole
        later = fences.later
        if scope.session_id is not None:
            session = escape(scope.session_id)
            where.append(ots.TermQuery(SESSION, session))
            lowest, later = fences.of(session), {}
        if lowest:
            where.append(ots.RangeQuery(EPOCH, range_from=lowest, include_lower=True))
        latest = sorted(later.items(), key=lambda each: -each[1])[:_MOST_SESSIONS]
        unless: list[Query] = [
            ots.BoolQuery(
                filter_queries=[
                    ots.TermQuery(SESSION, session),
                    ots.RangeQuery(EPOCH, range_to=epoch, include_upper=False),
                ]
            )
            for session, epoch in latest
        ]
        return where, unless

    async def _found(self, query: Query, most: int) -> list[Found]:
        import tablestore as ots

        latest_first = ots.FieldSort(ORDER, ots.SortOrder.DESC)
        sort: Any = ots.Sort([ots.ScoreSort(ots.SortOrder.DESC), latest_first])
        columns = ots.ColumnsToGet(list(READ), ots.ColumnReturnType.SPECIFIED)
        found: list[Found] = []
        token: bytes | None = None
        while len(found) < most:
            # A token remembers the order of the results, and refuses to be told it again.
            search = ots.SearchQuery(
                query,
                sort=None if token else sort,
                limit=min(most - len(found), _MOST_HITS),
                next_token=token,
            )
            answer = await asking(
                lambda search=search: self._table.client.search(  # type: ignore[misc]  # bound now
                    self._table.name, self.name, search, columns
                )
            )
            for hit in answer.search_hits:
                keys, attributes = hit.row[0], hit.row[1]
                row = {name: value for name, value, *_ in attributes}
                found.append(Found(keys[1][1], row, float(hit.score or 0.0)))
            token = answer.next_token
            if not token:
                break
        return found

    async def shown(self, keys: Sequence[Key]) -> dict[Key, int]:
        """Those of up to a hundred rows that a search can find by now, with their epochs."""
        import tablestore as ots

        where: list[Query] = [ots.TermsQuery(PLACE, sorted({place for _, place in keys}))]
        if self._dimension is not None:
            where.append(ots.TermQuery(EMBEDDED, 1))
        search = ots.SearchQuery(ots.BoolQuery(filter_queries=where), limit=_MOST_HITS)
        columns = ots.ColumnsToGet([EPOCH], ots.ColumnReturnType.SPECIFIED)
        answer = await asking(
            lambda: self._table.client.search(self._table.name, self.name, search, columns)
        )
        return {
            (keys[0][1], keys[1][1]): attributes[0][1]
            for keys, attributes in (row[:2] for row in answer.rows)
            if attributes
        }

    async def ping(self) -> None:
        """Whether the index can be searched. Raises as all calls do."""
        await self.shown([("0000-health", "none")])


def _metric(settings: TablestoreSettings) -> Any:
    import tablestore as ots

    return ots.VectorMetricType[f"VM_{settings.vector_metric_type.upper()}"]


def ots_name(metric: Any) -> str:
    """A metric as the settings call it."""
    import tablestore as ots

    return str(ots.VectorMetricType(metric).name).removeprefix("VM_").lower()
