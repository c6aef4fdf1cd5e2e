"""A fleet whose messages are signed: who has no key is not heard, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from recallq import BackendError, InvalidInput, MemoryClient, UndecodableJob, UnknownJob
from recallq.contract import Operation
from recallq.envelope import CeleryEnvelope
from recallq.signing import Signer
from tests.fuzz.hostile import envelope
from tests.support import Worker, eventually, redis_at

StartWorker = Callable[..., Worker]
KEY, NEXT = "k" * 64, "n" * 64


async def test_who_has_no_key_is_not_heard(
    redis_url: str, namespace: str, start_worker: StartWorker, user: str
) -> None:
    worker = await asyncio.to_thread(lambda: start_worker(signing_keys=f"{NEXT},{KEY}"))
    queue = f"{namespace}.live"
    async with redis_at(redis_url) as redis:
        for keys in (KEY, NEXT):
            async with MemoryClient(redis_url, namespace=namespace, signing_keys=keys) as client:
                await client.add_memory(user, f"signed with {keys[:1]}")
        for stranger in ("", "x" * 64):
            async with MemoryClient(
                redis_url, namespace=namespace, signing_keys=stranger
            ) as client:
                with pytest.raises(UndecodableJob, match="RECALLQ_SIGNING_KEYS"):
                    await client.add_memory(user, "forged")
        async with MemoryClient(redis_url, namespace=namespace, signing_keys=KEY) as client:
            # A signature of one message is none of another, nor of one that was changed.
            made = CeleryEnvelope("c", Signer([KEY])).wrap("m-1", Operation.ADD, '{"v":1}', queue)
            signed = json.loads(made)
            elsewhere = {"delivery_info": {"exchange": "", "routing_key": "others.live"}}
            forged = [
                signed | {"body": json.dumps([['{"v": 1}'], {}, {}])},
                signed | {"body": json.dumps([['{"v":1}'], {"more": 1}, {}])},
                signed | {"headers": signed["headers"] | {"task": Operation.DELETE.task_name}},
                signed | {"headers": signed["headers"] | {"id": "m-2"}},
                signed | {"properties": signed["properties"] | elsewhere},
                envelope(Operation.ADD.task_name, "p-1", [["{}"], {}, {}], queue),
            ]
            before = await client.dead_letters.count()
            for each in forged:
                await redis.lpush(queue, json.dumps(each))

            async def buried() -> bool:
                return await client.dead_letters.count() >= before + len(forged)

            await eventually(buried)
            letters = (await client.dead_letters.list())[before:]
            assert all("is not signed" in each.error for each in letters)
            texts = [each.text for each in await client.list_memory(user)]
            assert texts == ["signed with k", "signed with n"]
        assert KEY not in worker.output and NEXT not in worker.output


async def test_what_is_sent_again_is_still_signed(
    redis_url: str, namespace: str, start_worker: StartWorker, user: str
) -> None:
    """By the sweeper, after a failure, and as a dead letter's replay."""
    options = {"backend": "slow_redis", "signing_keys": KEY, "retry_base": 0.1}
    async with (
        redis_at(redis_url) as redis,
        MemoryClient(redis_url, namespace=namespace, signing_keys=KEY, timeout=30) as client,
    ):
        vanished = await client.submit_add(user, "tea")
        assert await redis.rpop(f"{namespace}.live")
        await asyncio.to_thread(lambda: start_worker(**options))
        assert (await client.add_memory(user, "fail 2 times")).added == 1
        with pytest.raises(BackendError):
            await client.add_memory(user, "refuse")
        await redis.set(f"{namespace}:allowed", 1)
        (letter,) = await client.dead_letters.list()
        assert (await (await client.dead_letters.replay(letter)).result(30)).added == 1
        assert (await vanished.result(30)).added == 1
        assert await client.dead_letters.count() == 0


async def test_extraction_with_signed_messages(
    redis_url: str, namespace: str, start_worker: StartWorker, user: str
) -> None:
    await asyncio.to_thread(lambda: start_worker(backend="extractor", signing_keys=KEY))
    async with MemoryClient(redis_url, namespace=namespace, signing_keys=KEY) as client:
        handles = [await client.submit_add(user, f"tea {number}") for number in range(3)]
        assert [(await each.result(30)).merged for each in handles]
        assert len(await client.list_memory(user)) == 3


async def test_what_was_refused_can_be_vouched_for(
    redis_url: str, namespace: str, start_worker: StartWorker, user: str
) -> None:
    """A fleet gets keys, and a client has none yet: what it sent is not lost."""
    await asyncio.to_thread(lambda: start_worker(signing_keys=KEY))
    async with MemoryClient(redis_url, namespace=namespace) as without:
        with pytest.raises(UndecodableJob, match="RECALLQ_SIGNING_KEYS"):
            await without.search(user, "tea")
        with pytest.raises(UndecodableJob, match="RECALLQ_SIGNING_KEYS"):
            await without.add_memory(user, ["green tea", "no milk"])
    async with MemoryClient(redis_url, namespace=namespace, signing_keys=KEY) as client:
        (letter,) = await client.dead_letters.list()  # a question is not worth keeping
        assert letter.unsigned
        with pytest.raises(InvalidInput, match="--unsigned"):
            await client.dead_letters.replay(letter)
        await client.add_memory(user, "later")
        handle = await client.dead_letters.replay(letter, unsigned=True)
        assert (await handle.result(30)).added == 2
        texts = [each.text for each in await client.list_memory(user)]
        assert texts == ["green tea", "no milk", "later"]
        assert await client.dead_letters.count() == 0


async def test_what_a_delete_was_about_stays_away_from_a_letter_that_is_vouched_for(
    redis_url: str, namespace: str, start_worker: StartWorker, user: str
) -> None:
    await asyncio.to_thread(lambda: start_worker(signing_keys=KEY))
    async with MemoryClient(redis_url, namespace=namespace) as without:
        with pytest.raises(UndecodableJob):
            await without.add_memory(user, "green tea")
    async with MemoryClient(redis_url, namespace=namespace, signing_keys=KEY) as client:
        await client.delete_memory(user)
        async with redis_at(redis_url) as redis:  # a letter may lie there for longer than a fence
            fences = [key async for key in redis.scan_iter(f"{namespace}:m:*:f")]
            assert await redis.delete(*fences) == 1
        (letter,) = await client.dead_letters.list()  # whose it was, nobody could tell
        with pytest.raises(UnknownJob, match="deleted since"):
            await client.dead_letters.replay(letter, unsigned=True)
        assert await client.dead_letters.count() == 0
        assert await client.list_memory(user) == []
