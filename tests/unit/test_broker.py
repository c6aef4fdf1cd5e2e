"""Messages as the worker's transport holds them."""

from __future__ import annotations

import itertools

from recallq_worker.broker import Message


class Channel:
    """Takes note of what is settled."""

    def __init__(self) -> None:
        self.settled: list[str] = []
        self.no_ack_consumers: set[str] = set()

    def decode_body(self, body: str, encoding: str | None = None) -> str:
        return body

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        self.settled.append("ack")

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.settled.append("requeue" if requeue else "reject")


def test_a_message_is_settled_once_however_often_it_is_tried() -> None:
    """A lost connection may return to its queue what a thread is about to run and acknowledge."""
    for first, second in itertools.permutations(("ack", "reject", "requeue"), 2):
        channel = Channel()
        message = Message(
            {
                "body": "[[], {}, {}]",
                "content-type": "application/json",
                "content-encoding": "utf-8",
                "headers": {"id": "x"},
                "properties": {
                    "delivery_tag": "t",
                    "delivery_info": {"exchange": "", "routing_key": "q"},
                },
            },
            channel=channel,
        )
        getattr(message, first)()
        getattr(message, second)()
        message.ack()
        assert channel.settled == [first]
