"""Executors that die, hang, drain, refuse, join and leave: the client sees pauses at most."""

import asyncio

import grpc
import pytest

from scalellm.v1 import common_pb2, link_pb2, scheduler_pb2
from service_processes import PATIENCE

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
INTERNAL = grpc.StatusCode.INTERNAL.value[0]
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
CANCELLED = grpc.StatusCode.CANCELLED.value[0]
READY = scheduler_pb2.EXECUTOR_PHASE_READY
DRAINING = scheduler_pb2.EXECUTOR_PHASE_DRAINING
INCOMPATIBLE = scheduler_pb2.EXECUTOR_PHASE_INCOMPATIBLE


def busy_executor(line):
    return next(executor for executor in line.executors if executor.running)


async def test_streams_survive_a_death_without_a_duplicate_or_missing_token(make_line, eventually):
    line = await make_line(2, executor={"step_time": 0.003})
    streams = [await line.edge.submit(10 + i, 60, n=1 + i % 2, logprobs=0) for i in range(8)]
    await eventually(lambda: all(len(stream.samples.get(0, ())) > 3 for stream in streams))
    victim, survivor = line.executors
    assert victim.running
    assert survivor.running
    lost = victim.running
    await victim.die()
    await line.edge.finish(*streams)
    moved = 0
    for i, stream in enumerate(streams):
        n = 1 + i % 2
        stream.check_tokens(60, n)
        for index in range(n):
            assert stream.logprobs[index] == [-float(token) for token in stream.samples[index]]
        assert stream.finish.timings.executor_id == survivor.address
        moved += stream.finish.usage.num_resumed > 0
        assert (stream.finish.usage.num_resumed > 0) == (stream.finish.timings.failover_ns > 0)
    assert moved == lost == line.check_books().resubmitted


async def test_the_resubmission_repeats_the_seed_and_carries_ended_samples(make_line, eventually):
    line = await make_line(2)
    stream = await line.edge.submit(10, 100_000, n=2)
    await eventually(lambda: len(stream.samples) == 2)
    await line.edge.abort(stream, link_pb2.ABORT_REASON_STOP, 0)
    await eventually(lambda: 0 in stream.ended)
    first = busy_executor(line)
    await first.die()
    (second,) = [executor for executor in line.executors if executor is not first]
    await eventually(lambda: second.submits)
    resubmit = second.submits[0]
    assert resubmit.sampling.seed == first.submits[0].sampling.seed
    ended, going = resubmit.resumed
    assert ended.finished == common_pb2.FINISH_REASON_STOP
    assert list(ended.token_ids) == stream.samples[0]
    assert going.finished == common_pb2.FINISH_REASON_UNSPECIFIED
    assert len(going.token_ids) > 0
    await line.edge.abort(stream)
    await line.edge.finish(stream)
    assert stream.ended == {0: common_pb2.FINISH_REASON_STOP}


async def test_several_deaths_under_one_request(make_line, make_executor, eventually):
    line = await make_line(3, executor={"step_time": 0.003})
    stream = await line.edge.submit(10, 80, n=2)
    for seen in (5, 15):
        await eventually(lambda seen=seen: len(stream.samples.get(1, ())) > seen)
        await busy_executor(line).die()
    await line.edge.finish(stream)
    stream.check_tokens(80, n=2)
    assert stream.finish.usage.num_resumed > 30
    assert line.check_books().resubmitted == 2


async def test_prompt_logprobs_are_not_repeated(make_line, eventually):
    line = await make_line(2)
    stream = await line.edge.submit(10, 300, prompt_logprobs=0)
    await eventually(lambda: len(stream.samples.get(0, ())) > 3)
    await busy_executor(line).die()
    await line.edge.finish(stream)
    stream.check_tokens(300)
    assert stream.prompt_logprobs == [-float(token) for token in stream.prompt]


async def test_an_executor_that_repeats_tokens_does_no_harm(make_line):
    line = await make_line()

    def repeat(step: link_pb2.StepOutput) -> None:
        if step.offsets and step.offsets[0] == 5:
            step.MergeFrom(link_pb2.StepOutput(handles=step.handles, indices=step.indices, offsets=step.offsets))
            step.counts.extend(step.counts)
            step.token_ids.extend(step.token_ids)

    line.executors[0].mangle = repeat
    stream = await line.edge.submit(10, 12)
    await line.edge.finish(stream)
    stream.check_tokens(12)


async def test_no_executor_left_ends_everything_unavailable(make_line, eventually):
    line = await make_line(executor={"max_running": 1})
    running = await line.edge.submit(10, 100_000)
    await eventually(lambda: running.samples)
    queued = await line.edge.submit()
    await eventually(lambda: line.state().queued == 1)
    await line.executors[0].die()
    await line.edge.finish(running, queued)
    new = await line.edge.submit()
    await line.edge.finish(new)
    for stream in (running, queued, new):
        assert stream.code == UNAVAILABLE
        assert "no executor" in stream.finish.status.message
        assert stream.finish.status.retry_after_ns > 0
    state = line.check_books()
    assert (state.rejected, state.queued, state.running) == (3, 0, 0)


async def test_the_restart_of_the_only_executor_is_ridden_out(make_line, make_executor, eventually):
    line = await make_line(executor={"step_time": 0.003}, executor_grace_s=PATIENCE)
    stream = await line.edge.submit(10, 50)
    await eventually(lambda: len(stream.samples.get(0, ())) > 3)
    (old,) = line.executors
    await old.die()
    queued = await line.edge.submit(10, 5)
    await make_executor(port=int(old.address.rpartition(":")[2]), instance_id="reborn")
    await line.edge.finish(stream, queued)
    stream.check_tokens(50)
    queued.check_tokens(5)
    assert line.state().executors[0].instance_id == "reborn"


async def test_a_hanging_executor_counts_as_dead(make_line, eventually):
    line = await make_line(2, stall_limit_s=0.3)
    stream = await line.edge.submit(10, 500)
    await eventually(lambda: stream.samples)
    hanging = busy_executor(line)
    hanging.hold()
    await line.edge.finish(stream)
    stream.check_tokens(500)
    assert stream.finish.usage.num_resumed > 0
    # Its front is back at once and looks idle: that attracts nobody.
    await line.all_ready(2)
    before = len(hanging.submits)
    streams = [await line.edge.submit(10 + i, 20) for i in range(6)]
    await line.edge.finish(*streams)
    assert len(hanging.submits) == before


async def test_a_hanging_executor_is_noticed_though_its_requests_were_given_up(make_line, eventually):
    line = await make_line(2, stall_limit_s=0.3, deadline_backstop_s=0.05)
    stream = await line.edge.submit(10, 100_000, time_remaining=1.0)
    await eventually(lambda: stream.samples)
    hanging = busy_executor(line)
    (link,) = hanging.links
    hanging.hold()
    await line.edge.finish(stream)
    assert stream.code == DEADLINE_EXCEEDED
    await eventually(lambda: link not in hanging.links)
    await line.all_ready(2)
    before = len(hanging.submits)
    streams = [await line.edge.submit(10 + i, 20) for i in range(6)]
    await line.edge.finish(*streams)
    assert len(hanging.submits) == before


async def test_a_suspect_executor_is_tried_with_one_request_and_trusted_again(make_line, eventually):
    line = await make_line(executor={"step_time": 0.005}, stall_limit_s=0.3, executor_grace_s=PATIENCE)
    (executor,) = line.executors
    streams = [await line.edge.submit(10 + i, 40) for i in range(4)]
    await eventually(lambda: all(stream.samples for stream in streams))
    executor.hold()
    await eventually(lambda: line.state().queued == 3)
    assert line.state().running == 1
    executor.release()
    await line.edge.finish(*streams)
    for stream in streams:
        stream.check_tokens(40)
        assert stream.finish.usage.num_resumed > 0


async def test_a_refusal_by_a_draining_executor_is_no_death(make_line):
    line = await make_line(2, max_executor_deaths=1)
    stubborn = line.executors[0]
    stubborn.refuse_with = link_pb2.LinkStatus(code=UNAVAILABLE, message="draining")
    streams = [await line.edge.submit(10 + i, 5) for i in range(10)]
    await line.edge.finish(*streams)
    for stream in streams:
        stream.check_tokens(5)
        assert stream.finish.timings.executor_id == line.executors[1].address
        assert stream.finish.timings.failover_ns == 0
    assert stubborn.submits
    assert line.check_books().resubmitted == 0


async def test_refused_by_all(make_line):
    line = await make_line(2)
    for executor in line.executors:
        executor.refuse_with = link_pb2.LinkStatus(code=UNAVAILABLE, message="engine is gone")
    stream = await line.edge.submit()
    await line.edge.finish(stream)
    assert stream.code == UNAVAILABLE
    assert "engine is gone" in stream.finish.status.message


async def test_a_draining_executor_finishes_and_gets_nothing_new(make_line, eventually):
    line = await make_line(2)
    stream = await line.edge.submit(10, 200)
    await eventually(lambda: stream.samples)
    leaver = busy_executor(line)
    leaver.draining = True
    await eventually(lambda: line.phases()[DRAINING] == 1)
    before = len(leaver.submits)
    others = [await line.edge.submit(10 + i, 5) for i in range(8)]
    await line.edge.finish(stream, *others)
    assert len(leaver.submits) == before
    stream.check_tokens(200)
    assert stream.finish.timings.executor_id == leaver.address
    assert stream.finish.usage.num_resumed == 0


async def test_executors_join_and_leave_at_run_time(make_line, make_executor, eventually):
    line = await make_line()
    stub = line.edge.stub
    newcomer = await make_executor()
    for _ in range(2):
        await stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=newcomer.address))
    await line.all_ready(2)
    old = line.executors[0]
    running = [await line.edge.submit(10, 300) for _ in range(4)]
    await eventually(lambda: old.running and newcomer.running and all(stream.samples for stream in running))
    old.hold()
    await stub.RemoveExecutor(scheduler_pb2.RemoveExecutorRequest(address=old.address))
    assert line.phases() == {READY: 1, DRAINING: 1}
    old.release()
    late = await line.edge.submit(10, 5)
    await line.edge.finish(late, *running)
    for stream in running:
        stream.check_tokens(300)
        assert stream.finish.usage.num_resumed == 0
    assert late.finish.timings.executor_id == newcomer.address
    await eventually(lambda: [executor.address for executor in line.state().executors] == [newcomer.address])
    await eventually(lambda: not old.links)
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.RemoveExecutor(scheduler_pb2.RemoveExecutorRequest(address=old.address))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as bad:
        await stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address="nowhere"))
    assert bad.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_executor_with_another_tokenizer_is_kept_out(make_line, make_executor, eventually):
    line = await make_line()
    alien = await make_executor(tokenizer_sha256=b"alien")
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=alien.address))
    await eventually(lambda: line.phases()[INCOMPATIBLE] == 1)
    (state,) = [executor for executor in line.state().executors if executor.address == alien.address]
    assert "tokenizer_sha256 differ" in state.last_error
    streams = [await line.edge.submit(10 + i, 5) for i in range(5)]
    await line.edge.finish(*streams)
    assert not alien.submits


async def test_the_same_executor_under_two_addresses_counts_once(make_line, make_executor, eventually):
    line = await make_line()
    twin = await make_executor(instance_id=line.executors[0].instance_id)
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=twin.address))
    await eventually(lambda: line.phases()[INCOMPATIBLE] == 1)
    assert line.phases()[READY] == 1


async def test_another_model_after_all_left_makes_clients_shake_hands_again(
    make_line, make_executor, make_edge, eventually
):
    line = await make_line()
    await line.executors[0].die()
    await eventually(lambda: not line.phases()[READY])
    successor = await make_executor(model="successor", tokenizer_sha256=b"new")
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=successor.address))
    await asyncio.wait_for(line.edge.reading, PATIENCE)
    edge = await make_edge(line.server.address).open(b"new")
    assert edge.welcome.model == "successor"


async def test_hello_waits_for_the_first_executor_and_gives_up(make_scheduler, make_executor, make_edge):
    server = await make_scheduler(executor_grace_s=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await make_edge(server.address).open()
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    executor = await make_executor()
    patient = await make_scheduler(executor, executor_grace_s=PATIENCE)
    edge = await make_edge(patient.address).open()
    stream = await edge.submit()
    await edge.finish(stream)
    stream.check_tokens(8)


async def test_abort_between_two_executors(make_line, eventually):
    line = await make_line(executor={"max_running": 2}, executor_grace_s=PATIENCE)
    cancelled = await line.edge.submit(10, 100_000)
    stopped = await line.edge.submit(10, 100_000)
    await eventually(lambda: cancelled.samples and stopped.samples)
    await line.executors[0].die()
    await eventually(lambda: line.state().queued == 2)
    await line.edge.abort(cancelled)
    await line.edge.abort(stopped, link_pb2.ABORT_REASON_STOP, 0)
    await line.edge.finish(cancelled, stopped)
    assert cancelled.code == CANCELLED
    assert stopped.code == 0
    assert stopped.ended == {0: common_pb2.FINISH_REASON_STOP}
    assert stopped.finish.usage.completion_tokens == len(stopped.samples[0])
    assert cancelled.finish.timings.failover_ns > 0


async def test_an_abort_that_the_executor_took_to_its_grave(make_line, eventually):
    line = await make_line(2)
    cancelled, stopped = [await line.edge.submit(10, 100_000, n=2) for _ in range(2)]
    await eventually(lambda: len(cancelled.samples) == 2 and len(stopped.samples) == 2)
    for executor in line.executors:
        executor.hold()
    await line.edge.abort(cancelled)
    await line.edge.abort(stopped, link_pb2.ABORT_REASON_STOP, 1)
    await eventually(lambda: sum(len(executor.aborts) for executor in line.executors) == 2)
    victims = [executor for executor in line.executors if executor.running]
    await asyncio.gather(*(victim.die() for victim in victims))
    await line.edge.finish(cancelled)
    assert cancelled.code == CANCELLED
    await eventually(lambda: stopped.ended == {1: common_pb2.FINISH_REASON_STOP})


async def test_a_drain_waits_for_requests_that_move_beside_one_that_ends(make_line, make_executor, eventually):
    line = await make_line(executor={"step_time": 0.003}, executor_grace_s=PATIENCE)
    cancelled = await line.edge.submit(10, 100_000)
    moving = await line.edge.submit(10, 50)
    await eventually(lambda: cancelled.samples and moving.samples)
    (old,) = line.executors
    old.hold()
    await line.edge.abort(cancelled)
    await eventually(lambda: old.aborts)
    await old.die()
    await line.edge.finish(cancelled)
    draining = asyncio.create_task(line.server.dispatchers.wait_idle(PATIENCE))
    await make_executor(port=int(old.address.rpartition(":")[2]), instance_id="reborn")
    assert await draining == 0
    await line.edge.finish(moving)
    moving.check_tokens(50)


async def test_an_executor_that_joins_with_a_shorter_context_gets_what_it_can_hold(
    make_line, make_executor, eventually
):
    line = await make_line()
    busy = [await line.edge.submit(10, 2000) for _ in range(4)]
    await eventually(lambda: all(stream.samples for stream in busy))
    short = await make_executor(max_model_len=32)
    await line.edge.stub.AddExecutor(scheduler_pb2.AddExecutorRequest(address=short.address))
    await line.all_ready(2)
    long_answer, short_answer = await line.edge.submit(10, 40), await line.edge.submit(10, 8)
    await line.edge.finish(long_answer, short_answer)
    assert long_answer.finish.timings.executor_id == line.executors[0].address
    assert short_answer.finish.timings.executor_id == short.address
