"""Vectors and their payloads in plain Redis, for libraries that bring no storage of their own."""

from recallq_worker.vectors.replicas import Compared
from recallq_worker.vectors.rows import NEVER_FENCED, Row
from recallq_worker.vectors.store import RedisVectors

__all__ = ["NEVER_FENCED", "Compared", "RedisVectors", "Row"]
