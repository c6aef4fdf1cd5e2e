"""What an embedder is: one provider's way from texts to vectors, a request at a time.

Joining the texts of many callers into requests, trying again, pausing and remembering are the
batcher's work (`batcher`), so a provider does nothing of it. Whatever library it uses, its errors
end here, without their words, which may quote keys and what users said. Nor are they chained: the
libraries' errors hold the whole request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from recallq.errors import BackendError, BackendUnavailable

Vector: TypeAlias = npt.NDArray[np.float32]
"""One-dimensional, and read-only, since callers and caches share it: ``tobytes()`` for Redis,
``tolist()`` for JSON."""


class Kind(Enum):
    """What a text is to search. Some models make other vectors of a query than of a document."""

    DOCUMENT = "document"
    QUERY = "query"


@dataclass(frozen=True, slots=True)
class Embedded:
    """What came of one request."""

    vectors: list[Vector]
    """In the order of the texts."""
    tokens: int
    """As the provider counts them; 0 where it does not say."""


class Refused(BackendError):
    """The provider refuses the request for what is in it: perhaps for a single one of its texts."""


class Throttled(BackendUnavailable):
    """The provider takes no more requests for now."""


class Embedder(Protocol):
    """One model of one provider."""

    @property
    def model(self) -> str: ...

    @property
    def dimensions(self) -> int:
        """What every vector has."""
        ...

    @property
    def most_texts(self) -> int:
        """How many texts a request may bring."""
        ...

    @property
    def most_request_tokens(self) -> int | None:
        """How many tokens a request may bring altogether, about. None: no limit is known.

        A text that is too long by itself is sent as it is: what the provider refuses fails for
        whoever wants it, and nothing is cut off in silence.
        """
        ...

    @property
    def most_at_once(self) -> int | None:
        """How many requests may run at once; None leaves it to the batcher."""
        ...

    @property
    def account(self) -> str:
        """The same for all that share a rate limit; says nothing of the key."""
        ...

    async def start(self) -> None:
        """Loads the library, on the event loop that will use it, and does not block it.

        Raises `MissingExtra`, `ConfigurationError`.
        """
        ...

    async def stop(self) -> None:
        """Closes connections. May be called more than once, also without a start."""
        ...

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        """One request for at most `most_texts` texts, which are not empty.

        Raises `BackendUnavailable` (`Throttled` where the provider says so) where a later try may
        succeed, `Refused` where the texts may be to blame, and `BackendError` where no request
        would succeed.
        """
        ...


def as_vectors(rows: Sequence[Any], *, texts: int, dimensions: int, doing: str) -> list[Vector]:
    """The vectors of an answer, checked: one per text, of the right size, all numbers finite.

    Another number of vectors, or something else than vectors, is a fault of the moment; other
    dimensions are a wrong setting; and what is not a finite number comes of a text.
    """
    if len(rows) != texts:
        raise BackendUnavailable(f"{doing}: {len(rows)} vectors came for {texts} texts")
    unreadable = f"{doing}: the answer holds something else than vectors"
    vectors: list[Vector] = []
    for row in rows:
        try:
            with np.errstate(over="ignore"):
                vector = np.array(row, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise BackendUnavailable(unreadable) from None
        if vector.ndim != 1:
            raise BackendUnavailable(unreadable)
        if vector.size != dimensions:
            raise BackendError(
                f"{doing}: its vectors have {vector.size} dimensions where {dimensions} are "
                f"expected; set RECALLQ_EMBEDDING_DIMENSIONS to what the model has"
            )
        if not np.isfinite(vector).all():
            raise Refused(f"{doing}: a vector holds something else than finite numbers")
        vector.flags.writeable = False
        vectors.append(vector)
    return vectors
