"""A worker of a later version: it reads the next protocol as well as today's."""

from __future__ import annotations

from recallq import contract
from recallq_worker.backends.redis import RedisStore
from tests.plugins.obedient_backend import ObedientExtractor

NEXT = contract.PROTOCOL_VERSION + 1
contract.PROTOCOL_VERSION = NEXT


class TomorrowsStore(RedisStore):
    """The same memories as today."""


class TomorrowsExtractor(ObedientExtractor):
    """It extracts as today."""
