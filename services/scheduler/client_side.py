"""The client's side of a request: the tokens it was sent, and the samples it asked to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import MAX_SAMPLES, RequestProgress
from scalellm.v1 import common_pb2, link_pb2

if TYPE_CHECKING:
    from scalellm.services.scheduler.client_link import ClientLink

_ENDS = {
    link_pb2.ABORT_REASON_STOP: common_pb2.FINISH_REASON_STOP,
    link_pb2.ABORT_REASON_DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
}


class ClientSide:
    """The part of a request that the per-token path touches; it knows nothing of executors.

    Attributes:
        link: The client link it came on.
        handle: Its handle there.
        progress: Tokens and ended samples that were sent to the client.
        emitted: The tokens of `progress`, by sample.
        stopping_samples: Samples that the client asked to end and whose end was not sent to it yet.
        cancelled: Reason for which the client ended the whole request; None = it did not.
    """

    __slots__ = ("cancelled", "emitted", "handle", "link", "progress", "stopping_samples")

    def __init__(self, link: ClientLink, submit: link_pb2.Submit) -> None:
        num_samples = submit.sampling.n if submit.sampling.HasField("n") else 1
        self.link = link
        self.handle: int = submit.handle
        self.progress = RequestProgress(min(num_samples, MAX_SAMPLES), len(submit.token_ids))
        self.emitted = self.progress.tokens
        self.stopping_samples: dict[int, common_pb2.FinishReason] = {}
        self.cancelled: StatusError | None = None

    def request_end(self, abort: link_pb2.Abort) -> bool:
        """Remember an Abort of the client, in case the executor dies before it answers. Returns False if it is of a
        sample that has ended, or that there is not.
        """
        if abort.HasField("index"):
            if abort.index >= len(self.emitted) or self.progress.ended[abort.index]:
                return False
            self.stopping_samples[abort.index] = _ENDS.get(abort.reason, common_pb2.FINISH_REASON_CANCELLED)
        elif abort.reason == link_pb2.ABORT_REASON_STOP:
            for index, ended in enumerate(self.progress.ended):
                if not ended:
                    self.stopping_samples[index] = common_pb2.FINISH_REASON_STOP
        elif abort.reason == link_pb2.ABORT_REASON_DEADLINE:
            self.cancelled = StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        else:
            self.cancelled = StatusError(grpc.StatusCode.CANCELLED, "the client cancelled the request")
        return True

    def settle_stopping(self) -> None:
        """Send the client the ends of the samples that it aborted, because their executor is lost and cannot."""
        for index, reason in sorted(self.stopping_samples.items()):
            self.progress.end_sample(index, reason)
            self.link.add_sample_finish(link_pb2.LinkSampleFinish(handle=self.handle, index=index, reason=reason))
        self.stopping_samples.clear()
