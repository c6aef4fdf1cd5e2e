"""placeholder"""
from __future__ import annotations
from typing import Any
class Vectors:
    dimension: int
    def __getattr__(self, n: str) -> Any: ...
