"""The breakdown adds up whatever the hops report."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.tokenizer.latency import LatencyTrace, server_timing
from scalellm.v1 import common_pb2, link_pb2

NOT_PARTS = {"total_ns", "preempted_ns", "ttft_ns", "detokenize_cpu_ns", "executor_id"}
HOPS = ("admission_ns", "queue_ns", "prefill_ns", "decode_ns", "failover_ns")
durations = st.integers(0, 10**12)


class Clock:
    def __init__(self) -> None:
        self.now = 5_000

    def __call__(self) -> int:
        return self.now


def sum_of_parts(latency: common_pb2.LatencyBreakdown) -> int:
    fields = [field.name for field in latency.DESCRIPTOR.fields if field.name not in NOT_PARTS]
    return sum(getattr(latency, name) for name in fields)


@given(
    steps=st.lists(durations, min_size=5, max_size=5),
    hops=st.fixed_dictionaries(dict.fromkeys(HOPS, durations)),
    reached=st.integers(0, 3),
)
def test_parts_add_up(steps, hops, reached):
    clock = Clock()
    trace = LatencyTrace(clock)
    arrived = clock.now
    clock.now += steps[0]
    trace.session_ns = steps[0] // 2
    trace.tokenize_ns = steps[0] - trace.session_ns
    if reached >= 1:
        trace.submitted_at = clock.now
    clock.now += steps[1]
    if reached >= 2:
        trace.first_token_at = trace.last_token_at = clock.now
        clock.now += steps[2]
        trace.last_token_at = clock.now
    clock.now += steps[3]
    latency = trace.breakdown(link_pb2.HopTimings(**hops) if reached == 3 else None)
    assert latency.total_ns == clock.now - arrived
    assert sum_of_parts(latency) == latency.total_ns
    if reached == 3:
        assert latency.detokenize_ns == steps[3]
        assert latency.ttft_ns == steps[0] + steps[1]
        if sum(hops.values()) <= steps[1] + steps[2]:
            assert {name: getattr(latency, name) for name in HOPS} == hops
            assert latency.network_ns == steps[1] + steps[2] - sum(hops.values())


@given(name=st.text(max_size=20))
def test_server_timing_is_well_formed(name):
    latency = common_pb2.LatencyBreakdown(total_ns=1_500_000, queue_ns=250_000, ttft_ns=3, executor_id=name)
    value = server_timing(latency, common_pb2.Usage(cached_tokens=7))
    assert value.isascii()
    entry = r'[a-z]+(;dur=\d+\.\d{3}|;desc=(\d+|"[^"\\]*"))'
    assert re.fullmatch(f"{entry}(, {entry})*", value)
    assert value.startswith("queue;dur=0.250, total;dur=1.500")
    assert value.endswith("cached;desc=7, preemptions;desc=0")


def test_unfinished_request_blames_nobody():
    latency = common_pb2.LatencyBreakdown(total_ns=10**6, tokenize_ns=1000, network_ns=999_000)
    assert server_timing(latency, None, is_complete=False) == "tokenize;dur=0.001, total;dur=1.000"
