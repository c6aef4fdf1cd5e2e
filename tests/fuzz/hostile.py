"""Messages that somebody puts on a worker's queue who means no good; the same for the same seed."""

from __future__ import annotations

import base64
import json
import random
import string
import uuid
from typing import Any

from recallq.contract import Operation

TASKS = [each.task_name for each in Operation]
_CELERYS = ["celery.backend_cleanup", "celery.chain", "celery.chord_unlock", "x" * 300]
_NUMBERS: list[Any] = [0, -1, 2**31, 2**53, 2**63, 10**40, 1e308, -1e308, 1e-300, True, None, "1"]
_TEXTS: list[Any] = [
    *("", "tea", "a|b", "a\nb", "\0", "é" * 50, "}{", "*", "[", "龙井茶", "\u202e", "x" * 70_000),
    *(None, 7, [], {}),
]
_HEADER_VALUES = [*_NUMBERS, *_TEXTS, *_CELERYS, *TASKS, "gzip", "2020-01-01T00:00:00", {"a": 1}]
_PARTS = ["properties", "content-type", "content-encoding", "headers"]
_PART_VALUES = [*_TEXTS, "pickle", "application/x-yaml", "zlib_codec"]


def envelope(task: Any, task_id: Any, body: Any, queue: str, **changes: Any) -> dict[str, Any]:
    """A message as plain Celery sends it, but for `changes`."""
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": task_id},
        "properties": {
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": str(uuid.UUID(int=random.getrandbits(128))),
            "body_encoding": "base64",
        },
        **changes,
    }


class Hostile:
    """Makes them, from a seed."""

    def __init__(self, seed: int, queue: str) -> None:
        self._chance = random.Random(seed)
        self._queue = queue
        self._made = 0

    def messages(self, count: int) -> list[bytes]:
        return [self._message() for _ in range(count)]

    def _message(self) -> bytes:
        self._made += 1
        kind = self._chance.choice(
            [self._bytes, self._cut, self._other_headers, self._other_body, self._odd_batch]
        )
        return kind()

    def _bytes(self) -> bytes:
        return self._chance.randbytes(self._chance.randint(1, 300))

    def _cut(self) -> bytes:
        whole = bytearray(self._dumped(self._batch()))
        for _ in range(self._chance.randint(1, 5)):
            at = self._chance.randrange(len(whole))
            whole[at : at + self._chance.randint(0, 6)] = self._chance.choice(
                [b"", b"\xff\xfe", b'"', b"[", b"{}", b"null", b"1e999"]
            )
        return bytes(whole)

    def _other_headers(self) -> bytes:
        whole = self._batch()
        headers = whole["headers"]
        for _ in range(self._chance.randint(1, 3)):
            name = self._chance.choice(
                [
                    *("task", "id", "root_id", "parent_id", "eta", "expires", "retries"),
                    *("timelimit", "group", "ignore_result", "replaced_task_nesting", "stamps"),
                    *("stamped_headers", "compression", "argsrepr", "origin", "shadow", "meth"),
                    *("recallq-listed", "lang", "group_index"),
                ]
            )
            headers[name] = self._chance.choice(_HEADER_VALUES)
        if self._chance.random() < 0.3:
            whole[self._chance.choice(_PARTS)] = self._chance.choice(_PART_VALUES)
        return self._dumped(whole)

    def _other_body(self) -> bytes:
        batch_id = self._id()
        call = {"task": TASKS[0], "args": [], "options": {"routing_key": self._queue}}
        body = self._chance.choice(
            [
                [[], {}, {}],
                [[1], {}, {}],
                [["x"], {"y": 1}, {}],
                [["{}"], {}, {self._chance.choice(["callbacks", "errbacks", "chain"]): [call]}],
                [["{}"], {}, {"chord": call}],
                [[json.dumps({"v": self._chance.choice(_NUMBERS)})], {}, None],
                {"args": []},
                None,
                self._deep(),
            ]
        )
        return self._dumped(envelope(self._chance.choice(TASKS), batch_id, body, self._queue))

    def _odd_batch(self) -> bytes:
        return self._dumped(self._batch(odd=True))

    def _batch(self, odd: bool = False) -> dict[str, Any]:
        """A batch as it should be, or with values that nobody would send."""
        operation = self._chance.choice(list(Operation))
        jobs = [self._job(odd) for _ in range(self._chance.choice([1, 1, 2, 5] if odd else [1]))]
        batch_id = self._id()
        batch: dict[str, Any] = {
            "v": 1, "id": batch_id, "lane": "live", "operation": operation.value, "jobs": jobs
        }  # fmt: skip
        if odd and self._chance.random() < 0.3:
            name = self._chance.choice(["v", "lane", "operation", "listed", "backend", "jobs"])
            batch[name] = self._chance.choice([*_TEXTS, *_NUMBERS, "add", "slow", "mem0", []])
        payload = json.dumps(batch)
        return envelope(operation.task_name, batch_id, [[payload], {}, {}], self._queue)

    def _job(self, odd: bool) -> dict[str, Any]:
        job: dict[str, Any] = {
            "scope": {"tenant": "t", "user_id": "hostile", "session_id": "s"},
            "submitted_at": 1.0,
            "messages": [{"role": "user", "content": "tea"}],
            "order": 1,
            "query": "tea",
            "top_k": 1,
            "offset": 0,
            "limit": 1,
        }
        for _ in range(self._chance.randint(1, 3) if odd else 0):
            name = self._chance.choice([*job, "deadline", "idempotency_key", "origin", "infer"])
            job[name] = self._chance.choice([*_NUMBERS, *_TEXTS, [{}], [{"content": 1e308}]])
        if odd and self._chance.random() < 0.3:
            place = self._chance.choice(["tenant", "user_id", "session_id"])
            job["scope"] = {"tenant": "t", "user_id": "hostile", "session_id": None} | {
                place: self._chance.choice(_TEXTS)
            }
        return job

    def _id(self) -> Any:
        if self._chance.random() < 0.1:
            return self._chance.choice(["x", "a|b", "*", "é", "n\n", "x" * 5000])
        letters = "".join(self._chance.choices(string.hexdigits.lower(), k=16))
        return f"{letters}-{self._made:x}"

    def _deep(self) -> Any:
        value: Any = []
        for _ in range(self._chance.choice([50, 200, 900])):
            value = [value]
        return value

    def _dumped(self, whole: Any) -> bytes:
        try:
            return json.dumps(whole).encode()
        except RecursionError:
            return b"[" * 100_000
