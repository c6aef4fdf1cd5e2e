"""Mappings of Elasticsearch's loopback server: an index's fields, and what is found in them.

A field that a mapping does not name gets its type from the first value that is seen there, for
good: text of which words can be found, with the whole beside it under ``.keyword``; a date, if it
looks like one; a number. What does not fit the type later is refused with its whole document.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.loopback.faults import HttpFailure

_MOST_FIELDS = 1000
_MOST_DIMENSIONS = 4096
_LONGEST_TERM = 32766
_LONGEST_WORD = 255
_KEYWORD_BESIDE_TEXT = 256

_WORDS = re.compile(r"\w+(?:[.'’]\w+)*")
_CJK = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
)
_DATE = re.compile(
    r"(?P<year>\d{4})(?:-(?P<month>\d\d)(?:-(?P<day>\d\d)(?:T(?:(?P<hour>\d\d)(?::(?P<minute>\d\d)"
    r"(?::(?P<second>\d\d)(?:[.,]\d{1,9})?)?)?)?(?P<zone>Z|[+-]\d\d(?::?\d\d)?)?)?)?)?"
)
_DATE_WITH_SLASHES = re.compile(
    r"(?P<year>\d{4})/(?P<month>\d\d)/(?P<day>\d\d)"
    r"(?: (?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)(?P<zone>))?"
)
_TYPES = {"text", "keyword", "long", "integer", "float", "double", "boolean", "date", "object"}


@dataclass
class Field:
    type: str
    ignore_above: int | None = None
    """Keywords that are longer are not found."""
    dimensions: int = 0
    parts: tuple[str, ...] = ()
    """The fields under it, such as ``keyword``, that hold the same value in another way."""


@dataclass
class Mapping:
    """The fields of an index, by their full names."""

    fields: dict[str, Field] = field(default_factory=dict)
    dynamic: str = "true"
    date_detection: bool = True
    templates: list[dict[str, Any]] = field(default_factory=list)

    def copy(self) -> Mapping:
        return Mapping(dict(self.fields), self.dynamic, self.date_detection, self.templates)


def read_mapping(raw: dict[str, Any]) -> Mapping:
    """What is said when an index is created."""
    mapping = Mapping(
        dynamic=str(raw.get("dynamic", "true")).lower(),
        date_detection=raw.get("date_detection", True),
        templates=[next(iter(each.values())) for each in raw.get("dynamic_templates", [])],
    )
    _add_properties(mapping, raw.get("properties", {}), "")
    return mapping


def _add_properties(mapping: Mapping, properties: dict[str, Any], prefix: str) -> None:
    for name, raw in properties.items():
        _add_field(mapping, prefix + name, raw)
        _add_properties(mapping, raw.get("properties", {}), f"{prefix}{name}.")


def _add_field(mapping: Mapping, name: str, raw: dict[str, Any]) -> None:
    kind = raw.get("type", "object")
    if kind == "dense_vector":
        size = raw.get("dims", 0)
        if not 1 <= size <= _MOST_DIMENSIONS:
            raise HttpFailure(
                400,
                "The number of dimensions should be in the range "
                f"[1, {_MOST_DIMENSIONS}] but was [{size}]",
                code="mapper_parsing_exception",
            )
        mapping.fields[name] = Field(kind, dimensions=size)
        return
    if kind not in _TYPES:
        words = f"No handler for type [{kind}] declared on field [{name}]"
        raise HttpFailure(400, words, code="mapper_parsing_exception")
    if len(mapping.fields) >= _MOST_FIELDS:
        raise HttpFailure(
            400,
            f"Limit of total fields [{_MOST_FIELDS}] has been exceeded while adding new fields [1]",
            code="document_parsing_exception",
        )
    beside = raw.get("fields", {})
    mapping.fields[name] = Field(kind, raw.get("ignore_above"), parts=tuple(beside))
    for part, sub in beside.items():
        mapping.fields[f"{name}.{part}"] = Field(sub["type"], sub.get("ignore_above"))


# --- what is found ------------------------------------------------------------------------------

Terms = dict[str, set[object]]
"""By the full name of the field."""


def index_document(mapping: Mapping, source: dict[str, Any]) -> Terms:
    """What a document is found by; adds the fields that are new to `mapping`."""
    terms: Terms = {}
    for name, value in _leaves(mapping, source, ""):
        known = mapping.fields.get(name)
        if known is None:
            if mapping.dynamic == "false":
                continue
            if mapping.dynamic == "strict":
                raise HttpFailure(
                    400,
                    f"[1:1] mapping set to strict, dynamic introduction of [{name}] is not allowed",
                    code="strict_dynamic_mapping_exception",
                )
            _add_field(mapping, name, _dynamic(mapping, name, value))
            known = mapping.fields[name]
        if known.type == "dense_vector":
            terms[name] = {_vector(value, known)}
            continue
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                _add_terms(mapping, terms, name, known, each)
    return terms


def _leaves(mapping: Mapping, value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for part, each in value.items():
        if not part.strip():
            words = "field name cannot contain only whitespace"
            raise HttpFailure(400, words, code="document_parsing_exception")
        name = prefix + part
        known = mapping.fields.get(name)
        if isinstance(each, dict):
            if known is not None and known.type != "object":
                raise _unfit(name, known, each)
            mapping.fields.setdefault(name, Field("object"))
            yield from _leaves(mapping, each, f"{name}.")
        elif known is not None and known.type == "object" and each is not None:
            raise HttpFailure(
                400,
                f"[1:1] object mapping for [{name}] tried to parse field [{part}] as object, "
                "but found a concrete value",
                code="document_parsing_exception",
            )
        elif each is not None and each != []:
            yield name, each


def _dynamic(mapping: Mapping, name: str, value: Any) -> dict[str, Any]:
    """What the first value of a field makes of it."""
    if isinstance(value, list):
        value = next((each for each in value if each is not None), "")
    kinds: dict[type, str] = {bool: "boolean", int: "long", float: "double", str: "string"}
    kind = kinds.get(type(value), "object")
    if kind == "string" and mapping.date_detection and _looks_like_a_date(value):
        kind = "date"
    for template in mapping.templates:
        if template.get("match_mapping_type", kind) in (kind, "*"):
            chosen: dict[str, Any] = template["mapping"]
            return chosen
    if kind == "string":
        beside = {"type": "keyword", "ignore_above": _KEYWORD_BESIDE_TEXT}
        return {"type": "text", "fields": {"keyword": beside}}
    if kind == "long" and not -(2**63) <= value < 2**63:
        words = (
            f"[1:1] failed to parse field [{name}]: No matching token for number_type [BIG_INTEGER]"
        )
        raise HttpFailure(400, words, code="document_parsing_exception")
    return {"type": "float" if kind == "double" else kind}


def _looks_like_a_date(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return _date(value) is not None
    return False  # pure numbers are no dates, though "2024" could be read as one


def _add_terms(mapping: Mapping, terms: Terms, name: str, known: Field, value: object) -> None:
    terms.setdefault(name, set()).update(_terms(name, known, value))
    for part in known.parts:
        beside = f"{name}.{part}"
        terms.setdefault(beside, set()).update(_terms(name, mapping.fields[beside], value))


def _terms(name: str, known: Field, value: object) -> Iterator[object]:
    text = _text(value)
    if known.type == "text":
        yield from words(text)
    elif known.type == "keyword":
        if known.ignore_above is not None and len(text) > known.ignore_above:
            return
        if len(text.encode(errors="surrogatepass")) > _LONGEST_TERM:
            raise HttpFailure(
                400,
                f'Document contains at least one immense term in field="{name}"',
                code="illegal_argument_exception",
            )
        yield text
    else:
        try:
            yield comparable(known, value)
        except ValueError:
            raise _unfit(name, known, value) from None


def words(text: str) -> list[str]:
    """As the standard analyzer makes them: in lower case, what lies between the punctuation."""
    found = [part for word in _WORDS.findall(text.lower()) for part in _CJK.findall(word)]
    return [
        word[at : at + _LONGEST_WORD] for word in found for at in range(0, len(word), _LONGEST_WORD)
    ]


def comparable(known: Field, value: object) -> object:
    """A value as a field that is neither text nor vector holds it; else a `ValueError`."""
    if known.type == "boolean":
        if not isinstance(value, bool | str) or value not in (True, False, "true", "false", ""):
            raise ValueError(value)
        return value in (True, "true")
    if known.type == "date":
        date = _date(value)
        if date is None:
            raise ValueError(value)
        return date[0]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    if not math.isfinite(float(value)):
        raise ValueError(value)
    if known.type in ("long", "integer"):
        whole = int(value) if isinstance(value, int) else math.trunc(float(value))
        if not -(2**63) <= whole < 2**63:
            raise ValueError(value)
        return whole
    number = float(value)
    return array("f", [number])[0] if known.type == "float" else number


def days(value: object) -> tuple[datetime, datetime] | None:
    """What a date covers: from when until when, which is not part of it."""
    return _date(value)


def _date(value: object) -> tuple[datetime, datetime] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        at = datetime.fromtimestamp(value / 1000, UTC)
        return at, at + timedelta(milliseconds=1)
    if not isinstance(value, str):
        return None
    found = _DATE.fullmatch(value) or _DATE_WITH_SLASHES.fullmatch(value)
    if found is None:
        return None
    parts = {name: part for name, part in found.groupdict().items() if part and name != "zone"}
    try:
        start = datetime(
            int(parts["year"]),
            int(parts.get("month", 1)),
            int(parts.get("day", 1)),
            int(parts.get("hour", 0)),
            int(parts.get("minute", 0)),
            int(parts.get("second", 0)),
            tzinfo=UTC,
        )
    except ValueError:
        return None
    if (zone := found["zone"]) and zone != "Z":
        offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]) if len(zone) > 3 else 0)
        start -= offset if zone[0] == "+" else -offset
    lengths = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "month": 31 * 86400}
    finest = next((name for name in lengths if name in parts), None)
    return start, start + timedelta(seconds=lengths[finest] if finest else 365 * 86400)


def _vector(value: object, known: Field) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != known.dimensions:
        raise HttpFailure(
            400,
            "[1:1] failed to parse: The [dense_vector] field has a different number of dimensions "
            f"than defined in the mapping [{known.dimensions}]",
            code="document_parsing_exception",
        )
    vector = tuple(array("f", value))
    if not any(vector):
        raise HttpFailure(
            400,
            "[1:1] failed to parse: The [cosine] similarity does not support vectors with zero "
            "magnitude.",
            code="document_parsing_exception",
        )
    return vector


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _unfit(name: str, known: Field, value: object) -> HttpFailure:
    return HttpFailure(
        400,
        f"[1:1] failed to parse field [{name}] of type [{known.type}]. "
        f"Preview of field's value: '{_text(value)[:50]}'",
        code="document_parsing_exception",
    )
