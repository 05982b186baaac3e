"""Frames of the links for fuzzing: the right kind in the right order, and extreme values in their fields."""

from __future__ import annotations

from hypothesis import strategies as st

from extreme_messages import altered
from scalellm.services.common.link import API_MINOR
from scalellm.v1 import common_pb2, link_pb2

HANDLES = (1, 2, 3)
"""Few: so that they are used twice, and aborted while they run."""

TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"

HELLO = link_pb2.ClientFrame(hello=link_pb2.Hello(client_id="fuzz", api_minor=API_MINOR))
SUBMITS = tuple(
    link_pb2.ClientFrame(
        submit=link_pb2.Submit(
            handle=handle,
            request_id=f"r{handle}",
            token_ids=range(1, 2 + handle),
            sampling=common_pb2.SamplingParams(
                max_tokens=4,
                n=handle,
                min_tokens=1,
                seed=7,
                temperature=0.5,
                logprobs=handle - 1,
                logit_bias=[{"token_id": 1, "bias": 0.5}],
                stop_token_ids=[3],
            ),
            resumed=[link_pb2.ResumedSample(index=0, token_ids=[1])][: handle - 1],
            time_remaining_ns=60 * 10**9,
            cache_salt=b"salt",
            traceparent=TRACEPARENT,
            tracestate="a=b",
            session_id="t:s",
            charged_tokens=1,
        )
    )
    for handle in HANDLES
)
ABORTS = tuple(
    link_pb2.ClientFrame(abort=link_pb2.Abort(handle=handle, index=index, reason=reason))
    for handle, index, reason in ((1, None, link_pb2.ABORT_REASON_CANCELLED), (2, 1, link_pb2.ABORT_REASON_STOP))
)

client_frames = st.one_of(altered(SUBMITS), altered((*SUBMITS, *ABORTS, HELLO)))
"""Frames that may follow a Hello."""

LOGPROBS = common_pb2.TokenLogprobs(logprobs=[-1.0], num_top=1, top_token_ids=[1], top_logprobs=[-1.0])
STEPS = (
    link_pb2.StepOutput(
        seq=1, handles=HANDLES, indices=[0, 1, 2], offsets=[0, 0, 0], counts=[1, 1, 1], token_ids=[1, 2, 3]
    ),
    link_pb2.StepOutput(
        handles=[2],
        indices=[0],
        offsets=[0],
        counts=[1],
        token_ids=[1],
        logprobs=[link_pb2.LinkLogprobs(handle=2, index=0, offset=0, values=LOGPROBS)],
        prompt_logprobs=[link_pb2.LinkLogprobs(handle=2, index=0, offset=0, values=LOGPROBS)],
    ),
    link_pb2.StepOutput(
        finished_samples=[
            link_pb2.LinkSampleFinish(handle=1, index=0, reason=common_pb2.FINISH_REASON_STOP, stop_token_id=1)
        ],
        finished=[
            link_pb2.Finish(
                handle=1,
                status=link_pb2.LinkStatus(),
                usage=common_pb2.Usage(prompt_tokens=2, completion_tokens=1),
                timings=link_pb2.HopTimings(executor_total_ns=4, queue_ns=1, prefill_ns=1, decode_ns=1),
            )
        ],
        load=link_pb2.Load(
            free_blocks=5, total_blocks=9, granted_prefill_tokens=2**40, granted_requests=2**40, draining=False
        ),
    ),
    link_pb2.StepOutput(
        finished=[link_pb2.Finish(handle=3, status=link_pb2.LinkStatus(code=8, message="full", retry_after_ns=5))]
    ),
)
WELCOME = link_pb2.Welcome(
    instance_id="fuzz", api_minor=API_MINOR, model="m", vocab_size=100,
    block_size=4, num_blocks=9, max_model_len=64, max_num_seqs=4,
    load=link_pb2.Load(granted_prefill_tokens=2**40, granted_requests=2**40),
)  # fmt: skip

steps = altered(STEPS)
"""Frames that may follow a Welcome."""
