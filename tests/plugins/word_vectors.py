"""An embedding model that knows words: texts are similar as far as they share some.

Each word has a direction of its own, nearly; ``dog`` and ``hound`` have the same, and so have the
words of each other pair of synonyms, so that there is something to be found by meaning alone. On a
worker's path, ``RECALLQ_EMBEDDING_CALLABLE=word_vectors:embed`` names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

DIMENSIONS = 256
_SYNONYMS = {"hound": "dog", "automobile": "car", "ocean": "sea"}


def vector_of(text: str) -> npt.NDArray[np.float32]:
    vector = np.zeros(DIMENSIONS, dtype=np.float32)
    for word in re.findall(r"\w+", text.lower()):
        vector[crc32(_SYNONYMS.get(word, word).encode()) % DIMENSIONS] += 1
    return vector


def embed(texts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
    return [vector_of(text) for text in texts]
