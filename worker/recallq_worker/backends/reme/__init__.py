"""The ReMe backends: what ReMe's flows learn of a user (personal), or of how tasks are done (task).

Importing this package imports nothing of ReMe, which takes seconds and 200 MB: `loading` does that,
once a worker with such a backend starts.
"""

from __future__ import annotations

from recallq_worker.backends.reme.backend import RemePersonal, RemeTask

__all__ = ["RemePersonal", "RemeTask"]
