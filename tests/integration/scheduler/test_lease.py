"""A tokenizer worker that says nothing any more: its requests do not hold executors for ever."""

import contextlib

import grpc

from scalellm.services.common.link import API_MINOR
from scalellm.v1 import common_pb2, link_pb2


async def test_what_no_worker_renews_is_freed(make_line, make_edge, eventually):
    line = await make_line(executor={"step_time": 0.01}, lease_s=0.5)
    call = make_edge(line.server.address).stub.Connect()
    await call.write(link_pb2.ClientFrame(hello=link_pb2.Hello(client_id="silent", api_minor=API_MINOR)))
    assert (await call.read()).welcome.lease_ns == 500_000_000
    sampling = common_pb2.SamplingParams(max_tokens=4000)
    await call.write(link_pb2.ClientFrame(submit=link_pb2.Submit(handle=1, token_ids=[1, 2], sampling=sampling)))
    with contextlib.suppress(grpc.aio.AioRpcError):
        while (frame := await call.read()) is not grpc.aio.EOF:
            assert not frame.step.finished
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await call.details() == "the client of this link has not renewed its lease for 0.5 s"
    await eventually(lambda: line.executors[0].aborts and not line.state().running)
    # The line's own link is one of the version before, which does not renew: it stands.
    stream = await line.edge.submit()
    await line.edge.finish(stream)
    stream.check_tokens(8)
    line.check_books()
