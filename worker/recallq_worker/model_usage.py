"""What this process asks of models, LLMs and embedding models: how often, and for how many tokens.

A process runs one backend, so it counts for all of it: whoever asks a model enters each request
here as it ends, from whatever thread, and `recallq_worker.metrics` tells the sums.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ModelUsage:
    """Of one kind of model, since the process's start."""

    succeeded: int = 0
    failed: int = 0
    """Requests that brought no answer, or one that is of no use."""
    input_tokens: int = 0
    """As the provider counts them; what it does not say is not in here."""
    output_tokens: int = 0
    texts: int = 0
    """That were to be embedded."""
    cached_texts: int = 0
    """Of these, for which no model was asked: it had been, or was just being."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ended(self, *, failed: bool = False) -> None:
        """A request has come to its end."""
        with self._lock:
            if failed:
                self.failed += 1
            else:
                self.succeeded += 1

    def spent(self, input_tokens: int, output_tokens: int = 0) -> None:
        """What a provider said of a request."""
        with self._lock:
            self.input_tokens += input_tokens
            self.output_tokens += output_tokens

    def spent_as_told(self, usage: object) -> None:
        """The same by the ``usage`` of an answer in OpenAI's protocol, if there is one."""

        def number(name: str) -> int:
            found: Any = usage.get(name) if isinstance(usage, dict) else getattr(usage, name, None)
            return found if isinstance(found, int) else 0

        self.spent(number("prompt_tokens"), number("completion_tokens"))

    def embedded(self, texts: int, *, cached: int = 0) -> None:
        with self._lock:
            self.texts += texts
            self.cached_texts += cached


LLM_USAGE = ModelUsage()
EMBEDDING_USAGE = ModelUsage()
