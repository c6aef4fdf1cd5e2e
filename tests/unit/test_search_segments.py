"""How the terms of messages are kept: entries, segments, vocabularies, and when they are merged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq_worker.search.entries import (
    VERSION,
    DamagedIndex,
    Messages,
    session_digest,
)
from recallq_worker.search.scoring import EntriesPart, SegmentPart, rank
from recallq_worker.search.segments import (
    MOST_MESSAGES,
    Fields,
    Segment,
    bucket_of,
    decode,
    encode,
    postings_in,
    sessions_in,
    vocabulary_in,
)
from recallq_worker.search.terms import query_terms
from recallq_worker.search.text import term_of
from recallq_worker.search.upkeep import ENTRIES, compacted, is_due, to_merge
from recallq_worker.search.vocabulary import still_in_use, tokens_in, with_part
from tests.indexing import analyze, encode_entry


class Said(NamedTuple):
    """A message as a test has it."""

    id: bytes
    session: str
    order: int
    weights: dict[int, int]
    usual: int = 0


def entries_of(said: Iterable[Said]) -> dict[bytes, bytes]:
    return {
        each.id: encode_entry(each.session, each.order, each.weights, each.usual) for each in said
    }


def messages_of(said: Iterable[Said]) -> Messages:
    return Messages.of_entries(entries_of(said))


def read(messages: Messages) -> dict[bytes, tuple[int, int, dict[int, int]]]:
    """Of each message the digest of its session, its order key and its terms' weights."""
    assert len(messages) == len(messages.ids) == len(messages.sessions) == len(messages.orders)
    weights: list[dict[int, int]] = [{} for _ in messages.ids]
    for number, term, weight in zip(
        messages.numbers.tolist(), messages.terms.tolist(), messages.weights.tolist(), strict=True
    ):
        assert term not in weights[number], "a term twice"
        weights[number][term] = weight
    heads = zip(messages.sessions.tolist(), messages.orders.tolist(), weights, strict=True)
    return dict(zip(messages.ids, heads, strict=True))


def expected(said: Iterable[Said]) -> dict[bytes, tuple[int, int, dict[int, int]]]:
    return {each.id: (session_digest(each.session), each.order, each.weights) for each in said}


def in_their_places(said: list[Said]) -> list[bytes]:
    """Sessions by their first messages, and in a session by order and id."""
    firsts: dict[str, int] = {}
    for each in said:
        firsts[each.session] = min(each.order, firsts.get(each.session, each.order))
    by_session = sorted(
        said,
        key=lambda each: (
            firsts[each.session], session_digest(each.session), each.order, each.id,
        ),
    )  # fmt: skip
    return [each.id for each in by_session]


# Few different bytes, so that those of a term also stand across two others.
terms = st.binary(min_size=4, max_size=4).map(lambda each: int.from_bytes(each, "little")) | (
    st.lists(st.sampled_from([0, 1, 255]), min_size=4, max_size=4).map(
        lambda each: int.from_bytes(bytes(each), "little")
    )
)
one = st.builds(
    Said,
    st.text("rj-01é", min_size=1, max_size=6).map(str.encode),
    st.sampled_from(["", "s", "t", "用户", "\ud800"]),
    st.integers(0, 5) | st.integers(-(2**63), 2**63 - 1),
    st.dictionaries(terms, st.integers(1, 255), max_size=12),
    st.integers(0, 255),
)
some = st.lists(one, max_size=12, unique_by=lambda each: each.id)
at_least_one = st.lists(one, min_size=1, max_size=12, unique_by=lambda each: each.id)
quick = settings(max_examples=50)


# --- entries --------------------------------------------------------------------------------------


@given(some)
@quick
def test_entries_say_what_was_written(said: list[Said]) -> None:
    assert read(messages_of(said)) == expected(said)


@given(some, some)
@quick
def test_messages_can_be_joined(first: list[Said], second: list[Said]) -> None:
    others = [each for each in second if each.id not in {known.id for known in first}]
    joined = Messages.joined([messages_of(first), messages_of(others)])
    assert read(joined) == expected([*first, *others])


@given(some, st.data())
@quick
def test_some_can_be_taken_away(said: list[Said], data: st.DataObject) -> None:
    gone = {each.id for each in said if data.draw(st.booleans())} | {b"unknown"}
    left = messages_of(said).without(gone)
    assert read(left) == expected(each for each in said if each.id not in gone)


@given(at_least_one)
@quick
def test_sessions_stand_together_and_in_their_order(said: list[Said]) -> None:
    messages = messages_of(said)
    places = messages.places().tolist()
    assert sorted(places) == list(range(len(said)))
    standing = sorted(zip(places, messages.ids, strict=True))
    assert [record_id for _, record_id in standing] == in_their_places(said)


@given(at_least_one)
@quick
def test_entries_are_searched_in_their_places(said: list[Said]) -> None:
    part = EntriesPart(entries_of(said))
    assert part.ids == in_their_places(said)
    assert part.recency is not None
    by_recency = sorted(range(len(said)), key=part.recency.__getitem__)
    orders = {each.id: each.order for each in said}
    found = [orders[part.ids[number]] for number in by_recency]
    assert found == sorted(found)
    for term in {term for each in said for term in each.weights}:
        postings = part.postings(term)
        assert postings is not None
        numbers, weights = postings
        named = [part.ids[number] for number in numbers.tolist()]
        assert len(named) == len(set(named))
        assert dict(zip(named, weights.tolist(), strict=True)) == {
            each.id: each.weights[term] for each in said if term in each.weights
        }
    assert part.postings(0x7E7E7E7E) is None


def test_no_entries_are_nothing() -> None:
    part = EntriesPart({})
    assert (part.size, part.ids, len(part.starts)) == (0, [], 0)
    assert part.postings(1) is None


def test_an_entry_of_another_version_is_not_read() -> None:
    entry = encode_entry("s", 1, {1: 1})
    assert entry[0] == VERSION
    with pytest.raises(DamagedIndex):
        Messages.of_entries({b"r": bytes([VERSION + 1]) + entry[1:]})


# --- segments -------------------------------------------------------------------------------------


@given(at_least_one, st.sets(st.text("abé用", min_size=1, max_size=4)))
@quick
def test_a_segment_says_what_was_written(said: list[Said], vocabulary: set[str]) -> None:
    segment = encode(messages_of(said), vocabulary)
    messages, words = decode(segment.fields)
    assert read(messages) == expected(said)
    assert messages.ids == in_their_places(said)
    assert words == vocabulary
    assert vocabulary_in(segment.fields[b"v"]).split("\n") == sorted(vocabulary or {""})
    assert segment.size == len(said)
    assert segment.last == max(each.order for each in said)
    described = (segment.size, segment.bits, segment.last, segment.ordered)
    assert segment.describe() == b"%d %d %d %d" % described


@given(at_least_one)
@quick
def test_a_segment_knows_where_sessions_begin(said: list[Said]) -> None:
    segment = encode(messages_of(said), [])
    standing = [next(each for each in said if each.id == id_) for id_ in in_their_places(said)]
    starts, digests = sessions_in(segment.fields[b"s"])
    assert [session_digest(standing[start].session) for start in starts.tolist()] == (
        digests.tolist()
    )
    assert len(digests) == len({each.session for each in said})
    for number, each in enumerate(standing):
        if number not in starts.tolist():
            assert each.session == standing[number - 1].session


def naive(said: list[Said]) -> dict[int, dict[bytes, int]]:
    found: dict[int, dict[bytes, int]] = {}
    for each in said:
        for term, weight in each.weights.items():
            found.setdefault(term, {})[each.id] = weight
    return found


def assert_finds(segment: Segment, said: list[Said], others: Iterable[int]) -> None:
    ids = decode(segment.fields)[0].ids
    everything = naive(said)
    for term in {*everything, *others}:
        bucket = segment.fields.get(bucket_of(term, segment.bits))
        found = None if bucket is None else postings_in(bucket, term)
        if term not in everything:
            assert found is None
            continue
        assert found is not None
        numbers, weights = (each.tolist() for each in found)
        assert numbers == sorted(set(numbers))
        named = [ids[number] for number in numbers]
        assert dict(zip(named, weights, strict=True)) == everything[term]


@given(at_least_one, st.lists(terms))
@quick
def test_a_segment_finds_what_a_dictionary_does(said: list[Said], others: list[int]) -> None:
    assert_finds(encode(messages_of(said), []), said, others)


def test_a_term_is_not_found_across_two_others() -> None:
    """The bytes of terms stand one after the other; only whole ones count."""
    first, second = 0x44332211, 0x88776655
    across = [int.from_bytes(bytes.fromhex("1122334455667788")[at : at + 4], "little")
              for at in (1, 2, 3)]  # fmt: skip
    said = [Said(b"r", "s", 1, {first: 7, second: 9})]
    segment = encode(messages_of(said), [])
    assert segment.bits == 0
    assert_finds(segment, said, across)
    # And one that is there besides is found all the same.
    said = [Said(b"r", "s", 1, dict.fromkeys((first, second, *across), 5))]
    assert_finds(encode(messages_of(said), []), said, [])


@pytest.mark.parametrize("count", [1, 40, 2_000])
def test_a_large_segment_has_buckets(count: int) -> None:
    chance = random.Random(count)
    known = [chance.getrandbits(32) for _ in range(count)] + [0, 2**32 - 1]
    said = [
        Said(
            b"r%06d" % number,
            f"s{number % 7}",
            number // 3,
            {chance.choice(known): chance.randint(1, 255) for _ in range(12)},
        )
        for number in range(count)
    ]
    segment = encode(messages_of(said), [])
    buckets = [value for name, value in segment.fields.items() if name.startswith(b"b")]
    assert max(map(len, buckets)) < 20_000
    assert (len(buckets) > 1) == (count > 1)
    assert_finds(segment, said, [chance.getrandbits(32) for _ in range(1000)])
    assert read(decode(segment.fields)[0]) == expected(said)


def test_the_largest_segment_numbers_all_its_messages() -> None:
    said = [Said(b"%d" % number, "s", number, {1: 1}) for number in range(MOST_MESSAGES)]
    segment = encode(messages_of(said), [])
    assert_finds(segment, said, [2])


def test_messages_without_terms_are_kept() -> None:
    """They are neighbours of others, and may get terms never."""
    said = [Said(b"r1", "s", 1, {}), Said(b"r2", "s", 2, {})]
    messages, words = decode(encode(messages_of(said), []).fields)
    assert read(messages) == expected(said)
    assert words == set()


# --- what another hand has touched ----------------------------------------------------------------

TEXTS = ["green tea in spring", "coffee and tea", "龙井茶 please", "the tea of a-1043", ""]
SAID = [
    Said(b"r%d" % number, f"s{number % 2}", 10 + number, dict(analyze({"content": each}).weights))
    for number, each in enumerate(TEXTS * 3)
]


def damaged(value: bytes) -> Iterator[bytes]:
    for length in range(len(value)):
        yield value[:length]
    for at in range(len(value)):
        for flipped in (0x01, 0x80, 0xFF):
            yield value[:at] + bytes([value[at] ^ flipped]) + value[at + 1 :]
    yield value + b"\0"
    yield value + value
    yield b"\xff" * len(value)
    yield b"[1, 2]"
    yield b"{}"
    yield b"17"


def damaged_segments() -> Iterator[Fields]:
    fields = encode(messages_of(SAID), ["green", "tea"]).fields
    for name, value in fields.items():
        yield {key: kept for key, kept in fields.items() if key != name}
        for bad in damaged(value):
            yield {**fields, name: bad}
    for number in range(300):
        chance = random.Random(number)
        yield {**fields, chance.choice(list(fields)): chance.randbytes(chance.randint(0, 60))}


def compact(fields: Fields) -> None:
    compacted({b"new": encode_entry("s0", 1, {1: 1})}, ["x"], [fields], {b"r1"})


def look_into(fields: Fields) -> None:
    if b"v" in fields:
        vocabulary_in(fields[b"v"])
    if b"s" in fields:
        sessions_in(fields[b"s"])
    for each in SAID:
        for term in each.weights:
            postings_in(fields.get(b"b0", b""), term)


def search(fields: Fields) -> None:
    if b"s" not in fields:
        return
    parts = [SegmentPart(len(SAID), 0, fields[b"s"], fields), EntriesPart(entries_of(SAID[:2]))]
    for session_id in (None, "s1"):
        ranked = rank(parts, query_terms("green tea"), total=20, session_id=session_id, most=5)
        for (part, number), score in ranked.portion(0, 5):
            assert 0 <= part < 2 and 0 <= number < parts[part].size
            assert 0 <= score <= 1


@pytest.mark.parametrize("use", [decode, look_into, compact, search])
def test_a_damaged_segment_is_known_for_one_or_gives_something(
    use: Callable[[Fields], object],
) -> None:
    """Only `DamagedIndex` has an index made anew; of anything else, nobody would know the cause."""
    other: list[str] = []
    for fields in damaged_segments():
        try:
            use(fields)
        except DamagedIndex:
            pass
        except Exception as error:
            other.append(f"{type(error).__name__}: {error}")
    assert sorted(set(other)) == []


def test_damaged_entries_are_known_for_such_or_give_something() -> None:
    entries = entries_of(SAID[:3])
    for name, value in entries.items():
        for bad in damaged(value):
            try:
                part = EntriesPart({**entries, name: bad})
            except DamagedIndex:
                continue
            rank([part], query_terms("green tea"), total=3, session_id="s1", most=5)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_no_entry_or_one(value: bytes) -> None:
    try:
        messages = Messages.of_entries({b"r": value})
    except DamagedIndex:
        return
    assert len(messages) == 1


@given(st.binary(max_size=80), terms)
def test_arbitrary_bytes_are_no_bucket_or_one(value: bytes, term: int) -> None:
    try:
        found = postings_in(value, term)
    except DamagedIndex:
        return
    assert found is None or len(found[0]) == len(found[1])


# --- vocabulary -----------------------------------------------------------------------------------


def test_a_vocabulary_has_what_parts_are_looked_for_in() -> None:
    """Not stop words, nor what nobody remembers a part of; accents are evened out."""
    texts = [analyze({"content": each}).text for each in ("The café, A-1043!", "龙井茶", "w" * 201)]
    assert tokens_in(texts) == {"cafe", "1043", "a-1043", "龙井", "井茶"}
    assert tokens_in([]) == tokens_in([""]) == set()


def test_tokens_are_in_use_while_their_terms_occur() -> None:
    known = {"tea", "teapot", "a-1043", "1043", "龙井", "running"}
    occur = [term_of("tea"), term_of("1043"), term_of("run")]
    assert still_in_use(known, occur, []) == {"tea", "1043", "running"}
    assert still_in_use(known, occur, [term_of("tea"), term_of("run")]) == {
        "tea",
        "1043",
        "running",
    }
    assert still_in_use(known, [], []) == set()


def test_which_form_of_a_word_was_removed_is_not_told() -> None:
    """Whoever looks for a part of what they share finds those who still say it."""
    run = term_of("run")
    known = ["running", "runs", "tea"]
    assert still_in_use(known, [run, term_of("tea")], []) == set(known)
    left = still_in_use(known, [run, term_of("tea")], [run])
    assert "running" not in left and "runs" not in left
    assert {token.term for token in with_part(left, "run", 9)} == {run}


@pytest.mark.parametrize(
    "forms", [["runs", "running"], ["raises", "raised"], ["horses", "horse"], ["owned", "owning"]]
)
def test_what_takes_the_place_of_forms_has_their_term(forms: list[str]) -> None:
    """What forms share may have another stem yet, or be a stop word."""
    (term,) = {term_of(form) for form in forms}
    for _ in range(2):  # also where it happens again
        left = still_in_use(forms, [term], [term])
        assert {token.term for token in with_part(left, forms[0][:3], 9)} == {term}
        forms = [*left, forms[0]]


def parts(vocabularies: list[str], part: str, most: int = 9) -> list[str]:
    return [token.text for token in with_part(vocabularies, part, most)]


def test_words_that_begin_with_a_part_come_first_and_the_shorter_before_the_longer() -> None:
    vocabulary = "oversteam\nsteam\ntea\nteal\nteam\nteapot\nunrelated"
    found = parts([vocabulary], "tea")
    assert found == ["tea", "teal", "team", "teapot", "steam", "oversteam"]
    assert parts([vocabulary], "tea", most=2) == ["tea", "teal"]
    assert parts([vocabulary], "zzz") == parts([], "tea") == parts([""], "tea") == []


def test_a_word_is_found_at_either_end_of_a_vocabulary() -> None:
    assert parts(["alpha\nbeta"], "alp") == ["alpha"]
    assert parts(["alpha\nbeta"], "eta") == ["beta"]
    assert parts(["alpha\nbeta"], "habe") == []
    assert parts(["alpha", "alphabet"], "alpha") == ["alpha", "alphabet"]


def test_a_part_is_looked_for_in_tokens_and_not_in_what_is_around_them() -> None:
    """Texts of messages have chunks where a vocabulary has tokens."""
    assert parts(["(snake_case)!"], "cas") == ["case", "snake_case"]
    assert parts(["(snake_case)!"], "e)!") == []
    assert parts(["there\nother"], "her") == []
    assert parts(["thermos\nother"], "the") == ["thermos"]


def test_a_part_of_very_many_words_is_found_in_some() -> None:
    vocabulary = "\n".join(f"tea{number:05}" for number in range(100_000))
    assert len(parts([vocabulary], "tea", most=64)) == 64


# --- compacting -----------------------------------------------------------------------------------


def texts_of(numbers: Iterable[int]) -> list[str]:
    return [analyze({"content": (TEXTS * 3)[number]}).text for number in numbers]


def made(numbers: Iterable[int]) -> Segment:
    chosen = list(numbers)
    segment = compacted(entries_of(SAID[number] for number in chosen), texts_of(chosen), [])
    assert segment is not None
    return segment


def test_it_is_the_same_segment_whatever_it_was_made_of() -> None:
    at_once = made(range(12))
    older, newer = made(range(5)), made(range(5, 9))
    merged = compacted(entries_of(SAID[9:12]), texts_of(range(9, 12)), [newer.fields, older.fields])
    assert merged == at_once


def test_what_is_gone_is_taken_out_with_its_words() -> None:
    segment = made([0, 1, 5, 6])
    left = compacted({}, [], [segment.fields], {b"r0", b"r5"})
    assert left is not None
    messages, words = decode(left.fields)
    assert set(messages.ids) == {b"r1", b"r6"}
    assert words == {"coffee", "tea"}
    held = b"\n".join(left.fields.values())
    assert b"r0" not in held and b"r5" not in held
    assert_finds(left, [SAID[1], SAID[6]], [term_of("green"), term_of("spring")])


def test_entries_may_be_gone_too() -> None:
    left = compacted(entries_of(SAID[:2]), texts_of(range(2)), [], {b"r0"})
    assert left is not None
    assert decode(left.fields)[1] == {"coffee", "tea"}


def test_nothing_left_is_no_segment() -> None:
    segment = made([0, 1])
    assert compacted({}, [], [segment.fields], {b"r0", b"r1"}) is None


def test_nothing_gone_changes_nothing() -> None:
    segment = made(range(6))
    assert compacted({}, [], [segment.fields], {b"unknown"}) == segment


# --- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "gone", "indexed", "due"),
    [
        (0, 0, 0, False),
        (ENTRIES - 1, 0, 10**6, False),
        (ENTRIES, 0, 0, True),
        (0, ENTRIES - 1, 0, False),
        (0, ENTRIES, ENTRIES, True),
        (0, ENTRIES, 4 * ENTRIES + 4, False),
        (0, 2_499, 10_000, False),
        (0, 2_500, 10_000, True),
    ],
)
def test_when_something_is_due(entries: int, gone: int, indexed: int, due: bool) -> None:
    assert is_due(entries, gone, indexed) == due


class Simulation:
    """Segments as lists of the flushes whose messages they hold."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []
        self.written: list[int] = []
        self.segments: dict[int, list[int]] = {}
        self.most_segments = 0

    def flush(self, size: int) -> None:
        sizes = {key: self._size(flushes) for key, flushes in self.segments.items()}
        merged = to_merge(size, sizes, self.most)
        assert len(merged) == len(set(merged))
        together = [len(self.sizes)]
        for key in merged:
            together += self.segments.pop(key)
        self.sizes.append(size)
        self.written.append(0)
        for flush in together:
            self.written[flush] += 1
        assert self._size(together) <= max(self.most, size)
        self.segments[len(self.sizes)] = together
        self.most_segments = max(self.most_segments, len(self.segments))

    def _size(self, flushes: list[int]) -> int:
        return sum(self.sizes[flush] for flush in flushes)


@pytest.mark.parametrize("most", [16_384, MOST_MESSAGES])
@pytest.mark.parametrize("varied", [False, True])
def test_there_are_few_segments_and_messages_are_rewritten_a_few_times(
    most: int, varied: bool
) -> None:
    chance = random.Random(most)
    simulation = Simulation(most)
    stored = 0
    while stored < 100_000:
        size = chance.randint(1, 700) if varied else ENTRIES
        simulation.flush(size)
        stored += size
    # Three of each of five levels, and those that are too large to grow.
    assert simulation.most_segments <= 15 + 2 * stored // most
    assert max(simulation.written) <= 10
    assert sum(
        size * times for size, times in zip(simulation.sizes, simulation.written, strict=True)
    ) <= (6 * stored)


def test_three_small_segments_are_left_alone() -> None:
    few: Mapping[str, int] = {"a": 128, "b": 128}
    assert to_merge(128, few) == []
    assert sorted(to_merge(128, {**few, "c": 130})) == ["a", "b", "c"]
    assert sorted(to_merge(128, {**few, "c": 130, "large": 10_000})) == ["a", "b", "c"]
    assert to_merge(128, {}) == []
    # Those that are smaller than what is made are merged with it, whatever their level.
    assert sorted(to_merge(2_048, {"a": 128, "b": 600, "c": 2_100})) == ["a", "b", "c"]


def test_nothing_is_merged_into_what_would_be_too_large() -> None:
    sizes = dict.fromkeys(range(10), 100)
    chosen = to_merge(128, sizes, most=500)
    assert len(chosen) == 3
    assert to_merge(128, {1: 400, 2: 400, 3: 400}, most=500) == []
