"""The service as a whole: sessions and Redis, draining, health, metrics, the process, and a random run."""

import asyncio
import random
import signal
import sys
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from reflection_client import ReflectionClient
from scalellm.v1 import common_pb2, link_pb2, scheduler_pb2
from service_processes import PATIENCE

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


def executor_id(stream):
    return stream.finish.timings.executor_id


async def run_session(edge, session_id, prompt=10):
    stream = await edge.submit(prompt, 2, session_id=session_id)
    await edge.finish(stream)
    assert stream.code == 0
    return executor_id(stream)


async def test_a_session_stays_on_its_executor(make_line, eventually):
    line = await make_line(3)
    homes = {}
    for i in range(6):
        homes[f"s{i}"] = await run_session(line.edge, f"s{i}")
    # Load alone would send everything elsewhere now.
    for address in set(homes.values()):
        (home,) = [executor for executor in line.executors if executor.address == address]
        weight = [await line.edge.submit(40, 100_000, session_id=f"heavy{i}") for i in range(3)]
        await eventually(lambda weight=weight: all(stream.samples for stream in weight))
        for session_id in [session_id for session_id, where in homes.items() if where == home.address]:
            assert await run_session(line.edge, session_id) == home.address
        for stream in weight:
            await line.edge.abort(stream)
        await line.edge.finish(*weight)


async def test_a_session_moves_when_its_executor_stays_out_of_credits(make_line, eventually):
    line = await make_line(2, executor={"max_running": 1}, session_wait_s=0.05)
    home = await run_session(line.edge, "s")
    (busy,) = [executor for executor in line.executors if executor.address == home]
    blocker = await line.edge.submit(10, 100_000, session_id="s")
    await eventually(lambda: busy.running)
    moved = await line.edge.submit(10, 2, session_id="s")
    await line.edge.finish(moved)
    assert moved.code == 0
    assert executor_id(moved) != home
    assert moved.finish.timings.admission_ns >= 40_000_000
    await line.edge.abort(blocker)


async def test_a_session_waits_for_its_executor_a_moment(make_line, eventually):
    line = await make_line(2, executor={"max_running": 1}, session_wait_s=PATIENCE)
    home = await run_session(line.edge, "s")
    (busy,) = [executor for executor in line.executors if executor.address == home]
    blocker = await line.edge.submit(10, 100_000, session_id="s")
    await eventually(lambda: busy.running)
    patient = await line.edge.submit(10, 2, session_id="s")
    other = await line.edge.submit(10, 2)  # overtakes it on the free executor
    await line.edge.finish(other)
    assert executor_id(other) != home
    assert patient.finish is None
    await line.edge.abort(blocker)
    await line.edge.finish(patient)
    assert executor_id(patient) == home


async def test_affinity_survives_a_restart_of_the_scheduler(
    make_line, make_scheduler, make_edge, redis_server, eventually, monkeypatch
):
    # A hint that comes late is done without.
    monkeypatch.setattr("scalellm.services.scheduler.affinity_store._LOOK_UP_LIMIT", PATIENCE)
    _, url = redis_server
    line = await make_line(3, redis_url=url, session_ttl_s=100)
    await eventually(lambda: line.state().redis_ok)
    homes = {f"s{i}": await run_session(line.edge, f"s{i}", 10 + i) for i in range(9)}
    # Spread by hand, since sessions one after another all find idle executors.
    redis = Redis.from_url(url)
    await eventually(lambda: len(redis.keys("scalellm:affinity:*")) == 9)
    for i, session_id in enumerate(homes):
        homes[session_id] = line.executors[i % 3].address
        redis.set(f"scalellm:affinity:{session_id}", homes[session_id], ex=100)
    restarted = await make_scheduler(*line.executors, redis_url=url)
    await eventually(lambda: restarted.service.get_state().redis_ok)
    await eventually(lambda: len([e for e in restarted.service.get_state().executors if e.instance_id]) == 3)
    edge = await make_edge(restarted.address).open()
    for session_id, home in homes.items():
        assert await run_session(edge, session_id) == home
    assert all(0 < redis.ttl(key) <= 3600 for key in redis.keys("*"))
    redis.close()


async def test_a_stalled_redis_stops_nothing_and_is_noticed(make_line, redis_server, eventually):
    process, url = redis_server
    line = await make_line(redis_url=url)
    await eventually(lambda: line.state().redis_ok)
    process.send_signal(signal.SIGSTOP)
    try:
        streams = [await line.edge.submit(10, 5, session_id=f"s{i}") for i in range(20)]
        await line.edge.finish(*streams)
        for stream in streams:
            stream.check_tokens(5)
        await eventually(lambda: not line.state().redis_ok)
    finally:
        process.send_signal(signal.SIGCONT)
    await eventually(lambda: line.state().redis_ok)
    redis = Redis.from_url(url)
    await run_session(line.edge, "afterwards")
    await eventually(lambda: redis.exists("scalellm:affinity:afterwards"))
    redis.close()


async def test_drain(make_line, make_edge, eventually):
    line = await make_line()
    stream = await line.edge.submit(10, 300)
    await eventually(lambda: stream.samples)
    draining = asyncio.ensure_future(line.edge.stub.Drain(scheduler_pb2.DrainRequest(timeout_s=120)))
    await eventually(lambda: line.edge.draining)
    refused = await line.edge.submit()
    await line.edge.finish(refused)
    assert refused.code == UNAVAILABLE
    assert refused.finish.status.retry_after_ns > 0
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await make_edge(line.server.address).open()
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await draining).remaining == 0
    await line.edge.finish(stream)
    stream.check_tokens(300)
    assert line.state().draining
    with pytest.raises(grpc.aio.AioRpcError) as too_long:
        await line.edge.stub.Drain(scheduler_pb2.DrainRequest(timeout_s=4000))
    assert "timeout_s" in too_long.value.details()


async def test_drain_says_what_is_left(make_line, eventually):
    line = await make_line()
    stream = await line.edge.submit(10, 100_000)
    await eventually(lambda: stream.samples)
    assert (await line.edge.stub.Drain(scheduler_pb2.DrainRequest(timeout_s=0))).remaining == 1


async def health_of(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return answer.status


async def test_health_follows_the_executors(make_scheduler, make_executor):
    server = await make_scheduler()
    assert await health_of(server.address, "scalellm.v1.Scheduler") == health_pb2.HealthCheckResponse.NOT_SERVING
    executor = await make_executor()
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        add = channel.unary_unary(
            "/scalellm.v1.Scheduler/AddExecutor",
            request_serializer=scheduler_pb2.AddExecutorRequest.SerializeToString,
        )
        await add(scheduler_pb2.AddExecutorRequest(address=executor.address))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_service(make_scheduler, version):
    server = await make_scheduler()
    async with grpc.aio.insecure_channel(server.address) as channel:
        reflection = ReflectionClient(channel, version)
        assert {"scalellm.v1.Scheduler", "grpc.health.v1.Health"} <= set(await reflection.services())


async def scrape(address: str) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
            return answer.read().decode()

    text = await asyncio.to_thread(read)
    return {
        "/".join((sample.name.removeprefix("scalellm_scheduler_"), *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_balance_at_every_scrape(make_line):
    line = await make_line(2, executor={"max_running": 2}, metrics_port=0)
    streams = []
    for i in range(30):
        streams.append(await line.edge.submit(10, 20))
        if i % 3 == 0:
            await line.edge.abort(streams[-1])
        if i % 5 == 0:
            values = await scrape(line.server.metrics_address)
            ended = sum(value for name, value in values.items() if name.startswith("requests_total/"))
            current = values["num_requests_waiting"] + values["num_requests_running"]
            assert values["requests_accepted_total"] == ended + current
    await line.edge.finish(*streams)
    values = await scrape(line.server.metrics_address)
    assert values["requests_accepted_total"] == 30
    assert values["executors/ready"] == 2
    assert "redis_up" not in values, "there is none"
    assert 20 <= values["queue_time_seconds_count"] <= 30
    assert values["queue_time_seconds_bucket/+Inf"] == values["queue_time_seconds_count"]


async def test_names_stand_for_addresses(make_executor, make_scheduler, eventually):
    executor = await make_executor()
    server = await make_scheduler(executor_resolve_s=0.05)
    port = executor.address.rpartition(":")[2]
    async with grpc.aio.insecure_channel(server.address) as channel:
        add = channel.unary_unary(
            "/scalellm.v1.Scheduler/AddExecutor",
            request_serializer=scheduler_pb2.AddExecutorRequest.SerializeToString,
        )
        await add(scheduler_pb2.AddExecutorRequest(address=f"localhost:{port}"))
        await add(scheduler_pb2.AddExecutorRequest(address="no..host:1"))

    def state_of(address):
        return next(
            (state for state in server.service.get_state().executors if state.address == address),
            scheduler_pb2.ExecutorState(),
        )

    await eventually(lambda: state_of(executor.address).phase == scheduler_pb2.EXECUTOR_PHASE_READY)
    await eventually(lambda: "cannot look up" in state_of("no..host:1").last_error)


async def test_the_process_drains_on_sigterm_and_exits_0(make_executor, make_edge, tmp_path, eventually):
    executor = await make_executor()
    announced = tmp_path / "address"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scalellm.services.scheduler", "--port", "0", "--metrics-port", "0", "--announce", str(announced)),
        *("--executors", executor.address, "--drain-limit-s", str(PATIENCE)),
    )
    try:
        await eventually(announced.exists)
        address, metrics = announced.read_text().split()
        edge = await make_edge(address).open()
        stream = await edge.submit(10, 300)
        await eventually(lambda: stream.samples)
        assert (await scrape(metrics.removeprefix("metrics=")))["num_requests_running"] == 1
        process.terminate()
        await eventually(lambda: edge.draining)
        await edge.finish(stream)
        stream.check_tokens(300)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        assert not announced.exists()
    finally:
        if process.returncode is None:
            process.kill()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "{port}"], "port is in use"),
        (["--port", "0", "--metrics-port", "{port}"], "choose another --metrics-port"),
        (["--port", "0", "--announce", "/nowhere/address"], "cannot write /nowhere/address"),
    ],
)
async def test_what_keeps_it_from_starting_is_one_clear_line(make_scheduler, flags, words):
    server = await make_scheduler()
    port = server.address.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scalellm.services.scheduler", *(flag.format(port=port) for flag in flags)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 1
    lines = [line for line in stderr.decode().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in stderr.decode()


@pytest.mark.parametrize("seed", [1, 2])
async def test_books_balance_after_a_random_run(make_line, make_edge, make_executor, seed, eventually):
    rng = random.Random(seed)
    options = {"max_running": 4, "credit_tokens": 60, "step_time": 0.002}
    line = await make_line(
        3,
        executor=options,
        max_queued_requests=30,
        executor_grace_s=PATIENCE,
        stall_limit_s=PATIENCE,
        max_executor_deaths=50,
    )
    edges = [line.edge, await make_edge(line.server.address).open(), await make_edge(line.server.address).open()]
    aborting: set[asyncio.Task[None]] = set()

    async def abort_later(edge, stream, delay, reason):
        await asyncio.sleep(delay)
        await edge.abort(stream, reason)

    streams = []
    leaving = edges[2]
    for i in range(200):
        edge = rng.choice(edges[: 3 if i < 120 else 2])
        stream = await edge.submit(
            rng.randint(1, 60),
            rng.randint(1, 30),
            n=rng.choice([1, 1, 2]),
            priority=rng.randint(-1, 1),
            time_remaining=rng.choice([None, None, 0.05, 5.0]),
            session_id=rng.choice(["", "a", "b", "c"]),
        )
        streams.append((edge, stream))
        if rng.random() < 0.33:
            reason = rng.choice([link_pb2.ABORT_REASON_CANCELLED, link_pb2.ABORT_REASON_STOP])
            task = asyncio.create_task(abort_later(edge, stream, rng.random() * 0.1, reason))
            aborting.add(task)
        if i in (60, 140):
            victim = line.executors[i % 3]
            await victim.die()
            port = int(victim.address.rpartition(":")[2])
            line.executors.append(await make_executor(port=port, **options))
        if i == 120:
            await asyncio.gather(*aborting)
            aborting.clear()
            # What was not read yet would be lost with the connection.
            await eventually(lambda: line.check_books().accepted == len(streams))
            await leaving.close()
        if i % 10 == 0:
            line.check_books()
            await asyncio.sleep(0.01)
    await asyncio.gather(*aborting)
    await asyncio.gather(*(edge.finish(stream) for edge, stream in streams if edge is not leaving))
    state = line.check_books()
    assert (state.accepted, state.queued, state.queued_tokens, state.running) == (200, 0, 0, 0)
    for edge, stream in streams:
        if edge is not leaving and stream.code == 0 and common_pb2.FINISH_REASON_STOP not in stream.ended.values():
            n = len(stream.samples)
            stream.check_tokens(len(stream.samples[0]), n)
    assert sum(executor.credit_violations for executor in line.executors) == 0
    await eventually(lambda: not any(executor.running for executor in line.executors))
    for edge in edges[:2]:
        edge.reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await edge.reading


async def test_an_edge_takes_no_rows_of_others(make_line):
    line = await make_line()
    first = await line.edge.submit(10, 64)
    second = await line.edge.submit(in_place_of=range(100))
    await line.edge.finish(first, second)
    first.check_tokens(64)
    assert [list(submit.in_place_of) for submit in line.executors[0].submits] == [[], []]
