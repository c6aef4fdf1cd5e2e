"""Which terms a message has, how much each counts, and which a query looks for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recallq_worker.search.entries import Messages
from recallq_worker.search.terms import FULL, query_terms, said_by
from recallq_worker.search.text import Kind, fold, term_of, tokens
from tests.indexing import analyze, encode_entry
from tests.strategies import json_objects, text


def weights(said: str, **fields: Any) -> dict[int, int]:
    return analyze({"role": "user", "content": said, **fields}).weights


def weight(word: str, said: str, **fields: Any) -> int:
    """0 if the message has no such term."""
    return weights(said, **fields).get(term_of(fold(word)), 0)


def those_of(words: Iterable[str]) -> set[int]:
    return {term_of(word) for word in words}


# --- weights --------------------------------------------------------------------------------------


def test_a_message_has_the_terms_of_its_text_and_no_others() -> None:
    assert set(weights("Green tea, a-1043!")) == {
        token.term for token in tokens("green tea a-1043")
    }


def test_all_text_of_a_message_counts() -> None:
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": "one"}, {"type": "data", "data": {"order": "two"}}],
        "tool_calls": [{"function": {"name": "three", "arguments": '{"city": "\\u676d\\u5dde"}'}}],
    }
    assert {token.term for token in tokens("one two three 杭州")} <= set(analyze(message).weights)


@pytest.mark.parametrize(
    "message", [{}, {"role": "user"}, {"content": None}, {"content": ""}, {"content": []}]
)
def test_a_message_without_text_has_no_terms(message: dict[str, Any]) -> None:
    assert analyze(message).weights == {}


def test_what_is_said_more_often_counts_more_and_ever_less_so() -> None:
    """Said twice is not said twice as much; nothing reaches more than `FULL`."""
    counts = [1, 2, 4, 8, 16]
    # Filled up with what does not count for the length, so that all are equally long.
    grown = [weight("tea", "tea " * count + "coffee " * (16 - count)) for count in counts]
    assert grown == sorted(set(grown))
    assert grown[1] < 1.5 * grown[0]
    steps = [after - before for before, after in pairwise(grown)]
    assert steps == sorted(steps, reverse=True)
    assert grown[-1] < FULL


def test_forms_of_a_word_are_counted_together() -> None:
    assert weight("go", "go went gone") == weight("go", "go go go")


def test_a_word_counts_less_the_longer_the_text() -> None:
    said = "tea " + " ".join(f"word{number}" for number in range(400))
    cut = [" ".join(said.split()[:count]) for count in (1, 20, 100, 400)]
    fallen = [weight("tea", each) for each in cut]
    assert fallen == sorted(set(fallen), reverse=True)


def test_a_word_in_a_short_message_has_about_two_thirds_of_what_there_is() -> None:
    """What the scores' usual size hangs on."""
    assert 0.6 * FULL < weight("tea", "a cup of tea") < 0.75 * FULL


@given(json_objects | st.fixed_dictionaries({"content": text}))
@settings(max_examples=200)
def test_weights_are_from_1_to_full(message: dict[str, Any]) -> None:
    analysis = analyze(message)
    assert all(1 <= each <= FULL for each in analysis.weights.values())
    assert all(0 <= term < 1 << 32 for term in analysis.weights)


@pytest.mark.parametrize(
    "said",
    [
        "tea " * 200_000,
        "tea tea " + " ".join(f"w{number}" for number in range(100_000)),
        "tea tea " + "x " * 200_000,
        "tea tea " + " ".join(f"w{number % 10_000}" for number in range(200_000)),
    ],
    ids=["one word", "many words", "letters", "words that come again"],
)
def test_a_book_has_weights_and_an_entry_as_well(said: str) -> None:
    """What is said twice among so many words counts for little, and not for nothing."""
    found = weights(said)
    assert found[term_of("tea")] >= 1
    assert all(1 <= each <= FULL for each in found.values())
    entry = encode_entry("s", 1, found)
    read = Messages.of_entries({b"r": entry})
    assert dict(zip(read.terms.tolist(), read.weights.tolist(), strict=True)) == found


def test_a_text_is_kept_folded_with_a_chunk_a_line() -> None:
    """Stop words and parts of chunks are in it; `vocabulary` knows what to make of it."""
    kept = analyze({"content": "Green  TEA,\tplease\n\nnow"}).text
    assert [line.strip(",") for line in kept.split("\n")][:3] == ["green", "tea", "please"]


# --- who speaks, and when -------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["name", "speaker", "author"])
def test_who_speaks_is_a_term(field: str) -> None:
    found = weights("hello", **{field: "Caroline Müller"})
    assert set(found) == those_of(["hello", "caroline", "muller"])
    assert said_by({field: " Caroline Müller "}) == "Caroline Müller"


def test_the_first_field_that_names_somebody_is_who_speaks() -> None:
    fields = {"author": "Dora", "speaker": "Caroline", "name": ""}
    assert said_by(fields) == "Caroline"
    assert set(weights("hello", **fields)) == those_of(["hello", "caroline"])


@pytest.mark.parametrize("name", [None, 7, True, "", " ", "?!", ["Ann"], {"first": "Ann"}])
def test_what_is_no_name_is_no_term(name: Any) -> None:
    assert weights("hello", name=name) == weights("hello")


def test_a_long_name_counts_by_its_beginning() -> None:
    name = "Ann " + "x" * 500 + " Berta"
    assert len(said_by({"name": name})) <= 200
    assert weight("ann", "hello", name=name) > 0
    assert weight("berta", "hello", name=name) == 0


def test_who_speaks_counts_as_much_as_a_word_and_more_than_the_time() -> None:
    said = weights("hello", name="Ann", timestamp="2023-05-08")
    ann, may = said[term_of("ann")], said[term_of("may")]
    assert 1 <= may < ann < FULL


def test_a_field_takes_nothing_from_what_is_said() -> None:
    """Nor does it count for the length."""
    said = "may may may may may may may may"
    assert weight("may", said, timestamp="2023-05-08") == weight("may", said)
    assert weight("tea", "tea", name="Ann Bert Carla", date="8 May 2023") == weight("tea", "tea")


EIGHTH_OF_MAY = those_of(["2023", "may", "8"])


@pytest.mark.parametrize("field", ["timestamp", "created_at", "datetime", "date", "time"])
@pytest.mark.parametrize(
    "value",
    [
        "2023-05-08",
        "2023-5-8",
        "2023-05-08T13:56:00Z",
        "2023-05-08 13:56:00.123456+02:00",
        "1:56 pm on 8 May, 2023",
        "8 MAY 2023",
        "08 May 2023",
        "May 8th, 2023",
        1683554160,
        1683554160.75,
        1683554160000,
    ],
)
def test_year_month_and_day_of_when_it_was_said_are_terms(field: str, value: Any) -> None:
    assert set(weights("hello", **{field: value})) == EIGHTH_OF_MAY | those_of(["hello"])


def test_a_question_may_name_the_day() -> None:
    asked = {term.term for term in query_terms("What did Caroline say on 8 May 2023?")}
    assert asked >= EIGHTH_OF_MAY


@pytest.mark.parametrize(
    "value",
    [None, True, False, "", " ", "?", "13:56", [], {}, ["2023-05-08"], 1e308, -1e308, 2**64 - 1,
     -(2**63), 1e11 * 1e11, float("inf"), float("nan")],
)  # fmt: skip
def test_what_is_no_time_is_no_term(value: Any) -> None:
    assert weights("hello", timestamp=value) == weights("hello")


@pytest.mark.parametrize("first", [None, True, "", " ", []])
def test_a_time_field_without_a_time_does_not_hide_the_next(first: Any) -> None:
    found = weights("hello", timestamp=first, date="2023-05-08")
    assert set(found) == EIGHTH_OF_MAY | those_of(["hello"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2023-13-08", ["2023", "8"]),
        ("2023-00-08", ["2023", "8"]),
        ("yesterday", ["yesterday"]),
        (0, ["1970", "january", "1"]),
        (-1, ["1969", "december", "31"]),
        (True + 0, ["1970", "january", "1"]),
    ],
)
def test_odd_times_say_what_they_say(value: Any, expected: list[str]) -> None:
    assert set(weights("hello", time=value)) == those_of(["hello", *expected])


def test_an_equal_bool_and_number_are_told_apart() -> None:
    """What was worked out for one must not be taken for the other."""
    assert set(weights("hello", time=1)) != {term_of("hello")}
    assert set(weights("hello", time=True)) == {term_of("hello")}
    assert set(weights("hello", time=1.0)) == set(weights("hello", time=1))


# --- queries --------------------------------------------------------------------------------------


def test_a_query_has_each_of_its_terms_once() -> None:
    assert [term.text for term in query_terms("Green green TEA, tea?")] == ["green", "tea"]
    assert [term.text for term in query_terms("went go gone")] == ["went"]


def test_a_query_has_stop_words_only_where_it_has_nothing_else() -> None:
    assert [term.text for term in query_terms("where is the tea")] == ["tea"]
    assert [term.text for term in query_terms("where is the")] == ["where", "is", "the"]


def test_a_long_query_looks_for_its_first_hundred_terms() -> None:
    said = [f"word{number}" for number in range(150)]
    assert [term.text for term in query_terms(" ".join(["the", *said]))] == said[:100]
    assert len(query_terms("用户" + "".join(chr(0x4E00 + number) for number in range(150)))) == 100


def test_a_term_after_many_stop_words_is_still_looked_for() -> None:
    assert [term.text for term in query_terms("the of and " * 1000 + "tea")] == ["tea"]


@pytest.mark.parametrize(
    ("query", "kind", "is_lone", "may_be_a_part"),
    [
        ("tea", Kind.WORD, False, True),
        ("x", Kind.WORD, False, False),
        ("5", Kind.WORD, False, False),
        ("é", Kind.WORD, False, False),
        ("the", Kind.STOP_WORD, False, False),
        ("龙", Kind.PAIR, True, True),
        ("龙井", Kind.PAIR, False, True),
    ],
)
def test_which_terms_may_be_parts_of_words(
    query: str, kind: Kind, is_lone: bool, may_be_a_part: bool
) -> None:
    (term,) = query_terms(query)
    assert (term.kind, term.is_lone, term.may_be_a_part) == (kind, is_lone, may_be_a_part)


@given(text)
@settings(max_examples=200)
@example("the The THE")
@example("won't won")
def test_the_terms_of_a_query_are_those_of_the_same_text_stored(said: str) -> None:
    stored = analyze({"content": said}).weights
    asked = [term.term for term in query_terms(said)]
    assert len(asked) == len(set(asked)) <= 100
    assert set(asked) <= set(stored)
    assert bool(asked) == bool(stored)
