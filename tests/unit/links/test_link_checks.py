"""Refusals of a link: a bad request alone and by its field, a malformed frame with its link."""

from __future__ import annotations

import grpc
import pytest

from link_frames import STEPS, SUBMITS, TRACEPARENT, WELCOME
from link_fuzz import play_to_engine, play_to_scheduler
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR, LONGEST_NS, check_submit, lease_of, read_hello
from scalellm.services.common.link.server_frames import read_step, read_welcome
from scalellm.v1 import common_pb2, link_pb2

INVALID = str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


def submit_with(**fields: object) -> link_pb2.Submit:
    sampling = common_pb2.SamplingParams(max_tokens=2, n=2, seed=1)
    return link_pb2.Submit(**({"handle": 1, "token_ids": [1, 2], "sampling": sampling} | fields))


BAD_SUBMITS = {
    "token_ids": {"token_ids": []},
    "request_id": {"request_id": "x" * 257},
    "session_id": {"session_id": "é" * 129},
    "cache_salt": {"cache_salt": b"x" * 65},
    "tenant": {"tenant": b"x" * 65},
    "execution_id": {"execution_id": b"x" * 15},
    "prediction_token_ids": {"prediction_token_ids": [1] * (2**16 + 1)},
    "priority": {"priority": -101},
    "tenant_weight": {"tenant_weight": 0.0},
    "time_remaining_ns": {"time_remaining_ns": 2**64 - 1},
    "charged_tokens": {"charged_tokens": 3},
    "traceparent": {"traceparent": TRACEPARENT[:-2] + "zz"},
    "tracestate": {"tracestate": "a" * 513},
    "sampling.n": {"sampling": common_pb2.SamplingParams(n=17)},
    "resumed.index": {"resumed": [link_pb2.ResumedSample(index=1), link_pb2.ResumedSample(index=1)]},
    "resumed.token_ids": {"resumed": [link_pb2.ResumedSample(index=1, token_ids=[1, 2, 3])]},
    "resumed.finished": {"resumed": [link_pb2.ResumedSample(finished=99)]},
}


@pytest.mark.parametrize("field", BAD_SUBMITS)
def test_a_bad_request_ends_alone_and_its_field_is_named(field: str) -> None:
    submit = submit_with(**BAD_SUBMITS[field])
    with pytest.raises(StatusError) as refused:
        check_submit(submit)
    assert (refused.value.code, refused.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    good = link_pb2.ClientFrame(submit=submit_with(handle=2))
    frames = [link_pb2.ClientFrame(submit=submit), good]
    assert play_to_engine(frames) == {INVALID: 1, "0": 1}
    assert play_to_scheduler(frames, []) == {f"code {INVALID}": 1, "code 0": 2}  # with the neighbour's


def test_what_is_at_its_limit_is_served() -> None:
    submit = submit_with(
        request_id="x" * 256,
        session_id="x" * 256,
        cache_salt=b"x" * 64,
        tenant=b"x" * 64,
        execution_id=b"x" * 16,
        attempt=2**32 - 1,
        priority=100,
        tenant_weight=100,
        time_remaining_ns=LONGEST_NS,
        charged_tokens=2,
        traceparent=TRACEPARENT,
        tracestate="a" * 512,
        resumed=[link_pb2.ResumedSample(index=1, token_ids=[1])],
        prediction_token_ids=[1] * 2**16,
    )
    check_submit(submit)
    frames = [link_pb2.ClientFrame(submit=submit)]
    assert play_to_engine(frames) == {"0": 1}
    assert play_to_scheduler(frames, []) == {"code 0": 2}


def test_a_request_that_cannot_be_sent_ends_and_takes_no_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with one, those behind it are sent."""
    from scalellm.services.scheduler.request import Request

    make_submit = Request.make_submit

    def fail_for_the_first(self: Request, *arguments: object, ahead: bool) -> link_pb2.Submit:
        if self.client.handle == 1:
            raise ValueError("out of range")
        return make_submit(self, *arguments, ahead=ahead)  # type: ignore[arg-type]

    monkeypatch.setattr(Request, "make_submit", fail_for_the_first)
    with pytest.raises(AssertionError, match="out of range"):  # it is logged as the fault that it is
        play_to_scheduler(SUBMITS[:1], [])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"handles": [1], "indices": [0], "offsets": [0], "counts": [2], "token_ids": [5]}, "sum of counts"),
        ({"handles": [1], "indices": [0], "offsets": [0], "counts": [1], "token_ids": [5, 6]}, "sum of counts"),
        ({"handles": [1], "indices": [0], "counts": [1], "token_ids": [5]}, "differ in length"),
        ({"handles": [1, 2], "indices": [0], "offsets": [0], "counts": [1], "token_ids": [5]}, "differ in length"),
        ({"handles": [1], "indices": [0], "offsets": [0], "counts": [1], "token_ids": [100]}, "vocabulary size 100"),
        ({"logprobs": [{"values": {"logprobs": [0.0], "num_top": 2, "top_token_ids": [1, 2]}}]}, "num_top"),
        ({"finished_samples": [{"reason": 0}]}, "FinishReason"),
        ({"finished_samples": [{"reason": 6}]}, "FinishReason"),
        ({"finished": [{"status": {"code": 17}}]}, "google.rpc.Code"),
        ({"finished": [{"status": {"code": 8, "retry_after_ns": 2**64 - 1}}]}, "retry_after_ns"),
        ({"finished": [{"status": {"code": 8, "message": "x" * 2049}}]}, "status.message: must have at most 2048"),
        ({"finished": [{"status": {"code": 3, "field": "x" * 1025}}]}, "status.field: must have at most 1024"),
        ({"finished": [{"tenant_full_ns": LONGEST_NS + 1}]}, "tenant_full_ns"),
        ({"finished": [{"timings": {"preempted_ns": LONGEST_NS + 1}}]}, "preempted_ns"),
        ({"finished": [{"timings": {"executor_id": "x" * 1025}}]}, "executor_id"),
    ],
)
def test_a_malformed_step_says_what_is_wrong(step: dict, words: str) -> None:
    frame = link_pb2.ServerFrame(step=link_pb2.StepOutput(**step)).SerializeToString()
    with pytest.raises(StatusError, match=words) as refused:
        read_step(frame, 100)
    assert refused.value.code is grpc.StatusCode.INTERNAL
    outcome = play_to_scheduler([link_pb2.ClientFrame(submit=submit_with())], [link_pb2.StepOutput(**step)])
    assert outcome == {"executor link cut": 1, "code 0": 2}  # the requests move, and are served


@pytest.mark.parametrize("step", STEPS)
def test_what_a_scheduler_or_executor_sends_is_read(step: link_pb2.StepOutput) -> None:
    assert read_step(link_pb2.ServerFrame(step=step).SerializeToString(), 100) == step


@pytest.mark.parametrize("field", ["block_size", "num_blocks", "max_model_len", "max_num_seqs", "vocab_size"])
def test_a_welcome_must_describe_a_model(field: str) -> None:
    welcome = link_pb2.Welcome()
    welcome.CopyFrom(WELCOME)
    assert read_welcome(link_pb2.ServerFrame(welcome=welcome).SerializeToString()) == welcome
    welcome.ClearField(field)
    with pytest.raises(StatusError, match=f"Welcome.{field}: must be at least"):
        read_welcome(link_pb2.ServerFrame(welcome=welcome).SerializeToString())


@pytest.mark.parametrize("read", [read_welcome, lambda frame: read_step(frame, 100)])
def test_the_first_frame_is_a_welcome_and_the_others_are_steps(read) -> None:
    for frame in (link_pb2.ServerFrame(), link_pb2.ServerFrame(welcome=WELCOME), link_pb2.ServerFrame(step=STEPS[0])):
        if frame.WhichOneof("frame") == ("welcome" if read is read_welcome else "step"):
            continue
        with pytest.raises(StatusError, match="malformed frame"):
            read(frame.SerializeToString())


@pytest.mark.parametrize("length", [1, 2048, 2049, 10**6])
def test_a_message_is_cut_to_what_a_frame_may_carry(length: int) -> None:
    error = StatusError.unavailable("é" * length)
    finish = link_pb2.Finish(handle=1, status=error.to_link())
    step = read_step(link_pb2.ServerFrame(step=link_pb2.StepOutput(finished=[finish])).SerializeToString(), 100)
    said = StatusError.from_link(step.finished[0].status).message
    assert len(said) == min(length, 2048)
    assert said.endswith("..." if length > 2048 else "é")


@pytest.mark.parametrize("minor", [API_MINOR - 1, API_MINOR, API_MINOR + 1])
def test_a_peer_one_minor_version_apart_is_worked_with(minor: int) -> None:
    hello = link_pb2.Hello(client_id="x", api_minor=minor)
    assert read_hello(link_pb2.ClientFrame(hello=hello).SerializeToString()) == hello
    assert (lease_of(hello, 30.0) is None) == (minor < 2)  # who does not renew is not waited for
    welcome = link_pb2.Welcome()
    welcome.CopyFrom(WELCOME)
    welcome.api_minor = minor
    assert read_welcome(link_pb2.ServerFrame(welcome=welcome).SerializeToString()) == welcome


@pytest.mark.parametrize("field", ["client_id", "service"])
def test_a_name_in_a_hello_has_a_longest_length(field: str) -> None:
    def frame(length: int) -> bytes:
        hello = link_pb2.Hello(api_minor=API_MINOR, **{field: "x" * length})
        return link_pb2.ClientFrame(hello=hello).SerializeToString()

    read_hello(frame(256))
    with pytest.raises(StatusError, match=f"hello.{field}.*256") as refused:
        read_hello(frame(257))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_hello_has_a_longest_length_whatever_is_in_it() -> None:
    """The engine may have to wait for many of them."""
    hello = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR)).SerializeToString()
    assert read_hello(hello * 1000).api_minor == API_MINOR
    with pytest.raises(StatusError, match="hello: must have at most 16384 bytes"):
        read_hello(hello * 10_000)


def test_an_older_peer_is_refused_and_both_versions_are_named() -> None:
    old = API_MINOR - 2
    both = f"speaks version {old} of the link's protocol, this service version {API_MINOR}"
    welcome = link_pb2.Welcome()
    welcome.CopyFrom(WELCOME)
    welcome.api_minor = old
    for read, frame in (
        (read_hello, link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=old))),
        (read_welcome, link_pb2.ServerFrame(welcome=welcome)),
    ):
        with pytest.raises(StatusError, match=both) as refused:
            read(frame.SerializeToString())
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
