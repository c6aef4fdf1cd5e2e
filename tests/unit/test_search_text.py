"""How texts are cut, seen by what finds a message and what does not."""

from __future__ import annotations

import asyncio
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recallq.contract import Scope
from recallq_worker.backends.base import Record
from recallq_worker.backends.in_memory import InMemoryStore
from recallq_worker.search import english
from recallq_worker.search.english import STOP_WORDS, stem
from recallq_worker.search.terms import query_terms
from recallq_worker.search.text import Kind, chunks, fold, term_of, tokens
from recallq_worker.search.vocabulary import still_in_use
from tests.indexing import analyze
from tests.strategies import text

WHOLE, PART, NOTHING = "whole", "part", "nothing"


async def score_of(query: str, said: str) -> float:
    """How well a query finds a user's only message; 0 if it does not."""
    store = InMemoryStore()
    message = {"role": "user", "content": said}
    await store.add([Record("r", Scope("t", "u", "s"), 1, 0, message)])
    hits = await store.search(Scope("t", "u"), query, top_k=5, score_threshold=None)
    assert len(hits) <= 1
    return hits[0].score if hits else 0.0


def score(query: str, said: str) -> float:
    """The same, for where nothing can be awaited."""
    return asyncio.run(score_of(query, said))


def words(said: str) -> list[str]:
    return [token.text for token in tokens(said) if token.kind in (Kind.WORD, Kind.STOP_WORD)]


def of_kind(said: str, kind: Kind) -> list[str]:
    return [token.text for token in tokens(said) if token.kind is kind]


# --- one term -----------------------------------------------------------------------------------

CASES: list[tuple[str, str, str]] = [
    # case and Unicode forms
    ("tea", "Green TEA, please", WHOLE),
    ("TEA", "green tea", WHOLE),
    ("Straße", "STRASSE", WHOLE),
    ("ΣΊΣΥΦΟΣ", "σίσυφος", WHOLE),
    ("ＡＢＣ１２", "abc12", WHOLE),
    ("file", "ﬁle", WHOLE),
    ("café", "cafe\u0301 crème", WHOLE),
    ("cafe\u0301", "CAFÉ", WHOLE),
    ("cafe", "Café", WHOLE),
    ("naïve", "naive", WHOLE),
    ("istanbul", "İstanbul", WHOLE),
    ("ｶﾀｶﾅ", "カタカナ", WHOLE),
    ("①", "1", WHOLE),
    # an accent in another script makes another letter
    ("мои", "мой", NOTHING),
    ("か", "が", NOTHING),
    # whole words, parts of words, and neither
    ("weath", "wonderful weather", PART),
    ("eathe", "wonderful weather", PART),
    ("weather", "whether", NOTHING),
    ("10", "100 cups", PART),
    ("10", "10 cups", WHOLE),
    ("snake_case", "a snake_case name", WHOLE),
    ("case", "a snake_case name", WHOLE),
    ("tea", "teapot and tea", WHOLE),
    # so are those with accents, whichever way they are written
    ("zubeho", "das Zubehör", PART),
    ("zubehö", "das Zubehör", PART),
    ("éco", "une école", PART),
    # single letters and digits count as words only
    ("a", "banana bread", NOTHING),
    ("a", "vitamin a helps", WHOLE),
    ("x", "extra", NOTHING),
    ("I", "I see", WHOLE),
    ("I", "this is it", NOTHING),
    ("5", "15 of 50", NOTHING),
    ("5", "5 of 50", WHOLE),
    ("é", "née", NOTHING),
    # identifiers are found as they stood, whatever is in them
    ("A-1043", "order a-1043 has left", WHOLE),
    ("A-1043", "A-1043.", WHOLE),
    ("A-1043", "(A-1043)", WHOLE),
    ("A-1043", "order A-10432", PART),
    ("A-1043", "A-1044", NOTHING),
    ("bob@example.com", "write to Bob@Example.com, please", WHOLE),
    ("https://x.y/z", "see https://x.y/z.", WHOLE),
    ("https://x.y/z", "<https://x.y/z>", WHOLE),
    ("https://x.y/z?q=a+b&c=%20#top", "at https://x.y/z?q=a+b&c=%20#top", WHOLE),
    ("3.14", "pi is 3.14", WHOLE),
    ("(a|b)*", "(a|b)* is a pattern", WHOLE),
    ("a.c", "abc", NOTHING),
    ("don't", "I don't know", WHOLE),
    ("O’Neill", "o'neill called", WHOLE),
    # punctuation around a word is not part of it
    ("tea?", "tea", WHOLE),
    ('"tea!"', "no tea, no", WHOLE),
    ("...tea...", "tea", WHOLE),
    ("tea", "go!tea☕️", WHOLE),
    # Chinese, Japanese, Korean, Thai: no spaces
    ("龙井", "我喜欢杭州的龙井茶", WHOLE),
    ("龙井", "龙在井里", NOTHING),
    ("龙", "龙井", WHOLE),
    ("茶", "我喜欢喝茶", WHOLE),
    ("喜", "我喜欢喝茶", WHOLE),
    ("茶", "茶", WHOLE),
    ("咖", "我喜欢喝茶", NOTHING),
    ("寿司", "昨日は寿司を食べた", WHOLE),
    ("ラーメン", "ラーメンが好き", WHOLE),
    ("한국어", "한국어를 배워요", WHOLE),
    ("ข้าวผัด", "ผมชอบกินข้าวผัดมาก", WHOLE),
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
    ("قهوة", "أريد قهوة من فضلك", WHOLE),
    # forms of English words
    ("go", "we went home", WHOLE),
    ("went", "let us go", WHOLE),
    ("child", "her children", WHOLE),
    ("running", "he runs and ran", WHOLE),
    ("ran", "running", WHOLE),
    ("best", "a good one", WHOLE),
]  # fmt: skip


@pytest.mark.parametrize(("query", "said", "expected"), CASES, ids=ascii)
async def test_a_term_is_found_whole_or_in_part_or_not(
    query: str, said: str, expected: str
) -> None:
    found = await score_of(query, said)
    # A word in a short message has two thirds of what there is, a part of one has half of that.
    assert expected == (WHOLE if found > 0.5 else PART if found > 0 else NOTHING), found


@pytest.mark.parametrize(
    ("query", "exact", "others"),
    [
        ("A-1043", "A-1043", ["A 1043", "BA-1043", "1043"]),
        ("bob@example.com", "bob@example.com", ["jim@example.com", "bob at example"]),
        ("https://x.y/z", "https://x.y/z", ["https://x.y/q", "x z"]),
        ("snake_case", "snake_case", ["snake", "case", "case snake"]),
        ("weather", "weather", ["weathers-proofed"]),
        ("weath", "weath", ["weather"]),
        ("龙井茶", "龙井茶", ["龙井", "井茶"]),
    ],
)
async def test_what_is_looked_for_itself_comes_before_what_is_like_it(
    query: str, exact: str, others: list[str]
) -> None:
    store = InMemoryStore()
    said = [exact, *others]
    for order, each in enumerate(said):
        message = {"role": "user", "content": each}
        await store.add([Record(f"r{order}", Scope("t", "u", f"s{order}"), order, 0, message)])
    hits = await store.search(Scope("t", "u"), query, top_k=9, score_threshold=None)
    assert {hit.record.message["content"] for hit in hits} == set(said)
    assert hits[0].record.message["content"] == exact
    assert hits[0].score > hits[1].score


@pytest.mark.parametrize(
    "query",
    ["", " ", "\n\t", ".", "?!", "...", "-", "。", "“”", "\u200b", "_", "☕", "❤️", "\u0301", "´"],
    ids=ascii,
)
@pytest.mark.parametrize("said", ["", "tea", "?!", "... - 。", "☀️ and ☎️", "l´été"], ids=ascii)
async def test_a_query_without_words_finds_nothing(query: str, said: str) -> None:
    """Above all, not everything; nor what has another symbol in colour."""
    assert query_terms(query) == []
    assert await score_of(query, said) == 0


async def test_an_accent_for_an_apostrophe_is_no_part_of_the_word_behind_it() -> None:
    """As it is typed on many keyboards; its compatibility form is a space and a mark."""
    assert words("l´école") == ["l", "ecole"]
    assert await score_of("école", "l´école") > 0.5


async def test_nothing_is_found_in_nothing() -> None:
    assert await score_of("tea", "") == 0


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("don't", ["don", "t"]),
        ("don’t", ["don", "t"]),
        ("rock'n'roll", ["rock", "n", "roll"]),
        ("(tea)", ["tea"]),
        ("well-known", ["well", "known"]),
    ],
)
def test_apostrophes_and_brackets_part_words(said: str, expected: list[str]) -> None:
    assert words(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("A-1043.", ["a-1043"]),
        ("<bob@example.com>,", ["bob@example.com"]),
        ("snake_case", ["snake_case"]),
        ("tea", []),
        ("'tea'", []),
        ("don't", []),
        ("don’t", []),
        ("订单A-1043已发货", ["a-1043"]),
        ("a" + "-" * 198 + "b", ["a" + "-" * 198 + "b"]),
        ("a" + "-" * 199 + "b", []),
    ],
)
def test_a_chunk_of_several_words_is_a_token_besides(said: str, expected: list[str]) -> None:
    """But for apostrophes, and unless it is too long for anybody to look for."""
    assert of_kind(said, Kind.WHOLE) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("龙", ["龙"]),
        ("龙井", ["龙井"]),
        ("龙井茶", ["龙井", "井茶"]),
        ("龙井,茶", ["龙井", "茶"]),
        ("喝tea吧", ["喝", "吧"]),
    ],
)
def test_scripts_without_spaces_are_cut_into_pairs(said: str, expected: list[str]) -> None:
    assert of_kind(said, Kind.PAIR) == expected


def test_stop_words_are_told_from_others() -> None:
    assert of_kind("What did the cat eat?", Kind.STOP_WORD) == ["what", "did", "the"]
    assert of_kind("What did the cat eat?", Kind.WORD) == ["cat", "eat"]


@pytest.mark.parametrize(
    ("more", "is_longer"),
    [("the of and", False), ("...", False), ("coffee", True), ("龙井", True), ("a-1", True)],
)
def test_what_counts_for_the_length_are_words_and_pairs(more: str, is_longer: bool) -> None:
    """Stop words say nothing, so a text is not the longer for them."""
    tea = term_of("tea")
    before = analyze({"role": "user", "content": "tea"}).weights[tea]
    many = f"tea {more} " + f"{more} " * 20
    assert (analyze({"role": "user", "content": many}).weights[tea] < before) == is_longer


def test_a_whole_does_not_count_for_the_length_beside_its_words() -> None:
    tea = term_of("tea")
    one, other = (
        analyze({"role": "user", "content": "tea " + words * 30}).weights[tea]
        for words in ("red-blue ", "red blue ")
    )
    assert one == other


# --- stop words -----------------------------------------------------------------------------------


async def test_stop_words_are_ignored_beside_other_words() -> None:
    assert await score_of("what is the tea", "what is the matter") == 0
    assert await score_of("what is the tea", "tea") == await score_of("tea", "tea")


async def test_stop_words_are_looked_for_where_there_is_nothing_else() -> None:
    assert await score_of("who are you", "who are you") > 0.5
    assert await score_of("who are you", "tea") == 0
    assert await score_of("the", "other") == 0


# --- English --------------------------------------------------------------------------------------


def test_all_forms_of_an_irregular_word_share_a_term() -> None:
    for line in english._IRREGULAR.split(";"):
        forms = line.split()
        assert len({stem(form) for form in forms}) == 1, forms


def test_no_irregular_form_stands_for_two_words() -> None:
    """The later would win, and the earlier lose one of its forms."""
    forms = [form for line in english._IRREGULAR.split(";") for form in line.split()[1:]]
    assert len(forms) == len(set(forms))


def test_different_words_have_different_terms() -> None:
    assert len({term_of(word) for word in ("tea", "team", "coffee", "go", "good", "child")}) == 6


def test_stop_words_are_cut_as_texts_are() -> None:
    """One that no text is cut into would never be recognized."""
    for word in STOP_WORDS:
        assert [(token.text, token.kind) for token in tokens(word)] == [(word, Kind.STOP_WORD)]


# --- whatever comes -------------------------------------------------------------------------------

said_words = st.text(st.sampled_from("ab1 -.@,用户é_'´\u0301\ufe0f"), max_size=12) | text


@given(said_words, said_words)
@settings(max_examples=50)
def test_a_score_is_between_0_and_1(query: str, said: str) -> None:
    assert 0 <= score(query, said) <= 1


@given(said_words)
@settings(max_examples=100)
def test_a_text_finds_itself(said: str) -> None:
    assert (score(said, said) > 0) == bool(query_terms(said))


@given(said_words)
@settings(max_examples=200)
@example("ǰ´é")
def test_unicode_forms_do_not_matter(said: str) -> None:
    """Composed or decomposed, it is the same text."""
    composed, decomposed = (unicodedata.normalize(form, said) for form in ("NFC", "NFD"))
    assert list(tokens(composed)) == list(tokens(decomposed))


@given(said_words)
@settings(max_examples=200)
@example("rock’n’roll-2")
def test_tokens_are_cut_into_themselves(said: str) -> None:
    """The vocabulary keeps texts of tokens, and finds their terms by cutting them again."""
    for token in tokens(said):
        assert still_in_use([token.text], [token.term], []) == {token.text}


@given(said_words, said_words)
@settings(max_examples=100)
def test_a_text_is_cut_chunk_by_chunk(first: str, second: str) -> None:
    assert [*tokens(first), *tokens(second)] == list(tokens(f"{first} {second}"))


@given(st.text(max_size=30))
@settings(max_examples=200)
@example("a\ud800b")
@example("\ud800")
@example("用\udc00户")
@example("\ud800é")
def test_lone_surrogates_harm_nothing(said: str) -> None:
    """No JSON holds them, but a query may."""
    assert len(query_terms(said)) <= 100
    analyze({"role": "user", "content": said})
    assert score(said, "tea") <= 1


LONG = {
    "line": "a" + "-" * 30_000 + "b",
    "only a line": "-" * 30_000,
    "dots": "a" + ".-" * 15_000 + "b",
    "letters": "b" * 100_000,
    "words": "b " * 20_000,
    "CJK": "用" * 50_000,
    "pieces": "b-" * 20_000,
    "marks": "e" + "\u0301" * 50_000,
}


@pytest.mark.parametrize("long", LONG.values(), ids=LONG)
async def test_what_is_very_long_is_cut_and_looked_for_all_the_same(long: str) -> None:
    assert await score_of(long, "coffee") == 0
    assert (await score_of(long, long) > 0) == bool(query_terms(long))


async def test_a_long_text_without_spaces_is_found_by_its_end() -> None:
    """Chinese has none: what stands between spaces is a paragraph."""
    said = "今天天气很好，我们一起出去散步。" * 200 + "最后喝了龙井"
    assert len(said) > 3_000
    assert await score_of("龙井", said) > 0


def test_remembering_a_chunk_changes_nothing() -> None:
    first = chunks["zanzibar-tea"]
    again = chunks["zanzibar-tea"]
    assert again is first
    long = "z" * 33
    assert chunks[long] == chunks[long]
    assert long not in chunks


def test_the_memory_for_chunks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recallq_worker.search.text._MOST_REMEMBERED", 5)
    chunks.clear()
    for number in range(50):
        assert [token.text for token in tokens(f"word{number}")] == [f"word{number}"]
        assert len(chunks) <= 5


def test_folding_ascii_is_as_folding_anything() -> None:
    said = "".join(map(chr, range(128)))
    assert fold(said) == unicodedata.normalize("NFKC", said).casefold()
