"""Requests that move by agreement: from another scheduler, from an executor that gives them back, from this one."""

import asyncio

import grpc

from fake_executor_link import expected_tokens
from scalellm.v1 import common_pb2
from service_processes import PATIENCE

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_the_edge_resubmits_what_another_scheduler_ran(make_line, eventually):
    line = await make_line(2, executor={"step_time": 0.003})
    prompt = [5, 6, 7]
    known = {index: expected_tokens(prompt, 20, index)[: 20 - index] for index in range(2)}
    stream = await line.edge.submit(prompt, 60, n=3, resumed=known, seed=1)
    await eventually(lambda: len(stream.samples.get(2, ())) > 3)
    first = next(executor for executor in line.executors if executor.running)
    assert {sample.index: list(sample.token_ids) for sample in first.submits[0].resumed} == known
    await first.die()
    await line.edge.finish(stream)
    stream.check_tokens(60, n=3)  # the client checks that no token comes twice
    assert stream.finish.usage.num_resumed > 39
    assert stream.finish.usage.completion_tokens == 180


async def test_an_edge_that_lacked_the_finish_alone_gets_it_at_once(make_line, eventually):
    line = await make_line()
    (executor,) = line.executors
    executor.hold()
    stream = await line.edge.submit(
        10, 5, resumed={0: [1, 2]}, finished={0: common_pb2.FINISH_REASON_STOP}, cache_salt=b"s"
    )
    await line.edge.finish(stream)
    assert (stream.code, stream.samples, stream.ended) == (0, {0: [1, 2]}, {})
    assert (stream.finish.usage.completion_tokens, stream.finish.usage.num_resumed) == (2, 2)
    assert not executor.submits
    assert line.check_books().finished == 1


async def test_what_an_edge_resumes_is_bounded_by_what_it_asks_for(make_line):
    line = await make_line()
    stream = await line.edge.submit(10, 2, resumed={0: [1, 2, 3]})
    await line.edge.finish(stream)
    assert (stream.code, stream.finish.status.field) == (INVALID_ARGUMENT, "resumed.token_ids")
    assert line.check_books().rejected == 1


async def test_what_an_executor_gives_back_goes_on_elsewhere_and_nobody_died(make_line, eventually):
    line = await make_line(2, executor={"step_time": 0.003}, max_executor_deaths=1)
    streams = [await line.edge.submit(10 + i, 200, n=1 + i % 2) for i in range(4)]
    await eventually(lambda: all(len(stream.samples.get(0, ())) > 3 for stream in streams))
    leaver, other = line.executors
    num_moved = leaver.running
    assert num_moved
    leaver.draining = leaver.gives_back = True
    await line.edge.finish(*streams)
    for i, stream in enumerate(streams):
        stream.check_tokens(200, 1 + i % 2)
        assert stream.finish.timings.executor_id == other.address
    assert line.check_books().resubmitted == num_moved


async def test_the_only_executor_gives_its_requests_back_and_returns(make_line, make_executor, eventually):
    line = await make_line(executor={"step_time": 0.003}, executor_grace_s=PATIENCE, max_executor_deaths=1)
    stream = await line.edge.submit(10, 60)
    await eventually(lambda: len(stream.samples.get(0, ())) > 3)
    (old,) = line.executors
    old.draining = old.gives_back = True
    await eventually(lambda: line.state().queued == 1)
    await old.die()
    await make_executor(port=int(old.address.rpartition(":")[2]), instance_id="reborn")
    await line.edge.finish(stream)
    stream.check_tokens(60)


async def test_a_scheduler_that_leaves_gives_its_requests_back(make_line, eventually):
    line = await make_line(executor={"max_running": 1})
    running, queued = await line.edge.submit(10, 100_000), await line.edge.submit()
    await eventually(lambda: running.samples and line.state().queued == 1)
    stopping = asyncio.create_task(line.server.stop())
    await eventually(lambda: line.edge.draining)
    late = await line.edge.submit()
    await line.edge.finish(running, queued, late)
    assert [stream.code for stream in (running, queued, late)] == [UNAVAILABLE] * 3
    assert [stream.finish.moved for stream in (running, queued, late)] == [True] * 3
    await stopping
