"""A request's spans name the schedulers that it lost."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import grpc

from fake_scheduler_link import Line, unconnected
from otlp import read_trace_file
from scalellm.services.common.errors import StatusError
from scalellm.services.common.logs import RequestFields
from scalellm.services.common.settings import ServiceSettings
from scalellm.services.common.tracing import open_tracer
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.request_log import RequestEnd
from scalellm.services.tokenizer.request_trace import RequestTrace
from scalellm.v1 import common_pb2, generation_pb2, link_pb2


class SomeCaller(Caller):
    transport, method = "grpc", "scalellm.v1.Generation/Generate"
    span_attributes = MappingProxyType({"rpc.system.name": "grpc"})
    metadata = ()

    def time_remaining(self) -> float | None:
        return None


async def test_each_resubmission_is_an_event_with_its_attempt_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with unconnected(), open_tracer("tokenizer", ServiceSettings(trace_file=path), 1.0) as tracer:
        line = Line(2)
        for peer in line.peers:
            await peer.come_up()
        times = LatencyTrace(lambda: line.now)
        trace = RequestTrace.begin(tracer, SomeCaller(), times, "m")
        trace.submit()
        receiver = line.submit()
        (first,) = [peer for peer in line.peers if peer.running]
        (second,) = [peer for peer in line.peers if peer is not first]
        first.step(3)
        line.now = 2_000_000
        first.die(StatusError.unavailable("Socket closed"))
        line.now = 3_000_000
        await first.come_up()
        second.give_back()
        while receiver.finish is None:
            first.step()
        times.leave_below(receiver)
        sampling = common_pb2.SamplingParams()
        request = generation_pb2.GenerateRequest(prompt="secret", sampling=sampling)
        end = RequestEnd(request, None, times.breakdown(receiver.finish.timings), None)
        trace.end(end, RequestFields(), receiver.finish, [])
        line.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    below, call = (span for span in read_trace_file(path) if span.name != "detokenize")
    assert (below.name, below.attributes["rpc.response.status_code"]) == ("scalellm.v1.Scheduler/Connect", "OK")
    addresses = [peer.link.address for peer in (first, second)]
    assert below.event_attributes == [
        ("resubmitted", {"server.address": addresses[1], "scalellm.attempt": 1, "scalellm.reason": "Socket closed"}),
        ("resubmitted", {"server.address": addresses[0], "scalellm.attempt": 2, "scalellm.reason": "killed"}),
    ]
    assert below.events["resubmitted"] - below.start == 3_000_000 - 1
    assert call.attributes["scalellm.resubmissions"] == 2
    assert call.attributes["rpc.response.status_code"] == grpc.StatusCode.OK.name
