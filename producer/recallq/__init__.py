"""RecallQ: long-term memory for fleets of AI agents, behind a task queue.

What an agent process or an ingestion job imports. The workers are `recallq_worker`.
"""

from recallq.client import MemoryClient
from recallq.contract import (
    AddResult,
    DeleteResult,
    Health,
    Hit,
    JobState,
    Lane,
    StoredMessage,
    Wait,
)
from recallq.dead_letters import DeadLetter
from recallq.errors import (
    AccessDenied,
    BackendError,
    BackendUnavailable,
    ClientClosed,
    ConfigurationError,
    InternalError,
    InvalidInput,
    JobCancelled,
    JobError,
    JobExpired,
    JobFailed,
    JobTimeout,
    MissingExtra,
    QueueFull,
    RecallQError,
    ResultWithdrawn,
    ServiceUnavailable,
    UndecodableJob,
    UnknownJob,
    WorkerLost,
    WrongBackend,
)
from recallq.factory import MemoryServiceFactory
from recallq.handle import JobHandle
from recallq.messages import (
    AudioPart,
    ContentPart,
    DataPart,
    FilePart,
    ImagePart,
    Message,
    RefusalPart,
    TextPart,
)
from recallq.settings import ClientSettings

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "AddResult",
    "AudioPart",
    "BackendError",
    "BackendUnavailable",
    "ClientClosed",
    "ClientSettings",
    "ConfigurationError",
    "ContentPart",
    "DataPart",
    "DeadLetter",
    "DeleteResult",
    "FilePart",
    "Health",
    "Hit",
    "ImagePart",
    "InternalError",
    "InvalidInput",
    "JobCancelled",
    "JobError",
    "JobExpired",
    "JobFailed",
    "JobHandle",
    "JobState",
    "JobTimeout",
    "Lane",
    "MemoryClient",
    "MemoryServiceFactory",
    "Message",
    "MissingExtra",
    "QueueFull",
    "RecallQError",
    "RefusalPart",
    "ResultWithdrawn",
    "ServiceUnavailable",
    "StoredMessage",
    "TextPart",
    "UndecodableJob",
    "UnknownJob",
    "Wait",
    "WorkerLost",
    "WrongBackend",
]
