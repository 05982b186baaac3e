"""After any mix of finish, cancel, deadline and preemption everything is back where it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import grpc
import redis as redis_client

from line import Line, generate, scrape, start_line
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, Spawn

NUM_REQUESTS = 500
IN_FLIGHT = 48


def random_request(rng: random.Random, number: int) -> generation_pb2.GenerateRequest:
    size = rng.choice((1, 15, 16, 17, 40, 120))
    return generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=[rng.randrange(300, 49000) for _ in range(size)]),
        sampling=common_pb2.SamplingParams(
            max_tokens=rng.choice((1, 2, 17, 60)), ignore_eos=True, n=rng.choice((1, 1, 1, 2, 3))
        ),
        priority=rng.choice((0, 0, -5, 10)),
        stop=[] if rng.random() < 0.8 else ["the", "a"],
        output=generation_pb2.OUTPUT_TEXT,
        request_id=f"request-{number}",
    )


def assert_books(line: Line) -> None:
    """accepted = finished + cancelled + rejected + running, per service, at this very scrape."""
    edge = scrape(line.tokenizer)
    outcomes = {
        name: value for name, value in edge.items() if name.startswith("scalellm_tokenizer_requests_ended_total{")
    }
    accepted = edge['scalellm_tokenizer_requests_accepted_total{transport="grpc"}']
    assert accepted == sum(outcomes.values()) + edge["scalellm_tokenizer_requests_running"], edge
    executor = scrape(line.executors[0])
    ended = sum(value for name, value in executor.items() if name.startswith("scalellm_executor_requests_total{"))
    held = executor["scalellm_executor_num_requests_running"] + executor["scalellm_executor_num_requests_waiting"]
    assert executor["scalellm_executor_requests_accepted_total"] == ended + held, executor


def edge_has_counted(line: Line) -> bool:
    """True if all workers are linked and have counted every token that the scheduler sent."""
    edge, core = scrape(line.tokenizer), scrape(line.scheduler)
    received = edge["scalellm_generation_tokens_total"] + edge["scalellm_tokenizer_tokens_discarded_total"]
    return (
        edge["scalellm_tokenizer_scheduler_links"] == core['scalellm_scheduler_links{peer="tokenizer"}']
        and received == core["scalellm_scheduler_tokens_sent_total"]
    )


async def test_everything_returns_to_its_baseline(spawn: Spawn, redis, model_dir) -> None:
    flags = ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--max-model-len", "512")
    line = start_line(
        spawn,
        redis,
        model_dir("smollm2-135m-instruct"),
        executors=((*flags, "--num-blocks", "40", "--max-num-seqs", "32"),),
        tokenizer=("--workers", "2"),
    )
    rng = random.Random(7)
    places = asyncio.Semaphore(IN_FLIGHT)
    outcomes: Counter[str] = Counter()
    async with line.channel() as one, line.channel() as other:
        # Everything that is made once is made; and sixteen samples outgrow the cache, however slow the machine is.
        crowd = random_request(rng, 1_000_000)
        crowd.sampling.CopyFrom(common_pb2.SamplingParams(max_tokens=60, ignore_eos=True, n=16))
        answer = await generate(one, crowd)
        assert answer.finished.usage.completion_tokens == 16 * 60
        assert answer.finished.usage.num_preemptions > 0

        def tasks() -> float:
            edge, core = scrape(line.tokenizer), scrape(line.scheduler)
            return edge["scalellm_tokenizer_asyncio_tasks"] + core["scalellm_scheduler_asyncio_tasks"]

        # A worker counts its tasks together with its tokens, twice a second.
        await generate(one, random_request(rng, 1_000_001))
        await generate(other, random_request(rng, 1_000_002))
        async with asyncio.timeout(PATIENCE):
            while not await asyncio.to_thread(edge_has_counted, line):
                await asyncio.sleep(0.1)
        baseline = tasks()

        async def client(number: int) -> None:
            request = random_request(rng, number)
            kind = number % 6
            options = {"timeout": rng.uniform(0.01, 0.6)} if kind == 5 else {}
            async with places:
                task = asyncio.create_task(generate(rng.choice((one, other)), request, **options))
                if kind in (0, 1):
                    done, _ = await asyncio.wait((task,), timeout=rng.uniform(0, 0.4))
                    if not done:
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                        outcomes["cancelled"] += 1
                        return
                answer = await task
                outcomes[answer.code.name] += 1

        clients = [asyncio.create_task(client(number)) for number in range(NUM_REQUESTS)]
        while not all(task.done() for task in clients):
            await asyncio.to_thread(assert_books, line)
            state = await line.scheduler_state()
            ended = state.finished + state.cancelled + state.rejected
            assert state.accepted == ended + state.queued + state.running
            await asyncio.sleep(0.2)
        await asyncio.gather(*clients)

        assert sum(outcomes.values()) == NUM_REQUESTS
        assert set(outcomes) <= {"OK", "cancelled", "DEADLINE_EXCEEDED"}
        assert outcomes["cancelled"] > NUM_REQUESTS / 10
        async with asyncio.timeout(PATIENCE):
            # One that was cancelled at once may still be on its way.
            while (state := await line.scheduler_state()).queued + state.running:
                await asyncio.sleep(0.05)
            while (info := await line.executor_info()).load.running + info.load.waiting:
                await asyncio.sleep(0.05)
        assert info.load.free_blocks == info.load.total_blocks
        assert info.accepted == info.finished + info.cancelled + info.rejected
        state = await line.scheduler_state()
        assert (state.queued, state.queued_tokens, state.running) == (0, 0, 0)
        assert_books(line)
        async with asyncio.timeout(PATIENCE):
            while await asyncio.to_thread(tasks) > baseline:
                await asyncio.sleep(0.1)
        with redis_client.Redis.from_url(redis.url) as client_of_redis:
            assert client_of_redis.dbsize() == 0
        answer = await generate(one, random_request(rng, 2_000_000))
        assert answer.code is grpc.StatusCode.OK
