"""The link from one tokenizer worker: its requests, and the frames that go back to it."""

from __future__ import annotations

import asyncio

from scalellm.services.common.link import ServerLink
from scalellm.services.scheduler.books import Books
from scalellm.services.scheduler.request import Request
from scalellm.v1 import link_pb2

# Unlimited credit: the edge must not queue. A request that does not fit into the queue is refused with a time to retry.
_UNLIMITED = 2**63

# Prompts have many log-probabilities: those of several executors together must not make a frame too long.
_MAX_PROMPT_LOGPROBS = 1 << 18

_BEAT = 5.0
_BEAT_FRAME = link_pb2.ServerFrame(step=link_pb2.StepOutput()).SerializeToString()


class ClientLink:
    """Collects the output for one client link and sends it as one StepOutput per iteration of the event loop.

    So one step of an executor becomes one frame per link, and steps of several executors that arrive together become
    one as well.

    While requests run without output, for instance during a long prefill, an empty frame every few seconds shows the
    client that this event loop is alive.

    Args:
        client_id: The incarnation of the upstream process.
        service: Name of its service; empty: not known.
        books: Counts of the scheduler; sent tokens are added to them.
        takes_any_model: True if the client's Hello named no model.
        beat: Seconds between empty frames.
    """

    def __init__(
        self, client_id: str, books: Books, beat: float = _BEAT, *, service: str = "", takes_any_model: bool = True
    ) -> None:
        self.client_id = client_id
        self.service = service
        self.takes_any_model = takes_any_model
        self.server_link = ServerLink(books.client_traffic)
        self._books = books
        self.requests: dict[int, Request] = {}
        self._loop = asyncio.get_running_loop()
        self._seq = 0
        self._flush_due = False
        self._load: link_pb2.Load | None = None
        self._beat_interval = beat
        self._loop.call_later(beat, self._beat)
        self._start_frame()

    def add_tokens(self, handle: int, index: int, offset: int, token_ids: list[int]) -> None:
        """Add new tokens of one sample to the frame."""
        self._handles.append(handle)
        self._indices.append(index)
        self._offsets.append(offset)
        self._counts.append(len(token_ids))
        self._token_ids += token_ids
        if not self._flush_due:
            self._schedule_flush()

    def add_columns(
        self, handles: list[int], indices: list[int], offsets: list[int], counts: list[int], token_ids: list[int]
    ) -> None:
        """Add new tokens of many samples to the frame, as columns."""
        self._handles += handles
        self._indices += indices
        self._offsets += offsets
        self._counts += counts
        self._token_ids += token_ids
        self._schedule_flush()

    def add_logprobs(self, logprobs: link_pb2.LinkLogprobs) -> None:
        """Add log-probabilities of new tokens to the frame."""
        self._logprobs.append(logprobs)
        self._schedule_flush()

    def add_prompt_logprobs(self, logprobs: link_pb2.LinkLogprobs) -> None:
        """Add log-probabilities of a part of a prompt to the frame."""
        self._prompt_logprobs.append(logprobs)
        self._num_prompt_logprobs += len(logprobs.values.logprobs) * (1 + logprobs.values.num_top)
        self._schedule_flush()

    def flush_if_full(self) -> None:
        """Send the collected output if it has many log-probabilities of prompts. Called between frames of executors,
        because what one of them tells together must reach the client together.
        """
        if self._num_prompt_logprobs >= _MAX_PROMPT_LOGPROBS:
            self.flush()

    def add_sample_finish(self, sample_finish: link_pb2.LinkSampleFinish) -> None:
        """Add the end of one sample to the frame."""
        self._finished_samples.append(sample_finish)
        self._schedule_flush()

    def add_finish(self, finish: link_pb2.Finish) -> None:
        """Add the end of a request to the frame and free its handle."""
        self.requests.pop(finish.handle, None)
        self._finished.append(finish)
        self._schedule_flush()

    def announce_draining(self) -> None:
        """Tell the client to send no new requests."""
        self._load = link_pb2.Load(draining=True)
        self._schedule_flush()

    def close(self) -> None:
        """Send the collected output and end the link."""
        self.flush()
        self.server_link.close()

    def flush(self) -> None:
        """Send the collected output now."""
        self._flush_due = False
        if not (
            self._handles
            or self._finished
            or self._finished_samples
            or self._logprobs
            or self._prompt_logprobs
            or self._load
        ):
            return
        self._seq += 1
        if self.server_link.is_closed:
            self._books.tokens_dropped += len(self._token_ids)
        else:
            self._books.tokens_sent += len(self._token_ids)
        step = link_pb2.StepOutput(
            seq=self._seq,
            handles=self._handles,
            indices=self._indices,
            offsets=self._offsets,
            counts=self._counts,
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            finished_samples=self._finished_samples,
            finished=self._finished,
            load=self._load,
        )
        self._start_frame()
        self.server_link.send(link_pb2.ServerFrame(step=step).SerializeToString())

    def _beat(self) -> None:
        if not self.server_link.is_closed:
            if self.requests:
                self.server_link.send(_BEAT_FRAME)
            self._loop.call_later(self._beat_interval, self._beat)

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def _start_frame(self) -> None:
        self._handles: list[int] = []
        self._indices: list[int] = []
        self._offsets: list[int] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[link_pb2.LinkLogprobs] = []
        self._prompt_logprobs: list[link_pb2.LinkLogprobs] = []
        self._num_prompt_logprobs = 0
        self._finished_samples: list[link_pb2.LinkSampleFinish] = []
        self._finished: list[link_pb2.Finish] = []
        self._load = None


def client_load(*, draining: bool) -> link_pb2.Load:
    """The first credits of a client link."""
    return link_pb2.Load(granted_prefill_tokens=_UNLIMITED, granted_requests=_UNLIMITED, draining=draining)
