"""The mem0 backend: memories that mem0 extracts, by its open-source library or its platform.

mem0 reads its environment as it is imported: where to keep a file of its own, and whether to tell
its makers what it does. It shall keep nothing and tell nothing, so that is settled here, before any
module of this package imports it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["MEM0_TELEMETRY"] = "False"
if "MEM0_DIR" not in os.environ:
    _directory = tempfile.mkdtemp(prefix="recallq-mem0-")
    os.environ["MEM0_DIR"] = _directory
    atexit.register(shutil.rmtree, _directory, ignore_errors=True)

from recallq_worker.backends.mem0.backend import Mem0Backend

__all__ = ["Mem0Backend"]
