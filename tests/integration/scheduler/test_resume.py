"""Requests that come with tokens: an edge resubmits what another scheduler ran."""

import grpc

from fake_executor_link import expected_tokens
from scalellm.v1 import common_pb2

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
