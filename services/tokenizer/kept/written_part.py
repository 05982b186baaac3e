"""The part of one request's results that its journal has, as far as this worker knows."""

from __future__ import annotations

import time

from scalellm.services.common.api_keys import Tenant
from scalellm.services.tokenizer.kept.journal import Entry, Head, Journal, Reading, Written, no_request
from scalellm.services.tokenizer.kept.transcript import Transcript
from scalellm.v1 import generation_pb2, link_pb2


class WrittenPart:
    """Makes the entries that complete a journal.

    Args:
        tenant: The tenant.
        head: The request.
        transcript: Its results.

    Attributes:
        num_writes: Number of entries so far.
        renewed_at: Time of the last write, in seconds of the monotonic clock.
    """

    def __init__(self, tenant: Tenant, head: Head, transcript: Transcript) -> None:
        self._tenant = tenant
        self._head = head
        self._transcript = transcript
        self._mark = self._next_mark = transcript.begin()
        self._num_bytes = 0
        self.num_writes = 0
        self.renewed_at = time.monotonic()

    def next_entry(
        self, fence: int, end: generation_pb2.Finished | link_pb2.LinkStatus | None, *, gives_up: bool = False
    ) -> Entry:
        """Return an entry with the next results that the journal lacks; see Entry for the arguments, which are of the
        last one of these entries.
        """
        step, self._next_mark = self._transcript.since(self._mark)
        if self._next_mark != self._transcript.mark:
            end, gives_up = None, False
        self.num_writes += 1
        submit, number, data = self._head.submit, self.num_writes, step.SerializeToString()
        return Entry(
            self._tenant, submit.request_id, submit.execution_id, fence, number, self._num_bytes, data, end, gives_up
        )

    def wrote(self, num_bytes: int) -> None:
        """Record that the last entry was written, after which the tail has `num_bytes` bytes."""
        self._mark, self._num_bytes = self._next_mark, num_bytes

    def forget(self) -> None:
        """Record that the journal has nothing."""
        self._mark, self._num_bytes = self._transcript.begin(), 0

    async def write_rest(
        self, journal: Journal, fence: int, end: generation_pb2.Finished | link_pb2.LinkStatus | None
    ) -> None:
        """Write all that the journal lacks, with the end, or so that others may take the request over at once. Raises
        StatusError.
        """
        while True:
            ((outcome, num_bytes),) = await journal.write([self.next_entry(fence, end, gives_up=end is None)])
            if outcome not in (Written.DONE, Written.CANCELLED):
                return
            self.wrote(num_bytes)
            if self._mark == self._transcript.mark:
                return

    async def read_all(self, journal: Journal) -> None:
        """Read the journal from its beginning, and add that to the results.

        This worker may know more, if it ran the request before. Raises StatusError NOT_FOUND if what was read is not of
        this execution, or lacks something; UNAVAILABLE.
        """
        known, edition, is_whole = Transcript(self._head.submit), "", False
        self._num_bytes = 0
        while not is_whole:
            reading = await journal.read(self._tenant, self._head.request_id, self._num_bytes, edition)
            if reading is None or reading.edition != edition:  # the first piece; or it was lost, and created again
                known, self._num_bytes = Transcript(self._head.submit), 0
            if reading is None:
                break
            self.apply(reading, known)
            self.apply(reading, self._transcript)
            self._num_bytes, edition, is_whole = reading.num_bytes, reading.edition, reading.is_whole
        self._mark = known.mark
        self.renewed_at = time.monotonic()

    def apply(self, reading: Reading, transcript: Transcript) -> None:
        """Add what was read to a transcript. Raises StatusError NOT_FOUND as `read_all` does."""
        if reading.execution != self._head.submit.execution_id:
            raise no_request(self._head.request_id)
        try:
            transcript.apply(reading.steps)
        except (ValueError, IndexError):
            raise no_request(self._head.request_id) from None
