"""Several models in one scheduler: each has executors, a queue and books of its own."""

import asyncio

import grpc
import pytest

from scalellm.v1 import scheduler_pb2
from service_processes import PATIENCE

READY = scheduler_pb2.EXECUTOR_PHASE_READY


@pytest.fixture
async def two_models(make_line, make_executor, make_edge):
    """A line of `small`, the executor of `large` beside it, and a client link to that."""
    line = await make_line(executor={"model": "small", "tokenizer_sha256": b"small"})
    large = await make_executor(model="large", tokenizer_sha256=b"large")
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=large.address))
    await line.all_ready(2)
    edge = await make_edge(line.server.address).open(model="large")
    return line, large, edge


def state_of(line, model):
    return next(state for state in line.check_books().models if state.model == model)


async def test_each_request_runs_on_its_model(two_models):
    line, large, edge = two_models
    assert (line.edge.welcome.model, edge.welcome.model) == ("small", "large")
    streams = [(each, await each.submit(10 + i, 5)) for each in (line.edge, edge) for i in range(5)]
    for each, stream in streams:
        await each.finish(stream)
        stream.check_tokens(5)
        assert stream.finish.timings.executor_id == (large if each is edge else line.executors[0]).address
    assert [len(executor.submits) for executor in (line.executors[0], large)] == [5, 5]
    assert {state.model: (state.accepted, state.finished, state.ready_executors) for state in line.state().models} == {
        "small": (5, 5, 1),
        "large": (5, 5, 1),
    }
    assert line.check_books().accepted == 10
    assert {executor.model for executor in line.state().executors} == {"small", "large"}


async def test_a_model_without_executors_leaves_the_others_alone(two_models, make_edge, make_executor, eventually):
    line, large, edge = two_models
    running = await line.edge.submit(10, 300)
    lost = await edge.submit(10, 100_000)
    await eventually(lambda: running.samples and lost.samples)
    await large.die()
    await edge.finish(lost)
    assert lost.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "'large'" in lost.finish.status.message
    refused = await edge.submit(10, 5)
    await edge.finish(refused)
    assert "'large'" in refused.finish.status.message
    await line.edge.finish(running)
    running.check_tokens(300)
    assert running.finish.usage.num_resumed == 0
    assert [state_of(line, model).ready_executors for model in ("small", "large")] == [1, 0]
    with pytest.raises(grpc.aio.AioRpcError) as absence:
        await make_edge(line.server.address).open(model="large")
    assert absence.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "'large'" in absence.value.details()
    # It comes back, and its old link serves on.
    await make_executor(port=int(large.address.rpartition(":")[2]), model="large", tokenizer_sha256=b"large")
    await eventually(lambda: state_of(line, "large").ready_executors)
    again = await edge.submit(10, 5)
    await edge.finish(again)
    again.check_tokens(5)


async def test_a_queue_that_is_full_is_one_models(make_line, make_executor, make_edge, eventually):
    line = await make_line(executor={"model": "small", "max_running": 1}, max_queued_requests=1)
    large = await make_executor(model="large")
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=large.address))
    await line.all_ready(2)
    edge = await make_edge(line.server.address).open(model="large")
    line.executors[0].hold()
    waiting = [await line.edge.submit(10, 5) for _ in range(2)]
    await eventually(lambda: state_of(line, "small").queued == 1)
    refused = await line.edge.submit(10, 5)
    await line.edge.finish(refused)
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    served = await edge.submit(10, 5)
    await edge.finish(served)
    served.check_tokens(5)
    line.executors[0].release()
    await line.edge.finish(*waiting)


async def test_a_link_that_names_no_model_gets_the_one_with_its_tokenizer(two_models, make_edge, make_executor):
    line, _, _ = two_models
    assert (await make_edge(line.server.address).open(b"large")).welcome.model == "large"
    for sha256, words in ((b"", "'small', 'large'"), (b"neither", "tokenizer_sha256")):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await make_edge(line.server.address).open(sha256)
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert words in refusal.value.details()


async def test_a_link_waits_for_its_model(make_line, make_executor, make_edge):
    line = await make_line(executor={"model": "small"})
    opening = asyncio.create_task(make_edge(line.server.address).open(model="large"))
    large = await make_executor(model="large")
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=large.address))
    edge = await asyncio.wait_for(opening, PATIENCE)
    assert edge.welcome.model == "large"


async def test_an_executor_comes_back_with_another_model(make_line, make_executor, eventually):
    line = await make_line(2, executor={"model": "old"})
    running = await line.edge.submit(10, 100_000)
    moved = line.executors[1]
    await moved.die()
    await make_executor(port=int(moved.address.rpartition(":")[2]), model="new")
    await eventually(lambda: [state.ready_executors for state in line.check_books().models] == [1, 1])
    models = {state.address: state.model for state in line.state().executors}
    assert models == {line.executors[0].address: "old", moved.address: "new"}
    # Its requests go on with the executor that still has their model.
    await eventually(lambda: line.executors[0].running == 1)
    await line.edge.abort(running)
    await line.edge.finish(running)


async def test_all_leave_on_drain(two_models, eventually):
    line, _, edge = two_models
    streams = [(each, await each.submit(10, 50)) for each in (line.edge, edge)]
    await eventually(lambda: all(stream.samples for _, stream in streams))
    assert (await line.edge.stub.Drain(scheduler_pb2.DrainRequest(timeout_s=int(PATIENCE)))).remaining == 0
    for each, stream in streams:
        await each.finish(stream)
        stream.check_tokens(50)
        assert each.draining
