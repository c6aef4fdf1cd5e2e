"""The checker finds what is wrong in a history, and nothing in one that is right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from recallq.contract import Operation
from tests.chaos.checker import AFTERLIFE, PATIENCE, Checker, Kind
from tests.chaos.history import SUCCEEDED, Call, Journal, note_death, read_journals


class Story:
    """Builds a history in which each call takes a second, from `at` on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, at: float, token: str, *, client: str = "a", **fields: object) -> Call:
        call = self._call(Operation.ADD, at, client, {"job_id": token, "state": "succeeded"})
        call.tokens = [token]
        return _changed(call, fields)

    def delete(self, at: float, session: str | None = "s", **fields: object) -> Call:
        call = self._call(Operation.DELETE, at, "d", {"session": session})
        return _changed(call, fields)

    def read(self, at: float, *tokens: str, **fields: object) -> Call:
        call = self._call(Operation.LIST, at, "r", {"whole": True})
        call.seen = [(token, "s") for token in tokens]
        return _changed(call, fields)

    def _call(self, operation: Operation, at: float, client: str, more: dict[str, object]) -> Call:
        call = Call(client, len(self.calls) + 1, operation, "u", "s", at)
        call.accepted = call.ended = call.settled = at + 1
        call.outcome = SUCCEEDED
        self.calls.append(_changed(call, more))
        return call

    def verdict(self) -> list[tuple[Kind, str]]:
        return [(each.kind, each.what.split(":")[0]) for each in Checker(self.calls).check()]

    def kinds(self) -> list[Kind]:
        return [kind for kind, _ in self.verdict()]


def _changed(call: Call, fields: dict[str, object]) -> Call:
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def _unanswered(call: Call) -> Call:
    return _changed(
        call,
        {"accepted": None, "settled": None, "outcome": "JobTimeout", "job_id": None, "state": None},
    )


@pytest.fixture
def story() -> Story:
    return Story()


def test_nothing_is_wrong_where_all_is_well(story: Story) -> None:
    story.add(1, "one")
    story.add(3, "two", client="b")
    story.read(5, "one", "two")
    story.delete(7)
    story.add(9, "three")
    story.read(11, "three")
    assert story.verdict() == []


# --- lost ---------------------------------------------------------------------------------------


def test_a_stored_message_that_is_not_there_is_lost(story: Story) -> None:
    story.add(1, "one")
    story.add(3, "two")
    story.read(5, "one")
    assert story.verdict() == [(Kind.LOST, "message two")]


def test_what_is_submitted_after_a_delete_must_stay(story: Story) -> None:
    story.delete(1)
    story.add(3, "one")
    story.read(5)
    assert story.kinds() == [Kind.LOST]


def test_what_overlaps_a_delete_may_be_there_or_not(story: Story) -> None:
    story.add(1, "one")
    story.delete(1.5)
    story.read(4)
    story.read(6, "one")
    assert story.verdict() == []


def test_a_delete_that_is_under_way_may_have_removed_what_was_there(story: Story) -> None:
    story.add(1, "one")
    story.delete(4.5, ended=20, settled=20, accepted=20)
    story.read(3, "one")
    story.read(5)
    assert story.verdict() == []


def test_an_unanswered_delete_may_come_a_little_later(story: Story) -> None:
    _unanswered(story.delete(1))
    story.add(3, "one")
    story.add(3 + AFTERLIFE, "two")
    story.read(40)
    assert story.verdict() == [(Kind.LOST, "message two")]


def test_an_unanswered_add_may_be_there_or_not_but_not_twice(story: Story) -> None:
    _unanswered(story.add(1, "one"))
    story.read(3)
    story.read(5, "one")
    assert story.verdict() == []
    story.read(7, "one", "one")
    assert story.kinds() == [Kind.DUPLICATED]


def test_only_a_whole_list_shows_what_is_missing(story: Story) -> None:
    story.add(1, "one")
    story.read(3, whole=False)
    story.read(5, operation=Operation.SEARCH, whole=False)
    assert story.verdict() == []


@pytest.mark.parametrize("state", ["queued", "running", "unknown", None])
def test_an_accepted_job_that_does_not_settle_is_lost(story: Story, state: str | None) -> None:
    story.add(1, "one", state=state, outcome=None, settled=None)
    assert story.verdict() == [(Kind.LOST, "a#1")]


def test_a_job_that_was_perhaps_accepted_may_be_unknown(story: Story) -> None:
    _changed(_unanswered(story.add(1, "one")), {"job_id": "one", "state": "unknown"})
    assert story.verdict() == []


# --- duplicated, out of order -------------------------------------------------------------------


def test_a_message_that_is_there_twice_is_duplicated(story: Story) -> None:
    story.add(1, "one")
    story.read(3, "one", "one")
    assert story.verdict() == [(Kind.DUPLICATED, "message one")]


def test_one_clients_messages_list_in_the_order_of_its_calls(story: Story) -> None:
    story.add(1, "one", ended=9)
    story.add(1.001, "two", ended=9)
    story.read(10, "two", "one")
    assert story.verdict() == [(Kind.OUT_OF_ORDER, "message two comes before one, which is older")]


def test_messages_of_one_call_list_in_their_order(story: Story) -> None:
    story.add(1, "one", tokens=["one", "two"])
    story.read(3, "two", "one")
    assert story.kinds() == [Kind.OUT_OF_ORDER]


def test_two_clients_messages_list_in_order_where_one_call_ended_before_the_other_began(
    story: Story,
) -> None:
    story.add(1, "one", client="a")
    story.add(1.5, "two", client="b")
    story.add(3, "three", client="c")
    story.read(5, "two", "one", "three")
    assert story.verdict() == []
    story.read(7, "three", "one", "two")
    assert story.kinds() == [Kind.OUT_OF_ORDER]


def test_the_clocks_of_two_clients_may_differ_a_little(story: Story) -> None:
    story.add(1, "one", client="a")
    story.add(2.001, "two", client="b")
    story.read(5, "two", "one")
    assert story.verdict() == []


def test_a_repeated_add_stands_at_any_of_its_calls(story: Story) -> None:
    story.add(1, "one", key="k")
    story.add(3, "two")
    story.add(5, "one", key="k", job_id="again")
    story.read(7, "one", "two")
    story.read(9, "two", "one")
    assert story.verdict() == []


# --- resurrected, from nowhere, refused ---------------------------------------------------------


@pytest.mark.parametrize("session", ["s", None])
def test_a_deleted_message_that_is_seen_is_resurrected(story: Story, session: str | None) -> None:
    story.add(1, "one")
    story.delete(3, session)
    story.read(5, "one")
    assert story.verdict() == [(Kind.RESURRECTED, "message one")]


def test_the_delete_of_another_session_resurrects_nothing(story: Story) -> None:
    story.add(1, "one")
    story.delete(3, "other")
    story.read(5, "one")
    assert story.verdict() == []


def test_until_a_delete_returns_its_messages_may_be_seen(story: Story) -> None:
    story.add(1, "one")
    story.delete(3, accepted=4, ended=4, settled=9)
    story.read(5, "one")
    story.read(10, operation=Operation.SEARCH, seen=[("one", "s")])
    assert story.verdict() == [(Kind.RESURRECTED, "message one")]


def test_a_message_may_come_back_by_a_later_call_with_its_key(story: Story) -> None:
    story.add(1, "one", key="k")
    story.delete(3)
    story.add(5, "one", key="k", job_id="again")
    story.read(7, "one")
    assert story.verdict() == []


def test_a_message_that_was_not_submitted_comes_from_nowhere(story: Story) -> None:
    story.read(1, "one")
    story.add(3, "one")
    story.read(5, "one", "two")
    assert story.verdict() == [
        (Kind.FROM_NOWHERE, "message one"),
        (Kind.FROM_NOWHERE, "message two"),
    ]


def test_another_users_or_sessions_message_comes_from_nowhere(story: Story) -> None:
    story.add(1, "one", user="other")
    story.add(3, "two", session="other")
    story.read(5, "one", "two")
    assert story.kinds() == [Kind.FROM_NOWHERE, Kind.FROM_NOWHERE]


@pytest.mark.parametrize(
    "why",
    [
        {"poison": "poison-permanent", "state": "dead", "outcome": "BackendError"},
        {
            "refused": True,
            "accepted": None,
            "outcome": "QueueFull",
            "job_id": None,
            "settled": None,
        },
    ],
    ids=lambda why: next(iter(why)),
)
def test_what_was_refused_must_not_be_there(story: Story, why: dict[str, Any]) -> None:
    story.add(1, "one", **why)
    story.read(3)
    assert story.verdict() == []
    story.read(5, "one")
    assert story.kinds() == [Kind.REFUSED]


def test_what_was_cancelled_may_have_been_stored_by_a_try_before(story: Story) -> None:
    story.add(1, "one", cancelled=True, state="cancelled", outcome=None, settled=None)
    story.read(3)
    story.read(5, "one")
    assert story.verdict() == []


# --- jobs ---------------------------------------------------------------------------------------


def test_a_job_without_poison_must_not_fail(story: Story) -> None:
    story.add(1, "one", outcome="BackendUnavailable", state="dead")
    assert story.kinds() == [Kind.FAILED]


@pytest.mark.parametrize("outcome", ["JobTimeout", "BackendUnavailable"])
def test_a_job_whose_callers_time_is_over_is_not_tried_again(story: Story, outcome: str) -> None:
    told: dict[str, Any] = {
        "code": "backend_unavailable",
        "state": "dead",
        "outcome": outcome,
        "timeout": 20.0,
    }
    settled = None if outcome == "JobTimeout" else 19
    story.add(1, "one", **told, ended=19, settled=settled)
    assert story.verdict() == []
    story.add(1, "two", **told, ended=5, settled=5)
    story.add(1, "three", **{**told, "code": "internal"}, ended=19, settled=settled)
    story.add(1, "four", **{**told, "timeout": None}, ended=19, settled=settled)
    assert story.verdict() == [(Kind.FAILED, f"a#{number}") for number in (2, 3, 4)]


def test_a_job_whose_caller_has_not_waited_for_it_may_still_succeed(story: Story) -> None:
    # That it has, was found out when all was over.
    story.add(1, "one", outcome="JobTimeout", ended=21, settled=60)
    story.read(3)
    story.read(30, "one")
    assert story.verdict() == []
    story.read(61)
    assert story.verdict() == [(Kind.LOST, "message one")]


def test_poison_must_fail(story: Story) -> None:
    story.add(1, "one", poison="poison-transient")
    assert story.kinds() == [Kind.REFUSED]


def test_poison_that_a_delete_removes_before_it_is_run_does_no_harm(story: Story) -> None:
    story.add(1, "one", poison="poison-transient")
    story.delete(2)
    assert story.kinds() == []
    story.add(5, "two", poison="poison-transient")
    assert story.kinds() == [Kind.REFUSED]


def test_a_job_settles_once(story: Story) -> None:
    story.add(1, "one", outcome="JobExpired", state="succeeded")
    story.add(3, "two", cancelled=True, outcome=None, settled=None)
    assert story.kinds() == [Kind.SETTLED_TWICE, Kind.SETTLED_TWICE]


def test_an_answer_may_be_withdrawn_later(story: Story) -> None:
    story.read(1, job_id="read", state="expired")
    story.read(3, outcome="ResultWithdrawn", seen=None)
    assert story.verdict() == []


def test_calls_end_in_time(story: Story) -> None:
    story.add(1, "one", ended=1 + PATIENCE + 1)
    _changed(_unanswered(story.add(3, "two")), {"ended": None, "outcome": None})
    assert story.kinds() == [Kind.HUNG, Kind.HUNG]


# --- journals -----------------------------------------------------------------------------------


def test_journals_come_back_as_they_were_written(tmp_path: Path) -> None:
    with Journal(tmp_path, "a") as journal:
        call = Call("", 0, Operation.ADD, "u", "s", 1.5, tokens=["one"])
        journal.begin(call)
        journal.learn(call, accepted=2.0, ended=2.0, job_id="j")
        read = Call("", 0, Operation.LIST, "u", None, 3.0)
        journal.begin(read)
        journal.learn(read, ended=4.0, seen=[("one", "s")], whole=True)
        assert read_journals(tmp_path) == [call, read]
        assert (call.name, read.name) == ("a#1", "a#2")


def test_a_killed_writers_last_calls_are_unanswered(tmp_path: Path) -> None:
    with Journal(tmp_path, "a") as journal:
        journal.begin(Call("", 0, Operation.ADD, "u", "s", 1.5, tokens=["one"]))
        journal.begin(Call("", 0, Operation.ADD, "u", "s", 1.6, tokens=["two"]))
        path = journal.path
    os.truncate(path, path.stat().st_size - 5)
    note_death(path, 2.0)
    (only,) = read_journals(tmp_path)
    assert (only.tokens, only.accepted, only.ended, only.outcome) == (["one"], None, 2.0, "Killed")
    assert Checker([only]).check() == []
