"""The scheduler's answers to KEDA over gRPC: how many executors there should be, by what waits and runs."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from keda_calls import Keda
from scalellm.keda import externalscaler_pb2 as pb
from scalellm.services.common.access import METHODS
from scalellm.services.common.link import API_MINOR
from scalellm.services.scheduler.scaling import ALL
from scalellm.services.scheduler.unserved import Unserved
from scalellm.v1 import link_pb2, scheduler_pb2

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


async def test_keda_hears_of_executors_that_are_wanted(make_line, eventually):
    line = await make_line(executor={"max_running": 10, "credit_tokens": 10_000})
    (executor,) = line.executors
    named = f"localhost:{executor.address.rpartition(':')[2]}"
    await line.server.service.AddExecutor(scheduler_pb2.AddExecutorRequest(address=named), None)
    async with grpc.aio.insecure_channel(line.server.address) as channel:
        keda, of_name = Keda(channel), Keda(channel, executors=named)
        watch = keda.watch()
        assert (await watch.read()).result is False
        assert (await keda.wanted(), await keda.is_active()) == (0, False)
        executor.hold()
        streams = [await line.edge.submit(10, 5) for _ in range(30)]
        assert (await watch.read()).result is True
        # 10 run on the executor, which holds no more; 20 wait: three executors' worth, of which 80 % is four.
        states = line.server.scaling
        await eventually(lambda: {state.wanted for state in states.states.values()} == {4})
        assert set(states.states) == {ALL, named}
        assert states.states[named].saturation == pytest.approx(3.0)
        assert (await keda.wanted(), await of_name.wanted(), await of_name.is_active()) == (4, 4, True)
        await eventually(lambda: states.states[ALL].oldest_s > 0.0)
        executor.release()
        await line.edge.finish(*streams)
        await eventually(lambda: states.states[ALL].saturation == 0.0)
        assert await keda.wanted() == 4  # for a minute
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await Keda(channel, executors="nobody:1").wanted()
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        assert "nobody:1" in refusal.value.details()
        watch.cancel()


async def test_a_request_that_finds_no_executor_wants_one(make_line, eventually):
    line = await make_line()
    await line.executors[0].die()
    (dispatcher,) = line.server.dispatchers
    await eventually(lambda: dispatcher.placement.outages.of_all.is_given_up)
    async with grpc.aio.insecure_channel(line.server.address) as channel:
        assert not await Keda(channel).is_active()
        refused = await line.edge.submit(10, 5)
        await line.edge.finish(refused)
        assert refused.code == UNAVAILABLE
        line.server.scaling.look()
        assert (await Keda(channel).wanted(), await Keda(channel).is_active()) == (1, True)


async def test_a_worker_whose_link_nobody_takes_tells_of_its_requests(make_scheduler, make_edge, eventually):
    server = await make_scheduler()
    await eventually(lambda: all(each.placement.outages.of_all.is_given_up for each in server.dispatchers))
    async with grpc.aio.insecure_channel(server.address) as channel:
        keda = Keda(channel)
        for unserved, is_active in ((0, False), (2, True)):
            hello = link_pb2.Hello(client_id="worker", api_minor=API_MINOR, unserved=unserved)
            call = make_edge(server.address).stub.Connect()
            await call.write(link_pb2.ClientFrame(hello=hello))
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            server.scaling.look()
            assert await keda.is_active() is is_active
        assert await keda.wanted() == 1


def test_only_new_requests_of_a_worker_count():
    unserved = Unserved()
    told = [unserved.has_more(link_pb2.Hello(client_id="worker", unserved=count)) for count in (0, 2, 2, 3, 3)]
    assert told == [False, True, False, True, False]
    assert unserved.has_more(link_pb2.Hello(client_id="other", unserved=1))


def test_every_method_is_open_to_keda():
    service = pb.DESCRIPTOR.services_by_name["ExternalScaler"]
    for method in service.methods:
        assert METHODS[f"/{service.full_name}/{method.name}"] == frozenset()


def test_metadata_is_read_as_the_map_that_keda_sends():
    file = descriptor_pb2.FileDescriptorProto(name="keda.proto", package="keda", syntax="proto3")
    scaled = file.message_type.add(name="ScaledObjectRef")
    entry = scaled.nested_type.add(name="ScalerMetadataEntry", options={"map_entry": True})
    field = descriptor_pb2.FieldDescriptorProto
    for number, name in enumerate(("key", "value"), 1):
        entry.field.add(name=name, number=number, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    type_name = ".keda.ScaledObjectRef.ScalerMetadataEntry"
    scaled.field.add(
        name="scalerMetadata", number=3, label=field.LABEL_REPEATED, type=field.TYPE_MESSAGE, type_name=type_name
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    sent = message_factory.GetMessageClass(pool.FindMessageTypeByName("keda.ScaledObjectRef"))
    values = {"scalerAddress": "scheduler:50052", "executors": "gpu:50061"}
    read = pb.ScaledObjectRef.FromString(sent(scalerMetadata=values).SerializeToString())
    assert {entry.key: entry.value for entry in read.scalerMetadata} == values
