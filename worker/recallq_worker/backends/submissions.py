"""What extractors read in submissions."""

from __future__ import annotations

from typing import Any

from recallq.messages import message_text
from recallq_worker.backends.base import Submission

_BYTES_A_TOKEN = 3
"""Rather many tokens than few: English has four, Chinese three."""
_TOKENS_A_MESSAGE = 4


def said(submission: Submission, *, infer: bool) -> dict[int, dict[str, Any]]:
    """The messages as texts with a role and perhaps a name, by their index; without those that hold
    none.

    An LLM shall read only roles that every library knows: others' messages become the assistant's.
    What is stored as it is, is what anybody has said: not the system's messages.
    """
    found = {}
    for index, message in enumerate(submission.messages):
        text, role = message_text(message).strip(), message.get("role") or "user"
        if not text or (role == "system" and not infer):
            continue
        if infer and role not in ("user", "assistant", "system"):
            role, text = "assistant", f"{role}: {text}"
        found[index] = {"role": str(role), "content": text}
        name = message.get("name")
        if isinstance(name, str) and name:
            found[index]["name"] = name
    return found


def tokens(submission: Submission) -> int:
    """About how many tokens of a prompt its messages take."""
    size = 0
    for message in submission.messages:
        size += len(message_text(message).encode()) // _BYTES_A_TOKEN + _TOKENS_A_MESSAGE
    return size
