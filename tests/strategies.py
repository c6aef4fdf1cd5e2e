"""Generated inputs that several tests share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

text: SearchStrategy[str] = st.text(st.characters(codec="utf-8"))
"""Any text that can be written as UTF-8: no lone surrogates."""

ids: SearchStrategy[str] = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
"""What a user, session or tenant may be called."""

json_values: SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
"""Any JSON value that orjson can write."""

json_objects: SearchStrategy[dict[str, Any]] = st.dictionaries(text, json_values, max_size=5)
