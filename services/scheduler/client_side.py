"""The client's side of a request: what it has been sent, and what it wants to end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc

from scalellm.v1 import common_pb2, link_pb2
from services.common.errors import StatusError
from services.common.link import MAX_SAMPLES

if TYPE_CHECKING:
    from services.scheduler.client_link import ClientLink

_ENDS = {
    link_pb2.ABORT_REASON_STOP: common_pb2.FINISH_REASON_STOP,
    link_pb2.ABORT_REASON_DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
}


class ClientSide:
    """What the per-token path touches of a request; it knows nothing of executors.

    Attributes:
        link: The client link it came on.
        handle: Its handle there.
        num_prompt_tokens: Tokens of the prompt.
        emitted: Tokens that the client has, by sample.
        ended_samples: Samples whose end the client knows, and why they ended.
        stopping_samples: Samples that the client wanted to end and whose end it was not told yet.
        logprobs_passed: Tokens whose log-probabilities the client has, by sample.
        prompt_logprobs_passed: The same for the prompt.
        cancelled: Why the client wanted the whole request to end; None = it did not.
    """

    __slots__ = (
        "cancelled",
        "emitted",
        "ended_samples",
        "handle",
        "link",
        "logprobs_passed",
        "num_prompt_tokens",
        "prompt_logprobs_passed",
        "stopping_samples",
    )

    def __init__(self, link: ClientLink, submit: link_pb2.Submit) -> None:
        num_samples = submit.sampling.n if submit.sampling.HasField("n") else 1
        self.link = link
        self.handle: int = submit.handle
        self.num_prompt_tokens = len(submit.token_ids)
        self.emitted: list[list[int]] = [[] for _ in range(min(num_samples, MAX_SAMPLES))]
        self.ended_samples: dict[int, common_pb2.FinishReason] = {}
        self.stopping_samples: dict[int, common_pb2.FinishReason] = {}
        self.logprobs_passed: dict[int, int] = {}
        self.prompt_logprobs_passed = 0
        self.cancelled: StatusError | None = None

    def resume(self, samples: Iterable[link_pb2.ResumedSample]) -> None:
        """Take over what the client had before this scheduler got the request."""
        for sample in samples:
            self.emitted[sample.index] = list(sample.token_ids)
            self.logprobs_passed[sample.index] = len(sample.token_ids)
            if sample.finished:
                self.ended_samples[sample.index] = sample.finished

    @property
    def num_emitted(self) -> int:
        """Tokens that the client has, over all samples."""
        return sum(map(len, self.emitted))

    @property
    def all_samples_ended(self) -> bool:
        """Whether only the Finish is missing."""
        return len(self.ended_samples) == len(self.emitted)

    def request_end(self, abort: link_pb2.Abort) -> None:
        """Remember an Abort of the client, in case the executor dies before it answers."""
        if abort.HasField("index"):
            if abort.index < len(self.emitted) and abort.index not in self.ended_samples:
                self.stopping_samples[abort.index] = _ENDS.get(abort.reason, common_pb2.FINISH_REASON_CANCELLED)
        elif abort.reason == link_pb2.ABORT_REASON_STOP:
            for index in range(len(self.emitted)):
                if index not in self.ended_samples:
                    self.stopping_samples[index] = common_pb2.FINISH_REASON_STOP
        elif abort.reason == link_pb2.ABORT_REASON_DEADLINE:
            self.cancelled = StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        else:
            self.cancelled = StatusError(grpc.StatusCode.CANCELLED, "the client cancelled the request")

    def settle_stopping(self) -> None:
        """End, towards the client, the samples that it wanted to end: no executor will answer to that any more."""
        for index, reason in sorted(self.stopping_samples.items()):
            self.ended_samples[index] = reason
            self.link.add_sample_finish(link_pb2.LinkSampleFinish(handle=self.handle, index=index, reason=reason))
        self.stopping_samples.clear()
