"""How well a text answers a query, and which candidates are kept."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq.contract import Scope
from recallq_worker.backends.base import Record
from recallq_worker.ranking import Query, Ranking, chunks
from tests.strategies import text

WHOLE, PART, NOTHING = 1.0, 0.5, 0.0


def score(query: str, candidate: str) -> float:
    return Query(query).score(candidate)


def record(said: str, order: int = 1, record_id: str = "r") -> Record:
    message = {"role": "user", "content": said}
    return Record(record_id, Scope("t", "u", "s"), order, 0, message)


def rank(
    query: str, records: list[Record], top_k: int = 10, least: float | None = None
) -> list[str]:
    ranking = Ranking(query, top_k=top_k, score_threshold=least)
    ranking.consider(records)
    return [hit.record.message["content"] for hit in ranking.best()]


# --- one term -----------------------------------------------------------------------------------

CASES: list[tuple[str, str, float]] = [
    # case and Unicode forms
    ("tea", "Green TEA, please", WHOLE),
    ("TEA", "green tea", WHOLE),
    ("Straße", "STRASSE", WHOLE),
    ("ΣΊΣΥΦΟΣ", "σίσυφος", WHOLE),
    ("ＡＢＣ１２", "abc12", WHOLE),
    ("file", "ﬁle", WHOLE),
    ("café", "cafe\u0301 crème", WHOLE),
    ("cafe\u0301", "CAFÉ", WHOLE),
    ("ｶﾀｶﾅ", "カタカナ", WHOLE),
    ("①", "1", WHOLE),
    # whole words, parts of words, and neither
    ("weath", "wonderful weather", PART),
    ("weather", "whether", NOTHING),
    ("10", "100 cups", PART),
    ("10", "10 cups", WHOLE),
    ("case", "snake_case", PART),
    ("snake_case", "a snake_case name", WHOLE),
    ("tea", "teapot and tea", WHOLE),
    # single letters count as words only
    ("a", "banana bread", NOTHING),
    ("a", "vitamin a helps", WHOLE),
    ("I", "I see", WHOLE),
    ("I", "this is it", NOTHING),
    ("5", "15 of 50", NOTHING),
    ("é", "née", NOTHING),
    # identifiers are one term, whatever is in them
    ("A-1043", "order a-1043 has left", WHOLE),
    ("A-1043", "A-1043.", WHOLE),
    ("A-1043", "(A-1043)", WHOLE),
    ("A-1043", "order A-10432", PART),
    ("A-1043", "order BA-1043", PART),
    ("A-1043", "A 1043", NOTHING),
    ("A-1043", "A-1044", NOTHING),
    ("bob@example.com", "write to Bob@Example.com, please", WHOLE),
    ("bob@example.com", "jim@example.com", NOTHING),
    ("bob@example.com", "rebob@example.com", PART),
    ("https://x.y/z", "see https://x.y/z.", WHOLE),
    ("https://x.y/z", "<https://x.y/z>", WHOLE),
    ("https://x.y/z", "https://x.y/zebra", PART),
    ("https://x.y/z?q=a+b&c=%20#top", "at https://x.y/z?q=a+b&c=%20#top", WHOLE),
    ("3.14", "pi is 3.14159", PART),
    ("3.14", "pi is 3.14", WHOLE),
    ("(a|b)*", "(a|b)* is a pattern", WHOLE),
    ("a.c", "abc", NOTHING),
    ("don't", "I don't know", WHOLE),
    # punctuation around a word is not part of it
    ("tea?", "tea", WHOLE),
    ('"tea!"', "no tea, no", WHOLE),
    ("...tea...", "tea", WHOLE),
    # Chinese, Japanese, Korean
    ("龙井", "我喜欢杭州的龙井茶", WHOLE),
    ("龙井", "龙在井里", NOTHING),
    ("龙", "龙井", WHOLE),
    ("寿司", "昨日は寿司を食べた", WHOLE),
    ("한국어", "한국어를 배워요", WHOLE),
    ("tea", "我爱喝tea和咖啡", WHOLE),
    # identifiers in Chinese sentences, which put no spaces around them
    ("A-1043", "订单A-1043已发货", WHOLE),
    ("bob@example.com", "邮箱是bob@example.com，请记住", WHOLE),
    ("https://x.y/z", "链接https://x.y/z很好", WHOLE),
    ("3.14", "圆周率3.14左右", WHOLE),
    # other scripts
    ("हिन्दी", "मैं हिन्दी बोलता हूँ", WHOLE),
    ("שלום", "אמר שלום לכולם", WHOLE),
    ("чай", "Зелёный ЧАЙ", WHOLE),
]


@pytest.mark.parametrize(("query", "candidate", "expected"), CASES, ids=ascii)
def test_a_term_is_found_whole_or_in_part_or_not(
    query: str, candidate: str, expected: float
) -> None:
    assert score(query, candidate) == expected


@pytest.mark.parametrize("query", ["", " ", "\n\t", ".", "?!", "...", "-", "。", "“”", "\u200b"])
@pytest.mark.parametrize("candidate", ["", "tea", "?!", "... - 。"])
def test_a_query_without_words_finds_nothing(query: str, candidate: str) -> None:
    """Above all, not everything."""
    assert score(query, candidate) == NOTHING
    assert rank(query, [record(candidate)]) == []


def test_nothing_is_found_in_nothing() -> None:
    assert score("tea", "") == NOTHING


# --- several terms ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "candidate", "expected"),
    [
        ("green tea", "green tea", 1.0),
        ("green tea", "tea, green", 1.0),
        ("green tea", "green hills", 0.5),
        ("green tea", "teapot", 0.25),
        ("green tea", "coffee", 0.0),
        ("green green tea", "tea", 0.5),
        ("green Green GREEN", "green", 1.0),
        ("龙井茶", "龙井绿茶", 0.5),
        ("龙井 tea", "tea", 0.5),
        ("tea a", "teapot banana", 0.25),
    ],
)
def test_a_score_is_the_share_of_terms_found(query: str, candidate: str, expected: float) -> None:
    """Repeats count once, and a part of a word half."""
    assert score(query, candidate) == pytest.approx(expected)


@given(text, text)
@settings(deadline=None)
def test_a_score_is_between_0_and_1(query: str, candidate: str) -> None:
    assert 0.0 <= score(query, candidate) <= 1.0


words = st.text(st.sampled_from("ab1 -.@,用户é_'"), max_size=12) | text


@given(words)
@settings(max_examples=500, deadline=None)
def test_a_text_answers_itself_perfectly(said: str) -> None:
    """Who searches for exactly what was said finds it with the best score there is."""
    expected = WHOLE if score(said, f"{said} {said}") > 0 else NOTHING
    assert score(said, said) == expected


@given(words, words)
@settings(deadline=None)
def test_unicode_forms_do_not_matter(query: str, candidate: str) -> None:
    """Composed or decomposed, it is the same text."""
    assert score(query, unicodedata.normalize("NFC", candidate)) == score(
        query, unicodedata.normalize("NFD", candidate)
    )
    assert score(unicodedata.normalize("NFC", query), candidate) == score(
        unicodedata.normalize("NFD", query), candidate
    )


@given(words, words, words)
@settings(deadline=None)
def test_more_text_never_answers_worse(query: str, candidate: str, more: str) -> None:
    """What is said besides, in another sentence, takes nothing away."""
    assert score(query, f"{candidate}\n{more}") >= score(query, candidate)


@pytest.mark.parametrize(
    "query",
    ["a" + "-" * 30_000 + "b", "-" * 30_000, "a" + ".-" * 15_000 + "b", "a" * 100_000,
     "a " * 20_000, "用" * 50_000, "a-" * 20_000],
    ids=["line", "only a line", "dots", "letters", "words", "CJK", "pieces"],
)  # fmt: skip
def test_a_long_query_takes_no_long_time(query: str) -> None:
    """A pasted table or log must not stop the worker's loop for everybody."""
    before = time.process_time()
    score(query, "tea")
    score(query, query)
    assert time.process_time() - before < 1.0


# --- which are kept -----------------------------------------------------------------------------


def test_the_best_come_first() -> None:
    records = [record("tea"), record("green tea"), record("nothing"), record("teapot")]
    assert rank("green tea", records) == ["green tea", "tea", "teapot"]


def test_equal_matches_come_newest_first() -> None:
    records = [record(f"tea {order}", order) for order in (2, 5, 1, 4, 3)]
    assert rank("tea", records) == ["tea 5", "tea 4", "tea 3", "tea 2", "tea 1"]
    assert rank("tea", records, top_k=2) == ["tea 5", "tea 4"]


def test_equal_matches_of_one_moment_come_by_record_id() -> None:
    """The last message of a call is the newest."""
    records = [record(f"tea {name}", 7, name) for name in ("j-00001", "j-00000", "j-00002")]
    assert rank("tea", records, top_k=2) == ["tea j-00002", "tea j-00001"]


@pytest.mark.parametrize("top_k", [1, 2, 5, 100])
def test_no_more_than_top_k_are_kept(top_k: int) -> None:
    records = [record(f"tea {number}", number) for number in range(20)]
    assert len(rank("tea", records, top_k=top_k)) == min(top_k, 20)


def test_a_threshold_keeps_what_reaches_it() -> None:
    records = [record("green tea"), record("tea"), record("teapot")]
    assert rank("green tea", records, least=0.5) == ["green tea", "tea"]
    assert rank("green tea", records, least=0.51) == ["green tea"]
    assert rank("green tea", records, least=1.01) == []


@pytest.mark.parametrize("least", [0.0, -1.0, None])
def test_what_does_not_match_is_never_a_hit(least: float | None) -> None:
    assert rank("tea", [record("coffee"), record("tea")], least=least) == ["tea"]


def test_a_message_without_text_harms_nothing() -> None:
    empty = Record("r0", Scope("t", "u", "s"), 1, 0, {"role": "user", "content": None})
    ranking = Ranking("tea", top_k=5, score_threshold=None)
    ranking.consider([empty, record("tea")])
    assert [hit.score for hit in ranking.best()] == [1.0]


@given(
    st.lists(st.sampled_from(["tea", "green tea", "teapot", "green", "coffee"]), max_size=30),
    st.integers(1, 8),
    st.integers(1, 7),
)
@settings(deadline=None)
def test_portions_do_not_change_the_outcome(said: list[str], top_k: int, portion: int) -> None:
    """Long histories are looked through bit by bit; the best are the best of all."""
    records = [record(each, order, f"r{order:03}") for order, each in enumerate(said)]
    ranking = Ranking("green tea", top_k=top_k, score_threshold=None)
    for some in chunks(records, portion):
        ranking.consider(some)
    found = [(hit.score, hit.record.order) for hit in ranking.best()]
    everything = [(score("green tea", each), order) for order, each in enumerate(said)]
    expected = sorted((each for each in everything if each[0] > 0), reverse=True)[:top_k]
    assert found == expected
    assert all(0 < each[0] <= 1 for each in found)


def test_portions_are_complete() -> None:
    records = [record(str(number), number) for number in range(7)]
    portions = list(chunks(records, 3))
    assert [len(portion) for portion in portions] == [3, 3, 1]
    assert [each for portion in portions for each in portion] == records
    assert list(chunks([], 3)) == []
