"""Dispatch: credits, order, deadlines, limits, refusals, malformed links."""

import asyncio
import contextlib
from types import SimpleNamespace

import grpc
import pytest

from scalellm.services.common.link import API_MINOR
from scalellm.v1 import common_pb2, link_pb2, scheduler_pb2
from service_processes import PATIENCE

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]
CANCELLED = grpc.StatusCode.CANCELLED.value[0]


async def test_a_request_streams_and_accounts_for_its_time(make_line):
    line = await make_line()
    stream = await line.edge.submit(20, 12, n=2)
    await line.edge.finish(stream)
    stream.check_tokens(12, n=2)
    assert stream.ended == {0: common_pb2.FINISH_REASON_LENGTH, 1: common_pb2.FINISH_REASON_LENGTH}
    timings = stream.finish.timings
    assert timings.executor_id == line.executors[0].address
    assert (timings.prefill_ns, timings.decode_ns, timings.failover_ns) == (1, 2, 0)
    assert 0 < timings.admission_ns < timings.scheduler_total_ns
    state = line.check_books()
    assert (state.accepted, state.finished, state.queued, state.running) == (1, 1, 0, 0)


async def test_welcome_relays_what_every_executor_can_keep(make_executor, make_scheduler, make_edge, eventually):
    executors = [await make_executor(max_model_len=length) for length in (2048, 1024)]
    server = await make_scheduler(*executors)
    ready = scheduler_pb2.EXECUTOR_PHASE_READY
    await eventually(lambda: [executor.phase for executor in server.service.get_state().executors] == [ready, ready])
    welcome = (await make_edge(server.address).open(b"tokenizer")).welcome
    assert (welcome.model, welcome.tokenizer_sha256, welcome.max_model_len) == ("fake-model", b"tokenizer", 1024)
    assert (welcome.block_size, welcome.num_blocks, welcome.max_num_seqs, welcome.vocab_size) == (16, 2000, 128, 5003)
    assert welcome.load.granted_requests > 0


async def test_another_tokenizer_is_refused(make_line, make_edge):
    line = await make_line()
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await make_edge(line.server.address).open(b"another")
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "tokenizer_sha256" in refusal.value.details()


async def test_credits_are_never_exceeded(make_line):
    line = await make_line(2, executor={"credit_tokens": 40, "max_running": 3})
    streams = [await line.edge.submit(5 + i % 30, 4) for i in range(60)]
    await line.edge.finish(*streams)
    for stream in streams:
        stream.check_tokens(4)
    assert [executor.credit_violations for executor in line.executors] == [0, 0]
    assert sum(len(executor.submits) for executor in line.executors) == 60
    assert min(len(executor.submits) for executor in line.executors) > 10


async def test_what_is_cached_takes_no_credit(make_line, eventually):
    """Behind a prompt in common, requests come together as far as what is left of each to compute goes."""
    line = await make_line(executor={"credit_tokens": 130})
    (executor,) = line.executors
    common = [1 + i % 100 for i in range(640)]
    await line.edge.finish(await line.edge.submit(common, 1))
    executor.hold()
    streams = [await line.edge.submit([*common, *[number + 1] * 20], 1) for number in range(10)]
    await eventually(lambda: len(executor.submits) == 1 + 7)  # 20 tokens of each are new, and 130 were granted
    executor.release()
    await line.edge.finish(*streams)
    assert [submit.charged_tokens for submit in executor.submits] == [640] + 10 * [20]
    assert executor.credit_violations == 0


async def test_a_request_larger_than_all_credit_still_runs(make_line):
    line = await make_line(executor={"credit_tokens": 8})
    stream = await line.edge.submit(100, 3)
    await line.edge.finish(stream)
    stream.check_tokens(3)


async def test_priority_then_arrival(make_line, eventually):
    line = await make_line(executor={"max_running": 1})
    (executor,) = line.executors
    executor.hold()
    first = await line.edge.submit(10, 1)
    await eventually(lambda: executor.submits)
    priorities = [5, 0, -3, 0, 5, -3]
    streams = [await line.edge.submit(10, 1, priority=priority) for priority in priorities]
    await eventually(lambda: line.state().queued == len(priorities))
    executor.release()
    await line.edge.finish(first, *streams)
    order = [int(submit.request_id[1:]) - 1 for submit in executor.submits[1:]]
    assert order == [2, 5, 1, 3, 0, 4]


async def test_a_tenants_burst_does_not_delay_another(make_line, eventually):
    line = await make_line(executor={"max_running": 1})
    (executor,) = line.executors
    executor.hold()
    first = await line.edge.submit(10, 1, cache_salt=b"burst")
    await eventually(lambda: executor.submits)
    streams = [await line.edge.submit(10, 1, cache_salt=b"burst") for _ in range(20)]
    streams += [await line.edge.submit(10, 1, cache_salt=b"late") for _ in range(2)]
    await eventually(lambda: line.state().queued == len(streams))
    executor.release()
    await line.edge.finish(first, *streams)
    salts = [submit.cache_salt for submit in executor.submits[1:]]
    assert salts[0] == b"late", "who was served least goes next"
    assert salts[:3].count(b"late") == 2


async def test_full_queue_says_when_to_retry(make_line, eventually):
    line = await make_line(executor={"max_running": 1}, max_queued_requests=2)
    (executor,) = line.executors
    executor.hold()
    streams = [await line.edge.submit()]
    await eventually(lambda: executor.submits)
    streams += [await line.edge.submit() for _ in range(2)]
    refused = await line.edge.submit()
    await line.edge.finish(refused)
    assert refused.code == RESOURCE_EXHAUSTED
    assert refused.finish.status.retry_after_ns > 0
    assert "2 requests" in refused.finish.status.message
    executor.release()
    await line.edge.finish(*streams)
    assert line.check_books().rejected == 1


async def test_a_full_queue_takes_what_another_scheduler_had_admitted(make_line, eventually):
    line = await make_line(executor={"max_running": 1}, max_queued_requests=2)
    for executor in line.executors:
        executor.hold()
    first = await line.edge.submit(10, 3)
    await eventually(lambda: line.state().running == 1)
    waiting = [await line.edge.submit(10, 3) for _ in range(2)]
    moved = [await line.edge.submit(10, 3, attempt=1) for _ in range(3)]
    refused = await line.edge.submit(10, 3)
    await line.edge.finish(refused)
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    for executor in line.executors:
        executor.release()
    await line.edge.finish(first, *waiting, *moved)
    for stream in (first, *waiting, *moved):
        stream.check_tokens(3)
    line.check_books()


async def test_a_tenant_that_fills_the_queue_makes_room_for_another(make_line, eventually):
    """Each request that made room ends once, with a time to try again; no one of the other tenant is refused."""
    line = await make_line(executor={"max_running": 1}, max_queued_requests=40)
    (executor,) = line.executors
    executor.hold()
    burst = [await line.edge.submit(10, 1, cache_salt=b"burst")]
    await eventually(lambda: executor.submits)
    burst += [await line.edge.submit(10, 1, cache_salt=b"burst") for _ in range(50)]
    late = [await line.edge.submit(10, 1, cache_salt=b"late") for _ in range(10)]
    await line.edge.finish(*burst[31:])  # ten found no room, ten made room
    for stream in burst[31:]:
        assert stream.code == RESOURCE_EXHAUSTED
        assert stream.finish.status.retry_after_ns > 0
        assert stream.finish.status.message.startswith("the admission queue is full: ")
    assert line.check_books().queued == 40
    executor.release()
    await line.edge.finish(*burst[:31], *late)
    assert [stream.code for stream in (*burst[:31], *late)] == [0] * 41
    assert (line.check_books().rejected, line.state().finished) == (20, 41)


async def test_full_queue_of_tokens(make_line, eventually):
    line = await make_line(executor={"max_running": 1}, max_queued_tokens=100)
    (executor,) = line.executors
    executor.hold()
    streams = [await line.edge.submit(10)]
    await eventually(lambda: executor.submits)
    streams.append(await line.edge.submit(80))
    refused = await line.edge.submit(30)
    await line.edge.finish(refused)
    assert refused.code == RESOURCE_EXHAUSTED
    executor.release()
    await line.edge.finish(*streams)


async def test_deadline_in_the_queue(make_line):
    line = await make_line(executor={"max_running": 1})
    (executor,) = line.executors
    executor.hold()
    running = await line.edge.submit()
    waiting = await line.edge.submit(time_remaining=0.05)
    await line.edge.finish(waiting)
    assert waiting.code == DEADLINE_EXCEEDED
    assert "waited" in waiting.finish.status.message
    assert waiting.finish.timings.admission_ns >= 40_000_000
    assert len(executor.submits) <= 1
    executor.release()
    await line.edge.finish(running)
    assert line.check_books().cancelled == 1


async def test_deadline_while_running_is_the_executors_and_travels_as_a_duration(make_line):
    # The executor goes by its steps, which take longer than they should: it is only just not given up.
    line = await make_line(executor={"step_time": 0.01}, deadline_backstop_s=PATIENCE)
    stream = await line.edge.submit(10, 100_000, time_remaining=0.5)
    await line.edge.finish(stream)
    assert stream.code == DEADLINE_EXCEEDED
    assert stream.finish.status.message == "deadline"
    assert line.executors[0].submits[0].HasField("time_remaining_ns")
    assert not line.executors[0].aborts


async def test_deadline_backstop_when_the_executor_hangs(make_line, eventually):
    line = await make_line(deadline_backstop_s=0.05)
    (executor,) = line.executors
    executor.honours_deadlines = False
    stream = await line.edge.submit(10, 100_000, time_remaining=1.0)
    await line.edge.finish(stream)
    assert stream.code == DEADLINE_EXCEEDED
    assert stream.finish.usage.completion_tokens == len(stream.samples[0])
    await eventually(lambda: executor.aborts)
    assert executor.aborts[0].reason == link_pb2.ABORT_REASON_DEADLINE
    assert line.check_books().running == 0


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(make_line, eventually):
    line = await make_line(executor={"max_running": 1, "credit_tokens": 20})
    (executor,) = line.executors
    streams = [await line.edge.submit(20, 10) for _ in range(20)]
    await line.edge.finish(*streams)
    executor.hold()
    streams = [await line.edge.submit(20, 1) for _ in range(200)]
    await eventually(lambda: line.state().queued == 199)
    hopeless = await line.edge.submit(20, 1, time_remaining=0.08)
    hopeful = await line.edge.submit(20, 1, time_remaining=3600.0)
    urgent = await line.edge.submit(20, 1, time_remaining=600.0, priority=-1)
    await line.edge.finish(hopeless)
    assert hopeless.code == DEADLINE_EXCEEDED
    assert "prompt tokens wait before" in hopeless.finish.status.message
    executor.release()
    await line.edge.finish(hopeful, urgent, *streams)
    assert hopeful.code == urgent.code == 0


async def test_abort_while_queued_and_while_running(make_line, eventually):
    line = await make_line(executor={"max_running": 1})
    (executor,) = line.executors
    running = await line.edge.submit(10, 100_000)
    await eventually(lambda: running.samples)
    queued = await line.edge.submit(10, 4)
    await line.edge.abort(queued)
    await line.edge.finish(queued)
    assert queued.code == CANCELLED
    assert len(executor.submits) == 1
    await line.edge.abort(running)
    await line.edge.finish(running)
    assert running.code == CANCELLED
    assert running.finish.timings.executor_id == executor.address
    await line.edge.abort(running)  # crossed with the Finish: ignored
    last = await line.edge.submit(10, 4)
    await line.edge.finish(last)
    last.check_tokens(4)
    assert line.check_books().cancelled == 2


async def test_stop_ends_one_sample_and_then_the_request(make_line, eventually):
    line = await make_line()
    stream = await line.edge.submit(10, 100_000, n=2)
    await eventually(lambda: len(stream.samples) == 2)
    await line.edge.abort(stream, link_pb2.ABORT_REASON_STOP, 1)
    await eventually(lambda: 1 in stream.ended)
    assert stream.finish is None
    await line.edge.abort(stream, link_pb2.ABORT_REASON_STOP)
    await line.edge.finish(stream)
    assert stream.code == 0
    assert stream.ended == {0: common_pb2.FINISH_REASON_STOP, 1: common_pb2.FINISH_REASON_STOP}


async def test_a_closed_link_cancels_on_the_executor(make_line, make_edge, eventually):
    line = await make_line(executor={"max_running": 2})
    (executor,) = line.executors
    other = await make_edge(line.server.address).open()
    for _ in range(4):
        await other.submit(10, 100_000)
    await eventually(lambda: (executor.running, line.check_books().queued) == (2, 2))
    await other.close()
    await eventually(lambda: not executor.running and len(executor.aborts) == 2)
    assert {abort.reason for abort in executor.aborts} == {link_pb2.ABORT_REASON_CANCELLED}
    state = line.check_books()
    assert (state.cancelled, state.queued, state.running) == (4, 0, 0)


async def test_what_the_executor_refuses_reaches_the_client(make_line):
    line = await make_line()
    line.executors[0].refuse_with = link_pb2.LinkStatus(
        code=INVALID_ARGUMENT, message="token_ids: 10 is above max_model_len = 9", field="token_ids"
    )
    stream = await line.edge.submit()
    await line.edge.finish(stream)
    assert stream.finish.status == line.executors[0].refuse_with
    assert line.check_books().rejected == 1


@pytest.mark.parametrize(
    ("prompt", "n", "field"), [([], 1, "token_ids"), ([1], 0, "sampling.n"), ([1], 17, "sampling.n")]
)
async def test_bad_submits_end_alone(make_line, prompt, n, field):
    line = await make_line()
    bad = await line.edge.submit(prompt, n=n)
    good = await line.edge.submit()
    await line.edge.finish(bad, good)
    assert bad.code == INVALID_ARGUMENT
    assert bad.finish.status.field == field
    good.check_tokens(8)


async def _status_of(call) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code(), await call.details()


async def test_broken_links_get_a_clear_status_and_hurt_nobody(make_line, make_edge, eventually):
    line = await make_line()
    hello = link_pb2.ClientFrame(hello=link_pb2.Hello(client_id="x", api_minor=API_MINOR))
    submit = link_pb2.ClientFrame(submit=link_pb2.Submit(handle=1, token_ids=[1, 2]))
    submit.submit.sampling.max_tokens = 100_000
    cases = [
        ([submit], "hello"),
        ([hello, hello], "hello"),
        ([hello, link_pb2.ClientFrame()], "frame"),
        ([hello, submit, submit], "handle"),
    ]
    for frames, word in cases:
        call = make_edge(line.server.address).stub.Connect()
        for frame in frames:
            await call.write(frame)
        code, details = await _status_of(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert word in details
    async with grpc.aio.insecure_channel(line.server.address) as channel:
        call = channel.stream_stream("/scalellm.v1.Scheduler/Connect", response_deserializer=lambda raw: raw)()
        await call.write(b"\xff\xff\xff nonsense")
        code, details = await _status_of(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "not a ClientFrame" in details
    stream = await line.edge.submit()
    await line.edge.finish(stream)
    stream.check_tokens(8)
    await eventually(lambda: not line.state().running)
    line.check_books()


async def test_a_step_that_breaks_the_protocol(make_line, eventually):
    line = await make_line()
    (executor,) = line.executors

    def skip_tokens(step: link_pb2.StepOutput) -> None:
        if step.offsets and step.offsets[0] == 3:
            step.offsets[0] = 5

    executor.mangle = skip_tokens
    stream = await line.edge.submit(10, 20)
    await line.edge.finish(stream)
    assert stream.code == grpc.StatusCode.INTERNAL.value[0]
    assert len(stream.samples[0]) == 3
    await eventually(lambda: executor.aborts)
    line.check_books()


async def test_a_message_that_is_no_frame_is_named_as_such(make_scheduler, make_edge, eventually):
    async def execute(frames, context):
        await anext(frames)
        sizes = {"max_model_len": 64, "block_size": 16, "num_blocks": 4, "max_num_seqs": 1, "vocab_size": 9}
        welcome = link_pb2.Welcome(instance_id="broken", api_minor=API_MINOR, model="m", **sizes)
        welcome.load.granted_requests = welcome.load.granted_prefill_tokens = 1
        yield link_pb2.ServerFrame(welcome=welcome).SerializeToString()
        await anext(frames)
        yield b"\xff\xff\xff no frame"

    server = grpc.aio.server()
    handlers = {"Execute": grpc.stream_stream_rpc_method_handler(execute)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("scalellm.v1.Executor", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    broken = SimpleNamespace(address=f"127.0.0.1:{port}")
    scheduler = await make_scheduler(broken, max_executor_deaths=1, executor_grace_s=PATIENCE)
    edge = await make_edge(scheduler.address).open()
    stream = await edge.submit()
    await edge.finish(stream)
    await server.stop(0)
    assert stream.code == grpc.StatusCode.INTERNAL.value[0]
    assert "not a ServerFrame" in stream.finish.status.message
