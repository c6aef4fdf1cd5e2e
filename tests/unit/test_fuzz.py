"""Readers of what others wrote; see `tests.fuzz`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=150, database=None)
@given(data=st.data())
def test_whatever_it_reads_it_says_so_by_its_own_error(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    value: Any = data.draw(target.inputs)
    target.use(value)
