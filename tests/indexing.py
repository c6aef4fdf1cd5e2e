"""How single messages stand in a search index, for tests that look into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from recallq_worker.search.entries import encode_entries
from recallq_worker.search.terms import Weighed, weigh


class Analysis(NamedTuple):
    weights: dict[int, int]
    usual: int
    text: str


def analyze(message: Mapping[str, Any]) -> Analysis:
    """The terms of a message, with their weights."""
    weighed = weigh([message])
    weights = dict(zip(weighed.terms.tolist(), weighed.weights.tolist(), strict=True))
    return Analysis(weights, int(weighed.usual[0]), weighed.texts[0])


def encode_entry(session_id: str, order: int, weights: Mapping[int, int], usual: int = 0) -> bytes:
    """The entry of a message that has these terms."""
    weighed = Weighed(
        [""],
        np.array([usual], "u1"),
        np.zeros(len(weights), np.int64),
        np.array(list(weights), "<u4"),
        np.array(list(weights.values()), "u1"),
    )
    return encode_entries([session_id], [order], weighed)[0]
