"""Names of everything RecallQ keeps in Redis, in one place.

Every key begins with the namespace. Keys of one user carry a hash tag ``{tenant/user}``, so that a
Redis Cluster keeps them in one slot. Ids go in percent-encoded: no id, however hostile, can reach
into another's keys, and no code ever takes a key apart again.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from urllib.parse import quote, unquote

_LONGEST_READABLE = 200


@lru_cache(maxsize=8192)
def escape(name: str) -> str:
    """An injective, printable form of any id; long ones become their hash.

    ``quote`` leaves no ``=`` unescaped, so the hashed form cannot meet a readable one.
    """
    escaped = quote(name, safe="")
    if len(escaped) <= _LONGEST_READABLE:
        return escaped
    return "=" + sha256(name.encode()).hexdigest()


def unescape(escaped: str) -> str | None:
    """The id that an escaped form stands for; None for one that became a hash."""
    return None if escaped.startswith("=") else unquote(escaped)


class Keys:
    """The key names of one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.held = f"{namespace}:held"
        """Sorted set: ids of the batches that workers run, by the end of their lease (ms)."""
        self.delayed = f"{namespace}:delayed"
        """Sorted set: ids of the batches that wait for another attempt, by its time (ms)."""
        self.clock = f"{namespace}:clock"
        """The latest time (ms) that a deletion epoch was taken from."""
        self.queued_prefix = f"{namespace}:queued:"
        self.batch_prefix = f"{namespace}:batch:"
        self.outstanding = f"{namespace}:outstanding"
        """Hash: lane -> jobs accepted and not settled."""
        self.totals = f"{namespace}:totals"
        """Hash: ``accepted:<lane>`` and ``settled:<lane>`` -> jobs, since they were first counted
        here."""
        self.slow = f"{namespace}:slow"
        """Sorted set: hash tags of the users for whom writes wait in the slow lane, by the time
        (ms) at which a worker may take one up; of those taken up, by the end of the lease."""
        self.indexing = f"{namespace}:indexing"
        """Sorted set: the same of the batches whose adds are stored and not yet searchable."""
        self.extracts = f"{namespace}:extracts"
        """0 if the workers' backend does not extract memories. 1 while there are others, which is
        as much as if it were not there, but that nobody writes a 0."""
        self.slow_tokens = f"{namespace}:slow-tokens"
        """Counter: the last fencing token given in the slow lane."""
        self.workers = f"{namespace}:workers"
        """Set of the ids of worker processes, some perhaps dead."""
        self.dead = f"{namespace}:dead"
        """Sorted set of dead letter ids by time of death."""
        self.result_prefix = f"{namespace}:"
        """Celery's backend puts it before its own ``celery-task-meta-``."""

    def batch(self, batch_id: str) -> str:
        """Hash: the ledger's entry of one outstanding batch."""
        return f"{self.batch_prefix}{batch_id}"

    def queued(self, lane: str) -> str:
        """Sorted set: ids of a lane's batches that nobody has begun, by publication (ms)."""
        return f"{self.queued_prefix}{lane}"

    def result(self, batch_id: str) -> str:
        """Where Celery's Redis result backend keeps a batch's result."""
        return f"{self.result_prefix}celery-task-meta-{batch_id}"

    def reply_channel(self, client_id: str) -> str:
        """Pub/sub channel on which a client hears of its results."""
        return f"{self.namespace}:reply:{client_id}"

    def epochs(self, tenant: str, user_id: str) -> str:
        """Hash: field ``n`` is the epoch of the user's last deletion. ``*`` and ``s:<session>``:
        the epoch below which nothing of the user, or of the session, is kept as a dead letter
        or replayed."""
        return self.epochs_of(self.user_tag(tenant, user_id))

    def epochs_of(self, user_tag: str) -> str:
        return f"{self.namespace}:epoch:{user_tag}"

    def waiting(self, user_tag: str) -> str:
        """Sorted set: ids of the jobs that wait for a user's turn in the slow lane, in order."""
        return f"{self.namespace}:waiting:{user_tag}"

    def coming(self, user_tag: str) -> str:
        """Sorted set: ids of a user's adds that are on their way to the slow lane, in order."""
        return f"{self.namespace}:coming:{user_tag}"

    def deleting(self, user_tag: str) -> str:
        """Sorted set: a user's deletes that are on their way to the slow lane, by epoch. A member
        is ``<job id>|<session>``, without a session where it is the whole user."""
        return f"{self.namespace}:deleting:{user_tag}"

    def pending(self, user_tag: str) -> str:
        """Hash: those jobs by their ids."""
        return f"{self.namespace}:pending:{user_tag}"

    def turn(self, user_tag: str) -> str:
        """Hash: who works for a user in the slow lane, and how far that went."""
        return f"{self.namespace}:turn:{user_tag}"

    def done(self, user_tag: str) -> str:
        """Prefix of the keys that remember what came of adds that may be submitted again."""
        return f"{self.namespace}:done:{user_tag}:"

    def worker(self, worker_id: str) -> str:
        """A worker process's description; expires with its last sign of life."""
        return f"{self.namespace}:worker:{worker_id}"

    def backend_owner(self, backend: str) -> str:
        """Lease of the one process that may run a single-process backend."""
        return f"{self.namespace}:owner:{backend}"

    def dead_letter(self, letter_id: str) -> str:
        """Hash: one dead letter."""
        return f"{self.namespace}:dead:{letter_id}"

    def dead_letters_of(self, tenant: str, user_id: str) -> str:
        """Set: the ids of a user's dead letters."""
        return f"{self.namespace}:deadof:{self.user_tag(tenant, user_id)}"

    def batch_tag(self, batch_id: str) -> str:
        """``{batch}``, which is no user's: theirs have a slash in them."""
        return f"{{{batch_id}}}"

    def user_tag(self, tenant: str, user_id: str) -> str:
        """``{tenant/user}``: the hash tag that all keys of one user share."""
        return f"{{{escape(tenant)}/{escape(user_id)}}}"
