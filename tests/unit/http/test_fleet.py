"""Snapshots of the fleet: who gets them, when they are taken, and what they say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiohttp import web

from face_kit import calling, make_face
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LinkDialer
from scalellm.services.common.metric_window import Scrape, Window
from scalellm.services.tokenizer.fleet.snapshot import Snapshots, model_figures, scheduler_json, window_figures
from scalellm.services.tokenizer.fleet.watch import FleetWatch
from scalellm.services.tokenizer.http.fleet_routes import FleetRoutes
from scalellm.v1 import link_pb2, scheduler_pb2, scheduler_pb2_grpc

READY, CONNECTING = scheduler_pb2.EXECUTOR_PHASE_READY, scheduler_pb2.EXECUTOR_PHASE_CONNECTING


class Taker:
    """Numbers the snapshots that are taken."""

    def __init__(self) -> None:
        self.num_taken = self.num_forgotten = 0

    async def take(self) -> bytes:
        await asyncio.sleep(0.001)
        self.num_taken += 1
        return b"%d" % self.num_taken

    async def forget(self) -> None:
        self.num_forgotten += 1


async def test_snapshots_are_taken_once_for_all_watchers_and_not_without_any() -> None:
    taker = Taker()
    watch = FleetWatch(taker.take, taker.forget, interval=0.0)
    async with watch.watching() as one, watch.watching() as other:
        assert await asyncio.gather(one(), other()) == [b"1", b"1"]
        assert await asyncio.gather(other(), one()) == [b"2", b"2"]
        assert taker.num_forgotten == 0
    assert (taker.num_forgotten, watch.num_watchers) == (1, 0)
    num_taken = taker.num_taken
    await asyncio.sleep(0.02)
    assert taker.num_taken == num_taken, "nobody watches"
    async with watch.watching() as again:
        assert await again() == b"%d" % (num_taken + 1)


async def test_a_call_that_is_cancelled_while_its_watcher_leaves_forgets_all_the_same() -> None:
    taker, watch = Taker(), None

    async def leave() -> None:
        async with watch.watching() as following:
            await following()
        raise AssertionError("it was cancelled before")

    async def forget() -> None:
        call.cancel()  # as aiohttp does once the connection is gone
        await asyncio.sleep(0.001)
        await taker.forget()

    watch = FleetWatch(taker.take, forget, interval=0.0)
    call = asyncio.create_task(leave())
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(120):
        while not taker.num_forgotten:
            await asyncio.sleep(0.001)


async def test_a_watcher_too_many_is_refused_and_a_failure_ends_no_other_snapshot() -> None:
    fails = [True, False]

    async def take() -> bytes:
        await asyncio.sleep(0)
        if fails.pop(0):
            raise RuntimeError("broken")
        fails.append(False)
        return b"fine"

    async def forget() -> None:
        pass

    watch = FleetWatch(take, forget, interval=0.0, most=1)
    async with watch.watching() as one:
        with pytest.raises(RuntimeError, match="broken"):
            await one()
        assert await one() == b"fine"
        with pytest.raises(StatusError) as refusal:
            async with watch.watching():
                pass
        assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with watch.watching():  # there is room again
        pass


def application(taker: Taker) -> tuple[web.Application, Any]:
    face = make_face()
    app = face.application()
    FleetRoutes(FleetWatch(taker.take, taker.forget, interval=0.0), face.gate).register(face, app)
    return app, face


async def test_one_snapshot_or_a_stream_of_them_until_the_worker_drains() -> None:
    taker = Taker()
    app, face = application(taker)
    async with calling(app) as client:
        async with client.get("/v1/fleet") as response:
            assert (response.content_type, await response.read()) == ("application/json", b"1")
        async with client.get("/v1/fleet?stream=true") as response:
            assert response.content_type == "text/event-stream"
            seen = [int((await response.content.readuntil(b"\n\n")).removeprefix(b"data: ")) for _ in range(3)]
            assert seen == sorted(set(seen))
            assert await face.gate.drain(0.0) == 0, "the drain waits for no watcher"
            rest = await response.content.read()  # ends, where it would go on for ever
            assert rest == b"" or rest.endswith(b"\n\n")
    assert taker.num_forgotten == 2


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    taker = Taker()
    app, _ = application(taker)
    async with calling(app) as client:
        response = await client.get("/v1/fleet?stream=true")
        await response.content.readuntil(b"\n\n")
        response.close()
        async with asyncio.timeout(120):
            while not taker.num_forgotten:
                await asyncio.sleep(0.01)


def scrape(at: float, **samples: dict[tuple[str, str] | None, float]) -> Scrape:
    return Scrape(
        "", at, {name: {(key,) if key else (): value for key, value in of.items()} for name, of in samples.items()}
    )


def test_figures_are_of_the_window_and_unknown_ones_are_null() -> None:
    buckets = {("le", "0.1"): 5.0, ("le", "0.2"): 5.0, ("le", "+Inf"): 5.0}
    later = {("le", "0.1"): 5.0, ("le", "0.2"): 15.0, ("le", "+Inf"): 15.0}
    old = scrape(
        0.0, scalellm_generation_tokens_total={None: 10.0}, scalellm_time_to_first_token_seconds_bucket=buckets
    )
    new = scrape(
        4.0,
        scalellm_generation_tokens_total={None: 90.0},
        scalellm_time_to_first_token_seconds_bucket=later,
        scalellm_tokenizer_requests_running={None: 3.0},
    )
    figures = window_figures(Window([old], [new]))
    assert figures["running"] == 3.0
    assert figures["generation_tokens_per_s"] == 20.0
    assert figures["ttft_ms"] == {"p50": 150.0, "p90": 190.0, "p99": 199.0}
    assert figures["itl_ms"] is figures["finished_per_s"] is None
    json.dumps(figures, allow_nan=False)


def test_figures_of_a_model_are_its_own() -> None:
    def scraped(at: float, **tokens: float) -> Scrape:
        series = {(("model_name", name),): value for name, value in tokens.items()}
        times = {
            (("le", le), ("model_name", name)): value / 10
            for name, value in tokens.items()
            for le in ({"one": "0.1", "two": "0.2"}[name], "+Inf")
        }
        samples = {"scalellm_generation_tokens_total": series, "scalellm_time_to_first_token_seconds_bucket": times}
        return Scrape("", at, samples)

    window = Window([scraped(0.0, one=0.0, two=0.0)], [scraped(4.0, one=80.0, two=40.0)])
    one, two = (model_figures(window, model_name=name) for name in ("one", "two"))
    assert (one["generation_tokens_per_s"], two["generation_tokens_per_s"]) == (20.0, 10.0)
    assert window_figures(window)["generation_tokens_per_s"] == 30.0
    assert one["ttft_ms"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert two["ttft_ms"] == {"p50": 150.0, "p90": 190.0, "p99": 199.0}


def executor(number: int, phase: Any = READY, **fields: Any) -> scheduler_pb2.ExecutorState:
    load = link_pb2.Load(free_blocks=25, total_blocks=100, waiting=2)
    return scheduler_pb2.ExecutorState(
        address=f"10.0.{number // 256}.{number % 256}:50061", phase=phase, load=load, **fields
    )


def test_a_scheduler_tells_of_its_executors_and_first_of_those_that_need_attention() -> None:
    lost = scheduler_pb2.ExecutorState(address="10.1.0.0:50061", phase=CONNECTING, last_error="gone")
    state = scheduler_pb2.GetStateResponse(
        instance_id="s",
        queued=3,
        running=4,
        executors=[*(executor(number, tokens=7, model="m") for number in range(999)), lost],
        models=[scheduler_pb2.ModelState(model="m", queued=3, running=4)],
        clients=[scheduler_pb2.ClientState(service=f"t:{number}", workers=2, running=1) for number in range(99)],
    )
    told: Any = scheduler_json("10.0.0.1:50052", state)
    assert (told["queued"], told["running"], told["num_executors"]) == (3, 4, 1000)
    assert told["phases"] == {"ready": 999, "connecting": 1}
    assert told["executors"][0]["last_error"] == "gone"
    assert told["executors"][0]["kv_usage"] is None, "its load is not known"
    assert [told["executors"][1][field] for field in ("kv_usage", "tokens", "model")] == [0.75, 7, "m"]
    assert told["models"] == [{"model": "m", "queued": 3, "running": 4}]
    assert (told["clients"][0], len(told["clients"])) == ({"service": "t:0", "workers": 2, "running": 1}, 64)
    assert len(told["executors"]) == 256
    assert len(json.dumps(told)) < 100_000
    assert scheduler_json("a:1", "did not answer") == {"address": "a:1", "error": "did not answer"}


@asynccontextmanager
async def scheduler(answer: Any) -> AsyncIterator[str]:
    class Scheduler(scheduler_pb2_grpc.SchedulerServicer):
        async def GetState(self, request: Any, context: Any) -> Any:
            return await answer(context)

    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(Scheduler(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_each_scheduler_is_asked_and_one_that_does_not_tell_hides_no_other(tmp_path: Any) -> None:
    async def tell(context: Any) -> Any:
        return scheduler_pb2.GetStateResponse(instance_id="one", executors=[executor(1)])

    async def refuse(context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: is missing")

    async with scheduler(tell) as good, scheduler(refuse) as locked:
        nobody = "127.0.0.1:1"
        dialers = dict.fromkeys((good, locked, nobody), LinkDialer())
        schedulers: Any = SimpleNamespace(dialers=dialers, service="here:1")
        snapshots = Snapshots(["m", "n"], 2, schedulers, None)
        taken = json.loads(await snapshots.take())
        told = {entry["address"]: entry for entry in taken["schedulers"]}
        assert told[good]["instance_id"] == "one"
        assert "link token" in told[locked]["error"]
        assert told[nobody]["error"]
        assert taken["tokenizer"] == {
            "service": "here:1",
            "models": ["m", "n"],
            "version": taken["tokenizer"]["version"],
            "workers": 2,
            "figures": None,
            "model_figures": {},
        }
        await snapshots.forget()
        schedulers.dialers = {good: LinkDialer()}
        assert [entry["address"] for entry in json.loads(await snapshots.take())["schedulers"]] == [good]
        await snapshots.forget()
