"""Redis key names: no id reaches into another's keys, and a user's keys share a slot."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recallq.keys import Keys, escape
from tests.strategies import ids

HOSTILE = st.sampled_from(
    [
        "a", "a/b", "/", "a/", "/b", "a%2Fb", "%", "%25", "{", "}", "{}", "{a}", "a}", "a:b", "*",
        "?", "[a-z]", " ", "\n", "\0", "=", "=" + "0" * 64, "é", "e\u0301", "Ａ", "A", "用户",
        "\u202e", "\ufeff", "👩‍👩‍👧‍👦", "default", ".", "..", "~", "-", "_",
        "x" * 200, "x" * 201, "x" * 200 + "y", "é" * 33, "é" * 34, "é" * 35,
    ]
)  # fmt: skip
anyone = ids | HOSTILE | st.text(st.characters(codec="utf-8"), min_size=150, max_size=300)

HASH_TAG = re.compile(r"\{[^{}]+\}")


def hash_tag(key: str) -> str:
    """What Redis Cluster hashes: what stands between the first brace and the next closing one."""
    start = key.index("{")
    return key[start + 1 : key.index("}", start)]


@given(anyone, anyone)
@settings(max_examples=500, deadline=None)
def test_different_ids_never_look_alike(first: str, second: str) -> None:
    assert (escape(first) == escape(second)) == (first == second)


@given(anyone)
@settings(deadline=None)
def test_an_escaped_id_is_short_and_harmless(name: str) -> None:
    """No separator, brace, space or pattern character of Redis gets through, however long."""
    escaped = escape(name)
    assert re.fullmatch(r"[A-Za-z0-9_.~%=-]{1,200}", escaped)


@given(anyone)
@settings(deadline=None)
def test_a_short_id_stays_readable(name: str) -> None:
    """Percent-decoding gives the id back, unless it was too long and became its hash."""
    escaped = escape(name)
    if escaped.startswith("="):
        assert len(escaped) == 65
        assert len(name.encode()) * 3 > 200
    else:
        assert unquote(escaped) == name


def test_an_id_is_hashed_once_it_is_too_long_to_read() -> None:
    assert escape("x" * 200) == "x" * 200
    assert re.fullmatch("=[0-9a-f]{64}", escape("x" * 201))


def test_an_id_that_looks_like_a_hash_is_not_taken_for_one() -> None:
    """Somebody who calls themselves by another's hash does not meet their keys."""
    victim = "x" * 1000
    assert escape(escape(victim)) != escape(victim)


@given(st.tuples(anyone, anyone), st.tuples(anyone, anyone))
@example(("a", "b/c"), ("a/b", "c"))
@example(("a", "b}/{c"), ("a}/{b", "c"))
@example(("a%2Fb", "c"), ("a/b", "c"))
@settings(max_examples=300, deadline=None)
def test_different_users_never_share_a_key(first: tuple[str, str], second: tuple[str, str]) -> None:
    """Tenant and user together decide; no way of joining them is ambiguous."""
    keys = Keys("recallq")
    assert (keys.user_tag(*first) == keys.user_tag(*second)) == (first == second)
    assert (keys.epochs(*first) == keys.epochs(*second)) == (first == second)


@given(anyone, anyone)
@settings(deadline=None)
def test_a_users_key_has_one_hash_tag(tenant: str, user: str) -> None:
    """Exactly one pair of braces, not empty, so that a cluster keeps the user in one slot."""
    keys = Keys("recallq")
    for key in (keys.user_tag(tenant, user), keys.epochs(tenant, user)):
        assert HASH_TAG.findall(key) == [keys.user_tag(tenant, user)]
        assert key.count("{") == key.count("}") == 1
        assert f"{{{hash_tag(key)}}}" == keys.user_tag(tenant, user)


def names(namespace: str, name: str) -> dict[str, str]:
    """A key of every kind, all for something called `name`."""
    keys = Keys(namespace)
    return {
        "held": keys.held,
        "delayed": keys.delayed,
        "clock": keys.clock,
        "queued": keys.queued(name),
        "outstanding": keys.outstanding,
        "workers": keys.workers,
        "dead": keys.dead,
        "batch": keys.batch(name),
        "result": keys.result(name),
        "reply": keys.reply_channel(name),
        "epochs": keys.epochs(name, name),
        "coming": keys.coming(keys.user_tag(name, name)),
        "deleting": keys.deleting(keys.user_tag(name, name)),
        "worker": keys.worker(name),
        "owner": keys.backend_owner(name),
        "letter": keys.dead_letter(name),
        "letters of a user": keys.dead_letters_of(name, name),
    }


@given(anyone, anyone)
@settings(deadline=None)
def test_keys_of_different_kinds_never_meet(first: str, second: str) -> None:
    """Whatever things are called, a worker is not a batch and a letter not a ledger."""
    mine, other = names("recallq", first), names("recallq", second)
    for kind, key in mine.items():
        assert [each for each, value in other.items() if value == key] in ([], [kind])


@pytest.mark.parametrize("namespace", ["recallq", "a", "a-b_c"])
def test_every_key_lies_in_its_namespace(namespace: str) -> None:
    assert all(key.startswith(f"{namespace}:") for key in names(namespace, "x").values())


def test_namespaces_share_no_key() -> None:
    """Not even where one is the beginning of the other."""
    first, second = names("recall", "x"), names("recallq", "x")
    assert not set(first.values()) & set(second.values())


def test_a_result_lies_where_celery_puts_it() -> None:
    """Celery writes its key prefix, then its own, then the task id."""
    keys = Keys("ns")
    assert keys.result("c-1") == "ns:celery-task-meta-c-1"
    assert keys.result("c-1").startswith(keys.result_prefix)
