"""Which messages answer a query and how well, seen through a store in memory."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq.contract import Scope
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.backends.in_memory import InMemoryStore
from recallq_worker.search import scoring, upkeep
from recallq_worker.search.entries import entries_of
from recallq_worker.search.finder import Wanted, find
from recallq_worker.search.in_memory import MemoryIndex
from recallq_worker.search.scoring import EntriesPart, Place, rank
from recallq_worker.search.segments import decode
from recallq_worker.search.terms import query_terms
from tests.indexing import analyze

USER = Scope("t", "u")
NEVER = 10**9
"""So many entries do not come together, so all stay entries."""
_numbers = itertools.count(1)


def said(
    text: str,
    session: str = "s",
    *,
    order: int | None = None,
    record_id: str | None = None,
    epoch: int = 0,
) -> Record:
    number = next(_numbers)
    return Record(
        record_id or f"r{number:08}",
        Scope("t", "u", session),
        number if order is None else order,
        epoch,
        {"role": "user", "content": text},
    )


async def holding(records: Iterable[Record]) -> InMemoryStore:
    store = InMemoryStore()
    assert set(await store.add(list(records))) <= {Added.NEW}
    return store


async def hits(
    store: InMemoryStore,
    query: str,
    *,
    session: str | None = None,
    top_k: int = 10,
    least: float | None = None,
) -> list[Hit]:
    return await store.search(Scope("t", "u", session), query, top_k=top_k, score_threshold=least)


def texts(found: Iterable[Hit]) -> list[str]:
    return [hit.record.message["content"] for hit in found]


def ids(found: Iterable[Hit]) -> list[str]:
    return [hit.record.record_id for hit in found]


def index_of(store: InMemoryStore) -> MemoryIndex:
    return store._users["t", "u"].index


@pytest.fixture(params=[NEVER, 4, 128], ids=["entries", "small segments", "as it is"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many entries become a segment."""
    count: int = request.param
    monkeypatch.setattr(upkeep, "ENTRIES", count)
    return count


# --- an exhaustive computation --------------------------------------------------------------------

NEIGHBOURS = {1: 0.6, 2: 0.42, 3: 0.35}


def exhaustively(records: Sequence[Record], query: str) -> dict[str, float]:
    """What the records score that answer, computed for each of them, from what is documented."""
    weights = {each.record_id: analyze(each.message).weights for each in records}
    sessions: dict[str | None, list[Record]] = {}
    for each in sorted(records, key=lambda each: (each.order, each.record_id)):
        sessions.setdefault(each.scope.session_id, []).append(each)
    scores = dict.fromkeys(weights, 0.0)
    possible = 0.0
    for term in query_terms(query):
        count = sum(term.term in each for each in weights.values())
        rarity = math.log(1 + max(len(records) - count, 0.5) / (count + 0.5))
        possible += rarity
        for session in sessions.values():
            said_here = [weights[each.record_id].get(term.term, 0) for each in session]
            for at, each in enumerate(session):
                near = [
                    share * said_here[at + far * sign]
                    for far, share in NEIGHBOURS.items()
                    for sign in (1, -1)
                    if 0 <= at + far * sign < len(session)
                ]
                scores[each.record_id] += rarity * max([said_here[at], *near])
    wanted = {term.term for term in query_terms(query)}
    return {
        record_id: score / possible / 255
        for record_id, score in scores.items()
        if wanted & set(weights[record_id])
    }


def assert_best(found: list[Hit], scores: dict[str, float], top_k: int) -> None:
    """The best there are, each with its score, and ties by recency."""
    assert len(set(ids(found))) == len(found) == min(top_k, len(scores))
    for hit in found:
        assert hit.score == pytest.approx(scores[hit.record.record_id], abs=3e-6)
    best = sorted(scores.values(), reverse=True)[:top_k]
    assert [hit.score for hit in found] == pytest.approx(best, abs=3e-6)
    keys = [(hit.score, hit.record.order, hit.record.record_id) for hit in found]
    assert keys == sorted(keys, reverse=True)


# None is a part of another, or of their stems.
WORDS = ["tea", "green", "coffee", "honey", "lisbon", "mountain", "purple", "zebra"]
conversations = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
        st.sampled_from(["s", "t", "u"]),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize("in_a_segment", [False, True])
@given(conversations, st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), st.integers(1, 40))
@settings(max_examples=60)
async def test_the_best_are_those_of_an_exhaustive_computation(
    in_a_segment: bool, conversation: list[tuple[str, str, int]], asked: list[str], top_k: int
) -> None:
    records = [said(text, session, order=order) for text, session, order in conversation]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upkeep, "ENTRIES", len(records) if in_a_segment else NEVER)
        store = await holding(records)
    assert len(index_of(store)._segments) == in_a_segment
    query = " ".join(asked)
    scores = exhaustively(records, query)
    assert_best(await hits(store, query, top_k=top_k), scores, top_k)
    of_a_session = {
        each.record_id: scores[each.record_id]
        for each in records
        if each.record_id in scores and each.scope.session_id == "t"
    }
    assert_best(await hits(store, query, top_k=top_k, session="t"), of_a_session, top_k)


def history(count: int, together: int = 16) -> list[Record]:
    """Conversations one after the other; common words, and some that are ever rarer."""
    chance = random.Random(count)
    words = [*WORDS, *(f"word{number:03}" for number in range(200))]
    odds = [1 / (1 + place) for place in range(len(words))]
    return [
        said(" ".join(chance.choices(words, odds, k=chance.randint(3, 25))), f"s{n // together}")
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "query", ["tea", "tea green", "tea zebra", "green word001 tea", "tea word150 word007 coffee"]
)
async def test_of_thousands_of_candidates_the_best_are_found(query: str) -> None:
    """Neighbours are looked at only around those that are good by themselves; what is among the
    best of so many has nearly everything itself or right beside it."""
    records = history(4096)
    scores = exhaustively(records, query)
    assert len(scores) > 2000
    store = await holding(records)
    assert_best(await hits(store, query, top_k=10), scores, 10)


async def test_of_thousands_of_candidates_those_beside_the_best_are_found(layout: int) -> None:
    """By itself, what stands beside the best is the worst of all."""
    conversation = [*["hills"] * 6, "tea " + "lisbon " * 60, "zebra", *["hills"] * 8]
    fillers = [said("tea", f"s{n // 16}") for n in range(2048)]
    beside = [said(text, "beside") for text in conversation]
    records = [*fillers[:1024], *beside, *fillers[1024:]]
    scores = exhaustively(records, "tea zebra")
    found = await hits(await holding(records), "tea zebra", top_k=2)
    if layout != 4:  # where sessions are split, so may be these two
        assert [hit.record for hit in found] == [beside[7], beside[6]]
        assert_best(found, scores, 2)


async def test_of_thousands_of_candidates_in_a_session_the_best_are_found() -> None:
    records = [said(each.message["content"], f"s{n % 2}") for n, each in enumerate(history(4096))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upkeep, "ENTRIES", len(records))
        store = await holding(records)
    scores = exhaustively(records, "tea green")
    there = {each.record_id for each in records if each.scope.session_id == "s1"} & set(scores)
    assert len(there) > 1024
    expected = {record_id: scores[record_id] for record_id in there}
    assert_best(await hits(store, "tea green", session="s1"), expected, 10)


async def test_it_does_not_matter_what_is_in_segments() -> None:
    """As long as no session is split: neighbours are known within a segment."""
    records = history(1024)
    found: list[list[tuple[str, float]]] = []
    segments: list[int] = []
    for count in (NEVER, 16, 48, 128, 1024):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upkeep, "ENTRIES", count)
            store = await holding(records)
        segments.append(len(index_of(store)._segments))
        found.append([
            (hit.record.record_id, hit.score)
            for query in ("tea", "zebra purple", "word003 tea", "ord00", "zeb", "what is tea")
            for session in (None, "s7")
            for hit in await hits(store, query, session=session, top_k=20)
        ])  # fmt: skip
    assert segments[0] == 0 and segments[-1] == 1 and max(segments) > 2
    assert all(each == found[0] for each in found)


# --- scores ---------------------------------------------------------------------------------------


async def test_better_matches_come_first(layout: int) -> None:
    store = await holding(
        said(text, f"s{n}")
        for n, text in enumerate(
            ["nothing", "teapot", "tea", "green tea", "green tea green tea", "green hills", "tea x"]
        )
    )
    found = await hits(store, "green tea")
    assert texts(found)[:2] == ["green tea green tea", "green tea"]
    assert texts(found)[-1] == "teapot"
    assert "nothing" not in texts(found)
    assert all(0 < hit.score <= 1 for hit in found)


async def test_a_message_that_says_all_terms_once_scores_about_two_thirds(layout: int) -> None:
    """Whatever the query, and however much there is: thresholds can be chosen once."""
    few = await holding([said("green tea from lisbon")])
    many = await holding([said("green tea from lisbon"), *history(300)])
    for store in (few, many):
        for query in ("tea", "green tea", "green tea lisbon"):
            best = (await hits(store, query, top_k=1))[0]
            assert 0.55 < best.score < 1


async def test_saying_it_over_and_over_approaches_one() -> None:
    store = await holding([said("tea " * 5000)])
    (hit,) = await hits(store, "tea")
    assert 0.9 < hit.score <= 1


async def test_rare_words_count_more(layout: int) -> None:
    store = await holding(
        [said("tea", "one"), said("green", "two"), *(said("green", f"s{n}") for n in range(20))]
    )
    found = await hits(store, "green tea", top_k=50)
    assert texts(found) == ["tea", *["green"] * 21]
    assert found[0].score > 2 * found[1].score


async def test_the_rarer_half_of_a_query_is_more_than_half_of_it(layout: int) -> None:
    store = await holding(
        [said("tea", "one"), said("green tea", "two"), *(said("green", f"s{n}") for n in range(9))]
    )
    found = {hit.record.message["content"]: hit.score for hit in await hits(store, "green tea")}
    assert found["tea"] > found["green tea"] / 2 > found["green"]


async def test_a_word_in_a_short_message_counts_more_than_in_a_long_one(layout: int) -> None:
    store = await holding([said("tea", "a"), said("tea " + "and honey with coffee " * 10, "b")])
    found = await hits(store, "tea")
    assert texts(found)[0] == "tea"
    assert found[0].score > found[1].score


async def test_an_identifier_that_nobody_says_is_looked_for_by_its_words(layout: int) -> None:
    """It takes nothing from them: the score is that of a query that has only them."""
    store = await holding([said("order 1043"), said("something else")])
    (by_whole,), (by_words,) = await hits(store, "order-1043"), await hits(store, "order 1043")
    assert by_whole.score == by_words.score


@pytest.mark.parametrize("least", [None, 0.0, -1.0])
async def test_what_does_not_match_is_never_a_hit(least: float | None, layout: int) -> None:
    store = await holding([said("coffee"), said("tea"), said(""), said("?")])
    assert texts(await hits(store, "tea", least=least)) == ["tea"]


async def test_a_threshold_keeps_what_reaches_it(layout: int) -> None:
    store = await holding(said(text, f"s{n}") for n, text in enumerate(["green tea", "tea", "x"]))
    best, next_best = await hits(store, "green tea")
    assert len(await hits(store, "green tea", least=next_best.score)) == 2
    assert len(await hits(store, "green tea", least=next_best.score + 1e-6)) == 1
    assert len(await hits(store, "green tea", least=best.score)) == 1
    assert await hits(store, "green tea", least=1.01) == []


@pytest.mark.parametrize("top_k", [1, 2, 5, 100, 1000])
async def test_there_are_no_more_than_were_asked_for(top_k: int, layout: int) -> None:
    store = await holding(said(f"tea {n}") for n in range(300))
    found = await hits(store, "tea", top_k=top_k)
    assert len(found) == min(top_k, 300)
    assert len(set(ids(found))) == len(found)


async def test_nobody_has_anything_at_first() -> None:
    assert await hits(InMemoryStore(), "tea") == []


# --- recency --------------------------------------------------------------------------------------


async def test_equal_matches_come_newest_first_across_sessions(layout: int) -> None:
    """And across what is in segments and what is not, whatever came first."""
    records = [said("tea", f"s{n % 3}", order=1000 + n) for n in range(10)]
    random.Random(7).shuffle(records)
    store = await holding(records)
    newest = sorted(records, key=lambda each: -each.order)
    assert ids(await hits(store, "tea")) == [each.record_id for each in newest]
    assert ids(await hits(store, "tea", top_k=3)) == [each.record_id for each in newest[:3]]


async def test_equal_matches_of_one_moment_come_by_record_id(layout: int) -> None:
    """The last message of a call is the newest."""
    records = [said("tea", order=7, record_id=f"j-{n:05}") for n in (3, 1, 4, 0, 2)]
    store = await holding(records)
    assert ids(await hits(store, "tea", top_k=2)) == ["j-00004", "j-00003"]


@pytest.mark.parametrize("count", [100, 640, 1_100, 1_280, 4_000])
async def test_of_very_many_equals_the_newest_are_found(count: int) -> None:
    store = await holding(
        said("tea", f"s{n // 10}", order=n, record_id=f"{n}") for n in range(count)
    )
    assert ids(await hits(store, "tea", top_k=3)) == [f"{count - n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("count", [60, 512])
async def test_of_the_equals_of_two_conversations_at_a_time_the_newest_are_found(
    count: int, layout: int
) -> None:
    store = await holding(said("tea", f"s{n % 2}", order=n, record_id=f"{n}") for n in range(count))
    assert ids(await hits(store, "tea", top_k=3)) == [f"{count - n}" for n in (1, 2, 3)]


# --- neighbours -----------------------------------------------------------------------------------


async def scores_of(records: list[Record], query: str, **options: str) -> dict[str, float]:
    found = await hits(await holding(records), query, top_k=100, **options)  # type: ignore[arg-type]
    return {hit.record.record_id: hit.score for hit in found}


@pytest.fixture(params=[False, True], ids=["entries", "segment"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """All messages are entries, or 12 of them a segment."""
    count = 12 if request.param else NEVER
    monkeypatch.setattr(upkeep, "ENTRIES", count)
    return count


def around(before: str, session: str) -> list[Record]:
    """Six messages, of which the last is about tea, and one about something else."""
    filler = ["hills"] * 5
    return [said(text, session) for text in (*filler[:4], before, "tea")]


async def test_what_was_said_just_before_counts(together: int) -> None:
    near, far = around("green", "s"), around("hills", "t")
    scores = await scores_of([*near, *far], "green tea")
    assert scores[near[-1].record_id] > scores[far[-1].record_id]
    # Those that say nothing of it themselves are no hits.
    assert set(scores) == {near[-1].record_id, near[-2].record_id, far[-1].record_id}


@pytest.mark.parametrize("after", [False, True])
async def test_what_is_nearer_counts_more_and_nothing_beyond_three(
    after: bool, together: int
) -> None:
    found: list[float] = []
    for distance in range(1, 6):
        line = ["tea", *["hills"] * 5]
        line[distance] = "green"
        records = [said(text) for text in (line if after else reversed(line))]
        records += [said("lisbon", "t") for _ in range(6)]
        (tea,) = (each.record_id for each in records if each.message["content"] == "tea")
        found.append((await scores_of(records, "green tea"))[tea])
    assert found[0] > found[1] > found[2] > found[3] == found[4]


async def test_nothing_counts_across_sessions(together: int) -> None:
    """Also where one session ends and the next begins."""
    lone = [said("green", "a"), said("tea", "b"), said("green", "c")]
    other = [said("hills", f"x{n}") for n in range(9)]
    scores = await scores_of([*lone, *other], "green tea")
    apart = [said("tea", "b"), said("hills", "d"), said("green", "a"), said("green", "c")]
    expected = await scores_of([*apart, *other[:8]], "green tea")
    assert scores[lone[1].record_id] == expected[apart[0].record_id]


async def test_the_session_that_is_asked_for_keeps_its_scores(together: int) -> None:
    near, far = around("green", "s"), around("green", "t")
    everywhere = await scores_of([*near, *far], "green tea")
    again = [said(each.message["content"], each.scope.session_id or "") for each in [*near, *far]]
    there = await scores_of(again, "green tea", session="t")
    assert list(there.values()) == [everywhere[each.record_id] for each in (far[-1], far[-2])]
    assert set(there) == {again[-1].record_id, again[-2].record_id}


async def test_repeating_what_was_said_gains_nothing(together: int) -> None:
    """Equal messages are equal, beside each other or alone."""
    beside = [said("green tea", "s") for _ in range(6)]
    alone = [said(text, "t") for text in (*["hills"] * 5, "green tea")]
    scores = await scores_of([*beside, *alone], "green tea")
    assert len(scores) == 7
    assert len(set(scores.values())) == 1


async def test_a_neighbour_counts_less_than_saying_it_oneself(together: int) -> None:
    near, itself = around("green", "s"), around("green tea", "t")
    scores = await scores_of([*near, *itself], "green tea")
    assert scores[itself[-2].record_id] > scores[near[-1].record_id]


# --- the session that is asked for ----------------------------------------------------------------


async def test_a_session_is_searched_wherever_its_messages_are(layout: int) -> None:
    records = [said(f"tea {n}", f"s{n % 5}") for n in range(300)]
    store = await holding(records)
    found = await hits(store, "tea", session="s3", top_k=100)
    assert set(ids(found)) == {each.record_id for each in records[3::5]}
    assert await hits(store, "tea", session="none") == []


async def test_few_matches_in_a_session_are_found_among_many_elsewhere(layout: int) -> None:
    records = [said("tea", "loud") for _ in range(2000)]
    records.insert(700, said("tea with very much honey from lisbon and other things", "quiet"))
    store = await holding(records)
    assert ids(await hits(store, "tea", session="quiet")) == [records[700].record_id]


# --- parts of words -------------------------------------------------------------------------------


async def test_a_part_of_a_word_finds_less_than_the_word(layout: int) -> None:
    store = await holding(said(text, f"s{n}") for n, text in enumerate(["teapot", "tea", "steam"]))
    found = await hits(store, "tea")
    assert texts(found)[0] == "tea"
    assert set(texts(found)) == {"teapot", "tea", "steam"}
    assert found[0].score >= 1.9 * found[1].score


async def test_parts_are_not_looked_for_where_the_words_find_enough(layout: int) -> None:
    store = await holding([said("teapot"), *(said("tea") for _ in range(10))])
    assert set(texts(await hits(store, "tea", top_k=10))) == {"tea"}
    assert set(texts(await hits(store, "tea", top_k=11))) == {"tea", "teapot"}


async def test_a_term_that_nobody_says_is_a_part_even_where_others_find_enough(
    layout: int,
) -> None:
    store = await holding([said("green teapot"), *(said("green", f"s{n}") for n in range(20))])
    assert texts(await hits(store, "green eapo", top_k=3))[0] == "green teapot"


async def test_a_lone_character_counts_as_a_word(layout: int) -> None:
    store = await holding([said("我喜欢喝茶", "a"), said("茶", "b"), said("咖啡", "c")])
    found = await hits(store, "茶")
    assert set(texts(found)) == {"我喜欢喝茶", "茶"}
    assert all(hit.score > 0.5 for hit in found)


async def test_a_lone_character_is_looked_for_in_words_even_where_it_is_found_alone(
    layout: int,
) -> None:
    store = await holding([*(said("茶", f"s{n}") for n in range(10)), said("喝茶", "newest")])
    assert texts(await hits(store, "茶", top_k=3)) == ["喝茶", "茶", "茶"]


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [False, True])
async def test_what_has_vanished_makes_room_for_the_next(flushed: bool) -> None:
    index = MemoryIndex()
    records = {each.record_id: each for each in (said("tea") for _ in range(300))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upkeep, "ENTRIES", 50 if flushed else NEVER)
        for each in records.values():
            index.add(each)
    newest = sorted(records, reverse=True)
    there: Callable[[str], Record | None] = {name: records[name] for name in newest[150:]}.get
    found = await find(index.reader(there), Wanted("tea", None, 5, None))
    assert ids(found) == newest[150:155]
    nothing = await find(index.reader(lambda name: None), Wanted("tea", None, 5, None))
    assert nothing == []


# --- whatever happens to a store ------------------------------------------------------------------


def check_forgotten(store: InMemoryStore, live: dict[str, Record]) -> None:
    """Nothing but what is live is known to any part of the index."""
    index = index_of(store)
    kept = {record_id.decode() for record_id in index._entries}
    assert set(index._texts) == set(index._entries)
    for segment in index._segments.values():
        messages, words = decode(segment.fields)
        named = {record_id.decode() for record_id in messages.ids}
        assert not named & kept
        kept |= named
        assert segment.size == len(messages.ids) > 0
        spoken = {
            word for name in named for word in live[name].message["content"].split()
        }  # fmt: skip
        assert words == spoken
    assert kept == set(live)
    assert index._gone == {}


async def check_found(store: InMemoryStore, live: dict[str, Record]) -> None:
    assert len(index_of(store)) == len(live)
    for word in WORDS:
        everywhere = ids(await hits(store, word, top_k=1000))
        expected = {name for name, each in live.items() if word in each.message["content"]}
        assert len(everywhere) == len(set(everywhere))
        assert set(everywhere) == expected, word
    there = ids(await hits(store, "tea", session="s1", top_k=1000))
    assert set(there) == {
        name
        for name, each in live.items()
        if "tea" in each.message["content"] and each.scope.session_id == "s1"
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize("entries", [3, 20])
async def test_a_search_finds_what_is_there_whatever_happened(
    seed: int, most: int | None, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "ENTRIES", entries)
    chance = random.Random(seed)
    store = InMemoryStore(most)
    live: dict[str, Record] = {}
    former: dict[str, Record] = {}
    epoch = 0

    async def add(record: Record) -> None:
        (added,) = await store.add([record])
        assert added is (Added.KNOWN if record.record_id in live else Added.NEW)
        if added is Added.KNOWN:
            before = live[record.record_id]
            live[record.record_id] = Record(
                before.record_id, before.scope, before.order, max(before.epoch, epoch),
                before.message,
            )  # fmt: skip
            return
        live[record.record_id] = record
        former.pop(record.record_id, None)
        session = [each for each in live.values() if each.scope == record.scope]
        session.sort(key=lambda each: (each.order, each.record_id))
        for each in session[: -(most or NEVER)]:
            former[each.record_id] = live.pop(each.record_id)

    async def delete(session: str | None) -> None:
        nonlocal epoch
        before = chance.choice([epoch, epoch + 1])
        epoch = max(epoch, before)
        gone = {
            name: each
            for name, each in live.items()
            if each.epoch < before and session in (None, each.scope.session_id)
        }
        assert await store.delete(Scope("t", "u", session), before_epoch=before) == len(gone)
        former.update(gone)
        for name in gone:
            del live[name]
        check_forgotten(store, live)

    for _ in range(100):
        what = chance.random()
        text = " ".join(chance.choices(WORDS, k=chance.randint(0, 4)))
        session = f"s{chance.randint(0, 2)}"
        # Some come late, between others.
        order = next(_numbers) - chance.choice([0, 0, 0, 50])
        if what < 0.75 or not live:
            await add(said(text, session, order=order, epoch=epoch))
        elif what < 0.85:
            await add(said(text, session, record_id=chance.choice(list(live)), epoch=epoch))
        elif what < 0.93 and former:
            # The same id as something that is gone, as an idempotency key makes it.
            name = chance.choice(list(former)[-3:])
            await add(said(text, session, order=order, record_id=name, epoch=epoch))
        else:
            await delete(chance.choice([session, session, None]))
        await check_found(store, live)
    await delete(None)


async def test_what_comes_back_after_it_fell_out_of_its_session_is_found_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The index may still know the one that fell out, which is another message."""
    monkeypatch.setattr(upkeep, "ENTRIES", 3)
    store = InMemoryStore(3)
    await store.add([said("zebra", record_id="k1")])
    await store.add([said("tea") for _ in range(3)])
    assert await hits(store, "zebra") == []
    assert await store.add([said("coffee", record_id="k1")]) == [Added.NEW]
    assert await hits(store, "zebra") == []
    assert texts(await hits(store, "coffee")) == ["coffee"]
    assert len(index_of(store)) == 3


async def test_the_index_forgets_what_falls_out_of_sessions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not at once, but before it is much of what there is."""
    monkeypatch.setattr(upkeep, "ENTRIES", 8)
    store = InMemoryStore(10)
    for number in range(500):
        await store.add([said(f"tea {number}", f"s{number % 2}")])
        index = index_of(store)
        assert len(index) == len(store._users["t", "u"].records) <= 20
        assert len(index._gone) <= 8
        assert index._indexed <= 36
    assert len(await hits(store, "tea", top_k=100)) == 20


async def test_many_messages_are_in_few_segments() -> None:
    store = await holding(said(f"tea {n % 100}", f"s{n // 50}") for n in range(5000))
    index = index_of(store)
    assert len(index._segments) <= 12
    assert len(index._entries) < upkeep.ENTRIES
    assert len(index) == 5000


# --- where all is in entries --------------------------------------------------------------------

_WORDS = ["green", "tea", "black", "coffee", "milk", "sugar", "cup", "pot"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from(_WORDS), max_size=6)),
             min_size=1, max_size=40),
    st.lists(st.sampled_from(_WORDS), min_size=1, max_size=4),
    st.sampled_from([None, "a", "z"]),
)  # fmt: skip
@settings(deadline=None)
def test_what_is_remembered_of_terms_ranks_as_what_is_reckoned(
    told: list[tuple[str, list[str]]], query: list[str], session: str | None
) -> None:
    entries = {
        f"r{number:03}".encode(): entry
        for number, (entry, _) in enumerate(
            entries_of(
                [session_id for session_id, _ in told],
                list(range(len(told))),
                [{"content": " ".join(words)} for _, words in told],
            )
        )
    }
    part = EntriesPart(entries)

    def ranked(most: int) -> tuple[list[tuple[Place, float]], list[int]]:
        terms = query_terms(" ".join(query))
        found = rank([part], terms, total=len(told), session_id=session, most=most)
        return list(found.portion(0, most)), [term.count for term in terms]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_ALL", 0)  # nothing is few
        reckoned = ranked(50)
    assert ranked(50) == reckoned
    assert ranked(50) == reckoned  # from memory


def test_no_more_is_remembered_than_is_said() -> None:
    many = [f"word{number}" for number in range(200)]
    ((entry, _),) = entries_of(["s"], [1], [{"content": " ".join(many)}])
    part = EntriesPart({b"r": entry})
    for word in many:
        rank([part], query_terms(word), total=1, session_id=None, most=1)
    assert 0 < len(part._around) <= scoring._REMEMBERED_TERMS
