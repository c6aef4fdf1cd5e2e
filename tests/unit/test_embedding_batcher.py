"""Joining texts of many callers into requests: what is sent when, and who gets what."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq.errors import BackendError, BackendUnavailable
from recallq_worker.embedding import EmbeddingBatcher, Kind, Refused, Throttled, Vector
from tests.fake_embedder import FakeEmbedder, Request, vector_of
from tests.virtual_time import now, run_virtually

LINGER = 0.005


@asynccontextmanager
async def batching(embedder: FakeEmbedder, **options: Any) -> AsyncIterator[EmbeddingBatcher]:
    batcher = EmbeddingBatcher(embedder, **{"linger": LINGER, **options})
    await batcher.start()
    try:
        yield batcher
    finally:
        await batcher.stop()
        assert embedder.in_flight == 0


def texts(count: int, name: str = "text") -> list[str]:
    return [f"{name} {number}" for number in range(count)]


def assert_right(vectors: Sequence[Vector], of: Sequence[str]) -> None:
    assert len(vectors) == len(of)
    for vector, text in zip(vectors, of, strict=True):
        np.testing.assert_array_equal(vector, vector_of(text))


async def later(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    await asyncio.sleep(seconds)
    return await work


# --- joining --------------------------------------------------------------------------------------


def test_a_thousand_callers_with_one_text_make_a_hundred_requests() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            each = await asyncio.gather(*(batcher.embed([text]) for text in texts(1000)))
            assert_right([vectors[0] for vectors in each], texts(1000))
            assert embedder.sizes == [10] * 100
            assert embedder.most_in_flight <= 8
            usage = batcher.usage()
            assert (usage.model, usage.texts, usage.requests) == ("fake", 1000, 100)
            assert usage.tokens_used == sum(len(text) for text in texts(1000))

    run_virtually(main())


def test_a_caller_alone_waits_for_others_for_a_moment_only() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            one = asyncio.create_task(batcher.embed(["one"]))
            other = asyncio.create_task(later(0.003, batcher.embed(["other"])))
            late = asyncio.create_task(later(0.0051, batcher.embed(["late"])))
            await asyncio.gather(one, other, late)
        assert [request.texts for request in embedder.requests] == [["one", "other"], ["late"]]
        assert embedder.requests[0].at == pytest.approx(LINGER)
        assert embedder.requests[1].at == pytest.approx(0.0051 + LINGER)

    run_virtually(main())


def test_a_full_request_waits_for_nobody() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder, linger=1.0) as batcher:
            await asyncio.gather(batcher.embed(texts(6)), batcher.embed(texts(4, "other")))
        assert [request.at for request in embedder.requests] == [0.0]

    run_virtually(main())


def test_long_lists_are_split_and_come_back_in_order() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        wanted = [*texts(1234), *texts(50), "text 7"]
        async with batching(embedder) as batcher:
            assert_right(await batcher.embed(wanted), wanted)
            assert await batcher.embed([]) == []
            assert batcher.usage().joined == 51
        assert sorted(embedder.sent) == sorted(set(wanted))
        assert len(embedder.requests) == 124

    run_virtually(main())


def test_requests_hold_no_more_tokens_than_the_provider_takes() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(most_texts=100)
        embedder.most_request_tokens = 1000
        long, short = ["x" * 1500 + str(each) for each in range(6)], texts(20)
        async with batching(embedder) as batcher:
            wanted = [*long, *short, "y" * 9000]
            assert_right(await batcher.embed(wanted), wanted)
        assert all(
            len(request.texts) == 1 or sum(len(text) // 3 + 1 for text in request.texts) <= 1000
            for request in embedder.requests
        )
        assert len(embedder.requests) <= 8

    run_virtually(main())


def test_the_same_text_is_sent_once() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            early = [batcher.embed(["same", "a"]), batcher.embed(["b", "same"])]
            under_way = later(0.05, batcher.embed(["same"]))
            afterwards = later(1.0, batcher.embed(["same"]))
            as_query = batcher.embed(["same"], Kind.QUERY)
            found = await asyncio.gather(*early, under_way, afterwards, as_query)
            for vectors, wanted in zip(
                found, (["same", "a"], ["b", "same"], *[["same"]] * 3), strict=True
            ):
                assert_right(vectors, wanted)
            usage = batcher.usage()
            assert (usage.joined, usage.cache_hits) == (2, 1)
        # Once as a document, and once as a query.
        assert sorted(embedder.sent) == ["a", "b", "same", "same"]

    run_virtually(main())


def test_vectors_are_shared_and_cannot_be_changed() -> None:
    async def main() -> None:
        async with batching(FakeEmbedder()) as batcher:
            (vector,) = await batcher.embed(["one"])
            assert vector.dtype == np.float32
            assert (await batcher.embed(["one"]))[0] is vector

    run_virtually(main())


def test_texts_that_no_request_can_hold() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            good = asyncio.create_task(batcher.embed(["good"]))
            with pytest.raises(BackendError, match="an empty text has no vector"):
                await batcher.embed(["fine", ""])
            assert_right(await batcher.embed(["half \ud83d of one"]), ["half ? of one"])
            assert_right(await good, ["good"])
        assert sorted(embedder.sent) == ["good", "half ? of one"]

    run_virtually(main())


# --- turns ----------------------------------------------------------------------------------------


def test_a_query_goes_before_documents_that_wait() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            bulk = asyncio.create_task(batcher.embed(texts(2000)))
            await asyncio.sleep(0.25)
            began = now()
            await asyncio.gather(
                *(batcher.embed([text], Kind.QUERY) for text in texts(10, "query"))
            )
            assert now() - began == pytest.approx(embedder.latency)
            await bulk
        assert embedder.most_in_flight == 8
        kinds = {request.kind for request in embedder.requests if "query 0" in request.texts}
        assert kinds == {Kind.QUERY}
        documents = [r for r in embedder.requests if r.kind is Kind.DOCUMENT]
        assert all(len(request.texts) == 10 for request in documents)

    run_virtually(main())


def test_a_caller_with_one_text_does_not_wait_for_one_with_thousands() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            bulk = [asyncio.create_task(batcher.embed(texts(100, str(each)))) for each in range(50)]
            await asyncio.sleep(0.31)
            began = now()
            await asyncio.gather(*(batcher.embed([text]) for text in texts(5, "small")))
            assert now() - began <= 2 * embedder.latency
            await asyncio.gather(*bulk)
        assert embedder.sizes.count(10) >= len(embedder.requests) - 2

    run_virtually(main())


def test_a_text_that_two_want_goes_with_the_first_whose_turn_it_is() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            bulk = asyncio.create_task(batcher.embed(texts(5000)))
            await asyncio.sleep(0.11)
            began = now()
            assert_right(await batcher.embed(["text 4999"]), ["text 4999"])
            assert now() - began <= 2 * embedder.latency
            assert_right(await bulk, texts(5000))
        assert len(embedder.sent) == 5000

    run_virtually(main())


def test_no_more_requests_at_once_than_the_embedder_takes() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.most_at_once = 1
        async with batching(embedder) as batcher:
            await asyncio.gather(batcher.embed(texts(100)), batcher.embed(["q"], Kind.QUERY))
        assert embedder.most_in_flight == 1
        assert embedder.requests[1].kind is Kind.QUERY

    run_virtually(main())


def test_long_calls_whose_first_texts_are_the_same() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(most_texts=256)
        one, other = ([*texts(256), *texts(44, name)] for name in ("one", "other"))
        async with batching(embedder) as batcher:
            found = await asyncio.gather(batcher.embed(one), batcher.embed(other))
            assert_right(found[0], one)
            assert_right(found[1], other)
            assert now() < 1
        assert embedder.sizes == [256, 88]

    run_virtually(main())


# --- failures -------------------------------------------------------------------------------------


def failing(error: Exception, *, texts: set[str] | None = None, times: int | None = None) -> Any:
    """A fate: so many requests fail, of those that hold one of `texts`."""
    left = [times]

    def fate(request: Request) -> Exception | None:
        if texts is not None and not texts & set(request.texts):
            return None
        if left[0] is not None:
            if left[0] == 0:
                return None
            left[0] -= 1
        return error

    return fate


def test_what_fails_in_passing_is_sent_again() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(BackendUnavailable("down"), times=1)
        async with batching(embedder) as batcher:
            assert_right(await batcher.embed(["one"]), ["one"])
            assert batcher.usage().failed_requests == 1
        assert len(embedder.requests) == 2

    run_virtually(main())


def test_a_request_that_fails_fails_only_those_who_are_in_it() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(BackendUnavailable("down"), texts={"text 3"})
        async with batching(embedder) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.embed([text]) for text in texts(30)), return_exceptions=True
            )
        failed = [each for each in outcomes if isinstance(each, BaseException)]
        assert len(failed) == 10
        assert all(isinstance(each, BackendUnavailable) for each in failed)
        assert len({id(each) for each in failed}) == 10, "each has an error of its own"
        assert sum("text 3" in request.texts for request in embedder.requests) == 2

    run_virtually(main())


@pytest.mark.parametrize("cache_bytes", [64e6, 0])
def test_a_call_that_is_repeated_costs_what_had_failed(cache_bytes: float) -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(BackendUnavailable("down"), texts={"text 95"}, times=2)
        async with batching(embedder, cache_bytes=cache_bytes) as batcher:
            with pytest.raises(BackendUnavailable, match="down"):
                await batcher.embed(texts(100))
            assert len(set(embedder.sent)) == 100
            embedder.requests.clear()
            assert_right(await batcher.embed(texts(100)), texts(100))
        assert sorted(embedder.sent) == texts(100)[90:]

    run_virtually(main())


def test_what_a_failed_caller_had_not_sent_is_not_sent() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(BackendError("no"), texts={"text 0"})
        async with batching(embedder) as batcher:
            with pytest.raises(BackendError):
                await batcher.embed(texts(10_000))
            sent = len(embedder.requests)
            await asyncio.sleep(5)
            assert len(embedder.requests) == sent <= 10

    run_virtually(main())


def test_only_the_text_that_is_refused_fails() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(most_texts=100)
        embedder.fate = failing(Refused("HTTP 400"), texts={"text 41"})
        async with batching(embedder) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.embed([text]) for text in texts(100)), return_exceptions=True
            )
            for text, outcome in zip(texts(100), outcomes, strict=True):
                if text == "text 41":
                    assert isinstance(outcome, BackendError)
                    assert str(outcome) == "HTTP 400"
                else:
                    assert not isinstance(outcome, BaseException)
                    assert_right(outcome, [text])
        assert len(embedder.requests) <= 1 + 2 * 7

    run_virtually(main())


def test_a_long_call_with_a_refused_text_fails_without_much_ado() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(Refused("HTTP 400"), texts={"text 41"})
        async with batching(embedder) as batcher:
            with pytest.raises(BackendError):
                await batcher.embed(texts(1000))
            await asyncio.sleep(3)
            # All but the guilty one are there, as far as they were sent.
            embedder.requests.clear()
            innocent = [text for text in texts(60) if text != "text 41"]
            assert_right(await batcher.embed(innocent), innocent)
            assert len(embedder.requests) <= 1

    run_virtually(main())


def test_where_everything_is_refused_not_every_text_is_tried_alone() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(Refused("HTTP 400: unknown parameter"))
        async with batching(embedder) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.embed([text]) for text in texts(1000)), return_exceptions=True
            )
            assert all(isinstance(each, BackendError) for each in outcomes)
            assert len(embedder.requests) <= 2 * 100 + 50
            # And it is found out when that is over.
            embedder.fate = failing(Refused("HTTP 400"), texts={"guilty"})
            guilty, fine = await asyncio.gather(
                batcher.embed(["guilty"]), batcher.embed(["fine"]), return_exceptions=True
            )
            assert isinstance(guilty, BackendError)
            assert not isinstance(fine, BaseException)

    run_virtually(main())


def test_bad_credentials_fail_all_at_once() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(BackendError("HTTP 401; check the key"))
        async with batching(embedder) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.embed([text]) for text in texts(10)), return_exceptions=True
            )
            assert {str(each) for each in outcomes} == {"HTTP 401; check the key"}
            assert len(embedder.requests) == 1
            with pytest.raises(BackendError, match="401"):
                await batcher.check()

    run_virtually(main())


def test_a_request_that_takes_too_long() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(latency=100.0)
        async with batching(embedder, timeout=2.0) as batcher:
            with pytest.raises(BackendUnavailable, match="no answer within 2 s"):
                await batcher.embed(["one"])
            assert now() == pytest.approx(2.0 + LINGER)
            assert embedder.in_flight == 0

    run_virtually(main())


def test_what_nobody_foresaw_is_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(RuntimeError("secret words"))
        async with batching(embedder) as batcher:
            with pytest.raises(BackendUnavailable, match="RuntimeError") as caught:
                await batcher.embed(["secret words"])
            assert "secret" not in str(caught.value)
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None

    run_virtually(main())
    assert "RuntimeError in " in caplog.text
    assert "secret" not in caplog.text


# --- rate limits ----------------------------------------------------------------------------------


def test_nobody_sends_before_the_time_that_the_provider_named() -> None:
    async def main() -> None:
        embedder, sibling = FakeEmbedder(), FakeEmbedder()
        embedder.fate = failing(Throttled("HTTP 429", retry_after=7.0), times=1)
        async with batching(embedder) as batcher, batching(sibling) as other:
            found = await asyncio.gather(
                batcher.embed(["one"]),
                later(1.0, batcher.embed(["query"], Kind.QUERY)),
                later(2.0, other.embed(["two"])),
            )
            assert_right([vectors[0] for vectors in found], ["one", "query", "two"])
        first, *rest = sorted([*embedder.requests, *sibling.requests], key=lambda each: each.at)
        assert first.at < 1
        refused_at = first.at + embedder.latency
        assert all(request.at >= refused_at + 7.0 for request in rest)
        assert all(request.at <= refused_at + 7.6 for request in rest)
        assert len(rest) == 3

    run_virtually(main())


def test_without_a_named_time_it_slows_down_and_recovers() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        capacity, most = 3, []

        def fate(request: Request) -> Exception | None:
            most.append(embedder.in_flight)
            return Throttled("HTTP 429") if embedder.in_flight > capacity else None

        embedder.fate = fate
        async with batching(embedder) as batcher:
            assert_right(await batcher.embed(texts(2000)), texts(2000))
            assert batcher.usage().failed_requests < 60
        assert embedder.most_in_flight == 7  # a place is kept free
        assert sum(most[-100:]) / 100 <= capacity + 1

    run_virtually(main())


def test_requests_that_were_under_way_together_count_as_one() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(Throttled("HTTP 429"), times=7)
        async with batching(embedder) as batcher:
            bulk = asyncio.create_task(batcher.embed(texts(3000)))
            await asyncio.sleep(0.05)
            assert embedder.in_flight == 7
            embedder.most_in_flight = 0
            await asyncio.sleep(1.5)
            assert 3 <= embedder.most_in_flight <= 4
            assert_right(await bulk, texts(3000))
        assert embedder.most_in_flight == 7, "it recovers"
        assert now() < 15

    run_virtually(main())


def test_waits_double_while_nothing_is_taken() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(Throttled("HTTP 429"))
        async with batching(embedder) as batcher:
            with pytest.raises(BackendUnavailable, match="429") as caught:
                await batcher.embed(["one"])
            assert caught.value.retry_after is not None
            assert now() <= 31
        at = [request.at for request in embedder.requests]
        gaps = [after - before for before, after in itertools.pairwise(at)]
        assert 3 <= len(gaps) <= 6
        assert all(0.7 * 2**n < gap < 1.5 * 2**n for n, gap in enumerate(gaps))

    run_virtually(main())


def test_longer_than_patience_is_for_the_queue_to_wait() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            await batcher.embed(["known"])
            embedder.fate = failing(Throttled("HTTP 429", retry_after=600.0), times=1)
            began = now()
            outcomes = await asyncio.gather(
                *(batcher.embed([text]) for text in texts(100)), return_exceptions=True
            )
            assert now() - began < 1
            for each in outcomes:
                if not isinstance(each, BaseException):
                    continue  # it was under way
                assert isinstance(each, BackendUnavailable)
                assert each.retry_after is not None
                assert 500 < each.retry_after < 700
            sent = len(embedder.requests)
            with pytest.raises(BackendUnavailable):
                await batcher.embed(["new"], Kind.QUERY)
            await asyncio.sleep(11)
            with pytest.raises(BackendUnavailable):
                await batcher.check()
            assert_right(await batcher.embed(["known"]), ["known"])
            assert len(embedder.requests) == sent
            await asyncio.sleep(620)
            assert_right(await batcher.embed(["new"], Kind.QUERY), ["new"])

    run_virtually(main())


def test_a_caller_whose_turn_does_not_come_is_told_so() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(latency=14.0)
        async with batching(embedder, at_once=1, patience=20.0) as batcher:
            outcomes = await asyncio.gather(
                *(batcher.embed([text]) for text in texts(100)), return_exceptions=True
            )
            failed = [each for each in outcomes if isinstance(each, BaseException)]
            assert 70 <= len(failed) <= 80
            assert all(
                isinstance(each, BackendUnavailable) and "no turn within 20 s" in str(each)
                for each in failed
            )
            assert now() < 45

    run_virtually(main())


def test_limits_of_requests_and_tokens_a_minute() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(latency=0.01)
        async with batching(embedder, rpm=300) as batcher:
            await batcher.embed(texts(1000))
            assert now() == pytest.approx(100 / 5, abs=1.1)
        for second in range(18):
            within = [each for each in embedder.requests if second <= each.at < second + 1]
            assert len(within) <= 10
        embedder = FakeEmbedder(latency=0.01, account="another")
        began = now()
        async with batching(embedder, tpm=60_000) as batcher:
            await batcher.embed(["x" * 95 + f"{each:05}" for each in range(100)])
            # The provider counts a hundred a text; the estimate, a third of that.
            assert now() - began == pytest.approx(10, abs=3)

    run_virtually(main())


def test_long_texts_within_a_limit_of_tokens_do_not_shut_anybody_out() -> None:
    async def main() -> None:
        embedder = FakeEmbedder(latency=0.01, most_texts=100)
        async with batching(embedder, tpm=60_000) as batcher:
            documents = asyncio.create_task(
                batcher.embed(["x" * 2995 + f"{n:05}" for n in range(100)])
            )
            for _ in range(20):
                await asyncio.sleep(1)
                began = now()
                await batcher.embed([f"query {began}"], Kind.QUERY)
                assert now() - began < 15
            documents.cancel()
            await asyncio.gather(documents, return_exceptions=True)
        assert max(sum(map(len, each.texts)) for each in embedder.requests) <= 30_000

    run_virtually(main())


def test_a_provider_is_asked_again_however_long_it_has_said_to_wait() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            embedder.fate = failing(Throttled("HTTP 503", retry_after=86_400.0), times=1)
            with pytest.raises(BackendUnavailable) as refused:
                await batcher.embed(["one"])
            assert refused.value.retry_after is not None
            assert refused.value.retry_after >= 86_400
            with pytest.raises(BackendUnavailable):
                await batcher.embed(["two"])
            assert len(embedder.requests) == 1
            await asyncio.sleep(1000)
            assert_right(await batcher.embed(["two"]), ["two"])
            await batcher.check()

    run_virtually(main())


# --- leaving --------------------------------------------------------------------------------------


def test_who_leaves_takes_along_what_is_not_sent() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            leaving = asyncio.create_task(batcher.embed(texts(1000)))
            staying = asyncio.create_task(batcher.embed(["text 5", "text 500", "own"]))
            await asyncio.sleep(0.05)
            leaving.cancel()
            assert_right(await staying, ["text 5", "text 500", "own"])
            with pytest.raises(asyncio.CancelledError):
                await leaving
            await asyncio.sleep(1)
            assert len(embedder.requests) <= 9
            # What was under way is there.
            sent = list(embedder.sent)
            embedder.requests.clear()
            assert_right(await batcher.embed(sent), sent)
            assert embedder.requests == []

    run_virtually(main())


def test_a_failed_request_is_not_repeated_for_nobody() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        embedder.fate = failing(BackendUnavailable("down"))
        async with batching(embedder) as batcher:
            leaving = asyncio.create_task(batcher.embed(["one"]))
            await asyncio.sleep(0.15)
            assert len(embedder.requests) == 1
            leaving.cancel()
            await asyncio.sleep(1)
            assert len(embedder.requests) == 1
            embedder.fate = failing(BackendUnavailable("down"), times=0)
            assert_right(await batcher.embed(["one"]), ["one"])

    run_virtually(main())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_everybody_gets_an_outcome(seed: int) -> None:
    """Callers of all sizes come and are cancelled at any moment, and requests fail in all ways."""
    rng = random.Random(seed)
    refused = {f"text {rng.randrange(200)}" for _ in range(3)}

    def fate(request: Request) -> Exception | None:
        if refused & set(request.texts):
            return Refused("HTTP 400")
        chance = rng.random()
        if chance < 0.05:
            return Throttled("HTTP 429", retry_after=rng.choice([None, 0.5]))
        return BackendUnavailable("down") if chance < 0.15 else None

    async def caller(batcher: EmbeddingBatcher) -> str:
        await asyncio.sleep(rng.random())
        wanted = [f"text {rng.randrange(200)}" for _ in range(rng.choice([1, 1, 3, 30, 300]))]
        kind = rng.choice([Kind.DOCUMENT, Kind.DOCUMENT, Kind.QUERY])
        try:
            async with asyncio.timeout(rng.choice([None, 0.001, 0.1, 0.2, 1.0])):
                assert_right(await batcher.embed(wanted, kind), wanted)
        except TimeoutError:
            return "left"
        except BackendUnavailable:
            return "unavailable"
        except BackendError:
            assert refused & set(wanted)
            return "refused"
        assert not refused & set(wanted)
        return "done"

    async def main() -> None:
        embedder = FakeEmbedder(latency=rng.choice([0.001, 0.05, 0.3]))
        embedder.fate = fate
        async with batching(embedder, cache_bytes=rng.choice([0, 5000, 64e6])) as batcher:
            outcomes = await asyncio.gather(*(caller(batcher) for _ in range(60)))
            assert "done" in outcomes
            await asyncio.sleep(60)
            assert embedder.in_flight == 0
            assert batcher._items == {}
            # Nothing that waits is left, and everything works.
            refused.clear()
            embedder.fate = lambda request: None
            assert_right(await batcher.embed(texts(250)), texts(250))

    run_virtually(main())


def test_stopping_ends_everything() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            calls = [asyncio.create_task(batcher.embed(texts(200, str(n)))) for n in range(20)]
            calls.append(asyncio.create_task(batcher.embed(["query"], Kind.QUERY)))
            calls.append(asyncio.create_task(batcher.embed(texts(5000, "long"))))
            await asyncio.sleep(0.05)
            await batcher.stop()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, BackendUnavailable)
            with pytest.raises(BackendUnavailable, match="not running"):
                await batcher.embed(["one"])
            await batcher.stop()
            assert not embedder.running
        assert len(asyncio.all_tasks()) == 1

    run_virtually(main())


def test_a_batcher_belongs_to_one_loop() -> None:
    batcher = EmbeddingBatcher(FakeEmbedder())

    async def use() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            await batcher.embed(["one"])

    async def main() -> None:
        await batcher.start()
        await asyncio.to_thread(asyncio.run, use())
        await batcher.stop()

    asyncio.run(main())


def test_a_check_asks_unless_it_is_known() -> None:
    async def main() -> None:
        embedder = FakeEmbedder()
        async with batching(embedder) as batcher:
            assert await batcher.check() == "fake, 8 dimensions"
            assert len(embedder.requests) == 1
            await batcher.embed(["one"])
            await batcher.check()
            assert len(embedder.requests) == 2
            await asyncio.sleep(11)
            embedder.fate = failing(BackendUnavailable("down"))
            with pytest.raises(BackendUnavailable, match="down"):
                await batcher.check()

    run_virtually(main())
