"""The executor service over real gRPC, with the fake engine behind it: links, credits, faults, drain."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from link_peer import LinkPeer, open_link
from scalellm.services.common.link import API_MINOR
from scalellm.services.common.settings import load_settings
from scalellm.services.executor.config import ExecutorSettings
from scalellm.v1 import common_pb2, executor_pb2, executor_pb2_grpc, link_pb2, scheduler_pb2_grpc
from service_processes import PATIENCE, ServiceProcess, Spawn, eventually

SERVING = health_pb2.HealthCheckResponse.SERVING


def execute(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamMultiCallable:
    return executor_pb2_grpc.ExecutorStub(channel).Execute


def connect(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamMultiCallable:
    return scheduler_pb2_grpc.SchedulerStub(channel).Connect


def flags(model: Path, *more: str) -> list[str]:
    return ["--engine", "fake", "--model", str(model), "--max-model-len", "512", "--num-blocks", "256", *more]


@pytest.fixture(scope="module")
def executor(module_spawn: Spawn, model_dir) -> ServiceProcess:
    return module_spawn("executor", *flags(model_dir("smollm2-135m-instruct")))


@pytest.fixture(scope="module")
def paced(module_spawn: Spawn, model_dir) -> ServiceProcess:
    """An executor with few rows and steps as long as a GPU's, so that requests can be seen running."""
    return module_spawn(
        "executor",
        *flags(model_dir("smollm2-135m-instruct"), "--fake-preset", "h200-llama-8b", "--max-num-seqs", "4"),
    )


def sampling(**fields) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(temperature=0, seed=1, **fields)


async def info(address: str) -> executor_pb2.GetExecutorInfoResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        return await executor_pb2_grpc.ExecutorStub(channel).GetInfo(executor_pb2.GetExecutorInfoRequest())


async def instance_id(address: str) -> str | None:
    """Return the id of the engine; None while there is no engine."""
    try:
        return (await info(address)).instance_id
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return None


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="scalellm.v1.Executor")
        )
        return answer.status


async def test_runs_requests_and_returns_every_block(executor: ServiceProcess) -> None:
    async with open_link(execute, executor.address) as peer:
        assert peer.welcome.model == "smollm2-135m-instruct"
        assert (peer.welcome.max_model_len, peer.welcome.vocab_size) == (512, 49152)
        assert len(peer.welcome.tokenizer_sha256) == 32
        for handle in range(40):
            # A prompt of which the scheduler expects a part to be cached takes the rest of the credits.
            charge = {"charged_tokens": 3} if handle % 2 else {}
            options = {"sampling": sampling(max_tokens=7, n=1 + handle % 3)} | charge
            await peer.submit(handle, list(range(5, 25 + handle)), **options)
        for handle in range(40):
            finish = await peer.finish(handle)
            assert finish.status.code == 0
            assert finish.usage.prompt_tokens == 20 + handle
            assert finish.usage.completion_tokens == 7 * (1 + handle % 3)
            timings = finish.timings
            assert timings.queue_ns + timings.prefill_ns + timings.decode_ns <= timings.executor_total_ns
            assert all(len(peer.tokens[handle, index]) == 7 for index in range(1 + handle % 3))
        await peer.until(lambda: peer.load.free_blocks == peer.load.total_blocks)
        assert (peer.load.running, peer.load.waiting) == (0, 0)
        assert peer.load.granted_requests >= 40 + peer.welcome.load.granted_requests
        assert (
            peer.load.granted_prefill_tokens
            == peer.welcome.load.granted_prefill_tokens + sum(range(20, 60, 2)) + 20 * 3
        )


async def test_refusals_name_the_field_and_give_credits_back(executor: ServiceProcess) -> None:
    async with open_link(execute, executor.address) as peer:
        await peer.submit(1, [])
        await peer.submit(2, [49152])
        await peer.submit(3, [5] * 600)
        await peer.submit(4, [5], sampling=sampling(top_p=float("nan")))
        for handle in (1, 2, 3, 4):
            finish = await peer.finish(handle)
            assert finish.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert finish.status.field
        assert "512" in peer.finished[3].status.message
        assert peer.finished[4].status.field == "top_p"
        assert peer.load.granted_requests == peer.welcome.load.granted_requests + 4
        await peer.submit(5, [5, 6, 7])
        assert (await peer.finish(5)).status.code == 0


async def test_requests_that_were_not_granted_end_the_link(paced: ServiceProcess) -> None:
    # None of the few granted requests has ended when one too many comes. Nothing is written after that one: a write
    # that races the end of its call spoils the status the client sees.
    async with open_link(execute, paced.address) as good, open_link(execute, paced.address) as greedy:
        for handle in range(greedy.welcome.load.granted_requests + 1):
            await greedy.submit(handle, [5], sampling=sampling(max_tokens=500, ignore_eos=True))
        assert await greedy.status() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await good.submit(1, [5])
        assert (await good.finish(1)).status.code == 0


async def test_a_flood_of_frames_waits_in_its_client_while_the_engine_does_not_read(executor: ServiceProcess) -> None:
    (engine,) = executor.children()
    front = psutil.Process(executor.pid)
    later_version = b"\xfa\x01\x80\x80\x04" + bytes(2**16)  # an unknown field
    abort = link_pb2.ClientFrame(abort=link_pb2.Abort(handle=9)).SerializeToString()
    frame = link_pb2.ClientFrame.FromString(abort + later_version)
    num_written = 0

    async def flood(peer: LinkPeer) -> None:
        nonlocal num_written
        while True:
            await peer.write(frame)
            num_written += 1

    async with open_link(execute, executor.address) as good, open_link(execute, executor.address) as bad:
        before = front.memory_info().rss
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            flooding = asyncio.create_task(flood(bad))
            await good.submit(1, [5, 6, 7])
            await asyncio.sleep(3)
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        assert front.memory_info().rss < before + 32 * 2**20
        assert (await good.finish(1)).status.code == 0
        stopped_at = num_written
        await eventually(lambda: num_written > stopped_at + 100)
        flooding.cancel()
        await asyncio.wait((flooding,))
        assert not bad._reader.done(), "the link stands"


async def test_a_broken_frame_ends_the_link_and_only_this_link(executor: ServiceProcess) -> None:
    async with open_link(execute, executor.address) as good, open_link(execute, executor.address) as bad:
        await good.submit(1, [5, 6], sampling=sampling(max_tokens=200, ignore_eos=True))
        await bad.write(link_pb2.ClientFrame(hello=link_pb2.Hello()))
        assert await bad.status() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await good.finish(1)).status.code == 0
    async with grpc.aio.insecure_channel(executor.address) as channel:
        call = channel.stream_stream("/scalellm.v1.Executor/Execute")()
        await call.write(b"\xff\xff\xff not protobuf")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async with open_link(
            execute, executor.address, link_pb2.Hello(api_minor=API_MINOR, tokenizer_sha256=b"x" * 32)
        ):
            pass
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_abort_and_a_dropped_link_free_everything(spawn: Spawn, model_dir) -> None:
    executor = spawn("executor", *flags(model_dir("smollm2-135m-instruct"), "--fake-preset", "h200-llama-8b"))
    long = sampling(max_tokens=400, ignore_eos=True)
    async with open_link(execute, executor.address) as peer:  # a handle in use breaks the protocol
        await peer.submit(1, [5], sampling=long)
        await peer.submit(1, [5], sampling=long)
        assert await peer.status() is grpc.StatusCode.INVALID_ARGUMENT
    async with open_link(execute, executor.address) as peer:
        for handle in range(4):
            await peer.submit(handle, [5, handle], sampling=long)
        await peer.until(lambda: all(peer.tokens[handle, 0] for handle in range(4)))
        await peer.abort(0)
        await peer.abort(1, index=0, reason=link_pb2.ABORT_REASON_STOP)
        await peer.abort(99)
        assert (await peer.finish(0)).status.code == grpc.StatusCode.CANCELLED.value[0]
        assert (await peer.finish(1)).status.code == 0
        assert peer.sample_reasons[1, 0] == common_pb2.FINISH_REASON_STOP
        await peer.submit(5, [5], sampling=long, time_remaining_ns=100_000_000)
        assert (await peer.finish(5)).status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    async with asyncio.timeout(PATIENCE):  # while steps are taken, the figures are up to half a second old
        while (state := await info(executor.address)).load.running or state.accepted < 6:
            await asyncio.sleep(0.05)
    assert state.load.free_blocks == state.load.total_blocks
    assert state.accepted == state.finished + state.cancelled + state.rejected == 6


async def test_engine_death_ends_the_links_and_a_new_engine_comes(paced: ServiceProcess) -> None:
    executor = paced
    first = (await info(executor.address)).instance_id
    async with open_link(execute, executor.address) as peer:
        await peer.submit(1, [5], sampling=sampling(max_tokens=400, ignore_eos=True))
        await peer.until(lambda: bool(peer.tokens[1, 0]))
        (engine,) = executor.children()
        os.kill(engine.pid, signal.SIGKILL)
        assert await peer.status() is grpc.StatusCode.UNAVAILABLE
    async with asyncio.timeout(PATIENCE):
        # The books of the dead engine are nobody's any more.
        while (instance := await instance_id(executor.address)) is None:
            await asyncio.sleep(0.05)
        assert instance != first
        while await health(executor.address) != SERVING:
            await asyncio.sleep(0.05)
    async with open_link(execute, executor.address) as peer:
        await peer.submit(1, [5])
        assert (await peer.finish(1)).status.code == 0


async def test_sigterm_finishes_what_runs_and_refuses_the_rest(paced: ServiceProcess) -> None:
    """The last that uses it."""
    executor = paced
    async with open_link(execute, executor.address) as peer:
        await peer.submit(1, [5], sampling=sampling(max_tokens=500, ignore_eos=True))
        await peer.until(lambda: bool(peer.tokens[1, 0]))
        family = executor.children()
        executor.process.terminate()
        await peer.until(lambda: peer.load.draining)
        await peer.submit(2, [5])
        assert (await peer.finish(2)).status.code == grpc.StatusCode.UNAVAILABLE.value[0]
        while await health(executor.address) == SERVING:
            await asyncio.sleep(0.05)
        assert (await peer.finish(1)).status.code == 0
        assert len(peer.tokens[1, 0]) == 500
        assert await asyncio.to_thread(executor.process.wait, PATIENCE) == 0
    await eventually(lambda: not any(child.is_running() for child in family))
    assert not executor.announce.exists()


async def test_what_no_scheduler_renews_is_freed(spawn: Spawn, model_dir) -> None:
    model = flags(model_dir("smollm2-135m-instruct"), "--fake-preset", "h200-llama-8b", "--lease-s", "1")
    executor = spawn("executor", *model)
    long = sampling(max_tokens=500, ignore_eos=True)
    hello = link_pb2.Hello(client_id="silent", api_minor=API_MINOR)
    async with open_link(execute, executor.address, hello) as silent, open_link(execute, executor.address) as old:
        assert (silent.welcome.lease_ns, old.welcome.lease_ns) == (10**9, 0)
        for peer in (silent, old):
            await peer.submit(1, [5], sampling=long)
        assert await silent.status() is grpc.StatusCode.UNAVAILABLE
        assert 1 not in silent.finished
        # A client of the version before does not renew: it is never let go.
        assert (await old.finish(1)).status.code == 0
    async with asyncio.timeout(PATIENCE):
        while (state := await info(executor.address)).load.running or state.accepted < 2:
            await asyncio.sleep(0.05)
    assert state.load.free_blocks == state.load.total_blocks
    assert (state.finished, state.cancelled) == (1, 1)


async def test_a_scheduler_that_stands_still_holds_no_rows_beyond_its_lease(spawn: Spawn, model_dir) -> None:
    model = flags(model_dir("smollm2-135m-instruct"), "--fake-preset", "h200-llama-8b", "--lease-s", "1")
    executor = spawn("executor", *model)
    scheduler = spawn("scheduler", "--executors", executor.address)

    long = sampling(max_tokens=500, ignore_eos=True)
    async with open_link(connect, scheduler.address) as edge:
        await edge.submit(1, [5], sampling=long)
        await edge.finish(1)  # which took several leases: they were renewed
        assert (await info(executor.address)).cancelled == 0
        await edge.submit(2, [5], sampling=long)
        await edge.until(lambda: bool(edge.tokens[2, 0]))
        scheduler.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE):
            while (state := await info(executor.address)).load.running:
                await asyncio.sleep(0.05)
        assert state.cancelled == 1
        scheduler.process.send_signal(signal.SIGCONT)
        # It connects again, and what it lost goes on.
        assert (await edge.finish(2)).status.code == 0
        assert edge.tokens[2, 0] == edge.tokens[1, 0]
        assert edge.finished[2].usage.num_resumed > 0


async def test_a_scheduler_that_wakes_up_finds_its_request_taken_over(spawn: Spawn, model_dir) -> None:
    """The request's edge has sent it again through another scheduler, with the tokens that it had."""
    executor = spawn("executor", *flags(model_dir("smollm2-135m-instruct"), "--fake-preset", "h200-llama-8b"))
    hung, other = (spawn("scheduler", "--executors", executor.address) for _ in range(2))
    long = sampling(max_tokens=500, ignore_eos=True)
    name = {"execution_id": b"x" * 16, "sampling": long}
    async with open_link(connect, hung.address) as first, open_link(connect, other.address) as second:
        await first.submit(1, [5], **name)
        await first.until(lambda: len(first.tokens[1, 0]) > 10)
        hung.process.send_signal(signal.SIGSTOP)
        resumed = [link_pb2.ResumedSample(index=0, token_ids=first.tokens[1, 0])]
        second.tokens[7, 0] = [*first.tokens[1, 0]]
        await second.submit(7, [5], attempt=1, resumed=resumed, **name)
        await second.until(lambda: len(second.tokens[7, 0]) > len(resumed[0].token_ids))
        async with asyncio.timeout(PATIENCE):  # while steps are taken, the figures are up to half a second old
            while (state := await info(executor.address)).cancelled == 0:
                await asyncio.sleep(0.05)
        assert state.load.running <= 1
        hung.process.send_signal(signal.SIGCONT)
        finish = await first.finish(1)
        assert finish.status.code == grpc.StatusCode.ABORTED.value[0]
        assert "attempt 1, which came later" in finish.status.message
        await first.submit(2, [5], **name)  # it had this one in its queue
        assert (await first.finish(2)).status.code == grpc.StatusCode.ABORTED.value[0]
        assert (await second.finish(7)).status.code == 0
        assert len(second.tokens[7, 0]) == 500
        await first.submit(3, [5], sampling=long)
        assert (await first.finish(3)).status.code == 0
        assert second.tokens[7, 0] == first.tokens[3, 0]


async def test_kill_9_of_the_front_leaves_no_engine(spawn: Spawn, model_dir) -> None:
    executor = spawn("executor", *flags(model_dir("smollm2-135m-instruct")))
    (engine,) = executor.children()
    executor.process.kill()
    executor.process.wait()
    await eventually(lambda: not engine.is_running() or engine.status() == "zombie")


def test_refuses_to_start_in_one_line(spawn: Spawn, model_dir) -> None:
    """By its settings, by its engine, by its front."""
    refusals = {
        words: spawn("executor", *flags(model_dir("smollm2-135m-instruct"), *more), wait=False)
        for words, more in (
            ("--capacity-policy", ["--capacity-policy", "hope"]),
            ("num_blocks", ["--num-blocks", "1"]),
            ("/nowhere/model", ["--model", "/nowhere/model"]),
            ("/nowhere/address", ["--announce", "/nowhere/address"]),
        )
    }
    for words, executor in refusals.items():
        assert executor.process.wait(PATIENCE) in (1, 2)
        errors = [line for line in executor.log.read_text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert words in errors[0]
        assert "Traceback" not in executor.log.read_text()


@pytest.mark.parametrize(
    ("option", "value", "words"), [("--fake-preset", "abacus", "instant"), ("--max-num-seqs", "0", "--max-num-seqs")]
)
def test_settings_that_cannot_be_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        load_settings(ExecutorSettings, [option, value])
    assert refused.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert words in error


def test_a_port_in_use_is_said_plainly(executor: ServiceProcess, spawn: Spawn, model_dir) -> None:
    port = executor.address.rpartition(":")[2]
    second = spawn("executor", *flags(model_dir("smollm2-135m-instruct"), "--port", port), wait=False)
    third = spawn("executor", *flags(model_dir("smollm2-135m-instruct"), "--metrics-port", port), wait=False)
    assert second.process.wait(PATIENCE) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.log.read_text()
    assert third.process.wait(PATIENCE) == 1
    (line,) = third.log.read_text().splitlines()
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port} for metrics")
